"""Other people's layouts are read by a preset or a mapping: kind, question, options, gold and images of each are right."""

from __future__ import annotations

import base64
import bz2
import gzip
import io
import json
import lzma
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from launching import ROOT
from PIL import Image

from lingshu_rl.data.load import DataError, load
from lingshu_rl.data.sources import Source, guess_preset, open_records, presets

Q, SIDES = "Which organ is shown?", ["kidney", "liver", "spleen", "colon"]
MARKED = "Which organ is shown? A) kidney, B) liver, C) spleen, D) colon"
LINES = "Which organ is shown?\nOptions:\nA. kidney\nB. liver\nC. spleen\nD. colon\nAnswer with the option's letter."
YES = ("yesno", "Is it there?", (), "yes", 1)
LIVER = ("option", Q, tuple(SIDES), "B", 1)
TEXT_ONLY = ("option", Q, tuple(SIDES), "B", 0)
WORD = ("open", Q, (), "liver", 1)


def png(level: int = 90) -> bytes:
    out = io.BytesIO()
    Image.effect_noise((40, 30), level).convert("L").save(out, "PNG")
    return out.getvalue()


PNG = png()
B64 = base64.b64encode(PNG).decode()
CELL = {"bytes": PNG, "path": None}


def turns(*texts: str, role: str = "from", content: str = "value", names: tuple[str, str] = ("human", "gpt")) -> list[Any]:  # fmt: skip
    return [{role: names[n % 2], content: text} for n, text in enumerate(texts)]


def chat(*texts: Any) -> list[Any]:
    return turns(*texts, role="role", content="content", names=("user", "assistant"))


