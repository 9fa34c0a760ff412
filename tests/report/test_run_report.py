"""The report of a made-up run: says what the figures say, survives what a killed run leaves, and lets no text run."""

import base64
import hashlib
import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lingshu_rl.eval.stats import summarise
from lingshu_rl.report import html, plots, write_report
from lingshu_rl.report.alarms import find_alarms
from lingshu_rl.report.html import early_and_late, findings, load_run, on_the_way, read_history, samples
from lingshu_rl.report.monitor import monitors
from lingshu_rl.report.spans import coloured
from rewards.trust import Rate, Trust

TASKS = (("plane", "option"), ("inverted", "yesno"), ("width", "numeric"), ("describe", "report"))
EVALS = ("before", "after", "before_blank", "after_blank", "before_shuffled", "after_shuffled")
CHANCE = {"option": 0.33, "yesno": 0.5, "numeric": 0.15, "report": 0.2}


def questions(folder, count):
    """Rows in the form of the test set, two questions an image."""
    rng, rows = np.random.default_rng(0), []
    for i in range(count):
        image = folder / f"slice-{i // 2}.png"
        if i % 2 == 0:
            y, x = np.mgrid[:64, :64]
            blob = 220 * np.exp(-(((x - rng.integers(20, 44)) / 14) ** 2) - ((y - rng.integers(20, 44)) / 18) ** 2)
            Image.fromarray(blob.astype(np.uint8)).save(image)
        task, kind = TASKS[i % 4]
        options = ["axial", "coronal", "sagittal"] if kind == "option" else []
        gold = {"option": "ABC"[i // 4 % 3], "yesno": ("yes", "no")[i // 4 % 2], "numeric": f"{i % 9 + 9}0 mm",
                "report": "Plane: axial. Level: low."}[kind]  # fmt: skip
        lines = [
            f"What about the {task}?",
            *(f"{a}. {o}" for a, o in zip("ABC", options, strict=False)),
            f"Answer: {kind}.",
        ]
        rows.append({"id": f"q{i}", "kind": kind, "task": task, "image": str(image), "question": "\n".join(lines),
                     "options": options, "gold": gold})  # fmt: skip
    return rows


def answer(row, right, rng):
    wrong = {"option": str(rng.choice([x for x in "ABC" if x != row["gold"]])), "numeric": "60 mm",
             "yesno": "no" if row["gold"] == "yes" else "yes", "report": "Plane: coronal."}[row["kind"]]  # fmt: skip
    parsed = row["gold"] if right else wrong
    text = f"<think> it looks so </think><answer> {parsed} </answer>"
    return {
        "completion": text,
        "value": float(right),
        "status": "ok",
        "parsed": parsed,
        "reason": f"label {row['gold']}",
    }


def step_metrics(step, steps, rng):
    done = step / steps
    kinds = {k: c + (1 - c) * (0.15 + 0.4 * done) + 0.03 * rng.normal() for k, c in CHANCE.items()}
    mean = sum(kinds.values()) / 4
    return {
        "step": step, "reward/mean": mean, "reward/std": 0.4, **{f"reward/kind/{k}": v for k, v in kinds.items()},
        "reward/component/correct": mean - 0.03, "reward/component/format": 0.9 + 0.1 * done, "reward/masked": 0,
        "reward/status/ok": 0.93 + 0.05 * done, "reward/status/unparsed": 0.05 - 0.04 * done,
        "reward/status/truncated": 0.02 - 0.01 * done, "groups/zero_variance": 0.2 + 0.2 * done,
        "completion/tokens_mean": 14 + 2 * done + 0.4 * rng.normal(), "completion/truncated_share": 0.02 * rng.random(),
        "policy/loss": 0.01 * rng.normal(), "policy/kl": 0.004 * done * (1 + 0.3 * rng.random()),
        "policy/entropy": 0.9 - 0.4 * done + 0.03 * rng.normal(), "policy/clip_low": 0.0, "policy/clip_high": 0.0,
        "policy/grad_norm": math.exp(-0.8 * done + 0.3 * rng.normal()), "policy/rollout_gap": 2e-7,
        "policy/rollout_gap_max": 1e-6 * math.exp(rng.normal()), "lr": 5e-4, "weight_version": step - 1,
        "time/rollout": 2.1 + 0.2 * rng.random(), "time/reward": 0.03, "time/reference": 0.5, "time/weight_sync": 0.08,
        "time/update": 1.6 + 0.3 * rng.random(), "time/step": 4.5, "tokens/generated": 4000,
    }  # fmt: skip


def make_run(folder, rows, steps=30, group_size=8):
    """Everything the trainer writes, with a policy that learns to look."""
    rng = np.random.default_rng(0)
    (folder / "eval").mkdir(parents=True)
    (folder / "rollouts").mkdir()
    evals = {}
    for name in EVALS:
        skill = {"before": 0.15, "after": 0.6}.get(name, 0.0)
        evals[name] = [{**row, **answer(row, rng.random() < max(skill, CHANCE[row["kind"]]), rng)} for row in rows]
        for row in evals[name][::25]:
            row |= {
                "completion": "<think> the the",
                "value": 0.0,
                "status": "unparsed",
                "parsed": None,
                "reason": "no tag",
            }
        write_rows(folder / "eval" / f"{name}.jsonl", evals[name])
    metrics = [step_metrics(step, steps, rng) for step in range(1, steps + 1)]
    write_rows(folder / "metrics.jsonl", metrics)
    for step in range(1, steps + 1):
        members = []
        for row in rng.choice(rows, 8, replace=False):
            values = rng.random(group_size) < 0.3 + 0.4 * step / steps
            for m, value in enumerate(values):
                got = {
                    **row,
                    **answer(row, value, rng),
                    "prompt_id": row["id"],
                    "step": step,
                    "member": m,
                    "tokens": 10 + (m * 5 + step) % 8,
                    "verdict": "" if m else "I say so <b>.",
                }
                got |= {"finish_reason": "stop", "weight_version": step - 1, "components": '{"correct": 1.0}'}
                got |= {
                    "parsed": json.dumps(got["parsed"]),
                    "advantage": (value - values.mean()) / (values.std() or 1.0),
                }
                members.append(got)
        pq.write_table(pa.Table.from_pylist(members), folder / "rollouts" / f"step-{step:06d}.parquet")
    versions = {"python": "3.11.9", "torch": "2.13.0", "vllm": "0.32.0", "deepspeed": "0.19.8", "trl": "1.16.0"}
    seconds = {"start": 41.2, "rollout": 2.2 * steps, "reward": 0.03 * steps, "reference": 0.5 * steps,
               "update": 1.75 * steps, "weight_sync": 0.08 * steps, "evaluation": 38.0}  # fmt: skip
    summary = {**summarise(evals), "steps": steps, "seconds_total": sum(seconds.values()), "seconds_by_phase": seconds,
               "versions": versions, "kl_first_step": 2e-8, "max_logprob_gap_first_step": 4.1e-6, "zero_stage": 2,
               "engine_generated_tokens": 4000 * steps}  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "versions.json").write_text(json.dumps(versions))
    (folder / "config.yaml").write_text(
        f"model: demo\nseed: 0\ndata: {{train: 'demo:train', test: 'demo:test'}}\nloss: {{kl_coef: 0.01}}\n"
        f"train: {{steps: {steps}, prompts_per_step: 8, group_size: {group_size}, lr: 0.0005}}\n"
    )
    return folder


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    return make_run(folder / "runs" / "demo", questions(folder, 120))


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "demo")


