"""Start a program as ``subprocess`` does, but in a fork of a process that has imported everything already.

An import of torch and transformers takes seconds, and the tests start more than a hundred programs. ``start`` and
``run`` take the words of a command whose first one is ``sys.executable``, and the options of ``subprocess.Popen``. What
they start has that command line, folder, environment, streams and exit code; it is a child of this process, and may be
killed like any other. It differs in three ways: imports take no time, all forks hash strings alike, and the interpreter
is not taken down at the end. A test that is about one of these asks for a fresh process (``fresh=True``);
``SMART_TEST_FRESH=1`` makes all of them fresh.
"""

import atexit
import contextlib
import ctypes
import gc
import importlib
import inspect
import json
import os
import pkgutil
import resource
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import types
import warnings
from collections.abc import Sequence
from typing import Any

FORKS = sys.platform == "linux" and not os.environ.get("SMART_TEST_FRESH")
KEPT = 2  # servers, one for each environment; each holds some 300 MiB
# what a program reads from its environment while it works, and no library when it is imported
PER_PROCESS = (
    "PYTEST_CURRENT_TEST",
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)
LATE = (
    "matplotlib.pyplot",
    "pyarrow.parquet",
    "scipy.stats",
    "torch.utils.tensorboard",
    "transformers.models.phi3.modeling_phi3",
)  # imported by functions


def start(
    words: Sequence[Any], *, fresh: bool = False, file_size: int | None = None, **options: Any
) -> subprocess.Popen[str]:
    """Start a program; ``file_size`` limits the bytes of each file that it writes."""
    words = [os.fspath(word) for word in words]
    options = {"text": True} | options
    if FORKS and not fresh:
        return _Fork(words, file_size, **options)

    def prepare() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored where the tests run under nohup
        if file_size is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))

    return subprocess.Popen(words, preexec_fn=prepare, **options)


def run(
    words: Sequence[Any], *, timeout: float = 300, check: bool = False, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, as ``subprocess.run`` does; what it writes is kept unless ``options`` say otherwise."""
    with start(words, **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options) as process:
        try:
            output, errors = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    assert not check or process.returncode == 0, f"{words}\n{output}\n{errors}"
    return subprocess.CompletedProcess(words, process.returncode, output, errors)


class _Fork(subprocess.Popen[str]):
    """A ``Popen`` whose process a server makes; its pipes, its waiting and its signals are those of the class."""

    def __init__(self, words: Sequence[str], file_size: int | None, **options: Any) -> None:
        assert words[0] == sys.executable, words
        self.file_size = file_size
        super().__init__(words, **options)

    def _execute_child(self, *given: Any) -> None:
        options = inspect.signature(subprocess.Popen._execute_child).bind(self, *given).arguments  # type: ignore[attr-defined]
        for name in ("preexec_fn", "pass_fds", "shell"):
            assert not options[name], f"a fork takes no {name}"
        fds = [options["p2cread"], options["c2pwrite"], options["errwrite"]]
        environment = dict(os.environ if options["env"] is None else options["env"])
        request = {
            "environment": {key: environment.pop(key) for key in PER_PROCESS if key in environment},
            "words": list(options["args"])[1:],
            "cwd": os.path.abspath(options["cwd"] or ""),
            "new_session": options["start_new_session"],
            "file_size": self.file_size,
        }
        self.pid = _server(environment).fork(request, [fd if fd >= 0 else place for place, fd in enumerate(fds)])
        self._child_created = True
        pipes = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(options[name] for name in pipes))  # type: ignore[attr-defined]


class _Server:
    """A process that forks: this module, run as a program."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                # Arrow's allocator has a thread otherwise, and a process of several cannot be forked safely
                env=environment | {"JE_ARROW_MALLOC_CONF": "background_thread:false"},
            )
        assert self.socket.recv(16) == b"ready", "the process to fork from did not start: its error is above"

    def fork(self, request: dict[str, Any], streams: list[int]) -> int:
        with _adopting():
            socket.send_fds(self.socket, [json.dumps(request).encode()], streams)
            answer = self.socket.recv(16)
        assert answer, "the process to fork from has died"
        return int(answer)

    def close(self) -> None:
        self.socket.close()
        self.process.wait()


_servers: dict[str, _Server] = {}
_lock = threading.RLock()


