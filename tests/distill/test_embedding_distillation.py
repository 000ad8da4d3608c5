"""Embedding distillation against full similarity matrices, sentence-transformers' own losses, and its real trainer."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("sentence_transformers")

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests" / "losses"), str(ROOT / "examples")]  # spawned processes get them, too

from loss_stage import peak_bytes  # noqa: E402
from processes import Outcomes, asked, assert_passed, run_checks  # noqa: E402
from sentence_transformers import SentenceTransformer  # noqa: E402
from sentence_transformers.sentence_transformer import losses as library  # noqa: E402
from sentence_transformers.sentence_transformer.modules import Normalize  # noqa: E402
from st_guided_parts import WIDTH, embeddings, guide_of, save_guide  # noqa: E402
from st_parts import (  # noqa: E402
    EXACT,
    HIDDEN,
    OUT,
    TOLERANCE,
    assert_same,
    build,
    dense,
    features,
    save_transformer,
    sentences,
    static_model,
    train,
    value_and_grads,
)

from distill import JSDLoss, KLDivLoss, TAIDLoss, TopKLoss  # noqa: E402
from distill.sentence_transformers import EmbedDistillLoss  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]
ROWS = 7


class Idle(nn.Module):
    """Stands for a model where embeddings are given."""

    tokenizer = None
    device = torch.device("cpu")

    def get_embedding_dimension(self) -> int:
        return 6


@pytest.fixture(scope="module")
def student_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_transformer(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def other_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A narrower model that numbers its tokens otherwise."""
    return save_guide(tmp_path_factory.mktemp("teacher"))


def make(loss: Any = "kl", model: Any = None, teacher: Any = None, **options: Any) -> EmbedDistillLoss:
    return EmbedDistillLoss(model or Idle(), teacher, loss, **{"compiled": False} | options)


# ---- formulas over whole matrices


def logits(columns: list[Tensor], scale: float) -> Tensor:
    """Row i over all documents, or over the other texts: (N, M), or (N, N - 1)."""
    query, *documents = (column / column.norm(dim=1, keepdim=True) for column in columns)
    scores = scale * query @ torch.cat(documents or [query]).T
    n = len(query)
    return scores if documents else scores[~torch.eye(n, dtype=torch.bool)].view(n, n - 1)


def jsd(q: Tensor, p: Tensor) -> Tensor:
    q, p = q.log_softmax(1), p.log_softmax(1)
    m = ((q.exp() + p.exp()) / 2).log()
    return sum(F.kl_div(m, side, reduction="batchmean", log_target=True) for side in (q, p)) / 2


FORMULAS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "kl": lambda q, p: F.kl_div(q.log_softmax(1), p.softmax(1), reduction="batchmean"),
    "reverse_kl": lambda q, p: F.kl_div(p.log_softmax(1), q.log_softmax(1), reduction="batchmean", log_target=True),
    "jsd": jsd,
    "tvd": lambda q, p: (q.softmax(1) - p.softmax(1)).abs().sum(1).mean() / 2,
    "cosine": lambda q, p: 1 - F.cosine_similarity(q, p).mean(),
    "taid": lambda q, p: F.cross_entropy(q, (0.6 * q.detach() + 0.4 * p).softmax(1)),
}


@pytest.mark.parametrize("chunk_size", [None, 3])
@pytest.mark.parametrize("columns", [1, 2, 4])
@pytest.mark.parametrize("divergence", FORMULAS)
def test_equals_whole_matrices(divergence: str, columns: int, chunk_size: int | None) -> None:
    student, teacher = embeddings(ROWS, columns), embeddings(ROWS, columns, width=9, seed=1)
    loss = make(divergence, scale=5.0, teacher_scale=8.0, chunk_size=chunk_size)
    value = loss.compute_loss_from_embeddings(student, teacher)
    expected = FORMULAS[divergence](logits(student, 5.0), logits(teacher, 8.0).detach())
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)
    for mine, theirs in zip(torch.autograd.grad(value, student), torch.autograd.grad(expected, student), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)
    stacked = torch.stack(teacher, dim=1) if columns > 1 else teacher[0]  # as a dataset's label column has them
    torch.testing.assert_close(loss.compute_loss_from_embeddings(student, stacked), value, rtol=0, atol=0)


