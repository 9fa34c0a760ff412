"""Every entry of the table loads rows of its publisher's format, pays perfect answers in full and empty ones nothing."""

import asyncio
import json
from dataclasses import replace

import pytest
from eval_samples import COUNTS, SAMPLES, chat_server, perfect, write_json, write_parquet

from lingshu_rl.data.sources import presets
from lingshu_rl.eval.benchmarks import BENCHMARKS, EvalError, choose, instruction_named, prompt_hash
from lingshu_rl.eval.controls import CONTROLS
from lingshu_rl.eval.judge import JudgeSettings
from lingshu_rl.eval.loading import _records, is_held_out, load_benchmark
from lingshu_rl.eval.runner import Settings, run_evaluation
from lingshu_rl.progress import Progress
from rewards.kinds import KINDS


def loaded(name, root, **options):
    SAMPLES[name](root, name)
    return load_benchmark(BENCHMARKS[name], root, **options)


def judge_script(body):
    """Meets every criterion that is good in replies that begin with GOOD, and none in others."""
    text = body["messages"][-1]["content"]
    return json.dumps({"met": "GOOD" in text and "Criterion: <<<Invents" not in text, "same": False})


def evaluate(name, root, answer, **changes):
    """The scores of one benchmark whose answers are `answer(prompt)`, through a file of outputs."""
    found = loaded(name, root)
    outputs = root / "outputs.jsonl"
    write_json(outputs, [{"id": p.id, "completion": answer(p)} for p in found.prompts])
    settings = Settings(str(outputs), (BENCHMARKS[name],), root / "run", data=str(root), controls=("majority", "normal_report"), report_metrics="labels")  # fmt: skip
    with chat_server(judge_script) as url:
        if BENCHMARKS[name].metric == "rubric":
            changes["judge"] = JudgeSettings(url)
        summary = asyncio.run(run_evaluation(replace(settings, **changes), Progress(quiet=True)))
    return summary["benchmarks"][name]


@pytest.mark.parametrize("count", [1, 3])
def test_rows_are_read_whatever_way_a_json_file_holds_them(tmp_path, count):
    """One row must do as many do: a file of one line is no mapping of rows by their ids."""
    rows = [{"id": f"q{n}", "question": "Why?\u2028So.", "meta": {"n": n}} for n in range(count)]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    ways = {"a.jsonl": lines, "lines.json": lines, "list.json": json.dumps(rows), "test.json": json.dumps({"test": rows}),
            "by_id.json": json.dumps({row["id"]: {k: v for k, v in row.items() if k != "id"} for row in rows})}  # fmt: skip
    for name, text in ways.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert [row for _, row in _records(tmp_path / name)] == rows, name


def test_every_entry_has_a_sample_and_says_what_it_was_tried_on():
    assert set(SAMPLES) == set(BENCHMARKS) and len(BENCHMARKS) >= 25
    for b in BENCHMARKS.values():
        assert (
            set("|".join(b.files.values()).split("|")) <= set(presets())
            and b.licence
            and b.tried
            and b.files
            and set(b.kinds) <= {*KINDS, "rubric"}
        )
        assert b.hub or b.expected == 0 or b.note or "not tried" in b.tried or b.metric == "report" or b.name == "omnimedvqa", b.name  # fmt: skip


@pytest.mark.parametrize("name", list(SAMPLES))
def test_perfect_answers_score_100_and_empty_ones_0(name, tmp_path):
    right = evaluate(name, tmp_path / "right", perfect)
    assert right["accuracy"] == 1.0 and right["n"] == right["asked"] == COUNTS.get(name, right["asked"])
    assert right["unread"] == right["errors"] == right["not_judged"] == 0
    empty = evaluate(name, tmp_path / "empty", lambda p: "")
    assert empty["accuracy"] == 0.0 and empty["n"] == right["n"] and empty["errors"] == 0
    assert empty["unread"] == empty["n"]  # a class of its own, never credited
    for groups in (right["by"], empty["by"]):
        assert all(sum(s["n"] for s in found.values()) <= right["n"] for found in groups.values())


@pytest.mark.parametrize("name", [n for n in SAMPLES if BENCHMARKS[n].images])
def test_images_arrive_with_their_questions(name, tmp_path):
    found = loaded(name, tmp_path)
    assert all(p.images for p in found.prompts)
    for p in found.prompts:
        assert sum(part["type"] == "image" for part in p.messages[-1]["content"]) == len(p.images)
    blind = load_benchmark(BENCHMARKS[name], tmp_path, images=False)
    assert not any(p.images for p in blind.prompts) and [p.id for p in blind.prompts] == [p.id for p in found.prompts]


