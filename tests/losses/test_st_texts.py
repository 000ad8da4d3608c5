"""``false_negatives``: what counts as the same text, and which candidates that leaves out, on real tiny models."""

from __future__ import annotations

import itertools

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses as library
from sentence_transformers.sentence_transformer.modules import (
    BoW,
    Normalize,
    Pooling,
    Router,
    StaticEmbedding,
    Transformer,
)
from st_parts import (
    HIDDEN,
    OUT,
    WORDS,
    assert_same,
    build,
    dense,
    features,
    static_model,
    value_and_grads,
    word_tokenizer,
)
from st_vision import message, save_vision_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

from chunked_embed import losses
from chunked_embed.losses._texts import text_ids

EAGER = {"compiled": False}
ALL = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
BOTH = ("query_to_doc", "doc_to_query")
WAYS: dict[str, dict] = {
    "plain": {},
    "unfused": {"fuse_projection": False},
    "chunked": {"chunk_size": 2, "fuse_projection": True},
    "cached": {"mini_batch_size": 4},
    "by tokens": {"mini_batch_num_tokens": 25},
}
DIRECTIONS: dict[str, dict] = {
    "one way": {},
    "joint": {"directions": BOTH},
    "each": {"directions": BOTH, "partition_mode": "per_direction"},
    "all four": {"directions": ALL},
}

QUERIES = ["a cat", "the dog runs", "a cat", "red bird", "sea", "old tree"]
DOCUMENTS = ["cat sits", "dog over sea", "cat under tree", "cat sits", "red bird", "old old tree"]
NEGATIVES = ["dog over sea", "tree", "cat sits", "sea", "sea", "old old tree"]
TEXTS = [QUERIES, DOCUMENTS, NEGATIVES]


def ours(model: nn.Module, **options) -> losses.MultipleNegativesRankingLoss:
    return losses.MultipleNegativesRankingLoss(model, **EAGER | options)


@pytest.fixture
def model(transformer_dir: str) -> SentenceTransformer:
    return build(transformer_dir, dense(), Normalize())


# --- what is left out -------------------------------------------------------------------------------------------------


def left_out(way: str, texts: list[list[str]], i: int, j: int, k: int = 0) -> bool:
    """Whether row i leaves out the query of row j, or its k-th document."""
    (qi, di), (qj, dj), candidate = ((texts[0][i], texts[1][i]), (texts[0][j], texts[1][j]), texts[1 + k][j])
    if way == "query_to_doc":
        return (j, k) != (i, 0) and (candidate in (qi, di) or (i != j and qi == qj))
    if way == "doc_to_query":  # the same pair of texts
        return left_out("query_to_doc", texts, j, i)
    if way == "query_to_query":
        return i == j or bool({qi, di} & {qj, dj})
    return i == j or qi == qj or candidate in (qi, di) or (di, candidate) == (qj, dj)


class ByHand(nn.Module):
    """One pair at a time."""

    def __init__(
        self,
        model: nn.Module,
        texts: list[list[str]],
        directions: tuple[str, ...] = ("query_to_doc",),
        partition_mode: str = "joint",
    ) -> None:
        super().__init__()
        self.model, self.texts, self.directions, self.each = model, texts, directions, partition_mode != "joint"

    def forward(self, features: list[dict], labels: Tensor | None) -> Tensor:
        columns = [nn.functional.normalize(self.model(column)["sentence_embedding"], dim=1) for column in features]
        s = {(a, b): 20 * columns[a] @ columns[b].T for a in (0, 1) for b in range(len(columns))}
        sides = {"query_to_doc": (0, 1), "doc_to_query": (1, 0), "query_to_query": (0, 0), "doc_to_doc": (1, 1)}
        rows, terms = range(len(columns[0])), []
        for i in rows:
            lses = []
            for way in self.directions:
                side, first = sides[way]
                lists = range(len(columns) - 1) if first else [0]
                kept = [s[side, first + k][i, j] for k in lists for j in rows if not left_out(way, self.texts, i, j, k)]
                lses.append(torch.stack(kept).logsumexp(0) if kept else columns[0].new_tensor(-torch.inf))
            total = torch.stack(lses)
            terms.append((total.mean() if self.each else total.logsumexp(0)) - s[0, 1][i, i])
        return torch.stack(terms).mean()


