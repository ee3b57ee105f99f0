"""What experiments over several seeds share: their YAML file read strictly, and numbers over seeds with an interval.

Not an experiment: `overoptimization` and `replication` are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from alignment.errors import UserError
from alignment.files import read_text


class Strict(BaseModel):
    """Base of the files' models: no unknown keys, no text for numbers."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


Model = TypeVar("Model", bound=Strict)


def read_experiment(path: Path, kind: type[Model]) -> Model:
    """The YAML file as a model of `kind`; UserError naming file and key for anything that is wrong."""
    try:
        return kind.model_validate(yaml.safe_load(read_text(path)))
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())[:200]}") from None
    except ValidationError as failed:
        first = failed.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(f"{path}: {where}: {first['msg']}, got {first['input']!r:.60}") from None


def over_seeds(values: Iterable[float]) -> dict[str, float | None]:
    """Mean and 95 % t interval over seeds: `mean`, `low`, `high`.

    NaN are left out. low and high are None with fewer than two seeds, mean with none.
    """
    from scipy.stats import t

    kept = [float(value) for value in values if not math.isnan(value)]
    if not kept:
        return {"mean": None, "low": None, "high": None}
    n, mean = len(kept), math.fsum(kept) / len(kept)
    if n < 2:
        return {"mean": mean, "low": None, "high": None}
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in kept) / (n - 1))
    half = float(t.ppf(0.975, n - 1)) * deviation / math.sqrt(n)
    return {"mean": mean, "low": mean - half, "high": mean + half}


def cell(found: Mapping[str, float | None], digits: int = 3) -> str:
    """`0.52 [0.50, 0.54]`; without the interval where there is one seed, a dash where there is no number.

    Seeds that are all alike have no spread to make an interval of: `0.52 (every seed)`.
    """
    mean, low, high = found["mean"], found["low"], found["high"]
    if mean is None:
        return "–"
    if low is None or high is None:
        return f"{mean:.{digits}f}"
    if low == high:
        return f"{mean:.{digits}f} (every seed)"
    return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
