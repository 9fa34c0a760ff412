"""What a checkpoint keeps comes back as it was, and keys of other versions do no harm."""

import json
from dataclasses import fields

from lingshu_rl.state import RunState


def test_all_that_is_saved_is_loaded(tmp_path):
    state = RunState(
        3, 48, 1, 0.5, "step-000002", {"update": 1.5}, 9.0, {"kl": 0.0}, {"base": 2}, [True, False], [2.5], {"test": {}}
    )
    assert all(getattr(state, f.name) != getattr(RunState(), f.name) for f in fields(RunState))
    (tmp_path / "run.json").write_text(json.dumps({**state.to_json(), "files": {"a": 1}}))
    assert RunState.read(tmp_path) == state


def test_a_checkpoint_without_a_newer_key_is_read_with_its_default(tmp_path):
    (tmp_path / "run.json").write_text('{"step": 2, "cursor": 8}')
    assert RunState.read(tmp_path) == RunState(step=2, cursor=8)
