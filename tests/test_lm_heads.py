"""What an LM head is: PEFT's adapters on it, dtypes of its own, devices, and shards of FSDP1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from alignment import DPOLoss
from chunked_embed import causal_lm

pytest.importorskip("transformers")

import head_ranks
from lm_parts import IDS, INPUTS, assert_its_own, expected_logps, logps, make, plain
from processes import Outcomes, assert_passed, run_checks

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),  # of what it makes of tied weights
]

# --- PEFT ------------------------------------------------------------------------------------------------------------

TOKENS = [3, 5, 33]
LORA: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": True},
    "LoRA, dropout": {"lora_dropout": 0.3},
    "LoRA, bias": {"lora_bias": True, "target_modules": ["lm_head"]},
    "LoRA, all biases": {"bias": "all"},
    "LoRA, its biases": {"bias": "lora_only"},
    "LoRA, tied": {"ensure_weight_tying": True},
    "DoRA": {"use_dora": True},
    "DoRA, dropout": {"use_dora": True, "lora_dropout": 0.3},
    "copy": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "copy, tied": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "ensure_weight_tying": True},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": TOKENS},
    "tokens of the head": {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": TOKENS}},
    "tokens, tied": {"target_modules": ["q_proj"], "trainable_token_indices": TOKENS, "ensure_weight_tying": True},
    "tokens, LoRA": {"trainable_token_indices": TOKENS},
}


def model(tied: bool, bias: bool) -> Any:
    found = plain("Llama", tie_word_embeddings=tied)
    if bias:
        found.lm_head.bias = nn.Parameter(torch.randn(64).double())
    return found


def moved(adapted: Any) -> Any:
    """Adapters begin as nothing."""
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return adapted


def adapted(base: Any, **options: Any) -> Any:
    peft = pytest.importorskip("peft")
    options = {"target_modules": ["lm_head", "q_proj"], "r": 2, "lora_alpha": 3, "init_lora_weights": False} | options
    found = moved(peft.get_peft_model(base, peft.LoraConfig(**options)).double())
    causal_lm.attach(found)
    return found


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", LORA)
def test_adapters_on_the_head(name: str, tied: bool) -> None:
    found = adapted(model(tied, bias="bias" in name), **LORA[name])
    assert_its_own(found.train())
    expected = assert_its_own(found.eval())
    with found.disable_adapter():
        assert (assert_its_own(found) - expected).abs().max() > 1e-3
    head = causal_lm.capture(found, INPUTS)
    assert not head.hidden.requires_grad and not head.weight.requires_grad
    torch.testing.assert_close(logps(head), expected)
    found.merge_adapter()
    merged = assert_its_own(found)
    causal_lm.check(found, INPUTS)
    if tied:  # the embeddings have what was merged, too
        return
    torch.testing.assert_close(merged, expected)
    with found.disable_adapter():  # undoes the merge, in the forward that comes first
        torch.testing.assert_close(found(**INPUTS, head_fn=logps).value, expected_logps(found))


@pytest.mark.parametrize("active", [["a"], ["a", "b"], ["b", "c", "a"], ["a", "b", "c"]], ids="".join)
def test_several_adapters(active: list[str]) -> None:
    """DoRA scales what those before it have made."""
    peft = pytest.importorskip("peft")
    found = adapted(model(False, bias=True))
    options = {"target_modules": ["lm_head"], "r": 3, "init_lora_weights": False}
    found.add_adapter("a", peft.LoraConfig(**options))
    found.add_adapter("b", peft.LoraConfig(**options, lora_bias=True))
    found.add_adapter("c", peft.LoraConfig(**options, use_dora=True))
    found.double().base_model.set_adapter(active)
    assert_its_own(moved(found))
    found.merge_adapter()
    assert_its_own(found)


def kinds() -> dict[str, Any]:
    peft = pytest.importorskip("peft")
    head = {"target_modules": ["lm_head"]}
    return {
        "ia3": peft.IA3Config(**head, feedforward_modules=[]),
        "loha": peft.LoHaConfig(**head),
        "oft": peft.OFTConfig(**head, oft_block_size=4),
        "vera": peft.VeraConfig(**head),
        "adalora": peft.AdaLoraConfig(**head, total_step=10),
        "ALoraLinearVariant": peft.LoraConfig(**head, alora_invocation_tokens=[3]),
    }


@pytest.mark.parametrize("name", ["ia3", "loha", "oft", "vera", "adalora", "ALoraLinearVariant"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_other_adapters_are_refused_when_a_model_is_attached(name: str) -> None:
    found = pytest.importorskip("peft").get_peft_model(make("Llama"), kinds()[name])  # attached before, too
    with pytest.raises((TypeError, ValueError), match=f"on the LM head.* got .*{name}"):
        causal_lm.attach(found)


class Normalised(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, F.normalize(self.weight))


def test_a_forward_of_ones_own_is_refused() -> None:
    found = plain("Llama")
    found.lm_head.__class__ = Normalised
    with pytest.raises(TypeError, match=r"whose forward is nn\.Linear's, got Normalised with a forward of its own"):
        causal_lm.attach(found)
    found.lm_head.__class__ = nn.Linear
    found.lm_head.forward = lambda x: 2 * F.linear(x, found.lm_head.weight)
    with pytest.raises(TypeError, match="got Linear with a forward of its own"):
        causal_lm.attach(found)
    del found.lm_head.forward
    causal_lm.attach(found)


# --- dtypes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("body", "head"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_a_head_in_a_dtype_of_its_own(body: torch.dtype, head: torch.dtype) -> None:
    """Where the model's own forward cannot run. Neither states nor weights are rounded."""
    found = make("Llama", initializer_range=0.2).to(body)
    found.lm_head.to(head)
    with pytest.raises(RuntimeError, match="dtype"):
        found(**INPUTS)
    causal_lm.check(found, INPUTS)
    out = found(**INPUTS, head_fn=logps).value
    states = found.model(**INPUTS).last_hidden_state
    expected = F.linear(states.double(), found.lm_head.weight.double())[:, :-1].log_softmax(-1)
    expected = expected.gather(-1, IDS[:, 1:, None])[..., 0]
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    learning = [found.lm_head.weight, found.model.norm.weight]
    for ours, theirs in zip(*(torch.autograd.grad(v.square().sum(), learning) for v in (out, expected)), strict=True):
        assert ours.abs().max() > 0
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2 * theirs.abs().max().item())
    found.lm_head.register_forward_hook(lambda module, args, out: 1.02 * out)
    with pytest.raises(ValueError, match="does something to its logits"):
        causal_lm.check(found, INPUTS)


