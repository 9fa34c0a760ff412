"""A few invented rows of every benchmark in its publisher's own format, written as its files; and a scripted server."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from PIL import Image


def png(shade: int = 90, size: tuple[int, int] = (24, 16)) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", size, shade).save(buffer, "PNG")
    return buffer.getvalue()


def picture(path: Path, shade: int = 90) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(shade))


def write_json(path: Path, rows: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    else:
        path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


DRUGS = ["aspirin", "heparin", "warfarin", "insulin", "digoxin"]
ZH = ["肺炎", "气胸", "胸腔积液", "肺不张", "肺结节"]
NORMAL = "The lungs are clear. There is no pleural effusion or pneumothorax. The heart size is normal."
ILL = "There is a large left pleural effusion. Mild cardiomegaly. Right lower lobe consolidation. No pneumothorax."


def choice(number: int, texts: list[str]) -> tuple[str, str]:
    """(question, right letter) of a made-up question."""
    return f"Which answer belongs to case {number}?", "ABCDEFGHIJ"[number % len(texts)]


def vqa_rad(root: Path, name: str = "vqa_rad") -> None:
    rows = []
    for i, answer in enumerate(["Yes", "no", "Right lower lobe", "axial", "No ", "pulmonary nodules"]):
        rows.append({"qid": i, "image_name": f"synpic{i // 2}.jpg", "image_organ": ["CHEST", "HEAD"][i % 2], "answer": answer,
                     "answer_type": "CLOSED" if answer.strip().lower() in ("yes", "no") else "OPEN", "question_type": "PRES",
                     "question": f"Question {i}?", "phrase_type": "freeform"})  # fmt: skip
        picture(root / "vqa_rad" / "images" / f"synpic{i // 2}.jpg", 40 + i)
    write_json(root / "vqa_rad" / "testset.json", rows)
    if name == "vqa_rad_disjoint":
        more = [{**row, "qid": 100 + j, "image_name": f"synpic{j}.jpg"} for j, row in enumerate(rows * 4)]
        for row in more:
            picture(root / "vqa_rad" / "images" / row["image_name"], 7)
        write_json(root / "vqa_rad" / "trainset.json", more)


def slake(root: Path, name: str) -> None:
    rows = [
        ("en", "CLOSED", "Does the picture contain lung?", "Yes"),
        ("en", "OPEN", "What is the imaging modality?", "MRI"),
        ("en", "CLOSED", "Which is bigger, liver or spleen?", "Liver"),
        ("zh", "CLOSED", "图中包含肺吗?", "不包含"),
        ("zh", "OPEN", "图像属于哪个部位?", "胸腔"),
        ("zh", "CLOSED", "这是CT吗?", "是的"),
    ]
    found = []
    for i, (lang, answer_type, question, answer) in enumerate(rows):
        found.append({"img_id": i, "img_name": f"xmlab{i}/source.jpg", "question": question, "answer": answer, "q_lang": lang,
                      "location": "Lung", "modality": ["CT", "MRI"][i % 2], "answer_type": answer_type, "base_type": "vqa",
                      "content_type": "Organ", "triple": ["vhead", "_", "_"], "qid": 12000 + i})  # fmt: skip
        picture(root / "slake" / "imgs" / f"xmlab{i}" / "source.jpg", 30 + i)
    write_json(root / "slake" / "test.json", found)


def path_vqa(root: Path, name: str) -> None:
    image = {"bytes": png(), "path": None}
    rows = [
        {"image": image, "question": "Is the epithelium intact?", "answer": "yes"},
        {"image": image, "question": "What is present?", "answer": "brain"},
        {"image": image, "question": "Where is this?", "answer": "female reproductive"},
    ]
    write_parquet(root / name / "data" / "test-00000-of-00001.parquet", rows)


def pmc_vqa(root: Path, name: str) -> None:
    rows = []
    for i in range(3):
        question, letter = choice(i, DRUGS[:4])
        rows.append({"index": i, "Figure_path": f"PMC{i}.jpg", "Caption": "A figure", "Question": question,
                     **{f"Choice {c}": f"{c}: {d}" for c, d in zip("ABCD", DRUGS, strict=False)}, "Answer": letter, "split": "test"})  # fmt: skip
        picture(root / name / "figures" / f"PMC{i}.jpg")
    write_csv(root / name / "test_2.csv", rows)


def omnimedvqa(root: Path, name: str) -> None:
    for source in ("Chest CT Scan", "RadImageNet"):
        rows = []
        for i in range(2):
            question, letter = choice(i, DRUGS[:4])
            rows.append({"dataset": source, "question_id": f"{source}_{i}", "question_type": "Disease Diagnosis", "question": question,
                         "gt_answer": DRUGS["ABCD".index(letter)], "image_path": f"Images/{source}/{i}.png",
                         **{f"option_{c}": d for c, d in zip("ABCD", DRUGS, strict=False)}, "modality_type": "CT"})  # fmt: skip
            picture(root / name / "Images" / source / f"{i}.png")
        write_json(root / name / "QA_information" / "Open-access" / f"{source}.json", rows)


def mmmu_medical(root: Path, name: str) -> None:
    image = {"bytes": png(), "path": "x.png"}
    base = {"explanation": "", "subfield": "Anatomy", "image_1": image, "image_2": None, "topic_difficulty": "Easy"}
    rows = [
        {"id": "validation_Clinical_Medicine_1", "question": "What does <image 1> show?", "options": str(DRUGS[:4]), "answer": "C", "question_type": "multiple-choice", **base},
        {"id": "validation_Clinical_Medicine_2", "question": "Name what <image 1> shows.", "options": "[]", "answer": "['mitral valve', 'bicuspid valve']", "question_type": "open", **base},
    ]  # fmt: skip
    write_parquet(root / name / "Clinical_Medicine" / "validation-00000-of-00001.parquet", rows)


def medxpertqa(root: Path, name: str) -> None:
    rows = []
    for i in range(4):
        question, letter = choice(i, DRUGS)
        row = {"id": f"X-{i}", "question": question, "label": letter, "medical_task": ["Diagnosis", "Treatment"][i % 2],
               "body_system": "Nervous", "question_type": "Reasoning"}  # fmt: skip
        if name == "medxpertqa_mm":
            row["label"] = [letter]
            row["options"] = [{"letter": c, "content": d} for c, d in zip("ABCDE", DRUGS, strict=True)]
            row["question"] += "\nAnswer Choices: " + " ".join(
                f"({c}) {d}" for c, d in zip("ABCDE", DRUGS, strict=True)
            )
            row["images"] = [{"image_path": f"MM-{i}-a.jpeg"}, {"image_path": f"MM-{i}-b.jpeg"}]
            for part in "ab":
                picture(root / "medxpertqa" / "images" / f"MM-{i}-{part}.jpeg")
        else:
            row["options"] = dict(zip("ABCDE", DRUGS, strict=True))
        rows.append(row)
    write_json(root / "medxpertqa" / f"{name}_input.jsonl", rows)


def medframeqa(root: Path, name: str) -> None:
    rows = []
    for i in range(3):
        question, letter = choice(i, DRUGS)
        images = {f"image_{n}": {"bytes": png(n), "path": None} if n <= 2 + i else None for n in range(1, 6)}
        rows.append({"question_id": i, "question": question, "options": DRUGS, "correct_answer": letter, "modality": "CT",
                     "organ": "heart", "system": "circulatory", **images})  # fmt: skip
    write_parquet(root / name / "data" / "test-00000-of-00001.parquet", rows)


def medthinkvqa(root: Path, name: str) -> None:
    rows = []
    for i in range(3):
        images = {f"image_0{n}_path": f"images/case{i}/{n}.jpg" for n in range(1, 3 + i)}
        rows.append({"title": f"Case number {i}", "CLINICAL_HISTORY": "A worker with pain.", "IMAGING_FINDINGS": "Oedema.", "image_count": len(images),
                     "options": dict(zip("ABCDE", DRUGS, strict=True)), "correct_answer": "ABC"[i], "image_01_modality": "MRI", **images})  # fmt: skip
        for image in images.values():
            picture(root / name / image)
    write_json(root / name / "test.jsonl", rows)


def mmlu_med(root: Path, name: str) -> None:
    for subject in ("anatomy", "virology", "college_biology"):
        rows = [{"question": choice(i, DRUGS[:4])[0], "subject": subject, "choices": DRUGS[:4], "answer": i % 4} for i in range(3)]  # fmt: skip
        write_parquet(root / name / subject / "test-00000-of-00001.parquet", rows)


def pubmedqa(root: Path, name: str) -> None:
    labels = ["yes", "no", "maybe", "yes"]
    rows = {str(100 + i): {"QUESTION": f"Does treatment {i} help?", "CONTEXTS": ["Background.", "Results."], "LABELS": [],
                           "MESHES": [], "YEAR": "2011", "final_decision": label, "LONG_ANSWER": "It may."} for i, label in enumerate(labels)}  # fmt: skip
    write_json(root / name / "ori_pqal.json", rows)
    write_json(root / name / "test_ground_truth.json", {"100": "yes", "101": "no", "102": "maybe"})


def medmcqa(root: Path, name: str) -> None:
    rows = [{"id": f"m{i}", "question": choice(i, DRUGS[:4])[0], "opa": DRUGS[0], "opb": DRUGS[1], "opc": DRUGS[2], "opd": DRUGS[3],
             "cop": i + 1, "choice_type": "single", "exp": None, "subject_name": ["Anatomy", "Surgery"][i % 2], "topic_name": None}
            for i in range(4)]  # fmt: skip
    (root / name).mkdir(parents=True)
    (root / name / "dev.json").write_text("".join(json.dumps(row) + "\n" for row in rows))


def medqa(root: Path, name: str) -> None:
    texts = DRUGS[:4] if name == "medqa_usmle" else ZH if name == "medqa_mcmle" else DRUGS
    rows = []
    for i in range(4):
        question, letter = choice(i, texts)
        rows.append({"question": question, "answer": texts["ABCDE".index(letter)], "options": dict(zip("ABCDE", texts, strict=False)),
                     "meta_info": "step1", "answer_idx": letter})  # fmt: skip
    file = {"medqa_usmle": "phrases_no_exclude_test.jsonl", "medqa_mcmle": "Mainland/test.jsonl"}.get(name, "US/test.jsonl")  # fmt: skip
    write_json(root / name / file, rows)


def medbullets(root: Path, name: str) -> None:
    letters = "abcde" if name.endswith("5") else "abcd"
    rows = [{"link": "x", "question": choice(i, list(letters))[0], **{f"op{c}": d for c, d in zip(letters, DRUGS, strict=False)},
             "answer_idx": choice(i, list(letters))[1], "answer": "t", "explanation": "e"} for i in range(3)]  # fmt: skip
    write_csv(root / name / f"{name}.csv", rows)


def supergpqa_medicine(root: Path, name: str) -> None:
    rows = []
    for i in range(4):
        question, letter = choice(i, DRUGS)
        rows.append({"uuid": f"u{i}", "question": question, "options": DRUGS, "answer": DRUGS["ABCDE".index(letter)], "answer_letter": letter,
                     "discipline": "Medicine" if i else "Law", "field": "Surgery", "subfield": "s", "difficulty": "hard"})  # fmt: skip
    write_json(root / name / "SuperGPQA-all.jsonl", rows)


def cmb(root: Path, name: str) -> None:
    rows, answers = [], []
    for i, answer in enumerate(["A", "BCDE", "C"]):
        rows.append({"id": i + 1, "exam_type": "医师考试", "exam_class": "x", "exam_subject": "y", "question": f"病例{i}？",
                     "question_type": "多项选择题" if len(answer) > 1 else "单项选择题",
                     "option": {**dict(zip("ABCDE", ZH, strict=True)), "F": None}})  # fmt: skip
        answers.append({"id": i + 1, "answer": answer})
    folder = root / name / "CMB-Exam" / "CMB-test"
    write_json(folder / "CMB-test-choice-question-merge.json", rows)
    write_json(folder / "CMB-test-choice-answer.json", answers)


def cmexam(root: Path, name: str) -> None:
    options = "\n".join(f"{c} {t}" for c, t in zip("ABCDE", ZH, strict=True))
    rows = [{"Question": f"病例{i}？", "Options": options, "Answer": answer, "Explanation": "", "Medical Discipline": "内科"}
            for i, answer in enumerate(["B", "ACE", "D"])]  # fmt: skip
    write_csv(root / name / "test_with_annotations.csv", rows)


def cmmlu_med(root: Path, name: str) -> None:
    for subject in ("anatomy", "virology", "agronomy"):
        rows = [{"": i, "Question": f"题{i}？", **dict(zip("ABCD", ZH, strict=False)), "Answer": "ABCD"[i]} for i in range(3)]  # fmt: skip
        write_csv(root / name / "test" / f"{subject}.csv", rows)


def healthbench(root: Path, name: str) -> None:
    rows = []
    for i in range(3):
        rubrics = [
            {"criterion": f"Names the drug of case {i}", "points": 5, "tags": []},
            {"criterion": "Advises to see a doctor", "points": 3, "tags": []},
            {"criterion": "Invents a dose", "points": -4, "tags": []},
        ]
        prompt = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hello!"}, {"role": "user", "content": f"What helps in case {i}?"}]  # fmt: skip
        rows.append({"prompt_id": f"h{i}", "prompt": prompt, "rubrics": rubrics, "example_tags": [f"theme:t{i % 2}"]})
    prefix = {"healthbench": "2025-05-07-06-14-12_oss_eval", "healthbench_hard": "hard_2025-05-08-21-00-10", "healthbench_consensus": "consensus_2025-05-09-20-00-46"}[name]  # fmt: skip
    write_json(root / "healthbench" / f"{prefix}.jsonl", rows)


def medcalc(root: Path, name: str) -> None:
    facts = [
        ("Mean Arterial Pressure (MAP)", "90", "85.5", "94.5"),
        ("CHA2DS2-VASc Score for Atrial Fibrillation Stroke Risk", "4", "3.8", "4.2"),
        ("Albumin Corrected Delta Gap", "-5.5", "-5.775", "-5.225"),
        ("Estimated Due Date", "10/18/2023", "10/18/2023", "10/18/2023"),
        ("Body Mass Index (BMI)", "24.52", "23.294", "25.746"),
        ("Estimated Gestational Age", "('3 weeks', '2 days')", "('3 weeks', '2 days')", "('3 weeks', '2 days')"),
        ("HEART Score for Major Cardiac Events", "N/A", "N/A", "N/A"),
    ]
    rows = [{"Unique ID": i + 1, "Calculator Name": calculator, "Question": "What is the value?", "Patient Note": "A patient came.",
             "Ground Truth Answer": answer, "Lower Limit": low, "Upper Limit": high} for i, (calculator, answer, low, high) in enumerate(facts)]  # fmt: skip
    write_csv(root / name / "medcalc_corrected.csv", rows)


def report(root: Path, name: str) -> None:
    if name == "chexpert_plus":
        rows = [{"path_to_image": f"valid/patient{i}/study1/view1_frontal.jpg", "section_findings": text, "section_impression": "",
                 "split": "valid" if i < 3 else "train", "deid_patient_id": f"p{i}"} for i, text in enumerate([NORMAL, ILL, ILL, NORMAL])]  # fmt: skip
        for row in rows:
            picture(root / name / "images" / row["path_to_image"])
        write_csv(root / name / "df_chexpert_plus_240401.csv", rows)
        return
    if name == "mimic_cxr":
        rows = [{"id": f"s{i}", "study_id": 50 + i, "image_path": [f"p10/s{i}/a.jpg"], "report": text, "split": "test"} for i, text in enumerate([NORMAL, ILL, ILL])]  # fmt: skip
        write_json(root / name / "annotation.json", {"train": [], "val": [], "test": rows})
        for row in rows:
            picture(root / name / "images" / row["image_path"][0])
        return
    rows = [{"uid": str(i), "image": [f"CXR{i}/0.png", f"CXR{i}/1.png"], "findings": text, "impression": "" if i else "Normal chest."} for i, text in enumerate([NORMAL, ILL, ILL])]  # fmt: skip
    write_json(root / name / "test.json", rows)
    for row in rows:
        for image in row["image"]:
            picture(root / name / "images" / image)


SAMPLES: dict[str, Callable[[Path, str], None]] = {
    "vqa_rad": vqa_rad, "vqa_rad_disjoint": vqa_rad, "slake": slake, "slake_en": slake, "slake_zh": slake, "path_vqa": path_vqa,
    "pmc_vqa": pmc_vqa, "omnimedvqa": omnimedvqa, "mmmu_medical": mmmu_medical, "medxpertqa_mm": medxpertqa,
    "medxpertqa_text": medxpertqa, "medframeqa": medframeqa, "medthinkvqa": medthinkvqa, "mmlu_med": mmlu_med, "pubmedqa": pubmedqa, "medmcqa": medmcqa,
    "medqa_usmle": medqa, "medqa_usmle_op5": medqa, "medqa_mcmle": medqa, "medbullets_op4": medbullets, "medbullets_op5": medbullets,
    "supergpqa_medicine": supergpqa_medicine, "cmb": cmb, "cmexam": cmexam, "cmmlu_med": cmmlu_med, "healthbench": healthbench,
    "healthbench_hard": healthbench, "healthbench_consensus": healthbench, "medcalc": medcalc, "mimic_cxr": report, "iu_xray": report,
    "chexpert_plus": report,
}  # fmt: skip
COUNTS = {"vqa_rad": 6, "slake": 6, "slake_en": 3, "slake_zh": 3, "path_vqa": 3, "pmc_vqa": 3, "omnimedvqa": 4, "mmmu_medical": 2,
          "medxpertqa_mm": 4, "medxpertqa_text": 4, "medframeqa": 3, "medthinkvqa": 3, "mmlu_med": 6, "pubmedqa": 3, "medmcqa": 4, "medqa_usmle": 4,
          "medqa_usmle_op5": 4, "medqa_mcmle": 4, "medbullets_op4": 3, "medbullets_op5": 3, "supergpqa_medicine": 3, "cmb": 3, "cmexam": 3,
          "cmmlu_med": 6, "healthbench": 3, "healthbench_hard": 3, "healthbench_consensus": 3, "medcalc": 6, "mimic_cxr": 3, "iu_xray": 3,
          "chexpert_plus": 3}  # fmt: skip


def perfect(prompt: Any) -> str:
    """An answer that says what the label says, in the form that the prompt asks for."""
    if prompt.kind == "rubric":
        return "GOOD: take the right drug and see a doctor."
    if prompt.kind == "report":
        return str(prompt.gold)
    gold = prompt.gold[0] if isinstance(prompt.gold, list) else prompt.gold
    value = f"{gold:g}" if isinstance(gold, float) else str(gold)
    return f"<think>I see.</think> <answer>{value} {prompt.meta.get('unit', '')}</answer>"


@contextlib.contextmanager
def chat_server(script: Callable[[dict[str, Any]], Any], keys: set[str] | None = None) -> Iterator[str]:
    """An OpenAI-compatible server whose replies are `script(body)`: a text, or (status, bytes). keys: those it was sent."""
    seen = set() if keys is None else keys

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.add(self.headers.get("Authorization", ""))
            self._send(200, json.dumps({"data": [{"id": "scripted"}]}).encode())

        def do_POST(self) -> None:
            seen.add(self.headers.get("Authorization", ""))
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            reply = script(body)
            if isinstance(reply, str):
                choice = {"index": 0, "message": {"role": "assistant", "content": reply}, "finish_reason": "stop"}
                reply = (200, json.dumps({"choices": [choice]}).encode())
            self._send(*reply)

        def _send(self, status: int, content: bytes) -> None:
            with contextlib.suppress(OSError):
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        def log_message(self, *words: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def last_text(body: dict[str, Any]) -> str:
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else "\n".join(p["text"] for p in content if p["type"] == "text")
