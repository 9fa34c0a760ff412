"""From a benchmark's files (or the Hub) to prompts: find, read, rename, draw the sample, check the images.

Every raw row ends as a prompt or in `excluded` with its reason; none is dropped in silence.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lingshu_rl.data.labels import labelled, texts_of
from lingshu_rl.data.rows import RowError, row_to_prompt
from lingshu_rl.data.sources import Source, SourceError, open_records
from lingshu_rl.eval.benchmarks import MEDCALC_UNITS, Benchmark, EvalError, prompt_line
from lingshu_rl.images import Picture
from lingshu_rl.types import Prompt

Row = dict[str, Any]
SHOWN = 10
MAX_EXCLUDED = 0.05  # share of rows that may be unusable before the data itself must be wrong
HELD_OUT_FIFTHS = 5


class Skip(RowError):
    """A row that the entry's own rule leaves out (no answer was published); not counted as a fault of the data."""


@dataclass(frozen=True)
class Loaded:
    """prompts: the chosen questions in file order. excluded: (place, reason). total: rows of this benchmark's split."""

    prompts: tuple[Prompt, ...]
    excluded: tuple[tuple[str, str], ...]
    total: int
    source: str
    data_hash: str


def load_benchmark(benchmark: Benchmark, data: str | Path | None, *, limit: int = 0, prompt: str = "auto", images: bool = True) -> Loaded:  # fmt: skip
    """The benchmark's questions. limit: that many, drawn by the hash of their ids (the same for every model and run).

    prompt: a name for `benchmarks.prompt_line`, "auto" for the entry's own. images: False asks without any.
    Raises EvalError when the files are missing, images cannot be read, or over 5 % of the rows cannot be used.
    """
    raw, source, folder = _find(benchmark, data)
    wanted = prompt if prompt != "auto" else benchmark.prompt
    reader = READERS[benchmark.reader]
    kept: list[Prompt] = []
    excluded: list[tuple[str, str]] = []
    skipped = 0
    seen: set[str] = set()
    total = 0
    for number, (record, base) in enumerate(raw, start=1):
        if any(str(record.get(key)) not in values for key, values in benchmark.keep.items() if key in record):
            continue
        try:
            rows: Iterable[Row] = list(reader(benchmark, record, base))
        except RowError as error:
            total += 1
            excluded.append((f"row {number}", str(error)))
            skipped += isinstance(error, Skip)
            continue
        for row in rows:
            total += 1
            row.setdefault("id", f"{number:06d}")
            name = str(row["id"])
            try:
                made = _prompt(benchmark, row, base, wanted, images)
                if made.id in seen:
                    raise RowError("its id stands on an earlier row too")
            except RowError as error:
                excluded.append((f"row {number} (id {name})", str(error)))
                continue
            seen.add(made.id)
            kept.append(made)
    if not total:
        raise EvalError(f"{benchmark.name}: {source} holds no row of this benchmark")
    faults = len(excluded) - skipped
    if faults > max(MAX_EXCLUDED * total, 1):
        lines = "\n".join(f"  {place}: {reason}" for place, reason in excluded[:SHOWN])
        raise EvalError(
            f"{benchmark.name}: {faults} of {total} rows of {source} cannot be used; is it the file that "
            f"`lingshu-rl eval --list` describes?\n{lines}"
        )
    if limit and limit < len(kept):
        chosen = set(sorted(range(len(kept)), key=lambda i: _digest(kept[i].id))[:limit])
        kept = [p for i, p in enumerate(kept) if i in chosen]
    kept = [replace(p, images=tuple(replace(i, source=_found(i.source, folder)) for i in p.images)) for p in kept]
    _check_images(benchmark, kept)
    return Loaded(tuple(kept), tuple(excluded), total, source, _data_hash(kept))


def _prompt(benchmark: Benchmark, row: Row, base: Path, wanted: str, images: bool) -> Prompt:
    if not images:
        row["images"] = []
    meta = {k: v for k, v in row.get("meta", {}).items() if v not in (None, "")}
    row["meta"] = meta
    if row["kind"] == "rubric":
        return Prompt(str(row["id"]), tuple(row["messages"]), (), row["answer"], (), "rubric", meta)
    if wanted == "direct" and row.pop("language", None) == "zh":
        wanted = "direct_zh"
    row.pop("language", None)
    line = prompt_line(wanted, row["kind"], meta)
    # Image paths stay as the source writes them: `_found` looks for them once the sample is drawn.
    return row_to_prompt(row, base_dir=base, instruction=line)


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def _data_hash(prompts: Sequence[Prompt]) -> str:
    """Over ids, wording, options, labels and image bytes of the chosen questions."""
    digest = hashlib.sha256()
    for p in prompts:
        digest.update(json.dumps([p.id, p.messages, p.options, p.gold, p.kind, dict(p.meta)], default=str, ensure_ascii=False, sort_keys=True).encode())  # fmt: skip
        for source in (picture.source for picture in p.images):
            digest.update(Path(source).read_bytes() if isinstance(source, str) else source)
    return digest.hexdigest()[:16]


