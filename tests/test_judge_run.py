"""A run that serves its own judge: a real small model through vLLM, tried, asked, and its words kept."""

import json

import pytest
from launching import launch
from short_runs import metrics_of

pytestmark = pytest.mark.slow

# A model that never saw such a prompt keeps the form when the server holds it to it.
FORM = {"choice": ['{"same": true}', '{"same": false}']}


def test_a_run_serves_its_own_judge(servers, tmp_path):
    import pyarrow.parquet as pq

    args = {"body": {"structured_outputs": FORM}, "max_tokens": 24, "cache": str(tmp_path / "judge.sqlite")}
    rows = {"path": "demo:train", "where": "kind in [numeric, report]"}
    done = launch(
        [
            f"run.dir={tmp_path / 'run'}",
            *servers.settings[:1],
            f"data.train={json.dumps(rows)}",
            f"data.test={json.dumps({**rows, 'path': 'demo:test'})}",
            "loss.kl_coef=0",
            "train.steps=1",
            "train.prompts_per_step=2",
            "train.group_size=4",
            "eval.limit=4",
            "eval.controls=[]",
            "judge.model=demo",
            "judge.vllm={max_model_len: 1024}",
            "judge.probe_rows=2",
            "judge.max_false_pay=1",
            "judge.max_false_refusal=1",
            f"rewards.spec={json.dumps({'class': 'JudgeReward', 'args': args})}",
        ],
        env=servers.env,
    )
    assert done.returncode == 0, done.stdout
    assert "judge server 0 is ready" in done.stdout and "its trial" in done.stdout
    trial = json.loads((tmp_path / "run" / "judge.json").read_text())["judges"][0]
    assert trial["judge"] == "judge (open-1) of demo at this run" and trial["rates"]["right"]["judged"] == 6
    [metrics] = metrics_of(tmp_path / "run")
    assert metrics["judge/requests"] > 20 and metrics["judge/cost"] == 0
    verdicts = pq.read_table(tmp_path / "run" / "rollouts" / "step-000001.parquet")["verdict"].to_pylist()
    assert any(json.loads(text).keys() == {"same"} for text in verdicts if text)
    assert "Can the judge be trusted?" in (tmp_path / "run" / "report.html").read_text()
