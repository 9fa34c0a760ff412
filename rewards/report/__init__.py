"""Findings of radiology reports: read with scope rules, compared one to one. Packs of words are data."""

from rewards.report.entity import Entity, ReportReading
from rewards.report.extract import extract
from rewards.report.labels import ReportLabels
from rewards.report.lexicon import DEFAULT_PACKS, Lexicon, load
from rewards.report.score import ReportEntities

__all__ = ["DEFAULT_PACKS", "Entity", "Lexicon", "ReportEntities", "ReportLabels", "ReportReading", "extract", "load"]
