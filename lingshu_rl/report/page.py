"""The frame of every page: one template environment, one style sheet, one script, nothing from elsewhere."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

import jinja2

from lingshu_rl.report import plots
from lingshu_rl.report.text import duration, percent, signed
from lingshu_rl.text.markup import encodable

HERE = Path(__file__).parent


def render(template: str, **values: Any) -> str:
    """A page; everything but the charts goes through autoescape, a name that is missing is an error."""
    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    env.filters |= {"pct": percent, "signed": signed, "duration": duration, "short": plots.short, "digest": digest}
    style, script = (HERE / "report.css").read_text(), (HERE / "report.js").read_text()
    return encodable(env.get_template(template).render(style=style, script=script, **values))


def digest(text: str) -> str:
    """SHA-256 as a content policy writes it; also an order of ids that nobody chose."""
    return base64.b64encode(hashlib.sha256(encodable(text).encode()).digest()).decode()
