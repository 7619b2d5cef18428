"""How far to optimise: the reward, a second score that training does not optimise (the judge), and diversity.

``smart evaluate frontier RUN... --out FOLDER`` samples fresh pieces from the checkpoints of one or more runs (with
different values of beta, say), for the same held-out prompts and seeds, and plots them on the axis of Gao, Schulman and
Hilton (2023), "Scaling laws for reward model overoptimization": d = sqrt(KL to the base). For comparison it adds
best-of-n: the expected reward of the best of n of the base's pieces per prompt, at KL = log n - (n-1)/n. Their laws

    R(d) - R(0) = d (alpha - beta d)          best-of-n
    R(d) - R(0) = d (alpha - beta log d)      reinforcement learning

are fitted to the reward and to the judge's score where there are enough points. KL is estimated from the samples: the
mean over pieces of log pi(piece) - log base(piece), in nats per piece, and also in nats per token. Intervals are 95%:
percentiles of a bootstrap over prompts, paired across checkpoints, or Student's t for few prompts; where none can be
known, it is left out. Diversity is a property of a set of pieces, so its intervals come from a jackknife that leaves
out a tenth of the prompts at a time.

``points`` samples and measures the models, ``laws`` has the estimators and fits; this module makes the report.

Axes: B prompts, N samples per prompt, K checkpoints (the first is the base), R resamples.
"""

import functools
import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from smart import UserError, __version__, plots, require
from smart.config import Config, load, to_dict
from smart.corpus import MANIFEST
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
from smart.evaluate.ratings import evenly
from smart.files import sha256, write_atomically
from smart.guard import PLAUSIBILITY, Judge, collapsed, default_judge, optimised_axes
from smart.intervals import Estimate, Scale, differences
from smart.model import load_base, pick_device
from smart.render import checked_soundfont, find_soundfont
from smart.reward import Reward, load_reward
from smart.reward.mixture import as_one, load_parts
from smart.reward.real import read_targets
from smart.rollout import System, find_system
from smart.run import (
    CONFIG,
    changes,
    check_names,
    checkpoint,
    claim_folder,
    digests,
    files_in,
    hold_folder,
    model_digests,
    progress,
)

__all__ = [
    "BEST_OF_N", "RULE", "Drawn", "Fit", "Point", "Setting", "average", "base_logprobs", "baseline", "best_of_n",
    "best_of_n_kl", "draw", "evenly", "fit_all", "fit_law", "interval", "keep", "mean", "order_weights",
    "ratio", "report", "resample", "varied", "weigh",
]  # fmt: skip

RULE = (
    "Take the checkpoints that have not collapsed. Of these take the one with the best judge score, and those that "
    "cannot be told from it (the paired 95% interval of the difference reaches 0). Of these keep the one with the "
    "highest reward. If every checkpoint has collapsed, keep the base. Without judge scores, go by reward alone."
)


def keep(rewards: Floats, judge: Floats, collapsed: Sequence[str | None], rows: Rows) -> int:
    """Index of the checkpoint to keep by ``RULE``; 0 is the base. ``rewards`` and ``judge`` are (K, B)."""
    sound = [place for place in range(1, len(rewards)) if not collapsed[place]]
    if not sound:
        return 0
    rated, wanted = np.nanmean(rewards, axis=1), judge if np.isfinite(judge).any() else rewards
    best = max(sound, key=lambda place: float(np.nanmean(wanted[place])))
    level = [place for place in sound if not mean(wanted[place] - wanted[best], rows).high < 0]
    return max(level, key=lambda place: float(rated[place]))


def columns(point: Point, collapse: str | None, kept: bool) -> dict[str, Any]:
    """A point as a row of the table; an unknown number is None."""
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
    """A fit for each series and measure (reward, judge), keyed by both names."""
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
            rows.shape[1],
        )
    return fits


