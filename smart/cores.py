"""How a program shares the cores that it may use between its own threads and its render workers.

- Cores are those of the affinity mask, and no more than the control group allows; the processes that ``torchrun``
  started on a machine divide them evenly.
- On a CPU this process computes with a thread for each of its cores. On CUDA it uses one thread: it has little to
  compute, and where render workers hold the cores, a thread that waits for another takes hundreds of times as long.
- Workers: one for each core. They have one thread each (``smart.workers``).
- A thread that waits for others spins for a short time, then sleeps. OpenMP's own limit lets it spin for many
  milliseconds, longer than another program's turn on the core that the others need.

``OMP_NUM_THREADS``, ``OMP_WAIT_POLICY``, ``GOMP_SPINCOUNT`` and ``render.workers`` come first where they are set.
"""

import math
import os
from pathlib import Path

from smart.system import usable_cpus

SPINS = 1_000  # rounds of waiting before a thread sleeps, 25 to 75 microseconds; OpenMP's own are 300,000
GROUPS = Path("/sys/fs/cgroup")


def bound_spin() -> None:
    """Limit how long OpenMP's threads spin, unless the user did; in effect if torch has not been imported yet."""
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)


def usable_cores(groups: Path | None = None) -> int:
    """How many cores this process may use: those of its affinity mask, or its control group's share if that is less."""
    return max(min(usable_cpus(), math.ceil(_allowed(groups or GROUPS))), 1)


def _allowed(groups: Path) -> float:
    """The cores that a control group (version 2 or 1) gives to a container; infinity if it sets no limit."""
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            quota, period = " ".join((groups / name).read_text(encoding="ascii") for name in names).split()
            if quota != "max" and int(quota) > 0:
                return int(quota) / int(period)
        except (OSError, ValueError):
            continue
    return 1e9


def share(processes: int = 1) -> int:
    """How many cores, and so render workers, each of ``processes`` on this machine gets."""
    return max(usable_cores() // processes, 1)


def limit_threads(device: str, processes: int = 1) -> None:
    """Have torch use no more threads than each of ``processes`` needs that compute on a ``device`` of this type."""
    import torch

    most = 1 if device == "cuda" else share(processes)
    if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > most:
        torch.set_num_threads(most)


def summary(workers: int) -> str:
    """One line for the log of a run: what this process decided."""
    import torch

    cores, threads = usable_cores(), torch.get_num_threads()
    return (
        f"{cores} usable core{'s' * (cores > 1)}: {threads} thread{'s' * (threads > 1)} to compute, "
        f"{workers} render worker{'s' * (workers > 1)}"
    )
