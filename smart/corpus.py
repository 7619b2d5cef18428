"""From folders of MIDI files, many of them broken, to tokenised pieces in shards: ``python -m smart.corpus build``.

What is kept (paper section 3.2): files with a piano program (General MIDI 1-8), those tracks only, merged into one,
duplicate notes removed; of files with the same onsets and pitches one; none with more than 300 notes in a bar,
with more than 20% empty bars, or too short for a prompt and a bar. The rest goes into ``train``, ``validation`` or
``test`` by the hash of its notes, so that a piece stays where it is when files are added.

Scraped files crash, hang or swell native parsers. Every file is therefore parsed in a worker process with a limit
on time and memory; a worker that dies costs the file that it was working on, which goes into ``rejects.csv`` with
the reason, and is replaced. This protects the build from bad files, not the machine from files made to attack it:
a worker is no sandbox.

A build keeps its state in ``OUT/.work`` (an SQLite table with one row a file, and the tokens so far) and continues
from there when it was killed. The result depends on the files and settings alone: not on the number of workers,
on the order in which they finish, or on interruptions.
"""

import contextlib
import csv
import fcntl
import fnmatch
import hashlib
import json
import os
import shutil
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import IO, Any

import click
import numpy as np
import numpy.typing as npt
from symusic import Score
from tqdm import tqdm

from smart import UserError, shards
from smart.tokens import build_tokenizer, decode, encode, load_tokenizer, merge_piano, save_tokenizer, vocabulary

EXTENSIONS = (".mid", ".midi")
TEST_SHARE, VALIDATION_SHARE = 0.1, 0.1  # of all pieces; of the pieces that are not test (paper section 3.2)


@dataclass(frozen=True)
class Limits:
    """What a file may hold, and what parsing it may cost."""

    max_bar_notes: int = 300  # paper section 3.2
    max_empty_bars: float = 0.2  # paper section 3.2
    min_bars: int = 2  # with notes: one for a prompt, one for what follows it
    max_bytes: int = 16 << 20
    max_notes: int = 200_000  # the longest real piece seen has 33,000
    max_quarters: int = 50_000  # seven hours at 120
    max_silence: float = 120.0  # seconds between two notes
    min_division: int = 12  # ticks per quarter: fewer cannot place a note on the tokenizer's grid of twelfths
    max_division: int = 30_720
    min_tempo: float = 4.0  # beats a minute; the slowest real one seen is 4.5
    max_tempo: float = 2_000.0  # the fastest real one seen is 1,500
    seconds: float = 20.0  # wall-clock time for one file
    megabytes: int = 1024  # memory for one file, beyond what a worker needs at rest


