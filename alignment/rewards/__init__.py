"""What judges text: a response in, a number out.

Not the place of learned judges' training, nor of win rates (`evaluation.win_rate`). Importing this package imports
nothing heavy; a reward loads what it needs when it is made.
"""

from alignment.rewards.base import RewardFunction
from alignment.rewards.registry import get_reward, list_rewards, reward_keys

__all__ = ["RewardFunction", "get_reward", "list_rewards", "reward_keys"]
