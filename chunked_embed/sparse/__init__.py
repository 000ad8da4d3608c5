"""For sentence-transformers' ``SparseEncoder``: ``attach(model)`` gives one the fused SPLADE head, ``losses`` are
drop-ins. Importing this does not import the library.
"""

from ._attach import attach

__all__ = ["attach"]
