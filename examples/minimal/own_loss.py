"""Losses of your own: what a token or a pair is worth, on plain tensors. The logits are never held whole."""

from functools import partial

import torch
import torch.nn.functional as F
from datasets import load_dataset
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

from chunked_embed import FlexChunkLoss, causal_lm

MODEL = "Qwen/Qwen3-0.6B"
DATASET = "trl-lib/ultrafeedback_binarized"  # conversations chosen and rejected, score_chosen and score_rejected
STEPS = 200
LEARNING_RATE = 1e-5


def focal_loss(outputs, rows, gamma):  # row-wise: logits (R, V), {"target": (R,)} -> a value a token (R,), and metrics
    nll = F.cross_entropy(outputs, rows["target"], reduction="none")
    return (1 - torch.exp(-nll)) ** gamma * nll, {"nll": nll}


class Lead(FlexChunkLoss):  # grouped: scores of tokens are added up for each completion, and a pair has one value
    def score_fn(self, outputs, rows):  # -> {name: (R,)}
        return {"logps": -F.cross_entropy(outputs, rows["target"], reduction="none")}

    def loss_fn(self, scores, groups):  # {"logps": (G, 2), "count": (G, 2)}, {"gap": (G,)} -> (G,), and metrics
        chosen, rejected = (scores["logps"] / scores["count"].clamp_min(1)).unbind(1)
        return F.softplus(groups["gap"] - 4 * (chosen - rejected)), {"accuracy": (chosen > rejected).float()}


focal, lead = FlexChunkLoss(focal_loss, gamma=2.0), Lead(segments_per_group=2)
device = "cuda" if torch.cuda.is_available() else "cpu"
tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).to(device).train()
causal_lm.attach(model)  # from here on it takes head_fn, which runs in the place of the LM head
optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)


def tokens(messages):
    ids = tokenizer.apply_chat_template(messages, return_dict=False)[:1024]
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
    return {"input_ids": ids, "labels": [-100] * len(prompt[:1024]) + ids[len(prompt) :]}


def collate(rows):  # chosen, rejected, chosen, ...
    batch = DataCollatorForSeq2Seq(tokenizer)([tokens(row[side]) for row in rows for side in ("chosen", "rejected")])
    batch["gap"] = torch.tensor([row["score_chosen"] - row["score_rejected"] for row in rows])
    return batch.to(device)


def losses(head, target, gap):  # head.projection has no scale or soft-cap in it: Gemma's are in head.transform
    head = head.shifted()  # the states that predict a token; those whose target is -100 are dropped before any product
    completion = torch.arange(len(target), device=device)[:, None].expand_as(target)  # of each token
    pairs = lead(head.projection, {"target": target}, segments=completion, groups={"gap": gap})
    return focal(head[::2].projection, {"target": target[::2]}), pairs


loader = DataLoader(load_dataset(DATASET, split="train"), 8, shuffle=True, collate_fn=collate)
for step, batch in zip(range(STEPS), loader):
    target, gap = batch.pop("labels")[:, 1:], batch.pop("gap")
    with torch.autocast(device, torch.bfloat16):
        chosen, pairs = model(**batch, head_fn=partial(losses, target=target, gap=gap)).value
    (chosen.loss + pairs.loss).backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 10 == 0:
        print(f"step {step}: NLL {chosen.means['nll']:.3f}, chosen likelier in {pairs.means['accuracy']:.0%} of pairs")
