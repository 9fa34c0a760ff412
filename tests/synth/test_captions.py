"""Captions in stages: what the writer is shown, and that facts win."""

import json
import re

import numpy as np
import pytest
from PIL import Image
from test_thoughts import read, synth
from writer_server import ScriptedWriter, images_of, text_of

from lingshu_rl.data.load import load
from lingshu_rl.synth.captions import judge_caption, modalities, modality_of

NINE = {"mri", "ct", "xray", "ultrasound", "histopathology", "dermoscopy", "fundus", "endoscopy", "knee_xray"}


def records(folder, entries):
    Image.new("L", (64, 48), 100).save(folder / "i.png")
    mask = np.zeros((48, 64), np.uint8)
    mask[4:20, 2:22] = 1
    Image.fromarray(mask).save(folder / "m.png")
    rows = [{"id": f"c{n}", "images": ["i.png"], **entry} for n, entry in enumerate(entries)]
    (folder / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def make(folder, entries, answer):
    records(folder, entries)
    with ScriptedWriter(answer) as server:
        code = synth("captions", folder / "r.jsonl", "--out", folder / "c.jsonl", "--url", server.url, "--model", "w")
    return code, server, read(folder / "c.jsonl"), read(folder / "c.dropped.jsonl")


def good(body):
    text = text_of(body)
    if text.startswith("Join"):
        facts = re.findall(r"^- (?:frame \d+: )?([^:\n]+)", text, re.M)
        return f"This image was made by {', '.join(facts)}; it is sharp and well exposed, and nothing else stands out here."
    return "FACTUAL TEXT of it." if "certain" in text else "PREFERRED TEXT of it."


def test_nine_modalities_each_with_its_own_list(tmp_path):
    assert set(modalities()) == NINE
    names = {"mri": "MR", "ct": "CT", "xray": "X-ray", "ultrasound": "US", "histopathology": "pathology", "dermoscopy": "dermoscopy",
             "fundus": "Fundus photography", "endoscopy": "colonoscopy", "knee_xray": "radiograph"}  # fmt: skip
    entries = [
        {"meta": {"modality": name, "organ": "knee" if key == "knee_xray" else "body"}} for key, name in names.items()
    ]
    assert [modality_of(e) for e in entries] == list(names)
    code, server, rows, dropped = make(tmp_path, entries, good)
    assert code == 0 and len(rows) == 9 and not dropped
    for body in server.bodies:
        text = text_of(body)
        if "specialist" in text:
            shown = {key for key, entry in modalities().items() if all(f"- {f}" in text for f in entry["look_at"])}
            assert len(shown) == 1
    assert len(load(tmp_path / "c.jsonl").prompts) == 9


def test_the_stages_of_one_caption(tmp_path):
    entry = {"meta": {"modality": "CT", "organ": "abdomen"}, "labels": {"finding": ["cyst"]}, "caption": "A dark spot.",
             "masks": [{"path": "m.png", "names": {"1": "liver"}}]}  # fmt: skip
    code, server, rows, _ = make(tmp_path, [entry], good)
    assert code == 0
    factual, preference, merge = server.bodies
    text = text_of(factual)
    assert "- abdomen" in text and "- cyst" in text and "source text: A dark spot." in text
    assert "frame 1: liver: box x 2 to 22, y 4 to 20, in the upper left part, 10.4 % of the image" in text
    assert images_of(factual) != images_of(preference) and not images_of(
        merge
    )  # frames are drawn for the factual stage alone
    assert (
        "FACTUAL TEXT" in text_of(merge)
        and "PREFERRED TEXT" in text_of(merge)
        and "the fact is right" in text_of(merge)
    )
    (row,) = rows
    synth_meta = row["meta"]["synth"]
    assert row["kind"] == "report" and "liver" in row["answer"] and "cyst" in row["answer"]
    assert synth_meta["facts"] == ["CT", "abdomen", "cyst", "liver"] and set(synth_meta["requests"]) == {
        "factual",
        "preference",
        "merge",
    }
    assert synth_meta["verdict"]["kept"]


LONG = " It is a sharp image and well exposed, and nothing else stands out."


@pytest.mark.parametrize(
    ("caption", "status"),
    [
        ("CT of the abdomen with a cyst." + LONG, "ok"),
        ("CT of the abdomen with a cyst. No free fluid is seen." + LONG, "ok"),
        ("CT of the abdomen, without free air but with a cyst." + LONG, "ok"),
        ("CT of the abdomen." + LONG, "fact missing"),
        ("CT of the abdomen without a cyst." + LONG, "fact denied"),
        ("CT of the abdomen with a cyst. There is no cyst elsewhere, as far as seen." + LONG, "fact denied"),
        ("I cannot diagnose, but this CT of the abdomen has a cyst." + LONG, "writer declined"),
        ("CT abdomen cyst.", "caption length"),
    ],
)
def test_a_caption_is_kept_only_if_every_fact_stands_in_it_unopposed(caption, status):
    assert judge_caption(caption, ["CT", "abdomen", "cyst"], False)["status"] == status


@pytest.mark.parametrize(
    ("fact", "said", "status"),
    [
        ("pleural effusion", "Pleural effusion is not seen in this image.", "fact denied"),
        ("pleural effusion", "Pleural effusion: none in this image at all.", "fact denied"),
        ("pleural effusion", "Pleural effusion has been ruled out here.", "fact denied"),
        ("pleural effusion", "A pleural effusion is unlikely in this image.", "fact denied"),
        ("pleural effusion", "Pleural effusion has completely resolved since then.", "fact denied"),
        ("pleural effusion", "Pleural effusion cannot be identified on either side here.", "fact denied"),
        ("left pleural effusion", "There is a pleural effusion on the right, none on the left.", "fact denied"),
        ("pleural effusion", "Without contrast, it shows a right-sided pleural effusion below.", "ok"),
        ("pleural effusion", "It shows no pneumothorax, and there is a pleural effusion on the right.", "ok"),
        ("pleural effusion", "It has no rib fracture and a moderate pleural effusion on the right side.", "ok"),
        ("pleural effusion", "It shows a pleural effusion on the right, not on the left.", "ok"),
        ("pleural effusion", "It shows pleural effusions on both sides.", "ok"),
        ("pleural effusion", "There is effusion in the right pleural space, moderate in amount.", "ok"),
        ("no pneumothorax", "There is no pneumothorax on either side.", "ok"),
        ("no pneumothorax", "There is no doubt: a pneumothorax is present.", "fact denied"),
        ("possible pneumonia", "There is possible pneumonia on the left.", "ok"),
        ("dysplastic nevus", "It shows a dysplastic nevus in the middle.", "ok"),  # in no pack of terms
        ("dysplastic nevus", "A dysplastic nevus is not seen.", "fact denied"),
        ("dysplastic nevus", "It shows a nevus.", "fact missing"),
        ("liver", "It shows the liver; no cyst is seen in the liver.", "ok"),
        ("liver", "The liver is not included.", "fact denied"),
    ],
)
def test_a_fact_is_read_with_its_stance(fact, said, status):
    caption = f"The CT shows the chest in good quality today. {said} Nothing else stands out here."
    assert judge_caption(caption, ["CT", "chest", fact], False)["status"] == status


def test_another_modality_is_no_denial_of_this_one_but_a_denial_beside_it_is():
    told = "It is sharp and well exposed, and nothing else stands out here."
    assert judge_caption(f"Without contrast and with no artefact, this CT is good. {told}", ["CT"], False)["kept"]
    assert judge_caption(f"This is not a CT but a drawing of one. {told}", ["CT"], False)["status"] == "fact denied"


def test_a_cut_caption_a_denied_fact_and_a_record_without_facts_are_dropped(tmp_path):
    def answer(body):
        if not text_of(body).startswith("Join"):
            return "text"
        if "cyst" in text_of(body):
            return "CT of the liver. There is no cyst in the liver at all, which is good." + LONG
        return {"content": "CT of the lung" + LONG, "finish_reason": "length"}

    entries = [{"meta": {"modality": "CT"}, "labels": {"f": "cyst"}}, {"meta": {"modality": "CT", "organ": "lung"}},
               {"meta": {"modality": "painting"}}, {}]  # fmt: skip
    code, server, rows, dropped = make(tmp_path, entries, answer)
    assert code == 1 and not rows
    assert [d["reason"] for d in dropped] == ["fact denied", "caption cut off", "unknown modality", "unknown modality"]
    assert len(server.bodies) == 6
    assert dropped[0]["row"]["meta"]["synth"]["verdict"]["reason"] == "cyst"


def test_a_mask_that_does_not_fit_is_named(tmp_path):
    entry = {"meta": {"modality": "CT"}, "masks": [{"path": "small.png", "names": {"1": "liver"}}]}
    Image.new("L", (8, 8)).save(tmp_path / "small.png")
    _, _, _, dropped = make(tmp_path, [entry], good)
    assert (
        dropped[0]["reason"] == "unreadable record"
        and "small.png is (8, 8), its image (64, 48)" in dropped[0]["detail"]
    )
