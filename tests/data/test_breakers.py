"""Rows and settings that a stranger broke the door with: each is refused by name, or read right. None ends in a traceback."""

import json

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from lingshu_rl.curate.readers import Source, read_rows
from lingshu_rl.data.load import DataError, load
from lingshu_rl.data.rows import RowError, row_to_prompt
from lingshu_rl.data.sources import SourceError
from lingshu_rl.failures import ConfigError
from lingshu_rl.model.shape import read_shape
from lingshu_rl.planning.given import load_config
from lingshu_rl.storage.folders import own
from rewards import RewardResult

ROW = {
    "id": "a",
    "images": [],
    "question": "Which side?",
    "options": ["left", "right"],
    "answer": "A",
    "kind": "option",
}
NUMBER = {"id": "a", "images": [], "question": "How many?", "answer": 3, "kind": "numeric"}


def line(row, **changes):
    return json.dumps({**row, **changes})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (line(ROW, id=1).replace("1", "1" * 5000), "4300 digits"),
        (line(NUMBER).replace("3", "7" * 5000), "4300 digits"),
        (line(ROW, meta={"x": 1}).replace("1", "1" * 5000), "4300 digits"),
        (line(NUMBER, tolerance={"abs": 10**401}), "tolerance 'abs' cannot be"),
        (line(ROW, images=["~nosuchuser/x.png"]), "image path '~nosuchuser/x.png' cannot be one"),
        (line(ROW, images=["a\0.png"]), "cannot be one"),
        (line(ROW, images=["\ud800.png"]), "cannot be one"),
        (line(ROW, images=["x" * 300 + ".png"]), "unreadable image"),
        (line(ROW, question="which \ud800 side"), "half of a character"),
        (line(ROW, options=["left", "ri\ud800ght"]), "half of a character"),
        (line(ROW, kind="open", options=None, answer="liv\ud800er"), "half of a character"),
        (line(ROW, options=["A. left", "C. right", "D. both"], answer="C"), "'C. right', whose own letter it is"),
        (line(ROW, options=["B. right", "A. left"], answer="A"), "'A. left', whose own letter it is"),
        (line(ROW, meta={"multi": "false"}), "meta.multi is true or false, got 'false'"),
    ],
)
def test_a_row_that_cannot_be_used_is_refused_by_its_place(tmp_path, text, reason):
    (tmp_path / "rows.jsonl").write_text("\n".join([line(ROW, id="good"), text]))
    with pytest.raises(DataError, match=r"1 of 2 rows") as error:
        load(tmp_path / "rows.jsonl")
    assert reason in str(error.value) and "line 2" in str(error.value)
    assert [p.id for p in load(tmp_path / "rows.jsonl", skip_bad_rows=True).prompts] == ["good"]


@pytest.mark.parametrize(
    "changes",
    [
        {"options": ["E. coli", "B. fragilis", "C. difficile"], "answer": "C"},
        {"options": ["C. difficile", "E. coli"], "answer": "A"},
        {"options": ["vitamin B", "vitamin A"], "answer": "A"},
    ],
)
def test_options_that_begin_like_letters_stay(changes):
    assert row_to_prompt({**ROW, **changes}).options == tuple(changes["options"])


def test_a_circle_of_links_is_a_refused_image(tmp_path):
    (tmp_path / "x.png").symlink_to(tmp_path / "x.png")
    with pytest.raises(RowError, match="image"):
        prompt = row_to_prompt({**ROW, "images": [str(tmp_path / "x.png")]})
        raise RowError(prompt.images[0].fault())


@pytest.mark.parametrize("mode", ["CMYK", "LAB", "YCbCr", "RGBA", "L", "P"])
def test_a_pil_image_of_any_mode_keeps_its_turn(mode):
    image = Image.new("RGB", (80, 40), "red").convert(mode) if mode != "LAB" else Image.new("LAB", (80, 40))
    image.getexif()[274] = 6
    (picture,) = row_to_prompt({**ROW, "images": [image]}).images
    assert picture.size == picture.pixels().size == (40, 80)


