"""The model's trailing Dense and Normalize inside the chunk: the same numbers, and only where that is safe."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses as library
from sentence_transformers.sentence_transformer.modules import Dense, Dropout, LayerNorm, Normalize, Transformer
from st_parts import HIDDEN, OUT, assert_same, build, dense, features, labels_for, value_and_grads
from torch import nn
from torch.nn.utils import parametrizations

from chunked_embed import losses
from chunked_embed.losses._tail import Tail, find_tail

SAFE: dict[str, Callable[[], list[nn.Module]]] = {
    "dense": lambda: [dense()],
    "dense without bias": lambda: [dense(bias=False)],
    "dense, normalize": lambda: [dense(nn.Identity()), Normalize()],
    "normalize": lambda: [Normalize()],
    "normalize, dense": lambda: [Normalize(), dense(nn.ReLU())],
    "two dense": lambda: [Dense(HIDDEN, HIDDEN), dense(nn.SiLU()), Normalize()],
    "gelu": lambda: [dense(nn.GELU()), Normalize()],
    "gelu, tanh": lambda: [dense(nn.GELU(approximate="tanh"))],
    "a function": lambda: [dense(torch.tanh)],
}


@pytest.mark.parametrize("tail", SAFE)
@pytest.mark.parametrize("name", ["CoSENTLoss", "AnglELoss", "TripletLoss"])
def test_fused_equals_the_library(name: str, tail: str, transformer_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(transformer_dir, *SAFE[tail]())
    batch = features(model, 9, 3 if name != "CoSENTLoss" else 2)
    labels = labels_for("tied", 9) if name == "CoSENTLoss" else None
    seen = runs_of(model[-1], monkeypatch)
    loss = getattr(losses, name)(model, compiled=False, fuse_projection=True, chunk_size=4)
    ours = value_and_grads(loss, model, batch, labels, upstream=2.0)
    assert not seen, "the tail ran in the model as well"
    assert_same(ours, value_and_grads(getattr(library, name)(model), model, batch, labels, upstream=2.0))
    assert seen, "the model is not what it was"
    assert not any("forward" in vars(module) for module in model.modules())


def runs_of(module: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """Grows by one with every forward pass of the module; no hook, which would rule fusing out."""
    seen: list[nn.Module] = []
    forward = type(module).forward

    def recording(self: nn.Module, features: dict) -> dict:
        seen.extend([self] if self is module else [])
        return forward(self, features)

    monkeypatch.setattr(type(module), "forward", recording)
    return seen


@pytest.mark.parametrize("frozen", ["weight", "bias", "both"])
def test_frozen_dense(frozen: str, transformer_dir: str) -> None:
    model = build(transformer_dir, dense(), Normalize())
    for name in ("weight", "bias") if frozen == "both" else (frozen,):
        model[2].linear.get_parameter(name).requires_grad_(False)
    batch, labels = features(model, 9, 2), labels_for("random", 9)
    ours = value_and_grads(losses.CoSENTLoss(model, compiled=False, fuse_projection=True), model, batch, labels)
    assert_same(ours, value_and_grads(library.CoSENTLoss(model), model, batch, labels))


def test_parameters_keep_their_names(transformer_dir: str) -> None:
    model = build(transformer_dir, dense(), Normalize())
    loss = losses.CoSENTLoss(model)
    before = [name for name, _ in library.CoSENTLoss(model).named_parameters()]
    loss._tail()
    assert [name for name, _ in loss.named_parameters()] == before


def test_an_error_restores_the_model(transformer_dir: str) -> None:
    model = build(transformer_dir, dense(), Normalize())
    with pytest.raises((KeyError, ValueError), match="input_ids"):
        losses.CoSENTLoss(model, compiled=False)([{"nothing": torch.ones(2)}] * 2, labels_for("random", 2))
    assert not any("forward" in vars(module) for module in model.modules())


# --- what must be left alone -----------------------------------------------------------------------------------------


def with_hook(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda module, args, output: output)
    return module


def patched_linear() -> Dense:
    """As an adapter does it: another class around the layer, whose weight is the base layer's."""

    class Adapter(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 2

    module = dense()
    module.linear = Adapter(HIDDEN, OUT)
    return module


def parametrized() -> Dense:
    module = dense()
    parametrizations.weight_norm(module.linear)
    return module


def patched_forward(module: nn.Module) -> nn.Module:
    module.forward = module.forward
    return module


class OwnDense(Dense):
    pass


def part_hooked(part: str) -> Dense:
    module = dense()
    with_hook(getattr(module, part))
    return module


UNSAFE: dict[str, tuple[Callable[[], list[nn.Module]], str]] = {
    "dropout": (lambda: [dense(), Dropout(0.1)], "Dropout"),
    "layer norm": (lambda: [LayerNorm(HIDDEN)], "LayerNorm"),
    "pooling": (lambda: [], "Pooling"),
    "subclass": (lambda: [OwnDense(HIDDEN, OUT)], "OwnDense"),
    "hook on dense": (lambda: [with_hook(dense())], "hooks"),
    "hook on normalize": (lambda: [dense(), with_hook(Normalize())], "hooks"),
    "hook on the linear": (lambda: [part_hooked("linear")], "hooks"),
    "hook on the activation": (lambda: [part_hooked("activation_function")], "hooks"),
    "patched forward": (lambda: [patched_forward(dense())], "patched"),
    "adapter": (lambda: [patched_linear()], "Adapter"),
    "parametrisation": (lambda: [parametrized()], "Parametrized"),
    "unknown activation": (lambda: [dense(nn.LeakyReLU(0.3))], "LeakyReLU"),
    "a lambda": (lambda: [dense(lambda x: x.sin())], "unknown activation"),
    "learnable activation": (lambda: [dense(nn.PReLU())], "PReLU"),
    "other names": (lambda: [dense(module_output_name="projected")], "does not map"),
}


@pytest.mark.parametrize("tail", UNSAFE)
def test_unsafe_tails(tail: str, transformer_dir: str) -> None:
    modules, reason = UNSAFE[tail]
    model = build(transformer_dir, *modules())
    assert reason in find_tail(model)
    batch, labels = features(model, 5, 2), labels_for("random", 5)
    with pytest.raises(ValueError, match="fuse_projection=True"):
        losses.CoSENTLoss(model, compiled=False, fuse_projection=True)(batch, labels)
    model.eval()  # dropout would draw twice
    ours = value_and_grads(losses.CoSENTLoss(model, compiled=False), model, batch, labels)
    assert_same(ours, value_and_grads(library.CoSENTLoss(model), model, batch, labels))


@pytest.mark.skipif("use_residual" not in Dense.config_keys, reason="this release's Dense has no residual")
def test_residual(transformer_dir: str) -> None:
    model = build(transformer_dir, Dense(HIDDEN, HIDDEN, use_residual=True))
    assert "residual" in find_tail(model)


def unusual_model(kind: str, folder: str) -> nn.Module:
    model = build(folder, dense(), Normalize())
    if kind == "hook":
        return with_hook(model)
    if kind == "patched":
        return patched_forward(model)
    if kind == "compiled":
        return torch.compile(model, backend="eager")
    if kind == "compiled in place":
        model.compile(backend="eager")
        return model
    if kind == "data parallel":
        return nn.DataParallel(model)
    if kind == "subclass":
        return type("Own", (SentenceTransformer,), {"forward": lambda self, x: x})(modules=list(model), device="cpu")
    return nn.Identity()


@pytest.mark.parametrize(
    "kind", ["hook", "patched", "compiled", "compiled in place", "data parallel", "subclass", "no model"]
)
def test_unusual_models(kind: str, transformer_dir: str) -> None:
    assert isinstance(find_tail(unusual_model(kind, transformer_dir)), str)


def test_global_hook(transformer_dir: str) -> None:
    model = build(transformer_dir, dense())
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
    try:
        assert "hooks" in find_tail(model)
    finally:
        handle.remove()
    assert isinstance(find_tail(model), Tail)


def test_one_activation_object() -> None:
    """It is part of a compile cache's key."""
    from chunked_embed.losses._tail import _activation

    assert _activation(nn.Tanh()) is _activation(nn.Tanh()) is torch.tanh
    assert _activation(nn.GELU()) is F.gelu
    assert _activation(nn.GELU(approximate="tanh")) is _activation(nn.GELU(approximate="tanh"))


def test_a_similarity_of_the_users_own_is_not_fused(transformer_dir: str) -> None:
    model = build(transformer_dir, dense(), Normalize())
    assert not losses.CoSENTLoss(model, 1.0, lambda a, b: (a * b).sum(1))._tail().modules
    with pytest.raises(ValueError, match="no fused form"):
        losses.TripletLoss(model, lambda a, b: (a * b).sum(1), fuse_projection=True)._tail()


def test_a_model_of_one_module(transformer_dir: str) -> None:
    model = SentenceTransformer(modules=[Transformer(transformer_dir)], device="cpu")
    assert "Transformer" in find_tail(model)