def lines(*records: Any) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def tar(samples: dict[str, dict[str, bytes]]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as shard:
        for key, parts in samples.items():
            for ending, data in parts.items():
                member = tarfile.TarInfo(f"{key}.{ending}")
                member.size = len(data)
                shard.addfile(member, io.BytesIO(data))
    return out.getvalue()


MCQ = {"question": Q, "image": "p.png"}
BY_LETTER = dict(zip("ABCD", SIDES, strict=True))
IMAGE_URL = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{B64}"}}

# file name -> (content, what the source says beside its path, what its first row must be). Parquet content is a list.
LAYOUTS: dict[str, tuple[Any, dict[str, Any], tuple[Any, ...]]] = {
    # ---- other trainers
    "llava_med_typo.json": (json.dumps([{"id": "a", "image": "p.png", "conversatons": turns(f"<image>\n{Q}", "liver")}]), {"format": "llava"}, WORD),
    "llava_choice.json": (json.dumps([{"id": "a", "image": "p.png", "conversations": turns(f"<image>\n{LINES}", "B")}]), {"format": "llava"}, LIVER),
    "sharegpt_system.jsonl": (lines({"images": ["p.png"], "conversations": [{"from": "system", "value": "You are a doctor."}, *turns(f"<image>{Q}", "liver")]}), {"format": "llava"}, WORD),
    "internvl.jsonl": (lines({"id": 0, "image": ["p.png", "q.png"], "conversations": turns(f"<image>\n<image>\n{Q}", "liver")}), {"format": "llava"}, ("open", Q, (), "liver", 2)),
    "minicpm_v.json": (json.dumps([{"id": "0", "image": {"<image_00>": "p.png"}, "conversations": chat(f"<image_00>\n{Q}", "liver")}]), {"format": "llava"}, WORD),
    "qwen_parts.jsonl": (lines({"messages": chat([{"type": "image", "image": "p.png"}, {"type": "text", "text": Q}], "liver")}), {"format": "messages"}, WORD),
    "openai_parts.jsonl": (lines({"messages": chat([{"type": "text", "text": Q}, IMAGE_URL], "liver")}), {"format": "messages"}, WORD),
    "swift_grpo.jsonl": (lines({"messages": chat(f"<image>{MARKED}"), "images": ["p.png"], "solution": "<answer>B</answer>"}), {"format": "messages"}, LIVER),
    "swift_old.jsonl": (lines({"query": f"<image>{Q}", "response": "liver", "images": ["p.png"]}), {"format": "swift"}, WORD),
    "alpaca.json": (json.dumps([{"instruction": Q, "input": "", "output": "liver", "images": ["p.png"]}]), {"format": "alpaca"}, WORD),
    "alpaca_input.json": (json.dumps([{"instruction": "Answer in a word.", "input": Q, "output": "liver"}]), {"format": "alpaca"}, ("open", f"Answer in a word.\n{Q}", (), "liver", 0)),
    "trl_text.jsonl": (lines({"prompt": Q, "completion": "liver", "image": "p.png"}), {"format": "trl"}, WORD),
    "trl_grpo.jsonl": (lines({"prompt": chat(Q), "image": "p.png", "solution": "liver"}), {"format": "trl_grpo"}, WORD),
    "verl_choice.parquet": ([{"data_source": "x", "prompt": chat(f"<image>\n{LINES}"), "images": [CELL], "reward_model": {"style": "rule", "ground_truth": "B"}}], {"format": "verl"}, LIVER),
    "easyr1_choice.parquet": ([{"images": [CELL], "problem": f"<image>{MARKED}", "answer": "\\boxed{B}"}], {"format": "easyr1"}, LIVER),
    "med_r1.json": (json.dumps([{"image": "p.png", "problem": MARKED, "solution": "<answer> B </answer>"}]), {"format": "open_r1"}, LIVER),
    "open_r1.parquet": ([{"image": CELL, "problem": Q, "solution": "<think>It is.</think><answer>liver</answer>"}], {"format": "open_r1"}, WORD),
    "openrlhf_m.jsonl": (lines({"message": json.dumps(chat([{"type": "image", "image": "p.png"}, {"type": "text", "text": Q}])), "answer": "$\\boxed{liver}$"}), {"format": "openrlhf"}, WORD),
    # ---- medical sets
    "vqa_rad.json": (json.dumps([{"qid": 0, "image_name": "p.png", "image_organ": "ABD", "question": "Is it there?", "answer": "Yes", "answer_type": "CLOSED", "phrase_type": "freeform"}]), {"format": "vqa_rad"}, YES),
    "vqa_med_train.txt": (f"p|{Q}|liver\n", {"format": "vqa_med_train"}, WORD),
    "path_vqa_hub.parquet": ([{"image": CELL, "question": "Is it there?", "answer": "yes"}], {"format": "path_vqa"}, YES),
    "kvasir.jsonl": (lines({"image": "p.png", "source": "kvasir", "question": Q, "answer": "liver", "img_id": "x"}), {"format": "vqa"}, WORD),
    "pmc_vqa_test.csv": (f"index,Figure_path,Caption,Question,Choice A,Choice B,Choice C,Choice D,Answer,split\n1,p.png,x,{Q}, A:kidney , B:liver , C:spleen, D:colon ,B,test\n", {"format": "pmc_vqa"}, LIVER),
    "medxpertqa_list.jsonl": (lines({"id": "MM-1", "question": f"{Q}\nAnswer Choices: (A) kidney (B) liver (C) spleen (D) colon", "options": [{"letter": k, "content": v} for k, v in BY_LETTER.items()], "label": "B", "images": ["p.png"], "medical_task": "Diagnosis"}), {"format": "medxpertqa"}, LIVER),
    "letters_by_letter.jsonl": (lines({"question": "Which marked part is it?", "options": {"A": "D", "B": "C", "C": "A", "D": "B"}, "label": ["D"], "images": ["p.png"]}), {"format": "medxpertqa"}, ("option", "Which marked part is it?", ("A", "B", "C", "D"), "B", 1)),
    "letters_among_texts.jsonl": (lines({"question": "Which marked part is it?", "options": [{"letter": "A", "content": "B"}, {"letter": "B", "content": "A"}, {"letter": "C", "content": "A and B"}], "label": "C", "images": ["p.png"]}), {"format": "medxpertqa"}, ("option", "Which marked part is it?", ("A", "B", "A and B"), "C", 1)),
    "medthinkvqa.jsonl": (lines({"title": "Case number 7", "CLINICAL_HISTORY": "A man with pain.", "IMAGING_FINDINGS": "A lesion.", "image_count": 2, "image_01_id": "x", "image_01_path": "p.png", "image_01_modality": "CT", "image_02_path": "q.png", "options": BY_LETTER, "correct_answer": "B", "correct_answer_text": "liver"}), {"format": "medthinkvqa"},
        ("option", "A man with pain.\nWhich diagnosis is most likely?", tuple(SIDES), "B", 2)),
    "medthinkvqa.parquet": ([{"title": "Case number 7", "CLINICAL_HISTORY": "A man with pain.", "image_01": CELL, "image_01_path": "images/case7/x.jpg", "image_02": None, "options": BY_LETTER, "correct_answer": "B"}], {"format": "medthinkvqa"}, ("option", "A man with pain.\nWhich diagnosis is most likely?", tuple(SIDES), "B", 1)),
    "medbullets.csv": (f"link,question,opa,opb,opc,opd,ope,answer_idx,answer\nx,{Q},kidney,liver,spleen,colon,,B,liver\n", {"format": "medbullets"}, TEXT_ONLY),
    "cmb.json": (json.dumps([{"id": 1, "exam_type": "x", "question": "哪个?", "question_type": "多项选择题", "option": {**BY_LETTER, "E": ""}, "answer": "BD"}]), {"format": "cmb"}, ("option", "哪个?", tuple(SIDES), "B,D", 0)),
    "cmb_single.json": (json.dumps([{"id": 1, "exam_type": "x", "question": "哪个?", "question_type": "单项选择题", "option": BY_LETTER, "answer": "B"}]), {"format": "cmb"}, ("option", "哪个?", tuple(SIDES), "B", 0)),
    "cmexam.csv": ('Question,Options,Answer\n哪个?,"A kidney\nB liver\nC spleen\nD colon",B\n', {"format": "cmexam"}, ("option", "哪个?", tuple(SIDES), "B", 0)),
    "cmmlu.csv": (",Question,A,B,C,D,Answer\n0,哪个?,kidney,liver,spleen,colon,B\n", {"format": "cmmlu"}, ("option", "哪个?", tuple(SIDES), "B", 0)),
    "openlifescience.parquet": ([{"id": "7", "data": {"Question": "Does it?", "Context": ["One.", "Two."], "Options": {"A": "yes", "B": "no", "C": "maybe"}, "Correct Answer": "no", "Correct Option": "B"}, "subject_name": None}], {"format": "openlifescience"}, ("option", "One.\nTwo.\nDoes it?", ("yes", "no", "maybe"), "B", 0)),
    "study.json": (json.dumps([{"uid": "1", "image": ["p.png", "q.png"], "findings": "Clear lungs.", "impression": ""}]), {"format": "reports"}, ("report", "Write the radiology report of these images.", (), "Clear lungs.", 2)),
    "chexpert_plus.csv": ("path_to_image,section_findings,section_impression,split\np.png,Clear lungs.,Normal.,valid\n", {"format": "reports"}, ("report", "Write the radiology report of these images.", (), "Clear lungs.\nNormal.", 1)),
    "medvlthinker_eval.parquet": ([{"images": [CELL], "question": Q, "options": "A. kidney\nB. liver\nC. spleen\nD. colon", "answer_label": "B", "answer": "liver"}], {"format": "medvlthinker"}, LIVER),
    "open_med_reason.parquet": ([{"image": CELL, "question": LINES, "reasoning": "r", "answer": "B"}], {"format": "vqa"}, LIVER),
    "step_cot.json": (json.dumps([{"patient_id": "p7", "image_path": "p.png", "vqa_chain": [{"step": "1", "question": Q, "options": SIDES, "answer": "liver"}, {"step": "2", "question": "Is it there?", "options": ["yes", "no"], "answer": "yes"}]}]),
        {"each": ["vqa_chain"], "map": {"images": "image_path", "question": "vqa_chain.question", "options": "vqa_chain.options", "answer": "vqa_chain.answer", "meta.patient_id": "patient_id"}}, LIVER),
    "mmmu.parquet": ([{"id": "v1", "question": f"<image 1> {Q}", "options": str(SIDES), "answer": "B", "question_type": "multiple-choice", "image_1": CELL, "image_2": None}], {"format": "mmmu"}, ("option", f"<image 1> {Q}", tuple(SIDES), "B", 1)),
    "scienceqa.parquet": ([{"image": CELL, "question": Q, "choices": SIDES, "answer": 1}], {"format": "scienceqa"}, LIVER),
    "aokvqa.json": (json.dumps([{"question_id": "q", "image": "p.png", "question": Q, "choices": SIDES, "correct_choice_idx": 1}]), {"format": "scienceqa"}, LIVER),
    "mmlu.csv": (f"{Q},kidney,liver,spleen,colon,B\n", {"columns": ["question", "A", "B", "C", "D", "answer"], "map": {"options": ["A", "B", "C", "D"]}}, TEXT_ONLY),
    "vqa_v2.json": (json.dumps({"data": [{"question_id": 1, "image": "p.png", "question": Q, "answers": [{"answer": "liver"}, {"answer": "hepar"}]}]}), {"format": "vqa_v2"}, ("open", Q, (), ["liver", "hepar"], 1)),
    "medqa.jsonl": (lines({"question": Q, "answer": "liver", "options": BY_LETTER, "meta_info": "step1", "answer_idx": "B"}), {"format": "medqa"}, TEXT_ONLY),
    "medmcqa_hub.json": (json.dumps([{"id": "m", "question": Q, "opa": "kidney", "opb": "liver", "opc": "spleen", "opd": "colon", "cop": 1, "choice_type": "single"}]), {"format": "medmcqa_hub"}, TEXT_ONLY),
    "supergpqa.jsonl": (lines({"uuid": "u", "question": Q, "options": SIDES, "answer": "liver", "answer_letter": "B"}), {"format": "supergpqa"}, TEXT_ONLY),
    "ori_pqal.json": (json.dumps({"77": {"QUESTION": "Does it?", "CONTEXTS": ["One.", "Two."], "final_decision": "no"}}), {"format": "pubmedqa"}, ("option", "One.\nTwo.\nDoes it?", ("yes", "no", "maybe"), "B", 0)),
    "pubmedqa.parquet": ([{"pubid": 77, "question": "Does it?", "context": {"contexts": ["One.", "Two."]}, "final_decision": "maybe"}], {"format": "pubmedqa_hub"}, ("option", "One.\nTwo.\nDoes it?", ("yes", "no", "maybe"), "C", 0)),
    "medcalc.csv": ("Row Number,Calculator Name,Patient Note,Question,Ground Truth Answer,Lower Limit,Upper Limit\n1,Body Mass Index (BMI),A note.,What is the BMI?,24.1,22.9,25.3\n", {"format": "medcalc"}, ("numeric", "A note.\nWhat is the BMI?", (), "24.1", 0)),
    "medcalc_weeks.csv": ("Row Number,Calculator Name,Patient Note,Question,Ground Truth Answer,Lower Limit,Upper Limit\n1,Estimated Gestational Age,A note.,How old?,\"('3 weeks', '2 days')\",\"('3 weeks', '2 days')\",\"('3 weeks', '2 days')\"\n", {"format": "medcalc"}, ("numeric", "A note.\nHow old?", (), "3 weeks 2 days", 0)),
    "mmmu_open.parquet": ([{"id": "v2", "question": "Name it.", "options": "[]", "answer": "['mitral valve', 'bicuspid valve']", "question_type": "open", "image_1": CELL}], {"format": "mmmu"}, ("open", "Name it.", (), ["mitral valve", "bicuspid valve"], 1)),
    "several_right.jsonl": (lines({**MCQ, "options": SIDES, "answer": "BD"}), {"format": "vqa"}, ("option", Q, tuple(SIDES), "B,D", 1)),
    # ---- reports, captions, labels
    "rocov2.csv": ("ID,Caption\np,Axial CT of the liver.\n", {"map": {"images": "ID", "answer": "Caption"}, "values": {"question": "Describe.", "kind": "report"}}, ("report", "Describe.", (), "Axial CT of the liver.", 1)),
    "nih_table.csv": ("Image Index,Finding Labels,Patient ID\np.png,Effusion|Mass,12\n", {"map": {"images": "Image Index", "answer": {"from": "Finding Labels", "split": "|"}, "meta.patient_id": "Patient ID"}, "values": {"question": "Name a finding."}}, ("open", "Name a finding.", (), ["Effusion", "Mass"], 1)),
    "grade.csv": ("id_code,diagnosis\np,2\n", {"map": {"images": "id_code", "answer": {"from": "diagnosis", "base": 0}}, "values": {"question": "Which grade?", "options": ["none", "mild", "moderate", "severe"]}}, ("option", "Which grade?", ("none", "mild", "moderate", "severe"), "C", 1)),
    "medmnist.parquet": ([{"image": CELL, "label": 1}], {"map": {"answer": {"from": "label", "as": {0: "benign", 1: "malignant"}}, "images": "image"}, "values": {"question": "Which?", "options": ["benign", "malignant"]}}, ("option", "Which?", ("benign", "malignant"), "B", 1)),
    "one_hot.csv": ("image,MEL,NV\np,0.0,1.0\n", {"map": {"images": "image", "answer": {"from": "NV", "as": {0: "no", 1: "yes"}}}, "values": {"question": "Is it there?"}}, YES),
    "shard-000.tar": (tar({"a/0001": {"png": PNG, "json": json.dumps({"question": Q, "answer": "liver"}).encode()}}), {"format": "webdataset"}, WORD),
    "captions.tar": (tar({"0001": {"png": PNG, "txt": b"Axial CT of the liver."}}), {"format": "webdataset_captions"}, ("report", "Describe the image.", (), "Axial CT of the liver.", 1)),
    # ---- how files are written
    "rows.jsonl.gz": (gzip.compress(lines({**MCQ, "answer": "liver"}).encode()), {"format": "vqa"}, WORD),
    "rows.json.xz": (lzma.compress(json.dumps([{**MCQ, "answer": "liver"}]).encode()), {"format": "vqa"}, WORD),
    "rows.csv.bz2": (bz2.compress(f"image,question,answer\np.png,{Q},liver\n".encode()), {"format": "vqa"}, WORD),
    "one_line.json": (json.dumps({**MCQ, "answer": "liver"}), {"format": "vqa"}, WORD),
    "jsonl_called.json": (lines({**MCQ, "answer": "liver"}, {**MCQ, "answer": "colon"}), {"format": "vqa"}, WORD),
    "by_id.json": (json.dumps({"a": {**MCQ, "answer": "liver"}, "b": {**MCQ, "answer": "colon"}}), {"format": "vqa"}, WORD),
    "semicolons.csv": (f"image;question;answer\np.png;{Q};liver\n", {"format": "vqa", "delimiter": ";"}, WORD),
    "deep.jsonl": (lines({"case": {"img": [{"file": "p.png"}], "qa": [{"q": Q, "a": {"short": "liver"}}]}}), {"map": {"images": "case.img.*.file", "question": "case.qa.0.q", "answer": "case.qa.0.a.short"}}, WORD),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "p.png").write_bytes(PNG)
    (tmp_path / "images" / "q.png").write_bytes(png(30))
    return tmp_path


def write(path: Path, content: Any) -> Path:
    if isinstance(content, list):
        pq.write_table(pa.Table.from_pylist(content), path)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content, encoding="utf-8")
    return path


