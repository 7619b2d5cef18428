"""smart.process and smart.style: closed streams, Ctrl-C while importing, limits of the system, figures."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from smart import UserError, require
from smart.process import exhausted
from smart.style import own_style

STREAMS = """
import os, socket, sys
import smart
opened = socket.socket().fileno(), os.memfd_create("x")
assert min(opened) > 2, opened
print("out"); print("err", file=sys.stderr); assert sys.stdin.read() == ""
import subprocess
subprocess.run([sys.executable, "-c", "import os; [os.fstat(number) for number in range(3)]"], check=True)
os._exit(7)
"""


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
def test_closed_streams_are_opened_on_nothing(closed: tuple[int, ...]) -> None:
    done = subprocess.run(
        ["sh", "-c", f'exec "$0" -c "$1" {" ".join(f"{number}>&-" for number in closed)}', sys.executable, STREAMS],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 7, done.stderr
    assert (done.stdout == "out\n") == (1 not in closed) and (done.stderr == "err\n") == (2 not in closed)


SWALLOWS = """
import os, signal, sys
sys.argv[0] = "smart"
import smart
sys.path.insert(0, {folder!r})
try:
    os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt:
    print("outside of imports it is an exception", flush=True)
import swallower
"""


def test_an_interrupt_that_a_module_would_swallow_ends_the_program(tmp_path: Path) -> None:
    (tmp_path / "swallower.py").write_text(
        "import os, signal, time\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(1)\n"
        "except BaseException:\n    pass\nprint('swallowed')\n"
    )
    words = [sys.executable, "-c", SWALLOWS.format(folder=str(tmp_path))]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 128 + signal.SIGINT and done.stderr == "Error: interrupted while it was starting\n"
    assert done.stdout == "outside of imports it is an exception\n"


@pytest.mark.parametrize(
    ("error", "limit"),
    [
        (OSError(errno.EMFILE, "Too many open files"), "too many open files in this process (ulimit -n is "),
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (MemoryError(), "not enough memory"),
        (RuntimeError("Cannot allocate memory (os error 12)"), "not enough memory"),
        (OSError(errno.ENOENT, "No such file"), None),
        (ValueError("not a number"), None),
    ],
)
def test_a_limit_of_the_system_is_not_the_users_mistake(error: Exception, limit: str | None) -> None:
    def find() -> None:
        try:
            raise error
        except Exception:
            raise UserError("base x: cannot be read") from None

    assert (exhausted(error) or "").startswith(limit or "")
    with pytest.raises(UserError) as caught:
        require(find, find)
    assert caught.value.exit_code == (1 if limit else 2)
    assert caught.value.message.startswith(limit or "base x") and "base x: cannot be read" in caught.value.message


def test_too_many_open_files_are_named(tmp_path: Path) -> None:
    """The smallest number of descriptors with which Python starts, and one more, and so on: never the input's fault."""
    (tmp_path / "x.json").write_text("{}")
    code = (
        "import resource, sys; from smart import UserError; from smart.reward.ce_proxy import load_coefficients\n"
        "held = [open('/dev/null') for _ in range(20)]\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (len(held), resource.getrlimit(resource.RLIMIT_NOFILE)[1]))\n"
        "try:\n    load_coefficients(sys.argv[1])\n"
        "except UserError as error:\n    print(error.exit_code, error.message)"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "x.json")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.stdout.startswith("1 too many open files in this process (ulimit -n is 20): "), done.stderr


def test_the_users_matplotlib_changes_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib

    @own_style
    def draw() -> tuple[object, object]:
        return matplotlib.rcParams["text.usetex"], matplotlib.rcParams["font.size"]

    with matplotlib.rc_context({"text.usetex": True, "font.size": 40}):
        assert draw() == (False, 10.0)
        assert matplotlib.rcParams["text.usetex"] and matplotlib.rcParams["font.size"] == 40


def test_a_backend_that_does_not_exist_ends_no_figure(tmp_path: Path) -> None:
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfont.family: NoSuchFont\n")
    code = (
        "from pathlib import Path; from smart.plots import curves\n"
        'Path("metrics.jsonl").write_text(\'{"step": 1, "a": 1.0}\\n{"step": 2, "a": 2.0}\\n\')\n'
        "curves(Path('.'), ('a',), 'x', step='step')"
    )
    environment = os.environ | {"MPLBACKEND": "no_such_backend", "MATPLOTLIBRC": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "a.png").is_file(), done.stderr
