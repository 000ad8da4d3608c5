"""Builders and comparisons that the tests of the losses share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import sentence_transformers
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, StaticEmbedding, Transformer
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

WORDS = ["a", "the", "cat", "dog", "bird", "tree", "sits", "runs", "under", "over", "red", "blue", "big", "old", "sea"]
HIDDEN, OUT = 16, 12


def word_tokenizer() -> Tokenizer:
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def save_transformer(folder: Path) -> str:
    torch.manual_seed(0)
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=word_tokenizer(), mask_token="[MASK]", **special).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(WORDS) + 5,
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(folder)
    return str(folder)


def build(
    folder: str, *tail: nn.Module, dropout: bool = False, dtype: torch.dtype = torch.float64
) -> SentenceTransformer:
    """Transformer, mean pooling and the given modules; the same weights at every call."""
    torch.manual_seed(0)
    modules = [Transformer(folder), Pooling(HIDDEN)]
    model = SentenceTransformer(modules=[*modules, *tail], device="cpu").to(dtype)
    model.train()
    if not dropout:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    return model


def dense(activation: nn.Module | None = None, seed: int = 1, **kwargs) -> Dense:
    torch.manual_seed(seed)
    return Dense(HIDDEN, OUT, activation_function=activation if activation is not None else nn.Tanh(), **kwargs)


def static_model(dtype: torch.dtype = torch.float64) -> SentenceTransformer:
    torch.manual_seed(0)
    module = StaticEmbedding(word_tokenizer(), embedding_dim=HIDDEN)
    return SentenceTransformer(modules=[module, Normalize()], device="cpu").to(dtype).train()


def sentences(rows: int, seed: int) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 10, (rows,), generator=generator).tolist()
    return [" ".join(WORDS[i] for i in torch.randint(len(WORDS), (n,), generator=generator)) for n in lengths]


def features(
    model: SentenceTransformer, count: int, columns: int, seed: int = 0, rows: slice = slice(None)
) -> list[dict[str, Tensor]]:
    return [model.preprocess(sentences(count, seed + column)[rows]) for column in range(columns)]


def labels_for(kind: str, rows: int) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return {
        "random": torch.rand(rows, generator=generator, dtype=torch.float64),
        "tied": torch.randint(0, 3, (rows,), generator=generator).double() / 2,
        "equal": torch.ones(rows, dtype=torch.float64),
        "bool": torch.rand(rows, generator=generator) > 0.5,
        "column": torch.rand(rows, 1, generator=generator, dtype=torch.float64),
        "binary": torch.arange(rows) % 3 % 2,
        "zero": torch.zeros(rows, dtype=torch.long),
        "two": torch.rand(rows, 2, generator=generator, dtype=torch.float64) * 9,
        "three": torch.rand(rows, 3, generator=generator, dtype=torch.float64) * 9,
    }[kind]


def value_and_grads(loss: nn.Module, model: nn.Module, batch, labels, upstream: float = 1.0) -> tuple[Tensor, dict]:
    """The loss, and the gradient of every parameter of the model."""
    model.zero_grad()
    value = loss([dict(column) for column in batch], labels)
    (upstream * value).backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return value.detach(), grads


# Gradient caching before sentence-transformers 6.2 replays in float32, whatever the model's dtype.
EXACT = tuple(int(part) for part in sentence_transformers.__version__.split(".")[:2]) >= (6, 2)
TOLERANCE = {"rtol": 1e-9, "atol": 1e-12} if EXACT else {"rtol": 1e-4, "atol": 1e-5}


def assert_same(ours: tuple[Tensor, dict], theirs: tuple[Tensor, dict], **tolerance: float) -> None:
    tolerance = tolerance or TOLERANCE
    torch.testing.assert_close(ours[0], theirs[0], **tolerance)
    assert ours[1].keys() == theirs[1].keys()
    for name, grad in theirs[1].items():
        torch.testing.assert_close(ours[1][name], grad, **tolerance, msg=lambda m, name=name: f"{name}: {m}")


def train(model: SentenceTransformer, loss: Any, data: Any, folder: Path, learning_rate: float = 1e-3) -> Any:
    """Three steps of the real trainer, each of two batches, and an evaluation -> the trainer."""
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments

    args = SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        max_steps=3,
        per_device_train_batch_size=5,
        gradient_accumulation_steps=2,
        learning_rate=learning_rate,
        eval_strategy="steps",
        eval_steps=3,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
    )
    trainer = SentenceTransformerTrainer(model=model, args=args, train_dataset=data, eval_dataset=data, loss=loss)
    trainer.train()
    return trainer
