"""Retrieval: thousands of in-batch negatives, and a Dense layer behind the encoder. Accuracy before and after."""

import torch
from datasets import load_dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from sentence_transformers.sentence_transformer.modules import Dense, Normalize

from chunked_embed import losses

MODEL = "microsoft/mpnet-base"
DATASET = "sentence-transformers/gooaq"  # two columns: a query, and the document that belongs to it
BATCH_SIZE = 16_384  # every document of the batch but its own is a query's negative
MINI_BATCH_SIZE = 128  # texts that the encoder holds at a time
STEPS = 100
LEARNING_RATE = 2e-4  # a large batch takes large steps
HELD_OUT = 1000

torch.manual_seed(0)
model = SentenceTransformer(MODEL)
dense = Dense(model.get_embedding_dimension(), 256, activation_function=torch.nn.Identity())
model = SentenceTransformer(modules=[*model, dense, Normalize()])

data = load_dataset(DATASET, split="train").train_test_split(test_size=HELD_OUT, seed=0)
queries, documents = (dict(enumerate(data["test"][column])) for column in data["test"].column_names)
evaluator = InformationRetrievalEvaluator(queries, documents, {n: {n} for n in queries})
before = evaluator(model)["cosine_accuracy@1"]

# "text": another row with the same question or the same answer is no negative. In a batch this large there are some.
loss = losses.MultipleNegativesRankingLoss(model, mini_batch_size=MINI_BATCH_SIZE, false_negatives="text")

args = SentenceTransformerTrainingArguments(
    "runs/large_batch_mnrl",
    max_steps=STEPS,
    per_device_train_batch_size=BATCH_SIZE,
    learning_rate=LEARNING_RATE,
    warmup_steps=0.1,  # of all steps
    bf16=torch.cuda.is_available(),
    dataloader_drop_last=True,
    logging_steps=1,
    save_strategy="no",
    report_to="none",
)
SentenceTransformerTrainer(model=model, args=args, train_dataset=data["train"], loss=loss).train()
model.save_pretrained("runs/large_batch_mnrl")

after = evaluator(model)["cosine_accuracy@1"]
print(f"accuracy@1, held out: {before:.4f} before, {after:.4f} after")
