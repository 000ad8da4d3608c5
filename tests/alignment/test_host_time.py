"""What a call of a preference or a distillation loss costs the host, beside the engine: operations, each a launch on a
GPU, transfers, which wait for it, and checks, which a second call of a kind need not repeat."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import alignment as A
import distill as D
from chunked_embed import Head, head
from chunked_embed.engine import pack
from chunked_embed.fields import Fields

TOKENS, HIDDEN, VOCABULARY, PAIRS = 6, 8, 31, 2
aten = torch.ops.aten
VIEWS = {aten.view, aten.detach, aten.t, aten.slice, aten.select, aten.alias, aten.unsqueeze, aten.expand, aten.empty}
VIEWS |= {
    aten.as_strided,
    aten.split,
    aten.unbind,
    aten.transpose,
    aten.empty_like,
    aten.scalar_tensor,
    aten._unsafe_view,
}


PACKAGES = ("alignment", "distill", "chunked_embed")


def package() -> str:
    """Which of ours is innermost on the stack."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        name = frame.f_globals.get("__name__", "").partition(".")[0]
        if name in PACKAGES:
            return name
        frame = frame.f_back
    return ""


class Launches(TorchDispatchMode):
    """Counts operations by the package that calls them: those of ours, and what the engine does for them."""

    def __init__(self) -> None:
        super().__init__()
        self.by_package: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket not in VIEWS:
            self.by_package[package()] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def transfers(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often a tensor is read, by the package that reads it."""
    found: Counter[str] = Counter()

    def counted(function: Callable) -> Callable:
        def read(*args: Any, **kwargs: Any) -> Any:
            found[package()] += 1
            return function(*args, **kwargs)

        return read

    for name in ("item", "tolist", "nonzero", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__"):
        monkeypatch.setattr(Tensor, name, counted(getattr(Tensor, name)))
    return found


def made(features: int = HIDDEN) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    hidden, ref_hidden = (torch.randn(2 * PAIRS, TOKENS, features, generator=g) for _ in range(2))
    weight, ref_weight = (torch.randn(VOCABULARY, features, generator=g) for _ in range(2))
    target = torch.randint(VOCABULARY, (2 * PAIRS, TOKENS), generator=g)
    target[:, 0] = -100
    return {
        "hidden": hidden.requires_grad_(),
        "weight": weight.requires_grad_(),
        "target": target,
        "reference": {"ref_hidden": ref_hidden, "ref_weight": ref_weight},
        "labels": torch.tensor([True, False] * PAIRS),
        "logps": -torch.rand(2 * PAIRS, generator=g),
        "with_prompt": torch.where(target < 0, 3, target),
        "ids": torch.arange(4).expand(2 * PAIRS, TOKENS, 4),
        "logprobs": torch.full((2 * PAIRS, TOKENS, 4), -2.0),
    }


def loose(x: dict[str, Any], **further: Any) -> dict[str, Any]:
    return {"hidden": x["hidden"], "weight": x["weight"], "target": x["target"], **further}


def sides(x: dict[str, Any], **further: Any) -> dict[str, Any]:
    given = {"student_hidden": x["hidden"], "student_weight": x["weight"]}
    reference = x["reference"]
    return given | {"teacher_hidden": reference["ref_hidden"], "teacher_weight": reference["ref_weight"], **further}


def both_heads(x: dict[str, Any]) -> tuple[Head, Head]:
    return Head(x["hidden"], x["weight"]), Head(*x["reference"].values())


def several(**options: Any) -> A.DPOLoss:
    return A.DPOLoss(loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0], **options)


Case = tuple[Callable[..., Any], Callable[[dict[str, Any]], dict[str, Any]], int, int | None]
# A loss; the arguments of a call; how many operations of its own it has in front of the engine, and in all of forward.
CASES: dict[str, Case] = {
    "DPO": (A.DPOLoss, lambda x: loose(x, **x["reference"]), 2, 21),
    "DPO, heads": (
        A.DPOLoss,
        lambda x: {"target": x["target"]} | dict(zip(("hidden", "ref"), both_heads(x), strict=True)),
        2,
        21,
    ),
    "DPO, ref_logps": (A.DPOLoss, lambda x: loose(x, ref_logps=x["logps"]), 3, 22),
    "DPO, tails": (lambda **o: A.DPOLoss(ld_alpha=0.5, **o), lambda x: loose(x, **x["reference"]), 9, 35),
    "MPO": (several, lambda x: loose(x, **x["reference"]), 2, 37),
    "f-PO": (A.FPOLoss, lambda x: loose(x, **x["reference"]), 2, 39),
    "SimPO": (A.SimPOLoss, loose, 2, 24),
    "ORPO": (A.ORPOLoss, lambda x: loose(x, nll_target=x["with_prompt"]), 13, 61),
    "KTO": (
        A.KTOLoss,
        lambda x: loose(x, preference_labels=x["labels"], ref_logps=x["logps"], kl=torch.tensor(0.1)),
        2,
        29,
    ),
    "BCO": (A.BCOLoss, lambda x: loose(x, preference_labels=x["labels"], ref_logps=x["logps"]), 2, 33),
    "KL": (D.KLDivLoss, sides, 0, None),
    "KL, mask": (D.KLDivLoss, lambda x: sides(x, target=x["target"]), 4, None),
    "KL + CE": (lambda **o: D.KLDivLoss(weight_hard=0.5, **o), lambda x: sides(x, target=x["target"]), 0, None),
    "KL + CE of a step": (
        lambda **o: D.KLDivLoss(weight_hard=0.5, **o),
        lambda x: (
            dict(zip(("student_hidden", "student_weight"), both_heads(x), strict=True))
            | {"target": x["target"], "num_items": 7}
        ),
        2,
        None,
    ),
    "top k": (
        D.TopKLoss,
        lambda x: (
            {"student_hidden": x["hidden"], "student_weight": x["weight"], "target": x["target"]}
            | {"teacher_ids": x["ids"], "teacher_logprobs": x["logprobs"]}
        ),
        20,
        None,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_few_operations_and_no_transfers(name: str, transfers: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    make, arguments, before, in_all = CASES[name]
    loss, given = make(compiled=False), arguments(made())
    own = "distill" if isinstance(loss, D.DistillationLoss) else "alignment"
    loss(**given).loss.backward()
    monkeypatch.setattr(pack._Rows, "all_count", lambda self: False)  # which reads on a CPU, where that is nothing
    transfers.clear()
    with Launches() as counted:
        prepared = loss.prepare(**given)
        assert counted.by_package[own] <= before, counted.by_package
        out = prepared.run()
    assert in_all is None or counted.by_package[own] <= in_all, counted.by_package
    assert not transfers[own] and transfers.total() <= 1, transfers
    assert not any(value.requires_grad for value in out.metrics.values())


@pytest.mark.parametrize("name", ["DPO", "ORPO", "KTO", "KL + CE", "top k"])
def test_a_second_call_of_a_kind_is_not_checked_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, arguments, *_ = CASES[name]
    loss, x, seen = make(compiled=False), made(), Counter[str]()

    def counted(name: str, function: Callable) -> Callable:
        def call(*given: Any, **named: Any) -> Any:
            seen[name] += 1
            return function(*given, **named)

        return call

    monkeypatch.setattr(Fields, "check", counted("options", Fields.check))
    monkeypatch.setattr(head, "check_head", counted("heads", head.check_head))
    first = loss(**arguments(x)).loss
    assert seen["options"] == 1 and seen.pop("heads") >= 1
    torch.testing.assert_close(loss(**arguments(x)).loss, first)
    assert seen == {"options": 1}
    wide = made(HIDDEN + 1)
    loss(**arguments(wide))
    assert seen["options"] == 1 and seen["heads"] >= 1
    loss.temperature = 1.5
    if name == "top k":
        loss.teacher_temperature = 1.5
    assert not torch.equal(loss(**arguments(x)).loss, first)
    assert seen["options"] == 2


NONSENSE: list[tuple[str, str, Any]] = [
    ("DPO", "beta", -1.0),
    ("DPO", "beta", torch.tensor(0.1)),
    ("DPO", "label_smoothing", 0.2),  # which nothing reads
    ("DPO", "loss_type", "nonsense"),
    ("MPO", "loss_weights", [1.0]),
    ("DPO", "chunk_size", 0),
    ("DPO", "token_metrics", 1),
    ("KTO", "desirable_weight", float("nan")),
    ("KL + CE", "temperature", 0),
    ("KL + CE", "vocabulary", None),
    ("KL + CE", "report", ["nonsense"]),
    ("top k", "tail", "nonsense"),
    ("top k", "teacher_temperature", 2.0),  # not the loss's
]


@pytest.mark.parametrize(("name", "attribute", "value"), NONSENSE)
def test_an_option_that_becomes_nonsense_is_refused(name: str, attribute: str, value: Any) -> None:
    make, arguments, *_ = CASES[name]
    loss, given = make(compiled=False), arguments(made())
    before = getattr(loss, attribute)
    for _ in range(2):
        loss(**given)
    setattr(loss, attribute, value)
    for _ in range(2):
        with pytest.raises((TypeError, ValueError), match="expected"):
            loss(**given)
    setattr(loss, attribute, before)
    loss(**given)


def test_a_list_that_changes_in_place_is_seen() -> None:
    loss, given = several(compiled=False), loose(x := made(), **x["reference"])
    first = [loss(**given).loss for _ in range(2)][1]
    loss.loss_weights[0] = 0.5
    assert not torch.equal(loss(**given).loss, first)
    loss.loss_type[1] = "nonsense"
    with pytest.raises(ValueError, match="loss_type"):
        loss(**given)


class Strict(A.DPOLoss):
    """A check that looks at more than options."""

    limit = 1.0

    def check(self) -> None:
        super().check()
        if self.beta > self.limit:
            raise ValueError(f"expected beta of {self.limit} or less, got {self.beta}")


def test_a_check_of_ones_own_is_made_in_each_call() -> None:
    loss, given = Strict(beta=0.5, compiled=False), loose(x := made(), **x["reference"])
    loss(**given)
    loss.limit = 0.1
    with pytest.raises(ValueError, match=r"expected beta of 0\.1"):
        loss(**given)


@pytest.mark.parametrize("name", ["DPO", "ORPO", "KTO", "KL + CE", "top k"])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda x: {"target": x["target"][:, :-1]}, "expected target of shape"),
        (lambda x: {"target": x["target"].float()}, "expected target to hold integers"),
        (lambda x: {"target": x["target"].to("meta")}, "expected target on cpu"),
        (lambda x: {"weight": x["weight"].detach()[:, 1:]}, "weight of shape"),
        (lambda x: {"weight": x["weight"].detach().long()}, "weight to be floating point"),
        (lambda x: {"hidden": x["hidden"].detach().to_sparse()}, "hidden to be a dense tensor"),
        (lambda x: {"hidden": None}, "hidden"),
    ],
)
def test_arguments_are_refused_after_calls_that_were_right(
    name: str, wrong: Callable[[dict[str, Any]], dict[str, Any]], message: str
) -> None:
    make, arguments, *_ = CASES[name]
    loss, x = make(compiled=False), made()
    loss(**arguments(x))
    with pytest.raises((TypeError, ValueError), match=message):
        loss(**arguments({**x, **wrong(x)}))


def test_copies_and_pickles_know_of_no_calls() -> None:
    loss, given = A.DPOLoss(compiled=False), loose(x := made(), **x["reference"])
    first = loss(**given).loss
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(other(**given).loss, first)
        other.beta = -1.0
        with pytest.raises(ValueError, match="beta"):
            other(**given)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_no_batch_is_kept_alive(name: str) -> None:
    make, arguments, *_ = CASES[name]
    loss = make(compiled=False)
    for _ in range(2):  # the second is of a known kind
        x = made()
        kept = [weakref.ref(value) for value in x.values() if isinstance(value, Tensor)]
        given = arguments(x)
        out = loss(**given)
        metrics = {name: value.clone() for name, value in out.metrics.items()}
        del out, given, x
        gc.collect()
        assert metrics and not any(ref() is not None for ref in kept)
