"""Configuration: turn a TOML file into a frozen dataclass; errors name the wrong key.

Only programs read the configuration; other modules take plain arguments. There are two schemas: ``Config`` for tuning
and ``PretrainConfig`` for a base model. A field's metadata holds the allowed values: ``low``/``high`` (inclusive),
``above`` (exclusive) and ``choices``. Nothing in a configuration file is ever executed.
"""

import dataclasses
import difflib
import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from smart import UserError
from smart.files import parse_toml

SHIPPED = Path(__file__).parent / "configs"
NO_REWARD = "none"  # reward.kind, where [[rewards]] holds all of them
TRACKERS = ("trackio", "wandb", "mlflow")

Schema = TypeVar("Schema")


def _number(default: Any, **allowed: Any) -> Any:
    return field(default=default, metadata=allowed)


def _choice(default: str, *choices: str) -> Any:
    return field(default=default, metadata={"choices": choices})


def _path(default: str) -> Any:
    return field(default=default, metadata={"path": True})


@dataclass(frozen=True)
class Run:
    """Where a run is written, ``<folder>/<name>/``, its seed and its device."""

    name: str = field(default="run", metadata={"file_name": True})
    folder: str = _path("runs")
    seed: int = _number(1, low=0, high=2**31 - 1)
    device: str = _choice("auto", "auto", "cpu", "cuda")


@dataclass(frozen=True)
class Model:
    """The base to start from: a shipped name, a local folder, or a hub id (only this one uses the network)."""

    base: str = _path("piano-small")


@dataclass(frozen=True)
class Prompts:
    """The prompts that completions start from (``smart.prompts``)."""

    kind: str = _choice("procedural", "procedural", "first_note", "bos", "dataset")
    corpus: str = _path("")  # folder written by smart.corpus; kind = "dataset" needs it
    split: str = _choice("train", "train", "validation", "test")


@dataclass(frozen=True)
class Sampling:
    """How completions are sampled (``smart.sampler``)."""

    max_new_tokens: int = _number(256, low=1, high=100_000)
    temperature: float = _number(1.0, above=0.0, high=100.0)
    top_k: int = _number(0, low=0)
    top_p: float = _number(1.0, above=0.0, high=1.0)
    dtype: str = _choice("auto", "auto", "float32", "bfloat16")  # auto: float32 on CPU, bfloat16 on CUDA


@dataclass(frozen=True)
class Render:
    """How notes become audio (``smart.render``, ``smart.render.bank``)."""

    soundfont: str = _path("timgm")
    soundfonts: tuple[str, ...] = ()  # several, in place of ``soundfont``
    # several soundfonts: one is drawn for each group, or each clip's ratings are averaged over all of them
    soundfont_use: str = _choice("draw", "draw", "average")
    backend: str = _choice("pool", "pool", "bank")  # worker processes, or a bank of stored notes on the device
    sample_rate: int = _number(44100, low=8000, high=192_000)
    seconds: float = _number(10.0, above=0.0, high=600.0)
    workers: int = _number(0, low=0, high=1024)  # 0: one per usable core
    deadline: float = _number(30.0, above=0.0, high=3600.0)  # seconds per clip; after that it has failed
    bank_megabytes: int = _number(2048, low=16, high=1_000_000)  # MiB of stored notes on the device, at most

    @property
    def fonts(self) -> tuple[str, ...]:
        """All soundfonts of a run, at least one."""
        return self.soundfonts or (self.soundfont,)


@dataclass(frozen=True)
class RewardConfig:
    """A reward (``smart.reward``). Empty ``weights``: its first axis alone, or all rules of ``symbolic``."""

    kind: str = "ce_proxy"
    weights: dict[str, float] = field(default_factory=dict)
    # passed to the reward: model, dtype, ...
    options: dict[str, Any] = field(default_factory=dict, metadata={"reserved": ("kind", "weights", "device")})
    deadline: float = _number(600.0, above=0.0, high=86_400.0)  # seconds for at most 16 clips; later the run stops