class Reject(Exception):
    """A file that is left out: ``reason``, one of a few, by which rejects are counted; ``detail`` for this file."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Piece:
    """A tokenised file: ``tokens`` are the bytes of (L,) little-endian uint16."""

    digest: bytes
    tokens: bytes
    notes: int
    bars: int
    seconds: float


# --- One file: runs in a worker ------------------------------------------------------------------------------------


def check_structure(data: bytes, limits: Limits) -> None:
    """Walk the chunks of a MIDI file without parsing events. Raises ``Reject``.

    A parser may take a truncated file for a short one; the lengths and number of chunks tell the difference.
    """
    if not data:
        raise Reject("empty file")
    if len(data) < 14 or data[:4] != b"MThd":
        raise Reject("not a MIDI file", f"starts with {data[:4]!r}")
    header, kind, tracks, division = struct.unpack(">IHHH", data[4:14])
    if kind not in (0, 1):
        raise Reject("MIDI format", f"format {kind}, expected 0 or 1")
    if not limits.min_division <= division <= limits.max_division:
        raise Reject("absurd division", f"{division}, expected {limits.min_division} to {limits.max_division}")
    place, found = 8 + header, 0
    while place + 8 <= len(data) and found < tracks:
        name, length = data[place : place + 4], struct.unpack(">I", data[place + 4 : place + 8])[0]
        place += 8 + length
        if name == b"MTrk":
            found += 1
            if place > len(data):
                raise Reject("truncated", f"track {found} ends {place - len(data)} bytes after the file")
    if found < tracks:
        raise Reject("truncated", f"{found} tracks, the header says {tracks}")


def check_notes(score: Score, limits: Limits) -> float:
    """Refuse a merged piano score that is absurd before any work in proportion to its length; its seconds."""
    if not len(score.tracks):
        raise Reject("no piano notes")
    notes = score.tracks[0].notes.numpy()
    onsets, ends = notes["time"].astype(np.int64), (notes["time"] + notes["duration"].astype(np.int64))
    if len(onsets) > limits.max_notes:
        raise Reject("too many notes", f"{len(onsets)}, expected at most {limits.max_notes}")
    if onsets[0] < 0 or ends.max() >= 2**31:
        raise Reject("absurd times", "ticks overflow 31 bits")
    quarters = onsets[-1] / score.ticks_per_quarter
    if quarters > limits.max_quarters:
        raise Reject("too long", f"{quarters:.0f} quarter notes, expected at most {limits.max_quarters}")
    tempos = score.tempos.numpy()
    if len(tempos["mspq"]):
        with np.errstate(divide="ignore"):
            bpm = 60e6 / tempos["mspq"].astype(np.float64)
        if not (bpm.min() >= limits.min_tempo and bpm.max() <= limits.max_tempo):
            raise Reject(
                "absurd tempo",
                f"{bpm.min():.4g} to {bpm.max():.4g}, expected {limits.min_tempo:g} to {limits.max_tempo:g}",
            )
    sounding = np.maximum.accumulate(ends)
    starts = seconds_at(onsets, tempos, score.ticks_per_quarter)
    stops = seconds_at(sounding, tempos, score.ticks_per_quarter)
    silence = float(max(starts[0], (starts[1:] - stops[:-1]).max(initial=0.0)))
    if silence > limits.max_silence:
        raise Reject("long silence", f"{silence:.0f} s, expected at most {limits.max_silence:.0f} s")
    return float(stops[-1])


def seconds_at(
    ticks: npt.NDArray[np.int64], tempos: dict[str, npt.NDArray[Any]], per_quarter: int
) -> npt.NDArray[np.float64]:
    """Time in seconds of each of ``ticks`` under ``tempos`` (columns time, mspq, sorted); 120 before the first."""
    changes = np.append(0, tempos["time"]).astype(np.float64)
    length = np.append(500_000, tempos["mspq"]) / 1e6 / per_quarter  # seconds a tick
    begins = np.append(0.0, np.cumsum(np.diff(changes) * length[:-1]))
    which = np.searchsorted(changes, ticks, side="right") - 1
    return np.asarray(begins[which] + (ticks - changes[which]) * length[which])


def content_hash(score: Score) -> bytes:
    """16 bytes that depend on the onsets, in quarter notes, and pitches of the notes of the first track only."""
    notes = score.tracks[0].notes.numpy()
    per_quarter = score.ticks_per_quarter
    # twelfths of a quarter, rounded half up in whole numbers: the same for every division that can tell them apart
    onsets = (notes["time"].astype(np.int64) * 24 + per_quarter) // (2 * per_quarter)
    keys = np.unique(onsets * 128 + notes["pitch"])
    return hashlib.blake2b(keys.astype("<i8").tobytes(), digest_size=16).digest()


def split_of(digest: bytes) -> str:
    """The split of a piece: its hash as a fraction of one; 10% test, 9% validation, 81% train."""
    share = int.from_bytes(digest[:8], "big") / 2**64
    if share < TEST_SHARE:
        return "test"
    return "validation" if share < TEST_SHARE + VALIDATION_SHARE * (1 - TEST_SHARE) else "train"


def read_piece(data: bytes, tokenizer: Any, limits: Limits) -> Piece:
    """The piece in the bytes of a MIDI file. Raises ``Reject`` with the reason where it is left out."""
    check_structure(data, limits)
    try:
        score = Score.from_midi(data)
    except (RuntimeError, ValueError, OverflowError) as error:
        raise Reject("cannot be parsed", str(error).splitlines()[0]) from None
    score = merge_piano(score)
    low, high = tokenizer.config.pitch_range
    for track in score.tracks:
        track.notes = track.notes.filter(lambda note: low <= note.pitch <= high)
    score.tracks = [track for track in score.tracks if len(track.notes)]
    seconds = check_notes(score, limits)
    digest = content_hash(score)
    tokens = settled_tokens(tokenizer, score)
    facts = vocabulary(tokenizer)
    array = np.array(tokens)
    bar = np.cumsum(array == facts.bar_id) - 1
    counts = np.bincount(bar[np.isin(array, facts.pitch_ids)], minlength=bar[-1] + 1)
    if counts.max() > limits.max_bar_notes:
        raise Reject("too many notes in a bar", f"{counts.max()}, expected at most {limits.max_bar_notes}")
    empty = float((counts == 0).mean())
    if empty > limits.max_empty_bars:
        raise Reject("too many empty bars", f"{empty:.0%}, expected at most {limits.max_empty_bars:.0%}")
    if (counts > 0).sum() < limits.min_bars:
        raise Reject("too short", f"{(counts > 0).sum()} bars with notes, expected at least {limits.min_bars}")
    return Piece(digest, array.astype(shards.DTYPE).tobytes(), int(counts.sum()), len(counts), seconds)


def settled_tokens(tokenizer: Any, score: Score) -> list[int]:
    """Tokens of ``score`` that decode to music which encodes to the same tokens. Raises ``Reject``."""
    tokens = encode(tokenizer, score)
    for _ in range(3):
        again = encode(tokenizer, decode(tokenizer, tokens))
        if again == tokens:
            return tokens
        tokens = again
    raise Reject("no round trip", "its tokens do not decode to music with the same tokens")


def worker_main(descriptor: int) -> None:
    """Serve read_piece over a socket until the other side closes it; started by ``Worker``, in a fresh interpreter."""
    import resource

    connection = Connection(descriptor)
    with contextlib.suppress(EOFError, KeyboardInterrupt, BrokenPipeError):
        tokenizer_file, settings = connection.recv()
        tokenizer, limits = load_tokenizer(tokenizer_file), Limits(**settings)
        decode(tokenizer, encode(tokenizer, Score(480)))  # what is loaded lazily is loaded before memory is limited
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        bound = pages * os.sysconf("SC_PAGE_SIZE") + (limits.megabytes << 20)
        resource.setrlimit(resource.RLIMIT_AS, (bound, bound))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        connection.send("ready")
        while True:
            path = connection.recv()
            # SIGALRM's default action ends the process even inside a native parser that never returns
            signal.setitimer(signal.ITIMER_REAL, limits.seconds)
            answer = _answer(path, tokenizer, limits)
            signal.setitimer(signal.ITIMER_REAL, 0)
            connection.send(answer)


def _answer(path: bytes, tokenizer: Any, limits: Limits) -> Piece | tuple[str, str]:
    try:
        with open(path, "rb") as file:
            data = file.read(limits.max_bytes + 1)
        if len(data) > limits.max_bytes:
            raise Reject("too large", f"over {limits.max_bytes} bytes")
        return read_piece(data, tokenizer, limits)
    except Reject as reject:
        return reject.reason, reject.detail
    except MemoryError:
        return "memory limit", f"over {limits.megabytes} MB"
    except OSError as error:
        return "cannot be read", str(error.strerror)
    except Exception as error:  # a parser's or tokenizer's bug on this file: a reject with its text, never silence
        return "cannot be tokenised", f"{type(error).__name__}: {error}".splitlines()[0][:200]


# --- Worker processes ----------------------------------------------------------------------------------------------


class Worker:
    """A process that reads files one after another; ``pending`` are those it was given and has not answered."""

    GRACE = 10.0  # seconds past the limit after which a worker that did not end itself is killed

    def __init__(self, tokenizer_file: Path, limits: Limits) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    f"from smart.corpus import worker_main; worker_main({theirs.fileno()})",
                ],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"},
            )
        self.connection = Connection(ours.detach())
        self.limits = limits
        self.pending: deque[tuple[bytes, bytes]] = deque()  # (key, path)
        self.ready = False
        self.since = time.monotonic()
        self.connection.send((str(tokenizer_file), asdict(limits)))

    def give(self, key: bytes, path: bytes) -> None:
        if not self.pending:
            self.since = time.monotonic()
        self.pending.append((key, path))
        self.connection.send(path)

    def overdue(self) -> bool:
        return bool(self.pending) and self.ready and time.monotonic() - self.since > self.limits.seconds + self.GRACE

    def close(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.wait()


def run_workers(
    tasks: Iterator[tuple[bytes, bytes]], tokenizer_file: Path, limits: Limits, count: int
) -> Iterator[tuple[bytes, Piece | tuple[str, str]]]:
    """Yield (key, answer) for every (key, path) of ``tasks``, in the order in which they are done.

    A worker that ran out of time rejects its file. One that crashed is given the file once more in a fresh process,
    in case it was killed for no fault of the file; a second crash rejects the file.
    """
    again: deque[tuple[bytes, bytes]] = deque()
    crashed: set[bytes] = set()
    workers = [Worker(tokenizer_file, limits) for _ in range(count)]
    try:
        while True:
            for worker in workers:
                while len(worker.pending) < 8:
                    task = again.popleft() if again else next(tasks, None)
                    if task is None:
                        break
                    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # seen below as its end
                        worker.give(*task)
            if not any(worker.pending for worker in workers):
                return
            for worker in workers:
                if worker.overdue():
                    worker.process.kill()
            busy = {worker.connection: worker for worker in workers}
            for connection in wait(list(busy), timeout=1.0):
                worker = busy[connection]  # type: ignore[index]  # what comes back is what was put in
                try:
                    answer = worker.connection.recv()
                except (EOFError, ConnectionResetError):
                    workers[workers.index(worker)] = Worker(tokenizer_file, limits)
                    yield from _bury(worker, again, crashed)
                    continue
                if answer == "ready":
                    worker.ready, worker.since = True, time.monotonic()
                    continue
                key, _ = worker.pending.popleft()
                worker.since = time.monotonic()
                yield key, answer
    finally:
        for worker in workers:
            worker.close()


def _bury(
    worker: Worker, again: deque[tuple[bytes, bytes]], crashed: set[bytes]
) -> Iterator[tuple[bytes, tuple[str, str]]]:
    """Account for a worker that died: its current file is rejected or tried again, the others are handed back."""
    overdue = worker.overdue()
    worker.connection.close()
    code = worker.process.wait()
    if not worker.ready:
        raise RuntimeError(f"a worker process ended with exit code {code} before it could start")
    if worker.pending:
        key, path = worker.pending.popleft()
        if overdue or code == -signal.SIGALRM:
            yield key, ("time limit", f"over {worker.limits.seconds:g} s")
        elif key in crashed:
            crashed.discard(key)
            what = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            yield key, ("crash", f"the parser died twice, by {what}")
        else:
            crashed.add(key)
            again.append((key, path))
    again.extend(worker.pending)


# --- The state of a build --------------------------------------------------------------------------------------------

SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT);
CREATE TABLE IF NOT EXISTS files (
    path BLOB PRIMARY KEY, reason TEXT, detail TEXT,
    hash BLOB, place INTEGER, length INTEGER, notes INTEGER, bars INTEGER, seconds REAL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_hash ON files (hash, path) WHERE hash IS NOT NULL;
"""
KEPT, PENDING = "kept", None  # values of ``reason`` beside those of rejects


