"""Two processes on CUDA: what travels by NCCL lies on the device, what travels by gloo on the host."""

from pathlib import Path

import pytest
from simulated_cuda import reason_not_to_run
from test_distributed import finish, start_two

from smart.run import read_metrics

pytestmark = [
    pytest.mark.slow,  # whole programs
    pytest.mark.skipif(bool(reason_not_to_run()), reason=reason_not_to_run()),
]
SCRIPT = str(Path(__file__).parent / "two_processes.py")


def test_exchanges() -> None:
    codes, output = finish(start_two(SCRIPT, "exchanges"))
    assert codes == [0, 0], output


def test_numbers_of_the_host_that_travel_by_nccl_are_found() -> None:
    codes, output = finish(start_two(SCRIPT, "sum_by_nccl"))
    assert all(codes) and "a tensor on cpu cannot travel by NCCL" in output, output


def test_a_run(tmp_path: Path) -> None:
    codes, output = finish(start_two(SCRIPT, "run", str(tmp_path)))
    assert codes == [0, 0], output
    assert len(read_metrics(tmp_path / "r")) == 4