def first(source: Any) -> tuple[Any, ...]:
    prompt = load(source, instruction="").prompts[0]
    question = prompt.text.split("\nA. ")[0] if prompt.options else prompt.text
    return prompt.kind, question, prompt.options, prompt.gold, len(prompt.images)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_published_layout_becomes_the_right_rows(folder: Path, name: str) -> None:
    content, told, expected = LAYOUTS[name]
    assert first({"path": str(write(folder / name, content)), **told}) == expected


@pytest.mark.parametrize("name", [n for n, (_, told, _) in LAYOUTS.items() if "format" in told])
def test_the_presets_are_known_by_their_columns(folder: Path, name: str) -> None:
    """But for those that differ from another in what a number means, or have no header."""
    content, told, _ = LAYOUTS[name]
    preset = told["format"]
    records, _ = open_records(Source(str(write(folder / name, content)), delimiter=told.get("delimiter", "")) if not presets()[preset].columns else Source(str(write(folder / name, content)), format=preset))  # fmt: skip
    found = guess_preset([record for _, record in records])
    if presets()[preset].signs:
        assert found == preset or {found, preset} == {"path_vqa", "vqa"}


def test_every_preset_is_tried(folder: Path) -> None:
    here = {told.get("format") for _, told, _ in LAYOUTS.values()}
    assert set(presets()) - here <= {"slake", "vqa_med", "path_vqa_lxmert", "omnimedvqa", "medframeqa", "gmai_mmbench", "medmcqa", "r2gen", "captions", "roco", "usual", "healthbench"}  # fmt: skip


