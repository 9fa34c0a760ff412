"""One clock: what a phase added to a step, when it ran, and what a resumed run has spent."""

import pytest

from lingshu_rl import timeline
from lingshu_rl.timeline import Timeline, seconds_added


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(timeline.time, "monotonic", lambda: now[0])
    return now


def test_a_phase_counts_what_no_earlier_one_covers():
    spans = {"reward": [(2.0, 3.0), (9.0, 11.0)], "rollout": [(0.0, 10.0)], "reference": [(4.0, 14.0), (15.0, 16.0)]}
    assert seconds_added(spans) == {"rollout": 10.0, "reward": 1.0, "reference": 4.0}
    assert seconds_added({}) == {}


def test_a_step_is_told_with_its_own_spans_also_those_that_ran_during_the_step_before(clock):
    t = Timeline()
    t.begin(0)
    t.add("rollout", 101.0, 103.0, step=0)
    t.add("update", 104.0, 106.0, step=0)
    t.add("rollout", 104.5, 105.5, step=1)
    with t.of("checkpoint"):
        clock[0] = 107.0
    first = t.take(0)
    assert first["time/rollout"] == 2.0 and first["time/update"] == 2.0 and first["time/step"] == 7.0
    assert (first["time/start/update"], first["time/end/update"]) == (4.0, 6.0)
    assert first["time/end/checkpoint"] == 7.0 and "time/checkpoint" not in first
    t.begin(1)
    clock[0] = 110.0
    second = t.take(1)
    assert (second["time/start/rollout"], second["time/end/rollout"]) == (4.5, 5.5) and second["time/step"] == 3.0
    assert t.seconds == {"rollout": 3.0, "update": 2.0, "checkpoint": 7.0}


def test_a_resumed_run_counts_on(clock):
    t = Timeline()
    t.resume({"update": 5.0}, total_s=50.0)
    t.begin(7)
    t.add("update", 100.0, 102.0, step=7)
    t.take(7)
    clock[0] = 110.0
    assert t.seconds == {"update": 7.0} and t.total_s == 60.0
