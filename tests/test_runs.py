"""Whole runs of ``python -m smart.grpo``: what they leave, what they learn from, and what they refuse.

Those that end before their time are in test_runs_interrupted.py.
"""

import json
import math
import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import programs
import pytest
import soundfile
import torch
from miditok import REMI, TokenizerConfig
from runs import HELD_OUT, arguments, build_corpus, metrics, pretrain, run
from safetensors.torch import load_file

from smart.config import SHIPPED, load, shipped
from smart.grpo import train
from smart.model import build_model, load_base, save_base
from smart.prompts import draw
from smart.render import RenderError, open_renderer
from smart.reward import Reward
from smart.run.checkpoint import read_tensors
from smart.sampler import Sampler
from smart.tokens import vocabulary
from smart.tuning import AHEAD

pytestmark = pytest.mark.slow  # whole programs


def test_what_a_run_leaves(finished: Path, base: Path) -> None:
    at_base, *rows = metrics(finished)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    measured = [at_base, *rows[1::2]]
    assert all({key for key in row if key.startswith("held_out/")} == HELD_OUT for row in measured)
    assert not any(key.startswith("held_out/") for row in rows[::2] for key in row)
    assert at_base["step"] == 0 and abs(at_base["held_out/kl"]) < 1e-5 < abs(measured[1]["held_out/kl"])
    best = max(rows[1::2], key=lambda row: row["held_out/judge"])["step"]
    assert (finished / "checkpoints" / "best").readlink() == Path(f"{best:08d}")
    for key in (
        "reward/mean", "reward/std", "reward/min", "reward/max", "reward/axis_CE", "reward/zero_variance_groups",
        "policy/kl", "policy/entropy", "policy/clip_fraction", "policy/grad_norm", "policy/dlogp_max",
        "completions/length", "completions/truncated_rate", "completions/unplayable_rate",
        "clips/silent_rate", "clips/failed", "policy/dlogp_mean",
    ):  # fmt: skip
        assert all(isinstance(row[key], float) for row in rows), key
    assert all(row["policy/dlogp_max"] < 1e-4 for row in rows)  # the sampler and the learner agree
    assert all(row["policy/dlogp_mean"] <= row["policy/dlogp_max"] for row in rows)
    stages = ("save", "generate", "reference", "score", "learn", "record", "iteration", "wait", "rate", "render")
    timed = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    for row in timed[1:]:
        seconds = {stage: row[f"seconds/{stage}"] for stage in stages}
        assert seconds["iteration"] == pytest.approx(sum(seconds[stage] for stage in stages[:6]))
        assert seconds["wait"] + seconds["rate"] <= seconds["score"]
    traces = sorted((finished / "traces").iterdir())
    assert [path.name for path in traces] == ["00000004.json", "00000004.png"]
    spans = [event for event in json.loads(traces[0].read_text())["traceEvents"] if event["ph"] == "X"]
    assert [span["name"] for span in spans].count("render") == 6
    assert rows[0]["policy/kl"] < 1e-6 < rows[-1]["policy/kl"]
    assert [row["policy/learning_rate"] for row in rows] == pytest.approx([3e-4 * k / 6 for k in (6, 5, 4, 3, 2, 1)])

    import pyarrow.parquet as pq

    completions = pq.read_table(finished / "completions").to_pylist()
    assert len(completions) == 6 * 6
    first = [row for row in completions if row["step"] == 1]
    assert np.mean([row["reward"] for row in first]) == pytest.approx(rows[0]["reward/mean"], abs=1e-5)
    assert all(len(row["tokens"]) <= 4 + 40 for row in completions)

    config = load(finished / "config.toml")
    assert config.grpo.iterations == 6 and config.model.base == str(base)
    assert list(finished.glob("tensorboard/events*")) and (finished / "reward_mean.png").stat().st_size > 5000
    for name in ("samples/00000003/00", "samples/00000006/01", "final/00-base", "final/01-tuned"):
        audio, rate = soundfile.read((finished / name).with_suffix(".wav"))
        assert rate == 44100 and audio.shape[1] == 2 and len(audio) <= 2 * rate
        assert np.abs(audio).max() > 0.9
        assert (finished / name).with_suffix(".mid").stat().st_size > 50
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["tuned"]["n"] == summary["base"]["n"] == 4
    tuned, _ = load_base(finished / "tuned")
    original, _ = load_base(base)
    assert not torch.equal(tuned.lm_head.weight, original.lm_head.weight)
    assert sorted(path.name for path in (finished / "checkpoints").iterdir()) == [
        "00000002",
        "00000004",
        "00000006",
        "best",
    ]