class Page(HTMLParser):
    """What a browser would make of a page: its tags with attributes, and its text."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.texts, self.source = [], [], path.read_text()
        self.feed(self.source)
        self.text = " ".join(" ".join(self.texts).replace("\N{NO-BREAK SPACE}", " ").split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)


def test_headline_says_what_the_summary_says(run):
    page = Page(write_report(run))
    summary = json.loads((run / "summary.json").read_text())
    assert f"The policy improved by {summary['gain']['points']:.1f} points" in page.text
    for key in ("before", "after", "blank_image", "shuffled_image"):
        assert f"{100 * summary[key]['accuracy']:.1f} %" in page.text
    sight = 100 * (summary["after"]["accuracy"] - summary["blank_image"]["accuracy"])
    assert re.search(rf"{sight:.1f} points \(95 % interval \+[\d.]+ to \+[\d.]+\) come from looking", page.text)
    assert "No alarms." in page.text
    for kind in CHANCE:
        assert f"{100 * summary['by_kind'][kind]['after']['accuracy']:.1f} %" in page.text
    for words in (
        "Training curves",
        "Where the time went",
        "step 1 · ",
        "step 30 · ",
        "4.1e-6 nats",
        "prompts_per_step",
    ):
        assert words in page.text


def test_a_loss_and_a_null_result_are_called_so(run):
    evals = run / "eval"
    (run / "summary.json").unlink()
    before = (evals / "before.jsonl").read_text()
    (evals / "before.jsonl").write_text((evals / "after.jsonl").read_text())
    assert "No change that can be told from noise" in Page(write_report(run)).text
    (evals / "after.jsonl").write_text(before)
    assert "The policy got worse by" in Page(write_report(run)).text


def test_the_page_needs_nothing_else(run):
    page = Page(write_report(run))
    images = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
    assert len(images) > 12 and all(src.startswith("data:image/jpeg;base64,") for src in images)
    assert not [tag for tag, _ in page.tags if tag in ("link", "iframe", "object", "embed", "base")]
    assert "http://" not in page.source and "https://" not in page.source and "@import" not in page.source
    assert str(run.parent) not in page.source
    assert len(page.source) < 1_000_000


def test_the_same_run_gives_the_same_page(run):
    first = write_report(run).read_text()
    assert write_report(run).read_text() == first


HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'><svg onload=alert(3)>{{ 7*7 }}&amp;</pre>"


def test_hostile_text_stays_text(run):
    for path in (run / "eval").glob("*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        fields = {
            name: HOSTILE for name in ("kind", "task", "question", "completion", "status", "reason", "gold", "image")
        }
        write_rows(path, [{**row, **fields, "options": [HOSTILE, "x"], "id": HOSTILE + row["id"]} for row in rows])
    for path in (run / "rollouts").glob("*.parquet"):
        rows = pq.read_table(path).to_pylist()
        fields = {name: HOSTILE for name in ("task", "question", "completion", "status", "reason", "gold")}
        pq.write_table(pa.Table.from_pylist([{**row, **fields, "options": [HOSTILE]} for row in rows]), path)
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    names = {f"{key}/{HOSTILE}": 0.5 for key in ("reward/kind", "reward/component", "reward/status", "time")}
    write_rows(run / "metrics.jsonl", [{**row, **names} for row in metrics])
    (run / "config.yaml").write_text(json.dumps({"model": HOSTILE}))
    (run / "versions.json").write_text(json.dumps({HOSTILE: HOSTILE}))
    (run / "summary.json").unlink()

    page = Page(write_report(run))
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    assert not [attrs for tag, attrs in page.tags if tag == "img" and not attrs["src"].startswith("data:")]
    assert page.text.count("<img src=x onerror=alert(2)>") > 20
    assert "{{ 7*7 }}" in page.text


def test_only_the_pages_own_script_may_run(run):
    page = Page(write_report(run))
    script = re.search(r"<script>(.*?)</script>", page.source, re.S).group(1)
    policy = next(attrs["content"] for _, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in policy
    assert policy.startswith("default-src 'none'")


def test_a_killed_run_is_reported_as_far_as_it_came(run):
    (run / "summary.json").unlink()
    for path in (run / "eval").glob("after*.jsonl"):
        path.unlink()
    metrics = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(metrics[:12]) + "\n" + metrics[12][:40])
    last = run / "rollouts" / "step-000030.parquet"
    last.write_bytes(last.read_bytes()[:200])
    text = Page(write_report(run)).text
    assert "12 of 30 steps are logged, there is no summary.json" in text
    assert "The last line of metrics.jsonl was cut off" in text
    assert "step-000030.parquet cannot be read" in text
    assert "There is no evaluation after training." in text
    assert "before training" in text and "step 29 · " in text


def test_a_run_that_has_only_begun(tmp_path):
    (tmp_path / "config.yaml").write_text("model: demo\ntrain:\n  steps: 5\n")
    text = Page(write_report(tmp_path)).text
    assert "Not evaluated on held-out questions" in text and "0 of 5 steps" in text
    assert "No alarms" not in text


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no run folder .*run\.dir"):
        write_report(tmp_path)


def test_missing_images_and_masked_answers(run):
    path = run / "eval" / "after.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    write_rows(path, [{**row, "image": "/nowhere/a.png"} for row in rows])
    step = run / "rollouts" / "step-000001.parquet"
    members = [{**row, "value": None, "advantage": None, "status": "error"} for row in pq.read_table(step).to_pylist()]
    pq.write_table(pa.Table.from_pylist(members), step)
    text = Page(write_report(run)).text
    assert "image file not found" in text and "masked" in text


def test_what_a_completion_earned_is_coloured_where_it_stands(run):
    """Word for word, whatever it says; old files without such a column are shown as they are."""
    evil = "Plane: <img src=x onerror=alert(1)>. Level: low. " + "so " * 400 + "Width: 80 mm."
    ends = {name: evil.index(name) for name in ("Plane", "Level", "Width")}
    spans = {
        "plane": [[0, ends["Level"] - 1, -0.25]], "level": [[ends["Level"], ends["Level"] + 11, 0.25]],
        "<b>": [[ends["Level"], ends["Level"] + 5, 0.5]], "width": [[ends["Width"], len(evil), 0.0]],
    }  # fmt: skip
    pieces = list(coloured({"completion": evil, "spans": json.dumps(spans)}))
    assert [(p.text, p.side, p.told) for p in pieces if p.side] == [
        ("Plane: <img src=x onerror=alert(1)>.", "down", "plane −0.25"),
        ("Level", "up", "level +0.25, <b> +0.50"),
        (": low.", "up", "level +0.25"),
        ("Width: 80 mm.", "flat", "width +0.00"),
    ]
    assert any(" […] " in p.text for p in pieces if not p.side)
    short = evil.replace("so ", "")
    assert "".join(p.text for p in coloured({"completion": short})) == short
    for step in ("000001", "000030"):
        file = run / "rollouts" / f"step-{step}.parquet"
        members = [{**row, "completion": evil, "spans": json.dumps(spans)} for row in pq.read_table(file).to_pylist()]
        pq.write_table(pa.Table.from_pylist(members), file)
    page = write_report(run).read_text()
    assert '<mark class="down" title="plane −0.25">Plane: &lt;img src=x onerror=alert(1)&gt;.</mark>' in page
    assert 'title="level +0.25, &lt;b&gt; +0.50">Level</mark>' in page and "<img src=x" not in page


def test_gallery_is_fixed_by_the_ids_and_spread_over_tasks(run):
    evals = load_run(run).evals
    chosen = samples(evals)
    again = samples({name: rows[::-1] for name, rows in evals.items()})
    assert [(s["move"], s["after"]["id"]) for s in chosen] == [(s["move"], s["after"]["id"]) for s in again]
    fixed = [s for s in chosen if s["move"] == "fixed"]
    assert {s["after"]["task"] for s in fixed} == {task for task, _ in TASKS}
    assert all(s["before"]["value"] < 0.5 <= s["after"]["value"] for s in fixed)


def test_evaluations_on_the_way_become_a_curve(run):
    assert "Held-out accuracy in training" not in Page(write_report(run)).text
    shutil.copy(run / "eval" / "before.jsonl", run / "eval" / "step-000010.jsonl")
    assert "Held-out accuracy in training" in Page(write_report(run)).text


def test_the_monitor_and_the_difficulty_of_questions(run):
    page = Page(write_report(run)).text
    for words in ("Is the reward being played?", "completions of 30 steps", "Letters chosen", "Reward by length, last steps",
                  "By difficulty", "middling at the start", "Questions by how many of their completions are right"):  # fmt: skip
        assert words in page, words


def test_difficulty_is_what_the_data_say_where_they_say_it(run):
    for path in (run / "eval").glob("*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        write_rows(path, [row | {"groups": {"difficulty": f"grade {i % 2}"}} for i, row in enumerate(rows)])
    found = load_run(run).summary["by_difficulty"]
    assert set(found) == {"grade 0", "grade 1"} and found["grade 0"]["after"]["n"] == 60


@pytest.mark.parametrize("form", ["timeline", "start and end"])
def test_the_phases_of_a_step_as_a_timeline(run, form):
    assert "what ran when" not in Page(write_report(run)).text
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in metrics:
        t = 100.0 * row["step"]
        spans = {"rollout": [t, t + 2.0], "reference": [t + 0.5, t + 2.4], "update": [t + 2.4, t + 4.0]}
        if form == "timeline":
            row["timeline"] = {**spans, "reward": [[t + 1.0, t + 1.1], [t + 2.0, t + 2.1]]}
        else:
            row |= {
                f"time/{edge}/{name}": span[i]
                for name, span in spans.items()
                for i, edge in enumerate(("start", "end"))
            }
    write_rows(run / "metrics.jsonl", metrics)
    page = Page(write_report(run))
    figure = page.source[page.source.index("what ran when") :].split("</figure>")[0]
    assert figure.count("<rect") == (5 if form == "timeline" else 3)
    assert "start/rollout" not in page.text  # moments are no phases of their own


def test_a_phase_has_one_colour_in_the_whole_section(run):
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in metrics:  # the reference starts before the rollouts do, and the update after all
        row["timeline"] = {"rollout": [1.0, 2.0], "reference": [0.0, 2.4], "weight_sync": [3, 4], "evaluation": [4, 5], "update": [2.4, 3.0]}  # fmt: skip
    write_rows(run / "metrics.jsonl", metrics)
    section = write_report(run).read_text().split("Where the time went")[1].split("<h2>")[0]
    table = {name: colour for colour, name in re.findall(r'--mark:var\((--s\d)\)"></span>([\w ]+)</td>', section)}
    lanes = section.split("what ran when")[1].split("</svg>")[0]
    drawn = re.findall(r'text-anchor="end">([a-z ]+)</text><rect style="fill:var\((--s\d)\)"', lanes)
    assert len(drawn) == 5 and all(table[name] == colour for name, colour in drawn)
    legend = section.split("Seconds a step")[1].split("</ul>")[0]
    listed = re.findall(r'--mark:var\((--s\d)\)"><i></i>([\w ]+)</li>', legend)
    assert len(listed) == 5 and all(table[name] == colour for colour, name in listed)


def test_texts_are_read_for_the_questions_that_are_shown_alone(run, monkeypatch):
    """512 prompts with 16 completions a step must not be held with their texts."""
    asked = []
    plain = html.read_rollouts

    def watched(path, notes, columns=(), of=()):
        asked.append((set(columns), len(of)))
        return plain(path, notes, columns, of)

    monkeypatch.setattr(html, "read_rollouts", watched)
    write_report(run)
    assert all(columns and "question" not in columns for columns, of in asked if not of)
    assert 0 < max(of for _, of in asked) <= html.GROUPS_SHOWN
    assert all(isinstance(row["completion"], int) for row in load_run(run).late)


def test_the_same_question_early_and_late(run):
    page = Page(write_report(run)).text
    assert "The same question, early and late" in page
    pairs = early_and_late(load_run(run))
    assert 1 <= len(pairs) <= 4 and len({p["early"][0]["task"] for p in pairs}) == len(pairs)
    for pair in pairs:
        assert pair["early"][0]["prompt_id"] == pair["late"][0]["prompt_id"]
        assert pair["early"][0]["step"] <= 10 < 20 < pair["late"][0]["step"]


def test_long_runs_are_sampled_evenly(run):
    table = pq.read_table(run / "rollouts" / "step-000030.parquet")
    for i in range(31, 101):
        later = table.set_column(table.schema.get_field_index("step"), "step", pa.array([i] * len(table)))
        pq.write_table(later, run / "rollouts" / f"step-{i:06d}.parquet")
    history = read_history(load_run(run))
    assert len(history) == 40 and next(iter(history)) == 1 and list(history)[-1] == 100


def test_answers_of_evaluations_on_the_way_stand_in_the_gallery(run):
    for step in (5, 10, 15, 20, 25):
        shutil.copy(run / "eval" / "before.jsonl", run / "eval" / f"step-{step:06d}.jsonl")
    assert list(on_the_way(load_run(run).evals)) == ["step 5", "step 15", "step 25"]
    assert "step 15" in Page(write_report(run)).text


def test_findings_of_a_report_are_listed():
    from rewards import ReportEntities, RewardInput

    text = "<answer>There is a small left pleural effusion. No pneumothorax.</answer>"
    gold = "Right pleural effusion. Cardiomegaly. No pneumothorax."
    graded = ReportEntities().score(RewardInput(completion=text, gold=gold))
    stored = {"kind": "report", "parsed": json.loads(json.dumps(graded.parsed, default=str)), "reason": graded.reason}
    found = findings(stored)
    assert any("left pleural effusion" in f["text"] and f["verdict"] == "wrong side" for f in found)
    assert any("cardiomegaly" in f["text"].lower() and "(in the reference)" in f["text"] for f in found)
    assert findings(stored | {"parsed": json.dumps(stored["parsed"])}) == found  # as parquet holds it
    fields = {
        "kind": "report",
        "parsed": {"plane": "axial", "level": "low"},
        "reason": "answer: wrong or missing: level",
    }
    assert [(f["text"], f["verdict"]) for f in findings(fields)] == [("plane: axial", "right"), ("level: low", "wrong")]
    for other in ({"kind": "report", "parsed": "free text"}, {"kind": "report", "parsed": None}, {"kind": "option", "parsed": [1]}):  # fmt: skip
        assert findings({"reason": "", **other}) == []


def alarm_names(run, metrics=None, evals=None, late=None):
    data = load_run(run)
    late = data.late if late is None else late
    return [alarm.name for alarm in find_alarms(metrics or data.metrics, {**data.evals, **(evals or {})}, late)]


@pytest.mark.parametrize("change, name", [
    (lambda i, m: m | {"completion/tokens_mean": 14 + i}, "Length drift"),
    (lambda i, m: m | {"completion/tokens_mean": 14 / (1 + i)}, "Length drift"),
    (lambda i, m: m | {"policy/kl": 0.4 if i == 20 else m["policy/kl"]}, "KL spikes"),
    (lambda i, m: m | {"completion/truncated_share": 0.2}, "Truncated answers"),
    (lambda i, m: m | {"groups/zero_variance": 0.95}, "Groups without contrast"),
    (lambda i, m: m | {"policy/loss": float("nan") if i == 3 else 0.0}, "Values that are no numbers"),
    (lambda i, m: m | {"reward/component/r/paid": 0.3 + i / 60, "reward/component/r/held_out": 0.3}, "Rubric learnt by heart"),
])  # fmt: skip
def test_alarms_of_the_curves(finished, change, name):
    metrics = [change(i, dict(m)) for i, m in enumerate(load_run(finished).metrics)]
    assert alarm_names(finished, metrics=metrics) == [name]


def test_held_out_criteria_that_rise_with_the_paid_ones_are_no_alarm(finished):
    rising = {"reward/component/r/paid", "reward/component/r/held_out"}
    metrics = [m | {key: 0.3 + i / 60 for key in rising} for i, m in enumerate(load_run(finished).metrics)]
    assert alarm_names(finished, metrics=metrics) == []


def test_the_trial_of_the_judge_stands_in_the_report(run):
    assert "Can the judge be trusted?" not in write_report(run).read_text()
    rates = {
        "refused": (Rate("the label", 2, 40),),
        "paid": (Rate("another row's label", 0, 40, 3),),
        "attacks": (Rate("flattery <b>", 39, 40),),
        "order": (Rate("judged otherwise in the other order", 4, 80),),
    }
    told = Trust("judge (open-1) of m", **rates).to_json()
    (run / "judge.json").write_text(json.dumps({"false_pay": 0.0, "false_refusal": 0.05, "judges": [told]}))
    page = write_report(run).read_text()
    for part in (
        "judge: I say so &lt;b&gt;.",
        "Can the judge be trusted?",
        "refused: the label",
        "paid: flattery &lt;b&gt;",
        "3 not judged",
        "87–100",
    ):
        assert part in page, part
    assert "flattery <b>" not in page
    (run / "judge.json").write_text("{")
    assert "judge.json" in write_report(run).read_text()


def test_alarms_of_the_answers(finished):
    after = load_run(finished).evals["after"]
    assert alarm_names(finished) == []
    letter = [row | {"parsed": "B", "status": "ok"} if row["kind"] == "option" else row for row in after]
    assert "Letter collapse" in alarm_names(finished, evals={"after": letter})
    same = [row | {"parsed": row["gold"], "status": "ok"} for row in after]
    assert alarm_names(finished, evals={"after": same}) == []
    lost = [row | {"status": "unparsed"} if i % 8 == 0 else row for i, row in enumerate(after)]
    assert alarm_names(finished, evals={"after": lost}) == ["Parse failures"]
    assert alarm_names(finished, evals={"after_blank": after}) == ["Answers without looking"]
    masked = [{"kind": "numeric", "status": "error", "value": None}] * 10
    assert alarm_names(finished, late=masked) == ["Masked samples"]


def test_a_collapse_in_training_is_read_from_the_parquet_form(finished):
    late = [{"kind": "option", "gold": "ABC"[i % 3], "parsed": '"A"', "status": "ok", "value": 0.5} for i in range(30)]
    assert alarm_names(finished, late=late) == ["Letter collapse"]


@pytest.mark.parametrize("parsed", [None, "null"])
def test_a_reward_that_does_not_tell_what_it_read_is_no_collapse(parsed):
    rows = [{"kind": k, "gold": "ABC"[i % 3], "parsed": parsed, "status": "ok", "value": 0.5} for i in range(30) for k in ("option", "yesno")]  # fmt: skip
    assert find_alarms([], {"after": rows}, [{"completion": f"{i}", "prompt_id": i, **row} for i, row in enumerate(rows)]) == []  # fmt: skip
    assert "letter_entropy" not in monitors(rows)


def test_a_kl_spike_is_told_against_what_it_is_compared_with():
    kl = [0.002, 0.1, 0.002, 0.002, 0.002, 0.1, 0.9]
    (alarm,) = find_alarms([{"step": i + 1, "policy/kl": v} for i, v in enumerate(kl)], {}, [])
    assert alarm.text == "Step 6, 7: at step 7 the KL was 0.9 nats, against 0.002, the median of the 6 steps before it."


@pytest.mark.parametrize("values", [
    [0.0], [0.0, 0.0], [5.0, 5.0], [-1.0, 2.0], [None, 1.0, None, float("nan"), 2.0], [1e-9, 1e-3], [float("inf"), 1.0],
    [1e6, 2e6], [-3.0],
])  # fmt: skip
@pytest.mark.parametrize("log", [False, True])
def test_charts_draw_whatever_is_logged(values, log):
    svg = plots.line_chart(list(range(1, len(values) + 1)), {"a": values}, log=log)
    assert not re.search(r"nan|inf(?!o)", re.sub(r'data-chart="[^"]*"', "", svg))
    heights = [float(y) for y in re.findall(r"[ML][\d.]+ (-?[\d.]+)", svg)]
    assert heights and all(0 <= y <= plots.HEIGHT for y in heights)
    assert "<svg" in plots.column_chart(list(range(len(values))), {"a": [abs(v or 0) for v in values]})


def test_ticks_are_round_and_cover():
    for low, high in ((0, 1), (0, 0.0063), (-3, 17), (0, 12345), (0.2, 0.21)):
        marks = plots.ticks(low, high)
        assert marks[0] <= low + 1e-9 and marks[-1] >= high - 1e-9 and 2 <= len(marks) <= 7
    assert plots.ticks(0, 1) == [0, 0.25, 0.5, 0.75, 1]


def test_moving_average_keeps_gaps():
    assert plots.moving_average([1.0, None, 3.0, 5.0], 3) == [1.0, None, 4.0, 4.0]


def test_reports_load_no_torch():
    code = "import sys, lingshu_rl.report, lingshu_rl.eval.stats; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


@pytest.mark.parametrize("unjudged", [("before", "after", "before_blank", "after_blank"), ("after",), ("before",), ("after_blank",)])  # fmt: skip
def test_answers_that_could_not_be_judged_leave_no_figure_and_no_error(run, unjudged):
    """A grader that gives nothing, before, after or both: summary line, report and watch come to their end."""
    from lingshu_rl.eval.stats import summarise
    from lingshu_rl.report.watch import watch
    from lingshu_rl.results import result_line

    for name in unjudged:
        path = run / "eval" / f"{name}.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        write_rows(path, [{**row, "value": None, "status": "error"} for row in rows])
    evals = {f.stem: [json.loads(line) for line in f.read_text().splitlines()] for f in (run / "eval").glob("*.jsonl")}
    summary = summarise(evals)
    line = result_line(summary)
    lost = {"before", "after"} & set(unjudged)
    assert ("gain unknown" in line) == bool(lost) and ("unknown ->" in line) == ("before" in unjudged)
    assert ("-> unknown" in line) == ("after" in unjudged)
    (run / "summary.json").write_text(json.dumps({**json.loads((run / "summary.json").read_text()), **summary}))
    text = Page(write_report(run)).text
    assert ("No held-out question could be judged both" in text) == bool(lost)
    assert ("come from looking" in text) == (not {"after", "after_blank"} & set(unjudged))
    assert watch(str(run), once=True) == 0


def test_a_run_without_evaluations_has_a_result_line():
    from lingshu_rl.results import result_line

    assert result_line({}) == "held-out accuracy unknown -> unknown, gain unknown: no question was judged both times"
