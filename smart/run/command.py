"""The command line of a program that makes a run, and errors that end it in one line."""

import gc
import json
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import click
from safetensors import SafetensorError
from tqdm import tqdm

from smart import UserError
from smart.process import exhausted
from smart.reward.file import name_file, named_files
from smart.run.folder import CONFIG, run_of
from smart.run.sources import ACCEPT

LATE = ("miditok", "transformers.models.phi3.modeling_phi3")  # large, and needed by every run


REPLACED = (  # by --reward
    "rewards=[]",
    "reward.weights={}",
    "reward.options={}",
    'reward.name=""',
    "reward.weight=1.0",
    'reward.target="none"',
    'reward.real=""',
)


def run_command(
    program: str, load: Callable[..., Any], *, default: str, help: str, rewards: bool = False
) -> click.Command:
    """The command line of a program that makes a run: ``--config``, ``--set``, ``--resume``, ``--overwrite``, ...

    It reads the configuration with ``load(path, overrides)``, and only then imports the module ``program`` and calls
    its ``train(config, resume=, overwrite=, accept_changes=)``. An early end is explained in one line
    (``in_one_line``), and everything saved so far is kept. ``rewards``: it also has ``--reward``.
    """

    @click.command(help=help)
    @click.option(
        "--config", "path", default=default, show_default=True, help="Config file (TOML), or the name of a shipped one."
    )
    @click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="SECTION.KEY=VALUE",
        help="Set one key of the configuration to another value (repeatable).",
    )
    @click.option(
        "--resume",
        is_flag=True,
        help="Continue a run from its last checkpoint, or from its beginning if it has none yet. "
        "With --config RUN/config.toml the run is the one in that folder.",
    )
    @click.option("--overwrite", is_flag=True, help="Replace a run of the same name.")
    @click.option(
        ACCEPT,
        "accept",
        is_flag=True,
        help="With --resume: continue although the files of the base, the soundfont, the corpus or a reward have "
        "changed since the run began. The run records that.",
    )
    def main(
        path: str,
        overrides: tuple[str, ...],
        resume: bool,
        overwrite: bool,
        accept: bool,
        reward: str | None = None,
    ) -> None:
        if resume and overwrite:
            raise click.UsageError("--resume and --overwrite contradict each other")
        if accept and not resume:
            raise click.UsageError(f"{ACCEPT} is for a run that is continued: add --resume")
        begun: list[Path] = []  # the folder of the run, as soon as it is known

        def then() -> str:
            saved = [folder for folder in begun if (folder / CONFIG).is_file()]
            if not saved:
                return "nothing was begun: repeat the command"
            return f"everything saved so far is kept; continue with: {continue_command(program, *saved)}"

        with in_one_line("the run", then):
            place = _place(path) if resume else ()
            config = load(path, (*place, *overrides))
            if reward:
                config = _with_reward(config, reward, lambda more: load(path, (*place, *more, *overrides)))
            begun.append(Path(config.run.folder) / config.run.name)
            train = import_module(program).train
            for name in LATE:
                import_module(name)
            gc.freeze()  # later collections skip what imports made, so that they find an iteration's garbage soon
            train(config, resume=resume, overwrite=overwrite, **({"accept_changes": True} if accept else {}))

    if rewards:
        click.option(
            "--reward",
            metavar="FILE.py:CLASS",
            help="Optimise a reward of your own, a subclass of smart.reward.Reward in a Python file, instead of the "
            "configuration's. The run records its name; give the option again with --resume.",
        )(main)
    return main


def continue_command(program: str, folder: Path) -> str:
    """The command that continues the run in ``folder``, to be pasted into a shell; ``program`` is a module."""
    config = ("--config", str(folder / CONFIG), "--resume")
    return shlex.join([sys.executable, "-m", program, *named_files(), *config])


def _place(path: str) -> tuple[str, ...]:
    """Overrides for a run whose configuration is given: it is where its configuration lies, even if it was moved."""
    found = run_of(Path(path).expanduser())
    if found is None:
        return ()
    folder, name = (json.dumps(str(part), ensure_ascii=False) for part in found)  # TOML writes strings the same way
    return f"run.folder={folder}", f"run.name={name}"


def _with_reward(config: Any, given: str, load: Callable[[tuple[str, ...]], Any]) -> Any:
    """The configuration with the reward FILE.py:CLASS alone, unless it names that reward already, as a resumed run."""
    kind = name_file(given)
    if not any(one.kind == kind for one in config.all_rewards):
        config = load((*REPLACED, f"reward.kind={json.dumps(kind, ensure_ascii=False)}"))
    if not any(one.kind == kind for one in config.all_rewards):
        raise UserError(f"--reward {given!r}: --set chooses another reward; give only one of them")
    return config