class State:
    """One row a file, and a spool of tokens; both survive a kill at any instant as of the last ``commit``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = open(folder / "lock", "w")  # noqa: SIM115 (held as long as this object)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"corpus {folder.parent}: another build is writing it; wait for it or stop it") from None
        self.table = sqlite3.connect(folder / "state.sqlite", isolation_level=None)
        self.table.executescript(SCHEMA)
        self.table.execute("BEGIN")
        self.spool = open(folder / "spool.bin", "ab")  # noqa: SIM115 (closed by close)
        self.end = int(self.get("spool", "0"))
        if self.spool.seek(0, os.SEEK_END) < self.end:
            raise UserError(f"corpus {folder.parent}: its unfinished build is damaged; start again with --overwrite")
        self.spool.truncate(self.end)

    def get(self, key: str, default: str) -> str:
        row = self.table.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return default if row is None else str(row[0])

    def put(self, key: str, value: str) -> None:
        self.table.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    def commit(self) -> None:
        """Tokens first, then the rows that point to them."""
        self.spool.flush()
        os.fsync(self.spool.fileno())
        self.put("spool", str(self.end))
        self.table.execute("COMMIT")
        self.table.execute("BEGIN")

    def record(self, path: bytes, answer: Piece | tuple[str, str]) -> None:
        if isinstance(answer, Piece):
            self.spool.write(answer.tokens)
            values: tuple[Any, ...] = (KEPT, "", answer.digest, self.end, len(answer.tokens), answer.notes)
            values += (answer.bars, answer.seconds)
            self.end += len(answer.tokens)
        else:
            values = (*answer, None, None, None, None, None, None)
        self.table.execute("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", (path, *values))

    def pending(self) -> Iterator[bytes]:
        """Paths without an answer, in order, read a page at a time so that rows may change meanwhile."""
        last = b""
        while page := self.table.execute(
            "SELECT path FROM files WHERE path > ? AND reason IS NULL ORDER BY path LIMIT 1000", (last,)
        ).fetchall():
            for (last,) in page:
                yield last

    def count(self, where: str) -> int:
        return int(self.table.execute(f"SELECT COUNT(*) FROM files WHERE {where}").fetchone()[0])

    def close(self) -> None:
        self.table.close()
        self.spool.close()
        self._lock.close()


def find_files(
    folders: Sequence[Path], include: Sequence[str], listed: frozenset[str] | None
) -> Iterator[tuple[bytes, Path]]:
    """(key, path) of every .mid and .midi file under ``folders``; a key is the folder's name and the path in it."""
    for root in folders:
        for folder, _, names in os.walk(root):
            for name in names:
                if not name.lower().endswith(EXTENSIONS):
                    continue
                path = Path(folder, name)
                key = Path(root.name, path.relative_to(root))
                if include and not any(fnmatch.fnmatchcase(str(key), pattern) for pattern in include):
                    continue
                if listed is not None and str(key) not in listed:
                    continue
                yield os.fsencode(key), path


