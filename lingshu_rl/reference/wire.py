"""The reference group's messages: token groups in, log-probs out, as safetensors. Never pickle.

Images come as the files that the engine got, with the text that they belong to, and are processed where they are used;
a group may also hold the processor's tensors.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import torch
from safetensors.torch import load, save

from lingshu_rl.imaging.files import UnreadablePicture
from lingshu_rl.imaging.images import FORMATS_SENT, opened
from lingshu_rl.processes.pool import BadAnswer
from lingshu_rl.types import ProcessorInputs, TokenGroup

MAX_HEADER = 1 << 20  # bytes of JSON; what it describes cannot be larger than the body, which safetensors checks
MAX_TEXT = 1 << 22  # bytes of a prompt's text
PIXEL_BYTES = (
    24  # of an image's pixel in a processor's hands: three colours in float32, twice where an image is two frames
)
MAX_SIDE = 1 << 16  # largest grid or size that a vision tensor may name
GRID = "_grid_thw"  # frames, rows and columns of patches, one row an image or a video
POSITIONS = "_position_ids"  # of patches; -1 is padding
PIXELS_OF = {"image_grid_thw": "pixel_values", "video_grid_thw": "pixel_values_videos"}


@dataclass(frozen=True)
class ImageInputs:
    """What a model takes of images. names: of the tensors. token: the placeholder in a prompt, None for text models.

    merge: patches along a side that make one token, in families with grids; 0 in others.
    """

    names: frozenset[str] = frozenset()
    token: int | None = None
    merge: int = 0


@dataclass(frozen=True)
class Reader:
    """What makes tokens and image tensors of a prompt's text and files. most_bytes: of pixels of one request.

    least: bytes of pixels that the processor makes of the smallest image, which it may enlarge.
    """

    read: Callable[[ProcessorInputs], tuple[tuple[int, ...], Mapping[str, torch.Tensor]]]
    most_bytes: int
    least: int = 0


class WireError(BadAnswer):
    """A message that is not what this protocol says; the text says where."""


def encode_groups(groups: Sequence[TokenGroup], inputs: Sequence[ProcessorInputs] = ()) -> bytes:
    """Several groups in one body. Integer tensors for tokens, the vision tensors under `<i>/vision/<name>`.

    inputs: of each group, where groups come without their image tensors; bytes under `<i>/text` and `<i>/image/<n>`.
    """
    tensors: dict[str, torch.Tensor] = {}
    for i, group in enumerate(groups):
        tensors[f"{i}/prompt"] = torch.tensor(group.prompt_ids, dtype=torch.int64)
        tensors[f"{i}/lengths"] = torch.tensor([len(c) for c in group.completions], dtype=torch.int64)
        tokens = np.fromiter(chain.from_iterable(group.completions), np.int64)  # a quarter of torch.tensor's time
        tensors[f"{i}/completions"] = torch.from_numpy(tokens)
        for name, value in (group.vision or {}).items():
            tensors[f"{i}/vision/{name}"] = value.detach().cpu().contiguous()
        if group.vision is None:
            tensors[f"{i}/text"] = _bytes(inputs[i].text.encode())
            tensors |= {f"{i}/image/{n}": _bytes(content) for n, content in enumerate(inputs[i].images)}
    return save(tensors, metadata={"keys": json.dumps([g.key for g in groups])})


def decode_groups(
    body: bytes,
    *,
    vocabulary: int,
    max_sequence: int = 1 << 20,
    max_tokens: int = 1 << 20,
    images: ImageInputs | None = None,
    reader: Reader | None = None,
) -> list[TokenGroup]:
    """Raises WireError for anything but what encode_groups makes, before any tensor reaches the model.

    images: what the model takes; None leaves that to it. max_sequence: tokens of a prompt with one completion
    (attention needs their square). max_tokens: of the whole body. reader: makes image tensors of files, once all else
    is known to be right; None refuses them.
    """
    tensors, keys = _load(body)
    groups = []
    inputs: dict[int, ProcessorInputs] = {}
    for i, key in enumerate(keys):
        try:
            prompt, lengths, tokens = (tensors.pop(f"{i}/{part}") for part in ("prompt", "lengths", "completions"))
        except KeyError as error:
            raise WireError(f"group {i} lacks {error.args[0]!r}") from None
        for name, value in (("prompt", prompt), ("lengths", lengths), ("completions", tokens)):
            if value.dtype != torch.int64 or value.ndim != 1:
                raise WireError(f"group {i}: {name} must be a list of int64")
        long = (lengths > len(tokens)).any()  # asked first, because a sum of such lengths may overflow
        if not len(prompt) or not len(lengths) or (lengths < 1).any() or long or int(lengths.sum()) != len(tokens):
            raise WireError(f"group {i}: empty prompt or completion, or lengths that do not add up")
        if len(prompt) + int(lengths.max()) > max_sequence:
            raise WireError(
                f"group {i}: a sequence of {len(prompt) + int(lengths.max())} tokens is over the model's {max_sequence}"
            )
        for value in (prompt, tokens):
            if int(value.min()) < 0 or int(value.max()) >= vocabulary:
                raise WireError(f"group {i}: token ids must be in [0, {vocabulary})")
        vision = _below(tensors, f"{i}/vision/")
        if f"{i}/text" in tensors:
            inputs[i] = _inputs(i, tensors.pop(f"{i}/text"), _below(tensors, f"{i}/image/"), vision)
        else:
            _check_vision(i, vision, prompt, images)
        completions = tuple(tuple(c.tolist()) for c in tokens.split(lengths.tolist()))
        groups.append(TokenGroup(key, tuple(prompt.tolist()), completions, vision))
    if tensors:
        raise WireError(f"unknown tensors: {sorted(tensors)[:5]}")
    if not groups:
        raise WireError("no groups")
    total = sum(len(g.prompt_ids) + sum(map(len, g.completions)) for g in groups)
    if total > max_tokens:
        raise WireError(f"{total} tokens in one request, the limit is {max_tokens}; send fewer groups at once")
    if inputs:
        _check_sizes(inputs, reader)
    for i, one in inputs.items():
        vision = _read(i, one, groups[i], reader)
        _check_vision(i, vision, torch.tensor(groups[i].prompt_ids), images)
        groups[i] = replace(groups[i], vision=vision)
    return groups


def _bytes(content: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _below(tensors: dict[str, torch.Tensor], marker: str) -> dict[str, torch.Tensor]:
    """Those whose names begin with the marker, taken out, by the rest of their names."""
    return {name.removeprefix(marker): tensors.pop(name) for name in [n for n in tensors if n.startswith(marker)]}


def _inputs(
    i: int, text: torch.Tensor, files: dict[str, torch.Tensor], vision: dict[str, torch.Tensor]
) -> ProcessorInputs:
    if vision or not files or files.keys() != {str(n) for n in range(len(files))}:
        raise WireError(f"group {i}: a text comes with its images, numbered from 0, and without image tensors")
    if any(part.dtype != torch.uint8 or part.ndim != 1 for part in (text, *files.values())) or len(text) > MAX_TEXT:
        raise WireError(f"group {i}: text and images must be bytes, of the text at most {MAX_TEXT}")
    try:
        return ProcessorInputs(
            text.numpy().tobytes().decode(), tuple(files[str(n)].numpy().tobytes() for n in range(len(files)))
        )
    except UnicodeDecodeError as error:
        raise WireError(f"group {i}: the text is not UTF-8: {error}") from None


def _check_sizes(inputs: Mapping[int, ProcessorInputs], reader: Reader | None) -> None:
    """By the headers of the files alone: together their pixels must be no more than the model's longest prompt has."""
    if reader is None:
        raise WireError("images must come as tensors here")
    pixels = 0
    for i, one in inputs.items():
        for n, content in enumerate(one.images):
            try:
                with opened(content, formats=FORMATS_SENT) as image:
                    width, height = image.size
            except UnreadablePicture as error:
                raise WireError(f"group {i}: image {n}: {error}") from None
            pixels += max(PIXEL_BYTES * width * height, reader.least)
            if pixels > reader.most_bytes:
                raise WireError(f"group {i}: image {n} of {width} x {height} pixels is over what the model can read")


