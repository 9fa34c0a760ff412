"""Symbolic labels ("Dose/V * exp(-k*t)"): is the answer the same function of the same variables?

The text is read by an own grammar into a small tree; nothing is ever handed to a parser that evaluates. Unequal
expressions are told apart here, by their values at fixed points. Only where those agree does sympy have the last word,
in a worker process that can be killed. Variables stand for positive numbers, as doses, times and concentrations do.
"""

from __future__ import annotations

import atexit
import math
import operator
import re
import threading
import zlib
from collections.abc import Callable, Mapping, Set
from typing import Any, NamedTuple

from rewards.base import Reward, RewardInput, RewardResult
from rewards.executor import Executor
from rewards.text import normalise

MAX_LENGTH = 400
MAX_NODES = 150
MAX_DEPTH = 25
MAX_POWER = 32
TIMEOUT_S = 3.0
MEMORY_MB = 1024

# A tree is ("number", text), ("variable", name), ("constant", name), ("call", function, tree), ("neg", tree) or
# (operator, left, right) with one of + - * / ^.
Tree = tuple[Any, ...]

_FUNCTIONS: dict[str, Callable[[float], float]] = {
    "sqrt": math.sqrt,
    "exp": math.exp,
    "ln": math.log,
    "log": math.log10,
    "log10": math.log10,
    "log2": math.log2,
    "sin": math.sin,
    "cos": math.cos,
    "tan": math.tan,
    "arcsin": math.asin,
    "arccos": math.acos,
    "arctan": math.atan,
}
_CONSTANTS = {"pi": math.pi, "e": math.e}
_ALIASES = {"π": "pi", "asin": "arcsin", "acos": "arccos", "atan": "arctan", "lg": "log10"}
_SUPERSCRIPT = re.compile("[⁰¹²³⁴-⁹⁺⁻]+")
_FONT = re.compile(
    r"\\(?:text|mathrm|mathit|mathbf|operatorname|left|right|displaystyle|boxed)(?![A-Za-z])|\\[,;:! ]|\$"
)
_LEFT_SIDE = re.compile(r"\s*[^\W\d_]\w{0,20}(?:\s?\(\s?[^\W\d_]\w{0,10}\s?\))?\s*=")
_TOKEN = re.compile(
    r"\s*(?:(?P<number>\d{1,15}(?:\.\d{1,15})?(?![\d.]))|\\?(?P<name>[^\W\d_]+(?:_\{\w{1,12}\}|\d{0,3}(?:_\w{1,12})?))"
    r"|(?P<mark>\*\*|[-+*/^(){}\[\]·×÷−]))"
)
_MARKS = {"**": "^", "·": "*", "×": "*", "÷": "/", "−": "-"}


def lift_superscripts(text: str) -> str:
    """x² as x^(2): Unicode normalisation would turn it into the variable x2."""
    return _SUPERSCRIPT.sub(lambda match: f"^({normalise(match.group())})", text)


def parse(text: str, known: Set[str] = frozenset()) -> Tree:
    """The tree of an expression in plain or LaTeX notation; ValueError names what cannot be read.

    "y = ..." is read as its right side. A variable is a name such as k, t, Vd, k_el; "xy" is one name, "2x" a product.
    "log" is the decimal logarithm. known: variables of the label; a name that is none of them but spelled with their
    letters is a product, as in e^{-kt}.
    """
    text = normalise(_FONT.sub(" ", lift_superscripts(text[: MAX_LENGTH * 2]))).strip().rstrip(".")
    if len(text) > MAX_LENGTH:
        raise ValueError(f"longer than {MAX_LENGTH} characters")
    left = _LEFT_SIDE.match(text)
    reader = _Reader(_tokens(text[left.end() :] if left is not None else text), known)
    tree = reader.sum(0)
    if reader.peek() != ("end", ""):
        raise ValueError(f"unexpected {reader.peek()[1]!r}")
    return tree


def _tokens(text: str) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    position = 0
    text = text.replace("\\cdot", "·").replace("\\times", "×").rstrip()
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise ValueError(f"unexpected {text[position:].strip()[:1]!r}")
        kind = str(match.lastgroup)
        word = match.group(kind)
        if kind == "name":
            word = word.replace("{", "").replace("}", "")
            word = _ALIASES.get(word, word)
        found.append((kind, _MARKS.get(word, word)))
        position = match.end()
    return found


