"""Symbolic labels: own grammar, unequal ones told apart here, equal ones by sympy in a worker that can be killed."""

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards.base import RewardInput
from rewards.executor import Executor
from rewards.numeric import NumericUnits
from rewards.symbolic import MEMORY_MB, equivalence, parse, value, variables

DOSE = r"\frac{D}{V} e^{-k t}"


@pytest.mark.parametrize(
    "answer, gold",
    [("D/V*exp(-k*t)", DOSE), (r"C(t) = \dfrac{D}{V}\exp(-kt)", DOSE), ("D e^{-kt}/V", DOSE), ("x^2 + 2x + 1", "(x+1)^2"),
     ("x² + 2x + 1", "(x+1)^2"), ("ln(a*b)", "ln(a) + ln(b)"), (r"\frac{\sqrt{2}}{2}", r"1/\sqrt{2}"),
     ("sin(x)^2 + cos(x)^2", "1"), ("0.1 + 0.2", "0.3"), ("log(100)", "2"), (r"\mathrm{Vd}\cdot k_{el}", "k_el*Vd"),
     ("sqrt(x^2)", "x"), ("2^{-n}", "1/2^n"), ("0.693/k", "0.693 / k.".rstrip("."))],
)  # fmt: skip
def test_equal_expressions(answer, gold):
    assert equivalence(answer, gold).value == 1.0


@pytest.mark.parametrize(
    "answer, gold",
    [("D/V*exp(k*t)", DOSE), ("D/V", DOSE), ("x", "y"), ("xy", "x+y"), ("x + 10^-15", "x"), ("x + 0.000000000001", "x"),
     ("x or y", "x"), ("x, y", "x"), ("x = y = x", "x"), ("1/0", "x"), ("", "x"), ("((x", "x"), ("9^9^9^9", "x"),
     ("__import__('os')", "x"), ("x.real", "x"), ("lambda: x", "x"), ("x" + "+x" * 400, "x"), ("(" * 200 + "x", "x"),
     ("x^99999999999", "x"), ("exp(exp(exp(exp(9))))", "x"), ("x; x", "x"), ("-" * 300 + "x", "x")],
)  # fmt: skip
def test_other_expressions_are_not_paid(answer, gold):
    result = equivalence(answer, gold)
    assert result.value == 0.0 and result.status in ("ok", "unparsed")


@pytest.mark.parametrize("text", ["", "x +", "2 3.4.5", "x^(9^9)", "f(", "x'", "\\foo{x", "x@y"])
def test_what_cannot_be_read(text):
    with pytest.raises(ValueError):
        parse(text)


def test_the_reward_takes_symbolic_labels():
    reward = NumericUnits()
    meta = {"kind": "symbolic"}
    for completion, expected in [
        (f"<answer>${DOSE}$</answer>", 1.0),
        ("\\boxed{D/V e^{-kt}}", 1.0),
        ("The answer is D/V*exp(-k*t).", 1.0),
        ("<answer>D/V*exp(-k*t)</answer><answer>D/V</answer>", 0.0),
        ("<answer>D/V*exp(k*t)</answer>", 0.0),
        ("<answer>no idea at all</answer>", 0.0),
    ]:
        assert reward.score(RewardInput(completion, DOSE, meta=meta)).value == expected, completion
    assert reward.score(RewardInput("<answer>x²</answer>", "x*x", meta=meta)).value == 1.0


def test_sympy_stays_in_the_worker():
    code = (
        "import sys; from rewards.numeric import NumericUnits; from rewards.base import RewardInput;"
        "r = NumericUnits(); m = {'kind': 'symbolic'};"
        "print(r.score(RewardInput('<answer>2x</answer>', 'x+x', meta=m)).value, 'sympy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == ["1.0", "False"]


def test_an_expression_on_which_sympy_hangs_is_masked():
    gold = "((x^32)^32)^32"
    with Executor("rewards.symbolic:SymbolicIdentity", mode="isolated", timeout_s=3, memory_mb=MEMORY_MB) as worker:
        hung, fine = worker.score(
            [RewardInput("((((x^32)^32)^32)^32)^(1/32)", gold), RewardInput("x+x", "2*x")], counted=False
        )
    assert (hung.value, hung.status) == (None, "timeout")
    assert fine.value == 1.0


@settings(deadline=None)
@given(st.text(max_size=80) | st.text("xy12+-*/^(){}\\. sqrtfanle", max_size=60))
def test_no_text_raises_but_valueerror(text):
    try:
        tree = parse(text)
    except ValueError:
        return
    value(tree, dict.fromkeys(variables(tree), 1.5))


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from("xyz"))
def test_a_tree_is_evaluated_as_written(a, b, name):
    tree = parse(f"{a}{name}^2 - {name}/{b}")
    assert value(tree, {name: 2.0}) == pytest.approx(a * 4 - 2 / b)
