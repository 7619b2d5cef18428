"""Pretraining on CUDA, without torch.compile: steps, samples, a resumed run."""

import shutil
from pathlib import Path

import pytest
from runs import PRETRAIN
from simulated_cuda import simulated

from smart.config import PretrainConfig, load
from smart.pretrain import train


@pytest.mark.slow
def test_pretraining(tmp_path: Path, corpus: Path) -> None:
    settings = PRETRAIN | {
        "run.folder": f"'{tmp_path}'", "run.name": "'p'", "run.device": "'cuda'", "data.corpus": f"'{corpus}'",
        "data.crop": 32, "optimisation.evaluate_every": 2, "optimisation.evaluate_rows": 6, "optimisation.samples": 2,
        "optimisation.listen": 1, "optimisation.compile": "'off'", "optimisation.steps": 4, "render.seconds": 2.0,
        "architecture.max_positions": 128,
    }  # fmt: skip
    config = load("base.toml", [f"{key}={value}" for key, value in settings.items()], schema=PretrainConfig)
    with simulated():
        made = train(config)
        shutil.rmtree(max((made / "checkpoints").glob("0*")))
        train(config, resume=True)
    assert (made / "base" / "model.safetensors").is_file()
