"""Steps that ask a model, against a scripted server that also errs: nothing is asked twice, no failure counts as an answer."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from curate_helpers import png, question, texture

from lingshu_rl.cli import main
from lingshu_rl.curate.rewrite import unsafe_parts
from rewards.chat import MOST_IN_A_ROW, Endpoint, EndpointError, RequestRefused, Unanswered


class Scripted:
    """answer: request body -> texts of the choices, or an HTTP status. log: every request's body."""

    def __init__(self) -> None:
        self.answer: Callable[[dict[str, Any]], list[Any] | int] = lambda body: ["ok"] * body.get("n", 1)
        self.log: list[dict[str, Any]] = []
        script = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                script.log.append(body)
                answer = script.answer(body)
                status = answer if isinstance(answer, int) else 200
                choices = [] if isinstance(answer, int) else [c if isinstance(c, dict) else {"message": {"content": c}, "finish_reason": "stop"} for c in answer]  # fmt: skip
                data = json.dumps({"choices": choices}).encode() if status == 200 else b"no"
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Scripted]:
    monkeypatch.setattr("rewards.chat.LONGEST_WAIT_S", 0.0)
    server = Scripted()
    yield server
    server.server.shutdown()
    server.server.server_close()


# --- the endpoint -----------------------------------------------------------------------------------------------------


def test_answers_are_kept_and_missing_choices_asked_for(scripted: Scripted, tmp_path: Path) -> None:
    scripted.answer = lambda body: [f"seed {body['seed']}"] * min(2, body["n"])  # a server that gives two at a time
    endpoint = Endpoint(scripted.url, tmp_path / "a.sqlite")
    first = [a.text for a in endpoint.sample({"model": "m", "messages": []}, 5, 10)]
    assert first == ["seed 10", "seed 10", "seed 12", "seed 12", "seed 14"]
    endpoint.close()
    again = Endpoint(scripted.url, tmp_path / "a.sqlite")
    assert [a.text for a in again.sample({"model": "m", "messages": []}, 5, 10)] == first
    assert (len(scripted.log), again.sent, again.from_cache) == (3, 0, 1)
    again.sample({"model": "other", "messages": []}, 1, 10)
    assert again.sent == 1


def test_a_busy_server_is_asked_again_a_refusal_is_not(scripted: Scripted, tmp_path: Path) -> None:
    statuses = iter([503, 429])
    scripted.answer = lambda body: next(statuses, ["ok"])  # type: ignore[arg-type]
    endpoint = Endpoint(scripted.url, tmp_path / "a.sqlite")
    assert endpoint.sample({"model": "m"}, 1, 0)[0].text == "ok" and len(scripted.log) == 3
    scripted.answer = lambda body: 400
    with pytest.raises(RequestRefused):
        endpoint.sample({"model": "m"}, 1, 1)
    assert len(scripted.log) == 4
    scripted.answer = lambda body: 500
    with pytest.raises(Unanswered, match="5 tries"):  # which costs this record alone
        endpoint.sample({"model": "m"}, 1, 2)
    scripted.answer = lambda body: 401
    with pytest.raises(EndpointError, match="key"):
        endpoint.sample({"model": "m"}, 1, 3)
    with pytest.raises(EndpointError, match="address"):
        Endpoint("localhost", tmp_path / "b.sqlite")


def test_reasoning_is_put_into_a_think_block_and_the_key_is_sent(
    scripted: Scripted, tmp_path: Path, monkeypatch
) -> None:
    scripted.answer = lambda body: [
        {"message": {"content": "B", "reasoning_content": "why"}, "finish_reason": "length"}
    ]
    monkeypatch.setenv("MY_KEY", "secret")
    endpoint = Endpoint(scripted.url, tmp_path / "a.sqlite", key_env="MY_KEY")
    (answer,) = endpoint.sample({"model": "m"}, 1, 0)
    assert (answer.text, answer.truncated) == ("<think>why</think>B", True)
    assert endpoint.http.headers["Authorization"] == "Bearer secret"


# --- rewriting --------------------------------------------------------------------------------------------------------

VOICE = "Hi, I am Dr. Smith. You have pneumonia. Take amoxicillin 500 mg thrice daily."
NEUTRAL = (
    "Cough with fever may suggest an infection of the lung. Antibiotics are commonly considered; a clinician decides."
)


@pytest.mark.parametrize(
    ("text", "faults"),
    [
        (VOICE, {"identity", "diagnosis", "prescription"}),
        ("As a cardiologist I can say it is fine. I am a senior cardiologist.", {"identity"}),
        ("I would recommend bed rest.", {"prescription"}),
        ("This is definitely appendicitis.", {"diagnosis"}),
        ("Please take Tab. Crocin for the fever.", {"prescription"}),
        ("Greetings from Dr. Smith, who cares.", {"identity"}),
        (NEUTRAL, set()),
        ("A dr may prefer rest.", set()),
        ("If you have any questions, see a clinician. You have to rest.", set()),
        ("The usual adult dose is between 250 and 500 mg, which a clinician sets.", set()),
        ("", set()),
    ],
)
def test_rules_name_what_an_answer_must_not_say(text: str, faults: set[str]) -> None:
    assert set(unsafe_parts(text)) == faults