# --- Building --------------------------------------------------------------------------------------------------------


@dataclass
class Summary:
    """What a build did; ``counts`` are files by reason, ``kept`` among them."""

    folder: Path
    counts: Counter[str] = field(default_factory=Counter)
    pieces: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    files: int = 0  # worked on in this run


def build(
    folders: Sequence[Path],
    out: Path,
    *,
    workers: int = 1,
    tokenizer: Any = None,
    limits: Limits | None = None,
    include: Sequence[str] = (),
    listed: frozenset[str] | None = None,
    overwrite: bool = False,
    shard_tokens: int = shards.SHARD_TOKENS,
) -> Summary:
    """Tokenise the MIDI files under ``folders`` into the corpus ``out``; continues an unfinished build of the same.

    Raises ``UserError`` where a folder is missing, ``out`` holds something else, or there is nothing to keep.
    """
    limits = limits or Limits()
    roots = [Path(folder).resolve() for folder in folders]
    for root in roots:
        if not root.is_dir():
            raise UserError(f"--midi {root}: no such folder")
    if len({root.name for root in roots}) < len(roots):
        raise UserError("--midi: two folders have the same name; give their parent, or rename one")
    work = out / ".work"
    if out.exists() and overwrite:
        _clear(out)
    if (out / shards.MANIFEST).exists():
        raise UserError(f"--out {out}: holds a finished corpus; give another folder, or --overwrite")
    if out.exists() and any(out.iterdir()) and not work.is_dir():
        raise UserError(f"--out {out}: not empty and no unfinished corpus; give another folder")
    state = State(work)
    tokenizer = tokenizer or build_tokenizer()
    save_tokenizer(tokenizer, out / "tokenizer")
    tokenizer_file = out / "tokenizer" / "tokenizer.json"
    settings = {
        "midi": [root.name for root in roots],
        "include": sorted(include),
        "list": None if listed is None else hashlib.sha256("\n".join(sorted(listed)).encode()).hexdigest(),
        "limits": asdict(limits),
        "shard_tokens": shard_tokens,
        "tokenizer": shards.sha256(tokenizer_file),
    }
    if state.get("settings", "") not in ("", json.dumps(settings)):
        raise UserError(f"--out {out}: unfinished, with other settings; finish it with those, or give --overwrite")
    state.put("settings", json.dumps(settings))
    with contextlib.closing(state):
        places = {os.fsencode(root.name): os.fsencode(root) for root in roots}
        for key, _ in find_files(roots, include, listed):
            state.table.execute("INSERT OR IGNORE INTO files (path) VALUES (?)", (key,))
        state.commit()
        if not state.count("1"):
            raise UserError(f"--midi {', '.join(map(str, roots))}: no .mid or .midi file")
        summary = Summary(out)
        started = time.monotonic()
        summary.files = _tokenise(state, places, tokenizer_file, limits, workers)
        _finish(state, out, settings, summary, shard_tokens)
        summary.seconds = time.monotonic() - started
    shutil.rmtree(work)
    return summary


