"""The tabular lab: preference games small enough to solve, and the project's own objectives played on them.

    from alignment.games import duality_gap, nash_policy
    pi = nash_policy(preference, ref_logits, beta=0.01)     # log-probabilities [..., n], to 1e-12
    duality_gap(logits, ref_logits, preference, beta=0.01)  # [...], 0 iff softmax(logits) is pi
    alignment games run recipes/games/egpo.yaml             # gap against updates, all methods on the same games

Knows no language model, no recipe file, no trainer. `preferences`: who beats whom; `solution`: values, best responses,
Nash policies; `gradients` and `methods`: an objective on enumerated responses; `rates`: linearised rates; `lab`:
experiments; `report` and `figure`: what is shown of them. What was measured: docs/games.md.
"""

from alignment.games.solution import best_response, duality_gap, exploitability, nash_policy, value

__all__ = ["best_response", "duality_gap", "exploitability", "nash_policy", "value"]
