"""Staged supervised fine-tuning: TRL's SFTTrainer once a stage, each on other rows, parts and learning rates.

    shallow alignment -> deep alignment -> instruction tuning, then RL (train.py)

A stage trains the parts that its `lr` names (vision, projector, language); the others are frozen. It starts from the
model of the stage before, ends with an ordinary Hugging Face folder, and is measured on held-out questions by the
rewards.

    DIR/<stage>/model/          the model after the stage          DIR/<stage>/metrics.jsonl   TRL's log
    DIR/<stage>/checkpoints/    while it runs                      DIR/eval/<stage>.jsonl      graded questions
    DIR/summary.json table.md   accuracy and gain by stage         DIR/eval/start.jsonl        those before the first
"""
