"""Did a change of settings matter? Differences between training runs, with the luck of seeds and of test questions.

Both settings are trained with the same S seeds and answer the same test questions. The difference of one seed and one
question is  d = mu + seed + question + (both together);  seeds and questions are samples (Clark 1973; Judd, Westfall
and Kenny 2012), so an interval for mu has to know the spread of both. Questions about one image are one cluster.

Half the interval is  sqrt(t(S-1)^2 a + t(C-1)^2 b),  with a the variance of the mean through seeds (S - 1 degrees of
freedom), b the one through the C clusters. Banerjee (Sankhya 1961) showed that such a sum keeps at least the nominal
coverage however few the degrees of freedom; Satterthwaite's, and a bootstrap over two seeds, do not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lingshu_rl.eval.stats import cluster_index

POWER = 0.8  # chance of seeing a true difference that "needed" and "smallest" are stated for
MOST_SEEDS = 100


@dataclass(frozen=True)
class Difference:
    """A mean difference, in the unit of the values.

    A variance is None where nobody knows it: of the seeds with one seed, of the items where all are of one cluster.
    """

    mean: float
    low: float
    high: float
    p: float  # two-sided, not corrected for other comparisons
    seeds: int
    items: int
    clusters: int
    seed_variance: float | None  # of one seed's mean
    item_variance: float | None  # of the mean over these questions, whatever the number of seeds


def difference(
    d: np.ndarray, clusters: Sequence[Any] | None = None, *, alpha: float = 0.05, bound: float | None = None
) -> Difference:
    """Mean of `d` with its 1 - alpha interval.

    d: (seeds, items), variant minus baseline; every number finite. clusters: one name an item, as in `mean_ci`.
    bound: the largest possible |d|, used where all differences are equal, so that agreement claims no certainty.
    Raises ValueError when `d` is empty or holds a value that is no number.
    """
    d = np.asarray(d, float)
    if d.ndim != 2 or not d.size or not np.isfinite(d).all():
        raise ValueError(f"d must be a filled (seeds, items) array of finite numbers, got shape {d.shape}")
    seeds, items = d.shape
    _, index = np.unique(cluster_index(clusters, items), return_inverse=True)
    count = int(index.max()) + 1
    mean = float(d.mean())
    # One column a cluster: its summed deviation, scaled so that the columns' mean is the mean over items.
    x = np.stack([np.bincount(index, weights=row, minlength=count) for row in (d - mean) * count / items])
    by_seed, by_cluster = x.mean(axis=1), x.mean(axis=0)
    residual = x - by_seed[:, None] - by_cluster[None, :] + x.mean()
    both = float((residual**2).sum()) / max(1, (seeds - 1) * (count - 1))
    seed_square = count * float(by_seed.var(ddof=1)) if seeds > 1 else 0.0
    item_square = seeds * float(by_cluster.var(ddof=1)) if count > 1 else 0.0
    if np.ptp(x) < 1e-12:
        low, high, p = _agreement(mean, count, alpha, bound)
        doubt = max(mean - low, high - mean) / _t(1 - alpha / 2, 10**6)  # about other clusters, which more seeds leave
        return Difference(mean, low, high, p, seeds, items, count, 0.0 if seeds > 1 else None, _known(doubt**2, count))
    # Few answers that differ look too certain; half a count to each cell mends it (Agresti and Min 2005).
    doubt = (bound or 0.0) ** 2 / (seeds * count)
    both = both + doubt if seeds > 1 and count > 1 else 0.0
    item_square = max(item_square - both, 0.0) if seeds > 1 else item_square + doubt
    cells = seeds * count
    spread = _Spread(seed_square / cells, both / cells, item_square / cells, seeds, count)
    half = spread.half(alpha)
    low, high = mean - half, mean + half
    p = spread.p(abs(mean))
    if bound is not None:
        low, high = max(low, -bound), min(high, bound)
    luck = max(spread.seed, spread.least) * seeds  # seeds cannot vary less than their questions' luck makes them vary
    return Difference(mean, low, high, p, seeds, items, count, luck if seeds > 1 else None, _known(spread.item, count))


def seeds_needed(found: Difference, *, alpha: float = 0.05, effect: float | None = None) -> int | None:
    """Seeds with which a true difference of `effect` (the measured one) would be seen with 80 % chance at level alpha.

    None: not with MOST_SEEDS seeds (see `items_needed`), or unknown as a variance is.
    """
    effect = abs(found.mean if effect is None else effect)
    if None in (found.seed_variance, found.item_variance) or effect == 0:
        return None
    for seeds in range(2, MOST_SEEDS + 1):
        if _visible(found, seeds, alpha) <= effect:
            return seeds
    return None


def items_needed(found: Difference, *, alpha: float = 0.05) -> int | None:
    """Test questions without which no number of seeds shows the measured difference; None where these are enough, or
    nobody knows."""
    z = _t(1 - alpha / 2, 10**6) + _t(POWER, 10**6)
    if found.mean == 0 or found.item_variance is None or z * math.sqrt(found.item_variance) <= abs(found.mean):
        return None
    return math.ceil(found.items * z**2 * found.item_variance / found.mean**2)


def smallest_visible(found: Difference, *, alpha: float = 0.05) -> float | None:
    """The true difference that these seeds and questions would show with 80 % chance; None where a variance is
    unknown."""
    unknown = None in (found.seed_variance, found.item_variance)
    return None if unknown else _visible(found, found.seeds, alpha)


def aligned(
    baseline: Mapping[int, Mapping[str, float | None]], variant: Mapping[int, Mapping[str, float | None]]
) -> tuple[list[int], list[str], np.ndarray, int]:
    """The seeds and items that both have judged throughout: (seeds, item ids, d, items left out).

    Values by seed and item id. A question that any of these runs could not judge is left out for all, so that every
    seed's mean is over the same questions.
    """
    seeds = sorted(baseline.keys() & variant.keys())
    runs = [side[seed] for seed in seeds for side in (baseline, variant)]
    asked = list(dict.fromkeys(item for run in runs for item in run))
    judged = [item for item in asked if all(run.get(item) is not None for run in runs)]
    one, other = ([[side[s][i] or 0.0 for i in judged] for s in seeds] for side in (baseline, variant))
    d = np.array(other, float) - np.array(one, float)
    return seeds, judged, d.reshape(len(seeds), len(judged)), len(asked) - len(judged)


@dataclass(frozen=True)
class _Spread:
    """Variances of a mean difference: through seeds, the least that seeds can have, and through clusters of items."""

    seed: float
    least: float
    item: float
    seeds: int
    clusters: int

    def half(self, alpha: float) -> float:
        """Half the width of the interval; never narrower than one that knows seeds not to matter."""
        many = (self.seeds - 1) * (self.clusters - 1)
        seed = _t(1 - alpha / 2, self.seeds - 1) ** 2 * self.seed if self.seed else 0.0
        least = _t(1 - alpha / 2, many) ** 2 * self.least if self.least else 0.0
        item = _t(1 - alpha / 2, self.clusters - 1) ** 2 * self.item if self.item else 0.0
        return math.sqrt(max(seed, least) + item)

    def p(self, effect: float) -> float:
        """The alpha whose interval just reaches 0."""
        low, high = 1e-12, 1.0
        if self.half(low) < effect:
            return low
        for _ in range(50):
            middle = math.sqrt(low * high)
            low, high = (middle, high) if self.half(middle) > effect else (low, middle)
        return high


def _known(variance: float, clusters: int) -> float | None:
    return variance if clusters > 1 else None


def _agreement(mean: float, clusters: int, alpha: float, bound: float | None) -> tuple[float, float, float]:
    """Every difference is the same number: a share of up to `unseen` of all clusters may differ and not have shown
    up."""
    if abs(mean) < 1e-12 and bound is None:
        return mean, mean, 1.0
    if bound is None:
        return mean, mean, math.nan
    unseen = 1 - (alpha / 2) ** (1 / clusters)
    p = min(1.0, 2 * (bound / (bound + abs(mean))) ** clusters)
    return mean - unseen * (mean + bound), mean + unseen * (bound - mean), p


def _visible(found: Difference, seeds: int, alpha: float) -> float:
    assert found.seed_variance is not None and found.item_variance is not None
    spread = _Spread(found.seed_variance / seeds, 0.0, found.item_variance, seeds, found.clusters)
    return spread.half(alpha) + _t(POWER, 10**6) * math.sqrt(spread.seed + spread.item)


def _t(quantile: float, df: int) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(df, quantile))
