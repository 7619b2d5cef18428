"""The whole paper in one command: ``python -m smart.reproduce --config paper.toml --corpus FOLDER --out FOLDER``.

It runs the other programs, one after another, each as a process: the base's check, the tuning of section 3.5, the
longer runs of section 5.2, the dataset prompts of section 5.3, then every table and figure; and writes ``index.html``,
which puts what the paper published beside what was measured here. ``--smoke`` does all of it with what ships with the
package, offline, in minutes: it shows that everything works, and says nothing about music.

Each step owns one folder in OUT. A step is finished when its process ended well and what it made is listed, with its
SHA-256, in ``state.json``; it is done again where its command, a configuration that it reads, or what an earlier step
made has changed since; what it made before is moved to ``replaced/``. So the same command goes on after a failure,
Ctrl-C or SIGKILL at any instant: finished steps are passed over, and an unfinished one continues where its program can.
"""

import base64
import contextlib
import csv
import dataclasses
import functools
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import click

from smart import UserError, paper, require
from smart.config import Config, dumps, load
from smart.corpus import MANIFEST, Corpus
from smart.files import hold, is_empty, parse_json, sha256, write_atomically
from smart.model import find_base
from smart.render import check_soundfont, find_soundfont
from smart.reward import Reward, load_reward
from smart.run import NEEDED, StopRequest, in_one_line, read_metrics

STATE, LOGS, REPLACED = "state.json", "logs", "replaced"
CONFIGS, PAGE = "configs", "index.html"
PACKAGES = (*NEEDED, "jinja2", "scipy")
OUT = "{out}"  # in a step's words: the folder that all goes into, wherever it is


class Found(NamedTuple):
    """What comes from outside."""

    base: Path
    reward: Reward
    corpus: Corpus | None
    soundfonts: list[Path]

    def checksums(self) -> str:
        """Of the files that decide what comes out."""
        files = [self.base / "model.safetensors", *self.soundfonts]
        files += [self.corpus.folder / MANIFEST] if self.corpus else []
        return " ".join([*map(sha256, files), self.reward.provenance])


class Step(NamedTuple):
    """One program to run, and what it makes in the folder ``<OUT>/<name>``."""

    name: str
    title: str
    words: tuple[str, ...]  # module and arguments, after ``python -m``
    outputs: tuple[str, ...]  # patterns below the step's folder: what later steps and the page read
    after: tuple[str, ...] = ()  # steps whose outputs it reads
    given: str = ""  # what else decides what comes out: a configuration's text, checksums of files from outside
    resume: tuple[str, ...] = ()  # said beside, where it was begun before
    last: str = ""  # what the program writes last, in one rename, where it refuses to run once that is there

    def key(self, done: dict[str, dict[str, Any]]) -> str:
        """A hash of the command, and of what the steps before it made."""
        made = {name: done[name]["outputs"] for name in self.after}
        return hashlib.sha256(json.dumps([self.words, self.given, made], sort_keys=True).encode()).hexdigest()


# --- Running ------------------------------------------------------------------------------------------------------


