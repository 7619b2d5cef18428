"""Notes -> audio with a soundfont: ``render_notes``, pure, one clip; ``RenderPool``, worker processes.

As in section 3.5 of the paper: a score is cut at 100 beats, rendered to its own end or ``seconds``, whichever
is shorter, in stereo, and peak-normalised; an empty score is one second of silence. The paper's own program
wrote a MIDI file for each clip and let old notes die away for four seconds before the next. Here the
synthesiser gets its events straight from the notes, at the exact sample, and every clip starts from a fresh
clone of the loaded soundfont (the samples are shared, the voices are not), so the audio depends on the notes
alone: not on the worker, nor on what that worker rendered before.

A note array is (n, 6) float64, one note a row; its columns are ``NOTE_COLUMNS``: onset and duration in
seconds, pitch 0-127, velocity 0-127, program 0-127, and drum, 0 or 1. A structured array with fields of these
names will do as well.

This module imports neither torch nor symusic, so that a worker starts fast and stays small: about 50 MiB,
plus the samples, which the synthesiser keeps as 32-bit floats (twice the size of an sf2, 12 to 15 times that
of an sf3).
"""

import contextlib
import math
import os
import queue
import resource
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from tinysoundfont import _tinysoundfont as tsf

from smart import Failure, UserError
from smart.processes import die_with_parent
from smart.soundfonts import check_soundfont, find_soundfont

Notes = npt.NDArray[np.float64]  # (n, 6), columns NOTE_COLUMNS
Audio = npt.NDArray[np.float32]  # (2, S)

NOTE_COLUMNS = ("onset", "duration", "pitch", "velocity", "program", "drum")
_HIGHEST = (86_400.0, 86_400.0, 127.0, 127.0, 127.0, 1.0)  # of each column; a day is no piece of music
MAX_VOICES = 1024  # bounds the work of one clip; a piano soundfont spends 2 to 4 voices on a note
DRUM_BANK = 128  # where General MIDI soundfonts keep their drum kits
PEAK_EPS = 1e-6
GIVE_UP = 16  # clips that fail in a row, each of them twice, before a pool stops trying
STARTS = 3  # workers that may die while they load, one after the other, before that counts as a failure
# seconds between attempts to start a worker: what the system lacks may come back
PAUSES = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2)


class Renderer(Protocol):
    """What takes scores and gives their audio some time later: ``RenderPool``, ``smart.bank.BankPool``."""

    def submit(self, score: Any) -> Future[Audio]:
        """Start rendering a ``symusic.Score`` or a note array; the future's result is float32 audio (2, S)."""
        ...


class RenderError(RuntimeError):
    """A clip that could not be rendered, twice; the text says why."""


def load_soundfont(name_or_path: str | os.PathLike[str]) -> Any:
    """Find, check and load a soundfont into this process, for ``render_notes``.

    Raises ``UserError`` where it is absent or no soundfont. A damaged file that passes the checks may crash
    the synthesiser, and this process with it; ``RenderPool`` survives that.
    """
    path = find_soundfont(name_or_path)
    check_soundfont(path)
    try:
        return tsf.SoundFont(str(path))
    except (RuntimeError, UnicodeError) as error:
        raise UserError(f"soundfont {path} cannot be loaded: {error}") from None


# Notes ------------------------------------------------------------------------------------------------------


