"""docs/configuration.md, made from the fields of the two schemas and the configurations of the paper that ship."""

import dataclasses
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any, get_origin, get_type_hints

from smart.config.reading import allowed_range, load
from smart.config.schema import Config, PretrainConfig
from smart.config.toml import as_toml, to_dict

INTRODUCTION = """# The configuration

<!-- made by `smart config --markdown` from smart/config/schema.py: change it there -->

A run is described by a TOML file, `smart grpo --config FILE`; `--set SECTION.KEY=VALUE` changes one key. Every key has
a default, so a file names only what it changes. An unknown key, or a value of the wrong type or size, ends the program
before any work. Nothing in a configuration is ever executed.

`smart config FILE` prints all keys of a file, with a comment on each that differs from its default; `--changed` prints
only these:

```sh
.venv/bin/python -m smart.config quickstart.toml --changed
```

Defaults are those of the package. "Paper" is the section of the SMART paper that has the value, "code" the authors'
public code, "TRL" the library that they used; a value follows where the paper's differs from the default. `paper.toml`
and `base.toml` set all of the paper's. [paper.md](paper.md) compares everything else.
"""
NAMES = {int: "integer", float: "number", str: "string", bool: "true or false", dict: "table", tuple: "list of strings"}
PAPER = {Config: "paper.toml", PretrainConfig: "base.toml"}


def markdown() -> str:
    """The whole page."""
    parts = [INTRODUCTION, "## Tuning: `smart grpo`", *_sections(Config)]
    tuning, pretraining = get_type_hints(Config), get_type_hints(PretrainConfig)
    again = [name for name, kind in pretraining.items() if tuning.get(name) is kind]
    parts += [
        "## Pretraining: `smart pretrain`",
        f"{', '.join(f'`[{name}]`' for name in again)}: the same keys as above. `model.base` is empty by default.",
        *_sections(PretrainConfig, but=again),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _names(schema: Any) -> list[str]:
    return [item.name for item in dataclasses.fields(schema)]


def _sections(schema: Any, but: Collection[str] = ()) -> Iterator[str]:
    paper, hints = to_dict(load(PAPER[schema], schema=schema)), get_type_hints(schema)
    for item in dataclasses.fields(schema):
        if get_origin(hints[item.name]) is tuple:
            yield f"### `[[{item.name}]]`\n\n{item.metadata['meaning']}"
        elif item.name not in but:
            about = re.sub("``(.*?)``", r"`\1`", hints[item.name].__doc__ or "")
            yield from _section(item.name, hints[item.name], getattr(schema(), item.name), paper[item.name], about)


def _section(name: str, kind: Any, default: Any, paper: Mapping[str, Any], about: str) -> Iterator[str]:
    """A heading, what the section is about, a table of its keys, and then the sections inside it."""
    hints = get_type_hints(kind)
    tables = [item for item in dataclasses.fields(kind) if dataclasses.is_dataclass(hints[item.name])]
    rows = [
        _row(f"{name}.{item.name}", item.metadata, hints[item.name], getattr(default, item.name), paper[item.name])
        for item in dataclasses.fields(kind)
        if item not in tables
    ]
    head = "| key | type | default | unit | meaning | paper |\n|---|---|---|---|---|---|"
    yield "\n\n".join([f"### `[{name}]`", about, "\n".join([head, *rows])])
    for item in tables:
        keys = ", ".join(f"`{name}.{item.name}.{key}`" for key in _names(hints[item.name]))
        changed = [
            f"`{key}` is `{as_toml(value)}`"
            for key, value in to_dict(getattr(default, item.name)).items()
            if value != to_dict(hints[item.name]())[key]
        ]
        about = f"{item.metadata['meaning']}\n\nKeys: {keys}, as in `[reward]`; by default {', '.join(changed)}."
        yield f"### `[{name}.{item.name}]`\n\n{about}"


def _row(name: str, about: Mapping[str, Any], kind: Any, default: Any, paper: Any) -> str:
    """A line of a table; the paper's value is shown where it differs from the default and the paper has the key."""
    source = about["paper"]
    if source and paper != default:
        source += f": `{as_toml(paper)}`"
    cells = (f"`{name}`", _type(kind, about), f"`{as_toml(default)}`", about["unit"], about["meaning"], source)
    return f"| {' | '.join(cells)} |"


def _type(kind: Any, about: Mapping[str, Any]) -> str:
    """A key's type and allowed values."""
    if "choices" in about:
        choices = ", ".join(f"`{choice}`" for choice in about["choices"])
        return choices if kind is str else f"list of {choices}"
    if "words" in about:
        return f"number, {', '.join(f'`{word}`' for word in about['words'])}"
    name = NAMES[get_origin(kind) or kind]
    limits = {"low", "above", "high"} & set(about)
    return f"{name}, {allowed_range(about).removeprefix('a value ')}" if limits else name
