"""How far to optimise: reward, a judge that was not optimised, and diversity, each against KL to the base.

``smart evaluate frontier RUN... --out FOLDER`` draws fresh samples of each checkpoint of one run or several (several
values of beta), for the same held-out prompts and from the same seeds, and puts them on the axes of Gao, Schulman and
Hilton (2023), "Scaling laws for reward model overoptimization": d = sqrt(KL). Beside them stands best-of-n: from N
samples a prompt of the base, the expected reward of the best of n, at KL = log n - (n-1)/n. Their laws

    R(d) - R(0) = d (alpha - beta d)          best-of-n
    R(d) - R(0) = d (alpha - beta log d)      reinforcement learning

are fitted to each measure where there are enough points. KL is estimated on the samples: the mean over pieces of
log pi(piece) - log base(piece), in nats a piece, and the same divided by the tokens drawn. All intervals are 95%:
percentiles of a bootstrap over prompts, which are paired over checkpoints; those of diversity, which belongs to a set
of pieces and not to one, come from a jackknife that leaves out a tenth of the prompts at a time.

Axes: B prompts, N samples a prompt, K checkpoints (the first is the base), R resamples.
"""

import functools
import itertools
import json
import math
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from smart import UserError, checkpoint, plots, require, track
from smart.compare import BLOCK, System, find_system
from smart.config import Config, load, to_dict
from smart.evaluate.laws import (
    Fit,
    Floats,
    Rows,
    best_of_n,
    best_of_n_kl,
    bootstrap,
    fit_law,
    interval,
    mean,
    order_weights,
    ratio,
    resample,
)
from smart.evaluate.points import (
    BEST_OF_N,
    Drawn,
    Point,
    Setting,
    average,
    base_logprobs,
    baseline,
    draw,
    varied,
    weigh,
)
from smart.files import sha256, write_atomically
from smart.guard import collapsed
from smart.model import load_base, pick_device
from smart.render import RenderError
from smart.reward import Reward, load_reward
from smart.soundfonts import check_soundfont, find_soundfont

__all__ = [
    "BEST_OF_N", "RULE", "Drawn", "Fit", "Point", "Setting", "average", "base_logprobs", "baseline", "best_of_n",
    "best_of_n_kl", "draw", "evenly", "fit_all", "fit_law", "interval", "keep", "main", "mean", "order_weights",
    "ratio", "report", "resample", "varied", "weigh",
]  # fmt: skip

RULE = (
    "Of the checkpoints that have not collapsed, those that the held-out judge rates highest, or as high as can be "
    "told (the paired 95% interval of the difference reaches 0); of these the one with the highest reward. Where every "
    "checkpoint has collapsed, the base. Without a judge, by reward alone."
)


def keep(rewards: Floats, judge: Floats, collapsed: Sequence[str | None], rows: Rows) -> int:
    """Which of K checkpoints to keep by ``RULE``; 0 is the base. ``rewards`` and ``judge`` are (K, B)."""
    sound = [place for place in range(1, len(rewards)) if not collapsed[place]]
    if not sound:
        return 0
    rated, wanted = np.nanmean(rewards, axis=1), judge if np.isfinite(judge).any() else rewards
    best = max(sound, key=lambda place: float(np.nanmean(wanted[place])))
    level = [place for place in sound if not mean(wanted[place] - wanted[best], rows).high < 0]
    return max(level, key=lambda place: float(rated[place]))


def columns(point: Point, collapse: str | None, kept: bool) -> dict[str, Any]:
    """A point as a row of the table; what is not known is None."""
    numbers = {
        f"{name}{end}": value if math.isfinite(value) else None
        for name, estimate in point.estimates.items()
        for end, value in zip(("", "_low", "_high"), estimate[:3], strict=True)
    }
    return {
        "series": point.series,
        "step": point.step,
        "prompts": len(point.by_prompt["reward"]),
        "pieces": point.pieces,
        "failed": point.failed,
        **numbers,
        "collapsed": collapse,
        "keep": kept,
    }


def fit_all(series: dict[str, list[Point]], rows: Rows) -> dict[tuple[str, str], Fit]:
    """The law of each series, by series and measure: of the reward and of the judge."""
    fits = {}
    for (name, points), measure in itertools.product(series.items(), ("reward", "judge")):
        resampled = {
            what: np.stack([bootstrap(point.by_prompt[what], rows) for point in points], axis=1)
            for what in ("log_ratio", measure)
        }
        values = np.array([point.estimates[measure].value for point in points])
        fits[name, measure] = fit_law(
            "best-of-n" if name == BEST_OF_N else "rl",
            np.array([point.estimates["kl"].value for point in points]),
            values - values[0],
            resampled["log_ratio"],
            resampled[measure] - resampled[measure][:, :1],
        )
    return fits


