"""Held-out accuracy during training: the evaluation kit's questions, controls and rows, with the run's engine and
rewards."""

from __future__ import annotations

from collections.abc import Sequence

from lingshu_rl.eval.engines import Reply
from lingshu_rl.eval.journal import Journal
from lingshu_rl.eval.runner import answer, conditions_of, constants_of, grade_rows
from lingshu_rl.eval.scoring import ENGINE_ERROR, MAIN, Row, score
from lingshu_rl.failures import PromptRefused
from lingshu_rl.rollout.sampler import RolloutError, Sampler
from lingshu_rl.run import Run
from lingshu_rl.types import Prompt

EVAL_SEED = 0


class RolloutEngine:
    """Greedy answers of the policy. A question that the server refuses is a reply with its error."""

    def __init__(self, client: Sampler) -> None:
        self.client = client

    async def ask(self, prompt: Prompt, condition: str) -> Reply:
        try:
            (rollout,) = await self.client.sample(prompt, 1, EVAL_SEED, temperature=0.0)
        except PromptRefused as error:
            return Reply(error=str(error))
        return Reply(rollout.text, rollout.finish_reason)

    async def close(self) -> None:
        pass


async def evaluate(run: Run, name: str, controls: Sequence[str] = ()) -> dict[str, list[Row]]:
    """Answer and grade the test questions; returns and stores the rows by condition ("main", "blank", ...).

    Raises RolloutError when no question at all was answered: then it is the engine that is at fault.
    """
    prompts = run.test[: run.config.eval.limit or None]
    asked = conditions_of(prompts, controls)
    run.progress.start(f"evaluating {name}", sum(map(len, asked.values())))
    replies = await answer(asked, RolloutEngine(run.rollout), Journal(None), run.progress.advance)
    replies |= constants_of(prompts, controls)
    results = {c: await grade_rows(prompts, given, run.rewards.grade) for c, given in replies.items()}
    run.progress.stop()
    failed = [row for row in results[MAIN] if row["status"] == ENGINE_ERROR]
    if failed and len(failed) == len(results[MAIN]):
        raise RolloutError(f"no held-out question was answered; the first: {failed[0]['reason']}")
    for condition, rows in results.items():
        run.folder.write_eval(name if condition == MAIN else f"{name}_{condition}", rows)
        found = score(rows)
        if condition == MAIN and found["n"]:
            run.state.accuracy = found["accuracy"]
        low, high = found["ci95"]
        told = f"{found['accuracy']:.3f}" if found["n"] else "unknown (no answer could be judged)"
        run.progress.say(
            f"{name}{'' if condition == MAIN else f', {condition}'}: accuracy {told} (95 % interval {low:.3f} to "
            f"{high:.3f}, "
            f"n={found['n']}), {found['unread']} unread" + (f", {found['errors']} errors" if found["errors"] else "")
        )
    return results
