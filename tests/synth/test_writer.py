"""The endpoint client: bounded, retried, resumable; and the command around it when it is killed."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_thoughts import corpus, read, scripted, synth
from writer_server import ScriptedWriter

from lingshu_rl.synth.writer import Estimator, Writer, WriterConfig
from rewards.chat import EndpointError, RequestRefused

ROOT = Path(__file__).resolve().parents[2]


def ask(config, texts, **options):
    async def all_of():
        async with Writer(config) as writer:
            replies = [writer.ask([{"role": "user", "content": t}], **options) for t in texts]
            return await asyncio.gather(*replies), writer

    return asyncio.run(all_of())


def test_no_more_requests_at_once_than_allowed_and_none_twice(tmp_path):
    def slow(body):
        time.sleep(0.02)
        return f"re: {body['messages'][-1]['content']}"

    with ScriptedWriter(slow) as server:
        config = WriterConfig(server.url, "w", tmp_path, concurrency=3)
        replies, writer = ask(config, [f"q{n}" for n in range(12)])
        assert [r.text for r in replies] == [f"re: q{n}" for n in range(12)]
        assert 1 < server.most_at_once <= 3
        assert writer.sent == 12
        again, writer = ask(config, [f"q{n}" for n in range(12)])
        assert [r.text for r in again] == [r.text for r in replies] and writer.sent == 0
        assert len(server.bodies) == 12
        _, writer = ask(config, ["q0"], seed=5)
        assert writer.sent == 1  # another seed is another question


def test_busy_servers_are_tried_again_refusals_are_not_and_a_wrong_key_stops(tmp_path):
    answers = {"busy": [429, 503, "fine"], "bad": [400], "key": [401]}

    def answer(body):
        return answers[body["messages"][-1]["content"]].pop(0)

    with ScriptedWriter(answer) as server:
        config = WriterConfig(server.url, "w", tmp_path, retries=3)
        (reply,), _ = ask(config, ["busy"])
        assert reply.text == "fine" and server.statuses == [429, 503, 200]
        with pytest.raises(RequestRefused, match="400"):
            ask(config, ["bad"])
        with pytest.raises(EndpointError, match="check the url"):
            ask(config, ["key"])


def test_a_dead_endpoint_is_named_after_the_tries(tmp_path):
    config = WriterConfig("http://127.0.0.1:9/v1", "w", tmp_path, retries=0)
    with pytest.raises(EndpointError, match="after 1 tries"):
        ask(config, ["q"])


def test_the_key_comes_from_the_environment_and_is_stored_nowhere(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "s3cret")
    with ScriptedWriter(lambda body: {"content": "a", "reasoning_content": "because"}) as server:
        (reply,), writer = ask(WriterConfig(server.url, "w", tmp_path, key_env="MY_KEY"), ["q"])
    assert reply.text == "<think>because</think>a"
    assert writer._http.headers["authorization"] == "Bearer s3cret"
    assert all("s3cret" not in p.read_text() for p in tmp_path.rglob("*.json"))


def test_the_estimate_counts_requests_tokens_and_money_and_asks_nothing(tmp_path, capsys):
    _, right, wrong = corpus(tmp_path, 10)
    with ScriptedWriter(scripted(right, wrong, ())) as server:
        args = ("thoughts", tmp_path / "rows.jsonl", "--out", tmp_path / "o.jsonl", "--url", server.url, "--model", "w",
                "--max-tokens", 100, "--price-in", 2, "--price-out", 10)  # fmt: skip
        assert synth(*args, "--estimate") == 0
        assert not server.bodies and not (tmp_path / "o.jsonl").exists()
        said = capsys.readouterr().out
        assert "10 requests" in said and "at most 1,000 out" in said and "at most 0.01" in said
        synth(*args, "--limit", 4)
        capsys.readouterr()
        synth(*args, "--estimate")
        assert "6 requests" in capsys.readouterr().out  # what is known already costs nothing
    estimator = Estimator(
        WriterConfig("http://x/v1", "w", tmp_path / "none", price_in=1.0, price_out=2.0, max_tokens=50)
    )
    image = (tmp_path / "i.png").read_bytes()
    asyncio.run(estimator.ask([{"role": "user", "content": "x" * 400}], images=[image]))
    assert estimator.tokens_in == 100 + 2 and estimator.tokens_out == 50  # 32 x 32 pixels: two image tokens
    assert estimator.cost == pytest.approx((102 * 1 + 50 * 2) / 1e6)


def test_killed_and_started_again_the_files_are_the_same(tmp_path):
    rows, right, wrong = corpus(tmp_path, 60)
    answer = scripted(right, wrong, {"r3", "r8"})

    def slow(body):
        time.sleep(0.03)
        return answer(body)

    def command(out):
        return [sys.executable, "-m", "lingshu_rl.cli", "synth", "thoughts", str(tmp_path / "rows.jsonl"), "--out", str(out),
                "--model", "w", "--concurrency", "2", "--url"]  # fmt: skip

    def files(folder):
        return {p.name: p.read_bytes() for p in folder.glob("out*.json*")}

    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with ScriptedWriter(slow) as server:
        process = subprocess.Popen([*command(tmp_path / "a" / "out.jsonl"), server.url], env=env, cwd=ROOT)
        while len(server.bodies) < 20:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "a" / "out.jsonl").exists()
        before = len(server.bodies)
        assert subprocess.run([*command(tmp_path / "a" / "out.jsonl"), server.url], env=env, cwd=ROOT).returncode == 0
        assert len(server.bodies) - before <= len(rows) - 17  # replies on disk were not asked for again
    with ScriptedWriter(answer) as server:
        assert subprocess.run([*command(tmp_path / "b" / "out.jsonl"), server.url], env=env, cwd=ROOT).returncode == 0
    a, b = files(tmp_path / "a"), files(tmp_path / "b")
    assert {k: v for k, v in a.items() if not k.endswith(".part")} == b and "out.jsonl" in b
    assert json.loads(b["out.summary.json"])["kept"] == len(read(tmp_path / "b" / "out.jsonl")) > 50
