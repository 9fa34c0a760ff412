"""Chains of thought: the verifier, not the writer, decides what is kept."""

import asyncio
import json
import random
import re
from pathlib import Path

import pytest
from PIL import Image
from writer_server import ScriptedWriter, images_of, text_of

from lingshu_rl.cli import main
from lingshu_rl.data.load import load
from lingshu_rl.synth.rows import Dropped, Kept, as_prompt
from lingshu_rl.synth.thoughts import Thoughts, chain_of
from lingshu_rl.synth.verify import Verifier
from lingshu_rl.synth.writer import Reply

PLACES = ("liver", "spleen", "left kidney", "right kidney", "pancreas", "stomach", "gallbladder", "aorta")
CHAINS = (
    "The lesion lies beside the {x}. Its border is smooth and the fat around it is clear.",
    "First I look at the contrast. Then I compare both sides. The {x} stands out against the rest.",
    "The image shows a bright area. It might be fat, but the shape speaks for the {x}. So that is what I would say.",
    "1. Orientation: standard.\n2. Finding: near the {x}.\n3. Nothing else is seen.",
    "Wait, let me check again: the {x}? Yes, the signal fits and the position is typical.",
)
FORMS = (
    "<think>{think}</think><answer>{a}</answer>",
    "<think>{think}</think>\n<answer> {a} </answer>",
    "<think>{think}</think>\n\nThe answer is {a}.",
    "<think>{think}</think>\n**Answer:** {a}",
    "<think>{think}</think>\n**Final answer: {a}**",
    "{think}\n\nAnswer: {a}",
    "{think}\nTherefore, the correct answer is {a}.",
    "{think}\n\n\\boxed{{{a}}}",
    '<think>{think}</think>{{"answer": "{a}"}}',
)


def corpus(folder, count, seed=0):
    """Rows of four kinds, and for each row id the text of its right and of a wrong answer."""
    rng = random.Random(seed)
    Image.new("L", (32, 32), 90).save(folder / "i.png")
    rows, right, wrong = [], {}, {}
    for n in range(count):
        row = {"id": f"r{n}", "images": ["i.png"], "meta": {"modality": "CT"}}
        kind = ("option", "yesno", "numeric", "open")[n % 4]
        place, *others = rng.sample(PLACES, 4)
        if kind == "option":
            options = rng.sample([place, *others], 4)
            letter, bad = "ABCD"[options.index(place)], "ABCD"[options.index(others[0])]
            row |= {"question": f"Q{n}: where does the lesion lie?", "options": options, "answer": letter}
            style = rng.randrange(3)
            right[row["id"]] = (letter, f"{letter}. {place}", f"({letter}) {place}")[style]
            wrong[row["id"]] = (bad, f"{bad}. {others[0]}", f"({bad}) {others[0]}")[style]
        elif kind == "yesno":
            answer = rng.choice(("yes", "no"))
            row |= {"question": f"Q{n}: is the {place} enlarged?", "answer": answer}
            right[row["id"]], wrong[row["id"]] = answer.title(), {"yes": "No", "no": "Yes"}[answer]
        elif kind == "numeric":
            mm = rng.randint(12, 90)
            row |= {"question": f"Q{n}: how wide is the {place}?", "answer": f"{mm} mm", "unit": "mm", "tolerance": {"abs": 1}}  # fmt: skip
            right[row["id"]] = rng.choice((f"{mm} mm", f"{mm / 10} cm", f"{mm}.0 mm"))
            wrong[row["id"]] = rng.choice((f"{mm + 5} mm", f"{mm} cm", f"{mm - 4} mm"))
        else:
            row |= {"question": f"Q{n}: which organ is marked?", "answer": place}
            right[row["id"]], wrong[row["id"]] = rng.choice((place, f"the {place}", place.title())), others[0]
        rows.append({**row, "kind": kind})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows, right, wrong


def scripted(right, wrong, bad_ids, seed=1):
    """Replies to each question in one of many forms; the ids in `bad_ids` get the wrong answer, argued as well."""

    def answer(body):
        name = "r" + re.match(r"Q(\d+):", text_of(body)).group(1)
        rng = random.Random(f"{seed}/{name}/{body['seed']}")
        said = (wrong if name in bad_ids else right)[name]
        return rng.choice(FORMS).format(think=rng.choice(CHAINS).format(x=rng.choice(PLACES)), a=said)

    return answer


