"""From folders of MIDI files, many of them broken, to tokenised pieces in shards: ``python -m smart.corpus build``.

``smart.corpus.piece`` decides which files are kept (paper section 3.1). Of files with the same onsets and pitches only
the first by path is kept. A piece goes into ``train``, ``validation`` or ``test`` by the hash of its onsets and pitches
alone, so that no piece is in two splits, and each stays in its split when files are added.

Scraped files crash, hang or swell native parsers. Every file is therefore read by a worker process with a limit on time
and memory (``smart.corpus.readers``). A file that kills its worker is listed in ``rejects.csv`` with the reason, like
all other rejected files.

A build keeps its state in ``OUT/.work`` (``smart.corpus.state``) and continues from there after it was killed. The
result depends only on the files and the settings, not on the number of workers, the order in which they finish, or
interruptions. Memory does not grow with the corpus.
"""

import contextlib
import csv
import fnmatch
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import click

from smart import UserError, __version__
from smart.corpus.midi import Limits, Piece, Reading
from smart.corpus.readers import ReaderPool
from smart.corpus.shards import DTYPE, FORMAT, MANIFEST, SHARD_TOKENS, SPLITS, ShardWriter
from smart.corpus.state import DUPLICATE, KEPT, SPOOL, STATE, State, hold_work
from smart.files import is_leftover, sha256, write_atomically
from smart.run import progress
from smart.tokens import FILE_NAME, build_tokenizer, save_tokenizer

EXTENSIONS = (".mid", ".midi")
TEST_SHARE, VALIDATION_SHARE = 0.1, 0.1  # shares of all pieces, and of those not in test (paper section 3.1)
SHARD_FILE = re.compile(rf"({'|'.join(SPLITS)})-\d{{5,}}\.(bin|idx\.npy)(\.tmp)?")
MOST_SHOWN = 20  # unknown lines of a list
COMMIT_SECONDS = 2.0  # the most work that is lost when a build is killed


def split_of(digest: bytes) -> str:
    """The split of a piece by its hash, read as a fraction of one: 10% test, 9% validation, 81% train."""
    share = int.from_bytes(digest[:8], "big") / 2**64
    if share < TEST_SHARE:
        return "test"
    return "validation" if share < TEST_SHARE + VALIDATION_SHARE * (1 - TEST_SHARE) else "train"


@dataclass
class Summary:
    """What a build made: files by reason (``kept`` is one), and pieces and tokens by split."""

    counts: dict[str, int] = field(default_factory=dict)
    remarks: dict[str, int] = field(default_factory=dict)  # kept pieces that were read otherwise than written, by kind
    pieces: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    pedalled: int = 0  # pieces with notes that the pedal lengthens
    stretch: float = 1.0  # how many times as long these pieces' notes are, on average
    placed: dict[str, int] = field(default_factory=dict)  # pieces by where their bar lines are
    read: int = 0  # files read by this run; fewer than all if it continued another
    seconds: float = 0.0  # of this run


