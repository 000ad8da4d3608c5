"""ORPO with TRL: preferences, without a reference. One name is not TRL's own, and the logits are never held."""

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.experimental.orpo import ORPOConfig

from alignment.trl import ChunkedORPOTrainer  # in the place of: from trl.experimental.orpo import ORPOTrainer

MODEL = "Qwen/Qwen3-0.6B-Base"
DATASET = "trl-lib/ultrafeedback_binarized"  # chosen and rejected, as texts after a prompt or as conversations
BATCH_SIZE = 4  # pairs
STEPS = 200
LEARNING_RATE = 8e-6

args = ORPOConfig(
    "runs/orpo",
    beta=0.1,
    max_steps=STEPS,
    per_device_train_batch_size=BATCH_SIZE,
    gradient_accumulation_steps=4,
    learning_rate=LEARNING_RATE,
    bf16=torch.cuda.is_available(),
    save_strategy="no",
    report_to="none",
)
trainer = ChunkedORPOTrainer(
    AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32),  # bf16 is for the products, not for the weights
    args=args,
    train_dataset=load_dataset(DATASET, split="train"),
    eval_dataset=load_dataset(DATASET, split="test"),
    processing_class=AutoTokenizer.from_pretrained(MODEL),
)

before = trainer.evaluate()
trainer.train()
after = trainer.evaluate()
trainer.save_model()

for name in ("eval_loss", "eval_rewards/accuracies", "eval_nll_loss"):
    print(f"{name}: {before[name]:.4f} before, {after[name]:.4f} after")