@dataclass(frozen=True)
class TrainedReward(RewardConfig):
    """A reward that training optimises, alone or as one of several (``smart.reward.mixture``)."""

    name: str = ""  # in the log, the metrics and the tables; empty: its kind
    weight: float = _number(1.0, low=0.0)  # in the weighted mean of all rewards; 0: it is logged, but not optimised
    # a piece earns nothing for a rating above this; "real": the median of real pieces through the run's soundfonts
    target: float | str = field(default="none", metadata={"words": ("none", "real")})
    real: str = ""  # folder of the real pieces, MIDI or audio files; empty: a figure that ships


@dataclass(frozen=True)
class Grpo:
    """Group relative policy optimization (``smart.grpo``)."""

    iterations: int = _number(200, low=1)
    prompts: int = _number(8, low=1)  # different prompts per iteration
    group_size: int = _number(8, low=2)  # completions per prompt
    learning_rate: float = _number(1e-4, above=0.0, high=1.0)
    beta: float = _number(0.04, low=0.0)  # weight of the KL term
    clip: float = _number(0.2, above=0.0, high=1.0)
    inner_epochs: int = _number(1, low=1)  # optimiser steps per batch (mu)
    rollouts_ahead: int = _number(0, low=0, high=1)  # batches sampled one update early
    micro_batch: int = _number(16, low=1)  # completions per forward and backward pass
    average: str = _choice("token", "token", "sequence", "constant")
    scale: str = _choice("group", "group", "none")
    # several rewards: add them up, then compare within the group; or compare each within the group, then add (GDPO)
    combine: str = _choice("sum", "sum", "normalised_sum")
    # a reward's target limits the rating of each piece; or also, once the mean of a group has reached the target, all
    # pieces of that group count as having reached it
    target_of: str = _choice("piece", "piece", "group")
    max_grad_norm: float = _number(1.0, above=0.0)
    precision: str = _choice("auto", "auto", "float32", "bfloat16")  # auto: bf16 autocast on CUDA only
    diversity: float = _number(0.0, low=0.0)  # reward points for differing from the rest of the group; 0: plain GRPO
    kl_budget: float = _number(0.0, low=0.0)  # stop at this held-out KL to the base, in nats per token; 0: never
    stop_on_collapse: bool = False  # stop if the rule of smart.guard finds that diversity has collapsed


@dataclass(frozen=True)
class Guard:
    """How over-optimisation is detected (``smart.guard``); ``Grpo`` and ``Track`` have further keys for it."""

    # the second score, which training does not optimise. kind "auto": the mean of the reward's axes without weight,
    # or, if there are none, ``smart.guard.DEFAULT_JUDGE``; "plausibility": how likely the music is under the base model
    judge: RewardConfig = field(default_factory=lambda: RewardConfig(kind="auto"))
    # a soundfont through which only the judge hears; kind "auto" is then the reward itself, heard through it
    soundfont: str = ""


@dataclass(frozen=True)
class Track:
    """What a run writes, and how often (every so many iterations)."""

    checkpoint_every: int = _number(20, low=1)
    keep_checkpoints: int = _number(3, low=0)  # 0: all
    samples_every: int = _number(20, low=1)
    samples: int = _number(2, low=0, high=1000)  # completions of such an iteration that are written as MIDI and WAV
    final_prompts: int = _number(64, low=2)  # new prompts on which base and tuned model are compared at the end
    final_listen: int = _number(4, low=0)  # how many of these comparisons are written as MIDI and WAV
    trace_every: int = _number(0, low=0)  # write a timeline every so many iterations; 0: never
    held_out_every: int = _number(10, low=0)  # measure on held-out prompts every so many iterations; 0: never
    held_out_prompts: int = _number(8, low=2)  # with four completions each
    also: tuple[str, ...] = field(default=(), metadata={"choices": TRACKERS})  # further trackers (smart.run.also)


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
    rewards: tuple[TrainedReward, ...] = ()
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

    layers: int = _number(4, low=1)
    hidden: int = _number(512, low=8)
    heads: int = _number(8, low=1)
    intermediate: int = _number(2048, low=8)
    max_positions: int = _number(2048, low=16)