class Book:
    """``state.json``: for each step its key, whether it was finished, its seconds, and its outputs' SHA-256."""

    def __init__(self, out: Path) -> None:
        self.out = out
        try:
            if out.exists() and (not out.is_dir() or (not is_empty(out) and not (out / STATE).is_file())):
                raise UserError(f"--out {out}: holds something else; give a new folder")
            out.mkdir(parents=True, exist_ok=True)
            self.rows: dict[str, dict[str, Any]] = {}
            if (out / STATE).is_file():
                self.rows = parse_json((out / STATE).read_text(encoding="utf-8"))
                if not isinstance(self.rows, dict) or not all(map(self._is_row, self.rows.values())):
                    raise ValueError("it is of another shape")
            else:
                self._write()
        except OSError as error:
            raise UserError(f"--out {out}: cannot be written ({error.strerror})") from None
        except ValueError as error:
            raise UserError(f"--out {out}: {STATE} cannot be read ({error}); give a new folder") from None

    @staticmethod
    def _is_row(row: Any) -> bool:
        return (
            isinstance(row, dict)
            and isinstance(row.get("key"), str)
            and isinstance(row.get("seconds"), int | float)
            and isinstance(row.get("outputs", {}), dict)
        )

    def _write(self) -> None:
        write_atomically(self.out / STATE, json.dumps(self.rows, indent=1).encode())

    def is_done(self, step: Step) -> bool:
        """Whether a step was finished, with this command and these inputs, and what it made is as it was."""
        row = self.rows.get(step.name)
        if row is None or "outputs" not in row or any(name not in self.rows for name in step.after):
            return False
        return bool(row["key"] == step.key(self.rows)) and self.made(step) == row["outputs"]

    def was_begun(self, step: Step) -> bool:
        """Whether what is in the step's folder comes from this command and these inputs, unfinished."""
        row = self.rows.get(step.name)
        return row is not None and "outputs" not in row and bool(row["key"] == step.key(self.rows))

    def made(self, step: Step) -> dict[str, str]:
        """SHA-256 of each output that there is, by its name."""
        folder = self.out / step.name
        files = sorted({path for pattern in step.outputs for path in folder.glob(pattern) if path.is_file()})
        return {str(path.relative_to(folder)): sha256(path) for path in files}

    def begin(self, step: Step) -> None:
        """Note that a step is being done; what its folder held before is moved out of the way."""
        folder = self.out / step.name
        if folder.exists():
            aside = self.out / REPLACED
            aside.mkdir(exist_ok=True)
            number = len(list(aside.glob(f"{step.name}-*"))) + 1
            os.replace(folder, aside / f"{step.name}-{number}")
        self.rows[step.name] = {"key": step.key(self.rows), "seconds": 0.0}
        self._write()

    def spend(self, step: Step, seconds: float) -> float:
        """Add to a step's time; returns the sum."""
        self.rows[step.name]["seconds"] = total = self.rows[step.name]["seconds"] + seconds
        self._write()
        return float(total)

    def finish(self, step: Step) -> None:
        """Note that a step is done."""
        self.rows[step.name]["outputs"] = self.made(step)
        self._write()


@contextlib.contextmanager
def alone(out: Path) -> Iterator[int]:
    """Hold the folder's lock, whose descriptor is handed to each step's process: one that outlives us keeps it."""
    with contextlib.ExitStack() as held:
        for patience in range(100, -1, -1):  # a step whose starter was killed takes a moment to end
            try:
                lock = held.enter_context(hold(out))
                break
            except BlockingIOError:
                if not patience:
                    raise UserError(f"--out {out}: another process is working in it; wait for it, or stop it") from None
                time.sleep(0.1)
        yield lock


