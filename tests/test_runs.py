"""Whole runs of ``python -m smart.grpo`` and ``python -m smart.pretrain``, as real processes that get killed."""

import contextlib
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from miditok import REMI, TokenizerConfig
from safetensors.torch import load_file, save_file

from smart.config import load, shipped
from smart.files import sha256
from smart.grpo import train
from smart.model import build_model, load_base, save_base
from smart.prompts import draw
from smart.render import RenderError, open_renderer
from smart.run.checkpoint import read_tensors
from smart.sampler import Sampler
from smart.tokens import vocabulary
from smart.tuning import AHEAD

SMALL = {
    "grpo.iterations": 6,
    "grpo.prompts": 2,
    "grpo.group_size": 3,
    "grpo.micro_batch": 4,
    "sampling.max_new_tokens": 40,
    "render.seconds": 2.0,
    "render.workers": 1,
    "track.checkpoint_every": 2,
    "track.samples_every": 3,
    "track.trace_every": 4,
    "track.final_prompts": 4,
    "track.final_listen": 2,
    "track.held_out_every": 2,
    "track.held_out_prompts": 2,
}

HELD_OUT = {
    f"held_out/{name}" for name in (
        "reward", "judge", "plausibility", "kl", "kl_sequence", "pitches", "velocities", "silent_rate", "length",
        "collapsed", *(f"{name}{of}" for name in ("vendi", "vendi_audio", "distance", "distinct_4grams")
                       for of in ("", "_within")),
    )
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A tiny base that was taught to write notes: an untrained one is silent, and every reward would be alike."""
    folder = tmp_path_factory.mktemp("base")
    model = build_model(tokenizer, layers=2, hidden=32, heads=4, intermediate=64, seed=3)
    vocab = tokenizer.vocab
    random_ = random.Random(1)
    pieces = []
    facts = vocabulary(tokenizer)
    for _ in range(256):
        # an opening like a prompt's, then notes on every beat
        piece = [facts.bar_id, random_.choice(facts.time_signature_ids), facts.position0_id]
        piece += [random_.choice(facts.tempo_ids)]
        for beat in range(8):
            piece += [] if beat == 0 else [vocab[f"Position_{12 * beat}"]]
            note = [f"Pitch_{random_.randint(40, 80)}", f"Velocity_{random_.choice([63, 95, 127])}"]
            piece += [vocab[token] for token in (*note, "Duration_1.0.12")]
        pieces.append(piece)
    tokens = torch.tensor(pieces)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(150):
        rows = tokens.roll(-32 * step, 0)[:32]
        logits = model(input_ids=rows).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    save_base(model, tokenizer, folder)
    return folder


def arguments(base: Path, folder: Path, **changes: Any) -> list[str]:
    settings = {"model.base": base, "run.folder": folder, "run.name": "r", **SMALL, **changes}
    return [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]


def start(program: str, *args: str, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", f"smart.{program}", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        **options,
    )


def run(program: str, *args: str, **options: Any) -> tuple[int, str]:
    process = start(program, *args, **options)
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def shared() -> set[str]:
    """Segments of shared memory, but those of browsers, databases and torch, which other tests may run meanwhile."""
    return {name for name in os.listdir("/dev/shm") if not name.startswith((".org.chromium", "PostgreSQL", "torch"))}


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The run's metrics without what the clock says."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith("seconds/")} for row in rows]


@pytest.fixture(scope="module")
def either(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs that nothing interrupted, by their ``grpo.rollouts_ahead``."""
    folders = []
    for ahead in (0, 1):
        folder = tmp_path_factory.mktemp("finished")
        changes = {"grpo.rollouts_ahead": ahead}
        status, output = run("grpo", "--config", "quickstart.toml", *arguments(base, folder, **changes))
        assert status == 0, output
        assert "is an approximation" in output and "standard errors" in output
        folders.append(folder / "r")
    return folders


@pytest.fixture(scope="module")
def finished(either: list[Path]) -> Path:
    """A run that nothing interrupted."""
    return either[0]


def assert_same_run(folder: Path, finished: Path) -> None:
    for name in ("tuned/model.safetensors", "summary.json", "final/00-tuned.mid", "final/01-tuned.wav"):
        assert (folder / name).read_bytes() == (finished / name).read_bytes(), name
    assert metrics(folder) == metrics(finished)
    import pyarrow.parquet as pq

    assert pq.read_table(folder / "completions").equals(pq.read_table(finished / "completions"))


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
    stages = ("generate", "reference", "score", "learn", "iteration", "wait", "rate", "render")
    timed = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    for row in timed[1:]:
        seconds = {stage: row[f"seconds/{stage}"] for stage in stages}
        assert seconds["iteration"] == pytest.approx(sum(seconds[stage] for stage in stages[:4]))
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


def test_an_existing_run_is_kept(finished: Path, base: Path) -> None:
    before = (finished / "metrics.jsonl").read_bytes()
    again = arguments(base, finished.parent)
    status, output = run("grpo", *again)
    assert status == 2 and "exists already; continue it with --resume, replace it with --overwrite" in output
    status, output = run("grpo", *again, "--resume", "--overwrite")
    assert status == 2 and "contradict" in output
    status, output = run("grpo", *again, "--resume", "--set", "grpo.beta=0.5", "--set", "grpo.rollouts_ahead=1")
    assert status == 2 and "grpo.beta" in output and "0.04" in output and "grpo.rollouts_ahead was 0" in output
    assert (finished / "metrics.jsonl").read_bytes() == before
    tuned = finished / "tuned" / "model.safetensors"
    whole, limit = tuned.read_bytes(), tuned.stat().st_size // 2
    short = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))}
    status, output = run("grpo", *again, "--resume", **short)  # nothing is left to do but the comparison; a full disk
    assert status == 1 and "could not be written" in output and tuned.read_bytes() == whole, output
    status, output = run("grpo", *again, "--resume")
    assert status == 0, output
    assert (finished / "metrics.jsonl").read_bytes() == before and tuned.read_bytes() == whole
    assert not list(finished.glob(".*"))