@dataclass(frozen=True)
class Data:
    """Tokenised music to learn from, written by ``smart.corpus``."""

    corpus: str = _path("")
    crop: int = _number(512, low=8)  # tokens of a training row, BOS and EOS included
    transpose: int = _number(0, low=0, high=11)  # largest shift in semitones, up or down; drawn for every row
    velocity_shift: int = _number(0, low=0, high=31)  # largest shift of a row's velocities, in steps of the vocabulary
    tempo_shift: int = _number(0, low=0, high=63)  # largest shift of a row's tempos, in steps of the vocabulary
    openings: float = _number(0.0, low=0.0, high=1.0)  # share of rows that start at the beginning of a piece


@dataclass(frozen=True)
class Optimisation:
    """Pretraining. Defaults: the authors' (AdamW 5e-4, 500 warm-up steps, cosine to 5e-6, weight decay 0.01)."""

    steps: int = _number(10_000, low=1)
    batch: int = _number(32, low=1)
    learning_rate: float = _number(5e-4, above=0.0, high=1.0)
    final_learning_rate: float = _number(5e-6, low=0.0, high=1.0)
    warmup: int = _number(500, low=0)
    optimizer: str = _choice("adamw", "adamw", "muon")  # muon: for the layers' matrices; AdamW for the rest
    weight_decay: float = _number(0.01, low=0.0)
    max_grad_norm: float = _number(1.0, above=0.0)
    precision: str = _choice("auto", "auto", "float32", "bfloat16")  # auto: bf16 autocast on CUDA only
    compile: str = _choice("auto", "auto", "on", "off")  # torch.compile; auto: on CUDA, if what it needs is there
    evaluate_every: int = _number(500, low=1)
    evaluate_rows: int = _number(256, low=1)  # validation rows, the same ones each time
    patience: int = _number(10, low=1)  # stop after so many evaluations without a better validation loss
    keep_checkpoints: int = _number(2, low=1)  # one is written at each evaluation
    samples: int = _number(16, low=0)  # pieces sampled at each evaluation, to count how many can be played
    listen: int = _number(4, low=0)  # how many of these pieces are written as MIDI and WAV


@dataclass(frozen=True)
class PretrainTrack:
    """The trackers that get a run's curves and samples, besides the files of the run and TensorBoard."""

    also: tuple[str, ...] = field(default=(), metadata={"choices": TRACKERS})


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


def shipped() -> list[str]:
    """File names of the configurations that ship with the package."""
    return sorted(path.name for path in SHIPPED.glob("*.toml"))


def find(path: str | Path) -> Path:
    """``path`` itself, or the shipped configuration of that name if there is no such file."""
    given = Path(os.path.expanduser(path))
    if given.is_file():
        return given
    if given.name == str(path) and (SHIPPED / given.name).is_file():
        return SHIPPED / given.name
    raise UserError(f"config {str(path)!r}: no such file; shipped configs are {', '.join(shipped())}")


