"""A processor, a model and preference data with pictures, small enough to train with TRL in a test."""

from typing import Any

import torch
import trl_parts as parts
from datasets import Dataset
from PIL import Image
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

SIDE, PATCH, IMAGE_TOKEN = 8, 4, 63
TEMPLATE = """\
{%- for message in messages %}{% if message.content is string %}{{ message.content }} {% else %}
{%- for part in message.content %}{{ '<image>' if part.type == 'image' else part.text }} {% endfor %}{% endif %}
{%- endfor %}"""


def processor() -> LlavaProcessor:
    tokenizer = parts.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    assert tokenizer.convert_tokens_to_ids("<image>") == IMAGE_TOKEN
    size = {"height": SIDE, "width": SIDE}
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=size),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    )


def model() -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    vision = CLIPVisionConfig(image_size=SIDE, patch_size=PATCH, projection_dim=16, num_hidden_layers=2, **sizes)
    text = LlamaConfig(vocab_size=64, num_hidden_layers=1, bos_token_id=1, eos_token_id=1, pad_token_id=0, **sizes)
    made = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN)
    )
    with torch.no_grad():
        made.lm_head.weight.mul_(20)
    return made


def said(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text.strip()}]


def picture(n: int) -> Image.Image:
    return Image.new("RGB", (SIDE, SIDE), (40 * n % 256, 30, 200))


def data(kind: str, size: int = 6) -> Any:
    """Pairs for "dpo", else completions with a label."""
    rows = []
    for n, row in enumerate(parts.pairs(size)):
        made = {"images": [picture(n)], "prompt": said("user", row["prompt"])}
        if kind == "dpo":
            made |= {side: said("assistant", row[side]) for side in ("chosen", "rejected")}
        else:
            made |= {"completion": said("assistant", row["chosen"]), "label": n % 2 == 0}
        rows.append(made)
    return Dataset.from_list(rows)
