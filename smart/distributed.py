"""Run as one process, or as several that ``torchrun`` started.

Each process runs the same program on its own share of every batch. ``World`` knows which process this is, and sums and
gathers values over all of them; with one process it costs nothing. Only the lead (rank 0) writes files and prints.

Numbers and objects are exchanged between the hosts (gloo), gradients between the devices (NCCL on CUDA). If a process
dies, the others notice at their next exchange and stop too; torchrun's report names the one that died first.
"""

import os
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import IO, Any, TypeVar

import click
import torch
import torch.distributed as dist

from smart import Failure, UserError, brief
from smart.cores import limit_threads

TIMEOUT = timedelta(minutes=10)  # how long a process waits for the others before it gives up

T = TypeVar("T")

_KEPT: list[Any] = []  # groups of gloo that were left


class _Told(click.ClickException):
    """Ends this process without a line, since another process says why all of them end."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]  # click reads it from the instance

    def show(self, file: IO[Any] | None = None) -> None:
        pass


@dataclass(frozen=True)
class World:
    """This process, one of ``size``; ``neighbours`` processes, including this one, share its machine."""

    device: torch.device
    rank: int = 0
    size: int = 1
    neighbours: int = 1
    hosts: Any = None  # the process group of the hosts

    @property
    def lead(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """This process's share of ``count`` items: consecutive ones; shares differ by at most one item."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by rank; every process gets all of them. Tensors must be on the CPU."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        self._exchange(lambda: dist.all_gather_object(values, value, group=self.hosts))
        return values

    def gather_rows(self, rows: torch.Tensor, filler: float = 0) -> torch.Tensor:
        """The rows (n, L) of all processes as (N, longest L) on this device: by rank, padded on the right."""
        parts = self.gather(rows.cpu())
        longest = max(part.shape[1] for part in parts)
        pad = torch.nn.functional.pad
        return torch.cat([pad(part, (0, longest - part.shape[1]), value=filler) for part in parts]).to(self.device)

    def sum(self, *values: float) -> list[float]:
        """The sum of each value over all processes, in float64; every process gets the same result."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        self._exchange(lambda: dist.all_reduce(total, group=self.hosts))
        return [float(value) for value in total.tolist()]

    def wait(self) -> None:
        """Wait until all processes have come this far."""
        self.sum(0)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process; every process gets the same result at the same point."""
        return self.sum(float(flag))[0] > 0

    @contextmanager
    def together(self) -> Iterator[None]:
        """If the block raises ``UserError`` or ``Failure`` in one process, all end; one of them says why.

        The block must not exchange anything with other processes.
        """
        problem: UserError | Failure | None = None
        try:
            yield
        except (UserError, Failure) as error:
            problem = error
        if problem is not None and self.size == 1:
            raise problem
        found = self.gather(None if problem is None else (problem.message, problem.exit_code))
        first, told = next(((rank, one) for rank, one in enumerate(found) if one is not None), (0, None))
        if told is None:
            return
        if problem is not None and self.rank == first:
            named = type(problem)(f"{self._name()}: {problem.message}" if first else problem.message)
            named.exit_code = problem.exit_code  # type: ignore[misc]  # click reads it from the instance
            raise named
        raise _Told(*told) from None

    def confirm(self, what: Mapping[str, object], then: str, *, error: type[click.ClickException] = UserError) -> None:
        """End all processes with ``error`` if the values of ``what`` differ; the lead names one, and who has it.

        ``then`` says what to do.
        """
        if self.size == 1:
            return
        found = self.gather((self._name(), {key: repr(value) for key, value in what.items()}))
        name, values = found[0]
        for other, others in found[1:]:
            for key in values.keys() | others.keys():
                here, there = values.get(key, "nothing"), others.get(key, "nothing")
                if here != there:
                    message = f"{other} has another {key} than {name}: {there[:80]} instead of {here[:80]}; {then}"
                    raise error(message) if self.lead else _Told(message, error.exit_code)

    def _name(self) -> str:
        return f"process {self.rank} ({socket.gethostname()})"

    def sum_gradients(self, parameters: Iterable[torch.Tensor]) -> None:
        """Sum the gradients of all processes, in place, in one exchange."""
        if self.size == 1:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        self._exchange(lambda: dist.all_reduce(flat))
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def _exchange(self, exchange: Callable[[], Any]) -> None:
        try:
            exchange()
        except RuntimeError as error:  # raised by gloo and NCCL
            reason = str(error).strip().splitlines()[0][:200]
            raise click.ClickException(
                f"process {self.rank} of {self.size} lost contact with another and stops ({reason}); torchrun's report "
                "names the first that failed. The last checkpoint is kept; run the same command with --resume"
            ) from None


