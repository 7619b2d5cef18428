"""Whole runs of ``python -m smart.grpo`` and ``python -m smart.pretrain``, small: how they are started and compared."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import programs
import torch

from smart.files import sha256
from smart.model import build_model, save_base
from smart.tokens import build_tokenizer, vocabulary

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
        "reward", "judge", "judge_std", "plausibility", "kl", "kl_sequence", "pitches", "velocities", "silent_rate",
        "length", "collapsed", *(f"{name}{of}" for name in ("vendi", "vendi_audio", "distance", "distinct_4grams")
                       for of in ("", "_within")),
    )
}  # fmt: skip


def teach_base(folder: Path) -> None:
    """A tiny base that was taught to write notes: an untrained one is silent, and every reward would be alike."""
    tokenizer = build_tokenizer()
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


# of the quickstart's two rewards the first, without a target, and plain GRPO
ALONE = {"rewards": "[]", "reward.target": "none", "grpo.diversity": 0}


def arguments(base: Path, folder: Path, **changes: Any) -> list[str]:
    """Settings of a small run, as words; None leaves one to the configuration."""
    settings = {"model.base": base, "run.folder": folder, "run.name": "r", **ALONE, **SMALL, **changes}
    given = {key: value for key, value in settings.items() if value is not None}
    return [part for key, value in given.items() for part in ("--set", f"{key}={value}")]


def start(program: str, *args: str, **options: Any) -> subprocess.Popen[str]:
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} | options
    return programs.start([sys.executable, "-m", f"smart.{program}", *args], **options)


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


def assert_same_run(folder: Path, finished: Path) -> None:
    for name in ("tuned/model.safetensors", "summary.json", "final/00-tuned.mid", "final/01-tuned.wav"):
        assert (folder / name).read_bytes() == (finished / name).read_bytes(), name
    assert metrics(folder) == metrics(finished)
    import pyarrow.parquet as pq

    assert pq.read_table(folder / "completions").equals(pq.read_table(finished / "completions"))


def rewrite(folder: Path, name: str, data: bytes) -> None:
    """Put other bytes into a checkpoint, and their hash into its manifest: whole, but not what a run writes."""
    (folder / name).write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["sha256"][name] = sha256(folder / name)
    (folder / "manifest.json").write_text(json.dumps(manifest))


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
    words = ("build", "--midi", str(midi), "--out", str(folder / "out"), "--workers", "1", *options)
    status, output = run("corpus", *words)
    assert status == 0, output
    return folder / "out"


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