# ------------------------------------------------------------------------------------------------------------- files


def _find(benchmark: Benchmark, data: str | Path | None) -> tuple[Iterator[tuple[Row, Path]], str, Path]:
    """(rows with the folder their paths start from), what they were read from, the benchmark's folder."""
    if data is None:
        return _hub(benchmark), f"{benchmark.hub} (Hugging Face Hub)", Path(".")
    root = Path(data).expanduser()
    if not root.is_dir():
        raise EvalError(f"--data {root}: no such folder")
    names = dict.fromkeys(name for name in (benchmark.name, benchmark.folder) if name)
    names |= dict.fromkeys(p.name for p in root.iterdir() if _plain(p.name) in {_plain(n) for n in names})
    folders = [root / name for name in names if (root / name).is_dir()] + [root]
    for folder in folders:
        for pattern in benchmark.files:
            parts = [sorted(folder.glob(part)) for part in pattern.split("+")]
            if all(parts):
                files = [file for part in parts for file in part]
                if "+" not in pattern and not benchmark.all_files:
                    files = _one_split(files)
                # A file of the wrong benchmark in a shared folder: its columns say so.
                if folder == root and not _fits(benchmark, files[0]):
                    continue
                shown = ", ".join(str(f.relative_to(root)) for f in files[:3]) + (" ..." if len(files) > 3 else "")
                return _read_files(benchmark, files, folder), f"{shown} in {root}", folder
    looked = "; ".join(f"{f}/{{{','.join(benchmark.files)}}}" for f in folders)
    raise EvalError(
        f"{benchmark.name}: no data found. Looked for {looked}. Put the publisher's files into {root / benchmark.name}"
        + (f", or leave --data out to read {benchmark.hub} from the Hub" if benchmark.hub else "")
    )


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _one_split(files: list[Path]) -> list[Path]:
    """Parquet shards belong together; of other files the first is the split."""
    shards = [f for f in files if f.suffix == ".parquet"]
    return shards or files[:1]


def _fits(benchmark: Benchmark, file: Path) -> bool:
    first = next(iter(_read(file)), None)
    if first is None:
        return False
    keys = set(first)
    asked = {part for alternatives in benchmark.fields.values() for name in alternatives.split("|") for part in name.split(",")}  # fmt: skip
    need = benchmark.fields.get("question") or benchmark.fields.get("answer") or next(iter(benchmark.fields.values()))
    return (bool(keys & set(need.split("|"))) and len(keys & asked) >= 2) or benchmark.reader == "path_vqa"


def _read_files(benchmark: Benchmark, files: Sequence[Path], folder: Path) -> Iterator[tuple[Row, Path]]:
    answers = _answers_beside(benchmark, files[0].parent)
    if benchmark.reader == "report" and len(files) > 1:
        reports, projections = files
        yield from _open_i(reports, projections, folder)
        return
    stems = [file.stem for file in files]
    places = {file: file.stem if stems.count(file.stem) == 1 else f"{file.parent.name}/{file.stem}" for file in files}
    for file in files:
        for number, row in enumerate(_read(file), start=1):
            row.setdefault("subject", file.stem.removesuffix("_test").removeprefix("test_") if len(files) > 1 else row.get("task"))  # fmt: skip
            if answers is not None:
                key = str(row.get("id") or row.get("pubid") or row.get("pmid") or number)
                if benchmark.reader == "pubmedqa" and key not in answers:
                    continue  # a training question
                row = {**row, "answer": answers[key]} if key in answers and benchmark.name == "cmb" else row
            if len(files) > 1:
                row["id"] = f"{places[file]}/{row.get('question_id') or row.get('id') or number}"
            yield row, folder