@pytest.mark.parametrize("columns", [1, 2])
def test_mean_squared_error_of_similarities(columns: int) -> None:
    student, teacher = embeddings(ROWS, columns), embeddings(ROWS, columns, seed=1)
    gap = logits(student, 20.0) - logits(teacher, 20.0)
    value = make("mse").compute_loss_from_embeddings(student, teacher)
    torch.testing.assert_close(value, gap.square().sum() / ROWS**2)


@pytest.mark.parametrize("columns", [1, 2])
@pytest.mark.parametrize("loss", ["kl", "adaptive_kl", "alpha_beta", "skew_reverse_kl", "mse", "cosine", "kvd", "uld"])
def test_an_equal_teacher_gives_zero(loss: str, columns: int) -> None:
    student = embeddings(ROWS, columns)
    value = make(loss).compute_loss_from_embeddings(student, student)
    assert abs(value) < 1e-13
    assert all(grad.abs().max() < 1e-12 for grad in torch.autograd.grad(value, student))


def test_the_hard_loss_is_info_nce() -> None:
    student = embeddings(ROWS, 3)
    teacher = embeddings(ROWS, 3, seed=1)
    expected = library.MultipleNegativesRankingLoss(None).compute_loss_from_embeddings(student, None)
    torch.testing.assert_close(make([("ce", 1.0)]).compute_loss_from_embeddings(student, teacher), expected)
    soft = make("kl").compute_loss_from_embeddings(student, teacher)
    both = make(KLDivLoss(weight_hard=0.5, compiled=False)).compute_loss_from_embeddings(student, teacher)
    torch.testing.assert_close(both, soft + 0.5 * expected)


@pytest.mark.parametrize("columns", [1, 2])
def test_a_function_is_a_loss(columns: int) -> None:
    student, teacher = embeddings(ROWS, columns), embeddings(ROWS, columns, seed=1)
    loss = make(squared_probabilities)
    expected = logits(student, 20.0).softmax(1) - logits(teacher, 20.0).softmax(1)
    value = loss.compute_loss_from_embeddings(student, teacher)
    torch.testing.assert_close(value, expected.square().sum(1).mean())
    assert loss.get_config_dict()["loss"] == "squared_probabilities"


def squared_probabilities(student: Tensor, teacher: Tensor) -> Tensor:
    return (student.softmax(1) - teacher.softmax(1)).square().sum(1)


def test_a_single_text_has_nothing_to_learn() -> None:
    student = embeddings(1, 1)
    value = make("kl").compute_loss_from_embeddings(student, embeddings(1, 1, seed=1))
    assert value == 0 and not torch.autograd.grad(value, student)[0].any()


def test_numbers_of_the_loss_may_change() -> None:
    for columns in (1, 2):
        student, teacher = embeddings(ROWS, columns), embeddings(ROWS, columns, seed=1)
        loss = make(JSDLoss(0.1, compiled=False))
        loss.compute_loss_from_embeddings(student, teacher)
        loss.loss.beta = 0.5
        expected = FORMULAS["jsd"](logits(student, 20.0), logits(teacher, 20.0))
        torch.testing.assert_close(loss.compute_loss_from_embeddings(student, teacher), expected)
        assert type(loss.loss) is JSDLoss


@pytest.mark.parametrize("divergence", ["kl", "mse"])
@pytest.mark.slow
def test_compiled_is_uncompiled(divergence: str) -> None:
    student, teacher = ([x.detach().float() for x in embeddings(40, 1, seed=s)] for s in (0, 1))
    student[0].requires_grad_()
    values = [make(divergence, compiled=c).compute_loss_from_embeddings(student, teacher) for c in (True, False)]
    torch.testing.assert_close(*values, rtol=1e-5, atol=1e-6)
    grads = [torch.autograd.grad(value, student)[0] for value in values]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


