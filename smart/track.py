"""What a run leaves behind: ``config.toml``, ``metrics.jsonl``, TensorBoard events, completions, MIDI and WAV.

Everything that is indexed by a step can be cut back to a step, so that a run that is resumed from a checkpoint
writes the same files as one that was never interrupted.
"""

import gc
import io
import json
import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import wraps
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import click
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from tqdm import tqdm

from smart import UserError
from smart.files import hold, is_empty, is_leftover, parse_json, parse_toml, write_atomically

CONFIG = "config.toml"
METRICS = "metrics.jsonl"
SETTINGS = "settings.json"
NEEDED = ("pyarrow", "tensorboard", "matplotlib", "soundfile")


def run_command(default: str) -> Callable[[Callable[..., None]], click.Command]:
    """The command line of a program that makes a run: ``--config``, ``--set``, ``--resume``, ``--overwrite``.

    What ends it before its time is one line (``in_one_line``); what was saved before stays.
    """

    def decorate(function: Callable[..., None]) -> click.Command:
        @click.command()
        @click.option(
            "--config", "path", default=default, show_default=True, help="TOML file, or a shipped one's name."
        )
        @click.option("--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE", help="Override one key.")
        @click.option("--resume", is_flag=True, help="Continue the run from its last checkpoint.")
        @click.option("--overwrite", is_flag=True, help="Replace a run of the same name.")
        @wraps(function)
        def main(path: str, overrides: tuple[str, ...], resume: bool, overwrite: bool) -> None:
            if resume and overwrite:
                raise click.UsageError("--resume and --overwrite contradict each other")
            gc.freeze()  # what imports made is not looked at again, so that the garbage of an iteration is found soon
            with in_one_line("the run", "what was saved is kept: go on with --resume"):
                function(path, overrides, resume, overwrite)

        return main

    return decorate


# words for it: torch's, on CUDA and on a CPU, those of threads, of C++, and of CUDA's libraries
OUT_OF_MEMORY = ("out of memory", "allocate memory", "can't start new thread", "bad_alloc", "ALLOC_FAILED")


@contextmanager
def in_one_line(writing: str, then: str, *expected: type[Exception]) -> Iterator[None]:
    """End a program with one line, and exit code 1, for what is no bug and no mistake in what was asked of it.

    That is Ctrl-C, a disk that is full or may not be written (``writing`` names what should have been), memory that
    does not suffice, and errors of the kinds ``expected``; ``then`` says what to do.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise click.ClickException(f"interrupted; {then}") from None
    except expected as error:
        raise click.ClickException(f"{error}; {then}") from None
    except (OSError, SafetensorError) as error:  # the latter is how that library reports a full disk
        raise click.ClickException(f"{writing} could not be written ({error}); {then}") from error
    except (MemoryError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if reason.startswith("Could not determine home directory"):  # pathlib's words
            raise UserError("a path begins with ~ and means a home directory that is not known here") from error
        if not isinstance(error, MemoryError) and not any(words in reason for words in OUT_OF_MEMORY):
            raise
        raise click.ClickException(f"memory did not suffice ({reason}); {then}") from error


def check_packages() -> None:
    """Raise ``UserError`` naming what the ``track`` extra would install and is not there."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise UserError(f"a run needs {', '.join(missing)}: pip install {' '.join(missing)}")


@contextmanager
def prepare(folder: Path, config: str, *, resume: bool, overwrite: bool) -> Iterator[None]:
    """Make the run's folder, or check that it may be continued or replaced; nothing is ever lost silently.

    Until the end of the ``with`` no other process can do the same, so that two never write one run.
    """
    if "\0" in str(folder):
        raise UserError(f"run {str(folder)!r}: no folder can have that name; choose another run.name")
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UserError(f"run {folder}: is not a folder; choose another run.name")
    with ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(hold(folder))
            _make_or_check(folder, config, resume=resume, overwrite=overwrite)
        except BlockingIOError:
            raise UserError(f"run {folder}: another process is working in it; wait for it, or stop it") from None
        except OSError as error:
            raise UserError(f"run {folder}: cannot be written ({error.strerror})") from None
        yield


def _make_or_check(folder: Path, config: str, *, resume: bool, overwrite: bool) -> None:
    # checkpoints go first, so that what is half deleted is not continued without what came before them; what says that
    # it is a run goes last
    order = {"checkpoints": 0, CONFIG: 2}
    inside = [] if is_empty(folder) else sorted(folder.iterdir(), key=lambda path: order.get(path.name, 1))
    if inside and overwrite:
        if not (folder / CONFIG).is_file():
            raise UserError(f"run {folder}: not overwritten, since it has no {CONFIG} and so is not a run")
        for path in inside:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    elif inside and not resume:
        raise UserError(
            f"run {folder}: exists already; continue it with --resume, replace it with --overwrite, "
            "or give another name with --set run.name=NAME"
        )
    elif (folder / CONFIG).is_file():
        _refuse_changes(folder, config)
    if not (folder / CONFIG).is_file():
        write_atomically(folder / CONFIG, config.encode())


