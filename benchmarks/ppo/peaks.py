"""The largest resident size that a process has had. Imports nothing of Plaudit: environments without it use this."""

import os
from pathlib import Path


def peak_resident_mib(pid: int | None = None) -> float:
    """MiB of this process or another one, on Linux: VmHWM, which `/proc/PID/clear_refs` sets back."""
    status = Path(f"/proc/{os.getpid() if pid is None else pid}/status").read_text(errors="replace")
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM:")).split()[1]) / 1024
