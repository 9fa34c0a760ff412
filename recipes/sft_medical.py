"""Staged supervised fine-tuning of a medical vision-language model, before RL.

accelerate launch recipes/sft_medical.py --config recipes/configs/lingshu_sft_7b.yaml   # Lingshu's plan on your data
accelerate launch recipes/sft_medical.py --config recipes/configs/sft_demo.yaml model=FOLDER   # in miniature, CPU
Add --dry-run to see every setting, --stage NAME for one stage alone.
"""

import sys

from lingshu_rl.cli import sft_main

if __name__ == "__main__":
    sys.exit(sft_main(sys.argv[1:]))
