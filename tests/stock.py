"""What transformers alone makes of a checkpoint folder, loaded apart from the wrapper; and pictures to show to both."""

from __future__ import annotations

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import AutoModelForImageTextToText
from twins import VICUNA

from embedlens.families.instructions import VICUNA_V1
from embedlens.pictures import squared

QUESTION = "what is in the picture ?"


def picture(size: tuple[int, int] = (80, 60), seed: int = 0) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def bright(image: Image.Image, box: tuple[float, ...]) -> Image.Image:
    """The picture with a bright square in it."""
    x0, y0, x1, y1 = map(round, box)
    values = np.asarray(image).copy()
    values[y0:y1, x0:x1] = (255, 255, 60)
    return Image.fromarray(values)


class Stock:
    def __init__(self, folder, processor: str = "LlavaProcessor", square: bool = False) -> None:
        self.square = square  # LLaVA-1.5 was trained on pictures padded before its processor cuts them
        released = getattr(transformers, processor)

        def without_video(cls):  # its video half cannot be loaded without torchvision
            return [part for part in released.get_attributes() if part != "video_processor"]

        still = type(processor, (released,), {"get_attributes": classmethod(without_video)})
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        self.processor = still.from_pretrained(folder, backend="pil")

    def inputs(self, image, question=QUESTION):
        if self.square:
            mean = self.processor.image_processor.image_mean
            image = squared(image, "letterbox", tuple(int(255 * part) for part in mean))
        turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        if self.processor.chat_template == VICUNA:  # trained with a system prompt that the template lacks
            turns.insert(0, {"role": "system", "content": [{"type": "text", "text": VICUNA_V1}]})
        text = self.processor.apply_chat_template(turns, add_generation_prompt=True)
        bos = self.processor.tokenizer.bos_token  # some templates write it themselves; one is wanted in either case
        written = bool(bos) and text.startswith(bos)
        return self.processor(images=image, text=text, return_tensors="pt", add_special_tokens=not written)

    @torch.no_grad()
    def forward(self, image, question=QUESTION):
        return self.model(**self.inputs(image, question), output_hidden_states=True)

    @torch.no_grad()
    def answer(self, image, question=QUESTION, max_new_tokens=16):
        inputs = self.inputs(image, question)
        ids = self.model.generate(**inputs, do_sample=False, repetition_penalty=1.0, max_new_tokens=max_new_tokens)
        return self.processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
