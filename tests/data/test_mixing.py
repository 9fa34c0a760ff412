"""Several sources as one set: how often each comes, in an order that its position alone decides."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from launching import ROOT

from lingshu_rl.data.load import DataError, load
from lingshu_rl.data.mixing import Part, draws, epoch_order
from lingshu_rl.data.sources import sources_of
from lingshu_rl.failures import ConfigError
from lingshu_rl.planning.given import load_config
from lingshu_rl.results import by_source
from lingshu_rl.stream import MixedStream, make_stream
from lingshu_rl.types import Group, Prompt, Scored
from rewards.base import RewardResult

A, B = range(10), range(10, 40)


def source(folder: Path, name: str, count: int, **more: Any) -> dict[str, Any]:
    path = folder / f"{name}.jsonl"
    rows = [{"id": f"{name}{n}", "images": [], "question": "Which?", "answer": "it", "kind": "open"} for n in range(count)]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"path": str(path), "name": name, **more}


def test_epochs_say_how_often_rows_come_and_shares_what_is_drawn() -> None:
    assert draws([Part("a", A, epochs=2.5), Part("b", B)]) == [25, 30]
    assert draws([Part("a", A, share=3), Part("b", B, share=1)]) == [30, 10]


def test_all_rows_of_a_source_come_before_one_comes_again() -> None:
    parts = [Part("a", A, epochs=2.5), Part("b", B, epochs=0.5)]
    drawn = [place for epoch in range(4) for place in epoch_order(parts, 0, epoch)]
    counts = Counter(drawn)
    assert {counts[n] for n in A} == {10} and {counts[n] for n in B} == {2}
    assert sorted(n for n in epoch_order(parts, 0, 0) + epoch_order(parts, 0, 1) if n in B) == list(B)


def test_the_order_is_one_of_seed_and_position() -> None:
    parts = [Part("a", A, share=1), Part("b", B, share=1)]
    items = list(range(40))
    one, two = MixedStream(items, 3, parts), MixedStream(items, 3, parts)
    straight = one.take(0, 100)
    assert [two.take(p, 25) for p in (75, 50)] == [straight[75:], straight[50:75]]
    assert MixedStream(items, 4, parts).take(0, 100) != straight
    near = [sum(n in A for n in straight[k : k + 40]) for k in (0, 40)]
    assert near == [20, 20]  # the shares hold in every epoch, which is as long as all rows together


def test_a_mixture_is_loaded_with_its_sources_apart(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text("id,question,answer\na0,Which?,that\n")
    told = [source(tmp_path, "a", 3, epochs=2), source(tmp_path, "b", 4), {"path": str(tmp_path / "c.csv"), "name": "c", "format": "vqa"}]  # fmt: skip
    loaded = load(told)
    assert [(p.name, p.rows) for p in loaded.parts] == [("a", range(3)), ("b", range(3, 7)), ("c", range(7, 8))]
    assert [p.id for p in loaded.prompts][-2:] == ["b3", "c:a0"]  # other people's ids may be anything
    assert [p.meta["source"] for p in loaded.prompts] == ["a"] * 3 + ["b"] * 4 + ["c"]
    assert loaded.prompts.place("b0") == "b, line 1"
    assert [loaded.source_of(p.id) for p in loaded.prompts] == ["a"] * 3 + ["b"] * 4 + ["c"]
    stream = make_stream(loaded.prompts, "none", 0, 8, loaded.parts)
    assert Counter(p.meta["source"] for p in stream.take(0, 11)) == {"a": 6, "b": 4, "c": 1}
    assert load(told[0]).parts == () and "source" not in load(told[0]).prompts[0].meta


def test_rewards_are_told_by_source() -> None:
    def group(source: str, *values: float | None) -> Group:
        prompt = Prompt(source, (), (), "A", (), "option", {})
        results = (RewardResult(v, "error" if v is None else "ok") for v in values)
        return Group(prompt, tuple(Scored(None, result) for result in results))  # type: ignore[arg-type]

    told = by_source(
        [group("slake", 1.0, 0.0), group("slake", 1.0, None), group("rad", None, None), group("", 1.0)], str
    )
    assert told == {"prompts/source/rad": 1, "prompts/source/slake": 2, "reward/source/slake": pytest.approx(2 / 3)}


def test_rows_say_themselves_where_they_are_from(tmp_path: Path) -> None:
    one, two = source(tmp_path, "a", 1), source(tmp_path, "b", 1)
    row = {"id": "x", "images": [], "question": "Which?", "answer": "it", "kind": "open", "meta": {"source": "slake"}}
    Path(two["path"]).write_text(json.dumps(row))
    assert [p.meta["source"] for p in load([one, two]).prompts] == ["a", "slake"]


def test_what_cannot_be_mixed_is_refused(tmp_path: Path) -> None:
    a, b = source(tmp_path, "a", 2), source(tmp_path, "b", 2)
    with pytest.raises(DataError, match="either every source has a share, or none"):
        load([{**a, "share": 1}, b])
    with pytest.raises(DataError, match="two sources are called 'a'"):
        load([a, {**b, "name": "a"}])
    with pytest.raises(DataError, match="duplicate id, first used at a, line 1"):
        load([a, {**a, "name": "again"}])
    Path(b["path"]).write_text("{}\n")
    with pytest.raises(DataError, match=r"b\.jsonl: no usable row is left of this source"):
        load([a, b], skip_bad_rows=True)


def test_the_pages_example_is_a_mixture(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "data.md").read_text()
    example = page.split("```yaml\n")[1].split("```")[0]
    (tmp_path / "run.yaml").write_text(example)
    config = load_config(tmp_path / "run.yaml", ["model=demo"])
    assert draws([Part(s.label, range(10), s.epochs, s.share) for s in sources_of(config.data.train)]) == [15, 8, 8]


def test_a_run_names_the_key_of_a_source_that_is_no_good(tmp_path: Path) -> None:
    a, b = source(tmp_path, "a", 2, share=1), source(tmp_path, "b", 2)

    def settings(**data: Any) -> list[str]:
        return [f"data.{key}={json.dumps(value)}" for key, value in data.items()]

    config = load_config(None, settings(train=[a, {**b, "share": 2}], test="held.jsonl"))
    assert config.data.train[1]["share"] == 2
    for data, said in (
        ({"train": [a, {**b, "sahre": 1}], "test": "x.jsonl"}, r"data.train\[1\].sahre: unknown key.*'share'"),
        ({"train": a}, "data.train=.*a.jsonl needs a data.test"),
        ({"train": b, "test": [a]}, "data.test is asked once"),
        ({"train": [a], "test": b, "curriculum": "pass_rate"}, "data.curriculum draws by pass rates alone"),
    ):
        with pytest.raises(ConfigError, match=said):
            load_config(None, settings(**data))
