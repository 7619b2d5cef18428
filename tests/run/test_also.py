"""What trackers get of a run: TensorBoard's audio and piano rolls, and the trackers of ``track.also``.

trackio, wandb and MLflow are optional: each test of the real package is skipped where it is not installed.
"""

import importlib.util
import os
import sys
import threading
import time
import wave
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import programs
import pytest
from PIL import Image
from symusic import Note, Score, Tempo, Track
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from smart import UserError
from smart.config import TRACKERS, PretrainConfig, dumps, load
from smart.doctor.machine import MISSING, _packages
from smart.run import Tracker, also, check_packages
from smart.run.roll import KEYS, LOWEST, ROW, piano_roll

RATE = 8000


def scale() -> Any:
    """Three notes of half a second from C4, at 120: the last is the loudest."""
    score = Score(480)
    score.tempos.append(Tempo(0, 120))
    track = Track(program=0)
    for place in range(3):
        track.notes.append(Note(480 * place, 480, 60 + 2 * place, 40 + 40 * place))
    score.tracks.append(track)
    return score


def clip(seconds: float = 2.0) -> Any:
    """A stereo clip: a tone on the left, silence on the right."""
    tone = np.sin(2 * np.pi * 440 * np.arange(int(seconds * RATE)) / RATE)
    return np.stack([tone, np.zeros_like(tone)]).astype(np.float32)


def test_a_piano_roll_shows_each_note_where_it_is() -> None:
    roll = piano_roll(scale(), 2.0)
    assert roll.shape == (KEYS * ROW, 100, 3) and roll.dtype == np.uint8
    for place in range(3):
        row = (KEYS - 1 - (60 + 2 * place - LOWEST)) * ROW
        blue = np.flatnonzero(roll[row, :, 0] < 200)
        assert (blue.min(), blue.max()) == (25 * place, 25 * place + 23), "half a second each, and a gap"
    shades = [int(roll[(KEYS - 1 - (60 + 2 * place - LOWEST)) * ROW, 25 * place + 5, 0]) for place in range(3)]
    assert shades == sorted(shades, reverse=True), "louder is darker"
    assert piano_roll(Score(480)).shape[1] == 50, "silence is a second long"
    assert piano_roll(scale()).shape[1] == 75


def test_tensorboard_gets_the_audio_and_the_piano_rolls(tmp_path: Path) -> None:
    with Tracker(tmp_path) as files:
        files.write_piece("samples/00000005/00", scale(), clip(), RATE)
        files.metrics(5, {"reward/mean": 1.0})
        files.metrics(6, {"reward/mean": 2.0})
        files.write_piece("samples/00000007/00", scale(), None, RATE)  # a clip that failed
        files.write_piece("final/00-base", scale(), clip(), RATE)
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"audio": 0, "images": 0})
    events.Reload()
    assert set(events.Tags()["audio"]) == {"samples/00/audio", "final/00-base/audio"}
    assert [point.step for point in events.Images("samples/00/roll")] == [5, 7]
    assert [point.step for point in events.Images("final/00-base/roll")] == [6], "the last step that was measured"
    (sound,) = events.Audio("samples/00/audio")
    assert sound.step == 5 and sound.sample_rate == RATE
    with wave.open(BytesIO(sound.encoded_audio_string)) as file:
        assert (file.getnchannels(), file.getnframes()) == (1, 2 * RATE)
        heard = np.frombuffer(file.readframes(2 * RATE), "<i2") / 32767
    assert np.allclose(heard, clip().mean(axis=0), atol=1e-3)
    picture = np.asarray(Image.open(BytesIO(events.Images("samples/00/roll")[0].encoded_image_string)))
    assert np.array_equal(picture, piano_roll(scale(), 2.0))


# --- track.also ---------------------------------------------------------------------------------------------------


class Notebook:
    """An adapter that writes down what it is told."""

    def __init__(self, target: also.Target) -> None:
        self.target, self.told = target, []
        Notebook.made.append(self)

    made: ClassVar[list["Notebook"]] = []
    told: list[tuple[Any, ...]]

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        self.told.append(("metrics", step, dict(values)))

    def piece(self, step: int, name: str, roll: Any, audio: Path | None) -> None:
        self.told.append(("piece", step, name, roll.shape, audio and audio.name))

    def close(self) -> None:
        self.told.append(("close",))


