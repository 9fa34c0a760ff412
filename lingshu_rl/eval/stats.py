"""Accuracy with honest intervals: percentile bootstrap over images, paired when two answers share a question.

Questions about one image stand or fall together, so what is resampled is the image (the cluster), not the question.
Source: Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13; Field and Welsh 2007 for whole clusters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# Which evaluation stands behind which key of the summary, and behind the `before` of a control.
CONDITIONS = {
    "before": "before",
    "after": "after",
    "blank_image": "after_blank",
    "shuffled_image": "after_shuffled",
    "text_only": "after_text_only",
    "majority_answer": "after_majority",
}
CONTROLS_BEFORE = {
    "blank_image": "before_blank",
    "shuffled_image": "before_shuffled",
    "text_only": "before_text_only",
}  # the most frequent label does not depend on the policy


def mean_ci(
    values: Sequence[float | None], clusters: Sequence[Any] | None = None, *, seed: int = 0, resamples: int = 2000
) -> dict[str, Any]:
    """Mean of values in [0, 1] with its 95 % interval: `{"accuracy", "ci95": [lo, hi], "n", "not_judged"}`.

    values: None means "could not be judged"; such values are left out and counted in `not_judged`.
    clusters: one name a value; values of one name are resampled together. An empty name (None, "") is a cluster of its
    own. Without clusters every value is its own.
    With nothing judged, `accuracy` is None and the interval is [0, 1]. Raises ValueError for a value outside [0, 1].
    """
    _check("values", values)
    kept = [i for i, value in enumerate(values) if value is not None]
    names = cluster_index(clusters, len(values))[kept]
    mean, low, high = _bootstrap(np.array([values[i] for i in kept], float), names, (0.0, 1.0), seed, resamples)
    return {"accuracy": mean, "ci95": [low, high], "n": len(kept), "not_judged": len(values) - len(kept)}


def paired_gain(
    before: Sequence[float | None],
    after: Sequence[float | None],
    clusters: Sequence[Any] | None = None,
    *,
    seed: int = 0,
    resamples: int = 2000,
) -> dict[str, Any]:
    """Mean of `after - before` in points (hundredths): `{"points", "ci95": [lo, hi], "n", "not_judged"}`.

    Item i of both lists is the same question; a pair with a None is left out and counted. Clusters as in `mean_ci`.
    """
    if len(before) != len(after):
        raise ValueError(
            f"before has {len(before)} values and after {len(after)}; give the same questions in the same order"
        )
    _check("before", before)
    _check("after", after)
    pairs = [(i, b, a) for i, (b, a) in enumerate(zip(before, after, strict=True)) if b is not None and a is not None]
    names = cluster_index(clusters, len(before))[[i for i, _, _ in pairs]]
    differences = np.array([100 * (a - b) for _, b, a in pairs], float)
    mean, low, high = _bootstrap(differences, names, (-100.0, 100.0), seed, resamples)
    return {"points": mean, "ci95": [low, high], "n": len(pairs), "not_judged": len(before) - len(pairs)}


def summarise(evals: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """The accuracy part of summary.json from graded rows.

    evals: `before`, `after`, and `before_` and `after_` with blank, shuffled, text_only or majority, any of them
    absent; rows need id and value, and may have image, kind, task and modality. Answers are paired by id, intervals are
    clustered by image. Returns `{"before", "after", "gain", "blank_image", "shuffled_image", "text_only",
    "majority_answer", "by_kind", "by_task", "by_modality"}` without what is absent; a control holds the trained
    policy's accuracy and, under "before", that of the policy the run started from.
    """
    out = _compare(evals)
    for key in ("kind", "task", "modality"):
        out[f"by_{key}"] = split_by(evals, key)
    return out


def split_by(evals: Mapping[str, Sequence[Mapping[str, Any]]], key: str) -> dict[str, Any]:
    """The same comparison for every value that the rows have under `key`."""
    names = sorted({str(row.get(key) or "") for rows in evals.values() for row in rows} - {""})
    return {
        name: _compare({e: [r for r in rows if str(r.get(key) or "") == name] for e, rows in evals.items()})
        for name in names
    }


def gain_between(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`paired_gain` of two lists of graded rows, paired by id (only questions in both count), clustered by image."""
    old = {row["id"]: row for row in before}
    pairs = [(old[row["id"]]["value"], row["value"], row.get("image")) for row in after if row["id"] in old]
    return paired_gain([p[0] for p in pairs], [p[1] for p in pairs], [p[2] for p in pairs])


def _compare(evals: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    def score(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return mean_ci([row["value"] for row in rows], [row.get("image") for row in rows])

    out = {key: score(evals[name]) for key, name in CONDITIONS.items() if evals.get(name)}
    for key, name in CONTROLS_BEFORE.items():
        if evals.get(name):
            out.setdefault(key, {})["before"] = score(evals[name])
    if evals.get("before") and evals.get("after"):
        out["gain"] = gain_between(evals["before"], evals["after"])
    return out


def _check(name: str, values: Sequence[float | None]) -> None:
    for i, value in enumerate(values):
        if value is not None and not 0.0 <= value <= 1.0:
            raise ValueError(f"{name}[{i}] is {value!r}; a value must be in [0, 1], or None when it was not judged")


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979): all that are at most alpha may be called different at once.

    A value that is no number (nothing could be compared) stays so and does not count.
    """
    order = sorted((p, i) for i, p in enumerate(p_values) if p == p)
    out, least = list(p_values), 0.0
    for rank, (p, i) in enumerate(order):
        least = max(least, min(1.0, p * (len(order) - rank)))
        out[i] = least
    return out


def cluster_index(clusters: Sequence[Any] | None, count: int) -> np.ndarray:
    """A number a value: equal for values of one cluster, negative and its own for a value without a name."""
    if clusters is None:
        return np.arange(count)
    if len(clusters) != count:
        raise ValueError(f"{count} values but {len(clusters)} clusters; give one cluster name a value")
    known: dict[str, int] = {}
    own = -1  # negative numbers: a question without an image shares its luck with no other
    index = np.empty(count, int)
    for i, name in enumerate(clusters):
        if name is None or name == "":
            index[i], own = own, own - 1
        else:
            index[i] = known.setdefault(str(name), len(known))
    return index


def _bootstrap(
    values: np.ndarray, clusters: np.ndarray, bounds: tuple[float, float], seed: int, resamples: int
) -> tuple[float | None, float, float]:
    """Mean and percentile interval; `bounds` are the least and greatest possible value."""
    if not len(values):
        return None, *bounds
    mean = float(values.mean())
    _, index = np.unique(clusters, return_inverse=True)
    sums, sizes = np.bincount(index, weights=values), np.bincount(index).astype(float)
    m = len(sums)
    if np.ptp(sums / sizes) < 1e-12:
        # All clusters agree, and resampling them would claim certainty. A share of up to `unseen` of all clusters could
        # still differ without having shown up (the exact binomial bound for none among m).
        unseen = 1 - 0.025 ** (1 / m)
        return mean, mean - unseen * (mean - bounds[0]), mean + unseen * (bounds[1] - mean)
    rng = np.random.default_rng(seed)
    means = []
    chunk = max(1, 2_000_000 // m)  # resamples drawn at once, so that memory stays under about 50 MB
    for start in range(0, resamples, chunk):
        drawn = rng.integers(0, m, (min(chunk, resamples - start), m))
        means.append(sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1))
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return mean, float(low), float(high)
