"""Tune symbolic music models with reinforcement learning from audio.

       prompts       tokens (N, P)     time signature and tempo; each prompt repeated G times
    -> sampler       tokens (N, P+T)   the policy writes up to T more; it keeps their log-probabilities (N, T)
    -> render        audio (N, 2, S)   tokens become notes, and a soundfont plays them
    -> reward        rewards (N,)      each clip is rated
    -> advantages    (N,)              each completion is compared with the others for its prompt
    -> loss          one number        with the log-probabilities (N, T) of the policy and of the frozen base
    -> optimizer     new weights       the policy takes a step, then writes the next batch

N = prompts x G; P, T: tokens of a prompt, of a completion; S: samples of a clip. ``smart.grpo`` is that loop.
"""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from smart.cores import bound_spin
from smart.process import end_imports_at_interrupt, exhausted, open_streams

# here, since every program imports this package first
open_streams()
end_imports_at_interrupt()
bound_spin()

try:
    import click
except ModuleNotFoundError:  # installed without its dependencies
    from smart.packages import lacking

    print(f"Error: smart was installed without packages that it needs: {lacking()}", file=sys.stderr)
    sys.exit(2)

__version__ = "0.2.0"


class UserError(click.ClickException, ValueError):
    """A mistake that the user can fix: one line that names the thing, what was expected and what to do.

    As a ``ClickException`` it ends a program with that line and exit code 2, without a traceback; code that uses
    the package as a library can catch it as a ``ValueError``. One that is raised because the system ran into a limit
    (memory, open files, disk) names the limit, and ends a program with exit code 1: it is not the user's mistake.
    """

    exit_code = 2

    def __init__(self, message: str) -> None:
        if limit := exhausted(sys.exc_info()[1]):
            message = message if message.startswith(limit) else f"{limit}: {message}"
            self.exit_code = 1  # type: ignore[misc]  # click reads it from the instance
        super().__init__(message)


class Failure(click.ClickException, RuntimeError):
    """A failure that is not the user's mistake: it ends a program with one line and exit code 1; saved work is kept."""


class FilePath(click.Path):
    """A path on a command line; a ``~`` at its beginning is the home directory, also where no shell expands it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(path_type=Path, **options)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(os.path.expanduser(value), param, ctx)


def brief(error: BaseException) -> str:
    """An exception as one line of limited length."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}{'...' if len(text) > 160 else ''}"


def require(*finders: Callable[[], Any]) -> list[Any]:
    """Call each of ``finders`` and return their results, or raise one ``UserError`` that lists everything missing."""
    found, problems = [], []
    for finder in finders:
        try:
            found.append(finder())
        except UserError as error:
            if error.exit_code == 1:  # a limit of the system, into which the others may run, too
                raise
            problems.append(error.message)
    problems = list(dict.fromkeys(problems))  # several may report the same thing
    if len(problems) > 1:
        raise UserError("\n- ".join([f"{len(problems)} things are missing:", *problems]))
    if problems:
        raise UserError(problems[0])
    return found


APART = ("tinysoundfont", "audiobox_aesthetics")  # what they depend on is not needed, and is hard to install


def missing(what: str, error: ModuleNotFoundError) -> UserError:
    """The error of ``what``, a program, for a package that is not installed. Raises ``error`` if it is a bug."""
    package = (error.name or "").partition(".")[0]
    if package in ("", "smart"):
        raise error
    how = f"pip install {'--no-deps ' if package in APART else ''}{package}"
    return UserError(f"{what} needs the package {package}, which is missing: {how}")


class Renamed(click.Option):
    """An option whose ``old`` names still work, but are not shown."""

    def __init__(self, names: Sequence[str], *, old: Sequence[str], **more: Any) -> None:
        super().__init__(names, **more)
        self._old = old

    def add_to_parser(self, parser: Any, ctx: click.Context) -> None:
        shown, self.opts = self.opts, [*self.opts, *self._old]
        super().add_to_parser(parser, ctx)
        self.opts = shown


class Group(click.Group):
    """A group of commands in their order, whose modules are imported late: a package that one lacks is named."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:
            raise missing(str(ctx.invoked_subcommand), error) from error
