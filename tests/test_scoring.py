"""smart.scoring: completions to rewards through the real renderer, and clips that fail."""

import math
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
import torch

from smart.model import build_model
from smart.prompts import draw
from smart.render import RenderError, RenderPool
from smart.reward import Reward, load_reward, resample
from smart.sampler import Rollout, Sampler
from smart.scoring import Rated, Scorer, completion_metrics
from smart.tokens import build_grammar, build_tokenizer, decode, vocabulary

RATE = 22050


@pytest.fixture(scope="module")
def pool() -> Iterator[RenderPool]:
    with RenderPool("timgm", sample_rate=RATE, seconds=2.0, workers=1) as pool:
        yield pool


def rollout_of(tokenizer: Any, *completions: list[str]) -> Rollout:
    """Completions after the prompt 4/4 at a middling tempo, padded to one length."""
    vocab = tokenizer.vocab
    prompt = [vocab[name] for name in ("Bar_None", "TimeSig_4/4", "Position_0", "Tempo_120.0")]
    longest = max(map(len, completions))
    tokens = [prompt + [vocab[name] for name in names] + [0] * (longest - len(names)) for names in completions]
    mask = [[True] * len(names) + [False] * (longest - len(names)) for names in completions]
    return Rollout(torch.tensor(tokens), torch.tensor(mask), torch.zeros(len(tokens), longest))


NOTE = ["Pitch_60", "Velocity_127", "Duration_1.0.12"]
HIGH = ["Pitch_80", "Velocity_63", "Duration_1.0.12"]


def test_each_clip_is_rated_as_if_it_were_alone(tokenizer: Any, pool: RenderPool) -> None:
    reward = load_reward("ce_proxy")
    scorer = Scorer(tokenizer, pool, reward, sample_rate=RATE, batch=2)
    rollout = rollout_of(tokenizer, NOTE + HIGH, NOTE, [*NOTE, "Position_24", *HIGH, "EOS_None"], ["EOS_None"])
    rated = scorer.collect(scorer.submit(rollout), keep=[0, 2])
    assert (rated.failed, rated.silent) == (0, 1)
    assert [clip is not None for clip in rated.audio] == [True, False, True, False]
    for row, tokens in enumerate(rollout.tokens):
        audio = pool.submit(decode(tokenizer, tokens)).result()
        clip = resample(torch.from_numpy(audio).mean(0), RATE, reward.sample_rate)[None]
        assert rated.scores["CE"][row].item() == pytest.approx(reward.score(clip)["CE"].item(), abs=1e-5)
    assert torch.equal(rated.rewards, rated.scores["CE"])
    np.testing.assert_array_equal(rated.audio[0], pool.submit(decode(tokenizer, rollout.tokens[0])).result())


def test_drums_and_strings_are_heard_as_what_they_are(pool: RenderPool) -> None:
    """The same key on three instruments: each as if its note had been given to the renderer."""
    tokenizer = build_tokenizer("all")
    clips = []
    for names, program, drum in (
        (["Program_0", "Pitch_60"], 0, 0),
        (["Program_48", "Pitch_60"], 48, 0),
        (["Program_-1", "PitchDrum_60"], 0, 1),
    ):
        rollout = rollout_of(tokenizer, [*names, *NOTE[1:]])
        audio = pool.submit(decode(tokenizer, rollout.tokens[0])).result()
        np.testing.assert_array_equal(audio, pool.submit(np.array([(0, 0.5, 60, 127, program, drum)])).result())
        assert np.abs(audio).max() > 0.99
        clips.append(audio.ravel())
    similarity = np.abs(np.corrcoef(clips))
    assert similarity[np.triu_indices(3, 1)].max() < 0.5


def test_what_a_model_of_many_instruments_writes_is_heard(pool: RenderPool) -> None:
    tokenizer = build_tokenizer("all")
    facts, grammar = vocabulary(tokenizer), build_grammar(tokenizer)
    model = build_model(tokenizer, layers=1, hidden=32, heads=2, intermediate=32, seed=3)
    prompts = draw("procedural", 4, tokenizer, torch.Generator().manual_seed(1))
    rollout = Sampler(model, pad_id=facts.pad_id, eos_id=None).sample(
        prompts, max_new_tokens=100, group_size=2, generator=torch.Generator().manual_seed(2), grammar=grammar
    )
    assert completion_metrics(rollout, facts.eos_id, grammar)["completions/unplayable_rate"] == 0
    assert np.isin(rollout.tokens, facts.drum_ids).any()
    scorer = Scorer(tokenizer, pool, load_reward("ce_proxy"), sample_rate=RATE)
    rated = scorer.collect(scorer.submit(rollout))
    assert rated.failed == rated.silent == 0 and rated.rewards.isfinite().all()