def check_notes(notes: npt.ArrayLike) -> Notes:
    """``notes`` as a contiguous (n, 6) float64 array; structured arrays are unfolded.

    Raises ``ValueError`` for another shape, and for a value that is not finite, negative, too large, or not
    whole where it must be: the text names the column.
    """
    array = np.asarray(notes)
    if array.dtype.names is not None:
        missing = [name for name in NOTE_COLUMNS if name not in array.dtype.names]
        if missing:
            raise ValueError(f"expected the fields {NOTE_COLUMNS}, got {array.dtype.names}: no {missing[0]}")
        array = np.stack([array[name].astype(np.float64) for name in NOTE_COLUMNS], axis=-1)
    array = np.ascontiguousarray(array, dtype=np.float64)
    if array.shape == (0,):
        array = array.reshape(0, 6)
    if array.ndim != 2 or array.shape[1] != len(NOTE_COLUMNS):
        raise ValueError(f"expected notes of shape (n, 6), columns {NOTE_COLUMNS}, got {array.shape}")
    for column, (name, highest) in enumerate(zip(NOTE_COLUMNS, _HIGHEST, strict=True)):
        values = array[:, column]
        whole = column >= 2
        good = (values >= 0) & (values <= highest)  # False for NaN
        if whole:
            good &= values == np.floor(values)
        if not good.all():
            row = int(np.argmin(good))
            kind = "a whole number" if whole else "seconds"
            raise ValueError(f"{name} of note {row} is {values[row]}: expected {kind} from 0 to {highest:g}")
    return array


def score_notes(score: Any, *, max_beats: float = 100.0) -> Notes:
    """The notes of a ``symusic.Score`` of any time unit as an (n, 6) array, in seconds by its tempo map.

    Cut at ``max_beats`` quarter notes: notes that start there or later are dropped, longer ones end there.
    120 beats a minute until the first tempo; of two tempos at one time the later in the list counts. Rows are
    sorted by onset, drum, program, pitch, velocity, duration, whatever the order of the tracks.

    Raises ``TypeError`` for what is not a score, ``ValueError`` naming the column for a negative onset or
    duration, or a pitch, velocity, program or tempo out of range.
    """
    if not all(hasattr(score, name) for name in ("tracks", "tempos", "ttype")):
        raise TypeError(f"expected a symusic.Score, got {type(score).__name__}")
    unit = str(score.ttype).rpartition(".")[2].lower()
    if unit not in ("tick", "quarter", "second"):
        raise TypeError(f"expected a score in ticks, quarters or seconds, got {score.ttype}")
    scale = float(score.ticks_per_quarter) if unit == "tick" else 1.0
    beats, seconds, pace = _tempo_map(score.tempos.numpy(), unit, scale)

    def to_seconds(beat: npt.NDArray[np.float64] | float) -> npt.NDArray[np.float64]:
        at = np.maximum(np.searchsorted(beats, beat, side="right") - 1, 0)
        return np.asarray(seconds[at] + (beat - beats[at]) * pace[at])

    stop = max_beats if unit != "second" else float(to_seconds(max_beats))
    rows = []
    for track in score.tracks:
        notes = track.notes.numpy()
        start = notes["time"].astype(np.float64) / scale
        end = np.minimum(start + notes["duration"].astype(np.float64) / scale, stop)
        keep = start < stop
        if unit != "second":
            start, end = to_seconds(start), to_seconds(end)
        same = np.ones_like(start)
        columns = (
            start,
            end - start,
            notes["pitch"],
            notes["velocity"],
            same * track.program,
            same * track.is_drum,
        )
        rows.append(np.stack([np.asarray(column, np.float64) for column in columns], axis=1)[keep])
    notes = np.concatenate(rows) if rows else np.empty((0, 6))
    onset, duration, pitch, velocity, program, drum = notes.T
    return check_notes(notes[np.lexsort((duration, velocity, pitch, program, drum, onset))])