class _Reader:
    """Recursive descent; every rule takes the depth so that no text can exhaust the stack."""

    def __init__(self, tokens: list[tuple[str, str]], known: Set[str]) -> None:
        self._tokens = tokens
        self._known = known
        self._position = 0
        self._nodes = 0

    def peek(self) -> tuple[str, str]:
        return self._tokens[self._position] if self._position < len(self._tokens) else ("end", "")

    def sum(self, depth: int) -> Tree:
        tree = self._product(depth)
        while self.peek()[1] in ("+", "-"):
            tree = self._node(self._next()[1], tree, self._product(depth))
        return tree

    def _next(self) -> tuple[str, str]:
        token = self.peek()
        self._position += 1
        return token

    def _node(self, *parts: Any) -> Tree:
        self._nodes += 1
        if self._nodes > MAX_NODES:
            raise ValueError("too many terms")
        return parts

    def _product(self, depth: int) -> Tree:
        tree = self._signed(depth)
        while True:
            kind, word = self.peek()
            if word in ("*", "/"):
                tree = self._node(self._next()[1], tree, self._signed(depth))
            elif kind in ("number", "name") or word in ("(", "{"):
                tree = self._node("*", tree, self._power(depth))  # 2x, 2(x + 1)
            else:
                return tree

    def _signed(self, depth: int) -> Tree:
        if depth > MAX_DEPTH:
            raise ValueError("nested too deeply")
        if self.peek()[1] == "-":
            self._next()
            return self._node("neg", self._signed(depth + 1))
        if self.peek()[1] == "+":
            self._next()
            return self._signed(depth + 1)
        return self._power(depth)

    def _power(self, depth: int) -> Tree:
        base = self._atom(depth)
        if self.peek()[1] != "^":
            return base
        self._next()
        exponent = self._signed(depth + 1)
        constant = value(exponent, {}) if not variables(exponent) else 0.0
        if constant is None or abs(constant) > MAX_POWER:
            raise ValueError(f"a power above {MAX_POWER}")
        return self._node("^", base, exponent)

    def _atom(self, depth: int) -> Tree:
        if depth > MAX_DEPTH:
            raise ValueError("nested too deeply")
        kind, word = self._next()
        if kind == "number":
            return self._node("number", word)
        if kind == "name" and word in ("frac", "dfrac", "tfrac"):
            return self._node("/", self._group(depth), self._group(depth))
        if kind == "name" and word in _FUNCTIONS:
            return self._node("call", word, self._group(depth))
        if kind == "name" and word in _CONSTANTS:
            return self._node("constant", word)
        if kind == "name":
            letters = list(word) if word not in self._known and set(word) <= self._known else [word]
            tree = self._node("variable", letters[0])
            for letter in letters[1:]:
                tree = self._node("*", tree, self._node("variable", letter))
            return tree
        if word in ("(", "{", "["):
            return self._closed(word, depth)
        raise ValueError(f"unexpected {word!r}, or the expression breaks off")

    def _group(self, depth: int) -> Tree:
        """The argument of a function: in brackets, or one factor as in "ln 2" or "sin x"."""
        if self.peek()[1] in ("(", "{", "["):
            return self._closed(self._next()[1], depth)
        return self._power(depth + 1)

    def _closed(self, mark: str, depth: int) -> Tree:
        inner = self.sum(depth + 1)
        if self._next()[1] != {"(": ")", "{": "}", "[": "]"}[mark]:
            raise ValueError(f"an open {mark!r}")
        return inner


def variables(tree: Tree) -> set[str]:
    if tree[0] == "variable":
        return {tree[1]}
    return set().union(*(variables(part) for part in tree[1:] if isinstance(part, tuple)))


def value(tree: Tree, point: dict[str, float]) -> float | None:
    """The tree's value where its variables have the values of `point`, or None where it has none (1/0, ln of -1)."""
    algebra = _Algebra(float, point, _CONSTANTS, _FUNCTIONS, math.pow)
    try:
        result = _evaluate(tree, algebra)
    except (ArithmeticError, ValueError):
        return None
    return result if math.isfinite(result) else None


