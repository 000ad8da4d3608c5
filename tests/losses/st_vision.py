"""A saved vision-language model with its processor, small enough to train in a test."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from st_parts import word_tokenizer
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaModel,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

SIDE, PATCH = 8, 4
TEMPLATE = """\
{%- for message in messages %}{% if message.content is string %}{{ message.content }}{% else %}
{%- for part in message.content %}{{ '<image> ' if part.type == 'image' else part.text + ' ' }}{% endfor %}{% endif %}
{%- endfor %}"""


def save_vision_model(folder: Path) -> str:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=word_tokenizer(), pad_token="[PAD]", unk_token="[UNK]")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    size = {"height": SIDE, "width": SIDE}
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=size),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    vision = CLIPVisionConfig(image_size=SIDE, patch_size=PATCH, projection_dim=16, num_hidden_layers=2, **sizes)
    text = LlamaConfig(
        vocab_size=len(tokenizer), num_hidden_layers=1, bos_token_id=1, eos_token_id=1, pad_token_id=0, **sizes
    )
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    LlavaModel(LlavaConfig(vision_config=vision, text_config=text, image_token_id=image_token)).save_pretrained(folder)
    return str(folder)


def message(text: str) -> list[dict]:
    """ "1 2 a cat": two pictures, then words. Equal numbers are equal pictures."""
    words = [word for word in text.split() if not word.isdigit()]
    parts: list[dict] = [{"type": "image", "image": picture(int(n))} for n in text.split() if n.isdigit()]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": " ".join(words)}]}]


def picture(n: int) -> Image.Image:
    return Image.new("RGB", (SIDE, SIDE), (40 * n % 256, 30, 200))