# ---------------------------------------------------------------------------------------- the files of the door's trial

DOOR = ROOT.parent / "shared" / "cases" / "door" / "data" / "formats"
ORGAN = ("option", "Which organ?", ("kidney", "liver", "spleen", "colon"), "B")
FRACTURE = ("yesno", "Is there a fracture?", (), "no", 1)
CAPTION = "An abdominal CT with a lesion in segment 0."
TWO = ("option", "Which organ?", ("kidney", "liver"), "B", 1)
FILES: dict[str, tuple[dict[str, Any], tuple[Any, ...], int]] = {
    "llava_conversations.json": ({"format": "llava"}, FRACTURE, 8),
    "pubmedvision.json": ({"format": "llava"}, FRACTURE, 4),
    "pmc_vqa.csv": ({"format": "pmc_vqa"}, (*ORGAN, 1), 4),
    "omnimedvqa.json": ({"format": "omnimedvqa"}, (*ORGAN, 1), 4),
    "medmcqa.jsonl": ({"format": "medmcqa"}, ("option", "Which organ makes bile?", *ORGAN[2:], 0), 4),
    "medxpertqa.jsonl": ({"format": "medxpertqa"}, TWO, 4),
    "slake.json": ({"format": "slake", "where": "q_lang == en"}, FRACTURE, 4),
    "pathvqa_lxmert.json": ({"format": "path_vqa_lxmert"}, ("open", "What is shown?", (), "liver", 1), 8),
    "vqamed2019.txt": ({"format": "vqa_med"}, FRACTURE, 4),
    "roco_captions.txt": ({"format": "roco"}, ("report", "Describe the image.", (), "Axial CT of the abdomen with a lesion in segment 0.", 1), 4),
    "roco.csv": ({"format": "captions"}, ("report", "Describe the image.", (), "Axial CT of the abdomen with a lesion in segment 0.", 1), 4),
    "gmai_base64.tsv": ({"format": "gmai_mmbench"}, (*ORGAN, 1), 4),
    "medframeqa.parquet": ({"format": "medframeqa"}, (*ORGAN, 2), 4),
    "verl.parquet": ({"format": "verl"}, FRACTURE, 4),
    "easyr1.parquet": ({"format": "easyr1"}, FRACTURE, 4),
    "hf_vqa.parquet": ({"format": "path_vqa"}, FRACTURE, 4),
    "medvlthinker.parquet": ({"format": "medvlthinker"}, TWO, 4),
    "trl_chat.jsonl": ({"format": "trl"}, FRACTURE, 4),
    "r2gen_annotation.json": ({"format": "r2gen", "split": "val"}, ("report", "Write the radiology report of these images.", (), "The lungs are clear number 0. No effusion is seen today.", 1), 2),
    "medtrinity.jsonl": ({"format": "captions"}, ("report", "Describe the image.", (), CAPTION, 1), 4),
    "imagefolder/metadata.jsonl": ({"format": "captions"}, ("report", "Describe the image.", (), CAPTION, 1), 4),
    "imagefolder": ({"format": "captions"}, ("report", "Describe the image.", (), CAPTION, 1), 4),
    "hubsnapshot": ({"format": "path_vqa", "split": "train"}, FRACTURE, 4),
    "hubsnapshot/data/train-00000-of-00002.parquet": ({"format": "path_vqa"}, FRACTURE, 2),
    "hubsnapshot/data/*.parquet": ({"format": "path_vqa"}, FRACTURE, 4),
    "medvqa_options_list.jsonl": ({"format": "scienceqa"}, TWO, 4),
    "qwen_messages.jsonl": ({"format": "messages"}, FRACTURE, 4),
    "chexpert.csv": ({"map": {"images": "Path", "answer": {"from": "Cardiomegaly", "as": {0: "no", 1: "yes"}}}, "values": {"question": "Is there cardiomegaly?"}, "where": "Cardiomegaly in [0, 1]"}, ("yesno", "Is there cardiomegaly?", (), "yes", 1), 2),
}  # fmt: skip


