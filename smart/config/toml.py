"""Write a configuration as TOML, whole or as it differs from the defaults."""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

NOT_SET = object()


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as nested dictionaries of plain values, as in a TOML file."""
    return dataclasses.asdict(config)


def dumps(config: Any) -> str:
    """The configuration as TOML; ``load`` reads it back to an equal object."""
    return _write(to_dict(config), None, changed=False)


def compared(config: Any, *, changed: bool = False) -> str:
    """The same, with a comment on each key that differs from its default; ``changed``: only these keys."""
    defaults = to_dict(type(config)())
    for name, value in vars(config).items():
        if isinstance(value, tuple):  # of tables, each with the defaults of its kind
            defaults[name] = tuple(to_dict(type(one)()) for one in value)
    return _write(to_dict(config), defaults, changed=changed)


def _write(table: dict[str, Any], defaults: Mapping[str, Any] | None, *, changed: bool) -> str:
    lines: list[str] = []
    _write_table(table, defaults, "", lines, changed=changed)
    return "\n".join(lines).strip() + "\n"


def _write_table(
    table: Mapping[str, Any], defaults: Mapping[str, Any] | None, prefix: str, lines: list[str], *, changed: bool
) -> None:
    for key, value in table.items():
        if isinstance(value, dict) or are_tables(value):
            continue
        default = value if defaults is None else defaults.get(key, NOT_SET)
        if value != default:
            was = "not set by default" if default is NOT_SET else f"default: {as_toml(default)}"
            lines.append(f"{_key(key)} = {as_toml(value)}  # {was}")
        elif not changed:
            lines.append(f"{_key(key)} = {as_toml(value)}")
    for key, value in table.items():
        name = f"{prefix}{_key(key)}"
        for number, one in enumerate(value if are_tables(value) else [value] if isinstance(value, dict) else []):
            known = None if defaults is None else defaults.get(key, {})
            inside: list[str] = []
            _write_table(
                one, known[number] if known and are_tables(value) else known, f"{name}.", inside, changed=changed
            )
            if inside or are_tables(value) or not changed:
                lines += ["", f"[[{name}]]" if are_tables(value) else f"[{name}]", *inside]


def are_tables(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(item, dict) for item in value)


def _key(key: str) -> str:
    bare = key and all(c.isascii() and (c.isalnum() or c in "-_") for c in key)
    return key if bare else as_toml(key)


def as_toml(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(as_toml(item) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_key(key)} = {as_toml(item)}' for key, item in value.items())}}}"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # inf, -inf and nan are spelled the same in TOML
    if isinstance(value, str):
        # JSON's escapes are valid in TOML, which also requires DEL to be escaped
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return json.dumps(value)
