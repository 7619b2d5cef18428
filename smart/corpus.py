"""From folders of MIDI files, many of them broken, to tokenised pieces in shards: ``python -m smart.corpus build``.

What a file must be to be kept is said in ``smart.midi`` (paper section 3.1). Of files with the same onsets
and pitches one is kept, the first by path. A piece goes into ``train``, ``validation`` or ``test`` by the
hash of its onsets and pitches alone, so that no piece is in two splits, and each stays where it is when files
are added.

Scraped files crash, hang or swell native parsers. Every file is therefore read by a worker process with a
limit on time and memory (``smart.midi_pool``); one that kills its worker goes into ``rejects.csv`` with the
reason, like every other that is left out.

A build keeps its state in ``OUT/.work`` (an SQLite table with a row for each file, and the tokens so far) and
continues from there after it was killed. The result depends on the files and the settings alone: not on the
number of workers, on the order in which they finish, or on interruptions. Memory does not grow with the
corpus.
"""

import contextlib
import csv
import fnmatch
import hashlib
import json
import os
import re
import shutil
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import click
import numpy as np
import numpy.typing as npt

from smart import UserError, shards
from smart.files import hold, is_leftover, sha256, write_atomically
from smart.midi import Limits, Piece
from smart.midi_pool import Pool
from smart.shards import Corpus
from smart.tokens import FILE_NAME, build_tokenizer, load_tokenizer, save_tokenizer, vocabulary
from smart.track import in_one_line, progress

EXTENSIONS = (".mid", ".midi")
TEST_SHARE, VALIDATION_SHARE = 0.1, 0.1  # of all pieces; of those that are not test (paper section 3.1)
SHARD_FILE = re.compile(rf"({'|'.join(shards.SPLITS)})-\d{{5,}}\.(bin|idx\.npy)(\.tmp)?")
COMMIT_SECONDS = 2.0  # at most so much work is lost when a build is killed


def split_of(digest: bytes) -> str:
    """The split of a piece by its hash, read as a fraction of one: 10% test, 9% validation, 81% train."""
    share = int.from_bytes(digest[:8], "big") / 2**64
    if share < TEST_SHARE:
        return "test"
    return "validation" if share < TEST_SHARE + VALIDATION_SHARE * (1 - TEST_SHARE) else "train"


# --- The state of a build -----------------------------------------------------------------------------------------