def _clear(out: Path) -> None:
    """Remove what a build wrote; refuse a folder that holds anything that no build writes."""
    ours = {shards.MANIFEST, "tokenizer", ".work", "pieces.csv", "rejects.csv", "stats.png"}
    foreign = [p.name for p in out.iterdir() if p.name not in ours and not p.name.startswith(shards.SPLITS)]
    if foreign:
        raise UserError(f"--overwrite {out}: holds {foreign[0]!r}, which no build wrote; give another folder")
    shutil.rmtree(out)


def _tokenise(
    state: State, places: dict[bytes, bytes], tokenizer_file: Path, limits: Limits, workers: int
) -> int:
    def tasks() -> Iterator[tuple[bytes, bytes]]:
        for key in state.pending():
            root, _, rest = key.partition(b"/")
            yield key, places[root] + b"/" + rest

    total, left = state.count("1"), state.count("reason IS NULL")
    rejects = state.count(f"reason IS NOT NULL AND reason != '{KEPT}'")
    if not left:
        return 0
    saved = time.monotonic()
    with tqdm(total=total, initial=total - left, unit="file", desc="corpus", smoothing=0.05) as bar:
        for key, answer in run_workers(tasks(), tokenizer_file, limits, min(workers, left)):
            state.record(key, answer)
            rejects += not isinstance(answer, Piece)
            bar.set_postfix(rejects=rejects, refresh=False)
            bar.update()
            if time.monotonic() - saved > 2:
                state.commit()
                saved = time.monotonic()
    state.commit()
    return left


