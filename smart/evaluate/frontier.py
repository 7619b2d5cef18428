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
from typing import Any, NamedTuple

import click
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from smart import UserError, diversity, plots, require
from smart.config import Config, load, to_dict
from smart.evaluate.sample import is_whole
from smart.evaluate.statistics import RESAMPLES, Estimate, jackknife
from smart.files import sha256, write_atomically
from smart.guard import Judge, collapsed, variety
from smart.model import load_base, pick_device
from smart.render import RenderError, check_soundfont, find_soundfont
from smart.reward import Reward, load_reward
from smart.rollout import BLOCK, Piece, System, compose, find_system
from smart.run import CONFIG, alone, changes, checkpoint, claim, in_one_line, progress
from smart.tokens import decode, load_tokenizer, vocabulary

Floats = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]

BEST_OF_N = "best of n"
FEWEST = 4  # points that a law with two coefficients is fitted to


# --- Best of n ----------------------------------------------------------------------------------------------------


def order_weights(samples: int, n: int) -> Floats:
    """Weight (N,) of the i-th lowest of N samples in the expected maximum of n of them, drawn without replacement.

    C(i-1, n-1) / C(N, n): the share of the subsets of n in which the i-th lowest is the highest. The weighted sum is
    the unbiased estimator of E[max of n] with least variance. Raises ``ValueError`` unless 1 <= n <= N.
    """
    if not 1 <= n <= samples:
        raise ValueError(f"best of n: expected 1 <= n <= {samples}, got {n}")
    return np.array([math.comb(i - 1, n - 1) / math.comb(samples, n) for i in range(1, samples + 1)])


def best_of_n(rewards: Floats, values: Floats, n: int) -> Floats:
    """Expected ``values`` of the sample with the highest of ``rewards`` among n: (B,) from (B, N) each.

    Samples of equal reward are equally likely to be the best. A sample without a reward (NaN) is not in the draw; a
    prompt with fewer than n is NaN.
    """
    expected = np.full(len(rewards), math.nan)
    for row, (reward, value) in enumerate(zip(rewards, values, strict=True)):
        rated = np.isfinite(reward)
        if rated.sum() < n:
            continue
        _, rank, count = np.unique(reward[rated], return_inverse=True, return_counts=True)
        ends = np.cumsum(count)
        share = np.diff(np.append(0.0, np.cumsum(order_weights(int(rated.sum()), n))[ends - 1])) / count
        expected[row] = (share[rank] * value[rated]).sum()
    return expected


def best_of_n_kl(n: int) -> float:
    """KL of best-of-n to the base in nats a piece: log n - (n-1)/n, exact where no two pieces have the same reward."""
    return math.log(n) - (n - 1) / n


# --- Intervals ----------------------------------------------------------------------------------------------------


def resample(prompts: int, seed: int) -> Rows:
    """Prompts of each of R bootstrap samples: (R, B)."""
    return np.random.default_rng(seed).integers(prompts, size=(RESAMPLES, prompts))


def bootstrap(values: Floats, rows: Rows) -> Floats:
    """Mean over prompts of each resample, (R,), of ``values`` (B,); what is NaN is left out."""
    return ratio(values, np.ones_like(values), rows)


def ratio(above: Floats, below: Floats, rows: Rows) -> Floats:
    """Sum of ``above`` over sum of ``below``, (R,), both (B,); prompts where ``above`` is NaN are left out."""
    known = np.isfinite(above)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(known, above, 0.0)[rows].sum(1) / np.where(known, below, 0.0)[rows].sum(1)


def interval(value: float, resampled: Floats, count: int) -> Estimate:
    """``value``, of ``count`` prompts or points, with the 2.5th and 97.5th percentile of what was resampled."""
    known = resampled[np.isfinite(resampled)]
    low, high = np.percentile(known, [2.5, 97.5]) if len(known) else (math.nan, math.nan)
    return Estimate(float(value), float(low), float(high), count)


def mean(values: Floats, rows: Rows) -> Estimate:
    """Mean over prompts of ``values`` (B,); what is NaN is left out."""
    known = values[np.isfinite(values)]
    return interval(float(known.mean()) if len(known) else math.nan, bootstrap(values, rows), len(known))


# --- The laws of Gao et al. ---------------------------------------------------------------------------------------