@pytest.mark.parametrize("ahead", [0, 1])
def test_killed_again_and_again_then_resumed_is_the_same_run(
    base: Path, either: list[Path], tmp_path: Path, ahead: int
) -> None:
    """SIGKILL at random instants; what is resumed ends bit for bit like what was never interrupted."""
    instants = random.Random(7)
    shared_memory = shared()
    changes = {"grpo.rollouts_ahead": ahead}
    args = ("--config", "quickstart.toml", *arguments(base, tmp_path, **changes), "--resume")
    for attempt in range(8):
        process = start("grpo", *args)
        # the first seconds are imports; later attempts are given time to get further
        time.sleep(instants.uniform(3, 6 + attempt))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if process.returncode == 0:
            break
    status, output = run("grpo", *args)
    assert status == 0, output
    assert_same_run(tmp_path / "r", either[ahead])
    assert shared() <= shared_memory
    assert not [path for path in (tmp_path / "r").rglob("*") if ".tmp" in path.name]


@pytest.mark.parametrize(("number", "ahead"), [(signal.SIGTERM, 0), (signal.SIGINT, 1), (signal.SIGHUP, 0)])
def test_asked_to_stop_it_saves_and_says_how_to_go_on(
    base: Path, either: list[Path], tmp_path: Path, number: signal.Signals, ahead: int
) -> None:
    changes = {"grpo.rollouts_ahead": ahead}
    process = start(
        "grpo", "--config", "quickstart.toml", *arguments(base, tmp_path, **changes),
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # ignored where the tests run under nohup
    )  # fmt: skip
    path = tmp_path / "r" / "metrics.jsonl"
    while not (path.exists() and path.stat().st_size):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, output
    assert f"--config {tmp_path}/r/config.toml --resume" in output and "Traceback" not in output
    assert (tmp_path / "r" / "checkpoints" / f"{metrics(tmp_path / 'r')[-1]['step']:08d}").is_dir()
    status, output = run("grpo", "--config", str(tmp_path / "r" / "config.toml"), "--resume")
    assert status == 0, output
    assert_same_run(tmp_path / "r", either[ahead])


