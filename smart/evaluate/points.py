"""The frontier's measurements: pieces of each model, sampled and rated, and the numbers of each model or best-of-n.

Axes: B prompts, N samples per prompt, R resamples.
"""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from smart import diversity
from smart.config import Config
from smart.evaluate import sealed
from smart.evaluate.laws import Floats, Rows, best_of_n, best_of_n_kl, mean, ratio_of
from smart.evaluate.sample import is_whole
from smart.evaluate.statistics import jackknife
from smart.gpu import exact
from smart.guard import Judge, variety
from smart.intervals import RATING, Estimate, Scale
from smart.render import find_soundfont
from smart.reward import Reward
from smart.rollout import BLOCK, Piece, System, compose
from smart.tokens import decode, load_tokenizer, vocabulary

BEST_OF_N = "best of n"


# --- Sampling -----------------------------------------------------------------------------------------------------


class Drawn(NamedTuple):
    """Samples of one model: B prompts, N samples each, in order; scores are NaN where a clip failed."""

    tokens: list[list[int]]  # (B x N) prompt and completion
    reward: Floats  # (B, N)
    judge: Floats  # (B, N)
    log_ratio: Floats  # (B, N) log pi(piece) - log base(piece), of the completion, in nats
    length: Floats  # (B, N) tokens of the completion


class Setting(NamedTuple):
    """How all models of a report are sampled and rated."""

    config: Config  # of the first run
    reward: Reward
    other: Reward | None  # a separate reward as the judge, if one was asked for
    prompts: int
    seed: int
    device: str
    plausible: bool = False  # the judge is plausibility, whatever axes the reward has

    @property
    def judge(self) -> str:
        """The judge's name for figures and the summary."""
        if self.other is not None:
            return f"{self.other.name} ({' '.join(self.other.weights)})"
        return Judge(self.reward, None, plausible=self.plausible).name

    @property
    def scales(self) -> dict[str, Scale]:
        """Between which numbers the reward and the judge lie; plausibility is a log-probability."""
        rates = self.other is not None or bool(Judge(self.reward, None).axes)
        return {"reward": RATING, "judge": RATING if rates else (-math.inf, 0)}


def base_logprobs(model: Any, pieces: Sequence[Piece], pad_id: int, temperature: float) -> list[float]:
    """Log-probability of each completion under ``model`` at ``temperature`` (full softmax), summed over its tokens."""
    device = model.device
    longest = max(len(piece.tokens) for piece in pieces)
    tokens = torch.tensor([piece.tokens + [pad_id] * (longest - len(piece.tokens)) for piece in pieces], device=device)
    place = torch.arange(1, longest, device=device)
    begin, end = (
        torch.tensor([count(piece) for piece in pieces], device=device)[:, None]
        for count in (lambda piece: piece.prompt_length, lambda piece: len(piece.tokens))
    )
    with torch.inference_mode():  # padding comes last, so no token of a piece attends to it
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float() / temperature
        logp = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
    within = (begin <= place) & (place < end)
    return logp.masked_fill(~within, 0).to(exact(device)).sum(1).tolist()


