"""The keys of a configuration: dataclasses, and what docs/configuration.md says about each field.

A field's metadata holds its ``meaning`` (Markdown), its ``unit``, where the ``paper`` has it, and the allowed values:
``low``/``high`` (inclusive), ``above`` (exclusive) and ``choices``.
"""

from dataclasses import dataclass, field
from typing import Any

NO_REWARD = "none"  # reward.kind, where [[rewards]] holds all of them
TRACKERS = ("trackio", "wandb", "mlflow")


def _about(meaning: str, *, unit: str = "", paper: str = "", **allowed: Any) -> dict[str, Any]:
    return {"meaning": meaning, "unit": unit, "paper": paper, **allowed}


def _key(default: Any, meaning: str, **more: Any) -> Any:
    return field(default=default, metadata=_about(meaning, **more))


def _choice(default: str, meaning: str, *choices: str, **more: Any) -> Any:
    return _key(default, meaning, choices=choices, **more)


def _path(default: str, meaning: str, **more: Any) -> Any:
    return _key(default, meaning, path=True, **more)


ALSO = "further trackers that get a run's curves and samples, besides its files and TensorBoard"


@dataclass(frozen=True)
class Run:
    """Where a run is written, ``<folder>/<name>/``, its seed and its device."""

    name: str = _key("run", "name of the run's folder", file_name=True)
    folder: str = _path("runs", "folder in which runs are written")
    seed: int = _key(1, "seed of prompts, sampling and all other random numbers", paper="code", low=0, high=2**31 - 1)
    device: str = _choice(
        "auto", "`auto`: CUDA if there is a GPU, else the CPU; `mps`: an Apple GPU (experimental)",
        "auto", "cpu", "cuda", "mps",
    )  # fmt: skip


@dataclass(frozen=True)
class Model:
    """The base to start from."""

    base: str = _path(
        "piano",
        "a shipped base's name, a local folder, or an id of the Hugging Face hub (only this one uses the network); "
        "empty: `smart pretrain` starts from random weights",
        paper="3.1",
    )


@dataclass(frozen=True)
class Prompts:
    """The prompts that completions start from (``smart.prompts``)."""

    kind: str = _choice(
        "procedural",
        "`procedural`: a bar with a random time signature and tempo; `first_note`: also a first note; `bos`: only the "
        "begin token; `dataset`: the first time signature and tempo of a piece in `corpus`",
        "procedural", "first_note", "bos", "dataset",
        paper="3.5; 5.3 for `dataset`; code for the others",
    )  # fmt: skip
    corpus: str = _path("", 'folder written by `smart corpus build`; `kind = "dataset"` needs it', paper="5.3")
    split: str = _choice(
        "train", "pieces of the corpus that give prompts", "train", "validation", "test", paper="5.3 and code"
    )


@dataclass(frozen=True)
class Sampling:
    """How completions are sampled (``smart.sampler``)."""

    max_new_tokens: int = _key(
        256, "longest completion, without its prompt", unit="tokens", paper="3.5", low=1, high=100_000
    )
    temperature: float = _key(
        1.0, "divides the logits; below 1 the policy writes more predictably", paper="3.5", above=0.0, high=100.0
    )
    top_k: int = _key(0, "draw from so many most likely tokens; 0: from all", paper="not mentioned; TRL: 50", low=0)
    top_p: float = _key(
        1.0,
        "draw from the most likely tokens that have this probability together",
        paper="not mentioned",
        above=0.0,
        high=1.0,
    )
    dtype: str = _choice(
        "auto", "number format of sampling; `auto`: float32 on a CPU, bfloat16 on CUDA", "auto", "float32", "bfloat16"
    )


@dataclass(frozen=True)
class Render:
    """How notes become audio (``smart.render``, ``smart.render.bank``)."""

    soundfont: str = _path("timgm", "name of a known soundfont, or path of an SF2 file", paper="3.4")
    soundfonts: tuple[str, ...] = _key((), "several soundfonts, used instead of `soundfont`")
    soundfont_use: str = _choice(
        "draw",
        "with several soundfonts: `draw` one for each group, or `average` each clip's ratings over all of them",
        "draw", "average",
    )  # fmt: skip
    backend: str = _choice(
        "pool", "`pool`: worker processes; `bank`: sums of stored notes on the device", "pool", "bank", paper="3.4"
    )
    sample_rate: int = _key(44100, "samples per second of the audio", unit="Hz", paper="code", low=8000, high=192_000)
    seconds: float = _key(
        10.0, "length of the audio that is rated, from the beginning", unit="s", paper="3.4", above=0.0, high=600.0
    )
    workers: int = _key(0, "processes that render; 0: one per usable core", unit="processes", low=0, high=1024)
    deadline: float = _key(30.0, "time to render one clip; after that it has failed", unit="s", above=0.0, high=3600.0)
    bank_megabytes: int = _key(
        2048, "most memory that stored notes take on the device", unit="MiB", low=16, high=1_000_000
    )

    @property
    def fonts(self) -> tuple[str, ...]:
        """All soundfonts of a run, at least one."""
        return self.soundfonts or (self.soundfont,)


