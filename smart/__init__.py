"""Tune symbolic music models with reinforcement learning from audio."""

import click


class UserError(click.ClickException, ValueError):
    """A mistake that the user can mend: one line that names the thing, what was expected and what to do.

    As a ``ClickException`` it ends any of the programs with that line and exit code 2, without a traceback;
    as a ``ValueError`` it can be caught by whoever uses the package as a library.
    """

    exit_code = 2
