"""Timing several contenders in turn, so that whatever else the machine does hits each alike."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch

Clock = Callable[[], float]


def clock(device: str, busy: bool = False) -> Clock:
    """Seconds: wall time once the device has done all it was given, or CPU time of this process on a busy machine."""
    if device == "cuda":
        return _gpu_clock
    return time.process_time if busy else time.perf_counter


def in_turn(calls: Mapping[str, Callable], repeats: int, clock: Clock) -> dict[str, list[float]]:
    """Milliseconds of `repeats` calls of each, interleaved, after one warm-up call of each."""
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            started = clock()
            call()
            times[name].append(1000 * (clock() - started))
    return times


def medians(calls: Mapping[str, Callable], repeats: int, clock: Clock) -> dict[str, float]:
    """Median milliseconds of each call; a call that raises is left out, so ask `why_not` for it first."""
    return {name: statistics.median(values) for name, values in in_turn(calls, repeats, clock).items()}


def why_not(call: Callable) -> str:
    """Runs a call once; "" if it works, else what it raised."""
    try:
        call()
    except Exception as error:  # compilers and peers raise what they like; the table goes on without them
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160] if str(error).strip() else ''}"
    return ""


def _gpu_clock() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()