@pytest.mark.parametrize("directions", DIRECTIONS)
@pytest.mark.parametrize("way", WAYS)
def test_equal_texts(way: str, directions: str, model: SentenceTransformer) -> None:
    for texts in (TEXTS, TEXTS[:2]):
        batch, options = [model.preprocess(column) for column in texts], DIRECTIONS[directions]
        expected = value_and_grads(ByHand(model, texts, **options), model, batch, None, upstream=2.0)
        loss = ours(model, false_negatives="text", **options, **WAYS[way])
        assert_same(value_and_grads(loss, model, batch, None, upstream=2.0), expected)
    plain = ours(model, **options)([dict(column) for column in batch], None)
    assert abs(plain.item() - expected[0].item()) > 1e-3


@pytest.mark.parametrize("extra", [{}, {"mini_batch_size": 4}], ids=str)
def test_with_a_similarity_of_ones_own(extra: dict, model: SentenceTransformer) -> None:
    batch = [model.preprocess(column) for column in TEXTS]
    expected = value_and_grads(ByHand(model, TEXTS, ALL), model, batch, None)
    loss = ours(model, similarity_fct=lambda a, b: a @ b.T, directions=ALL, false_negatives="text", **extra)
    assert_same(value_and_grads(loss, model, batch, None), expected)


