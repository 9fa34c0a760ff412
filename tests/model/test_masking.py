from lingshu_rl.planning.given import load_config
from lingshu_rl.train import advantages_of, mask_truncated
from lingshu_rl.types import Group, Prompt, Rollout, Scored
from rewards.base import RewardResult

PROMPT = Prompt("q", ({"role": "user", "content": "?"},), (), "A", (), "open", {})


def group(*members):
    """members: (value or None, tokens, finish reason)."""
    scored = []
    for i, (value, tokens, finish) in enumerate(members):
        rollout = Rollout(PROMPT, i, "", (1,), (5,) * tokens, (-0.1,) * tokens, finish, 0)
        scored.append(Scored(rollout, RewardResult(value, "ok" if value is not None else "timeout")))
    return Group(PROMPT, tuple(scored))


def test_a_failed_reward_is_masked_and_leaves_the_mean_alone():
    config = load_config(None, ["advantage.variant=no_std"])
    assert advantages_of(group((1.0, 3, "stop"), (None, 3, "stop"), (0.0, 3, "stop")), config) == (0.5, None, -0.5)


def test_truncated_completions_are_masked_only_when_asked():
    members = group((1.0, 3, "stop"), (0.0, 9, "length"), (0.0, 3, "stop"))
    found = advantages_of(members, load_config())
    assert mask_truncated(members, found, load_config()) == found and None not in found
    masked = mask_truncated(members, found, load_config(None, ["loss.mask_truncated=true"]))
    assert masked == (found[0], None, found[2])


def test_overlong_completions_lose_reward():
    settings = [
        "rollout.max_tokens=10",
        "advantage.overlong_buffer=4",
        "advantage.overlong_penalty=0.5",
        "advantage.variant=no_std",
    ]
    config = load_config(None, settings)
    short, long = advantages_of(group((1.0, 5, "stop"), (1.0, 10, "length")), config)
    assert short == 0.25 and long == -0.25