def test_the_matrix_is_never_there() -> None:
    n = 4096
    student, teacher = torch.randn(2, n, 8).unbind()
    student.requires_grad_()
    loss = make("jsd", chunk_size=16)
    peak = peak_bytes(lambda: loss.compute_loss_from_embeddings([student], [teacher]).backward(), student.device)
    assert peak < n * n  # bytes


# ---- hidden states


@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize("width", [6, 9])
@pytest.mark.parametrize("hidden", ["cosine", "mse"])
def test_hidden_equals_the_library(hidden: str, width: int, columns: int) -> None:
    student, teacher = embeddings(ROWS, columns), embeddings(ROWS, columns, width=width, seed=1)
    theirs = library.EmbedDistillLoss(Idle(), hidden, width if width != 6 else None).double()
    ours = make(None, hidden=hidden, hidden_weight=0.3, teacher_dim=width).double()
    parameters = [student, student]
    if width != 6:
        ours.projection.load_state_dict(theirs.projection.state_dict())
        parameters = [[*student, *loss.projection.parameters()] for loss in (ours, theirs)]
    assert (ours.projection is None) == (width == 6)
    values = [loss.compute_loss_from_embeddings(student, teacher) for loss in (ours, theirs)]
    torch.testing.assert_close(values[0], 0.3 * values[1])
    mine, expected = (torch.autograd.grad(value, over) for value, over in zip(values, parameters, strict=True))
    for a, b in zip(mine, expected, strict=True):
        torch.testing.assert_close(a, 0.3 * b)
    both = make("kl", hidden=hidden, hidden_weight=0.3, teacher_dim=width).double()
    if width != 6:
        both.projection.load_state_dict(theirs.projection.state_dict())
    soft = make("kl").compute_loss_from_embeddings(student, teacher)
    torch.testing.assert_close(both.compute_loss_from_embeddings(student, teacher), soft + values[0])


# ---- teachers


def whole(loss: EmbedDistillLoss, model: nn.Module, batch: list[dict[str, Tensor]], labels: Any = None) -> tuple:
    """Loss and all gradients, the projection's too."""
    loss.zero_grad()
    value, grads = value_and_grads(loss, model, batch, labels, upstream=0.5)
    own = {} if loss.projection is None else dict(loss.projection.named_parameters(prefix="own"))
    return value, grads | {name: parameter.grad.clone() for name, parameter in own.items()}


@pytest.mark.parametrize("columns", [1, 2])
@pytest.mark.parametrize("kind", ["same tokens", "other tokens", "function", "static student"])
def test_teachers_and_mini_batches(kind: str, columns: int, student_dir: str, other_dir: str) -> None:
    model = static_model() if kind == "static student" else build(student_dir)
    teacher = build(student_dir, dense(), dropout=True) if kind == "same tokens" else guide_of(other_dir)
    width = OUT if kind == "same tokens" else WIDTH
    texts = [sentences(ROWS, column) for column in range(columns)]
    with torch.no_grad():
        teacher.eval()
        expected = [teacher(teacher.preprocess(column))["sentence_embedding"] for column in texts]
        teacher.train()

    def function(given: list[str]) -> Any:
        assert given in texts
        return teacher.encode(given)  # numpy

    options = {"hidden": "mse", "teacher_dim": width}
    torch.manual_seed(3)
    reference = make("kl", model, **options).double()
    batch = features(model, ROWS, columns)
    results = [whole(reference, model, batch, torch.stack(expected, 1) if columns > 1 else expected[0])]
    if kind == "function":
        teacher.eval()
    for mini_batch_size in (None, 3):
        torch.manual_seed(3)
        given = function if kind == "function" else teacher
        loss = make("kl", model, given, mini_batch_size=mini_batch_size, **options).double()
        loss.train()
        results.append(whole(loss, model, batch))
    assert len(results[0][1]) > 2
    for result in results[1:]:
        assert_same(result, results[0])
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_no_gradients_in_evaluation(student_dir: str) -> None:
    model = build(student_dir)
    values = []
    for mini_batch_size in (None, 2):
        loss = make("kl", model, build(student_dir, dense()), mini_batch_size=mini_batch_size)
        with torch.no_grad():
            values.append(loss(features(model, ROWS, 2)))
    assert not values[0].requires_grad
    torch.testing.assert_close(*values, **TOLERANCE)