@pytest.mark.skipif(not DOOR.is_dir(), reason="shared cases are not here")
@pytest.mark.parametrize("name", FILES)
def test_the_files_of_the_trial_are_read(name: str) -> None:
    told, expected, count = FILES[name]
    source = {"path": str(DOOR / name), **told}
    assert first(source) == expected
    assert len(load(source).prompts) == count


# ----------------------------------------------------------------------------------------------------- what is refused


def refusal(source: Any) -> str:
    with pytest.raises(DataError) as caught:
        load(source)
    return str(caught.value)


def test_rows_of_a_known_layout_are_answered_with_its_preset(folder: Path) -> None:
    path = write(folder / "train.json", json.dumps([{"id": "a", "image": "p.png", "conversations": turns(Q, "liver")}]))
    assert f"data.train=[{{path: {path}, format: llava}}]" in refusal(str(path))


def test_a_column_that_no_record_has_is_an_error(folder: Path) -> None:
    path = write(folder / "a.jsonl", lines({**MCQ, "answer": "liver"}))
    said = refusal({"path": str(path), "map": {"images": "imgae", "answer": "answer"}})
    assert "map.images: 'imgae' stands in no record" in said


def test_a_letter_without_options_is_no_open_answer(folder: Path) -> None:
    path = write(folder / "a.jsonl", lines({**MCQ, "answer": "B"}))
    assert "map.options says where they are" in refusal({"path": str(path), "format": "vqa"})


