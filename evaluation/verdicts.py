"""What a rate, its interval and its test let one say: one rule for terminal, Markdown, pages and `compare`.

A claim needs all three: enough prompts, an interval that leaves one half out, and a test. Each alone says too much: a
bootstrap over four prompts that were all won is [100, 100], beside p = 0.12.
"""

from __future__ import annotations

LEVEL = 0.95
ALPHA = 1 - LEVEL
LEAST_PROMPTS = 20  # under this many nothing is claimed; the number is ours
BETTER, WORSE = "better", "worse"
NO_DIFFERENCE = "no significant difference"
TOO_FEW = "too few prompts to tell"


def verdict(prompts: int, low: float, high: float, p_value: float, middle: float = 0.5) -> str:
    """`better`, `worse`, `no significant difference`, or `too few prompts to tell`.

    Args:
        prompts: independent ones that were judged.
        low, high: limits of the interval that is shown (`intervals.readable`).
        p_value: of the test of "no difference", adjusted where several are tested.
        middle: no difference, in the limits' unit.
    """
    if prompts < LEAST_PROMPTS:
        return TOO_FEW
    if p_value > ALPHA + 1e-12:
        return NO_DIFFERENCE
    return BETTER if low > middle else WORSE if high < middle else NO_DIFFERENCE


def sentence(prompts: int, low: float, high: float, p_value: float, middle: float = 0.5) -> str:
    """The verdict on a model against its baseline with its reason, without a full stop; arguments as of `verdict`."""
    said = verdict(prompts, low, high, p_value, middle)
    if said == TOO_FEW:
        return f"{TOO_FEW}: {prompts}, and a claim needs {LEAST_PROMPTS}"
    if said == BETTER:
        return "better than the baseline by this judge: the interval lies above one half, and the test agrees"
    if said == WORSE:
        return "worse than the baseline by this judge: the interval lies below one half, and the test agrees"
    contained = low <= middle <= high
    why = "the interval contains one half" if contained else f"the test's p-value is above {ALPHA:.2g}"
    return f"{NO_DIFFERENCE} from the baseline: {why}"
