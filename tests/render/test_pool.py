"""The render pool: the same audio always, from workers that are really killed, stopped and starved."""

import gc
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import symusic
from clips import RATE, Array, heavy_notes, make_score, notes, random_notes, tiny_soundfont

from smart import Failure, UserError
from smart.render import RenderError, RenderPool, load_soundfont, render_notes, score_notes
from smart.render import pool as pool_file


@pytest.fixture(scope="module")
def piano() -> Any:
    return load_soundfont("timgm")


@pytest.fixture(scope="module")
def sine_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("soundfonts") / "sine.sf2"
    path.write_bytes(tiny_soundfont())
    return path


@pytest.fixture(scope="module")
def sine(sine_file: Path) -> Any:
    return load_soundfont(sine_file)


@pytest.fixture(scope="module")
def pool() -> Iterator[RenderPool]:
    with RenderPool("timgm", workers=2) as shared:
        yield shared


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


def running(pid: int) -> bool:
    """Whether a process exists and is no zombie (nobody may be there to reap an orphan)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def busy(pid: int) -> bool:
    """Whether a process is on a processor, or wants to be."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "R"


# The same audio, always -------------------------------------------------------------------------------------


def test_audio_depends_on_the_notes_alone(piano: Any, pool: RenderPool) -> None:
    clips = [random_notes(seed) for seed in range(6)]
    loud = notes(*((0, 10, pitch, 127) for pitch in range(30, 90)))
    expected = [render_notes(piano, clip) for clip in clips]
    for clip, audio in zip(clips, expected, strict=True):
        render_notes(piano, loud)
        np.testing.assert_array_equal(render_notes(piano, clip), audio)
    for workers in (1, 2):
        with RenderPool("timgm", workers=workers) as fresh:
            order = np.random.default_rng(workers).permutation(len(clips))
            futures = {}
            for index in order:
                fresh.submit(loud[:3])
                futures[index] = fresh.submit(clips[index])
            for index, future in futures.items():
                np.testing.assert_array_equal(future.result(), expected[index])
    for audio, want in zip(pool.map(clips), expected, strict=True):
        assert audio.dtype == np.float32 and audio.flags.c_contiguous and audio.flags.writeable
        np.testing.assert_array_equal(audio, want)
    np.testing.assert_array_equal(render_notes("timgm", clips[0]), expected[0])  # a synthesiser loaded anew


def test_no_clip_leaves_a_tail(piano: Any) -> None:
    loud = notes(*((0, 10, pitch, 127, 48) for pitch in range(40, 80)))
    silent, quiet = notes((0, 1, 60, 0)), notes((0.5, 0.5, 72, 1))
    with RenderPool("timgm", workers=1) as one:
        _, after_loud, _, soft, after_soft = one.map([loud, silent, loud, quiet, silent])
    assert not after_loud.any() and not after_soft.any()
    np.testing.assert_array_equal(soft, render_notes(piano, quiet))


def test_scores_and_their_notes_give_the_same(pool: RenderPool) -> None:
    score = make_score([(0, 480, 60, 100), (480, 960, 64, 90)], [(0, 90.0)])
    for unit in ("tick", "quarter"):
        audio = pool.submit(score.to(unit)).result()
        np.testing.assert_array_equal(audio, pool.submit(score_notes(score)).result())
    assert pool.submit(symusic.Score(480)).result().shape == (2, RATE)
    with pytest.raises(ValueError, match="pitch"):
        pool.submit(notes((0, 1, 200)))
    with pytest.raises(TypeError):
        pool.submit("a score")


