"""Without --data: data sets fetched from a Hub that has them as their publishers do, pictures in archives and all."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from eval_samples import COUNTS, SAMPLES, write_json, write_parquet
from hub_server import hub
from launching import ROOT

from lingshu_rl.eval.benchmarks import BENCHMARKS

# How data sets stand on the Hub where that is not how SAMPLES write the authors' files: entry -> (sample's file or folder,
# its place on the Hub); of a place that ends in .zip, the folder's content is the archive's.
TREES = {
    "slake": [("test.json", "test.json"), ("imgs", "imgs.zip")],
    "pmc_vqa": [("test_2.csv", "test_clean.csv"), ("figures", "images.zip")],
    "medxpertqa_mm": [("medxpertqa_mm_input.jsonl", "MM/test.jsonl"), ("images", "images.zip")],
    "medxpertqa_text": [("medxpertqa_text_input.jsonl", "Text/test.jsonl")],
    "cmmlu_med": [("test", "cmmlu_v1_0_1.zip")],
    "cmexam": [("test.json", "test.json")],
    "medqa_mcmle": [("Mainland/test.jsonl", "MedQA-MCMLE-test.jsonl")],
}
# Files of other splits, of pictures nobody asks for, and scripts, which are not run.
BESIDE = {
    "slake": ["train.json", "validation.json", "KG.zip", "mask.txt"],
    "pmc_vqa": ["train.csv", "test_2.csv", "images_2.zip", "oa_comm_use_file_list.csv"],
    "medxpertqa_mm": ["MM/dev.jsonl", "Text/test.jsonl"],
    "cmmlu_med": ["cmmlu.py", "README.md"],
    "vqa_rad": ["data/train-00000-of-00001-eb8844602202be60.parquet", "scripts/processing.py"],
    "pubmedqa": ["data/train-00000-of-00001.parquet", "data/validation-00000-of-00001.parquet"],
    "healthbench": ["2025-05-07-06-14-12_oss_meta_eval.jsonl", "hard_2025-05-08-21-00-10.jsonl"],
    "mmlu_med": ["all/test-00000-of-00001.parquet", "agronomy/test-00000-of-00001.parquet", "data.tar"],
    "medcalc": ["data/train-00000-of-00001.parquet"],
}
ASK = """
import json, sys
from lingshu_rl.eval.benchmarks import BENCHMARKS, EvalError
from lingshu_rl.eval.loading import load_benchmark
for name in sys.argv[1:]:
    try:
        found = load_benchmark(BENCHMARKS[name.removesuffix("!")], None, images=not name.endswith("!"))
        print(json.dumps([name, found.total, len(found.prompts), sum(map(bool, (p.images for p in found.prompts))), found.source]))
    except EvalError as error:
        print(json.dumps([name, str(error)]))
"""


def publish(root: Path, name: str) -> Path:
    """The entry's data set as the Hub has it."""
    made, there = root / "made" / name, root / "hub" / name
    SAMPLES[name](made, name)
    (own,) = made.iterdir()
    there.mkdir(parents=True)
    if name in ("vqa_rad", "pubmedqa", "medcalc", "cmexam", "medmcqa", "medthinkvqa"):
        _as_published(name, own)
    for place, target in TREES.get(name, [(".", ".")]):
        if target.endswith(".zip"):
            with zipfile.ZipFile(there / target, "w") as archive:
                for file in sorted((own / place).rglob("*.*")):
                    archive.write(file, Path(place) / file.relative_to(own / place))
        elif target == ".":
            shutil.copytree(own, there, dirs_exist_ok=True)
        else:
            (there / target).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(own / place, there / target)
    for other in BESIDE.get(name, []):
        (there / other).parent.mkdir(parents=True, exist_ok=True)
        (there / other).write_bytes(b"not this one")
    return there


def _as_published(name: str, own: Path) -> None:
    """Sets that others turned into tables: the authors' files make way for those."""
    import csv

    if name == "vqa_rad":
        rows = json.loads((own / "testset.json").read_text())
        table = [{"image": {"bytes": (own / "images" / r["image_name"]).read_bytes(), "path": None}, "question": r["question"], "answer": r["answer"]} for r in rows]  # fmt: skip
        write_parquet(own / "data" / "test-00000-of-00001-e5bc3d208bb4deeb.parquet", table)
    elif name == "pubmedqa":
        rows = json.loads((own / "ori_pqal.json").read_text())
        letters = {"yes": "A", "no": "B", "maybe": "C"}
        table = [{"id": key, "subject_name": None, "data": {"Question": r["QUESTION"], "Context": r["CONTEXTS"], "Options": {"A": "yes", "B": "no", "C": "maybe"}, "Correct Option": letters[r["final_decision"]]}} for key, r in rows.items()][:3]  # fmt: skip
        write_parquet(own / "data" / "test-00000-of-00001.parquet", table)
    elif name == "medcalc":
        with (own / "medcalc_corrected.csv").open() as lines:
            write_parquet(own / "data" / "test-00000-of-00001.parquet", list(csv.DictReader(lines)))
    elif name == "medthinkvqa":  # its pictures stand in the table as well
        rows = [json.loads(line) for line in (own / "test.jsonl").read_text().splitlines()]
        table = [{**r, **{f"image_{n:02d}": {"bytes": (own / r[f"image_{n:02d}_path"]).read_bytes(), "path": None} for n in (1, 2)}} for r in rows]  # fmt: skip
        write_parquet(own / "test.parquet", table)
    elif name == "cmexam":
        with (own / "test_with_annotations.csv").open() as lines:
            write_json(own / "test.json", list(csv.DictReader(lines)))
    else:
        rows = [{**json.loads(line), "cop": n} for n, line in enumerate((own / "dev.json").read_text().splitlines())]
        write_parquet(own / "data" / "validation-00000-of-00001.parquet", rows)
    for file in own.glob("*.*"):
        if file.name not in ("test.json", "test.parquet", "test.jsonl"):
            file.unlink()


