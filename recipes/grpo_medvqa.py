"""GRPO with verifiable rewards on medical visual questions.

accelerate launch recipes/grpo_medvqa.py                                   # the embedded demo, CPU or GPU
accelerate launch recipes/grpo_medvqa.py --config recipes/configs/lingshu_rl_7b.yaml train.lr=5e-7
accelerate launch recipes/grpo_medvqa.py --dry-run                         # settings and devices, loads no model
"""

import sys

from lingshu_rl.cli import train_main

if __name__ == "__main__":
    sys.exit(train_main(sys.argv[1:]))
