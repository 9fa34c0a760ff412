"""A prompt as tokens and pixels: the model's own chat template and processor, alike in trainer, reference and
engine."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lingshu_rl.failures import RunStopped
from lingshu_rl.imaging.images import decoded
from lingshu_rl.model.loading import model_path, reading_model
from lingshu_rl.types import ProcessorInputs, Prompt

if TYPE_CHECKING:
    import torch

PROBE = "lingshu"  # a text whose place in a rendered prompt shows what a template takes
_NOT_VISION = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "labels"}


class TemplateError(RunStopped):
    """A model whose chat template is missing, or cannot hold a prompt."""


class PromptEncoder:
    """Prompt -> (token ids with image placeholders expanded, the processor's vision tensors).

    The same files serve vLLM, so the ids must equal those that vLLM reports; the trainer compares them. So the choices
    are vLLM's: the processor's template before the tokenizer's, message content as a list of parts where the template
    reads one and as a string where not, and no token before or after what the template writes.

    processor: None for a text model, which has a tokenizer alone.
    eos_ids: every token that ends a completion: the tokenizer's, and those of the generation config.
    special: every text that would become a control token or an image placeholder.
    """

    def __init__(self, name: str) -> None:
        from transformers import AutoProcessor, AutoTokenizer
        from transformers.processing_utils import ProcessorMixin

        path = model_path(name)
        with reading_model(name):
            try:
                found = AutoProcessor.from_pretrained(path)
            except (ValueError, OSError):  # "Unrecognized processing class": a tokenizer is all there is
                found = None
            self.processor: Any = found if isinstance(found, ProcessorMixin) else None
            self.tokenizer: Any = getattr(self.processor, "tokenizer", None) or AutoTokenizer.from_pretrained(path)
        self.template = template_of(name, self.processor, self.tokenizer)
        self.takes_parts = self._takes_parts()
        self.eos_ids = end_tokens(path, self.tokenizer)
        self.special = special_texts(self.processor, self.tokenizer)

    def render(self, prompt: Prompt) -> str:
        """The prompt as the model's template writes it, one placeholder an image. Raises TemplateError, naming the
        row."""
        messages = [{**m, "content": self._content(m["content"])} for m in prompt.messages]
        try:
            return self._apply(messages)
        except Exception as error:  # templates refuse by raise_exception, and fail in any way that Jinja can
            roles = ", ".join(str(m["role"]) for m in messages)
            raise TemplateError(
                f"prompt {prompt.id!r}: the model's chat template refuses turns of {roles}: {error}; leave out "
                "data.system or the turns that it does not know, or give the model's folder another "
                "chat_template.jinja"
            ) from error

    def inputs(self, prompt: Prompt) -> ProcessorInputs:
        """What `read` takes; no pixel is decoded. Raises TemplateError and UnreadablePicture."""
        return ProcessorInputs(self.render(prompt), tuple(picture.encoded() for picture in prompt.images))

    def encode(self, prompt: Prompt) -> tuple[tuple[int, ...], dict[str, torch.Tensor]]:
        """See the class. Raises TemplateError, naming the row, for a prompt that the processor cannot read."""
        inputs = self.inputs(prompt)
        try:
            return self.read(inputs)
        except TemplateError as error:
            raise TemplateError(f"prompt {prompt.id!r}: {error}") from error

    def read(self, inputs: ProcessorInputs) -> tuple[tuple[int, ...], dict[str, torch.Tensor]]:
        """`encode`, for whoever has not the prompt. Raises TemplateError for what the processor cannot read."""
        if not inputs.images:
            return tuple(self.tokenizer(inputs.text, add_special_tokens=False)["input_ids"]), {}
        if self.processor is None:
            raise TemplateError("it has images, and this model reads text alone")
        images = [decoded(content) for content in inputs.images]
        try:
            encoded = self.processor(text=[inputs.text], images=images, return_tensors="pt", add_special_tokens=False)
        except Exception as error:
            raise TemplateError(f"the model's processor cannot read it: {type(error).__name__}: {error}") from error
        ids = tuple(encoded["input_ids"][0].tolist())
        return ids, {key: value for key, value in encoded.items() if key not in _NOT_VISION}

    def fault(self, prompt: Prompt) -> str | None:
        """Why this model cannot be asked this prompt, or None. Text and template only: no image is opened."""
        try:
            self.checked_text(prompt)
        except TemplateError as error:
            return str(error)
        return None

    def checked_text(self, prompt: Prompt) -> str:
        """`render`, for a prompt that this model can be asked; else raises TemplateError with the reason."""
        texts = [text for message in prompt.messages for text in texts_of(message["content"])]
        for text in texts:
            if found := self.special.search(text):
                raise TemplateError(
                    f"the text holds {found[0]!r}, which this model reads as a control token and not as text: reword it"
                )
        if prompt.images and self.processor is None:
            raise TemplateError("it has images, and this model reads text alone")
        rendered = self.render(prompt)
        if lost := next((text for text in texts if text.strip() not in rendered), None):
            raise TemplateError(f"the model's chat template leaves out or changes the text {lost[:60]!r}")
        return rendered

    def text_lengths(self, texts: Sequence[str]) -> list[int]:
        """Tokens of rendered texts, as `encode` makes them; a long text is no matter for a warning here."""
        found = self.tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [len(ids) for ids in found["input_ids"]]

    def end_of_turn(self) -> str:
        """The text that ends an answer: what the template writes after one, to the first token that ends a
        completion."""
        turns = [{"role": role, "content": self._content(PROBE)} for role in ("user", "assistant")]
        try:
            written = self._apply(turns, answered=True).rpartition(PROBE)[2]
        except Exception:  # a template that takes no answers
            written = ""
        ids = self.tokenizer(written, add_special_tokens=False)["input_ids"]
        last = next((place for place, token in enumerate(ids) if token in self.eos_ids), None)
        if last is None:
            return str(self.tokenizer.eos_token or self.tokenizer.decode([min(self.eos_ids)]))
        return str(self.tokenizer.decode(ids[: last + 1]))

    def save(self, folder: Path) -> None:
        """Write the processor's files beside a model's, so that the folder loads by itself."""
        (self.processor or self.tokenizer).save_pretrained(folder)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The completion's text with its tags, without the end-of-turn token."""
        ids = list(token_ids)
        if ids and ids[-1] in self.eos_ids:
            ids.pop()
        return str(self.tokenizer.decode(ids, skip_special_tokens=False))

    def _apply(self, messages: Sequence[Mapping[str, Any]], answered: bool = False) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                list(messages), chat_template=self.template, tokenize=False, add_generation_prompt=not answered
            )
        )

    def _takes_parts(self) -> bool:
        """Whether the template reads a list of parts; others join the content to text, or print the list as it is."""
        parts = [{"type": "text", "text": PROBE}]
        try:
            rendered = self._apply([{"role": "user", "content": parts}])
        except Exception:  # "can only concatenate str", or a refusal of the template's own
            return False
        return PROBE in rendered and "'text'" not in rendered and '"text"' not in rendered

    def _content(self, content: Any) -> Any:
        """The content in the template's form, as vLLM gives it: in a string, image placeholders stand before the
        text."""
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else [dict(part) for part in content]
        if self.takes_parts:
            return parts
        images = [self._placeholder() for part in parts if part["type"] == "image"]
        return "\n".join([*images, *texts_of(parts)])

    def _placeholder(self) -> str:
        return str(getattr(self.processor, "image_token", "<image>"))