def evenly(steps: Sequence[int], most: int) -> list[int]:
    """At most ``most`` of ``steps``, evenly spaced, the last one among them."""
    count = min(most, len(steps))
    return [steps[round(place * len(steps) / count) - 1] for place in range(1, count + 1)]


def find_settings(runs: Sequence[Path]) -> list[Config]:
    """Each run's configuration. Raises ``UserError`` where they differ in what must be alike to be compared."""
    configs: list[Config] = []
    for run in runs:
        if not (run / track.CONFIG).is_file():
            raise UserError(f"{run}: expected the folder of a tuning run, with {track.CONFIG}")
        configs.append(load(run / track.CONFIG))
    wanted = ("model", "prompts", "sampling", "render", "reward")
    first, *others = [{name: to_dict(config)[name] for name in wanted} for config in configs]
    for run, other in zip(runs[1:], others, strict=True):
        apart = track.changes(first, other, but=("render.workers", "render.deadline", "prompts.split"))
        if apart:
            raise UserError(f"{run} cannot be compared with {runs[0]}: {'; '.join(apart)}")
    return configs


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN...")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder, new or unfinished.")
@click.option("-n", "--n", "prompts", default=128, show_default=True, type=click.IntRange(min=2), help="Prompts.")
@click.option("--samples", default=2, show_default=True, type=click.IntRange(1, BLOCK), help="Pieces a prompt.")
@click.option(
    "--checkpoints", default=10, show_default=True, type=click.IntRange(min=1), help="Of each run, evenly spaced."
)
@click.option(
    "--best-of", default=16, show_default=True, type=click.IntRange(1, BLOCK), help="The base's pieces a prompt."
)
@click.option("--judge", help="A reward that judges beside the run's own; else what the run's [guard.judge] says.")
@click.option("--seed", default=2, show_default=True, type=click.IntRange(0, 2**31 - 1))
@click.option("--device", default="auto", show_default=True, type=click.Choice(["auto", "cpu", "cuda"]))
def main(**given: Any) -> None:
    """Reward, a held-out judge and diversity against KL to the base, over the checkpoints of each tuning RUN.

    The same command goes on after an interruption.
    """
    with track.in_one_line("the report", "the same command goes on from here", RenderError):
        report(**given)