# a step's process before its program: it ends at once when the process that started it (its first argument) does
START = """
import ctypes, os, runpy, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
if os.getppid() != int(sys.argv[1]):
    sys.exit("whoever started this has ended")
del sys.argv[:2]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def run(step: Step, out: Path, log: Path, lock: int, stop: StopRequest, say: str, *, again: bool) -> int:
    """Run one step's program, with its output in ``log``; returns its exit code, or minus the signal that ended it.

    A request to stop is passed on as SIGINT: every program then saves what it has.
    """
    words = [word.replace(OUT, str(out)) for word in (*step.words, *(step.resume if again else ()))]
    log.parent.mkdir(exist_ok=True)
    (out / step.name).mkdir(exist_ok=True)
    shown = sys.stderr.isatty()
    with open(log, "ab") as file:
        file.write(f"$ python -m {' '.join(words)}\n".encode())
        file.flush()
        child = subprocess.Popen(
            [sys.executable, "-c", START, str(os.getpid()), *words],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for us; it is passed on below
            pass_fds=(lock,),
        )
        began, told = time.monotonic(), 0
        try:
            while True:
                try:
                    code = child.wait(timeout=0.2)
                    break
                except subprocess.TimeoutExpired:
                    pass
                if stop.requested and not told:
                    told = stop.requested
                    child.send_signal(signal.SIGINT)
                if shown:
                    _overwrite(f"{say} {_clock(time.monotonic() - began)}  {_last_line(log)}")
        except BaseException:  # a second Ctrl-C, or our own failure
            child.kill()
            child.wait()
            raise
        finally:
            if shown:
                _overwrite("")
    return code


def _overwrite(text: str) -> None:
    with contextlib.suppress(OSError):  # a terminal that was closed
        width = os.get_terminal_size(sys.stderr.fileno()).columns - 1
        sys.stderr.write(f"\r\033[K{text[:width]}")
        sys.stderr.flush()


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # a terminal that was closed, a pipe that nobody reads any more
        click.echo(text, err=True)


def _last_line(log: Path) -> str:
    with open(log, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 400))
        lines = file.read().decode("utf-8", "replace").replace("\r", "\n").splitlines()
    return next((line for line in reversed(lines) if line.strip()), "")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def perform(steps: Sequence[Step], out: Path, book: Book, lock: int) -> None:
    """Do what is not done yet. Raises ``click.ClickException`` with the step's exit code where one fails."""
    with StopRequest() as stop:
        for number, step in enumerate(steps, 1):
            say = f"[{number:2}/{len(steps)}] {step.name}: {step.title}"
            if book.is_done(step):
                _say(f"{say} - done before ({_clock(book.rows[step.name]['seconds'])})")
                continue
            log = out / LOGS / f"{step.name}.log"
            again = book.was_begun(step)
            if not again:
                book.begin(step)
            _say(f"{say} - {'goes on' if again else 'begins'}")
            began = time.monotonic()
            finished = again and step.last and (out / step.name / step.last).is_file()
            code = 0 if finished else run(step, out, log, lock, stop, say, again=again)
            seconds = book.spend(step, time.monotonic() - began)
            if stop.requested and code:
                raise _Failed(f"stopped in step {step.name}; the same command goes on from here", 128 + stop.requested)
            missing = [pattern for pattern in step.outputs if not any((out / step.name).glob(pattern))]
            if code or missing:
                what = _ended(code) if code else f"did not write {', '.join(missing)}"
                raise _Failed(
                    f"step {step.name} {what}; its log is {log}, which ends:\n"
                    f"  {_last_line(log)}\nThe same command goes on from this step.",
                    code if code > 0 else 1,
                )
            book.finish(step)
            _say(f"{say} - done in {_clock(seconds)}")
            if stop.requested:
                raise _Failed("stopped; the same command goes on from here", 128 + stop.requested)


def _ended(code: int) -> str:
    return f"failed with exit code {code}" if code > 0 else f"was ended by signal {signal.Signals(-code).name}"


class _Failed(click.ClickException):
    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.exit_code = code  # type: ignore[misc]  # click reads it from the instance


# --- What the paper's experiments are -----------------------------------------------------------------------------

# with the quickstart's base, reward and soundfont: everything once, in minutes on two cores
SMOKE = (
    "run.name=smoke",
    "grpo.iterations=4",
    "grpo.prompts=4",
    "grpo.group_size=4",
    "sampling.max_new_tokens=96",
    "render.seconds=4.0",
    "track.checkpoint_every=2",
    "track.keep_checkpoints=0",
    "track.samples_every=4",
    "track.held_out_every=4",
    "track.held_out_prompts=2",
    "track.final_prompts=24",
    "track.final_listen=2",
)
SMOKE_PIECES = 96  # that the base writes for a corpus: enough that no split of it is empty
PIECES = 10  # of the corpus, for table 2
PROBED = 24  # pieces that probes are made of
LONGER = 5  # section 5.2: 1000 iterations instead of 200


def variants(config: Config, corpus: str) -> dict[str, Config]:
    """The paper's four runs, by the name of their step: sections 3.5, 5.2 (twice) and 5.3."""
    longer = dataclasses.replace(config.grpo, iterations=LONGER * config.grpo.iterations)
    prompts = dataclasses.replace(config.prompts, kind="dataset", corpus=corpus)
    runs = {
        "tuned": config,
        "tuned-long": dataclasses.replace(config, grpo=longer),
        "tuned-long-beta0": dataclasses.replace(config, grpo=dataclasses.replace(longer, beta=0.0)),
        "tuned-dataset": dataclasses.replace(config, prompts=prompts),
    }
    return {
        name: dataclasses.replace(one, run=dataclasses.replace(one.run, name=name, folder="runs"))
        for name, one in runs.items()
    }


