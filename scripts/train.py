"""Train from a recipe, for `accelerate launch` in a checkout; `alignment.runs.program` is the program.

accelerate launch scripts/train.py recipes/quickstart/dpo.yaml training.learning_rate=4e-5
"""

from alignment.errors import run_or_exit
from alignment.runs.program import main

if __name__ == "__main__":
    run_or_exit(main)