def test_a_clip_that_failed_is_nan_and_counted(tokenizer: Any, pool: RenderPool) -> None:
    scorer = Scorer(tokenizer, pool, load_reward("ce_proxy"), sample_rate=RATE)
    clips = scorer.submit(rollout_of(tokenizer, NOTE, HIGH, NOTE))
    lost: Future[Any] = Future()
    lost.set_exception(RenderError("twice"))
    rated = scorer.collect([clips[0], lost, clips[2]], keep=[1])
    assert rated.failed == 1 and rated.audio[1] is None
    assert rated.rewards.isnan().tolist() == [False, True, False]
    assert rated.rewards[0] == rated.rewards[2]
    metrics = rated.metrics(3)
    assert metrics["clips/failed"] == 1 and math.isfinite(metrics["reward/mean"])
    nothing = scorer.collect([lost, lost])
    assert nothing.failed == 2 and nothing.rewards.isnan().all()
    assert all(math.isnan(value) for key, value in nothing.metrics(2).items() if key == "reward/mean")


def test_metrics_by_hand() -> None:
    rewards = torch.tensor([1.0, 2.0, 3.0, 4.0, 4.0, math.nan])
    rated = Rated(rewards, {"CE": rewards}, [None] * 6, failed=1, silent=3)
    assert rated.metrics(3) == pytest.approx(
        {
            "reward/mean": 2.8, "reward/std": 1.3038405, "reward/min": 1, "reward/max": 4,
            "reward/zero_variance_groups": 0.5, "reward/axis_CE": 2.8, "clips/silent_rate": 0.5, "clips/failed": 1,
        }
    )  # fmt: skip


def test_rows_hold_the_tokens_without_what_follows_the_end(tokenizer: Any) -> None:
    rollout = rollout_of(tokenizer, NOTE + HIGH, [*NOTE, "EOS_None"])
    rewards = torch.tensor([5.0, 6.0])
    rows = Rated(rewards, {"CE": rewards}, [None, None], 0, 0).rows(rollout, 2)
    assert [row["group"] for row in rows] == [0, 0]
    assert [row["reward"] for row in rows] == [5.0, 6.0]
    assert [len(row["tokens"]) - row["prompt_length"] for row in rows] == [6, 4]
    assert rows[1]["tokens"][-1] == vocabulary(tokenizer).eos_id


def test_completion_metrics(tokenizer: Any) -> None:
    broken = ["Pitch_60", "Pitch_62", "Velocity_127", "Duration_1.0.12"]  # a pitch without its velocity
    rollout = rollout_of(tokenizer, [*NOTE, "EOS_None"], broken)
    got = completion_metrics(rollout, vocabulary(tokenizer).eos_id, build_grammar(tokenizer))
    assert got == {
        "completions/length": 4.0,
        "completions/truncated_rate": 0.5,
        "completions/unplayable_rate": 1 / 8,
    }


def test_a_reward_of_several_axes_is_combined(tokenizer: Any, pool: RenderPool) -> None:
    class TwoAxes(Reward):
        axes = ("LOUD", "LONG")
        sample_rate = 8000

        def rate(self, audio: torch.Tensor, lengths: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"LOUD": audio.abs().amax(1), "LONG": lengths.to(audio) / 8000}

    reward = TwoAxes()
    reward.set_weights({"LOUD": 1.0, "LONG": -3.0})
    scorer = Scorer(tokenizer, pool, reward, sample_rate=RATE)
    rated = scorer.collect(scorer.submit(rollout_of(tokenizer, NOTE, [*NOTE, "Position_24", *NOTE])))
    assert rated.scores["LONG"].tolist() == pytest.approx([0.5, 1.5], abs=1e-3)
    expected = (rated.scores["LOUD"] - 3 * rated.scores["LONG"]) / 4
    torch.testing.assert_close(rated.rewards, expected)
