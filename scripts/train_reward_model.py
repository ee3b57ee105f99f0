"""A reward model from a recipe, for `accelerate launch` in a checkout; `alignment.runs.program` is the program.

accelerate launch scripts/train_reward_model.py recipes/quickstart/reward_model.yaml
"""

from alignment.errors import run_or_exit
from alignment.runs.program import main_reward_model

if __name__ == "__main__":
    run_or_exit(main_reward_model)
