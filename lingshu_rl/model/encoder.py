"""A prompt as tokens and pixels: the model's own chat template and processor, alike in trainer, reference and engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lingshu_rl.images import open_image
from lingshu_rl.model.loading import model_path
from lingshu_rl.types import Prompt

if TYPE_CHECKING:
    import torch


class PromptEncoder:
    """Prompt -> (token ids with image placeholders expanded, the processor's vision tensors).

    The same processor files serve vLLM, so the ids must equal those that vLLM reports; the trainer compares them.
    """

    def __init__(self, name: str) -> None:
        from transformers import AutoProcessor, AutoTokenizer

        path = model_path(name)
        self.processor = AutoProcessor.from_pretrained(path)
        self.tokenizer = getattr(self.processor, "tokenizer", None) or AutoTokenizer.from_pretrained(path)
        self.eos_ids = frozenset({self.tokenizer.eos_token_id})

    def encode(self, prompt: Prompt) -> tuple[tuple[int, ...], dict[str, torch.Tensor]]:
        messages = [dict(m) for m in prompt.messages]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        if not prompt.images:
            return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"]), {}
        images = [open_image(image) for image in prompt.images]
        encoded = self.processor(text=[text], images=images, return_tensors="pt", add_special_tokens=False)
        ids = tuple(encoded["input_ids"][0].tolist())
        drop = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"}
        return ids, {key: value for key, value in encoded.items() if key not in drop}

    def save(self, folder: Path) -> None:
        """Write the processor's files beside a model's, so that the folder loads by itself."""
        self.processor.save_pretrained(folder)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The completion's text with its tags, without the end-of-turn token."""
        ids = list(token_ids)
        if ids and ids[-1] in self.eos_ids:
            ids.pop()
        return str(self.tokenizer.decode(ids, skip_special_tokens=False))
