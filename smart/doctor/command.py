"""The command line of ``smart doctor``; the checks of a GPU are imported when they are asked for."""

import shlex
import sys
from pathlib import Path

import click

from smart.config import Config, load
from smart.doctor.machine import MISSING, NOTE, examine


@click.command()
@click.option(
    "--config",
    "path",
    help="Config file (TOML) of the run to check, or the name of a shipped one.  "
    "[default: quickstart.toml; with --gpu: paper.toml]",
)
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="SECTION.KEY=VALUE",
    help="Set one key of the configuration to another value (repeatable).",
)
@click.option(
    "--gpu",
    is_flag=True,
    help="Compare what the GPU computes with the CPU, and measure time and memory at the sizes of the configuration; "
    "takes about a minute and needs no network.",
)
@click.option(
    "--study",
    type=click.Path(path_type=Path),
    help="Folder of a listening study whose consent text is checked (default: every study in the current folder).",
)
def main(path: str | None, overrides: tuple[str, ...], gpu: bool, study: Path | None) -> None:
    """Check whether this machine can run a configuration, and list how to fix what is missing.

    The exit code is 1 if something is missing, or if the GPU (--gpu) differs from the CPU by more than rounding, and 2
    if --gpu finds no GPU.
    """
    if gpu:
        _check_gpu(path or "paper.toml", overrides)
    else:
        _check_machine(path or "quickstart.toml", overrides, study)


def _check_gpu(path: str, overrides: tuple[str, ...]) -> None:
    config: Config = load(path, overrides)
    from smart.model import pick_device

    device = pick_device("cuda")
    from smart.doctor.gpu import run

    if not run(config, device):
        raise SystemExit(1)


def _check_machine(path: str, overrides: tuple[str, ...], study: Path | None) -> None:
    findings = examine(path, overrides, study)
    width = max(map(len, findings))
    for name, finding in findings.items():
        click.echo(f"{finding.state:7}  {name:{width}}  {finding.found}")
        if finding.remedy:
            click.echo(f"{'':7}  {'':{width}}  -> {finding.remedy}")
    missing = [name for name, finding in findings.items() if finding.state == MISSING]
    if missing:
        click.echo(f"\nnot ready: {', '.join(missing)}")
        raise SystemExit(1)
    words = [sys.executable, "-m", "smart.grpo", "--config", path]
    words += [word for override in overrides for word in ("--set", override)]
    if findings["run"].state == NOTE:  # it exists: without --resume it would be refused
        words.append("--resume")
    click.echo(f"\nready: {shlex.join(words)}")
