"""Several rewards at once: weights, targets, adding, metrics, and one that fails in company of a good one."""

import math
import sys
from concurrent.futures import Future
from typing import Any

import numpy as np
import programs
import pytest
import torch

from smart import Failure, UserError
from smart.grpo import decoupled_advantages, group_advantages
from smart.guard import Judge, optimised_axes
from smart.reward import Mixture, Reward, load_reward
from smart.reward.mixture import Part, as_one, load_parts
from smart.rollout import Scorer

NAN, INF = math.nan, math.inf
RATE = 8000


class Level(Reward):
    """How loud a clip is, ten times its mean magnitude; ``how`` it fails otherwise."""

    axes = ("level", "half")
    sample_rate = RATE

    def __init__(self, how: str = "", rate: int = RATE) -> None:
        self.sample_rate = rate
        super().__init__()
        self.how = how

    def rate(self, audio: torch.Tensor, lengths: torch.Tensor) -> dict[str, torch.Tensor]:
        level = 10 * audio.abs().mean(1)
        if self.how == "raises":
            raise OSError("out of order")
        if self.how == "shape":
            return {"level": level[:, None], "half": level}
        if self.how == "none":
            level = level * NAN
        elif self.how == "NaN":
            level = torch.where(level > 5, NAN, level)
        elif self.how == "infinite":
            level = torch.where(level > 5, INF, level)
        return {"level": level, "half": level / 2}


def clips(*levels: float) -> list[Future[Any]]:
    futures = []
    for level in levels:
        futures.append(Future[Any]())
        futures[-1].set_result(np.full((2, RATE), level, np.float32))
    return futures


def test_a_value_is_the_weighted_mean_up_to_the_targets() -> None:
    scores = {f"{name}.{axis}": torch.zeros(4) for name in "abc" for axis in ("level", "half")}
    scores["a.level"] = torch.tensor([2.0, 6.0, 9.0, NAN])
    scores["b.level"] = torch.tensor([8.0, 4.0, 1.0, 5.0])
    scores["c.level"] = torch.tensor([NAN, 100.0, -100.0, 0.0])  # weight 0: only logged
    mixture = Mixture([Part("a", Level(), 1.0, 6.5), Part("b", Level(), 3.0), Part("c", Level(), 0.0)])
    torch.testing.assert_close(
        mixture.combine(scores), torch.tensor([6.5, 4.5, (6.5 + 3) / 4, NAN]), equal_nan=True, rtol=0, atol=1e-6
    )
    assert mixture.weights == {"a.level": 1.0, "b.level": 3.0}
    assert mixture.name == "a+b+c"


def test_a_group_whose_mean_has_arrived_earns_the_target_as_a_whole() -> None:
    mixture = Mixture([Part("a", Level(), 1.0, 6.0)])
    scores = {"a.level": torch.tensor([9.0, 4.0, NAN, 7.0, 4.0, 4.0]), "a.half": torch.zeros(6)}
    by_piece = mixture.earned(scores)[0]
    torch.testing.assert_close(by_piece, torch.tensor([6.0, 4.0, NAN, 6.0, 4.0, 4.0]), equal_nan=True)
    by_group = mixture.earned(scores, 3)[0]  # means 6.5 and 5
    torch.testing.assert_close(by_group, torch.tensor([6.0, 6.0, NAN, 6.0, 4.0, 4.0]), equal_nan=True)
    assert group_advantages(by_group, 3)[:3].tolist() == [0, 0, 0]
    assert group_advantages(by_piece, 3)[:2].abs().min() > 0.5, "by piece the straggler is pushed at full size"


def test_gdpo_by_hand() -> None:
    """Two rewards of very different spread, weights 1 and 2, groups of two."""
    rewards = torch.tensor([[1.0, 3.0, 2.0, 2.0], [0.10, 0.00, 0.04, 0.08]])
    # with s = 1/sqrt 2 the first gives -s, s, 0, 0 and the second s, -s, -s, s; their sum s, -s, -2s, 2s
    # has mean 0 and the variance (s^2 + s^2 + 4 s^2 + 4 s^2) / 3 = 5/3
    expected = torch.tensor([1.0, -1.0, -2.0, 2.0]) * math.sqrt(0.5) / math.sqrt(5 / 3)
    got = decoupled_advantages(rewards, torch.tensor([1.0, 2.0]), 2, eps=1e-9)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    summed = group_advantages(rewards[0] + 2 * rewards[1], 2)
    assert summed[0] < 0 < got[0], "in a plain sum the reward of small spread is drowned"


