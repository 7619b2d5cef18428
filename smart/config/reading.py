"""Turn a TOML file and overrides into a frozen dataclass; errors name the wrong key."""

import dataclasses
import difflib
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from smart import UserError
from smart.config.schema import NO_REWARD, Config
from smart.config.toml import are_tables, dumps
from smart.files import parse_toml

SHIPPED = Path(__file__).parent.parent / "configs"

Schema = TypeVar("Schema")


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
        if not isinstance(table, dict) and not are_tables(table):
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
        raise wrong(allowed_range(allowed))
    if "above" in allowed and not value > allowed["above"]:
        raise wrong(allowed_range(allowed))
    if "file_name" in allowed and (not value or value == ".." or value != Path(value).name or not value.isprintable()):
        raise wrong("a plain folder name, without a path")
    return value


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer of hundreds of digits
        return False


def allowed_range(allowed: Any) -> str:
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
