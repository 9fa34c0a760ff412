"""Mass, molar, equivalent and international units of one named analyte (glucose 90 mg/dL is 5 mmol/L)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache, lru_cache
from importlib import resources

from rewards.text import table
from rewards.units import Unit

ATOMIC_WEIGHTS: dict[str, float] = table("numbers")["atomic_weights"]
_ELEMENT = re.compile(r"([A-Z][a-z]?)(\d*)")
_SETTING = re.compile(
    r"\([^()]*\)|\b(?:serum|plasma|blood|urine|urinary|csf|capillary|venous|arterial|total|free|fasting|random|ionized"
    r"|ionised|direct|indirect|conjugated|unconjugated|corrected|adjusted|levels?|concentration)\b"
)
_GREEK = str.maketrans({"α": "alpha ", "β": "beta ", "γ": "gamma ", "δ": "delta ", "-": " ", "_": " ", ",": " "})
_HBA1C = {"hba1c", "a1c", "hemoglobin a1c", "haemoglobin a1c", "glycated hemoglobin", "glycated haemoglobin"}
_MMOL_PER_MOL = 1e-3
_PERCENT = 1e-2


def convert_analyte(value: float, source: Unit, target: Unit, analyte: str) -> float | None:
    """`value` in `target` units for this analyte, or None when no rule connects the two units.

    Rules: molar mass (g, mol), equivalents (mEq/L, mmol/L), international units where one standard holds (IU, g),
    enzyme activity (U, katal), and HbA1c between NGSP per cent and IFCC mmol/mol.
    """
    per_mole = _per_mole(analyte)
    if per_mole is None:
        return _hba1c(value, source, target) if _plain_name(analyte) in _HBA1C else None
    difference = dict(source.dims)
    for name, degree in target.dims:
        difference[name] = difference.get(name, 0) - degree
    difference = {name: degree for name, degree in difference.items() if degree}
    if "enzyme" in per_mole:
        katal_per_unit = 1e-6 / 60
        if difference == {"iu": 1, "amount": -1, "time": 1}:
            return value * source.factor * katal_per_unit / target.factor
        if difference == {"iu": -1, "amount": 1, "time": -1}:
            return value * source.factor / katal_per_unit / target.factor
        return None
    gained = [name for name, degree in difference.items() if degree == 1]
    lost = [name for name, degree in difference.items() if degree == -1]
    if len(difference) != 2 or len(gained) != 1 or len(lost) != 1:
        return None
    if gained[0] not in per_mole or lost[0] not in per_mole:
        return None
    return value * source.factor * per_mole[lost[0]] / per_mole[gained[0]] / target.factor


def _hba1c(value: float, source: Unit, target: Unit) -> float | None:
    """NGSP = 0.09148 IFCC + 2.152 (master equation, Hoelzel et al., Clin Chem 2004;50:166)."""
    if source.dims or target.dims:
        return None
    if source.factor == _MMOL_PER_MOL and target.factor in (_PERCENT, 1.0):
        return (0.09148 * value + 2.152) * _PERCENT / target.factor
    if target.factor == _MMOL_PER_MOL and source.factor in (_PERCENT, 1.0):
        return (value * source.factor / _PERCENT - 2.152) / 0.09148
    return None


def bridges(source: Unit, target: Unit, analyte: str) -> bool:
    """True when the analyte's own rule must be used although the dimensions agree (HbA1c: % and mmol/mol)."""
    return source.factor != target.factor and not source.dims and not target.dims and _plain_name(analyte) in _HBA1C


@lru_cache(maxsize=512)
def _per_mole(analyte: str) -> Mapping[str, float] | None:
    table = _table()
    return table.get(_name(analyte)) or table.get(_plain_name(analyte))


def _name(analyte: str) -> str:
    return " ".join(analyte.casefold().translate(_GREEK).split())


def _plain_name(analyte: str) -> str:
    """The analyte without specimen and state: "Serum creatinine (fasting)" is "creatinine"."""
    return " ".join(_SETTING.sub(" ", _name(analyte)).split())


@cache
def _table() -> dict[str, Mapping[str, float]]:
    """name -> what one mole of it is in each dimension (grams, equivalents, international units)."""
    table: dict[str, Mapping[str, float]] = {}
    source = resources.files("rewards") / "data" / "analytes.tsv"
    for line in source.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            continue
        names, mass, equivalents, units_per_gram = line.split("\t")
        entry: dict[str, float] = {"amount": 1.0}
        if mass == "enzyme":
            entry = {"enzyme": 1.0}
        elif mass:
            entry["mass"] = molar_mass(mass)
        if equivalents:
            entry["equivalent"] = float(equivalents)
        if units_per_gram:
            entry["iu"] = float(units_per_gram) * entry["mass"]
        for name in names.split(";"):
            table[_name(name)] = entry
    return table


def molar_mass(formula: str) -> float:
    """Grams per mole of "C6H12O6"; a plain number is taken as it is."""
    if formula[0].isdigit():
        return float(formula)
    return sum(ATOMIC_WEIGHTS[element] * int(count or 1) for element, count in _ELEMENT.findall(formula))