@dataclass(frozen=True)
class RewardConfig:
    """A reward (``smart.reward``)."""

    kind: str = _key(
        "ce_proxy",
        "`audiobox`, `ce_proxy`, `naturalness`, `naturalness_mel`, `reference`, `symbolic`, one of an "
        "installed package, or, with `--reward`, `FILE.py:CLASS` ([rewards.md](rewards.md)); `none`: `[[rewards]]` "
        "holds all rewards",
        paper="3.3",
    )
    weights: dict[str, float] = field(
        default_factory=dict,
        metadata=_about(
            "weights of the reward's axes in its rating; empty: its first axis alone, or all rules of `symbolic`",
            paper="3.3",
        ),
    )
    options: dict[str, Any] = field(
        default_factory=dict,
        metadata=_about(
            "passed to the reward, for example `model` and `dtype`", reserved=("kind", "weights", "device")
        ),
    )
    deadline: float = _key(
        600.0, "time to rate at most 16 clips; after that the run stops", unit="s", above=0.0, high=86_400.0
    )


@dataclass(frozen=True)
class TrainedReward(RewardConfig):
    """The reward that training optimises, alone or as one of several (``smart.reward.mixture``)."""

    name: str = _key("", "its name in the log, the metrics and the tables; empty: its kind")
    weight: float = _key(
        1.0, "weight in the weighted mean of all rewards; 0: the reward is logged, but not optimised", low=0.0
    )
    target: float | str = _key(
        "none",
        "a piece earns nothing for a rating above this number; `real`: the median of real pieces through the run's "
        "soundfonts; `none`: no limit",
        unit="rating",
        words=("none", "real"),
    )
    real: str = _key(
        "", "folder of the real pieces (MIDI or audio files) for `real`; empty: a figure that ships with the package"
    )


@dataclass(frozen=True)
class Grpo:
    """Group relative policy optimization (``smart.grpo``)."""

    iterations: int = _key(
        200, "batches to learn from; the learning rate falls to 0 over them", paper="3.5; 1000 in 5.2", low=1
    )
    prompts: int = _key(8, "different prompts per iteration", unit="prompts", paper="3.5", low=1)
    group_size: int = _key(8, "completions of each prompt", unit="completions", paper="3.5", low=2)
    learning_rate: float = _key(1e-4, "AdamW's at the first iteration", paper="3.5", above=0.0, high=1.0)
    beta: float = _key(
        0.04, "weight of the KL term, which keeps the policy near the base", paper="3.5; 0 in 5.2", low=0.0
    )
    clip: float = _key(
        0.2, "the ratio of policies is clipped to 1 ± this; with one step per batch it never acts",
        paper="TRL", above=0.0, high=1.0,
    )  # fmt: skip
    inner_epochs: int = _key(1, "optimiser steps per batch", unit="steps", paper="code", low=1)
    rollouts_ahead: int = _key(
        0, "batches that are sampled one update early, so that they render during it", unit="batches", low=0, high=1
    )
    micro_batch: int = _key(
        16, "completions per forward and backward pass; changes memory and speed, not the gradient",
        unit="completions", low=1,
    )  # fmt: skip
    average: str = _choice(
        "token",
        "what counts equally in the loss: `token`: every token of the batch; `sequence`: every completion; `constant`: "
        "every token, divided by a number that no completion's length changes (Dr. GRPO)",
        "token", "sequence", "constant",
        paper="TRL",
    )  # fmt: skip
    scale: str = _choice(
        "group", "divide advantages by the standard deviation of their group, or not", "group", "none", paper="3.2"
    )
    combine: str = _choice(
        "sum",
        "several rewards: `sum`: add them up, then compare within the group; `normalised_sum`: compare each within the "
        "group, then add (GDPO)",
        "sum", "normalised_sum",
    )  # fmt: skip
    target_of: str = _choice(
        "piece",
        "`piece`: a reward's target limits the rating of each piece; `group`: also, once the mean of a group has "
        "reached the target, all pieces of that group count as having reached it",
        "piece", "group",
    )  # fmt: skip
    max_grad_norm: float = _key(1.0, "the gradient is scaled down to this norm", paper="code", above=0.0)
    precision: str = _choice(
        "auto", "number format of training; `auto`: bfloat16 autocast on CUDA only", "auto", "float32", "bfloat16",
        paper="code",
    )  # fmt: skip
    diversity: float = _key(
        0.0, "bonus for a piece that differs from the rest of its group; 0: plain GRPO", unit="reward points", low=0.0
    )
    kl_budget: float = _key(
        0.0, "stop once the held-out KL to the base reaches this; 0: never", unit="nats per token", low=0.0
    )
    stop_on_collapse: bool = _key(False, "stop if the rule of `smart.guard` finds that diversity has collapsed")


