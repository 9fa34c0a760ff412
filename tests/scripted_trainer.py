"""A stand-in for the trainer that costs milliseconds: reads key=value words and writes a run folder of known effects.

Not a test. `python scripted_trainer.py key=value ...`. What settings do: train.lr 9 fails; loss.kl_coef adds ten points a
unit to the chance of a right answer; rewards.spec {class: zero} earns 0 always; STEP_S seconds pass at every step; with loss.kl_coef under HANG_BELOW it never ends.
A run that is stopped leaves the steps it has done, and goes on from them.
"""

import json
import os
import random
import sys
import time
from pathlib import Path


def main(words: list[str]) -> int:
    settings = dict(word.split("=", 1) for word in words if "=" in word)
    folder, seed = Path(settings["run.dir"]), int(settings["seed"])
    steps, limit = int(settings.get("train.steps", 5)), int(settings.get("eval.limit", 60))
    kl, zero = float(settings.get("loss.kl_coef", 0)), "zero" in settings.get("rewards.spec", "")
    (folder / "eval").mkdir(parents=True, exist_ok=True)
    print("settings:", settings, flush=True)
    if settings.get("train.lr") == "9":
        print("Traceback (most recent call last):\nValueError: the loss is not a number", flush=True)
        return 1
    spec = json.loads(settings.get("rewards.spec", "{}"))
    test = folder.parent.parent / "test.jsonl"
    rows = [{"id": f"q{i}", "question": "Is it?", "answer": "yes", "kind": "yesno", "images": []} for i in range(limit)]
    test.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {"model": "demo", "seed": seed, "train": {"steps": steps}, "loss": {"kl_coef": kl}, "rewards": {"spec": spec},
              "data": {"train": str(test), "test": str(test)}}  # fmt: skip
    (folder / "config.yaml").write_text(json.dumps(config))
    log = folder / "metrics.jsonl"
    done = len(log.read_text().splitlines()) if log.exists() else 0
    for step in range(done + 1, steps + 1):
        time.sleep(float(os.environ.get("STEP_S", "0")))
        reward = 0.0 if zero else 0.3 + 0.02 * step + 0.1 * kl
        row = {"step": step, "reward/mean": reward, "reward/std": 0.0 if zero else 0.4, "policy/kl": 0.001 * step,
               "groups/zero_variance": 1.0 if zero else 0.1, "tokens/generated": 100, "completion/tokens_mean": 10}  # fmt: skip
        with open(log, "a") as out:
            out.write(json.dumps(row) + "\n")
    if kl < float(os.environ.get("HANG_BELOW", "0")):
        time.sleep(600)
    questions, luck = random.Random(0), random.Random(f"seed {seed}")  # hard questions are hard for all
    right = [0.5 * questions.random() + 0.5 * luck.random() < 0.5 + 0.1 * kl for _ in range(limit)]
    rows = [
        {"id": f"q{i}", "kind": "yesno", "task": "", "modality": "", "image": f"i{i // 2}.png", "question": "?",
         "options": [], "gold": "yes", "completion": f"<answer>{'yes' if r else 'no'}</answer>", "value": 0.0 if zero else float(r), "status": "ok",
         "parsed": "yes" if r else "no", "reason": ""}
        for i, r in enumerate(right)
    ]  # fmt: skip
    (folder / "eval" / "after.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    score = sum(row["value"] for row in rows) / len(rows)
    (folder / "summary.json").write_text(json.dumps({"after": {"accuracy": score}, "steps": steps}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
