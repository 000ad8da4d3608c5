"""The fused head inside of real, tiny sparse encoders, against the library's: no download."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("sentence_transformers")

import attach_ranks
import torch.distributed as dist
import transformers
from attach_ranks import TEXTS, build
from processes import asked, assert_passed, run_checks
from sentence_transformers import SparseEncoder
from sentence_transformers.base.modules import Router, Transformer
from sentence_transformers.sparse_encoder.modules import MLMTransformer, SpladePooling
from tokenizers import Tokenizer, models, pre_tokenizers

from chunked_embed import sparse
from chunked_embed.sparse import _attach

WORDS = ["a", "the", "cat", "dog", "bird", "tree", "sits", "runs", "under", "over", "red", "blue", "big", "old", "sea"]
SPECIAL = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
SIZES = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
OF_DISTILBERT = {"vocab_size": 20, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32}
CONFIGS = {
    "bert": lambda **more: transformers.BertConfig(**SIZES, **more),
    "roberta": lambda **more: transformers.XLMRobertaConfig(**SIZES, pad_token_id=0, **more),
    "distilbert": lambda **more: transformers.DistilBertConfig(**OF_DISTILBERT, **more),
    "modernbert": lambda **more: transformers.ModernBertConfig(**SIZES, pad_token_id=0, **more),
}
POOLINGS = [("max", "relu"), ("max", "log1p_relu"), ("sum", "relu")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of models by their kind, tied and untied."""
    made = {}

    def save(kind: str = "bert", tied: bool = True) -> str:
        if (kind, tied) not in made:
            path = tmp_path_factory.mktemp(kind)
            vocabulary = {word: n for n, word in enumerate([*SPECIAL.values(), *WORDS])}
            tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
            tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
            transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL).save_pretrained(path)
            torch.manual_seed(0)
            model = transformers.AutoModelForMaskedLM.from_config(CONFIGS[kind](tie_word_embeddings=tied))
            for parameter in model.parameters():
                nn.init.normal_(parameter, std=0.3)  # outputs of a size, and biases that are not zero
            model.save_pretrained(path)
            made[kind, tied] = str(path)
        return made[kind, tied]

    return save


def attached(model):
    model = copy.deepcopy(model)
    sparse.attach(model)
    return model


def run(model, features=None):
    """-> embeddings, and the gradients of a sum of them with signs."""
    features = model.preprocess(TEXTS) if features is None else dict(features)
    found = model(features)["sentence_embedding"]
    signs = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    model.zero_grad()
    (found.double() * signs).sum().backward()
    return found.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected, **tolerance):
    torch.testing.assert_close(found[0], expected[0], **tolerance)
    assert found[1].keys() == expected[1].keys()
    for name, grad in expected[1].items():
        torch.testing.assert_close(found[1][name], grad, **tolerance)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("pooling", "activation"), POOLINGS)
def test_is_the_librarys(folder, kind, tied, pooling, activation):
    model = build(folder(kind, tied), pooling, activation)
    mine = attached(model)
    assert_same(run(mine), run(model))
    model.eval(), mine.eval()
    for options in ({}, {"max_active_dims": 3}, {"convert_to_sparse_tensor": False, "batch_size": 2}):
        found, expected = mine.encode(TEXTS, **options), model.encode(TEXTS, **options)
        assert found.layout == expected.layout and found.dtype == expected.dtype
        torch.testing.assert_close(found.to_dense(), expected.to_dense())


def test_no_logits(folder, monkeypatch):
    mine = attached(build(folder()))
    sizes = []
    linear = nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda *a: sizes.append(linear(*a).shape) or linear(*a))
    out = mine(mine.preprocess(TEXTS))
    assert sizes and all(size[-1] != SIZES["vocab_size"] for size in sizes)
    assert "token_embeddings" not in out and mine[1].get_embedding_dimension() == SIZES["vocab_size"]


def test_what_the_pooling_says_counts_when_it_is_called(folder):
    model = build(folder())
    mine = attached(model)
    for own in (model, mine):
        own[1].pooling_strategy, own[1].activation_function, own[1].chunk_size = "sum", "log1p_relu", 2
    assert_same(run(mine), run(model))


