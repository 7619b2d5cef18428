"""Processes that read MIDI files: those that die, hang or answer nonsense cost one file at most."""

import pickle
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import programs
import pytest
from corpora import GOOD, MALFORMED, contents, hooked, song, table, wait_until_gone, write_songs
from hypothesis import given, settings
from hypothesis import strategies as st

from smart.corpus import Limits, Piece, ReaderPool, readers
from smart.corpus.build import build
from smart.tokens import FILE_NAME, save_tokenizer

pytestmark = pytest.mark.slow


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Have every worker run some code before it reads a file."""

    def install(body: str) -> None:
        monkeypatch.setattr(readers, "PROGRAM", hooked(body))

    return install


@pytest.mark.parametrize(
    ("fault", "reason", "detail"),
    [
        ("while True: pass", "time limit", "over 2 s"),
        ("import ctypes; ctypes.string_at(0)", "crash", "died of signal 11"),
        ("os._exit(3)", "crash", "ended with exit status 3"),
        ("hold = [bytes(1 << 20) for _ in range(200)]", "memory limit", "over 100 MB"),
        ("raise SystemError('a bug')", "cannot be tokenised", "SystemError: a bug"),
    ],
)
def test_a_worker_that_dies_costs_one_file(tmp_path: Path, hook: Any, fault: str, reason: str, detail: str) -> None:
    write_songs(tmp_path / "midi", range(10))
    victim = song(4).dumps_midi()
    hook(f"""
    if data == {bytes(victim)!r}:
        {fault}""")
    summary = build([tmp_path / "midi"], tmp_path / "out", limits=Limits(seconds=2.0, megabytes=100))
    assert summary.counts == {"kept": 9, reason: 1}
    (row,) = table(tmp_path / "out" / "rejects.csv")
    assert row["path"] == "midi/1/song 004.mid" and detail in row["detail"]


def damaged(data: bytes, random: np.random.Generator) -> bytes:
    """A file with bytes changed, removed, repeated or put in, or nothing but a header and noise."""
    out, at = bytearray(data), int(random.integers(len(data)))
    noise = random.integers(0, 256, random.integers(1, 60), np.uint8).tobytes()
    match random.integers(6):
        case 0:
            for place in random.integers(0, len(data), random.integers(1, 8)):
                out[place] ^= 1 << random.integers(8)
        case 1:
            out[at : at + len(noise)] = noise
        case 2:
            del out[at : at + len(noise)]
        case 3:
            out[at:at] = out[at : at + 100] * 3
        case 4:
            out[at : at + 4] = b"\xff\xff\xff\x7f"  # the longest time, or length
        case 5:
            return data[:14] + noise
    return bytes(out)


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_any_file_is_read_or_rejected_for_what_it_is(tokenizer: Any, tmp_path_factory: Any, seed: int) -> None:
    """No damage crashes, hangs or swells a worker, or gets as far as a bug."""
    random, folder = np.random.default_rng(seed), tmp_path_factory.mktemp("damaged")
    save_tokenizer(tokenizer, folder)
    good, bad = [bytes(song(number).dumps_midi()) for number in range(5)], [data for data, _ in MALFORMED.values()]
    tasks = []
    for number in range(200):
        path = folder / f"{number}.mid"
        sources = bad if number % 2 else good
        path.write_bytes(damaged(sources[random.integers(len(sources))] or GOOD, random))
        tasks.append((str(number).encode(), str(path).encode()))
    with ReaderPool(folder / FILE_NAME, Limits(), 1) as pool:
        answers = dict(pool.answers(iter(tasks)))
    assert len(answers) == len(tasks)
    reasons = Counter("kept" if isinstance(answer, Piece) else answer[0] for answer in answers.values())
    assert reasons["kept"] and len(reasons) > 3
    assert not reasons.keys() & {"crash", "time limit", "memory limit", "cannot be tokenised"}, reasons


def test_a_worker_killed_from_outside_costs_nothing(tmp_path: Path, hook: Any) -> None:
    """The first worker to read a certain file is killed there; the file is read again by another."""
    write_songs(tmp_path / "midi", range(10))
    mark = tmp_path / "mark"
    hook(f"""
    if data == {bytes(song(4).dumps_midi())!r} and not os.path.exists({str(mark)!r}):
        open({str(mark)!r}, 'w').close()
        os.kill(os.getpid(), 9)""")
    assert build([tmp_path / "midi"], tmp_path / "out").counts == {"kept": 10}
    assert mark.exists()


@pytest.mark.parametrize("seeds", [range(10), [4]])
def test_a_worker_killed_within_an_answer_costs_nothing(tmp_path: Path, hook: Any, seeds: Sequence[int]) -> None:
    """Its answer ends half way; the file is read again, and those that waited behind it, if any."""
    write_songs(tmp_path / "midi", seeds)
    mark = tmp_path / "mark"
    hook(f"""
    if data == {bytes(song(4).dumps_midi())!r} and not os.path.exists({str(mark)!r}):
        open({str(mark)!r}, 'w').close()
        from smart import workers
        def half(connection, *rest):
            connection.sendall(bytes(10))
            os.kill(os.getpid(), 9)
        workers._send = half""")
    assert build([tmp_path / "midi"], tmp_path / "out").counts == {"kept": len(seeds)}
    assert mark.exists()


def test_a_pause_costs_no_file(tmp_path: Path, hook: Any) -> None:
    """A worker stands still, once, for longer than the limit on a file."""
    write_songs(tmp_path / "midi", range(10))
    mark = tmp_path / "mark"
    hook(f"""
    if data == {bytes(song(4).dumps_midi())!r} and not os.path.exists({str(mark)!r}):
        open({str(mark)!r}, 'w').close()
        import subprocess
        subprocess.Popen(["sh", "-c", f"kill -STOP {{os.getpid()}}; sleep 1.5; kill -CONT {{os.getpid()}}"])
        time.sleep(0.2)""")
    assert build([tmp_path / "midi"], tmp_path / "out", limits=Limits(seconds=1.0)).counts == {"kept": 10}
    assert mark.exists()


def test_workers_that_cannot_start_stop_the_build(tmp_path: Path, monkeypatch: Any) -> None:
    write_songs(tmp_path / "midi", range(2))
    monkeypatch.setattr(readers, "PROGRAM", "os._exit(5)")
    with pytest.raises(RuntimeError, match="MIDI workers do not start: it ended with exit status 5"):
        build([tmp_path / "midi"], tmp_path / "out")


def test_workers_are_replaced_after_a_while(tmp_path: Path, monkeypatch: Any) -> None:
    write_songs(tmp_path / "midi", range(10))
    monkeypatch.setattr(readers, "SERVES", 4)
    assert build([tmp_path / "midi"], tmp_path / "out", workers=2).counts == {"kept": 10}


def test_a_worker_that_never_gets_ready_is_replaced(tmp_path: Path, monkeypatch: Any) -> None:
    write_songs(tmp_path / "midi", range(4))
    mark = tmp_path / "mark"
    hang = f"os.path.exists({str(mark)!r}) or (open({str(mark)!r}, 'w').close(), os.kill(os.getpid(), signal.SIGSTOP))"
    monkeypatch.setattr(readers, "PROGRAM", hang + readers.PROGRAM)
    monkeypatch.setattr(readers, "START", 3.0)
    assert build([tmp_path / "midi"], tmp_path / "out", workers=1).counts == {"kept": 4}
    assert mark.exists()


@pytest.mark.parametrize(
    "answer",
    [
        "connection.sendall(header(number, 2, 0)), os.kill(os.getpid(), signal.SIGSTOP)",
        "send(connection, number, *rest), send(connection, number, *rest)",
        "connection.sendall(b'nonsense' * 10)",
        "connection.sendall(header(number, 2, 0) + b'[]')",
        "connection.sendall(header(number, 2, 2**40) + b'{}')",  # more than any piece has
        "connection.sendall(header(number, 2**30, 0))",
        "send(connection, number + 1, *rest)",
        "send(connection, number, {})",
        "send(connection, number, {'reason': 5, 'detail': ''})",
        "send(connection, number, {'reason': chr(0xd800), 'detail': ''})",
        "send(connection, number, {**rest[0], 'digest': 'x' * 32}, rest[1])",
        "send(connection, number, {**rest[0], 'notes': 10**30}, rest[1])",
        "send(connection, number, {**rest[0], 'seconds': float('nan')}, rest[1])",
        "send(connection, number, {'error': 'a bug'})",
    ],
)
def test_a_worker_that_answers_nonsense_costs_nothing(tmp_path: Path, hook: Any, monkeypatch: Any, answer: str) -> None:
    """Once, at a certain file: it stops within its answer, answers twice, or something else."""
    write_songs(tmp_path / "midi", range(10))
    build([tmp_path / "midi"], tmp_path / "whole")
    mark = tmp_path / "mark"
    answer_once(hook, mark, answer)
    monkeypatch.setattr(readers, "GRACE", 1.0)
    assert build([tmp_path / "midi"], tmp_path / "out", workers=1).counts == {"kept": 10}
    assert mark.exists() and contents(tmp_path / "out") == contents(tmp_path / "whole")


def answer_once(hook: Any, mark: Path, answer: str) -> None:
    """Have the first worker that reads song 4 create the file ``mark`` and run ``answer`` instead of answering."""
    hook(f"""
    if data == {bytes(song(4).dumps_midi())!r} and not os.path.exists({str(mark)!r}):
        open({str(mark)!r}, 'w').close()
        from smart import workers
        header, send = workers._HEADER.pack, workers._send
        def wrong(connection, number, *rest):
            workers._send = send
            {answer}
        workers._send = wrong""")


class Opener:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return open, (self.path, "w")


@pytest.mark.parametrize(
    "answer",
    [
        "connection.sendall({crafted!r})",
        "connection.sendall(len({crafted!r}).to_bytes(4, 'big') + {crafted!r})",  # as multiprocessing frames it
        "connection.sendall(header(number, len({crafted!r}), 0) + {crafted!r})",
        "connection.sendall(header(number, 2, len({crafted!r})) + b'{{}}' + {crafted!r})",
        "send(connection, number, {{'reason': {crafted!r}.decode('latin-1'), 'detail': 7}})",
    ],
)
def test_nothing_that_a_worker_answers_is_unpickled(tmp_path: Path, hook: Any, monkeypatch: Any, answer: str) -> None:
    crafted, made, mark = pickle.dumps(Opener(tmp_path / "made"), 0), tmp_path / "made", tmp_path / "mark"
    pickle.loads(crafted).close()
    made.unlink()
    write_songs(tmp_path / "midi", range(6))
    answer_once(hook, mark, answer.format(crafted=crafted))
    monkeypatch.setattr(readers, "GRACE", 1.0)
    assert build([tmp_path / "midi"], tmp_path / "out", workers=1).counts == {"kept": 6}
    assert mark.exists() and not made.exists()


def test_a_worker_that_twice_answers_nonsense_costs_its_file(tmp_path: Path, hook: Any) -> None:
    write_songs(tmp_path / "midi", range(6))
    hook(f"""
    if data == {bytes(song(4).dumps_midi())!r}:
        from smart import workers
        workers._send = lambda connection, *_: connection.sendall(b'nonsense' * 10)""")
    assert build([tmp_path / "midi"], tmp_path / "out", workers=1).counts == {"kept": 5, "crash": 1}
    (row,) = table(tmp_path / "out" / "rejects.csv")
    assert row["path"] == "midi/1/song 004.mid" and "a garbled answer" in row["detail"]


def test_a_stopped_worker_dies_with_its_parent(tmp_path: Path, tokenizer: Any) -> None:
    save_tokenizer(tokenizer, tmp_path)
    code = f"""
import os, signal, time
from pathlib import Path
from smart.corpus import Limits, ReaderPool
pool = ReaderPool(Path({str(tmp_path / FILE_NAME)!r}), Limits(), 1)
(worker,) = pool.workers
worker.receive(60)
os.kill(worker.process.pid, signal.SIGSTOP)
print(worker.process.pid, flush=True)
time.sleep(60)
"""
    with programs.start([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        process.kill()
        wait_until_gone([pid])
