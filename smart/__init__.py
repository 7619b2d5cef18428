"""Tune symbolic music models with reinforcement learning from audio."""

from collections.abc import Callable
from typing import Any

import click


class UserError(click.ClickException, ValueError):
    """A mistake that the user can mend: one line that names the thing, what was expected and what to do.

    As a ``ClickException`` it ends any of the programs with that line and exit code 2, without a traceback;
    as a ``ValueError`` it can be caught by whoever uses the package as a library.
    """

    exit_code = 2


class Failure(click.ClickException, RuntimeError):
    """Why work cannot go on, through no mistake of the user's: one line, exit code 1; what was saved is kept."""


def require(*finders: Callable[[], Any]) -> list[Any]:
    """What each of ``finders`` returns; or one ``UserError`` that lists everything that they could not find."""
    found, problems = [], []
    for finder in finders:
        try:
            found.append(finder())
        except UserError as error:
            problems.append(error.message)
    if len(problems) > 1:
        raise UserError("\n- ".join([f"{len(problems)} things are missing:", *problems]))
    if problems:
        raise UserError(problems[0])
    return found
