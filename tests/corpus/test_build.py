"""A whole build: real MIDI files, good and malformed, real worker processes, real kills; its statistics."""

import contextlib
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import programs
import pytest
from corpora import (
    GOOD,
    MALFORMED,
    MELODY,
    build_small,
    contents,
    hooked,
    midi,
    notes,
    run,
    song,
    table,
    wait_until_gone,
    write_songs,
)

from smart import UserError
from smart.corpus import Corpus, shards
from smart.corpus import build as building
from smart.corpus.build import build, find_files, split_of
from smart.corpus.state import State
from smart.corpus.stats import measure
from smart.tokens import decode, encode, vocabulary


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy it before changing it."""
    return build_small(tmp_path_factory.mktemp("small"))


def test_all_instruments(tokenizer: Any, tmp_path: Path) -> None:
    """With programs in the vocabulary, bass and drums stay what they are, and count in the hash."""
    band = song(7)
    for program, is_drum in ((33, False), (0, True)):
        track = song(8 + program).tracks[0]
        track.program, track.is_drum = program, is_drum
        band.tracks.append(track)
    (tmp_path / "midi").mkdir()
    band.dump_midi(tmp_path / "midi" / "band.mid")
    song(7).dump_midi(tmp_path / "midi" / "piano.mid")
    for track in band.tracks[1:]:
        track.program += 1
    band.dump_midi(tmp_path / "midi" / "other band.mid")
    done = run("build", "--midi", str(tmp_path / "midi"), "--out", str(tmp_path / "out"), "--instruments", "all")
    assert done.exit_code == 0, done.output
    corpus = Corpus(tmp_path / "out", verify=True)
    rows = {row["path"]: row for row in table(tmp_path / "out" / "pieces.csv")}
    assert rows.keys() == {"midi/band.mid", "midi/piano.mid", "midi/other band.mid"}
    for name, voices in (("band", [(0, False), (0, True), (33, False)]), ("piano", [(0, False)])):
        row = rows[f"midi/{name}.mid"]
        tokens = corpus.split(row["split"])[int(row["index"])]
        music = decode(corpus.tokenizer, tokens)
        assert sorted((track.program, track.is_drum) for track in music.tracks) == voices
        assert encode(corpus.tokenizer, music) == tokens.tolist()
        assert sum(len(track.notes) for track in music.tracks) == int(row["notes"])
    assert build([tmp_path / "midi"], tmp_path / "piano").counts == {"duplicate": 2, "kept": 1}


def test_split_shares() -> None:
    digests = np.random.default_rng(5).bytes(16 * 20_000)
    counts = Counter(split_of(digests[place : place + 16]) for place in range(0, len(digests), 16))
    assert counts["test"] / 20_000 == pytest.approx(0.10, abs=0.01)
    assert counts["validation"] / 20_000 == pytest.approx(0.09, abs=0.01)
    assert counts["train"] / 20_000 == pytest.approx(0.81, abs=0.01)


def test_good_and_malformed_together(tokenizer: Any, tmp_path: Path) -> None:
    """All good files in, every bad one in the rejects with its reason, and every round trip exact."""
    folder, out = tmp_path / "midi", tmp_path / "out"
    write_songs(folder, range(30))
    for name, (data, _) in MALFORMED.items():
        (folder / f"{name}.mid").write_bytes(data)
    song(3, velocity=99).dump_midi(folder / "0" / "a twin.MIDI")  # of song 3, and before it by name
    (folder / "0" / "ignored.txt").write_bytes(GOOD)
    (folder / "broken link.mid").symlink_to(folder / "nowhere.mid")
    (folder / "loop.mid").symlink_to(folder / "loop.mid")
    (folder / "a folder.mid").mkdir()
    (folder / "a folder.mid" / "inside.mid").write_bytes(song(101).dumps_midi())
    (folder / 'new\nline, "and" more.mid').write_bytes(song(102).dumps_midi())
    os.mkfifo(folder / "pipe.mid")
    (folder / os.fsdecode(b"caf\xe9.mid")).write_bytes(song(100).dumps_midi())  # a name that is no UTF-8

    summary = build([folder], out, workers=2)

    rejects = {row["path"]: row["reason"] for row in table(out / "rejects.csv")}
    expected = {f"midi/{name}.mid": reason for name, (_, reason) in MALFORMED.items()}
    expected |= {"midi/0/song 003.mid": "duplicate"}
    unreadable = ("broken link", "loop", "pipe", "a folder")
    expected |= {f"midi/{name}.mid": "cannot be read" for name in unreadable}
    assert rejects == expected
    assert summary.counts == dict(Counter([*expected.values(), *["kept"] * 33]))
    twin = next(row for row in table(out / "rejects.csv") if row["reason"] == "duplicate")
    assert twin["detail"] == "of midi/0/a twin.MIDI"

    corpus = Corpus(out, verify=True)
    pieces = table(out / "pieces.csv")
    odd = {"midi/caf\\xe9.mid", "midi/a folder.mid/inside.mid", 'midi/new\nline, "and" more.mid'}
    assert len(pieces) == 33 and odd < {row["path"] for row in pieces}
    assert sum(len(corpus.split(name)) for name in shards.SPLITS) == 33
    assert not (out / ".work").exists()
    for row in pieces:
        assert row["split"] == split_of(bytes.fromhex(row["hash"]))
        assert row["shard"] == "0"  # so that the index in the shard is the index in the split
        tokens = corpus.split(row["split"])[int(row["index"])]
        assert len(tokens) == int(row["tokens"])
        assert encode(corpus.tokenizer, decode(corpus.tokenizer, tokens)) == tokens.tolist()


def test_result_does_not_depend_on_workers_or_earlier_runs(tmp_path: Path) -> None:
    write_songs(tmp_path / "midi", range(12))
    for name, workers in (("one", 1), ("two", 2)):
        build([tmp_path / "midi"], tmp_path / name, workers=workers)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    build([tmp_path / "midi"], tmp_path / "one", overwrite=True)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_splits_are_stable_when_files_are_added(tmp_path: Path) -> None:
    def splits(out: Path) -> dict[str, str]:
        return {row["hash"]: row["split"] for row in table(out / "pieces.csv")}

    write_songs(tmp_path / "midi", range(25))
    build([tmp_path / "midi"], tmp_path / "before")
    write_songs(tmp_path / "midi", range(25, 60))
    (tmp_path / "midi" / "bad.mid").write_bytes(b"")
    build([tmp_path / "midi"], tmp_path / "after")
    before, after = splits(tmp_path / "before"), splits(tmp_path / "after")
    assert len(before) == 25 and len(after) == 60
    assert before.items() <= after.items()
    assert len(set(after.values())) == 3


def test_no_piece_is_in_two_splits_whatever_its_file(tmp_path: Path) -> None:
    """The same music under many names, divisions, programs and velocities is one piece."""
    folder = tmp_path / "midi"
    folder.mkdir()
    for seed in range(6):
        for number, division in enumerate((96, 480, 960)):
            twin = song(seed, division=division, program=number, velocity=10 + number)
            twin.dump_midi(folder / f"{number}-{seed}.mid")
    summary = build([folder], tmp_path / "out", workers=2)
    assert summary.counts == {"duplicate": 12, "kept": 6}
    assert {row["path"] for row in table(tmp_path / "out" / "pieces.csv")} == {f"midi/0-{n}.mid" for n in range(6)}


@pytest.mark.slow
def test_killed_and_continued_is_bit_identical(tmp_path: Path) -> None:
    """SIGKILL in the middle, then Ctrl-C; workers die with the build; the result is that of one go."""
    write_songs(tmp_path / "midi", range(40))
    (tmp_path / "midi" / "bad.mid").write_bytes(b"")
    build([tmp_path / "midi"], tmp_path / "whole")
    code = "from smart.corpus import build, command, readers; build.COMMIT_SECONDS = 0.1; "
    command = [sys.executable, "-c", code + f"readers.PROGRAM = {hooked('time.sleep(0.03)')!r}; command.main()"]
    command += ["build", "--midi", str(tmp_path / "midi"), "--out", str(tmp_path / "out"), "--workers", "2"]
    reached = [0]
    for blow in (signal.SIGKILL, signal.SIGINT):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        spool = tmp_path / "out" / ".work" / "spool.bin"
        while process.poll() is None and not (spool.exists() and spool.stat().st_size > reached[-1] + 1000):
            time.sleep(0.02)
        children = _children(process.pid)
        process.send_signal(blow)
        _, said = process.communicate()
        assert process.returncode == (1 if blow == signal.SIGINT else -signal.SIGKILL), "it was done too soon"
        assert (b"interrupted; run the same command again" in said) == (blow == signal.SIGINT)
        assert children
        wait_until_gone(children)
        with pytest.raises(UserError, match="unfinished"):
            Corpus(tmp_path / "out")
        reached.append(spool.stat().st_size)
    assert reached[1] < reached[2]
    summary = build([tmp_path / "midi"], tmp_path / "out", workers=2)
    assert 0 < summary.read < 41, "it began from the start"
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    """The build's own peak for 30 pieces and for 400 differ by little, and so does the reader's."""
    peaks = {}
    for count in (30, 400):
        folder = tmp_path / f"midi{count}"
        folder.mkdir()
        for seed in range(count):
            song(seed, bars=20).dump_midi(folder / f"{seed}.mid")
        code = (
            "import resource, sys; from pathlib import Path; from smart.corpus.build import build\n"
            "build([Path(sys.argv[1])], Path(sys.argv[2]))\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, "
            "resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
        )
        command = [sys.executable, "-c", code, str(folder), str(tmp_path / f"out{count}")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[count] = [int(value) / 1024 for value in done.stdout.split()]
    for few, many in zip(peaks[30], peaks[400], strict=True):
        assert many < few + 15, f"MiB at 30 and 400 pieces: {peaks}"


def test_commands(tmp_path: Path) -> None:
    write_songs(tmp_path / "midi", range(20))
    (tmp_path / "midi" / "bad.mid").write_bytes(b"")
    done = run("build", "--midi", str(tmp_path / "midi"), "--out", str(tmp_path / "out"), "--workers", "1")
    assert done.exit_code == 0, done.output
    assert "kept" in done.output and "empty file" in done.output and "files/s" in done.output
    done = run("stats", str(tmp_path / "out"), "--plot", str(tmp_path / "plot.png"))
    assert done.exit_code == 0, done.output
    assert "tokens per piece" in done.output and "3/4" in done.output
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_statistics_count_what_is_there(small: Path, tokenizer: Any) -> None:
    corpus = Corpus(small)
    pieces = [corpus.split(name)[index] for name in shards.SPLITS for index in range(len(corpus.split(name)))]
    stats = measure(corpus)
    assert stats.tokens_per_piece.tolist() == [len(piece) for piece in pieces]
    np.testing.assert_array_equal(stats.vocabulary_counts, np.bincount(np.concatenate(pieces), minlength=413))
    per_bar: Counter[int] = Counter()
    facts = vocabulary(tokenizer)
    for piece in pieces:
        for line in np.split(piece, np.flatnonzero(piece == facts.bar_id))[1:]:
            per_bar[int(np.isin(line, facts.pitch_ids).sum())] += 1
    assert {number: count for number, count in enumerate(stats.notes_per_bar.tolist()) if count} == dict(per_bar)


def test_include_and_list(tmp_path: Path) -> None:
    folder = tmp_path / "midi"
    write_songs(folder, range(9))

    def found(*include: str, listed: set[str] | None = None) -> list[str]:
        keys = find_files([folder], include, None if listed is None else frozenset(listed))
        return sorted(os.fsdecode(key).removeprefix("midi/") for key in keys)

    zeros, two = ["0/song 000.mid", "0/song 003.mid", "0/song 006.mid"], {"midi/0/song 000.mid", "midi/1/song 001.mid"}
    assert len(found()) == 9
    assert found("midi/0/*") == zeros
    assert found("midi/0/*", "*song 004*") == [*zeros, "1/song 004.mid"]
    assert found(listed={*two, "midi/none.mid"}) == ["0/song 000.mid", "1/song 001.mid"]
    assert found("midi/1/*", listed=two) == ["1/song 001.mid"]


def test_options_reach_the_build(tmp_path: Path) -> None:
    write_songs(tmp_path / "midi", range(6))
    (tmp_path / "list.txt").write_text("midi/0/song 000.mid\nmidi/1/song 001.mid\nmidi/2/song 002.mid\n")
    arguments = ["--midi", str(tmp_path / "midi"), "--out", str(tmp_path / "out"), "--max-bar-notes", "3"]
    done = run("build", *arguments, "--list", str(tmp_path / "list.txt"), "--include", "*.mid", "--workers", "1")
    assert done.exit_code == 0, done.output
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    in_three = sum(song(seed).time_signatures[0].numerator == 3 for seed in range(3))
    assert manifest["counts"] == {"kept": in_three, "too many notes in a bar": 3 - in_three}
    assert manifest["settings"]["limits"]["max_bar_notes"] == 3


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    midi_folder, out = tmp_path / "midi", tmp_path / "out"
    write_songs(midi_folder, range(3))
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "bad.mid").write_bytes(b"")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("do not lose this")
    (tmp_path / "diary").mkdir()
    (tmp_path / "diary" / "training.txt").write_text("nor this")
    (tmp_path / "file").write_text("")
    (tmp_path / "other" / "midi").mkdir(parents=True)
    build([midi_folder], tmp_path / "done")
    good = ["--midi", str(midi_folder)]
    cases = [
        (["--midi", str(tmp_path / "none"), "--out", str(out)], "no such folder"),
        (["--midi", str(tmp_path / "empty"), "--out", str(out)], "no .mid or .midi file"),
        (["--midi", str(tmp_path / "bad"), "--out", str(out), "--overwrite"], "no file can be kept (1 empty file)"),
        ([*good, "--midi", str(tmp_path / "other" / "midi"), "--out", str(out)], "same name"),
        ([*good, "--out", str(tmp_path / "done")], "finished corpus"),
        ([*good, "--out", str(tmp_path / "mine")], "'thesis.tex', which no build wrote"),
        ([*good, "--out", str(tmp_path / "mine"), "--overwrite"], "'thesis.tex', which no build wrote"),
        ([*good, "--out", str(tmp_path / "diary"), "--overwrite"], "'training.txt', which no build wrote"),
        ([*good, "--out", str(tmp_path / "file")], "is not a folder"),
        ([*good, "--out", str(out), "--tokenizer", str(tmp_path / "file")], "cannot be read"),
        ([*good, "--out", str(out), "--list", str(tmp_path / "none")], "cannot be read"),
        ([*good, "--out", str(out), "--workers", "0"], "0 is not in the range"),
    ]
    for arguments, message in cases:
        done = run("build", *arguments)
        assert done.exit_code == 2, (arguments, done.output, done.exception)
        lines = [line for line in done.output.splitlines() if line.startswith("Error")]
        assert len(lines) == 1 and message in lines[0], (arguments, done.output)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "do not lose this"


def test_other_settings_do_not_continue_a_build(tmp_path: Path) -> None:
    write_songs(tmp_path / "midi", range(3))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "bad.mid").write_bytes(b"")
    with pytest.raises(UserError, match="no file can be kept"):
        build([tmp_path / "bad"], tmp_path / "out")
    with pytest.raises(UserError, match="begun with other settings"):
        build([tmp_path / "midi"], tmp_path / "out")
    assert build([tmp_path / "midi"], tmp_path / "out", overwrite=True).counts == {"kept": 3}


@pytest.mark.slow
@pytest.mark.parametrize("limit", [0, 3000, 9000])
def test_a_disk_that_takes_no_more_is_one_line(tmp_path: Path, limit: int) -> None:
    """A limit on the size of a file, below that of the table of what has been read, or of the tokenizer."""
    write_songs(tmp_path / "midi", range(12))
    words = [sys.executable, "-m", "smart.corpus", "build", "--midi", tmp_path / "midi", "--out", tmp_path / "out"]
    done = programs.run(words, fresh=limit == 0, file_size=limit, timeout=120)
    assert done.returncode == 1 and done.stderr.startswith("Error: ") and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.endswith("; run the same command again to continue\n")
    assert not (tmp_path / "out" / "manifest.json").exists()
    programs.run(words, check=True, timeout=120)
    assert len(Corpus(tmp_path / "out").split("train")) > 0


def test_two_builds_do_not_share_a_folder(tmp_path: Path) -> None:
    write_songs(tmp_path / "midi", range(3))
    state = State(tmp_path / "out" / ".work")
    with pytest.raises(UserError, match="another build is writing this folder"):
        build([tmp_path / "midi"], tmp_path / "out")
    (tmp_path / "out" / "train-00000.bin.tmp").write_bytes(b"its")
    with pytest.raises(UserError, match="another build is writing this folder"):
        build([tmp_path / "midi"], tmp_path / "out", overwrite=True)
    assert sorted(path.name for path in (tmp_path / "out").rglob("*.*")) == [
        ".work", "spool.bin", "state-3.sqlite", "train-00000.bin.tmp"
    ]  # fmt: skip
    state.close()
    assert build([tmp_path / "midi"], tmp_path / "out", overwrite=True).counts == {"kept": 3}


@pytest.mark.parametrize("name", ["state-3.sqlite", "spool.bin"])
def test_damaged_state_says_so(tmp_path: Path, name: str) -> None:
    write_songs(tmp_path / "midi", range(3))
    state = State(tmp_path / "out" / ".work")
    state.spool.write(bytes(1000))
    state.end = 1000
    state.commit()
    state.close()
    (tmp_path / "out" / ".work" / name).write_bytes(b"x" * 500)
    with pytest.raises(UserError, match="damaged; start again with --overwrite"):
        build([tmp_path / "midi"], tmp_path / "out")


@pytest.mark.parametrize("name", [".work", ".work/spool.bin", ".work/state-3.sqlite", "tokenizer"])
def test_a_planted_link_is_not_followed(tmp_path: Path, name: str) -> None:
    write_songs(tmp_path / "midi", range(3))
    target = tmp_path / "precious"
    target.mkdir() if name in (".work", "tokenizer") else target.write_bytes(b"mine")
    link = tmp_path / "out" / name
    link.parent.mkdir(parents=True)
    link.symlink_to(target)
    with pytest.raises(UserError, match=rf"--out .*: {re.escape(name)} is a link, which no build made; remove it"):
        build([tmp_path / "midi"], tmp_path / "out")
    assert list(target.iterdir()) == [] if target.is_dir() else target.read_bytes() == b"mine"


@pytest.mark.parametrize("damage", ["tokens", "notes", "reject", "path", "text", "far away"])
def test_a_flipped_bit_in_an_unfinished_build_is_found(
    tmp_path: Path, small: Path, damage: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = small.parent / "midi", tmp_path / "out"
    with monkeypatch.context() as stopped:
        stopped.setattr(building, "_write", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build([folder], out)
    changes = {
        "notes": "UPDATE files SET notes = notes + 1 WHERE path = (SELECT MAX(path) FROM files WHERE hash IS NOT NULL)",
        "far away": "UPDATE files SET place = -1, length = 1 << 60 WHERE hash IS NOT NULL",
        "reject": "UPDATE files SET detail = detail || 'x' WHERE hash IS NULL",
        "path": "UPDATE files SET path = CAST('x' || path AS BLOB) WHERE hash IS NOT NULL",
        "text": "UPDATE files SET placed = CAST(X'ff' AS TEXT) WHERE hash IS NOT NULL",
    }
    if damage == "tokens":
        spool = bytearray((out / ".work" / "spool.bin").read_bytes())
        spool[len(spool) // 2] ^= 4
        (out / ".work" / "spool.bin").write_bytes(spool)
    else:
        with contextlib.closing(sqlite3.connect(out / ".work" / "state-3.sqlite")) as table:
            assert table.execute(changes[damage]).rowcount
            table.commit()
    assert build([folder], out).read
    assert damage == "path" or "is damaged" in capsys.readouterr().err
    files = sorted(path.relative_to(small) for path in small.rglob("*") if path.is_file())
    assert [path for path in files if (out / path).read_bytes() != (small / path).read_bytes()] == []


def test_damage_within_the_state_is_one_line(tmp_path: Path) -> None:
    """All but its first page, which says what it is."""
    write_songs(tmp_path / "midi", range(3))
    for number in range(2000):
        (tmp_path / "midi" / f"{number}.mid").touch()
    state = State(tmp_path / "out" / ".work")
    state.list_files(find_files([tmp_path / "midi"]))
    state.close()
    path = tmp_path / "out" / ".work" / "state-3.sqlite"
    data = path.read_bytes()
    assert len(data) > 10 * 4096
    path.write_bytes(data[:4096] + b"x" * (len(data) - 4096))
    done = run("build", "--midi", str(tmp_path / "midi"), "--out", str(tmp_path / "out"), "--workers", "1")
    assert done.exit_code == 2 and done.output.count("\n") == 1, (done.output, done.exception)
    assert "is damaged" in done.output and "start again with --overwrite" in done.output


def test_killed_after_the_manifest_or_with_old_shards_about(tmp_path: Path, small: Path, monkeypatch: Any) -> None:
    """What a kill leaves at the very end, and shards of files that have gone since, disturb no later run."""
    folder = small.parent / "midi"
    shutil.copytree(small, tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr("pathlib.Path.rename", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build([folder], tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "manifest.json").exists() and (tmp_path / "out" / ".work").exists()
    for name in ("train-00007.bin", "train-00007.idx.npy", "test-00003.bin.tmp"):
        (tmp_path / "out" / name).write_bytes(b"old")
    assert build([folder], tmp_path / "out").read == 0
    assert contents(tmp_path / "out") == contents(small)


def test_killed_at_the_very_end_the_rest_is_cleared_away(tmp_path: Path, small: Path) -> None:
    shutil.copytree(small, tmp_path / "out")
    (tmp_path / "out" / ".work.tmp").mkdir()
    (tmp_path / "out" / ".work.tmp" / "spool.bin").touch()
    with pytest.raises(UserError, match="holds a finished corpus"):
        build([small.parent / "midi"], tmp_path / "out")
    assert contents(tmp_path / "out") == contents(small) and not (tmp_path / "out" / ".work.tmp").exists()


def test_files_that_are_gone_are_forgotten(tmp_path: Path) -> None:
    """A build that continues after files were removed and added equals a fresh build of the present files."""
    write_songs(tmp_path / "midi", range(6))
    state = State(tmp_path / "out" / ".work")
    state.list_files(find_files([tmp_path / "midi"]))
    state.record(b"midi/0/song 000.mid", ("crash", "of an earlier run"))
    state.commit()
    state.close()
    (tmp_path / "midi" / "0" / "song 000.mid").unlink()
    write_songs(tmp_path / "midi", [6])
    assert build([tmp_path / "midi"], tmp_path / "out").counts == {"kept": 6}


def test_a_list_may_come_from_another_system_and_names_files_that_exist(tmp_path: Path) -> None:
    """A byte order mark, CRLF, spaces and backslashes do not matter; a line that names no file does."""
    write_songs(tmp_path / "midi", range(3))
    names = [f"midi/{seed}/song 00{seed}.mid" for seed in range(3)]
    listed = tmp_path / "list.txt"
    lines = ["\ufeff" + names[0], names[1] + "  ", names[2].replace("/", "\\"), ""]
    listed.write_bytes("\r\n".join(lines).encode())
    words = ["build", "--midi", str(tmp_path / "midi"), "--list", str(listed), "--workers", "1", "--out"]
    done = run(*words, str(tmp_path / "out"))
    assert done.exit_code == 0, done.output
    assert [row["path"] for row in table(tmp_path / "out" / "pieces.csv")] == names

    listed.write_text("\n".join([names[0], "midi/0/sogn 000.mid", "song 001.mid", "midi/../midi/1/song 001.mid"]))
    done = run(*words, str(tmp_path / "b"))
    assert done.exit_code == 2 and "3 lines name no MIDI file" in done.output
    for line in ("line 2: midi/0/sogn 000.mid", "line 3: song 001.mid", "line 4: midi/../midi/1/song 001.mid"):
        assert f"\n- {line}" in done.output
    assert not (tmp_path / "b").exists()
    done = run(*words, str(tmp_path / "b"), "--skip-missing")
    assert done.exit_code == 0 and [row["path"] for row in table(tmp_path / "b" / "pieces.csv")] == names[:1]


def test_what_was_read_otherwise_is_counted(tmp_path: Path) -> None:
    """Notes that are never released, and bars of other time signatures, are in the table and in the summary."""
    folder = tmp_path / "midi"
    write_songs(folder, range(1))
    hanging = notes(*MELODY)[:-4] + b"\x00\x90\x30\x40\x87\x40\xff\x2f\x00"
    (folder / "hanging.mid").write_bytes(midi(hanging))
    (folder / "seven.mid").write_bytes(midi(b"\x00\xff\x58\x04\x07\x02\x18\x08" + notes(*MELODY)))
    done = run("build", "--midi", str(folder), "--out", str(tmp_path / "out"), "--workers", "1")
    assert done.exit_code == 0 and "notes without an end in 1 of the kept" in done.output, done.output
    assert "bars read in other time signatures in 1 of the kept" in done.output
    remarks = {row["path"]: row["remarks"] for row in table(tmp_path / "out" / "pieces.csv")}
    assert remarks == {
        "midi/0/song 000.mid": "",
        "midi/hanging.mid": "notes without an end: 1",
        "midi/seven.mid": "bars read in other time signatures: 7/4 as 4/4 + 3/4",
    }


def test_a_file_that_changed_while_a_build_waited_is_read_again(tmp_path: Path) -> None:
    """Also one of the same size and time, as a copy of another file has them."""
    file, other, key = tmp_path / "a.mid", tmp_path / "other", b"m/a.mid"
    file.write_bytes(b"one")
    other.write_bytes(b"two")
    os.utime(other, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
    state = State(tmp_path / ".work")
    state.list_files(iter([key]))
    state.stamp(key, os.fsencode(file))
    state.record(key, ("cannot be read", "x"))
    state.commit()
    assert state.read_again(lambda _: os.fsencode(file)) == [] and list(state.unread()) == []
    os.replace(other, file)
    assert state.read_again(lambda _: os.fsencode(file)) == [key] and list(state.unread()) == [key]
    state.close()