def test_map_is_in_order_and_takes_an_iterator_as_it_goes(pool: RenderPool) -> None:
    taken = 0

    def endless() -> Iterator[Array]:
        nonlocal taken
        while True:
            taken += 1
            yield notes((0, taken / 100, 60))

    lengths = [audio.shape[1] for audio, _ in zip(pool.map(endless()), range(20), strict=False)]
    assert lengths == [RATE * (index + 1) // 100 for index in range(20)]
    assert taken < 60


# Workers that fail ------------------------------------------------------------------------------------------


def test_a_killed_worker_is_replaced_and_its_clip_rendered_again(piano: Any) -> None:
    heavy, light = heavy_notes(), random_notes(5)
    with RenderPool("timgm", workers=1, seconds=1.5) as one:
        (pid,) = one.pids
        future, behind = one.submit(heavy), one.submit(light)
        wait_until(lambda: busy(pid))
        time.sleep(0.05)
        os.kill(pid, signal.SIGKILL)
        np.testing.assert_array_equal(future.result(60), render_notes(piano, heavy, seconds=1.5))
        np.testing.assert_array_equal(behind.result(60), render_notes(piano, light, seconds=1.5))
        assert (one.retries, one.failures, one.restarts) == (1, 0, 1)
        assert one.pids != [pid] and not running(pid)
        # killed while it had nothing to do: no clip is lost over it
        os.kill(one.pids[0], signal.SIGKILL)
        wait_until(lambda: not running(one.pids[0]))
        assert one.submit(light).result(60).any()
        assert (one.retries, one.failures, one.restarts) == (1, 0, 2)


@pytest.mark.slow
def test_a_stopped_worker_is_replaced_after_the_deadline(sine_file: Path, sine: Any) -> None:
    with RenderPool(sine_file, workers=1, deadline=1.0) as one:
        os.kill(one.pids[0], signal.SIGSTOP)
        started = time.monotonic()
        audio = one.submit(notes((0, 1, 60))).result(30)
        assert 0.9 < time.monotonic() - started < 15
        np.testing.assert_array_equal(audio, render_notes(sine, notes((0, 1, 60))))
        assert (one.retries, one.failures, one.restarts) == (1, 0, 1)
        # a message larger than the socket holds, to one who does not read
        many = np.repeat(notes((0, 0.01, 60)), 40_000, axis=0)
        os.kill(one.pids[0], signal.SIGSTOP)
        assert one.submit(many).result(30).any()
        assert (one.retries, one.failures, one.restarts) == (2, 0, 2)


POISON = """
import time
from smart.render import pool
clean = pool.render_notes
def poisoned(soundfont, notes, **settings):
    if len(notes) and notes[0, 2] == 13:
        {effect}
    return clean(soundfont, notes, **settings)
pool.render_notes = poisoned
"""


def poisoned(effect: str) -> str:
    """The program of a worker that meets a certain clip with ``effect``."""
    return POISON.format(effect=effect) + pool_file.PROGRAM


@pytest.mark.slow
@pytest.mark.parametrize(
    ("effect", "reason", "restarts"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "died of signal 11", 2),
        ("os.kill(os.getpid(), signal.SIGSTOP)", "no answer within 1 s", 2),
        ("time.sleep(60)", "no answer within 1 s", 2),
        ("os._exit(7)", "exit status 7", 2),
        ("raise MemoryError('full')", "MemoryError: full", 2),
    ],
)
def test_a_clip_that_fails_twice_fails_alone(
    sine_file: Path, sine: Any, monkeypatch: pytest.MonkeyPatch, effect: str, reason: str, restarts: int
) -> None:
    monkeypatch.setattr(pool_file, "PROGRAM", poisoned(effect))
    poison, good = notes((0, 1, 13)), notes((0, 1, 60))
    with RenderPool(sine_file, workers=1, deadline=1.0) as one:
        futures = [one.submit(rows) for rows in (good, poison, good)]
        with pytest.raises(RenderError, match=f"{reason}.*; again: .*{reason}"):
            futures[1].result(30)
        for future in (futures[0], futures[2]):
            np.testing.assert_array_equal(future.result(30), render_notes(sine, good))
        assert (one.retries, one.failures, one.restarts) == (1, 1, restarts)


