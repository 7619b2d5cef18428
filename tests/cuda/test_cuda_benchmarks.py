"""The benchmarks of gpu.sh on the simulated device, tiny: they run to the end, and gather.py reads what they write."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from audiobox_weights import thin_architecture
from simulated_cuda import simulated

pytestmark = pytest.mark.slow
FOLDER = Path(__file__).parents[2] / "benchmarks"
if not FOLDER.is_dir():
    pytest.skip("the benchmarks are not part of an installed package", allow_module_level=True)

NETWORK = "--device cuda --layers 2 --hidden 32 --heads 2 --intermediate 48 --tokens 20 --rows 4"
STEPS = {
    "sampler": f"{NETWORK} --group-size 2 --repeats 1",
    "render": "--bank cuda --clips 2 --rounds 1 --workers 1",
    "reward": "--device cuda --clips 2 --rounds 1",
    "learner": f"{NETWORK} --micro 4 --rounds 1",
    "iteration": "--device cuda --config quickstart.toml --iterations 1 --random-weights --set grpo.prompts=2 "
    "--set grpo.group_size=2 --set sampling.max_new_tokens=24 --set render.workers=1 --set render.seconds=2",
}


def test_all_but_doctor_and_peer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    import common

    for rate in ("matmul_rate", "memory_rate"):  # products that are large enough for a GPU
        monkeypatch.setattr(common, rate, lambda *_: 1e12)
    for name, options in STEPS.items():
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *options.split(), "--json", str(tmp_path / f"{name}.json")])
        with simulated() as device, thin_architecture():
            monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda *_: None)
            runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
        assert device.counts["launch"], name
        assert ("replay" in device.counts) == (name in ("sampler", "iteration")), name
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["gather.py", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(FOLDER / "gather.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert ended.value.code == 0 and "not measured: doctor, peer" in printed, printed
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["machine"] == "simulated" and found.keys() >= STEPS.keys() and found["failed"] == []