def draw(system: System, samples: int, setting: Setting, folder: Path, base: Any, bar: Any) -> Drawn:
    """Sample one model, a table per block in ``folder``; blocks that are already there are read, not sampled again.

    ``base`` is the base's network. The tables also hold ratings and log-probabilities. ``bar`` shows the progress.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config, size = setting.config, max(BLOCK // samples, 1)  # prompts per block
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
            soundfont=find_soundfont(config.render.fonts[0]),
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
            sealed.write_table(path, pa.Table.from_pylist(rows))
            bar.update(len(rows))
    table = pa.concat_tables([sealed.read_table(path) for path in blocks]).to_pydict()

    def column(name: str) -> Floats:
        return np.array(table[name], dtype=np.float64).reshape(setting.prompts, samples)

    def rated(reward: Reward, axes: Sequence[str] = ()) -> Floats:
        """The mean of ``axes``, or without them the combined reward."""
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
    axes = Judge(setting.reward, None, plausible=setting.plausible).axes
    plausibility = under_base / np.maximum(length, 1)
    return Drawn(
        tokens=table["tokens"],
        reward=rated(setting.reward),
        judge=rated(setting.other) if setting.other else rated(setting.reward, axes) if axes else plausibility,
        log_ratio=column("logprob") - under_base,
        length=length,
    )


# --- Measuring ----------------------------------------------------------------------------------------------------


def varied(vectors: npt.NDArray[Any], rows: Rows) -> tuple[Estimate, Estimate]:
    """Effective number of different pieces (Vendi score) across prompts, and within the samples of one prompt.

    ``vectors`` is (B, N, D), unit vectors of the pieces. The first score is computed on sets with one piece per prompt
    and averaged over the N sets: 1 to B. The second is averaged over prompts: 1 to N.
    """
    count, samples, _ = vectors.shape
    sets = [diversity.kernel(vectors[:, sample]) for sample in range(samples)]

    def among(prompts: Sequence[int]) -> dict[str, float]:
        return {"vendi": float(np.mean([diversity.vendi_score(one[np.ix_(prompts, prompts)]) for one in sets]))}

    within = np.array([diversity.vendi_score(diversity.kernel(one)) for one in vectors])
    return jackknife(among, count, {"vendi": (1, count)})["vendi"], mean(within, rows, (1, samples))


def average(values: Floats) -> Floats:
    """Mean over the samples that are not NaN: (B,) from (B, N). NaN where all are."""
    known = np.isfinite(values)
    count = known.sum(1)
    return np.where(count > 0, np.where(known, values, 0).sum(1) / np.maximum(count, 1), math.nan)


class Point(NamedTuple):
    """The numbers of one model, or of best-of-n at one n."""

    series: str
    step: int  # iterations, or n of best-of-n
    estimates: dict[str, Estimate]  # kl, kl_token, reward, judge, vendi, vendi_within
    by_prompt: dict[str, Floats]  # (B,) reward, judge and log_ratio
    variety: dict[str, float]  # the measures that the collapse rule looks at
    failed: int
    pieces: int


def exactly(value: float, count: int) -> Estimate:
    """A number that is known, not estimated."""
    return Estimate(value, value, value, count)


def not_negative(kl: Estimate) -> Estimate:
    """An estimate of KL, which is never negative, though a mean of log-ratios may be."""
    return kl._replace(value=max(kl.value, 0.0), low=max(kl.low, 0.0), high=max(kl.high, 0.0))


def weigh(
    series: str,
    step: int,
    drawn: Drawn,
    tokenizer: Any,
    rows: Rows,
    scales: dict[str, Scale],
    *,
    is_base: bool = False,
) -> Point:
    """Measure one model. The base's KL to itself is set to exactly 0. ``scales``: of the reward and the judge."""
    count, samples = drawn.reward.shape
    scores = [decode(tokenizer, tokens) for tokens in drawn.tokens]
    vectors = np.stack([diversity.symbolic_vector(score) for score in scores]).reshape(count, samples, -1)
    log_ratio = np.zeros_like(drawn.log_ratio) if is_base else drawn.log_ratio
    by_prompt = {"reward": average(drawn.reward), "judge": average(drawn.judge), "log_ratio": log_ratio.mean(1)}
    length = drawn.length.mean(1)
    estimates = {name: mean(by_prompt[name], rows, scale) for name, scale in scales.items()}
    kl, per_token = mean(by_prompt["log_ratio"], rows), ratio_of(by_prompt["log_ratio"], length, rows)
    among, within = varied(vectors, rows)
    return Point(
        series,
        step,
        {
            "kl": exactly(0.0, count) if is_base else not_negative(kl),
            "kl_token": exactly(0.0, count) if is_base else not_negative(per_token),
            **estimates,
            "vendi": among,
            "vendi_within": within,
        },
        by_prompt,
        variety(scores, groups=[row // samples for row in range(len(scores))]),
        int((~np.isfinite(drawn.reward)).sum()),
        count * samples,
    )


def baseline(drawn: Drawn, tokenizer: Any, rows: Rows, sets: int, scales: dict[str, Scale]) -> list[Point]:
    """Best-of-n from the base's N samples per prompt, n = 1, 2, 4, .. N.

    Scores are expectations over all subsets of n. Diversity is that of the best samples of up to ``sets`` disjoint
    subsets.
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
        kl = best_of_n_kl(n)
        estimates = {
            "kl": exactly(kl, count),
            "kl_token": exactly(kl / float(drawn.length.mean()), count),
            **{name: mean(by_prompt[name], rows, scale) for name, scale in scales.items()},
            "vendi": among,
            "vendi_within": Estimate(math.nan, math.nan, math.nan, 0),
        }
        failed = int((~np.isfinite(drawn.reward)).sum())
        points.append(Point(BEST_OF_N, n, estimates, by_prompt, {}, failed, count * samples))
    return points
