"""`lingshu-rl rewards coverage REPORTS.csv --pack P`: what the packs do not read in one's own reports, by frequency."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import Any

from rewards.report.extract import extract
from rewards.report.lexicon import DEFAULT_PACKS, Lexicon, load
from rewards.report.sentences import read
from rewards.report.terms import Marks, find
from rewards.sheets import DELIMITERS, UTF16, records

COLUMNS = ("findings", "impression", "report", "report_text", "text")
_LONGEST = 3  # words of an unread phrase
_SIGNS = {"present": "", "uncertain": "possible ", "absent": "no "}


@dataclass
class Coverage:
    """Counts are in reports. `phrases` and `sentences`: (text, reports that have it, one sentence with it)."""

    reports: int = 0
    read: int = 0  # reports with any statement
    statements: float = 0.0  # a report, mean
    findings: float = 0.0
    sentences_read: float = 0.0  # share of the sentences from which a statement was read
    words_known: float = 0.0  # share of the words that some pack knows
    phrases: list[tuple[str, int, str]] = field(default_factory=list)
    sentences: list[tuple[str, int, str]] = field(default_factory=list)
    found: list[tuple[str, int]] = field(default_factory=list)


def measure(texts: Sequence[str], lexicon: Lexicon, top: int = 40) -> Coverage:
    """What is read and what is not in these reports. Phrases that only repeat in longer ones are left out."""
    phrases, sentences, found = Counter[str](), Counter[str](), Counter[str]()
    examples: dict[str, str] = {}
    words = known = statements = positives = silent = total = read_any = 0
    for text in texts:
        entities = extract(text, lexicon).entities
        read_any += bool(entities)
        statements += len(entities)
        named = {_SIGNS[e.assertion] + e.finding for e in entities if not e.group}
        positives += sum(not name.startswith("no ") for name in named)
        found.update(named)
        seen_phrases, seen_sentences = set(), set()
        for sentence in read(text, lexicon).sentences:
            line = " ".join(sentence.words)
            marks = find(sentence.words, lexicon)
            unread = _unread(marks, lexicon)
            words += len(sentence.words)
            known += len(sentence.words) - len(unread)
            total += 1
            if not extract(line, lexicon).entities and any(word.isalpha() for word in sentence.words):
                silent += 1
                seen_sentences.add(line)
            for phrase in _phrases(sentence.words, unread, lexicon):
                seen_phrases.add(phrase)
                examples.setdefault(phrase, line)
        phrases.update(seen_phrases)
        sentences.update(seen_sentences)
    count = max(1, len(texts))
    return Coverage(
        reports=len(texts),
        read=read_any,
        statements=statements / count,
        findings=positives / count,
        sentences_read=1.0 - silent / max(1, total),
        words_known=known / max(1, words),
        phrases=[(p, n, examples[p]) for p, n in _longest(phrases, top)],
        sentences=[(line, n, line) for line, n in sentences.most_common(top)],
        found=found.most_common(top),
    )


def _unread(marks: Marks, lexicon: Lexicon) -> set[int]:
    """Positions of words that belong to no term and to no small word class."""
    mentions = (*marks.heads, *marks.organs, *marks.states, *marks.cues, *marks.normals, *marks.abnormals)
    covered = {i for span in mentions for i in range(span.begin, span.end)}
    covered |= {i for span in marks.modifiers for i in range(span.begin, span.end)}
    small = _small(lexicon)
    return {
        i
        for i, word in enumerate(marks.words)
        if i not in covered and word not in small and word.isalpha() and word not in lexicon.trie
    }


@lru_cache(maxsize=8)
def _small(lexicon: Lexicon) -> frozenset[str]:
    return frozenset[str]().union(*lexicon.grammar.values())


def _phrases(words: Sequence[str], unread: set[int], lexicon: Lexicon) -> Iterator[str]:
    """Every unread word, and runs of words with an unread one at an end ("crazy paving pattern")."""
    small = _small(lexicon)
    for i in unread:
        for length in range(1, _LONGEST + 1):
            for begin in sorted({i, i - length + 1}):
                run = words[max(0, begin) : begin + length]
                if begin >= 0 and len(run) == length and all(map(str.isalpha, run)) and not small & {run[0], run[-1]}:
                    yield " ".join(run)


def _longest(phrases: Counter[str], top: int) -> list[tuple[str, int]]:
    """The most frequent phrases; a shorter one that almost only stands within a longer one is left out."""
    chosen: list[tuple[str, int]] = []
    often = [(p, n) for p, n in phrases.most_common(top * 20) if n > 1 or len(phrases) <= top]
    for phrase, count in sorted(often, key=lambda item: (-len(item[0].split()), -item[1])):
        if not any(f" {phrase} " in f" {longer} " and n >= 0.7 * count for longer, n in chosen):
            chosen.append((phrase, count))
    single = [(p, n) for p, n in chosen if n * len(p.split()) > 1]
    return sorted(single, key=lambda item: (-item[1], item[0]))[:top]


def load_texts(path: Path, columns: Sequence[str]) -> list[str]:
    """The reports of a CSV, TSV or JSONL file. Raises ValueError where it has none of the columns, naming the file and
    the line of what cannot be read.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(_READERS[path.suffix](file))
    except KeyError:
        raise ValueError(f"{path}: reports are read from {', '.join(_READERS)}, one a row") from None
    except UnicodeDecodeError as error:
        code = "utf-16" if path.read_bytes()[:2] in UTF16 else "latin1"
        raise ValueError(f"{path}: is not UTF-8 text; write it anew, for example iconv -f {code} -t utf-8") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    have = list(dict.fromkeys(name for row in rows for name in row))
    chosen = [c for c in have if (c in columns if columns else c.lower().replace(" ", "_") in COLUMNS)]
    if not chosen:
        told = f"it has {', '.join(have)}: name those of the text with --column" if have else "it has no rows"
        raise ValueError(f"{path}: no column {', '.join(columns or COLUMNS)}; {told}")
    texts = ["\n\n".join(f"{c}: {row[c]}" for c in chosen if str(row.get(c) or "").strip()) for row in rows]
    return [text for text in texts if text]


