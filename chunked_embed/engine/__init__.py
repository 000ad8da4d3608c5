"""The engine: one loop over chunks of the outputs, two shapes of loss. See docs/design.md."""

from .logps import TokenLogps, TokenStatistics, linear_logps
from .loss import FlexChunkLoss
from .plan import ChunkPlan
from .types import LossOutput, Projection

__all__ = ["ChunkPlan", "FlexChunkLoss", "LossOutput", "Projection", "TokenLogps", "TokenStatistics", "linear_logps"]
