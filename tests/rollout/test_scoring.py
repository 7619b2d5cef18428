"""smart.rollout: completions to rewards through the real renderer, and clips that fail."""

import gc
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import numpy as np
import programs
import pytest
import torch

from smart import Failure
from smart.model import build_model
from smart.prompts import draw
from smart.render import RenderError, RenderPool, load_soundfont, played_notes, render_notes, score_notes
from smart.reward import Reward, load_reward, resample
from smart.rollout import Clips, Rated, Scorer, completion_metrics
from smart.rollout.horizon import Horizon
from smart.run import Stopwatch
from smart.sampler import Rollout, Sampler
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
    rated = scorer.collect(Clips(scorer).submit_rest(rollout), keep=[0, 2])
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
    rated = scorer.collect(Clips(scorer).submit_rest(rollout))
    assert rated.failed == rated.silent == 0 and rated.rewards.isfinite().all()


def test_a_clip_that_failed_is_nan_and_counted(tokenizer: Any, pool: RenderPool) -> None:
    scorer = Scorer(tokenizer, pool, load_reward("ce_proxy"), sample_rate=RATE)
    clips = Clips(scorer).submit_rest(rollout_of(tokenizer, NOTE, HIGH, NOTE))
    lost: Future[Any] = Future()
    lost.set_exception(RenderError("twice"))
    rated = scorer.collect([clips[0], lost, clips[2]], keep=[1])
    assert rated.failed == 1 and rated.audio[1] is None
    assert rated.rewards.isnan().tolist() == [False, True, False]
    assert rated.rewards[0] == rated.rewards[2]
    metrics = rated.metrics(3)
    assert metrics["clips/failed"] == 1 and math.isfinite(metrics["reward/mean"])
    nothing = scorer.collect([lost, lost])
    lost_clips = Clips(scorer)
    lost_clips.futures = {1: lost, 0: lost}
    with pytest.raises(Failure, match="none of 2 clips could be rated; 2 of them"):
        lost_clips.rate().check()
    assert nothing.failed == 2 and nothing.rewards.isnan().all()
    assert all(math.isnan(value) for key, value in nothing.metrics(2).items() if key == "reward/mean")


@pytest.mark.parametrize("failing", [False, True])
def test_audio_is_freed_with_its_batch(tokenizer: Any, pool: RenderPool, failing: bool) -> None:
    """Without waiting for a collection of garbage, between which batches of audio piled up to gigabytes."""
    scorer = Scorer(tokenizer, pool, load_reward("ce_proxy"), sample_rate=RATE)
    rollout = rollout_of(tokenizer, NOTE, HIGH, NOTE)
    gc.collect()
    gc.disable()
    try:
        clips = Clips(scorer, Stopwatch())
        futures = clips.submit_rest(rollout)
        if failing:
            lost: Future[Any] = Future()
            lost.set_exception(RenderError("twice"))
            clips.futures[1] = lost
        heard = [weakref.ref(future.result()) for future in futures]
        rated = clips.rate()
        del clips, futures
        assert rated.failed == failing
        deadline = time.monotonic() + 10  # the worker's thread may still be handing over the last one
        while time.monotonic() < deadline and not all(audio() is None for audio in heard):
            time.sleep(0.01)
        assert [audio() is None for audio in heard] == [True] * 3
    finally:
        gc.enable()


