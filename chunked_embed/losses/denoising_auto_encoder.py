"""TSDAE: a decoder writes a text from the embedding of what is left of it."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable
from dataclasses import fields
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chunked_embed import FlexChunkLoss, Head, Step, lm_heads
from chunked_embed.causal_lm import unwrapped
from chunked_embed.chunking import NAMES, Chunking
from chunked_embed.engine.compile import outside_compile
from chunked_embed.functional.arguments import shared
from chunked_embed.functional.kernel_steps import CrossEntropyRows
from chunked_embed.losses._base import Options
from chunked_embed.losses._compat import SentenceTransformer, library
from chunked_embed.losses._kinds import check_model
from chunked_embed.losses._unwrapped import averaged_behind, in_step

logger = logging.getLogger(__name__)

# Options of the other losses: here a text's loss is its own, so that batches of any size accumulate to the same.
FOREIGN = tuple(field.name for field in fields(Options) if field.name not in NAMES)


class TokenCrossEntropy(FlexChunkLoss):
    """``-log softmax(outputs)[target]`` of each row."""

    def loss_fn(self, outputs: Tensor, rows: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(outputs, rows["target"], reduction="none")

    def make_step(self, projections: tuple[str, ...]) -> Step:
        return CrossEntropyRows(1.0)


class DenoisingAutoEncoderLoss(library.DenoisingAutoEncoderLoss):
    """``mean over tokens t of  -log p(t | the tokens before it, the embedding of the damaged text)``.

    The decoder stops short of its logits: they are formed a chunk of tokens at a time, for tokens that are no padding,
    and nothing of tokens x vocabulary is held. Products of half precision are float32 logits. A batch of nothing but
    padding has a loss of zero.

    A decoder whose head is not known (see ``chunked_embed.lm_heads``), or that does more to its logits than its head
    does, holds them all, as in the library; one logged warning says why.

    Over several processes the gradients of encoder and decoder are averaged at the end of each backward pass, and
    process 0's parameters are what all of them start from, cross-attention that is new among them: the trainer wraps
    neither. What is wrapped in DistributedDataParallel or sharded all the same is left to the wrapper.

    Args:
        model: The SentenceTransformer to train.
        decoder_name_or_path: Of the decoder, a causal language model of transformers that takes cross-attention; by
            default the encoder's.
        tie_encoder_decoder: Share the parameters that both have.
        chunk_size, max_chunk_bytes, compiled, float32_outputs: See :class:`~chunked_embed.losses.Options`. Rows are
            tokens.

    Inputs: the damaged text and the original; labels are ignored.

    Reference: https://huggingface.co/papers/2104.06979

    Example:
        >>> from sentence_transformers import SentenceTransformer
        >>> from chunked_embed import losses
        >>> model = SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2")
        >>> loss = losses.DenoisingAutoEncoderLoss(model)
        >>> texts = ["A is off.", "A plays flute."], ["A plane is taking off.", "A man plays a flute."]
        >>> features = [model.preprocess(list(column)) for column in texts]
        >>> loss(features, labels=None).backward()
    """

    def __init__(
        self,
        model: SentenceTransformer,
        decoder_name_or_path: str | None = None,
        tie_encoder_decoder: bool = True,
        **options: Any,
    ) -> None:
        check_model(model)
        for name in options:
            if name not in NAMES:
                raise TypeError(f"expected options of {type(self).__name__} among {[*NAMES]}, got {name!r}")
        chunking = Chunking(**options)
        super().__init__(model, decoder_name_or_path, tie_encoder_decoder)
        for name, value in chunking.keywords.items():
            setattr(self, name, value)
        self._told: set[str] = set()
        self._refused: tuple[nn.Module | None, str] = (None, "")  # a head whose decoder wants its logits, and why
        if isinstance(reason := _known_head(self.decoder), str):
            self._tell(reason)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in FOREIGN:
            raise TypeError(f"expected options of {type(self).__name__} among {[*NAMES]}, got {name!r}")
        if name in NAMES:
            Chunking(**{name: value})
        super().__setattr__(name, value)

    def get_config_dict(self) -> dict[str, Any]:
        options = Chunking.of(self).keywords
        return {**super().get_config_dict(), **{k: v for k, v in options.items() if v != getattr(Options, k)}}

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        columns = list(sentence_features)
        if len(columns) != 2:
            raise ValueError(
                f"{type(self).__name__} expects two columns, the damaged text and the original, got {len(columns)}"
            )
        damaged, original = columns
        chunking = Chunking.of(self)
        parameters = in_step(self)
        if self.need_retokenization:
            original = self.retokenize(original)
        embedding = self.encoder(damaged)["sentence_embedding"]  # (N, H)
        tokens = original["input_ids"]
        decode = partial(
            self.decoder,
            input_ids=tokens[:, :-1],
            encoder_hidden_states=embedding[:, None],
            encoder_attention_mask=damaged["attention_mask"][:, :1],
            use_cache=False,
        )
        return averaged_behind(self._cross_entropy(decode, tokens[:, 1:], chunking), parameters)

    @outside_compile
    def _cross_entropy(self, decode: Callable[[], Any], target: Tensor, chunking: Chunking) -> Tensor:
        padding = self.tokenizer_decoder.pad_token_id
        found = self._head(decode, target)
        if isinstance(found, Head):
            loss = shared(TokenCrossEntropy, chunking, ignore_index=padding)
            return loss(found.projection, {"target": target.to(found.hidden.device)}).loss
        self._tell(found)
        logits = decode()[0]
        return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), target.reshape(-1), ignore_index=padding)

    def _head(self, decode: Callable[[], Any], target: Tensor) -> Head | str:
        """With the decoder's states, or why its logits can't be taken in its place."""
        module = _known_head(self.decoder)
        if isinstance(module, str):
            return module
        refused, reason = self._refused
        if module is refused:
            return reason
        found = _states(unwrapped(self.decoder), module, decode, target)
        if isinstance(found, str):
            self._refused = module, found  # not asked again, which takes a pass
        return found

    def _tell(self, reason: str) -> None:
        if reason not in self._told:
            self._told.add(reason)
            who, decoder = type(self).__name__, type(unwrapped(self.decoder)).__name__
            logger.warning("%s holds all logits of %s, as sentence-transformers does: %s", who, decoder, reason)


def _known_head(decoder: nn.Module) -> nn.Module | str:
    """A decoder's head, or what is unknown about it."""
    inner = unwrapped(decoder)
    module = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    if module is None:
        return "it has no output embeddings"
    try:
        lm_heads.check(module)
    except (TypeError, ValueError) as error:
        return str(error)
    for part in decoder.modules():
        compiled = "_orig_mod" in part._modules or getattr(part, "_compiled_call_impl", None) is not None
        if compiled and any(each is module for each in part.modules()):
            return "its head is part of what is compiled"
    return module


