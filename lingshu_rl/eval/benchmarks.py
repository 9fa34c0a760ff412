"""The benchmarks as a table: where each one's rows are, how they become data rows, what they ask, how they are scored.

An entry is data. What a layout needs beyond renaming fields is a named reader in `loading.py`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from lingshu_rl.data.rows import instruction_text
from lingshu_rl.failures import LingshuError
from rewards.kinds import KINDS, find


class EvalError(LingshuError, ValueError):
    """An evaluation that cannot be run; the message names what is wrong and what to do."""


@dataclass(frozen=True)
class Benchmark:
    """One row of the table.

    reader: a name in `loading.READERS`. fields: what the reader wants -> the source's field, alternatives split by "|".
    files: patterns under DIR/<name or folder> and DIR itself, the first that matches is read. hub: dataset id, with its
    configurations in `configs` ("" for the default one). keep: source field -> the values whose rows belong to it.
    groups: name in the results -> source field. one_based: an answer index counts from 1 in the source's files. all_files: every matching file is a part (one a
    subject), not only the first.
    prompt: a name in PROMPTS. metric: accuracy | report | rubric. expected: rows of the published set, 0 where the
    publisher gives none. tried: what its loader was run on.
    """

    name: str
    title: str
    reader: str
    kinds: tuple[str, ...]
    fields: Mapping[str, str]
    files: tuple[str, ...]
    hub: str
    split: str
    expected: int
    licence: str
    tried: str
    configs: tuple[str, ...] = ("",)
    folder: str = ""
    keep: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    groups: Mapping[str, str] = field(default_factory=dict)
    one_based: bool = False
    all_files: bool = False
    prompt: str = "direct"
    metric: str = "accuracy"
    note: str = ""

    @property
    def has_images(self) -> bool:
        return "images" in self.fields


# What the last line of a prompt asks for. "direct" suits models of any training; "think" is the training prompt.
PROMPT_NAMES = ("auto", "direct", "think", "short")


def prompt_line(prompt: str, kind: str, multi: bool) -> str:
    """The last line of a question. prompt: "direct", "direct_zh", "think" or "short" (the training prompts), or own text."""
    if prompt in ("direct", "direct_zh"):
        return find(kind).prompt(prompt, multi)
    return instruction_text({"think": "full"}.get(prompt, prompt), kind, multi)


def prompt_hash(prompt: str) -> str:
    """Changes when any wording of this prompt changes."""
    lines = [prompt_line(prompt, kind, multi) for kind in KINDS for multi in (False, True)]
    return hashlib.sha256(json.dumps(lines, ensure_ascii=False).encode()).hexdigest()[:16]


# The unit each MedCalc question asks for; "score" is a count without a unit, "date" a calendar date.
MEDCALC_UNITS: Mapping[str, str] = {
    "Creatinine Clearance (Cockcroft-Gault Equation)": "mL/min",
    "CKD-EPI Equations for Glomerular Filtration Rate": "mL/min/1.73 m2",
    "MDRD GFR Equation": "mL/min/1.73 m2",
    "Mean Arterial Pressure (MAP)": "mmHg",
    "Body Mass Index (BMI)": "kg/m2",
    "Calcium Correction for Hypoalbuminemia": "mg/dL",
    "Ideal Body Weight": "kg",
    "Adjusted Body Weight": "kg",
    "Target weight": "kg",
    "QTc Bazett Calculator": "ms",
    "QTc Fridericia Calculator": "ms",
    "QTc Framingham Calculator": "ms",
    "QTc Hodges Calculator": "ms",
    "QTc Rautaharju Calculator": "ms",
    "Maintenance Fluids Calculations": "mL/h",
    "Sodium Correction for Hyperglycemia": "mEq/L",
    "Serum Osmolality": "mOsm/kg",
    "Free Water Deficit": "L",
    "Anion Gap": "mEq/L",
    "Delta Gap": "mEq/L",
    "Albumin Corrected Anion Gap": "mEq/L",
    "Albumin Corrected Delta Gap": "mEq/L",
    "Fractional Excretion of Sodium (FENa)": "%",
    "LDL Calculated": "mg/dL",
    "Body Surface Area Calculator": "m2",
    "Steroid Conversion Calculator": "mg",
    "Estimated Gestational Age": "days",
    "Estimated Due Date": "date",
    "Estimated of Conception": "date",
    "Fibrosis-4 (FIB-4) Index for Liver Fibrosis": "",
    "Delta Ratio": "",
    "Albumin Corrected Delta Ratio": "",
    "Morphine Milligram Equivalents (MME) Calculator": "",
    "HOMA-IR (Homeostatic Model Assessment for Insulin Resistance)": "",
    "CHA2DS2-VASc Score for Atrial Fibrillation Stroke Risk": "score",
    "Wells' Criteria for Pulmonary Embolism": "score",
    "Wells' Criteria for DVT": "score",
    "Child-Pugh Score for Cirrhosis Mortality": "score",
    "Revised Cardiac Risk Index for Pre-Operative Risk": "score",
    "HEART Score for Major Cardiac Events": "score",
    "Centor Score (Modified/McIsaac) for Strep Pharyngitis": "score",
    "HAS-BLED Score for Major Bleeding Risk": "score",
    "Glasgow-Blatchford Bleeding Score (GBS)": "score",
    "Charlson Comorbidity Index (CCI)": "score",
    "FeverPAIN Score for Strep Pharyngitis": "score",
    "CURB-65 Score for Pneumonia Severity": "score",
    "Framingham Risk Score for Hard Coronary Heart Disease": "score",
    "PERC Rule for Pulmonary Embolism": "score",
    "SIRS Criteria": "score",
    "PSI Score: Pneumonia Severity Index for CAP": "score",
    "Glasgow Coma Score (GCS)": "score",
    "APACHE II Score": "score",
    "Sequential Organ Failure Assessment (SOFA) Score": "score",
    "Caprini Score for Venous Thromboembolism (2005)": "score",
}

_CHOICE = {"question": "question", "options": "options", "answer": "answer_idx|answer"}
_DOCUMENTED = "rows of the documented format; not tried on its own data"
_VQA_RAD = Benchmark(
    name="vqa_rad",
    title="VQA-RAD (published test split)",
    reader="vqa",
    kinds=("yesno", "open"),
    fields={"id": "qid", "question": "question", "answer": "answer", "images": "image_name|image"},
    files=("testset.json", "test*.json*", "data/test*.parquet", "test*.parquet"),
    hub="flaviagiammarino/vqa-rad",
    split="test",
    expected=451,
    licence="CC0-1.0",
    tried="its own data: all 451 questions with their 203 images",
    groups={"organ": "image_organ", "question_type": "question_type", "answer_type": "answer_type"},
    note="All 203 images of this split are also in the published training split: use vqa_rad_disjoint after training.",
)
_SLAKE = Benchmark(
    name="slake",
    title="SLAKE (English and Chinese)",
    reader="vqa",
    kinds=("yesno", "open"),
    fields={"id": "qid", "question": "question", "answer": "answer", "images": "img_name", "language": "q_lang"},
    files=("test.json", "slake_test*.json", "*test*.parquet"),
    hub="BoKelvin/SLAKE",
    split="test",
    expected=2094,
    licence="CC-BY-4.0",
    tried="200 of its own rows, without their images",
    groups={
        "language": "q_lang",
        "modality": "modality",
        "organ": "location",
        "question_type": "content_type",
        "answer_type": "answer_type",
    },
)
_MEDQA = Benchmark(
    name="medqa_usmle",
    title="MedQA-USMLE, 4 options",
    reader="choice",
    kinds=("option",),
    fields=_CHOICE,
    files=("phrases_no_exclude_test.jsonl", "*4_options*/*test*.jsonl", "test*.json*", "*test*.parquet"),
    hub="GBaker/MedQA-USMLE-4-options",
    split="test",
    expected=1273,
    licence="MIT",
    tried=_DOCUMENTED,
    groups={"step": "meta_info"},
)
_MEDBULLETS = Benchmark(
    name="medbullets_op4",
    title="Medbullets, 4 options",
    reader="choice",
    kinds=("option",),
    fields={"question": "question", "options": "options|opa,opb,opc,opd", "answer": "answer_idx|answer"},
    files=("*op4*.csv", "*op4*.json*", "*test*.csv", "*.parquet"),
    hub="tuenguyen/Medical-Eval-MedBullets_op4",
    split="train",
    expected=308,
    licence="not stated by its authors",
    tried=_DOCUMENTED,
)
_HEALTHBENCH = Benchmark(
    name="healthbench",
    title="HealthBench",
    reader="rubric",
    kinds=("rubric",),
    fields={"id": "prompt_id", "messages": "prompt", "rubrics": "rubrics"},
    files=("2025*oss_eval.jsonl", "healthbench.jsonl"),
    hub="openai/healthbench",
    split="test",
    expected=5000,
    licence="MIT",
    tried=_DOCUMENTED,
    groups={"theme": "example_tags"},
    metric="rubric",
    note="Scored by a judge alone: give --judge URL.",
)
_MIMIC = Benchmark(
    name="mimic_cxr",
    title="MIMIC-CXR reports",
    reader="report",
    kinds=("report",),
    fields={
        "id": "study_id|id",
        "report": "report",
        "findings": "findings",
        "impression": "impression",
        "images": "image_path|image",
    },
    files=("test.json", "annotation.json", "mimic_annotation*.json"),
    hub="",
    split="test",
    expected=3858,
    licence="PhysioNet Credentialed Health Data License 1.5.0",
    tried=_DOCUMENTED,
    metric="report",
)


def _like(base: Benchmark, **changes: object) -> Benchmark:
    from dataclasses import replace

    return replace(base, **changes)  # type: ignore[arg-type]


_TABLE = (
    _VQA_RAD,
    _like(
        _VQA_RAD,
        name="vqa_rad_disjoint",
        title="VQA-RAD, questions on held-out images",
        reader="vqa_held_out",
        folder="vqa_rad",
        files=("testset.json+trainset.json", "test*.json*+train*.json*"),
        hub="",
        expected=0,
        tried="its own data",
        note="A fifth of the 315 images is held out by a hash of its name, with all its questions of both published "
        "splits; train on the other images (`loading.vqa_rad_held_out`).",
    ),
    _SLAKE,
    _like(
        _SLAKE,
        name="slake_en",
        title="SLAKE (English)",
        folder="slake",
        keep={"q_lang": ("en",)},
        expected=1061,
    ),
    _like(
        _SLAKE,
        name="slake_zh",
        title="SLAKE (Chinese)",
        folder="slake",
        keep={"q_lang": ("zh",)},
        expected=1033,
        prompt="direct_zh",
    ),
    Benchmark(
        name="path_vqa",
        title="PathVQA",
        reader="path_vqa",
        kinds=("yesno", "open"),
        fields={"question": "question", "answer": "answer", "images": "image"},
        files=("pathvqa_test*.json", "test*.json*", "data/test*.parquet", "test*.parquet"),
        hub="flaviagiammarino/path-vqa",
        split="test",
        expected=6719,
        licence="MIT",
        tried="630 questions of its own LXMERT-style file, without their images",
        groups={"answer_type": "answer_type"},
        folder="pathvqa",
    ),
    Benchmark(
        name="pmc_vqa",
        title="PMC-VQA",
        reader="choice",
        kinds=("option",),
        fields={
            "id": "index",
            "question": "Question",
            "options": "Choice A,Choice B,Choice C,Choice D",
            "answer": "Answer_label|Answer",
            "images": "Figure_path",
        },
        files=("test_clean.csv", "test_2.csv", "test.csv"),
        hub="RadGenome/PMC-VQA",
        split="test",
        expected=2000,
        licence="CC-BY-SA",
        tried=_DOCUMENTED,
        note="2,000 rows are the cleaned test set (test_clean.csv); test_2.csv has 33,430.",
    ),
    Benchmark(
        name="omnimedvqa",
        title="OmniMedVQA (open access)",
        reader="choice",
        kinds=("option",),
        fields={
            "id": "question_id",
            "question": "question|problem",
            "options": "option_A,option_B,option_C,option_D",
            "answer": "gt_answer|solution",
            "images": "image_path|image",
        },
        files=("QA_information/Open-access/*.json*", "omnimedvqa_*.json"),
        hub="",
        all_files=True,
        split="test",
        expected=88995,
        licence="open-access part: as each of its 42 source datasets states",
        tried="320 of its own rows as Med-R1 writes them, without their images",
        groups={"modality": "modality_type|modality", "question_type": "question_type", "source": "dataset"},
    ),
    Benchmark(
        name="mmmu_medical",
        title="MMMU Health & Medicine (validation)",
        reader="mmmu",
        kinds=("option", "open"),
        fields={
            "id": "id",
            "question": "question",
            "options": "options",
            "answer": "answer",
            "images": "image_1,image_2,image_3,image_4,image_5,image_6,image_7",
        },
        files=("*/validation*.parquet", "*validation*.json*"),
        hub="MMMU/MMMU",
        configs=(
            "Basic_Medical_Science",
            "Clinical_Medicine",
            "Diagnostics_and_Laboratory_Medicine",
            "Pharmacy",
            "Public_Health",
        ),
        all_files=True,
        split="validation",
        expected=150,
        licence="Apache-2.0",
        tried=_DOCUMENTED,
        groups={"subject": "subfield", "question_type": "question_type"},
        note="The test split's answers are not published, so it cannot be scored here.",
    ),
    Benchmark(
        name="medxpertqa_mm",
        title="MedXpertQA (multimodal)",
        reader="choice",
        kinds=("option",),
        fields={"id": "id", "question": "question", "options": "options", "answer": "label", "images": "images"},
        files=("medxpertqa_mm*.jsonl", "MM/test.jsonl", "eval/data/medxpertqa/input/medxpertqa_mm_input.jsonl"),
        hub="TsinghuaC3I/MedXpertQA",
        configs=("MM",),
        split="test",
        expected=2000,
        licence="MIT",
        tried="100 of its own rows, without their images",
        groups={"task": "medical_task", "organ": "body_system", "question_type": "question_type"},
        folder="medxpertqa",
    ),
    Benchmark(
        name="medxpertqa_text",
        title="MedXpertQA (text)",
        reader="choice",
        kinds=("option",),
        fields={"id": "id", "question": "question", "options": "options", "answer": "label"},
        files=("medxpertqa_text*.jsonl", "Text/test.jsonl", "eval/data/medxpertqa/input/medxpertqa_text_input.jsonl"),
        hub="TsinghuaC3I/MedXpertQA",
        configs=("Text",),
        split="test",
        expected=2450,
        licence="MIT",
        tried="100 of its own rows",
        groups={"task": "medical_task", "organ": "body_system", "question_type": "question_type"},
        folder="medxpertqa",
    ),
    Benchmark(
        name="medframeqa",
        title="MedFrameQA",
        reader="choice",
        kinds=("option",),
        fields={
            "id": "question_id",
            "question": "question",
            "options": "options",
            "answer": "correct_answer",
            "images": "image_1,image_2,image_3,image_4,image_5",
        },
        files=("data/test*.parquet", "*test*.parquet", "*test*.json*"),
        hub="SuhaoYu1020/MedFrameQA",
        split="test",
        expected=2851,
        licence="CC-BY-4.0",
        tried=_DOCUMENTED,
        groups={"modality": "modality", "organ": "organ", "system": "system"},
    ),
    Benchmark(
        name="mmlu_med",
        title="MMLU, six medical subjects",
        reader="choice",
        kinds=("option",),
        fields={"question": "question", "options": "choices", "answer": "answer"},
        files=("*test*.parquet", "*/test*.parquet", "*test*.json*"),
        hub="cais/mmlu",
        configs=(
            "anatomy",
            "clinical_knowledge",
            "college_biology",
            "college_medicine",
            "medical_genetics",
            "professional_medicine",
        ),
        all_files=True,
        split="test",
        expected=1089,
        licence="MIT",
        tried=_DOCUMENTED,
        keep={
            "subject": (
                "anatomy",
                "clinical_knowledge",
                "college_biology",
                "college_medicine",
                "medical_genetics",
                "professional_medicine",
            )
        },
        groups={"subject": "subject"},
    ),
    Benchmark(
        name="pubmedqa",
        title="PubMedQA (expert-labelled test)",
        reader="pubmedqa",
        kinds=("option",),
        fields={
            "id": "id|pubid|pmid",
            "question": "QUESTION|question",
            "contexts": "CONTEXTS|context",
            "answer": "final_decision",
        },
        files=("test_set.json", "ori_pqal.json", "pqal_*.json", "*test*.parquet", "*.parquet"),
        hub="qiaojin/PubMedQA",
        configs=("pqa_labeled",),
        split="train",
        expected=500,
        licence="MIT",
        tried="500 of its own rows",
        groups={"answer": "final_decision"},
        note="Of ori_pqal.json or the Hub's 1,000 rows only those named in test_ground_truth.json beside it are the test set.",
    ),
    Benchmark(
        name="medmcqa",
        title="MedMCQA (validation)",
        reader="choice",
        kinds=("option",),
        fields={"id": "id", "question": "question", "options": "opa,opb,opc,opd", "answer": "cop"},
        files=("dev.json", "medmcqa_dev*.jsonl", "validation*.json*", "*validation*.parquet"),
        hub="openlifescienceai/medmcqa",
        split="validation",
        expected=4183,
        licence="MIT",
        tried="3,764 of its own rows",
        one_based=True,
        groups={"subject": "subject_name"},
        note="`cop` counts from 1 in the authors' files and from 0 on the Hub; the test split has no answers.",
    ),
    _MEDQA,
    _like(
        _MEDQA,
        name="medqa_usmle_op5",
        title="MedQA-USMLE, 5 options",
        hub="",
        files=("US/test.jsonl", "questions/US/test.jsonl", "test*.jsonl"),
    ),
    _MEDBULLETS,
    _like(
        _MEDBULLETS,
        name="medbullets_op5",
        title="Medbullets, 5 options",
        hub="LangAGI-Lab/medbullets_op5",
        split="test",
        fields={"question": "question", "options": "options|opa,opb,opc,opd,ope", "answer": "answer_idx|answer"},
        files=("*op5*.csv", "*op5*.json*", "*test*.csv", "*.parquet"),
    ),
    Benchmark(
        name="supergpqa_medicine",
        title="SuperGPQA (medicine)",
        reader="choice",
        kinds=("option",),
        fields={"id": "uuid", "question": "question", "options": "options", "answer": "answer_letter|answer"},
        files=("SuperGPQA*.jsonl", "*.jsonl", "*.parquet"),
        hub="m-a-p/SuperGPQA",
        split="train",
        expected=2755,
        licence="ODC-BY",
        tried=_DOCUMENTED,
        keep={"discipline": ("Medicine",)},
        groups={"subject": "field", "difficulty": "difficulty"},
    ),
    Benchmark(
        name="cmb",
        title="CMB-Exam",
        reader="choice",
        kinds=("option",),
        fields={"id": "id", "question": "question", "options": "option", "answer": "answer"},
        files=("CMB-Exam/CMB-test/CMB-test-choice-question-merge.json", "CMB-test*question*.json", "CMB-val*.json"),
        hub="",
        split="test",
        expected=11200,
        licence="Apache-2.0",
        tried=_DOCUMENTED,
        groups={"exam": "exam_type", "question_type": "question_type"},
        prompt="direct_zh",
        note="The test answers are a file of their own (CMB-test-choice-answer.json): put it beside the questions.",
    ),
    Benchmark(
        name="cmexam",
        title="CMExam",
        reader="choice",
        kinds=("option",),
        fields={"question": "Question", "options": "Options", "answer": "Answer"},
        files=("test_with_annotations.csv", "test*.csv", "test*.json*"),
        hub="fzkuji/CMExam",
        split="test",
        expected=6811,
        licence="Apache-2.0",
        tried=_DOCUMENTED,
        groups={"discipline": "Medical Discipline"},
        prompt="direct_zh",
    ),
    Benchmark(
        name="cmmlu_med",
        title="CMMLU, seven medical subjects",
        reader="choice",
        kinds=("option",),
        fields={"question": "Question|question", "options": "A,B,C,D", "answer": "Answer|answer"},
        files=("test/*.csv", "*.csv", "*test*.json*", "*.parquet"),
        hub="lmlmcat/cmmlu",
        all_files=True,
        split="train",
        expected=1333,
        licence="CC-BY-NC-4.0",
        tried=_DOCUMENTED,
        keep={
            "subject": (
                "anatomy",
                "clinical_knowledge",
                "college_medicine",
                "genetics",
                "nutrition",
                "traditional_chinese_medicine",
                "virology",
            )
        },
        groups={"subject": "subject"},
        prompt="direct_zh",
    ),
    _like(
        _MEDQA,
        name="medqa_mcmle",
        title="MedQA-MCMLE (mainland China)",
        hub="shuyuej/MedQA-MCMLE-Benchmark",
        expected=3426,
        files=("Mainland/test.jsonl", "questions/Mainland/test.jsonl", "test*.json*"),
        prompt="direct_zh",
    ),
    _HEALTHBENCH,
    _like(
        _HEALTHBENCH,
        name="healthbench_hard",
        title="HealthBench Hard",
        expected=1000,
        files=("hard_2025*.jsonl", "healthbench_hard.jsonl"),
        folder="healthbench",
    ),
    _like(
        _HEALTHBENCH,
        name="healthbench_consensus",
        title="HealthBench Consensus",
        expected=3671,
        files=("consensus_2025*.jsonl", "healthbench_consensus.jsonl"),
        folder="healthbench",
    ),
    Benchmark(
        name="medcalc",
        title="MedCalc-Bench v1.0",
        reader="medcalc",
        kinds=("numeric",),
        fields={
            "id": "Unique ID|Row Number",
            "question": "Question",
            "note": "Patient Note",
            "answer": "Ground Truth Answer",
            "lower": "Lower Limit",
            "upper": "Upper Limit",
            "calculator": "Calculator Name",
        },
        files=("*corrected*.csv", "test_data.csv", "*test*.csv"),
        hub="ncbi/MedCalc-Bench-v1.0",
        split="test",
        expected=1047,
        licence="CC-BY-SA-4.0",
        tried="437 of its own rows with physicians' corrections",
        groups={"calculator": "Calculator Name"},
        note="Questions that the corrections mark as unanswerable (N/A) are left out and counted.",
    ),
    _MIMIC,
    _like(
        _MIMIC,
        name="iu_xray",
        title="IU X-ray (Open-i) reports",
        expected=590,
        licence="CC-BY-NC-ND-4.0",
        files=("test.json", "annotation.json", "indiana_reports.csv+indiana_projections.csv"),
        fields={**_MIMIC.fields, "id": "uid|id"},
        tried="its own 3,851 reports, without their images",
        note="From indiana_reports.csv the test set is the fifth of the studies with the lowest hash of the uid.",
    ),
    _like(
        _MIMIC,
        name="chexpert_plus",
        title="CheXpert Plus reports",
        expected=0,
        licence="Stanford AIMI research licence",
        files=("test.json", "df_chexpert_plus*.csv"),
        keep={"split": ("valid", "test")},
        fields={
            "id": "path_to_image|id",
            "report": "report",
            "findings": "section_findings|findings",
            "impression": "section_impression|impression",
            "images": "path_to_image|image",
        },
    ),
)

BENCHMARKS: Mapping[str, Benchmark] = MappingProxyType({b.name: b for b in _TABLE})


def choose(names: str) -> list[Benchmark]:
    """The entries of "vqa_rad,slake". Raises EvalError with the nearest name for an unknown one."""
    chosen: list[Benchmark] = []
    for name in (part.strip() for part in names.split(",")):
        if name not in BENCHMARKS:
            near = difflib.get_close_matches(name.lower().replace("-", "_"), BENCHMARKS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise EvalError(f"unknown benchmark {name!r}{hint} (`lingshu-rl eval --list` shows all {len(BENCHMARKS)})")
        if name in {b.name for b in chosen}:
            raise EvalError(f"benchmark {name!r} is named twice")
        chosen.append(BENCHMARKS[name])
    return chosen