# ---- the real trainer


@pytest.mark.slow
@pytest.mark.parametrize("run", ["texts", "cached", "labels, hidden"])
def test_trains(run: str, student_dir: str, other_dir: str, tmp_path: Path) -> None:
    from datasets import Dataset

    model, teacher = build(student_dir, dtype=torch.float32), guide_of(other_dir).float()
    before = copy.deepcopy(teacher.state_dict())
    columns = {f"text_{i}": sentences(16, i) for i in range(1 if run == "texts" else 2)}
    options: dict[str, Any] = {"mini_batch_size": 2} if run == "cached" else {}
    if run == "labels, hidden":
        columns["label"] = [list(pair) for pair in zip(*(teacher.encode(c).tolist() for c in columns.values()))]
        options |= {"hidden": "cosine", "teacher_dim": WIDTH}
    loss = make("jsd", model, None if "label" in columns else teacher, **options)
    start = None if loss.projection is None else loss.projection.weight.detach().clone()
    data = Dataset.from_dict(columns)
    trainer = train(model, loss, data, tmp_path / "run", learning_rate=1e-2)
    assert trainer.evaluate()["eval_loss"] < 0.9 * trainer.state.log_history[0]["loss"]
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert start is None or not torch.equal(loss.projection.weight, start)
    model.save_pretrained(str(tmp_path / "saved"))
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "distill.sentence_transformers.EmbedDistillLoss" in card and '"loss": "jsd"' in card
    assert "fang2021seed" in card
    model.eval()
    again = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    torch.testing.assert_close(
        again.encode(["a cat"], convert_to_tensor=True), model.encode(["a cat"], convert_to_tensor=True)
    )


# ---- processes

WORLD, SHARDS = 2, [slice(0, 4), slice(4, 7)]
CASES = {"one column": (1, "kl"), "pairs": (2, [("ce", 0.5), ("jsd", 0.5)]), "negatives": (3, "tvd")}
if EXACT:
    CASES |= {f"{name}, cached": case for name, case in CASES.items()}


def check(name: str, rank: int, folder: str, teacher: str) -> None:
    """Each process with its share of the texts gives what one with all of them gives."""
    from torch.nn.parallel import DistributedDataParallel

    columns, terms = CASES[name]
    model = build(folder, Normalize())
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_("pooler" not in parameter_name)  # without use here: DDP would wait for it

    def new(**options: Any) -> EmbedDistillLoss:
        torch.manual_seed(3)
        return make(terms, model, guide_of(teacher), hidden="mse", hidden_weight=0.1, **options).double()

    expected = whole(new(), model, features(model, ROWS, columns))
    options = {"mini_batch_size": 2} if "cached" in name else {}
    loss = new(gather_across_devices=True, **options)
    assert loss.projection is not None and loss.projection.weight.shape == (WIDTH, HIDDEN)
    loss.model = DistributedDataParallel(model)
    value, grads = whole(loss, model, features(model, ROWS, columns, rows=SHARDS[rank]))
    dist.all_reduce(value)
    assert_same((value / WORLD, grads), expected)


@pytest.fixture(scope="module")
def outcomes(
    request: pytest.FixtureRequest, student_dir: str, other_dir: str, tmp_path_factory: pytest.TempPathFactory
) -> Outcomes:
    return run_checks(check, asked(request), WORLD, tmp_path_factory.mktemp("ranks"), student_dir, other_dir)


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs torch.distributed with gloo")
@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_one_with_the_whole_batch(name: str, outcomes: Outcomes) -> None:
    assert_passed(name, outcomes)


