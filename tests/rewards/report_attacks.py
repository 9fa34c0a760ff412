"""Reports that are written without looking at the image, in 35 kinds: none of them may pay like an honest one."""

NORMAL = (
    "The heart is normal in size. The lungs are clear. No pleural effusion or pneumothorax. No acute bony abnormality."
)
COMMON = (
    *("cardiomegaly", "left pleural effusion", "right pleural effusion", "atelectasis", "pulmonary edema", "opacity"),
    *("consolidation", "pneumonia", "nodule", "granuloma", "emphysema", "hyperinflation", "scarring"),
    *("degenerative changes of the spine", "tortuous aorta", "atherosclerosis", "rib fracture", "pneumothorax"),
)
RARE = (
    *("pneumomediastinum", "hemothorax", "sarcoidosis", "dextrocardia", "aortic dissection", "cavity", "abscess"),
    *("pneumoperitoneum", "empyema", "tension pneumothorax", "pulmonary embolism", "lymphoma"),
)
OFTEN_SEEN = "Mild degenerative changes of the thoracic spine. Calcified granuloma. Low lung volumes."


def _all(template: str, names: tuple[str, ...] = COMMON, join: str = " ") -> str:
    return join.join(template.format(name) for name in names)


# name -> a text that is the same for every patient
CONSTANTS: dict[str, str] = {
    "normal report": NORMAL,
    "short normal": "Normal chest.",
    "no acute abnormality": "No acute cardiopulmonary abnormality.",
    "everything denied": _all("No {}."),
    "everything denied in one list": "No " + ", ".join(COMMON) + ".",
    "everything present": _all("There is {}."),
    "everything in one list": ", ".join(COMMON) + ".",
    "everything possible": _all("Possible {}."),
    "everything cannot be excluded": _all("{} cannot be excluded."),
    "either or": " or ".join(COMMON) + ".",
    "present and denied": _all("There is {0}. No {0}."),
    "denied and present": _all("No {0}. There is {0}."),
    "yes and no": _all("{0}: yes. {0}: no."),
    "rare list": _all("There is {}.", RARE),
    "the most frequent finding": "Degenerative changes of the thoracic spine.",
    "the most frequent findings": OFTEN_SEEN,
    "normal with the most frequent findings": f"{NORMAL} {OFTEN_SEEN}",
    "normal but everything possible": NORMAL + " " + _all("Possible {}."),
    "cardiomegaly for everybody": f"Mild cardiomegaly. {NORMAL.split('. ', 1)[1]}",
    "opacity for everybody": "There is an opacity. No pleural effusion or pneumothorax.",
    "bilateral everything": _all("Bilateral {}."),
    "all grades": _all("Mild to severe {}."),
    "all sides": _all("Left {0}. Right {0}."),
    "json of all": "{" + _all('"{}": true', join=", ") + "}",
    "json of none": "{" + _all('"{}": false', join=", ") + "}",
    "table of all": "\n".join(f"| {name} | yes |" for name in COMMON),
    "boxes ticked": "\n".join(f"- [x] {name}" for name in COMMON),
    "hedged normal": "The chest may be normal, but disease cannot be excluded.",
    "borderline everything": _all("Borderline {}."),
    "old everything": _all("Old {}."),
    "tiny everything": _all("Tiny {}."),
    "organs only": "Heart. Lungs. Pleura. Mediastinum. Bones. Diaphragm.",
    "questions": _all("Is there {}?"),
    "sections only": "FINDINGS:\nIMPRESSION:\nFINDINGS: See impression. IMPRESSION: See findings.",
    "normal forty times": " ".join([NORMAL] * 12),
}
