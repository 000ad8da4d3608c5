"""What trainers share, without one: the loss in a model's forward, its check, and means over processes."""

from __future__ import annotations

from contextlib import nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from alignment import CPOLoss, DPOLoss
from chunked_embed import Head, LossOutput, causal_lm
from chunked_embed.trainers import HeadTrainer, check_given_loss, warn_untested

transformers = pytest.importorskip("transformers")
IDS = torch.tensor([[5, 9, 2, 33], [8, 3, 4, 11]])


class Processes:
    """An accelerator of two processes that have the same."""

    autocast = nullcontext

    def gather(self, x: Tensor) -> Tensor:
        return torch.cat([x, x])


class Trainer(HeadTrainer):
    def __init__(self, n_gpu: int = 1, parallel: Any = None) -> None:
        sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = transformers.CohereConfig(
            vocab_size=40, logit_scale=0.3, num_key_value_heads=2, pad_token_id=0, **sizes
        )
        torch.manual_seed(0)
        self.model = transformers.CohereForCausalLM(config).double().eval()
        self.args = SimpleNamespace(n_gpu=n_gpu)
        self.accelerator = Processes()
        self.accelerator.parallelism_config = parallel
        self.attach_model()


def test_a_loss_in_the_models_forward() -> None:
    trainer, loss = Trainer(), CPOLoss(compiled=False)
    trainer.check_once(trainer.model, {"input_ids": IDS})
    with torch.no_grad():
        out, aux_loss = trainer.run_loss(
            trainer.model, {"input_ids": IDS}, IDS[:, 1:], lambda head, target: loss(head, target=target)
        )
        head = trainer.frozen_head(trainer.model, {"input_ids": IDS}, IDS[:, 1:])
        found = trainer.token_logps(trainer.model, {"input_ids": IDS}, IDS[:, 1:], compiled=False)
        log_p = trainer.model(IDS).logits[:, :-1].log_softmax(-1)
    expected = log_p.gather(-1, IDS[:, 1:, None])[..., 0]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(head.logits().log_softmax(-1), log_p)
    assert isinstance(head, Head) and head.transform == (0.3, None)
    torch.testing.assert_close(out.metrics["logps/chosen"], expected[:1].sum(1))
    assert aux_loss is None and out.counts["entropy"] == 6


def test_each_model_is_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, seen = Trainer(), []
    monkeypatch.setattr(causal_lm, "check", lambda model, inputs: seen.append(model))
    for _ in range(2):
        trainer.check_once(trainer.model, {"input_ids": IDS})
    assert seen == [trainer.model]
    with pytest.raises(ValueError, match="expected input_ids below 40, the embeddings of the teacher, got 77"):
        Trainer().check_once(trainer.model, {"input_ids": IDS + 44}, "the teacher")


def test_means_over_processes() -> None:
    counts = {"kl": torch.tensor([1, 0, 1]), "entropy": torch.tensor(4), "nowhere": torch.tensor(0)}
    metrics = {"kl": torch.tensor([3.0, 0.0, 5.0]), "entropy": torch.tensor(2.0), "nowhere": torch.tensor(0.0)}
    out = LossOutput(torch.tensor(0.0), {**metrics, "margin": torch.tensor([1.0, 2.0])}, counts)
    assert out.means == {"kl": 4, "entropy": 2, "nowhere": 0, "margin": 1.5}
    for gather in (True, False):
        assert Trainer().means_of(out.sums, gather) == {"kl": 4, "entropy": 2, "margin": 1.5}
    assert Trainer().means_of({}) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_gpu": 2}, "a process for each GPU"),
        ({"parallel": SimpleNamespace(cp_enabled=True, sp_enabled=False)}, "context or sequence parallelism"),
    ],
)
def test_what_cannot_be_served(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Trainer(**options)


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        ("sigmoid", None, "expected loss to be a DPOLoss, got str"),
        (CPOLoss(), None, "expected loss to be a DPOLoss, got CPOLoss"),
        (DPOLoss(), {"beta": 1.0}, "expected loss or loss_options, got both"),
        (DPOLoss(ignore_index=-1), None, "ignore_index=-100, as trainers count labels, got -1"),
        (None, {"ignore_index": 0}, "ignore_index=-100, as trainers count labels, got 0"),
    ],
)
def test_losses_that_are_given(loss: Any, options: dict[str, Any] | None, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        check_given_loss(loss, DPOLoss, options)


def test_a_library_that_moved_on() -> None:
    library = ModuleType("trl")
    library.__version__ = "1.17.2"
    with pytest.warns(UserWarning, match=r"mine is written for trl 1\.16\.x and not tried with 1\.17\.2"):
        warn_untested("mine", library, "1.16.")
