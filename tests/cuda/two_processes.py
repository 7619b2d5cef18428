"""One of two processes on simulated CUDA devices, with NCCL and gloo told apart; gloo does the work of both.

python two_processes.py exchanges            a little of everything that processes exchange
python two_processes.py run FOLDER           a whole run
python two_processes.py sum_by_nccl          the exchanges, with numbers of the host sent by NCCL
"""

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from checks import mutated, tune  # noqa: E402
from simulated_cuda import CudaTensor, simulated  # noqa: E402
from torch.utils._pytree import tree_flatten  # noqa: E402

from smart.distributed import World, join  # noqa: E402


@contextlib.contextmanager
def two_backends() -> Iterator[Counter[str]]:
    """Refuses what may not travel by a group, and counts the exchanges of each."""
    started, reduce, gather = dist.init_process_group, dist.all_reduce, dist.all_gather_object
    backends: list[str] = []
    traffic: Counter[str] = Counter()

    def init_process_group(backend: str, **options: Any) -> None:
        backends.append(backend)
        started("gloo", **options)

    def travel(group: Any, on_cuda: bool) -> None:
        by_nccl = group is None and backends == ["nccl"]
        if by_nccl != on_cuda:
            raise RuntimeError(f"a tensor on {'cuda' if on_cuda else 'cpu'} cannot travel by {by_nccl and 'NCCL'}")
        traffic["NCCL" if by_nccl else "gloo"] += 1

    def all_reduce(tensor: Any, *args: Any, group: Any = None, **options: Any) -> Any:
        travel(group, isinstance(tensor, CudaTensor))
        return reduce(tensor.held if isinstance(tensor, CudaTensor) else tensor, *args, group=group, **options)

    def all_gather_object(values: Any, value: Any, group: Any = None) -> Any:
        travel(group, any(isinstance(part, CudaTensor) for part in tree_flatten(value)[0]))
        return gather(values, value, group=group)

    with pytest.MonkeyPatch.context() as patch:
        for replaced in (init_process_group, all_reduce, all_gather_object):
            patch.setattr(dist, replaced.__name__, replaced)
        yield traffic


def exchange() -> None:
    with join(torch.device("cuda")) as world:
        assert world.sum(world.rank + 1, 0.5) == [3.0, 1.0]
        parts = world.gather({"rank": world.rank, "rows": torch.arange(world.rank + 1)})
        assert [part["rank"] for part in parts] == [0, 1]
        rows = world.gather_rows(torch.full((1, world.rank + 1), world.rank, device="cuda"), 7)
        assert rows.is_cuda and rows.tolist() == [[0, 7], [1, 1]]
        weight = torch.nn.Parameter(torch.zeros(2, 3, device="cuda"))
        weight.grad = torch.full_like(weight, 10.0**world.rank)
        world.sum_gradients([weight])
        assert bool((weight.grad == 11).all())


def main(what: str, folder: str = "") -> None:
    with two_backends() as traffic, simulated(devices=2):
        if what == "run":
            tune(Path(folder), grpo__prompts=3, grpo__rollouts_ahead=1, grpo__diversity=0.5)
        elif what == "exchanges":
            exchange()
        else:
            with mutated(World, "sum", "group=self.hosts", "group=None"):
                exchange()
    assert traffic["NCCL"] and traffic["gloo"]


if __name__ == "__main__":
    main(*sys.argv[1:])
