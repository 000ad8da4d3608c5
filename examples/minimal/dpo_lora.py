"""DPO with TRL, and LoRA on the LM head too. One name is not TRL's own, and the logits are never held."""

import torch
from datasets import load_dataset
from peft import LoraConfig
from trl import DPOConfig

from alignment.trl import ChunkedDPOTrainer  # in the place of: from trl import DPOTrainer

MODEL = "allenai/OLMo-2-0425-1B-SFT"
DATASET = "trl-lib/ultrafeedback_binarized"  # chosen and rejected, as texts after a prompt or as conversations
BATCH_SIZE = 4  # pairs
STEPS = 200
LEARNING_RATE = 2e-5

args = DPOConfig(
    "runs/dpo_lora",
    max_steps=STEPS,
    per_device_train_batch_size=BATCH_SIZE,
    gradient_accumulation_steps=4,
    learning_rate=LEARNING_RATE,
    loss_type=["sigmoid", "sft"],  # DPO, and a little cross-entropy on what was chosen
    loss_weights=[1.0, 0.1],
    bf16=torch.cuda.is_available(),
    save_strategy="no",
    report_to="none",
)
trainer = ChunkedDPOTrainer(
    MODEL,
    args=args,
    train_dataset=load_dataset(DATASET, split="train"),
    eval_dataset=load_dataset(DATASET, split="test"),
    # TRL's own trainer refuses lm_head. The reference is this model with its adapters off.
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj", "lm_head"]),
)

before = trainer.evaluate()  # rewards are zero here: policy and reference are one
trainer.train()
after = trainer.evaluate()
trainer.save_model()

for name in ("eval_loss", "eval_rewards/accuracies", "eval_rewards/margins"):
    print(f"{name}: {before[name]:.4f} before, {after[name]:.4f} after")
