"""The engine: one loop over chunks of the outputs, and the contract of a step. See docs/design.md.

``call`` reads arguments, ``layout`` checks and lays out calls of one key, ``pack`` and ``plan`` decide on chunks,
``sweep`` is the loop, ``functions`` the step of plain functions, ``losses`` and ``autograd`` what surrounds it.
"""

from .chunk import Chunk, Into
from .plan import ChunkPlan
from .step import LOSS, Needs, Shape, Step
from .types import LossOutput, Projection

__all__ = ["LOSS", "Chunk", "ChunkPlan", "Into", "LossOutput", "Needs", "Projection", "Shape", "Step"]
