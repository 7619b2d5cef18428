"""A reward's class in a Python file that the user names on the command line, as FILE.py:CLASS.

The file is executed, so nothing that comes from elsewhere may name one: a configuration holds only the name of the file
and of the class, which ``load_reward`` knows once the command line has named the file itself.
"""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from smart import UserError, brief
from smart.files import sha256

_named: dict[str, Path] = {}  # kind -> the file that the command line named


def name_file(text: str) -> str:
    """Let ``load_reward`` find the class of FILE.py:CLASS; returns its kind, which is the same without folders."""
    file, _, name = text.rpartition(":")
    path = Path(file).expanduser()
    if path.suffix != ".py" or not name.isidentifier():
        raise UserError(f"--reward {text!r}: expected FILE.py:CLASS, for example my.py:MyReward")
    if not path.is_file():
        raise UserError(f"--reward {text!r}: there is no file {path}")
    kind = f"{path.name}:{name}"
    _named[kind] = path
    return kind


def is_named(kind: str) -> bool:
    """Whether the command line named the file of this kind."""
    return kind in _named


def named_files() -> list[str]:
    """The words of a command line that name the same files again."""
    return [word for kind, path in _named.items() for word in ("--reward", f"{path}:{kind.rpartition(':')[2]}")]


def provenance(kind: str) -> str:
    """Which file a kind comes from, for the log."""
    return f"{kind}, SHA-256 {sha256(_named[kind])}"


def load_class(kind: str) -> Callable[..., Any]:
    """Execute the file and return the class. Raises ``UserError`` if that fails or if it is no ``Reward``."""
    from smart.reward.reward import Reward

    path, name = _named[kind], kind.rpartition(":")[2]
    module_name = f"smart_reward_{path.stem}"
    try:
        spec = importlib.util.spec_from_file_location(module_name, path)
        assert spec is not None and spec.loader is not None
        module = sys.modules[module_name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except Exception as error:  # the file may raise anything
        raise UserError(f"--reward {path}:{name}: the file could not be imported ({brief(error)})") from error
    found = getattr(module, name, None)
    if not (isinstance(found, type) and issubclass(found, Reward)):
        have = [key for key, value in vars(module).items() if isinstance(value, type) and issubclass(value, Reward)]
        own = ", ".join(key for key in have if getattr(module, key).__module__ == module_name) or "none"
        raise UserError(
            f"--reward {path}:{name}: {name} is no subclass of smart.reward.Reward; those of the file: {own}"
        )
    return found