def test_killed_right_after_the_last_checkpoint_the_rest_is_made_up_for(
    base: Path, finished: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "r", symlinks=True)
    best = (finished / "checkpoints" / "best").readlink()
    (tmp_path / "r" / "checkpoints" / "best").unlink()
    curve = tmp_path / "r" / "reward_mean.png"
    curve.write_bytes(b"older")
    for leftover in (curve.with_name(".reward_mean.png.tmp"), curve.with_name(".summary.json.tmp")):
        leftover.write_bytes(b"half")
    status, output = run("grpo", "--config", "quickstart.toml", *arguments(base, tmp_path), "--resume")
    assert status == 0, output
    assert (tmp_path / "r" / "checkpoints" / "best").readlink() == best
    assert curve.read_bytes() == (finished / "reward_mean.png").read_bytes()
    assert not list((tmp_path / "r").glob(".*"))


def stop_once_there_is(path: Path, process: subprocess.Popen[str], folder: Path) -> None:
    """SIGTERM as soon as a run has written ``path``: it says how to go on."""
    while not path.exists():
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert f"--config {folder}/config.toml --resume" in output and "Traceback" not in output


def test_asked_to_stop_before_its_first_iteration_it_says_how_to_go_on(base: Path, tmp_path: Path) -> None:
    process = start("grpo", "--config", "quickstart.toml", *arguments(base, tmp_path))
    stop_once_there_is(tmp_path / "r" / "config.toml", process, tmp_path / "r")
    assert not (tmp_path / "r" / "checkpoints").exists()


@pytest.mark.parametrize("after", ["checkpoints/00000002", "final/00-base.mid"])
def test_asked_to_stop_after_the_last_iteration_it_stops(base: Path, tmp_path: Path, after: str) -> None:
    """While base and tuned are compared, of many prompts; only that is done again."""
    short = {"grpo.iterations": 2, "track.held_out_every": 0, "track.final_prompts": 300, "render.seconds": 0.5}
    process = start("grpo", "--config", "quickstart.toml", *arguments(base, tmp_path, **short))
    stop_once_there_is(tmp_path / "r" / after, process, tmp_path / "r")
    assert not (tmp_path / "r" / "summary.json").exists()
    before = (tmp_path / "r" / "metrics.jsonl").read_bytes()
    status, output = run("grpo", "--config", str(tmp_path / "r" / "config.toml"), "--resume")
    assert status == 0 and (tmp_path / "r" / "summary.json").exists(), output
    assert (tmp_path / "r" / "metrics.jsonl").read_bytes() == before


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

    def arrive(self, number: int) -> None:
        for late, clip in self.asked[max(number, 0) * self.batch : (number + 1) * self.batch]:
            audio = clip.result()
            self.events.append(("arrived", number))
            late.set_result(audio)

    def give_up(self) -> None:
        for late, _ in self.asked:
            if not late.done():
                late.set_exception(RenderError("it would have waited for ever"))


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
        assert [name for *_, name in sorted(spans)] == ["generate", "reference", "score", "learn"]
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


def test_a_spent_budget_ends_the_run_with_the_best(base: Path, tmp_path: Path) -> None:
    """Its policy runs away from the base, and reaches the budget by iteration 4; one checkpoint is to be kept."""
    budget = 0.2
    changes: dict[str, Any] = {"grpo.learning_rate": 3e-3, "grpo.beta": 0, "grpo.iterations": 8}
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


