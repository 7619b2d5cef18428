"""Tune symbolic music models with reinforcement learning from audio."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import click

__version__ = "0.1.0"


class UserError(click.ClickException, ValueError):
    """A mistake that the user can fix: one line that names the thing, what was expected and what to do.

    As a ``ClickException`` it ends a program with that line and exit code 2, without a traceback; code that uses
    the package as a library can catch it as a ``ValueError``.
    """

    exit_code = 2


class Failure(click.ClickException, RuntimeError):
    """A failure that is not the user's mistake: it ends a program with one line and exit code 1; saved work is kept."""


def require(*finders: Callable[[], Any]) -> list[Any]:
    """Call each of ``finders`` and return their results, or raise one ``UserError`` that lists everything missing."""
    found, problems = [], []
    for finder in finders:
        try:
            found.append(finder())
        except UserError as error:
            problems.append(error.message)
    problems = list(dict.fromkeys(problems))  # several may report the same thing
    if len(problems) > 1:
        raise UserError("\n- ".join([f"{len(problems)} things are missing:", *problems]))
    if problems:
        raise UserError(problems[0])
    return found


class LazyGroup(click.Group):
    """A group of commands, each in a separate module that is imported only when the command is called.

    ``programs`` maps a command's name to its help. Its module is the one in ``modules``, else ``package.NAME``.
    """

    def __init__(
        self,
        *args: Any,
        programs: Mapping[str, str],
        package: str,
        modules: Mapping[str, str] | None = None,
        **keys: Any,
    ) -> None:
        super().__init__(*args, **keys)
        self.programs, self.package, self.modules = programs, package, modules or {}

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.programs)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.programs:
            return None
        module = self.modules.get(cmd_name, f"{self.package}.{cmd_name}")
        try:
            command: click.Command = import_module(module).main
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if package in ("", "smart"):
                raise
            raise UserError(
                f"{cmd_name} needs the package {package}, which is missing: pip install {package}"
            ) from error
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Programs"):  # without importing any of them
            formatter.write_dl(list(self.programs.items()))