def report(
    *,
    runs: Sequence[Path],
    out: Path,
    prompts: int,
    samples: int,
    checkpoints: int,
    best_of: int,
    judge: str | None,
    seed: int,
    device: str,
) -> None:
    """Write ``out``: see the command's help. Raises ``UserError`` for what the user can mend."""
    configs = find_settings(runs)
    config, where = configs[0], pick_device(device)
    names = [run.resolve().name for run in runs]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two runs are called {name!r}; rename the folder of one")

    def reward() -> Reward:
        wanted = config.reward
        return load_reward(wanted.kind, weights=wanted.weights or None, device=where, **wanted.options)

    def other() -> Reward | None:
        wanted = config.guard.judge
        if judge is not None:
            return load_reward(judge, device=where)
        if wanted.kind == "auto":
            return None
        return load_reward(wanted.kind, weights=wanted.weights or None, device=where, **wanted.options)

    def sound() -> None:
        check_soundfont(find_soundfont(config.render.soundfont))

    def checkpoints_of(run: Path) -> list[System]:
        steps = checkpoint.steps(run / "checkpoints")
        if not steps:
            raise UserError(f"{run}: this run has no checkpoints yet")
        return [find_system(f"{run}@{step}") for step in evenly(steps, checkpoints)]

    rates, other_rates, base, _, *systems = require(
        reward,
        other,
        lambda: find_system(f"{runs[0]}@base"),
        sound,
        *(functools.partial(checkpoints_of, run) for run in runs),
    )
    if other_rates is not None and other_rates.name == rates.name:
        raise UserError(f"--judge {other_rates.name}: is what the runs optimise; give another reward")
    network, tokenizer = load_base(base.model, device=where)
    setting = Setting(config, rates, other_rates, prompts, seed, device)
    models = [base, *itertools.chain(*systems)]
    track.claim(
        out,
        {
            "models": {model.name: sha256(model.model / "model.safetensors") for model in models},
            **{name: to_dict(config)[name] for name in ("prompts", "sampling", "reward")},
            "soundfont_sha256": sha256(find_soundfont(config.render.soundfont)),
            "seconds": config.render.seconds,
            "sample_rate": config.render.sample_rate,
            "n": prompts,
            "samples": samples,
            "best_of": best_of,
            "judge": setting.judge,
            "seed": seed,
            "version": version("smart"),
        },
    )
    many = max(best_of, samples)
    rows = resample(prompts, seed)
    with track.alone(out), track.progress(total=prompts * (many + samples * (len(models) - 1)), unit="piece") as bar:
        drawn = draw(base, many, setting, out / "pieces" / "base", network, bar)
        few = Drawn(
            [tokens for place, tokens in enumerate(drawn.tokens) if place % many < samples],
            *(part[:, :samples] for part in drawn[1:]),
        )
        origin = weigh("", 0, few, tokenizer, rows, is_base=True)
        series: dict[str, list[Point]] = {}
        for name, one, of_run in zip(names, configs, systems, strict=True):
            title = f"{name} (beta {one.grpo.beta:g})"
            points = series[title] = [origin._replace(series=title)]
            for system in of_run:
                found = draw(system, samples, setting, out / "pieces" / system.name, network, bar)
                points.append(weigh(title, system.step or 0, found, tokenizer, rows))
    chosen: dict[str, Any] = {}
    table = []
    for title, points in series.items():
        far = [point.variety | {"kl": point.estimates["kl_token"].value} for point in points[1:]]
        reasons = [None, *(collapsed(origin.variety, each) for each in far)]
        reward_of, judge_of = (np.stack([point.by_prompt[what] for point in points]) for what in ("reward", "judge"))
        best = keep(reward_of, judge_of, reasons, rows)
        table += [
            columns(point, reason, place == best)
            for place, (point, reason) in enumerate(zip(points, reasons, strict=True))
        ]
        gone = [{"step": point.step, "why": why} for point, why in zip(points, reasons, strict=True) if why]
        chosen[title] = {
            "keep": points[best].step,
            "judge_against_base": mean(judge_of[best] - judge_of[0], rows)._asdict(),
            "reward_against_base": mean(reward_of[best] - reward_of[0], rows)._asdict(),
            "collapsed": gone,
        }
    series[BEST_OF_N] = baseline(drawn, tokenizer, rows, samples)
    table += [columns(point, None, False) for point in series[BEST_OF_N]]
    fits = fit_all(series, rows)
    write(out, table, fits, chosen, setting)
    for title, one in chosen.items():
        what = f"keep iteration {one['keep']}" if one["keep"] else "keep the base: every checkpoint has collapsed"
        click.echo(f"{title}: {what}; {len(one['collapsed'])} of {len(series[title]) - 1} checkpoints have collapsed")
        for gone in one["collapsed"][:1]:
            click.echo(f"  from iteration {gone['step']} on: {gone['why']}")
    if rates.is_stand_in:
        click.echo(f"{rates.name} is a stand-in, not the aesthetic model: see docs/rewards.md")
    click.echo(f"report in {out}: frontier.png, frontier.pdf, frontier.csv, frontier.parquet, summary.json")


def write(
    out: Path,
    table: list[dict[str, Any]],
    fits: dict[tuple[str, str], Fit],
    chosen: dict[str, Any],
    setting: Setting,
) -> None:
    """The figure, its data as CSV and Parquet, and ``summary.json``, which comes last."""
    data = pa.Table.from_pylist(table)
    write_atomically(out / "frontier.parquet", functools.partial(pq.write_table, data))
    labels = {
        "reward": f"reward: {setting.reward.name} ({' '.join(setting.reward.weights)})",
        "judge": "held-out judge: " + setting.judge.replace(" (", "\n("),
        "vendi": f"different pieces in effect, of {setting.prompts}",
    }
    starts = {(row["series"], measure): row[measure] for row in reversed(table) for measure in labels}  # R(0)
    laws: dict[tuple[str, str], Callable[[Floats], Floats]] = {
        place: functools.partial(fit.curve, start=starts[place]) for place, fit in fits.items() if fit.alpha
    }
    plots.frontier(table, labels, laws, out / "frontier")
    summary = {
        "runs": chosen,
        "rule": RULE,
        "judge": setting.judge,
        "reward": setting.reward.provenance,
        "stand_in": setting.reward.is_stand_in,
        "prompts": setting.prompts,
        "fits": [
            {
                "series": series,
                "measure": measure,
                "law": fit.law,
                "points": fit.points,
                "alpha": fit.alpha and fit.alpha._asdict(),
                "beta": fit.beta and fit.beta._asdict(),
                "residual": fit.residual if fit.alpha else None,
                "why_not": fit.why_not,
            }
            for (series, measure), fit in fits.items()
        ],
        "table": table,
    }
    write_atomically(out / "summary.json", json.dumps(summary, indent=1).encode())