def test_a_render_worker_that_is_killed_costs_nothing(base: Path, finished: Path, tmp_path: Path) -> None:
    process = start("grpo", "--config", "quickstart.toml", *arguments(base, tmp_path))
    killed = 0
    path = tmp_path / "r" / "metrics.jsonl"
    while process.poll() is None and killed < 3:
        if path.exists() and len(path.read_text().splitlines()) > killed:  # one in each of the first iterations
            for task in Path(f"/proc/{process.pid}/task").glob("*/children"):
                with contextlib.suppress(OSError):  # a thread that has ended meanwhile
                    for pid in task.read_text().split():
                        os.kill(int(pid), signal.SIGKILL)
            killed += 1
        time.sleep(0.01)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert killed
    assert_same_run(tmp_path / "r", finished)


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(base: Path, finished: Path, tmp_path: Path) -> None:
    args = ("--config", "quickstart.toml", *arguments(base, tmp_path))
    status, output = run("grpo", *args)
    assert status == 0, output
    newest = tmp_path / "r" / "checkpoints" / "00000006" / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    status, output = run("grpo", *args, "--resume")
    assert status == 0 and "00000006: state.safetensors is damaged" in output
    assert "Traceback" not in output
    assert_same_run(tmp_path / "r", finished)
    for file in (tmp_path / "r" / "checkpoints").glob("*/model.safetensors"):
        file.write_bytes(b"")
    status, output = run("grpo", *args, "--resume")
    assert status == 2 and "can be used" in output and "Traceback" not in output


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


def test_two_processes_do_not_work_in_one_run(base: Path, finished: Path, tmp_path: Path) -> None:
    args = ("--config", "quickstart.toml", *arguments(base, tmp_path))
    first = start("grpo", *args)
    while not (tmp_path / "r" / "metrics.jsonl").exists():
        assert first.poll() is None
        time.sleep(0.01)
    first.send_signal(signal.SIGSTOP)
    for how in ("--resume", "--overwrite"):
        status, output = run("grpo", *args, how)
        assert status == 2 and "another process is working in it" in output and "Traceback" not in output
    first.send_signal(signal.SIGCONT)
    output, _ = first.communicate(timeout=120)
    assert first.returncode == 0, output
    assert_same_run(tmp_path / "r", finished)


WITHOUT_NETWORK = """
import os, runpy, socket, sys
def refuse(*args, **keys):
    os._exit(99)
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
sys.argv[0] = "smart.grpo"
runpy.run_module("smart.grpo", run_name="__main__", alter_sys=True)
"""


def test_a_run_asks_no_network(base: Path, tmp_path: Path) -> None:
    args = arguments(base, tmp_path, **{"grpo.iterations": 1, "track.held_out_every": 0})
    done = subprocess.run([sys.executable, "-c", WITHOUT_NETWORK, *args], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_run_goes_on_when_nobody_reads_what_it_says(base: Path, finished: Path, tmp_path: Path) -> None:
    process = start("grpo", "--config", "quickstart.toml", *arguments(base, tmp_path))
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=120) == 0
    assert_same_run(tmp_path / "r", finished)


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


def test_numbers_that_are_not_finite_stop_the_run_and_keep_the_checkpoint(base: Path, tmp_path: Path) -> None:
    args = ("--config", "quickstart.toml", *arguments(base, tmp_path))
    process = start("grpo", *args)
    checkpoints = tmp_path / "r" / "checkpoints"
    while not (checkpoints / "00000002").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.communicate()
    # the damage of a bad step, in a checkpoint that is otherwise whole
    newest = max(path for path in checkpoints.iterdir() if path.name.isdecimal())
    weights = load_file(newest / "model.safetensors")
    weights["lm_head.weight"][0, 0] = torch.nan
    save_file(weights, tmp_path / "other", metadata={"format": "pt"})
    rewrite(newest, "model.safetensors", (tmp_path / "other").read_bytes())
    status, output = run("grpo", *args, "--resume")
    assert status == 1 and "Traceback" not in output, output
    assert "stopped before it changed the weights" in output and "not finite" in output
    assert f"last good checkpoint is {newest}" in output


def rewrite(folder: Path, name: str, data: bytes) -> None:
    """Put other bytes into a checkpoint, and their hash into its manifest: whole, but not what a run writes."""
    (folder / name).write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["sha256"][name] = sha256(folder / name)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_batch_drawn_ahead_that_is_none_is_refused(base: Path, either: list[Path], tmp_path: Path) -> None:
    shutil.copytree(either[1], tmp_path / "r")
    for step in ("00000006", "00000004"):
        shutil.rmtree(tmp_path / "r" / "checkpoints" / step, ignore_errors=True)
    (newest,) = [path for path in (tmp_path / "r" / "checkpoints").glob("0*") if path.name == "00000002"]
    save_file({"tokens": torch.zeros(2, 2)}, tmp_path / "other")
    rewrite(newest, AHEAD, (tmp_path / "other").read_bytes())
    args = arguments(base, tmp_path, **{"grpo.rollouts_ahead": 1})
    status, output = run("grpo", "--config", "quickstart.toml", *args, "--resume")
    assert status == 2 and f"{AHEAD} does not hold a batch" in output and "Traceback" not in output, output


