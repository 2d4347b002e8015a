"""The device in words, for records and tables."""

import os
import platform
from pathlib import Path

import torch


def device_name(device: torch.device | str) -> str:
    """The GPU's name, or the CPU's with the cores this process may use and its vector instructions."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{_cpu_model()}, {cores} cores, {torch.backends.cpu.get_cpu_capability()}"


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
