"""The command line of ``smart generate``."""

from __future__ import annotations

from typing import Any

import click

from smart import FilePath, UserError
from smart.generate.pieces import FILL_VERSIONS, generate
from smart.generate.writer import ROWS
from smart.render import RenderError
from smart.run import backend_option, in_one_line, soundfont_option


@click.command()
@click.option(
    "--model",
    default="piano",
    show_default=True,
    help="Base model (shipped name, folder or hub id) or folder of a run.",
)
@click.option(
    "--out",
    type=FilePath(),
    required=True,
    help="Folder for the pieces; an unfinished one is continued.",
)
@click.option(
    "-n",
    "--count",
    default=4,
    show_default=True,
    type=click.IntRange(min=1),
    help="Number of pieces or continuations to write.",
)
@click.option(
    "--tokens", default=512, show_default=True, type=click.IntRange(min=1), help="Maximum new tokens per piece."
)
@click.option("--tempo", default=120.0, show_default=True, help="Tempo of new pieces in quarter notes per minute.")
@click.option("--time-signature", default="4/4", show_default=True, help="First time signature of new pieces.")
@click.option("--continue", "song", type=FilePath(), help="MIDI file to continue after its last note.")
@click.option("--fill", type=FilePath(), help="MIDI file of which the --bars are written anew.")
@click.option(
    "--bars",
    default="8",
    show_default=True,
    help="With --continue: how many bars at the end of the MIDI file to use as context. With --fill: the bars to write "
    "anew, such as 5-8, counted from 1.",
)
@click.option(
    "--whole-song",
    is_flag=True,
    help="With --continue: NNNN-joined.wav begins with the song's first bar, not with the --bars last ones. "
    "NNNN-joined.mid has the whole song in either case.",
)
@click.option(
    "--seed",
    default=1,
    show_default=True,
    type=click.IntRange(0, 2**31 - 1),
    help="Seed of the sampling: the same one gives the same pieces.",
)
@click.option(
    "--temperature",
    default=1.0,
    show_default=True,
    type=click.FloatRange(0, 100, min_open=True),
    help="Temperature of the sampling: below 1 it prefers likely tokens, above 1 it draws unlikely ones more often.",
)
@click.option(
    "--top-k",
    default=0,
    show_default=True,
    type=click.IntRange(min=0),
    help="Sample from the K most likely tokens only (0: from all).",
)
@click.option(
    "--top-p",
    default=0.95,
    show_default=True,
    type=click.FloatRange(0, 1, min_open=True),
    help="Sample from the most likely tokens that together have this probability.",
)
@click.option("--playable", is_flag=True, help="Never sample a token that cannot be played.")
@click.option(
    "--best-of",
    default=1,
    show_default=True,
    type=click.IntRange(1, ROWS),
    help="Write this many versions of each piece and keep the best (--fill: the one that joins best; 16 by default).",
)
@click.option(
    "--reward", "kind", default="ce_proxy", show_default=True, help="Reward that picks the best version (--best-of)."
)
@click.option(
    "--reward-option", "options", multiple=True, metavar="KEY=VALUE", help="Setting of the reward (repeatable)."
)
@soundfont_option
@click.option(
    "--sample-rate",
    default=44100,
    show_default=True,
    type=click.IntRange(8000, 192_000),
    help="Sample rate of the WAV files in Hz.",
)
@click.option(
    "--seconds",
    default=600.0,
    show_default=True,
    type=click.FloatRange(0, 3600, min_open=True),
    help="Maximum length of a WAV file in seconds.",
)
@backend_option
@click.option(
    "--device",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "cpu", "cuda", "mps"]),
    help="Where models and rewards run; auto: on CUDA if available; mps: on an Apple GPU (experimental).",
)
@click.pass_context
def main(context: click.Context, **given: Any) -> None:
    """Write music with a base or a tuned run, as MIDI and WAV.

    If it was interrupted, run the same command again to continue.
    """
    chosen = {name for name in given if context.get_parameter_source(name) != click.core.ParameterSource.DEFAULT}
    if {"song", "fill"} <= chosen:
        raise UserError("--continue and --fill cannot be combined; choose one")
    option = "--fill" if given["fill"] else "--continue" if given["song"] else ""
    if given["whole_song"] and not given["song"]:
        raise UserError("--whole-song needs --continue FILE, the song to continue")
    for name in ("tempo", "time_signature"):
        if option and name in chosen:
            what = "a continuation keeps" if given["song"] else "the new bars keep"
            raise UserError(f"--{name.replace('_', '-')} and {option} cannot be combined: {what} the song's own")
    if given["fill"]:
        if "bars" not in chosen:
            raise UserError("--fill needs --bars, the bars to write anew, such as --bars 5-8")
        if chosen & {"kind", "options"}:
            raise UserError("--reward and --fill cannot be combined: --fill keeps the version that joins best")
        if "best_of" not in chosen:
            given["best_of"] = FILL_VERSIONS
    else:
        if not given["bars"].isdecimal() or not 1 <= int(given["bars"]) < 10**9:
            raise UserError(
                f"--bars {given['bars']}: expected a number of bars from 1, or --fill with bars such as 5-8"
            )
        given["bars"] = int(given["bars"])
    with in_one_line("a piece", "run the same command again to continue", RenderError):
        generate(**given)