def _answers_beside(benchmark: Benchmark, folder: Path) -> dict[str, Any] | None:
    """Answers (CMB) or the list of test ids (PubMedQA) that the publisher keeps in a file of their own."""
    pattern = {"cmb": "**/*choice-answer*.json", "pubmedqa": "test_ground_truth.json"}.get(benchmark.name)
    found = next(iter(folder.glob(pattern)), None) if pattern else None
    if found is None:
        return None
    content = json.loads(found.read_text(encoding="utf-8"))
    if isinstance(content, dict):
        return {str(k): v for k, v in content.items()}
    return {str(item["id"]): item["answer"] for item in content}


def _read(file: Path) -> Iterator[Row]:
    """The records of a file, of a JSON file by splits those of "test"."""
    try:
        for number, record in (records := open_records(Source(str(file), split="test"))[0]):
            if isinstance(record, RowError):
                raise EvalError(f"{file}, {records.place(number)}: {record}")
            yield dict(record)
    except SourceError as error:
        raise EvalError(f"{file} cannot be read: {error}") from error


def _open_i(reports: Path, projections: Path, folder: Path) -> Iterator[tuple[Row, Path]]:
    """Open-i's two tables joined; the fifth of the studies with the lowest hash, as the publisher names no test set."""
    views: dict[str, list[str]] = {}
    for view in _read(projections):
        views.setdefault(view["uid"], []).append(view["filename"])
    for row in _read(reports):
        if int.from_bytes(_digest(row["uid"]), "big") % HELD_OUT_FIFTHS == 0:
            yield {**row, "image": views.get(row["uid"], [])}, folder


def _hub(benchmark: Benchmark) -> Iterator[tuple[Row, Path]]:
    if not benchmark.hub:
        raise EvalError(
            f"{benchmark.name} is not on the Hub as one data set: give --data DIR with {benchmark.files[0]} in it"
        )
    import datasets

    for config in benchmark.configs:
        try:
            data = datasets.load_dataset(benchmark.hub, config or None, split=benchmark.split)
        except Exception as error:  # the Hub's errors share no base class
            raise EvalError(
                f"{benchmark.name}: {benchmark.hub} {config} cannot be loaded ({type(error).__name__}: {error}); "
                f"download it and give --data DIR, where DIR/{benchmark.name} holds its files"
            ) from error
        for name, feature in data.features.items():
            if isinstance(feature, datasets.Image):
                data = data.cast_column(name, datasets.Image(decode=False))
        for number, row in enumerate(data, start=1):
            row = {"subject": row.get("task") or config, **row, "_hub": True}
            if len(benchmark.configs) > 1:
                row["id"] = f"{config}/{row.get('id') or number}"
            yield row, Path(".")


def _found(image: str | bytes, folder: Path) -> str | bytes:
    """The file that a source's image path means: beside the file, or in the usual image folders of the benchmark."""
    if isinstance(image, bytes) or Path(image).is_file():
        return image
    base = folder.resolve()
    relative = Path(image).relative_to(base) if Path(image).is_relative_to(base) else Path(Path(image).name)
    places = ("images", "imgs", "Images", "figures", "images/images_normalized", "files", "")
    names = (relative, Path(*relative.parts[1:])) if len(relative.parts) > 1 else (relative,)
    for place in places:
        for name in names:
            for suffix in ("", ".jpg"):
                if (path := base / place / f"{name}{suffix}").is_file():
                    return str(path)
    return image


def _check_images(benchmark: Benchmark, prompts: Sequence[Prompt]) -> None:
    pictures = dict.fromkeys(picture for p in prompts for picture in p.images)
    faults: dict[Picture, str] = {picture: fault for picture in pictures if (fault := picture.fault())}
    if faults:
        lines = "\n".join(f"  {fault}" for fault in list(faults.values())[:SHOWN])
        raise EvalError(
            f"{benchmark.name}: {len(faults)} images cannot be used (put them into an `images` folder beside the "
            f"questions, or ask without any: --no-images):\n{lines}"
        )


# ------------------------------------------------------------------------------------------------------------ readers


def _get(benchmark: Benchmark, row: Row, name: str) -> Any:
    """The first of the field's alternatives that the row has; a list for fields joined by commas."""
    for alternative in filter(None, benchmark.fields.get(name, "").split("|")):
        if "," in alternative:
            parts = [part.strip() for part in alternative.split(",")]
            if any(part in row for part in parts):
                return [row.get(part) for part in parts if not _missing(row.get(part))]
        elif alternative in row and not _missing(row[alternative]):
            return row[alternative]
    return None