def _read(i: int, inputs: ProcessorInputs, group: TokenGroup, reader: Reader | None) -> dict[str, torch.Tensor]:
    assert reader is not None
    try:
        ids, vision = reader.read(inputs)
    except Exception as error:  # files that break off, and what a processor refuses in its own way
        raise WireError(f"group {i}: {error}") from None
    if ids != group.prompt_ids:
        raise WireError(
            f"group {i}: {len(group.prompt_ids)} tokens came, and this server's processor makes {len(ids)}, or others; "
            "both must use the same processor files and pixel limits"
        )
    return dict(vision)


def _check_vision(i: int, vision: dict[str, torch.Tensor], prompt: torch.Tensor, images: ImageInputs | None) -> None:
    _check_tensors(i, vision)
    if images is not None:
        _check_images(i, vision, prompt, images)


def _check_tensors(i: int, vision: dict[str, torch.Tensor]) -> None:
    """Grids and sizes become allocations inside the model: they must be small, and grids fit the pixels that came."""
    for name, value in vision.items():
        low = 1 if name.endswith(GRID) else -1 if name.endswith(POSITIONS) else 0
        if not value.is_floating_point() and value.numel() and (int(value.min()) < low or int(value.max()) > MAX_SIDE):
            raise WireError(f"group {i}: {name} must be in [{low}, {MAX_SIDE}]")
        if name.endswith(GRID):
            pixels = vision.get(PIXELS_OF.get(name, ""))
            if value.dtype != torch.int64 or value.ndim != 2 or value.shape[1] != 3 or pixels is None:
                raise WireError(f"group {i}: {name} must be int64 rows of 3 beside its pixels")
            patches = value.prod(dim=1)
            if (patches > len(pixels)).any() or int(patches.sum()) != len(pixels):  # a sum alone may wrap around
                raise WireError(f"group {i}: {name} does not describe the {len(pixels)} rows of pixels")


