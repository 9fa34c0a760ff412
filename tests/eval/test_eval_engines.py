"""The kit over real servers: a vLLM started for the model, a vLLM at a URL, and a vLLM as judge."""

import json
import os
import subprocess
import sys

import pytest
from eval_samples import SAMPLES
from launching import ROOT, TOKEN

pytestmark = pytest.mark.slow


def evaluate(*words, env=None):
    command = [sys.executable, "-m", "lingshu_rl.cli", "eval", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env={**(env or os.environ), "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def results(folder):
    return (folder / "slake_en" / "results.jsonl").read_text()


@pytest.mark.endurance
def test_a_server_started_here_and_one_at_a_url_give_the_same_answers(servers, tmp_path):
    SAMPLES["slake_en"](tmp_path, "slake_en")
    common = ["--benchmarks", "slake_en", "--data", str(tmp_path), "--max-tokens", "24", "--prompt", "short"]
    shown = evaluate("--model", "demo", *common, "--out", str(tmp_path / "local"), "--vllm", "max_model_len=512")
    assert "blank image" in shown and "majority" in shown and "tables, rows and provenance" in shown
    provenance = json.loads((tmp_path / "local" / "slake_en" / "provenance.json").read_text())["inputs"]
    assert len(provenance["model_hash"]) == 16 and provenance["engine"]["options"] == {"max_model_len": 512}
    assert provenance["engine"]["vllm"] and provenance["engine"]["torch"]
    first = results(tmp_path / "local")
    assert all(json.loads(line)["completion"] for line in first.splitlines())
    evaluate(
        "--model", "demo", *common, "--out", str(tmp_path / "local"), "--vllm", "max_model_len=512"
    )  # nothing left to ask: no server
    assert results(tmp_path / "local") == first
    env = {**os.environ, "LINGSHU_RL_API_KEY": TOKEN, "LINGSHU_RL_JUDGE_API_KEY": TOKEN}
    shown = evaluate("--model", servers.rollout, *common, "--controls", "none", "--out", str(tmp_path / "url"), "--judge", servers.rollout,
                     "--judge-price", "1,1", env=env)  # fmt: skip
    assert "judge: " in shown and "tokens in" in shown
    served = [json.loads(line) for line in results(tmp_path / "url").splitlines()]
    local = {json.loads(line)["id"]: json.loads(line) for line in first.splitlines() if json.loads(line)["condition"] == "main"}  # fmt: skip
    assert {r["id"]: r["value"] for r in served} == {i: r["value"] for i, r in local.items()}
    judged = [r["judge"] for r in served if r["kind"] == "open"]
    assert judged and all(j["value"] is None and j["text"] for j in judged)  # the tiny policy is no judge: not judged