def rows_to_rewrite() -> list[dict[str, Any]]:
    return [question(i, id=name, question=f"What about {name}?", answer=VOICE) for i, name in enumerate(("good", "still", "empty", "refused", "long"))] + [
        question(8, id="safe", question="What about safe?", answer=NEUTRAL),
        question(9, id="closed", kind="yesno", answer="yes"),
    ]  # fmt: skip


def writer(body: dict[str, Any]) -> list[Any] | int:
    asked = body["messages"][1]["content"]
    if "refused" in asked:
        return 400
    if "long" in asked:
        return [{"message": {"content": NEUTRAL[:20]}, "finish_reason": "length"}]
    return [
        "" if "empty" in asked else VOICE if "still" in asked else f"<think>let me see, I am Dr. X</think>{NEUTRAL}"
    ]


def test_rewriting_keeps_only_what_passes_the_rules(curate, scripted: Scripted) -> None:
    scripted.answer = writer
    step = {"rewrite": {"url": scripted.url, "model": "w", "only_unsafe": True}}
    run = curate(rows_to_rewrite(), [step])
    assert run.dropped("rewrite") == {
        "still": "rewrite_unsafe",
        "empty": "writer_failed",
        "refused": "writer_failed",
        "long": "writer_failed",
    }
    rows = {row["id"]: row for row in run.rows()}
    assert rows["s:good"]["answer"] == NEUTRAL and rows["s:good"]["meta"]["original_answer"] == VOICE
    assert rows["s:safe"]["answer"] == NEUTRAL and "original_answer" not in rows["s:safe"]["meta"]
    assert run.notes("rewrite")["rows_rewritten"] == 1 and len(scripted.log) == 5
    every = curate(rows_to_rewrite(), [{"rewrite": {**step["rewrite"], "only_unsafe": False, "kinds": ["open"]}}])
    assert every.notes("rewrite")["rows_rewritten"] == 2
    assert len(scripted.log) == 5 + 1 + 1  # the safe row, and the refusal, which is not kept


def test_a_record_that_no_server_answers_is_dropped_and_a_server_that_dies_stops_the_step(
    curate, scripted: Scripted, tmp_path: Path, capsys
) -> None:
    scripted.answer = lambda body: 500 if "still" in body["messages"][1]["content"] else writer(body)
    step = {"rewrite": {"url": scripted.url, "model": "w", "concurrency": 1}}
    assert curate(rows_to_rewrite(), [step]).dropped("rewrite")["still"] == "writer_failed"
    done = len(scripted.log)
    scripted.answer = writer
    assert curate(rows_to_rewrite(), [step]).dropped("rewrite")["still"] == "rewrite_unsafe"  # asked again
    good = [body for body in scripted.log[done:] if "about good" in body["messages"][1]["content"]]
    assert good == []  # kept
    many = [question(n, id=f"m{n}", question=f"What about case {n}?", answer=VOICE) for n in range(MOST_IN_A_ROW + 2)]
    scripted.answer = lambda body: 500
    with pytest.raises(EndpointError, match="goes on later"):
        curate(many, [step])
    import yaml

    (tmp_path / "p.yaml").write_text(yaml.safe_dump({"out": str(tmp_path / "o"), "sources": [{"path": str(tmp_path / "in" / "s.jsonl")}], "steps": [{"rewrite": {"url": scripted.url, "model": "v"}}]}))  # fmt: skip
    scripted.answer = lambda body: 500
    assert main(["curate", str(tmp_path / "p.yaml")]) == 1
    assert "curation stopped" in capsys.readouterr().err


# --- difficulty -------------------------------------------------------------------------------------------------------


def policy(body: dict[str, Any]) -> list[Any] | int:
    """Answers "passes N" questions right N times of n."""
    text = body["messages"][0]["content"][-1]["text"]
    n = int(text.split("passes ")[1].split()[0])
    return [f"<think>so</think><answer>{'yes' if i < n else 'no'}</answer>" for i in range(body["n"])]