def _server(environment: dict[str, str]) -> _Server:
    """The server whose environment this is: libraries read theirs when they are imported."""
    key = json.dumps(environment, sort_keys=True)
    with _lock:
        server = _servers.pop(key, None) or _Server(environment)
        _servers[key] = server  # the last one used is the last one
        while len(_servers) > KEPT:
            _servers.pop(next(iter(_servers))).close()
        return server


@atexit.register
def _close() -> None:
    while _servers:
        _servers.popitem()[1].close()


@contextlib.contextmanager
def _adopting() -> Any:
    """Meanwhile a process whose parent ends becomes a child of this one: a server forks twice, and one of them ends."""
    set_child_subreaper = 36
    with _lock:
        _prctl(set_child_subreaper, 1)
        try:
            yield
        finally:
            _prctl(set_child_subreaper, 0)


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), f"prctl({option}, {value})")


# --- In the server -------------------------------------------------------------------------------------------------


def _import_everything() -> None:
    import smart

    found = [module.name for module in pkgutil.walk_packages(smart.__path__, "smart.")]
    for name in (*(name for name in found if not name.endswith("__main__")), *LATE):
        with contextlib.suppress(ModuleNotFoundError):  # an extra that is not installed
            importlib.import_module(name)
    import torch

    assert torch.get_num_threads() == 1, "more than one thread (OMP_NUM_THREADS)"


def _serve(requests: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Fork for each request until the tests end; returns in the forks."""
    while True:
        message, streams, _, _ = socket.recv_fds(requests, 1 << 20, 3)
        if not message:
            os._exit(0)
        reading, writing = os.pipe()
        if not (between := os.fork()):
            between = os.getpid()
            if child := os.fork():
                os.write(writing, str(child).encode())
                os._exit(0)
            while os.getppid() == between:  # until it has ended, and the tests' process is the parent
                time.sleep(0.0005)
            for fd in (reading, writing):
                os.close(fd)
            requests.close()
            return json.loads(message), streams
        os.waitpid(between, 0)
        requests.send(os.read(reading, 16))
        for fd in (reading, writing, *streams):
            os.close(fd)


def _become(request: dict[str, Any], streams: list[int]) -> None:
    """Make of a fork what a fresh interpreter finds itself to be."""
    for place, fd in enumerate(streams):
        os.dup2(fd, place)
    for fd in streams:
        os.close(fd)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if request["new_session"]:
        os.setsid()
    if request["file_size"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_size"], request["file_size"]))
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])


def _execute(words: list[str]) -> None:
    """``python WORDS``, where the words begin with -m, -c or the path of a script."""
    if words[0] == "-m":
        sys.path.insert(0, os.getcwd())
        sys.argv[:] = words[1:]
        # the program's own module has been imported: a second copy runs now, as it may in a fresh process
        warnings.filterwarnings("ignore", module="runpy", category=RuntimeWarning)
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.path.insert(0, "")
        sys.argv[:] = ["-c", *words[2:]]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(words[1], "<string>", "exec"), main.__dict__)
    else:
        assert not words[0].startswith("-"), f"a fork does not know {words[0]}"
        sys.path.insert(0, os.path.dirname(os.path.realpath(words[0])))
        sys.argv[:] = words
        runpy.run_path(words[0], run_name="__main__")


def _exit_code() -> int:
    """That of an interpreter which ends with the exception that is being handled, and what it says of it."""
    error = sys.exception() if sys.version_info >= (3, 12) else sys.exc_info()[1]
    if isinstance(error, SystemExit):
        if error.code is None or isinstance(error.code, int):
            return (error.code or 0) & 0xFF
        print(error.code, file=sys.stderr)
        return 1
    sys.excepthook(*sys.exc_info())
    if isinstance(error, KeyboardInterrupt):
        sys.stderr.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    return 1


def _main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests to act on; their end is ours
    sys.path.pop(0)  # this file's folder
    _import_everything()
    del os.environ["JE_ARROW_MALLOC_CONF"]
    requests = socket.socket(fileno=int(sys.argv[1]))
    assert len(os.listdir("/proc/self/task")) == 1, "something that is imported starts a thread"
    gc.collect()
    gc.freeze()  # so that a fork's collector does not write to the pages that it shares
    requests.send(b"ready")
    request, streams = _serve(requests)
    try:
        _become(request, streams)
        _execute(request["words"])
        code = 0
    except BaseException:
        code = _exit_code()
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as the end of an interpreter does
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except OSError:
        code = 120
    os._exit(code)


if __name__ == "__main__":
    _main()
