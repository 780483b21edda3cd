"""Times and peak memory of one call, repeated, with everything that must be said about how they were taken."""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "numpy", "scikit-learn")
MEGABYTE = 1e6


def spread(values: Sequence[float], digits: int = 4) -> dict[str, float]:
    """Median, lowest and highest of the repeats, and how many there were.

    >>> spread([3.0, 1.0, 2.0])
    {'median': 2.0, 'low': 1.0, 'high': 3.0, 'repeats': 3}
    """
    low, middle, high = min(values), statistics.median(values), max(values)
    return {**{k: rounded(v, digits) for k, v in zip(("median", "low", "high"), (middle, low, high), strict=True)}} | {
        "repeats": len(values)
    }


def rounded(value: float, digits: int = 4) -> float:
    """To so many significant digits: more would say that a time is known better than it is.

    >>> rounded(0.0123456)
    0.01235
    """
    return float(f"{value:.{digits}g}")


def timed(ways: Mapping[str, Callable[[], Any]], repeats: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of each way, once a round: what disturbs the machine for a while disturbs all of them alike.

    Every round starts with another way, so that none always runs on what the one before left in the caches.
    """
    for run in ways.values():
        for _ in range(warm_up):
            run()
    times: dict[str, list[float]] = {name: [] for name in ways}
    order = list(ways)
    for _ in range(repeats):
        for name in order:
            began = time.perf_counter()
            ways[name]()
            times[name].append(time.perf_counter() - began)
        order = order[1:] + order[:1]
    return times


def compared(times: Mapping[str, Sequence[float]], to: str) -> dict[str, dict[str, Any]]:
    """Seconds of each way, and how many times the seconds of `to`, taken round by round."""
    return {
        name: {
            "seconds": spread(taken),
            "ratio": spread([mine / base for mine, base in zip(taken, times[to], strict=True)]),
        }
        for name, taken in times.items()
    }


def operations(run: Callable[[], Any]) -> int:
    """Floating-point operations in matrix products, convolutions and attention of one call.

    A count from shapes, the same on every machine: what a faster way spares in arithmetic, apart from what it spares
    in overhead.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def peak_extra_bytes(run: Callable[[], Any]) -> int | None:
    """How far the resident memory of this process rises above its level before, while `run` runs.

    The kernel keeps the highest level ever; it is set back before the call, which Linux allows and others do not:
    None there. Call it in a fresh process, where no freed memory waits to be used again.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    before = _status("VmRSS")
    run()
    return max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in /proc/self/status")


def in_fresh_process(function: Callable[..., Any], threads: int, **arguments: Any) -> Any:
    """What a function of a module returns in a process of its own, with so many threads."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_with_threads, function, threads, arguments).result()


def _with_threads(function: Callable[..., Any], threads: int, arguments: Mapping[str, Any]) -> Any:
    import torch

    torch.set_num_threads(threads)
    return function(**arguments)


def circumstances(threads: int) -> dict[str, Any]:
    """The machine, without its name; the versions; and how busy the machine was before the first measurement."""
    import torch

    from embedlens.records import machine

    return {
        "machine": machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": threads,
        "load_before": round(os.getloadavg()[0], 1),
        "versions": {package: version(package).split("+")[0] for package in PACKAGES},
    }