# --- devices ---------------------------------------------------------------------------------------------------------

PARTS = ["model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb", "lm_head"]


@pytest.mark.parametrize("first", [True, False], ids=["attached, split", "split, attached"])
def test_an_offloaded_head_is_refused(first: bool, tmp_path: Path) -> None:
    """On a disk here, in the CPU's memory beside a GPU. The rest of a model may be."""
    accelerate = pytest.importorskip("accelerate")
    devices = dict.fromkeys(PARTS, "cpu")
    found = (make if first else plain)("Llama")
    accelerate.dispatch_model(found, {**devices, "lm_head": "disk"}, "cpu", offload_dir=str(tmp_path / "head"))
    with pytest.raises(ValueError, match="expected an LM head in memory, got an offloaded one"):
        causal_lm.attach(found)
    if first:
        with pytest.raises(ValueError, match="expected an LM head in memory, got one on the meta device"):
            found(**INPUTS, head_fn=logps)
    found = (make if first else plain)("Llama")
    accelerate.dispatch_model(found, {**devices, "model.layers": "disk"}, "cpu", offload_dir=str(tmp_path / "body"))
    causal_lm.attach(found)
    with torch.no_grad():
        torch.testing.assert_close(found(**INPUTS, head_fn=logps).value, expected_logps(make("Llama")))


