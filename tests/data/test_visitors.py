"""What strangers bring, through the door and the whole loop: it trains with trainer and engine alike, or is refused by row."""

import json

import pyarrow.parquet as parquet
import pytest
from launching import launch
from short_runs import SHORT, metrics_of
from visiting_rows import REFUSED, TEXTS, text_row, visitors

from lingshu_rl.data.load import DataError, load
from lingshu_rl.model.encoder import PromptEncoder


def written(folder, rows, name="rows.jsonl"):
    file = folder / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize("name", REFUSED)
def test_a_picture_that_is_none_is_refused_by_row_with_the_reason(name, tmp_path):
    write, reason = REFUSED[name]
    write(tmp_path / name)
    file = written(tmp_path, [text_row("good", "?") | {"images": []}, text_row("bad", "?") | {"images": [name]}])
    with pytest.raises(DataError, match=rf"1 of 2 rows.*\n.*line 2 \(id bad\).*{reason}"):
        load(str(file))


def test_control_tokens_of_the_model_are_refused_by_row_and_those_of_others_are_text(tmp_path):
    encoder = PromptEncoder("demo")
    own = [token for token in encoder.tokenizer.all_special_tokens if token]
    rows = [text_row(f"own {n}", f"Which {token} side?") | {"images": []} for n, token in enumerate(own)]
    file = written(tmp_path, [*rows, text_row("theirs", TEXTS["other placeholders"]) | {"images": []}])
    with pytest.raises(DataError, match=f"{len(own)} of {len(own) + 1} rows") as refused:
        load(str(file), fault=encoder.fault)
    assert own and all(f"(id own {n})" in str(refused.value) for n in range(min(len(own), 20)))
    assert "(id theirs)" not in str(refused.value)


@pytest.mark.slow
def test_every_visitor_trains_with_trainer_and_engine_alike(servers, tmp_path):
    """All in one batch each step, compared token by token; nothing set aside."""
    rows = visitors(tmp_path)
    assert len(rows) >= 60
    run = tmp_path / "run"
    settings = [
        f"data.train={written(tmp_path, rows)}",
        f"data.test={written(tmp_path, [text_row('held out', 'Which side?') | {'images': []}], 'test.jsonl')}",
        "data.instruction=short",
        "data.curriculum=none",
        f"train.prompts_per_step={len(rows)}",
        "train.group_size=2",
        "rollout.max_tokens=8",
        "eval.limit=2",
        "eval.controls=[]",
    ]
    done = launch([*SHORT, *servers.settings, *settings, f"run.dir={run}"], env=servers.env)
    assert done.returncode == 0, done.stdout[-3000:]
    steps = metrics_of(run)
    assert [step.get("refused", {}) for step in steps] == [{}, {}]
    assert all(0 < step["policy/rollout_gap_max"] < 1e-3 for step in steps), steps
    assert {row["id"] for row in rows} == seen(run)


def seen(run):
    """Ids of the prompts that were learnt from."""
    return {
        name for file in run.glob("rollouts/*.parquet") for name in parquet.read_table(file)["prompt_id"].to_pylist()
    }