def _missing(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, float) and value != value)


def _need(benchmark: Benchmark, row: Row, name: str) -> Any:
    value = _get(benchmark, row, name)
    if value is None:
        raise RowError(f"has no {name}: none of the fields {benchmark.fields.get(name)!r}")
    return value


def _base(benchmark: Benchmark, row: Row) -> Row:
    out: Row = {"meta": _groups(benchmark, row), "images": _images(_get(benchmark, row, "images"))}
    if "language" in benchmark.fields:
        out["language"] = _get(benchmark, row, "language")
    name = _get(benchmark, row, "id")
    if name is None and row.get("id") is not None:
        name = row["id"]
    if name is not None:
        out["id"] = str(name)
    return out


def _groups(benchmark: Benchmark, row: Row) -> Row:
    found = {}
    for group, source in benchmark.groups.items():
        value = next((row[s] for s in source.split("|") if not _missing(row.get(s))), None)
        if isinstance(value, list):
            value = next((v.removeprefix("theme:") for v in value if str(v).startswith("theme:")), None)
        if value is not None:
            found[group] = str(value)
    return found


def _images(value: Any) -> list[Any]:
    if value is None:
        return []
    values = value if isinstance(value, list | tuple) else [value]
    return [v["image_path"] if isinstance(v, Mapping) and "image_path" in v else v for v in values]


# A yes or no in the words a Chinese label uses; a label and every word of its group are one answer.
_YES_ZH = ("是", "是的", "有", "包含", "存在", "可以", "能", "对", "yes")
_NO_ZH = ("否", "不是", "没有", "不包含", "不存在", "不可以", "不能", "不", "no")


def _answered(row: Row, question: str, answer: Any) -> Row:
    """A question with a short free answer: yesno where the label says yes or no, else open."""
    text = str(answer).strip()
    word = text.lower().rstrip(".")
    if word in ("yes", "no"):
        return {**row, "question": question, "answer": word, "kind": "yesno"}
    for group in (_YES_ZH, _NO_ZH):
        if text in group:
            row["meta"]["synonyms"] = [w for w in group if w != text]
    return {**row, "question": question, "answer": text, "kind": "open"}


def read_vqa(benchmark: Benchmark, row: Row, base: Path) -> Iterator[Row]:
    question, answer = _need(benchmark, row, "question"), _need(benchmark, row, "answer")
    yield _answered(_base(benchmark, row), str(question), answer)


def read_vqa_held_out(benchmark: Benchmark, row: Row, base: Path) -> Iterator[Row]:
    if vqa_rad_held_out(str(row.get("image_name"))):
        yield from read_vqa(benchmark, row, base)


def vqa_rad_held_out(image_name: str) -> bool:
    """Whether an image of VQA-RAD is held out: about a fifth, by the hash of its name, so that no list has to be kept."""
    return int.from_bytes(_digest(Path(image_name).stem), "big") % HELD_OUT_FIFTHS == 0


def read_path_vqa(benchmark: Benchmark, row: Row, base: Path) -> Iterator[Row]:
    """One question a row (Hub), or an image with lists of questions and labels (the authors' LXMERT-style file)."""
    if "sentf" not in row:
        yield from read_vqa(benchmark, row, base)
        return
    for number, (question, label) in enumerate(zip(row["sentf"]["pvqa"], row["labelf"]["pvqa"], strict=True)):
        own = {"id": f"{row['img_id']}/{number}", "images": [f"{row['img_id']}.jpg"], "meta": {}}
        yield _answered(own, question, next(iter(label)))


def read_choice(benchmark: Benchmark, row: Row, base: Path) -> Iterator[Row]:
    """A question with options in any of the usual forms, in its text too; several right options become `meta.multi`."""
    out = _base(benchmark, row)
    question, answer = str(_need(benchmark, row, "question")), _need(benchmark, row, "answer")
    options = _get(benchmark, row, "options")
    text = isinstance(answer, str) and answer in texts_of(options)  # a number that is an option's text is no index
    first = None if text else int(benchmark.one_based and not row.get("_hub"))
    made = labelled({**out, "question": question, "options": options, "answer": answer, "kind": "option"}, first)
    if str(row.get("question_type", "")).startswith("多"):
        made["meta"]["multi"] = True
    yield made