def backend_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """The option ``--backend`` of a program that renders, for ``smart.render.open_renderer``."""
    option = click.option(
        "--backend", default="pool", show_default=True, type=click.Choice(["pool", "bank"]),
        help="Renderer: worker processes (pool), or sums of notes that were rendered in advance (bank); clips that the "
        "bank cannot play go to the pool.",
    )  # fmt: skip
    return option(function)


soundfont_option = click.option(
    "--soundfont", default="timgm", show_default=True, help="Soundfont that plays the pieces: a short name or a path."
)
tokens_option = click.option(
    "--tokens",
    default=256,
    show_default=True,
    type=click.IntRange(min=1),
    help="Longest piece, in tokens after its prompt.",
)
temperature_option = click.option(
    "--temperature",
    default=1.0,
    show_default=True,
    type=click.FloatRange(0, 100, min_open=True),
    help="Divides the logits when sampling; below 1 the models write more predictably.",
)
workers_option = click.option(
    "--workers",
    default=0,
    show_default=True,
    type=click.IntRange(0, 1024),
    help="Number of processes that render audio (0: one per usable core).",
)
pedal_option = click.option(
    "--pedal/--no-pedal",
    default=True,
    show_default=True,
    help="Lengthen notes that end under the pressed sustain pedal to its release (the paper's form: --no-pedal).",
)


def accept_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """The option of a program that takes up unfinished work, for ``claim_folder``."""
    option = click.option(
        ACCEPT,
        "accept_changes",
        is_flag=True,
        help="Continue unfinished work although files that it was begun with (models, the soundfont, files of rewards) "
        "have changed. That is recorded with the result.",
    )
    return option(function)


SECONDS = 30.0  # between two lines of progress where there is no terminal
LINE = "{desc}{n_fmt}/{total_fmt} {unit}s, {elapsed} passed, {remaining} left{postfix}"
# how torch (on CUDA and on a CPU), Python's threads, C++ and CUDA's libraries say it
OUT_OF_MEMORY = ("out of memory", "allocate memory", "can't start new thread", "bad_alloc", "ALLOC_FAILED")


@contextmanager
def in_one_line(writing: str, then: str | Callable[[], str], *expected: type[Exception]) -> Iterator[None]:
    """End a program with one line and exit code 1 for failures that are neither bugs nor mistakes of the user.

    These are Ctrl-C, a disk that is full or read-only (``writing`` names what could not be written), too little memory,
    and errors of the kinds ``expected``; ``then`` says what to do, or is called to say it.
    """

    def what_to_do() -> str:
        return then() if callable(then) else then

    try:
        yield
    except KeyboardInterrupt:
        raise click.ClickException(f"interrupted; {what_to_do()}") from None
    except expected as error:
        raise click.ClickException(f"{error}; {what_to_do()}") from None
    except (OSError, SafetensorError) as error:  # the latter is how that library reports a full disk
        limit = exhausted(error)
        if limit and "disk" not in limit:
            raise click.ClickException(f"{limit}; {what_to_do()}") from error
        raise click.ClickException(f"{writing} could not be written ({error}); {what_to_do()}") from error
    except (MemoryError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if reason.startswith("Could not determine home directory"):  # pathlib's words
            raise UserError("a path begins with ~, and the home directory that it stands for is unknown") from error
        if not isinstance(error, MemoryError) and not any(words in reason for words in OUT_OF_MEMORY):
            raise
        raise click.ClickException(f"not enough memory ({reason}); {what_to_do()}") from error


def progress(rows: Iterable[Any] | None = None, *, show: bool = True, **options: Any) -> Any:
    """A tqdm bar on stderr, or a line every ``SECONDS`` if it is no terminal or notebook; silent if not ``show``."""
    if not show or sys.stderr.isatty():
        return tqdm(rows, disable=not show, dynamic_ncols=True, **options)
    if type(sys.stderr).__module__.startswith("ipykernel"):  # a notebook keeps each state of the bar in its file
        return tqdm(rows, ncols=100, mininterval=1.0, **options)
    options = {"unit": "item"} | options
    if "desc" in options:
        options["desc"] += ": "
    timing: dict[str, Any] = {"mininterval": SECONDS, "delay": SECONDS, "miniters": 1}
    return tqdm(rows, file=_Lines(), bar_format=LINE, **timing, **options)


class _Lines:
    """A file for tqdm that writes each state of the bar to stderr as a line, for logs."""

    def write(self, text: str) -> None:
        if line := text.strip("\r\n "):
            with suppress(OSError, ValueError):  # closed
                sys.stderr.write(f"{line}\n")

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            sys.stderr.flush()