def _tempo_map(
    tempos: dict[str, npt.NDArray[Any]], unit: str, scale: float
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Where the tempo changes, in beats and in seconds, and the seconds a beat from there; starts at 0."""
    at = tempos["time"].astype(np.float64) / scale
    pace = tempos["mspq"].astype(np.float64) / 1e6
    if not ((at >= 0) & np.isfinite(at)).all() or not (pace > 0).all():
        raise ValueError("tempo: expected times from 0 and a positive number of microseconds a beat")
    order = np.argsort(at, kind="stable")
    at, pace = np.append(0.0, at[order]), np.append(0.5, pace[order])
    steps = np.diff(at)
    other = np.append(0.0, np.cumsum(steps / pace[:-1] if unit == "second" else steps * pace[:-1]))
    return (other, at, pace) if unit == "second" else (at, other, pace)


def to_notes(score: Any) -> Notes:
    """Whatever may be rendered, as a checked note array."""
    if isinstance(score, np.ndarray | list | tuple):
        return check_notes(score)
    return score_notes(score)


# One clip ---------------------------------------------------------------------------------------------------


def render_notes(soundfont: Any, notes: npt.ArrayLike, *, sample_rate: int = 44100, seconds: float = 10.0) -> Audio:
    """Audio (2, S) float32 of one clip; a pure function of its arguments.

    ``soundfont`` is what ``load_soundfont`` gave (a path or short name is loaded for this one call),
    ``notes`` a note array. S is the last note's end or ``seconds``, whichever is earlier; a clip without
    notes is one second of silence (or ``seconds``, if less). The audio is divided by its peak over both
    channels plus 1e-6.

    Times are rounded to the nearest sample. A note lasts at least one sample; velocity 0 is no note. At one
    sample, notes end before others begin. A pitch that begins again on the same instrument ends there and
    starts anew, and the end of the earlier note no longer counts; of equal notes that begin together one is
    played, with the greatest velocity and the latest end. So the order of the rows does not matter.

    Every program has a channel of its own. A program that the soundfont lacks is played by program 0, or else
    by the first preset; a drum kit that it lacks by kit 0, or else the drums stay silent. At most
    ``MAX_VOICES`` voices sound at a time; beyond them, released ones are cut off first.

    Raises ``ValueError`` for impossible notes (see ``check_notes``), sample rate or seconds, ``RenderError``
    if the synthesiser gives NaN or infinity, which a damaged soundfont can bring about.
    """
    limit = most_samples(sample_rate, seconds)
    if isinstance(soundfont, str | os.PathLike):
        soundfont = load_soundfont(soundfont)
    notes = check_notes(notes)
    played = played_notes(notes[notes[:, 3] > 0], sample_rate)
    if not len(played):
        return np.zeros((2, min(sample_rate, limit)), np.float32)
    samples = min(limit, int(played[:, OFF].max()))
    played = played[played[:, ON] < samples]
    synth = fresh_synth(soundfont, sample_rate)
    silent = _set_channels(synth, played)
    audio = np.empty((samples, 2), np.float32)
    frames = audio.reshape(-1).view(np.uint8)  # the synthesiser writes into bytes, 8 a frame
    done = 0
    for at, starts, channel, pitch, velocity in _events(played):
        if at >= samples:
            break
        if at > done:
            synth.render(frames[8 * done : 8 * at])
            done = at
        if channel in silent:
            continue
        if starts:
            synth.channel_note_on(channel, pitch, velocity / 127.0)
        else:
            synth.channel_note_off(channel, pitch)
    synth.render(frames[8 * done :])
    return _normalise(audio)


def most_samples(sample_rate: int, seconds: float) -> int:
    """The most samples that a clip may have."""
    if not (isinstance(sample_rate, int | np.integer) and 1000 <= sample_rate <= 384_000):
        raise ValueError(f"sample_rate: expected a whole number from 1000 to 384000, got {sample_rate!r}")
    if not 0 < seconds <= 3600:
        raise ValueError(f"seconds: expected more than 0 and at most 3600, got {seconds!r}")
    return max(1, round(seconds * sample_rate))


ON, OFF, CHANNEL, PITCH, VELOCITY, PROGRAM, DRUM = range(7)  # columns of what played_notes returns


def played_notes(notes: Notes, sample_rate: int) -> npt.NDArray[np.int64]:
    """Notes as they are played, (m, 7) int64: on and off in samples, channel, pitch, velocity, program, drum.

    Each pitch of a channel sounds once at a time: see ``render_notes`` for what becomes of overlaps.
    """
    on = np.floor(notes[:, 0] * sample_rate + 0.5).astype(np.int64)
    off = np.floor((notes[:, 0] + notes[:, 1]) * sample_rate + 0.5).astype(np.int64)
    off = np.maximum(off, on + 1)
    pitch, velocity, program, drum = notes[:, 2:].astype(np.int64).T
    _, channel = np.unique(drum * 128 + program, return_inverse=True)
    table = np.stack([on, off, channel, pitch, velocity, program, drum], axis=1)
    table = table[np.lexsort((table[:, ON], table[:, PITCH], table[:, CHANNEL]))]
    if not len(table):
        return table
    same_key = (np.diff(table[:, [CHANNEL, PITCH]], axis=0) == 0).all(axis=1)
    together = same_key & (np.diff(table[:, ON]) == 0)
    first = np.flatnonzero(np.append(True, ~together))
    merged = table[first]
    merged[:, OFF] = np.maximum.reduceat(table[:, OFF], first)
    merged[:, VELOCITY] = np.maximum.reduceat(table[:, VELOCITY], first)
    again = (np.diff(merged[:, [CHANNEL, PITCH]], axis=0) == 0).all(axis=1)
    merged[:-1, OFF] = np.where(again, np.minimum(merged[:-1, OFF], merged[1:, ON]), merged[:-1, OFF])
    return merged


def _events(played: npt.NDArray[np.int64]) -> list[list[int]]:
    """[sample, 1 to start or 0 to end, channel, pitch, velocity] in the one order that the notes allow."""
    many = len(played)
    on, off = played[:, [ON, CHANNEL, PITCH, VELOCITY]], played[:, [OFF, CHANNEL, PITCH, VELOCITY]]
    both = np.insert(np.concatenate([on, off]), 1, np.repeat([1, 0], many), axis=1)
    events: list[list[int]] = both[np.lexsort((both[:, 3], both[:, 2], both[:, 1], both[:, 0]))].tolist()
    return events


def fresh_synth(soundfont: Any, sample_rate: int) -> Any:
    """A clone that has played nothing. What is not part of the samples has to be set on each clone.

    The soundfont itself must never be played or given a limit of voices: a clone inherits the limit, not the
    voices.
    """
    synth = tsf.SoundFont(soundfont)
    synth.set_output(tsf.OutputMode.StereoInterleaved, int(sample_rate), 0.0)
    synth.set_max_voices(MAX_VOICES)
    return synth


def _set_channels(synth: Any, played: npt.NDArray[np.int64]) -> set[int]:
    """Give every channel its preset; returns the channels that have to stay silent."""
    silent = set()
    for channel, program, drum in np.unique(played[:, [CHANNEL, PROGRAM, DRUM]], axis=0).tolist():
        bank = DRUM_BANK if drum else 0
        preset = synth.get_preset_index(bank, program)
        if preset < 0:
            preset = synth.get_preset_index(bank, 0)
        if preset < 0 and drum:
            silent.add(channel)
        else:
            synth.channel_set_preset_index(channel, max(preset, 0))
    return silent


def _normalise(audio: Audio) -> Audio:
    """Interleaved (S, 2) to (2, S), divided by its peak."""
    peak = max(float(audio.max()), -float(audio.min()))
    if not math.isfinite(peak):
        raise RenderError("the synthesiser gave NaN or infinite samples: the soundfont is probably damaged")
    normal = np.empty(audio.shape[::-1], np.float32)
    np.divide(audio.T, np.float32(peak) + np.float32(PEAK_EPS), out=normal)
    return normal


# A worker process -------------------------------------------------------------------------------------------
# A message is a header, its kind and length, and a body. The audio itself comes back through a file in memory
# that both sides hold open: it has no name, so nothing is left behind however either side dies. The header of a request
# holds its number, too, and its answer has the same: an answer too many is not taken for that to the next request.

_HEADER = struct.Struct("<cQQ")  # kind, number, length
_LOADED, _CANNOT_LOAD, _NOTES, _AUDIO, _ERROR = b"L", b"X", b"N", b"A", b"E"
_LONGEST_ANSWER = 1 << 16


def _send(connection: socket.socket, kind: bytes, number: int, body: bytes = b"") -> None:
    connection.sendall(_HEADER.pack(kind, number, len(body)) + body)


def _receive(
    connection: socket.socket, *, longest: int | None = None, until: float | None = None
) -> tuple[bytes, int, bytes]:
    """Kind, number, body; ``EOFError`` when the other side is gone, ``TimeoutError`` past ``until`` (monotonic)."""
    kind, number, length = _HEADER.unpack(_read(connection, _HEADER.size, until))
    if longest is not None and length > longest:
        raise ValueError(f"a message of {length} bytes, at most {longest} expected")
    return kind, number, _read(connection, length, until)


def _read(connection: socket.socket, length: int, until: float | None) -> bytes:
    data = bytearray()
    while len(data) < length:
        if until is not None:
            left = until - time.monotonic()
            if left <= 0:
                raise TimeoutError
            connection.settimeout(left)
        part = connection.recv(min(length - len(data), 1 << 20))
        if not part:
            raise EOFError
        data += part
    return bytes(data)


def _work(connection_fd: str, audio_fd: str, soundfont: str, sample_rate: str, seconds: str) -> None:
    """What a worker process runs: load the soundfont, then render clips until the other side is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to act on
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash is expected and handled: no core file
    try:
        with socket.socket(fileno=int(connection_fd)) as connection:
            _serve(connection, int(audio_fd), soundfont, int(sample_rate), float(seconds))
    except (EOFError, ConnectionError):
        return  # the pool is closed, or its process is dead


def _serve(connection: socket.socket, audio_fd: int, path: str, sample_rate: int, seconds: float) -> None:
    try:
        soundfont = tsf.SoundFont(path)
    except (RuntimeError, MemoryError, UnicodeError) as error:
        _send(connection, _CANNOT_LOAD, 0, _one_line(error))
        return
    _send(connection, _LOADED, 0)
    while True:
        _, number, body = _receive(connection)
        try:
            notes = np.frombuffer(body, np.float64).reshape(-1, len(NOTE_COLUMNS))
            audio = render_notes(soundfont, notes, sample_rate=sample_rate, seconds=seconds)
            _write_all(audio_fd, audio)
        except Exception as error:  # whatever it is, the parent tells the caller
            _send(connection, _ERROR, number, _one_line(error))
        else:
            _send(connection, _AUDIO, number, struct.pack("<Q", audio.shape[1]))


def _one_line(error: BaseException) -> bytes:
    return " ".join(f"{type(error).__name__}: {error}".split()).encode(errors="replace")[:1000]


def _write_all(file: int, audio: Audio) -> None:
    data, done = audio.reshape(-1).view(np.uint8).data, 0
    while done < len(data):
        done += os.pwrite(file, data[done:], done)


def _read_audio(file: int, samples: int) -> Audio:
    audio = np.empty((2, samples), np.float32)
    data, done = audio.reshape(-1).view(np.uint8).data, 0
    while done < len(data):
        many = os.preadv(file, [data[done:]], done)
        if not many:
            raise ValueError(f"{done} bytes of audio, {len(data)} announced")
        done += many
    return audio


def _anonymous_file() -> int:
    """A file without a name, in memory where the system can do that; closed with its last descriptor."""
    if hasattr(os, "memfd_create"):
        with contextlib.suppress(OSError):  # some containers refuse it
            return os.memfd_create("smart-render")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


# sys.path is handed over, so that a worker finds this package just as its parent did
_BOOT = "import sys; sys.path[:] = sys.argv[6:]; from smart.render import _work; _work(*sys.argv[1:6])"
# what a synthesiser does to itself that follows a damaged soundfont
_CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL)
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


