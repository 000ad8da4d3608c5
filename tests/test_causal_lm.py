"""A loss inside a model's own forward, on models of transformers and adapters of PEFT."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from alignment import CPOLoss
from chunked_embed import Head, LossOutput, causal_lm

transformers = pytest.importorskip("transformers")
SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
MODELS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Gemma2": {"head_dim": 8, "final_logit_softcapping": 0.1, "attn_implementation": "eager"},
    "Cohere": {"logit_scale": 0.3},
    "Granite": {"logits_scaling": 3.0},
    "RecurrentGemma": {"logits_soft_cap": 0.1, "num_hidden_layers": 3, "attention_window_size": 8},
    "GPT2": {"n_embd": 16, "n_layer": 1, "n_head": 2},
}
IDS = torch.tensor([[5, 9, 2, 33, 7, 60], [8, 3, 4, 11, 0, 0]])
MASK = (IDS != 0).long()


def make(name: str) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **MODELS[name]})
    model = getattr(transformers, f"{name}ForCausalLM" if name != "GPT2" else "GPT2LMHeadModel")(config).double().eval()
    causal_lm.attach(model)
    return model


def expected_logps(model: Any) -> Tensor:
    logits = model(input_ids=IDS, attention_mask=MASK).logits[:, :-1]
    return logits.log_softmax(-1).gather(-1, IDS[:, 1:, None])[..., 0]


def logps(head: Head) -> Tensor:
    return head.shifted().logps(IDS[:, 1:], compiled=False)


@pytest.mark.parametrize("name", MODELS)
def test_log_probabilities_and_gradients_are_the_models_own(name: str) -> None:
    model = make(name)
    found = model(input_ids=IDS, attention_mask=MASK, head_fn=logps).value
    expected = expected_logps(model)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    ours, theirs = (torch.autograd.grad(v.square().sum(), list(model.parameters())) for v in (found, expected))
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9)
    causal_lm.check(model, {"input_ids": IDS, "attention_mask": MASK})


@pytest.mark.parametrize("name", MODELS)
def test_a_loss_of_a_head_is_that_of_the_models_logits(name: str) -> None:
    """What ``check`` compared is what the loss computes on: scale and cap come with the head, nobody sets them."""
    model, loss = make(name), CPOLoss(0.3, compiled=False)
    causal_lm.check(model, {"input_ids": IDS, "attention_mask": MASK})
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


@pytest.mark.parametrize("options", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}])
@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
def test_peft_on_the_head(options: dict[str, list[str]]) -> None:
    peft = pytest.importorskip("peft")
    base = make("Llama")
    config = peft.LoraConfig(**{"target_modules": ["q_proj"], "r": 2, "init_lora_weights": False, **options})
    model = peft.get_peft_model(base, config).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(2)
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    found, expected = model(**inputs, head_fn=logps).value, expected_logps(model)
    torch.testing.assert_close(found, expected)
    trained = [p for p in model.parameters() if p.requires_grad]
    ours, theirs = (torch.autograd.grad(v.square().sum(), trained) for v in (found, expected))
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q)
    with model.disable_adapter():
        torch.testing.assert_close(model(**inputs, head_fn=logps).value, expected_logps(model))
    model.merge_adapter()
    torch.testing.assert_close(model(**inputs, head_fn=logps).value, expected)
    head = causal_lm.capture(model, inputs)
    assert not head.hidden.requires_grad and not head.weight.requires_grad
    torch.testing.assert_close(logps(head), expected)


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
def test_an_adapter_of_another_kind_is_refused() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make("Llama"), peft.LoraConfig(target_modules=["lm_head"], use_dora=True))
    with pytest.raises(ValueError, match="plain LoRA"):
        model(input_ids=IDS, head_fn=logps)


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


def test_check_finds_what_a_model_does_to_its_logits() -> None:
    model = make("Llama")
    model.lm_head.register_forward_hook(lambda module, args, out: 1.5 * out)
    model.train()
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    causal_lm.check(make("Llama"), {"input_ids": IDS, "attention_mask": torch.zeros_like(MASK)})  # nothing to compare
    with pytest.raises(ValueError, match="does something to its logits"):
        causal_lm.check(model, inputs)
    assert model.training and model.lm_head.training


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_check_finds_a_mask_of_part_of_the_vocabulary(dtype: torch.dtype) -> None:
    """It moves all log-probabilities by a little, which rounding in bfloat16 would hide."""
    model = make("Llama").to(dtype)
    causal_lm.check(model, {"input_ids": IDS, "attention_mask": MASK})
    forward = model.forward

    def masked(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        if hasattr(out, "logits"):
            out.logits[..., -8:] = torch.finfo(dtype).min
        return out

    model.forward = masked
    with pytest.raises(ValueError, match="does something to its logits"):
        causal_lm.check(model, {"input_ids": IDS, "attention_mask": MASK})


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