def _check_images(i: int, vision: dict[str, torch.Tensor], prompt: torch.Tensor, images: ImageInputs) -> None:
    """Only what the model takes for images, and as many patches as the prompt has tokens for."""
    if foreign := sorted(vision.keys() - images.names):
        raise WireError(f"group {i}: {foreign[0]!r} is nothing that this model takes of images")
    tokens = int((prompt == images.token).sum()) if images.token is not None else 0
    if bool(tokens) != bool(vision):
        raise WireError(f"group {i}: {tokens} image tokens in the prompt beside {len(vision)} image tensors")
    if images.merge and tokens:
        grid = vision.get("image_grid_thw", torch.zeros(0, 3, dtype=torch.int64))
        sides = grid[:, 1:] // images.merge
        if (grid[:, 1:] % images.merge).any() or int((grid[:, 0] * sides.prod(dim=1)).sum()) != tokens:
            raise WireError(f"group {i}: image_grid_thw does not make the {tokens} image tokens of the prompt")


def encode_logprobs(logprobs: Sequence[Sequence[torch.Tensor]]) -> bytes:
    """One flat float32 tensor a group: its completions' log-probs one after another."""
    return save({str(i): torch.cat(list(pieces)).float() for i, pieces in enumerate(logprobs)})


def decode_logprobs(body: bytes, groups: Sequence[TokenGroup]) -> list[tuple[torch.Tensor, ...]]:
    """Per group, per completion, a float32 tensor of its length. Raises WireError for anything but finite log-probs."""
    try:
        tensors = load(body)
    except Exception as error:  # safetensors' own errors share no base class
        raise WireError(f"no safetensors: {type(error).__name__}: {error}") from None
    result = []
    for i, group in enumerate(groups):
        lengths = [len(c) for c in group.completions]
        value = tensors.get(str(i))
        if value is None or value.shape != (sum(lengths),) or value.dtype != torch.float32:
            raise WireError(f"the answer for group {group.key!r} does not fit its completions")
        if not torch.isfinite(value).all():
            raise WireError(f"the answer for group {group.key!r} holds log-probs that are no numbers")
        result.append(tuple(value.split(lengths)))
    return result


def _load(body: bytes) -> tuple[dict[str, torch.Tensor], list[str]]:
    size = int.from_bytes(body[:8], "little")
    if size > MAX_HEADER:
        raise WireError(f"not a safetensors message of token groups: a header of {size} bytes is over {MAX_HEADER}")
    try:
        tensors = load(body)
        keys = json.loads(json.loads(body[8 : 8 + size])["__metadata__"]["keys"])
    except Exception as error:
        raise WireError(f"not a safetensors message of token groups: {type(error).__name__}: {error}") from None
    if not isinstance(keys, list) or not all(isinstance(k, str) for k in keys):
        raise WireError("metadata.keys must be a list of strings")
    return tensors, keys