def plan(
    config: Config, corpus: Path | None, fonts: Sequence[str], recordings: Sequence[Path], outside: str
) -> list[Step]:
    """All steps, in order. Without ``corpus`` the base writes one first; ``outside`` tells files from elsewhere."""
    many, n = config.track.final_prompts, str(config.track.final_prompts)
    own = () if corpus else ("corpus",)  # what a step with dataset prompts waits for
    folder = str(corpus) if corpus else f"{OUT}/corpus"
    sound = ("--soundfont", config.render.soundfont, "--sample-rate", str(config.render.sample_rate))
    device = ("--device", config.run.device)
    rates = ["--reward", config.reward.kind]
    for key, value in config.reward.options.items():
        rates += ["--reward-option", f"{key}={value if isinstance(value, str) else json.dumps(value)}"]
    drawn = ["--seconds", f"{config.render.seconds:g}", "--tokens", str(config.sampling.max_new_tokens)]
    drawn += ["--temperature", str(config.sampling.temperature), "--top-k", str(config.sampling.top_k)]
    drawn += ["--top-p", str(config.sampling.top_p), "--backend", config.render.backend]

    def writes(count: int, *more: str) -> tuple[str, ...]:
        tokens = ("--tokens", str(config.sampling.max_new_tokens), "-n", str(count))
        return ("smart.generate", "--model", config.model.base, *tokens, *sound, *device, *more)

    def tunes(name: str, one: Config) -> Step:
        told = f"{one.grpo.iterations} iterations, beta {one.grpo.beta:g}, {one.prompts.kind} prompts"
        return Step(
            name,
            f"tune the base: {told}",
            ("smart.grpo", "--config", f"{OUT}/{CONFIGS}/{name}.toml", "--set", f'run.folder="{OUT}"'),
            ("summary.json", "metrics.jsonl", "reward_mean.png", "tuned/*.*", "checkpoints/*/manifest.json"),
            after=own if one.prompts.kind == "dataset" else (),
            given=dumps(one),
            resume=("--resume",),
        )

    def samples(name: str, kind: str, *runs: str) -> Step:
        models = [f"base={config.model.base}", *(f"{run}={OUT}/{run}" for run in runs)]
        where = ("--prompts", kind, *(("--corpus", folder) if kind == "dataset" else ()))
        return Step(
            name,
            f"{n} pieces of each of {len(models)} models, {kind} prompts",
            ("smart.evaluate", "sample", *models, "--out", f"{OUT}/{name}/{kind}.parquet", "-n", n, *where, *rates,
             *sound, *drawn, *device),
            (f"{kind}.parquet",),
            after=(*runs, *(own if kind == "dataset" else ())),
        )  # fmt: skip

    tuning = [tunes(name, one) for name, one in variants(config, folder).items()]
    aggressive = ("tuned", "tuned-long", "tuned-long-beta0")
    steps = [
        Step("base", "the base writes eight pieces", writes(8, "--out", f"{OUT}/base"), ("pieces.csv", "*.wav")),
        *tuning,
        Step(
            "table-1",
            "ratings of silence and noise" + (f", and of {len(recordings)} recordings" if recordings else ""),
            ("smart.evaluate", "rate", *map(str, recordings), *rates, *device, "--out", f"{OUT}/table-1/ratings.csv"),
            ("ratings.csv",),
            resume=("--overwrite",),
        ),
        Step(
            "table-2",
            f"the same {PIECES} pieces with {len(fonts)} soundfonts",
            ("smart.evaluate", "soundfonts", *(word for font in fonts for word in ("--soundfonts", font)),
             "--corpus", folder, "--n", str(PIECES), *rates, *device, "--seconds", f"{config.render.seconds:g}",
             "--sample-rate", str(config.render.sample_rate), "--out", f"{OUT}/table-2"),
            ("soundfonts.csv", "soundfonts.png"),
            after=own,
        ),
        samples("samples", "procedural", *aggressive),
        samples("samples-dataset", "dataset", "tuned-dataset"),
        Step(
            "report",
            "figures 2, 3, 4, 6 and 7",
            ("smart.evaluate", "report", f"{OUT}/samples/procedural.parquet", f"{OUT}/samples-dataset/dataset.parquet",
             *(word for run in variants(config, "") for word in ("--run", f"{OUT}/{run}")), "--out", f"{OUT}/report"),
            ("*.png", "*-paper.csv", "index.html"),
            after=("samples", "samples-dataset", *variants(config, "")),
        ),
        Step(
            "hacks",
            f"what else than music the reward likes, beside {PROBED} pieces of the base",
            ("smart.evaluate", "hacks", "--model", config.model.base, "-n", str(PROBED), *rates, *sound, *device,
             "--seconds", f"{config.render.seconds:g}", "--out", f"{OUT}/hacks"),
            ("hacks.csv", "hacks.png"),
        ),
        Step(
            "frontier",
            "reward, a held-out judge and diversity against KL",
            ("smart.evaluate", "frontier", *(f"{OUT}/{run}" for run in aggressive), "--out", f"{OUT}/frontier",
             "-n", str(max(many // 4, 8)), "--best-of", str(min(max(many // 8, 4), 16)), *device),
            ("frontier.png", "frontier.csv", "summary.json"),
            after=aggressive,
        ),
    ]  # fmt: skip
    if not corpus:
        more = ("--playable", "--seconds", "1", "--out", f"{OUT}/midi")
        steps[:0] = [
            Step("midi", f"the base writes {SMOKE_PIECES} pieces", writes(SMOKE_PIECES, *more), ("*.mid",)),
            Step(
                "corpus",
                "a corpus of these pieces",
                ("smart.corpus", "build", "--midi", f"{OUT}/midi", "--out", f"{OUT}/corpus", "--max-empty-bars", "1"),
                ("manifest.json",),
                after=("midi",),
                last="manifest.json",
            ),
        ]
    return [step._replace(given=step.given + outside) for step in steps]


def find(
    config: Config, corpus: Path | None, fonts: Sequence[str], recordings: Sequence[Path], *, smoke: bool
) -> Found:
    """Everything that the steps need from outside. Raises one ``UserError`` that lists all that is missing."""

    def packages() -> None:
        missing = [name for name in PACKAGES if find_spec(name) is None]
        if missing:
            raise UserError(f"these packages are missing: pip install {' '.join(missing)}")

    def base() -> Path:
        return find_base(config.model.base)

    def soundfont(name: str) -> Path:
        path = find_soundfont(name)
        check_soundfont(path)
        return path

    def reward() -> Reward:
        wanted = config.reward
        return load_reward(wanted.kind, weights=wanted.weights or None, **wanted.options)

    def pieces() -> Corpus | None:
        if smoke:
            return None
        if corpus is None:
            raise UserError(
                "--corpus is needed for the dataset prompts of section 5.3 and the pieces of table 2: "
                "a folder written by `smart corpus build`"
            )
        found = Corpus(corpus)
        for split in ("train", "validation", "test"):
            if not len(found.split(split)):
                raise UserError(f"--corpus {corpus}: its split {split!r} has no pieces")
        return found

    def excerpts() -> None:
        missing = [str(path) for path in recordings if not path.is_file()]
        if missing:
            raise UserError(f"--recording: no such file: {', '.join(missing)}")

    names = dict.fromkeys((config.render.soundfont, *fonts))
    _, _, *found = require(
        packages, excerpts, base, reward, pieces, *(functools.partial(soundfont, name) for name in names)
    )
    return Found(base=found[0], reward=found[1], corpus=found[2], soundfonts=found[3:])


# --- The page -----------------------------------------------------------------------------------------------------


class Section(NamedTuple):
    """A part of the page: words, a table (its first row is the header), figures with their data."""

    title: str
    words: str = ""
    table: Sequence[Sequence[str]] = ()
    figures: Sequence[tuple[str, Path]] = ()  # caption and PNG


def number(value: float | None, digits: int = 2) -> str:
    """A number as the page shows it; a dash where there is none."""
    return "-" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def with_interval(estimate: dict[str, float | None], digits: int = 2) -> str:
    """``mean [low, high]`` of an estimate with keys value or mean, low, high."""
    middle = estimate.get("value", estimate.get("mean"))
    return f"{number(middle, digits)} [{number(estimate['low'], digits)}, {number(estimate['high'], digits)}]"


def read_json(path: Path) -> Any:
    """What a step wrote."""
    return parse_json(path.read_text(encoding="utf-8"))


def duration(run: Path) -> float:
    """Minutes of a run's iterations, added up."""
    rows = read_metrics(run)
    return sum(row.get("seconds/iteration") or 0.0 for row in rows) / 60


def sections(out: Path, config: Config, found: Found) -> list[Section]:
    """All of the page, from what the steps wrote."""
    real = bool(getattr(found.reward, "is_published", False))
    return [
        _training(out, config),
        _table_1(out, config.reward.kind, real),
        _table_2(out, real),
        *_effects(out, real and config.model.base == paper.BASE),
        _hacks(out),
        _frontier(out),
        Section(
            "Listening study (section 4.3, table 5)",
            "Not reproduced here: it needs listeners. The paper's values; smart study makes and analyses one.",
            [("", "paper"), *paper.LISTENING.items()],
        ),
    ]


def _training(out: Path, config: Config) -> Section:
    rows: list[Sequence[str]] = [
        ("run", "iterations", "beta", "minutes", "reward of the base", "reward after", "difference")
    ]
    for name, one in variants(config, "").items():
        summary = read_json(out / name / "summary.json")
        rows.append(
            (
                name,
                str(one.grpo.iterations),
                f"{one.grpo.beta:g}",
                number(duration(out / name), 1),
                *(
                    f"{summary[which]['reward']:.2f} ± {1.96 * summary[which]['standard_error']:.2f}"
                    for which in ("base", "tuned", "difference")
                ),
            )
        )
    return Section(
        "Tuning (sections 3.5, 5.2 and 5.3; figure 2)",
        f"The paper: {paper.ITERATIONS} iterations in {paper.MINUTES} minutes on one NVIDIA GeForce RTX 3090. Minutes "
        "are of another machine here, and so are no verdict. Rewards: means of fresh samples, with 95% intervals.",
        rows,
        [
            (
                "Figure 2: mean reward by iteration, and one standard deviation",
                out / "report" / "reward-by-iteration.png",
            )
        ],
    )


def _table_1(out: Path, kind: str, real: bool) -> Section:
    ours: dict[str, dict[str, str]] = {}
    for line in _csv(out / "table-1" / "ratings.csv"):
        ours.setdefault(Path(line["file"]).stem, {})[line["rating"].rpartition(".")[2]] = line["mean"]
    rows: list[Sequence[str]] = [("audio", *(f"{axis}: paper / here" for axis in paper.AXES), "verdict")]
    for name, published in paper.TABLE_1.items():
        mine = [ours.get(name, {}).get(axis, "") for axis in paper.AXES]
        cells = [
            f"{value:.2f} / {number(float(here)) if here else '-'}" for value, here in zip(published, mine, strict=True)
        ]
        rows.append((name, *cells, _close(name, mine) if real else ""))
    for name, ratings in ours.items():
        if name not in paper.TABLE_1:
            mine = [ratings.get(axis, "") for axis in paper.AXES]
            rows.append((name, *(f"- / {number(float(here)) if here else '-'}" for here in mine), ""))
    words = f"Here: {kind}. Recordings are not part of this package; one that is called as its row is set beside it."
    if not real:
        words += " No verdict: these are not the published weights of Audiobox Aesthetics."
    return Section("Table 1: ratings of recordings, silence and noise", words, rows)


def _close(row: str, here: Sequence[str]) -> str:
    if not all(here):
        return ""
    worst = max(abs(value - float(mine)) for value, mine in zip(paper.TABLE_1[row], here, strict=True))
    return f"{'agrees' if worst <= paper.tolerance(row) else 'differs'} (at most {worst:.2f} apart)"


def _table_2(out: Path, real: bool) -> Section:
    axes = (*paper.AXES, "mean")
    ours: dict[str, dict[str, dict[str, str]]] = {}
    for line in _csv(out / "table-2" / "soundfonts.csv"):
        ours.setdefault(line["soundfont"], {})[line["rating"].rpartition(".")[2]] = line
    rows: list[Sequence[str]] = [("soundfont", *(f"{axis}: paper / here" for axis in axes), "verdict")]
    for name in dict.fromkeys((*paper.TABLE_2, *ours)):
        lines = [ours.get(name, {}).get(axis) for axis in axes]
        published = [f"{value:.2f}" for value in paper.TABLE_2[name]] if name in paper.TABLE_2 else ["-"] * len(axes)
        cells = [
            f"{value} / {_here(line, 'mean', '') if line else '-'}"
            for value, line in zip(published, lines, strict=True)
        ]
        inside = [
            float(line["low"]) <= float(line["paper"]) <= float(line["high"])
            for line in lines
            if line and line["paper"]
        ]
        rows.append((name, *cells, f"{sum(inside)} of {len(inside)} agree" if real and inside else ""))
    return Section(
        "Table 2: the same pieces with several soundfonts",
        "The paper's ten pieces are not known; these are others. So a verdict says whether the paper's mean is in the "
        "95% interval of the mean here, and is given for the published weights alone.",
        rows,
        [("Means, and rank correlation over pieces", out / "table-2" / "soundfonts.png")],
    )


def _effects(out: Path, judged: bool) -> list[Section]:
    found = []
    for name, prompts, figures in (("procedural", "Procedural", "3, 4 and 6"), ("dataset", "Dataset", "7")):
        rows: list[Sequence[str]] = [("model", "measure", "the paper", "here: difference to the base", "verdict")]
        for line in _csv(out / "report" / f"{name}-paper.csv"):
            here = _here(line, "difference", "difference_")
            rows.append((line["after"], line["measure"], line["paper"], here, line["verdict"] if judged else ""))
        pictures = [
            (f"{what}, {name} prompts", out / "report" / f"{name}-{part}.png")
            for part, what in (("ratings", "Ratings"), ("features", "MIDI features"), ("rolls", "Average piano rolls"))
        ]
        found.append(
            Section(
                f"{prompts} prompts: effects of tuning (section 5.1; figures {figures})",
                "The paper prints no numbers for these, but says which way they go."
                + ("" if judged else " No verdict: the base or the reward is not the paper's."),
                rows,
                pictures,
            )
        )
    return found


def _hacks(out: Path) -> Section:
    rows: list[Sequence[str]] = [("probe", "kind", "rating", "mean", "against the pieces", "verdict")]
    for line in _csv(out / "hacks" / "hacks.csv"):
        mean, apart = _here(line, "mean", ""), _here(line, "difference", "difference_")
        rows.append((line["probe"], line["kind"], line["rating"], mean, apart, line["verdict"]))
    return Section(
        "What else than music the reward likes",
        "Not in the paper. Each probe is made from each of the base's pieces, and compared with it.",
        rows,
        [("Ratings of probes", out / "hacks" / "hacks.png")],
    )


def _csv(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _here(line: dict[str, str], name: str, prefix: str) -> str:
    """``name`` of a line of a table, with its interval, which stands in the columns ``<prefix>low`` and ``high``."""
    middle, low, high = (number(float(line[key] or "nan"), 3) for key in (name, f"{prefix}low", f"{prefix}high"))
    return f"{middle} [{low}, {high}]"


def _frontier(out: Path) -> Section:
    summary = read_json(out / "frontier" / "summary.json")
    rows: list[Sequence[str]] = [
        ("run", "checkpoint to keep", "reward, against the base", "judge, against the base", "collapsed")
    ]
    for name, one in summary["runs"].items():
        gone = one["collapsed"]
        rows.append(
            (
                name,
                f"iteration {one['keep']}" if one["keep"] else "the base",
                with_interval(one["reward_against_base"]),
                with_interval(one["judge_against_base"]),
                f"{len(gone)}, from iteration {gone[0]['step']}: {gone[0]['why']}" if gone else "none",
            )
        )
    words = [f"Judge: {summary['judge']}. {summary['prompts']} held-out prompts. The rule: {summary['rule']}"]
    words += [
        f"{fit['series']}, {fit['measure']}: alpha {with_interval(fit['alpha'])}, beta {with_interval(fit['beta'])}."
        if fit["alpha"]
        else f"{fit['series']}, {fit['measure']}: no law is fitted ({fit['why_not']})."
        for fit in summary["fits"]
    ]
    return Section(
        "How far to optimise (section 5.2)",
        "\n".join(words),
        rows,
        [
            (
                "Reward, judge and diversity against KL; laws of Gao, Schulman and Hilton (2023)",
                out / "frontier" / "frontier.png",
            )
        ],
    )


def write_page(steps: Sequence[Step], out: Path, book: Book, config: Config, found: Found, *, smoke: bool) -> Path:
    """``index.html``: one file, with its figures in it, and links to their data beside it."""
    import jinja2

    template = (Path(__file__).parent / "reproduce.html").read_text(encoding="utf-8")
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page.filters["embed"] = lambda path: base64.b64encode(path.read_bytes()).decode()
    page.filters["beside"] = lambda path: str(path.relative_to(out))
    page.globals["siblings"] = lambda path: sorted(
        other for other in path.parent.glob(f"{path.stem}.*") if other.suffix in (".pdf", ".csv", ".parquet")
    )
    text = page.from_string(template).render(
        smoke=smoke,
        config=config,
        reward=found.reward,
        is_the_papers=bool(getattr(found.reward, "is_published", False)) and config.model.base == paper.BASE,
        sections=sections(out, config, found),
        steps=[
            (step, _clock(book.rows[step.name]["seconds"]), " ".join(("python -m", *step.words)).replace(OUT, "OUT"))
            for step in steps
        ],
    )
    write_atomically(out / PAGE, text.encode())
    return out / PAGE


# --- The command --------------------------------------------------------------------------------------------------


@click.command()
@click.option("--config", "path", help="TOML file, or a shipped one's name.  [default: paper.toml]")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder, new or unfinished.")
@click.option("--corpus", type=click.Path(path_type=Path), help="Folder written by smart corpus build.")
@click.option(
    "--recording", "recordings", multiple=True, type=click.Path(path_type=Path), help="Audio to rate; repeatable."
)
@click.option("--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE", help="Override one key of all runs.")
@click.option("--smoke", is_flag=True, help="All of it, tiny, with what ships with the package; offline, in minutes.")
@click.option("--list", "listing", is_flag=True, help="Show the steps, and what is missing; do nothing.")
def main(
    path: str | None,
    out: Path,
    corpus: Path | None,
    recordings: tuple[Path, ...],
    overrides: tuple[str, ...],
    smoke: bool,
    listing: bool,
) -> None:
    """Every experiment, table and figure of the paper, into one folder with a page that compares."""
    if smoke and (path is not None or corpus is not None):
        raise click.UsageError("--smoke brings its own configuration and corpus: leave out --config and --corpus")
    config: Config = load("quickstart.toml", (*SMOKE, *overrides)) if smoke else load(path or "paper.toml", overrides)
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, folder="runs"))
    fonts = [config.render.soundfont] if smoke else list(paper.TABLE_2)
    try:
        found = find(config, corpus, fonts, recordings, smoke=smoke)
    except UserError as error:
        if not listing:
            raise
        found, problem = None, error.message
    where = None if smoke else corpus or Path("CORPUS")
    steps = plan(config, where, fonts, recordings, found.checksums() if found else "")
    if listing:
        _list(steps, out)
        click.echo("nothing is missing" if found else problem)
        return
    assert found is not None
    book = Book(out)
    with in_one_line("the reproduction", "the same command goes on from here"), alone(out) as lock:
        (out / CONFIGS).mkdir(exist_ok=True)
        for name, one in variants(config, str(corpus) if corpus else str(out / "corpus")).items():
            write_atomically(out / CONFIGS / f"{name}.toml", dumps(one).encode())
        perform(steps, out, book, lock)
        page = write_page(steps, out, book, config, found, smoke=smoke)
    total = sum(book.rows[step.name]["seconds"] for step in steps)
    click.echo(f"all {len(steps)} steps are done, in {_clock(total)}; see {page}")


def _list(steps: Sequence[Step], out: Path) -> None:
    book = Book(out) if (out / STATE).is_file() else None
    for place, step in enumerate(steps, 1):
        state = "to do"
        if book is not None:
            state = "done" if book.is_done(step) else "begun" if book.was_begun(step) else state
        words = " ".join(word.replace(OUT, str(out)) for word in step.words)
        click.echo(f"[{place:2}/{len(steps)}] {step.name}: {step.title} ({state})\n        python -m {words}")


if __name__ == "__main__":
    main()
