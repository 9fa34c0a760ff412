"""Replies as they arrive, one line each: what a killed run is taken up from."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lingshu_rl.eval.engines import Reply


class Journal:
    """Append-only file of replies by (condition, id). A last line that was cut off is dropped when the file is opened.

    retry_errors: replies that are errors count as not yet asked. path None: kept in memory only.
    """

    def __init__(self, path: Path | None, retry_errors: bool = False) -> None:
        self.path = path
        self.replies: dict[tuple[str, str], Reply] = {}
        if path is None or not path.exists():
            return
        kept = []
        text = path.read_text(encoding="utf-8", errors="replace")
        for line in text.split("\n"):
            try:
                row: dict[str, Any] = json.loads(line)
                reply = Reply(row["text"], row["finish_reason"], row["error"])
                key = (row["condition"], row["id"])
            except (ValueError, KeyError, TypeError):
                continue
            if retry_errors and reply.error:
                continue
            self.replies[key] = reply
            kept.append(line + "\n")
        if "".join(kept) != text:
            part = path.with_name(path.name + ".part")
            part.write_text("".join(kept), encoding="utf-8")
            part.replace(path)

    def get(self, condition: str, name: str) -> Reply | None:
        return self.replies.get((condition, name))

    def add(self, condition: str, name: str, reply: Reply) -> None:
        self.replies[condition, name] = reply
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            line = json.dumps({"condition": condition, "id": name, **asdict(reply)})
            with self.path.open("a", encoding="utf-8") as out:
                out.write(line + "\n")
