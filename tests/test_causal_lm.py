"""A loss inside a model's own forward, on models of transformers and in what wraps them."""

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from types import MethodType
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from alignment import CPOLoss
from chunked_embed import Head, LossOutput, causal_lm

transformers = pytest.importorskip("transformers")
from largest import Largest  # noqa: E402
from lm_parts import (  # noqa: E402
    IDS,
    INPUTS,
    MASK,
    MODELS,
    SIZES,
    assert_its_own,
    expected_logps,
    logps,
    make,
    plain,
)


@pytest.mark.parametrize("name", MODELS)
def test_log_probabilities_and_gradients_are_the_models_own(name: str) -> None:
    model = make(name)
    assert_its_own(model)
    causal_lm.check(model, INPUTS)


@pytest.mark.parametrize("name", MODELS)
def test_a_loss_of_a_head_is_that_of_the_models_logits(name: str) -> None:
    """What ``check`` compared is what the loss computes on: scale and cap come with the head, nobody sets them."""
    model, loss = make(name), CPOLoss(0.3, compiled=False)
    causal_lm.check(model, INPUTS)
    target = torch.where(MASK[:, 1:] > 0, IDS[:, 1:], -100)

    def of(head: Head) -> LossOutput:
        return loss(head.shifted(), target=target)

    out = model(input_ids=IDS, attention_mask=MASK, head_fn=of).value
    picked = expected_logps(model) * (target != -100)
    chosen, rejected = picked.sum(1)
    nll = -chosen / (target[0] != -100).sum()
    expected = nll - torch.nn.functional.logsigmoid(0.3 * (chosen - rejected))
    torch.testing.assert_close(out.loss, expected, rtol=1e-9, atol=1e-9)
    ours, theirs = (torch.autograd.grad(v, list(model.parameters())) for v in (out.loss, expected))
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9)


def test_everything_else_is_as_before() -> None:
    model = make("Llama")
    plain = copy.deepcopy(model)
    causal_lm.attach(model)  # again
    assert model.generate(IDS[:1], max_new_tokens=2, do_sample=False).shape == (1, 8)
    assert model(input_ids=IDS, labels=IDS).loss > 0
    with torch.no_grad():
        plain.model.norm.weight.zero_()  # a copy is a model of its own
    assert plain(input_ids=IDS, head_fn=lambda head: head.hidden.abs().sum()).value == 0
    assert model(input_ids=IDS, head_fn=lambda head: head.hidden.abs().sum()).value > 0
    with pytest.raises(ZeroDivisionError):
        model(input_ids=IDS, head_fn=lambda head: 1 / 0)
    assert torch.equal(model(input_ids=IDS).logits, model.lm_head(model.model(input_ids=IDS).last_hidden_state))


def t5() -> Any:
    sizes = {"vocab_size": 64, "d_model": 16, "d_ff": 16, "d_kv": 8, "num_layers": 1, "num_heads": 2}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))


def with_odd_head() -> Any:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    model.lm_head = nn.Sequential(nn.Linear(16, 64))
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: nn.Linear(2, 2), "expected a causal language model of transformers, got Linear"),
        (lambda: transformers.LlamaModel(transformers.LlamaConfig(**SIZES)), "with a backbone, got LlamaModel"),
        (t5, "decoder-only"),
        (with_odd_head, "Linear layer of floating weights, got Sequential"),
    ],
)
def test_models_without_such_a_head_are_refused(model: Callable[[], Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        causal_lm.attach(model())


def test_a_model_that_lost_its_forward_is_attached_again() -> None:
    model = make("Llama")
    del model.forward  # as unpickling does
    causal_lm.attach(model)
    assert model(input_ids=IDS, head_fn=logps).value.shape == (2, 5)


@pytest.mark.parametrize("use", [causal_lm.check, causal_lm.capture])
def test_a_model_that_is_not_attached_is_refused(use):
    config = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=16, **config))
    with pytest.raises(ValueError, match="attach was applied, got LlamaForCausalLM"):
        use(model, {"input_ids": torch.arange(6).view(2, 3)})


# --- the check at the first batch ------------------------------------------------------------------------------------

LARGER = {"vocab_size": 500, "hidden_size": 64, "initializer_range": 0.2}  # logits that span some units
MORE = {  # beside those of float64
    "Llama": {},
    "Gemma2": {"final_logit_softcapping": 30.0, "head_dim": 32},
    "RecurrentGemma": {"logits_soft_cap": 30.0},
    "GPT2": {"n_embd": 64},
}
LONG = torch.randint(3, 500, (3, 30), generator=torch.Generator().manual_seed(0))


