"""Grounding: where in the image something is, as boxes, points or masks. Rows of the kinds `box`, `points` and `mask`.

The three records are all that the library knows of these kinds; an own kind is added in the same way.
"""

from rewards.grounding.kinds import BOX, MASK, POINTS
from rewards.grounding.score import BoxSet, MaskDice, PointSet

__all__ = ["BOX", "MASK", "POINTS", "BoxSet", "MaskDice", "PointSet"]
