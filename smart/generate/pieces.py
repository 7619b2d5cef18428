"""A folder of pieces: new ones, continuations of a song, or a song with some bars written anew."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click
import numpy as np

from smart import UserError, require
from smart.corpus import Limits, played, read_score
from smart.files import sha256, write_atomically
from smart.generate.fill import Fill, bar_range, fill_song
from smart.generate.song import Continuation, Song, continue_song, read_song
from smart.generate.table import COLUMNS, Lines, open_pieces, read_table
from smart.generate.writer import ROWS, WINDOW, Writer, last_bars, opening, unplayable_tokens
from smart.model import context_length, load_base, pick_device
from smart.render import RenderError, checked_soundfont, open_renderer, score_notes, write_wav
from smart.reward import load_reward, read_options
from smart.run import check_packages, digests, files_in, model_digests, progress
from smart.tokens import Grammar, build_grammar, decode, vocabulary

if TYPE_CHECKING:  # imported where they are used: the command line answers at once
    from symusic.core import ScoreTick

    from smart.reward import Reward
    from smart.rollout import Scorer

FILL_VERSIONS = 16  # versions of the bars to fill, of which the one that joins best is kept
JOIN = "join"  # the column for how well it joins


class Music(NamedTuple):
    """A piece: its file, what is heard of it from quarter note ``begin`` on, and its number of new notes."""

    midi: bytes
    score: ScoreTick
    notes: int
    begin: float = 0.0


class Task(NamedTuple):
    """What is written: ``prompt`` is what the model reads first; the functions turn the tokens after it into music."""

    prompt: list[int]
    music: Callable[[Sequence[int]], Music]
    joined: Callable[[Sequence[int]], Music] | None = None  # with the song before it
    fill: Fill | None = None


def choose(clips: Sequence[Any], scorer: Scorer | None) -> tuple[int, Any, dict[str, float]]:
    """The index of the best candidate, its audio (2, S), and its rating on each axis; ``clips`` are being rendered.

    Without a scorer it is the first. Raises ``RenderError`` if no candidate can be rendered.
    """
    if scorer is None:
        return 0, clips[0].result(), {}
    rated = scorer.collect(list(clips), keep=range(len(clips)))
    best = int(rated.rewards.nan_to_num(-math.inf).argmax())  # a candidate without a rating comes last
    if rated.audio[best] is None:
        raise RenderError("none of the candidates could be rendered")
    return best, rated.audio[best], {axis: values[best].item() for axis, values in rated.scores.items()}


def heard(midi: bytes, notes: int, begin: float = 0.0) -> Music:
    """A file that was written, as it is read again: a release ends the first of two notes of a key that overlap."""
    return Music(midi, played(read_score(midi, Limits(max_notes=1 << 30))), notes, begin)


def plan(
    tokenizer: Any,
    song: Song | None,
    context: int,
    *,
    fill: Fill | None,
    bars: int,
    whole_song: bool,
    tempo: float,
    time_signature: str,
) -> Task:
    """What to write, before anything is written."""
    facts = vocabulary(tokenizer)
    if fill is not None:
        return Task(fill.prompt(), lambda new: heard(fill.midi(new), fill.notes(new)), fill=fill)
    if song is None:
        prompt = opening(tokenizer, time_signature, tempo)

        def music(new: Sequence[int]) -> Music:
            score = decode(tokenizer, [*prompt, *new])
            return heard(score.dumps_midi(), score.note_num())

        return Task(prompt, music)
    going_on: Continuation = continue_song(song, tokenizer)

    def alone(new: Sequence[int]) -> Music:
        score = going_on.alone(new)
        return heard(score.dumps_midi(), score.note_num())

    read = last_bars(song.tokens, facts, bars=bars, longest=context - len(going_on.line))
    if read.count(facts.bar_id) < min(bars, song.tokens.count(facts.bar_id)):
        click.echo(f"only the song's last {read.count(facts.bar_id)} bars fit into the model's context", err=True)
    begin = 0.0 if whole_song else song.last_bars(bars)
    return Task(read + going_on.line, alone, lambda new: heard(going_on.joined(new), 0, begin))


def generate(
    *,
    model: str,
    out: Path,
    count: int,
    tokens: int,
    tempo: float,
    time_signature: str,
    song: Path | None,
    fill: Path | None,
    bars: int | str,
    whole_song: bool,
    seed: int,
    temperature: float,
    top_k: int,
    top_p: float,
    playable: bool,
    best_of: int,
    kind: str,
    options: Sequence[str],
    soundfont: str,
    sample_rate: int,
    seconds: float,
    backend: str,
    device: str,
) -> None:
    """Write ``count`` pieces into ``out``; the command's help explains the options.

    Raises ``UserError`` for mistakes that the user can fix.
    """
    settings = {
        key: str(value) if isinstance(value, Path) else value for key, value in locals().items() if key != "out"
    }
    if fill is None:
        del settings["fill"]  # the settings of other pieces stay as they were
    if song is None:
        del settings["whole_song"]
    import torch

    from smart.rollout import Scorer, find_system
    from smart.sampler import Sampler

    file, option = (fill, "--fill") if fill is not None else (song, "--continue")

    def reward() -> Reward | None:
        if best_of == 1 or fill is not None:
            return None
        where = "cuda" if torch.cuda.is_available() else "cpu"
        where = device if device in ("cpu", "mps") else where
        return load_reward(kind, device=where, **read_options(options))

    def song_file() -> None:
        if file is not None and not file.is_file():
            raise UserError(f"{option} {file}: no such file; expected a MIDI file")

    where, folder, soundfont_file, rates, *_ = require(
        lambda: pick_device(device),
        lambda: find_system(model).model,
        lambda: checked_soundfont(soundfont),
        reward,
        song_file,
        check_packages,
    )
    network, tokenizer = load_base(folder, device=where)
    facts, grammar = vocabulary(tokenizer), build_grammar(tokenizer)
    window = min(WINDOW, context_length(network))
    sampler = Sampler(network, pad_id=facts.pad_id, eos_id=facts.eos_id)
    writer = Writer(sampler, facts, temperature, top_k, top_p, window)
    source = None if file is None else read_song(file, option, tokenizer, folder / "tokenizer.json")
    if source is not None and source.remark:
        click.echo(f"Note: {file}: {source.remark}", err=True)
    task = plan(
        tokenizer,
        source,
        writer.context,
        fill=None if fill is None or source is None else fill_song(source, *bar_range(str(bars)), tokenizer, window),
        bars=0 if fill is not None else int(bars),
        whole_song=whole_song,
        tempo=tempo,
        time_signature=time_signature,
    )
    settings |= {f"model_{name}": digest for name, digest in model_digests(folder).items()}
    for name, path in (("soundfont", soundfont_file), ("song", file)):
        settings[f"{name}_sha256"] = None if path is None else sha256(path)
    if rates is not None:
        settings |= {"reward": rates.provenance, "reward_files": digests(files_in(read_options(options)))}
    columns = [*COLUMNS, *([JOIN] if task.fill else rates.axes if rates else ())]

    def draw(batch: int, rows: int, mask: Grammar | None) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed * 2**31 + batch)
        if task.fill:
            return task.fill.write(writer, rows, tokens, generator, grammar)
        return writer.write([task.prompt] * rows, tokens, generator, mask)

    with (
        open_pieces(out, settings, columns) as done,
        open_renderer(backend, soundfont_file, sample_rate=sample_rate, seconds=seconds, device=where) as pool,
        progress(total=count, initial=done, unit="piece") as bar,
        Lines(out) as lines,
    ):
        scorer = None if rates is None else Scorer(tokenizer, pool, rates, sample_rate=sample_rate)
        table = csv.writer(lines, lineterminator="\n")
        if not done:
            table.writerow(columns)
        together = max(ROWS // best_of, 1)
        for batch in range(done // together, -(-count // together)):
            pieces = range(batch * together, min((batch + 1) * together, count))
            rows = len(pieces) * best_of
            drawn = draw(batch, rows, grammar if playable else None)
            bad = unplayable_tokens([task.prompt] * rows, drawn, grammar)
            if playable and batch == 0 and not task.fill:
                free = draw(batch, rows, None)
                click.echo(f"without --playable: {_rate(unplayable_tokens([task.prompt] * rows, free, grammar), free)}")
                click.echo(f"with --playable:    {_rate(bad, drawn)}")
            for place, piece in enumerate(pieces):
                if piece < done:
                    continue
                mine = slice(place * best_of, (place + 1) * best_of)
                first, ratings = 0, dict[str, float]()
                versions = drawn[mine]
                if task.fill:
                    first, ratings = best_join(task.fill, network, versions)
                    versions = versions[first : first + 1]
                made = [task.music(new) for new in versions]
                best, audio, rated = choose([pool.submit(_notes(each)) for each in made], scorer)
                ratings |= rated
                stem = f"{piece:04d}"
                write_atomically(out / f"{stem}.mid", made[best].midi)
                write_wav(out / f"{stem}.wav", audio, sample_rate)
                if task.joined:
                    both = task.joined(versions[best])
                    write_atomically(out / f"{stem}-joined.mid", both.midi)
                    write_wav(out / f"{stem}-joined.wav", pool.submit(_notes(both)).result(), sample_rate)
                table.writerow(
                    [
                        piece,
                        f"{stem}.wav",
                        made[best].notes,
                        f"{audio.shape[1] / sample_rate:.2f}",
                        len(versions[best]),
                        bad[mine][first + best],
                        first + best,
                        *(f"{value:.4f}" for value in ratings.values()),
                    ]
                )
                bar.update()
    report(out, columns, kind, best_of, rates, task.fill)


def _notes(music: Music) -> Any:
    return score_notes(music.score, max_beats=math.inf, from_beat=music.begin)


def best_join(fill: Fill, network: Any, versions: Sequence[Sequence[int]]) -> tuple[int, dict[str, float]]:
    """The version that joins best, and its rating. One without notes is kept only if all are."""
    values = fill.join(network, versions)
    best = max(range(len(versions)), key=lambda row: (fill.notes(versions[row]) > 0, values[row]))
    return best, {JOIN: values[best]}


def report(out: Path, columns: Sequence[str], kind: str, best_of: int, rates: Reward | None, fill: Fill | None) -> None:
    """Print what the folder holds."""
    rows = read_table(out, columns)
    silent = sum(row["notes"] == "0" for row in rows)
    click.echo(
        f"{len(rows)} {'piece' if len(rows) == 1 else 'pieces'} in {out}, {silent} without notes; "
        "tokens that cannot be played: "
        + _rate([int(row["unplayable"]) for row in rows], [range(int(row["tokens"])) for row in rows])
    )
    if fill is not None:
        mean = np.mean([float(row[JOIN]) for row in rows])
        click.echo(f"best of {best_of} by how well they join: mean log-probability {mean:.3f} per token that follows")
    if rates is not None:
        axis, hint = rates.axes[0], " (an approximation, not the aesthetic model)" if rates.is_stand_in else ""
        mean = np.mean([float(row[axis]) for row in rows])
        click.echo(f"best of {best_of} by {kind}{hint}: mean {axis} {mean:.3f}")


def _rate(bad: Sequence[int], written: Sequence[Sequence[int]]) -> str:
    total = sum(map(len, written))
    share = sum(bad) / max(total, 1)
    return f"{sum(bad)} of {total} ({share:.2%}), in {sum(map(bool, bad))} of {len(bad)} pieces"