def _states(decoder: nn.Module, module: nn.Module, decode: Callable[[], Any], target: Tensor) -> Head | str:
    """What turns hidden states into logits, of a decoder whose head is given no states."""
    heads: list[Head] = []
    returned: list[Any] = []
    outputs: list[Any] = []

    def without_states(_: nn.Module, args: tuple[Any, ...]) -> Any:
        if len(args) != 1 or args[0].shape[:-1] != target.shape:
            return args
        heads.append(lm_heads.head(module, args[0], 1.0, None))
        return args[0][:, :0]

    hooks = [
        module.register_forward_pre_hook(without_states, prepend=True),
        module.register_forward_hook(lambda _, args, output: returned.append(output)),
        decoder.register_forward_hook(lambda _, args, output: outputs.append(output[0])),
    ]
    try:
        decode()
    except Exception as error:
        if not heads or isinstance(error, torch.OutOfMemoryError):  # it had all that it wanted, or wanted too much
            raise
        return f"it does more to its logits than its head does ({error})"
    finally:
        for hook in hooks:
            hook.remove()
    if len(heads) != 1 or len(returned) != 1:
        return f"it does not call its head once, with a state for each of {tuple(target.shape)} tokens"
    if len(outputs) != 1 or outputs[0] is not returned[0]:
        return "it does more to its logits than its head does"
    return heads[0]


# help() and inspect see the options one by one.
_shared = inspect.signature(Options).parameters
_own = list(inspect.signature(DenoisingAutoEncoderLoss.__init__).parameters.values())[1:-1]
DenoisingAutoEncoderLoss.__signature__ = inspect.Signature([*_own, *(_shared[name] for name in NAMES)])
