"""Semantic similarity with sentence-transformers: scored pairs and CoSENT. One import is not the library's."""

import torch
from datasets import load_dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator

from chunked_embed import losses  # in the place of: from sentence_transformers.sentence_transformer import losses

MODEL = "sentence-transformers/all-MiniLM-L6-v2"
DATASET = "sentence-transformers/stsb"  # sentence1, sentence2, score
BATCH_SIZE = 512
EPOCHS = 4
LEARNING_RATE = 5e-5

model = SentenceTransformer(MODEL)
train = load_dataset(DATASET, split="train")
held_out = load_dataset(DATASET, split="validation")
evaluator = EmbeddingSimilarityEvaluator(held_out["sentence1"], held_out["sentence2"], held_out["score"])
before = evaluator(model)["spearman_cosine"]

# CoSENT compares all pairs of a batch, so it likes a large one. The encoder holds 64 sentences at a time.
loss = losses.CoSENTLoss(model, mini_batch_size=64)

args = SentenceTransformerTrainingArguments(
    "runs/sts",
    num_train_epochs=EPOCHS,
    per_device_train_batch_size=BATCH_SIZE,
    learning_rate=LEARNING_RATE,
    warmup_steps=0.1,  # of all steps
    bf16=torch.cuda.is_available(),
    logging_steps=1,
    save_strategy="no",
    report_to="none",
)
SentenceTransformerTrainer(model=model, args=args, train_dataset=train, loss=loss).train()
model.save_pretrained("runs/sts")

print(f"Spearman, held out: {before:.4f} before, {evaluator(model)['spearman_cosine']:.4f} after")
