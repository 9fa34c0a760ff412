"""Tables and files as spreadsheets, scripts and killed copies leave them: read right, or refused by line. None swallows
rows.
"""

import argparse
import json
import re

import pyarrow as pa
import pytest
from pyarrow import parquet

from lingshu_rl import look
from lingshu_rl.data import tables
from lingshu_rl.data.load import DataError, load
from lingshu_rl.failures import ConfigError
from lingshu_rl.sft.rows import _load
from lingshu_rl.sft.settings import SftConfig, load_sft_config

HEADER = "id,question,answer\n"
ASKED = {"format": "usual"}


def read(tmp_path, text, name="a.csv"):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return load({"path": str(tmp_path / name), **ASKED}, skip_bad_rows=True)


def answers(loaded):
    return [prompt.gold for prompt in loaded.prompts]


@pytest.mark.parametrize(
    "rows",
    [
        'a,What?,liver\nb,"What?,lung\nc,Where?,left\n',
        'a,What?,liver\nb,What?,"lung\nc,Where?,left',
        'a,"1\n2",x\nb,y,"',
    ],
)
def test_a_quote_that_never_closes_is_refused_where_it_opens(tmp_path, rows):
    line = 2 + rows.splitlines().index(next(row for row in rows.splitlines() if row.startswith("b")))
    with pytest.raises(DataError, match=f"a quote opens in the record of line {line} and never closes"):
        read(tmp_path, HEADER + rows)


@pytest.mark.parametrize(
    ("rows", "where"),
    [
        ('b,"What?,lung\nc,"Where?",left\n', "line 3 to 4"),  # the quote closes where the next one opens
        ('b,"a "big" one?",lung\n', "line 3"),
        ('b,"a \\"big\\" one?",lung\n', "line 3"),
    ],
)
def test_a_quote_inside_of_a_cell_costs_its_record_and_no_other(tmp_path, rows, where):
    told = read(tmp_path, HEADER + "a,What?,liver\n" + rows + "d,What?,spleen\n")
    assert answers(told) == ["liver", "spleen"]
    assert [r.reason.startswith(f"{where}: ") for r in told.refused] == [True]


def test_quotes_that_are_doubled_or_stand_inside_of_bare_cells_are_text(tmp_path):
    told = read(tmp_path, HEADER + 'a,"a ""big"" one,\nor two?",liver\nb,a 5" one?,lung\n')
    assert [p.messages[-1]["content"].splitlines()[0] for p in told.prompts] == ['a "big" one,', 'a 5" one?']


@pytest.mark.parametrize("sign", [";", "\t", "|"])
@pytest.mark.parametrize("begin", ["", "\ufeff", "sep={}\r\n", '\ufeff"sep={}"\r\n', "\n"])
def test_a_table_is_split_as_its_header_is(tmp_path, sign, begin):
    rows = "id,question,answer,unit\r\na,Wie groß?,{},mm\r\n".replace(",", sign).format("3,5")
    told = read(tmp_path, begin.format(sign) + rows)
    assert [(p.gold, p.meta["unit"]) for p in told.prompts] == [("3,5", "mm")]


def test_a_given_delimiter_and_a_comma_in_the_header_stand(tmp_path):
    (tmp_path / "a.csv").write_text("id,a;question;answer\n1;What?;liver\n")
    source = {"path": str(tmp_path / "a.csv"), "delimiter": ";", "map": {"id": "id,a"}, **ASKED}
    assert answers(load(source)) == ["liver"]


@pytest.mark.parametrize("name", ["a.csv", "a.json", "a.jsonl", "a.tsv"])
@pytest.mark.parametrize("code", ["utf-16", "utf-16-be"])
def test_utf_16_is_named(tmp_path, name, code):
    text = ("\ufeff" if code == "utf-16-be" else "") + HEADER
    with pytest.raises(DataError, match="is UTF-16; write it anew: iconv -f utf-16"):
        read(tmp_path, text.encode(code), name)


def test_cells_of_nan_are_empty(tmp_path):
    told = read(tmp_path, HEADER + "a,What?,NaN\nb,What?,nan\nc,What?,Na\n")
    assert answers(told) == ["Na"]
    assert all("field 'answer' is missing" in refused.reason for refused in told.refused)


ROW = json.dumps({"id": "a", "images": [], "question": "What?", "answer": "liver"})


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("a.json", f"[{ROW}, {ROW}", "its array never closes"),
        ("a.json", f"[{ROW},", "its array never closes"),
        ("a.json", f"[{ROW}]\n[{ROW}]", "text follows its array"),
        ("a.jsonl", f"[\n{ROW},\n{ROW}\n]\n", "holds an array, not a record a line; name it .json"),
    ],
)
def test_an_array_that_is_cut_or_doubled_is_not_read_in_part(tmp_path, name, text, reason):
    with pytest.raises(DataError, match=reason):
        read(tmp_path, text, name)


def said(column):
    """One value for many rows, held once."""
    return pa.DictionaryArray.from_arrays(pa.array([0] * 5000, pa.int32()), pa.array(column))


