"""Stub."""

import click


@click.command()
def main() -> None:
    """Stub."""