def test_an_index_is_read_only_where_it_is_said_from_where_it_counts(folder: Path) -> None:
    path = str(write(folder / "a.jsonl", lines({**MCQ, "options": SIDES, "answer": 1})))
    assert "{from: COLUMN, base: 0}" in refusal({"path": path, "format": "vqa"})
    assert first({"path": path, "format": "vqa", "map": {"answer": {"from": "answer", "base": 0}}})[3] == "B"
    assert first({"path": path, "format": "vqa", "map": {"answer": {"from": "answer", "base": 1}}})[3] == "A"
    outside = str(write(folder / "b.jsonl", lines({**MCQ, "choices": SIDES, "answer": 4})))
    assert "outside the 4 options" in refusal({"path": outside, "format": "scienceqa"})
    without = str(write(folder / "c.jsonl", lines({**MCQ, "answer": 2})))
    assert "this record has no options" in refusal({"path": without, "map": {"answer": {"from": "answer", "base": 0}}})


def test_letters_that_are_words_of_the_options_stay(folder: Path) -> None:
    path = str(write(folder / "a.jsonl", lines({**MCQ, "options": ["A wave", "B wave", "C wave"], "answer": "B wave"})))
    assert first({"path": path, "format": "vqa"})[2:4] == (("A wave", "B wave", "C wave"), "B")
    path = str(write(folder / "b.jsonl", lines({**MCQ, "options": ["x", "y", "z"], "answer": "CAB"})))
    assert "neither one letter nor the text" in refusal({"path": path, "format": "vqa"})


def test_an_option_that_is_a_number_is_its_text(folder: Path) -> None:
    path = str(write(folder / "a.jsonl", lines({**MCQ, "options": ["2", "1"], "answer": "1"})))
    assert first({"path": path, "format": "vqa"})[3] == "B"


def test_an_option_missing_in_the_middle_is_refused_and_at_the_end_is_not(folder: Path) -> None:
    head = "image,question,A,B,C,D,answer\n"
    options = {"format": "vqa", "map": {"options": ["A", "B", "C", "D"]}}
    end = write(folder / "end.csv", head + "p.png,Which?,kidney,liver,,,B\n")
    assert first({"path": str(end), **options})[2:4] == (("kidney", "liver"), "B")
    gap = write(folder / "gap.csv", head + "p.png,Which?,kidney,,spleen,liver,D\n")
    assert "every option must be a non-empty text" in refusal({"path": str(gap), **options})


def test_every_answer_of_a_conversation_is_a_row_with_what_was_said_before(folder: Path) -> None:
    record = {"id": "c", "image": "p.png", "conversations": turns(f"<image>\n{Q}", "liver", "Is it there?", "Yes.")}
    path = str(write(folder / "a.json", json.dumps([record])))
    one, two = load({"path": path, "format": "llava"}, instruction="").prompts
    assert (one.id, one.gold, two.id, two.gold) == ("c", "liver", "c/2", "yes")
    assert [m["role"] for m in two.messages] == ["user", "assistant", "user"]
    assert [part["type"] for part in two.messages[0]["content"]] == ["image", "text"] and two.text == "Is it there?"
    (last,) = load({"path": path, "format": "llava", "turns": "last"}).prompts
    assert last.gold == "yes" and last.id == "c"


