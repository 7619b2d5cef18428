"""The result of one check of a device: what was measured, what it may be, and what to switch off."""

import math
from collections.abc import Mapping
from typing import NamedTuple

OK, DIFFERS, FAILED = "ok", "DIFFERS", "FAILED"
MEASURED, SKIPPED = "measured", "skipped"
BAD = {DIFFERS, FAILED}

LESS_MEMORY = "--set grpo.micro_batch=8 --set reward.options.batch_size=2"


class Check(NamedTuple):
    """One row of the table; ``values`` are its numbers for the JSON line."""

    name: str
    verdict: str
    found: str
    values: Mapping[str, float] = {}
    remedy: str = ""  # if the verdict is bad: what to switch off


def compare(name: str, values: Mapping[str, float], limits: Mapping[str, float], remedy: str) -> Check:
    """A check that each value with a limit is at most that; NaN is not."""
    parts = [
        f"{key} {value:.3g}" + (f" (limit {limits[key]:g})" if key in limits else "") for key, value in values.items()
    ]
    good = all(values[key] <= limit for key, limit in limits.items())
    return Check(name, OK if good else DIFFERS, ", ".join(parts), values, "" if good else remedy)


def measured(name: str, values: Mapping[str, float], unit: str) -> Check:
    """Numbers that have no limit."""
    return Check(name, MEASURED, ", ".join(f"{key} {value:.3g} {unit}" for key, value in values.items()), values)


def finite(values: Mapping[str, float]) -> dict[str, float | None]:
    """``values`` as JSON can hold them: None for NaN and infinity."""
    return {key: value if math.isfinite(value) else None for key, value in values.items()}
