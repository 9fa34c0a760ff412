"""The whole pipeline: the same files after a kill, every row accounted for, rows that train, and the real sets."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from curate_helpers import jpeg, png, question, read_rows, texture, write_rows
from PIL import Image

from lingshu_rl.cli import main
from lingshu_rl.curate.pipeline import STEPS, load_pipeline, parse_pipeline, run_pipeline
from lingshu_rl.data.load import load
from lingshu_rl.failures import ConfigError
from lingshu_rl.imaging.pixels import PSEUDONYM_KEY_ENV
from lingshu_rl.progress import Progress
from lingshu_rl.storage.folders import LOCK

ROOT = Path(__file__).resolve().parent.parent.parent


def make_set(folder: Path, rows: int = 60) -> dict[str, Any]:
    """A pipeline over `rows` questions about 20 pictures, some of them copies."""
    (folder / "images").mkdir(parents=True)
    for i in range(20):
        data = jpeg(texture(i % 15), 60) if i >= 15 else png(texture(i))
        (folder / "images" / f"{i}.png").write_bytes(data)
    written = [question(i, images=[f"{i % 20}.png"], question=f"Is finding {i // 40} present?", kind="yesno",
                        answer="yes" if i % 3 else "no", patient_id=f"p{i % 20 // 2}") for i in range(rows)]  # fmt: skip
    written.append({"id": "broken"})
    source = {"name": "set", "path": str(write_rows(folder / "set.jsonl", written))}
    steps = ["quality", "dedup_images", "dedup_text", "tag", {"balance": {"max_share": 0.6}}, {"split": {"test": 0.3}}]
    return {"out": str(folder / "out"), "sources": [source], "steps": steps}


def outputs(out: Path) -> dict[str, str]:
    """Hash of everything that is not work in progress; times in the report are left out."""
    found = {}
    for path in sorted(p for p in out.rglob("*") if p.is_file() and not {"work", LOCK} & set(p.relative_to(out).parts)):
        data = path.read_bytes()
        if path.name == "report.json":
            report = json.loads(data)
            for step in report["steps"]:
                step.pop("seconds")
            data = json.dumps(report).encode()
        found[str(path.relative_to(out))] = hashlib.sha256(data).hexdigest()
    return found


def run(settings: dict[str, Any]) -> dict[str, Any]:
    return run_pipeline(parse_pipeline(settings), Progress(quiet=True))


def test_every_row_is_kept_or_in_a_side_file(tmp_path: Path) -> None:
    settings = make_set(tmp_path)
    report = run(settings)
    out = Path(settings["out"])
    dropped = [entry for path in sorted((out / "dropped").iterdir()) for entry in read_rows(path)]
    kept = [row for name in report["files"] for row in read_rows(out / name)]
    assert len(kept) + len(dropped) == 61
    assert {entry["reason"] for entry in dropped} >= {"bad_row", "duplicate_question", "surplus"}
    assert all(entry["row"] for entry in dropped if entry["reason"] != "bad_row")
    steps = report["steps"]
    assert all(a["kept"] == b["in"] for a, b in pairwise(steps))
    assert report["sources"] == {"set": {"read": 61, "left": len(kept)}}
    assert "duplicate_question" in (out / "report.md").read_text()
    with Image.open(out / "funnel.png") as picture:
        assert picture.width > 500


def test_the_rows_train_as_they_are(tmp_path: Path) -> None:
    settings = make_set(tmp_path)
    run(settings)
    prompts = load(Path(settings["out"]) / "train.jsonl").prompts
    assert prompts and all(p.meta["source"] == "set" and p.meta["patient_id"] for p in prompts)


def test_a_finished_run_is_not_run_again_and_a_change_reruns_what_follows(tmp_path: Path) -> None:
    settings = make_set(tmp_path)
    run(settings)
    work = Path(settings["out"]) / "work"
    times = {p.name: p.stat().st_mtime_ns for p in work.glob("*.jsonl")}
    before = outputs(Path(settings["out"]))
    run(settings)
    assert {p.name: p.stat().st_mtime_ns for p in work.glob("*.jsonl")} == times
    assert outputs(Path(settings["out"])) == before
    settings["steps"][4] = {"balance": {"max_share": 0.5}}
    run(settings)
    changed = {p.name for p in work.glob("*.jsonl") if p.stat().st_mtime_ns != times[p.name]}
    assert changed == {"05_balance.jsonl", "06_split.jsonl"}
    settings["steps"] = settings["steps"][:2]
    run(settings)
    assert sorted(p.name for p in (Path(settings["out"]) / "dropped").iterdir()) == [
        "00_read.jsonl",
        "01_quality.jsonl",
        "02_dedup_images.jsonl",
    ]
    assert not (Path(settings["out"]) / "train.jsonl").exists()


class Stop(Exception):
    pass


def test_a_run_that_dies_at_any_row_gives_the_same_files_when_it_is_started_again(tmp_path: Path) -> None:
    settings = make_set(tmp_path)
    run(settings)
    whole = outputs(Path(settings["out"]))

    class Dying(Progress):
        def __init__(self, rows: int) -> None:
            super().__init__(quiet=True)
            self.left = rows

        def advance(self, note: str = "", by: int = 1) -> None:
            self.left -= 1
            if self.left < 0:
                raise Stop

    for rows in (0, 61, 100, 160, 230):
        again = {**settings, "out": str(tmp_path / f"died{rows}")}
        with pytest.raises(Stop):
            run_pipeline(parse_pipeline(again), Dying(rows))
        run(again)
        assert outputs(Path(again["out"])) == whole, rows


def test_killed_processes_too(tmp_path: Path) -> None:
    settings = make_set(tmp_path)
    run(settings)
    whole = outputs(Path(settings["out"]))
    out = tmp_path / "killed"
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "lingshu_rl.cli", "curate", str(tmp_path / "p.yaml"), "--out", str(out)]
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL
    )
    while process.poll() is None and not (out / "work" / "01_quality.jsonl.part").exists():
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (
        subprocess.run(
            command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL
        ).returncode
        == 0
    )
    assert outputs(out) == whole


def test_pictures_are_copied_when_asked(tmp_path: Path) -> None:
    settings = {**make_set(tmp_path), "copy_images": True}
    run(settings)
    out = Path(settings["out"])
    rows = read_rows(out / "train.jsonl")
    assert all((out / image).is_file() and not Path(image).is_absolute() for row in rows for image in row["images"])


def test_a_picture_that_comes_later_or_is_repaired_is_noticed(tmp_path: Path) -> None:
    """As after a download that went on: one file was missing, one was cut off, one of a benchmark was not there yet."""
    settings = make_set(tmp_path)
    pictures = tmp_path / "images"
    late, whole = (pictures / "3.png").read_bytes(), (pictures / "4.png").read_bytes()
    (pictures / "3.png").unlink()
    (pictures / "4.png").write_bytes(whole[:200])
    bench = write_rows(tmp_path / "bench" / "b.jsonl", [question(0, images=["b.png"])])
    settings["steps"] = ["quality", {"decontaminate": {"against": [{"name": "bench", "path": str(bench)}]}}]
    out = Path(settings["out"])

    def reasons() -> dict[str, int]:
        return {k: v for step in run(settings)["steps"] for k, v in step["reasons"].items() if k != "bad_row"}

    assert reasons() == {"missing_image": 3, "unreadable_image": 3}
    (pictures / "3.png").write_bytes(late)
    assert reasons() == {"unreadable_image": 3}
    (pictures / "4.png").write_bytes(whole)
    assert reasons() == {}
    (bench.parent / "b.png").write_bytes((pictures / "5.png").read_bytes())
    assert reasons() == {"benchmark_image": 3}
    before = outputs(out)
    stamps = [path.stat().st_mtime_ns for path in sorted((out / "work").glob("*.json"))]
    run(settings)
    assert [path.stat().st_mtime_ns for path in sorted((out / "work").glob("*.json"))] == stamps  # nothing ran again
    assert outputs(out) == before


def test_pictures_of_the_outputs_own_folder_are_made_again_when_they_are_gone(tmp_path: Path) -> None:
    import shutil

    import pyarrow
    import pyarrow.parquet

    row = {"id": "a", "images": [png(texture(1))], "question": "Q?", "answer": "a lung", "kind": "open"}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "a.parquet")
    settings = {"out": str(tmp_path / "out"), "sources": [{"path": str(tmp_path / "a.parquet")}], "steps": ["quality"]}
    run(settings)
    shutil.rmtree(tmp_path / "out" / "images")
    run(settings)
    (written,) = read_rows(tmp_path / "out" / "rows.jsonl")
    assert (tmp_path / "out" / written["images"][0]).is_file()


def test_another_pseudonym_key_makes_other_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nibabel
    import numpy as np

    volume = np.random.default_rng(0).uniform(0, 1, (40, 40, 8)).astype(np.float32)
    (tmp_path / "raw").mkdir()
    nibabel.save(nibabel.Nifti1Image(volume, np.diag([1.0, 1.0, 10.0, 1.0])), tmp_path / "raw" / "Sub_001.nii")
    source = {"path": str(tmp_path / "raw"), "format": "nifti", "values": {"question": "Q?", "answer": "a phantom"}}
    settings = {"out": str(tmp_path / "out"), "sources": [source], "steps": ["tag"]}

    def patients() -> set[str]:
        run(settings)
        return {row["meta"]["patient_id"] for row in read_rows(tmp_path / "out" / "rows.jsonl")}

    before = patients()
    monkeypatch.setenv(PSEUDONYM_KEY_ENV, "another secret")
    assert len(before) == 1 and before.isdisjoint(patients())
    assert "another secret" not in "".join(p.read_text() for p in (tmp_path / "out" / "work").glob("*.json"))


def test_a_row_cannot_name_the_file_that_it_is_written_to(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "a.jsonl", [question(1, meta={"_split": "../../x", "split": "gold"})])
    run({"out": str(tmp_path / "out"), "sources": [{"path": str(rows)}]})
    (row,) = read_rows(tmp_path / "out" / "rows.jsonl")
    assert row["meta"] == {"split": "gold", "source": "a"}


def test_ids_are_told_apart_by_source_and_doubles_dropped(tmp_path: Path) -> None:
    sources = [
        {"name": name, "path": str(write_rows(tmp_path / f"{name}.jsonl", [question(1), question(1), question(2)]))}
        for name in ("a", "b")
    ]
    run({"out": str(tmp_path / "out"), "sources": sources})
    assert [row["id"] for row in read_rows(tmp_path / "out" / "rows.jsonl")] == ["a:q1", "a:q2", "b:q1", "b:q2"]
    assert [d["reason"] for d in read_rows(tmp_path / "out" / "dropped" / "00_read.jsonl")] == ["duplicate_id"] * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stepz": []}, "stepz"),
        ({"out": None}, "out"),
        ({"sources": []}, "at least one source"),
        ({"steps": ["qualty"]}, "did you mean 'quality'"),
        ({"steps": [{"quality": {"min_sid": 3}}]}, "did you mean 'min_side'"),
        ({"steps": [{"quality": {"min_side": "wide"}}]}, "must be int"),
        ({"steps": [{"quality": {}, "tag": {}}]}, "a step is a name"),
        ({"steps": [{"dedup_images": {"by": "hand"}}]}, "neither question nor image"),
        ({"steps": [{"decontaminate": {"against": [{"name": "x"}]}}]}, "'path' is missing"),
        ({"sources": [{"path": "a.jsonl"}, {"path": "b/a.jsonl"}]}, "two sources"),
        ({"sources": [{"path": "a.jsonl", "scan": {"plane": "oblique"}}]}, "oblique"),
        ({"seed": 1.5}, "must be int"),
    ],
)
def test_a_wrong_pipeline_file_is_refused_with_the_key(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    good = {"out": "o", "sources": [{"path": "a.jsonl"}], "steps": ["quality"]}
    path = tmp_path / "p.yaml"
    path.write_text(yaml.safe_dump({**good, **change}))
    with pytest.raises(ConfigError, match=message):
        load_pipeline(path)


def test_the_command_explains_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = make_set(tmp_path)
    path = tmp_path / "p.yaml"
    path.write_text(yaml.safe_dump(settings))
    assert main(["curate", str(path), "--dry-run"]) == 0
    assert "step: balance(of='answer'" in capsys.readouterr().out and not Path(settings["out"]).exists()
    assert main(["curate", str(path), "--out", str(tmp_path / "elsewhere")]) == 0
    assert "| 02_dedup_images | 60 |" in capsys.readouterr().out and (tmp_path / "elsewhere" / "train.jsonl").is_file()
    path.write_text(yaml.safe_dump({**settings, "sources": [{"path": str(tmp_path / "gone.jsonl")}]}))
    assert main(["curate", str(path)]) == 2
    assert "no such file" in capsys.readouterr().err
    path.write_text(yaml.safe_dump({**settings, "steps": [{"balance": {"of": "kind", "max_share": 0.4}}]}))
    assert main(["curate", str(path)]) == 1
    assert "curation stopped: balance" in capsys.readouterr().err


def test_the_recipes_are_valid() -> None:
    recipes = sorted((ROOT / "recipes" / "curate").glob("*.yaml"))
    assert recipes
    used = {step.name for path in recipes for step in load_pipeline(path).steps}
    assert used == set(STEPS)


MEASURE = """
import json, resource, sys
from lingshu_rl.curate.pipeline import parse_pipeline, run_pipeline
from lingshu_rl.progress import Progress
folder, count = sys.argv[1], int(sys.argv[2])
with open(f"{folder}/{count}.jsonl", "w") as file:
    for i in range(count):
        row = {"id": i, "images": [], "question": f"What is the {i}th thing named {i * i}?", "answer": f"a lung {i}", "kind": "open"}
        file.write(json.dumps({**row, "meta": {"note": "x" * 12_000, "patient_id": f"p{i}"}}) + "\\n")