def test_a_row_whose_image_is_missing_or_broken_is_left_out_and_named(tmp_path):
    SAMPLES["slake"](tmp_path, "slake")
    folder = tmp_path / "slake" / "imgs"
    (folder / "xmlab2" / "source.jpg").unlink()
    found = load_benchmark(BENCHMARKS["slake"], tmp_path)
    assert len(found.prompts) == 5 and found.total == 6
    ((place, reason),) = found.excluded
    assert place == "row 3 (id 12002)" and reason.startswith("image file not found") and "xmlab2" in reason
    (folder / "xmlab4" / "source.jpg").write_bytes(b"no picture")
    with pytest.raises(EvalError, match=r"(?s)2 of 6 rows .* cannot be used.*xmlab2.*xmlab4"):
        load_benchmark(BENCHMARKS["slake"], tmp_path)
    assert len(load_benchmark(BENCHMARKS["slake"], tmp_path, images=False).prompts) == 6


def test_missing_data_say_where_they_belong(tmp_path):
    with pytest.raises(EvalError, match=r"medmcqa: no data found.*dev\.json.*openlifescienceai/medmcqa"):
        load_benchmark(BENCHMARKS["medmcqa"], tmp_path)
    with pytest.raises(EvalError, match="no such folder"):
        load_benchmark(BENCHMARKS["medmcqa"], tmp_path / "nowhere")
    with pytest.raises(EvalError, match="not on the Hub"):
        load_benchmark(BENCHMARKS["cmb"], None)


def test_another_benchmarks_file_is_not_taken_for_this_one(tmp_path):
    SAMPLES["medcalc"](tmp_path, "medcalc")
    (tmp_path / "medcalc" / "medcalc_corrected.csv").rename(tmp_path / "test.csv")
    with pytest.raises(EvalError, match="no data found"):
        load_benchmark(BENCHMARKS["medbullets_op4"], tmp_path)


def test_rows_that_cannot_be_used_are_listed_or_end_it(tmp_path):
    SAMPLES["medmcqa"](tmp_path, "medmcqa")
    file = tmp_path / "medmcqa" / "dev.json"
    row = json.loads(file.read_text().splitlines()[0])
    file.write_text(file.read_text() + json.dumps({**row, "id": "twins", "opb": row["opa"]}) + "\n")
    found = load_benchmark(BENCHMARKS["medmcqa"], tmp_path)
    assert len(found.prompts) == 4 and found.total == 5
    assert found.excluded == (("row 5 (id twins)", "option 'aspirin' stands twice in the list"),)
    file.write_text(file.read_text() + "".join(json.dumps({**row, "id": f"t{i}", "cop": 9}) + "\n" for i in range(3)))
    with pytest.raises(
        EvalError, match=r"(?s)4 of 8 rows .*answer 9 is outside the 4 options when they are counted from 1"
    ):
        load_benchmark(BENCHMARKS["medmcqa"], tmp_path)


def test_answer_indices_count_from_one_in_the_authors_file_and_from_zero_on_the_hub(tmp_path, monkeypatch):
    found = loaded("medmcqa", tmp_path)
    assert [p.gold for p in found.prompts] == ["A", "B", "C", "D"]
    rows = [{**json.loads(line), "cop": i} for i, line in enumerate((tmp_path / "medmcqa" / "dev.json").read_text().splitlines())]  # fmt: skip
    write_parquet(tmp_path / "hub" / "medmcqa" / "data" / "validation-00000-of-00001.parquet", rows)
    assert [p.gold for p in load_benchmark(BENCHMARKS["medmcqa"], tmp_path / "hub").prompts] == ["A", "B", "C", "D"]


def test_a_sample_depends_on_the_ids_alone(tmp_path):
    SAMPLES["slake"](tmp_path, "slake")
    small = load_benchmark(BENCHMARKS["slake"], tmp_path, limit=2)
    larger = load_benchmark(BENCHMARKS["slake"], tmp_path, limit=4)
    names = [p.id for p in larger.prompts]
    assert len(small.prompts) == 2 and len(names) == 4 and {p.id for p in small.prompts} < set(names)
    file = tmp_path / "slake" / "test.json"
    write_json(file, list(reversed(json.loads(file.read_text()))))
    again = load_benchmark(BENCHMARKS["slake"], tmp_path, limit=4)
    assert {p.id for p in again.prompts} == set(names) and again.data_hash != larger.data_hash