def test_a_worker_that_dies_while_it_starts_costs_no_clip(
    sine_file: Path, sine: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with RenderPool(sine_file, workers=1) as one:
        mark = tmp_path / "died"
        dies_once = f"import os; os.path.exists({str(mark)!r}) or (open({str(mark)!r}, 'w').close(), os._exit(9))\n"
        monkeypatch.setattr(pool_file, "PROGRAM", dies_once + pool_file.PROGRAM)
        os.kill(one.pids[0], signal.SIGKILL)
        wait_until(lambda: not running(one.pids[0]))
        rows = notes((0, 1, 60))
        np.testing.assert_array_equal(one.submit(rows).result(60), render_notes(sine, rows))
        assert mark.exists() and (one.retries, one.failures, one.restarts) == (0, 0, 2)


@contextmanager
def files_at_most(count: int) -> Iterator[None]:
    """As many files may be opened in this process, and no more."""
    numbers = [os.dup(0) for _ in range(count + 1)]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for number in numbers:
        os.close(number)
    resource.setrlimit(resource.RLIMIT_NOFILE, (numbers[-1], hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("free", [0, 1, 3])
def test_a_short_outage_of_the_system_costs_no_clip(sine_file: Path, free: int) -> None:
    """For a while there is no file for the audio, none for the connection, none for the pipe of a new process."""
    with RenderPool(sine_file, workers=1) as one:
        inside = open_files()
        os.kill(one.pids[0], signal.SIGKILL)
        wait_until(lambda: not running(one.pids[0]))
        with files_at_most(free):
            futures = [one.submit(notes((0, 1, 60))) for _ in range(20)]
            time.sleep(0.5)
        assert not any(future.done() for future in futures)
        assert all(future.result(30).any() for future in futures)
        assert (one.retries, one.failures, one.restarts) == (0, 0, 1) and open_files() == inside


def test_a_system_that_starts_no_process_is_named(sine_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_file, "PAUSES", (0.01,))
    monkeypatch.setattr(pool_file, "GIVE_UP", 1)
    with RenderPool(sine_file, workers=1) as one:
        os.kill(one.pids[0], signal.SIGKILL)
        wait_until(lambda: not running(one.pids[0]))
        with files_at_most(0):
            lost, hopeless = (one.submit(notes((0, 1, 60))) for _ in range(2))
            with pytest.raises(RenderError, match=r"no worker process can be started: .*Too many open files"):
                lost.result(30)
            with pytest.raises(Failure, match=r"no worker process can be started: .*open files.*\)$"):
                hopeless.result(30)
    with files_at_most(1), pytest.raises(Failure, match=r"do not start: no worker process .*Too many open files"):
        RenderPool(sine_file, workers=1)


def test_closing_does_not_wait_for_the_system(sine_file: Path) -> None:
    with RenderPool(sine_file, workers=1) as one:
        os.kill(one.pids[0], signal.SIGKILL)
        wait_until(lambda: not running(one.pids[0]))
        with files_at_most(0):
            future = one.submit(notes((0, 1, 60)))
            time.sleep(0.4)
            started = time.monotonic()
            one.close()
        assert time.monotonic() - started < 1
        with pytest.raises(RenderError, match="closed"):
            future.result(0)


# the first to make the folder dies, and no other
DIES = """
import os
try:
    os.mkdir({mark!r})
except FileExistsError:
    pass
else:
    os.kill(os.getpid(), {signal})
"""


def test_the_loss_of_a_worker_that_starts_is_survived(
    sine_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    boot, mark = pool_file.PROGRAM, tmp_path / "died"
    monkeypatch.setattr(pool_file, "PROGRAM", DIES.format(mark=str(mark), signal=9) + boot)
    with RenderPool(sine_file, workers=2) as two:
        assert mark.exists() and two.submit(notes((0, 1, 60))).result(30).any()
        assert (two.retries, two.failures, two.restarts) == (0, 0, 1)
    monkeypatch.setattr(pool_file, "PROGRAM", "import os; os.kill(os.getpid(), 9)")
    with pytest.raises(Failure, match="the render workers do not start: it died of signal 9"):
        RenderPool(sine_file, workers=1)
    mark.rmdir()  # but a synthesiser that crashes would do so again
    monkeypatch.setattr(pool_file, "PROGRAM", DIES.format(mark=str(mark), signal=11) + boot)
    with pytest.raises(UserError, match=r"sine\.sf2 cannot be loaded.*died of signal 11"):
        RenderPool(sine_file, workers=1)


def test_a_soundfont_that_is_replaced_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "font.sf2"
    path.write_bytes(tiny_soundfont())
    with RenderPool(path, workers=1) as one:
        assert one.submit(notes((0, 1, 60))).result(30).any()
        os.kill(one.pids[0], signal.SIGKILL)
        wait_until(lambda: not running(one.pids[0]))
        (tmp_path / "other.sf2").write_bytes(tiny_soundfont(((0, 0), (0, 1))))
        (tmp_path / "other.sf2").replace(path)
        for _ in range(2):  # not even by the worker that has loaded it
            with pytest.raises(Failure, match=r"font\.sf2 was changed while it was in use"):
                one.submit(notes((0, 1, 60))).result(30)


TWICE = """
from smart import workers
send = workers._send
def twice(connection, number, fields, data=b""):
    for _ in range(1 + ("samples" in fields)):
        send(connection, number, fields, data)
workers._send = twice
"""


def test_an_answer_too_many_is_not_the_next_clip(sine_file: Path, sine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_file, "PROGRAM", TWICE + pool_file.PROGRAM)
    with RenderPool(sine_file, workers=1) as one:
        for pitch in (60, 64, 67):
            rows = notes((0, 1, pitch))
            np.testing.assert_array_equal(one.submit(rows).result(30), render_notes(sine, rows))
        assert (one.retries, one.failures, one.restarts) == (2, 0, 2)


def test_a_clip_that_failed_is_freed_without_a_collection(sine_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_file, "PROGRAM", poisoned("raise MemoryError('full')"))
    with RenderPool(sine_file, workers=1) as one:
        gc.collect()
        gc.disable()
        try:
            future = one.submit(notes((0, 1, 13)))
            assert isinstance(future.exception(30), RenderError)
            freed = weakref.ref(future)
            del future
            wait_until(lambda: freed() is None)
        finally:
            gc.enable()


def test_a_worker_out_of_memory_is_replaced(sine_file: Path, sine: Any) -> None:
    """It may have no more than it has: the clip is rendered by another, which may."""
    long = np.concatenate([notes((second, second + 1, 60)) for second in range(59)])
    with RenderPool(sine_file, workers=1, seconds=60.0) as one:
        (pid,) = one.pids
        most = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.prlimit(pid, resource.RLIMIT_AS, (most, most))
        np.testing.assert_array_equal(one.submit(long).result(60), render_notes(sine, long, seconds=60.0))
        assert (one.retries, one.failures, one.restarts) == (1, 0, 1) and not running(pid)


def test_a_pool_whose_every_clip_fails_stops_trying(sine_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_file, "PROGRAM", poisoned("os.kill(os.getpid(), signal.SIGSEGV)"))
    monkeypatch.setattr(pool_file, "GIVE_UP", 3)
    poison, good = notes((0, 1, 13)), notes((0, 1, 60))
    with RenderPool(sine_file, workers=1) as one:
        futures = [one.submit(rows) for rows in (poison, poison, good, poison, poison, poison, good, poison)]
        for future, fails in zip(futures[:6], (True, True, False, True, True, True), strict=True):
            if fails:
                with pytest.raises(RenderError, match="died of signal 11"):
                    future.result(60)
            else:
                assert future.result(60).any()  # which starts the count anew
        for future in futures[6:]:
            with pytest.raises(Failure, match=r"none of the last 3 clips could.*sine\.sf2.*signal 11.*choose another"):
                future.result(60)
        assert (one.failures, one.restarts) == (5, 9)  # nothing was tried in vain after that


IMPOSTOR = """
import json, socket, struct, time
connection = socket.socket(fileno=int(sys.argv[1]))
def receive():
    number, length, size = struct.unpack("<QIQ", connection.recv(20, socket.MSG_WAITALL))
    return json.loads(connection.recv(length, socket.MSG_WAITALL)), connection.recv(size, socket.MSG_WAITALL)
def message(fields, data=b"", number=2):
    text = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    connection.sendall(struct.pack("<QIQ", number, len(text), len(data)) + text + data)
memory = receive()[0]["audio_fd"]
message({{}}, number=1)
receive()
{answer}
time.sleep(60)
"""


@pytest.mark.parametrize(
    "answer",
    [
        "connection.sendall(b'nonsense' * 100)",
        "message({'samples': 10**15})",
        "message({'samples': 0})",
        "message({'samples': 1000})",  # without having written them
        "message({'samples': '1'})",
        "message({'samples': 1}, bytes(1))",  # more than was agreed
        "message(b'?')",
        "message(b'[1]')",
        "message(b'[' * 60_000)",
        "message({'text': 'x' * 2**16})",
        "os.pwrite(memory, bytes(8), 0); message({'samples': 1}, number=3)",  # to no request
        "os.pwrite(memory, bytes(8), 0); message({'samples': 1}, number=1)",
    ],
)
def test_nonsense_from_a_worker_fails_the_clip(sine_file: Path, monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
    monkeypatch.setattr(pool_file, "PROGRAM", IMPOSTOR.format(answer=answer))
    with RenderPool(sine_file, workers=1, deadline=10.0) as one:
        first = one.pids[0]
        with pytest.raises(RenderError, match=r"a garbled answer \(.*\); again: a garbled answer \("):
            one.submit(notes((0, 1, 60))).result(30)
        assert (one.retries, one.failures, one.restarts) == (1, 1, 1)
        assert not running(first)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("answer", "reason"), [("connection.close()", "it closed its connection"), ("sys.exit(3)", "exit status 3")]
)
def test_a_worker_that_leaves_fails_the_clip(
    sine_file: Path, monkeypatch: pytest.MonkeyPatch, answer: str, reason: str
) -> None:
    monkeypatch.setattr(pool_file, "PROGRAM", IMPOSTOR.format(answer=answer))
    with RenderPool(sine_file, workers=1, deadline=10.0) as one, pytest.raises(RenderError, match=f"{reason}; again"):
        one.submit(notes((0, 1, 60))).result(30)


def test_a_soundfont_that_takes_too_long(sine_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_file, "PROGRAM", "import time; time.sleep(60)")
    with pytest.raises(UserError, match=r"sine\.sf2 cannot be loaded.*no answer within 0\.3 s"):
        RenderPool(sine_file, workers=2, load_deadline=0.3)


def test_closing(sine_file: Path) -> None:
    one = RenderPool(sine_file, workers=1, seconds=60.0)
    (pid,) = one.pids
    working, waiting = one.submit(heavy_notes()), one.submit(notes((0, 1, 60)))
    wait_until(lambda: working.running() and busy(pid))
    started = time.monotonic()
    one.close()
    assert time.monotonic() - started < 5
    with pytest.raises(RenderError, match="closed"):
        working.result(0)
    with pytest.raises(CancelledError):
        waiting.result(0)
    assert not running(pid) and one.pids == []
    one.close()
    with pytest.raises(RuntimeError, match="closed"):
        one.submit(notes((0, 1, 60)))
    assert (one.retries, one.failures, one.restarts) == (0, 0, 0)


def test_closing_does_not_wait_for_a_stopped_worker(sine_file: Path) -> None:
    with RenderPool(sine_file, workers=2) as two:
        for pid in two.pids:
            os.kill(pid, signal.SIGSTOP)
        futures = [two.submit(notes((0, 1, 60))) for _ in range(5)]
        started = time.monotonic()
    assert time.monotonic() - started < 5
    assert all(future.done() for future in futures)


def test_a_cancelled_clip_is_not_rendered(sine_file: Path) -> None:
    with RenderPool(sine_file, workers=1, seconds=2.0) as one:
        first, second, third = (one.submit(rows) for rows in (heavy_notes(), notes((0, 1, 60)), notes((0, 2, 60))))
        assert second.cancel()
        assert third.result(30).shape == (2, 2 * RATE) and first.done()


def test_wrong_settings(sine_file: Path) -> None:
    for setting in (
        {"workers": 0},
        {"workers": 1.5},
        {"deadline": 0.0},
        {"seconds": -1.0},
        {"sample_rate": 1},
    ):
        with pytest.raises(ValueError, match=next(iter(setting))):
            RenderPool(sine_file, **setting)  # type: ignore[arg-type]


# Memory, files and processes --------------------------------------------------------------------------------


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.slow
def test_nothing_is_left_after_many_pools_and_clips(sine_file: Path) -> None:
    with RenderPool(sine_file, workers=1) as one:
        one.submit(notes((0, 1, 60))).result()
    files, threads = open_files(), threading.active_count()
    pids: set[int] = set()
    for cycle in range(12):
        with RenderPool(sine_file, workers=2) as two:
            pids.update(two.pids)
            if cycle % 3 == 0:
                os.kill(two.pids[0], signal.SIGKILL)
            futures: list[Future[Array]] = [two.submit(notes((0, 1, 60))) for _ in range(4)]
            inside = open_files()
            if cycle % 2:
                assert all(future.result().any() for future in futures)
                assert open_files() <= inside + 2
    assert open_files() == files and threading.active_count() == threads
    assert not any(running(pid) for pid in pids)
    with RenderPool(sine_file, workers=1) as one:
        inside = open_files()
        for _ in one.map([notes((0, 0.1, 60))] * 200):
            pass
        assert open_files() == inside


def test_a_worker_stays_small(pool: RenderPool) -> None:
    for _ in pool.map([random_notes(seed, 200, 9.0) for seed in range(6)]):
        pass
    allowed = 100 * 2**20 + pool.soundfont.stat().st_size
    for pid in pool.pids:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        assert int(status["VmHWM"].split()[0]) * 1024 < allowed
        loaded = Path(f"/proc/{pid}/maps").read_text()
        assert "numpy" in loaded and "torch" not in loaded and "symusic" not in loaded
        for file in Path(f"/proc/{pid}/fd").iterdir():  # no named memory that would have to be removed
            assert int(file.name) <= 2 or not os.readlink(file).startswith(("/dev/shm", "/tmp"))


SCRIPT = """
import os, sys, time
import numpy as np
from smart.render import RenderPool

print("main program", flush=True)
pool = RenderPool({path!r}, workers=2, seconds=60.0)
heavy = np.array([(0.0, 60.0, pitch, 100, program, 0) for pitch in range(20, 100) for program in range(9)])
futures = [pool.submit(heavy) for _ in range(3)]
print("workers", *pool.pids, flush=True)
{rest}
"""


def start_script(folder: Path, soundfont: Path, rest: str, **options: Any) -> tuple["subprocess.Popen[str]", list[int]]:
    """Run SCRIPT, which has no __main__ guard, in a folder full of traps; returns it and its workers' ids."""
    script, traps = folder / "programs" / "main.py", folder / "traps"
    script.parent.mkdir()
    traps.mkdir()
    for name in ("numpy", "json", "socket", "tinysoundfont", "click", "smart"):
        (traps / f"{name}.py").write_text("raise SystemExit('imported from the current directory')")
    script.write_text(SCRIPT.format(path=str(soundfont), rest=rest))
    process = subprocess.Popen(
        [sys.executable, str(script)],
        cwd=traps,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,
    )
    assert process.stdout is not None
    lines = [process.stdout.readline().split() for _ in range(2)]
    assert lines[0] == ["main", "program"] and lines[1][:1] == ["workers"], process.communicate()
    return process, [int(pid) for pid in lines[1][1:]]


def finish(process: "subprocess.Popen[str]", workers: list[int]) -> tuple[str, str]:
    """Wait for a program and its workers; returns what it still wrote."""
    process.wait(20)
    wait_until(lambda: not any(running(pid) for pid in workers), 5)
    assert process.stdout is not None and process.stderr is not None
    return process.stdout.read(), process.stderr.read()


def test_workers_die_with_a_killed_parent(tmp_path: Path, sine_file: Path) -> None:
    process, pids = start_script(tmp_path, sine_file, "time.sleep(60)")
    with process:
        assert len(pids) == 2
        wait_until(lambda: all(busy(pid) for pid in pids))  # at work, so that no end of file is noticed
        os.kill(pids[0], signal.SIGSTOP)
        process.kill()
        assert finish(process, pids) == ("", "")


def test_a_worker_that_stands_still_in_its_imports_dies_with_its_parent(tmp_path: Path, sine_file: Path) -> None:
    code = f"""
import os, threading, time
from smart.render import pool
pool.PROGRAM = "os.kill(os.getpid(), signal.SIGSTOP)"
threading.Thread(target=pool.RenderPool, args=({str(sine_file)!r},), kwargs=dict(workers=1), daemon=True).start()
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        children = Path(f"/proc/{process.pid}/task")
        found: list[int] = []

        def stopped() -> bool:
            try:
                found[:] = [int(pid) for task in children.iterdir() for pid in (task / "children").read_text().split()]
                return any(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T" for pid in found)
            except OSError:  # a thread that has ended meanwhile
                return False

        wait_until(stopped)
        process.kill()
        wait_until(lambda: not any(running(pid) for pid in found))


def test_ctrl_c_while_waiting_ends_everything(tmp_path: Path, sine_file: Path) -> None:
    process, pids = start_script(tmp_path, sine_file, "with pool:\n    futures[0].result()")
    with process:
        wait_until(lambda: all(busy(pid) for pid in pids))
        os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the workers too
        out, err = finish(process, pids)
    assert process.returncode == -signal.SIGINT and out == ""
    assert err.count("Traceback") == 1 and err.strip().endswith("KeyboardInterrupt")


def test_a_program_that_forgets_its_pool_ends_quietly(tmp_path: Path, sine_file: Path) -> None:
    process, pids = start_script(tmp_path, sine_file, "print('end')")
    with process:
        out, err = finish(process, pids)
    assert (out, err, process.returncode) == ("end\n", "", 0)