def larger(name: str) -> Any:
    return make(name, **LARGER, **MORE.get(name, {}), tie_word_embeddings=False)


def times(factor: float | Tensor) -> Callable[[Any], None]:
    """The head's outputs, by a hook: a module whose class says nothing of it."""

    def change(model: Any) -> None:
        model.lm_head.register_forward_hook(lambda module, args, out: (factor * out.float()).to(out.dtype))

    return change


def masked(count: int) -> Callable[[Any], None]:
    """The last entries of the vocabulary, in the model's outputs."""

    def change(model: Any) -> None:
        def without(module: Any, args: Any, out: Any) -> Any:
            if hasattr(out, "logits"):
                out.logits[..., -count:] = torch.finfo(out.logits.dtype).min

        model.register_forward_hook(without)

    return change


def normalised(model: Any) -> None:
    """A head on rows of length one, where those of its weight are near one."""
    head = model.lm_head
    rows = F.normalize(torch.randn(head.weight.shape)) * (1 + 0.015 * torch.randn(len(head.weight), 1))
    head.weight.data = rows.to(head.weight)
    head.register_forward_hook(lambda module, args, out: F.linear(args[0], F.normalize(module.weight)))


CHANGES = {
    "a scale": times(1.5),
    "a scale of 1.01": times(1.01),
    "a factor for each token": times(1 + 0.01 * torch.randn(500, generator=torch.Generator().manual_seed(0))),
    "one token of many": times(1 + 0.1 * (torch.arange(500) == 7)),
    "a mask of eight": masked(8),
    "a mask of one": masked(1),
    "a normalised head": normalised,
    "no numbers": times(float("nan")),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("change", CHANGES)
def test_check_finds_what_a_model_does_to_its_logits(change: str, dtype: torch.dtype) -> None:
    model = larger("Llama").to(dtype).train()
    causal_lm.check(model, {"input_ids": LONG})
    CHANGES[change](model)
    with pytest.raises(ValueError, match="does something to its logits"):
        causal_lm.check(model, {"input_ids": LONG})
    assert model.training and model.lm_head.training


def test_check_of_a_head_of_zeros() -> None:
    model = make("Llama")
    model.lm_head.weight.data.zero_()
    causal_lm.check(model, INPUTS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODELS)
def test_check_lets_rounding_pass(name: str, dtype: torch.dtype) -> None:
    inputs = {"input_ids": LONG, "attention_mask": torch.ones_like(LONG)}
    causal_lm.check(larger(name).to(dtype), inputs)
    if dtype != torch.float32:
        with torch.autocast("cpu", dtype):
            causal_lm.check(larger(name).float(), inputs)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}])
@pytest.mark.parametrize("name", ["Llama", "RecurrentGemma"])
@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
def test_check_lets_rounding_of_an_adapter_pass(name: str, options: dict[str, Any]) -> None:
    """PEFT keeps it in float32 on a model in bfloat16."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["lm_head"], r=8, lora_alpha=32, init_lora_weights=False, **options)
    causal_lm.check(peft.get_peft_model(larger(name).bfloat16(), config), {"input_ids": LONG})


def vision_language(**text: Any) -> tuple[Any, dict[str, Tensor]]:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = transformers.CLIPVisionConfig(**sizes, image_size=8, patch_size=4, projection_dim=16)
    parts = {"vision_config": vision, "text_config": transformers.LlamaConfig(**{**SIZES, **text})}
    config = transformers.LlavaConfig(**parts, image_token_index=2, image_seq_length=4, vision_feature_layer=-1)
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).double().eval()
    ids = torch.randint(3, 64, (4, 25))
    ids[:, 3:7] = 2
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs["attention_mask"][1, :2] = 0  # on the left
    return model, inputs | {"pixel_values": torch.randn(4, 3, 8, 8).double()}


def test_a_vision_language_model() -> None:
    model, inputs = vision_language()
    causal_lm.attach(model)
    here = assert_its_own(model, inputs)
    elsewhere = expected_logps(model, inputs | {"pixel_values": torch.zeros_like(inputs["pixel_values"])})
    assert not torch.allclose(here, elsewhere)  # so images count


def test_check_forms_logits_at_a_few_positions() -> None:
    """Of a batch with images too, which nobody can cut, by the model's own forward as by ours."""
    model, inputs = vision_language(vocab_size=640)
    causal_lm.attach(model)
    with Largest() as seen:
        causal_lm.check(model, inputs)
    assert seen.elements == causal_lm.POSITIONS * 640
    with Largest() as seen:
        model(**inputs)
    assert seen.elements == 4 * 25 * 640
    model.lm_head.register_forward_hook(lambda module, args, out: 1.01 * out)
    with pytest.raises(ValueError, match="does something to its logits"):
        causal_lm.check(model, inputs)


