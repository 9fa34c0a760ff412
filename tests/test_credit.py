"""Credit by token: exact sums, masked members, places in the sampled tokens with the tokenizers of real families."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lingshu_rl.advantages import Placed, group_advantages, span_credit
from lingshu_rl.credit import placed, token_ranges
from lingshu_rl.demo.reward import demo_spec
from lingshu_rl.failures import ConfigError
from lingshu_rl.objective import AdvantageConfig
from lingshu_rl.planning.given import load_config
from lingshu_rl.policy import check_choices
from lingshu_rl.train import advantages_of, credit_of, mask_truncated
from lingshu_rl.types import Group, Rollout, Scored
from rewards import RewardInput, RewardResult, build

NO_STD = AdvantageConfig("no_std")


def test_by_hand() -> None:
    """Two findings; the second member has the first one wrong and does not name the other."""
    rewards = [1.0, 0.0]
    places = [Placed(4, {"side": [(0, 2, 0.5)], "size": [(3, 4, 0.5)]}), Placed(4, {"side": [(0, 1, 0.0)]})]
    right, wrong = span_credit(rewards, group_advantages(rewards, NO_STD), places)
    # Each finding is 0.25 above or below its mean: of the first member's advantage of 0.5 nothing is left for the rest.
    assert [0.5 + d for d in right] == pytest.approx([0.25 * 4 / 2, 0.25 * 4 / 2, 0.0, 0.25 * 4])
    assert [-0.5 + d for d in wrong] == pytest.approx([-0.25 - 0.25 * 4, -0.25, -0.25, -0.25])


def test_what_all_of_a_group_state_alike_is_neither_rewarded_nor_punished() -> None:
    rewards = [0.75, 0.25, 0.25]
    alike = {"plane": [(0, 2, 0.25)]}
    places = [Placed(5, alike | {"level": [(2, 4, 0.5)]}), *[Placed(5, alike | {"level": [(2, 4, 0.0)]})] * 2]
    advantages = group_advantages(rewards, NO_STD)
    for own, credit in zip(advantages, span_credit(rewards, advantages, places), strict=True):
        tokens = [own + d for d in credit]
        assert tokens[:2] == pytest.approx([0, 0]) and tokens[4] == pytest.approx(0)
        assert tokens[2] == tokens[3] == pytest.approx(own * 5 / 2)


tokens = st.integers(1, 30)
spans = st.tuples(st.integers(0, 29), st.integers(1, 8), st.floats(-1, 1))
placings = st.dictionaries(st.sampled_from("abc"), st.lists(spans, min_size=1, max_size=3))
members = st.tuples(st.none() | st.floats(-1, 1.2), tokens, placings)


@given(st.lists(members, min_size=2, max_size=8), st.sampled_from(["group", "no_std", "leave_one_out"]))
def test_the_credit_of_a_completion_is_the_plain_one(group, variant: str) -> None:
    """Whatever the spans: overlapping, of one name or several, in masked members. Fractions alone are rounded."""
    rewards = [reward for reward, _, _ in group]
    places = [
        Placed(n, {k: [(a % n, min(a % n + m, n), p) for a, m, p in all_k] for k, all_k in own.items()})
        for _, n, own in group
    ]
    advantages = group_advantages(rewards, AdvantageConfig(variant))
    for place, credit in zip(places, span_credit(rewards, advantages, places), strict=True):
        assert len(credit) == place.tokens
        scale = max(map(abs, credit), default=0.0)
        assert math.fsum(credit) == pytest.approx(0, abs=1e-12 * place.tokens * max(scale, 1))


def test_masked_members_count_for_nothing() -> None:
    one, other = Placed(4, {"a": [(0, 2, 0.8)]}), Placed(4, {"a": [(1, 3, 0.2)]})
    masked = Placed(4, {"a": [(0, 4, -1.0)]})
    rewards = [0.8, 0.2]
    plain = span_credit(rewards, group_advantages(rewards, NO_STD), [one, other])
    holed = [0.8, None, 0.2]
    found = span_credit(holed, group_advantages(holed, NO_STD), [one, masked, other])
    assert [found[0], found[2]] == plain


def test_a_group_without_contrast_has_no_credit_to_place() -> None:
    places = [Placed(3, {"a": [(0, 1, 0.5)]}), Placed(3, {"b": [(0, 1, 0.5)]})]
    assert [*map(set, span_credit([0.5, 0.5], [0.0, 0.0], places))] == [{0.0}, {0.0}]


# ------------------------------------------------------------ from characters to sampled tokens

TEXTS = (
    "<think> axial </think><answer> Plane: axial. Width: 140 mm. </answer>",
    "Große Läsion (≥ 3 cm²) im linken Unterlappen – Verdacht auf Pneumonie.",
    "左肺下叶见斑片状高密度影，考虑肺炎。No effusion. 心影增大 🫁👩🏽‍⚕️ é",
    "  two  blanks,\n\ta tab and\u00a0more … ",
)


@dataclass(frozen=True)
class Spelling:
    """A tokenizer. bytes_of: what a token stands for, which the library does not ask."""

    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    bytes_of: Callable[[int], bytes]


def byte_level(tokenizer, decode) -> Spelling:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    bytes_by_letter = {letter: byte for byte, letter in bytes_to_unicode().items()}
    added = {i: token.content for i, token in tokenizer.added_tokens_decoder.items()}

    def bytes_of(i: int) -> bytes:
        return (
            added[i].encode() if i in added else bytes(bytes_by_letter[c] for c in tokenizer.convert_ids_to_tokens(i))
        )

    return Spelling(lambda text: tokenizer(text)["input_ids"], decode, bytes_of)


@pytest.fixture(scope="module", params=["demo", "sentencepiece", "tekken"])
def spelling(request, tmp_path_factory) -> Spelling:
    """The demo's byte-level BPE, Llama's SentencePiece with pieces of a byte, Mistral's Tekken."""
    if request.param == "demo":
        from lingshu_rl.model.encoder import PromptEncoder

        encoder = PromptEncoder("demo")
        return byte_level(encoder.tokenizer, encoder.decode)
    data = Path(pytest.importorskip("mistral_common").__file__).parent / "data"
    if request.param == "tekken":
        from mistral_common.tokens.tokenizers.tekken import SpecialTokenPolicy, Tekkenizer

        tekken = Tekkenizer.from_file(str(data / "tekken_240911.json"))
        return Spelling(
            lambda text: tekken.encode(text, bos=False, eos=False),
            lambda ids: tekken.decode(list(ids), special_token_policy=SpecialTokenPolicy.KEEP),
            lambda i: tekken.id_to_byte_piece(i, SpecialTokenPolicy.KEEP),
        )
    from transformers import LlamaTokenizer

    folder = tmp_path_factory.mktemp("llama")
    shutil.copy(data / "tokenizer.model.v1", folder / "tokenizer.model")
    llama = LlamaTokenizer.from_pretrained(folder)

    def bytes_of(i: int) -> bytes:
        piece = llama.convert_ids_to_tokens(i)
        return bytes([int(piece[1:-1], 16)]) if piece.startswith("<0x") else piece.replace("▁", " ").encode()

    return Spelling(lambda text: llama(text, add_special_tokens=False)["input_ids"], llama.decode, bytes_of)