class _Algebra(NamedTuple):
    """What the leaves and functions of a tree are: floats, or terms of sympy."""

    number: Callable[[str], Any]
    variables: Mapping[str, Any]
    constants: Mapping[str, Any]
    functions: Mapping[str, Callable[[Any], Any]]
    power: Callable[[Any, Any], Any]


def _evaluate(tree: Tree, algebra: _Algebra) -> Any:
    kind, first, *rest = tree
    leaves = {"number": algebra.number, "variable": algebra.variables.get, "constant": algebra.constants.get}
    if kind in leaves:
        return leaves[kind](first)
    if kind == "call":
        return algebra.functions[first](_evaluate(rest[0], algebra))
    parts = [_evaluate(part, algebra) for part in (first, *rest)]
    return {**_OPERATORS, "^": algebra.power}[kind](*parts)


_OPERATORS: dict[str, Callable[..., Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "neg": operator.neg,
}


def equivalence(answer: str, gold: str) -> RewardResult:
    """1 when both texts are the same function, 0 when not or when the answer cannot be read; None when undecided.

    Raises ValueError when the label cannot be read.
    """
    target = parse(gold)
    try:
        tree = parse(answer, variables(target))
    except ValueError as error:
        return RewardResult(0.0, "unparsed", reason=f"not a readable expression: {error}")
    if tree == target:
        return RewardResult(1.0, parsed=answer)
    agreed = 0
    for number in range(8):
        point = {name: _coordinate(name, number) for name in variables(tree) | variables(target)}
        left, right = value(tree, point), value(target, point)
        if left is None or right is None:
            continue
        if not math.isclose(left, right, rel_tol=1e-7, abs_tol=1e-12):
            return RewardResult(0.0, parsed=answer, reason=f"differs from {gold}")
        agreed += 1
    if not agreed:
        return RewardResult(0.0, "unparsed", reason="the expression has no value at ordinary points")
    return _prover().score([RewardInput(answer, gold)], counted=False)[0]


def _coordinate(name: str, number: int) -> float:
    """A fixed positive coordinate for a variable, the same in every process."""
    return 0.4 + zlib.crc32(f"{name}/{number}".encode()) / 2**32 * 2.2


_lock = threading.Lock()
_worker: Executor | None = None


def _prover() -> Executor:
    """The one worker process of this process, started for the first label that needs it."""
    global _worker
    with _lock:
        if _worker is None:
            _worker = Executor(
                "rewards.symbolic:SymbolicIdentity", mode="isolated", timeout_s=TIMEOUT_S, memory_mb=MEMORY_MB
            )
            atexit.register(_worker.close)
        return _worker


class SymbolicIdentity(Reward):
    """Whether completion and gold, both expressions, are identical. Runs in the worker: the only user of sympy."""

    name = "symbolic_identity"

    def score(self, sample: RewardInput) -> RewardResult:
        import sympy

        target = parse(sample.gold)
        tree = parse(sample.completion, variables(target))
        names = sorted(variables(tree) | variables(target))
        symbols = {name: sympy.Symbol(f"x{index}", positive=True) for index, name in enumerate(names)}
        algebra = _Algebra(sympy.Rational, symbols, {"pi": sympy.pi, "e": sympy.E}, _sympy_functions(), operator.pow)
        left, right = _evaluate(tree, algebra), _evaluate(target, algebra)
        difference = left - right
        # Fifty digits at rational points: what float agreement could have been by accident is told apart here.
        for number in range(3):
            point = {symbols[name]: sympy.Rational(_coordinate(name, 100 + number)) for name in names}
            size = abs(right.subs(point).evalf(50))
            if not abs(difference.subs(point).evalf(50, chop=True)) <= sympy.Float("1e-40") * (1 + size):
                return RewardResult(0.0, parsed=sample.completion, reason=f"differs from {sample.gold}")
        return RewardResult(1.0, parsed=sample.completion)


def _sympy_functions() -> dict[str, Callable[[Any], Any]]:
    import sympy

    named = {name: getattr(sympy, name) for name in ("sqrt", "exp", "sin", "cos", "tan")}
    inverse = {f"arc{name}": getattr(sympy, f"a{name}") for name in ("sin", "cos", "tan")}
    logs = {name: lambda x, base=base: sympy.log(x, base) for name, base in (("log", 10), ("log10", 10), ("log2", 2))}
    return {**named, **inverse, **logs, "ln": sympy.log}
