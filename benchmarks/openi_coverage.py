"""How much of real chest reports does the finding extractor read, and does it agree with the human MeSH codes?

Input: the Open-i reports as CSV (columns `Problems`, `findings`, `impression`), which are not part of this repository.
Output: Markdown tables on standard output, as they stand in docs/report_packs.md.

    python benchmarks/openi_coverage.py PATH/indiana_reports.csv
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections import Counter
from pathlib import Path

# A script's folder comes first on the path, where benchmarks/rewards.py would hide the package of that name.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

from rewards.base import RewardInput  # noqa: E402
from rewards.report import ReportEntities, extract  # noqa: E402

# MeSH problem -> findings of the packs that mean it. Codes of one organ without a state ("Lung", "Spine") stay out:
# their meaning is in qualifiers of the code.
CODES: dict[str, tuple[str, ...]] = {
    "Opacity": ("opacity", "consolidation", "interstitial_opacity", "atelectasis", "pneumonia", "scar", "nodule"),
    "Cardiomegaly": ("cardiomegaly", "cardiomediastinal_enlargement", "chamber_enlargement"),
    "Pulmonary Atelectasis": ("atelectasis", "volume_loss"),
    "Calcinosis": ("calcification", "granuloma", "calcified_node", "atherosclerosis", "pleural_plaque", "nodule"),
    "Calcified Granuloma": ("granuloma", "calcification", "calcified_node"),
    "Granuloma": ("granuloma", "calcification", "calcified_node"),
    "Granulomatous Disease": ("granuloma", "calcified_node"),
    "Cicatrix": ("scar", "pleural_thickening", "pulmonary_fibrosis"),
    "Pleural Effusion": ("pleural_effusion", "costophrenic_blunting"),
    "Atherosclerosis": ("atherosclerosis",),
    "Airspace Disease": ("opacity", "consolidation", "pneumonia"),
    "Infiltrate": ("opacity", "consolidation", "interstitial_opacity", "pneumonia"),
    "Catheters, Indwelling": ("central_line", "swan_ganz", "support_device"),
    "Tube, Inserted": (
        "endotracheal_tube",
        "tracheostomy",
        "enteric_tube",
        "chest_tube",
        "support_device",
        "central_line",
    ),
    "Deformity": ("deformity", "fracture", "fracture_rib", "fracture_compression"),
    "Nodule": ("nodule", "mass", "granuloma"),
    "Mass": ("mass", "mediastinal_mass", "hilar_enlargement", "nodule"),
    "Surgical Instruments": ("surgical_clips", "sternotomy", "surgical_change"),
    "Scoliosis": ("scoliosis",),
    "Kyphosis": ("kyphosis",),
    "Fractures, Bone": ("fracture", "fracture_rib", "fracture_compression", "deformity"),
    "Costophrenic Angle": ("costophrenic_blunting", "pleural_effusion", "pleural_thickening"),
    "Osteophyte": ("degenerative_change",),
    "Spondylosis": ("degenerative_change",),
    "Pulmonary Congestion": ("vascular_congestion", "edema_pulmonary", "heart_failure", "fluid_overload"),
    "Emphysema": ("emphysema", "copd", "bulla"),
    "Pulmonary Emphysema": ("emphysema", "copd", "hyperinflation"),
    "Pulmonary Disease, Chronic Obstructive": ("copd", "emphysema", "hyperinflation"),
    "Hernia, Hiatal": ("hiatal_hernia",),
    "Pulmonary Edema": ("edema_pulmonary", "edema", "vascular_congestion"),
    "Pneumonia": ("pneumonia", "infection"),
    "Diaphragmatic Eventration": ("diaphragm_eventration", "diaphragm_elevation"),
    "Arthritis": ("degenerative_change", "osteoarthritis"),
    "Bone Diseases, Metabolic": ("osteopenia",),
    "Consolidation": ("consolidation", "pneumonia", "opacity"),
    "Pneumothorax": ("pneumothorax",),
    "Pulmonary Fibrosis": ("pulmonary_fibrosis", "scar", "interstitial_opacity"),
    "Stents": ("stent",),
    "Lung Diseases, Interstitial": ("interstitial_opacity", "pulmonary_fibrosis"),
    "Heart Failure": ("heart_failure", "edema_pulmonary", "vascular_congestion"),
    "Hypertension, Pulmonary": ("pulmonary_hypertension", "heart_failure", "vascular_congestion"),
    "Bronchiectasis": ("bronchiectasis",),
    "Pericardial Effusion": ("pericardial_effusion",),
    "Pneumoperitoneum": ("pneumoperitoneum",),
    "Sarcoidosis": ("sarcoidosis",),
}


# Finding of the packs -> MeSH problems of which any one bears it out; an organ code stands for "something is wrong there".
BORNE_OUT_BY: dict[str, tuple[str, ...]] = {
    "cardiomegaly": ("Cardiomegaly", "Cardiac Shadow", "Heart"),
    "pleural_effusion": ("Pleural Effusion", "Hydropneumothorax", "Costophrenic Angle", "Sulcus", "Hemothorax"),
    "pneumothorax": ("Pneumothorax", "Hydropneumothorax", "Hemopneumothorax"),
    "atelectasis": ("Pulmonary Atelectasis", "Volume Loss"),
    "pneumonia": ("Pneumonia", "Infiltrate", "Consolidation", "Airspace Disease", "Opacity"),
    "edema_pulmonary": ("Pulmonary Edema", "Pulmonary Congestion", "Heart Failure"),
    "degenerative_change": (
        *("Thoracic Vertebrae", "Spine", "Lumbar Vertebrae", "Cervical Vertebrae", "Osteophyte", "Spondylosis"),
        *("Arthritis", "Shoulder", "Hyperostosis, Diffuse Idiopathic Skeletal"),
    ),
    "granuloma": ("Calcified Granuloma", "Granuloma", "Granulomatous Disease", "Calcinosis", "Nodule"),
    "scoliosis": ("Scoliosis",),
    "hiatal_hernia": ("Hernia, Hiatal", "Hernia, Diaphragmatic"),
    "osteopenia": ("Bone Diseases, Metabolic", "Osteoporosis"),
    "fracture_rib": ("Fractures, Bone", "Deformity", "Ribs"),
    "low_lung_volume": ("Lung",),
    "aortic_tortuosity": ("Aorta", "Aorta, Thoracic"),
}


def read_reports(path: Path) -> list[tuple[set[str], str]]:
    """(MeSH problems, findings and impression) of each report that has text."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    reports = []
    for row in rows:
        text = f"FINDINGS: {row['findings']}\nIMPRESSION: {row['impression']}"
        if row["findings"].strip() or row["impression"].strip():
            reports.append(({p.strip() for p in row["Problems"].split(";") if p.strip()}, text))
    return reports