def test_what_is_saved_is_the_librarys(folder, tmp_path):
    model = build(folder(), dtype=torch.float32)
    mine = attached(model)
    for name, own in (("library", model), ("mine", mine)):
        own.save_pretrained(str(tmp_path / name))
    files = {
        name: sorted(str(f.relative_to(tmp_path / name)) for f in (tmp_path / name).rglob("*"))
        for name in ("library", "mine")
    }
    assert files["library"] == files["mine"]
    for file in (f for f in files["mine"] if f.endswith(".json")):
        assert json.loads((tmp_path / "mine" / file).read_text()) == json.loads(
            (tmp_path / "library" / file).read_text()
        )
    loaded = SparseEncoder(str(tmp_path / "mine"), device="cpu")
    assert "forward" not in vars(loaded[0])
    assert torch.equal(loaded.encode(TEXTS).to_dense(), model.eval().encode(TEXTS).to_dense())
    assert type(mine[0]) is type(model[0]) and type(mine[1]) is type(model[1]) and repr(mine) == repr(model)
    mine.load_state_dict(model.state_dict())


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save", "attached twice"])
def test_copies(folder, way):
    model = build(folder())
    mine = attached(model)
    if way == "deepcopy":
        other = copy.deepcopy(mine)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(mine))
    elif way == "torch.save":
        file = io.BytesIO()
        torch.save(mine, file)
        other = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    else:
        other = mine
        sparse.attach(other)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
        for parameter in model.parameters():
            parameter.mul_(1.1)
    found = run(other)
    assert "token_embeddings" not in other(other.preprocess(TEXTS))
    assert_same(found, run(model))  # of its own parameters, and none of another's
    assert way == "attached twice" or all(p.grad is None for p in mine.parameters())


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["query", "decoder"], "r": 3},
        {"target_modules": ["decoder"], "r": 2, "use_dora": True},
        {"target_modules": ["query"], "modules_to_save": ["decoder"]},
        {"target_modules": ["query"], "trainable_token_indices": [3, 7]},
    ],
    ids=str,
)
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.filterwarnings("ignore")  # PEFT's, of tied weights
def test_adapters(folder, options, before):
    peft = pytest.importorskip("peft")
    model = build(folder(tied="trainable_token_indices" not in options))
    mine = attached(model) if before else copy.deepcopy(model)
    for own in (model, mine):
        torch.manual_seed(0)
        own[0].model = peft.get_peft_model(own[0].model, peft.LoraConfig(init_lora_weights=False, **options))
        own.to(torch.float64)
    if not before:
        sparse.attach(mine)
    assert_same(run(mine), run(model))
    assert any("default" in name for name in run(mine)[1])


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")  # of a later transformers
def test_gradient_checkpointing_and_frozen_parts(folder):
    model = build(folder())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layer.1" in name or "transform" in name)
    mine = attached(model)
    expected = run(model)
    mine[0].model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_same(run(mine), expected)


@pytest.mark.parametrize(("pooling", "activation"), POOLINGS)
def test_autocast(folder, pooling, activation):
    model = build(folder(), pooling, activation, torch.float32)
    mine = attached(model)
    exact = run(model)
    with torch.autocast("cpu", torch.bfloat16):
        found, theirs = run(mine), run(model)
    assert found[0].dtype == torch.float32
    error, of_library = ((x[0].double() - exact[0].double()).norm() for x in (found, theirs))
    assert error <= 1.1 * of_library
    assert found[1].keys() == exact[1].keys()
    grads = [torch.cat([x[1][name].flatten() for name in exact[1]]) for x in (found, exact)]
    assert grads[0].dtype == torch.float32
    assert (grads[0] - grads[1]).norm() <= 0.2 * grads[1].norm()  # rounded states, and now and then another largest


def test_half_precision_models(folder):
    model = build(folder(), dtype=torch.bfloat16)
    mine = attached(model)
    found, expected = run(mine)[0], run(model)[0]
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