@pytest.mark.parametrize("text", TEXTS)
def test_a_span_has_the_tokens_that_hold_its_characters_and_no_other(spelling: Spelling, text: str) -> None:
    """Against the bytes of the tokens; also for a spelling of one character after another, which sampling may take."""
    slow = [i for character in text for i in spelling.encode(character)]
    for ids in (spelling.encode(text), slow):
        text, pieces = spelling.decode(ids), [spelling.bytes_of(i) for i in ids]
        blank = len(b"".join(pieces)) - len(text.encode())  # of SentencePiece, which leaves out the first one
        assert text and b"".join(pieces)[blank:] == text.encode()
        ends = [max(end - blank, 0) for end in accumulate(map(len, pieces))]
        at = [len(text[:k].encode()) for k in range(len(text) + 1)]
        for start in range(len(text)):
            for end in {start + 1, min(start + 7, len(text)), len(text)}:
                inside = [n for n, (a, b) in enumerate(pairwise([0, *ends])) if a < at[end] and b > max(a, at[start])]
                [(first, stop)] = token_ranges(ids, text, [(start, end)], spelling.decode)
                assert [*range(first, stop)] == inside, (text[start:end], [pieces[n] for n in inside])


def test_pieces_of_one_character_belong_to_it_together(spelling: Spelling) -> None:
    ids = spelling.encode("a🫁b")
    text = spelling.decode(ids)
    place = text.index("🫁")
    [lung, behind] = token_ranges(ids, text, [(place, place + 1), (place + 1, place + 2)], spelling.decode)
    assert lung[1] - lung[0] >= 2 and "🫁".encode() in b"".join(map(spelling.bytes_of, ids[slice(*lung)]))
    assert behind[0] >= lung[1] - 1


def scored(ids, text: str, result: RewardResult) -> Scored:
    return Scored(Rollout(None, 0, text, (1,), tuple(ids), (0.0,) * len(ids), "stop", 0), result)


def test_the_end_of_the_turn_earns_what_the_rest_earns() -> None:
    from lingshu_rl.model.encoder import PromptEncoder

    encoder = PromptEncoder("demo")
    ids = [*encoder.tokenizer("Plane: axial.")["input_ids"], min(encoder.eos_ids)]
    text = encoder.decode(ids)
    member = scored(ids, text, RewardResult(1.0, spans={"plane": [(0, len(text), 1.0)]}))
    found = placed(member, encoder.decode)
    assert found == Placed(len(ids), {"plane": [(0, len(ids) - 1, 1.0)]})
    credit, _ = span_credit([1.0, 0.0], [0.5, -0.5], [found, replace(found, spans={})])
    assert credit[-1] == pytest.approx(-0.5) and 0.5 + credit[0] == pytest.approx(0.5 * len(ids) / (len(ids) - 1))