def share(flags: list[bool]) -> str:
    return f"{100 * sum(flags) / max(1, len(flags)):.1f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path, help="indiana_reports.csv")
    parser.add_argument(
        "--misses", choices=sorted(CODES), help="print the reports with this code that were not so read"
    )
    args = parser.parse_args()
    reward = ReportEntities()
    reports = read_reports(args.csv)
    all_codes = [codes for codes, _ in reports]
    begin = time.process_time()
    readings = [extract(text, reward.lexicon) for _, text in reports]
    seconds = time.process_time() - begin
    stated = [{e.finding for e in r.entities if e.assertion != "absent" and not e.group} for r in readings]
    if args.misses:
        for (codes, text), found in zip(reports, stated, strict=True):
            if args.misses in codes and not found & set(CODES[args.misses]):
                print(sorted(found), text, "\n")
        return

    total = len(reports)
    normal = [found for codes, found in zip(all_codes, stated, strict=True) if codes == {"normal"}]
    major = [{f for f in found if reward.lexicon.finding(f).weight >= 0.5} for found in normal]
    coded = [found for codes, found in zip(all_codes, stated, strict=True) if codes & CODES.keys()]
    selves = [reward.score(RewardInput(text, text)).value for _, text in reports]
    judged = [value for value in selves if value is not None]
    print("| reports | |\n|---|---|")
    for label, figure in (
        ("with text", f"{total}"),
        ("with a statement read (finding, denial or normal organ)", share([bool(r.entities) for r in readings])),
        ("statements a report, mean", f"{sum(len(r.entities) for r in readings) / total:.1f}"),
        ("findings present or suspected a report, mean", f"{sum(map(len, stated)) / total:.2f}"),
        ("coded with a mapped problem, and a finding read", f"{share([bool(f) for f in coded])} of {len(coded)}"),
        ("coded normal, and no finding read", f"{share([not f for f in normal])} of {len(normal)}"),
        ("coded normal, and no finding of weight 0.5 or more", f"{share([not f for f in major])} of {len(normal)}"),
        ("scored against itself: exactly 1", f"{share([v > 0.9999 for v in judged])} of {len(judged)} judged"),
        ("scored against itself: lowest", f"{min(judged):.3f}"),
        ("reports read a processor second", f"{total / seconds:.0f}"),
    ):
        print(f"| {label} | {figure} |")

    print("\n| MeSH problem | reports | read as a finding that means it |\n|---|---|---|")
    counts = Counter(problem for codes in all_codes for problem in sorted(codes))
    for problem, count in counts.most_common():
        if problem in CODES and count >= 5:
            names = set(CODES[problem])
            hits = sum(problem in codes and bool(found & names) for codes, found in zip(all_codes, stated, strict=True))
            print(f"| {problem} | {count} | {100 * hits / count:.0f} % |")

    print("\n| finding stated as present | reports | borne out by a code |\n|---|---|---|")
    for finding, problems in BORNE_OUT_BY.items():
        with_it = [
            codes
            for codes, reading in zip(all_codes, readings, strict=True)
            if any(e.finding == finding and e.assertion == "present" for e in reading.entities)
        ]
        print(f"| {finding} | {len(with_it)} | {share([bool(codes & set(problems)) for codes in with_it])} |")

    top = Counter(f for found in stated for f in sorted(found)).most_common(25)
    print("\nMost frequent findings: " + ", ".join(f"{name} {count}" for name, count in top) + ".")
    rest = [f"{code} {count}" for code, count in counts.most_common() if code not in CODES and code != "normal"]
    print("\nCodes without a mapping: " + ", ".join(rest) + ".")


if __name__ == "__main__":
    main()
