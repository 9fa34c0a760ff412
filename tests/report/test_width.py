"""In a browser no table of a page is wider than its frame: figures that must be scrolled to are not seen."""

import json
import re
import shutil
import subprocess

import pytest
from report.test_run_report import make_run, questions

from lingshu_rl.report import write_report
from lingshu_rl.sweep.answer import Member, write_comparison
from lingshu_rl.sweep.plan import Variant
from lingshu_rl.sweep.status import Status

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
WIDE = """<script>
for (const details of document.querySelectorAll("details")) details.open = true;
const boxes = [document.documentElement, ...document.querySelectorAll(".card, figure, .tile, .note, article, table")];
const wide = boxes.filter((e) => e.scrollWidth > e.clientWidth + 1).map((e) => `${e.className}: ${e.textContent.trim().slice(0, 40)}`);
document.body.textContent = `WIDE${JSON.stringify(wide)}WIDE`;
</script></body>"""


def too_wide(page, folder, pixels):
    """The page's frames that hold something wider than themselves."""
    copy = folder / "probe.html"
    copy.write_text(re.sub(r"<meta http-equiv[^>]*>", "", page.read_text()).replace("</body>", WIDE))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={pixels},2000", "--dump-dom"]
    done = subprocess.run([*command, copy.as_uri()], capture_output=True, text=True, timeout=120)
    return json.loads(re.search("WIDE(.*)WIDE", done.stdout, re.DOTALL)[1])


def alarmed(folder, rows):
    run = make_run(folder, rows, steps=12)
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    bad = {"groups/zero_variance": 0.95, "completion/truncated_share": 0.3}
    (run / "metrics.jsonl").write_text("".join(json.dumps(row | bad) + "\n" for row in metrics))
    return run


@pytest.mark.skipif(BROWSER is None, reason="no browser here")
@pytest.mark.parametrize("pixels", [1280, 1600])
def test_no_table_is_cut_off(tmp_path, pixels):
    rows, members = questions(tmp_path, 24), []
    for name in ("usual", "loss.variant=gspo, train.group_size=16", "a/very_long_name_" + "9" * 30):
        run = alarmed(tmp_path / name, rows)
        members.append(Member(Variant(name, {"name": name}), 0, run, Status("", state="done", devices="cuda:0,1,2,3")))
    write_comparison(members, "usual", tmp_path, name="a sweep")
    assert too_wide(tmp_path / "sweep.html", tmp_path, pixels) == []
    assert too_wide(write_report(run), tmp_path, pixels) == []
