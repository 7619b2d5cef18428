"""smart.guard: held-out measurements, the rule for collapse, the best checkpoint and when to stop."""

import math
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_tiny_model
from symusic import Note, Score, Track

from smart import UserError, diversity
from smart.distributed import World
from smart.diversity import alikeness
from smart.guard import COMPLETIONS, Guard, HeldOut, Judge, Measured, collapsed, effective_number, judged_lower
from smart.logprobs import Reference
from smart.prompts import draw
from smart.render import RenderPool, find_soundfont
from smart.reward import Mixture, Reward, load_reward
from smart.reward.mixture import Part
from smart.rollout import Batch, Batches, Clips, Drawn, Scorer
from smart.sampler import Rollout, Sampler
from smart.tokens import vocabulary

NAN = math.nan


def piece(seed: int, notes: int = 40, pitches: range = range(40, 90)) -> Any:
    random = np.random.default_rng(seed)
    track = Track()
    for _ in range(notes):
        time, pitch, velocity = random.integers(0, 64) * 120, random.choice(pitches), random.integers(30, 120)
        track.notes.append(Note(int(time), 240, int(pitch), int(velocity)))
    score = Score(480)
    score.tracks.append(track)
    return score


def variety(pieces: list[Any]) -> dict[str, float]:
    return diversity.summary(pieces, groups=[row // COMPLETIONS for row in range(len(pieces))])


def test_copies_are_a_collapse_and_different_pieces_are_not() -> None:
    base = variety([piece(seed) for seed in range(32)])
    assert collapsed(base, base) is None
    assert collapsed(base, variety([piece(seed) for seed in range(100, 132)])) is None
    for pieces in (
        [piece(7)] * 32,  # one piece
        [piece(seed % 8) for seed in range(32)],  # eight, for any prompt
        [piece(row // COMPLETIONS) for row in range(32)],  # one for each prompt
    ):
        reason = collapsed(base, variety(pieces))
        assert reason is not None and "under half of the base's" in reason


def test_the_rule_is_under_half_or_under_three_quarters_far_from_the_base() -> None:
    base = {"vendi": 20.0, "pitches": 40.0, "reward": 7.0, "vendi_audio": 1.4}
    assert collapsed(base, base | {"vendi": 10.0, "reward": 1.0}) is None  # exactly half; the reward does not matter
    assert collapsed(base, base | {"vendi": 9.99}) == "vendi is 9.99, under half of the base's 20"
    assert collapsed(base, base | {"pitches": 19.0}) == "pitches is 19, under half of the base's 40"
    far = base | {"kl": 0.26, "pitches": 29.0}
    assert (
        collapsed(base, far) == "pitches is 29, under three quarters of the base's 40, at a KL of 0.26 nats per token"
    )
    assert collapsed(base, far | {"kl": 0.25}) is collapsed(base, far | {"pitches": 30.0}) is None
    assert collapsed(base, {"reward": 7.0}) is collapsed({}, base) is collapsed(base, base | {"vendi": NAN}) is None


def test_effective_number_by_hand() -> None:
    assert effective_number(np.array([60, 60, 72, 72])) == pytest.approx(2)
    assert effective_number(np.arange(128)) == pytest.approx(128)
    assert effective_number(np.array([5] * 9)) == 1
    assert effective_number(np.array([1, 1, 1, 2])) == pytest.approx(4 / 3**0.75)
    assert effective_number(np.array([])) == 0


def test_alikeness_of_copies_and_of_different_pieces() -> None:
    low, high = piece(1, pitches=range(48, 54)), piece(2, pitches=range(54, 60))  # no pitch class in common
    got = alikeness([low, low, high, low, high, high], 3)
    torch.testing.assert_close(got[0], torch.tensor([[1.0, 1, 0], [1, 1, 0], [0, 0, 1]]))
    torch.testing.assert_close(got[1], torch.tensor([[1.0, 0, 0], [0, 1, 1], [0, 1, 1]]))


def history(*rows: tuple[float, float, float], **settings: Any) -> Guard:
    """A guard that has measured the base (KL 0, judge 5, vendi 20), then each (kl, judge, vendi) ten steps later."""
    guard = Guard(None, **settings)
    for number, (kl, judge, vendi) in enumerate([(0.0, 5.0, 20.0), *rows]):
        guard.history.append(Measured(10 * number, {"kl": kl, "judge": judge, "vendi": vendi}))
    return guard


def test_one_bad_measurement_is_no_collapse_and_two_in_a_row_are() -> None:
    assert history((0.1, 5, 9)).collapse is None
    assert history((0.1, 5, 9), (0.1, 5, 15), (0.1, 5, 9)).collapse is None
    guard = history((0.1, 5, 9), (0.1, 5, 8))
    assert guard.collapse == "vendi is 8, under half of the base's 20"
    assert guard.stop is None  # stop_on_collapse is off
    assert history((0.1, 5, 9), (0.1, 5, 8), stop_on_collapse=True).stop == guard.collapse
    assert history((0.1, 5, 9), (0.1, 5, 8), (0.1, 5, 15), stop_on_collapse=True).stop is None


def test_a_judge_that_speaks_against_the_pieces_twice_is_a_collapse() -> None:
    base = {"judge": 6.0, "judge_std": 2.0}
    assert judged_lower(base, {"judge": 5.0}) is None and judged_lower(base, {"judge": math.nan}) is None
    said = "the judge's rating is 4.9, more than half a standard deviation under the base's 6"
    assert judged_lower(base, {"judge": 4.9}) == said
    assert judged_lower({"judge": -1.5}, {"judge": -3.0}) is None, "plausibility"
    assert judged_lower(base | {"judge_std": 0.0}, {"judge": 5.0}) is None
    guard = Guard(None, stop_on_collapse=True)
    guard.history = [Measured(step, {"judge": judge, "judge_std": 2.0, "kl": 0.1}) for step, judge in ((0, 6), (10, 4))]
    assert guard.collapse is None, "once"
    guard.history.append(Measured(20, {"judge": 4.9, "kl": 0.1}))
    assert guard.collapse == guard.stop == said and guard.best == 20, "the best is chosen by the judge itself"


def test_the_budget_stops_where_it_is_reached() -> None:
    assert history((0.1, 5, 20), (0.19, 5, 20), kl_budget=0.2).stop is None
    assert history((0.1, 5, 20), (0.2, 5, 20), kl_budget=0.2).stop == (
        "KL to the base is 0.2 nats per token, the budget 0.2"
    )
    assert history(kl_budget=1e-9).stop is None  # the base itself has no KL
    assert history((9.0, 5, 20)).stop is None  # no budget


def test_the_best_has_the_highest_score_within_the_budget_and_not_collapsed() -> None:
    assert Guard(None).best is history().best is None
    assert history((0.1, 4, 20), (0.2, 6, 20), (0.3, 5, 20)).best == 20
    assert history((0.1, 6, 20), (0.2, 6, 20)).best == 10  # the first of equals
    assert history((0.1, 4, 20), (0.2, 6, 20), (0.3, 9, 20), kl_budget=0.25).best == 20
    assert history((0.1, 4, 20), (0.2, 9, 9), (0.3, 5, 20)).best == 30  # a collapsed one is never the best
    assert history((0.1, NAN, 20), (0.2, 1, 20)).best == 20
    assert history((0.4, 1, 20), (0.3, 2, 20), (0.5, 9, 20), kl_budget=0.2).best == 20  # all over budget: the closest


def test_the_best_changes_only_to_what_was_just_measured() -> None:
    """Its checkpoint is written at that time, or never."""
    random = np.random.default_rng(0)
    for _ in range(200):
        rows = [tuple(row) for row in random.choice([0.1, 0.3, 4, 9, NAN], (12, 3))]
        best = [history(*rows[: count + 1], kl_budget=0.2).best for count in range(12)]
        for number in range(1, 12):
            assert best[number] in (best[number - 1], 10 * (number + 1))


def test_a_guard_that_is_read_back_decides_the_same(tmp_path: Path) -> None:
    guard = history((0.1, 5, 9), (0.3, NAN, 8), stop_on_collapse=True)
    guard.write(tmp_path)
    again = Guard(None, stop_on_collapse=True)
    again.read(tmp_path)
    assert (again.stop, again.best, again.collapse) == (guard.stop, guard.best, guard.collapse)
    again.write(tmp_path / "..")
    assert (tmp_path.parent / "guard.json").read_bytes() == (tmp_path / "guard.json").read_bytes()
    (tmp_path / "guard.json").write_text('[["one", 2]]')
    with pytest.raises(UserError, match=r"guard\.json cannot be read"):
        again.read(tmp_path)


class Loudness(Reward):
    """Two axes: how loud, and how long."""

    axes = ("loud", "long")
    sample_rate = 8000

    def rate(self, audio: torch.Tensor, lengths: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loud": audio.square().mean(1), "long": lengths.float()}


def done(audio: np.ndarray) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(audio)
    return future


def test_the_second_score_is_never_what_training_optimises(tokenizer: Any) -> None:
    clips = [done(np.full((2, samples), 0.5, np.float32)) for samples in (800, 1600)]
    scorer = Scorer(tokenizer, None, Loudness(), sample_rate=8000)  # type: ignore[arg-type]  # nothing is rendered
    batches = Batches(scorer, World(torch.device("cpu")))
    mask = torch.tensor([[True, True], [True, False]])
    rollout = Rollout(torch.zeros(2, 6, dtype=torch.int64), mask, torch.zeros(2, 2))
    drawn = Drawn(rollout, Clips(scorer), 0)
    drawn.clips.futures = dict(enumerate(clips))
    batch = Batch(rollout, scorer.collect(clips), torch.tensor([[-0.5, -1.5], [-2.0, -9.0]]))
    other = Judge(Loudness())
    assert "long" in other.name and "loud " not in other.name
    assert other.rate(drawn, batch, batches).tolist() == [800, 1600]
    both = Loudness()
    both.set_weights({"loud": 1.0, "long": 1.0})
    plain = Judge(both)
    assert "plausibility" in plain.name
    assert plain.rate(drawn, batch, batches).tolist() == [-1, -2]
    second = Judge(Loudness(), both)
    assert second.rate(drawn, batch, batches).tolist() == pytest.approx([400.125, 800.125], abs=0.1)
    assert Judge(load_reward("ce_proxy")).name == plain.name


def test_where_no_judge_is_named_an_ear_that_is_not_optimised_judges() -> None:
    from smart.guard import default_judge

    assert default_judge(Loudness()) is None, "the other axis judges"
    ear, other = load_reward("naturalness"), load_reward("naturalness_mel")
    proxy = load_reward("ce_proxy")
    assert default_judge(proxy) == default_judge(ear) == "naturalness_mel"
    assert default_judge(other) == "naturalness"
    assert default_judge(Mixture([Part("a", proxy), Part("b", other)])) == "naturalness"
    assert default_judge(Mixture([Part("a", ear), Part("b", other)])) is None, "plausibility"
    assert "plausibility" in Judge(Loudness(), plausible=True).name


def test_a_judge_hears_through_its_own_soundfont(tokenizer: Any) -> None:
    """What it rates comes from its own renderer, not from the clips that the reward heard."""

    class Silent:
        def submit(self, piece: Any) -> Future[Any]:
            return done(np.zeros((2, 800), np.float32))

    clips = [done(np.full((2, 800), 0.5, np.float32))]
    scorer = Scorer(tokenizer, None, Loudness(), sample_rate=8000)  # type: ignore[arg-type]  # nothing is rendered
    batches = Batches(scorer, World(torch.device("cpu")))
    rollout = Rollout(torch.zeros(1, 6, dtype=torch.int64), torch.ones(1, 2, dtype=torch.bool), torch.zeros(1, 2))
    drawn = Drawn(rollout, Clips(scorer), 0)
    drawn.clips.futures = dict(enumerate(clips))
    batch = Batch(rollout, scorer.collect(clips), torch.zeros(1, 2))
    own = Judge(Loudness(), Loudness(), pool=Silent(), soundfont="other")  # type: ignore[arg-type]  # a fake
    assert own.name == "Loudness (loud) through other"
    assert own.rate(drawn, batch, batches).tolist() == [0]
    assert Judge(Loudness(), Loudness()).rate(drawn, batch, batches).tolist() == [0.25]


@pytest.fixture(scope="module")
def soundfont() -> Path:
    return find_soundfont("timgm")


def held_out(tokenizer: Any, base: Any, pool: RenderPool, **changes: Any) -> HeldOut:
    reward = load_reward("ce_proxy")

    cpu = torch.device("cpu")
    scorer = Scorer(tokenizer, pool, reward, sample_rate=44100, seconds=2.0)
    settings: dict[str, Any] = {
        "seed": 5,
        "batches": Batches(scorer, World(cpu), max_new_tokens=48),
        "judge": Judge(reward),
        "reference": Reference(base, temperature=1.0, micro_batch=16, autocast=torch.autocast("cpu", enabled=False)),
    }
    prompts = draw("procedural", 3, tokenizer, torch.Generator().manual_seed(5))
    return HeldOut(prompts, **settings | changes)


def test_a_measurement_depends_on_the_policy_alone(tokenizer: Any, tiny_model: Any, soundfont: Path) -> None:
    """The base has KL 0, the same policy gives the same numbers, and no other random stream changes."""
    facts = vocabulary(tokenizer)
    policy = make_tiny_model(tokenizer)
    with torch.no_grad():
        policy.lm_head.weight.mul_(1.1)
    samplers = [Sampler(model, pad_id=facts.pad_id, eos_id=facts.eos_id) for model in (tiny_model, policy)]
    before = torch.random.get_rng_state()
    with RenderPool(soundfont, seconds=2.0, workers=1) as pool:
        held = held_out(tokenizer, tiny_model, pool)
        base, moved, again = (held.measure(samplers[which]) for which in (0, 1, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert moved == again and moved != base
    assert abs(base["kl"]) < 1e-5 < 1e-3 < moved["kl"]
    assert collapsed(base, base) is None
    for values in (base, moved):
        assert values["judge"] == values["plausibility"] < 0
        assert 1 <= values["vendi"] <= 12 and 1 <= values["vendi_within"] <= COMPLETIONS
        assert values["kl_sequence"] == pytest.approx(values["kl"] * values["length"], rel=1e-4)

    # the same samples again: likelihood and KL from the definition, in float64
    rollout = samplers[1].sample(
        held.prompts, group_size=COMPLETIONS, generator=torch.Generator().manual_seed(5), max_new_tokens=48
    )
    logp = {}
    for name, model in (("base", tiny_model), ("policy", policy)):
        probs = model.double()(input_ids=rollout.tokens).logits[:, 3:-1].softmax(-1)
        logp[name] = probs.gather(-1, rollout.tokens[:, 4:, None])[..., 0].log()
    kl = (logp["policy"] - logp["base"])[rollout.mask].mean().item()
    assert moved["kl"] == pytest.approx(kl, rel=1e-3)
    likely = (logp["base"] * rollout.mask).sum(1) / rollout.mask.sum(1)
    assert moved["plausibility"] == pytest.approx(likely.mean().item(), rel=1e-4)


def test_it_measures_every_few_iterations(tokenizer: Any) -> None:
    class Counted:
        def measure(self, sampler: Any) -> dict[str, float]:
            return {"kl": sampler, "judge": 1.0, "vendi": 2.0}

    guard = Guard(Counted(), every=3)  # type: ignore[arg-type]  # a fake
    looks = {step: guard.look(step, float(step)) for step in range(8)}  # type: ignore[arg-type]  # and its sampler
    assert [step for step, found in looks.items() if found] == [0, 3, 6]
    assert [step for step, _ in guard.history] == [0, 3, 6]
    assert looks[6]["held_out/kl"] == 6.0 and looks[6]["held_out/collapsed"] == 0.0
    assert Guard(None).look(0, None) == {}  # type: ignore[arg-type]  # never asked
