"""Rewards of a group -> advantages. Pure functions on plain numbers; None stands for a reward that could not be judged.

A None counts neither in the mean nor in the deviation and gets None back: the caller leaves that completion out.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lingshu_rl.objective import AdvantageConfig, Noise

_EPSILON = 1e-4  # added to a deviation, as in TRL: near-equal rewards do not explode, exact ones give 0


def group_advantages(rewards: Sequence[float | None], config: AdvantageConfig) -> list[float | None]:
    """Advantages of one group's completions by `config.variant` (group, no_std or leave_one_out).

    A group with fewer than two different judged rewards has nothing to compare: its judged members get exactly 0.
    """
    if config.variant == "gdpo":
        raise ValueError("advantage.variant=gdpo looks at all groups at once; call gdpo_advantages")
    judged = [reward for reward in rewards if reward is not None]
    if len(set(judged)) < 2:
        return [None if reward is None else 0.0 for reward in rewards]
    formula = {"group": _normalised, "no_std": _centred, "leave_one_out": _leave_one_out}[config.variant]
    values = iter(formula(judged))
    return [None if reward is None else next(values) for reward in rewards]


def _normalised(rewards: Sequence[float]) -> list[float]:
    """A_i = (R_i - mean R) / (std R + 1e-4), std with n - 1. GRPO, arXiv 2402.03300, section 4.1.2."""
    mean, deviation = statistics.fmean(rewards), statistics.stdev(rewards)
    return [(reward - mean) / (deviation + _EPSILON) for reward in rewards]


def _centred(rewards: Sequence[float]) -> list[float]:
    """A_i = R_i - mean R. Dr. GRPO, arXiv 2503.20783: dividing by std R favours prompts too easy or too hard."""
    mean = statistics.fmean(rewards)
    return [reward - mean for reward in rewards]


def _leave_one_out(rewards: Sequence[float]) -> list[float]:
    """A_i = R_i - mean of the others. RLOO, Kool et al. 2019, arXiv 2402.14740: a baseline free of the own reward."""
    total, others = sum(rewards), len(rewards) - 1
    return [reward - (total - reward) / others for reward in rewards]


def denoised(
    rewards: Sequence[float | None], judged: Sequence[bool], noise: Noise, correction: str
) -> list[float | None]:
    """A group's rewards with the judge's errors taken out of those that it gave, before `group_advantages`.

    judged: whether a reward is a judge's; the others are certain. With a = false_pay, b = false_refusal, c = 1 - a - b:

        backward    (r - a) / c      its mean over the judge's errors is the true reward, so the gradient is unbiased
        forward     r - (1 - b)      the weights b - 1 and b of the score functions of a refused and of a paid one;
                                     certain ones get c (r - 1), the mean that a judged one of their reward has

    Cai et al., arXiv 2510.00915 (their rho_0 = a, rho_1 = b). The forward value is c times the backward one, less c:
    the gradient it gives is c times the unbiased one, and its variance c^2 times. Both are one line in r, so a group
    that is judged throughout keeps its advantages but for a factor, and all of them once they are divided by their
    deviation (advantage.variant=group). What changes is the weight of a judge's verdicts beside certain rewards in one
    group and, without that division, of judged groups beside others.
    """
    a, b, c = noise.false_pay, noise.false_refusal, noise.signal
    judged_line, certain_line = ((1 / c, -a / c), (1.0, 0.0)) if correction == "backward" else ((1.0, b - 1), (c, -c))
    lines = [judged_line if own else certain_line for own in judged]
    return [None if r is None else slope * r + shift for r, (slope, shift) in zip(rewards, lines, strict=True)]


def gdpo_advantages(
    components: Sequence[Sequence[Mapping[str, float] | None]], weights: Mapping[str, float]
) -> list[list[float | None]]:
    """Advantages of a batch with each reward component normalised on its own. GDPO, arXiv 2601.05242.

        a_ik = (R_ik - mean_group R_k) / (std_group R_k + 1e-4)
        A_i  = (S_i - mean_batch S) / (std_batch S + 1e-4),   S_i = sum_k weight_k a_ik

    A rare component keeps its say: in a plain sum the component of larger spread drowns it.
    components: for each group, for each completion, its component values, or None when it was not judged. A component
    that a completion lacks counts neither in that component's mean nor in its sum.
    """
    sums: list[list[float | None]] = []
    for group in components:
        totals: list[float | None] = [None if member is None else 0.0 for member in group]
        for name, weight in weights.items():
            values = group_advantages([None if m is None else m.get(name) for m in group], AdvantageConfig("group"))
            for i, value in enumerate(values):
                if value is not None:
                    totals[i] = (totals[i] or 0.0) + weight * value
        sums.append(totals)
    flat = [total for group_totals in sums for total in group_totals if total is not None]
    if len(flat) < 2:
        return [[None if total is None else 0.0 for total in group_totals] for group_totals in sums]
    scaled = iter(_normalised(flat))
    # A group without contrast keeps its exact 0, which the mean's rounding would take from it.
    return [
        [None if total is None else next(scaled) * any(group_totals) for total in group_totals] for group_totals in sums
    ]


@dataclass(frozen=True)
class Placed:
    """A completion's tokens, and where its reward's points were earned: name -> (first token, one after, points)."""

    tokens: int
    spans: Mapping[str, Sequence[tuple[int, int, float]]]


def span_credit(
    rewards: Sequence[float | None], advantages: Sequence[float | None], placed: Sequence[Placed], share: float = 1.0
) -> list[tuple[float, ...]]:
    """By how much the advantage of each token differs from its completion's: what a span earned goes to its tokens.

        c_s = share * slope * (p_s - m_k / n_k)
        d_t = sum_s c_s * (|o| / |s| if t in s else 0) - c_s

    share: advantage.spans. p_s: points of span s. m_k: mean over the group's judged members of their points under the
    name k. n_k: spans of that name in this completion. |o|, |s|: tokens. slope = dA/dR: within a group all advantages
    are one line in the reward. The d_t of a completion sum up to 0, so that its credit is |o| A in all, as without
    spans. What others earned under a name that this completion lacks, and what no span places, stays with all of its
    tokens. A span has at least one token.
    """
    judged = [one for one, reward in zip(placed, rewards, strict=True) if reward is not None]
    line = [(r, a) for r, a in zip(rewards, advantages, strict=True) if r is not None and a is not None]
    slope = share * _slope(line)
    names = {name for one in judged for name in one.spans}
    means = {k: statistics.fmean(sum(p for *_, p in one.spans.get(k, ())) for one in judged) for k in names}
    found = []
    for one in placed:
        credit = [0.0] * one.tokens
        for name, spans in one.spans.items():
            for first, stop, points in spans:
                c = slope * (points - means.get(name, 0.0) / len(spans))
                credit = [d - c for d in credit]
                for t in range(first, stop):
                    credit[t] += c * one.tokens / (stop - first)
        found.append(tuple(credit))
    return found


def _slope(line: Sequence[tuple[float, float]]) -> float:
    """Of the line through (reward, advantage); 0 where all rewards are alike."""
    if len({reward for reward, _ in line}) < 2:
        return 0.0
    (low, start), (high, end) = min(line), max(line)
    return (end - start) / (high - low)


def overlong_penalty(tokens: int, max_tokens: int, config: AdvantageConfig) -> float:
    """What a long completion loses, in reward (<= 0), before advantages are computed.

        0                                            up to max_tokens - buffer
        penalty * (max_tokens - buffer - n) / buffer up to max_tokens
        -penalty                                     at max_tokens, where sampling was cut

    Soft overlong punishment of DAPO, arXiv 2503.14476, equation 13, with overlong_penalty = 1.
    """
    if not config.overlong_buffer:
        return 0.0
    over = tokens - (max_tokens - config.overlong_buffer)
    return -config.overlong_penalty * min(max(over / config.overlong_buffer, 0.0), 1.0)