def test_several_right_options_are_a_set(tmp_path):
    found = loaded("cmb", tmp_path)
    multi = found.prompts[1]
    assert multi.gold == "B,C,D,E" and multi.meta["multi"] is True and "F" not in multi.text.split("\n")[-2][:1]
    assert "所有正确选项" in multi.text and "所有正确选项" not in found.prompts[0].text
    assert [p.gold for p in loaded("cmexam", tmp_path).prompts] == ["B", "A,C,E", "D"]


def test_chinese_questions_are_asked_in_chinese(tmp_path):
    found = loaded("slake", tmp_path)
    last = {p.meta["language"]: p.text.split("\n")[-1] for p in found.prompts}
    assert last["en"].isascii() and not last["zh"].isascii()
    no = next(p for p in found.prompts if p.gold == "不包含")
    assert "没有" in no.meta["synonyms"] and "包含" not in no.meta["synonyms"]


def test_rubrics_keep_the_whole_conversation(tmp_path):
    first = loaded("healthbench_hard", tmp_path).prompts[0]
    assert [m["role"] for m in first.messages] == ["user", "assistant", "user"] and first.gold[2]["points"] == -4


def test_the_held_out_images_of_vqa_rad_are_a_fifth_and_whole(shared_data):
    found = load_benchmark(BENCHMARKS["vqa_rad_disjoint"], shared_data / "data")
    images = {p.images[0].source for p in found.prompts}
    everything = list((shared_data / "data" / "vqa_rad" / "images").glob("*.jpg"))
    assert 0.15 < len(images) / len(everything) < 0.25 and all(is_held_out(i) for i in images)
    rows = [r for part in ("testset", "trainset") for r in json.loads((shared_data / "data" / "vqa_rad" / f"{part}.json").read_text())]  # fmt: skip
    held = [r for r in rows if is_held_out(r["image_name"])]
    assert len(held) == found.total and len(found.prompts) == len(held) - len(found.excluded)


REAL = {"vqa_rad": 451, "pubmedqa": 500, "medmcqa": 3742, "medcalc": 398}
SAMPLES_ONLY = {"slake": 200, "slake_zh": 91, "path_vqa": 630, "omnimedvqa": 320, "medxpertqa_mm": 100, "medxpertqa_text": 100}  # fmt: skip


@pytest.mark.parametrize("name", [*REAL, *SAMPLES_ONLY, "iu_xray"])
def test_real_rows_pay_perfect_answers_in_full_and_empty_ones_nothing(name, shared_data):
    from rewards import build
    from rewards.compose import DEFAULT_SPEC

    folder = {**dict.fromkeys(SAMPLES_ONLY, "data/format_samples"), "iu_xray": "data/openi_reports"}.get(name, "data")
    found = load_benchmark(BENCHMARKS[name], shared_data / folder, images=name in REAL)
    grader = build({"route": DEFAULT_SPEC["parts"]["answer"]["route"]})
    prompts = found.prompts[:: max(1, len(found.prompts) // 300)]
    right = [grader.score(p.reward_input(perfect(p))) for p in prompts]
    if name == "iu_xray":  # a report without a finding that the packs know is not judged
        assert sum(r.value is None for r in right) <= 0.02 * len(right)
        right = [r for r in right if r.value is not None]
    assert [p.id for p, r in zip(prompts, right, strict=False) if r.value != 1.0] == []
    assert all(not grader.score(p.reward_input("")).value for p in prompts)
    assert len(found.prompts) == {**REAL, **SAMPLES_ONLY, "iu_xray": len(found.prompts)}[name]


def test_every_medcalc_calculator_has_a_unit_that_the_grader_knows():
    from rewards.units import parse_unit

    units = presets()["medcalc"].layout.map["unit"]["as"]
    assert len(units) == 54
    for unit in set(units.values()) - {""}:
        assert parse_unit(unit) is not None, unit


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(EvalError, match="did you mean 'vqa_rad'"):
        choose("vqa_rat")
    with pytest.raises(EvalError, match="named twice"):
        choose("slake, slake")
    assert [b.name for b in choose("vqa_rad,slake,pubmedqa")] == ["vqa_rad", "slake", "pubmedqa"]


def test_prompts_are_hashed_by_their_wording():
    hashes = {prompt_hash(name) for name in ("direct", "direct_zh", "think", "short", "Answer!")}
    assert len(hashes) == 5
    assert instruction_named("think", "option", {}) == "full" and instruction_named("Answer!", "open", {}) == "Answer!"
    assert CONTROLS == ("blank", "shuffled", "text_only", "majority", "normal_report")