def test_texts_in_one_row(folder):
    """As with FlashAttention: no padding, and bounds of texts."""
    model = build(folder())
    lengths = torch.tensor([4, 1, 6])
    bounds = torch.cat([torch.zeros(1, dtype=torch.int32), lengths.cumsum(0).int()])
    ids = torch.randint(5, 20, (1, 11), generator=torch.Generator().manual_seed(0))
    places = torch.cat([torch.arange(n) for n in lengths])[None]
    features = {"input_ids": ids, "position_ids": places, "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
    assert_same(run(attached(model), features), run(model, features))


def test_left_padding(folder):
    model = build(folder())
    model.tokenizer.padding_side = "left"
    assert_same(run(attached(model)), run(model))


def test_routes(folder):
    query, document = build(folder()), build(folder("distilbert"), "sum")
    router = Router({"query": list(query), "document": list(document)}, default_route="document")
    model = SparseEncoder(modules=[router], device="cpu").eval()
    mine = attached(model)
    for name in ("encode_query", "encode_document"):
        torch.testing.assert_close(getattr(mine, name)(TEXTS).to_dense(), getattr(model, name)(TEXTS).to_dense())
    assert all("forward" in vars(part) for route in mine[0].sub_modules.values() for part in route)


def test_the_legacy_module(folder):
    model = build(folder(), module=MLMTransformer)
    assert_same(run(attached(model)), run(model))


@pytest.mark.filterwarnings("ignore")  # dynamo's
def test_compiled(folder):
    model = build(folder())
    mine = attached(model)
    mine.compile(backend="eager")
    assert_same(run(mine), run(model))
    assert_same(run(mine), run(model))


def test_several_processes_of_encode_get_an_attached_model(folder):
    """What is sent to them is a pickle."""
    mine = attached(build(folder(), dtype=torch.float32)).eval()
    sent = pickle.loads(pickle.dumps(mine))
    assert torch.equal(sent.encode(TEXTS).to_dense(), mine.encode(TEXTS).to_dense())


def test_threads_that_share_a_model(folder):
    """As in a server: the head's forward is another while one of them is in it."""
    mine = attached(build(folder())).eval()
    forward, together = mine[0].model.bert.forward, threading.Barrier(2)

    def slow(*args, **kwargs):
        with contextlib.suppress(threading.BrokenBarrierError):
            together.wait(0.05)  # for another thread in the same forward, which has to stay away
        return forward(*args, **kwargs)

    expected = mine.encode(TEXTS, show_progress_bar=False).to_dense()
    mine[0].model.bert.forward = slow
    with ThreadPoolExecutor(3) as pool:
        for found in pool.map(lambda _: mine.encode(TEXTS, show_progress_bar=False).to_dense(), range(3)):
            assert torch.equal(found, expected)
    assert together.broken and "forward" not in vars(mine[0].model.get_output_embeddings())


def test_one_language_model_in_several_routes(folder):
    encoder, pooling = build(folder())
    for other in (SpladePooling("sum"), SpladePooling("max"), nn.Identity()):
        routes = Router({"query": [encoder, pooling], "document": [encoder, other]}, default_route="document")
        with pytest.raises(ValueError, match=f"in front of another {type(other).__name__} too: let routes that share"):
            sparse.attach(SparseEncoder(modules=[routes], device="cpu"))
        assert "forward" not in vars(encoder)
    routes = Router({"query": [encoder, pooling], "document": [encoder, pooling]}, default_route="document")
    model = SparseEncoder(modules=[routes], device="cpu").eval()
    expected = model.encode_query(TEXTS).to_dense(), model.encode_document(TEXTS).to_dense()
    sparse.attach(model)
    torch.testing.assert_close(
        (model.encode_query(TEXTS).to_dense(), model.encode_document(TEXTS).to_dense()), expected
    )


def test_a_module_that_takes_anothers_place(folder):
    model = build(folder())
    mine = attached(model)
    for own in (model, mine):
        own[1] = SpladePooling("sum")
    sparse.attach(mine)
    assert_same(run(mine), run(model))


@pytest.mark.slow
def test_trainer(folder, tmp_path):
    """The same curve as the library's, and the same parameters at the end."""
    from datasets import Dataset
    from sentence_transformers import SparseEncoderTrainer, SparseEncoderTrainingArguments
    from sentence_transformers.sparse_encoder import losses

    data = Dataset.from_dict({"anchor": TEXTS * 3, "positive": TEXTS[::-1] * 3})
    logs, weights = [], []
    for way in (copy.deepcopy, attached):
        model = way(build(folder(), dtype=torch.float32))
        ranking = losses.SparseMultipleNegativesRankingLoss(model)
        loss = losses.SpladeLoss(model, ranking, document_regularizer_weight=1e-2, query_regularizer_weight=1e-2)
        args = SparseEncoderTrainingArguments(
            output_dir=str(tmp_path),
            max_steps=4,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            learning_rate=1e-3,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            seed=0,
        )
        trainer = SparseEncoderTrainer(model=model, args=args, train_dataset=data, loss=loss)
        trainer.train()
        logs.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        weights.append(dict(model.named_parameters()))
    assert len(logs[0]) == 4
    torch.testing.assert_close(torch.tensor(logs[1]), torch.tensor(logs[0]), rtol=1e-4, atol=1e-5)
    for name, parameter in weights[0].items():
        torch.testing.assert_close(weights[1][name], parameter, rtol=1e-3, atol=1e-4)


# --- several processes -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def outcomes(request, folder, tmp_path_factory):
    ranks = attach_ranks
    models = folder(), folder(tied=False)
    return run_checks(ranks.check, asked(request), ranks.WORLD, tmp_path_factory.mktemp("outcomes"), *models)


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs torch.distributed with gloo")
@pytest.mark.parametrize("name", attach_ranks.NAMES)
def test_several_processes(name, outcomes):
    assert_passed(name, outcomes)


# --- refusals --------------------------------------------------------------------------------------------------------


class Scaled(transformers.BertForMaskedLM):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = 2 * out.logits
        return out


def test_a_model_that_does_more_to_its_logits(folder):
    model = build(folder())
    model[0].model.__class__ = Scaled
    sparse.attach(model)
    with pytest.raises(
        RuntimeError, match="expected logits that are the outputs of the model's last layer, got Scaled"
    ):
        model(model.preprocess(TEXTS))
    model[0].model.__class__ = transformers.BertForMaskedLM
    model(model.preprocess(TEXTS))  # nothing is left of the call that failed


def test_replicas(folder, monkeypatch):
    """Of nn.DataParallel. Here there is no GPU, but what stands for tensors on some."""
    with FakeTensorMode():
        first, second = (torch.empty(1, device=f"cuda:{n}") for n in range(2))
    monkeypatch.setattr(_attach.lm_heads, "linear", lambda head: SimpleNamespace(weight=first))
    _attach._refuse_replicas(None, None, {"input_ids": first, "modality": "text"})
    with pytest.raises(ValueError, match="expected features on cuda:0, where the attached encoder is"):
        _attach._refuse_replicas(None, None, {"input_ids": second})
    _attach._refuse_replicas(SimpleNamespace(hf_device_map={}), None, {"input_ids": second})  # split over devices


class Halves(SpladePooling):
    def forward(self, features):
        return {"sentence_embedding": super().forward(features)["sentence_embedding"] / 2}


class LogitsOfItsOwn(nn.Linear):
    def forward(self, x):
        return super().forward(x).tanh()


def test_refusals(folder):
    with pytest.raises(TypeError, match="expected a SparseEncoder of sentence-transformers, got str"):
        sparse.attach(folder())
    with pytest.raises(TypeError, match=r"SpladePooling, one behind the other, got Sequential of \['Linear'\]"):
        sparse.attach(nn.Sequential(nn.Linear(2, 2)))
    encoder, pooling = build(folder())
    with pytest.raises(TypeError, match="expected a SpladePooling with the library's forward, got Halves"):
        sparse.attach(nn.Sequential(encoder, Halves()))
    pooling.forward = lambda features: features
    with pytest.raises(TypeError, match="expected a SpladePooling with the library's forward, got SpladePooling"):
        sparse.attach(nn.Sequential(encoder, pooling))
    with pytest.raises(TypeError, match="expected a masked language model of transformers with a head, got BertModel"):
        sparse.attach(nn.Sequential(Transformer(folder()), SpladePooling()))
    encoder.model.cls.predictions.decoder.__class__ = LogitsOfItsOwn
    with pytest.raises(TypeError, match="a forward of its own"):
        sparse.attach(nn.Sequential(encoder, SpladePooling()))
