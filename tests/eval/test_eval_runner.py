"""One evaluation over a scripted engine: resuming, error rows, controls, provenance, tables, the command line."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from eval_samples import SAMPLES, chat_server, last_text, perfect, write_json

from lingshu_rl.cli import main
from lingshu_rl.eval.benchmarks import BENCHMARKS, EvalError
from lingshu_rl.eval.controls import majority, text_only
from lingshu_rl.eval.engines import FileEngine, Reply, kind_of, takes_images
from lingshu_rl.eval.journal import Journal
from lingshu_rl.eval.loading import load_benchmark
from lingshu_rl.eval.runner import Settings, run_evaluation
from lingshu_rl.progress import Progress
from rewards.chat import Unreachable

ROOT = Path(__file__).resolve().parents[2]


def settings_of(url, root, *names, **changes):
    for name in names:
        if not (root / (BENCHMARKS[name].folder or name)).exists():
            SAMPLES[name](root, name)
    made = Settings(url, tuple(BENCHMARKS[n] for n in names), root / "run", data=str(root), report_metrics="labels")
    return replace(made, **changes)


def run(settings):
    return asyncio.run(run_evaluation(settings, Progress(quiet=True)))


def images_in(body):
    content = body["messages"][-1]["content"]
    return [p["image_url"]["url"] for p in content if p["type"] == "image_url"] if isinstance(content, list) else []


def result_files(folder):
    return {f.relative_to(folder): f.read_bytes() for f in sorted(folder.rglob("*")) if f.name in ("results.jsonl", "scores.json", "table.md", "table.tex", "table.html")}  # fmt: skip


def test_a_run_asks_every_condition_and_scores_them_beside_each_other(tmp_path):
    seen = []

    def script(body):
        seen.append((last_text(body).split("\n")[0], images_in(body), body))
        # Looks at the image: right only with a real one.
        grey = not images_in(body) or "the-question-alone" in last_text(body)
        return "I cannot tell." if grey else "Yes"

    with chat_server(script) as url:
        summary = run(settings_of(url, tmp_path, "slake_en", max_tokens=33, seed=5))
    scores = summary["benchmarks"]["slake_en"]
    assert scores["n"] == 3 and set(scores["controls"]) == {"blank", "shuffled", "text_only", "majority"}
    assert all(isinstance(b["messages"][-1]["content"], str) == (not images) for _, images, b in seen)
    assert len(seen) == 3 * 4 and {b["max_tokens"] for _, _, b in seen} == {33} and {b["seed"] for _, _, b in seen} == {5}  # fmt: skip
    assert {b["model"] for _, _, b in seen} == {"scripted"} and all(b["temperature"] == 0 for _, _, b in seen)
    assert sum(not images for _, images, _ in seen) == 3  # text only
    assert scores["controls"]["text_only"]["unread"] == 1 and scores["controls"]["text_only"]["accuracy"] == 0
    assert set(scores["not_beaten"]) == {"blank", "shuffled", "majority", "text_only"}  # 3 questions prove nothing
    rows = [json.loads(line) for line in (tmp_path / "run" / "slake_en" / "results.jsonl").read_text().splitlines()]
    assert {r["condition"] for r in rows} == {"main", "blank", "shuffled", "text_only", "majority"}
    assert all({"id", "completion", "value", "status", "reason", "gold", "image"} <= set(r) for r in rows)
    assert "| slake_en | answer type | CLOSED | 2 |" in (tmp_path / "run" / "table.md").read_text()
    assert "†" in (tmp_path / "run" / "table.md").read_text() and "textdagger" in (tmp_path / "run" / "table.tex").read_text()  # fmt: skip
    assert scores["by"]["answer_type"]["CLOSED"]["n"] == 2 and scores["by"]["kind"]["yesno"]["accuracy"] == 1


def test_a_score_that_beats_its_controls_carries_no_mark(tmp_path):
    rows = [{"id": f"m{i}", "question": f"Case {i}?", "opa": "w", "opb": "x", "opc": "y", "opd": "z", "cop": i % 4 + 1} for i in range(60)]  # fmt: skip
    write_json(tmp_path / "medmcqa" / "dev.json", rows)
    found = load_benchmark(BENCHMARKS["medmcqa"], tmp_path)
    write_json(tmp_path / "o.jsonl", [{"id": p.id, "completion": perfect(p)} for p in found.prompts])
    scores = run(settings_of(str(tmp_path / "o.jsonl"), tmp_path, "medmcqa"))["benchmarks"]["medmcqa"]
    assert scores["controls"]["majority"]["accuracy"] == 0.25 and scores["not_beaten"] == []
    assert scores["controls"]["majority"]["above"]["points"] == 75


def test_an_engine_error_on_one_item_is_an_error_row(tmp_path):
    def script(body):
        if "What is the imaging modality" in last_text(body):
            return (400, b'{"error": "the prompt is too long"}')
        return "<answer>Yes</answer>"

    with chat_server(script) as url:
        scores = run(settings_of(url, tmp_path, "slake_en", controls=()))["benchmarks"]["slake_en"]
    assert scores["errors"] == 1 and scores["n"] == 2 and scores["not_judged"] == 1 and scores["accuracy"] == 0.5
    rows = [json.loads(line) for line in (tmp_path / "run" / "slake_en" / "results.jsonl").read_text().splitlines()]
    (bad,) = [r for r in rows if r["status"] == "engine_error"]
    assert bad["value"] is None and "HTTP 400" in bad["reason"] and "too long" in bad["reason"]
    with chat_server(lambda body: "<answer>MRI</answer>") as url:  # asked again only when told to
        same = settings_of(url, tmp_path, "slake_en", controls=())  # another port, the same model
        assert run(same)["benchmarks"]["slake_en"]["errors"] == 1
        again = run(replace(same, retry_errors=True))["benchmarks"]["slake_en"]
    assert again["errors"] == 0 and again["n"] == 3


def test_a_busy_server_is_asked_again(tmp_path):
    calls = []

    def script(body):
        calls.append(1)
        return (503, b"busy") if len(calls) < 3 else "yes"

    with chat_server(script) as url:
        scores = run(settings_of(url, tmp_path, "slake_en", controls=(), limit=1))["benchmarks"]["slake_en"]
    assert scores["errors"] == 0 and len(calls) == 3


def test_a_server_that_is_gone_stops_the_run_and_keeps_what_was_answered(tmp_path):
    with chat_server(lambda body: "yes") as url:
        pass
    rows = [{"id": f"m{i}", "question": f"Case {i}?", "opa": "w", "opb": "x", "opc": "y", "opd": "z", "cop": 1} for i in range(8)]  # fmt: skip
    write_json(tmp_path / "medmcqa" / "dev.json", rows)
    with pytest.raises(Unreachable, match="cannot be reached"):
        run(settings_of(url, tmp_path, "medmcqa", served_model="m"))
    assert not (tmp_path / "run" / "medmcqa" / "answers.jsonl").exists()  # no row is blamed for it
    with chat_server(lambda body: "<answer>A</answer>") as again:
        settings = settings_of(again, tmp_path, "medmcqa", served_model="m")
        assert run(settings)["benchmarks"]["medmcqa"]["accuracy"] == 1.0


def test_killed_at_any_item_and_started_again_it_gives_the_same_files(tmp_path):
    def script(body):
        return f"<answer>{'ABCD'[len(last_text(body)) % 4]}</answer>"

    with chat_server(script) as url:
        whole = settings_of(url, tmp_path, "medmcqa", "slake", out=tmp_path / "whole", concurrency=1, served_model="m", controls=("blank", "majority"))  # fmt: skip
        run(whole)
        wanted = result_files(tmp_path / "whole")
        assert len(wanted) == 7
        journal = (tmp_path / "whole" / "slake" / "answers.jsonl").read_bytes()
        lines = journal.splitlines(keepends=True)
        for kept, cut in (
            (0, b'{"condi'),
            (1, b""),
            (len(lines) // 2, b'{"condition": "main", "id": "12'),
            (len(lines), b""),
        ):
            part = tmp_path / f"part-{kept}"
            (part / "slake").mkdir(parents=True)
            (part / "slake" / "answers.jsonl").write_bytes(b"".join(lines[:kept]) + cut)
            run(replace(whole, out=part))
            assert result_files(part) == wanted, (kept, cut)


def test_the_command_killed_in_the_middle_goes_on_where_it_was(tmp_path):
    asked, gate, killed = [], threading.Event(), threading.Event()

    def script(body):
        asked.append(last_text(body))
        if len(asked) == 5:
            gate.set()
            killed.wait(120)
        return "<answer>A</answer>"

    SAMPLES["medqa_usmle"](tmp_path, "medqa_usmle")
    SAMPLES["medmcqa"](tmp_path, "medmcqa")
    with chat_server(script) as url:
        command = [sys.executable, "-m", "lingshu_rl.cli", "eval", "--model", url, "--benchmarks", "medqa_usmle,medmcqa", "--data", str(tmp_path),
                   "--out", str(tmp_path / "run"), "--concurrency", "1"]  # fmt: skip
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        assert gate.wait(120)
        process.send_signal(signal.SIGKILL)
        process.wait(30)
        before = len(asked)
        killed.set()
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(asked) - before == 8 - 4  # four answers were kept
    assert "medmcqa" in done.stdout and "majority" in done.stdout
    assert (tmp_path / "run" / "medmcqa" / "scores.json").exists()


def test_equal_provenance_gives_equal_results_and_another_setting_is_refused(tmp_path):
    with chat_server(lambda body: f"<answer>{'ABCD'[len(last_text(body)) % 4]}</answer>") as url:
        first = settings_of(url, tmp_path, "medmcqa", out=tmp_path / "a")
        run(first)
        run(replace(first, out=tmp_path / "b"))
        assert result_files(tmp_path / "a") == result_files(tmp_path / "b")
        assert (tmp_path / "a/medmcqa/provenance.json").read_text() == (tmp_path / "b/medmcqa/provenance.json").read_text()  # fmt: skip
        with pytest.raises(EvalError, match=r"another evaluation \(.*prompt: 'direct' -> 'think'.*another --out"):
            run(replace(first, prompt="think"))
        with pytest.raises(EvalError, match="seed: 0 -> 4"):
            run(replace(first, seed=4))
        rows = json.loads((tmp_path / "medmcqa" / "dev.json").read_text().splitlines()[0])
        write_json(tmp_path / "medmcqa" / "dev.json", [{**rows, "question": "Another question?"}])
        with pytest.raises(EvalError, match="data_hash"):
            run(first)
    provenance = json.loads((tmp_path / "a" / "medmcqa" / "provenance.json").read_text())
    assert set(provenance) >= {"inputs", "grader", "commit", "versions", "judge", "controls"}
    assert set(provenance["inputs"]) >= {"model", "model_hash", "prompt_hash", "data_hash", "seed", "engine", "temperature", "max_tokens"}  # fmt: skip
    assert provenance["versions"]["python"] and provenance["versions"]["numpy"] and len(provenance["grader"]) == 16


def test_a_local_models_hash_follows_its_weights(tmp_path):
    from lingshu_rl.eval.provenance import differences, model_hash

    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"one")
    first = model_hash(str(tmp_path))
    (tmp_path / "notes.md").write_text("not part of the model")
    assert model_hash(str(tmp_path)) == first and len(model_hash("demo")) == 16
    with pytest.raises(EvalError, match="no model folder and cannot be fetched"):
        model_hash("nobody/nothing")
    (tmp_path / "model.safetensors").write_bytes(b"two")
    assert model_hash(str(tmp_path)) != first
    assert differences({"a": {"b": 1}, "c": 2}, {"a": {"b": 3}, "c": 2}) == ["a.b: 1 -> 3"]


def test_outputs_of_a_file_and_what_it_lacks(tmp_path):
    SAMPLES["slake_en"](tmp_path, "slake_en")
    file = tmp_path / "o.jsonl"
    write_json(file, [{"id": "12000", "completion": "yes"}, {"id": "12001", "output": "CT"}, {"id": "12000", "completion": "no", "condition": "blank"}])  # fmt: skip
    scores = run(settings_of(str(file), tmp_path, "slake_en", controls=("blank",)))["benchmarks"]["slake_en"]
    assert scores["n"] == 2 and scores["errors"] == 1 and scores["controls"]["blank"]["n"] == 1
    write_json(file, [{"id": "a"}])
    with pytest.raises(EvalError, match=r"o\.jsonl, line 1"):
        FileEngine(file)
    write_json(file, [{"id": "a", "output": "x"}, {"id": "a", "output": "y"}])
    with pytest.raises(EvalError, match="line 2: id 'a' has an output already"):
        FileEngine(file)


def test_a_text_model_is_not_asked_about_images_it_cannot_take(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(EvalError, match="no model folder and cannot be fetched"):
        takes_images("nobody/nothing")
    assert takes_images("demo") and not takes_images(str(tmp_path / "text"))
    with pytest.raises(EvalError, match=r"takes no images, but slake_en has them.*--no-images"):
        run(settings_of(str(tmp_path / "text"), tmp_path, "slake_en"))


def test_kinds_of_models():
    assert [kind_of(m) for m in ("http://a/v1", "https://b", "out.jsonl", "demo", "org/model")] == ["url", "url", "file", "local", "local"]  # fmt: skip


def test_majority_is_the_best_constant_answer_of_a_kind(tmp_path):
    SAMPLES["vqa_rad"](tmp_path, "vqa_rad")
    prompts = load_benchmark(BENCHMARKS["vqa_rad"], tmp_path).prompts
    answers = dict(zip([p.id for p in prompts], majority(prompts), strict=True))
    assert {answers[p.id] for p in prompts if p.kind == "yesno"} == {"<answer>no</answer>"}
    assert len({answers[p.id] for p in prompts if p.kind == "open"}) == 1
    bare = text_only(prompts)
    assert not any(p.images for p in bare) and [p.text for p in bare] == [p.text for p in prompts]


def test_a_journal_drops_a_cut_line_and_forgets_errors_when_told(tmp_path):
    path = tmp_path / "j.jsonl"
    journal = Journal(path)
    journal.add("main", "a", Reply("\ud800 odd \u2028 text", "stop"))
    journal.add("main", "b", Reply(error="HTTP 500"))
    path.write_text(path.read_text() + '{"condition": "main", "id": "c", "te')
    again = Journal(path)
    assert again.get("main", "a").text == "\ud800 odd \u2028 text" and again.get("main", "b").error and not again.get("main", "c")  # fmt: skip
    assert path.read_text().endswith("\n") and len(path.read_text().splitlines()) == 2
    assert Journal(path, retry_errors=True).get("main", "b") is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "demo"], "give --model and --benchmarks"),
        (["--model", "demo", "--benchmarks", "slak"], "did you mean 'slake'"),
        (["--model", "o.jsonl", "--benchmarks", "slake", "--controls", "blnk"], "unknown control 'blnk'"),
        (["--model", "o.jsonl", "--benchmarks", "slake"], "no such file of outputs"),
        (["--model", "http://x", "--benchmarks", "slake", "--vllm", "a=1"], "served elsewhere"),
        (["--model", "demo", "--benchmarks", "slake", "--vllm", "a"], "not of the form key=value"),
        (["--model", "o.jsonl", "--benchmarks", "healthbench"], "give --judge URL"),
        (["--model", "demo", "--benchmarks", "slake", "--report-metrics", "rouge"], "unknown report metric 'rouge'"),
        (["--model", "demo", "--benchmarks", "slake", "--judge", "http://x", "--judge-price", "1"], "give two numbers"),
    ],
)
def test_wrong_words_are_answered_in_a_line(words, message, capsys):
    assert main(["eval", *words]) == 2
    assert message in capsys.readouterr().err


def test_the_table_of_benchmarks_is_shown(capsys):
    assert main(["eval", "--list"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in BENCHMARKS) and "not tried on its own data" in shown


def test_the_command_writes_tables_and_says_what_was_left_out(tmp_path, capsys):
    SAMPLES["medcalc"](tmp_path, "medcalc")
    found = load_benchmark(BENCHMARKS["medcalc"], tmp_path)
    write_json(tmp_path / "o.jsonl", [{"id": p.id, "completion": perfect(p)} for p in found.prompts])
    words = ["eval", "--model", str(tmp_path / "o.jsonl"), "--benchmarks", "medcalc", "--data", str(tmp_path), "--out", str(tmp_path / "run"), "--limit", "5"]  # fmt: skip
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "medcalc: 1 rows left out, the first: row 7 (id 7): its answer is not published" in shown and "the published set has 1047" in shown  # fmt: skip
    assert "100.0" in shown and "a sample of 5 questions" in shown
    assert "<table>" in (tmp_path / "run" / "table.html").read_text()
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["benchmarks"]["medcalc"]["accuracy"] == 1.0


def test_the_kit_loads_no_torch_until_it_runs():
    code = "import sys; import lingshu_rl.cli as c; c.main(['eval', '--list']); assert 'torch' not in sys.modules and 'transformers' not in sys.modules"  # fmt: skip
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL)  # fmt: skip
