"""Fixtures that several test files share: the paper's tokenizer and a tiny random model over it."""

import ctypes
import fcntl
import gc
import importlib.util
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

# the files that take longest: with several processes, one that begins last would keep all others waiting
LONG = (
    "test_study_browser", "test_docs_pages", "test_runs_interrupted", "test_docs", "test_pretrain", "test_benchmarks",
    "test_runs", "test_cuda_runs", "test_cuda_agreement", "test_readers", "test_distributed", "test_audiobox",
    "test_build", "test_report", "test_pool",
)  # fmt: skip

# Before anything imports torch: several test processes share the cores, and threads that wait for each other on a busy
# machine make a test of seconds one of minutes. What the user has set stays.
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")
# These keep notes of failures and a list of fonts: not in the clone, nor in a home that may be read-only, where each
# process would make, and remove, a folder for its fonts. Forks would remove that of the process that they come from.
for name, folder in (("HYPOTHESIS_STORAGE_DIRECTORY", "hypothesis"), ("MPLCONFIGDIR", "matplotlib")):
    os.environ.setdefault(name, os.path.join(tempfile.gettempdir(), f"smart-tests-{folder}-{os.getuid()}"))
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # in a background job of a shell; children would ignore it, too
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Python finds no package, or takes the folder of the clone for one, when it is started in the folder above
if (found := importlib.util.find_spec("smart")) is None or found.origin is None:
    root = str(Path(__file__).parent.parent)
    sys.path.insert(0, root)
    os.environ["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
from hypothesis import settings  # noqa: E402 -- it reads the folder named above when it is imported

import smart  # noqa: E402, F401 -- before anything imports torch: it bounds how long threads spin

settings.register_profile("patient", settings(), deadline=None)  # no test may fail because others use the machine
settings.load_profile("patient")


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config.option, "loadscopereorder"):  # pytest-xdist's, which begins with the files of most tests
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONG)))


@pytest.fixture(autouse=True, scope="module")
def memory_goes_back() -> Iterator[None]:
    """What a file of tests took is given back to the system: all must fit into 4 GiB, two files at a time."""
    yield
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    from smart.tokens import build_tokenizer

    return build_tokenizer()


def make_tiny_model(tokenizer: Any, seed: int = 3) -> Any:
    """Random Phi-3, 2 layers x 32; logits spread enough that sampling is not uniform."""
    import torch

    from smart.model import build_model

    model = build_model(tokenizer, layers=2, hidden=32, heads=4, intermediate=64, seed=seed)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return model


@pytest.fixture
def tiny_model(tokenizer: Any) -> Any:
    return make_tiny_model(tokenizer)


Once = Callable[[str, Callable[[Path], None]], Path]


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """Called with a name and what fills a folder: the folder, filled by the first of all test processes to ask for it.

    It is for reading: who changes something works on a copy.
    """
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent

    def make(name: str, fill: Callable[[Path], None]) -> Path:
        folder, done = root / f"once-{name}", root / f"once-{name}.done"
        with open(root / f"once-{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a process that failed
                folder.mkdir()
                fill(folder)
                done.touch()
        return folder

    return make


@pytest.fixture(scope="session")
def base(once: Once) -> Path:
    from runs import teach_base

    return once("base", teach_base)


@pytest.fixture(scope="session")
def either(base: Path, once: Once) -> list[Path]:
    """Two runs that nothing interrupted, by their ``grpo.rollouts_ahead``; one of them is of a fresh process."""
    from runs import arguments, run

    def tune(folder: Path) -> None:
        ahead = int(folder.name[-1])
        changes = {"grpo.rollouts_ahead": ahead}
        words = ("--config", "quickstart.toml", *arguments(base, folder, **changes))
        status, output = run("grpo", *words, fresh=ahead == 0)
        assert status == 0, output
        assert "is an approximation" in output and "standard errors" in output

    return [once(f"finished-{ahead}", tune) / "r" for ahead in (0, 1)]


@pytest.fixture(scope="session")
def finished(either: list[Path]) -> Path:
    """A run that nothing interrupted."""
    return either[0]


@pytest.fixture(scope="session")
def corpus(once: Once) -> Path:
    from runs import build_corpus

    return once("corpus", lambda folder: build_corpus(folder, [(0, False)])) / "out"


class Demo(NamedTuple):
    """A page of ``smart demo`` and what it was made of."""

    page: Path
    run: Path  # a run of two checkpoints; tuned/ is the second
    arguments: list[str]  # of the command line, without --out


HOSTILE = "</script><img src=x onerror=alert(1)>"  # where the page says a name, it says this


@pytest.fixture(scope="session")
def demo(once: Once) -> Demo:
    """The shipped base against slightly perturbed copies of it, two prompts, short clips."""
    options = ["--steps", "all", "--prompts", "2", "--tokens", "48"]
    options += ["--seconds", "3", "--sample-rate", "22050", "--workers", "1", "--device", "cpu"]

    def words(folder: Path) -> list[str]:
        return ["--section", HOSTILE, "piano-small", str(folder / "perturbed"), *options]

    def fill(folder: Path) -> None:
        import torch
        from click.testing import CliRunner

        from smart.config import Config, dumps
        from smart.demo.command import main
        from smart.model import load_base, save_base
        from smart.run import checkpoint

        run = folder / "perturbed"
        run.mkdir()
        (run / "config.toml").write_text(dumps(Config()) + f"# {HOSTILE}\n", encoding="utf-8")
        model, tokenizer = load_base("piano-small")
        generator = torch.Generator().manual_seed(1)
        for step in (1, 2):
            with torch.no_grad():
                for weights in model.parameters():
                    weights.add_(0.03 * weights.std() * torch.randn(weights.shape, generator=generator))
            checkpoint.save(run / "checkpoints", step, lambda folder: save_base(model, tokenizer, folder))
        save_base(model, tokenizer, run / "tuned")
        result = CliRunner().invoke(main, [*words(folder), "--out", str(folder / "page.html")])
        assert result.exit_code == 0, result.output

    folder = once("demo", fill)
    return Demo(folder / "page.html", folder / "perturbed", words(folder))
