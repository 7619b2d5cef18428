"""Every experiment of the paper as a step: its command, inputs and outputs."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from smart import UserError, require
from smart.config import Config, dumps
from smart.corpus import MANIFEST, Corpus
from smart.files import sha256
from smart.model import find_base
from smart.render import checked_soundfont
from smart.reproduce.book import OUT, Book, Step
from smart.run import NEEDED

if TYPE_CHECKING:  # it imports torch
    from smart.reward import Reward

CONFIGS, PAGE = "configs", "index.html"
JUDGES = ("naturalness", "naturalness_mel")  # rate the runs of each reward, whatever these were tuned with
PACKAGES = (*NEEDED, "jinja2", "scipy")


class Found(NamedTuple):
    """The inputs that come from elsewhere."""

    base: Path
    reward: Reward
    corpus: Corpus | None
    soundfonts: list[Path]

    def checksums(self) -> str:
        """Checksums of the files that affect the results."""
        files = [self.base / "model.safetensors", *self.soundfonts]
        files += [self.corpus.folder / MANIFEST] if self.corpus else []
        return " ".join([*map(sha256, files), self.reward.provenance])


# settings on top of the quickstart's with which everything takes minutes on two cores
SMOKE = (
    "run.name=smoke",
    "grpo.iterations=4",
    "grpo.prompts=4",
    "grpo.group_size=4",
    "sampling.max_new_tokens=96",
    "render.seconds=4.0",
    "track.checkpoint_every=4",
    "track.keep_checkpoints=0",
    "track.samples_every=4",
    "track.held_out_every=4",
    "track.held_out_prompts=2",
    "track.final_prompts=24",
    "track.final_listen=2",
)
SMOKE_PIECES = 96  # written by the base as a corpus: enough that none of its splits is empty
PIECES = 10  # from the corpus, for table 2
PROBED = 24  # pieces that the probes are made from
LONGER = 5  # section 5.2: 1000 iterations instead of 200
AGGRESSIVE = ("tuned", "tuned-long", "tuned-long-beta0")  # the runs of section 5.2


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


def each_alone(config: Config) -> dict[str, Config]:
    """The configuration's rewards together, and each alone without a target; all of these with and without a KL term.

    Raises ``UserError`` if there is only one.
    """
    if len(config.all_rewards) < 2:
        raise UserError("--each-reward compares several rewards, but the configuration has one; see docs/rewards.md")
    sets = {"together": config.all_rewards} | {
        f"{one.name or one.kind}-alone": (dataclasses.replace(one, target="none", weight=1.0),)
        for one in config.all_rewards
    }
    runs = {}
    for name, rewards in sets.items():
        first, *others = rewards
        for ending, beta in (("", config.grpo.beta), ("-beta0", 0.0)):
            runs[name + ending] = dataclasses.replace(
                config,
                run=dataclasses.replace(config.run, name=name + ending, folder="runs"),
                reward=first,
                rewards=tuple(others),
                grpo=dataclasses.replace(config.grpo, beta=beta),
            )
    return runs


def plan(
    config: Config,
    corpus: Path | None,
    fonts: Sequence[str],
    recordings: Sequence[Path],
    outside: str,
    *,
    each_reward: bool = False,
) -> list[Step]:
    """All steps, in order. Without ``corpus`` the base writes one first; ``outside`` identifies other input files.

    ``each_reward`` adds the runs of ``each_alone``, rated by all rewards and by the ear that trains none of them.
    """
    many, n = config.track.final_prompts, str(config.track.final_prompts)
    own = () if corpus else ("corpus",)  # the step that dataset prompts wait for
    folder = str(corpus) if corpus else f"{OUT}/corpus"
    sound = ("--soundfont", config.render.fonts[0], "--sample-rate", str(config.render.sample_rate))
    device = ("--device", config.run.device)
    rated_by = {one.kind: one.options for one in config.all_rewards}  # each kind once
    rates = _rated_by(rated_by)
    drawn = ["--seconds", f"{config.render.seconds:g}", "--tokens", str(config.sampling.max_new_tokens)]
    drawn += ["--temperature", str(config.sampling.temperature), "--top-k", str(config.sampling.top_k)]
    drawn += ["--top-p", str(config.sampling.top_p), "--backend", config.render.backend]

    def writes(count: int, *more: str) -> tuple[str, ...]:
        drawing = ("--tokens", str(config.sampling.max_new_tokens), "--temperature", str(config.sampling.temperature))
        return ("smart.generate", "--model", config.model.base, *drawing, "-n", str(count), *sound, *device, *more)

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

    def samples(name: str, kind: str, *runs: str, rates: Sequence[str] = rates) -> Step:
        models = [f"base={config.model.base}", *(f"{run}={OUT}/{run}" for run in runs)]
        where = ("--prompts", kind, *(("--corpus", folder) if kind == "dataset" else ()))
        return Step(
            name,
            f"{n} pieces per model, {len(models)} models, {kind} prompts",
            ("smart.evaluate", "sample", *models, "--out", f"{OUT}/{name}/{kind}.parquet", "-n", n, *where, *rates,
             *sound, *drawn, *device),
            (f"{kind}.parquet",),
            after=(*runs, *(own if kind == "dataset" else ())),
        )  # fmt: skip

    tuning = [tunes(name, one) for name, one in variants(config, folder).items()]
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
        samples("samples", "procedural", *AGGRESSIVE),
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
            f"ratings of non-music, compared with {PROBED} pieces of the base",
            ("smart.evaluate", "hacks", "--model", config.model.base, "-n", str(PROBED), *rates, *sound, *device,
             "--seconds", f"{config.render.seconds:g}", "--out", f"{OUT}/hacks"),
            ("hacks.csv", "hacks.png"),
        ),
        Step(
            "frontier",
            "reward, a second score and diversity against KL",
            ("smart.evaluate", "frontier", *(f"{OUT}/{run}" for run in AGGRESSIVE), "--out", f"{OUT}/frontier",
             "-n", str(max(many // 4, 8)), "--best-of", str(min(max(many // 8, 4), 16)), *device),
            ("frontier.png", "frontier.csv", "summary.json"),
            after=AGGRESSIVE,
        ),
    ]  # fmt: skip
    if each_reward:
        alone = each_alone(config)
        judged = _rated_by(rated_by | {kind: rated_by.get(kind, {}) for kind in JUDGES})
        steps += [
            *(tunes(name, one) for name, one in alone.items()),
            samples("samples-rewards", "procedural", *alone, rates=judged),
            Step(
                "report-rewards",
                "each reward alone, and all together",
                ("smart.evaluate", "report", f"{OUT}/samples-rewards/procedural.parquet", "--corpus", folder,
                 "--out", f"{OUT}/report-rewards"),
                ("*.png", "*-distances.csv", "*-diversity.csv", "index.html"),
                after=("samples-rewards", *own),
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


def _rated_by(kinds: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The words that rate with these kinds of rewards and their options."""
    words = []
    for kind, options in kinds.items():
        prefix = f"{kind}." if len(kinds) > 1 else ""
        words += ["--reward", kind]
        for key, value in options.items():
            words += ["--reward-option", f"{prefix}{key}={value if isinstance(value, str) else json.dumps(value)}"]
    return words


