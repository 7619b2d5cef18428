"""Find the models that a comparison compares, by name: a run, one of its checkpoints, or a base."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click

from smart import UserError, hub
from smart.files import parse_toml, split_name
from smart.model import FILES, find_base
from smart.published import BASE, REWARD
from smart.run import CONFIG, checkpoint


class System(NamedTuple):
    """A model in a comparison, and its name in tables."""

    name: str
    model: Path  # folder in the form of a base
    run: Path | None  # the run that it belongs to, if any
    step: int | None  # iterations or steps of that run, 0 for its base; None without a run, or for a pretrained base


def find_system(text: str) -> System:
    """The system that ``text`` names: a run's folder, or a base (folder, shipped name, or hub id).

    A run stands for its tuned model, or for the base that a pretraining run made; if the run is unfinished, for its
    newest checkpoint, with a note on stderr. RUN@base is the base that it started from (or made), RUN@STEP a
    checkpoint. NAME=TEXT sets the name in tables; by default it is the folder's. A path may hold ``=``. Raises
    ``UserError`` if there is no such model.
    """
    name, text = split_name(text)
    if name:
        return find_system(text)._replace(name=name)
    path, _, which = text.rpartition("@")
    if path and _is_run(Path(path)):
        return _of_run(Path(path), which)
    if _is_run(Path(text)):
        return _of_run(Path(text), "")
    folder = find_base(text)
    return System(Path(text).name or folder.name, folder, None, None)


def find_systems(texts: Sequence[str]) -> list[System]:
    """``find_system`` for each text. Raises ``UserError`` if there is none, or if two systems have the same name."""
    systems = [find_system(text) for text in texts]
    if not systems:
        raise UserError("no model was given; expected a run, a base's folder or the name of a shipped base")
    names = [system.name for system in systems]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two models are called {name!r}; give one another name, as in {name}-2=PATH")
    return systems


def is_the_papers(system: System) -> bool:
    """Whether a model is the paper's base, or was tuned from it with the reward that the paper used."""
    if system.run is None or system.step == 0:
        base = hub.find_cached(BASE, FILES)
        return base is not None and base[0].parent == system.model
    try:
        config = parse_toml((system.run / CONFIG).read_text(encoding="utf-8"))
        reward = config["reward"]
        plain = reward["kind"] == "audiobox" and reward["options"].get("model", REWARD) == REWARD
        return bool(plain and not config.get("rewards") and config["model"]["base"] == BASE)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _is_run(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def _of_run(run: Path, which: str) -> System:
    name = run.resolve().name + (f"@{which}" if which else "")
    checkpoints = run / "checkpoints"
    if which == "base":
        folder = run / "base" if (run / "base").is_dir() else find_base(_setting(run, "model", "base"))
        return System(name, folder, run, 0)
    if which:
        steps = checkpoint.steps(checkpoints)
        if not which.isdecimal() or int(which) not in steps:
            known = ", ".join(map(str, steps)) or "none"
            raise UserError(f"{run}@{which}: expected {run}@base, or {run}@STEP with the step of a checkpoint: {known}")
        folder = checkpoints / f"{int(which):08d}"
        checkpoint.verify(folder)
        return System(name, folder, run, int(which))
    if (run / "tuned" / "model.safetensors").is_file():  # the file that is written last
        return System(name, find_base(str(run / "tuned")), run, _setting(run, "grpo", "iterations"))
    if (run / "base").is_dir():
        return System(name, find_base(str(run / "base")), run, None)
    newest = checkpoint.latest(checkpoints)
    if newest is None:
        raise UserError(f"{run}: this run has not saved a model yet")
    click.echo(f"{run} is not finished; using its checkpoint {newest.name}", err=True)
    return System(name, newest, run, int(newest.name))


def _setting(run: Path, section: str, key: str) -> Any:
    """One value of a run's configuration, which contains all keys."""
    try:
        return parse_toml((run / CONFIG).read_text(encoding="utf-8-sig"))[section][key]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"run {run}: {CONFIG} holds no {section}.{key} ({type(error).__name__})") from None