def numbers(estimate: Estimate) -> dict[str, Any]:
    """An estimate for JSON, which knows no NaN."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in estimate._asdict().items()
    }


def choose(
    points: Sequence[Point], rows: Rows, scales: dict[str, Scale]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Apply ``RULE`` to a run, base first: its entry in the summary, and its rows of the table."""
    base = points[0].variety
    far = [point.variety | {"kl": point.estimates["kl_token"].value} for point in points[1:]]
    reasons = [None, *(collapsed(base, each) for each in far)]
    reward, judge = (np.stack([point.by_prompt[what] for point in points]) for what in ("reward", "judge"))
    best = keep(reward, judge, reasons, rows)
    entry = {
        "keep": points[best].step,
        "judge_against_base": numbers(mean(judge[best] - judge[0], rows, differences(scales["judge"]))),
        "reward_against_base": numbers(mean(reward[best] - reward[0], rows, differences(scales["reward"]))),
        "collapsed": [{"step": point.step, "why": why} for point, why in zip(points, reasons, strict=True) if why],
    }
    return entry, [
        columns(point, reason, place == best) for place, (point, reason) in enumerate(zip(points, reasons, strict=True))
    ]


def find_settings(runs: Sequence[Path]) -> list[Config]:
    """Each run's configuration. Raises ``UserError`` if they differ in a setting that makes runs incomparable."""
    configs: list[Config] = []
    for run in runs:
        if not (run / CONFIG).is_file():
            raise UserError(f"{run}: expected the folder of a tuning run, but it has no {CONFIG}")
        configs.append(load(run / CONFIG))
    wanted = ("model", "prompts", "sampling", "render", "reward", "rewards")
    first, *others = [{name: to_dict(config)[name] for name in wanted} for config in configs]
    for run, other in zip(runs[1:], others, strict=True):
        apart = changes(first, other, but=("render.workers", "render.deadline", "prompts.split"))
        if apart:
            raise UserError(f"{run} cannot be compared with {runs[0]}: {'; '.join(apart)}")
    return configs


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
    backend: str | None = None,
    accept_changes: bool = False,
) -> None:
    """Write the report to ``out``. Arguments as in the command's help; raises ``UserError`` for mistakes in them."""
    configs = find_settings(runs)
    config, where = configs[0], pick_device(device)
    if backend is not None:
        config = replace(config, render=replace(config.render, backend=backend))
    names = [run.resolve().name for run in runs]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two runs are called {name!r}; rename one of the folders")

    targets = read_targets(runs[0])

    def reward() -> Reward:
        return as_one(load_parts([to_dict(one) for one in config.all_rewards], device=where), targets)

    def other() -> Reward | None:
        wanted = config.guard.judge
        if judge is not None:
            return None if judge == PLAUSIBILITY else load_reward(judge, device=where)
        if wanted.kind in ("auto", PLAUSIBILITY):
            return None
        return load_reward(wanted.kind, weights=wanted.weights or None, device=where, **wanted.options)

    def sound() -> None:
        checked_soundfont(config.render.fonts[0])

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
    plausible = PLAUSIBILITY in (judge, config.guard.judge.kind)
    if other_rates is None and not plausible and (kind := default_judge(rates)):
        other_rates = load_reward(kind, device=where)
    if other_rates is not None and (other_rates.name == rates.name or optimised_axes(rates, Judge(rates, other_rates))):
        raise UserError(f"--judge {other_rates.name}: the runs optimise this reward; choose another")
    network, tokenizer = load_base(base.model, device=where)
    setting = Setting(config, rates, other_rates, prompts, seed, device, plausible)
    models = [base, *itertools.chain(*systems)]
    files = digests(
        files_in({"rewards": [one.options for one in config.all_rewards], "judge": config.guard.judge.options})
        | ({"corpus": Path(config.prompts.corpus) / MANIFEST} if config.prompts.kind == "dataset" else {})
    )
    sources = [one.provenance for one in (rates, other_rates) if one is not None]
    accepted = claim_folder(
        out,
        {
            "models": {model.name: model_digests(model.model) for model in models},
            **{name: to_dict(config)[name] for name in ("prompts", "sampling", "reward")},
            "soundfont_sha256": sha256(find_soundfont(config.render.fonts[0])),
            "seconds": config.render.seconds,
            "sample_rate": config.render.sample_rate,
            "backend": config.render.backend,
            "n": prompts,
            "samples": samples,
            "best_of": best_of,
            "judge": setting.judge,
            "provenance": sources,
            **({"rewards": to_dict(config)["rewards"], "targets": targets} if config.rewards or targets else {}),
            **({"reward_files": files} if files else {}),
            "seed": seed,
            "version": __version__,
        },
        accept=accept_changes,
    )
    check_names((model.name for model in models), out, "the models")
    many = max(best_of, samples)
    rows = resample(prompts, seed)
    with hold_folder(out), progress(total=prompts * (many + samples * (len(models) - 1)), unit="piece") as bar:
        drawn = draw(base, many, setting, out / "pieces" / "base", network, bar)
        few = Drawn(
            [tokens for place, tokens in enumerate(drawn.tokens) if place % many < samples],
            *(part[:, :samples] for part in drawn[1:]),
        )
        origin = weigh("", 0, few, tokenizer, rows, setting.scales, is_base=True)
        series: dict[str, list[Point]] = {}
        for name, one, of_run in zip(names, configs, systems, strict=True):
            title = f"{name} (beta {one.grpo.beta:g})"
            points = series[title] = [origin._replace(series=title)]
            for system in of_run:
                found = draw(system, samples, setting, out / "pieces" / system.name, network, bar)
                points.append(weigh(title, system.step or 0, found, tokenizer, rows, setting.scales))
    chosen: dict[str, Any] = {}
    table = []
    for title, points in series.items():
        chosen[title], lines = choose(points, rows, setting.scales)
        table += lines
    series[BEST_OF_N] = baseline(drawn, tokenizer, rows, samples, setting.scales)
    table += [columns(point, None, False) for point in series[BEST_OF_N]]
    fits = fit_all(series, rows)
    write(out, table, fits, chosen, setting, accepted)
    for title, one in chosen.items():
        what = f"keep iteration {one['keep']}" if one["keep"] else "keep the base: every checkpoint has collapsed"
        click.echo(f"{title}: {what}; {len(one['collapsed'])} of {len(series[title]) - 1} checkpoints have collapsed")
        for gone in one["collapsed"][:1]:
            click.echo(f"  first at iteration {gone['step']}: {gone['why']}")
    if rates.is_stand_in:
        click.echo(f"{rates.name} is an approximation, not the aesthetic model: see docs/rewards.md")
    click.echo(f"report in {out}: frontier.png, frontier.pdf, frontier.csv, frontier.parquet, summary.json")


