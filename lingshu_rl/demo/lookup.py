"""Text-only pretraining: find the thought word in the option list and answer with its letter.

Answering "B" because the second line says what was thought is the one skill that a small network does not pick up from
a few thousand questions: it has to tie every word to its line's letter, carry the thought to the answer, match the two
and copy the letter, and the loss says nothing before all of it works. Three things make it quick (minutes on one core):
* dense fresh data: every sequence is a new list of random words and asks for its options again and again;
* a start at which query and key projections are equal, and output undoes value: heads then match like with like;
* a loss on three attention heads, which are shown where to look, on top of the loss on the letters.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration

from lingshu_rl.demo.model import LETTERS

# (layer, head) that are shown where to look: word -> its line's letter, <answer> -> thought, <answer> -> thought's line
LETTER_HEAD, THOUGHT_HEAD, MATCH_HEAD = (0, 0), (0, 1), (2, 0)
LENGTH = 144  # tokens of one sequence
MOST_WORDS = 3  # of one option
NEAR_MISS = 0.4  # share of options that differ from another one in a single word, as "grey matter", "white matter" do


@dataclass(frozen=True)
class Vocabulary:
    """Token ids of what look-up sequences are made of. words: every token that is a word with its leading blank."""

    words: tuple[int, ...]
    letters: tuple[int, ...]
    before: tuple[int, ...]
    newline: int
    dot: int
    instruction: tuple[int, ...]
    think: int
    think_end: int
    answer: int
    answer_end: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast, instruction: str) -> Vocabulary:
        def ids(text: str) -> tuple[int, ...]:
            return tuple(tokenizer(text)["input_ids"])

        def one(text: str) -> int:
            (token,) = ids(text)  # a ValueError here means that the tokenizer splits what has to be one token
            return token

        words = [n for token, n in tokenizer.get_vocab().items() if token[0] == "Ġ" and token[1:].isalnum()]
        return cls(
            words=tuple(sorted(words)),
            letters=tuple(one(letter) for letter in LETTERS),
            before=ids("<|im_start|>user\n"),
            newline=one("\n"),
            dot=one("."),
            instruction=ids(f"\n{instruction}<|im_end|>\n<|im_start|>assistant\n"),
            think=one("<think>"),
            think_end=one("</think>"),
            answer=one("<answer>"),
            answer_end=one("</answer>"),
        )


@dataclass(frozen=True)
class Batch:
    """tokens_BL; letters_BL: the letter that has to follow, -100 elsewhere; look_BLL[h]: where head h should look."""

    tokens_BL: torch.Tensor
    letters_BL: torch.Tensor
    look_BLL: dict[tuple[int, int], torch.Tensor]

    def to(self, device: torch.device) -> Batch:
        look = {head: where.to(device) for head, where in self.look_BLL.items()}
        return Batch(self.tokens_BL.to(device), self.letters_BL.to(device), look)


def draw_options(words: Sequence[int], rng: random.Random) -> list[list[int]]:
    """Two to eight different options of one to three random words each."""
    count = rng.randint(2, len(LETTERS))
    options: list[list[int]] = []
    while len(options) < count:
        option = [rng.choice(words) for _ in range(rng.randint(1, MOST_WORDS))]
        if options and rng.random() < NEAR_MISS:
            option = list(rng.choice(options))
            option[rng.randrange(len(option))] = rng.choice(words)
        if option not in options:
            options.append(option)
    return options


def draw_batch(size: int, vocabulary: Vocabulary, rng: random.Random) -> Batch:
    v = vocabulary
    tokens = torch.zeros(size, LENGTH, dtype=torch.long)
    letters = torch.full((size, LENGTH), -100)
    look = {
        head: torch.zeros(size, LENGTH, LENGTH, dtype=torch.bool) for head in (LETTER_HEAD, THOUGHT_HEAD, MATCH_HEAD)
    }
    for b in range(size):
        options = draw_options(v.words, rng)
        text = [*v.before, *(rng.choice(v.words) for _ in range(rng.randint(0, 8)))]
        lines = []
        for option, letter in zip(options, v.letters, strict=False):
            text += [v.newline, letter, v.dot]
            lines.append(range(len(text), len(text) + len(option)))
            look[LETTER_HEAD][b, lines[-1], len(text) - 2] = True
            text += option
        text += v.instruction
        asked: list[int] = []
        while len(text) < LENGTH:
            asked = asked or rng.sample(range(len(options)), len(options))
            n = asked.pop()
            thought = slice(len(text) + 1, len(text) + 1 + len(options[n]))
            text += [v.think, *options[n], v.think_end, v.answer]
            if len(text) <= LENGTH:
                here = len(text) - 1
                letters[b, here] = v.letters[n]
                look[THOUGHT_HEAD][b, here, thought] = True
                look[MATCH_HEAD][b, here, lines[n]] = True
            text += [v.letters[n], v.answer_end]
        tokens[b] = torch.tensor(text[:LENGTH])
    return Batch(tokens, letters, look)


def prepare(model: Qwen2_5_VLForConditionalGeneration) -> None:
    """The start at which heads match like with like (in place)."""
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            attention = layer.self_attn
            attention.k_proj.weight.copy_(attention.q_proj.weight)
            attention.o_proj.weight.copy_(attention.v_proj.weight.T)


def pretrain(
    model: Qwen2_5_VLForConditionalGeneration,
    vocabulary: Vocabulary,
    *,
    steps: int,
    seed: int,
    batch: int = 16,
    lr: float = 2e-3,
    warmup: int = 50,
) -> float:
    """Train `model` in place; returns the share of right letters over the last 20 batches, none of which it saw before.

    The look-where loss is left out of the last quarter; the learning rate falls to zero over it.
    """
    prepare(model)
    rng = random.Random(seed)
    text = model.model.language_model
    text.set_attn_implementation("eager")  # the one that returns attention weights
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    right: list[float] = []
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, step / warmup, 4 * (1 - (step - 1) / steps))
        data = draw_batch(batch, vocabulary, rng).to(model.device)
        guided = step <= 0.75 * steps
        out = text(input_ids=data.tokens_BL, use_cache=False, output_attentions=guided)
        asked = data.letters_BL != -100
        logits = model.lm_head(out.last_hidden_state[asked])
        loss = F.cross_entropy(logits, data.letters_BL[asked])
        if guided:
            for (layer, head), look_BLL in data.look_BLL.items():
                looked_BL = (out.attentions[layer][:, head] * look_BLL).sum(-1)
                loss = loss - (looked_BL[look_BLL.any(-1)] + 1e-6).log().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        right.append((logits.argmax(-1) == data.letters_BL[asked]).float().mean().item())
        if step % 50 == 0:
            print(f"look-up step {step}/{steps}: {sum(right[-20:]) / 20:.3f} of letters right", flush=True)
    text.set_attn_implementation("sdpa")
    return sum(right[-20:]) / len(right[-20:])
