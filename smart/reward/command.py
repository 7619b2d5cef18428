"""The command line of ``smart calibrate``; what it does is imported when it is called."""

from typing import Any

import click

from smart import FilePath

SOURCE = "clips and ratings supplied by the user of the calibration program"


@click.command(context_settings={"show_default": True})
@click.option("--audio", required=True, type=FilePath(), help="Folder with the audio files that the table names.")
@click.option("--scores", type=FilePath(), help="CSV with one rated clip per row.")
@click.option(
    "--pairs",
    type=FilePath(),
    help="Choices between two clips, instead of --scores: a CSV with the columns better and worse, the choices that a "
    "demo page saves (CSV or JSON), or the export of a study.",
)
@click.option(
    "--out",
    default="ce_proxy.json",
    type=FilePath(dir_okay=False),
    help="JSON file to write the coefficients to.",
)
@click.option("--overwrite", is_flag=True, help="Replace the file --out if it exists.")
@click.option("--clip-column", default="clip", help="Column with the file names, relative to --audio.")
@click.option("--score-column", default="CE", help="Column with ratings from 1 to 10; CE also finds content_enjoyment.")
@click.option(
    "--group-column",
    default=None,
    show_default="sample, if there is such a column",
    help="Column with the groups; clips of one group are held out together.",
)
@click.option(
    "--ridge",
    default=None,
    show_default="0.5, or 0.01 with --pairs",
    type=click.FloatRange(min=0),
    help="Strength of the ridge penalty on the coefficients.",
)
@click.option("--folds", default=4, type=click.IntRange(min=2), help="Number of folds of the cross-validation.")
@click.option("--repeats", default=50, type=click.IntRange(min=1), help="How often the cross-validation is repeated.")
@click.option("--seed", default=0, type=click.IntRange(min=0), help="Seed with which clips are assigned to folds.")
@click.option("--source", default=SOURCE, help="Where the clips and ratings come from; stored in --out.")
def main(**given: Any) -> None:
    """Fit the ce_proxy reward to clips that you rated or compared, and write its coefficients to a file.

    To tune with them: --set reward.kind=ce_proxy --set reward.options.coefficients=OUT
    """
    from smart.reward.calibrate import calibrate

    calibrate(**given)
