"""Embedding distillation for the sentence-transformers trainer: a small student learns a teacher's similarities.

::

    loss = EmbedDistillLoss(student, teacher, loss="kl", scale=20.0)
    SentenceTransformerTrainer(model=student, train_dataset=dataset, loss=loss).train()
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chunked_embed import checks
from chunked_embed.checks import POSITIVE
from chunked_embed.gather import ranks
from chunked_embed.losses._bags import is_bag
from chunked_embed.losses._base import ChunkedLoss
from chunked_embed.losses._compat import SentenceTransformer, callable_name, embed_columns
from chunked_embed.losses._kinds import check_columns, check_embeddings, check_model
from chunked_embed.losses._learnable import averaged
from chunked_embed.losses.gist import _MiniBatches

from .divergences import Divergence
from .losses import DistillationLoss, DistillLoss
from .topk import TopKLoss

checks.own_package(sys.modules["distill"], "DistillationLoss")


class EmbedDistillLoss(ChunkedLoss, nn.Module):
    """``D(softmax(scale cos(student)), softmax(scale cos(teacher))) + hidden_weight * distance(P student, teacher)``.

    D is any divergence of ``distill``, between what the two think of the texts of a batch. Of several columns, row i of
    the first one is compared with all rows of the others (a query with documents); of one column, every text with all
    others (in the mean of "mse" its own counts, as an agreement). No N x N matrix is held. With ``hidden`` each
    embedding is compared with the teacher's, too.

    Args:
        model: The student.
        teacher: A SentenceTransformer, which is frozen and put in evaluation mode; a function from a list of texts to
            their embeddings; or None, where the dataset's ``label`` column has the teacher's embeddings. A teacher that
            reads other tokens than the student, and a function, get texts that were decoded from the student's tokens:
            truncated like them, and without prompts. Labels have none of these limits, and the teacher runs once.
        loss: The name of a divergence ("kl", "jsd", ...), terms of a :class:`~distill.DistillLoss`, a
            :class:`~distill.DistillationLoss`, whose numbers may change during training, a function of yours as for
            ``DistillLoss(loss_fn=...)``, or None for ``hidden`` alone. The hard loss ("ce") is InfoNCE: a row's own
            text in the second column is right.
        scale: Factor on the cosine similarities.
        hidden: "cosine": ``mean(1 - cos(P student, teacher))``; "mse": ``mean((P student - teacher)^2)``.
        hidden_weight: Factor of it.
        teacher_scale: Factor on the teacher's similarities, where it is another one.
        teacher_dim: Of the teacher's embeddings; only a SentenceTransformer is asked. Where ``hidden`` needs it and it
            is not the student's, P is a learnable ``nn.Linear``, ``self.projection`` (no part of the saved model).
            Otherwise P is the identity.
        options: See :class:`~chunked_embed.losses.Options`; those of chunks count for a ``loss`` that is made here.
            With ``gather_across_devices`` texts are compared with those of all processes.

    Inputs: one column of texts or more. Labels, without a teacher: (N, D), or (N, columns, D) for several columns.
    With a teacher, labels of one number a row (classes, scores) are ignored; embeddings are refused.

    Raises:
        TypeError, ValueError: what makes no sense, in the constructor as far as it shows there; neither or both of a
            teacher and its embeddings as labels, shapes that do not fit.

    The name is that of a loss of sentence-transformers which does what ``hidden`` does, from labels.

    References: https://arxiv.org/abs/2101.04731 (similarity distributions), https://arxiv.org/abs/2301.12005 (hidden)

    Example:
        >>> from sentence_transformers import SentenceTransformer
        >>> from distill.sentence_transformers import EmbedDistillLoss
        >>> model = SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2")
        >>> teacher = SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2")
        >>> loss = EmbedDistillLoss(model, teacher, loss="kl", scale=20.0)
        >>> texts = ["A plane.", "A flute.", "Bread."], ["An aircraft.", "Music.", "A loaf."]
        >>> loss([model.preprocess(list(column)) for column in texts], labels=None)  # one model twice: nothing to learn
        tensor(0., grad_fn=<AddBackward0>)
    """

    def __init__(
        self,
        model: SentenceTransformer,
        teacher: SentenceTransformer | Callable[[list[str]], Any] | None = None,
        loss: str | Sequence[tuple] | DistillationLoss | Callable[..., Tensor] | None = "kl",
        scale: float = 20.0,
        hidden: Literal["cosine", "mse"] | None = None,
        hidden_weight: float = 1.0,
        *,
        teacher_scale: float | None = None,
        teacher_dim: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        check_model(model)
        if not hasattr(model, "get_embedding_dimension"):
            raise TypeError(f"expected a SentenceTransformer as model, got {type(model).__name__}")
        if teacher is not None and (not callable(teacher) or isinstance(teacher, type)):
            raise TypeError(f"expected a SentenceTransformer, a function or None as teacher, got {teacher!r}")
        check_model(teacher, "teacher")
        if isinstance(teacher, nn.Module):
            trained = {id(p) for p in model.parameters() if p.requires_grad}
            if teacher is model or any(id(p) in trained for p in teacher.parameters()):
                raise ValueError("expected a teacher apart from the model, got one that would be trained with it")
        if isinstance(loss, TopKLoss):
            raise TypeError("expected a divergence of whole distributions, got a TopKLoss")
        own = isinstance(loss, Divergence) or (callable(loss) and not isinstance(loss, (type, nn.Module)))
        if not own and not isinstance(loss, (str, list, tuple, DistillationLoss, type(None))):
            raise TypeError(
                "expected loss to be the name of a divergence, terms, a DistillationLoss, a function or None, "
                f"got {loss!r}"
            )
        if isinstance(loss, DistillationLoss) and loss.ignore_index >= 0:
            raise ValueError(
                f"expected a loss with a negative ignore_index, got {loss.ignore_index}: a row of the batch"
            )
        if hidden not in (None, "cosine", "mse"):
            raise ValueError(f'expected hidden to be "cosine", "mse" or None, got {hidden!r}')
        if loss is None and hidden is None:
            raise ValueError("expected a loss or hidden, got None for both")
        teacher_scale = scale if teacher_scale is None else teacher_scale
        for name, value in (("scale", scale), ("teacher_scale", teacher_scale), ("hidden_weight", hidden_weight)):
            checks.number(name, value, POSITIVE)
        self._set_options(**options)
        self.gather_across_devices: bool
        self._given = loss
        self.model = model
        self.scale, self.teacher_scale = scale, teacher_scale
        self.hidden, self.hidden_weight = hidden, hidden_weight
        terms: Any = [(loss, 1.0)] if own or isinstance(loss, str) else loss
        if terms is not None:  # absent, not None: a model card names the class of what is in `loss`
            self.loss = DistillLoss(terms, **self._chunking.keywords) if isinstance(terms, (list, tuple)) else terms
        if isinstance(teacher, SentenceTransformer):
            teacher.requires_grad_(False).eval()
            self._same_tokens = _reads_the_same(model, teacher)
            teacher_dim = teacher.get_embedding_dimension()
        self.teacher = teacher
        self._tokenizer = getattr(model, "tokenizer", None)
        width = model.get_embedding_dimension()
        self.projection: nn.Linear | None = None
        if hidden and teacher_dim not in (None, width):
            self.projection = nn.Linear(width, teacher_dim, device=model.device)

    def train(self, mode: bool = True) -> EmbedDistillLoss:
        super().train(mode)
        if isinstance(self.teacher, nn.Module):
            self.teacher.eval()
        return self

    def compute_loss_from_embeddings(self, embeddings: Iterable[Tensor], labels: Any = None) -> Tensor:
        """The loss of the student's embeddings, one tensor (N, D) a column, and the teacher's: likewise, or labels."""
        return self._loss(check_columns(embeddings), labels)

    @property
    def _fusable(self) -> bool:
        return False

    @property
    def _normalizes(self) -> bool:
        return self.hidden != "mse" and self.projection is None

    # ---- the teacher

    @torch.no_grad()
    def _targets(self, features: list[dict[str, Tensor]], labels: Any) -> Any:
        """The teacher's embeddings, which take the place of labels."""
        if self.teacher is None:
            return labels
        if isinstance(labels, Tensor) and labels.dim() > 1:
            raise ValueError(
                f"expected a teacher or its embeddings as labels, got both: labels of shape {tuple(labels.shape)}"
            )
        if isinstance(self.teacher, SentenceTransformer):
            if self._same_tokens and self.uses_gradient_cache:
                return [_MiniBatches(self.teacher, self).embed(dict(column)) for column in features]
            if self._same_tokens:
                return embed_columns(self.teacher, [dict(column) for column in features])
            size = self.mini_batch_size or 32
            return [
                # Those of encode() are inference tensors, which no backward pass may keep.
                self.teacher.encode(
                    self._texts(column), batch_size=size, convert_to_tensor=True, show_progress_bar=False
                ).clone()
                for column in features
            ]
        return [_embeddings(self.teacher(self._texts(column))) for column in features]

    def _texts(self, column: dict[str, Tensor]) -> list[str]:
        if self._tokenizer is None or "input_ids" not in column:
            raise ValueError(f"expected tokens to decode for the teacher, got {sorted(column)}: give it as labels")
        ids = column["input_ids"]
        if is_bag(column):
            rows: Any = ids.tensor_split(column["offsets"][1:].cpu())
        elif "cu_seq_lens_q" in column:  # one sequence, which holds all rows
            rows = ids[0].tensor_split(column["cu_seq_lens_q"][1:-1].long().cpu())
        else:
            rows = ids
        decode = getattr(self._tokenizer, "decode_batch", None) or self._tokenizer.batch_decode
        return decode([row.tolist() for row in rows], skip_special_tokens=True)

    def _columns(self, embeddings: list[Tensor], labels: Any) -> list[Tensor]:
        """The teacher's embeddings of each column, (N, D)."""
        if labels is None:
            raise ValueError("expected a teacher, or its embeddings as labels, got neither")
        if isinstance(labels, Tensor):
            labels = labels.unbind(1) if labels.dim() == 3 else [labels]
        if not isinstance(labels, (list, tuple)) or not all(isinstance(column, Tensor) for column in labels):
            raise TypeError(f"expected the teacher's embeddings as tensors, one a column, got {_kind(labels)}")
        shapes = [tuple(column.shape) for column in labels]
        rows = [len(column) for column in embeddings]
        if len(set(shapes)) != 1 or len(shapes[0]) != 2 or [shape[0] for shape in shapes] != rows:
            expected = f"{len(rows)} columns of {rows[0]} embeddings, ({rows[0]}, D) each"
            raise ValueError(f"expected the teacher's embeddings of {expected}, got shapes {shapes}")
        return [column.detach().to(embeddings[0]) for column in labels]

    # ---- the loss

    def _loss(self, embeddings: list[Tensor], labels: Any, **projection: Any) -> Tensor:
        wide = torch.promote_types(embeddings[0].dtype, torch.float32)
        check_embeddings({f"embeddings[{i}]": column for i, column in enumerate(embeddings)}, one_dtype=False)
        student = [column.to(wide) for column in embeddings]
        teacher = self._columns(student, labels)
        processes = ranks(student[0], self.gather_across_devices)
        total = student[0].new_zeros(())
        if getattr(self, "loss", None) is not None:
            total = total + self._similarities(self.loss, student, teacher, processes)
        if self.hidden is not None:
            distances = [self._distance(*sides) for sides in zip(student, teacher)]
            total = total + self.hidden_weight * torch.stack(distances).mean()
        return processes.share(total)

    def _similarities(
        self, loss: DistillationLoss, student: list[Tensor], teacher: list[Tensor], processes: Any
    ) -> Tensor:
        alone = len(student) == 1
        if alone and loss.weight_hard != 0:
            raise ValueError(
                'expected two columns of texts or more for the hard loss ("ce", or a weight_hard): the right text of a '
                "row is its own in the second column, got one column"
            )
        heads = []
        for side, columns, scale in (("student", student, self.scale), ("teacher", teacher, self.teacher_scale)):
            query, *documents = (F.normalize(column, dim=1) for column in columns)
            heads.append(loss.head_of(side, scale * query, torch.cat(processes.gather(*(documents or [query])))))
        ours, theirs = heads
        own = processes.offset + torch.arange(len(student[0]), device=student[0].device)
        if not alone:
            return loss(ours, theirs, target=own).loss
        if len(ours.weight) < 2:
            return 0 * ours.hidden.sum()  # the last batch of an epoch may be a single text
        return loss.among_others(ours, theirs, own).loss

    def _distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        if self.projection is not None:
            weight, bias = (averaged(p).to(student.dtype) for p in (self.projection.weight, self.projection.bias))
            student = F.linear(student, weight, bias)
        if student.shape != teacher.shape:
            raise ValueError(
                f"expected embeddings of the teacher of width {student.shape[1]}, got {teacher.shape[1]}: "
                "hidden needs its teacher_dim where it is not the student's"
            )
        if self.hidden == "mse":
            return F.mse_loss(student, teacher)
        return 1 - F.cosine_similarity(student, teacher, dim=1).mean()

    def get_config_dict(self) -> dict[str, Any]:
        given = self._given
        name: Any = type(given).__name__ if isinstance(given, DistillationLoss) else given
        if isinstance(name, (list, tuple)):
            name = [(_name_of(kind), *rest) for kind, *rest in name]
        elif name is not None:
            name = _name_of(name)
        return {
            "loss": name,
            "scale": self.scale,
            "teacher_scale": self.teacher_scale,
            "hidden": self.hidden,
            "hidden_weight": self.hidden_weight,
            **self._changed_options(),
        }

    @property
    def citation(self) -> str:
        return """
@inproceedings{fang2021seed,
    title={{SEED}: Self-supervised Distillation For Visual Representation},
    author={Fang, Zhiyuan and Wang, Jianfeng and Wang, Lijuan and Zhang, Lei and Yang, Yezhou and Liu, Zicheng},
    booktitle={International Conference on Learning Representations},
    year={2021},
    url={https://arxiv.org/abs/2101.04731}
}
"""


def _name_of(kind: Any) -> str:
    return kind if isinstance(kind, str) else callable_name(getattr(kind, "function", kind))  # of a Divergence


def _embeddings(given: Any) -> Tensor:
    """What a function gave for a column, as a tensor."""
    try:
        return torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"expected a teacher that returns embeddings (N, D), got {_kind(given)}: {error}") from error


def _kind(given: Any) -> str:
    inside = f" of {sorted({type(item).__name__ for item in given})}" if isinstance(given, (list, tuple)) else ""
    return type(given).__name__ + inside


def _reads_the_same(model: SentenceTransformer, teacher: SentenceTransformer) -> bool:
    mine, other = getattr(model, "tokenizer", None), getattr(teacher, "tokenizer", None)
    if mine is None or other is None or type(mine) is not type(other) or mine.get_vocab() != other.get_vocab():
        return False
    return (teacher.max_seq_length or math.inf) >= (model.max_seq_length or math.inf)