def device_map(model: Any, name: str) -> dict[str, int]:
    if name == "embeddings and head apart":
        return {**dict.fromkeys(PARTS, 1), "model.embed_tokens": 0, "model.rotary_emb": 0}
    infer = pytest.importorskip("accelerate").infer_auto_device_map
    most = 3 * sum(p.nbytes for p in model.parameters()) // 4
    return infer(model, {0: most, 1: 10**9}, no_split_module_classes=["LlamaDecoderLayer"])


@pytest.mark.gpu
@pytest.mark.parametrize("given", ["cpu", "cuda:0", "cuda:1"])
@pytest.mark.parametrize("name", ["embeddings and head apart", "as accelerate has it"])
def test_a_model_on_two_devices_is_that_on_one(name: str, given: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    loss, device = DPOLoss(0.3, compiled=False), torch.device(given)
    results = []
    split = make("Llama", num_hidden_layers=3)
    devices = device_map(split, name)
    assert devices["model.embed_tokens"] == 0 and devices["lm_head"] == 1
    split = pytest.importorskip("accelerate").dispatch_model(split, devices)
    for found in (make("Llama", num_hidden_layers=3).cuda(), split):
        trainer = head_ranks.trainer(found)
        inputs = {key: value.to(device if results else "cuda") for key, value in INPUTS.items()}
        target = inputs["input_ids"][:, 1:]
        trainer.check_once(found, inputs)
        with torch.no_grad():
            reference = trainer.token_logps(found, inputs, target).double().sum(1) + 0.1
            head = trainer.frozen_head(found, inputs, target)
            captured = head.logps(target.to(head.hidden.device), compiled=False)
        out = trainer.run_loss(found, inputs, target, loss, ref_logps=reference)
        assert {x.device for x in (out.loss, reference, *out.metrics.values())} == {target.device}
        out.loss.backward()
        results.append([out.loss.detach(), reference, captured, *(p.grad for p in found.parameters())])
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(two.cpu(), one.cpu(), rtol=1e-9, atol=1e-12)


# --- shards ----------------------------------------------------------------------------------------------------------


def gathered_by_hooks(model: nn.Module) -> None:
    """Each module's own parameters are there while its forward runs, and nowhere else: as ZeRO-3 has them."""
    for module in model.modules():
        whole = {p: p.data for p in module.parameters(recurse=False)}

        def gather(module: Any, args: Any, whole: dict[Any, Tensor] = whole) -> None:
            for parameter, data in whole.items():
                parameter.data = data

        def release(module: Any, args: Any, out: Any, whole: dict[Any, Tensor] = whole) -> None:
            for parameter, data in whole.items():
                parameter.data = data.new_empty(0)
                parameter.ds_id = 0

        module.register_forward_pre_hook(gather)
        module.register_forward_hook(release)
        release(module, None, None)


@pytest.mark.parametrize(
    "options", [None, {}, {"use_dora": True, "target_modules": ["lm_head"]}], ids=["plain", "LoRA", "DoRA"]
)
def test_hooks_of_all_modules_of_a_head_run_around_the_loss(options: dict[str, Any] | None) -> None:
    found = make("Llama") if options is None else adapted(plain("Llama"), **options)
    expected = expected_logps(found).detach()
    gathered_by_hooks(found)
    with torch.no_grad():
        torch.testing.assert_close(found(**INPUTS, head_fn=logps).value, expected)
    torch.testing.assert_close(logps(causal_lm.capture(found, INPUTS)), expected)  # of copies, behind the forward


# --- on processes ----------------------------------------------------------------------------------------------------

needs_gloo = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs torch.distributed with gloo")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return run_checks(head_ranks.check, head_ranks.NAMES, head_ranks.WORLD, tmp_path_factory.mktemp("outcomes"))


@needs_gloo
@pytest.mark.parametrize("name", head_ranks.NAMES[:-1])
def test_fsdp1_is_one_process_with_both_batches(name: str, outcomes: Outcomes) -> None:
    assert_passed(name, outcomes)


@needs_gloo
def test_a_head_on_another_device_than_the_inputs(outcomes: Outcomes) -> None:
    assert_passed(head_ranks.SPLIT, outcomes)
