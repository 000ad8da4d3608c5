"""Small language models of transformers that take a loss in their forward."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import transformers

from chunked_embed import Head, causal_lm

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
    "Llama4": {"head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 32},  # base_model_prefix names nothing
}
CONFIGS = {"Llama4": "Llama4TextConfig"}
CLASSES = {"GPT2": "GPT2LMHeadModel"}
IDS = torch.tensor([[5, 9, 2, 33, 7, 60], [8, 3, 4, 11, 0, 0]])
MASK = (IDS != 0).long()
INPUTS = {"input_ids": IDS, "attention_mask": MASK}


def plain(name: str, **more: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, CONFIGS.get(name, f"{name}Config"))(**{**SIZES, **MODELS[name], **more})
    return getattr(transformers, CLASSES.get(name, f"{name}ForCausalLM"))(config).double().eval()


def make(name: str, **more: Any) -> Any:
    model = plain(name, **more)
    causal_lm.attach(model)
    return model


def expected_logps(model: Any, inputs: dict[str, Tensor] = INPUTS) -> Tensor:
    """By the model's own logits, of the real tokens: prompt tuning has others in front."""
    ids = inputs["input_ids"]
    logits = model(**inputs).logits[:, -ids.shape[1] : -1]
    return logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]


def logps_of(ids: Tensor) -> Callable[[Head], Tensor]:
    return lambda head: head.shifted(ids.shape[1]).logps(ids[:, 1:], compiled=False)


logps = logps_of(IDS)


def assert_its_own(model: Any, inputs: dict[str, Tensor] = INPUTS) -> Tensor:
    """Log-probabilities and gradients are those of the model's own logits, draws of dropout included; -> the former."""
    torch.manual_seed(1)
    found = model(**inputs, head_fn=logps_of(inputs["input_ids"])).value
    torch.manual_seed(1)
    expected = expected_logps(model, inputs)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    learning = [p for p in model.parameters() if p.requires_grad]
    if not found.requires_grad:
        assert not expected.requires_grad
        return expected.detach()
    pair = (torch.autograd.grad(v.square().sum(), learning, allow_unused=True) for v in (found, expected))
    for p, q in zip(*pair, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9)
    return expected.detach()