def load(path: str | Path, overrides: Iterable[str] = (), *, schema: type[Schema] = Config) -> Schema:  # type: ignore[assignment]  # mypy has no default for a type variable
    """Read ``path``, apply ``overrides`` ("section.key=value", in TOML notation) and check everything.

    Raises ``UserError`` naming the key, its value and the allowed values.
    """
    file = find(path)
    try:
        values = parse_toml(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError(f"config {file}: cannot be read as TOML: {error}") from None
    overrides = {_apply(values, override): override for override in overrides}
    if schema is Config and values.get("rewards"):
        values.setdefault("reward", {"kind": NO_REWARD})

    def source(name: str) -> str:
        for key, override in overrides.items():
            if f"{name}.".startswith(f"{key}."):
                return f"--set {_short(override)}"
            if key.startswith(f"{name}."):
                return f"{file} with --set {_short(override)}"
        return str(file)

    return _build(schema, values, "", source)


def completed(path: Path, *, schema: type[Any] = Config) -> str:
    """The configuration of a run as TOML, with the defaults of keys that did not exist when it was written."""
    return dumps(load(path, schema=schema))


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as nested dictionaries of plain values, as in a TOML file."""
    return dataclasses.asdict(config)


def dumps(config: Any) -> str:
    """The configuration as TOML; ``load`` reads it back to an equal object."""
    lines: list[str] = []
    _write_table(to_dict(config), "", lines)
    return "\n".join(lines).strip() + "\n"


def _write_table(table: dict[str, Any], prefix: str, lines: list[str]) -> None:
    for key, value in table.items():
        if not isinstance(value, dict) and not _are_tables(value):
            lines.append(f"{_key(key)} = {_toml(value)}")
    for key, value in table.items():
        name = f"{prefix}{_key(key)}"
        if isinstance(value, dict):
            lines += ["", f"[{name}]"]
            _write_table(value, f"{name}.", lines)
        elif _are_tables(value):
            for item in value:
                lines += ["", f"[[{name}]]"]
                _write_table(item, f"{name}.", lines)


def _are_tables(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(item, dict) for item in value)


def _key(key: str) -> str:
    bare = key and all(c.isascii() and (c.isalnum() or c in "-_") for c in key)
    return key if bare else _toml(key)


def _toml(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(_toml(item) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_key(key)} = {_toml(item)}' for key, item in value.items())}}}"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # inf, -inf and nan are spelled the same in TOML
    if isinstance(value, str):
        # JSON's escapes are valid in TOML, which also requires DEL to be escaped
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return json.dumps(value)


def _apply(values: dict[str, Any], override: str) -> str:
    """Put an override into ``values``; returns its dotted key."""
    key, separator, text = override.partition("=")
    parts = [part.strip() for part in key.split(".")]
    try:
        parsed = parse_toml(f"value = {text}")
        value = parsed["value"] if list(parsed) == ["value"] else text
    except ValueError:
        value = text  # a bare word is a string
    if not separator or not all(parts) or (len(parts) < 2 and not isinstance(value, list)):  # a list of tables
        raise UserError(f"--set {override!r}: expected section.key=value, for example grpo.beta=0.02")
    table: Any = values
    for place, part in enumerate(parts[:-1]):
        if isinstance(table, list):
            parts[place] = str(number := _find_table(table, part, override))
            table = table[number]
        else:
            table = table.setdefault(part, {})
        if not isinstance(table, dict) and not _are_tables(table):
            raise UserError(f"--set {override!r}: {part} is not a section")
    if isinstance(table, list):
        raise UserError(
            f"--set {override!r}: {parts[-2]} has several tables; say which, as in {parts[-2]}.0.{parts[-1]}"
        )
    table[parts[-1]] = value
    return ".".join(parts)


def _find_table(tables: list[Any], wanted: str, override: str) -> int:
    """The index of a table in a list, given by its index, or by its name or kind if only one table has it."""
    if wanted.isdecimal() and int(wanted) < len(tables):
        return int(wanted)
    names = [table.get("name") or table.get("kind") for table in tables]
    if names.count(wanted) != 1:
        raise UserError(f"--set {override!r}: no table is called {wanted}; expected 0 to {len(tables) - 1}, or a name")
    return names.index(wanted)


def _build(schema: type[Schema], values: dict[str, Any], prefix: str, source: Callable[[str], str]) -> Schema:
    """Check ``values`` and build ``schema`` from them; ``source`` tells from where a key's value comes."""
    fields = {item.name: item for item in dataclasses.fields(schema)}  # type: ignore[arg-type]  # always a dataclass
    hints = get_type_hints(schema)
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if key not in fields:
            close = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean {prefix}{close[0]}?" if close else f"allowed: {', '.join(fields)}"
            raise UserError(f"{source(name)}: unknown key {name} = {_short(value)}; {hint}")
        kind = hints[key]
        if get_origin(kind) is tuple and dataclasses.is_dataclass(entry := get_args(kind)[0]):
            if not isinstance(value, list) or not all(isinstance(table, dict) for table in value):
                raise UserError(f"{source(name)}: {name} = {_short(value)}: expected tables [[{name}]]")
            built = (_build(entry, table, f"{name}.{number}.", source) for number, table in enumerate(value))  # type: ignore[arg-type]  # as below
            arguments[key] = tuple(built)
        elif dataclasses.is_dataclass(kind):
            if not isinstance(value, dict):
                raise UserError(f"{source(name)}: {name} = {_short(value)}: expected a section [{name}]")
            arguments[key] = _build(kind, value, f"{name}.", source)  # type: ignore[arg-type]  # is_dataclass narrows to instances too
        else:
            arguments[key] = _check(kind, value, name, fields[key].metadata, source(name))
    return schema(**arguments)


def _check(kind: Any, value: Any, name: str, allowed: Any, source: str) -> Any:
    def wrong(expected: str) -> UserError:
        return UserError(f"{source}: {name} = {_short(value)}: expected {expected}")

    if "words" in allowed:  # a number, or one of some words
        if value in allowed["words"] or _is_number(value):
            return value if isinstance(value, str) else float(value)
        raise wrong(f"a finite number or one of {', '.join(allowed['words'])}")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        if not _is_number(value):
            raise wrong("a finite number")
        value = float(value)
    if kind == tuple[str, ...]:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            listed = ", ".join(f'"{word}"' for word in allowed.get("choices", ("timgm", "fluidr3"))[:2])
            raise wrong(f"a list of strings, for example [{listed}]")
        if "choices" in allowed and not set(value) <= set(allowed["choices"]):
            raise wrong(f"a list of some of {', '.join(allowed['choices'])}")
        return tuple(value)
    if kind == dict[str, float]:
        if not isinstance(value, dict) or not all(_is_number(item) for item in value.values()):
            raise wrong("a table of finite numbers, for example { CE = 1.0 }")
        return {key: float(item) for key, item in value.items()}
    if kind == dict[str, Any]:
        if not isinstance(value, dict):
            raise wrong("a table")
        for key in allowed.get("reserved", ()):
            if key in value:
                raise wrong(f"a table without {key!r}, which is set elsewhere")
        return value
    if allowed.get("path") and isinstance(value, str):
        return os.path.expanduser(value)
    if type(value) is not kind:
        raise wrong({int: "an integer", float: "a number", str: "a string", bool: "true or false"}[kind])
    if kind is float and not math.isfinite(value):
        raise wrong("a finite number")
    if "choices" in allowed and value not in allowed["choices"]:
        raise wrong(f"one of {', '.join(allowed['choices'])}")
    if not (value >= allowed.get("low", value) and value <= allowed.get("high", value)):
        raise wrong(_range(allowed))
    if "above" in allowed and not value > allowed["above"]:
        raise wrong(_range(allowed))
    if "file_name" in allowed and (not value or value == ".." or value != Path(value).name or not value.isprintable()):
        raise wrong("a plain folder name, without a path")
    return value


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer of hundreds of digits
        return False


def _range(allowed: Any) -> str:
    bounds = []
    if "low" in allowed:
        bounds.append(f"at least {allowed['low']}")
    if "above" in allowed:
        bounds.append(f"greater than {allowed['above']:g}")
    if "high" in allowed:
        bounds.append(f"at most {allowed['high']}")
    return "a value " + " and ".join(bounds)


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print such an integer, but reads one in hexadecimal
        return "an integer of thousands of digits"
    return text if len(text) <= 60 else f"{text[:57]}..."
