"""``smart evaluate sample MODEL... --out TABLE.parquet``: pieces of several models for the same prompts, in one table.

Each row is a piece: system, prompt, seed, tokens and their log-probability, the length of the clip and whether it
failed or is silent, the paper's eight MIDI features, and the rating on every axis of every reward. The schema's
metadata, under ``smart``, records the settings, checksums, and each system's tokenizer.

The table is written with a single rename. Until then, finished blocks of prompts are kept in ``TABLE.parquet.parts``;
after a kill the same command continues from there and writes the same bytes.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from smart import UserError, __version__, require
from smart.corpus import MANIFEST, Corpus
from smart.diversity import audio_vector
from smart.evaluate import sealed
from smart.evaluate.ratings import load_rewards
from smart.features import SCALARS, is_empty, midi_features
from smart.files import parse_json, sha256
from smart.model import pick_device
from smart.render import checked_soundfont, write_midi, write_wav
from smart.reward import Reward, read_options
from smart.rollout import BLOCK, SILENT, Piece, System, compose, find_systems, is_the_papers
from smart.run import changes, check_names, claim_folder, digests, files_in, hold_folder, model_digests, progress
from smart.tokens import FILE_NAME

METADATA = b"smart"
WHOLE = ("number_of_notes", "pitch_range", "velocity_range")  # features that are whole numbers


def schema(axes: Sequence[str]) -> pa.Schema:
    """Columns of a table with these rating axes, each "reward.axis"."""
    return pa.schema(
        [
            ("system", pa.string()),
            ("prompt", pa.int32()),
            ("seed", pa.int64()),
            ("tokens", pa.list_(pa.int32())),
            ("prompt_length", pa.int32()),
            ("length", pa.int32()),
            ("logprobs", pa.float64()),
            ("seconds", pa.float32()),
            ("failed", pa.bool_()),
            ("silent", pa.bool_()),
            ("empty", pa.bool_()),
            *((name, pa.int32() if name in WHOLE else pa.float32()) for name in SCALARS),
            ("pitches", pa.list_(pa.uint8())),
            ("velocities", pa.list_(pa.uint8())),
            ("audio_vector", pa.list_(pa.float32())),
            *((axis, pa.float32()) for axis in axes),
        ]
    )


def row(piece: Piece, sample_rate: int) -> dict[str, Any]:
    """One piece as a row; values that need the audio are NaN or null if the clip failed."""
    audio = piece.audio
    return {
        **{name: getattr(piece, name) for name in ("system", "prompt", "seed", "tokens", "prompt_length")},
        "length": piece.length,
        "logprobs": piece.logprobs,
        "seconds": float("nan") if audio is None else audio.shape[1] / sample_rate,
        "failed": audio is None,
        "silent": audio is not None and bool(np.abs(audio.mean(axis=0)).max() < SILENT),
        "empty": is_empty(piece.score),
        **midi_features(piece.score),
        "audio_vector": None if audio is None else audio_vector(audio, sample_rate),
        **piece.scores,
    }


def read_settings(table: Path) -> dict[str, Any]:
    """The metadata of a table. Raises ``UserError`` if it was not written by this command."""
    try:
        found = (pq.read_schema(table).metadata or {})[METADATA]
        provenance: dict[str, Any] = parse_json(found)
        provenance["settings"]["models"]
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError, MemoryError, OverflowError):
        raise UserError(f"{table}: expected a table written by `smart evaluate sample`") from None
    return provenance


def is_whole(part: Path) -> bool:
    """Whether a block is complete and as it was written; a damaged one is reported, and will be sampled again."""
    if not part.is_file():
        return False
    try:
        sealed.read_table(part)
    except sealed.Damaged as damage:
        click.echo(f"Warning: {part} is damaged and will be sampled again ({damage})", err=True)
        return False
    return True


def finish(parts: Sequence[Path], out: Path, names: Sequence[str], metadata: Mapping[str, Any]) -> pa.Table:
    """Join the parts, sorted by system and prompt, and write ``out``."""
    table = pa.concat_tables([sealed.read_table(part, sealed=False) for part in parts])
    systems = np.array([names.index(name) for name in table["system"].to_pylist()])
    table = table.take(np.lexsort((table["prompt"].to_numpy(), systems))).combine_chunks()
    table = table.replace_schema_metadata({METADATA: json.dumps(metadata)})
    sealed.write_table(out, table, compression="zstd")
    return table


def describe(table: pa.Table, names: Sequence[str], axes: Sequence[str]) -> str:
    """One line per system: mean ratings, and how many pieces failed, are silent, or have no notes."""
    lines = []
    for name in names:
        mine = table.filter(pa.compute.equal(table["system"], name))
        means = []
        for axis in axes:
            values = mine[axis].to_numpy()
            rated = values[np.isfinite(values)]
            means.append(f"{axis} {rated.mean():.3f}" if len(rated) else f"{axis} not rated")
        failed, silent, empty = (sum(mine[column].to_pylist()) for column in ("failed", "silent", "empty"))
        lines.append(
            f"{name}: {mine.num_rows} pieces, {', '.join(means) or 'not rated'}; "
            f"{failed} failed, {silent} silent, {empty} without notes"
        )
    return "\n".join(lines)


def sample(
    *,
    models: Sequence[str],
    out: Path,
    prompts: str,
    corpus: Path | None,
    split: str,
    count: int,
    seed: int,
    kinds: Sequence[str],
    options: Sequence[str],
    soundfont: str,
    sample_rate: int,
    seconds: float,
    tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    audio: Path | None,
    backend: str,
    workers: int,
    device: str,
    accept_changes: bool = False,
) -> None:
    """Write the table ``out``. Arguments as in the command's help; raises ``UserError`` for mistakes in them."""

    def source() -> str | None:
        if prompts != "dataset":
            return None
        if corpus is None:
            raise UserError("--kind dataset needs --corpus, a folder written by `smart corpus build`")
        return sha256(Corpus(corpus).folder / MANIFEST)

    where = pick_device(device)
    found = require(
        lambda: find_systems(models),
        lambda: checked_soundfont(soundfont),
        lambda: load_rewards(kinds, options, device),
        source,
    )
    systems: list[System] = found[0]
    rewards: list[Reward] = found[2]
    names = [system.name for system in systems]
    axes = [f"{reward.name}.{axis}" for reward in rewards for axis in reward.axes]
    drawing: dict[str, Any] = {
        "prompts": prompts,
        "split": split,
        "count": count,
        "seed": seed,
        "max_new_tokens": tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seconds": seconds,
        "sample_rate": sample_rate,
        "backend": backend,
        "batch": min(BLOCK, count),
    }
    settings = {
        "systems": names,
        "models": {
            system.name: {"step": system.step, "is_the_papers": is_the_papers(system), **model_digests(system.model)}
            for system in systems
        },
        **drawing,
        "corpus_sha256": found[3],
        "soundfont_sha256": sha256(found[1]),
        "rewards": {
            reward.name: {
                "axes": list(reward.axes),
                "provenance": reward.provenance,
                "stand_in": reward.is_stand_in,
                "is_published": bool(getattr(reward, "is_published", False)),
            }
            for reward in rewards
        },
        "reward_options": list(options),
        "device": where.type,
        "audio": audio is not None,
        "version": __version__,
    }
    if files := digests(files_in(read_options(options))):
        settings["reward_files"] = files
    parts = out.with_name(f"{out.name}.parts")
    if out.exists():
        changed = changes(read_settings(out)["settings"], settings)
        if changed:
            raise UserError(
                f"--out {out} holds pieces made with other settings ({'; '.join(changed)}); choose another file"
            )
        try:
            sealed.read_table(out, sealed=False)
        except sealed.Damaged as damage:
            raise UserError(f"--out {out} is damaged ({damage}); delete it, and give the same command again") from None
        shutil.rmtree(parts, ignore_errors=True)  # left over if the process was killed right after writing the table
        click.echo(f"{out} is already complete: nothing to do")
        return
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: the folder {out.parent} does not exist; create it first")
    if parts.is_symlink():  # its name can be guessed
        raise UserError(f"--out {out}: {parts} is a link, which this command did not make; remove it")
    accepted = claim_folder(parts, settings, accept=accept_changes)
    with hold_folder(parts):
        batch = drawing["batch"]
        blocks = [parts / f"{block:06d}.parquet" for block in range(-(-count // batch))]
        done = next((number for number, path in enumerate(blocks) if not is_whole(path)), len(blocks))
        if audio is not None:
            audio.mkdir(parents=True, exist_ok=True)
            check_names(names, audio, "the models")
        first = min(done * batch, count)
        pieces = compose(
            systems,
            corpus=corpus,
            first=first,
            soundfont=found[1],
            rewards=rewards,
            workers=workers,
            device=device,
            **drawing | {"count": count - first},
        )
        rows: list[dict[str, Any]] = []
        with progress(total=count * len(systems), initial=first * len(systems), unit="piece") as bar:
            for piece in pieces if done < len(blocks) else ():
                rows.append(row(piece, sample_rate))
                if audio is not None:
                    stem = audio / f"{piece.prompt:04d}-{piece.system}"
                    write_midi(Path(f"{stem}.mid"), piece.score)
                    if piece.audio is not None:
                        write_wav(Path(f"{stem}.wav"), piece.audio, sample_rate)
                bar.update()
                if len(rows) == len(systems) * min(batch, count - done * batch):
                    sealed.write_table(blocks[done], pa.Table.from_pylist(rows, schema(axes)))
                    rows, done = [], done + 1
        tokenizers = {system.name: (system.model / FILE_NAME).read_text(encoding="utf-8") for system in systems}
        provenance = {"settings": settings, "given": list(models), "tokenizers": tokenizers}
        if accepted:
            provenance["accepted"] = accepted
        table = finish(blocks, out, names, provenance)
        shutil.rmtree(parts, ignore_errors=True)
    click.echo(describe(table, names, axes))
    for reward in rewards:
        if reward.is_stand_in:
            click.echo(f"{reward.name} is an approximation, not the aesthetic model: see docs/rewards.md")
    click.echo(f"{table.num_rows} pieces in {out}")