# ---- mistakes


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"loss": None}, ValueError, "a loss or hidden"),
        ({"loss": "kld"}, ValueError, "expected a divergence among"),
        ({"loss": TopKLoss()}, TypeError, "TopKLoss"),
        ({"hidden": "l2"}, ValueError, "hidden"),
        *(({"scale": scale}, ValueError, "scale") for scale in (0.0, -1.0, float("nan"))),
        *(({"scale": scale}, TypeError, "scale") for scale in (None, "20")),
        *(({"loss": loss}, TypeError, "expected loss") for loss in (KLDivLoss, nn.KLDivLoss(), {"kl": 1.0}, 3)),
        ({"teacher_scale": "20"}, TypeError, "teacher_scale"),
        *(({"model": model}, TypeError, "a SentenceTransformer as model") for model in ("a", nn.Linear(2, 2), None)),
        ({"hidden_weight": float("nan")}, ValueError, "hidden_weight"),
        ({"teacher": "a name"}, TypeError, "teacher"),
        ({"mini_batch_size": 0}, ValueError, "mini_batch_size"),
    ],
)
def test_wrong_options_are_refused(options: dict, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        EmbedDistillLoss(**{"model": Idle()} | options)


def test_a_teacher_that_would_be_trained_is_refused(student_dir: str) -> None:
    model = build(student_dir)
    for teacher in (model, SentenceTransformer(modules=[model[0]], device="cpu")):
        with pytest.raises(ValueError, match="a teacher apart from the model"):
            make("kl", model, teacher)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        (None, TypeError, r"returns embeddings \(N, D\), got NoneType"),
        ([torch.ones(4)] * ROWS, TypeError, r"got list of \['Tensor'\]"),
        (torch.ones(ROWS), ValueError, r"\(7, D\) each, got shapes \[\(7,\)\]"),
        (torch.ones(ROWS, 2, 2), ValueError, r"got shapes \[\(7, 2, 2\)\]"),
    ],
)
def test_what_a_function_gives_is_checked(given: Any, kind: type[Exception], message: str, student_dir: str) -> None:
    model = build(student_dir)
    with pytest.raises(kind, match=message):
        make("kl", model, lambda texts: given)(features(model, ROWS, 1))


def test_labels_beside_a_teacher(student_dir: str) -> None:
    model = build(student_dir)
    loss, batch = make("kl", model, guide := build(student_dir, dense())), features(model, ROWS, 1)
    assert guide.training is False
    torch.testing.assert_close(loss(batch, torch.arange(ROWS)), loss(batch))
    with pytest.raises(ValueError, match="got both"):
        loss(batch, torch.ones(ROWS, OUT))


@pytest.mark.parametrize(
    ("loss", "options", "student", "teacher", "message"),
    [
        ("kl", {}, embeddings(ROWS, 2), None, "a teacher, or its embeddings"),
        ("kl", {}, embeddings(ROWS, 2), embeddings(ROWS, 1), "2 columns of 7"),
        ("kl", {}, embeddings(ROWS, 2), embeddings(ROWS, 1)[0], "2 columns of 7"),
        ("kl", {}, embeddings(ROWS, 1), embeddings(ROWS - 1, 1), "1 columns of 7"),
        ([("kl", 0.5), ("mse", 0.5)], {}, embeddings(ROWS, 1), embeddings(ROWS, 1), "all take a softmax"),
        (TAIDLoss(student_softcap=9.0), {}, embeddings(ROWS, 1), embeddings(ROWS, 1), "soft-cap"),
        (TAIDLoss(weight_hard=1.0), {}, embeddings(ROWS, 1), embeddings(ROWS, 1), "two columns .*weight_hard"),
        ([("ce", 0.5), ("kl", 0.5)], {}, embeddings(ROWS, 1), embeddings(ROWS, 1), 'two columns .*"ce"'),
        ("kl", {}, embeddings(ROWS, 1), [torch.ones(ROWS)], r"got shapes \[\(7,\)\]"),
        (None, {"hidden": "mse"}, embeddings(ROWS, 1), embeddings(ROWS, 1, width=9), "teacher_dim"),
    ],
)
def test_wrong_embeddings_are_refused(loss: Any, options: dict, student: list, teacher: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(loss, **options).compute_loss_from_embeddings(student, teacher)


@pytest.mark.parametrize("teacher", [[[1.0] * 6] * ROWS, "text", [None]])
def test_embeddings_are_tensors(teacher: Any) -> None:
    with pytest.raises(TypeError, match="as tensors, one a column"):
        make().compute_loss_from_embeddings(embeddings(ROWS, 1), teacher)
