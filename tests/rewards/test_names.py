import subprocess
import sys

import rewards

HEAVY = ("torch", "sympy", "numpy", "rapidfuzz", "omegaconf", "lingshu_rl", "transformers", "trl")


def test_importing_rewards_loads_nothing_heavy():
    code = f"import sys, rewards; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_there():
    for name in rewards.__all__:
        assert getattr(rewards, name) is not None
    assert set(rewards.__all__) <= set(dir(rewards))


def test_an_unknown_name_is_refused():
    assert not hasattr(rewards, "OptionLeter")
