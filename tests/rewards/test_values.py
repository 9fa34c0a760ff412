"""A reward's numbers are floats from the moment they are given, whichever library they come from."""

import pickle
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest

from rewards.base import Reward, RewardInput, RewardResult
from rewards.executor import Executor, judge

NUMBERS = [0.5, np.float32(0.5), np.float64(0.5), np.float16(0.5), np.array(0.5), Decimal("0.5"), Fraction(1, 2)]


def torch_numbers():
    import torch

    return [torch.tensor(0.5), torch.tensor(0.5, dtype=torch.bfloat16), torch.tensor(0.5, requires_grad=True)]


@pytest.mark.parametrize("number", [*NUMBERS, *torch_numbers()], ids=lambda n: type(n).__name__)
def test_numbers_of_any_library_become_floats(number):
    result = RewardResult(number, components={"part": number})
    assert type(result.value) is float and result.value == 0.5
    assert type(result.components["part"]) is float
    assert pickle.loads(pickle.dumps(result)) == result


@pytest.mark.parametrize(("number", "value"), [(True, 1.0), (0, 0.0), (np.int64(1), 1.0), (np.bool_(True), 1.0), (1 + 1e-7, 1.0)])  # fmt: skip
def test_whole_numbers_truths_and_rounding_steps_too(number, value):
    result = RewardResult(number)
    assert type(result.value) is float and result.value == value


@pytest.mark.parametrize("number", ["0.5", b"1", [0.5], np.array([0.5]), 1 + 0j, object(), {}], ids=lambda n: type(n).__name__)  # fmt: skip
def test_what_is_no_number_is_refused(number):
    with pytest.raises(TypeError, match="reward value must be a number"):
        RewardResult(number)
    with pytest.raises(TypeError, match="component 'part' must be a number"):
        RewardResult(0.5, components={"part": number})


class Wild(Reward):
    name = "wild"

    def __init__(self, value):
        self.value = value

    def score(self, sample):
        return RewardResult(self.value)


@pytest.mark.parametrize("value", [float("nan"), np.float32("inf"), -0.5, 2, "1"], ids=str)
def test_an_impossible_value_masks_its_sample_under_the_rewards_name(value):
    (result,) = judge(Wild(value), [RewardInput("", "")])
    assert result.value is None and result.status == "error" and result.reason.startswith("wild: ")
    with Executor(Wild(value)) as executor:
        executor.score([RewardInput("", "")])
        assert executor.budget.masked == 1


def test_scalars_of_other_libraries_come_out_of_a_worker(tmp_path, monkeypatch):
    """A worker finds the module of the working folder too."""
    (tmp_path / "own_scalars.py").write_text(
        "import numpy as np\nfrom rewards import Reward, RewardResult\n\n\nclass Half(Reward):\n"
        "    def score(self, sample):\n        return RewardResult(np.float32(0.5))\n"
    )
    monkeypatch.chdir(tmp_path)
    with Executor("own_scalars:Half", mode="isolated") as executor:
        assert [type(r.value) for r in executor.score([RewardInput("", "")] * 3)] == [float] * 3