@pytest.mark.parametrize(
    "mask",
    [torch.zeros_like(MASK), torch.tensor([[0, 0, 0, 0, 0, 1], [0] * 6]), MASK.flip(1)],
    ids=["nothing", "one token", "padding on the left"],
)
def test_check_of_masked_batches(mask: Tensor) -> None:
    model = make("Llama")
    causal_lm.check(model, {"input_ids": IDS, "attention_mask": mask})
    model.lm_head.register_forward_hook(lambda module, args, out: 1.01 * out)
    with pytest.raises(ValueError, match="does something") if mask.any() else nullcontext():
        causal_lm.check(model, {"input_ids": IDS, "attention_mask": mask})


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
def test_virtual_tokens_of_prompt_tuning() -> None:
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(make("Llama"), config).double()
    assert_its_own(model, {"input_ids": IDS, "attention_mask": MASK})
    causal_lm.check(model, INPUTS)
    model.get_base_model().lm_head.register_forward_hook(lambda module, args, out: 1.01 * out)
    with pytest.raises(ValueError, match="does something"):
        causal_lm.check(model, INPUTS)


# --- what replaces and wraps forwards --------------------------------------------------------------------------------


def other_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """As kernels of other libraries: any argument is taken, one that is not known does nothing."""
    kwargs.pop("head_fn", None)
    return type(self).forward(self, *args, **kwargs)


def replaced(model: Any) -> Any:
    model.forward = MethodType(other_forward, model)
    return model


def around(model: Any) -> Any:
    """A patch that calls what it replaced, which is ours: ours again must not call itself."""
    earlier = model.forward
    model.forward = lambda *args, **kwargs: earlier(*args, **kwargs)
    return model


def accelerator() -> Any:
    """A process has one state, and trainers of other tests leave theirs."""
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    return accelerate.Accelerator(cpu=True, mixed_precision="bf16")


def prepared(model: Any) -> Any:
    return accelerator().prepare(model.float())