def test_whose_music_an_iteration_learns_from(either: list[Path], base: Path) -> None:
    """Its own policy's; with a batch drawn ahead, that of the policy one iteration ago."""
    import pyarrow.parquet as pq

    now, behind = ([row for row in metrics(folder) if row["step"]] for folder in either)
    assert now[0] == behind[0] != now[1]  # the first is on-policy either way
    assert behind[0]["policy/dlogp_max"] < 1e-4 and behind[0]["policy/clip_fraction"] == 0
    assert all(row["policy/dlogp_mean"] > 1e-3 and row["policy/ratio"] != 1 for row in behind[1:])

    for ahead, folder in enumerate(either):
        written: dict[int, list[list[int]]] = {}
        for row in pq.read_table(folder / "completions").to_pylist():
            written.setdefault(row["step"], []).append(row["tokens"])

        def trimmed(rollout: Any) -> list[list[int]]:
            return [row[: 4 + n].tolist() for row, n in zip(rollout.tokens, rollout.mask.sum(1).tolist(), strict=True)]

        # a checkpoint's policy, from the checkpoint's random state, writes what comes next
        for done, model in [(0, base), *((step, folder / "checkpoints" / f"{step:08d}") for step in (2, 4, 6))]:
            policy, tokenizer = load_base(model)
            facts = vocabulary(tokenizer)
            generators = [torch.Generator().manual_seed(1) for _ in range(2)]
            sampler = Sampler(policy, pad_id=facts.pad_id, eos_id=facts.eos_id)
            kept = model / AHEAD
            assert kept.exists() == (0 < done < 6 and ahead == 1)
            if done:
                state = read_tensors(model / "state.safetensors")
                for name, generator in zip(("prompts", "sampler"), generators, strict=True):
                    generator.set_state(state[f"rng.{name}"])
            for step in [done + 1 + ahead] if done else range(1, 2 + ahead):
                prompts = draw("procedural", 2, tokenizer, generators[0])
                drawn = sampler.sample(prompts, max_new_tokens=40, group_size=3, generator=generators[1])
                assert trimmed(drawn) == written.get(step, trimmed(drawn))


class Late:
    """The pool, but no clip of a batch arrives before all of the next batch have been asked for."""

    def __init__(self, pool: Any, *, batch: int, batches: int) -> None:
        self.pool, self.batch, self.batches = pool, batch, batches
        self.asked: list[tuple[Future[Any], Future[Any]]] = []
        self.events: list[tuple[str, int]] = []

    def submit(self, score: Any) -> Future[Any]:
        number = len(self.asked) // self.batch
        if number >= self.batches:  # base against tuned
            return self.pool.submit(score)  # type: ignore[no-any-return]  # a Future
        late: Future[Any] = Future()
        self.asked.append((late, self.pool.submit(score)))
        self.events.append(("asked", number))
        if len(self.asked) % self.batch == 0:
            self.arrive(number - 1)
            if number == self.batches - 1:
                self.arrive(number)
        return late

    def fallback_fraction(self, clips: Any) -> None:
        return None

    def fallback_kinds(self, clips: Any) -> dict[str, float]:
        return {}

    def arrive(self, number: int) -> None:
        for late, clip in self.asked[max(number, 0) * self.batch : (number + 1) * self.batch]:
            audio = clip.result()
            self.events.append(("arrived", number))
            late.set_result(audio)

    def give_up(self) -> None:
        for late, _ in self.asked:
            if not late.done():
                late.set_exception(RenderError("it would have waited for ever"))