def test_ones_own_query_among_the_documents(model: SentenceTransformer) -> None:
    """Two pairs: the second's document is the first's query."""
    batch = [model.preprocess(["a cat", "sea"]), model.preprocess(["red bird", "a cat"])]
    a, b = (model(dict(column))["sentence_embedding"] for column in batch)
    scores = 20 * a @ b.T
    scores[0, 1] = -torch.inf
    expected = nn.functional.cross_entropy(scores, torch.arange(2))
    torch.testing.assert_close(ours(model, false_negatives="text")(batch), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("extra", [{}, {"mini_batch_size": 4}], ids=str)
def test_equal_texts_in_bags(extra: dict) -> None:
    model = static_model()
    batch = [model.preprocess(texts) for texts in TEXTS]
    expected = value_and_grads(ByHand(model, TEXTS), model, batch, None)
    assert_same(value_and_grads(ours(model, false_negatives="text", **extra), model, batch, None), expected)


def test_equal_labels(model: SentenceTransformer) -> None:
    """Rows of one class are no negatives of each other."""
    batch, labels = features(model, 6, 3), torch.tensor([0, -1, 0, 2, -1, 0])
    fresh = itertools.count()
    texts = [[str(label) for label in labels.tolist()], *([f"text {next(fresh)}" for _ in range(6)] for _ in range(2))]
    expected = value_and_grads(ByHand(model, texts), model, batch, None)
    for given in (labels, labels.int(), labels[:, None]):
        for extra in ({}, {"mini_batch_size": 4}):
            loss = ours(model, false_negatives="labels", **extra)
            assert_same(value_and_grads(loss, model, batch, given), expected)


def test_features_that_a_model_has_seen(model: SentenceTransformer) -> None:
    """A wrapper calls its loss several times with the same features, where modules leave what they compute."""
    batch = [model.preprocess(column) for column in TEXTS]
    loss = ours(model, false_negatives="text")
    first, second = loss(batch), loss(batch)
    assert "token_embeddings" in batch[0]
    torch.testing.assert_close(first, second)


DIMS = [4, OUT, 7]


@pytest.mark.parametrize("way", ["plain", "cached inside", "cached outside", "theirs", "theirs, cached"])
def test_matryoshka(way: str, transformer_dir: str) -> None:
    model = build(transformer_dir, dense())
    batch = [model.preprocess(texts) for texts in TEXTS]
    expected = value_and_grads(library.MatryoshkaLoss(model, ByHand(model, TEXTS), DIMS), model, batch, None)
    package = library if way.startswith("theirs") else losses
    inside = {"mini_batch_size": 4} if way in ("cached inside", "theirs, cached") else {}
    outside = {"mini_batch_size": 4} if way == "cached outside" else {}
    loss = package.MatryoshkaLoss(model, ours(model, false_negatives="text", **inside), DIMS, **outside)
    assert_same(value_and_grads(loss, model, batch, None), expected)


def test_matryoshka_of_as_many_columns_as_dimensions(transformer_dir: str) -> None:
    """Ids of as many texts as the embedding is wide are no embeddings."""
    model = build(transformer_dir)
    texts = [QUERIES, *[DOCUMENTS, NEGATIVES] * 8][:HIDDEN]
    batch = [model.preprocess(column) for column in texts]
    assert len(batch) == HIDDEN
    loss = losses.MatryoshkaLoss(model, ours(model, false_negatives="text"), [HIDDEN, 5])
    expected = library.MatryoshkaLoss(model, ByHand(model, texts), [HIDDEN, 5])
    assert_same(value_and_grads(loss, model, batch, None), value_and_grads(expected, model, batch, None))


# --- pictures ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vision_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_vision_model(tmp_path_factory.mktemp("vision"))


@pytest.mark.parametrize("extra", [{}, {"mini_batch_size": 2}], ids=str)
def test_pictures_of_equal_tokens(extra: dict, vision_dir: str) -> None:
    """A row has one picture, two or none; the batch has as many pictures as rows, though not one each."""
    model = SentenceTransformer(modules=[Transformer(vision_dir), Pooling(HIDDEN)], device="cpu").double().train()
    texts = [["1 a cat", "2 a cat", "a cat", "3 sea"], ["3 4 red", "a cat", "red", "3 5 red"]]
    batch = [model.preprocess([message(text) for text in column]) for column in texts]
    if "num_images_per_sample" not in batch[0]:
        pytest.skip("this sentence-transformers counts no pictures: without grids they can't be told apart by row")
    counts = [column["num_images_per_sample"].tolist() for column in batch]
    assert counts == [[1, 1, 0, 1], [2, 0, 0, 2]]
    assert len(batch[1]["pixel_values"]) == len(texts[1])
    same_partition(text_ids(batch), numbered(texts))
    expected = value_and_grads(ByHand(model, texts, ALL), model, batch, None)
    loss = ours(model, false_negatives="text", directions=ALL, **extra)
    assert_same(value_and_grads(loss, model, batch, None), expected)


def test_pictures_alone(vision_dir: str) -> None:
    model = SentenceTransformer(modules=[Transformer(vision_dir), Pooling(HIDDEN)], device="cpu")
    texts = [["1", "2", "3", "1"], ["4", "5", "6", "2"]]
    batch = [model.preprocess([message(text)[0]["content"][0]["image"] for text in column]) for column in texts]
    same_partition(text_ids(batch), numbered(texts))
    # The same pictures beside a row without any, as another column of the data may have it.
    mixed = model.preprocess([message(text) for text in ("1", "2 a cat", "3", "1")])
    ids = text_ids([batch[0], mixed])
    assert (ids[:, 0] == ids[:, 1]).tolist() == [True, False, True, True]


# --- ids --------------------------------------------------------------------------------------------------------------


def numbered(texts: list[list[str]]) -> Tensor:
    """An id for each text, (rows, columns)."""
    seen: dict[str, int] = {}
    return torch.tensor([[seen.setdefault(text, len(seen)) for text in row] for row in zip(*texts)])


def same_partition(a: Tensor, b: Tensor) -> None:
    a, b = a.flatten(), b.flatten()
    assert torch.equal(a[:, None] == a, b[:, None] == b)


def one(**column: object) -> Tensor:
    return text_ids([column])[:, 0]


def test_ids_of_texts(model: SentenceTransformer) -> None:
    batch = [model.preprocess(texts) for texts in TEXTS]
    ids = text_ids(batch)
    assert ids.shape == (6, 3) and ids.dtype == torch.long
    same_partition(ids, numbered(TEXTS))
    # Longer on the right, longer on the left, in one sequence, in a bag, alone and without a mask: the same ids.
    for column, expected in zip(batch, ids.unbind(1)):
        tokens, mask = column["input_ids"], column["attention_mask"]
        lengths, blank = mask.sum(1), torch.full((6, 4), 3)
        forms = [
            {"input_ids": torch.cat([tokens, blank], 1), "attention_mask": torch.cat([mask, blank * 0], 1)},
            {"input_ids": torch.cat([blank, tokens], 1), "attention_mask": torch.cat([blank * 0, mask], 1)},
            {
                "input_ids": tokens[mask.bool()][None],
                "cu_seq_lens_q": nn.functional.pad(lengths.cumsum(0), (1, 0)).int(),
            },
            {"input_ids": tokens[mask.bool()], "offsets": lengths.cumsum(0) - lengths},
        ]
        for form in forms:
            assert torch.equal(one(**form), expected)
        rows = [one(input_ids=tokens[i : i + 1, : int(lengths[i])]) for i in range(6)]
        assert torch.equal(torch.cat(rows), expected)


def test_ids_of_many_texts_differ() -> None:
    """Every text of up to three tokens out of twelve, and its order counts."""
    rows = [list(t) for n in (1, 2, 3) for t in itertools.product(range(12), repeat=n)]
    tokens = torch.tensor([row + [0] * (3 - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (3 - len(row)) for row in rows])
    assert len(one(input_ids=tokens, attention_mask=mask).unique()) == len(rows)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16", "uint8", "bool"])
def test_ids_of_many_pictures_differ(dtype: str) -> None:
    """One or two pixels out of a thousand, of numbers whose bits are mostly zeros."""
    n = 600
    x = torch.zeros(n, 2, 16, 32, dtype=getattr(torch, dtype))
    places = torch.randint(1024, (n, 2), generator=torch.Generator().manual_seed(0))
    x.flatten(1).scatter_(1, places, x.new_ones(()).expand(n, 2))
    assert len(one(pixel_values=x).unique()) == len({tuple(sorted(pair)) for pair in places.tolist()})


def test_ids_of_large_rows_are_those_of_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(7, 3, 5)
    whole = one(pixel_values=x)
    monkeypatch.setattr("chunked_embed.losses._texts.BLOCK", 32)
    assert torch.equal(one(pixel_values=x), whole)


TOKENS = torch.tensor([[4, 9, 9, 5], [4, 9, 9, 5], [4, 9, 9, 5], [6, 5, 0, 0]])
MASK = (TOKENS > 0).long()
BASE = {"input_ids": TOKENS, "attention_mask": MASK}
PICTURES = torch.tensor([[1.0, -2.0], [1.0, -2.0], [1.0, 2.0], [0.0, 0.0]])
GRID = torch.tensor([[1, 1, 2], [1, 2, 2], [1, 1, 2], [1, 1, 2]])
FLAT = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 5.0], [5.0, 5.0], [1.0, 2.0], [3.0, 4.0], [1.0, 2.0], [3.0, 5.0]])
FLAT = torch.cat([FLAT, torch.tensor([[7.0, 7.0], [8.0, 8.0]])])

