"""Distillation in a loop of your own: two models, bf16 autocast, accumulated gradients. Neither's logits are held."""

import torch
from datasets import load_dataset
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from chunked_embed import causal_lm
from distill import DistillLoss

TEACHER = "Qwen/Qwen3-1.7B"
STUDENT = "Qwen/Qwen3-0.6B"  # with the teacher's tokenizer
DATASET = "roneneldan/TinyStories"  # text
BATCH_SIZE = 8
ACCUMULATE = 4  # batches a step
STEPS = 200
LEARNING_RATE = 1e-5

device = "cuda" if torch.cuda.is_available() else "cpu"
tokenizer = AutoTokenizer.from_pretrained(STUDENT)
teacher = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.bfloat16).to(device).eval()
student = AutoModelForCausalLM.from_pretrained(STUDENT, dtype=torch.float32).to(device).train()
loss_fn = DistillLoss([("kl", 0.5), ("ce", 0.5)])  # ce: the labels' cross-entropy
optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE)


def collate(rows):
    texts = [row["text"] for row in rows]
    inputs = tokenizer(texts, padding=True, truncation=True, max_length=512, return_tensors="pt").to(device)
    return inputs, inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)[:, 1:]


def forward(inputs, target, num_items=None):
    def loss(head):  # hidden states, and the LM head
        return loss_fn(head.shifted(), taught.shifted(), target=target, num_items=num_items)

    with torch.autocast(device, torch.bfloat16):
        taught = causal_lm.capture(teacher, inputs)
        return student(**inputs, head_fn=loss).value


def held_out_means():
    with torch.no_grad(), causal_lm.evaluating(student):
        means = [forward(*batch).means for batch in held_out]
    return {name: round(sum(m[name].item() for m in means) / len(means), 4) for name in means[0]}


data = load_dataset(DATASET)
batches = iter(DataLoader(data["train"], BATCH_SIZE, shuffle=True, collate_fn=collate))
held_out = [batch for _, batch in zip(range(20), DataLoader(data["validation"], BATCH_SIZE, collate_fn=collate))]
for model in (teacher, student):
    causal_lm.attach(model)  # from here on it takes head_fn, which runs in the place of the LM head
    causal_lm.check(model, held_out[0][0])  # that nothing but the head makes its logits

before = held_out_means()
for _ in tqdm(range(STEPS)):
    parts = [next(batches) for _ in range(ACCUMULATE)]
    num_items = sum((target != -100).sum() for _, target in parts)  # so that a token counts alike in all parts
    for inputs, target in parts:
        forward(inputs, target, num_items).loss.backward()
    torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
student.save_pretrained("runs/distill_loop")

for name, value in held_out_means().items():
    print(f"held-out {name}: {before[name]} before, {value} after")