ON_HUB = [n for n, b in BENCHMARKS.items() if b.hub and n not in ("slake_en", "slake_zh", "healthbench_hard", "healthbench_consensus")]  # fmt: skip


@pytest.mark.slow
def test_every_set_on_the_hub_is_read_as_its_publisher_laid_it_out(tmp_path):
    """Right rows of the right split with their pictures; no other file is fetched, and no script is run."""
    folders = {name: publish(tmp_path, name) for name in ON_HUB}
    shared = {}
    for name, folder in folders.items():  # MedXpertQA's two halves stand in one data set
        shutil.copytree(folder, shared.setdefault(BENCHMARKS[name].hub, tmp_path / "all" / BENCHMARKS[name].hub), dirs_exist_ok=True)  # fmt: skip
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}  # fmt: skip

    def ask(*names: str, **more: str) -> dict[str, list]:
        done = subprocess.run([sys.executable, "-c", ASK, *names], env={**env, **more}, capture_output=True, text=True, timeout=200)  # fmt: skip
        assert done.returncode == 0, done.stderr
        return {found[0]: found[1:] for found in map(json.loads, done.stdout.splitlines())}

    with hub(shared) as (url, taken):
        blind = ask("slake!", HF_ENDPOINT=url)
        assert blind["slake!"][:3] == [6, 6, 0] and not [f for f in taken if f.endswith(".zip")]
        found = ask(*ON_HUB, HF_ENDPOINT=url)
    wrong = {n: f for n, f in found.items() if len(f) == 1 or f[1] != COUNTS[n] or f[2] != (COUNTS[n] if BENCHMARKS[n].images else 0)}  # fmt: skip
    assert not wrong
    beside = {f"{BENCHMARKS[n].hub}/{f}" for n, names in BESIDE.items() for f in names} - {"TsinghuaC3I/MedXpertQA/Text/test.jsonl"}  # fmt: skip
    assert sorted(beside & set(taken)) == []
    again = ask(*ON_HUB, HF_HUB_OFFLINE="1")  # without a connection, what was fetched is still there
    assert {n: (f, again.get(n)) for n, f in found.items() if again.get(n) != f} == {}


def test_what_cannot_be_fetched_says_where_to_put_it(tmp_path, monkeypatch):
    from lingshu_rl.eval.benchmarks import EvalError
    from lingshu_rl.eval.loading import load_benchmark

    with pytest.raises(EvalError, match=r"slake: BoKelvin/SLAKE cannot be fetched \(.*put its test.json and imgs.zip into DIR/slake and give --data DIR"):  # fmt: skip
        load_benchmark(BENCHMARKS["slake"], None)
    with pytest.raises(EvalError, match=r"cmb is not on the Hub as one data set: put its .* into DIR/cmb and give --data DIR"):  # fmt: skip
        load_benchmark(BENCHMARKS["cmb"], None)


def test_a_downloaded_data_set_is_read_with_its_archives_packed(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", str(tmp_path / "assets"))
    from lingshu_rl.eval.benchmarks import EvalError
    from lingshu_rl.eval.loading import load_benchmark

    shutil.copytree(publish(tmp_path, "slake"), tmp_path / "data" / "slake")
    found = load_benchmark(BENCHMARKS["slake"], tmp_path / "data")
    assert len(found.prompts) == 6 and not found.excluded
    shutil.copytree(publish(tmp_path, "cmmlu_med"), tmp_path / "data" / "cmmlu_med")
    assert len(load_benchmark(BENCHMARKS["cmmlu_med"], tmp_path / "data").prompts) == 6
    (tmp_path / "data" / "slake" / "imgs.zip").write_bytes(b"PK cut off")
    with pytest.raises(EvalError, match=r"imgs\.zip cannot be unpacked"):
        load_benchmark(BENCHMARKS["slake"], tmp_path / "data")
