"""Further trackers that a run can report to: trackio, Weights & Biases, MLflow (``track.also``).

Each is a small adapter with ``metrics``, ``piece`` and ``close``. Its package is imported only if the run asks for it.
A tracker works in a thread, so that a server that does not answer delays no iteration; if it fails, the run prints one
warning and continues without it. What a tracker gets is in the run's folder anyway.
"""

import math
import os
import queue
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from smart import UserError, brief
from smart.files import parse_toml, write_atomically
from smart.run.folder import CONFIG, flat
from smart.run.roll import Picture

PROJECT = "smart"
IDENTITY = "tracked_as.txt"  # in a run's folder: the name under which its trackers continue it
WAITING = 1000  # calls that may wait for a tracker before it counts as too slow
SECONDS = 60.0  # at the end of a run, for a tracker to send what it has


class Target(NamedTuple):
    """What a tracker is told about the run."""

    folder: Path
    settings: dict[str, Any]  # dotted key -> value
    identity: str  # differs between runs, and stays when a run is resumed


class Adapter(Protocol):
    """A tracker; ``name`` of a piece is like a path, for example "samples/00"."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None: ...
    def piece(self, step: int, name: str, roll: Picture, audio: Path | None) -> None: ...
    def close(self) -> None: ...


class _Trackio:
    """trackio keeps its runs on this machine (``trackio show``), or where its own variables say."""

    def __init__(self, run: Target) -> None:
        import trackio

        self._package = trackio
        trackio.init(
            project=PROJECT,
            name=run.identity,
            config=run.settings,
            resume="allow",
            embed=False,
        )

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        self._package.log(dict(values), step=step)

    def piece(self, step: int, name: str, roll: Picture, audio: Path | None) -> None:
        media = {f"{name}/roll": self._package.Image(roll)}
        if audio is not None:
            media[f"{name}/audio"] = self._package.Audio(audio)
        self._package.log(media, step=step)

    def close(self) -> None:
        self._package.finish()


class _Wandb:
    """Weights & Biases; with ``WANDB_MODE=offline`` it writes into the run's folder (``wandb sync`` sends that)."""

    def __init__(self, run: Target) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        if os.environ.get("WANDB_MODE", "online") in ("online", "shared") and not wandb.api.api_key:
            # otherwise it asks for one on the terminal
            raise UserError("no API key: run `wandb login`, or set WANDB_MODE=offline")
        self._package = wandb
        self._run = wandb.init(
            project=PROJECT,
            name=run.folder.name,
            id=run.identity,
            resume="allow",
            dir=run.folder,
            config=run.settings,
            settings=wandb.Settings(console="off", silent=True),
        )

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def piece(self, step: int, name: str, roll: Picture, audio: Path | None) -> None:
        media: dict[str, Any] = {f"{name}/roll": self._package.Image(roll)}
        if audio is not None:
            media[f"{name}/audio"] = self._package.Audio(str(audio))
        self._run.log(media, step=step)

    def close(self) -> None:
        self._run.finish()


class _Mlflow:
    """MLflow; without ``MLFLOW_TRACKING_URI`` it writes a database next to the run's folder (``mlflow ui``)."""

    def __init__(self, run: Target) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient

        home = run.folder.resolve().parent
        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home / 'mlflow.db'}"
        self._client = MlflowClient(uri)
        experiment = self._client.get_experiment_by_name(PROJECT)
        place = None if "MLFLOW_TRACKING_URI" in os.environ else (home / "mlflow").as_uri()
        where = experiment.experiment_id if experiment else self._client.create_experiment(PROJECT, place)
        found = self._client.search_runs([where], f"tags.identity = '{run.identity}'")
        if found:
            self._run = found[0].info.run_id
            return
        made = self._client.create_run(where, run_name=run.folder.name, tags={"identity": run.identity})
        self._run = made.info.run_id
        for key, value in run.settings.items():
            self._client.log_param(self._run, key, value)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = round(1000 * time.time())
        points = [Metric(key, value, now, step) for key, value in values.items() if math.isfinite(value)]
        self._client.log_batch(self._run, metrics=points)

    def piece(self, step: int, name: str, roll: Picture, audio: Path | None) -> None:
        place = f"{name}/{step:08d}"
        self._client.log_image(self._run, roll, artifact_file=f"{place}/roll.png")
        if audio is not None:
            self._client.log_artifact(self._run, str(audio), place)

    def close(self) -> None:
        self._client.set_terminated(self._run)


ADAPTERS: dict[str, Callable[[Target], Adapter]] = {"trackio": _Trackio, "wandb": _Wandb, "mlflow": _Mlflow}


class Also:
    """A tracker in its thread. Nothing that goes wrong there reaches the run: ``warn`` gets one line about it."""

    def __init__(self, name: str, run: Target, warn: Callable[[str], object]) -> None:
        self._name, self._target, self._warn = name, run, warn
        self._calls: queue.SimpleQueue[Callable[[Adapter], object] | None] = queue.SimpleQueue()
        self._failed = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        kept = dict(values)
        self._call(lambda adapter: adapter.metrics(step, kept))

    def piece(self, step: int, name: str, roll: Picture, audio: Path | None) -> None:
        self._call(lambda adapter: adapter.piece(step, name, roll, audio))

    def close(self) -> None:
        """Let the tracker finish, but wait no longer than ``SECONDS``."""
        self._calls.put(None)
        self._thread.join(SECONDS)
        if self._thread.is_alive():
            self._fail(f"it did not finish within {SECONDS:.0f} s")

    def _call(self, call: Callable[[Adapter], object]) -> None:
        if self._failed.is_set():
            return
        if self._calls.qsize() >= WAITING:
            self._fail("it does not keep up with the run")
        self._calls.put(call)

    def _work(self) -> None:
        try:
            adapter = ADAPTERS[self._name](self._target)
            while (call := self._calls.get()) is not None:
                if not self._failed.is_set():
                    call(adapter)
            adapter.close()
        except BaseException as error:  # also what a package calls exit for
            self._fail(error.message if isinstance(error, UserError) else brief(error))

    def _fail(self, why: str) -> None:
        if not self._failed.is_set():
            self._failed.set()
            self._warn(f"Warning: the run continues without {self._name}: {why}")


def describe(folder: Path) -> Target:
    """What trackers are told about the run in ``folder``; its identity is made once, and kept in the folder."""
    kept, config = folder / IDENTITY, folder / CONFIG
    if not kept.is_file():
        write_atomically(kept, f"{folder.resolve().name}-{secrets.token_hex(4)}\n".encode())
    settings = flat(parse_toml(config.read_text(encoding="utf-8"))) if config.is_file() else {}
    return Target(folder, settings, kept.read_text(encoding="utf-8").strip())