def test_a_disk_that_takes_no_more_ends_the_run_in_one_line(base: Path, tmp_path: Path) -> None:
    """A limit on the size of a file, between that of a checkpoint's weights and that of its optimiser's state."""
    limit = 3 * (base / "model.safetensors").stat().st_size // 2

    def no_larger_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    settings = arguments(base, tmp_path, **{"render.seconds": 0.25})
    status, output = run("grpo", "--config", "quickstart.toml", *settings, preexec_fn=no_larger_files)
    assert status == 1 and "Traceback" not in output, output
    assert "could not be written" in output and "go on with --resume" in output
    assert list((tmp_path / "r" / "checkpoints").iterdir()) == []
    status, output = run("grpo", "--config", "quickstart.toml", *settings, "--resume")
    assert status == 0, output


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A file system in memory: called with mount options, it is made, or mounted anew with them."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> Path:
        again = "remount," if folder.is_mount() else ""
        command = ["mount", "-t", "tmpfs", "-o", again + options, "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"a file system cannot be mounted here: {done.stderr.strip()}")
        return folder

    yield mount
    subprocess.run(["umount", "--lazy", str(folder)], check=False, capture_output=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a file system")
def test_a_folder_that_is_moved_ends_the_run_in_one_line(base: Path, tmp_path: Path) -> None:
    """TensorBoard's thread meets it first, and would print a traceback of its own."""
    process = start("grpo", "--config", "quickstart.toml", *arguments(base, tmp_path, **{"grpo.iterations": 1000}))
    path = tmp_path / "r" / "metrics.jsonl"
    while not (path.exists() and path.read_text().count("\n") >= 2):
        assert process.poll() is None
        time.sleep(0.01)
    (tmp_path / "r").rename(tmp_path / "elsewhere")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "could not be written" in output and "Traceback" not in output, output


def test_a_disk_that_fills_up_and_then_is_read_only(
    base: Path, finished: Path, small_disk: Callable[[str], Path]
) -> None:
    """It fills up at the first checkpoint, then at a later file, then is read-only: a line each, no byte lost."""
    folder = small_disk("size=900k")
    args = ("--config", "quickstart.toml", *arguments(base, folder))
    checkpoints = folder / "r" / "checkpoints"
    for size, made in (("900k", 0), ("1800k", 1)):
        small_disk(f"size={size}")
        status, output = run("grpo", *args, "--resume")
        assert status == 1 and "Traceback" not in output, output
        assert "could not be written" in output and "go on with --resume" in output
        assert len(list(checkpoints.iterdir())) >= made
    small_disk("size=64m,ro")
    status, output = run("grpo", *args, "--resume")
    assert status == 1 and "Read-only" in output and "Traceback" not in output, output
    small_disk("rw")
    status, output = run("grpo", *args, "--resume")
    assert status == 0, output
    assert_same_run(folder / "r", finished)


def test_paper_config_lists_all_that_is_missing_in_one_message(tmp_path: Path) -> None:
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "smart.grpo", "--config", "paper-dataset.toml"],
        capture_output=True, text=True, env=env, cwd=tmp_path, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "4 things are missing" in done.stderr
    for part in ("lucacasini/metamidipianophi3_4L", "model.base", "soundfonts4u", "facebook/audiobox-aesthetics",
                 "prompts.corpus"):  # fmt: skip
        assert part in done.stderr
    assert not (tmp_path / "runs").exists()


OFFLINE = {"model.base", "render.soundfont", "reward.kind", "reward.options"}


@pytest.mark.parametrize("name", [name for name in shipped() if name.startswith(("paper", "quickstart"))])
def test_shipped_config_runs_shortened(name: str, base: Path, tmp_path: Path, corpus: Path) -> None:
    """Each tuning config, with the embedded reward and soundfont where it asks for what must be downloaded."""
    config = tmp_path / "c.toml"
    text = (Path(load.__code__.co_filename).parent / "configs" / name).read_text(encoding="utf-8")
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


def build_corpus(folder: Path, voices: list[tuple[int, bool]], *options: str) -> Path:
    """Forty short pieces through ``smart.corpus``: a note on every beat for each voice (program, whether drums)."""
    from symusic import Note, Score, Tempo, TimeSignature, Track

    midi = folder / "midi"
    midi.mkdir()
    for piece in range(40):
        draw = random.Random(piece)
        score = Score(480)
        score.tempos.append(Tempo(0, 90 + 3 * piece))
        score.time_signatures.append(TimeSignature(0, 4, 4))
        for program, is_drum in voices:
            track = Track(program=program, is_drum=is_drum)
            for beat in range(40):
                track.notes.append(Note(480 * beat, 480, draw.randint(40, 80), draw.randint(30, 120)))
            score.tracks.append(track)
        score.dump_midi(midi / f"{piece}.mid")
    status, output = run(
        "corpus", "build", "--midi", str(midi), "--out", str(folder / "out"), "--workers", "1", *options
    )
    assert status == 0, output
    return folder / "out"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_corpus(tmp_path_factory.mktemp("corpus"), [(0, False)])


PRETRAIN = {
    "architecture.layers": 1,
    "architecture.hidden": 32,
    "architecture.heads": 2,
    "architecture.intermediate": 32,
    "optimisation.steps": 12,
    "optimisation.batch": 4,
    "optimisation.evaluate_every": 3,
    "optimisation.evaluate_rows": 4,
    "data.crop": 64,
}


def pretrain(corpus: Path, folder: Path, config: str = "base-small.toml") -> list[str]:
    settings = {"data.corpus": corpus, "run.folder": folder, "run.name": "r", **PRETRAIN}
    return ["--config", config] + [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]


def curve(folder: Path) -> list[dict[str, Any]]:
    """The metrics of a pretraining without what the clock says."""
    return [{key: value for key, value in row.items() if key != "tokens_per_second"} for row in metrics(folder)]


@pytest.mark.parametrize("config", ["base-small.toml", "base.toml"])
def test_pretraining_killed_and_resumed_gives_the_same_curve(config: str, corpus: Path, tmp_path: Path) -> None:
    status, output = run("pretrain", *pretrain(corpus, tmp_path / "a", config))
    assert status == 0, output
    whole = tmp_path / "a" / "r"

    process = start("pretrain", *pretrain(corpus, tmp_path / "b", config))
    while len(list((tmp_path / "b").glob("r/checkpoints/0*"))) < 1:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.communicate()
    status, output = run("pretrain", *pretrain(corpus, tmp_path / "b", config), "--resume")
    assert status == 0, output

    assert curve(tmp_path / "b" / "r") == curve(whole)
    assert [row["step"] for row in curve(whole)] == [3, 6, 9, 12]
    assert curve(whole)[-1]["validation_loss"] < curve(whole)[0]["validation_loss"]
    for name in ("base/model.safetensors", "samples/00000012/00.mid"):
        assert (tmp_path / "b" / "r" / name).read_bytes() == (whole / name).read_bytes()
    load_base(whole / "base")

    for newest in (whole / "checkpoints").glob("0*"):
        rewrite(newest, "progress.json", b'{"pace": "allegro"}')
    status, output = run("pretrain", *pretrain(corpus, tmp_path / "a", config), "--resume")
    assert status == 2 and "progress.json cannot be read" in output and "Traceback" not in output, output


def test_pretraining_asked_to_stop_saves_and_goes_on_with_the_same_curve(corpus: Path, tmp_path: Path) -> None:
    long = ["--set", "optimisation.steps=400", "--set", "optimisation.evaluate_every=100"]
    status, output = run("pretrain", *pretrain(corpus, tmp_path / "a"), *long)
    assert status == 0, output
    process = start("pretrain", *pretrain(corpus, tmp_path / "b"), *long)
    folder = tmp_path / "b" / "r"
    while not (folder / "checkpoints" / "00000100").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and f"Continue with: {sys.executable} -m smart.pretrain" in output
    (last,) = sorted((folder / "checkpoints").iterdir())[-1:]
    assert 100 < int(last.name) < 400 and int(last.name) % 100  # within a stretch between two evaluations
    status, output = run("pretrain", "--config", str(folder / "config.toml"), "--resume")
    assert status == 0, output
    assert curve(folder) == curve(tmp_path / "a" / "r")
    weights = "base/model.safetensors"
    assert (folder / weights).read_bytes() == (tmp_path / "a" / "r" / weights).read_bytes()


def test_two_processes_learn_what_one_does(corpus: Path, tmp_path: Path) -> None:
    """Rows of different lengths, an odd number of them: the mean over the batch's tokens is not one of means."""
    uneven: dict[str, Any] = {
        "data.crop": 1024,
        "optimisation.batch": 5,
        "optimisation.steps": 3,
        "optimisation.evaluate_every": 1,
    }
    uneven["optimisation.precision"] = "float32"
    extra = [part for key, value in uneven.items() for part in ("--set", f"{key}={value}")]
    status, output = run("pretrain", *pretrain(corpus, tmp_path / "one"), *extra)
    assert status == 0, output
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, "-m", "smart.pretrain", *pretrain(corpus, tmp_path / "two"), *extra],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "and 1 more" in done.stderr
    one, two = curve(tmp_path / "one" / "r"), curve(tmp_path / "two" / "r")
    assert [row["step"] for row in two] == [1, 2, 3]  # one metrics file
    for key in ("loss", "gradient_norm"):
        assert two[0][key] == pytest.approx(one[0][key], rel=1e-5)  # before rounding is amplified by AdamW
        assert two[2][key] == pytest.approx(one[2][key], rel=1e-4)
    assert two[2]["validation_loss"] == pytest.approx(one[2]["validation_loss"], rel=1e-5)


