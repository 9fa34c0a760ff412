from lingshu_rl.stream import PromptStream


def test_every_prompt_once_an_epoch_and_batches_cross_epochs():
    stream = PromptStream(list(range(10)), seed=3)
    drawn = [x for start in range(0, 30, 4) for x in stream.take(start, 4)][:30]
    assert all(sorted(drawn[e : e + 10]) == list(range(10)) for e in (0, 10, 20))
    assert drawn[:10] != drawn[10:20]


def test_taking_again_from_a_position_gives_the_same_prompts():
    a, b = PromptStream(list("abcdefg"), seed=1), PromptStream(list("abcdefg"), seed=1)
    a.take(0, 5)
    assert a.take(5, 6) == b.take(5, 6)
    assert PromptStream(list("abcdefg"), seed=2).take(0, 7) != b.take(0, 7)
