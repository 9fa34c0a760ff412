"""Feeds damaged files of a kind to their reader, in a process with little memory: `feeding.py KIND COUNT SEED FOLDER`.

Prints counts as JSON. Whatever a reader raises that is no refusal ends the process with its traceback, and the file
that did it lies in FOLDER.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import logging
import random
import resource
import sys
import tarfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mutants import mutant

MEMORY = 1 << 30  # bytes a reader may take beyond what the process has when all is imported
ROWS = [
    {"id": "a", "images": [], "question": "Which side?", "options": ["left", "right"], "answer": "A", "kind": "option"},
    {
        "id": "b",
        "images": ["film.png"],
        "question": "Wie viele?",
        "answer": 3,
        "kind": "numeric",
        "unit": "mm",
        "tolerance": {"abs": 1},
    },
    {
        "id": "ç",
        "images": [],
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Größe?"}]}],
        "answer": "yes",
        "kind": "yesno",
    },
    {
        "id": "d",
        "images": [],
        "question": "Describe.",
        "answer": "No effusion.",
        "kind": "report",
        "meta": {"modality": "CT", "x": [1, {"y": None}]},
    },
]


INTACT = {"id": "intact", "images": [], "question": "Which organ?", "answer": "liver", "kind": "open"}


@dataclass(frozen=True)
class Kind:
    """seeds: whole files by name. read: what becomes of one: reasons for what is refused, "" for what is taken.

    after: what stands behind the damage and must be read whatever that is.
    """

    seeds: Callable[[], dict[str, bytes]]
    read: Callable[[Path], Iterator[str]]
    after: bytes = b""


def loaded(path: Path, **layout: Any) -> Iterator[str]:
    """As training reads rows, and curation after it, for itself and to compare with."""
    from lingshu_rl.curate.readers import Source, read_rows
    from lingshu_rl.data.load import DataError, load
    from lingshu_rl.data.sources import SourceError

    try:
        told = load({"path": str(path), **layout}, skip_bad_rows=True)
        yield from ["" if prompt.id != "intact" else "intact" for prompt in told.prompts]
        yield from [f"row: {refused.reason}" for refused in told.refused]
    except DataError as error:
        yield f"source: {error}"
    for strict in (True, False):
        try:
            for record in read_rows(Source(str(path), name="s", **layout), label=True, strict=strict):
                yield "" if record.row else f"{record.reason}: {record.detail}"
                json.dumps(record.row, default=len)
                f"{record.place} {record.detail}".encode("utf-8", "surrogatepass")
        except SourceError as error:
            yield f"source: {error}"


TABLE = partial(loaded, format="usual")
SHARD = partial(loaded, map={name: f"json.{name}" for name in ("id", "question", "options", "answer", "kind")})


def scanned(path: Path) -> Iterator[str]:
    from lingshu_rl.curate.readers import Source, read_rows
    from lingshu_rl.imaging.pixels import ScanOptions

    scan = ScanOptions(frames="all", burned_in=True)
    kind = "nifti" if ".nii" in path.name else "dicom"
    source = Source(str(path), format=kind, scan=scan, values={"question": "What is it?", "answer": "a scan"})
    for record in read_rows(source):
        yield "" if record.row else f"{record.reason}: {record.detail}"
        f"{record.place} {record.detail}".encode()


def pictured(path: Path) -> Iterator[str]:
    from lingshu_rl.imaging.images import Picture

    picture = Picture(str(path))
    fault = picture.fault()
    if fault is None:
        with_pixels = Picture(picture.encoded()).size
        assert with_pixels == picture.size, (with_pixels, picture.size)
    yield fault or ""


# --------------------------------------------------------------------------------------------------------------- seeds


def json_lines() -> dict[str, bytes]:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
    return {"t.jsonl": text, "r.jsonl": text.replace(b"\n", b"\r"), "n.jsonl": text.replace(b"\n", b"\r\n")}


def json_files() -> dict[str, bytes]:
    whole = {"array": ROWS, "split": {"train": ROWS}, "by_id": {row["id"]: row for row in ROWS}, "one": ROWS[0]}
    return {f"{name}.json": json.dumps(told, ensure_ascii=False, indent=1).encode() for name, told in whole.items()}


def tables() -> dict[str, bytes]:
    rows = [{"id": "a", "question": 'Which, "left"?', "options": '["left", "right"]', "answer": "A"}]
    rows += [{"id": str(n), "question": "Où ?", "answer": "là", "kind": "open"} for n in range(6)]
    made = {}
    for name, dialect in {"t.csv": "unix", "t.tsv": "excel-tab", "r.csv": "excel"}.items():
        out = io.StringIO(newline="")
        table = csv.DictWriter(out, ["id", "question", "options", "answer", "kind"], dialect=dialect)
        table.writeheader()
        table.writerows(rows)
        made[name] = out.getvalue().encode()
    return made


def packed() -> dict[str, bytes]:
    import bz2
    import lzma

    (text, *_) = json_lines().values()
    ways = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
    return {f"t.jsonl.{ending}": pack(text) for ending, pack in ways.items()}


def parquets() -> dict[str, bytes]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def written(table: pa.Table, **options: Any) -> bytes:
        out = io.BytesIO()
        pq.write_table(table, out, **options)
        return out.getvalue()

    plain = [{**INTACT, "id": str(n), "options": None} for n in range(9)]
    meta = pa.array([[("modality", "CT")]] * 9, pa.map_(pa.string(), pa.string()))
    mapped = pa.Table.from_pylist(plain).append_column("meta", meta)
    return {
        "a.parquet": written(pa.Table.from_pylist(plain)),
        "m.parquet": written(mapped, compression="none"),
        "i.parquet": written(mapped.append_column("__index_level_0__", pa.array(range(9))), use_dictionary=False),
    }


def shards() -> dict[str, bytes]:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as shard:
        for row in [row for row in ROWS if "question" in row]:
            for ending, data in {"json": json.dumps(row).encode(), "txt": b"caption", "cls": b"3"}.items():
                member = tarfile.TarInfo(f"{row['id']}.{ending}")
                member.size = len(data)
                shard.addfile(member, io.BytesIO(data))
    return {"t.tar": out.getvalue(), "t.tar.gz": gzip.compress(out.getvalue())}


def dicoms() -> dict[str, bytes]:
    """Of every way in which pixels are written the smallest that pydicom ships."""
    from pydicom.data import get_testdata_file

    folder = Path(str(get_testdata_file("CT_small.dcm", download=False))).parent
    files = [file for file in folder.iterdir() if file.suffix == ".dcm" and file.stat().st_size < 45_000]
    return {file.name: file.read_bytes() for file in sorted(files)}


def volumes() -> dict[str, bytes]:
    import nibabel
    import numpy as np

    values = np.random.default_rng(0).integers(0, 900, (9, 8, 7))
    made = {
        "a.nii": nibabel.Nifti1Image(values.astype(np.int16), np.diag([1.0, 2.0, 3.0, 1.0])),
        "f.nii": nibabel.Nifti1Image(values.astype(np.float32)[..., None].repeat(3, 3), np.diag([-1.0, 1.0, 9.0, 1.0])),
        "b.nii": nibabel.Nifti2Image(values.astype(np.uint8), np.eye(4)),
    }
    data = {name: image.to_bytes() for name, image in made.items()}
    return {**data, "a.nii.gz": gzip.compress(data["a.nii"]), "f.nii.gz": gzip.compress(data["f.nii"])}


def pictures() -> dict[str, bytes]:
    from PIL import Image

    film = Image.linear_gradient("L").resize((90, 60)).convert("RGB")
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    ways: dict[str, dict[str, Any]] = {
        "PNG": {"exif": exif},
        "JPEG": {"exif": exif, "xmp": b'tiff:Orientation="8"'},
        "WEBP": {"exif": exif},
        "TIFF": {"compression": "tiff_lzw"},
        "BMP": {},
        "GIF": {},
        "PPM": {},
        "MPO": {"save_all": True, "append_images": [film.rotate(9)]},
    }
    made = {}
    for kind, options in ways.items():
        out = io.BytesIO()
        film.save(out, kind, **options)
        made[f"{kind.lower()}.img"] = out.getvalue()
    return made


KINDS = {
    "json lines": Kind(json_lines, loaded, f"\n{json.dumps(INTACT)}".encode()),
    "json": Kind(json_files, loaded),
    "tables": Kind(tables, TABLE),
    "packed": Kind(packed, loaded),
    "parquet": Kind(parquets, loaded),
    "tar": Kind(shards, SHARD),
    "dicom": Kind(dicoms, scanned),
    "nifti": Kind(volumes, scanned),
    "pictures": Kind(pictures, pictured),
}


def limit_memory() -> None:
    """From here on the process may take MEMORY more, in addresses: nothing that a file claims is reserved for it."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    allowed = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (allowed, allowed))


