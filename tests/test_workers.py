"""One worker process: its frames, its deadlines, its end; and that nothing in the package unpickles."""

import ast
import os
import pickle
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import smart
from smart.workers import Died, GarbledAnswer, NoAnswer, Refused, Worker, WorkerFailure, answering

ECHO = """
import time
from smart import workers
def prepare(greeting):
    if greeting == "refuse":
        raise ValueError("this is not\\n how we greet")
    def answer(data):
        if data == b"raise":
            raise MemoryError("full")
        if data == b"sleep":
            time.sleep(60)
        return {"greeting": greeting, "length": len(data)}, data
    return answer
"""
SERVE = "workers.serve(int(sys.argv[1]), prepare)"


@contextmanager
def started(program: str = ECHO + SERVE, greeting: str = "hello", longest: int = 1 << 20) -> Iterator[Worker]:
    worker = Worker(program, {"greeting": greeting}, longest=longest)
    try:
        yield worker
    finally:
        worker.close()


def test_fields_and_bytes_arrive_as_they_were_sent() -> None:
    greeting = "Grüße, \udce9 and \N{MUSICAL SYMBOL G CLEF}"
    with started(greeting=greeting) as worker:
        assert not worker.ready and worker.receive(30) == ({}, b"") and worker.ready
        for data in (b"", b"{}", bytes(range(256)) * 4096):
            assert worker.ask(data, 30) == ({"greeting": greeting, "length": len(data)}, data)
        for data in (b"one", b"two"):
            worker.send(data)
        assert [worker.receive(30)[1] for _ in range(2)] == [b"one", b"two"]


def test_an_error_is_an_answer() -> None:
    with started() as worker:
        worker.receive(30)
        with pytest.raises(Refused, match=r"^MemoryError: full$"):
            worker.ask(b"raise", 30)
        assert worker.ask(b"on", 30)[1] == b"on"
    with started(greeting="refuse") as worker, pytest.raises(Refused, match=r"^ValueError: this is not how we greet$"):
        worker.receive(30)


def test_a_worker_that_is_late_or_gone() -> None:
    with started() as worker:
        assert answering([worker], 30) == [worker]
        worker.receive(30)
        assert answering([worker], 0) == []
        since = time.monotonic()
        with pytest.raises(NoAnswer, match=r"^no answer within 0\.5 s$"):
            worker.ask(b"sleep", 0.5)
        assert 0.4 < time.monotonic() - since < 5
        worker.kill()
        assert answering([worker], 30) == [worker]
        with pytest.raises(Died, match=r"^it died of signal 9, Killed$"):
            worker.receive(30)
        assert not worker.alive() and worker.close() == -signal.SIGKILL
    with started() as worker:
        worker.receive(30)
        assert worker.close(patience=30) == 0  # it ends by itself when its connection does


def test_an_answer_too_many_is_garbled() -> None:
    twice = "send = workers._send\nworkers._send = lambda *words: (send(*words), send(*words))\n"
    with started(ECHO + twice + SERVE) as worker:
        worker.receive(30)
        with pytest.raises(GarbledAnswer, match="it answers request 1, which is not due"):
            worker.ask(b"", 30)


def test_no_more_is_read_than_was_agreed() -> None:
    with started(longest=10) as worker:
        worker.receive(30)
        assert worker.ask(bytes(10), 30)[1] == bytes(10)
        with pytest.raises(GarbledAnswer, match="expected at most"):
            worker.ask(bytes(11), 30)


class Opener:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return open, (self.path, "w")


@pytest.mark.parametrize(
    "answer",
    [
        "{crafted}",
        "len({crafted}).to_bytes(4, 'big') + {crafted}",  # the frame of a multiprocessing.Connection
        "workers._HEADER.pack(2, len({crafted}), 0) + {crafted}",  # in place of the fields
        "workers._HEADER.pack(2, 2, len({crafted})) + b'{{}}' + {crafted}",  # as raw bytes
    ],
)
def test_an_answer_is_not_unpickled(tmp_path: Path, answer: str) -> None:
    crafted, made = pickle.dumps(Opener(tmp_path / "made")), tmp_path / "made"
    pickle.loads(crafted).close()
    made.unlink()  # so that is what it would do
    impostor = f"""
def impostor(connection, *words):
    if words[0] == 1:
        return send(connection, *words)
    connection.sendall({answer.format(crafted=repr(crafted))})
send, workers._send = workers._send, impostor
"""
    with started(ECHO + impostor + SERVE) as worker:
        worker.receive(30)
        try:
            assert worker.ask(b"", 2.0) == ({}, crafted)
        except WorkerFailure as failure:
            assert isinstance(failure, GarbledAnswer | NoAnswer)
    assert not made.exists()


def test_a_worker_dies_with_the_thread_that_started_it() -> None:
    workers = []

    def start() -> None:
        workers.append(Worker(ECHO + SERVE, {"greeting": ""}))
        workers[0].receive(30)
        os.kill(workers[0].process.pid, signal.SIGSTOP)  # so that it does not notice the end of its connection

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    assert workers[0].process.wait(30) == -signal.SIGKILL
    workers[0].close()


# Nothing is unpickled ---------------------------------------------------------------------------------------

UNPICKLING = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "multiprocessing"}


def test_nothing_in_the_package_unpickles_or_runs_what_it_reads() -> None:
    """But for what the processes of one run tell each other (smart.distributed)."""
    found = set()
    for path in Path(smart.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            elif isinstance(node, ast.Call) and unpickles(node):
                found.add((path.name, ast.unparse(node.func)))
                continue
            else:
                continue
            found |= {(path.name, name) for name in names if name.partition(".")[0] in UNPICKLING}
    assert found == {("distributed.py", "dist.all_gather_object")}


def unpickles(node: ast.Call) -> bool:
    name, keywords = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
    if name == "torch.load":
        return keywords.get("weights_only") != "True"
    if name in ("np.load", "numpy.load"):
        return keywords.get("allow_pickle") != "False"
    return name in ("eval", "exec") or name.startswith("yaml.") or name.endswith(("_object", "_pickle"))
