"""smart.system: what takes the place of what only Linux has. Linux is taken away from whole processes (no_linux)."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import runs

from smart.render import RenderPool, find_soundfont

NO_LINUX = str(Path(__file__).parent / "no_linux")


def without_linux(*arguments: str, **options: Any) -> "subprocess.Popen[str]":
    path = os.pathsep.join([NO_LINUX, *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, *arguments], env=environment, text=True, **{**pipes, **options})


ROOMS = """
import os, sys
from pathlib import Path
import numpy as np
import symusic
from smart import cores, system
from smart.corpus.midi import Limits
from smart.corpus.readers import ReaderPool
from smart.doctor.machine import FEWEST_BYTES, _available_memory
from smart.files import hold, write_atomically
from smart.model import find_base
from smart.render import RenderPool, find_soundfont
from smart.render.bank import NoteBank

folder = Path(sys.argv[1])
assert not hasattr(os, "memfd_create") and not Path("/proc").exists() and system.path_of(0) is None
assert cores.usable_cores() >= 1 and _available_memory() > FEWEST_BYTES // 4

notes = np.array([[0.0, 0.5, 60, 100, 0, 0], [0.25, 0.5, 64, 90, 0, 0]])
font = find_soundfont("timgm")
with RenderPool(font, seconds=1.0, workers=2) as pool:
    rendered = list(pool.map([notes] * 4))
assert all(np.array_equal(rendered[0], other) for other in rendered) and abs(rendered[0]).max() > 0.01
np.save(folder / "pool.npy", rendered[0])
np.save(folder / "bank.npy", NoteBank(font, seconds=1.0).render([notes])[0].numpy())

score = symusic.Score(480)
score.tracks.append(symusic.Track(program=0))
score.tracks[0].notes.extend(symusic.Note(480 * beat, 480, 60 + beat, 80) for beat in range(16))
score.dump_midi(folder / "scale.mid")
tokenizer = Path(find_base("piano-small")) / "tokenizer.json"
path = os.fsencode(folder / "scale.mid")
with ReaderPool(tokenizer, Limits(), 1) as readers:
    [(_, piece)] = readers.answers(iter([(path, path)]))
assert piece.notes == 16, piece

write_atomically(folder / "file", b"whole")
with hold(folder):
    try:
        with hold(folder):
            raise SystemExit("locked twice")
    except BlockingIOError:
        pass
"""


def test_the_rooms_work_without_what_only_linux_has(tmp_path: Path) -> None:
    process = without_linux("-c", ROOMS, str(tmp_path))
    _, said = process.communicate(timeout=300)
    assert (process.returncode, said) == (0, "")
    notes = np.array([[0.0, 0.5, 60, 100, 0, 0], [0.25, 0.5, 64, 90, 0, 0]])
    with RenderPool(find_soundfont("timgm"), seconds=1.0, workers=1) as pool:
        here = pool.submit(notes).result()
    assert np.array_equal(np.load(tmp_path / "pool.npy"), here)
    assert np.allclose(np.load(tmp_path / "bank.npy"), here, atol=1e-3)


PARENT = """
import subprocess, sys
code = "import os, sys; from smart.system import die_with_parent; die_with_parent(int(sys.argv[1])); print(os.getpid())"
child = subprocess.Popen([sys.executable, "-c", code + "; sys.stdout.flush(); sys.stdin.read()", sys.argv[1]])
child.wait()
"""


def test_a_process_ends_with_its_parent_also_where_the_system_does_not_see_to_it() -> None:
    """``die_with_parent`` in a process whose parent is killed, and in one whose parent was gone before it asked."""
    code = PARENT.replace("sys.argv[1]]", "str(os.getpid())]").replace("import subprocess", "import os, subprocess")
    with without_linux("-c", code, stdin=subprocess.PIPE) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        assert Path(f"/proc/{child}").exists()
        process.kill()
        began = time.monotonic()
        while running(child):
            assert time.monotonic() - began < 20
            time.sleep(0.05)
    done = without_linux("-c", PARENT, "1", stdin=subprocess.PIPE)  # 1 is not its parent
    with done:
        assert done.wait(20) is not None


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_run_is_tuned_without_what_only_linux_has(tmp_path: Path) -> None:
    base = tmp_path / "base"
    runs.teach_base(base)
    changes = {"grpo.iterations": 1, "track.final_prompts": 2, "track.held_out_every": 1, "render.workers": 1}
    process = without_linux("-m", "smart.grpo", *runs.arguments(base, tmp_path / "runs", **changes))
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert (tmp_path / "runs" / "r" / "tuned" / "model.safetensors").is_file()
    assert (tmp_path / "runs" / "r" / "final" / "00-tuned.wav").is_file()


def test_a_step_of_a_reproduction_runs_without_what_only_linux_has(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from test_reproduce import go, writes; "
        "go(Path(sys.argv[1]), writes('first', 'a'))"
    )
    tests = str(Path(__file__).parent / "reproduce")
    process = without_linux("-c", f"import sys; sys.path.insert(0, {tests!r}); {code}", str(tmp_path / "out"))
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0 and (tmp_path / "out" / "first" / "made.txt").is_file(), said


def test_a_limit_on_memory_holds_where_the_system_has_one() -> None:
    code = "from smart.system import limit_memory; limit_memory(64 << 20); bytearray(512 << 20)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "MemoryError" in done.stderr
    other = without_linux("-c", code)
    assert other.communicate(timeout=60)[1] == "" and other.returncode == 0
