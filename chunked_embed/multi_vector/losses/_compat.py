"""Where sentence-transformers 6.x keeps what the losses of a MultiVectorEncoder build on."""

# ruff: noqa: F401

from __future__ import annotations

from chunked_embed.losses._compat import multi_vector_library as library
from chunked_embed.losses._compat import sentence_transformers, util

if library is None:
    raise ImportError(
        "chunked_embed.multi_vector.losses needs sentence-transformers 6.0 or later, found "
        f"{sentence_transformers.__version__}: pip install -U 'chunked-embed[sentence-transformers]'"
    )

from sentence_transformers import MultiVectorEncoder
from sentence_transformers.base.losses.merged_forward import embed_columns_padded
from sentence_transformers.multi_vector_encoder import scoring
from sentence_transformers.util import (
    cat_padded_token_embeddings,
    check_teacher_targets,
    similarity_fct_name,
    stack_padded_token_embeddings,
)