# Features of four texts, and numbers that are equal where those are: the first three have the same tokens.
SAME: dict[str, tuple[dict, list[int]]] = {
    "tokens": (BASE, [0, 0, 0, 1]),
    "pictures": (BASE | {"pixel_values": PICTURES}, [0, 0, 1, 2]),
    "halves": (BASE | {"pixel_values": PICTURES.bfloat16()}, [0, 0, 1, 2]),
    "bytes": (BASE | {"pixel_values": PICTURES.byte()}, [0, 0, 1, 2]),
    "complex numbers": (BASE | {"spectrum": torch.complex(PICTURES, PICTURES.flip(1))}, [0, 0, 1, 2]),
    "nothing less than zero": (BASE | {"pixel_values": torch.tensor([[0.0], [-0.0], [1.0], [0.0]])}, [0, 0, 1, 2]),
    "a number each": (BASE | {"year": torch.tensor([1999, 2001, 1999, 0])}, [0, 1, 0, 2]),
    "a list": (BASE | {"year": [1999, 2001, 1999, 0]}, [0, 1, 0, 2]),
    "an array": (BASE | {"year": torch.tensor([1999, 2001, 1999, 0]).numpy()}, [0, 1, 0, 2]),
    "of the column": (
        BASE | {"task": "query", "modality": ("image", "text"), "logits_to_keep": 1, "x": None, "y": torch.tensor(3)},
        [0, 0, 0, 1],
    ),
    "layout": (
        BASE | {"position_ids": torch.arange(16).view(4, 4), "prompt_length": torch.tensor([1])}, [0, 0, 0, 1],
    ),
    "segments": (BASE | {"token_type_ids": torch.tensor([[0, 0, 0, 1], [0] * 4, [0] * 4, [0] * 4])}, [0, 1, 1, 2]),
    "tokens' boxes": (  # what stands at padding counts for nothing
        {"input_ids": TOKENS, "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 0, 0]])}
        | {"bbox": torch.stack([torch.tensor([[1, 2], [3, 4], [5, 6], [i, i]]) for i in range(4)])},
        [0, 0, 0, 1],
    ),
    "tokens' boxes that differ": (BASE | {"bbox": torch.arange(4)[:, None, None].expand(4, 4, 2)}, [0, 1, 2, 3]),
    "grids, one each": (BASE | {"pixel_values": FLAT, "image_grid_thw": GRID}, [0, 1, 2, 3]),
    "grids": (
        BASE
        | {"pixel_values": FLAT, "image_grid_thw": GRID}
        | {"num_images_per_sample": torch.tensor([2, 0, 2, 0])},
        [0, 1, 2, 3],
    ),
    "equal grids": (
        BASE
        | {"pixel_values": FLAT[:4].repeat(2, 1), "image_grid_thw": torch.ones(8, 3).long()}
        | {"num_images_per_sample": torch.tensor([4, 4, 0, 0])},
        [0, 0, 1, 2],
    ),
    "the shape of a grid": (
        BASE
        | {"pixel_values": torch.ones(16, 2)}
        | {"image_grid_thw": torch.tensor([[1, 1, 4], [1, 1, 4], [1, 2, 2], [1, 2, 2]])},
        [0, 0, 1, 2],
    ),
    "videos": (
        BASE
        | {"pixel_values_videos": FLAT[4:10], "video_grid_thw": GRID[[0, 2, 3]], "second_per_grid_ts": [1.0, 1.0, 1.0]}
        | {"num_videos_per_sample": torch.tensor([1, 1, 1, 0])},
        [0, 1, 2, 3],
    ),
    "pictures of no row": (BASE | {"pixel_values": torch.ones(0, 3, 2, 2)}, [0, 0, 0, 1]),
    "pictures by number": (
        BASE
        | {"pixel_values": PICTURES[[0, 2, 1, 2]], "image_sizes": torch.ones(4, 2).long()}
        | {"num_images_per_sample": torch.tensor([2, 2, 0, 0])},
        [0, 0, 1, 2],
    ),
    "padded pictures": (
        BASE
        | {"pixel_values": torch.stack([PICTURES, PICTURES.flip(0)], 1), "pixel_attention_mask": torch.ones(4, 2, 2)}
        | {"num_images_per_sample": torch.tensor([2, 2, 2, 1])},
        [0, 1, 2, 3],
    ),
    "sound": (
        {"input_values": torch.tensor([[1.0, 2.0, 0.0], [1.0, 2.0, 0.0], [1.0, 2.0, 0.0], [0.0, 1.0, 2.0]])}
        | {"attention_mask": torch.tensor([[1, 1, 0], [1, 1, 0], [1, 1, 1], [1, 1, 1]])},
        [0, 0, 1, 2],
    ),
    "bags of words": ({"sentence_embedding": PICTURES}, [0, 0, 1, 2]),
    "a bag": ({"input_ids": torch.tensor([4, 5, 4, 5, 4]), "offsets": torch.tensor([0, 2, 4, 4])}, [0, 0, 1, 2]),
    "empty bags": ({"input_ids": torch.tensor([4, 5, 4, 5]), "offsets": torch.tensor([0, 0, 2, 4])}, [0, 1, 1, 0]),
    "a weighed bag": (
        {"input_ids": torch.tensor([4, 4, 4, 4, 5]), "offsets": torch.tensor([0, 1, 2, 3])}
        | {"per_sample_weights": torch.tensor([1.0, 1.0, 0.5, 1.0, 1.0]), "year": torch.zeros(4)},
        [0, 0, 1, 2],
    ),
    "one sequence": (
        {"input_ids": torch.tensor([[4, 5, 4, 5, 4, 5, 4]]), "cu_seq_lens_q": torch.tensor([0, 2, 4, 6, 7])}
        | {"cu_seq_lens_k": torch.tensor([0, 2, 4, 6, 7]), "seq_idx": torch.tensor([[0, 0, 1, 1, 2, 2, 3]])}
        | {"position_ids": torch.tensor([[0, 1, 0, 1, 0, 1, 0]]), "max_length_q": 2, "max_length_k": 2}
        | {"speakers": torch.tensor([[1, 2, 1, 2, 1, 1, 1]]), "year": torch.ones(4, 1)},
        [0, 0, 1, 2],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SAME)
def test_all_inputs_count(case: str) -> None:
    column, expected = SAME[case]
    same_partition(one(**column), torch.tensor(expected))


def test_padding_counts_for_nothing() -> None:
    """Of anything: pictures of more pixels, recordings of more samples, boxes of tokens on either side."""
    boxes, pixels = torch.arange(1, 33).view(4, 4, 2) * MASK[..., None], torch.rand(4, 2, 3, 5)
    column = {**BASE, "bbox": boxes, "pixel_values": pixels}
    pad = nn.functional.pad
    wider = {"pixel_values": pad(pixels, (0, 2, 0, 1, 0, 3))}
    for sides in ((0, 3), (2, 0)):
        padded = {"input_ids": pad(TOKENS, sides, value=3), "attention_mask": pad(MASK, sides)}
        padded |= {"bbox": pad(boxes, (0, 0, *sides), value=7)}
        assert torch.equal(one(**column), one(**padded | wider))
    sound, mask = torch.rand(4, 6), torch.ones(4, 6)
    long = {"input_values": pad(sound, (0, 2)), "attention_mask": pad(mask, (0, 2))}
    assert torch.equal(one(input_values=sound, attention_mask=mask), one(**long))


def test_bags_of_words() -> None:
    model = SentenceTransformer(modules=[BoW(WORDS), Normalize()], device="cpu")
    same_partition(text_ids([model.preprocess(column) for column in TEXTS]), numbered(TEXTS))


def test_prompts_are_part_of_a_text(model: SentenceTransformer) -> None:
    plain, prompted = model.preprocess(["a cat"]), model.preprocess(["a cat"], prompt="the ")
    assert "prompt_length" in prompted and not torch.equal(text_ids([plain]), text_ids([prompted]))
    same_partition(text_ids([prompted, model.preprocess(["the a cat"])]), torch.zeros(1, 2))


def another_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["[UNK]", *WORDS[::-1]])}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