def test_what_the_bank_leaves_to_the_workers_is_counted_by_reason(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stored note of ten minutes needs 100 MB, so none fits into the memory that the configuration allows."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    changes = {"render.backend": "bank", "render.bank_megabytes": 16, "render.seconds": 600.0, "grpo.iterations": 1}
    train(load("quickstart.toml", arguments(base, tmp_path, **changes)[1::2]))
    row = metrics(tmp_path / "r")[1]
    assert row["render/fallback_fraction_memory"] == row["render/fallback_fraction"] > 0
    assert row["clips/failed"] == 0


def test_rendering_is_hidden_behind_the_next_batch(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow: a batch's clips need not arrive before the whole next batch has been written."""
    pools = []

    @contextmanager
    def open_late(*args: Any, **options: Any) -> Iterator[Late]:
        with open_renderer(*args, **options) as pool:
            pools.append(late := Late(pool, batch=6, batches=4))
            watchdog = threading.Timer(60, late.give_up)
            watchdog.start()
            yield late
            watchdog.cancel()

    monkeypatch.setattr("smart.tuning.open_renderer", open_late)
    changes = {"grpo.rollouts_ahead": 1, "grpo.iterations": 4, "track.trace_every": 1, "track.held_out_every": 0}
    train(load("quickstart.toml", arguments(base, tmp_path, **changes)[1::2]))
    one = [("asked", 0)] * 6
    for number in range(1, 4):
        one += [("asked", number)] * 6 + [("arrived", number - 1)] * 6
    assert pools[0].events == one + [("arrived", 3)] * 6
    rows = metrics(tmp_path / "r")
    assert all(row["clips/failed"] == 0 for row in rows)
    rendered = 0
    for path in (tmp_path / "r" / "traces").glob("*.json"):
        events = json.loads(path.read_text())["traceEvents"]
        spans = [(e["ts"], e["ts"] + e["dur"], e["name"]) for e in events if e["ph"] == "X" and e["tid"] == 0]
        assert [name for *_, name in sorted(spans)] == ["save", "generate", "reference", "score", "learn", "record"]
        rendered += sum(e["name"] == "render" for e in events)
    assert rendered == 4 * 6  # each belongs to the iteration in which it arrived


def test_looking_on_changes_nothing(base: Path, finished: Path, tmp_path: Path) -> None:
    """Without measurements the same is drawn, learnt and saved, to the byte."""
    quiet = {"track.held_out_every": 0}
    status, output = run("grpo", "--config", "quickstart.toml", *arguments(base, tmp_path, **quiet))
    assert status == 0 and "held-out" not in output, output

    def trained(folder: Path) -> list[dict[str, Any]]:
        rows = [row for row in metrics(folder) if row["step"]]
        return [{key: value for key, value in row.items() if not key.startswith("held_out/")} for row in rows]

    folder = tmp_path / "r"
    assert trained(folder) == trained(finished) and len(trained(folder)) == len(metrics(folder)) == 6
    import pyarrow.parquet as pq

    assert pq.read_table(folder / "completions").equals(pq.read_table(finished / "completions"))
    for name in ("tuned/model.safetensors", "summary.json", "final/01-tuned.wav"):
        assert (folder / name).read_bytes() == (finished / name).read_bytes(), name
    assert not (folder / "checkpoints" / "best").exists()


def test_the_bonus_for_diversity_moves_advantages_alone(
    base: Path, finished: Path, tmp_path: Path, tokenizer: Any
) -> None:
    """The first batch is what it was, rewards too; its advantages are those of the two pure functions."""
    import pyarrow.parquet as pq

    from smart.diversity import alikeness, distinct_rewards
    from smart.grpo import group_advantages
    from smart.tokens import decode

    changes = {"grpo.diversity": 5.0, "grpo.iterations": 1, "track.held_out_every": 0}
    status, output = run("grpo", "--config", "quickstart.toml", *arguments(base, tmp_path, **changes))
    assert status == 0, output
    rows = pq.read_table(tmp_path / "r" / "completions").to_pylist()
    plain = [row for row in pq.read_table(finished / "completions").to_pylist() if row["step"] == 1]
    assert [(row["tokens"], row["reward"]) for row in rows] == [(row["tokens"], row["reward"]) for row in plain]
    alike = alikeness([decode(tokenizer, torch.tensor(row["tokens"])) for row in rows], 3)
    rewards = torch.tensor([row["reward"] for row in rows])
    expected = group_advantages(distinct_rewards(rewards, alike, weight=5.0), 3)
    assert [row["advantage"] for row in rows] == pytest.approx(expected.tolist(), abs=1e-5)
    assert [row["advantage"] for row in rows] != pytest.approx([row["advantage"] for row in plain], abs=1e-2)


@pytest.mark.slow
def test_a_spent_budget_ends_the_run_with_the_best(base: Path, tmp_path: Path) -> None:
    """Its policy runs away from the base; the budget lies between two of its measurements; one checkpoint is kept."""
    changes: dict[str, Any] = {"grpo.learning_rate": 3e-3, "grpo.beta": 0, "grpo.iterations": 8}
    free = tmp_path / "free"
    status, output = run("grpo", "--config", "quickstart.toml", *arguments(base, free, **changes))
    assert status == 0, output
    first, *later = [row["held_out/kl"] for row in metrics(free / "r")[1:] if "held_out/kl" in row]
    highest = first
    for kl in later[:-1]:
        if kl > 1.05 * highest:  # rounded as below, the budget is between the two
            break
        highest = max(highest, kl)
    budget = float(f"{(highest + kl) / 2:.3g}")
    assert highest < budget < kl, (first, later)
    changes |= {"grpo.kl_budget": budget, "track.keep_checkpoints": 1}
    args = ("--config", "quickstart.toml", *arguments(base, tmp_path, **changes))
    status, output = run("grpo", *args)
    assert status == 0, output
    folder = tmp_path / "r"
    rows = metrics(folder)
    *within, over = [row for row in rows[1:] if "held_out/kl" in row]
    assert within and all(row["held_out/kl"] < budget for row in within) and over["held_out/kl"] >= budget
    assert over is rows[-1] and over["step"] < 8
    best = max(within, key=lambda row: row["held_out/judge"])["step"]
    assert f"tuned/ is iteration {best}, the best by the held-out score" in output and f"{budget:g}" in output
    kept = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert kept == [f"{best:08d}", f"{over['step']:08d}", "best"]
    tuned = (folder / "tuned" / "model.safetensors").read_bytes()
    assert tuned == (folder / "checkpoints" / f"{best:08d}" / "model.safetensors").read_bytes()
    status, output = run("grpo", *args, "--resume")  # it knows that it has ended
    assert status == 0 and metrics(folder) == rows, output
    assert (folder / "tuned" / "model.safetensors").read_bytes() == tuned
    weights = bytearray(tuned)
    weights[-1] ^= 1
    (folder / "checkpoints" / f"{best:08d}" / "model.safetensors").write_bytes(weights)
    status, output = run("grpo", *args, "--resume")  # no damaged one becomes tuned/: the other that was kept does
    assert status == 0 and f"{best:08d}: model.safetensors is damaged" in output, output
    assert f"tuned/ is iteration {over['step']}" in output


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"render.soundfont": "/no/such.sf2"}, "soundfont /no/such.sf2 does not exist"),
        ({"render.soundfont": "GARBAGE"}, "garbage.sf2 is not a soundfont"),
        ({"model.base": "no-such-base"}, "base 'no-such-base': no such folder"),
        ({"reward.kind": "beauty"}, "beauty"),
        ({"reward.weights": "{PQ=1}"}, "PQ"),
        ({"prompts.kind": "dataset"}, "prompts.corpus is empty"),
        ({"grpo.group_size": 1}, "grpo.group_size = 1: expected a value at least 2"),
        ({"run.folder": "/proc/nowhere"}, "cannot be written"),
        ({"sampling.max_new_tokens": 5000}, "max_new_tokens"),
        ({"track.held_out_every": 0, "grpo.kl_budget": 0.1}, "need measurements: set track.held_out_every above 0"),
        ({"guard.judge.kind": "taste"}, "taste"),
    ],
)
def test_a_users_mistake_is_one_clear_line(base: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    (tmp_path / "garbage.sf2").write_bytes(b"not a soundfont" * 100)
    change = {key: str(value).replace("GARBAGE", str(tmp_path / "garbage.sf2")) for key, value in change.items()}
    status, output = run("grpo", *arguments(base, tmp_path, **change))
    assert status == 2, output
    assert message in output and "Traceback" not in output
    assert not (tmp_path / "r").exists()


WITHOUT_NETWORK = """
import os, runpy, socket, sys
def refuse(*args, **keys):
    os._exit(99)
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
sys.argv[0] = "smart.grpo"
runpy.run_module("smart.grpo", run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
def test_a_run_asks_no_network(base: Path, tmp_path: Path) -> None:
    args = arguments(base, tmp_path, **{"grpo.iterations": 1, "track.held_out_every": 0})
    done = programs.run([sys.executable, "-c", WITHOUT_NETWORK, *args], fresh=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_model_that_writes_nothing_is_tuned_without_harm(base: Path, tmp_path: Path) -> None:
    """Every completion ends at once: silent clips, equal rewards, no advantage, nothing to learn."""
    model, tokenizer = load_base(base)
    facts = vocabulary(tokenizer)
    with torch.no_grad():
        for name, weights in model.named_parameters():  # the last hidden state is the same whatever was read
            if "o_proj" in name or "down_proj" in name:
                weights.zero_()
        model.model.embed_tokens.weight.fill_(1.0)
        model.model.norm.weight.fill_(1.0)
        model.lm_head.weight.zero_()
        model.lm_head.weight[facts.eos_id] = 10.0
    save_base(model, tokenizer, tmp_path / "silent")
    args = arguments(tmp_path / "silent", tmp_path, **{"grpo.iterations": 2})
    status, output = run("grpo", "--config", "quickstart.toml", *args)
    assert status == 0, output
    for row in metrics(tmp_path / "r")[1:]:
        assert row["completions/length"] == 1 and row["completions/truncated_rate"] == 0
        assert row["reward/zero_variance_groups"] == 1 and row["policy/grad_norm"] < 1e-6
    before, after = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "silent", tmp_path / "r" / "tuned")
    )
    for name, weights in before.items():
        torch.testing.assert_close(after[name], weights, atol=1e-4, rtol=0)


def test_a_vocabulary_of_another_layout_is_tuned(tmp_path: Path) -> None:
    """Other numbers of everything, and the special tokens in another order: no id is where the paper's has it."""
    tokenizer = REMI(
        TokenizerConfig(
            pitch_range=(36, 84),
            beat_res={(0, 8): 8},
            num_velocities=8,
            special_tokens=["EOS", "MASK", "BOS", "PAD"],
            use_tempos=True,
            num_tempos=9,
            tempo_range=(50, 200),
            use_time_signatures=True,
            time_signature_range={4: [3, 4]},
            use_programs=False,
            use_rests=True,
        )
    )
    facts = vocabulary(tokenizer)
    assert (facts.eos_id, facts.bos_id, facts.pad_id) == (0, 2, 3)
    save_base(build_model(tokenizer, layers=1, hidden=32, heads=2, intermediate=32), tokenizer, tmp_path / "other")
    args = arguments(tmp_path / "other", tmp_path, **{"grpo.iterations": 2, "prompts.kind": "procedural"})
    status, output = run("grpo", "--config", "quickstart.toml", *args)
    assert status == 0, output
    rows = metrics(tmp_path / "r")
    assert rows[-1]["step"] == 2 and all(math.isfinite(row["policy/kl"]) for row in rows[1:])
    assert load_base(tmp_path / "r" / "tuned")[1].vocab == tokenizer.vocab


@pytest.mark.slow
def test_paper_config_lists_all_that_is_missing_in_one_message(tmp_path: Path) -> None:
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "HOME": str(tmp_path)}
    words = [sys.executable, "-m", "smart.grpo", "--config", "paper-dataset.toml"]
    done = programs.run(words, fresh=True, env=env, cwd=tmp_path, timeout=120)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "4 things are missing" in done.stderr
    for part in ("lucacasini/metamidipianophi3_4L", "model.base", "soundfonts4u", "facebook/audiobox-aesthetics",
                 "prompts.corpus"):  # fmt: skip
        assert part in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", [name for name in shipped() if name.startswith(("paper", "quickstart"))])