@dataclass(frozen=True)
class Guard:
    """How over-optimisation is detected (``smart.guard``); ``[grpo]`` and ``[track]`` have further keys for it."""

    judge: RewardConfig = field(
        default_factory=lambda: RewardConfig(kind="auto"),
        metadata=_about(
            "The second score, which training does not optimise. Its `kind` can also be `auto`: the mean of the "
            "reward's axes without weight, or, if there are none, an ear that is not optimised (`naturalness_mel`, or "
            "else `naturalness`); or `plausibility`: how likely the music is under the base model."
        ),
    )
    soundfont: str = _key(
        "",
        "a soundfont through which only the judge hears; a judge of kind `auto` is then the reward itself, heard "
        "through it; empty: those of the run",
    )


@dataclass(frozen=True)
class Track:
    """What a run writes, and how often."""

    checkpoint_every: int = _key(20, "iterations from one checkpoint to the next", unit="iterations", low=1)
    keep_checkpoints: int = _key(3, "newest checkpoints that are kept; 0: all", unit="checkpoints", low=0)
    samples_every: int = _key(20, "iterations from one set of samples to the next", unit="iterations", low=1)
    samples: int = _key(
        2, "completions of such an iteration that are written as MIDI and WAV", unit="completions", low=0, high=1000
    )
    final_prompts: int = _key(
        64, "new prompts on which base and tuned model are compared at the end", unit="prompts", paper="4.1", low=2
    )
    final_listen: int = _key(4, "comparisons of these that are written as MIDI and WAV", unit="prompts", low=0)
    trace_every: int = _key(0, "iterations from one timeline to the next; 0: never", unit="iterations", low=0)
    held_out_every: int = _key(
        10, "iterations from one measurement on held-out prompts to the next; 0: never", unit="iterations", low=0
    )
    held_out_prompts: int = _key(8, "held-out prompts, with four completions each", unit="prompts", low=2)
    also: tuple[str, ...] = _key((), ALSO, choices=TRACKERS)


@dataclass(frozen=True)
class Config:
    """A tuning run. Defaults: the paper's numbers (section 3.5), but with the base and reward that ship.

    ``reward`` and each of ``rewards`` are optimised together; ``reward.kind`` "none" leaves ``rewards`` alone, and so
    does a file with ``[[rewards]]`` and without ``[reward]``.
    """

    run: Run = field(default_factory=Run)
    model: Model = field(default_factory=Model)
    prompts: Prompts = field(default_factory=Prompts)
    sampling: Sampling = field(default_factory=Sampling)
    render: Render = field(default_factory=Render)
    reward: TrainedReward = field(default_factory=TrainedReward)
    rewards: tuple[TrainedReward, ...] = _key(
        (),
        "Any number of further rewards, each a table with the keys of `[reward]`. A file with `[[rewards]]` and "
        "without `[reward]` optimises only these.",
    )
    grpo: Grpo = field(default_factory=Grpo)
    guard: Guard = field(default_factory=Guard)
    track: Track = field(default_factory=Track)

    @property
    def all_rewards(self) -> tuple[TrainedReward, ...]:
        """``reward``, unless its kind is "none" and there are others; then ``rewards``."""
        return self.rewards if self.rewards and self.reward.kind == NO_REWARD else (self.reward, *self.rewards)