def test_gdpo_leaves_out_what_lacks_a_reward() -> None:
    rewards = torch.tensor([[1.0, 3.0, 5.0, 2.0, 4.0, 2.0], [5.0, NAN, 6.0, 1.0, 2.0, 1.0]])
    weights = torch.tensor([1.0, 1.0])
    got = decoupled_advantages(rewards, weights, 3)
    assert got[1] == 0 and got.isfinite().all() and got[2] > 0 > got[0]
    without = decoupled_advantages(rewards.index_fill(1, torch.tensor([1]), NAN), weights, 3)
    torch.testing.assert_close(got, without)
    assert decoupled_advantages(torch.full((2, 6), NAN), weights, 3).tolist() == [0] * 6
    assert decoupled_advantages(torch.ones(2, 6), weights, 3).tolist() == [0] * 6, "all have arrived"
    scaled = decoupled_advantages(rewards * torch.tensor([[1.0], [1000.0]]), weights, 3)
    torch.testing.assert_close(got, scaled, rtol=1e-3, atol=1e-3)


def test_metrics_by_hand() -> None:
    mixture = Mixture([Part("a", Level(), target=4.0), Part("b", Level())])
    a, b = torch.tensor([1.0, 3.0, 5.0, 5.0]), torch.tensor([2.0, 1.0, NAN, 3.0])
    half = torch.zeros(4)
    got = mixture.metrics({"a.level": a, "a.half": half, "b.level": b, "b.half": half}, 2)
    assert got == pytest.approx(
        {
            "reward/a/mean": 3.5, "reward/a/std": a.std().item(), "reward/a/group_std": math.sqrt(2) / 2,
            "reward/a/unrated": 0, "reward/a/at_target": 0.5, "reward/b/mean": 2, "reward/b/std": 1,
            "reward/b/group_std": math.sqrt(0.5), "reward/b/unrated": 0.25, "reward/correlation/a/b": -1,
        },
        abs=1e-6,
    )  # fmt: skip


def test_each_part_hears_at_its_own_rate_as_if_it_were_alone(tokenizer: Any) -> None:
    random = np.random.default_rng(1)
    heard = clips(*[0.1] * 3)
    for clip in heard:
        clip.result()[:] *= random.normal(size=(2, RATE))
    parts = [Part("slow", Level()), Part("fast", Level(rate=11025), 2.0), Part("ce", load_reward("ce_proxy"))]
    together = Scorer(tokenizer, None, Mixture(parts), sample_rate=RATE, batch=2).collect(heard)  # type: ignore[arg-type]
    for part in parts:
        alone = Scorer(tokenizer, None, part.reward, sample_rate=RATE, batch=2).collect(heard)  # type: ignore[arg-type]
        for axis, values in alone.scores.items():
            assert torch.equal(together.scores[f"{part.name}.{axis}"], values)
    assert list(together.scores) == ["slow.level", "slow.half", "fast.level", "fast.half", "ce.CE"]


@pytest.mark.parametrize("how", ["NaN", "infinite"])
def test_a_clip_that_one_of_them_cannot_rate_has_no_reward(tokenizer: Any, how: str) -> None:
    mixture = Mixture([Part("good", Level()), Part("bad", Level(how))])
    rated = Scorer(tokenizer, None, mixture, sample_rate=RATE).collect(clips(0.2, 0.9, 0.4, 0.4))  # type: ignore[arg-type]
    assert rated.rewards.isnan().tolist() == [False, True, False, False]
    assert rated.scores["good.level"].isfinite().all()
    rated.check()
    assert mixture.metrics(rated.scores, 2)["reward/bad/unrated"] == 0.25
    assert group_advantages(rated.rewards, 2).tolist()[:2] == [0, 0]
    logged_only = Mixture([Part("good", Level()), Part("bad", Level(how), 0.0)])
    assert logged_only.combine(rated.scores).isfinite().all()


def test_one_that_rates_nothing_is_named(tokenizer: Any) -> None:
    mixture = Mixture([Part("good", Level()), Part("bad", Level("none"))])
    rated = Scorer(tokenizer, None, mixture, sample_rate=RATE).collect(clips(0.2, 0.9))  # type: ignore[arg-type]
    with pytest.raises(
        Failure, match=r"none of 2 clips could be rated; 0 of them .*none has a rating of bad.level, bad.h"
    ):
        rated.check()


