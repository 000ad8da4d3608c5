"""Against liger-kernel, where it has the loss. Its sums are float32."""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

import pytest
import torch
from preference_zoo import make_batch

import alignment as A

EAGER: dict[str, Any] = {"compiled": False}
DPO_TYPES = [
    "sigmoid",
    "hinge",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "discopop",
]


@pytest.fixture(scope="module")
def liger() -> Any:
    if importlib.util.find_spec("liger_kernel") is None:
        pytest.skip("needs liger-kernel")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("liger_kernel.chunked_loss", exc_type=ImportError)


@pytest.mark.parametrize("name", [*DPO_TYPES, "simpo", "cpo_simpo", "cpo", "orpo", "kto"])
def test_same_as_liger(name: str, liger: Any) -> None:
    batch = make_batch(3, dtype=torch.float64)
    reference: dict[str, Any] = batch.reference() if name in (*DPO_TYPES, "kto") else {}
    call: dict[str, Any] = {}
    theirs: Any
    ours: Any
    if name in DPO_TYPES:
        e = 0.1 if name in ("exo_pair", "robust") else 0.0
        theirs = liger.LigerFusedLinearDPOLoss(beta=0.2, loss_type=name, label_smoothing=e, compiled=False)
        ours = A.DPOLoss(0.2, name, label_smoothing=e, **EAGER)
    elif name in ("simpo", "cpo_simpo"):
        nll = name == "cpo_simpo"
        theirs = liger.LigerFusedLinearSimPOLoss(beta=2.0, gamma=0.3, compute_nll_loss=nll, compiled=False)
        ours = A.CPOSimPOLoss(2.0, 0.3, **EAGER) if nll else A.SimPOLoss(2.0, 0.3, **EAGER)
    elif name == "cpo":
        theirs = liger.LigerFusedLinearCPOLoss(beta=0.2, alpha=0.7, compiled=False)
        ours = A.CPOLoss(0.2, alpha=0.7, **EAGER)
    elif name == "orpo":
        theirs = liger.LigerFusedLinearORPOLoss(beta=0.2, compiled=False)
        ours, call = A.ORPOLoss(0.2, **EAGER), {"nll_target": batch.prompt_target}
    else:
        theirs = liger.LigerFusedLinearKTOLoss(beta=0.2, use_ref_model=True, compiled=False)
        ours, call = A.KTOLoss(0.2, **EAGER), {"preference_labels": batch.labels, "kl": torch.tensor(0.3)}
    renamed = {k.replace("ref_hidden", "ref_input"): v for k, v in reference.items()}
    expected, _ = (
        theirs(batch.weight, batch.hidden, batch.target, bias=batch.bias, **renamed, **call)
        if (name != "kto")
        else theirs(batch.hidden, batch.weight, batch.target, bias=batch.bias, **renamed, **call)
    )
    out = ours(batch.hidden, batch.weight, batch.target, bias=batch.bias, **reference, **call)
    torch.testing.assert_close(out.loss.float(), expected.float(), rtol=2e-5, atol=1e-6)
    wanted = torch.autograd.grad(expected, batch.leaves)
    for a, b in zip(torch.autograd.grad(out.loss, batch.leaves), wanted, strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=1e-3, atol=1e-5)