def _started_with_others() -> bool:
    """Whether the environment is that of one of several processes. Raises ``UserError`` if it is so only in part."""
    names = ("RANK", "MASTER_ADDR", "MASTER_PORT")
    size = _number("WORLD_SIZE", 1)
    missing = [name for name in names if not os.environ.get(name)]
    if size is None or (size == 1 and missing):
        return False
    if missing:
        raise UserError(
            f"WORLD_SIZE = {size} is set in the environment, but not {', '.join(missing)}: start the program with "
            "torchrun, which sets all of them, or unset WORLD_SIZE"
        )
    if (rank := _number("RANK", 0)) is not None and rank >= size:
        raise UserError(f"RANK = {rank} in the environment: expected less than WORLD_SIZE = {size}; use torchrun")
    for name, low in (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1), ("MASTER_PORT", 0)):
        _number(name, low)
    return True


def _number(name: str, low: int) -> int | None:
    """A whole number from the environment, at least ``low``; None if it is not set."""
    text = os.environ.get(name, "")
    if not text:
        return None
    if not text.isdecimal() or int(text) < low:
        raise UserError(
            f"{name} = {text!r} in the environment: expected a whole number from {low}, as torchrun sets it; unset it, "
            "or start the program with torchrun"
        )
    return int(text)


@contextmanager
def join(device: torch.device) -> Iterator[World]:
    """Connect to the other processes if torchrun started this one (it sets WORLD_SIZE), and disconnect at the end.

    On CUDA each process takes the device of its local rank. Raises ``UserError`` if a machine has fewer devices
    than processes, or the environment is not as torchrun sets it; ``Failure`` if the others stay away for ``TIMEOUT``.
    """
    if not _started_with_others() or not dist.is_available():
        yield World(device)
        return
    if device.type == "cuda":
        local, devices = _number("LOCAL_RANK", 0) or 0, torch.cuda.device_count()
        if local >= devices:
            raise UserError(
                f"torchrun started more processes than this machine has CUDA devices ({devices}); "
                f"use --nproc-per-node {devices}, or run.device = 'cpu'"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    on_cuda = device.type == "cuda"
    try:
        dist.init_process_group("nccl" if on_cuda else "gloo", timeout=TIMEOUT)
    except (RuntimeError, ValueError, OSError) as error:  # which of them depends on the backend
        place, minutes = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}", TIMEOUT.total_seconds() / 60
        raise Failure(
            f"process {os.environ['RANK']} of {os.environ['WORLD_SIZE']} did not find all others at {place} within "
            f"{minutes:g} minutes ({brief(error)})"
        ) from None
    hosts = dist.new_group(backend="gloo", timeout=TIMEOUT) if on_cuda else None
    # the end of a gloo group joins its threads while it holds Python's lock, which one of them may still wait for in
    # order to let go of a tensor: so the group stays until this process ends
    _KEPT.append(hosts or dist.group.WORLD)
    neighbours = _number("LOCAL_WORLD_SIZE", 1) or 1
    limit_threads(device.type, neighbours)
    try:
        yield World(device, dist.get_rank(), dist.get_world_size(), neighbours, hosts)
    except SystemExit:  # all processes have agreed to stop
        dist.destroy_process_group()
        raise
    # not if this process fails alone: NCCL would wait for all the others, which wait for this one. When it ends, its
    # connections close, and torchrun stops the rest
    dist.destroy_process_group()
