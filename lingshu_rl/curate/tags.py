"""Modality and organ by rule. A text that names two is left alone: a wrong tag is worse than none."""

from __future__ import annotations

import re
from collections.abc import Mapping

MODALITIES: Mapping[str, str] = {
    "MRI": (
        r"m\.?r\.?i\.?s?|mr\s+imag\w*|magnetic\s+resonance(?!\s+angio)|mr|flair|t[12][- ]?weighted"
        r"|diffusion[- ]weighted|dwi"
    ),
    "CT": r"c\.?t\.?s?|cat\s+scan|computed\s+tomograph\w*|hounsfield",
    "X-ray": r"x[- ]?rays?|radiograph\w*|cxr|plain\s+films?|chest\s+films?",
    "mammography": r"mammogra\w*",
    "ultrasound": r"ultraso(?:und|nograph)\w*|sonogra\w*|echocardiogra\w*|doppler",
    "histopathology": (
        r"histopatholog\w*|histolog\w*|h\s*&\s*e|hematoxylin|haematoxylin|immunohistochem\w*"
        r"|photomicrograph\w*|micrograph"
    ),
    "dermoscopy": r"dermosco\w*|dermatosco\w*",
    "fundus": r"fundus\s+(?:photo\w*|image\w*|camera)|fundoscop\w*|ophthalmoscop\w*|colou?r\s+fundus|fundus",
    "OCT": r"optical\s+coherence\s+tomograph\w*|oct",
    "endoscopy": r"endoscop\w*|colonoscop\w*|gastroscop\w*|bronchoscop\w*|laparoscop\w*",
    "PET": r"pet|positron\s+emission\w*",
    "angiography": r"angiogra(?:m|ms|phy|phic)",
    "fluoroscopy": r"fluorosc\w*|barium\s+(?:swallow|enema|meal)",
}
ORGANS: Mapping[str, str] = {
    "brain": (
        r"brain|cerebr\w*|cerebell\w*|intracranial|ventricles?\s+of\s+the\s+brain|frontal\s+lobe"
        r"|temporal\s+lobe|parietal|occipital|head|neuro"
    ),
    "chest": (
        r"chest|thora(?:x|cic)|lungs?|pulmonary|pleura\w*|pneumothora\w*|cardiomediastin\w*"
        r"|mediastin\w*|heart|cardiac|cardiomegaly|hemidiaphragm"
    ),
    "abdomen": (
        r"abdom\w*|abd|liver|hepatic|spleen|splenic|kidneys?|renal|pancrea\w*|bowel|colon|stomach"
        r"|gallbladder|gastrointestinal"
    ),
    "pelvis": r"pelvi[sc]|bladder|uter(?:us|ine)|ovar\w*|prostat\w*",
    "breast": r"breasts?|mamm\w*",
    "eye": r"eyes?|retina\w*|fundus|optic\s+(?:disc|disk|nerve)|macula\w*",
    "skin": r"skin|derm\w*|nevus|naevus|melanoma",
    "spine": r"spin(?:e|al)|vertebra\w*|lumbar|cervical\s+spine",
    "limbs": r"knees?|hips?|femur|tibia|fibula|ankles?|foot|feet|wrists?|hands?|elbows?|humerus|shoulders?|extremit\w*",
    "neck": r"neck|thyroid|larynx|carotid",
}
_RULES = {
    table: {name: re.compile(rf"(?<![\w]){'(?:' + rule + ')'}(?![\w])", re.IGNORECASE) for name, rule in rules.items()}
    for table, rules in (("modality", MODALITIES), ("organ", ORGANS))
}


def modality_of(text: str) -> str:
    """The one modality that a text names, or ""."""
    return _only("modality", text)


def organ_of(text: str) -> str:
    """The one body region that a text names, or ""."""
    return _only("organ", text)


def _only(table: str, text: str) -> str:
    found = [name for name, rule in _RULES[table].items() if rule.search(text)]
    return found[0] if len(found) == 1 else ""