def read_mmmu(benchmark: Benchmark, row: Row, base: Path) -> Iterator[Row]:
    question = re.sub(r"<image (\d+)>", r"[image \1]", str(_need(benchmark, row, "question")))
    if _get(benchmark, row, "answer") in (None, "?"):
        raise Skip("its answer is not published")
    if row.get("question_type") == "multiple-choice":
        options = re.sub(r"<image (\d+)>", r"[image \1]", str(_need(benchmark, row, "options")))
        yield from read_choice(benchmark, {**row, "question": question, "options": options}, base)
    else:
        answer = _need(benchmark, row, "answer")
        golds = ast.literal_eval(answer) if str(answer).startswith("[") else [answer]
        out = _answered(_base(benchmark, row), question, golds[0])
        out["meta"]["synonyms"] = [str(g) for g in golds[1:]]
        yield out


def read_pubmedqa(benchmark: Benchmark, row: Row, base: Path) -> Iterator[Row]:
    contexts = _need(benchmark, row, "contexts")
    contexts = contexts.get("contexts") if isinstance(contexts, Mapping) else contexts
    text = "\n".join(contexts) if isinstance(contexts, list) else str(contexts)
    question = f"Abstract: {text}\nQuestion: {_need(benchmark, row, 'question')}"
    yield {**_base(benchmark, row), "question": question, "options": ["yes", "no", "maybe"],
           "answer": _need(benchmark, row, "answer"), "kind": "option"}  # fmt: skip


def read_medcalc(benchmark: Benchmark, row: Row, base: Path) -> Iterator[Row]:
    calculator, answer = str(_need(benchmark, row, "calculator")), str(_need(benchmark, row, "answer")).strip()
    if answer.upper() == "N/A":
        raise Skip("the label says that the note does not allow an answer (N/A)")
    if calculator not in MEDCALC_UNITS:
        raise RowError(f"unknown calculator {calculator!r}: add its unit to MEDCALC_UNITS")
    unit = MEDCALC_UNITS[calculator]
    out = _base(benchmark, row)
    question = f"Patient note: {_need(benchmark, row, 'note')}\nQuestion: {_need(benchmark, row, 'question')}"
    out |= {"question": question, "kind": "numeric", "answer": answer}
    if unit == "date":
        out["meta"]["kind"] = "date"
    elif weeks := re.fullmatch(r"\('(\d+) weeks', '(\d+) days'\)", answer):
        out["answer"] = f"{weeks[1]} weeks {weeks[2]} days"
        out["meta"]["kind"] = "duration"
        out["tolerance"] = {"exact": True}
    else:
        # The limits say how near is near enough, whatever the kind of the value.
        low, high = float(_need(benchmark, row, "lower")), float(_need(benchmark, row, "upper"))
        out["tolerance"] = {"lower": min(low, high), "upper": max(low, high)}
        out["answer"] = float(answer)
        if unit == "score":
            out["meta"]["kind"] = "score"
        elif unit:
            out["unit"] = unit
    yield out


def read_report(benchmark: Benchmark, row: Row, base: Path) -> Iterator[Row]:
    """The reference is the report's text, or its findings and impression; an empty section adds nothing."""
    sections = [str(_get(benchmark, row, name) or "").strip() for name in ("findings", "impression")]
    text = str(_get(benchmark, row, "report") or "").strip() or "\n".join(s for s in sections if s and s != "None")
    if not text:
        raise Skip("its report is empty")
    yield {**_base(benchmark, row), "question": "These are the images of one study.", "answer": text, "kind": "report"}


def read_rubric(benchmark: Benchmark, row: Row, base: Path) -> Iterator[Row]:
    given = _need(benchmark, row, "rubrics")
    rubrics = [{"criterion": str(r["criterion"]), "points": float(r["points"])} for r in given]
    if not any(float(r["points"]) > 0 for r in given):
        raise RowError("no criterion of its rubric gives points")
    messages = [{"role": m["role"], "content": m["content"]} for m in _need(benchmark, row, "messages")]
    yield {**_base(benchmark, row), "messages": messages, "answer": rubrics, "kind": "rubric", "images": []}


READERS: Mapping[str, Callable[[Benchmark, Row, Path], Iterator[Row]]] = {
    "vqa": read_vqa,
    "vqa_held_out": read_vqa_held_out,
    "path_vqa": read_path_vqa,
    "choice": read_choice,
    "mmmu": read_mmmu,
    "pubmedqa": read_pubmedqa,
    "medcalc": read_medcalc,
    "report": read_report,
    "rubric": read_rubric,
}
