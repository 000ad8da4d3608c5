"""What trainers share, without one: the loss in a model's forward, its check, and means over processes."""

from __future__ import annotations

import inspect
import itertools
import textwrap
from contextlib import nullcontext
from pathlib import Path
from types import MethodType, ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from alignment import CPOLoss, DPOLoss
from chunked_embed import Head, LossOutput, causal_lm, trainers
from chunked_embed.trainers import HeadTrainer, check_given_loss, warn_untested

transformers = pytest.importorskip("transformers")
IDS = torch.tensor([[5, 9, 2, 33], [8, 3, 4, 11]])


class Processes:
    """An accelerator of two processes that have the same."""

    autocast = nullcontext
    num_processes = 2
    is_main_process = True

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
        out = trainer.run_loss(trainer.model, {"input_ids": IDS}, IDS[:, 1:], loss)
        head = trainer.frozen_head(trainer.model, {"input_ids": IDS}, IDS[:, 1:])
        found = trainer.token_logps(trainer.model, {"input_ids": IDS}, IDS[:, 1:], compiled=False)
        log_p = trainer.model(IDS).logits[:, :-1].log_softmax(-1)
    expected = log_p.gather(-1, IDS[:, 1:, None])[..., 0]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(head.logits().log_softmax(-1), log_p)
    assert isinstance(head, Head) and head.transform == (0.3, None)
    torch.testing.assert_close(out.metrics["logps/chosen"], expected[:1].sum(1))
    assert out.counts["entropy"] == 6


def test_each_model_is_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, seen = Trainer(), []
    monkeypatch.setattr(causal_lm, "check", lambda model, inputs: seen.append(model))
    for _ in range(2):
        trainer.check_once(trainer.model, {"input_ids": IDS})
    assert seen == [trainer.model]
    with pytest.raises(ValueError, match="expected input_ids below 40, the embeddings of the teacher, got 77"):
        Trainer().check_once(trainer.model, {"input_ids": IDS + 44}, "the teacher")


def test_a_forward_that_was_replaced_is_ours_again_at_each_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer()
    monkeypatch.setattr(causal_lm, "check", lambda model, inputs: None)
    model = trainer.model
    for _ in range(2):
        trainer.check_once(model, {"input_ids": IDS})
        assert trainer.token_logps(model, {"input_ids": IDS}, IDS[:, 1:], compiled=False).shape == (2, 3)
        model.forward = MethodType(type(model).forward, model)  # by a library that knows nothing of ours


def small() -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, initializer_range=0.2, **sizes))


def rows(count: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for k in range(count):
        ids = torch.randint(3, 64, (9,), generator=generator)
        labels = ids.masked_fill(torch.arange(9) < 1 + k % 4, -100)
        found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return found


@pytest.mark.parametrize("flat", [False, True], ids=["padded", "documents in one row"])
def test_the_documented_trainer_trains_as_transformers_own(flat: bool, tmp_path: Path) -> None:
    """The example of the module's docstring, as it stands there."""
    source = inspect.getdoc(trainers).split("::\n\n", 1)[1]
    lines = itertools.takewhile(lambda line: not line or line.startswith(" "), source.splitlines())
    names: dict[str, Any] = {}
    exec(textwrap.dedent("\n".join(lines)), names)
    settings = {"max_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "logging_steps": 1}
    settings |= {"learning_rate": 1.0, "optim": "sgd", "report_to": "none", "use_cpu": True, "save_strategy": "no"}
    logs, weights = [], []
    for kind in (transformers.Trainer, names["ChunkedSFTTrainer"]):
        args = transformers.TrainingArguments(str(tmp_path), disable_tqdm=True, **settings)
        data = {"train_dataset": rows(12), "eval_dataset": rows(4)}
        if flat:
            data["data_collator"] = lambda batch: transformers.DataCollatorWithFlattening()(
                [{name: row[name].tolist() for name in ("input_ids", "labels")} for row in batch]
            )
        trainer = kind(small(), args, **data)
        trainer.train()
        logs.append([*(entry["loss"] for entry in trainer.state.log_history[:3]), trainer.evaluate()["eval_loss"]])
        weights.append(list(trainer.model.parameters()))
    assert logs[1] == pytest.approx(logs[0], rel=1e-5)
    for ours, theirs, before in zip(weights[1], weights[0], small().parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        assert (ours - before).abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore::UserWarning:peft")  # of tied weights
@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
def test_adapters_that_are_not_served_are_refused_when_the_trainer_is_made() -> None:
    peft = pytest.importorskip("peft")
    trainer = Trainer()
    trainer.model = peft.get_peft_model(trainer.model, peft.LoHaConfig(target_modules=["lm_head"]))
    with pytest.raises(TypeError, match="expected an adapter on the LM head to be LoRA"):
        trainer.attach_model()


def test_means_over_processes() -> None:
    counts = {"kl": torch.tensor([1, 0, 1]), "entropy": torch.tensor(4), "nowhere": torch.tensor(0)}
    metrics = {"kl": torch.tensor([3.0, 0.0, 5.0]), "entropy": torch.tensor(2.0), "nowhere": torch.tensor(0.0)}
    out = LossOutput(torch.tensor(0.0), {**metrics, "margin": torch.tensor([1.0, 2.0])}, counts)
    assert out.means == {"kl": 4, "entropy": 2, "nowhere": 0, "margin": 1.5}
    for gather in (True, False):
        assert Trainer().means_of(out.sums, gather) == {"kl": 4, "entropy": 2, "margin": 1.5}
    assert Trainer().means_of({}) == {}


def test_many_metrics_are_summed_as_each_alone() -> None:
    g = torch.Generator().manual_seed(0)
    metrics = {f"{kind}{k}": torch.randn(shape, generator=g) for kind, shape in KINDS.items() for k in range(5)}
    counts = {name: torch.randint(3, value.shape, generator=g) for name, value in metrics.items() if name[0] in "ts"}
    counts |= {name: torch.tensor([2, 0, 1]) for name in metrics if name[0] == "b"}  # of each column
    metrics |= {"right": torch.tensor([True, False, True]), "wide": torch.tensor(2.0, dtype=torch.float64)}
    out = LossOutput(torch.tensor(0.0), metrics, counts)
    assert list(out.sums) == list(out.means) == list(metrics)
    for name, value in metrics.items():
        alone = LossOutput(out.loss, {name: value}, {name: counts[name]} if name in counts else None)
        for found, expected in zip(out.sums[name], alone.sums[name], strict=True):
            torch.testing.assert_close(found, expected, check_dtype=False)
        torch.testing.assert_close(out.means[name], alone.means[name])


KINDS: dict[str, tuple[int, ...]] = {"pairs": (7,), "tokens": (2, 3), "sums": (), "broad": (2, 3), "numbers": ()}


def test_a_step_is_divided_by_the_tokens_of_all_processes() -> None:
    trainer = Trainer()
    for shared, expected in ((True, 5.0), (False, 10.0)):
        trainer.args.average_tokens_across_devices = shared
        assert trainer.items_per_process(10) == trainer.items_per_process(torch.tensor(10)) == expected
        assert trainer.items_per_process(0) == expected / 10  # all tokens ignored
        assert trainer.items_per_process(None) is None


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
        (None, ["chunk_size"], "expected loss_options to be a dict of keywords, got"),
        (None, {3: 4}, "expected loss_options to be a dict of keywords, got"),
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