def _lines(file: Iterable[str]) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(file, start=1):
        try:
            row = json.loads(line) if line.strip() else {}
        except ValueError as error:
            raise ValueError(f"line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"line {number} holds a {type(row).__name__}, and one JSON object a line is read")
        yield row


def _table(file: Iterable[str], usual: str) -> Iterator[dict[str, Any]]:
    lines = records(file, usual)
    names = next(lines, [])
    for number, cells in enumerate(chain([names], lines)):
        if isinstance(cells, str):
            raise ValueError(cells)
        if len(cells) > len(names):
            raise ValueError(
                f"row {number} has {len(cells)} cells and the table {len(names)} columns, {', '.join(names)}"
            )
        if number:
            yield dict(zip(names, cells, strict=False))


_READERS: Mapping[str, Callable[[Iterable[str]], Iterator[dict[str, Any]]]] = {
    ".csv": partial(_table, usual=DELIMITERS[".csv"]),
    ".tsv": partial(_table, usual=DELIMITERS[".tsv"]),
    ".jsonl": _lines,
}


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 2 for a wrong call."""
    parser = argparse.ArgumentParser(
        prog="lingshu-rl rewards coverage", description="Show what report packs do not read in reports of your own."
    )
    parser.add_argument(
        "reports", metavar="REPORTS", type=Path, help="a .csv, .tsv or .jsonl file with one report a row"
    )
    parser.add_argument("--pack", metavar="P", action="append", help="a pack's name or JSON file; default: all shipped")
    parser.add_argument("--column", metavar="C", action="append", default=[], help=f"default: {', '.join(COLUMNS)}")
    parser.add_argument("--top", metavar="N", type=int, default=40, help="lines a list; default: %(default)s")
    parser.add_argument("--out", metavar="FILE", type=Path, help="write the lists as JSON too")
    arguments = parser.parse_args(argv)
    try:
        lexicon = load(tuple(arguments.pack or DEFAULT_PACKS))
        coverage = measure(load_texts(arguments.reports, arguments.column), lexicon, arguments.top)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    _show(coverage)
    if arguments.out:
        arguments.out.write_text(json.dumps(asdict(coverage), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


def _show(coverage: Coverage) -> None:
    print(f"reports {coverage.reports}, read {coverage.read}")
    print(f"statements a report {coverage.statements:.1f}, findings {coverage.findings:.1f}")
    print(f"sentences read {coverage.sentences_read:.1%}, words known {coverage.words_known:.1%}")
    for title, rows in (("unread phrases", coverage.phrases), ("unread sentences", coverage.sentences)):
        print(f"\n{title} (reports, text)")
        for text, count, example in rows:
            print(f"{count:6d}  {text}" + (f"   [{example[:90]}]" if example != text else ""))
    print("\nread most often (reports, statement)")
    for name, count in coverage.found:
        print(f"{count:6d}  {name}")
