"""The one place that knows where sentence-transformers 5.7 to 6.x keeps what we build on."""

# ruff: noqa: E402, F401

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from importlib import import_module
from typing import Any

from torch import Tensor, nn

MINIMUM = (5, 7)
NEED = "chunked_embed.losses needs sentence-transformers 5.7 or later"

try:
    import sentence_transformers
except ModuleNotFoundError as error:
    if (error.name or "").split(".")[0] != "sentence_transformers":
        raise  # it is there, and something that it needs is not
    raise ImportError(f"{NEED}: pip install 'chunked-embed[sentence-transformers]'") from error

if tuple(int(part) for part in sentence_transformers.__version__.split(".")[:2]) < MINIMUM:
    raise ImportError(
        f"{NEED}, found {sentence_transformers.__version__}: pip install -U 'chunked-embed[sentence-transformers]'"
    )

# Whose computations ours are compared with: small batches are left to them. Before, they differ from class to class.
LEAVES_SMALL = tuple(int(part) for part in sentence_transformers.__version__.split(".")[:2]) >= (6, 2)

from sentence_transformers import CrossEncoder, SentenceTransformer, SparseEncoder, util
from sentence_transformers.base.losses import CachedLossMixin, RandContext, uses_gradient_cache
from sentence_transformers.sentence_transformer import losses as library
from sentence_transformers.sentence_transformer.losses.matryoshka import shrink
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling
from sentence_transformers.sparse_encoder import losses as sparse_library
from sentence_transformers.sparse_encoder.modules import SparseAutoEncoder, SpladePooling

try:
    from sentence_transformers.base.losses.merged_forward import embed_columns
except ImportError:  # 5.x embeds every column in a forward pass of its own

    def embed_columns(
        model: nn.Module, features_list: Iterable[dict[str, Tensor]], separate_first: bool = True
    ) -> list:
        return [model(features)["sentence_embedding"] for features in features_list]


multi_vector_library: Any = None  # there is no MultiVectorEncoder in 5.x
with suppress(ModuleNotFoundError):
    multi_vector_library = import_module("sentence_transformers.multi_vector_encoder.losses")

TripletDistanceMetric = library.TripletDistanceMetric
SiameseDistanceMetric = library.SiameseDistanceMetric
check_teacher_targets = getattr(util, "check_teacher_targets", None)  # not in 5.x


def callable_name(function: object) -> str:
    """A name for a config: of a function, a module, a ``functools.partial`` or any other callable."""
    if hasattr(util, "similarity_fct_name"):
        return util.similarity_fct_name(function)
    function = getattr(function, "func", function)  # 5.x: of a partial, the function alone
    return getattr(function, "__name__", type(function).__name__)


# By id: these live as long as the library does, and a user's callable need not have a hash.
_MATRICES = {id(util.cos_sim): "cosine", id(util.pytorch_cos_sim): "cosine", id(util.dot_score): "dot"}


def known_matrix(function: object) -> str | None:
    """The name of a similarity of all rows with all rows that the losses form by products; None for any other."""
    return _MATRICES.get(id(function))


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_plain(module: nn.Module) -> bool:
    """Whether a call of the module is its class's forward, and nothing else."""
    hooked = any(getattr(module, hooks, None) for hooks in _HOOKS)
    return not (hooked or "forward" in vars(module) or getattr(module, "_compiled_call_impl", None))


def is_mean_cross_entropy(module: object) -> bool:
    """Whether this is the mean cross-entropy of whole rows, as the library's constructors set it."""
    return (
        type(module) is nn.CrossEntropyLoss
        and is_plain(module)
        and (module.weight, module.label_smoothing, module.reduction) == (None, 0.0, "mean")
        and module.ignore_index < 0
    )


def is_cosine(module: object) -> bool:
    """Whether this is the cosine over the last dimension, as the library's constructors set it."""
    return type(module) is nn.CosineSimilarity and is_plain(module) and (module.dim, module.eps) == (-1, 1e-8)