def test_pil_images_that_cannot_be_kept_are_refused(tmp_path):
    Image.effect_noise((64, 64), 90).save(tmp_path / "cut.png")
    data = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    frames = [Image.new("L", (8, 8), n) for n in (0, 99)]
    frames[0].save(tmp_path / "two.gif", save_all=True, append_images=frames[1:])
    for image in (Image.open(tmp_path / "cut.png"), Image.open(tmp_path / "two.gif"), Image.new("RGB", (0, 0))):
        with pytest.raises(RowError):
            row_to_prompt({**ROW, "images": [image]})


def test_a_file_whose_rows_changed_places_is_not_read_on(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(line(ROW, id="q1") + "\n" + line(ROW, id="q2") + "\n")
    prompts = load(file).prompts
    with open(file, "w") as out:
        out.write(line(ROW, id="q2") + "\n" + line(ROW, id="q1") + "\n")
    with pytest.raises(DataError, match=r"has changed since it was loaded: its id is 'q2', and was 'q1'"):
        prompts.by_id("q1")
    with pytest.raises(DataError, match=r"has changed since it was loaded: its id is 'q1', and was 'q2'"):
        prompts[1]


@pytest.mark.parametrize(
    "setting",
    [
        *(f"{key}=nan" for key in ("train.lr", "loss.kl_coef", "rollout.temperature", "check.max_logprob_gap")),
        *(f"{key}=inf" for key in ("train.lr", "rollout.temperature")),
        *(f"{key}=-1" for key in ("train.warmup_steps", "train.weight_decay", "train.max_grad_norm", "eval.every",
                                  "eval.limit", "checkpoint.every", "rollout.request_timeout_s", "rewards.timeout_s")),
    ],
)  # fmt: skip
def test_numbers_that_mean_nothing_are_refused_by_their_key(setting):
    with pytest.raises(ConfigError, match=setting.partition("=")[0].replace(".", r"\.")):
        load_config(None, [setting])


@pytest.mark.parametrize(
    ("prefixes", "told"),
    [
        (("nonsense",), "begins with 'nonsense'"),
        (("model.vissual",), "did you mean 'model.visual'"),
        (("",), "begins with ''"),
        (("model",), "leaves nothing to train"),
    ],
)
def test_freezing_what_is_not_there_or_everything_is_refused(prefixes, told):
    with pytest.raises(ConfigError, match=told):
        read_shape("demo", prefixes)
    assert read_shape("demo", ("model.visual",)).trained < read_shape("demo").trained


@pytest.mark.parametrize("wrong", [{"reason": 3}, {"components": [1]}])
def test_a_result_of_other_types_is_refused_by_name(wrong):
    with pytest.raises(TypeError, match=next(iter(wrong))):
        RewardResult(1.0, **wrong)


def test_a_run_whose_folder_is_a_file_says_so(tmp_path):
    (tmp_path / "tr.jsonl").write_text("")
    with (
        pytest.raises(ConfigError, match=r"run\.dir=.*tr\.jsonl cannot be written"),
        own(tmp_path / "tr.jsonl", "a run", "run.dir"),
    ):
        raise AssertionError


# What one row may hold: none of it may cost its neighbours.
POISON = {
    "an endless number": '"answer": ' + "7" * 5000 + ', "kind": "numeric"',
    "brackets": '"meta": ' + '{"a":' * 3000 + "1" + "}" * 3000,
    "half a character": r'"meta": {"x": "\ud800"}',
    "a NUL in a path": r'"images": ["a\u0000.png"]',
    "no such user": '"images": ["~nosuchuser/x.png"]',
    "a long path": f'"images": ["{"x" * 5000}"]',
    "a deep path": f'"images": ["{"a/" * 2500}x.png"]',
    "a list for meta": '"meta": [1, 2]',
    "a number for images": '"images": 3',
    "no turns": '"question": null, "messages": [[[]]]',
    "a mapping for the id": '"id": {"a": 1}',
    "infinity": '"kind": "numeric", "answer": Infinity, "tolerance": {"rel": NaN}',
}
GOOD = '{"id": "%s", "images": [], "question": "Which organ?", "answer": "liver", "kind": "open"}'


def poisoned(name):
    """A row whose later fields, as JSON has it, win over its earlier ones."""
    return GOOD[:-1] % "bad" + f", {POISON[name]}}}"


def ids_of(source):
    loaded = [prompt.id for prompt in load(source, skip_bad_rows=True).prompts]
    curated = [record.row["id"] for record in read_rows(Source(str(source), name="s")) if record.row]
    return loaded, curated


@pytest.mark.parametrize("name", POISON)
@pytest.mark.parametrize("form", ["lines", "array", "lines with CR"])
def test_one_row_costs_itself_alone(tmp_path, form, name):
    rows = [GOOD % "first", poisoned(name), GOOD % "last"]
    file = tmp_path / ("rows.json" if form == "array" else "rows.jsonl")
    file.write_text(
        f"[{', '.join(rows)}]" if form == "array" else ("\r" if "CR" in form else "\n").join(rows), newline=""
    )
    assert ids_of(file) == (["first", "last"],) * 2


def test_bad_bytes_cost_the_row_where_they_stand(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"id,question,answer\na,What?,liver\nb,O\xf9 ?,foie\nc,What?,lung\n")
    (tmp_path / "b.jsonl").write_bytes(f"{GOOD % 'a'}\n".encode() + b'{"id": "\xff"}\n' + (GOOD % "c").encode())
    (tmp_path / "c.json").write_bytes(f"[{GOOD % 'a'}, {GOOD % 'b'}, {GOOD % 'c'}]".encode().replace(b'"b"', b'"\xf9"'))
    for name in ("a.csv", "b.jsonl", "c.json"):
        told = load({"path": str(tmp_path / name), "format": "usual"}, skip_bad_rows=True)
        assert [prompt.id for prompt in told.prompts] == ["a", "c"], name
        (refused,) = told.refused
        assert refused.place in ("row 2", "line 2") and ("iconv" in refused.reason or "not JSON" in refused.reason)


def test_tables_as_data_frames_write_them(tmp_path):
    meta = pa.array(
        [[("modality", "CT")], None, [("modality", "MR"), ("modality", "CT")]], pa.map_(pa.string(), pa.string())
    )
    rows = [json.loads(GOOD % n) for n in range(3)]
    table = (
        pa.Table.from_pylist(rows).append_column("meta", meta).append_column("__index_level_0__", pa.array([7, 8, 9]))
    )
    parquet.write_table(table, tmp_path / "a.parquet")
    told = load(tmp_path / "a.parquet", skip_bad_rows=True)
    assert [(p.id, dict(p.meta)) for p in told.prompts] == [("0", {"modality": "CT"}), ("1", {})]
    assert [r.place for r in told.refused] == ["row 3"]  # one key twice: which is meant is not told
    (tmp_path / "a.csv").write_text(",id,question,answer\n0,a,What?,liver\n")
    (prompt,) = load({"path": str(tmp_path / "a.csv"), "format": "usual"}).prompts
    assert prompt.id == "a"


def test_a_parquet_file_with_a_text_that_is_none_loses_that_row(tmp_path):
    broken = pa.Array.from_buffers(
        pa.string(), 3, [None, pa.py_buffer(np.array([0, 1, 2, 3], np.int32)), pa.py_buffer(b"a\xffc")]
    )
    rows = pa.Table.from_pylist([json.loads(GOOD % n) for n in range(3)])
    parquet.write_table(rows.set_column(0, "id", broken), tmp_path / "a.parquet")
    told = load(tmp_path / "a.parquet", skip_bad_rows=True)
    assert [p.id for p in told.prompts] == ["a", "c"] and told.refused[0].place == "row 2"


@pytest.mark.parametrize("given", [None, 5, 1.5, True])
def test_what_is_no_source_says_so(given):
    with pytest.raises(DataError, match=f"a source is demo:train.*got {given}"):
        load(given)


def test_a_list_of_neither_rows_nor_sources_is_refused_row_by_row():
    with pytest.raises(DataError, match=r"2 of 2 rows"):
        load([None, 3])


@pytest.mark.parametrize("path", ["~nouser/t.jsonl", "x" * 300 + ".jsonl", "a\0b.jsonl", "\ud800.jsonl"])
def test_a_path_that_can_be_none_is_refused_by_loader_and_curation(path):
    with pytest.raises(DataError, match="cannot be a path"):
        load(path)
    with pytest.raises(SourceError, match="cannot be a path"):
        list(read_rows(Source(path)))