class _WorkerFailure(Exception):
    """Why a worker did not render a clip; whatever it was, the worker may be of no more use."""


class _NotStarted(_WorkerFailure):
    """The system gives no process, or not what one needs."""


class _CannotLoad(_WorkerFailure):
    """A worker that did not load the soundfont, and no other is likely to."""


class _Worker:
    """A worker process as seen by the one thread that feeds it; any thread may ``kill`` it."""

    def __init__(self, soundfont: Path, sample_rate: int, seconds: float) -> None:
        self.limit = most_samples(sample_rate, seconds)
        self.number = 0  # of the last request
        with contextlib.ExitStack() as files:
            self.audio_fd = _anonymous_file()
            files.callback(os.close, self.audio_fd)
            self.connection, theirs = socket.socketpair()
            files.callback(self.connection.close)
            with theirs:
                fds = (theirs.fileno(), self.audio_fd)
                settings = (*fds, soundfont, sample_rate, float(seconds))
                path = [os.path.abspath(place) for place in sys.path]
                self.process = subprocess.Popen(
                    [sys.executable, "-P", "-c", die_with_parent() + _BOOT, *map(str, settings), *path],
                    pass_fds=fds,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    env=os.environ | _ONE_THREAD,
                )
            self._files = files.pop_all()

    def kill(self) -> None:
        self.process.kill()

    def close(self) -> None:
        """Kill and reap the process, and close what belongs to it."""
        self.kill()
        self.process.wait()
        self._files.close()

    def alive(self) -> bool:
        return self.process.poll() is None

    def answer(self, seconds: float, kind: bytes = b"", body: bytes = b"") -> tuple[bytes, bytes]:
        """Send a request, if any, and wait for its answer, ``seconds`` at most; else ``_WorkerFailure``."""
        until = time.monotonic() + seconds
        try:
            if kind:
                self.connection.settimeout(seconds)
                self.number += 1
                _send(self.connection, kind, self.number, body)
            kind, number, body = _receive(self.connection, longest=_LONGEST_ANSWER, until=until)
            if number != self.number:
                raise ValueError(f"it is to request {number}, not to {self.number}")
            return kind, body
        except TimeoutError:
            raise _WorkerFailure(f"no answer within {seconds:g} s") from None
        except (EOFError, ConnectionError):
            raise _WorkerFailure(self._how_it_died()) from None
        except ValueError as error:
            raise _WorkerFailure(f"a garbled answer ({error})") from None

    def _how_it_died(self) -> str:
        try:
            status = self.process.wait(1)
        except subprocess.TimeoutExpired:
            return "it closed its connection"
        if status < 0:
            return f"it died of signal {-status}, {signal.strsignal(-status)}"
        return f"it ended with exit status {status}"

    def render(self, notes: Notes, deadline: float) -> Audio:
        kind, body = self.answer(deadline, _NOTES, notes.tobytes())
        if kind == _ERROR:
            raise _WorkerFailure(body.decode(errors="replace"))
        try:
            (samples,) = struct.unpack("<Q", body)
            if kind != _AUDIO or not 1 <= samples <= self.limit:
                raise ValueError(f"kind {kind!r}, {samples} samples")
            return _read_audio(self.audio_fd, samples)
        except (struct.error, ValueError) as error:
            raise _WorkerFailure(f"a garbled answer ({error})") from None


