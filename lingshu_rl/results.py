"""What a run tells: one line and one metrics object a step, and the summary and report at its end."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, pstdev
from typing import Any

from lingshu_rl.eval.heldout import evaluate
from lingshu_rl.eval.stats import summarise
from lingshu_rl.progress import step_line
from lingshu_rl.report import write_report
from lingshu_rl.report.samples import show_samples, shows_samples
from lingshu_rl.run import Run
from lingshu_rl.storage.disk import writing
from lingshu_rl.storage.runfolder import versions, write_text
from lingshu_rl.types import Experience, Group


def log_step(run: Run, step: int, batch: Experience, update: dict[str, float]) -> None:
    """Write the step's metrics and rollouts, feed the trackers, print a line. Main rank only; others return.

    step: from 0, as the loop counts; readers see it counted from 1.
    """
    times = run.timeline.take(step)
    if not run.is_main:
        return
    step += 1
    members = [m for g in batch.groups for m in g.members]
    judged = [m.result.value for m in members if m.result.value is not None]
    by_kind: dict[str, list[float]] = defaultdict(list)
    components: dict[str, list[float]] = defaultdict(list)
    for m in members:
        if m.result.value is not None:
            by_kind[m.rollout.prompt.kind].append(m.result.value)
            for name, value in m.result.components.items():
                components[name].append(value)
    lengths = [len(m.rollout.token_ids) for m in members]
    statuses = Counter(m.result.status for m in members)
    metrics: dict[str, Any] = {
        "step": step,
        "reward/mean": fmean(judged) if judged else 0.0,
        "reward/std": pstdev(judged) if judged else 0.0,
        "reward/masked": len(members) - len(judged),
        **{f"reward/kind/{kind}": fmean(v) for kind, v in sorted(by_kind.items())},
        **by_source(batch.groups, run.source_of),
        **{f"reward/component/{name}": fmean(v) for name, v in sorted(components.items())},
        **{f"reward/status/{status}": n / len(members) for status, n in sorted(statuses.items())},
        "groups/zero_variance": sum(not any(a) for a in batch.advantages) / len(batch.groups),
        "groups/trained": len(batch.train),
        "prompts/drawn": batch.drawn,
        "completion/tokens_mean": fmean(lengths),
        "completion/truncated_share": sum(m.rollout.truncated for m in members) / len(members),
        "tokens/generated": sum(lengths),
        **{key if "/" in key or key == "lr" else f"policy/{key}": value for key, value in update.items()},
        "weight_version": min(m.rollout.weight_version for m in members),
        "staleness": step - 1 - min(m.rollout.weight_version for m in members),
        "cursor": run.state.cursor,
        **({"reference_version": int(run.state.reference[-6:])} if run.state.reference else {}),
        **({"prompts/refused": len(batch.refused), "refused": dict(batch.refused)} if batch.refused else {}),
        **({"disagreement": run.disagreement} if run.disagreement else {}),
        **run.rewards.spent(),
        **times,
    }
    run.folder.log_metrics(metrics)
    rows = run.folder.write_rollouts(step, batch.groups, batch.advantages)
    figures = {k: v for k, v in metrics.items() if k != "step" and isinstance(v, int | float)}
    run.policy.accelerator.log(figures, step=step)
    if shows_samples(step, run.config.train.steps):
        images = {g.prompt.id: g.prompt.images[0] for g in batch.groups if g.prompt.images}
        show_samples(run.policy.accelerator.trackers, step, rows, images)
    run.progress.advance(note=f"reward {metrics['reward/mean']:.3f}")
    run.progress.say(step_line(step, run.config.train.steps, metrics))
    if nothing := nothing_learnt(metrics):
        run.progress.say(f"WARNING: step {step} teaches nothing: {nothing}")


# Statuses of completions in which no answer was found, and of those that the reward could not judge.
UNREAD, UNJUDGED = ("unparsed", "truncated"), ("gold_invalid", "timeout", "error")


def nothing_learnt(metrics: Mapping[str, Any]) -> str:
    """Why a step's completions gave the update nothing, in words; "" where they gave it something."""
    if metrics["groups/trained"]:
        return ""
    unread = sum(metrics.get(f"reward/status/{status}", 0.0) for status in UNREAD)
    if unread > 0.5:
        return (
            f"in {100 * unread:.0f} % of the completions no answer could be read: look at rollouts/, the prompt's "
            "last line (data.instruction) and rollout.max_tokens"
        )
    if sum(metrics.get(f"reward/status/{status}", 0.0) for status in UNJUDGED) > 0.5:
        return "most completions could not be judged: their reasons are in rollouts/"
    if metrics["reward/std"] == 0:
        return f"all completions earned {metrics['reward/mean']:.2f}"
    return "in no group do the rewards differ: the questions are too easy, too hard, or the group is too small"


def by_source(groups: Sequence[Group], source_of: Callable[[str], str]) -> dict[str, float]:
    """For each source of a mixture: how many of its prompts were drawn, and the mean of their judged rewards."""
    rewards: dict[str, list[float]] = defaultdict(list)
    drawn: Counter[str] = Counter()
    for group in groups:
        if source := source_of(group.prompt.id):
            drawn[source] += 1
            rewards[source] += [m.result.value for m in group.members if m.result.value is not None]
    return {f"prompts/source/{source}": float(count) for source, count in sorted(drawn.items())} | {
        f"reward/source/{source}": fmean(values) for source, values in sorted(rewards.items()) if values
    }


async def finish(run: Run) -> dict[str, Any]:
    """Evaluate the trained policy, write summary.json and report.html, and say where they are."""
    with run.timeline.of("evaluation"):
        await evaluate(run, "after", run.config.eval.controls)
    summary = {
        **summarise(run.folder.read_evals()),
        "steps": run.config.train.steps,
        "seconds_total": round(run.timeline.total_s, 1),
        "seconds_by_phase": {name: round(value, 2) for name, value in run.timeline.seconds.items()},
        "versions": versions(),
        **run.state.first_batch,
        "zero_stage": run.policy.zero_stage,
        "policy_ranks": run.policy.ranks,
        "policy_parameters": run.policy.parameters,
        "engine_generated_tokens": await run.rollout.generated_tokens() - run.counted_before,
    }
    with writing(run.folder.summary):
        write_text(run.folder.summary, json.dumps(summary, indent=1))
        report = write_report(run.folder.path)
    run.progress.say(result_line(summary))
    run.progress.say(f"the engines counted {summary['engine_generated_tokens']} tokens generated for this run")
    run.progress.say(f"summary: {run.folder.summary}   report: {report}")
    return summary


def result_line(summary: Mapping[str, Any]) -> str:
    """The held-out result in a line. What could not be judged, or was not evaluated, has no figure."""

    def figure(key: str) -> str:
        value = summary.get(key, {}).get("accuracy")
        return "unknown" if value is None else f"{value:.3f}"

    told = f"held-out accuracy {figure('before')} -> {figure('after')}"
    gain = summary.get("gain", {})
    if gain.get("points") is None:
        told += ", gain unknown: no question was judged both times"
    else:
        told += f", gain {gain['points']:.1f} points (95 % interval {gain['ci95'][0]:.1f} to {gain['ci95'][1]:.1f})"
    controls = ("blank_image", "shuffled_image", "text_only", "majority_answer")
    return "; ".join([told, *(f"{c.replace('_', ' ')} {figure(c)}" for c in controls if summary.get(c))])