class Broken(Reward):
    """Raises, or answers with the wrong shape."""

    axes = ("X",)
    sample_rate = RATE

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def rate(self, audio: torch.Tensor, lengths: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.how == "raises":
            raise OSError("the rater is out of order")
        return {"X": torch.zeros(len(audio) + 1)}


@pytest.mark.parametrize(
    ("how", "reason"), [("raises", "OSError: the rater is out of order"), ("shape", r"must be float32 of shape \(2,\)")]
)
def test_a_reward_that_breaks_is_named(tokenizer: Any, pool: RenderPool, how: str, reason: str) -> None:
    scorer = Scorer(tokenizer, pool, Broken(how), sample_rate=RATE)
    with pytest.raises(Failure, match=f"reward Broken failed on 2 clips .*{reason}"):
        scorer.collect(Clips(scorer).submit_rest(rollout_of(tokenizer, NOTE, HIGH)))


def test_a_reward_that_hangs_ends_the_process_in_one_line() -> None:
    code = """
import time, torch, numpy as np
from concurrent.futures import Future
from smart.reward import Reward
from smart.rollout import Scorer
from smart.tokens import build_tokenizer
class Hangs(Reward):
    axes, sample_rate = ("X",), 16000
    def rate(self, audio, lengths):
        if len(audio) == 1: time.sleep(60)
        return {"X": torch.ones(len(audio))}
scorer = Scorer(build_tokenizer(), None, Hangs(), sample_rate=16000, batch=2, deadline=0.5)
clip = Future()
clip.set_result(np.ones((2, 16000), np.float32))
print(scorer.collect([clip, clip]).rewards.tolist(), flush=True)
time.sleep(0.6)  # nothing is left over from a batch that was in time
print("alive", flush=True)
scorer.collect([clip])
print("not reached")
"""
    done = programs.run([sys.executable, "-c", code], timeout=50)
    assert (done.returncode, done.stdout) == (1, "[1.0, 1.0]\nalive\n")
    assert (
        done.stderr == "Error: reward Hangs gave no answer within 0.5 s, so the process ends; what was saved is kept\n"
    )


def test_a_reward_that_hangs_ends_the_process_though_nobody_listens() -> None:
    code = "import time; from smart.rollout.scorer import _within\nwith _within(0.3, 'it'): time.sleep(30)"
    reading, writing = os.pipe()
    with programs.start([sys.executable, "-c", code], stderr=writing) as process:
        os.close(reading)
        os.close(writing)
        assert process.wait(20) == 1


PAUSED = """
import time
from smart.rollout.scorer import _within
with _within(3.0, "a reward"):
    print("begun", flush=True)
    end = time.process_time() + 0.5  # of its own time
    while time.process_time() < end:
        sum(range(1000))
print("done", flush=True)
"""


@pytest.mark.slow
def test_a_pause_is_no_hang() -> None:
    with programs.start([sys.executable, "-c", PAUSED], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == "begun\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(4)
        process.send_signal(signal.SIGCONT)
        assert process.stdout.read() == "done\n"
    assert process.returncode == 0


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
    rated = scorer.collect(Clips(scorer).submit_rest(rollout_of(tokenizer, NOTE, [*NOTE, "Position_24", *NOTE])))
    assert rated.scores["LONG"].tolist() == pytest.approx([0.5, 1.5], abs=1e-3)
    expected = (rated.scores["LOUD"] - 3 * rated.scores["LONG"]) / 4
    torch.testing.assert_close(rated.rewards, expected)


# ------------------------------------------------------------------------------ what will be heard is settled


ALL = build_tokenizer("all")  # with a program before each note


def write_music(tokenizer: Any, seed: int, length: int) -> list[int]:
    """Tokens that look like music but keep no rule: positions and tempos anywhere, notes cut short, missing bars."""
    draw = random.Random(seed)
    kinds: dict[str, list[int]] = {}
    for name, number in tokenizer.vocab.items():
        kinds.setdefault(name.split("_")[0], []).append(number)
    pitches = draw.sample(kinds["Pitch"], 6)  # few, so that notes are struck again while they sound
    tempos = draw.choice([kinds["Tempo"], kinds["Tempo"][-8:], kinds["Tempo"][:8]])
    disorder = draw.choice([0.0, 0.0, 0.1, 0.4])
    weights = {"Bar": draw.choice([1, 2, 6]), "TimeSig": 0.5, "Tempo": draw.choice([0.0, 0.3, 1.0]), "Position": 3,
               "Note": draw.choice([0.3, 3, 6])}  # fmt: skip
    tokens: list[int] = []
    while len(tokens) < length:
        kind = draw.choices(list(weights), list(weights.values()))[0]
        if draw.random() < disorder:
            tokens.append(draw.choice(draw.choice(list(kinds.values()))))
        elif kind == "Note":
            tokens += [draw.choice(kinds["Program"])] if "Program" in kinds else []
            tokens.append(draw.choice(draw.choice([pitches, kinds.get("PitchDrum", pitches)])))
            tokens += [draw.choice(kinds["Velocity"]), draw.choice(kinds["Duration"])]
        else:
            tokens.append(draw.choice(tempos if kind == "Tempo" else kinds[kind]))
    return tokens[:length]


def heard(tokenizer: Any, tokens: Any, seconds: float) -> Any:
    """What the synthesiser gets: the length of the clip, and every event within it, in order.

    The number of an instrument's channel is left out: instruments that come later may shift it, not the order.
    """
    table = played_notes(score_notes(decode(tokenizer, tokens)), RATE)
    limit = round(seconds * RATE)
    if not len(table):
        return 0, []
    samples = min(limit, int(table[:, 1].max()))
    table = table[table[:, 0] < samples]
    table[:, 1] = table[:, 1].clip(max=samples)
    return samples, np.delete(table, 2, axis=1).tolist()


@pytest.mark.parametrize("vocabulary_", ["piano", "all"])
@pytest.mark.parametrize("seconds", [1.0, 10.0, 600.0])
def test_nothing_that_follows_a_settled_prefix_is_heard(tokenizer: Any, vocabulary_: str, seconds: float) -> None:
    """Many rows of disorderly music, each cut where it is first called settled; 600 s is beyond 100 beats."""
    tokenizer = ALL if vocabulary_ == "all" else tokenizer
    horizon = Horizon(tokenizer, seconds=seconds)
    length, settled, changed = 260, 0, 0
    rows = torch.tensor([write_music(tokenizer, seed, length) for seed in range(150)])
    open_rows = set(range(len(rows)))
    for width in (*range(3, 40), *range(40, length, 9)):
        found = horizon.settled(rows[:, :width])
        for row in sorted(open_rows & set(found.nonzero()[:, 0].tolist())):
            open_rows.remove(row)
            settled += 1
            assert heard(tokenizer, rows[row, :width], seconds) == heard(tokenizer, rows[row], seconds), (row, width)
            whole = score_notes(decode(tokenizer, rows[row]))
            changed += len(whole) != len(score_notes(decode(tokenizer, rows[row, :width])))
        # once settled, always settled
        assert found[sorted(set(range(len(rows))) - open_rows)].all()
    assert settled > 30
    assert changed > 5 or seconds == 600.0  # notes did follow


@pytest.mark.parametrize("vocabulary_", ["piano", "all"])
def test_the_clip_of_a_settled_prefix_is_bit_for_bit_the_whole_clip(tokenizer: Any, vocabulary_: str) -> None:
    tokenizer = ALL if vocabulary_ == "all" else tokenizer
    soundfont = load_soundfont("timgm")
    horizon = Horizon(tokenizer, seconds=3.0)
    rendered = 0
    for seed in range(40):
        tokens = torch.tensor(write_music(tokenizer, seed, 200))
        widths = [width for width in range(8, 200, 8) if horizon.settled(tokens[None, :width])]
        if widths and len(score_notes(decode(tokenizer, tokens))):
            early, whole = (
                render_notes(soundfont, score_notes(decode(tokenizer, part)), sample_rate=RATE, seconds=3.0)
                for part in (tokens[: widths[0]], tokens)
            )
            np.testing.assert_array_equal(early, whole)
            rendered += 1
    assert rendered > 10


def test_when_a_completion_is_settled_by_hand(tokenizer: Any) -> None:
    def settled(names: str, seconds: float = 10.0) -> bool:
        tokens = torch.tensor([[tokenizer.vocab[name] for name in names.split()]])
        return bool(Horizon(tokenizer, seconds=seconds).settled(tokens))

    start = "Bar_None TimeSig_4/4 Position_0 Tempo_120.0 "  # two seconds a bar
    note = "Pitch_60 Velocity_127 Duration_1.0.12 "
    assert not settled(start + note + 5 * "Bar_None " + note)  # the sixth bar begins at 10 s, too close to tell
    assert settled(start + note + 6 * "Bar_None " + note)
    assert not settled(start + note + 6 * "Bar_None " + "Pitch_60 Velocity_127")  # no note past 10 s yet
    assert not settled(start + note + 6 * "Bar_None ")  # the clip may still end where its one note ends
    assert not settled(start + note + 4 * "Bar_None " + "Position_47 " + note)  # near, in a bar that begins before
    assert settled(start + note + 5 * "Bar_None " + note, seconds=9.9)
    assert settled(start + note + 2 * "Bar_None " + "Position_0 Tempo_40.0 " + 2 * "Bar_None " + note)
    assert not settled(start + note + 2 * "Bar_None " + "Position_0 Tempo_250.0 " + 3 * "Bar_None " + note)
    assert settled(start + 24 * "Bar_None ", seconds=600.0) is False
    assert settled(start + 25 * "Bar_None ", seconds=600.0)  # 100 beats
    assert not settled(26 * "Bar_None ", seconds=600.0)  # the time signature may still come, and hold from the start
    assert not settled(9 * "Bar_None " + "TimeSig_3/8 " + note)  # it holds from the start: 0.75 s a bar
    assert settled("Position_0 " + note + 6 * "Bar_None " + "TimeSig_3/8 " + note)  # it comes after a note: 4/4 before


def test_rests_move_bars_so_nothing_is_settled_early() -> None:
    from miditok import REMI, TokenizerConfig

    tokenizer = REMI(TokenizerConfig(use_rests=True, use_tempos=True, use_time_signatures=True))
    names = ["Bar_None", "TimeSig_4/4", "Pitch_60", "Velocity_127", "Duration_1.0.8", *["Bar_None"] * 99]
    tokens = torch.tensor([[tokenizer.vocab[name] for name in [*names, *names[2:5]]]])
    assert not Horizon(tokenizer, seconds=1.0).settled(tokens).any()


class Stage:
    """A pool whose clips are rendered at once, and arrive only when the test says so; notes what was asked for."""

    def __init__(self) -> None:
        self.soundfont = load_soundfont("timgm")
        self.waiting: dict[Future[Any], Any] = {}

    def submit(self, score: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.waiting[future] = render_notes(self.soundfont, score_notes(score), sample_rate=RATE, seconds=2.0)
        return future

    def arrive(self, futures: list[Future[Any]]) -> None:
        for future in futures:
            future.set_result(self.waiting.pop(future))


class Recorded(Reward):
    """Loudness, and which batches it was asked to rate, in which order."""

    axes = ("LOUD",)
    sample_rate = 8000

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[list[float]] = []

    def rate(self, audio: torch.Tensor, lengths: torch.Tensor) -> dict[str, torch.Tensor]:
        loud = audio.square().sum(dim=1)
        self.batches.append(loud.tolist())
        return {"LOUD": loud}


def test_clips_are_submitted_while_others_are_drawn_and_rated_as_they_arrive(tokenizer: Any) -> None:
    """The same scores whether all was submitted at the end or as it settled, and whatever arrives first."""
    rows = [write_music(tokenizer, seed, 84) for seed in range(12)]
    for row, end in ((3, 30), (7, 83)):
        rows[row][end:] = [vocabulary(tokenizer).eos_id] + [0] * (83 - end)
    tokens = torch.tensor(rows)
    ends = torch.tensor([end + 1 if end else 99 for end in (0, 0, 0, 30, 0, 0, 0, 83, 0, 0, 0, 0)])
    rollout = Rollout(tokens, torch.arange(4, 84) < ends[:, None], torch.zeros(12, 80))

    stage, reward = Stage(), Recorded()
    scorer = Scorer(tokenizer, stage, reward, sample_rate=RATE, seconds=2.0, batch=4)
    late = Clips(scorer).submit_rest(rollout)
    stage.arrive(late)
    expected = scorer.collect(late)
    assert len(reward.batches) == 3 and len(expected.rewards.unique()) > 6

    for seed in range(3):
        stopwatch = Stopwatch()
        clips = Clips(scorer, stopwatch)
        counts = []
        for width in (16, 36, 52, 68):
            clips.submit_settled(tokens[:, :width], ends <= width)
            counts.append(len(clips.futures))
        assert 0 < counts[0] < counts[-1] < 12
        futures = clips.submit_rest(rollout)
        stage.arrive(random.Random(seed).sample(futures, 12))
        rated = scorer.collect(futures, stopwatch=stopwatch)
        assert torch.equal(rated.rewards, expected.rewards)
        assert (rated.failed, rated.silent) == (expected.failed, expected.silent)
        stages = [span.stage for span in stopwatch.spans]
        assert stages.count("render") == stages.count("wait") == stages.count("rate") == 12


def test_a_clip_is_rated_as_it_arrives_and_the_order_changes_no_bit(tokenizer: Any) -> None:
    """Each clip arrives only once the one before has been rated; the ratings are those of one batch."""
    rollout = rollout_of(
        tokenizer, NOTE, HIGH, NOTE + HIGH, [*NOTE, "Position_24", *HIGH], [*HIGH, "Position_12", *NOTE]
    )
    stage = Stage()
    whole = Scorer(tokenizer, stage, load_reward("ce_proxy"), sample_rate=RATE, seconds=2.0, batch=5)
    clips = Clips(whole).submit_rest(rollout)
    stage.arrive(clips)
    expected = whole.collect(clips)

    class OneByOne(type(load_reward("ce_proxy"))):  # type: ignore[misc]
        def rate(self, audio: torch.Tensor, lengths: torch.Tensor) -> dict[str, torch.Tensor]:
            answer: dict[str, torch.Tensor] = super().rate(audio, lengths)
            stage.arrive([clips[order.pop()]] if order else [])
            return answer

    def give_up() -> None:
        for row in order:
            clips[row].set_exception(RenderError("the clip before it waited for its neighbours"))

    for seed in range(3):
        scorer = Scorer(tokenizer, stage, OneByOne(), sample_rate=RATE, seconds=2.0)
        clips = Clips(scorer).submit_rest(rollout)
        order = random.Random(seed).sample(range(5), 5)
        stage.arrive([clips[order.pop()]])
        watchdog = threading.Timer(60, give_up)
        watchdog.start()
        rated = scorer.collect(clips)
        watchdog.cancel()
        assert rated.failed == 0 and not order
        assert torch.equal(rated.rewards, expected.rewards) and rated.rewards.isfinite().all()


def test_a_batch_waits_for_its_own_clips_only(tokenizer: Any) -> None:
    """Row 1 arrives only once the reward has rated the rows of the other batch."""
    stage = Stage()

    class Patient(Recorded):
        def rate(self, audio: torch.Tensor, lengths: torch.Tensor) -> dict[str, torch.Tensor]:
            answer = super().rate(audio, lengths)
            stage.arrive(slow[:1])
            slow.clear()
            return answer

    reward = Patient()
    scorer = Scorer(tokenizer, stage, reward, sample_rate=RATE, seconds=2.0, batch=2)
    clips = Clips(scorer).submit_rest(rollout_of(tokenizer, NOTE, HIGH, NOTE + HIGH, [*NOTE, "Position_24", *HIGH]))
    slow = [clips[1]]
    stage.arrive([clips[3], clips[0], clips[2]])
    rated = scorer.collect(clips, keep=[1])
    assert rated.rewards.isfinite().all() and rated.audio[1] is not None
    assert [len(batch) for batch in reward.batches] == [2, 2]
    assert reward.batches[0] == rated.rewards[2:].tolist() and reward.batches[1] == rated.rewards[:2].tolist()