@pytest.mark.parametrize("shared", [True, False])
def test_routes(shared: bool) -> None:
    """Tokens of unlike vocabularies are no equal texts; those of two copies of one are."""
    tokenizers = [word_tokenizer(), word_tokenizer() if shared else another_tokenizer()]
    routes = [[StaticEmbedding(tokenizer, embedding_dim=HIDDEN)] for tokenizer in tokenizers]
    model = SentenceTransformer(modules=[Router.for_query_document(*routes)], device="cpu").double()
    words = [tokenizers[0].id_to_token(6), tokenizers[1].id_to_token(6)]
    texts = [[words[0], "cat", "cat"], ["bird", words[1], "bird"]]
    tasks = ("query", "document")
    batch = [{**model.preprocess(column, task=task), "task": task} for column, task in zip(texts, tasks)]
    ids = text_ids(batch, model)
    assert ids[1, 0] == ids[2, 0] and ids[0, 1] == ids[2, 1]
    assert (ids[0, 0] == ids[1, 1]) == shared
    assert torch.equal(text_ids(batch, nn.DataParallel(model)), ids)
    assert ours(model, false_negatives="text")(batch).isfinite()


# --- refusals ---------------------------------------------------------------------------------------------------------

BAD: dict[str, tuple[dict, str]] = {
    "nothing": ({"task": "query", "num_images_per_sample": torch.ones(4)}, "needs tokens"),
    "patches": (BASE | {"pixel_values": FLAT}, r"'pixel_values' \(10, 2\) does not say which of the 4 texts .*labels"),
    "patches of few grids": (BASE | {"pixel_values": FLAT, "image_grid_thw": GRID[:2]}, "'pixel_values'"),
    "patches of other grids": (BASE | {"pixel_values": FLAT[:9], "image_grid_thw": GRID}, "'pixel_values'"),
    "pictures of other rows": (
        BASE | {"pixel_values": PICTURES[:3], "num_images_per_sample": torch.ones(5).long()}, "'pixel_values'",
    ),
    "something else": (BASE | {"of_the_batch": torch.ones(1, 4)}, r"'of_the_batch' \(1, 4\) .* num_images_per_sample"),
    "something in a sequence": (
        {"input_ids": torch.ones(1, 6), "cu_seq_lens_q": torch.tensor([0, 4, 6]), "x": torch.ones(3, 5)},
        r"'x' \(3, 5\) .* a last dimension of 6 \(tokens\), or a first one of 2",
    ),
    "words": (BASE | {"url": ["a", "b", "c", "d"]}, "'url' a dense tensor, got list"),
    "an object": (BASE | {"image": object()}, "'image' a dense tensor, got object"),
    "a sparse tensor": (BASE | {"counts": torch.eye(4).to_sparse()}, "'counts' a dense tensor, got torch.sparse_coo"),
    "a tensor of lists": (BASE | {"crops": [torch.ones(2), torch.ones(3)]}, "'crops' a dense tensor, got list"),
    "one token": ({"input_ids": torch.ones(4)}, r"\(N, T\), got \(4,\) and None"),
    "a square mask": ({"input_ids": TOKENS, "attention_mask": torch.ones(4, 4, 4)}, r"got \(4, 4\) and \(4, 4, 4\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_refuses(case: str) -> None:
    column, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        text_ids([column])


def test_refuses_columns_of_unlike_length() -> None:
    with pytest.raises(ValueError, match=r"as many texts each, got \[4, 2\]"):
        text_ids([BASE, {"input_ids": TOKENS[:2]}])
