"""Groups -> rows. A shared row is `[prompt, completion 1, ..., completion G]`, the prompt and its images once; several
groups fill a row up to a token budget. A dense row is a batch of ordinary sequences, each with its prompt and images,
as the model's processor would make it. Completions of a group that are alike, as short answers often are, stand in a
row once. Tensors here stay on the CPU, one sequence after another; what fills up a batch and masks come where they are
used.

Shapes: S tokens in a row, T completion tokens scored by it, U places of the row whose output predicts a token (U <= T:
the last prompt token predicts the first token of all G completions). The last token of a completion predicts
nothing, so it is a target and not part of a shared row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lingshu_rl.model.families import ModelSpec, model_spec, mrope_positions
from lingshu_rl.types import TokenGroup

# What processors return for each token of a prompt; rows make their own.
_PER_TOKEN = {"input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"}


@dataclass(frozen=True)
class GroupSpan:
    """Where a prompt stands in a row: [start, start + prompt), then follow the branches. group: its index."""

    group: int
    start: int
    prompt: int
    branches: tuple[int, ...]  # row tokens of each different completion

    @property
    def end(self) -> int:
        return self.start + self.prompt + sum(self.branches)


@dataclass(frozen=True)
class PackedRow:
    """Everything one forward needs.

    positions: (1, S), or (3, 1, S) for models with multi-axis positions; None in a dense row: the model makes its own.
    group_S: number of the group in the row. branch_S: of the completion in the group, -1 for the prompt.
    logical_S: place in the unshared sequence.
    image_S: number of the image a token belongs to, -1 for text.
    keep_U: places whose output predicts a token. row_T, target_T: which of the U, and which id, for each of the T.
    vision: as in TokenGroup, of the images of all spans.
    members: (group index, member index, completion tokens) in the order of the T tokens.
    features: the encoded images, in place of the pixels in `vision`; see `logprobs.with_image_features`.
    """

    input_ids_1S: Tensor
    positions: Tensor | None
    group_S: Tensor
    branch_S: Tensor
    logical_S: Tensor
    image_S: Tensor
    vision: dict[str, Tensor]
    keep_U: Tensor
    row_T: Tensor
    target_T: Tensor
    members: tuple[tuple[int, int, int], ...]
    spans: tuple[GroupSpan, ...]
    dense: bool
    features: Any = None

    @property
    def tokens(self) -> int:
        """Tokens the model reads in this row, those included that fill a dense one up."""
        return self.longest * len(self.spans) if self.dense else self.input_ids_1S.shape[1]

    @property
    def longest(self) -> int:
        return max(span.end - span.start for span in self.spans)

    def batched(self, x_S: Tensor, fill: int = 0) -> Tensor:
        """What there is of each token, as the model reads it: (1, S), or (B, longest) of a dense row, filled up
        behind."""
        if not self.dense:
            return x_S[None]
        return pad_sequence([x_S[span.start : span.end] for span in self.spans], batch_first=True, padding_value=fill)

    @property
    def outputs_U(self) -> Tensor:
        """Where `keep_U` are in what the model returns, its batch flattened."""
        places = self.batched(torch.arange(self.input_ids_1S.shape[1]), fill=-1).flatten()
        return places.argsort()[-self.input_ids_1S.shape[1] :][self.keep_U]

    @property
    def sequence_T(self) -> Tensor:
        """(T,) index into `members` of each completion token."""
        lengths = torch.tensor([length for _, _, length in self.members], dtype=torch.long)
        return torch.repeat_interleave(torch.arange(len(lengths)), lengths)


@dataclass
class _Part:
    """A group, or as many of its completions as fit a row."""

    group: int
    members: list[int] = field(default_factory=list)
    tokens: int = 0


@dataclass(frozen=True)
class RowPlan:
    """What stands in a row, before it is made. tokens: as of the row. vision: whether it has images."""

    parts: tuple[_Part, ...]
    tokens: int
    vision: bool
    dense: bool

    @property
    def groups(self) -> set[int]:
        """Their indices."""
        return {part.group for part in self.parts}

    def members(self, groups: Sequence[TokenGroup]) -> list[tuple[int, int, int]]:
        """As of the row, planned from these groups."""
        return [(p.group, m, len(groups[p.group].completions[m])) for p in self.parts for m in p.members]


def own_vision(group: TokenGroup) -> Mapping[str, Tensor]:
    """The image tensors that the group holds. Raises ValueError where they were left out."""
    if group.vision is None:
        raise ValueError(f"group {group.key!r} came without its images")
    return group.vision


def pack(groups: Sequence[TokenGroup], model: Any, token_budget: int, layout: str = "shared") -> list[PackedRow]:
    """All rows of `plan_rows` at once, of groups that hold their images."""
    return [build_row(plan, groups, model) for plan in plan_rows(groups, model, token_budget, layout)]


def plan_rows(groups: Sequence[TokenGroup], model: Any, token_budget: int, layout: str = "shared") -> list[RowPlan]:
    """Rows that score every completion of `groups` once. No image is looked at, and no tensor made.

    model: the model that will run the rows (wrapped or not) or its config.
    layout: "shared", or "dense" for batches of unshared sequences. A family that cannot share gets dense rows.
    token_budget: tokens of a row. A group over it is split over rows, each with the prompt; a single sequence over it
    gets a row of its own. With 1, dense rows are the model's forward on one sequence after another: the oracle.
    Raises ValueError naming the group for an empty prompt or an image placeholder in a completion.
    """
    spec = model_spec(model)
    if layout not in ("shared", "dense"):
        raise ValueError(f"layout={layout!r} is not one of shared, dense")
    for group in groups:
        _check(group, spec)
    shared = layout == "shared" and spec.shareable
    plans = []
    for parts in _fill(groups, token_budget) if shared else _batch(groups, token_budget, spec):
        sizes = [part.tokens for part in parts]
        tokens = sum(sizes) if shared else max(sizes) * len(sizes)
        vision = any(_has_images(groups[part.group]) for part in parts)
        plans.append(RowPlan(tuple(parts), tokens, vision, dense=not shared))
    return plans


def build_row(
    plan: RowPlan,
    groups: Sequence[TokenGroup],
    model: Any,
    vision_of: Callable[[TokenGroup], Mapping[str, Tensor]] = own_vision,
) -> PackedRow:
    """The row. groups, model: as it was planned from. vision_of: where a group's image tensors come from.

    Raises ValueError naming the group where placeholders do not match the images.
    """
    spec = model_spec(model)
    seen = {g: replace(groups[g], vision=vision_of(groups[g])) for g in plan.groups}
    prompts = {g: _prompt(group, spec) for g, group in seen.items()}
    row = _row(seen, plan.parts, prompts, spec)
    # Positions and mask of a batch are left to the model.
    return replace(row, positions=None, dense=True) if plan.dense else row


def _check(group: TokenGroup, spec: ModelSpec) -> None:
    if not group.prompt_ids:
        raise ValueError(f"group {group.key!r} has an empty prompt; at least one token must precede a completion")
    banned = set(spec.placeholder_ids)
    for member, completion in enumerate(group.completions):
        if found := banned.intersection(completion):
            raise ValueError(
                f"group {group.key!r}, completion {member}: token {min(found)} is an image placeholder, but "
                "completions have no pixels; ban it in sampling (logit_bias)"
            )


def _row_tokens(completion: Sequence[int]) -> int:
    return max(len(completion) - 1, 0)


def _fill(groups: Sequence[TokenGroup], budget: int) -> list[list[_Part]]:
    """First fit: each part goes into the first row with room for it."""
    rows: list[list[_Part]] = []
    room: list[int] = []
    for g, group in enumerate(groups):
        for part in _split(g, group, budget):
            r = next((r for r, free in enumerate(room) if part.tokens <= free), len(rows))
            if r == len(rows):
                rows.append([])
                room.append(budget)
            rows[r].append(part)
            room[r] -= part.tokens
    return rows


def _split(index: int, group: TokenGroup, budget: int) -> list[_Part]:
    prompt = len(group.prompt_ids)
    parts: list[_Part] = []
    held: set[tuple[int, ...]] = set()  # the completions of the last part
    for member, completion in enumerate(group.completions):
        extra = 0 if completion in held else _row_tokens(completion)
        if not parts or parts[-1].tokens + extra > budget:
            parts.append(_Part(index, tokens=prompt))
            held, extra = set(), _row_tokens(completion)
        held.add(completion)
        parts[-1].members.append(member)
        parts[-1].tokens += extra
    return parts


def _batch(groups: Sequence[TokenGroup], budget: int, spec: ModelSpec) -> list[list[_Part]]:
    """Sequences of about one length together: as many as stay in the budget when filled up to the longest."""
    rows: list[list[_Part]] = []
    for part in sorted(_sequences(groups), key=lambda part: -part.tokens):
        longest = rows[-1][0].tokens if rows else 0
        alike = longest == part.tokens or spec.rope_limit is None or longest <= spec.rope_limit
        if rows and alike and (len(rows[-1]) + 1) * longest <= budget:
            rows[-1].append(part)
        else:
            rows.append([part])
    return rows


def _sequences(groups: Sequence[TokenGroup]) -> Iterator[_Part]:
    """A part for each different completion of a group."""
    for index, group in enumerate(groups):
        members: dict[tuple[int, ...], list[int]] = {}
        for member, completion in enumerate(group.completions):
            members.setdefault(completion, []).append(member)
        for completion, alike in members.items():
            yield _Part(index, alike, len(group.prompt_ids) + _row_tokens(completion))


@dataclass(frozen=True)
class _PromptLayout:
    ids: Tensor
    positions: Tensor  # (axes, P)
    next_position: int  # of the first completion token
    image: Tensor  # (P,) number of the image, -1 for text


def _prompt(group: TokenGroup, spec: ModelSpec) -> _PromptLayout:
    ids = torch.tensor(group.prompt_ids, dtype=torch.long)
    is_image = ids == spec.image_id if spec.image_id is not None else torch.zeros_like(ids, dtype=torch.bool)
    # A run of placeholders is one image.
    starts = is_image & ~torch.cat([is_image.new_zeros(1), is_image[:-1]])
    image = torch.where(is_image, starts.cumsum(0) - 1, -1)
    images = own_vision(group)
    if is_image.any() and not _images(images):
        raise ValueError(f"group {group.key!r}: the prompt has image placeholders, but `vision` holds no tensors")
    if not spec.mrope_merge:
        positions = torch.arange(len(ids))[None] + spec.first_position
        return _PromptLayout(ids, positions, len(ids) + spec.first_position, image)
    grids = images.get("image_grid_thw", torch.empty(0, 3)).tolist()
    try:
        axes, following = mrope_positions(is_image.tolist(), grids, spec.mrope_merge)
    except ValueError as error:
        raise ValueError(f"group {group.key!r}: {error}") from None
    return _PromptLayout(ids, torch.tensor(axes), following, image)


def _row(
    groups: Mapping[int, TokenGroup], parts: Sequence[_Part], prompts: dict[int, _PromptLayout], spec: ModelSpec
) -> PackedRow:
    ids: list[Tensor] = []
    positions: list[Tensor] = []
    group_of: list[Tensor] = []
    branch_of: list[Tensor] = []
    logical: list[Tensor] = []
    image: list[Tensor] = []
    keep: list[int] = []
    row_of: list[int] = []
    targets: list[int] = []
    members = []
    spans = []
    start = 0
    for n, part in enumerate(parts):
        group, prompt = groups[part.group], prompts[part.group]
        size = len(prompt.ids)
        axes = prompt.positions.shape[0]
        ids.append(prompt.ids)
        positions.append(prompt.positions)
        branch_of.append(torch.full((size,), -1))
        logical.append(torch.arange(size))
        image.append(prompt.image)
        last_prompt = len(keep)
        keep.append(start + size - 1)
        place = start + size
        branches: list[int] = []
        scored_at: dict[tuple[int, ...], list[int]] = {}  # completion -> which of the U predict its tokens
        for member in part.members:
            completion = group.completions[member]
            if completion not in scored_at:
                length = _row_tokens(completion)
                steps = torch.arange(length)
                ids.append(torch.tensor(completion[:length], dtype=torch.long))
                positions.append((prompt.next_position + steps).expand(axes, -1))
                branch_of.append(torch.full((length,), len(branches)))
                logical.append(size + steps)
                image.append(torch.full((length,), -1))
                scored_at[completion] = [last_prompt, *range(len(keep), len(keep) + length)] if completion else []
                keep += range(place, place + length)
                branches.append(length)
                place += length
            row_of += scored_at[completion]
            targets += completion
            members.append((part.group, member, len(completion)))
        spans.append(GroupSpan(part.group, start, size, tuple(branches)))
        group_of.append(torch.full((place - start,), n))
        start = place
    positions_1S = torch.cat(positions, dim=1)[:, None]
    return PackedRow(
        input_ids_1S=torch.cat(ids)[None],
        positions=positions_1S if spec.mrope_merge else positions_1S[0],
        group_S=torch.cat(group_of),
        branch_S=torch.cat(branch_of),
        logical_S=torch.cat(logical),
        image_S=torch.cat(image),
        vision=_merge_vision([own_vision(groups[part.group]) for part in parts]),
        keep_U=torch.tensor(keep),
        row_T=torch.tensor(row_of, dtype=torch.long),
        target_T=torch.tensor(targets, dtype=torch.long),
        members=tuple(members),
        spans=tuple(spans),
        dense=False,
    )


def _has_images(group: TokenGroup) -> bool:
    return group.vision is None or bool(_images(group.vision))


def _images(vision: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in vision.items() if key not in _PER_TOKEN}


def _merge_vision(visions: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The images of several prompts as the processor would have returned them for one batch."""
    merged: dict[str, list[Tensor]] = {}
    for vision in visions:
        for key, value in _images(vision).items():
            merged.setdefault(key, []).append(value)
    return {key: torch.cat(_pad_alike(values)) for key, values in merged.items()}


def _pad_alike(values: list[Tensor]) -> list[Tensor]:
    """Zero-pad all but the first axis to the largest (images of different sizes, as in Pixtral, carry image_sizes)."""
    largest = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True)]
    if all(list(value.shape[1:]) == largest for value in values):
        return values
    padded = []
    for value in values:
        margins = [m for size, full in zip(value.shape[1:], largest, strict=True) for m in (full - size, 0)]
        padded.append(torch.nn.functional.pad(value, margins[::-1]))
    return padded