@dataclass(frozen=True)
class Architecture:
    """Size of a new Phi-3 base. Defaults: the paper's."""

    layers: int = _key(4, "transformer layers", paper="3.1", low=1)
    hidden: int = _key(512, "width of the embeddings; a multiple of `heads`", paper="3.1", low=8)
    heads: int = _key(8, "attention heads per layer", paper="3.1", low=1)
    intermediate: int = _key(2048, "width of the feed-forward layers", paper="code", low=8)
    max_positions: int = _key(2048, "longest piece that the model can read or write", unit="tokens", low=16)


@dataclass(frozen=True)
class Data:
    """Tokenised music to learn from."""

    corpus: str = _path("", "folder written by `smart corpus build`; required", paper="3.1")
    crop: int = _key(512, "longest training row, begin and end tokens included", unit="tokens", paper="code", low=8)
    transpose: int = _key(
        0, "largest shift of a row's pitches, up or down; drawn for every row", unit="semitones", low=0, high=11
    )
    velocity_shift: int = _key(0, "largest shift of a row's velocities", unit="steps of the vocabulary", low=0, high=31)
    tempo_shift: int = _key(0, "largest shift of a row's tempos", unit="steps of the vocabulary", low=0, high=63)
    openings: float = _key(0.0, "share of rows that start at the beginning of a piece", low=0.0, high=1.0)
    meters: float = _key(0.0, "share of rows rewritten in a random time signature, where it fits", low=0.0, high=1.0)


@dataclass(frozen=True)
class Optimisation:
    """Pretraining. Defaults: the authors' (AdamW 5e-4, 500 warm-up steps, cosine to 5e-6, weight decay 0.01)."""

    steps: int = _key(10_000, "optimiser steps, unless `patience` ends the run", unit="steps", paper="code", low=1)
    batch: int = _key(32, "rows per step", unit="rows", paper="code", low=1)
    learning_rate: float = _key(5e-4, "highest learning rate, after the warm-up", paper="code", above=0.0, high=1.0)
    final_learning_rate: float = _key(
        5e-6, "learning rate at the end, reached along a cosine", paper="code", low=0.0, high=1.0
    )
    warmup: int = _key(500, "steps in which the learning rate rises from 0", unit="steps", paper="code", low=0)
    optimizer: str = _choice(
        "adamw", "`muon`: Muon for the layers' matrices, AdamW for the rest", "adamw", "muon", paper="code"
    )
    weight_decay: float = _key(0.01, "weight decay of the optimiser", paper="code", low=0.0)
    grammar_weight: float = _key(
        0.0, "weight of a penalty on the probability that the model gives to tokens that cannot be played", low=0.0
    )
    max_grad_norm: float = _key(1.0, "the gradient is scaled down to this norm", above=0.0)
    precision: str = _choice(
        "auto", "number format of training; `auto`: bfloat16 autocast on CUDA only", "auto", "float32", "bfloat16",
        paper="code",
    )  # fmt: skip
    compile: str = _choice("auto", "torch.compile; `auto`: on CUDA, if what it needs is installed", "auto", "on", "off")
    evaluate_every: int = _key(500, "steps from one evaluation to the next", unit="steps", low=1)
    evaluate_rows: int = _key(256, "validation rows, the same ones each time", unit="rows", low=1)
    patience: int = _key(
        10, "stop after so many evaluations without a lower validation loss", unit="evaluations", paper="code", low=1
    )
    keep_checkpoints: int = _key(
        2, "newest checkpoints that are kept; each evaluation writes one", unit="checkpoints", low=1
    )
    samples: int = _key(16, "pieces sampled at each evaluation, to count how many can be played", unit="pieces", low=0)
    listen: int = _key(4, "pieces of these that are written as MIDI and WAV", unit="pieces", low=0)


@dataclass(frozen=True)
class PretrainTrack:
    """Where else a run's curves and samples go."""

    also: tuple[str, ...] = _key((), ALSO, choices=TRACKERS)


@dataclass(frozen=True)
class PretrainConfig:
    """A pretraining run (``smart.pretrain``). Empty ``model.base``: random weights of ``architecture``."""

    run: Run = field(default_factory=Run)
    model: Model = field(default_factory=lambda: Model(base=""))
    architecture: Architecture = field(default_factory=Architecture)
    data: Data = field(default_factory=Data)
    optimisation: Optimisation = field(default_factory=Optimisation)
    render: Render = field(default_factory=Render)
    track: PretrainTrack = field(default_factory=PretrainTrack)