def drop_checkpoints(out: Path) -> None:
    """Delete the checkpoints of finished runs, most of what the smoke test writes; its page needs only their names."""
    for file in out.glob("*/checkpoints/*/*.safetensors"):
        file.unlink()


def retune(steps: Sequence[Step], book: Book) -> None:
    """Have the runs of the step ``frontier`` run again if it has to be repeated and their checkpoints were dropped."""
    if not all(book.is_done(step) for step in steps if step.name == "frontier"):
        for name in AGGRESSIVE:
            folders = [path.parent for path in (book.out / name / "checkpoints").glob("*/manifest.json")]
            if not all((folder / "model.safetensors").is_file() for folder in folders):
                book.forget(name)


def find(
    config: Config, corpus: Path | None, fonts: Sequence[str], recordings: Sequence[Path], *, smoke: bool
) -> Found:
    """Find all inputs from elsewhere. Raises one ``UserError`` that lists everything that is missing."""

    def packages() -> None:
        missing = [name for name in PACKAGES if find_spec(name) is None]
        if missing:
            raise UserError(f"these packages are missing: pip install {' '.join(missing)}")

    def base() -> Path:
        return find_base(config.model.base)

    def reward() -> Reward:
        from smart.reward.mixture import as_one, load_parts  # it imports torch

        return as_one(load_parts([dataclasses.asdict(one) for one in config.all_rewards], device="cpu"))

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

    names = dict.fromkeys((config.render.fonts[0], *fonts))
    _, _, *found = require(
        packages, excerpts, base, reward, pieces, *(functools.partial(checked_soundfont, name) for name in names)
    )
    return Found(base=found[0], reward=found[1], corpus=found[2], soundfonts=found[3:])