def find_files(
    folders: Sequence[Path], include: Sequence[str] = (), listed: frozenset[str] | None = None
) -> Iterator[bytes]:
    """Keys of everything named .mid or .midi under ``folders``: the folder's name, then the path in it.

    ``include``: glob patterns, one of which a key must match. ``listed``: the only keys to take. A folder that cannot
    be listed is a key too, so that it is rejected rather than skipped; so is anything else with such a name. Links to
    folders are not followed.
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


def check_list(lines: Sequence[str], folders: Sequence[Path], *, skip_missing: bool = False) -> frozenset[str]:
    """The keys that the lines of a list name, FOLDER-NAME/PATH each; spaces around a line count for nothing.

    A backslash may stand for a slash. Raises ``UserError`` that shows the lines which name no MIDI file under
    ``folders``, unless ``skip_missing``: then they are left out.
    """
    readings = [(line, line.strip(), line.strip().replace("\\", "/")) for line in lines]
    keys = find_files(
        [folder.resolve() for folder in folders], (), frozenset(key for three in readings for key in three)
    )
    there = {os.fsdecode(key) for key in keys}
    found, unknown = set(), []
    for number, three in enumerate(readings, 1):
        if key := next((key for key in three if key in there), None):
            found.add(key)
        elif three[1]:
            unknown.append(f"line {number}: {_printable(three[1])}")
    if unknown and not skip_missing:
        raise UserError(
            "\n- ".join(
                [f"--list: {len(unknown)} lines name no MIDI file under --midi; correct them, or add --skip-missing:"]
                + unknown[:MOST_SHOWN]
                + [f"and {len(unknown) - MOST_SHOWN} more"] * (len(unknown) > MOST_SHOWN)
            )
        )
    return frozenset(found)


def _printable(text: str) -> str:
    return text if text.isprintable() else repr(text)


def build(
    folders: Sequence[Path],
    out: Path,
    *,
    workers: int = 1,
    tokenizer: Any = None,
    limits: Limits | None = None,
    reading: Reading | None = None,
    include: Sequence[str] = (),
    listed: frozenset[str] | None = None,
    overwrite: bool = False,
    shard_tokens: int = SHARD_TOKENS,
) -> Summary:
    """Tokenise the MIDI files under ``folders`` into the corpus ``out``, or continue an unfinished build of it.

    Raises ``UserError`` if a folder is missing, ``out`` holds something else, or no file can be kept.
    """
    limits, reading, tokenizer = limits or Limits(), reading or Reading(), tokenizer or build_tokenizer()
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
    for path in (out / ".work", out / ".work" / STATE, out / ".work" / SPOOL, out / "tokenizer"):
        if path.is_symlink():  # a build writes into these, and would into what a link points to
            raise UserError(f"--out {out}: {path.relative_to(out)} is a link, which no build made; remove it")
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
            "reading": asdict(reading),
            "shard_tokens": shard_tokens,
            "tokenizer": sha256(tokenizer_file),
        }
        if state.get("settings") not in ("", json.dumps(settings)):
            raise UserError(
                f"--out {out}: begun with other settings; finish it with those, or start again with --overwrite"
            )
        state.put("settings", json.dumps(settings))
        if damaged := state.damaged():
            click.echo(
                f"Warning: the unfinished build in {out} is damaged; {len(damaged)} files are read again: "
                f"{_shown(damaged[0])}{' ...' if len(damaged) > 1 else ''}",
                err=True,
            )
        state.list_files(find_files(roots, include, listed))
        if not state.count("1"):
            raise UserError(
                f"--midi {', '.join(map(str, folders))}: no .mid or .midi file found that --include and --list allow"
            )
        summary = Summary()
        places = {os.fsencode(root.name): os.fsencode(root) for root in roots}
        if changed := state.read_again(partial(_path, places)):
            click.echo(
                f"{len(changed)} files have changed since this build read them, and are read again: "
                f"{_shown(changed[0])}{' ...' if len(changed) > 1 else ''}",
                err=True,
            )
        with ReaderPool(tokenizer_file, limits, min(workers, max(state.count("reason IS NULL"), 1)), reading) as pool:
            summary.read = _read_all(state, places, pool)
        _write(state, out, settings, summary)
        (out / ".work").rename(out / ".work.tmp")  # in one step, so that a kill leaves no half-deleted state
    shutil.rmtree(out / ".work.tmp", ignore_errors=True)
    summary.seconds = time.monotonic() - started
    return summary


def _version(package: str) -> str | None:
    """The version of an installed package; None where it is on the path without having been installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _check_out(out: Path, overwrite: bool) -> None:
    """Refuse a folder that a build may not write to; with ``overwrite``, clear what an earlier build wrote."""
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"--out {out}: is not a folder")
    ours = {MANIFEST, "tokenizer", ".work", "pieces.csv", "rejects.csv", "stats.png"}
    foreign = [
        path.name
        for path in out.iterdir()
        if path.name.removesuffix(".tmp") not in ours and not SHARD_FILE.fullmatch(path.name) and not is_leftover(path)
    ]
    if foreign:
        raise UserError(f"--out {out}: holds {foreign[0]!r}, which no build wrote; choose another folder")
    shutil.rmtree(out / ".work.tmp", ignore_errors=True)  # left by a build that was killed after its last write
    if overwrite:
        with contextlib.ExitStack() as held:
            if (out / ".work").is_dir():
                hold_work(out / ".work", held)
            # first, so that a half-cleared folder does not look finished
            (out / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(out)
    elif (out / MANIFEST).exists() and not (out / ".work").exists():
        raise UserError(f"--out {out}: holds a finished corpus; choose another folder, or replace it with --overwrite")


def _path(roots: dict[bytes, bytes], key: bytes) -> bytes:
    name, _, rest = key.partition(b"/")
    return roots[name] + b"/" + rest


def _read_all(state: State, roots: dict[bytes, bytes], pool: ReaderPool) -> int:
    """Read every unread file; returns how many there were."""

    def tasks() -> Iterator[tuple[bytes, bytes]]:
        for key in state.unread():
            path = _path(roots, key)
            state.stamp(key, path)
            yield key, path

    total, left = state.count("1"), state.count("reason IS NULL")
    rejects = state.count("reason IS NOT NULL AND reason != ?", KEPT)
    saved = time.monotonic()
    with progress(total=total, initial=total - left, unit="file", desc="corpus") as bar:
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
    """Write the pieces into shards in the order of their paths, then the tables, and the manifest last."""
    for path in [out / MANIFEST, *filter(lambda path: SHARD_FILE.fullmatch(path.name), out.iterdir())]:
        path.unlink(missing_ok=True)  # left by a run that was killed here; its files may have changed since
    state.mark_duplicates()
    summary.counts, summary.remarks = state.reasons(), state.remarks()
    longer = "reason = ? AND stretch > 1"
    summary.pedalled = state.count(longer, KEPT)
    if summary.pedalled:
        summary.stretch = sum(row[0] for row in state.rows("stretch", longer, KEPT)) / summary.pedalled
    for (how,) in state.rows("placed", "reason = ?", KEPT):
        summary.placed[how] = summary.placed.get(how, 0) + 1
    if KEPT not in summary.counts:
        reasons = ", ".join(f"{number} {reason}" for reason, number in summary.counts.items())
        raise UserError(f"--midi: no file can be kept ({reasons}); nothing was built")
    writers = {split: ShardWriter(out, split, shard_tokens=settings["shard_tokens"]) for split in SPLITS}
    write_atomically(out / "pieces.csv", lambda file: _write_pieces(state, writers, file))
    write_atomically(out / "rejects.csv", lambda file: _write_rejects(state, file))
    splits = {split: writer.close() for split, writer in writers.items()}
    summary.pieces = {split: sum(shard["pieces"] for shard in splits[split]) for split in splits}
    summary.tokens = {split: sum(shard["tokens"] for shard in splits[split]) for split in splits}
    manifest = {
        "format": FORMAT,
        "settings": settings,
        "tokenizer": {"sha256": settings["tokenizer"]},
        "versions": {"smart": __version__, **{name: _version(name) for name in ("miditok", "symusic", "numpy")}},
        "counts": summary.counts,
        "pieces": summary.pieces,
        "tokens": summary.tokens,
        "splits": {split: {"shards": splits[split]} for split in splits},
        "files": {name: sha256(out / name) for name in ("pieces.csv", "rejects.csv")},
    }
    text = json.dumps(manifest, indent=2) + "\n"
    write_atomically(out / MANIFEST, lambda file: file.write(text.encode()))


def _write_pieces(state: State, writers: dict[str, ShardWriter], file: IO[bytes]) -> None:
    columns = ("path", "hash", "split", "shard", "index", "tokens", "notes", "bars", "seconds")
    table = _table(file, *columns, "stretch", "placed", "remarks")
    wanted = "path, hash, place, length, notes, bars, seconds, stretch, placed, remarks"
    with open(state.folder / SPOOL, "rb") as spool:
        for path, digest, place, length, notes, bars, *rest in state.rows(wanted, "reason = ?", KEPT):
            seconds, stretch, placed, remarks = rest
            spool.seek(place)
            split = split_of(digest)
            shard, index = writers[split].add(spool.read(length))
            numbers = (length // DTYPE.itemsize, notes, bars, f"{seconds:.2f}", f"{stretch:.3f}")
            table([_shown(path), digest.hex(), split, shard, index, *numbers, placed, remarks])


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
    """A path to show to people; file names need not be UTF-8."""
    return path.decode("utf-8", "backslashreplace")
