"""One process, or several that ``torchrun`` started, acting as one.

Each process runs the same program on its own share of every batch. ``World`` says which process this is and
adds numbers up over all of them; alone, it costs nothing. Only the lead (rank 0) writes files and talks.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from smart import UserError

TIMEOUT = timedelta(minutes=10)  # how long a process waits for the others before it gives up


@dataclass(frozen=True)
class World:
    """This process among ``size``; ``device`` is its own."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def lead(self) -> bool:
        """Whether this is the process that writes files and talks."""
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Each value added up over all processes, in float64; every process gets the same answer."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return [float(value) for value in total.tolist()]

    def any(self, flag: bool) -> bool:
        """Whether the flag is up in any process; every process gets the same answer, at the same moment."""
        return self.sum(float(flag))[0] > 0


@contextmanager
def join(device: torch.device) -> Iterator[World]:
    """Meet the other processes, where torchrun started this one (it sets WORLD_SIZE), and part from them at the end.

    On CUDA each process takes the device of its local rank. Raises ``UserError`` where a machine has fewer
    devices than processes.
    """
    if "WORLD_SIZE" not in os.environ or not dist.is_available():
        yield World(device)
        return
    if device.type == "cuda":
        local, devices = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= devices:
            raise UserError(
                f"this machine has {devices} CUDA devices and torchrun started more processes here: "
                f"use --nproc-per-node {devices}, or run.device = 'cpu'"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield World(device, dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