def write(
    out: Path,
    table: list[dict[str, Any]],
    fits: dict[tuple[str, str], Fit],
    chosen: dict[str, Any],
    setting: Setting,
    accepted: list[Any],
) -> None:
    """Write the figure, its data as CSV and Parquet, and last ``summary.json``."""
    data = pa.Table.from_pylist(table)
    write_atomically(out / "frontier.parquet", functools.partial(pq.write_table, data))
    labels = {
        "reward": f"reward: {setting.reward.name}\n({', '.join(setting.reward.weights)})",
        "judge": "held-out score: " + setting.judge.replace(" (", "\n("),
        "vendi": f"effective number of different pieces, of {setting.prompts}",
    }
    starts = {(row["series"], measure): row[measure] for row in reversed(table) for measure in labels}  # R(0)
    laws: dict[tuple[str, str], Callable[[Floats], Floats]] = {
        place: functools.partial(fit.curve, start=starts[place]) for place, fit in fits.items() if fit.alpha
    }
    plots.frontier(table, labels, laws, out / "frontier")
    summary = {
        "runs": chosen,
        **({"accepted": accepted} if accepted else {}),
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
                "alpha": fit.alpha and numbers(fit.alpha),
                "beta": fit.beta and numbers(fit.beta),
                "residual": fit.residual if fit.alpha else None,
                "why_not": fit.why_not,
            }
            for (series, measure), fit in fits.items()
        ],
        "table": table,
    }
    write_atomically(out / "summary.json", json.dumps(summary, indent=1).encode())
