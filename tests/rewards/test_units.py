"""Units, their dimensions, and the analyte rules that join mass, molar, equivalent and international units."""

from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards.analytes import convert_analyte, molar_mass
from rewards.units import _tables, convert, match_unit, parse_unit

SAME = [
    ("mg/dL", "MG/DL", "mg/dl", "mg / dL", "mg dL-1", "mg·dL^-1", "mg per deciliter", "mg%", "mg/100 mL"),
    ("µg", "μg", "ug", "mcg", "UG", "microgram", "micrograms"),
    ("mmHg", "mm Hg", "mm[Hg]", "mmhg", "MMHG", "millimeters of mercury", "毫米汞柱"),
    ("mL/min/1.73 m2", "mL/min/1.73m2", "mL/min/{1.73_m2}", "mL/min per 1.73 m^2", "mL/(min·1.73 m2)"),
    ("/min", "bpm", "beats/min", "beats per minute", "per minute", "min-1", "min^-1"),
    ("10^9/L", "x10^9/L", "×10^3/µL", "10*9/L", "10E3/uL", "K/µL", "G/L", "thousand/mm3", "10^9 cells/L"),
    ("kg/m2", "kg/m^2", "kg/m**2", "kg m^-2", "kg/square meter", "kg/sq m"),
    ("mg/kg/d", "mg/kg/day", "mg/kg/24h", "mg/(kg·d)", "mg/kg·d"),
    ("IU/L", "U/L", "units/L", "mIU/mL", "mU/mL"),
    ("mEq/L", "meq/L", "MEQ/L", "mval/L"),
    ("dyn·s/cm5", "dyn-s/cm^5", "dyne·sec·cm-5"),
    ("°C", "degC", "degrees Celsius", "Cel", "C", "摄氏度"),
    ("d", "day", "days", "jours", "Tage", "días", "天"),
    ("1", "", "score", "points", "titer", "cells", "{cells}"),
]


@pytest.mark.parametrize("spellings", SAME, ids=lambda spellings: spellings[0])
def test_spellings_of_one_unit(spellings):
    units = [parse_unit(text) for text in spellings]
    assert None not in units, [text for text, unit in zip(spellings, units, strict=True) if unit is None]
    for unit in units:
        assert unit.dims == units[0].dims and unit.offset == units[0].offset
        assert unit.factor == pytest.approx(units[0].factor, rel=1e-12)


@pytest.mark.parametrize(
    "one, other",
    [("mg", "Mg"), ("mM", "mm"), ("mIU", "MIU"), ("m", "min"), ("d", "D"), ("mL/min", "mL/min/1.73 m2"),
     ("mGy", "mSv"), ("mEq/L", "mmol/L"), ("mOsm/kg", "mmol/kg"), ("IU", "mg"), ("%", "1"), ("s", "°")],
)  # fmt: skip
def test_units_that_must_stay_apart(one, other):
    assert parse_unit(one) is not None and parse_unit(other) is not None
    assert parse_unit(one) != parse_unit(other)


@pytest.mark.parametrize(
    "text", ["foo", "mg/foo", "5", "mgg", "PM", "a", "of", "is", "M", "MIu/", "/", "10^9", "mg/", "(mg"]
)
def test_what_is_no_unit(text):
    assert parse_unit(text) is None


@pytest.mark.parametrize("text", ["mg" * 500, "mg/" * 500, "(" * 500 + "mg", "m·" * 500, "x10^9" * 200, "mg^99999999"])
def test_long_units_are_refused_not_computed(text):
    assert parse_unit(text) is None


@pytest.mark.parametrize(
    "value, source, target, expected",
    [(98.6, "°F", "°C", 37.0), (310.15, "K", "°C", 37.0), (120, "mmHg", "kPa", 15.99864), (1, "in", "cm", 2.54),
     (1, "lb", "kg", 0.45359237), (2, "Wood units", "dyn·s/cm5", 159.987), (5, "mcg/kg/min", "mg/kg/h", 0.3),
     (1.5, "h", "min", 90), (2.5, "‰", "1", 0.0025), (10, "cmH2O", "mmHg", 7.35559), (1, "year", "month", 12),
     (1, "kcal", "kJ", 4.184), (1, "mCi", "MBq", 37), (1, "M/µL", "/L", 1e12), (3, "mg/kg", "g/kg", 0.003)],
)  # fmt: skip
def test_known_conversions(value, source, target, expected):
    found = convert(value, parse_unit(source), parse_unit(target))
    assert found == pytest.approx(expected, rel=2e-5)


def test_a_temperature_difference_has_no_offset():
    assert convert(1.8, parse_unit("°F"), parse_unit("°C"), difference=True) == pytest.approx(1.0)


def test_other_dimensions_do_not_convert():
    assert convert(5, parse_unit("mg"), parse_unit("mmol")) is None


def _spellings():
    exact, folded, _ = _tables()
    return sorted({*exact, *folded})


