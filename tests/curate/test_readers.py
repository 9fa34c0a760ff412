"""Every format gives the same rows; what is no row comes with its place and reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from curate_helpers import png, texture, write_rows

from lingshu_rl.curate.readers import Source, SourceError, image_folder, read_rows

RECORDS = [{"qid": i, "image_name": f"{i}.png", "question": f"Is picture {i} a CT?", "answer": "yes" if i % 2 else "a liver", "patient": f"p{i}"} for i in range(4)]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for i in range(4):
        (tmp_path / "images" / f"{i}.png").write_bytes(png(texture(i)))
    return tmp_path


def jsonl(folder: Path) -> Source:
    return Source(str(write_rows(folder / "a.jsonl", RECORDS)))


def json_array(folder: Path) -> Source:
    (folder / "a.json").write_text(json.dumps(RECORDS, indent=2))
    return Source(str(folder / "a.json"))


def json_lines_in_json(folder: Path) -> Source:
    return Source(str(write_rows(folder / "b.json", RECORDS)))


def csv_table(folder: Path) -> Source:
    lines = ["qid,image_name,question,answer,patient"]
    lines += [",".join(str(v) for v in record.values()) for record in RECORDS]
    (folder / "a.csv").write_text("\n".join(lines) + "\n")
    return Source(str(folder / "a.csv"))


def parquet(folder: Path) -> Source:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), folder / "a.parquet")
    return Source(str(folder / "a.parquet"))


@pytest.mark.parametrize("make", [jsonl, json_array, json_lines_in_json, csv_table, parquet])
def test_every_table_gives_the_same_rows(folder: Path, make: Any) -> None:
    rows = [record.row for record in read_rows(make(folder))]
    assert all(rows)
    assert [str(row["id"]) for row in rows] == ["0", "1", "2", "3"]
    assert [row["kind"] for row in rows] == ["open", "yesno", "open", "yesno"]
    assert [row["images"] for row in rows] == [[str((folder / "images" / f"{i}.png").resolve())] for i in range(4)]
    assert [row["meta"] for row in rows] == [{"patient_id": f"p{i}"} for i in range(4)]


def test_a_dataset_folder_keeps_its_image_bytes(folder: Path) -> None:
    import datasets

    stored = [{"id": str(i), "image": {"bytes": png(texture(i)), "path": None}, "question": "What is it?", "answer": "a liver"} for i in range(3)]  # fmt: skip
    features = datasets.Features({"id": datasets.Value("string"), "image": datasets.Image(), "question": datasets.Value("string"), "answer": datasets.Value("string")})  # fmt: skip
    data = datasets.Dataset.from_list(stored, features=features)
    datasets.DatasetDict({"train": data}).save_to_disk(str(folder / "set"))
    keep = image_folder(folder / "kept")
    rows = [record.row for record in read_rows(Source(str(folder / "set"), split="train"), keep)]
    assert [Path(row["images"][0]).read_bytes() for row in rows] == [png(texture(i)) for i in range(3)]
    with pytest.raises(SourceError, match="train"):
        list(read_rows(Source(str(folder / "set"))))


def test_an_object_of_objects_and_a_long_array_are_read_piece_by_piece(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"77": {"question": "Q?", "answer": "a lung", "images": []}}))
    (row,) = [record.row for record in read_rows(Source(str(tmp_path / "a.json")))]
    assert (row["id"], row["question"]) == ("77", "Q?")
    many = [{"id": i, "images": [], "question": "é" * 900 + str(i), "answer": "a ] [ , lung"} for i in range(3000)]
    (tmp_path / "b.json").write_text(json.dumps(many, ensure_ascii=False))  # several reads of a mebibyte
    assert [record.row["id"] for record in read_rows(Source(str(tmp_path / "b.json")))] == [str(n) for n in range(3000)]
    (tmp_path / "c.json").write_text('[{"a": 1}, oops')
    with pytest.raises(SourceError, match="not JSON"):
        list(read_rows(Source(str(tmp_path / "c.json"))))


def test_fields_and_values_say_where_a_row_comes_from(folder: Path) -> None:
    source = Source(
        str(write_rows(folder / "a.jsonl", [{"n": 1, "image": "not a file", "text": "Clear lungs.", "sex": "F"}])),
        map={"id": "n", "answer": "text", "meta.sex": "sex"},
        values={"images": [], "question": "Write the report.", "kind": "report", "meta.modality": "X-ray"},
    )
    (record,) = read_rows(source, label=True)
    assert record.row == {"id": "a:1", "images": [], "question": "Write the report.", "answer": "Clear lungs.", "kind": "report",
                          "meta": {"sex": "F", "modality": "X-ray", "source": "a"}}  # fmt: skip


def test_records_that_are_no_rows_come_with_place_and_reason(folder: Path) -> None:
    path = folder / "a.jsonl"
    good = {"id": 1, "images": [], "question": "Q?", "answer": "a lung"}
    lines = [json.dumps(good), "{broken", json.dumps([1]), json.dumps({**good, "image": "gone.png", "images": None}),
             json.dumps({**good, "answer": ""}), json.dumps({**good, "images": ["https://x.org/a.png"]})]  # fmt: skip
    path.write_text("\n".join(lines) + "\n")
    found = [(record.place, record.reason) for record in read_rows(Source(str(path)))]
    assert found == [("line 1", ""), ("line 2", "bad_row"), ("line 3", "bad_row"), ("line 4", "missing_image"),
                     ("line 5", "bad_row"), ("line 6", "bad_row")]  # fmt: skip


def test_options_in_a_cell_are_json_or_parts(folder: Path) -> None:
    (folder / "a.csv").write_text(
        'id,images,question,options,answer\n1,0.png,Q?,CT|MRI,A\n2,0.png|1.png,Q?,"[""CT"", ""MRI""]",MRI\n'
    )
    rows = [record.row for record in read_rows(Source(str(folder / "a.csv")))]
    assert [(row["options"], row["kind"], len(row["images"])) for row in rows] == [
        (["CT", "MRI"], "option", 1),
        (["CT", "MRI"], "option", 2),
    ]


def test_sources_that_cannot_be_read_are_said(tmp_path: Path) -> None:
    for bad, message in (
        ({"path": "x", "format": "xml"}, "xml"),
        ({"path": "x", "map": {"quesion": "q"}}, "quesion"),
    ):
        with pytest.raises(SourceError, match=message):
            Source(**bad)
    with pytest.raises(SourceError, match="no such file"):
        list(read_rows(Source(str(tmp_path / "none.jsonl"))))
    (tmp_path / "a.weird").write_text("x")
    with pytest.raises(SourceError, match="a source is demo:train"):
        list(read_rows(Source(str(tmp_path / "a.weird"))))
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="holds no file that can be read"):
        list(read_rows(Source(str(tmp_path / "empty"))))


def test_a_layout_of_other_people_is_curated_by_its_preset(folder: Path) -> None:
    """The mapping of `data.train`: presets, filters, conversations; a column that no record has is an error."""
    record = {"id": "c", "image": "1.png", "keep": 1, "conversations": [
        {"from": "human", "value": "<image>\nWhich organ?"}, {"from": "gpt", "value": "liver"},
        {"from": "human", "value": "Is it large?"}, {"from": "gpt", "value": "yes"}]}  # fmt: skip
    path = str(write_rows(folder / "a.jsonl", [record, {**record, "id": "d", "keep": 0}]))
    found = list(read_rows(Source(path, format="llava", where="keep == 1"), label=True))
    assert [(r.row["id"], r.row["kind"], r.row["answer"]) for r in found if r.row] == [("a:c", "open", "liver"), ("a:c/2", "yesno", "yes")]  # fmt: skip
    assert [r.place for r in found] == ["line 1", "line 1, question 2"]
    with pytest.raises(SourceError, match="'gender' stands in no record"):
        list(read_rows(Source(path, format="llava", map={"meta.sex": "gender"})))
    with pytest.raises(SourceError, match="did you mean 'llava'"):
        Source(path, format="lava")


def test_a_letter_without_its_options_is_refused_where_rows_are_to_train_on(folder: Path) -> None:
    path = str(write_rows(folder / "a.jsonl", [{"image": "1.png", "question": "Which?", "answer": "B"}]))
    (record,) = read_rows(Source(path))
    assert record.row is None and "map.options says where they are" in record.detail
    (record,) = read_rows(Source(path), strict=False)  # to compare pictures, labels need no sense
    assert record.row is not None and len(record.row["images"]) == 1


def test_a_column_that_a_source_uses_itself_is_no_other_field(folder: Path) -> None:
    path = str(write_rows(folder / "a.jsonl", [{"patient": "I cough.", "doctor": "Rest.", "images": []}]))
    (record,) = read_rows(Source(path, map={"question": "patient", "answer": "doctor"}, values={"kind": "open"}))
    assert record.row is not None and "meta" not in record.row