def synth(*arguments):
    return main(["synth", *map(str, arguments)])


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_of_five_per_cent_planted_wrong_answers_the_verifier_removes_nearly_all_and_hardly_a_right_one(tmp_path):
    rows, right, wrong = corpus(tmp_path, 1200)
    bad = set(random.Random(2).sample([row["id"] for row in rows], 60))
    with ScriptedWriter(scripted(right, wrong, bad)) as server:
        code = synth(
            "thoughts", tmp_path / "rows.jsonl", "--out", tmp_path / "out.jsonl", "--url", server.url, "--model", "w"
        )
    assert code == 0
    kept = {row["id"] for row in read(tmp_path / "out.jsonl")}
    removed_bad, removed_right = len(bad - kept) / len(bad), 1 - len(kept - bad) / (len(rows) - len(bad))
    print(f"removed {removed_bad:.1%} of the wrong, {removed_right:.2%} of the right answers")
    assert removed_bad >= 0.95
    assert removed_right < 0.02
    dropped = read(tmp_path / "out.dropped.jsonl")
    assert len(kept) + len(dropped) == len(rows)
    assert all(d["reason"] and d["row"]["meta"]["synth"]["verdict"]["kept"] is False for d in dropped)
    usable = load(tmp_path / "out.jsonl")
    assert len(usable.prompts) == len(kept) and not usable.refused
    for row in read(tmp_path / "out.jsonl"):
        synth_meta = row["meta"]["synth"]
        assert synth_meta["verdict"]["value"] == 1.0 and synth_meta["from"] == row["id"] and synth_meta["request"]
        assert len(row["meta"]["think"].split()) >= 3 and row["meta"]["modality"] == "CT"


def test_the_writer_sees_question_options_and_image_but_not_the_label(tmp_path):
    _, right, wrong = corpus(tmp_path, 4)
    with ScriptedWriter(scripted(right, wrong, ())) as server:
        synth("thoughts", tmp_path / "rows.jsonl", "--out", tmp_path / "o.jsonl", "--url", server.url, "--model", "w", "--limit", 1)  # fmt: skip
    (body,) = server.bodies
    row = read(tmp_path / "rows.jsonl")[0]
    text = text_of(body)
    assert row["question"] in text and all(option in text for option in row["options"])
    assert images_of(body)[0].startswith("data:image/png;base64,")
    assert text == as_prompt({**row, "answer": "ABCD".replace(row["answer"], "")[0]}).text  # the same for another label


def decide(kind, answer, reply, options=(), finish="stop"):
    row = {"id": "a", "images": [], "question": "Which?", "kind": kind, "answer": answer}
    row |= {"options": list(options)} if options else {}
    step = Thoughts(Verifier())
    return step.decide(row, as_prompt(row), Reply(reply, finish, "key"), 0)


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ("<think>It is dark and round.</think><answer>B</answer>", "wrong answer"),
        ("<answer>A</answer>", "no chain of thought"),
        ("<think>It is dark and round. So the answer is B.</think><answer>A</answer>", "chain concludes otherwise"),
        ("<think>It is dark and round", "answer unparsed"),
        ("<think>It is dark and round.</think><answer>A</answer><answer>B</answer>", "answer conflict"),
    ],
)
def test_what_is_dropped_says_why(reply, reason):
    outcome = decide("option", "A", reply, ("CT", "MRI"))
    assert isinstance(outcome, Dropped) and outcome.reason == reason


def test_a_reply_cut_at_the_limit_is_dropped_and_an_arguing_chain_is_not():
    assert isinstance(decide("open", "liver", "It is dark. Answer: liver", finish="length"), Dropped)
    text = "<think>The answer is not B, because the table is square.</think><answer>A</answer>"
    assert isinstance(decide("option", "A", text, ("CT", "MRI")), Kept)


def test_reasoning_returned_apart_is_the_chain():
    assert chain_of("<think>dark and round</think>The answer is A.") == "dark and round"
    assert chain_of("It is dark and round.\nThe answer is A.") == "It is dark and round."


def test_more_samples_rescue_a_row_and_a_bad_label_is_named(tmp_path):
    rows, right, wrong = corpus(tmp_path, 8)

    def answer(body):
        return scripted(right, wrong, {r["id"] for r in rows} if body["seed"] == 0 else ())(body)

    with ScriptedWriter(answer) as server:
        args = ("thoughts", tmp_path / "rows.jsonl", "--url", server.url, "--model", "w", "--cache", tmp_path / "cache")
        assert synth(*args, "--out", tmp_path / "one.jsonl") == 1  # nothing kept
        assert synth(*args, "--out", tmp_path / "two.jsonl", "--samples", 2) == 0
    assert len(server.bodies) == 16  # the first samples were not asked again
    assert {row["meta"]["synth"]["sample"] for row in read(tmp_path / "two.jsonl")} == {1}

    class NoWriter:
        async def ask(self, *_, **__):
            raise AssertionError("a row whose label cannot be judged costs no request")

    bad = {"id": "x", "images": [], "question": "How wide?", "kind": "numeric", "answer": "rather wide"}
    (outcome,) = asyncio.run(Thoughts(Verifier())(bad, NoWriter()))
    assert outcome.reason in ("label cannot be judged", "not a usable row")
