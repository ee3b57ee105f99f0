"""Supervised fine-tuning from a recipe, for `accelerate launch` in a checkout; `alignment.runs.program` does it.

accelerate launch scripts/sft.py recipes/quickstart/sft.yaml
"""

from alignment.errors import run_or_exit
from alignment.runs.program import main_sft

if __name__ == "__main__":
    run_or_exit(main_sft)