def test_shipped_config_runs_shortened(name: str, base: Path, tmp_path: Path, corpus: Path) -> None:
    """Each tuning config, with the embedded reward and soundfont where it asks for what must be downloaded."""
    config = tmp_path / "c.toml"
    text = (SHIPPED / name).read_text(encoding="utf-8")
    before, _, after = text.partition("[grpo]\n")
    config.write_text(before.partition("[reward.options]")[0] + "[grpo]\n" + after)
    short = {
        "grpo.iterations": 1,
        "render.soundfont": "timgm",
        "reward.kind": "ce_proxy",
        "prompts.corpus": corpus,
    }
    status, output = run("grpo", "--config", str(config), *arguments(base, tmp_path, **short))
    assert status == 0, output


@pytest.mark.slow
def test_many_instruments_from_midi_files_to_a_tuned_model(tmp_path: Path) -> None:
    """Strings, bass and drums: a corpus, a base that learns from it for seconds, two iterations, a few pieces."""
    from symusic import Score

    (tmp_path / "corpus").mkdir()
    band = [(48, False), (33, False), (0, True)]
    corpus = build_corpus(tmp_path / "corpus", band, "--instruments", "all")
    learn = {"steps": 120, "batch": 16, "learning_rate": 1e-2, "warmup": 10, "evaluate_every": 120}
    more = [part for key, value in learn.items() for part in ("--set", f"optimisation.{key}={value}")]
    status, output = run("pretrain", *pretrain(corpus, tmp_path / "base"), *more)
    assert status == 0, output
    base = tmp_path / "base" / "r" / "base"

    short = {"grpo.iterations": 2, "track.samples_every": 1, "prompts.kind": "dataset", "prompts.corpus": corpus}
    status, output = run("grpo", "--config", "quickstart.toml", *arguments(base, tmp_path, **short))
    assert status == 0, output
    rows = metrics(tmp_path / "r")
    assert all(row["policy/dlogp_max"] < 1e-4 and row["clips/failed"] == 0 for row in rows if row["step"])
    assert rows[-1]["policy/kl"] > 0 and rows[-1]["clips/silent_rate"] < 1

    out = tmp_path / "pieces"
    status, output = run(
        "generate", "--model", str(tmp_path / "r"), "--out", str(out), "-n", "2", "--tokens", "80", "--playable"
    )
    assert status == 0 and "tokens that cannot be played: 0 of" in output, output
    for folder in (tmp_path / "r" / "samples", tmp_path / "r" / "final", out):
        tracks = [track for path in folder.rglob("*.mid") for track in Score(path).tracks]
        assert {(track.program, track.is_drum) for track in tracks} >= set(band), folder
        for path in folder.rglob("*.wav"):
            assert soundfile.read(path)[0].any()


def test_a_reward_that_is_no_object_of_a_reward_class_is_refused(tmp_path: Path) -> None:
    for wrong in ("ce_proxy", Reward):
        with pytest.raises(TypeError, match=r"reward: expected an object of a subclass of smart\.reward\.Reward, got"):
            train(load("quickstart.toml", [f"run.folder={tmp_path}"]), reward=wrong)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