# The pool ---------------------------------------------------------------------------------------------------


class RenderPool:
    """Worker processes that hold a loaded soundfont each, and render clips; use it as a context manager.

    ``soundfont`` is a path or a short name (``find_soundfont``), ``workers`` the number of processes, by
    default one for each usable core. Starting waits until all have loaded the soundfont: ``UserError`` if
    that fails, ``Failure`` if the system starts no workers, or kills them. The file must stay as it is: a worker that
    starts later and finds another gives ``Failure``.

    A worker is a fresh Python interpreter that imports this module alone, not the caller's main program: no
    ``if __name__ == "__main__"`` is needed, and neither torch nor the caller's threads come along.

    When ``GIVE_UP`` clips fail with none rendered in between, the soundfont or the machine is to blame: then every clip
    gets ``Failure``, which says so, instead of being tried.

    A worker that dies, gives no answer within ``deadline`` seconds (also because it was stopped), answers nonsense or
    fails (its memory may be full) is killed and replaced, and its clip rendered once more; if that fails too, the
    clip's future gets ``RenderError``. ``retries`` counts clips that were tried again, ``failures`` clips that failed,
    ``restarts`` workers that were replaced. Workers die with the process that owns the pool, however it ends,
    and ignore Ctrl-C. This protects from a synthesiser that crashes or hangs; it is no sandbox against a
    hostile soundfont.
    """

    def __init__(
        self,
        soundfont: str | os.PathLike[str],
        *,
        sample_rate: int = 44100,
        seconds: float = 10.0,
        workers: int | None = None,
        deadline: float = 30.0,
        load_deadline: float = 300.0,
    ) -> None:
        most_samples(sample_rate, seconds)
        if workers is None:
            workers = usable_cores()
        if not (isinstance(workers, int) and workers >= 1):
            raise ValueError(f"workers: expected a whole number from 1, got {workers!r}")
        for name, value in (("deadline", deadline), ("load_deadline", load_deadline)):
            if not 0 < value <= threading.TIMEOUT_MAX:
                raise ValueError(f"{name}: expected a positive number of seconds, got {value!r}")
        self.soundfont = find_soundfont(soundfont).absolute()
        check_soundfont(self.soundfont)
        self.sample_rate, self.seconds = int(sample_rate), float(seconds)
        self.deadline, self.load_deadline = deadline, load_deadline
        self._state = file_state(self.soundfont)
        self.retries = self.failures = self.restarts = 0
        self._failed_in_a_row, self._hopeless = 0, ""
        self._lock = threading.Lock()  # of the counters, _closed and _workers
        self._closed = False
        self._ending = threading.Event()  # wakes up who waits to start a worker
        self._workers: list[_Worker | None] = [None] * workers
        self._jobs: queue.SimpleQueue[tuple[Future[Audio], Notes] | None] = queue.SimpleQueue()
        ready: list[Future[None]] = [Future() for _ in range(workers)]
        # Linux kills a worker when the *thread* that started it ends: each worker has a thread of its own,
        # which starts it, feeds it and reaps it
        self._threads = [
            threading.Thread(target=self._feed, args=(place, ready[place]), name=f"render-{place}", daemon=True)
            for place in range(workers)
        ]
        try:
            for thread in self._threads:
                thread.start()
            for future in ready:
                future.result()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "RenderPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers."""
        with self._lock:
            return [worker.process.pid for worker in self._workers if worker is not None]

    def submit(self, score: Any) -> Future[Audio]:
        """Start rendering a ``symusic.Score`` or a note array; the future's result is float32 audio (2, S).

        ``RuntimeError`` if the pool is closed, ``ValueError`` and ``TypeError`` as from ``score_notes``.
        """
        notes = to_notes(score)
        future: Future[Audio] = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError("this RenderPool is closed")
            self._jobs.put((future, notes))
        return future

    def map(self, scores: Iterable[Any]) -> Iterator[Audio]:
        """Audio of each score, in order; submits a few ahead of the one waited for, so that memory is
        bounded.

        Raises ``RenderError`` at a clip that failed, which ends the iteration: to go on, use ``submit``.
        """
        ahead: deque[Future[Audio]] = deque()
        try:
            for score in scores:
                ahead.append(self.submit(score))
                if len(ahead) > 4 * len(self._threads):
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()

    def close(self) -> None:
        """End the workers; cancel clips that wait; those in work get ``RenderError``. May be repeated."""
        with self._lock:
            first, self._closed = not self._closed, True
            self._ending.set()
            for worker in self._workers:
                if worker is not None:
                    worker.kill()  # its thread wakes up, reaps it and ends
        if first:
            for _ in self._threads:
                self._jobs.put(None)
        for thread in self._threads:
            if thread.ident is not None and thread is not threading.current_thread():
                thread.join()

    def _feed(self, place: int, ready: "Future[None]") -> None:
        """The life of the thread that owns the worker at ``place``."""
        # a worker inherits the mask: Ctrl-C cannot hit it before it has learnt to ignore it
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._start(place, replaces=False)
        except BaseException as error:
            self._discard(place)
            ready.set_exception(self._why_not_started(error))
            return
        ready.set_result(None)
        while (job := self._jobs.get()) is not None:
            self._answer(place, *job)
            del job  # or the clip would be kept until the next one comes
        self._discard(place)

    def _answer(self, place: int, future: "Future[Audio]", notes: Notes) -> None:
        if self._closed:
            future.cancel()
        if future.set_running_or_notify_cancel():
            try:
                audio = self._render(place, notes)
            except Exception as error:
                # without its traceback, which holds this frame, and so the future that holds the error: a circle
                future.set_exception(error.with_traceback(None))
            else:
                future.set_result(audio)

    def _start(self, place: int, *, replaces: bool) -> _Worker:
        """Start the worker at ``place`` and wait until it has loaded the soundfont; several attempts, with pauses.

        That the system has no room for a process, or kills one that loads, is no fault of the clip's that waits for it,
        and may pass.
        """
        deaths, failure = 0, _WorkerFailure()
        for pause in (*PAUSES, 0.0):
            self._discard(place)
            try:
                return self._try_to_start(place, replaces or deaths > 0)
            except _WorkerFailure as error:
                failure, deaths = error, deaths + 1
                if deaths == STARTS or (isinstance(error, _CannotLoad) and not replaces):
                    break
            except OSError as error:
                failure = _NotStarted(f"no worker process can be started: {error}")
            if self._ending.wait(pause):
                break
        raise failure

    def _try_to_start(self, place: int, again: bool) -> _Worker:
        worker = _Worker(self.soundfont, self.sample_rate, self.seconds)
        with self._lock:
            self._workers[place] = worker
            self.restarts += again
            if self._closed:
                worker.kill()
        try:
            kind, body = worker.answer(self.load_deadline)
            if kind != _LOADED:
                raise _CannotLoad(f"the synthesiser refused it ({body.decode(errors='replace')})")
        except _WorkerFailure as error:
            check_unchanged(self.soundfont, self._state)
            died_of = -(worker.process.poll() or 0)
            if worker.alive() or died_of in _CRASHES:  # alive: after all that time, or with a garbled answer
                raise _CannotLoad(str(error)) from None
            raise
        try:
            check_unchanged(self.soundfont, self._state)
        except Failure:
            self._discard(place)
            raise
        return worker

    def _discard(self, place: int) -> None:
        with self._lock:
            worker, self._workers[place] = self._workers[place], None
        if worker is not None:
            worker.close()

    def _why_not_started(self, error: BaseException) -> BaseException:
        if isinstance(error, _CannotLoad):
            return UserError(
                f"soundfont {self.soundfont} cannot be loaded (the render worker: {error}): "
                "download it again, or choose another"
            )
        return Failure(f"the render workers do not start: {error}") if isinstance(error, _WorkerFailure) else error

    def _render(self, place: int, notes: Notes) -> Audio:
        """Render with the worker at ``place``, and once more if that fails."""
        reasons: list[str] = []
        with self._lock:
            if self._failed_in_a_row >= GIVE_UP:
                raise Failure(self._hopeless)
        for attempt in range(2):
            try:
                audio = self._living_worker(place).render(notes, self.deadline)
                with self._lock:
                    self._failed_in_a_row = 0
                return audio
            except (_WorkerFailure, OSError) as error:  # OSError: its audio cannot be read
                reasons.append(str(error))
                advice = "" if isinstance(error, _NotStarted) else "; choose another soundfont"
                self._discard(place)
            with self._lock:
                if self._closed:
                    raise RenderError("the pool was closed while this clip was being rendered")
                if attempt == 0:
                    self.retries += 1
                else:
                    self.failures += 1
                    self._failed_in_a_row += 1
                    self._hopeless = (
                        f"the last {self._failed_in_a_row} clips could all not be rendered with soundfont "
                        f"{self.soundfont} (the last one: {'; again: '.join(reasons)}){advice}"
                    )
        raise RenderError(f"this clip could not be rendered: {reasons[0]}; again: {reasons[1]}")

    def _living_worker(self, place: int) -> _Worker:
        worker = self._workers[place]
        if worker is not None and worker.alive():
            return worker
        return self._start(place, replaces=True)


def file_state(path: Path) -> tuple[int, int] | None:
    """By which a file is known again: its size, and when it was written; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def check_unchanged(soundfont: Path, state: tuple[int, int] | None) -> None:
    """``Failure`` if the file is no longer as ``state`` says: clips before and after would not be of one soundfont."""
    if file_state(soundfont) != state:
        raise Failure(f"soundfont {soundfont} was changed while it was in use")


def usable_cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