def _finish(state: State, out: Path, settings: dict[str, Any], summary: Summary, shard_tokens: int) -> None:
    """Sort the pieces into shards, by path, and write the tables and, last, the manifest."""
    state.table.execute(
        """UPDATE files SET reason = 'duplicate', detail = (
             SELECT MIN(first.path) FROM files AS first WHERE first.hash = files.hash)
           WHERE hash IS NOT NULL AND path > (SELECT MIN(first.path) FROM files AS first WHERE first.hash = files.hash)"""
    )
    writers = {split: shards.ShardWriter(out, split, shard_tokens=shard_tokens) for split in shards.SPLITS}
    columns = "path, hash, place, length, notes, bars, seconds"

    def pieces(file: IO[bytes]) -> None:
        table = _csv(file, ["path", "hash", "split", "shard", "index", "tokens", "notes", "bars", "seconds"])
        with open(state.folder / "spool.bin", "rb") as spool:
            for path, digest, place, length, notes, bars, seconds in state.table.execute(
                f"SELECT {columns} FROM files WHERE reason = '{KEPT}' ORDER BY path"
            ):
                spool.seek(place)
                split = split_of(digest)
                shard, index = writers[split].add(spool.read(length))
                row = [_shown(path), digest.hex(), split, shard, index, length // 2, notes, bars, f"{seconds:.2f}"]
                table.writerow(row)

    def rejects(file: IO[bytes]) -> None:
        table = _csv(file, ["path", "reason", "detail"])
        for path, reason, detail in state.table.execute(
            f"SELECT path, reason, detail FROM files WHERE reason != '{KEPT}' ORDER BY path"
        ):
            table.writerow([_shown(path), reason, _shown(detail) if isinstance(detail, bytes) else detail])

    shards.write_atomically(out / "pieces.csv", pieces)
    shards.write_atomically(out / "rejects.csv", rejects)
    splits = {split: {"shards": writers[split].close()} for split in shards.SPLITS}
    counts = state.table.execute("SELECT reason, COUNT(*) FROM files GROUP BY reason ORDER BY reason").fetchall()
    summary.counts = Counter(dict(counts))
    for split in shards.SPLITS:
        summary.pieces[split] = sum(shard["pieces"] for shard in splits[split]["shards"])
        summary.tokens[split] = sum(shard["tokens"] for shard in splits[split]["shards"])
    if not summary.counts[KEPT]:
        reasons = ", ".join(f"{reason} {number}" for reason, number in counts)
        raise UserError(f"--midi: none of the {sum(summary.counts.values())} files can be kept ({reasons})")
    manifest = {
        "format": shards.FORMAT,
        "settings": settings,
        "tokenizer": {"sha256": settings["tokenizer"]},
        "versions": {name: version(name) for name in ("smart", "miditok", "symusic", "numpy")},
        "counts": dict(counts),
        "pieces": summary.pieces,
        "tokens": summary.tokens,
        "splits": splits,
        "files": {name: shards.sha256(out / name) for name in ("pieces.csv", "rejects.csv")},
    }
    text = json.dumps(manifest, indent=2) + "\n"
    shards.write_atomically(out / shards.MANIFEST, lambda file: file.write(text.encode()))


def _csv(file: IO[bytes], header: Sequence[str]) -> Any:
    class Text:
        def write(self, line: str) -> None:
            file.write(line.encode("utf-8", "backslashreplace"))

    table = csv.writer(Text(), lineterminator="\n")
    table.writerow(header)
    return table


def _shown(path: bytes) -> str:
    return path.decode("utf-8", "backslashreplace")


@click.group()
def main() -> None:
    """Turn folders of MIDI files into a tokenised corpus, and look into one."""


@main.command("build")
@click.option("--midi", "folders", multiple=True, required=True, type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path))
@click.option("--workers", default=os.cpu_count() or 1, show_default=True, type=click.IntRange(min=1))
@click.option("--tokenizer", "tokenizer_path", help="tokenizer.json, a folder with it, or a hub id")
@click.option("--include", multiple=True)
@click.option("--list", "list_file", type=click.Path(path_type=Path))
@click.option("--overwrite", is_flag=True)
def build_command(
    folders: tuple[Path, ...],
    out: Path,
    workers: int,
    tokenizer_path: str | None,
    include: tuple[str, ...],
    list_file: Path | None,
    overwrite: bool,
) -> None:
    """Tokenise the MIDI files under --midi."""
    listed = None
    if list_file is not None:
        listed = frozenset(line for line in list_file.read_text().splitlines() if line)
    tokenizer = load_tokenizer(tokenizer_path) if tokenizer_path else None
    summary = build(
        folders, out, workers=workers, tokenizer=tokenizer, include=include, listed=listed, overwrite=overwrite
    )
    print(summary)


if __name__ == "__main__":
    from smart.corpus import main as run

    run()
