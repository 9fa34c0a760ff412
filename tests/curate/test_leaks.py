"""`eval leaks`: what two sets share, counted right, and a training set without it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from curate_helpers import jpeg, png, question, read_rows, texture, write_rows

from lingshu_rl.cli import main

ROOT = Path(__file__).resolve().parent.parent.parent


def check(train: Path, test: Path, folder: Path, *more: str) -> dict:
    report = folder / "leaks.json"
    assert main(["eval", "leaks", "--train", str(train), "--test", str(test), "--json", str(report), *more]) == 0
    return json.loads(report.read_text())


def test_vqa_rads_published_split_shares_203_images(shared_data: Path, tmp_path: Path, capsys) -> None:
    folder = shared_data / "data" / "vqa_rad"
    if not (folder / "trainset.json").is_file():
        pytest.skip("no VQA-RAD")
    clean = tmp_path / "clean.jsonl"
    report = check(folder / "trainset.json", folder / "testset.json", tmp_path, "--clean", str(clean))
    assert report["shared_images"] == 203 == len(report["images"]) == len({e["image"] for e in report["images"]})
    assert report["faulty_rows"] == [] and report["unreadable_images"] == {}
    assert "203" in capsys.readouterr().out
    test_images = {row["image_name"] for row in json.loads((folder / "testset.json").read_text())}
    kept = read_rows(clean)
    names = {row["image_name"]: 0 for row in json.loads((folder / "trainset.json").read_text())}
    assert {Path(row["images"][0]).name for row in kept} == set(names) - test_images
    again = check(clean, folder / "testset.json", tmp_path)
    assert again["shared_images"] == 0 and again["train_rows_leaking"] == 0


def test_pictures_patients_and_texts_are_counted_by_what_is_shared(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for i in range(8):
        (images / f"{i}.png").write_bytes(png(texture(i)))
        (images / f"{i}s.jpg").write_bytes(jpeg(texture(i).resize((120, 96)), 50))
    vignette = "A man of 54 years has had crushing chest pain for 2 hours. What is the next step?"
    train = [
        question(
            i,
            id=f"t{i}",
            images=[f"{i}.png"],
            patient_id=f"p{i}",
            question=f"Which of the organs is marked as number {i}?",
        )
        for i in range(4)
    ]
    train += [
        question(9, id="t9", question=vignette),
        question(10, id="t10", question="Is this an axial plane?", images=["3.png"]),
    ]
    test = [
        question(0, id="v0", images=["0s.jpg"], patient_id="other"),  # a near-duplicate picture
        question(1, id="v1", images=["0s.jpg", "1.png"]),  # the same again, and an exact copy
        question(2, id="v2", images=["6.png"], patient_id="p2"),
        question(3, id="v3", images=["7.png"], patient_id="p2"),
        question(4, id="v4", question=vignette.replace("man", "man ") + " "),
        question(
            5, id="v5", question="Is this an axial plane?", images=["7.png"]
        ),  # the same question about another picture
        question(6, id="v6", question="An entirely different question about gout"),
    ]
    clean = tmp_path / "clean" / "train.jsonl"
    report = check(write_rows(tmp_path / "train.jsonl", train), write_rows(tmp_path / "test.jsonl", test), tmp_path, "--clean", str(clean))  # fmt: skip
    assert (report["shared_images"], report["shared_patients"], report["near_duplicate_texts"]) == (2, 1, 2)
    assert [(e["test_row"], e["certain"]) for e in report["texts"]] == [("v4", True), ("v5", False)]
    assert sorted(row["id"] for row in read_rows(clean)) == ["t10", "t3"]
    assert report["train_rows_leaking_by"] == {"image": 2, "patient": 1, "text": 1}
    exact = check(tmp_path / "train.jsonl", tmp_path / "test.jsonl", tmp_path, "--distance", "0", "--threshold", "0.99")
    assert exact["shared_images"] == 1


def test_image_bytes_are_compared_and_written_beside_the_cleaned_set(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    def table(name: str, seeds: list[int]) -> Path:
        rows = [
            {"id": f"{name}{s}", "images": [png(texture(s))], "question": "Q?", "answer": "a lung", "kind": "open"}
            for s in seeds
        ]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
        return tmp_path / f"{name}.parquet"

    clean = tmp_path / "clean.jsonl"
    report = check(table("a", [1, 2, 3]), table("b", [2, 9]), tmp_path, "--clean", str(clean))
    assert report["shared_images"] == 1
    assert [Path(row["images"][0]).read_bytes() for row in read_rows(clean)] == [png(texture(1)), png(texture(3))]


def test_rows_need_not_be_fit_to_train_on(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        (tmp_path / f"{name}.png").write_bytes(png(texture(seed)))
    train = write_rows(
        tmp_path / "train.jsonl",
        [
            {"image": "a.png", "patient_id": 5},
            {"image": ["c.png", "gone.png"], "caption": "A mass in the upper lobe of the left lung"},
        ],
    )
    test = write_rows(
        tmp_path / "test.jsonl",
        [{"image": "b.png"}, {"patient_id": "5"}, {"text": "a mass in the upper lobe of the left lung."}],
    )
    report = check(train, test, tmp_path)
    assert (report["shared_images"], report["shared_patients"], report["near_duplicate_texts"]) == (1, 1, 1)
    assert [(e["set"], e["place"]) for e in report["faulty_rows"]] == [("train", "line 2")]


def test_the_report_is_written_though_nobody_reads_the_table(tmp_path: Path) -> None:
    """`eval leaks --json F | head`: the pipe is closed before the table comes."""
    rows = write_rows(tmp_path / "a.jsonl", [question(1), question(2)])
    arguments = ["eval", "leaks", "--train", str(rows), "--test", str(rows), "--json", str(tmp_path / "leaks.json")]
    code = f"import sys; from lingshu_rl.cli import main; sys.exit(main({arguments!r}))"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    ) as done:
        assert done.stdout is not None and done.stderr is not None
        done.stdout.close()
        told = done.stderr.read().decode()
    assert done.returncode == 0 and "Traceback" not in told and "Broken" not in told
    assert json.loads((tmp_path / "leaks.json").read_text())["test_rows"] == 2


def test_what_cannot_be_compared_is_said(tmp_path: Path, capsys) -> None:
    (tmp_path / "bad.png").write_bytes(b"no picture")
    rows = write_rows(
        tmp_path / "a.jsonl", [question(1), question(2, images=["gone.png"]), question(3, images=["bad.png"])]
    )
    report = check(rows, rows, tmp_path, "--images", str(tmp_path))
    assert [(e["set"], e["place"], e["reason"]) for e in report["faulty_rows"]] == [
        ("train", "line 2", "missing_image"),
        ("test", "line 2", "missing_image"),
    ]
    assert list(report["unreadable_images"]) == [str((tmp_path / "bad.png").resolve())]
    assert "faulty rows" in capsys.readouterr().out
    for bad in (["--train", str(tmp_path / "gone.jsonl")], ["--train", str(rows), "--distance", "99"]):
        assert main(["eval", "leaks", "--test", str(rows), *bad]) == 2
    assert "no such file" in capsys.readouterr().err
