"""Each step drops what it should, with its reason, and nothing else."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from curate_helpers import jpeg, png, question, texture, write_rows
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from lingshu_rl.curate.burned import text_corners
from lingshu_rl.curate.items import REASONS
from lingshu_rl.curate.shares import targets
from lingshu_rl.curate.steps import StepError
from lingshu_rl.curate.tags import modality_of, organ_of


def save(path: Path, data: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return str(path)


def test_quality_names_what_is_wrong_with_a_picture(curate, tmp_path: Path) -> None:
    pictures = {
        "good": png(texture(1)),
        "small": png(texture(1, (200, 40))),
        "long": png(texture(1, (900, 90))),
        "blank": png(Image.new("L", (100, 100), 7)),
        "broken": png(texture(1))[:300],
        "soft": png(texture(1, (24, 20)).resize((250, 200), Image.Resampling.BICUBIC)),
    }
    rows = [
        question(i, id=name, images=[save(tmp_path / "p" / f"{name}.png", data)])
        for i, (name, data) in enumerate(pictures.items())
    ]
    run = curate([*rows, question(9, id="text")], [{"quality": {"min_sharpness": 12.0}}])
    assert run.dropped("quality") == {"small": "small_image", "long": "long_image", "blank": "blank_image",
                                      "broken": "unreadable_image", "soft": "blurred_image"}  # fmt: skip
    assert run.ids() == ["good", "text"]


def same_pictures(folder: Path) -> dict[str, str]:
    picture = texture(5)
    return {
        "a": save(folder / "a.png", png(picture)),
        "copy": save(folder / "copy.png", png(picture)),
        "jpeg": save(folder / "jpeg.jpg", jpeg(picture.resize((120, 96)), 40)),
        "other": save(folder / "other.png", png(texture(6))),
    }


def test_image_dedup_by_question_keeps_every_question_and_finds_conflicts(curate, tmp_path: Path) -> None:
    p = same_pictures(tmp_path / "p")
    rows = [
        question(0, id="first", images=[p["a"]], question="Which organ?", answer="Lung"),
        question(0, id="again", images=[p["jpeg"]], question="which organ ?", answer="lung"),
        question(0, id="conflict", images=[p["copy"]], question="Which organ?", answer="liver"),
        question(0, id="new question", images=[p["copy"]], question="Which plane?", answer="axial"),
        question(0, id="other picture", images=[p["other"]], question="Which organ?", answer="liver"),
    ]
    run = curate(rows, ["dedup_images"])
    assert run.dropped("dedup_images") == {"again": "duplicate_question", "conflict": "conflicting_answer"}
    assert "s:first" in run.details("dedup_images")["again"] and "score" in run.details("dedup_images")["again"]
    groups = {row["id"]: row["meta"]["image_group"] for row in run.rows()}
    assert groups["s:first"] == groups["s:new question"] != groups["s:other picture"]


def test_image_dedup_knows_a_choice_again_when_its_options_moved(curate, tmp_path: Path) -> None:
    image = same_pictures(tmp_path / "p")["a"]
    rows = [
        question(0, id=name, images=[image], question="Which one?", kind="option", options=options, answer=answer)
        for name, options, answer in (
            ("first", ["lung", "liver"], "A"),
            ("moved", ["liver", "lung"], "B"),
            ("conflict", ["liver", "lung"], "A"),
            ("other options", ["lung", "heart"], "A"),
        )
    ]
    run = curate(rows, ["dedup_images"])
    assert run.dropped("dedup_images") == {"moved": "duplicate_question", "conflict": "conflicting_answer"}


def test_image_dedup_by_image_keeps_the_most_trusted_row(curate, tmp_path: Path) -> None:
    p = same_pictures(tmp_path / "p")
    low = [question(i, id=name, images=[p[name]], kind="report") for i, name in enumerate(("a", "other"))]
    high = [question(7, id="jpeg", images=[p["jpeg"]], kind="report")]
    sources = [
        {"name": "low", "path": str(write_rows(tmp_path / "low.jsonl", low))},
        {"name": "high", "path": str(write_rows(tmp_path / "high.jsonl", high)), "trust": 5},
    ]
    run = curate(sources, [{"dedup_images": {"by": "image"}}])
    assert run.dropped("dedup_images") == {"a": "duplicate_image"}
    assert sorted(row["id"] for row in run.rows()) == ["high:jpeg", "low:other"]
    exact = curate(sources, [{"dedup_images": {"by": "image", "distance": 0}}])
    assert exact.dropped("dedup_images") == {}


REPORT = "The heart is normal in size. The lungs are clear. There is no pleural effusion. Bones are intact."


def test_text_dedup_keeps_the_trusted_copy_and_asks_about_pictures(curate, tmp_path: Path) -> None:
    p = same_pictures(tmp_path / "p")
    low = [question(0, id="reworded", kind="report", answer=REPORT.replace("intact", "unbroken"))]
    high = [
        question(0, id="original", kind="report", answer=REPORT),
        question(0, id="other finding", kind="report", answer=REPORT.replace("no pleural", "a left pleural")),
        question(0, id="yes", kind="yesno", answer="yes", question="Is there any pleural effusion here?", images=[p["a"]]),
        question(0, id="other picture", kind="yesno", answer="yes", question="Is there any pleural effusion here?", images=[p["other"]]),
        question(0, id="other answer", kind="yesno", answer="no", question="Is there any pleural effusion here ?", images=[p["a"]]),
        question(0, id="same", kind="yesno", answer="yes", question="Is there any pleural effusion, here?", images=[p["a"]]),
    ]  # fmt: skip
    sources = [
        {"name": "low", "path": str(write_rows(tmp_path / "low.jsonl", low)), "trust": 1},
        {"name": "high", "path": str(write_rows(tmp_path / "high.jsonl", high)), "trust": 2},
    ]
    run = curate(sources, ["dedup_text"])
    assert run.dropped("dedup_text") == dict.fromkeys(("same", "reworded"), "near_duplicate_text")
    across = curate(sources, [{"dedup_text": {"across_images": True}}])
    assert set(across.dropped("dedup_text")) == {"same", "reworded", "other picture"}
    strict = curate(sources, [{"dedup_text": {"threshold": 0.95}}])
    assert set(strict.dropped("dedup_text")) == {"same"}
    loose = curate(sources, [{"dedup_text": {"guard": False}}])
    assert "other finding" in loose.dropped("dedup_text")


LABELS = ("atelectasis", "cardiomegaly", "pleural effusion", "infiltration", "lung mass", "lung nodule", "pneumonia",
          "pneumothorax", "consolidation", "pulmonary edema", "emphysema", "pulmonary fibrosis")  # fmt: skip
REWORDED = {"Does this chest X-ray show {}?": "Does this chest X-ray image show {}?", "Is there {}?": "is there {} ?",
            "Is there evidence of {} in this study?": "Is there any evidence of {} in this study?"}  # fmt: skip


def test_text_dedup_tells_the_findings_of_template_questions_apart(curate) -> None:
    """Every label asked in three ways about 20 films; what is dropped are the planted copies and nothing else."""
    rng = random.Random(0)
    asked, copies = [], []
    for film in range(20):
        for template, other in REWORDED.items():
            for label in LABELS:
                row = question(0, id=f"{film}-{template[-8:]}-{label}", question=template.format(label), kind="yesno",
                               answer=rng.choice(("yes", "no")), meta={"image_group": f"film{film}"})  # fmt: skip
                asked.append(row)
                if rng.random() < 0.2:
                    copies.append({**row, "id": f"copy-{row['id']}", "question": other.format(label)})
        options = {"question": "Which finding is present?", "kind": "option", "meta": {"image_group": f"film{film}"}}
        for n in range(4):
            shown = rng.sample(LABELS, 4)
            asked.append(question(0, id=f"{film}-option-{n}", **options, options=shown, answer="A"))
            copies.append(question(0, id=f"copy-{film}-option-{n}", **options, options=shown[::-1], answer="D"))
    repeated = {row["id"] for row in copies}
    dropped = set(curate([*asked, *copies], ["dedup_text"]).dropped("dedup_text"))
    assert len(dropped & repeated) >= 0.99 * len(dropped), sorted(dropped - repeated)[:5]
    assert len(dropped & repeated) >= 0.9 * len(repeated), sorted(repeated - dropped)[:40]


def test_text_dedup_reads_conversations_and_option_mappings(curate) -> None:
    def chat(name: str, asks: str, **more: object) -> dict:
        row = question(0, id=name, **more)
        del row["question"]
        return {**row, "messages": [{"role": "user", "content": asks}]}

    two = {"kind": "option", "answer": "A"}
    rows = [
        chat("mass", "Is there a mass in the lung?", kind="yesno", answer="yes"),
        chat("node", "Is there a lymph node in the lung?", kind="yesno", answer="yes"),
        chat("again", "Is there a mass seen in the lung?", kind="yesno", answer="yes"),
        question(1, id="CT", question="Which one?", options={"A": "CT", "B": "MRI"}, **two),
        question(1, id="US", question="Which one?", options={"A": "US", "B": "MRI"}, **two),
    ]
    assert set(curate(rows, ["dedup_text"]).dropped("dedup_text")) == {"again"}
    assert curate(rows, ["dedup_images"]).dropped("dedup_images") == {}


def test_caption_length_counts_tokens_of_its_kinds(curate) -> None:
    rows = [question(i, id=str(n), kind="report", answer="word " * n) for i, n in enumerate((3, 10, 30, 31))]
    run = curate([*rows, question(9, id="open")], [{"caption_length": {"min": 5, "max": 30}}])
    assert run.dropped("caption_length") == {"3": "short_text", "31": "long_text"} and run.ids() == ["10", "30", "open"]
    both = curate(
        [*rows, question(9, id="open")], [{"caption_length": {"min": 5, "max": 30, "kinds": ["open", "report"]}}]
    )
    assert both.dropped("caption_length")["open"] == "short_text"


@pytest.mark.slow
def test_caption_length_with_a_models_tokenizer(curate, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=letters, unk_token="[UNK]").save_pretrained(tmp_path / "tok")
    rows = [question(1, id="a", kind="report", answer="abcdefgh ijk")]
    settings = {"min": 5, "max": 200, "tokenizer": str(tmp_path / "tok")}
    assert curate(rows, [{"caption_length": settings}]).ids() == ["a"]  # 12 letters, but 2 words
    assert curate(rows, [{"caption_length": {"min": 5, "max": 200}}]).dropped("caption_length") == {"a": "short_text"}
    with pytest.raises(StepError, match="cannot be loaded"):
        curate(rows, [{"caption_length": {"tokenizer": str(tmp_path / "none")}}])


def test_deidentify_changes_texts_and_counts_rows(curate) -> None:
    rows = [
        question(0, id="a", answer="Seen on 12/03/2019 by Dr. Roe."),
        question(1, id="b"),
        question(2, id="n", kind="numeric", answer="12/03/2019"),
    ]
    run = curate(rows, ["deidentify"])
    assert [row["answer"] for row in run.rows()] == ["Seen on [date] by Dr. [name].", "a lung", "12/03/2019"]
    assert run.notes("deidentify") == {"rows_changed": 1}


def test_an_answer_that_is_an_identifier_is_no_label(curate) -> None:
    rows = [question(0, id="when", answer="12-Feb-2021."), question(1, id="range", answer="0.55-4.78 uIU/mL")]
    run = curate(rows, ["deidentify"])
    assert run.dropped("deidentify") == {"when": "identifying_answer"}
    assert [row["answer"] for row in run.rows()] == ["0.55-4.78 uIU/mL"]


def test_deidentify_reads_conversations_and_leaves_options_as_they_are(curate) -> None:
    said = [{"role": "user", "content": [{"type": "text", "text": "Dated 12-Feb-2021. Any effusion?"}]}]
    chat = {"id": "chat", "images": [], "messages": said, "answer": "no", "kind": "yesno"}
    choice = question(1, id="choice", kind="option", options=["15 April 1987", "1 May 1990"], answer="15 April 1987")
    first, second = curate([chat, choice], ["deidentify"]).rows()
    assert first["messages"][0]["content"][0]["text"] == "Dated [date]. Any effusion?"
    assert (second["options"], second["answer"]) == (choice["options"], choice["answer"])


@pytest.mark.parametrize(
    ("text", "modality", "organ"),
    [
        ("A chest X-ray of a child", "X-ray", "chest"),
        ("Axial T2-weighted MRI of the brain", "MRI", "brain"),
        ("abdominal CT", "CT", "abdomen"),
        ("Is this a CT or an MRI?", "", ""),
        ("The doctor expected octopus actions", "", ""),
        ("H&E stained section of the liver", "histopathology", "abdomen"),
        ("heart and liver", "", ""),
    ],
)
def test_tags_name_one_thing_or_nothing(text: str, modality: str, organ: str) -> None:
    assert (modality_of(text), organ_of(text)) == (modality, organ)


def test_tag_respells_finds_and_requires(curate) -> None:
    rows = [
        question(0, id="respelt", meta={"modality": "x ray", "organ": "CHEST"}),
        question(1, id="unknown word stays", meta={"modality": "thermography"}),
        question(2, id="found", question="Which organ does this brain MRI show?", answer="the brain"),
        question(3, id="denied", question="Is this a CT of the abdomen?", answer="no", kind="yesno"),
    ]
    run = curate(rows, [{"tag": {"require": ["modality"]}}])
    tags = {row["id"]: row["meta"] for row in run.rows()}
    assert tags["s:respelt"]["modality"] == "X-ray" and tags["s:respelt"]["organ"] == "chest"
    assert tags["s:unknown word stays"]["modality"] == "thermography"
    assert (tags["s:found"]["modality"], tags["s:found"]["organ"]) == ("MRI", "brain")
    assert run.dropped("tag") == {"denied": "untagged"}
    with pytest.raises(Exception, match="require"):
        curate(rows, [{"tag": {"require": ["plane"]}}])


# --- burnt-in text ----------------------------------------------------------------------------------------------------


def with_text(picture: Image.Image, corner: str, text: str = "DOE JANE 12345") -> Image.Image:
    picture = picture.convert("L")
    size = max(12, picture.width // 28)
    font = ImageFont.load_default(size)
    draw = ImageDraw.Draw(picture)
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    x = 6 if "left" in corner else picture.width - (right - left) - 8
    y = 6 if "top" in corner else picture.height - (bottom - top) - 14
    draw.rectangle((x - 4, y - 4, x + right + 4, y + bottom + 4), fill=10)
    draw.text((x, y), text, fill=250, font=font)
    return picture


def test_text_in_a_corner_is_dropped_masked_or_flagged(curate, tmp_path: Path) -> None:
    clean, marked = texture(1, (512, 400)), with_text(texture(2, (512, 400)), "bottom right")
    rows = [question(0, id="clean", images=[save(tmp_path / "p/clean.png", png(clean))]),
            question(1, id="marked", images=[save(tmp_path / "p/marked.png", png(marked))])]  # fmt: skip
    assert curate(rows, ["burned_text"]).dropped("burned_text") == {"marked": "burned_in_text"}
    flagged = curate(rows, [{"burned_text": {"action": "flag"}}])
    assert [row["meta"].get("burned_text") for row in flagged.rows()] == [None, "bottom right"]
    masked = curate(rows, [{"burned_text": {"action": "mask"}}])
    path = masked.out / masked.rows()[1]["images"][0]
    pixels = np.asarray(Image.open(path))
    assert pixels[-20:, -100:].max() == 0 and np.array_equal(pixels[:200], np.asarray(marked)[:200])
    assert text_corners(np.asarray(Image.open(path).convert("L"))) == []


def test_burnt_in_text_on_real_films(shared_data: Path) -> None:
    """Planted names in a random corner of NIH films are found; few films are accused (some carry letters themselves)."""
    films = sorted((shared_data / "data" / "nih_cxr" / "images384").glob("*.jpg"))[::20]
    if not films:
        pytest.skip("no NIH films")
    rng = random.Random(0)
    found = accused = 0
    for film in films:
        with Image.open(film) as picture:
            grey = picture.convert("L").resize((768, 768))
        accused += bool(text_corners(np.asarray(grey)))
        corner = rng.choice(("top left", "top right", "bottom left", "bottom right"))
        found += corner in text_corners(np.asarray(with_text(grey, corner)))
    assert found >= 0.95 * len(films), (found, len(films))
    assert accused <= 0.1 * len(films), accused
    # VQA-RAD's pictures carry their publisher's name and the uploader in small print.
    published = sorted((shared_data / "data" / "vqa_rad" / "images").glob("*.jpg"))[::20]
    assert all(text_corners(np.asarray(Image.open(path).convert("L"))) for path in published)


# --- contamination ----------------------------------------------------------------------------------------------------


def test_decontamination_by_picture_patient_and_text(curate, tmp_path: Path) -> None:
    p = same_pictures(tmp_path / "p")
    bench = [
        question(0, id="b0", images=[p["a"]], meta={"patient_id": "7"}),
        question(1, id="b1", question="What lowers the pressure within the eye most of all?", answer="timolol"),
        {"id": "b2", "images": [p["copy"], "gone.png"]},  # no row to train on, but a picture to keep out
    ]
    rows = [
        question(0, id="picture", images=[p["jpeg"]]),
        question(1, id="patient", images=[p["other"]], meta={"patient_id": 7}),
        question(2, id="text", question="What lowers the pressure within the eye most of all ?", answer="Timolol"),
        question(3, id="clean", images=[p["other"]], meta={"patient_id": "8"}),
        question(4, id="same words, own picture", images=[p["other"]], question=bench[0]["question"]),
    ]
    against = [{"name": "bench", "path": str(write_rows(tmp_path / "bench.jsonl", bench))}]
    run = curate(rows, [{"decontaminate": {"against": against}}])
    assert run.dropped("decontaminate") == {
        "picture": "benchmark_image",
        "patient": "benchmark_patient",
        "text": "benchmark_text",
    }
    assert run.notes("decontaminate")["benchmarks"] == {"bench": {"rows": 3, "image": 1, "patient": 1, "text": 1}}
    assert run.notes("decontaminate")["faulty_rows_of_bench"] == 1
    assert "bench/b0" in run.details("decontaminate")["picture"]
    with pytest.raises(Exception, match="against"):
        curate(rows, ["decontaminate"])


def test_decontamination_against_the_evaluation_kits_benchmarks(curate, shared_data: Path) -> None:
    pytest.importorskip("lingshu_rl.eval.benchmarks")
    data = shared_data / "data"
    source = {"name": "rad", "path": str(data / "vqa_rad" / "testset.json")}
    run = curate([source], [{"decontaminate": {"benchmarks": "vqa_rad", "data": str(data)}}])
    assert run.report["steps"][1]["reasons"]["benchmark_image"] > 0.9 * run.report["steps"][1]["in"]
    every = curate([source], [{"decontaminate": {"benchmarks": "all", "data": str(data / "pubmedqa")}}])
    assert "vqa_rad" in every.notes("decontaminate")["not_compared_with"]


# --- shares and splits ------------------------------------------------------------------------------------------------


@given(st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 400), min_size=3), st.floats(0.34, 0.9))
def test_targets_keep_every_share_and_no_more_is_dropped_than_needed(counts: dict[str, int], share: float) -> None:
    shares = dict.fromkeys(counts, share)
    try:
        kept = targets(counts, shares)
    except ValueError:
        return
    total = sum(kept.values())
    assert all(kept[name] <= counts[name] and kept[name] <= share * total + 1e-6 for name in counts)
    for name in counts:  # one more of a class would break its share
        if kept[name] < counts[name]:
            assert kept[name] + 1 > share * (total + 1) - 1e-6 or kept[name] + 1 > share * total - 1


def test_balance_caps_a_class_and_draws_the_same_rows_whatever_their_order(curate) -> None:
    rows = [question(i, kind="yesno", answer="yes" if i % 5 else "no") for i in range(100)]
    rows += [question(100 + i) for i in range(10)]
    run = curate(rows, [{"balance": {"kinds": ["yesno"], "max_share": 0.5}}])
    assert Counter(row["answer"] for row in run.rows()) == {"yes": 20, "no": 20, "a lung": 10}
    assert set(run.dropped("balance").values()) == {"surplus"}
    first = run.ids()
    other_order = curate(
        random.Random(1).sample(rows, len(rows)), [{"balance": {"kinds": ["yesno"], "max_share": 0.5}}]
    ).ids()
    assert sorted(other_order) == sorted(first) and other_order != first
    other_seed = curate(rows, [{"balance": {"kinds": ["yesno"], "max_share": 0.5}}], seed=1).ids()
    assert sorted(other_seed) != sorted(first)


def test_balance_of_kinds_modalities_and_sources(curate) -> None:
    rows = [question(i, kind="yesno", answer="yes", meta={"modality": "CT"}) for i in range(50)]
    rows += [question(50 + i, meta={"modality": "MRI"}) for i in range(50)]
    kinds = curate(rows, [{"balance": {"of": "kind", "shares": {"yesno": 0.1}}}])
    assert Counter(row["kind"] for row in kinds.rows()) == {"yesno": 5, "open": 50}
    modality = curate(rows, [{"balance": {"of": "meta.modality", "shares": {"MRI": 0.2}}}])
    assert Counter(row["meta"]["modality"] for row in modality.rows()) == {"CT": 50, "MRI": 12}
    for bad, message in (({"max_share": 0.5, "of": "colour"}, "colour"), ({}, "max_share or shares"), ({"max_share": 1.5}, "between 0 and 1"),
                         ({"of": "source", "max_share": 0.5}, "leave no row|below 1"), ({"of": "kind", "shares": {"report": 0.5}}, "no row has")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            curate(rows, [{"balance": bad}])


def test_options_are_shuffled_so_that_letters_are_even(curate) -> None:
    options = ["lung", "liver", "heart", "spleen"]
    rows = [question(i, kind="option", options=options, answer="A") for i in range(400)]
    rows += [question(500, kind="option", options=["lung", "liver", "all of the above"], answer="C", id="above"),
             question(501, kind="option", options=["lung", "liver", "A and B"], answer="C", id="letters")]  # fmt: skip
    run = curate(rows, ["shuffle_options"])
    made = run.rows()
    assert all(row["options"]["ABCD".index(row["answer"])] == "lung" for row in made[:400])
    letters = Counter(row["answer"] for row in made[:400])
    assert min(letters.values()) > 70  # 100 expected, five standard deviations are 43
    assert [row["options"] for row in made[400:]] == [rows[400]["options"], rows[401]["options"]]
    assert run.notes("shuffle_options") == {"left_as_they_are": 2}


def test_no_patient_and_no_picture_stands_in_two_splits(curate, tmp_path: Path) -> None:
    pictures = [save(tmp_path / "p" / f"{i}.png", png(texture(i, (90, 80)))) for i in range(40)]
    twins = [save(tmp_path / "p" / f"{i}b.jpg", jpeg(texture(i, (90, 80)), 50)) for i in range(40)]
    rng = random.Random(0)
    rows = []
    for i in range(300):
        n = rng.randrange(40)
        meta = {"patient_id": f"p{n // 2}"} if rng.random() < 0.6 else {}
        rows.append(question(i, images=[rng.choice((pictures, twins))[n]], meta=meta))
    run = curate(rows, ["dedup_images", {"split": {"validation": 0.2, "test": 0.3}}])
    split_of: dict[str, set[str]] = {}
    sizes = {}
    for name in ("train", "validation", "test"):
        made = run.rows(name)
        sizes[name] = len(made)
        for row in made:
            number = Path(row["images"][0]).stem.removesuffix("b")
            split_of.setdefault(f"picture {number}", set()).add(name)
            split_of.setdefault(f"patient p{int(number) // 2}", set()).add(name) if row["meta"].get(
                "patient_id"
            ) else None
    assert all(len(found) == 1 for found in split_of.values())
    assert sum(sizes.values()) == 300 and min(sizes.values()) > 15
    with pytest.raises(ValueError, match="shares"):
        curate(rows, [{"split": {"validation": 0.5, "test": 0.5}}])


def test_reason_codes_have_meanings() -> None:
    assert all(code == code.lower() and meaning for code, meaning in REASONS.items())