def test_a_faulty_answer_costs_its_own_row(folder: Path) -> None:
    record = {"id": "c", "image": "p.png", "conversations": turns(Q, "B", Q, "liver")}
    path = str(write(folder / "a.json", json.dumps([record])))
    loaded = load({"path": path, "format": "llava"}, skip_bad_rows=True)
    assert [p.id for p in loaded.prompts] == ["c"] and loaded.refused[0].place == "row 1"
    parts = {"image": "p.png", "qa": [{"q": Q, "a": 3, "o": SIDES}, {"q": Q, "a": "liver", "o": SIDES}]}
    source = {"each": ["qa"], "map": {"images": "image", "question": "qa.q", "answer": "qa.a", "options": "qa.o"}}
    loaded = load({"path": str(write(folder / "b.jsonl", lines(parts))), **source}, skip_bad_rows=True)
    assert [p.gold for p in loaded.prompts] == ["B"] and "is an index" in loaded.refused[0].reason


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", "image,question,answer\np.png,Où ?,là\n".encode("latin1"), "is not UTF-8.*iconv"),
        ("a.json", b'[{"a": 1}, {"a": ', "not JSON"),
        ("a.json.gz", gzip.compress(b'[{"a": 1}]', mtime=0)[:-9], "cannot be read"),
        ("a.jsonl.gz", b"no gzip", "cannot be unpacked"),
        ("a.tar", b"no tar", "is no whole tar file"),
        ("a.csv", b"image,image\na,b\n", "two columns have one name"),
        ("a.txt", b"a|b\n", "name its columns"),
        ("a.json", b'{"train": [{"a": 1}], "test": [{"a": 1}]}', "name one of its splits, train, test"),
        ("a.pkl", b"", "a pickle runs code"),
        ("a.bin", b"", "a source is demo:train"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_what_to_do(folder: Path, name: str, content: bytes, said: str) -> None:  # fmt: skip
    (folder / name).write_bytes(content)
    with pytest.raises(DataError, match=f"(?s){name}.*{said}"):
        load({"path": str(folder / name), "format": "vqa"})


def test_an_earlier_answer_is_asked_for_with_the_images_shown_by_then(folder: Path) -> None:
    record = {"image": ["p.png", "q.png"], "conversations": turns(f"<image>{Q}", "liver", f"<image>{Q}", "colon")}
    path = str(write(folder / "a.json", json.dumps([record])))
    assert [len(p.images) for p in load({"path": path, "format": "llava"}).prompts] == [1, 2]


def test_a_placeholder_between_words_keeps_its_place(folder: Path) -> None:
    record = {"problem": "Compare <image> with <image>, please.", "answer": "larger", "images": ["p.png", "q.png"]}
    (prompt,) = load(
        {"path": str(write(folder / "a.jsonl", lines(record))), "format": "easyr1"}, instruction=""
    ).prompts
    assert [part["type"] for part in prompt.messages[0]["content"]] == ["text", "image", "text", "image", "text"]


def test_where_keeps_the_records_that_are_meant(folder: Path) -> None:
    records = [
        {**MCQ, "answer": "liver", "lang": lang, "year": year} for lang, year in (("en", 1), ("zh", 2), ("en", 3))
    ]
    path = str(write(folder / "a.jsonl", lines(*records, {**MCQ, "answer": "liver"})))

    def kept(where: str) -> int:
        return len(load({"path": path, "format": "vqa", "where": where}).prompts)

    assert [kept(w) for w in ("lang == en", "lang != en", "lang in [en, zh]", "lang not in [en]", "year >= 2", "lang == en and year > 1")] == [2, 2, 3, 2, 2, 1]  # fmt: skip
    assert "keeps none of its 4 records" in refusal({"path": path, "format": "vqa", "where": "lang == de"})
    assert "is not COLUMN == VALUE" in refusal({"path": path, "format": "vqa", "where": "lang = en"})


def test_class_labels_are_read_by_their_names(folder: Path) -> None:
    import datasets

    features = datasets.Features(
        {"q": datasets.Value("string"), "cop": datasets.ClassLabel(names=["a", "b", "c", "d"])}
    )
    data = datasets.Dataset.from_list([{"q": Q, "cop": 1}, {"q": Q, "cop": -1}], features=features)
    data.to_parquet(folder / "a.parquet")
    data.save_to_disk(str(folder / "saved"))
    for path in (folder / "a.parquet", folder / "saved"):
        records, _ = open_records(Source(str(path)))
        assert [r["cop"] for _, r in records] == ["b", None] and records.row(1)["cop"] == "b"


def test_large_parquet_files_go_through_the_cache_of_datasets(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lingshu_rl.data.tables.IN_MEMORY", 0)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
    path = write(folder / "a.parquet", [{"image": CELL, "question": Q, "answer": "liver"}])
    assert first({"path": str(path), "format": "vqa"}) == WORD


def test_a_set_of_the_hub_is_asked_for_by_its_subset_and_split(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load_dataset(*names: Any, split: Any) -> Any:
        asked.append((*names, split))
        features = datasets.Features({"image": datasets.Image(), "question": datasets.Value("string"), "answer": datasets.Value("string")})  # fmt: skip
        data = datasets.Dataset.from_list([{"image": CELL, "question": Q, "answer": "liver"}], features=features)
        return data if split else datasets.DatasetDict({"train": data, "test": data})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert first({"path": "org/name:test", "subset": "english", "format": "vqa"}) == WORD
    assert asked == [("org/name", "english", "test")]
    assert "name one of its splits, train, test, after a colon: org/name:train" in refusal(
        {"path": "org/name", "format": "vqa"}
    )


def test_images_are_looked_for_in_their_folder(folder: Path) -> None:
    (folder / "far" / "img").mkdir(parents=True)
    (folder / "far" / "img" / "r.jpeg").write_bytes(PNG)
    source = {"path": str(write(folder / "a.jsonl", lines({"image": "r", "question": Q, "answer": "liver"}))), "format": "vqa"}  # fmt: skip
    assert "image file not found" in refusal(source)
    (prompt,) = load({**source, "image_dir": str(folder / "far")}).prompts
    assert prompt.images[0].source == str((folder / "far" / "img" / "r.jpeg").resolve())


def test_pictures_in_folders_by_class(folder: Path) -> None:
    for n, name in enumerate(("NORMAL", "PNEUMONIA")):
        (folder / "train" / name).mkdir(parents=True)
        (folder / "train" / name / f"{n}.png").write_bytes(PNG)
    source = {"path": f"{folder}:train", "map": {"images": "image", "answer": "label"}, "values": {"question": "Which?", "options": ["NORMAL", "PNEUMONIA"]}}  # fmt: skip
    assert [p.gold for p in load(source).prompts] == ["A", "B"]


def test_a_folder_of_several_splits_wants_one_named(folder: Path) -> None:
    (folder / "data").mkdir()
    for split, answer in (("train", "liver"), ("test", "colon")):
        write(folder / "data" / f"{split}-00000-of-00001.parquet", [{"image": CELL, "question": Q, "answer": answer}])
    assert "name one of its splits, train, test" in refusal({"path": str(folder), "format": "vqa"})
    assert first({"path": f"{folder}:test", "format": "vqa"})[3] == "colon"
    assert "no file of split 'dev'" in refusal({"path": f"{folder}:dev", "format": "vqa"})


def test_a_table_tells_of_lines_that_do_not_fit(folder: Path) -> None:
    path = write(folder / "a.csv", f"image,question,answer\np.png,{Q},liver\np.png,a,b,c\n")
    said = refusal({"path": str(path), "format": "vqa"})
    assert "row 2: it has 4 cells and the table 3 columns" in said


def test_places_and_later_reading_name_the_same_rows(folder: Path) -> None:
    """Of shards, with a record that has two rows and one that is left out."""
    for n in range(2):
        records = [{"id": f"{n}{k}", "image": "p.png", "keep": k, "conversations": turns(Q, "liver", Q, f"organ {n}{k}")} for k in range(3)]  # fmt: skip
        write(folder / f"part-{n}.jsonl", lines(*records))
    prompts = load({"path": str(folder / "part-*.jsonl"), "format": "llava", "where": "keep != 1"}).prompts
    assert [p.id for p in prompts] == ["00", "00/2", "02", "02/2", "10", "10/2", "12", "12/2"]
    assert prompts[-1].gold == "organ 12" and prompts.place("12/2") == "part-1.jsonl, line 3, question 2"


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"fromat": "llava"}, "unknown key.*did you mean 'format'"),
        ({"format": "lava"}, "no preset 'lava'.*did you mean 'llava'"),
        ({"map": {"qeustion": "a"}}, "'qeustion' is no field of a row.*did you mean 'question'"),
        ({"map": {"answer": {"form": "a"}}}, "map.answer.*constants belong under values"),
        ({"map": {"answer": {"from": "a", "bsae": 1}}}, "map.answer: unknown 'bsae'"),
        (
            {"map": {"answer": {"from": "a", "base": "B"}}},
            "map.answer.base: 'B' is not where an index may start",
        ),
        ({"map": "question"}, "map must be a mapping, got 'question'"),
        ({"each": {"a": 1}}, "each must be a list"),
        ({"turns": "first"}, "turns: 'first' is not one of each, last"),
        ({"share": 0}, "share=0 must be a number above 0"),
        ({"path": ""}, "`path` is missing"),
    ],
)
def test_a_source_that_says_nothing_sensible_is_refused_by_its_key(told: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        load({"path": "a.jsonl", **told})
