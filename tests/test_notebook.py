"""The notebook of the examples, and ``train`` in a kernel: in a cell, with an event loop running, and in a thread."""

import asyncio
import os
import queue
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from runs import arguments

nbformat = pytest.importorskip("nbformat", reason="needs nbclient and ipykernel")
nbclient = pytest.importorskip("nbclient", reason="needs nbclient and ipykernel")
pytest.importorskip("ipykernel", reason="needs nbclient and ipykernel")

from jupyter_client.manager import start_new_kernel  # noqa: E402

pytestmark = pytest.mark.slow

NOTEBOOK = Path(__file__).parent.parent / "examples" / "quickstart.ipynb"
PATIENCE = 240  # seconds, on a busy machine
SHORT = ["grpo.iterations=2", "grpo.prompts=2", "grpo.group_size=2", "sampling.max_new_tokens=64"]
SHORT += ["render.workers=1", "track.final_prompts=2", "track.held_out_every=0"]


def outputs(notebook: Any, kind: str) -> list[Any]:
    """What all cells gave of a mime type."""
    given = [output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", [])]
    return [data[kind] for data in given if kind in data]


def test_the_notebook_tunes_plots_and_plays(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert not [cell for cell in notebook.cells if cell.get("outputs") or cell.get("execution_count")]
    place = [cell.metadata.get("tags") for cell in notebook.cells].index(["parameters"])
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(f"settings += {SHORT}"))
    client = nbclient.NotebookClient(notebook, timeout=PATIENCE, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    assert len(outputs(notebook, "image/png")) == 3
    heard = [html for html in outputs(notebook, "text/html") if "<audio" in html]
    assert len(heard) == 4 and all("data:audio/" in html for html in heard)
    tuning = notebook.cells[place + 3]
    text = "".join(output.text for output in tuning.outputs if output.output_type == "stream")
    assert "2/2" in text and "iteration" in text and "\r" in text, "a bar that is redrawn"
    assert (tmp_path / "runs" / "notebook" / "tuned" / "model.safetensors").is_file()


class Kernel:
    """A kernel that has loaded a configuration as ``config``; ``run`` executes a cell."""

    def __init__(self, settings: list[str], folder: Path) -> None:
        # with that variable a kernel does not show what is written to the descriptors of its streams
        env = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
        self.manager, self.client = start_new_kernel(startup_timeout=PATIENCE, cwd=str(folder), env=env)
        self.run("from smart.config import load\nfrom smart.grpo import train")
        self.run(f"config = load('quickstart.toml', {settings})")

    def close(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)

    def run(self, cell: str, *, interrupt_at: str = "") -> tuple[str, str]:
        """What a cell writes, and its error or ""; it is interrupted when the text matches ``interrupt_at``."""
        asked = self.client.execute(cell)
        text, error, until = "", "", time.monotonic() + PATIENCE
        while time.monotonic() < until:
            try:
                message = self.client.get_iopub_msg(timeout=1)
            except queue.Empty:
                assert self.manager.is_alive(), text
                continue
            if message["parent_header"].get("msg_id") != asked:
                continue
            content = message["content"]
            text += content.get("text", "")
            if message["msg_type"] == "error":
                error = content["ename"]
            if interrupt_at and re.search(interrupt_at, text):
                self.manager.interrupt_kernel()
                interrupt_at = ""
            if message["msg_type"] == "status" and content["execution_state"] == "idle":
                return text, error
        raise AssertionError(f"the cell does not end: {text}")


LEARNING = r"\b[1-9]\d*/40"  # the bar after an iteration: it is drawn once a second


@pytest.fixture
def kernel(base: Path, tmp_path: Path) -> Iterator[Kernel]:
    # iterations that last, so that the interrupt comes before the last of them; no checkpoints but its own
    changes = {"grpo.iterations": 40, "track.checkpoint_every": 100, "track.held_out_every": 0}
    changes |= {"sampling.max_new_tokens": 240}
    opened = Kernel(arguments(base, tmp_path, **changes)[1::2], tmp_path)
    yield opened
    opened.close()


def test_interrupting_a_cell_saves_the_run_and_the_cell_continues_it(kernel: Kernel, tmp_path: Path) -> None:
    loop = "import asyncio; assert asyncio.get_running_loop().is_running()\n"
    text, error = kernel.run(f"{loop}train(config)", interrupt_at=LEARNING)
    assert error == "SystemExit" and "Stopping: the current iteration" in text and "Continue with: " in text
    assert len(list((tmp_path / "r" / "checkpoints").iterdir())) == 1
    text, error = kernel.run("run = train(config, resume=True)")
    assert error == "" and "40/40" in text
    assert (tmp_path / "r" / "tuned" / "model.safetensors").is_file()
    assert "default_int_handler" in kernel.run("import signal; print(signal.getsignal(signal.SIGINT))")[0]


def test_a_run_in_a_thread_is_not_hurt_by_an_interrupt(kernel: Kernel, tmp_path: Path) -> None:
    """Signals reach the main thread only, which waits here."""
    kernel.run("from concurrent.futures import ThreadPoolExecutor\ntuned = ThreadPoolExecutor().submit(train, config)")
    assert kernel.run("tuned.result()", interrupt_at=LEARNING)[1] == "KeyboardInterrupt"
    assert kernel.run("assert tuned.result().is_dir()")[1] == ""
    assert (tmp_path / "r" / "tuned" / "model.safetensors").is_file()


def test_a_run_beside_an_event_loop(base: Path, tmp_path: Path) -> None:
    """In this process: the loop keeps turning while a thread trains."""
    from smart.config import load
    from smart.grpo import train

    config = load("quickstart.toml", arguments(base, tmp_path)[1::2])

    async def both() -> int:
        turns, training = 0, asyncio.create_task(asyncio.to_thread(train, config))
        while not training.done():
            await asyncio.sleep(0.01)
            turns += 1
        await training
        return turns

    assert asyncio.run(both()) > 5
    assert (tmp_path / "r" / "tuned" / "model.safetensors").is_file()