class Fit(NamedTuple):
    """R(d) - R(0) = d (alpha - beta d), or d (alpha - beta log d); without coefficients where ``why_not`` says why."""

    law: str  # "best-of-n" or "rl"
    points: int
    alpha: Estimate | None = None
    beta: Estimate | None = None
    residual: float = math.nan  # root mean square, on the measure's own scale
    why_not: str = ""

    def curve(self, distance: Floats, start: float = 0.0) -> Floats:
        """R(d) from R(0) = ``start``."""
        assert self.alpha is not None and self.beta is not None
        return start + _terms(self.law, distance) @ np.array([self.alpha.value, self.beta.value])


def _terms(law: str, distance: Floats) -> Floats:
    """(K, 2): what alpha and beta are multiplied with."""
    second = distance if law == "best-of-n" else np.log(distance, where=distance > 0, out=np.zeros_like(distance))
    return np.stack([distance, -distance * second], axis=-1)


def fit_law(law: str, kl: Floats, gain: Floats, kl_resampled: Floats, gain_resampled: Floats) -> Fit:
    """Least squares of one law over K points, and again over each of R resamples for the intervals.

    ``kl`` and ``gain`` = R(d) - R(0) are (K,), the resampled ones (R, K). Points whose KL cannot be told from 0 do not
    count: their d is noise.
    """
    away = np.isfinite(gain) & (kl > 0) & (np.percentile(kl_resampled, 2.5, axis=0) > 0)
    points = int(away.sum())
    if points < FEWEST:
        reason = f"{points} of {len(kl)} points have a KL above 0; two coefficients need {FEWEST} to mean anything"
        return Fit(law, points, why_not=reason)

    def solve(kl: Floats, gain: Floats) -> Floats:
        return np.asarray(np.linalg.lstsq(_terms(law, np.sqrt(np.maximum(kl, 0))), gain, rcond=None)[0], np.float64)

    found = solve(kl[away], gain[away])
    many = [solve(*pair) for pair in zip(kl_resampled[:, away], gain_resampled[:, away], strict=True)]
    alpha, beta = (interval(one, column, points) for one, column in zip(found, np.array(many).T, strict=True))
    fit = Fit(law, points, alpha, beta)
    return fit._replace(residual=float(np.sqrt(np.mean((fit.curve(np.sqrt(kl[away])) - gain[away]) ** 2))))


# --- The checkpoint to keep ---------------------------------------------------------------------------------------

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


# --- Drawing ------------------------------------------------------------------------------------------------------


class Drawn(NamedTuple):
    """What one model wrote: B prompts, N samples each, in order; ratings are NaN where a clip failed."""

    tokens: list[list[int]]  # (B x N) prompt and completion
    reward: Floats  # (B, N)
    judge: Floats  # (B, N)
    log_ratio: Floats  # (B, N) log pi(piece) - log base(piece), of the completion, in nats
    length: Floats  # (B, N) tokens of the completion


class Setting(NamedTuple):
    """What all of one report's models are drawn and rated with."""

    config: Config  # of the first run
    reward: Reward
    other: Reward | None  # a judge of its own, where one was asked for
    prompts: int
    seed: int
    device: str

    @property
    def judge(self) -> str:
        """Who judges, in words."""
        if self.other is not None:
            return f"{self.other.name} ({' '.join(self.other.weights)})"
        return Judge(self.reward, None).name


def base_logprobs(model: Any, pieces: Sequence[Piece], pad_id: int, temperature: float) -> list[float]:
    """Log-probability of each completion under ``model`` at ``temperature``, full softmax, summed over its tokens."""
    device = model.device
    longest = max(len(piece.tokens) for piece in pieces)
    tokens = torch.tensor([piece.tokens + [pad_id] * (longest - len(piece.tokens)) for piece in pieces], device=device)
    place = torch.arange(1, longest, device=device)
    begin, end = (
        torch.tensor([count(piece) for piece in pieces], device=device)[:, None]
        for count in (lambda piece: piece.prompt_length, lambda piece: len(piece.tokens))
    )
    with torch.inference_mode():  # what follows a piece's end is padding, which nothing looks back at
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float() / temperature
        logp = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
    within = (begin <= place) & (place < end)
    return logp.masked_fill(~within, 0).double().sum(1).tolist()