def test_pass_rates_are_stored_and_the_extremes_dropped(curate, scripted: Scripted, tmp_path: Path) -> None:
    scripted.answer = policy
    picture = tmp_path / "p.png"
    picture.write_bytes(png(texture(1)))
    rows = [
        question(
            i, id=f"n{i}", kind="yesno", answer="yes", images=[str(picture)], question=f"Is it so, passes {i} times?"
        )
        for i in range(5)
    ]
    rows.append(question(9, id="bad label", kind="report", answer="unknown", question="passes 1 time?"))
    step = {"difficulty": {"url": scripted.url, "model": "policy", "k": 4}}
    run = curate(rows, [step])
    assert run.dropped("difficulty") == {"n0": "too_hard", "n4": "too_easy", "bad label": "label_invalid"}
    assert [row["meta"]["pass_rate"] for row in run.rows()] == [0.25, 0.5, 0.75]
    assert all(row["meta"]["rollouts"] == 4 and row["meta"]["pass_rate_policy"] == "policy" for row in run.rows())
    assert all(body["n"] == 4 and body["messages"][0]["content"][0]["type"] == "image_url" for body in scripted.log)
    assert "<answer>" in scripted.log[0]["messages"][0]["content"][-1]["text"]
    asked = len(scripted.log)
    wider = curate(rows, [{"difficulty": {**step["difficulty"], "keep": [2, 4]}}])
    assert wider.dropped("difficulty")["n1"] == "too_hard" and [row["id"] for row in wider.rows()] == [
        "s:n2",
        "s:n3",
        "s:n4",
    ]
    assert len(scripted.log) == asked  # another limit, the same rollouts
    own = {"class": "OptionLetter"}
    assert set(
        curate(rows, [{"difficulty": {**step["difficulty"], "rewards": own}}]).dropped("difficulty").values()
    ) == {"label_invalid"}


def test_a_picture_that_cannot_be_read_costs_its_row_alone(curate, scripted: Scripted, tmp_path: Path) -> None:
    scripted.answer = lambda body: ["<answer>yes</answer>", "<answer>no</answer>"]
    (tmp_path / "good.png").write_bytes(png(texture(1)))
    (tmp_path / "cut.png").write_bytes(png(texture(1))[:200])
    rows = [
        question(0, id=name, images=[str(tmp_path / f"{name}.png")], question="Is it?", answer="yes", kind="yesno")
        for name in ("cut", "good", "gone")
    ]
    run = curate(rows, [{"difficulty": {"url": scripted.url, "model": "policy", "k": 2}}])
    assert list(run.dropped("read").values()) == ["missing_image"]
    assert run.dropped("difficulty") == {"cut": "unreadable_image"} and run.ids() == ["good"]


def test_rollouts_that_cannot_be_judged_count_as_neither(curate, scripted: Scripted) -> None:
    from lingshu_rl.curate.difficulty import Difficulty
    from lingshu_rl.curate.items import Context, Dropped, Item

    step = Difficulty(url="http://x", model="m", k=4)
    item = Item({"id": "a", "kind": "open"}, "s", "line 1")

    def judged(*values: float | None) -> Any:
        return step.judge(item, list(values), Context(None, Path(), Path(), 0, None, {}))  # type: ignore[arg-type]

    assert judged(1.0, None, 0.0, None).row["meta"] == {"pass_rate": 0.5, "rollouts": 2, "pass_rate_policy": "m"}
    assert judged(1.0, None, 1.0, 1.0).reason == "too_easy"
    assert judged(0.0, None, None, None).reason == "too_hard"
    failed = judged(None, None, None, None)
    assert isinstance(failed, Dropped) and failed.reason == "unjudged"
    assert judged(0.4, 0.6, 0.0, 0.0).row["meta"]["pass_rate"] == 0.25


@pytest.mark.parametrize("settings", [{"k": 1}, {"keep": [1]}, {"keep": [3, 2]}, {"keep": [0, 9]}, {"url": ""}])
def test_impossible_difficulty_settings_are_refused(curate, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="difficulty"):
        curate([question(1)], [{"difficulty": {"url": "http://x/v1", "model": "m", **settings}}])


@pytest.mark.endurance
def test_pass_rates_of_the_demo_policy_from_a_real_vllm_server(
    curate, servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lingshu_rl.demo.build import build_demo
    from lingshu_rl.demo.reward import demo_spec
    from lingshu_rl.processes.token import TOKEN_ENV

    monkeypatch.setenv("VLLM_TOKEN", servers.env[TOKEN_ENV])
    folder = build_demo()
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()[:40]]
    rows = [{**row, "images": [str(folder / image) for image in row["images"]]} for row in rows]
    settings = {"url": f"{servers.rollout}/v1", "model": "policy", "k": 4, "max_tokens": 40, "instruction": "short", "key_env": "VLLM_TOKEN",
                "rewards": dict(demo_spec())}  # fmt: skip
    run = curate(rows, [{"difficulty": settings}])
    rates = [row["meta"]["pass_rate"] for row in run.rows()]
    assert rates and all(0 < rate < 1 for rate in rates)
    assert (
        set(run.dropped("difficulty").values()) <= {"too_easy", "too_hard"}
        and len(rates) + len(run.dropped("difficulty")) == 40
    )
