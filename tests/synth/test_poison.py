"""One record that a server cannot answer costs itself; a server that answers none stops the command. Costs are told at most."""

import json
import re

import pytest
from test_thoughts import corpus, read, synth
from writer_server import ScriptedWriter

from rewards.chat import MOST_IN_A_ROW

RIGHT = "<think>The image shows it clearly.</think><answer>yes</answer>"


def rows(folder, count):
    corpus(folder, 1)
    made = [{"id": f"r{n}", "images": ["i.png"], "question": f"Is it seen? (case {n})", "answer": "yes", "kind": "yesno", "caption": f"Case {n}."} for n in range(count)]  # fmt: skip
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    return folder / "in.jsonl"


def text_of(body):
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else content[-1]["text"]


def test_a_record_that_is_never_answered_is_dropped_and_the_others_go_on(tmp_path):
    poison = {"(case 0)", "(case 7)"}
    with ScriptedWriter(lambda body: 500 if any(p in text_of(body) for p in poison) else RIGHT) as server:
        assert (
            synth(
                "thoughts",
                rows(tmp_path, 9),
                "--out",
                tmp_path / "o.jsonl",
                "--url",
                server.url,
                "--model",
                "w",
                "--retries",
                1,
            )
            == 0
        )
    assert len(read(tmp_path / "o.jsonl")) == 7
    dropped = read(tmp_path / "o.dropped.jsonl")
    assert [(d["id"], d["reason"]) for d in dropped] == [("r0", "no answer"), ("r7", "no answer")]
    assert "HTTP 500" in dropped[0]["detail"] and "after 2 tries" in dropped[0]["detail"]


def test_a_server_that_answers_nobody_stops_the_command(tmp_path, capsys):
    with ScriptedWriter(lambda body: 500) as server:
        words = (
            "thoughts",
            rows(tmp_path, 3 * MOST_IN_A_ROW),
            "--out",
            tmp_path / "o.jsonl",
            "--url",
            server.url,
            "--model",
            "w",
        )
        assert synth(*words, "--retries", 0, "--concurrency", 2) == 1
    error = capsys.readouterr().err
    assert f"none to {MOST_IN_A_ROW} requests one after another" in error and not (tmp_path / "o.jsonl").exists()


def test_curation_drops_what_is_never_answered(tmp_path):
    from rewards.chat import Endpoint, EndpointError, RequestRefused

    with ScriptedWriter(lambda body: 500 if "bad" in text_of(body) else "fine") as server:
        endpoint = Endpoint(server.url, tmp_path / "a.sqlite", retries=0, concurrency=1)

        def asked(name):
            return endpoint.sample({"model": "w", "messages": [{"role": "user", "content": name}]}, 1, 0)

        found = dict(endpoint.each(["bad", "good", "bad too"], asked))
        assert isinstance(found["bad"], RequestRefused) and isinstance(found["bad too"], RequestRefused)
        assert found["good"][0].text == "fine"
        with pytest.raises(EndpointError, match="one after another"):
            list(endpoint.each([f"bad {n}" for n in range(MOST_IN_A_ROW)], asked))
        endpoint.close()


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (("thoughts", "--samples", "4"), "<think>It is not seen at all.</think><answer>no</answer>"),
        (("instruct", "--count", "3"), None),
        (("instruct", "--count", "2"), None),
    ],
)
def test_no_more_is_asked_than_the_estimate_says_at_most(tmp_path, capsys, words, answer):
    """The writer does what costs most: every sample is wrong, and more questions come than were asked for."""

    def answered(body):
        known = re.search(r"Case \d+\.", text_of(body))
        many = [{"question": f"Is it {n}? {known and known[0]}", "kind": "yesno", "answer": "yes"} for n in range(5)]
        return answer or (json.dumps(many) if text_of(body).startswith("Write") else RIGHT)

    with ScriptedWriter(answered) as server:
        step, *more = words
        synth(step, rows(tmp_path, 10), "--out", tmp_path / "o.jsonl", "--url", server.url, "--model", "w", *more)
    said = capsys.readouterr().out
    most = int(re.search(r"at most (\d+) requests", said)[1])
    assert len(server.bodies) == most == 10 * (4 if step == "thoughts" else 1 + int(more[1]))
    if step == "instruct":
        over = [d for d in read(tmp_path / "o.dropped.jsonl") if d["reason"] == "more questions than asked for"]
        assert len(over) == 10 * (5 - int(more[1]))
