"""The command line of ``smart naturalness``; what a command does is imported when it is called."""

from pathlib import Path
from typing import Any

import click

from smart import Group, UserError


class Part(click.ParamType):
    """A part of all pieces, such as 1/2."""

    name = "K/N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        which, separator, parts = str(value).partition("/")
        if separator and which.isdecimal() and parts.isdecimal() and 1 <= int(which) <= int(parts):
            return int(which), int(parts)
        raise click.BadParameter(f"expected K/N with K from 1 to N, such as 1/2, got {value!r}", ctx, param)


@click.group(cls=Group)
def main() -> None:
    """Train an ear, a reward that tells piano music from its corruptions, on MIDI files of yours, or test one."""


midi = click.option(
    "--midi", "folders", multiple=True, required=True, type=click.Path(path_type=Path), metavar="DIR",
    help="Folder with MIDI files of real music, subfolders included; repeatable. "
    "A folder that is named twice is drawn from twice as often.",
)  # fmt: skip
soundfonts = click.option(
    "--soundfonts", multiple=True, default=("timgm",), show_default=True, metavar="NAME",
    help="Soundfont (a short name or a file) that plays the excerpts; repeatable: each excerpt draws one of them.",
)  # fmt: skip


@main.command(short_help="Train an ear and write it to one file.", context_settings={"show_default": True})
@midi
@soundfonts
@click.option("--out", required=True, type=click.Path(path_type=Path, dir_okay=False), help="File to write the ear to.")
@click.option(
    "--work", default=None, type=click.Path(path_type=Path), show_default="OUT.work, removed at the end",
    help="Folder for rendered excerpts and unfinished networks; the same command continues from it.",
)  # fmt: skip
@click.option(
    "--spectra",
    default="log",
    type=click.Choice(["log", "mel"]),
    help="Spectra that the ear hears: 88 semitones (log) or 128 mel bands (mel).",
)
@click.option(
    "--part", default="1/1", type=Part(),
    help="Use only this part of the pieces; two ears with 1/2 and 2/2 share none.",
)  # fmt: skip
@click.option("--excerpts", default=3000, type=click.IntRange(min=8), help="Number of excerpts to train on.")
@click.option(
    "--corruptions", default=4, type=click.IntRange(1, 12), help="Number of corruptions rendered for each excerpt."
)
@click.option("--held-out", default=120, type=click.IntRange(min=8), help="Number of excerpts of other pieces to test.")
@click.option("--members", default=2, type=click.IntRange(1, 8), help="Number of networks; the least rating counts.")
@click.option("--steps", default=1500, type=click.IntRange(min=1), help="Training steps of each network.")
@click.option("--batch", default=24, type=click.IntRange(min=2), help="Excerpts of a step, with their corruptions.")
@click.option(
    "--learning-rate",
    default=2e-3,
    type=click.FloatRange(0, 1, min_open=True),
    help="Largest step size of the optimiser in the training.",
)
@click.option(
    "--precision", default="bfloat16", type=click.Choice(["bfloat16", "float32"]),
    help="Number format of the training; bfloat16 is about twice as fast on processors that know it.",
)  # fmt: skip
@click.option("--seed", default=1, type=click.IntRange(min=0), help="Seed of excerpts, corruptions and networks.")
@click.option("--overwrite", is_flag=True, help="Replace --out if it exists.")
def train(**given: Any) -> None:
    """Train an ear on MIDI files of yours.

    It renders excerpts of ten seconds and corruptions of them, trains a few small networks to rate the real one higher,
    tests them on pieces that it held out, and writes one file. To tune with it: --set reward.kind=naturalness --set
    reward.options.model=OUT
    """
    from smart.reward.naturalness.program import train_ear

    if given["out"].exists() and not given["overwrite"]:
        raise UserError(f"{given['out']} already exists; choose another --out or add --overwrite")
    train_ear(**{key: value for key, value in given.items() if key != "overwrite"})


@main.command(short_help="Test an ear on MIDI files.", context_settings={"show_default": True})
@click.argument("ear", default="naturalness")
@midi
@soundfonts
@click.option("--excerpts", default=100, type=click.IntRange(min=2), help="Number of excerpts to test the ear on.")
@click.option("--kind", "kinds", multiple=True, help="Corruption to test; repeatable; without it: all of them.")
@click.option("--seed", default=1, type=click.IntRange(min=0), help="Seed of excerpts and corruptions.")
@click.option(
    "--out", default=None, type=click.Path(path_type=Path, dir_okay=False), help="JSON file to write the figures to."
)
def test(**given: Any) -> None:
    """Test EAR (naturalness, naturalness_mel or a file) on MIDI files: how often real excerpts beat corruptions."""
    from smart.reward.naturalness.program import test_ear

    test_ear(**given)
