"""Peak memory of one video: the GPU's allocations, or the process's resident memory on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def start_peak(device: Any) -> None:
    """Forget earlier peaks, where the system can."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        CLEAR.write_text("5")
    except OSError:  # not Linux, or not allowed: the peak is the process's since its start
        return


def peak(device: Any) -> int:
    """Bytes at the most since `start_peak`."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        line = next(x for x in STATUS.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