KEPT, DUPLICATE = "kept", "duplicate"  # reasons that no worker gives
DAMAGED = "its unfinished build is damaged"
SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT);
CREATE TABLE IF NOT EXISTS files (
    path BLOB PRIMARY KEY, reason TEXT, detail,
    hash BLOB, place INTEGER, length INTEGER, notes INTEGER, bars INTEGER, seconds REAL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_hash ON files (hash, path) WHERE hash IS NOT NULL;
"""
FIRST = "(SELECT MIN(first.path) FROM files AS first WHERE first.hash = files.hash)"


class State:
    """A row for each file, and a spool of tokens; after a kill at any instant both are as of the last ``commit``.

    ``reason`` is null for files that have not been read, ``kept`` for pieces.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._open = contextlib.ExitStack()
        with contextlib.ExitStack() as opened:  # closed again where anything below fails
            _hold(folder, opened)
            damaged = f"--out {folder.parent}: {DAMAGED}; start again with --overwrite"
            self.table = sqlite3.connect(folder / "state.sqlite", isolation_level=None)
            opened.callback(self.table.close)
            try:
                self.table.executescript(SCHEMA)
                self.table.execute("BEGIN")
                self.end = int(self.get("spool") or 0)
            except sqlite3.OperationalError:  # a disk that is full, or may not be written
                raise
            except (sqlite3.DatabaseError, ValueError):
                raise UserError(damaged) from None
            self.spool = opened.enter_context(open(folder / "spool.bin", "ab"))
            if self.spool.seek(0, os.SEEK_END) < self.end:
                raise UserError(damaged)
            self.spool.truncate(self.end)
            self._open = opened.pop_all()

    def close(self) -> None:
        self._open.close()

    def get(self, key: str) -> str:
        row = self.table.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return "" if row is None else str(row[0])

    def put(self, key: str, value: str) -> None:
        self.table.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    def commit(self) -> None:
        """Make everything so far durable: tokens first, then the rows that point to them."""
        self.spool.flush()
        os.fsync(self.spool.fileno())
        self.put("spool", str(self.end))
        self.table.execute("COMMIT")
        self.table.execute("BEGIN")

    def list_files(self, keys: Iterator[bytes]) -> None:
        """Add the files that are not listed yet, and forget those that are gone."""
        self.table.execute("CREATE TEMP TABLE present (path BLOB PRIMARY KEY) WITHOUT ROWID")
        self.table.executemany("INSERT OR IGNORE INTO present VALUES (?)", ((key,) for key in keys))
        self.table.execute("DELETE FROM files WHERE path NOT IN present")
        self.table.execute("INSERT OR IGNORE INTO files (path) SELECT path FROM present")
        self.table.execute("DROP TABLE present")
        self.commit()

    def record(self, key: bytes, answer: Piece | tuple[str, str]) -> None:
        row: tuple[Any, ...]
        if isinstance(answer, Piece):
            self.spool.write(answer.tokens)
            row = (KEPT, "", answer.digest, self.end, len(answer.tokens), answer.notes, answer.bars, answer.seconds)
            self.end += len(answer.tokens)
        else:
            row = (*answer, *[None] * 6)
        self.table.execute("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", (key, *row))

    def unread(self) -> Iterator[bytes]:
        """Keys of files that have not been read, in order; a page at a time, as rows change meanwhile."""
        last = b""
        query = "SELECT path FROM files WHERE path > ? AND reason IS NULL ORDER BY path LIMIT 1000"
        while page := self.table.execute(query, (last,)).fetchall():
            for (last,) in page:
                yield last

    def mark_duplicates(self) -> None:
        """Of pieces with one hash, keep the first by path."""
        self.table.execute("UPDATE files SET reason = ?, detail = '' WHERE hash IS NOT NULL", (KEPT,))
        self.table.execute(
            f"UPDATE files SET reason = ?, detail = {FIRST} WHERE hash IS NOT NULL AND path > {FIRST}", (DUPLICATE,)
        )

    def rows(self, columns: str, where: str, *values: Any) -> Iterator[tuple[Any, ...]]:
        yield from self.table.execute(f"SELECT {columns} FROM files WHERE {where} ORDER BY path", values)

    def count(self, where: str, *values: Any) -> int:
        return int(self.table.execute(f"SELECT COUNT(*) FROM files WHERE {where}", values).fetchone()[0])

    def reasons(self) -> dict[str, int]:
        return dict(self.table.execute("SELECT reason, COUNT(*) FROM files GROUP BY reason ORDER BY reason"))


def _hold(work: Path, held: contextlib.ExitStack) -> None:
    """Have no other build work in ``work``. Raises ``UserError`` where one does."""
    try:
        held.enter_context(hold(work))
    except BlockingIOError:
        raise UserError(f"--out {work.parent}: another build is writing it; wait for it") from None


# --- Building -----------------------------------------------------------------------------------------------------


@dataclass
class Summary:
    """What a build made: files by reason, ``kept`` among them, and pieces and tokens by split."""

    counts: dict[str, int] = field(default_factory=dict)
    pieces: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    read: int = 0  # files read by this run; less than all where it continued another
    seconds: float = 0.0  # of this run


def find_files(
    folders: Sequence[Path], include: Sequence[str] = (), listed: frozenset[str] | None = None
) -> Iterator[bytes]:
    """Keys of what is named .mid or .midi under ``folders``: the folder's name, then the path in it.

    ``include``: glob patterns of which a key must match one. ``listed``: the only keys to take. Folders that
    cannot be listed are among the keys too, so that they are rejected and not passed over; so is whatever else
    bears such a name. Links to folders are not followed.
    """
    for root in folders:
        prefix = str(root.parent / "x")[:-1]  # with its slash, also at the top
        left = [str(root)]
        while left:
            folder = left.pop()
            try:
                with os.scandir(folder) as entries:  # one entry at a time: a folder may hold millions
                    for entry in entries:
                        if entry.is_dir(follow_symlinks=False):
                            left.append(entry.path)
                        if not entry.name.lower().endswith(EXTENSIONS):
                            continue
                        key = entry.path.removeprefix(prefix)
                        if include and not any(fnmatch.fnmatchcase(key, pattern) for pattern in include):
                            continue
                        if listed is None or key in listed:
                            yield os.fsencode(key)
            except OSError:
                yield os.fsencode(folder.removeprefix(prefix))


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
    """Tokenise the MIDI files under ``folders`` into the corpus ``out``, or continue an unfinished build of it.

    Raises ``UserError`` where a folder is missing, ``out`` holds something else, or there is nothing to keep.
    """
    limits, tokenizer = limits or Limits(), tokenizer or build_tokenizer()
    roots = [Path(folder).resolve() for folder in folders]
    for root in roots:
        if not root.is_dir():
            raise UserError(f"--midi {root}: no such folder")
    if len({root.name for root in roots}) < len(roots):
        raise UserError("--midi: two folders have the same name; rename one, or give the folder that holds both")
    if len(tokenizer.vocab) > 1 << 16:
        raise UserError(f"--tokenizer: {len(tokenizer.vocab)} tokens, expected at most 65,536")
    _check_out(out, overwrite)
    started = time.monotonic()
    state = State(out / ".work")
    with contextlib.closing(state):
        save_tokenizer(tokenizer, out / ".work")
        tokenizer_file = out / "tokenizer" / FILE_NAME
        tokenizer_file.parent.mkdir(exist_ok=True)
        write_atomically(tokenizer_file, (out / ".work" / FILE_NAME).read_bytes())
        settings = {
            "midi": [root.name for root in roots],
            "include": sorted(include),
            "list": None if listed is None else hashlib.sha256("\n".join(sorted(listed)).encode()).hexdigest(),
            "limits": asdict(limits),
            "shard_tokens": shard_tokens,
            "tokenizer": sha256(tokenizer_file),
        }
        if state.get("settings") not in ("", json.dumps(settings)):
            raise UserError(f"--out {out}: begun with other settings; finish it with those, or give --overwrite")
        state.put("settings", json.dumps(settings))
        state.list_files(find_files(roots, include, listed))
        if not state.count("1"):
            raise UserError(f"--midi {', '.join(map(str, folders))}: no .mid or .midi file that was asked for")
        summary = Summary()
        with Pool(tokenizer_file, limits, min(workers, max(state.count("reason IS NULL"), 1))) as pool:
            summary.read = _read_all(state, {os.fsencode(root.name): os.fsencode(root) for root in roots}, pool)
        _write(state, out, settings, summary)
        (out / ".work").rename(out / ".work.tmp")  # at once, so that a kill leaves no half of a state
    shutil.rmtree(out / ".work.tmp", ignore_errors=True)
    summary.seconds = time.monotonic() - started
    return summary


def _check_out(out: Path, overwrite: bool) -> None:
    """Refuse a folder that a build may not write to; with ``overwrite``, clear what a build wrote before."""
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"--out {out}: is not a folder")
    ours = {shards.MANIFEST, "tokenizer", ".work", "pieces.csv", "rejects.csv", "stats.png"}
    foreign = [
        path.name
        for path in out.iterdir()
        if path.name.removesuffix(".tmp") not in ours and not SHARD_FILE.fullmatch(path.name) and not is_leftover(path)
    ]
    if foreign:
        raise UserError(f"--out {out}: holds {foreign[0]!r}, which no build wrote; give another folder")
    shutil.rmtree(out / ".work.tmp", ignore_errors=True)  # of a build that was killed after its last write
    if overwrite:
        with contextlib.ExitStack() as held:
            if (out / ".work").is_dir():
                _hold(out / ".work", held)
            # first, so that what is half cleared does not look finished
            (out / shards.MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(out)
    elif (out / shards.MANIFEST).exists() and not (out / ".work").exists():
        raise UserError(f"--out {out}: holds a finished corpus; give another folder, or --overwrite")


def _read_all(state: State, roots: dict[bytes, bytes], pool: Pool) -> int:
    """Have every unread file read; returns how many these were."""

    def tasks() -> Iterator[tuple[bytes, bytes]]:
        for key in state.unread():
            name, _, rest = key.partition(b"/")
            yield key, roots[name] + b"/" + rest

    total, left = state.count("1"), state.count("reason IS NULL")
    rejects = state.count("reason IS NOT NULL AND reason != ?", KEPT)
    saved = time.monotonic()
    with progress(total=total, initial=total - left, unit=" files", desc="corpus") as bar:
        for key, answer in pool.answers(tasks()):
            state.record(key, answer)
            rejects += not isinstance(answer, Piece)
            bar.set_postfix(rejects=rejects, refresh=False)
            bar.update()
            if time.monotonic() - saved > COMMIT_SECONDS:
                state.commit()
                saved = time.monotonic()
    state.commit()
    return left


def _write(state: State, out: Path, settings: dict[str, Any], summary: Summary) -> None:
    """Write the pieces into shards, by path, then the tables and, last, the manifest."""
    for path in [out / shards.MANIFEST, *filter(lambda path: SHARD_FILE.fullmatch(path.name), out.iterdir())]:
        path.unlink(missing_ok=True)  # of a run that was killed here; files may have come and gone since
    state.mark_duplicates()
    summary.counts = state.reasons()
    if KEPT not in summary.counts:
        reasons = ", ".join(f"{number} {reason}" for reason, number in summary.counts.items())
        raise UserError(f"--midi: no file can be kept ({reasons}); nothing was built")
    writers = {split: shards.ShardWriter(out, split, shard_tokens=settings["shard_tokens"]) for split in shards.SPLITS}
    write_atomically(out / "pieces.csv", lambda file: _write_pieces(state, writers, file))
    write_atomically(out / "rejects.csv", lambda file: _write_rejects(state, file))
    splits = {split: writer.close() for split, writer in writers.items()}
    summary.pieces = {split: sum(shard["pieces"] for shard in splits[split]) for split in splits}
    summary.tokens = {split: sum(shard["tokens"] for shard in splits[split]) for split in splits}
    manifest = {
        "format": shards.FORMAT,
        "settings": settings,
        "tokenizer": {"sha256": settings["tokenizer"]},
        "versions": {name: version(name) for name in ("smart", "miditok", "symusic", "numpy")},
        "counts": summary.counts,
        "pieces": summary.pieces,
        "tokens": summary.tokens,
        "splits": {split: {"shards": splits[split]} for split in splits},
        "files": {name: sha256(out / name) for name in ("pieces.csv", "rejects.csv")},
    }
    text = json.dumps(manifest, indent=2) + "\n"
    write_atomically(out / shards.MANIFEST, lambda file: file.write(text.encode()))


def _write_pieces(state: State, writers: dict[str, shards.ShardWriter], file: IO[bytes]) -> None:
    table = _table(file, "path", "hash", "split", "shard", "index", "tokens", "notes", "bars", "seconds")
    columns = "path, hash, place, length, notes, bars, seconds"
    with open(state.folder / "spool.bin", "rb") as spool:
        for path, digest, place, length, notes, bars, seconds in state.rows(columns, "reason = ?", KEPT):
            spool.seek(place)
            split = split_of(digest)
            shard, index = writers[split].add(spool.read(length))
            numbers = (length // shards.DTYPE.itemsize, notes, bars, f"{seconds:.2f}")
            table([_shown(path), digest.hex(), split, shard, index, *numbers])


def _write_rejects(state: State, file: IO[bytes]) -> None:
    table = _table(file, "path", "reason", "detail")
    for path, reason, detail in state.rows("path, reason, detail", "reason != ?", KEPT):
        table([_shown(path), reason, f"of {_shown(detail)}" if reason == DUPLICATE else detail])


def _table(file: IO[bytes], *header: str) -> Callable[[Sequence[Any]], object]:
    """A CSV writer into a binary file."""

    class Text:
        def write(self, line: str) -> None:
            file.write(line.encode("utf-8", "backslashreplace"))

    writer = csv.writer(Text(), lineterminator="\n")
    writer.writerow(header)
    return writer.writerow


def _shown(path: bytes) -> str:
    """A path for people; file names need not be UTF-8."""
    return path.decode("utf-8", "backslashreplace")


# --- What is in a corpus ------------------------------------------------------------------------------------------


@dataclass
class Statistics:
    """Counts over a corpus; ``vocabulary_counts`` (V,) tells how often each token occurs."""

    tokens_per_piece: npt.NDArray[np.int64]
    vocabulary_counts: npt.NDArray[np.int64]
    notes_per_bar: npt.NDArray[np.int64]  # [n]: bars with n notes


def measure(corpus: Corpus, splits: Sequence[str] = shards.SPLITS) -> Statistics:
    """Count tokens and notes per bar, a few hundred pieces at a time."""
    facts = vocabulary(corpus.tokenizer)
    is_pitch = np.zeros(facts.size, dtype=bool)
    is_pitch[[*facts.pitch_ids, *facts.drum_ids]] = True
    total = Statistics(np.zeros(0, np.int64), np.zeros(facts.size, np.int64), np.zeros(1, np.int64))
    for name in splits:
        split = corpus.split(name)
        total.tokens_per_piece = np.append(total.tokens_per_piece, split.lengths())
        for start in range(0, len(split), 256):
            tokens = np.concatenate(split[start : start + 256]).astype(np.int64)
            total.vocabulary_counts += np.bincount(tokens, minlength=facts.size)
            bar = np.cumsum(tokens == facts.bar_id) - 1  # every piece begins with a bar line
            per_bar = np.bincount(np.bincount(bar[is_pitch[tokens]], minlength=bar[-1] + 1))
            longer, shorter = sorted((total.notes_per_bar, per_bar), key=len, reverse=True)
            total.notes_per_bar = longer.copy()
            total.notes_per_bar[: len(shorter)] += shorter
    return total


def _spread(values: npt.NDArray[Any], counts: npt.NDArray[np.int64]) -> str:
    """Least, quartiles and greatest of ``values``, each occurring ``counts`` times."""
    order = np.argsort(values)
    values, reached = values[order], np.cumsum(counts[order])
    shares = (0.0, 0.25, 0.5, 0.75, 1.0)
    places = [int(np.searchsorted(reached, max(share * reached[-1], 1))) for share in shares]
    return "  ".join(f"{values[place]:>8g}" for place in places)


def _by_value(corpus: Corpus, counts: npt.NDArray[np.int64], kind: str) -> dict[str, int]:
    """How often each token of ``kind`` occurs, by its value."""
    vocab: dict[str, int] = corpus.tokenizer.vocab
    return {
        token.split("_", 1)[1]: int(counts[number])
        for token, number in vocab.items()
        if token.startswith(f"{kind}_") and counts[number]
    }


def describe(corpus: Corpus, stats: Statistics) -> str:
    """Tables for a terminal."""
    manifest = corpus.manifest
    lines = ["files"]
    lines += [f"  {reason:28}{number:>12,}" for reason, number in manifest["counts"].items()]
    lines += [f"{'split':30}{'pieces':>12}{'tokens':>16}"]
    lines += [f"  {name:28}{manifest['pieces'][name]:>12,}{manifest['tokens'][name]:>16,}" for name in shards.SPLITS]
    signatures = _by_value(corpus, stats.vocabulary_counts, "TimeSig")
    bars = sum(signatures.values())
    lines += ["time signatures, share of bars"]
    lines += [f"  {name:28}{number / bars:>12.1%}" for name, number in Counter(signatures).most_common(8)]
    lines += [f"{'':30}{'least':>8}  {'25%':>8}  {'half':>8}  {'75%':>8}  {'most':>8}"]
    ones = np.ones(len(stats.tokens_per_piece), np.int64)
    lines += [f"{'tokens a piece':30}{_spread(stats.tokens_per_piece, ones)}"]
    lines += [f"{'notes a bar':30}{_spread(np.arange(len(stats.notes_per_bar)), stats.notes_per_bar)}"]
    for title, kind in (("tempo marks, quarters a minute", "Tempo"), ("velocities", "Velocity")):
        found = _by_value(corpus, stats.vocabulary_counts, kind)
        lines += [f"{title:30}{_spread(np.array([float(value) for value in found]), np.array([*found.values()]))}"]
    return "\n".join(lines)


def plot(corpus: Corpus, stats: Statistics, path: Path) -> None:
    """Draw the distributions that ``describe`` prints into a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), layout="constrained")
    axes = figure.subplots(2, 3).flatten()
    lengths = stats.tokens_per_piece
    bins = np.geomspace(max(lengths.min(), 1), lengths.max() + 1, 40)
    axes[0].hist(lengths, bins=bins.tolist())
    axes[0].set(title="tokens a piece", xscale="log", ylabel="pieces")
    signatures = _by_value(corpus, stats.vocabulary_counts, "TimeSig")
    axes[1].bar([*signatures], [*signatures.values()])
    axes[1].set(title="time signatures", ylabel="bars")
    axes[1].tick_params(axis="x", rotation=90)
    for axis, kind, title, width in ((axes[2], "Tempo", "tempo marks", 3.0), (axes[3], "Velocity", "velocities", 3.6)):
        found = _by_value(corpus, stats.vocabulary_counts, kind)
        axis.bar([float(value) for value in found], [*found.values()], width=width)
        axis.set(title=title, ylabel="tokens")
    shown = stats.notes_per_bar[:65]
    axes[4].bar(np.arange(len(shown)), shown)
    axes[4].set(title="notes a bar (up to 64)", ylabel="bars")
    splits = corpus.manifest["tokens"]
    axes[5].bar([*splits], [*splits.values()])
    axes[5].set(title="splits", ylabel="tokens")
    figure.savefig(path, dpi=120)


# --- Commands -----------------------------------------------------------------------------------------------------


@click.group()
def main() -> None:
    """Turn folders of MIDI files into a tokenised corpus, and look into one."""


def _limit_options(command: Any) -> Any:
    """One option for each field of ``Limits``."""
    for limit in reversed(fields(Limits)):
        kind = click.IntRange(min=0) if isinstance(limit.default, int) else click.FloatRange(min=0)
        name = f"--{limit.name.replace('_', '-')}"
        command = click.option(name, default=limit.default, show_default=True, type=kind)(command)
    return command


FOLDER = click.Path(path_type=Path)


@main.command("build")
@click.option("--midi", "folders", multiple=True, required=True, type=FOLDER, help="Folder to search; repeatable.")
@click.option("--out", required=True, type=FOLDER, help="Folder of the corpus, new or unfinished.")
@click.option("--workers", default=os.cpu_count() or 1, show_default=True, type=click.IntRange(min=1))
@click.option(
    "--instruments", default="piano", type=click.Choice(["piano", "all"]), show_default=True, help="Tracks to keep."
)
@click.option("--tokenizer", help="tokenizer.json, a folder with it, or a hub id, in place of --instruments.")
@click.option("--include", multiple=True, help="Glob over FOLDER-NAME/PATH of files to take; repeatable.")
@click.option("--list", "listed", type=FOLDER, help="File with one FOLDER-NAME/PATH a line: take only these.")
@click.option("--overwrite", is_flag=True, help="Replace a corpus, or an unfinished build.")
@_limit_options
def build_command(
    folders: tuple[Path, ...],
    out: Path,
    workers: int,
    instruments: str,
    tokenizer: str | None,
    include: tuple[str, ...],
    listed: Path | None,
    overwrite: bool,
    **limits: Any,
) -> None:
    """Tokenise the MIDI files under the --midi folders; run again after an interruption, it continues."""
    only = None
    if listed is not None:
        try:
            only = frozenset(filter(None, listed.read_text(encoding="utf-8").splitlines()))
        except (OSError, ValueError) as error:
            raise UserError(f"--list {listed}: cannot be read ({error})") from None
    try:
        # what SQLite says of a full disk is no OSError
        with in_one_line("the corpus", "the same command goes on from here", sqlite3.OperationalError):
            summary = build(
                folders,
                out,
                workers=workers,
                tokenizer=load_tokenizer(tokenizer) if tokenizer else build_tokenizer(instruments),
                limits=Limits(**limits),
                include=include,
                listed=only,
                overwrite=overwrite,
            )
    except sqlite3.DatabaseError as error:
        raise UserError(f"--out {out}: {DAMAGED} ({error}); start again with --overwrite") from None
    for reason, number in summary.counts.items():
        click.echo(f"{reason:30}{number:>12,}")
    click.echo(f"{'split':30}{'pieces':>12}{'tokens':>16}")
    for split in shards.SPLITS:
        click.echo(f"  {split:28}{summary.pieces[split]:>12,}{summary.tokens[split]:>16,}")
    rate = summary.read / summary.seconds
    click.echo(f"{summary.read:,} files read in {summary.seconds:.1f} s, {rate:.1f} files/s -> {out}")


@main.command("stats")
@click.argument("folder", type=FOLDER)
@click.option("--plot", "picture", type=FOLDER, help="PNG file to draw; else stats.png in the corpus.")
def stats_command(folder: Path, picture: Path | None) -> None:
    """Print and plot what is in a corpus, after checking every byte of it."""
    corpus = Corpus(folder, verify=True)
    stats = measure(corpus)
    click.echo(describe(corpus, stats))
    picture = picture or folder / "stats.png"
    try:
        plot(corpus, stats, picture)
    except ModuleNotFoundError as error:
        raise UserError(f"the plot needs {error.name}; install it with: pip install 'smart[track]'") from None
    click.echo(f"drawn in {picture}")


if __name__ == "__main__":
    main()
