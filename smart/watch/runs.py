"""Read the runs of a folder while other processes write, replace and delete them.

Nothing here writes. A run is a folder right below, so that no name leads elsewhere, and a piece is read only if it lies
in the run's own folder. What is half written is left out until it is complete.
"""

import json
import math
import os
import re
import secrets
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from smart import UserError
from smart.files import parse_json, parse_toml
from smart.listen import notes_of
from smart.render import SILENT
from smart.run import CONFIG, METRICS

TAIL = 64 * 1024  # bytes at the end of a metrics file, which hold its last line
STEP = re.compile(r"[0-9]{8}")
PIECE = re.compile(r"[0-9]{2,6}(-base|-tuned)?\.(mid|wav)")
KINDS = ("final", "held_out", "samples")  # folders of pieces in a run
SETTLED = 10.0  # seconds after which pieces without ratings, of an older run or a pretraining, count as complete


class Missing(Exception):
    """What was asked for is not there, or no longer; the message says what."""


class Metrics:
    """The lines of a metrics file that grows: each look reads only what was added since the last one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._forget(None)

    def _forget(self, inode: int | None) -> None:
        self.version = secrets.token_hex(4)  # changes when lines that were seen are no longer valid
        self.rows: list[dict[str, Any]] = []
        self._inode, self._read, self._head = inode, 0, b""

    def look(self, path: Path) -> tuple[str, list[dict[str, Any]]]:
        """The file's version and its complete lines, as numbers by name; None for what is not finite."""
        with self._lock, open(path, "rb") as file:
            about = os.fstat(file.fileno())
            head = file.read(min(256, self._read))
            if about.st_ino != self._inode or about.st_size < self._read or head != self._head:
                self._forget(about.st_ino)
            file.seek(self._read)
            whole, newline, _ = file.read().rpartition(b"\n")
            self.rows += [row for line in whole.split(b"\n") if (row := numbers(line)) is not None]
            self._read += len(whole) + len(newline)
            file.seek(0)
            self._head = file.read(min(256, self._read))
            return self.version, list(self.rows)


def numbers(line: bytes) -> dict[str, Any] | None:
    """A line of a metrics file: its step and its numbers; None if it is not one."""
    with suppress(ValueError, TypeError, OverflowError):
        row = parse_json(line)
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            return {
                str(key): value if isinstance(value, int | float) and math.isfinite(value) else None
                for key, value in row.items()
            }
    return None


def plain(value: Any) -> Any:
    """A value of a TOML or JSON file as JSON that every browser reads: dates, infinities and NaN become text."""
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [plain(each) for each in value]
    if value is None or isinstance(value, bool | str) or (isinstance(value, int) and abs(value) < 2**53):
        return value
    return value if isinstance(value, float) and math.isfinite(value) else str(value)


class Set(NamedTuple):
    """Pieces that were written together: their folder in the run, and the iteration after which."""

    kind: str
    step: int

    @property
    def name(self) -> str:
        return self.kind if self.kind == "final" else f"{self.kind}/{self.step:08d}"