def test_a_group_of_the_demo_comes_to_the_update_with_a_credit_for_every_token() -> None:
    """Real tokens and the real reward; nothing is kept of a failed and of a cut member."""
    from lingshu_rl.model.encoder import PromptEncoder

    encoder, reward = PromptEncoder("demo"), build(demo_spec())
    config = load_config(None, ["advantage.spans=1", "advantage.variant=no_std", "loss.mask_truncated=true"])
    run = SimpleNamespace(config=config, encoder=encoder, rewards=SimpleNamespace(noise=None))
    members = []
    for plane, width in (("axial", 120), ("axial", 140), ("coronal", 120), ("coronal", 140)):
        text = f"<think> {plane} </think><answer> Plane: {plane}. Width: {width} mm. </answer>"
        ids = [*encoder.tokenizer(text)["input_ids"], min(encoder.eos_ids)]
        sample = RewardInput(encoder.decode(ids), "Plane: axial. Width: 120 mm.", kind="report")
        members.append(scored(ids, sample.completion, reward.score(sample)))
    members.append(replace(members[0], result=RewardResult(None, "error")))
    members.append(replace(members[0], rollout=replace(members[0].rollout, finish_reason="length")))
    group = Group(None, tuple(members))
    advantages = mask_truncated(group, advantages_of(group, config), config)
    credit = credit_of(run, group, advantages)
    assert [len(one) for one in credit] == [len(m.rollout.token_ids) for m in members[:4]]
    both, plane_alone, width_alone, neither = (
        {word: a + d for word, d in zip(map(encoder.tokenizer.decode, member.rollout.token_ids), one, strict=True)}
        for member, one, a in zip(members, credit, advantages, strict=False)
    )
    # the thought's word and the answer's are one token, of which the dictionaries keep the answer's
    assert both[" axial"] == pytest.approx(plane_alone[" axial"]) and both[" axial"] > 0 > neither[" coronal"]
    assert width_alone[" 120"] == pytest.approx(both[" 120"]) and width_alone[" 120"] > 0 > plane_alone[" 140"]
    for one in (both, plane_alone, width_alone, neither):
        assert one["<answer>"] == pytest.approx(one["</answer>"]) == pytest.approx(0, abs=1e-9)


# ------------------------------------------------------------ settings


def test_only_a_share_may_go_to_the_spans() -> None:
    rewards, places = [1.0, 0.0], [Placed(4, {"a": [(0, 2, 1.0)]}), Placed(4, {"a": [(1, 2, 0.0)]})]
    advantages = group_advantages(rewards, NO_STD)
    whole, half = (span_credit(rewards, advantages, places, share) for share in (1.0, 0.5))
    assert [[2 * d for d in credit] for credit in half] == [list(credit) for credit in whole]
    with pytest.raises(ConfigError, match=r"advantage.spans=2"):
        load_config(None, ["advantage.spans=2"])


@pytest.mark.parametrize("loss", ["gspo", "gmpo"])
def test_losses_of_whole_sequences_refuse_it_by_name(loss: str) -> None:
    with pytest.raises(ConfigError, match=f"loss.variant={loss} has one ratio"):
        check_choices(load_config(None, [f"loss.variant={loss}", "advantage.spans=1"]))
    check_choices(load_config(None, [f"loss.variant={loss}"]))


def test_parts_that_are_normalised_one_by_one_refuse_it() -> None:
    with pytest.raises(ConfigError, match="gdpo"):
        load_config(None, ["advantage.spans=1", "advantage.variant=gdpo"])


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "dapo", "cispo", "sapo", "dppo"])
def test_in_every_loss_by_token_a_token_has_the_gradient_of_its_own_advantage(loss: str) -> None:
    """On the first step: that of a batch in which the whole completion had the token's advantage."""
    from lingshu_rl.losses import policy_loss
    from lingshu_rl.objective import LossConfig

    sequence_T, advantages = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0.5, -1.0])
    credit_T = torch.tensor([1.0, -0.25, -0.75, 2.0, -2.0])
    base_T = torch.log(torch.tensor([0.5, 0.2, 0.9, 0.4, 0.7]))

    def gradient(advantages, credit_T=None):
        logprobs_T = base_T.clone().requires_grad_()
        policy_loss(
            logprobs_T, sequence_T=sequence_T, advantages=advantages, config=LossConfig(loss), total_tokens=5,
            total_sequences=2, max_tokens=8, rollout_logprobs_T=base_T, credit_T=credit_T,
        )[0].backward()  # fmt: skip
        return logprobs_T.grad

    found = gradient(advantages, credit_T)
    for t in range(5):
        alone = gradient(torch.full((2,), float(advantages[sequence_T[t]] + credit_T[t])))
        assert found[t] == pytest.approx(float(alone[t]), abs=1e-7)
    assert torch.equal(gradient(advantages), gradient(advantages, torch.zeros(5)))
