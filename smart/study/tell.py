"""Messages to whoever runs the server."""

import contextlib

import click


def tell(text: str) -> None:
    """Print a line on stderr. A log that cannot be written, on a full disk for example, must not fail a request."""
    with contextlib.suppress(OSError, ValueError):
        click.echo(text, err=True)
