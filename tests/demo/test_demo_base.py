"""The stages' data: what a supervised stage trains on is the demo's own rows, with their labels."""

from lingshu_rl.data.rows import row_to_prompt
from lingshu_rl.demo.policy import training_rows
from lingshu_rl.demo.questions import sft_text
from lingshu_rl.demo.reward import demo_spec
from lingshu_rl.sft.examples import completion_of
from rewards.compose import build


def test_a_stage_trains_the_ideal_completion_of_every_row_and_the_reward_pays_it_in_full():
    rows, folder = training_rows()
    reward = build(demo_spec())
    for row in rows:
        prompt = row_to_prompt(row, base_dir=folder, instruction="short")
        text = completion_of(prompt, "think")
        assert text == sft_text(row)
        assert reward.score(prompt.reward_input(text, False)).value == 1.0, row["id"]