@pytest.mark.parametrize(
    ("how", "reason"), [("raises", "OSError: out of order"), ("shape", "must be float32 of shape")]
)
def test_one_that_breaks_is_named(tokenizer: Any, how: str, reason: str) -> None:
    mixture = Mixture([Part("good", Level()), Part("bad", Level(how))])
    with pytest.raises(Failure, match=f"reward bad failed on 2 clips .*{reason}"):
        Scorer(tokenizer, None, mixture, sample_rate=RATE).collect(clips(0.2, 0.9))  # type: ignore[arg-type]


def test_one_that_hangs_ends_the_process_by_its_own_deadline() -> None:
    code = """
import time, torch, numpy as np
from concurrent.futures import Future
from smart.reward import Mixture, Reward
from smart.reward.mixture import Part
from smart.rollout import Scorer
from smart.tokens import build_tokenizer
class Slow(Reward):
    axes, sample_rate = ("X",), 16000
    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds
    def rate(self, audio, lengths):
        time.sleep(self.seconds)
        return {"X": torch.ones(len(audio))}
mixture = Mixture([Part("patient", Slow(0.6), deadline=60.0), Part("hangs", Slow(60), deadline=0.5)])
clip = Future()
clip.set_result(np.ones((2, 16000), np.float32))
Scorer(build_tokenizer(), None, mixture, sample_rate=16000).collect([clip])
print("not reached")
"""
    done = programs.run([sys.executable, "-c", code], timeout=100)
    assert (done.returncode, done.stdout) == (1, "")
    assert "Error: reward hangs gave no answer within 0.5 s" in done.stderr


def table(**keys: Any) -> dict[str, Any]:
    plain = {"name": "", "weight": 1.0, "weights": {}, "options": {}, "target": "none", "real": "", "deadline": 600.0}
    return {**plain, "kind": "ce_proxy", **keys}


def test_rewards_are_built_from_tables() -> None:
    single = as_one(load_parts([table()], device="cpu"))
    assert type(single).__name__ == "CEProxy" and single.axes == ("CE",), "one reward is what it was"
    limited = as_one(load_parts([table(target=7.5)], device="cpu"))
    assert isinstance(limited, Mixture) and limited.axes == ("ce_proxy.CE",) and limited.is_stand_in
    rules = table(kind="symbolic", name="rules", weight=0.5, options={"key": "high", "dissonance": "low"})
    parts = load_parts([table(target="real"), rules], device="cpu")
    several = as_one(parts, {"ce_proxy": 7.2})
    assert isinstance(several, Mixture) and several.reads_notes
    assert several.axes == ("ce_proxy.CE", "rules.key", "rules.dissonance")
    assert several.weights == {"ce_proxy.CE": 1.0, "rules.key": 0.5, "rules.dissonance": 0.5}
    assert [part.target for part in several.parts] == [7.2, INF]
    assert "ce_proxy (weight 1, target 7.2)" in several.provenance and "rules (weight 0.5)" in several.provenance
    for tables, message in (
        ([table(), table()], 'two rewards are called "ce_proxy"'),
        ([table(weight=0.0)], "every reward has weight 0"),
        ([table(name="a/b"), table()], "reward name 'a/b': expected letters"),
    ):
        with pytest.raises(UserError, match=message):
            as_one(load_parts(tables, device="cpu"))
    with pytest.raises(UserError, match="2 things are missing") as raised:
        load_parts([table(kind="beauty"), table(), table(kind="symbolic")], device="cpu")
    assert "beauty" in raised.value.message and "needs a rule" in raised.value.message


def test_a_judge_that_is_optimised_is_noticed() -> None:
    mixture = Mixture([Part("loud", Level()), Part("ce", load_reward("ce_proxy"), 0.0)])
    other = Level()
    assert optimised_axes(mixture, Judge(mixture, other)) == ["Level.level"]
    other.set_weights({"half": 1.0})
    assert optimised_axes(mixture, Judge(mixture, other)) == []
    assert optimised_axes(mixture, Judge(mixture, load_reward("ce_proxy"))) == [], "it has weight 0"
    assert optimised_axes(Level(), Judge(Level(), Level())) == ["Level.level"]
    assert Judge(mixture).axes == ["loud.half", "ce.CE"]