@pytest.mark.parametrize("shape", ["texts", "a dotted name", "lists", "structs", "numbers"])
def test_parquet_that_unfolds_beyond_memory_is_refused_and_not_unfolded(tmp_path, monkeypatch, shape):
    monkeypatch.setattr(tables, "IN_MEMORY", 1 << 20)
    many = pa.array([0, 5000], pa.int32())
    column = {
        "texts": said(["x" * 2000]),
        "a dotted name": said(["x" * 2000]),
        "lists": pa.ListArray.from_arrays(many, said(["x" * 2000])),
        "structs": pa.StructArray.from_arrays([said(["x" * 2000])], ["bytes"]),
        "numbers": pa.ListArray.from_arrays(pa.array([0, 1 << 21], pa.int32()), pa.array([0] * (1 << 21))),
    }[shape]
    name = "a.b" if shape == "a dotted name" else "q"
    parquet.write_table(pa.table({name: column, "n": list(range(len(column)))}), tmp_path / "a.parquet")
    if shape not in ("lists", "numbers"):  # a file of one row is smaller than a row
        assert (tmp_path / "a.parquet").stat().st_size > 5000
    before = pa.total_allocated_bytes()
    with pytest.raises(tables.UnreadableSource, match="it unfolds to more than 1 MiB; write it as several files"):
        tables.parquet(tmp_path / "a.parquet")
    assert pa.total_allocated_bytes() - before < 1 << 20


def test_a_parquet_footer_that_ends_its_reader_ends_not_the_run(tmp_path):
    """A column said to be never empty, beside counts of its empty values: pyarrow throws what nothing catches."""
    file = tmp_path / "rows.parquet"
    parquet.write_table(pa.table({"id": ["a", "b"]}), file)
    whole = file.read_bytes()
    for stored, outcome in (
        (whole.replace(b"%\x02\x18\x02id", b"%\x00\x18\x02id"), "the file is damaged"),
        (whole, ""),  # the next is read by a new process
    ):
        file.write_bytes(stored)
        try:
            assert len(list(tables.parquet(file))) == 2 and not outcome
        except tables.UnreadableSource as error:
            assert outcome and outcome in str(error)


def test_parquet_in_parts_of_every_type_is_what_was_written(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "BATCH", 1000)
    table = pa.table(
        {
            "text": ["x" * 1000, None, "y"] * 400,
            "image": [{"bytes": b"%d" % n, "path": None} for n in range(1200)],
            "options": [["a" * 500, "b"], None, []] * 400,
            "map": pa.array([[("k", 1)]] * 1200, pa.map_(pa.string(), pa.int64())),
            "number": list(range(1200)),
        }
    )
    parquet.write_table(table, tmp_path / "a.parquet", dictionary_pagesize_limit=2000, row_group_size=500)
    assert tables.parquet(tmp_path / "a.parquet").table.to_pylist() == table.to_pylist()
    parquet.write_table(table.slice(0, 0), tmp_path / "b.parquet")
    assert list(tables.parquet(tmp_path / "b.parquet")) == []


def test_stages_name_their_own_keys_for_bad_rows(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"image": "a.png", "question": "What?", "answer": "liver"}))
    with pytest.raises(DataError) as error:
        _load(SftConfig(), str(tmp_path / "a.jsonl"), "stages.a.data", "full", lambda prompt: None)
    assert "or set skip_bad_rows=true" in str(error.value) and "stages.a.data=[{path:" in str(error.value)
    assert "data.skip_bad_rows" not in str(error.value) and "data.train" not in str(error.value)


def looked(path, *words):
    parser = argparse.ArgumentParser()
    look.add_arguments(parser)
    arguments = parser.parse_args(["look", str(path), *words])
    (source,) = look.sources_of({"path": str(path)}, "source")
    return list(look.look(source, arguments.rows, arguments.limit, "", "full"))


def test_look_shows_and_guesses_by_the_first_value_of_every_column(tmp_path):
    (tmp_path / "a.csv").write_text("Path,Edema,Findings,Impression\n,,,Normal.\n,1.0,Clear lungs.,Normal.\n")
    lines = looked(tmp_path / "a.csv")
    assert "  Edema: '1.0'" in lines and "  Findings: 'Clear lungs.'" in lines
    assert any("kind: report" in line for line in lines) and lines[-1].startswith("pixels") is False
    assert any("rows can be used" in line for line in lines)


@pytest.mark.parametrize("text", ["", HEADER])
def test_look_names_an_empty_file(tmp_path, text):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(DataError, match=r"a\.csv: no rows"):
        looked(tmp_path / "a.csv")


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("stages.a.data={path: a.jsonl}", "stages.a.data takes a list, not keys and values"),
        ("stages=[]", "stages takes keys and values, not a list"),
        ("trainer=[1]", "trainer takes keys and values, not a list"),
    ],
)
def test_a_list_for_a_mapping_is_named_with_its_key(word, told):
    with pytest.raises(ConfigError, match=re.escape(told)):
        load_sft_config(None, ["stages.a.data=[a.jsonl]", word])
