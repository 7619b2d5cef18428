"""A run's folder: created, continued or replaced, and held by one process; nothing is lost silently."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from smart import UserError, __version__
from smart.files import hold, ignores_case, is_empty, parse_json, parse_toml, write_atomically
from smart.run.sources import ACCEPT, SOURCES, files_changed

if TYPE_CHECKING:
    from smart.distributed import World

CONFIG = "config.toml"
SETTINGS = "settings.json"
NEEDED = ("pyarrow", "tensorboard", "matplotlib", "soundfile")


def check_packages(also: Iterable[str] = ()) -> None:
    """Raise ``UserError`` naming the packages that a run needs, and those of trackers in ``also``, that are missing."""
    missing = [name for name in (*NEEDED, *also) if find_spec(name) is None]
    if missing:
        raise UserError(f"a run needs {', '.join(missing)}: pip install {' '.join(missing)}")


class Opening(NamedTuple):
    """How a run is opened: ``resume`` continues one, ``overwrite`` replaces one.

    ``accept_changes``: with ``resume``, the files that the run was made of may have changed since it began.
    """

    resume: bool = False
    overwrite: bool = False
    accept_changes: bool = False


@contextmanager
def open_run_folder(
    folder: Path, config: str, *, resume: bool, overwrite: bool, complete: Callable[[Path], str] | None = None
) -> Iterator[None]:
    """Create the run's folder, or check that it may be continued or replaced; nothing is lost silently.

    ``complete`` reads the configuration of a run that an older version began, and adds the keys that did not exist yet.
    Until the end of the ``with`` no other process can open the folder, so that two never write one run.
    """
    if "\0" in str(folder):
        raise UserError(f"run {str(folder)!r}: a folder cannot have that name; choose another run.name")
    _check_kind(folder, resume)
    with ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(hold(folder))
            _make_or_check(folder, config, resume=resume, overwrite=overwrite, complete=complete)
        except BlockingIOError:
            raise UserError(
                f"run {folder}: another process is working in it; wait for that process, or stop it"
            ) from None
        except OSError as error:
            raise UserError(f"run {folder} cannot be written ({error.strerror})") from None
        yield


def check_resumable(folder: Path, config: str, *, complete: Callable[[Path], str] | None = None) -> None:
    """Raise ``UserError`` if ``folder`` holds no run, or one with another configuration; arguments as above."""
    _check_kind(folder, True)
    _refuse_changes(folder, config, complete)


def _check_kind(folder: Path, resume: bool) -> None:
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UserError(f"run {folder} is not a folder; choose another run.name")
    if resume and not (folder / CONFIG).is_file():
        raise UserError(
            f"run {folder}: nothing to resume, since it has no {CONFIG}; leave out --resume to begin it, or give the "
            f"configuration of a run, --config RUN/{CONFIG}"
        )


def _make_or_check(
    folder: Path, config: str, *, resume: bool, overwrite: bool, complete: Callable[[Path], str] | None
) -> None:
    # checkpoints go first, so that a half-deleted run is not continued from one of them; the file that marks the folder
    # as a run goes last
    order = {"checkpoints": 0, CONFIG: 2}
    inside = [] if is_empty(folder) else sorted(folder.iterdir(), key=lambda path: order.get(path.name, 1))
    if inside and overwrite:
        if not (folder / CONFIG).is_file():
            raise UserError(f"run {folder} was not overwritten: it has no {CONFIG}, so it is not a run")
        for path in inside:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    elif inside and not resume:
        raise UserError(
            f"run {folder} already exists; use --resume to continue it, --overwrite to replace it, "
            "or --set run.name=NAME to choose another name"
        )
    elif (folder / CONFIG).is_file():
        _refuse_changes(folder, config, complete)
    if not (folder / CONFIG).is_file():
        write_atomically(folder / CONFIG, config.encode())


def confirm_settings(world: World, program: str, config: str, opening: Opening) -> None:
    """Raise ``UserError`` in every process if one was started with another program, configuration or flag."""
    settings = {key: value for key, value in flat(parse_toml(config)).items() if key not in MAY_DIFFER}
    world.confirm(
        {"program": f"{program} {__version__}", **settings, **opening._asdict()},
        "start all processes with the same command",
    )


def run_of(config: Path) -> tuple[Path, str] | None:
    """The folder and name of the run whose configuration is this file; None if the file lies in no run."""
    folder = Path(os.path.abspath(config)).parent
    if config.name != CONFIG or not any((folder / name).exists() for name in ("checkpoints", SOURCES, "metrics.jsonl")):
        return None
    return folder.parent, folder.name


def claim_folder(folder: Path, settings: Mapping[str, Any], *, accept: bool | None = None) -> list[Any]:
    """Create ``folder`` for the output of ``settings``, or continue one with the same; they are kept in it as JSON.

    ``accept``: continue also if digests of files among the settings have changed, and record that (None: the program
    has no such option). Returns all changes that were accepted so far. Raises ``UserError`` if the folder holds
    something else, was begun with other settings, or cannot be written.
    """
    kept = folder / SETTINGS
    accepted: list[Any] = []
    try:
        if folder.exists() and (not folder.is_dir() or (not is_empty(folder) and not kept.is_file())):
            raise UserError(f"--out {folder} holds something else; choose a new folder")
        if kept.is_file():
            try:
                before = dict(parse_json(kept.read_text(encoding="utf-8", errors="replace")))
                accepted = list(before.pop("accepted", ()))
                changed = changes(before, json.loads(json.dumps(settings)))
            except (ValueError, TypeError):
                before, changed = {}, ["they cannot be read"]
            only_files = bool(before) and files_changed(before, settings)
            if changed and not (only_files and accept):
                also = f", or continue with {ACCEPT}" if only_files and accept is not None else ""
                raise UserError(
                    f"--out {folder} holds pieces made with other settings ({'; '.join(changed)}); "
                    f"choose a new folder{also}"
                )
            if not changed:
                return accepted
            accepted.append(changed)
        else:
            folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**settings, **({"accepted": accepted} if accepted else {})}, indent=1) + "\n"
        write_atomically(kept, text.encode())
    except OSError as error:
        raise UserError(f"--out {folder} cannot be written ({error.strerror})") from None
    return accepted


def check_names(names: Iterable[str], folder: Path, what: str) -> None:
    """Raise ``UserError`` if two names would be one file in ``folder``, since its file system ignores their case."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(name.casefold(), name)
        if other != name and ignores_case(folder):
            raise UserError(
                f"{what} {other!r} and {name!r} would share files in {folder}, whose file system ignores upper and "
                "lower case; rename one"
            )


@contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Hold a claimed folder, so that only this process writes into it. Raises ``UserError`` if another one does."""
    with ExitStack() as held:
        try:
            held.enter_context(hold(folder))
        except BlockingIOError:
            raise UserError(
                f"--out {folder}: another process is working in it; wait for that process, or stop it"
            ) from None
        yield


def text_changes(before: str, now: str) -> str:
    """How two JSON texts of settings differ."""
    try:
        return "; ".join(changes(parse_json(before), parse_json(now)))
    except (ValueError, AttributeError):
        return "they cannot be read"


MAY_CHANGE = (
    "run.folder",
    "run.name",
    "render.workers",
    "render.deadline",
    "reward.deadline",
    "rewards.deadline",
    "track.trace_every",
    "track.also",
)  # these do not change the result
MAY_DIFFER = tuple(key for key in MAY_CHANGE if key != "run.name")  # between processes


def _refuse_changes(folder: Path, config: str, complete: Callable[[Path], str] | None) -> None:
    """Raise ``UserError`` if a run would be continued with another configuration."""
    try:
        before = parse_toml((folder / CONFIG).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError(f"run {folder}: its {CONFIG} cannot be read ({error})") from None
    before = before if complete is None else parse_toml(complete(folder / CONFIG))
    changed = changes(before, parse_toml(config), but=MAY_CHANGE)
    if changed:
        raise UserError(
            f"run {folder} cannot be continued with another configuration: {'; '.join(changed)}; "
            f"use --config {folder / CONFIG}, or another run.name"
        )


def changes(before: Mapping[str, Any], now: Mapping[str, Any], *, but: Collection[str] = ()) -> list[str]:
    """How nested settings differ: one clause per dotted key, except those in ``but``, without numbers of tables."""
    old, new = flat(before), flat(now)
    return [
        f"{key} was {old.get(key)!r} and is {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and re.sub(r"\.\d+\.", ".", key) not in but
    ]


def flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one mapping from dotted keys."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):  # [[tables]]
            value = {str(number): item for number, item in enumerate(value)}
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found
