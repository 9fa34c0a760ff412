"""lingshu-rl: reinforcement learning with verifiable rewards for medical vision-language models."""

__version__ = "0.1.0"