@pytest.fixture
def notebooks(monkeypatch: pytest.MonkeyPatch) -> list[Notebook]:
    monkeypatch.setattr(Notebook, "made", [])
    monkeypatch.setattr(also, "ADAPTERS", {"wandb": Notebook})
    return Notebook.made


def test_a_tracker_gets_curves_samples_and_settings(tmp_path: Path, notebooks: list[Notebook]) -> None:
    (tmp_path / "config.toml").write_text("[grpo]\nbeta = 0.04\n")
    for start in (0, 1):  # begun, and resumed
        with Tracker(tmp_path, start=start, also=["wandb", "wandb"]) as files:
            files.metrics(start + 1, {"reward/mean": 1.0})
            files.write_piece("samples/00000002/00", scale(), clip(), RATE)
    first, second = notebooks
    assert first.told == [
        ("metrics", 1, {"reward/mean": 1.0}),
        ("piece", 2, "samples/00", (352, 100, 3), "00.wav"),
        ("close",),
    ]
    assert first.target.settings == {"grpo.beta": 0.04}
    assert first.target.identity == second.target.identity, "a resumed run is the same run"
    assert first.target.identity.startswith(f"{tmp_path.name}-")


@pytest.mark.parametrize("where", ["open", "metrics", "piece", "close"])
def test_a_tracker_that_fails_is_one_warning(
    tmp_path: Path, notebooks: list[Notebook], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def fail(*_: Any) -> None:
        raise ConnectionError("no route to\nhost") if where != "piece" else SystemExit(3)

    monkeypatch.setattr(Notebook, "__init__" if where == "open" else where, fail)
    with Tracker(tmp_path, also=["wandb"]) as files:
        for step in range(1, 20):
            files.metrics(step, {"reward/mean": 1.0})
            files.write_piece(f"samples/{step:08d}/00", scale(), clip(0.1), RATE)
    log = (tmp_path / "log.txt").read_text().splitlines()
    why = "SystemExit: 3" if where == "piece" else "ConnectionError: no route to host"
    assert log == [f"Warning: the run continues without wandb: {why}"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 19


def test_a_tracker_that_hangs_delays_nothing(
    tmp_path: Path, notebooks: list[Notebook], monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    monkeypatch.setattr(Notebook, "metrics", lambda *_: release.wait(60))
    monkeypatch.setattr(also, "SECONDS", 0.2)
    began = time.monotonic()
    with Tracker(tmp_path, also=["wandb"]) as files:
        for step in range(1, 10):
            files.metrics(step, {"reward/mean": 1.0})
    assert time.monotonic() - began < 10
    assert (tmp_path / "log.txt").read_text() == (
        "Warning: the run continues without wandb: it did not finish within 0 s\n"
    )
    release.set()


def test_one_that_does_not_keep_up_is_left(
    tmp_path: Path, notebooks: list[Notebook], monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    monkeypatch.setattr(Notebook, "metrics", lambda *_: release.wait(60))
    monkeypatch.setattr(also, "WAITING", 5)
    with Tracker(tmp_path, also=["wandb"]) as files:
        for step in range(1, 20):
            files.metrics(step, {"reward/mean": 1.0})
        release.set()
    assert "it does not keep up with the run" in (tmp_path / "log.txt").read_text()


def test_names_are_checked() -> None:
    config = load("quickstart.toml", ['track.also=["trackio", "mlflow"]'])
    assert config.track.also == ("trackio", "mlflow") and 'also = ["trackio", "mlflow"]' in dumps(config)
    assert load("base.toml", ['track.also=["wandb"]'], schema=PretrainConfig).track.also == ("wandb",)
    with pytest.raises(
        UserError, match=r'track\.also = .wandb.: expected a list of strings, for example \["trackio", "wandb"\]'
    ):
        load("quickstart.toml", ["track.also=wandb"])
    with pytest.raises(UserError, match="expected a list of some of trackio, wandb, mlflow"):
        load("quickstart.toml", ['track.also=["comet"]'])
    assert set(also.ADAPTERS) == set(TRACKERS)


def test_a_package_that_is_missing_is_named_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("smart.run.folder.find_spec", lambda name: None if name == "wandb" else find(name))
    with pytest.raises(UserError, match="a run needs wandb: pip install wandb"):
        check_packages(["wandb"])
    check_packages()
    found = _packages(load("quickstart.toml", ['track.also=["wandb"]']))
    assert found == (MISSING, "a run needs wandb", "pip install wandb")


def test_none_is_imported_unless_it_is_asked_for() -> None:
    code = f"import sys, smart.tuning, smart.pretrain; print([name for name in {TRACKERS} if name in sys.modules])"
    assert programs.run([sys.executable, "-c", code], fresh=True, check=True).stdout == "[]\n"


# --- The real packages ----------------------------------------------------------------------------------------------


def tracked(name: str, folder: Path, code: str = "", **environment: str) -> str:
    """A run's files with one tracker, in its offline or local mode; returns the log and what ``code`` prints."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    script = f"""
import sys
sys.path[:0] = {[str(Path(__file__).parent), str(Path(programs.__file__).parent)]}
from pathlib import Path
from test_also import RATE, clip, scale
from smart.run import Tracker
folder = Path({str(folder / "r")!r})
for start in (0, 2):  # begun, and resumed
    with Tracker(folder, start=start, also=[{name!r}]) as files:
        for step in (start + 1, start + 2):
            files.write_piece(f"samples/{{step:08d}}/00", scale(), clip(), RATE)
            files.metrics(step, {{"reward/mean": step / 2, "bad": float("nan")}})
{code}
"""
    (folder / "r").mkdir()
    (folder / "r" / "config.toml").write_text("[grpo]\nbeta = 0.04\n")
    env = (
        os.environ | {"HOME": str(folder), "TRACKIO_DIR": str(folder / "trackio"), "HF_HUB_OFFLINE": "1"} | environment
    )
    done = programs.run([sys.executable, "-c", script], fresh=True, cwd=folder, env=env)
    assert done.returncode == 0, done.stderr
    log = folder / "r" / "log.txt"
    return (log.read_text() if log.exists() else "") + done.stdout


@pytest.mark.slow
def test_trackio_keeps_curves_and_samples(tmp_path: Path) -> None:
    code = """
import sqlite3
(database,) = (folder.parent / "trackio").glob("smart*.db")
with sqlite3.connect(database) as opened:
    names = {row[0] for row in opened.execute("select distinct run_name from metrics")}
    rows = opened.execute("select step, cast(metrics as text) from metrics order by step").fetchall()
clips = sum("samples/00/audio" in values for _, values in rows)
print(len(names), [step for step, values in rows if "reward/mean" in values], clips)
"""
    assert tracked("trackio", tmp_path, code).splitlines()[-1] == "1 [1, 2, 3, 4] 4"


@pytest.mark.slow
def test_wandb_offline_writes_runs_that_can_be_sent_later(tmp_path: Path) -> None:
    assert tracked("wandb", tmp_path, WANDB_MODE="offline") == ""
    parts = list((tmp_path / "r" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(parts) == 2 and len({part.name for part in parts}) == 1, "the same run, in two parts"
    written = b"".join(part.read_bytes() for part in parts)
    assert b"reward/mean" in written and b"samples/00/audio" in written and b"samples/00/roll" in written


@pytest.mark.slow
def test_wandb_without_a_key_is_one_warning(tmp_path: Path) -> None:
    log = tracked("wandb", tmp_path, WANDB_MODE="online", WANDB_API_KEY="")
    why = "no API key: run `wandb login`, or set WANDB_MODE=offline"
    assert log == f"Warning: the run continues without wandb: {why}\n" * 2  # once in each of two runs


@pytest.mark.slow
def test_mlflow_keeps_curves_and_samples(tmp_path: Path) -> None:
    code = """
from mlflow import MlflowClient
client = MlflowClient(f"sqlite:///{folder.parent / 'mlflow.db'}")
(run,) = client.search_runs([client.get_experiment_by_name("smart").experiment_id])
points = client.get_metric_history(run.info.run_id, "reward/mean")
files = [file.path for file in client.list_artifacts(run.info.run_id, "samples/00/00000003")]
print([(point.step, point.value) for point in points], run.data.params, run.info.status, files)
"""
    assert tracked("mlflow", tmp_path, code).splitlines()[-1] == (
        "[(1, 0.5), (2, 1.0), (3, 1.5), (4, 2.0)] {'grpo.beta': '0.04'} FINISHED "
        "['samples/00/00000003/00.wav', 'samples/00/00000003/roll.png']"
    )
