"""A run on CUDA checks its sampler on the first batches, and falls back, or stops before it learns."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checks import mutated, tune
from simulated_cuda import simulated

from smart import Failure
from smart.run import read_metrics
from smart.sampler import graph, network

pytestmark = pytest.mark.slow  # whole programs
SHORT: dict[str, Any] = {
    "grpo__iterations": 2, "track__held_out_every": 0, "track__final_prompts": 2, "sampling__max_new_tokens": 20,
    "render__seconds": 1.0, "track__checkpoint_every": 1,
}  # fmt: skip


@pytest.fixture
def stale_weights() -> Iterator[None]:
    """A graph that does not see what the optimiser has changed."""
    with mutated(graph, "_fill", "held.copy_(now)", "pass"):
        yield


@pytest.fixture
def baked_in_length() -> Iterator[None]:
    with mutated(graph, "_step", "slots.cache, column)", "slots.cache, column * 0 + 5)"):
        yield


@pytest.mark.parametrize("filters", [{}, {"sampling__top_k": 20, "sampling__top_p": 0.9}], ids=str)
def test_they_agree(filters: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with simulated() as device:
        made = tune(tmp_path, **SHORT, **filters)
    said = "".join(capsys.readouterr())
    assert said.count("sampler and learner agree: log-probabilities differ by 0.0") == 1 and "Warning" not in said
    assert device.counts["replay"] and (made / "checkpoints" / "00000002" / "devices.txt").read_text() == "simulated"


def test_a_bad_graph_is_left(baked_in_length: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line, the same random numbers, and from then on the run goes as it would without graphs."""
    with simulated() as device:
        made = tune(tmp_path / "bad", **SHORT)
        assert sum(entry[0] == "capture" for entry in device.log) == 1
    said = "".join(capsys.readouterr())
    assert said.count("Warning: the sampler's log-probabilities differ from the learner's by") == 1
    assert "sampling step by step from now on" in said
    with simulated(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("smart.sampler.sample.GRAPH_DEVICES", set())
        plain = tune(tmp_path / "plain", **SHORT)
    for one, other in zip(read_metrics(made), read_metrics(plain), strict=True):
        assert (
            one["policy/dlogp_mean"] == other["policy/dlogp_mean"] < 0.05 and one["reward/mean"] == other["reward/mean"]
        )


def test_stale_weights_are_found_in_the_second_iteration(
    stale_weights: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with simulated():
        tune(tmp_path, **SHORT, grpo__learning_rate=0.01)
    said = "".join(capsys.readouterr())
    assert said.index("sampler and learner agree") < said.index("sampling step by step from now on")


def test_a_sampler_that_is_wrong_without_graphs_stops_the_run(tmp_path: Path) -> None:
    with (
        simulated(),
        mutated(network, "rotation_table", "angle.cos()", "angle.mul(1.5).cos()"),
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(Failure, match=r"iteration 1 stopped before it changed the weights: .* also without CUDA graphs"),
    ):
        for name in ("sample", "graph"):
            patch.setattr(f"smart.sampler.{name}.rotation_table", network.rotation_table)
        tune(tmp_path, **SHORT)
    assert not read_metrics(tmp_path / "r")


def test_a_resumed_run_checks_only_another_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with simulated():
        tune(tmp_path, **SHORT)
    for name, checks in (("simulated", 0), ("another", 1)):
        newest = max((tmp_path / "r" / "checkpoints").glob("0*"))
        for path in sorted(newest.iterdir()):
            path.unlink()
        newest.rmdir()
        capsys.readouterr()
        with simulated(name=name):
            tune(tmp_path, resume=True, **SHORT)
        assert "".join(capsys.readouterr()).count("sampler and learner agree") == checks