def dispatched(model: Any) -> Any:
    devices = dict.fromkeys(["model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
    return pytest.importorskip("accelerate").dispatch_model(model, devices, main_device="cpu", force_hooks=True)


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda model: model,
    "replaced": replaced,
    "around": around,
    "prepared": prepared,
    "replaced, prepared": lambda model: prepared(replaced(model)),
    "dispatched": dispatched,
    "dispatched, prepared": lambda model: prepared(dispatched(model)),
    "dispatched, replaced": lambda model: replaced(dispatched(model)),
    "compiled": lambda model: torch.compile(model, backend="eager"),
}


@pytest.mark.parametrize("first", [True, False], ids=["attached, wrapped", "wrapped, attached"])
@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo looks at it
def test_attached_again_in_any_wrapper(name: str, first: bool) -> None:
    alone, model = make("Llama"), (make if first else plain)("Llama")
    wrapped = WRAPPERS[name](model)
    counts = []
    for _ in range(3):
        causal_lm.attach(wrapped)
        counts.append(len(model._forwards_without_head_fn))
    assert len(set(counts)) == 1 and counts[0] <= 2
    close = {"rtol": 2e-2, "atol": 2e-2} if "prepared" in name else {}
    found = wrapped(**INPUTS, head_fn=logps).value
    torch.testing.assert_close(found.double(), alone(**INPUTS, head_fn=logps).value, **close)
    torch.testing.assert_close(wrapped(**INPUTS).logits.double(), alone(**INPUTS).logits, **close)
    assert found.requires_grad
    causal_lm.check(wrapped, INPUTS)


def test_accelerates_unwrapping_leaves_a_model_attached() -> None:
    half = accelerator()
    model = half.unwrap_model(half.prepare(make("Llama")), keep_fp32_wrapper=False)
    assert not torch.is_autocast_enabled("cpu")
    torch.testing.assert_close(model(**INPUTS, head_fn=logps).value, expected_logps(make("Llama")))
    assert model.generate(IDS[:1], max_new_tokens=2, do_sample=False).shape == (1, 8)


# --- past a model's outputs ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    logps: Tensor
    nothing: None = None


def of_all_kinds(head: Head) -> dict[str, Any]:
    logps = head.shifted().logps(IDS[:, 1:], compiled=False)
    return {"tensor": logps, "list": [logps.square(), (logps.detach(), 7)], "found": Found(logps.exp())}


@pytest.fixture
def mesh() -> Iterator[Any]:
    if not dist.is_gloo_available():
        pytest.skip("needs torch.distributed with gloo")
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("units", ["root", "head and root"])
def test_what_fsdp2_casts_is_not_what_comes_out(units: str, mesh: Any) -> None:
    """Neither values nor gradients, in what leaves the head and in what leaves the model."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    alone, model = make("Llama"), make("Llama")
    policy = MixedPrecisionPolicy(output_dtype=torch.bfloat16)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    if units != "root":
        fully_shard(model.lm_head, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    causal_lm.attach(model)  # again: FSDP2 makes classes of its own
    with torch.no_grad():
        assert model(input_ids=IDS).logits.dtype == torch.bfloat16
        assert torch.equal(model(input_ids=IDS, head_fn=logps).value, alone(input_ids=IDS, head_fn=logps).value)
    causal_lm.check(model, {"input_ids": IDS})
    for _ in range(2):  # hooks have states
        alone.zero_grad()
        model.zero_grad()
        values = [m(input_ids=IDS, head_fn=of_all_kinds).value for m in (alone, model)]
        for value in values:
            first, (square, (constant, seven)) = value["tensor"], value["list"]
            assert seven == 7 and value["found"].nothing is None and not constant.requires_grad
            (first.sum() / 3 + (square * value["found"].logps).sum() + (constant * first).sum()).backward()
        assert torch.equal(values[0]["tensor"], values[1]["tensor"])
        assert torch.equal(values[0]["list"][1][0], values[1]["list"][1][0])
        for p, q in zip(alone.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(q.grad.full_tensor(), p.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("mesh")
def test_attached_again_under_ddp() -> None:
    alone, model = make("Llama"), make("Llama")
    wrapped = nn.parallel.DistributedDataParallel(replaced(model))
    for _ in range(2):
        causal_lm.attach(wrapped)
        for m in (alone, wrapped):
            m.zero_grad()
            m(**INPUTS, head_fn=logps).value.sum().backward()
        for p, q in zip(alone.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad)
    assert len(model._forwards_without_head_fn) == 2
    causal_lm.check(wrapped, INPUTS)


def test_a_casting_wrapper_leaves_an_auxiliary_loss_alone() -> None:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**SIZES, num_local_experts=4, output_router_logits=True)
    model = transformers.MixtralForCausalLM(config).eval()
    causal_lm.attach(model)
    expected = model(input_ids=IDS).aux_loss
    model.register_forward_hook(lambda module, args, out: out._replace(carriers=out.carriers.bfloat16()))
    with torch.no_grad():
        found = model(input_ids=IDS, head_fn=lambda head: None)
    assert found.value is None and torch.equal(found.aux_loss, expected)


def test_a_value_may_be_read_and_differentiated_as_any() -> None:
    model = make("Llama")
    weights = [model.lm_head.weight, model.model.norm.weight]
    plain: list[Tensor] = []

    def two(head: Head) -> tuple[Tensor, Tensor]:
        z = head.logits()
        plain[:] = [z.square().mean(), z.logsumexp(-1).sum()]
        return plain[0], plain[1]

    out = model(input_ids=IDS, head_fn=two)
    for k in range(2):  # each alone, and again
        for _ in range(2):
            found, expected = (torch.autograd.grad(v[k], weights, retain_graph=True) for v in (out.value, plain))
            torch.testing.assert_close(found, expected)
    found, expected = (
        torch.autograd.grad(a[0] * b[1] + b[0], weights, create_graph=True)
        for a, b in ((out.value, out.value), (plain, plain))
    )
    torch.testing.assert_close(found, expected)
    squares = [sum(g.square().sum() for g in first) for first in (found, expected)]
    twice = [torch.autograd.grad(v, weights, retain_graph=True) for v in squares]
    torch.testing.assert_close(*twice)
    changed = model(input_ids=IDS, head_fn=logps).value
    changed[MASK[:, 1:] == 0] = 0  # in place
    assert changed.sum().requires_grad