def claim(folder: Path, settings: Mapping[str, Any]) -> None:
    """Make ``folder`` for what ``settings`` produce, or go on with one of the same; they are kept in it as JSON.

    Raises ``UserError`` where it holds something else, was begun with other settings, or cannot be written.
    """
    text, kept = json.dumps(settings, indent=1) + "\n", folder / SETTINGS
    try:
        if folder.exists() and (not folder.is_dir() or (not is_empty(folder) and not kept.is_file())):
            raise UserError(f"--out {folder}: holds something else; give a new folder")
        if kept.is_file():
            before = kept.read_text(encoding="utf-8", errors="replace")
            if before != text:
                raise UserError(
                    f"--out {folder}: holds pieces made with other settings ({_changes_in(before, text)}); "
                    "give a new folder"
                )
        else:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(kept, text.encode())
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be written ({error.strerror})") from None


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a claimed folder, so that no two processes write into it. Raises ``UserError`` where another one does."""
    with ExitStack() as held:
        try:
            held.enter_context(hold(folder))
        except BlockingIOError:
            raise UserError(f"--out {folder}: another process is working in it; wait for it, or stop it") from None
        yield


def _changes_in(before: str, now: str) -> str:
    """How two JSON texts of settings differ."""
    try:
        return "; ".join(changes(parse_json(before), parse_json(now)))
    except ValueError:
        return "they cannot be read"


MAY_CHANGE = (
    "run.folder",
    "run.name",
    "render.workers",
    "render.deadline",
    "reward.deadline",
    "track.trace_every",
)  # without changing what comes out


def _refuse_changes(folder: Path, config: str) -> None:
    """A run is continued under its own configuration, or it would not be that run."""
    try:
        before = parse_toml((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"run {folder}: its {CONFIG} cannot be read ({error})") from None
    changed = changes(before, parse_toml(config), but=MAY_CHANGE)
    if changed:
        raise UserError(
            f"run {folder}: cannot be continued with another configuration: {'; '.join(changed)}; "
            f"use --config {folder / CONFIG}, or another run.name"
        )


def changes(before: Mapping[str, Any], now: Mapping[str, Any], *, but: Collection[str] = ()) -> list[str]:
    """How nested settings differ, a clause for each key (dotted), those of ``but`` left out."""
    old, new = _flat(before), _flat(now)
    return [
        f"{key} was {old.get(key)!r} and is {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and key not in but
    ]


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


class Tracker:
    """Writes a run's files. Use as a context manager; ``start`` is the last step that is already done (0: none)."""

    def __init__(self, folder: Path, *, start: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder
        self._completions: list[dict[str, Any]] = []
        _cut_back(folder, start)
        self._metrics = open(folder / METRICS, "a", encoding="utf-8")  # noqa: SIM115  # closed by close()
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)
        self._hook, threading.excepthook = threading.excepthook, self._thread_failed

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        threading.excepthook = self._hook
        self._metrics.close()
        self._board.close()

    def _thread_failed(self, failure: threading.ExceptHookArgs) -> None:
        """What TensorBoard's thread cannot write, the next point raises: no traceback of its own."""
        if not (isinstance(failure.exc_value, OSError) and type(failure.thread).__module__.startswith("tensorboard")):
            self._hook(failure)

    def say(self, text: str) -> None:
        """A line for the person who watches (stderr, above any progress bar) and for the run's log."""
        with suppress(OSError):  # a terminal that was closed, a pipe that nobody reads any more: no reason to stop
            tqdm.write(text, file=sys.stderr)
        with open(self.folder / "log.txt", "a", encoding="utf-8") as log:
            log.write(text + "\n")

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """One line of ``metrics.jsonl`` and one point a curve; a value that is not finite becomes null."""
        line = {key: (value if math.isfinite(value) else None) for key, value in values.items()}
        self._metrics.write(json.dumps({"step": step, **line}) + "\n")
        self._metrics.flush()
        for key, value in values.items():
            self._board.add_scalar(key, value, step)

    def completions(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Keep rows (step, prompt, tokens, scores, ...) for the Parquet file of the next ``flush``."""
        self._completions += map(dict, rows)

    def flush(self, step: int) -> None:
        """Write the rows kept since the last flush as ``completions/<step>.parquet``; then the disk has all metrics."""
        os.fsync(self._metrics.fileno())
        if not self._completions:
            return
        import pyarrow as pa
        import pyarrow.parquet as pq

        folder = self.folder / "completions"
        folder.mkdir(exist_ok=True)
        table = pa.Table.from_pylist(self._completions)
        write_atomically(folder / f"{step:08d}.parquet", lambda file: pq.write_table(table, file))
        self._completions.clear()

    def listen(self, name: str, score: Any, audio: npt.NDArray[np.float32] | None, sample_rate: int) -> Path:
        """Write ``<name>.mid`` and, unless the clip failed, ``<name>.wav``; returns the path to listen to."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        midi = path.with_suffix(".mid")
        write_midi(midi, score)
        if audio is None:
            return midi
        wav = path.with_suffix(".wav")
        write_wav(wav, audio, sample_rate)
        return wav


class Onlooker(Tracker):
    """A tracker that writes nothing: for processes beside the one that does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __exit__(self, *_: object) -> None:
        pass

    def say(self, text: str) -> None:
        pass

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        pass

    def completions(self, rows: Iterable[Mapping[str, Any]]) -> None:
        pass

    def flush(self, step: int) -> None:
        pass

    def listen(self, name: str, score: Any, audio: npt.NDArray[np.float32] | None, sample_rate: int) -> Path:
        return self.folder / name


def write_midi(path: Path, score: Any) -> None:
    """A ``symusic.Score`` as a MIDI file; ``OSError`` where it cannot be written."""
    write_atomically(path, score.dumps_midi())


def write_wav(path: Path, audio: npt.NDArray[np.float32], sample_rate: int) -> None:
    """(C, S) float32 in [-1, 1] as 16-bit PCM; ``OSError`` where it cannot be written (libsndfile's own says less)."""
    import soundfile

    encoded = io.BytesIO()
    soundfile.write(encoded, audio.T, sample_rate, subtype="PCM_16", format="WAV")
    write_atomically(path, encoded.getvalue())


def read_audio(path: Path, seconds: float = math.inf) -> tuple[npt.NDArray[np.float32], int]:
    """Mono audio (S,) float32, S >= 0, and its sample rate: the mean of the channels of a wav, flac, mp3 or ogg file.

    No more than the first ``seconds`` are read. Raises ``UserError`` where the file is missing or unreadable, or the
    package soundfile is.
    """
    soundfile = load_soundfile()
    if not path.is_file():
        raise UserError(f"audio file {path}: no such file")
    try:
        with soundfile.SoundFile(path) as file:
            rate = int(file.samplerate)
            most = -1 if math.isinf(seconds) else round(seconds * rate)
            # a block at a time: an hour of many channels would not fit into memory
            blocks = file.blocks(10 * rate, dtype="float32", always_2d=True, frames=most) if file.frames else ()
            audio = np.concatenate([np.empty(0, np.float32), *(block.mean(axis=1) for block in blocks)])
    except (RuntimeError, OSError) as error:  # soundfile's own errors are RuntimeErrors
        reason = " ".join(str(getattr(error, "error_string", error)).split())
        raise UserError(f"audio file {path} cannot be read as wav, flac, mp3 or ogg ({reason})") from error
    if not np.isfinite(audio).all():
        raise UserError(f"audio file {path} holds samples that are not finite numbers")
    return audio, rate


def load_soundfile() -> Any:
    """The package soundfile; ``UserError`` where it or its library is not installed."""
    try:
        import soundfile
    except ImportError as error:
        raise UserError(
            "reading audio files needs the package soundfile, which is missing; do: pip install soundfile"
        ) from error
    except OSError as error:  # the package is there, the library that it wraps is not
        raise UserError(f"the package soundfile does not find libsndfile ({error}); reinstall it") from error
    return soundfile


def summarise(folder: Path, rewards: Mapping[str, npt.NDArray[np.float32]]) -> str:
    """Write ``summary.json``: the mean reward of fresh base and tuned samples and how they differ; say it in words."""
    mean = {name: float(values.mean()) for name, values in rewards.items()}
    error = {name: float(values.std(ddof=1)) / math.sqrt(len(values)) for name, values in rewards.items()}
    difference, its_error = mean["tuned"] - mean["base"], math.hypot(*error.values())
    summary: dict[str, Any] = {
        name: {"n": len(rewards[name]), "reward": mean[name], "standard_error": error[name]} for name in rewards
    }
    summary["difference"] = {"reward": difference, "standard_error": its_error}
    write_atomically(folder / "summary.json", json.dumps(summary, indent=1).encode())
    times = f" = {difference / its_error:.1f} standard errors" if its_error else ""
    return "\n".join(
        [
            *(
                f"{name:>10} {mean[name]:7.3f} ± {error[name]:.3f}  mean reward of {len(rewards[name])} fresh samples"
                for name in rewards
            ),
            f"difference {difference:+7.3f} ± {its_error:.3f}{times}",
            f"listen:       {folder / 'final'}/00-base.wav, then 00-tuned.wav, 01-base.wav, ... (and .mid)",
            f"reward curve: {folder / 'reward_mean.png'}",
            f"tuned model:  {folder / 'tuned'}",
        ]
    )


def read_metrics(folder: Path, keys: Collection[str] | None = None) -> list[dict[str, Any]]:
    """The run's metrics, one mapping a step, in order: "step" and those of ``keys`` that it has (None: all).

    A last line that a crash cut short is left out; any other that cannot be read is too, and is named on stderr.
    """
    path = folder / METRICS
    if not path.is_file():
        raise UserError(f"run {folder}: has no {METRICS}")
    rows, damaged = [], 0
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if damaged:  # and not the last
                click.echo(f"Warning: {path}: line {damaged} is damaged and left out", err=True)
            damaged = 0
            try:
                row = parse_json(line)
                if not isinstance(row["step"], int):
                    raise TypeError
            except (ValueError, KeyError, TypeError):
                damaged = number
                continue
            rows.append(row if keys is None else {key: row[key] for key in ("step", *keys) if key in row})
    return rows


class Span(NamedTuple):
    """One piece of work: its stage, when it began and ended (``time.perf_counter``), and who did it."""

    stage: str
    start: float
    end: float
    lane: str


class Stopwatch:
    """Where the time of an iteration went.

    ``laps`` are the stages of the main thread, one after another, in seconds; ``spans`` all that was timed, also what
    went on within a lap or beside it in other threads. A span belongs to the iteration in which it ended.
    """

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self.spans: list[Span] = []
        self._last = time.perf_counter()

    def restart(self) -> None:
        """Begin the next iteration; what other threads have finished since the last lap belongs to it."""
        # in one step, since they may be adding spans; spans lie in the order of their ends
        del self.spans[: sum(span.end <= self._last for span in self.spans)]
        self.laps = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """End ``stage`` now."""
        now = time.perf_counter()
        self.laps[f"seconds/{stage}"] = now - self._last
        self.span(stage, self._last, now, "main")
        self._last = now

    def span(self, stage: str, start: float, end: float, lane: str) -> None:
        """Note a piece of work; any thread may."""
        self.spans.append(Span(stage, start, end, lane))

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """A span of the main thread within a lap."""
        start = time.perf_counter()
        yield
        self.span(stage, start, time.perf_counter(), "within")

    def metrics(self) -> dict[str, float]:
        """Seconds of each lap, their sum ``seconds/iteration``, and the seconds of the other stages, added up."""
        beside: dict[str, float] = {}
        for stage, start, end, lane in list(self.spans):
            if lane != "main" and end <= self._last:
                beside[f"seconds/{stage}"] = beside.get(f"seconds/{stage}", 0.0) + end - start
        return self.laps | {"seconds/iteration": sum(self.laps.values())} | beside

    def write(self, path: Path) -> Path:
        """All spans as a trace for Chrome's and Perfetto's viewers, a track for each lane; returns the path."""
        spans = sorted(self.spans, key=lambda span: span.start)
        lanes = sorted({span.lane for span in spans}, key=lambda lane: (lane != "main", lane != "within", lane))
        zero = spans[0].start if spans else 0.0
        events: list[dict[str, Any]] = [
            {"ph": "M", "name": "thread_name", "pid": 1, "tid": lanes.index(lane), "args": {"name": lane}}
            for lane in lanes
        ]
        events += [
            {"ph": "X", "name": stage, "pid": 1, "tid": lanes.index(lane), "ts": 1e6 * (start - zero),
             "dur": 1e6 * (end - start)}
            for stage, start, end, lane in spans
        ]  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps({"traceEvents": events}).encode())
        return path


def progress(rows: Iterable[Any] | None = None, *, show: bool = True, **options: Any) -> Any:
    """A tqdm bar on stderr, silent where that is not a terminal, or not to ``show``."""
    return tqdm(rows, disable=not (show and sys.stderr.isatty()), dynamic_ncols=True, **options)


def _cut_back(folder: Path, step: int) -> None:
    """Drop what was written after ``step``: it is going to be written again."""
    if (folder / METRICS).exists():
        # step 0, the base's own values, is written by the run's first process
        rows = [json.dumps(row) + "\n" for row in read_metrics(folder) if row["step"] <= step and step > 0]
        write_atomically(folder / METRICS, "".join(rows).encode())
    for path in (folder / "completions").glob("*"):
        if is_leftover(path) or (path.suffix == ".parquet" and path.stem.isdecimal() and int(path.stem) > step):
            path.unlink()