def texts_of(content: Any) -> list[str]:
    """The texts of a message's content."""
    return [content] if isinstance(content, str) else [part["text"] for part in content if part["type"] == "text"]


def template_of(name: str, processor: Any, tokenizer: Any) -> str:
    """The model's chat template. Raises TemplateError for a model without one."""
    found = getattr(processor, "chat_template", None) or getattr(tokenizer, "chat_template", None)
    if isinstance(found, dict):
        found = found.get("default")
    if not found:
        raise TemplateError(
            f"model={name} has no chat template, so a question cannot be put to it: train an instruction-tuned model, "
            "or write the template as chat_template.jinja into the model's folder"
        )
    return str(found)


def end_tokens(path: str, tokenizer: Any) -> frozenset[int]:
    """The tokens that end a completion: the tokenizer's end of text, and the one or several of the generation config.

    Raises TemplateError when there is none.
    """
    from transformers import AutoConfig, GenerationConfig

    try:
        config: Any = GenerationConfig.from_pretrained(path)
    except OSError:
        config = AutoConfig.from_pretrained(path).get_text_config()
    named = getattr(config, "eos_token_id", None)
    ends = {tokenizer.eos_token_id, *(named if isinstance(named, list | tuple) else [named])} - {None}
    if not ends:
        raise TemplateError(
            f"{path} names no eos_token_id, in its tokenizer or generation config: no completion would end"
        )
    return frozenset(int(end) for end in ends)


def special_texts(processor: Any, tokenizer: Any) -> re.Pattern[str]:
    """What finds a text that would become a control token: the tokenizer's special ones and the processor's
    placeholders."""
    texts = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    texts |= {str(token) for token in tokenizer.all_special_tokens}
    texts |= {v for k, v in vars(processor or object).items() if k.endswith("_token") and isinstance(v, str)}
    longest_first = sorted((text for text in texts if text.strip()), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
