"""Timing of several functions in one run, interleaved, so that a disturbance of the machine falls on all of them."""

from __future__ import annotations

import ctypes
import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

NOISY = 0.10  # spread above which a timing is called noisy
_SHORTEST = 1e-3  # seconds that one timing lasts at least: a faster call is repeated within it
_ROUNDS_AT_LEAST = 5
_ROUNDS_AT_MOST = 200
_SLOW = 1.0  # a call that takes longer is timed three times only


@dataclasses.dataclass
class Timing:
    """Seconds a call: median and quartiles over rounds."""

    median: float
    low: float  # first quartile
    high: float  # third quartile
    rounds: int

    @property
    def spread(self) -> float:
        """The distance of the quartiles as a share of the median."""
        return (self.high - self.low) / self.median if self.median else 0.0

    def as_dict(self) -> dict[str, float]:
        return {**dataclasses.asdict(self), "spread": self.spread}


def summary(values: list[float]) -> Timing:
    """Median and quartiles of some measurements (of seconds, or of a rate)."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return Timing(median, low, high, len(values))


def _time(call: Callable[[], Any], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def interleaved(
    calls: dict[str, Callable[[], Any]],
    seconds: float,
    limit: Callable[[], float] | None = None,
) -> tuple[dict[str, Timing], Timing | None]:
    """Times every call in turn, A-B-C-A-B-C, and the machine's limit once a round.

    Args:
        calls: what to time, by name. Each has run before: nothing here warms up, compiles or checks.
        seconds: about how long each of them is timed.
        limit: measures the machine's limit once and returns the rate.

    Returns:
        the timings by name, and the limit's rates in the same form (None without `limit`).
    """
    once = {name: _time(call, 1) for name, call in calls.items()}
    repeats = {name: max(1, round(_SHORTEST / max(t, 1e-9))) for name, t in once.items()}
    wanted = {
        name: 3 if t > _SLOW else min(_ROUNDS_AT_MOST, max(_ROUNDS_AT_LEAST, int(seconds / (t * repeats[name]))))
        for name, t in once.items()
    }
    measured: dict[str, list[float]] = {name: [] for name in calls}
    rates: list[float] = []
    rounds = max(wanted.values())
    for r in range(rounds):
        for name, call in calls.items():
            # one that needs fewer rounds is spread over the whole run
            if r * wanted[name] // rounds != (r + 1) * wanted[name] // rounds:
                measured[name].append(_time(call, repeats[name]))
        if limit is not None:
            rates.append(limit())
    return {name: summary(values) for name, values in measured.items()}, summary(rates) if limit is not None else None


def peak_memory(call: Callable[[], Any]) -> int | None:
    """How many bytes the process grows while `call` runs, at its highest; None where the system does not tell."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # or the call is served from memory that earlier ones have left
        with open("/proc/self/clear_refs", "w") as reset:
            reset.write("5")  # sets the highest to the current value
        before = _status("VmRSS")
        call()
        return max(0, _status("VmHWM") - before)
    except (OSError, KeyError, AttributeError):
        return None


def _status(name: str) -> int:
    with open("/proc/self/status") as status:
        values = dict(line.split(":", 1) for line in status if ":" in line)
    return int(values[name].split()[0]) * 1024