steps = ["quality", "dedup_images", "dedup_text", "tag", "split"]
run_pipeline(parse_pipeline({"out": f"{folder}/out{count}", "sources": [{"path": f"{folder}/{count}.jsonl"}], "steps": steps}), Progress(quiet=True))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    """2,000 more rows of 12 kB are 24 MB: whoever kept them anywhere would show it in the process's peak memory."""
    peaks = []
    for rows in (200, 2_200):
        command = [sys.executable, "-c", MEASURE, str(tmp_path), str(rows)]
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True
        )
        peaks.append(float(done.stdout.splitlines()[-1]))
    assert peaks[1] - peaks[0] < 12, peaks  # MiB


# --- real sets --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_vqa_rad_nih_and_open_i_with_planted_duplicates(shared_data: Path, tmp_path: Path) -> None:
    """The published VQA-RAD training set loses the test set's pictures; planted copies of films and reports go."""
    data = shared_data / "data"
    for needed in ("vqa_rad/trainset.json", "nih_cxr/labels.csv", "openi_reports/indiana_reports.csv"):
        if not (data / needed).is_file():
            pytest.skip(f"no {needed}")
    rng = random.Random(0)
    with (data / "nih_cxr" / "labels.csv").open() as file:
        films = list(csv.DictReader(file))[:160]
    originals = [question(0, id=f["image"], images=[str(data / "nih_cxr" / "images384" / f["image"])], question="What does the film show?",
                          answer=f["findings"], patient_id=f["patient"]) for f in films]  # fmt: skip
    planted = []
    for row in rng.sample(originals, 40):
        with Image.open(row["images"][0]) as picture:
            turned = picture.convert("L").rotate(rng.uniform(-4, 4), Image.Resampling.BICUBIC).resize((250, 250))
        path = tmp_path / f"copy_{row['id']}"
        path.write_bytes(jpeg(turned, 40))
        planted.append({**row, "id": f"copy_{row['id']}", "images": [str(path)]})
    with (data / "openi_reports" / "indiana_reports.csv").open() as file:
        reports = [r for r in csv.DictReader(file) if len(r["findings"].split()) > 25][:300]
    texts = [question(0, id=r["uid"], kind="report", answer=r["findings"]) for r in reports]
    copies = [
        {**t, "id": f"copy_{t['id']}", "answer": " ".join(reversed(t["answer"].upper().split(". ")))}
        for t in rng.sample(texts, 40)
    ]
    settings = {
        "out": str(tmp_path / "out"),
        "sources": [
            {"name": "rad", "path": str(data / "vqa_rad" / "trainset.json"), "trust": 3},
            {"name": "nih", "path": str(write_rows(tmp_path / "nih.jsonl", originals)), "trust": 2},
            {"name": "openi", "path": str(write_rows(tmp_path / "openi.jsonl", texts)), "trust": 2},
            {"name": "planted", "path": str(write_rows(tmp_path / "planted.jsonl", [*planted, *copies]))},
        ],
        "steps": [
            "quality",
            "dedup_images",
            {"caption_length": {"min": 10, "max": 1024}},
            "dedup_text",
            "tag",
            {"decontaminate": {"against": [{"name": "rad_test", "path": str(data / "vqa_rad" / "testset.json")}]}},
            {"balance": {"kinds": ["yesno"], "max_share": 0.5}},
            {"split": {"validation": 0.1, "test": 0.1}},
        ],
    }
    report = run(settings)
    out = Path(settings["out"])
    by_image = [d for d in read_rows(out / "dropped" / "02_dedup_images.jsonl") if d["source"] != "rad"]
    assert sum(d["source"] == "planted" for d in by_image) >= 39
    assert [d for d in by_image if d["source"] == "nih" and "score" in d["detail"]] == []  # no film taken for another
    by_text = read_rows(out / "dropped" / "04_dedup_text.jsonl")
    assert sum(d["source"] == "planted" for d in by_text) >= 38
    leak = report["steps"][6]["notes"]["benchmarks"]["rad_test"]
    assert leak["rows"] == 451 and leak["image"] > 1000
    kept = [row for name in report["files"] for row in read_rows(out / name)]
    test_names = {r["image_name"] for r in json.loads((data / "vqa_rad" / "testset.json").read_text())}
    assert len(test_names) == 203
    assert not {Path(image).name for row in kept for image in row["images"]} & test_names
    assert (out / "funnel.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("out: x\nsources: [{path: a.jsonl, format: lava}]\n", "sources, number 1: format: no preset 'lava'"),
        ("out: ${nowhere}\nsources: [{path: a.jsonl}]\n", "is not readable YAML"),
        ("out: x\nsource: [{path: a.jsonl}]\n", r"unknown key 'source' \(did you mean 'sources'"),
        ("out: x\nsources: {path: a.jsonl}\n", "it is a list, one source an entry beginning with -"),
        ("out: x\nsteps: [quality]\n", "the file has out, steps"),
    ],
)
def test_sources_that_are_missing_or_no_list_are_told_apart(tmp_path, text, reason):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError, match=reason):
        load_pipeline(tmp_path / "a.yaml")