class Runs:
    """The runs of ``folder``, or the one that ``folder`` itself is. Raises ``UserError`` if it is no folder."""

    def __init__(self, folder: Path) -> None:
        try:
            whole = folder.resolve(strict=True)
            is_run = (whole / CONFIG).is_file()
            list(os.scandir(whole))
        except (OSError, ValueError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or "no such folder"
            raise UserError(f"{folder} cannot be read ({reason}); give a folder of runs, such as runs") from None
        self.folder = whole.parent if is_run else whole
        self._only = whole.name if is_run else None
        self.title = str(folder)
        self._metrics: dict[Path, Metrics] = {}
        self._last: dict[Path, tuple[Any, dict[str, Any]]] = {}
        self._clips: dict[tuple[Path, int], dict[str, Any]] = {}

    def _is_run(self, name: str) -> bool:
        """Whether ``name`` is a run in the folder itself. Links, hidden folders and unprintable names are none."""
        if not name.isprintable() or name.startswith(".") or "/" in name or "\\" in name:
            return False
        path = self.folder / name
        with suppress(OSError, ValueError):  # a name that is too long, or that the system's encoding does not know
            return self._only in (None, name) and not path.is_symlink() and (path / CONFIG).is_file()
        return False

    def names(self) -> list[str]:
        """Names of the runs that are there now."""
        with suppress(OSError):  # the folder itself was deleted
            return sorted(name for name in os.listdir(self.folder) if self._is_run(name))
        return []

    def find(self, name: str) -> Path:
        """The folder of the run ``name``. Raises ``Missing`` if there is none."""
        if not self._is_run(name):
            raise Missing("This run is not there, or no longer.")
        return self.folder / name

    # --- The list of runs

    def overview(self) -> list[dict[str, Any]]:
        """All runs, the one that was written last first; ``changed`` tells what has to be read again."""
        found = []
        for name in self.names():
            with suppress(OSError, Missing):  # deleted meanwhile
                found.append(self._overview(name))
        return sorted(found, key=lambda run: (run["age"], run["name"]))

    def _overview(self, name: str) -> dict[str, Any]:
        run = self.folder / name
        config = self.config(name)
        last, state = self._last_line(run), None
        newest = (run / CONFIG).stat()
        with suppress(OSError):
            state = (run / METRICS).stat()
        sets = self.sets(name)
        steps = self._parquets(run)
        total = config.get("grpo", config.get("optimisation", {}))
        total = total.get("iterations", total.get("steps")) if isinstance(total, dict) else None
        return {
            "name": name,
            "program": "pretrain" if "optimisation" in config else "grpo",
            "step": last.get("step"),
            "total": total if isinstance(total, int) else None,
            "reward": last.get("reward/mean"),
            "finished": (run / "summary.json").is_file() or (run / "base" / "model.safetensors").is_file(),
            "age": max(0, round(time.time() - max(newest.st_mtime, state.st_mtime if state else 0))),
            "changed": {
                "config": f"{newest.st_ino}-{newest.st_mtime_ns}",
                "metrics": state and f"{state.st_ino}-{state.st_size}",
                "sets": [each.name for each in sets],
                "completions": [path.name for path in steps],
            },
        }

    def _last_line(self, run: Path) -> dict[str, Any]:
        """The newest complete line of a run's metrics; the end of the file is read only if it has changed."""
        with suppress(OSError), open(run / METRICS, "rb") as file:
            about = os.fstat(file.fileno())
            known = self._last.get(run)
            if known is None or known[0] != (about.st_ino, about.st_size):
                file.seek(max(0, about.st_size - TAIL))
                rows = (numbers(line) for line in reversed(file.read().split(b"\n")[:-1]))
                known = (about.st_ino, about.st_size), next((row for row in rows if row is not None), {})
                self._last[run] = known
            return known[1]
        return {}

    # --- One run

    def config(self, name: str) -> dict[str, Any]:
        """A run's configuration; empty if it cannot be read."""
        with suppress(OSError, ValueError):
            found: dict[str, Any] = plain(parse_toml((self.find(name) / CONFIG).read_text(encoding="utf-8")))
            return found
        return {}

    def metrics(self, name: str, version: str, seen: int) -> dict[str, Any]:
        """A run's metrics after the first ``seen`` lines of ``version``, or all, if that version is no longer valid."""
        run = self.find(name)
        try:
            now, rows = self._metrics.setdefault(run, Metrics()).look(run / METRICS)
        except FileNotFoundError:
            return {"version": "", "first": 0, "rows": []}
        first = seen if version == now and 0 <= seen <= len(rows) else 0
        return {"version": now, "first": first, "rows": rows[first:]}

    # --- Pieces

    def sets(self, name: str) -> list[Set]:
        """What can be heard, newest first: the comparison at the end, then held-out pieces before others."""
        run = self.find(name)
        found = []
        for kind in KINDS[1:]:
            with suppress(OSError):
                found += [
                    Set(kind, int(entry.name))
                    for entry in os.scandir(run / kind)
                    if STEP.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False) and _complete(Path(entry))
                ]
        found = [each for each in found if each != Set("held_out", 0)]  # the base's, to which others are compared
        found.sort(key=lambda each: (each.step, each.kind == "held_out"), reverse=True)
        if (run / "final" / "00-tuned.mid").is_file() and (run / "summary.json").is_file():
            found.insert(0, Set("final", 0))
        return found

    def pieces(self, name: str, wanted: str) -> dict[str, Any]:
        """The pieces of a set in pairs of base and policy, or alone if the base wrote none for the same prompts."""
        run = self.find(name)
        which = next((each for each in self.sets(name) if each.name == wanted), None)
        if which is None:
            raise Missing("These pieces are not there, or no longer.")
        if which.kind == "final":
            sides = [("base", "final", "-base"), ("tuned", "final", "-tuned")]
        else:
            sides = [(f"iteration {which.step}", which.name, "")]
            if which.kind == "held_out" and (run / "held_out" / "00000000").is_dir():
                sides.insert(0, ("base", "held_out/00000000", ""))
        pairs: dict[str, list[dict[str, Any]]] = {}
        for label, folder, ending in sides:
            ratings = _ratings(run / folder / f"ratings{ending}.json")
            for path in sorted((run / folder).glob(f"*{ending}.mid")):
                if PIECE.fullmatch(path.name):
                    number = path.stem.removesuffix(ending)
                    clip = self._clip(self.file(name, folder, path.name))
                    pairs.setdefault(number, []).append(
                        clip
                        | {"label": label, "folder": folder, "file": path.stem, "ratings": ratings.get(path.stem, {})}
                    )
        last = sides[-1][0]
        chosen = {number: clips for number, clips in pairs.items() if clips[-1]["label"] == last}
        return {"name": which.name, "pairs": [{"number": int(each), "clips": chosen[each]} for each in sorted(chosen)]}

    def file(self, name: str, folder: str, file: str) -> Path:
        """A MIDI or WAV file of a run's pieces. Raises ``Missing`` unless it lies in the run's own folder."""
        run = self.find(name)
        kind, _, step = folder.partition("/")
        named = kind in KINDS and (STEP.fullmatch(step) is not None if kind != "final" else folder == "final")
        if not named or not PIECE.fullmatch(file):
            raise Missing("There is no such piece.")
        path = run / folder / file
        try:
            inside = path.resolve(strict=True).is_relative_to(run.resolve())
        except (OSError, RuntimeError):
            inside = False
        if not inside or not path.is_file():
            raise Missing("This piece is not there, or no longer.")
        return path

    def _clip(self, midi: Path) -> dict[str, Any]:
        key = midi, midi.stat().st_mtime_ns
        if key not in self._clips:
            if len(self._clips) > 200:
                self._clips.clear()
            self._clips[key] = {"notes": notes_of(midi.read_bytes()), **_sound(midi.with_suffix(".wav"))}
        return self._clips[key]

    # --- Completions

    def _parquets(self, run: Path) -> list[Path]:
        return sorted(path for path in (run / "completions").glob("*.parquet") if STEP.fullmatch(path.stem))

    def completion_steps(self, name: str) -> list[int]:
        """Iterations whose completions have been written, which happens when a checkpoint is saved."""
        import pyarrow.parquet as pq

        found: set[int] = set()
        for path in self._parquets(self.find(name)):
            with suppress(OSError, ValueError):  # deleted meanwhile, or damaged
                found.update(pq.read_table(path, columns=["step"])["step"].to_pylist())
        return sorted(step for step in found if isinstance(step, int))

    def completions(self, name: str, step: int) -> list[dict[str, Any]]:
        """The rows of one iteration's completions, as the run wrote them. Raises ``Missing`` if there are none."""
        import pyarrow.parquet as pq

        for path in self._parquets(self.find(name)):
            if step <= int(path.stem):  # which is of eight digits: a larger number is in none
                rows: list[dict[str, Any]] = pq.read_table(path, filters=[("step", "=", step)]).to_pylist()
                if rows:
                    return rows
        raise Missing("The completions of this iteration are not there, or no longer.")


def _complete(folder: Path) -> bool:
    """Whether all pieces of a set have been written: their ratings are last; older runs and pretraining write none."""
    with suppress(OSError):
        return (folder / "ratings.json").is_file() or (
            (folder / "00.mid").is_file() and time.time() - folder.stat().st_mtime > SETTLED
        )
    return False


def _ratings(path: Path) -> dict[str, dict[str, Any]]:
    with suppress(OSError, ValueError):
        read = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(read, dict):
            return {piece: plain(rated) for piece, rated in read.items() if isinstance(rated, dict)}
    return {}


def _sound(path: Path) -> dict[str, Any]:
    """Length in seconds of a WAV file and whether it is silent; without one, ``audio`` is None."""
    import soundfile

    try:
        audio, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (OSError, RuntimeError):  # soundfile's own errors are RuntimeErrors
        return {"audio": None}
    loudest = float(np.abs(audio).max()) if audio.size else 0.0
    return {"audio": True, "seconds": len(audio) / rate, "silent": loudest < SILENT}