def draw(system: System, samples: int, setting: Setting, folder: Path, base: Any, bar: Any) -> Drawn:
    """Pieces of one model, read from ``folder`` as far as they were drawn before, a table for each block.

    ``base`` is the base's network. Ratings and log-probabilities are stored, so that nothing is drawn twice.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config, size = setting.config, max(BLOCK // samples, 1)  # prompts of a block
    blocks = [folder / f"{number:05d}.parquet" for number in range(-(-setting.prompts // size))]
    done = next((place for place, path in enumerate(blocks) if not is_whole(path)), len(blocks))
    bar.update(min(done * size, setting.prompts) * samples)
    if done < len(blocks):
        tokenizer = load_tokenizer(system.model)
        pieces = compose(
            [system],
            prompts=config.prompts.kind,
            corpus=config.prompts.corpus or None,
            split="test",
            first=done * size,
            count=setting.prompts - done * size,
            samples=samples,
            seed=setting.seed,
            soundfont=find_soundfont(config.render.soundfont),
            rewards=[setting.reward, *([setting.other] if setting.other else [])],
            seconds=config.render.seconds,
            sample_rate=config.render.sample_rate,
            workers=config.render.workers,
            backend=config.render.backend,
            device=setting.device,
            batch=size * samples,
            **{name: getattr(config.sampling, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p")},
        )
        pad_id = vocabulary(tokenizer).pad_id
        for path in blocks[done:]:
            block = list(itertools.islice(pieces, size * samples))
            likely = base_logprobs(base, block, pad_id, config.sampling.temperature)
            rows = [
                {
                    "prompt": piece.prompt,
                    "sample": piece.sample,
                    "seed": piece.seed,
                    "tokens": piece.tokens,
                    "length": piece.length,
                    "logprob": piece.logprobs,
                    "base_logprob": under_base,
                    **piece.scores,
                }
                for piece, under_base in zip(block, likely, strict=True)
            ]
            write_atomically(path, functools.partial(pq.write_table, pa.Table.from_pylist(rows)))
            bar.update(len(rows))
    table = pa.concat_tables([pq.read_table(path) for path in blocks]).to_pydict()

    def column(name: str) -> Floats:
        return np.array(table[name], dtype=np.float64).reshape(setting.prompts, samples)

    def rated(reward: Reward, axes: Sequence[str] = ()) -> Floats:
        """The mean of ``axes``, or what the reward makes of them all."""
        scores = {axis: torch.from_numpy(column(f"{reward.name}.{axis}")) for axis in reward.axes}
        if axes:
            return torch.stack([scores[axis] for axis in axes]).mean(0).numpy()
        return (
            reward.combine({axis: values.flatten() for axis, values in scores.items()})
            .double()
            .numpy()
            .reshape(setting.prompts, samples)
        )

    length, under_base = column("length"), column("base_logprob")
    axes = Judge(setting.reward, None).axes
    plausibility = under_base / np.maximum(length, 1)
    return Drawn(
        tokens=table["tokens"],
        reward=rated(setting.reward),
        judge=rated(setting.other) if setting.other else rated(setting.reward, axes) if axes else plausibility,
        log_ratio=column("logprob") - under_base,
        length=length,
    )


# --- The report ---------------------------------------------------------------------------------------------------


def varied(vectors: npt.NDArray[Any], rows: Rows) -> tuple[Estimate, Estimate]:
    """How many different pieces there are in effect (Vendi score): among prompts, and among a prompt's own samples.

    ``vectors`` is (B, N, D), unit vectors of the pieces. The first is over sets of one piece a prompt, the mean over
    the N sets: 1 to B. The second is the mean over prompts: 1 to N.
    """
    count, samples, _ = vectors.shape
    sets = [diversity.kernel(vectors[:, sample]) for sample in range(samples)]

    def among(prompts: Sequence[int]) -> dict[str, float]:
        return {"vendi": float(np.mean([diversity.vendi_score(one[np.ix_(prompts, prompts)]) for one in sets]))}

    within = np.array([diversity.vendi_score(diversity.kernel(one)) for one in vectors])
    found = jackknife(among, count)["vendi"]
    return found._replace(low=max(found.low, 1.0), high=min(found.high, float(count))), mean(within, rows)


def average(values: Floats) -> Floats:
    """Mean over samples, (B,) from (B, N), of what is not NaN; NaN where all are."""
    known = np.isfinite(values)
    count = known.sum(1)
    return np.where(count > 0, np.where(known, values, 0).sum(1) / np.maximum(count, 1), math.nan)


class Point(NamedTuple):
    """One model, or best-of-n at one n, in numbers."""

    series: str
    step: int  # iterations; n of best-of-n
    estimates: dict[str, Estimate]  # kl, kl_token, reward, judge, vendi, vendi_within
    by_prompt: dict[str, Floats]  # (B,) reward, judge and log_ratio
    variety: dict[str, float]  # what the rule for collapse looks at
    failed: int
    pieces: int


def weigh(series: str, step: int, drawn: Drawn, tokenizer: Any, rows: Rows, *, is_base: bool = False) -> Point:
    """One model's point. The base's KL to itself is 0."""
    count, samples = drawn.reward.shape
    scores = [decode(tokenizer, tokens) for tokens in drawn.tokens]
    vectors = np.stack([diversity.symbolic_vector(score) for score in scores]).reshape(count, samples, -1)
    log_ratio = np.zeros_like(drawn.log_ratio) if is_base else drawn.log_ratio
    by_prompt = {"reward": average(drawn.reward), "judge": average(drawn.judge), "log_ratio": log_ratio.mean(1)}
    length = drawn.length.mean(1)
    estimates = {name: mean(values, rows) for name, values in by_prompt.items()}
    per_token = float(by_prompt["log_ratio"].sum() / length.sum())
    among, within = varied(vectors, rows)
    return Point(
        series,
        step,
        {
            "kl": estimates.pop("log_ratio"),
            "kl_token": interval(per_token, ratio(by_prompt["log_ratio"], length, rows), count),
            **estimates,
            "vendi": among,
            "vendi_within": within,
        },
        by_prompt,
        variety(scores, groups=[row // samples for row in range(len(scores))]),
        int((~np.isfinite(drawn.reward)).sum()),
        count * samples,
    )


def baseline(drawn: Drawn, tokenizer: Any, rows: Rows, sets: int) -> list[Point]:
    """Best-of-n of the base's N samples a prompt, n = 1, 2, 4, .. N.

    Ratings are the expectation over all subsets of n. For diversity the best of each of up to ``sets`` disjoint subsets
    is looked at.
    """
    count, samples = drawn.reward.shape
    scores = [diversity.symbolic_vector(decode(tokenizer, tokens)) for tokens in drawn.tokens]
    vectors = np.stack(scores).reshape(count, samples, -1)
    points = []
    for n in [2**power for power in range(samples.bit_length()) if 2**power <= samples]:
        by_prompt = {
            "reward": best_of_n(drawn.reward, drawn.reward, n),
            "judge": best_of_n(drawn.reward, drawn.judge, n),
            "log_ratio": np.full(count, best_of_n_kl(n)),
        }
        parts = [slice(begin, begin + n) for begin in range(0, samples - n + 1, n)][:sets]
        best = [np.nan_to_num(drawn.reward[:, part], nan=-math.inf).argmax(1) + part.start for part in parts]
        among, _ = varied(np.stack([vectors[np.arange(count), one] for one in best], axis=1), rows)
        exact = Estimate(best_of_n_kl(n), best_of_n_kl(n), best_of_n_kl(n), count)
        per_token = exact.value / float(drawn.length.mean())
        estimates = {
            "kl": exact,
            "kl_token": Estimate(per_token, per_token, per_token, count),
            "reward": mean(by_prompt["reward"], rows),
            "judge": mean(by_prompt["judge"], rows),
            "vendi": among,
            "vendi_within": Estimate(math.nan, math.nan, math.nan, 0),
        }
        failed = int((~np.isfinite(drawn.reward)).sum())
        points.append(Point(BEST_OF_N, n, estimates, by_prompt, {}, failed, count * samples))
    return points


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
        if not (run / CONFIG).is_file():
            raise UserError(f"{run}: expected the folder of a tuning run, with {CONFIG}")
        configs.append(load(run / CONFIG))
    wanted = ("model", "prompts", "sampling", "render", "reward")
    first, *others = [{name: to_dict(config)[name] for name in wanted} for config in configs]
    for run, other in zip(runs[1:], others, strict=True):
        apart = changes(first, other, but=("render.workers", "render.deadline", "prompts.split"))
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
    with in_one_line("the report", "the same command goes on from here", RenderError):
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
    claim(
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
    with alone(out), progress(total=prompts * (many + samples * (len(models) - 1)), unit="piece") as bar:
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
