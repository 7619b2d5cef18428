"""What a run is made of: digests of its base, soundfont, corpus and the files of its rewards.

They are kept in the run's folder and compared before it is continued, so that it never continues with something else
under the same name.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from smart import UserError
from smart.files import parse_json, sha256, write_atomically

SOURCES = "sources.json"
ACCEPT = "--accept-changes"


def digest(path: Path) -> str:
    """The SHA-256 of a file, or of the names and the SHA-256 of all files in a folder."""
    if not path.is_dir():
        return sha256(path)
    found = hashlib.sha256()
    for file in sorted(each for each in path.rglob("*") if each.is_file()):
        found.update(f"{file.relative_to(path)}\0{sha256(file)}\n".encode("utf-8", "surrogateescape"))
    return found.hexdigest()


def digests(paths: Mapping[str, Path]) -> dict[str, str]:
    """The ``digest`` of each path. Raises ``UserError`` for one that cannot be read."""
    found = {}
    for name, path in paths.items():
        try:
            found[name] = digest(path)
        except OSError as error:
            raise UserError(f"{name} = {path} cannot be read ({error.strerror})") from None
    return found


def model_digests(folder: Path) -> dict[str, str]:
    """The digests of a model's files, by a name for each; all of them change what it writes."""
    files = {"sha256": "model.safetensors", "config_sha256": "config.json", "tokenizer_sha256": "tokenizer.json"}
    return digests({name: folder / file for name, file in files.items()})


def files_in(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Path]:
    """The files and folders that the texts in nested settings name, by dotted key."""
    return {f"{prefix}{key}": path for key, path in _paths(settings, "")}


def _paths(value: Any, name: str) -> Iterator[tuple[str, Path]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _paths(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from _paths(inner, f"{name}.{number}")
    elif isinstance(value, str) and value and "\0" not in value:
        try:
            path = Path(value).expanduser()
            if path.exists():
                yield name, path
        except (OSError, RuntimeError):  # too long for a name, or a home that is unknown
            return


def check_sources(folder: Path, sources: Mapping[str, str], *, accept: bool, step: int) -> list[str]:
    """Compare what a run is made of now with what it was made of, which ``folder`` keeps; returns lines for its log.

    ``sources``: name -> digest, or another text that identifies it. ``step`` is where the run continues. With
    ``accept`` changes are recorded and no mistake. Raises ``UserError`` that names them otherwise.
    """
    kept = folder / SOURCES
    if not kept.exists():  # a new run, or one of an older version
        write_atomically(kept, _text(sources, []))
        return [f"what the run is made of was not recorded before iteration {step}; now it is"] if step else []
    try:
        record = parse_json(kept.read_text(encoding="utf-8"))
        before, accepted = dict(record["sources"]), list(record["accepted"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"run {folder}: {SOURCES} cannot be read ({type(error).__name__}); delete it if the run's base, "
            "soundfont, corpus and rewards are surely still the same"
        ) from None
    changed = differences(before, sources)
    if not changed:
        return []
    if not accept:
        raise UserError(
            f"run {folder} was begun with other files: {'; '.join(changed)}; put them back, or continue with {ACCEPT}"
        )
    accepted.append({"step": step, "before": before, "now": dict(sources)})
    write_atomically(kept, _text(sources, accepted))
    return [f"accepted after step {step} ({ACCEPT}): {'; '.join(changed)}"]


def _text(sources: Mapping[str, str], accepted: list[Any]) -> bytes:
    return json.dumps({"sources": dict(sources), "accepted": accepted}, indent=1).encode()


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """How two sets of sources differ: one clause for each."""
    clauses = []
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if old == new:
            continue
        if old is None or new is None:
            clauses.append(f"{name} is {'new' if old is None else 'missing'}")
        elif _is_digest(old) and _is_digest(new):
            clauses.append(f"{name} has changed (SHA-256 was {old[:12]}... and is {new[:12]}...)")
        else:
            clauses.append(f"{name} was {old!r} and is {new!r}")
    return clauses


def files_changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether nested settings differ in nothing but digests of files."""
    if before.keys() != now.keys():
        return False
    for key, old in before.items():
        new = now[key]
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            if not files_changed(old, new):
                return False
        elif old != new and not (_is_digest(old) and _is_digest(new)):
            return False
    return True


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None
