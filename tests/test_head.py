"""``Head``: its parts stay together, and it refuses what makes no logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from chunked_embed import Head, causal_lm, checks
from chunked_embed.signatures import signature


def make(**options: Any) -> Head:
    g = torch.Generator().manual_seed(0)
    hidden, weight, bias, down, up = (
        torch.randn(*shape, dtype=torch.float64, generator=g) for shape in ((2, 5, 4), (11, 4), (11,), (2, 4), (11, 2))
    )
    given: dict[str, Any] = {"hidden": hidden, "weight": weight, "bias": bias, "extra": [(hidden @ down.T, up)]}
    return Head(**{**given, "logit_scale": 0.5, "logit_softcap": 2.0, **options})


def plain(head: Head) -> torch.Tensor:
    y = head.hidden @ head.weight.T + head.bias + sum(x @ weight.T for x, weight in head.extra)
    return head.logit_softcap * torch.tanh(head.logit_scale * y / head.logit_softcap)


def test_logits_and_log_probabilities() -> None:
    head, target = make(), torch.randint(11, (2, 5))
    torch.testing.assert_close(head.logits(), plain(head))
    expected = plain(head).log_softmax(-1).gather(-1, target[..., None])[..., 0]
    torch.testing.assert_close(head.logps(target, compiled=False), expected)


def test_parts_stay_together() -> None:
    head = make()
    logits = plain(head)
    torch.testing.assert_close(head[:, 1:3].logits(), logits[:, 1:3])
    torch.testing.assert_close(head[torch.ones(2, 5) > 0].logits(), logits.flatten(0, 1))
    torch.testing.assert_close(head.shifted().logits(), logits[:, :-1])
    torch.testing.assert_close(head.shifted(3).logits(), logits[:, 2:-1])
    torch.testing.assert_close(head.cut(7).logits(), logits[..., :7])
    torch.testing.assert_close(head.to(torch.float32).logits(), logits.float())
    learning = make(weight=head.weight.requires_grad_())
    assert learning.logits().requires_grad and not learning.detach().logits().requires_grad
    assert head.projection.extra is head.extra and head.transform == (0.5, 2.0)
    assert causal_lm.Head is Head


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": [[1.0]]}, "expected hidden to be a tensor, got list"),
        ({"hidden": torch.zeros(2, 5, 4, device="meta")}, "expected hidden in memory"),
        ({"weight": torch.zeros(11, 5)}, r"expected weight of shape \(vocabulary, 4\), got \(11, 5\)"),
        ({"weight": torch.zeros(11, 4, dtype=torch.int8)}, "expected weight to be floating point"),
        ({"bias": torch.zeros(10)}, r"expected bias of shape \(11,\), got \(10,\)"),
        ({"extra": torch.zeros(2, 5)}, r"expected extra to be a tuple of \(input, weight\) pairs, got Tensor"),
        ({"extra": [(torch.zeros(2, 5, 1),)]}, r"expected extra\[0\] to be a pair"),
        ({"extra": [(torch.zeros(2, 5, 1), torch.zeros(11, 2))]}, r"expected extra\[0\]\[1\] of shape \(11, 1\)"),
        ({"logit_scale": 0.0}, "expected logit_scale to be a positive, finite number, got 0.0"),
        ({"logit_softcap": "30"}, "expected logit_softcap to be a positive, finite number, or None, got '30'"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        make(**options)


def test_one_vocabulary_but_for_padding() -> None:
    assert checks.one_vocabulary("policy and reference", 152_064, 151_936) == 151_936
    with pytest.raises(ValueError, match=r"policy and reference of one vocabulary.* got 2 and 9 tokens.*\[:2\]"):
        checks.one_vocabulary("policy and reference", 2, 9)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_signature_tells_calls_apart_that_a_check_would() -> None:
    hidden, weight = torch.zeros(2, 3, 4), torch.zeros(5, 4)
    same = signature(hidden, weight, None, ())
    assert same == signature(torch.ones(2, 3, 4), torch.nn.Parameter(weight), None, ()) != signature(hidden, weight)
    others = [
        (hidden[:1], weight, None, ()),
        (hidden, weight.half(), None, ()),
        (hidden, weight.to("meta"), None, ()),
        (hidden, weight.to_sparse(), None, ()),
        (hidden, weight, torch.zeros(5), ()),
        (hidden, weight, None, ((hidden, weight),)),
        (Head(hidden, weight), None, None, ()),
        (Head(hidden, weight, logit_scale=0.5), None, None, ()),
        (Head(hidden, weight, extra=((hidden, weight),)), None, None, ()),
    ]
    assert len({same, *(signature(*given) for given in others)}) == len(others) + 1

    class Other(torch.Tensor):
        pass

    ragged = torch.nested.nested_tensor([weight, weight[:2]])
    for unknown in (weight.as_subclass(Other), ragged, True, [], [(hidden, weight)], ((hidden,),)):
        assert signature(hidden, unknown) is None


def test_a_frozen_head_stays_as_it_is() -> None:
    head = make()
    assert head.detach().hidden is head.hidden and head.detach().extra[0][1] is head.extra[0][1]
    learning = make(weight=torch.zeros(11, 4, dtype=torch.float64, requires_grad=True))
    assert not learning.detach().weight.requires_grad and learning.detach().hidden is learning.hidden