@settings(deadline=None)
@given(st.sampled_from(_spellings()), st.sampled_from(_spellings()), st.floats(-1e6, 1e6))
def test_conversion_round_trip(one, other, value):
    source, target = parse_unit(one), parse_unit(other)
    there = convert(value, source, target)
    if there is None:
        assert source.dims != target.dims
    else:
        back = convert(there, target, source)
        assert back == pytest.approx(value, rel=1e-9, abs=1e-9 * max(1.0, abs(source.offset / source.factor)))


def test_every_spelling_of_the_table_can_be_read():
    assert [text for text in _spellings() if parse_unit(text) is None] == []


@settings(deadline=None)
@given(st.text(max_size=60))
def test_no_text_raises(text):
    parse_unit(text)
    for start in range(0, len(text), 7):
        match_unit(text, start)


@pytest.mark.parametrize(
    "formula, mass",
    [("C6H12O6", 180.16), ("C4H7N3O", 113.12), ("C27H46O", 386.65), ("C33H36N4O6", 584.7), ("C5H4N4O3", 168.11),
     ("Na", 22.99), ("C63H88CoN14O14P", 1355.4), ("16114", 16114)],
)  # fmt: skip
def test_molar_masses(formula, mass):
    assert molar_mass(formula) == pytest.approx(mass, rel=1e-4)


@pytest.mark.parametrize(
    "value, source, target, analyte, expected",
    [(90, "mg/dL", "mmol/L", "glucose", 5.0), (5, "mEq/L", "mmol/L", "Calcium", 2.5), (28, "mg/dL", "mmol/L", "BUN", 10.0),
     (53, "mmol/mol", "%", "HbA1c", 7.0), (7.0, "%", "mmol/mol", "HbA1c", 53.0), (40, "IU", "µg", "vitamin D", 1.0),
     (60, "U/L", "µkat/L", "ALT", 1.0), (14, "g/dL", "mmol/L", "Hb", 8.69), (140, "mmol/L", "mEq/L", "serum sodium", 140),
     (1, "mg/dL", "µmol/L", "Serum Creatinine (enzymatic)", 88.4), (0.07, "1", "mmol/mol", "A1c", 53.0)],
)  # fmt: skip
def test_analytes(value, source, target, analyte, expected):
    found = convert_analyte(value, parse_unit(source), parse_unit(target), analyte)
    assert found == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize(
    "source, target, analyte",
    [("mg/dL", "mmol/L", "unobtainium"), ("mg/dL", "mL", "glucose"), ("mEq/L", "mmol/L", "glucose"),
     ("µIU/mL", "pmol/L", "insulin"), ("mg", "mmol/L", "glucose"), ("%", "mg/dL", "HbA1c")],
)  # fmt: skip
def test_what_no_analyte_rule_joins(source, target, analyte):
    assert convert_analyte(1, parse_unit(source), parse_unit(target), analyte) is None


def test_analytes_agree_with_labunits():
    """An independent table. Left out are its rows that are wrong by its own molar masses, or name a fraction."""
    labunits = pytest.importorskip("labunits")
    import json
    from pathlib import Path

    wrong = {"Acetylcholinesterase", "Cystine", "Norepinephrine"}
    rows = json.loads((Path(labunits.__file__).parent / "data" / "analytes.json").read_text(encoding="utf-8"))
    compared = 0
    for row in rows.values():
        source, target = parse_unit(row["traditional_units"]), parse_unit(row["si_units"])
        if source is None or target is None or row["name"] in wrong:
            continue
        found = convert(1.0, source, target)
        if found is None:
            found = convert_analyte(1.0, source, target, row["name"])
        if found is not None:
            compared += 1
            # Its factors are rounded to two or three digits (U/L to µkat/L is 0.017).
            assert found == pytest.approx(row["conversion_factor"], rel=0.021), row["name"]
    assert compared > 95


def test_no_symbol_has_two_meanings():
    """A prefixed symbol may not silently hide another row of the table (m + in is not min)."""
    from importlib import resources

    from rewards.units import _PREFIXES

    seen = {}
    text = (resources.files("rewards") / "data" / "units.tsv").read_text(encoding="utf-8")
    for line in text.splitlines():
        if line.startswith("#"):
            continue
        symbols, _, factor, dims, rest = line.split("\t")
        for prefix in ("", *([] if rest.startswith("+") else rest.split())):
            scale, marks, _ = _PREFIXES[prefix] if prefix else (1.0, ("",), "")
            for symbol in symbols.split():
                for mark in marks:
                    seen.setdefault(mark + symbol, set()).add((float(factor) * scale, dims, rest[:1] == "+"))
    doubled = {symbol: meanings for symbol, meanings in seen.items() if len(meanings) > 1}
    assert not [symbol for symbol, meanings in doubled.items() for a, b in permutations(meanings, 2)
                if a[1:] != b[1:] or abs(a[0] / b[0] - 1) > 1e-9]  # fmt: skip