def feed(name: str, count: int, seed: int, folder: Path) -> dict[str, Any]:
    kind = KINDS[name]
    (folder / "film.png").write_bytes(pictures()["png.img"])
    seeds = kind.seeds()
    for file, data in sorted(seeds.items()):  # imports and pools stand before the limit does
        (folder / file).write_bytes(data)
        if any(said := list(kind.read(folder / file))):
            print(file, said, file=sys.stderr)
            del seeds[file]
    assert seeds, "no whole file is read"
    limit_memory()
    counts: Counter[str] = Counter()
    slowest = 0.0
    for number in range(count):
        rng = random.Random(f"{seed} {number}")
        name = rng.choice(sorted(seeds))
        file = folder / f"{number}-{name}"  # what was prepared of a path is kept
        file.write_bytes(mutant(seeds[name], rng) + kind.after)
        began = time.monotonic()
        said = list(kind.read(file))
        slowest = max(slowest, time.monotonic() - began)
        counts["read" if not any(said) else "read in part" if "" in said else "refused"] += 1
        assert not kind.after or "intact" in said, said
        for reason in filter(None, said):
            assert len(reason) < 20_000 and "Traceback" not in reason, reason
        file.unlink()
    return {
        "tried": count,
        **counts,
        "slowest_s": round(slowest, 2),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    print(json.dumps(feed(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))))