def test_pretraining_goes_on_from_a_base(corpus: Path, base: Path, tmp_path: Path) -> None:
    status, output = run(
        "pretrain", *pretrain(corpus, tmp_path), "--set", f"model.base={base}", "--set", "optimisation.steps=3"
    )
    assert status == 0, output
    before, after = load_base(base)[0], load_base(tmp_path / "r" / "base")[0]
    assert after.config.num_hidden_layers == before.config.num_hidden_layers == 2  # the base's own architecture
    change = max((p - q).abs().max().item() for p, q in zip(before.parameters(), after.parameters(), strict=True))
    assert 0 < change < 0.01


def test_a_base_with_another_vocabulary_is_refused(corpus: Path, tmp_path: Path) -> None:
    from smart.tokens import build_tokenizer

    other = build_tokenizer("all")
    save_base(build_model(other, layers=1, hidden=16, heads=2, intermediate=16), other, tmp_path / "other")
    status, output = run("pretrain", *pretrain(corpus, tmp_path), "--set", f"model.base={tmp_path / 'other'}")
    assert status == 2 and "its vocabulary is not that of corpus" in output
    assert "Traceback" not in output and not (tmp_path / "r").exists()


@pytest.mark.slow
def test_compiled_pretraining_learns_the_same(corpus: Path, tmp_path: Path) -> None:
    if not any(map(shutil.which, ("g++", "clang++"))):
        pytest.skip("torch.compile needs a C++ compiler")
    for name in ("on", "off"):
        status, output = run("pretrain", *pretrain(corpus, tmp_path / name), "--set", f"optimisation.compile={name}")
        assert status == 0, output
    for on, off in zip(curve(tmp_path / "on" / "r"), curve(tmp_path / "off" / "r"), strict=True):
        assert on["loss"] == pytest.approx(off["loss"], rel=1e-4)
        assert on["validation_loss"] == pytest.approx(off["validation_loss"], rel=1e-4)


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
