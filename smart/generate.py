"""Generate music with a base or a tuned run, as MIDI and WAV: ``python -m smart.generate --model runs/quickstart``.

It writes new pieces with a chosen tempo and time signature, or continues a MIDI file, with its last bars as context.
``--best-of`` keeps the best of several candidates by any reward; ``--playable`` forbids tokens that cannot be played.

A piece may be longer than the model's context: it is written one window at a time, and each window starts with the
bars before it.

Axes: N pieces that are written together, P prompt length, T completion length.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click
import numpy as np

from smart import UserError, require
from smart.corpus import Limits, ReaderPool
from smart.files import sha256, write_atomically
from smart.model import load_base, pick_device
from smart.render import (
    RenderError,
    checked_soundfont,
    open_renderer,
    score_notes,
    write_midi,
    write_wav,
)
from smart.reward import load_reward, read_options
from smart.run import backend_option, check_packages, claim_folder, hold_folder, in_one_line, progress
from smart.tokens import Grammar, Vocabulary, build_grammar, decode, unplayable, vocabulary

if TYPE_CHECKING:  # imported where they are used: the command line answers at once
    import torch
    from symusic.core import ScoreTick

    from smart.reward import Reward
    from smart.rollout import Scorer
    from smart.sampler import Sampler

WINDOW = 512  # tokens that the model sees at once: the length of its training rows (paper section 3.1)
CONTEXT = WINDOW * 3 // 4  # at most this many of them are context for new tokens
ROWS = 64  # pieces, including candidates, that are written together
TABLE = "pieces.csv"


# --- Tokens -------------------------------------------------------------------------------------------------------


def opening(tokenizer: Any, time_signature: str, tempo: float) -> list[int]:
    """The first four tokens of a new piece: Bar, TimeSig, Position_0, and the nearest Tempo.

    Raises ``UserError`` for a time signature or tempo that is not in the vocabulary.
    """
    vocab, facts = tokenizer.vocab, vocabulary(tokenizer)
    signatures = {name.removeprefix("TimeSig_") for name in vocab if name.startswith("TimeSig_")}
    tempos = {float(name.removeprefix("Tempo_")): name for name in vocab if name.startswith("Tempo_")}
    if time_signature not in signatures:
        known = ", ".join(sorted(signatures, key=lambda name: [int(part) for part in name.split("/")][::-1]))
        raise UserError(f"--time-signature {time_signature}: expected one of {known}")
    if not min(tempos) <= tempo <= max(tempos):
        raise UserError(f"--tempo {tempo:g}: expected {min(tempos):g} to {max(tempos):g} quarter notes per minute")
    nearest = min(tempos, key=lambda value: abs(value - tempo))
    return [facts.bar_id, vocab[f"TimeSig_{time_signature}"], facts.position0_id, vocab[tempos[nearest]]]


def last_bars(tokens: Sequence[int], facts: Vocabulary, *, bars: int, longest: int) -> list[int]:
    """The end of a piece, from a bar line: at most ``bars`` bars and ``longest`` tokens, with the current tempo.

    A single bar that is too long is cut at its beginning.
    """
    lines = [place for place, token in enumerate(tokens) if token == facts.bar_id][-bars:]
    fitting = [place for place in lines if len(tokens) - place < longest]  # one token is for the tempo
    start = fitting[0] if fitting else max(len(tokens) - longest + 1, 0)
    end = list(tokens[start:])
    tempos, positions = set(facts.tempo_ids), set(facts.position_ids)
    in_force = next((token for token in reversed(tokens[:start]) if token in tempos), None)
    first = next((place for place, token in enumerate(end) if token in positions), None)
    if in_force is not None and first is not None and not tempos.intersection(end[first + 1 : first + 2]):
        end.insert(first + 1, in_force)
    return end


class Writer(NamedTuple):
    """Writes tokens: the sampler and its options."""

    sampler: Sampler
    facts: Vocabulary
    temperature: float
    top_k: int
    top_p: float

    def write(
        self, prompts: Sequence[Sequence[int]], tokens: int, generator: torch.Generator, grammar: Grammar | None
    ) -> list[list[int]]:
        """Up to ``tokens`` new tokens after each of N prompts, one window at a time, without the end token."""
        import torch

        written: list[list[int]] = [[] for _ in prompts]
        going = list(range(len(prompts)))
        done = 0
        while going and done < tokens:
            seen = [
                last_bars([*prompts[row], *written[row]], self.facts, bars=WINDOW, longest=CONTEXT) for row in going
            ]
            width = max(map(len, seen))
            padded = torch.tensor([[self.facts.pad_id] * (width - len(row)) + row for row in seen])
            rollout = self.sampler.sample(
                padded,
                max_new_tokens=min(tokens - done, WINDOW - width),
                temperature=self.temperature,
                top_k=self.top_k,
                top_p=self.top_p,
                generator=generator,
                grammar=grammar,
            )
            lengths = rollout.mask.sum(1).tolist()
            for row, drawn, length in zip(going, rollout.tokens[:, width:].tolist(), lengths, strict=True):
                written[row] += drawn[:length]
            going = [row for row in going if written[row][-1] != self.facts.eos_id]
            done += max(lengths)
        return [row[:-1] if row and row[-1] == self.facts.eos_id else row for row in written]


def unplayable_tokens(
    prompts: Sequence[Sequence[int]], written: Sequence[Sequence[int]], grammar: Grammar
) -> list[int]:
    """How many of each piece's new tokens cannot be played after its prompt."""
    import torch

    counts = []
    for prompt, new in zip(prompts, written, strict=True):
        row = torch.tensor([[*prompt, *new]])
        counts.append(int(unplayable(row, len(prompt), torch.ones(1, len(new), dtype=torch.bool), grammar).sum()))
    return counts


# --- The song to continue -----------------------------------------------------------------------------------------


class Song(NamedTuple):
    """A MIDI file to continue: its score, its tokens, and the end of its last bar in quarter notes."""

    score: ScoreTick
    tokens: list[int]
    end: float


def read_song(path: Path, tokenizer: Any, tokenizer_file: Path) -> Song:
    """Read a MIDI file, first in a separate process, so that a file that crashes or hangs the parser does no harm.

    Raises ``UserError`` with the reason if it cannot be read, or contains nothing that the model can represent.
    """
    from symusic.core import ScoreTick

    limits = Limits(max_empty_bars=1.0, min_bars=1)
    with ReaderPool(tokenizer_file, limits, 1) as pool:
        ((_, answer),) = pool.answers(iter([(b"song", os.fsencode(path))]))
    if isinstance(answer, tuple):
        raise UserError(f"--continue {path}: {': '.join(filter(None, answer))}")
    tokens = np.frombuffer(answer.tokens, "<u2").tolist()
    names = {number: token for token, number in tokenizer.vocab.items()}
    signatures = [names[token].removeprefix("TimeSig_") for token in tokens if names[token].startswith("TimeSig_")]
    end = sum(4 * int(beats) / int(unit) for beats, unit in (name.split("/") for name in signatures))
    return Song(ScoreTick(path), tokens, end)


def continuation(song: Song, tokens: Sequence[int], tokenizer: Any, *, joined: bool) -> ScoreTick:
    """The music of ``tokens``, which continue ``song``: alone, or ``joined`` to the end of the song.

    The song's own notes and times do not change; the continuation is added as new tracks.
    """
    from symusic.core import NoteTick, ScoreTick, TempoTick, TimeSignatureTick, TrackTick

    whole = decode(tokenizer, [*song.tokens, *tokens])
    line = round(song.end * whole.ticks_per_quarter)
    score = song.score.copy() if joined else ScoreTick(whole.ticks_per_quarter)
    start = round(song.end * score.ticks_per_quarter) if joined else 0

    def moved(tick: int) -> int:
        return start + round((tick - line) * score.ticks_per_quarter / whole.ticks_per_quarter)

    def tempo_at(event: Any, tick: int) -> TempoTick:
        return TempoTick(tick, mspq=event.mspq)

    def signature_at(event: Any, tick: int) -> TimeSignatureTick:
        return TimeSignatureTick(tick, event.numerator, event.denominator)

    for name, at in (("tempos", tempo_at), ("time_signatures", signature_at)):
        events = list(getattr(whole, name))
        later = [at(event, moved(event.time)) for event in events if event.time >= line]
        if joined:
            before = [event for event in getattr(score, name) if event.time < start]
        else:  # the tempo and time signature at the end of the song
            before = [at(event, 0) for event in events if event.time < line][-1:]
            before = [] if later and later[0].time == 0 else before
        setattr(score, name, type(getattr(score, name))([*before, *later]))
    for part in whole.tracks:
        notes = [note for note in part.notes if note.time >= line]
        if not notes:
            continue
        new = TrackTick("continuation", part.program, part.is_drum)
        for note in notes:
            new.notes.append(NoteTick(moved(note.time), moved(note.end) - moved(note.time), note.pitch, note.velocity))
        score.tracks.append(new)
    return score


# --- Pieces -------------------------------------------------------------------------------------------------------


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


def read_table(folder: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The finished pieces, in order, up to the first line that is damaged or incomplete after a crash.

    A damaged line is reported on stderr; the pieces from there on are written again.
    """
    path = folder / TABLE
    if not path.is_file():
        return []
    # no value contains a comma or a quotation mark; text after the last line break is an incomplete line
    *lines, _ = path.read_text(encoding="utf-8", errors="replace").split("\n")
    rows: list[dict[str, str]] = []
    for number, line in enumerate(lines):
        values = line.split(",")
        if number == 0 and values == list(columns):
            continue
        try:
            row = dict(zip(columns, values, strict=True))
            numbers = {name: float(value) for name, value in row.items() if name != "file"}
            whole = [int(row[name]) for name in ("piece", "tokens", "unplayable")]
            if number == 0 or whole[0] != len(rows) or not all(map(math.isfinite, numbers.values())):
                raise ValueError
        except ValueError:
            click.echo(
                f"Warning: {path}: line {number + 1} is damaged; the pieces from there on are written again", err=True
            )
            break
        rows.append(row)
    return rows


@contextmanager
def open_pieces(out: Path, settings: dict[str, Any], columns: Sequence[str]) -> Iterator[int]:
    """Create the folder ``out``, or continue one with the same settings; yields how many pieces it already has.

    Inside the ``with`` no other process can use the folder.
    """
    claim_folder(out, settings)
    with hold_folder(out):
        rows = read_table(out, columns)
        lines = [list(rows[0]), *(list(row.values()) for row in rows)] if rows else []
        try:
            write_atomically(out / TABLE, "".join(",".join(line) + "\n" for line in lines).encode())
        except OSError as error:
            raise UserError(f"--out {out} cannot be written ({error.strerror})") from None
        yield len(rows)


COLUMNS = ("piece", "file", "notes", "seconds", "tokens", "unplayable", "candidate")


@click.command()
@click.option(
    "--model",
    default="piano-small",
    show_default=True,
    help="Base model (shipped name, folder or hub id) or folder of a run.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder for the pieces; an unfinished one is continued.",
)
@click.option("-n", "--count", default=4, show_default=True, type=click.IntRange(min=1), help="Number of pieces.")
@click.option(
    "--tokens", default=512, show_default=True, type=click.IntRange(min=1), help="Maximum new tokens per piece."
)
@click.option("--tempo", default=120.0, show_default=True, help="Tempo of new pieces in quarter notes per minute.")
@click.option("--time-signature", default="4/4", show_default=True, help="First time signature of new pieces.")
@click.option("--continue", "song", type=click.Path(path_type=Path), help="MIDI file to continue.")
@click.option(
    "--bars",
    default=8,
    show_default=True,
    type=click.IntRange(min=1),
    help="How many bars at the end of the MIDI file to use as context.",
)
@click.option("--seed", default=1, show_default=True, type=click.IntRange(0, 2**31 - 1), help="Seed of the sampling.")
@click.option(
    "--temperature",
    default=1.0,
    show_default=True,
    type=click.FloatRange(0, 100, min_open=True),
    help="Sampling temperature.",
)
@click.option(
    "--top-k",
    default=0,
    show_default=True,
    type=click.IntRange(min=0),
    help="Sample from the K most likely tokens only (0: from all).",
)
@click.option(
    "--top-p",
    default=1.0,
    show_default=True,
    type=click.FloatRange(0, 1, min_open=True),
    help="Sample from the most likely tokens that together have this probability.",
)
@click.option("--playable", is_flag=True, help="Never sample a token that cannot be played.")
@click.option(
    "--best-of",
    default=1,
    show_default=True,
    type=click.IntRange(1, ROWS),
    help="Write this many versions of each piece and keep the best.",
)
@click.option(
    "--reward", "kind", default="ce_proxy", show_default=True, help="Reward that picks the best version (--best-of)."
)
@click.option(
    "--reward-option", "options", multiple=True, metavar="KEY=VALUE", help="Setting of the reward (repeatable)."
)
@click.option("--soundfont", default="timgm", show_default=True, help="Soundfont (short name or path).")
@click.option(
    "--sample-rate",
    default=44100,
    show_default=True,
    type=click.IntRange(8000, 192_000),
    help="Sample rate of the WAV files in Hz.",
)
@click.option(
    "--seconds",
    default=600.0,
    show_default=True,
    type=click.FloatRange(0, 3600, min_open=True),
    help="Maximum length of a WAV file in seconds.",
)
@backend_option
@click.option(
    "--device",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "cpu", "cuda"]),
    help="Where the models run (auto: on the GPU if there is one).",
)
@click.pass_context
def main(context: click.Context, **given: Any) -> None:
    """Write music with a base or a tuned run, as MIDI and WAV.

    If it was interrupted, run the same command again to continue.
    """
    if given["song"] is not None:
        for name in ("tempo", "time_signature"):
            if context.get_parameter_source(name) != click.core.ParameterSource.DEFAULT:
                raise UserError(
                    f"--{name.replace('_', '-')} and --continue cannot be combined: a continuation keeps the song's own"
                )
    with in_one_line("a piece", "run the same command again to continue", RenderError):
        generate(**given)


def generate(
    *,
    model: str,
    out: Path,
    count: int,
    tokens: int,
    tempo: float,
    time_signature: str,
    song: Path | None,
    bars: int,
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
    import torch

    from smart.rollout import Scorer, find_system
    from smart.sampler import Sampler

    def reward() -> Reward | None:
        if best_of == 1:
            return None
        where = "cpu" if device == "cpu" or not torch.cuda.is_available() else "cuda"
        return load_reward(kind, device=where, **read_options(options))

    def song_file() -> None:
        if song is not None and not song.is_file():
            raise UserError(f"--continue {song}: no such file; expected a MIDI file")

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
    going_on = None if song is None else read_song(song, tokenizer, folder / "tokenizer.json")
    if going_on is None:
        prompt = opening(tokenizer, time_signature, tempo)
    else:
        # the continuation starts a new bar, in the time signature of the last one
        signature = next(token for token in reversed(going_on.tokens) if token in facts.time_signature_ids)
        line = [facts.bar_id, signature]
        read = last_bars(going_on.tokens, facts, bars=bars, longest=CONTEXT - len(line))
        if read.count(facts.bar_id) < min(bars, going_on.tokens.count(facts.bar_id)):
            click.echo(f"{song}: only its last {read.count(facts.bar_id)} bars fit into the model's context", err=True)
        prompt = read + line
    for name, path in (("model", folder / "model.safetensors"), ("soundfont", soundfont_file), ("song", song)):
        settings[f"{name}_sha256"] = None if path is None else sha256(path)
    columns = [*COLUMNS, *(rates.axes if rates else ())]
    writer = Writer(Sampler(network, pad_id=facts.pad_id, eos_id=facts.eos_id), facts, temperature, top_k, top_p)

    def music(new: Sequence[int]) -> ScoreTick:
        if going_on is None:
            return decode(tokenizer, [*prompt, *new])
        return continuation(going_on, [*line, *new], tokenizer, joined=False)

    def draw(batch: int, rows: Sequence[Sequence[int]], mask: Grammar | None) -> list[list[int]]:
        return writer.write(rows, tokens, torch.Generator().manual_seed(seed * 2**31 + batch), mask)

    with (
        open_pieces(out, settings, columns) as done,
        open_renderer(backend, soundfont_file, sample_rate=sample_rate, seconds=seconds, device=where) as pool,
        progress(total=count, initial=done, unit="piece") as bar,
        open(out / TABLE, "a", encoding="utf-8", newline="") as file,
    ):
        scorer = None if rates is None else Scorer(tokenizer, pool, rates, sample_rate=sample_rate)
        table = csv.writer(file, lineterminator="\n")
        if not done:
            table.writerow(columns)
        together = max(ROWS // best_of, 1)
        for batch in range(done // together, -(-count // together)):
            pieces = range(batch * together, min((batch + 1) * together, count))
            prompts = [prompt] * (len(pieces) * best_of)
            drawn = draw(batch, prompts, grammar if playable else None)
            bad = unplayable_tokens(prompts, drawn, grammar)
            if playable and batch == 0:
                free = draw(batch, prompts, None)
                click.echo(f"without --playable: {_rate(unplayable_tokens(prompts, free, grammar), free)}")
                click.echo(f"with --playable:    {_rate(bad, drawn)}")
            for place, piece in enumerate(pieces):
                if piece < done:
                    continue
                mine = slice(place * best_of, (place + 1) * best_of)
                scores = [music(new) for new in drawn[mine]]
                clips = [pool.submit(score_notes(score, max_beats=math.inf)) for score in scores]
                best, audio, ratings = choose(clips, scorer)
                stem = out / f"{piece:04d}"
                write_midi(stem.with_suffix(".mid"), scores[best])
                write_wav(stem.with_suffix(".wav"), audio, sample_rate)
                if going_on is not None:
                    joined = continuation(going_on, [*line, *drawn[mine][best]], tokenizer, joined=True)
                    write_midi(out / f"{piece:04d}-joined.mid", joined)
                    sound_of_both = pool.submit(score_notes(joined, max_beats=math.inf)).result()
                    write_wav(out / f"{piece:04d}-joined.wav", sound_of_both, sample_rate)
                table.writerow(
                    [
                        piece,
                        f"{piece:04d}.wav",
                        scores[best].note_num(),
                        f"{audio.shape[1] / sample_rate:.2f}",
                        len(drawn[mine][best]),
                        bad[mine][best],
                        best,
                        *(f"{value:.4f}" for value in ratings.values()),
                    ]
                )
                file.flush()
                bar.update()
    rows = read_table(out, columns)
    silent = sum(row["notes"] == "0" for row in rows)
    click.echo(
        f"{len(rows)} {'piece' if len(rows) == 1 else 'pieces'} in {out}, {silent} without notes; "
        "tokens that cannot be played: "
        + _rate([int(row["unplayable"]) for row in rows], [range(int(row["tokens"])) for row in rows])
    )
    if rates is not None:
        axis, hint = rates.axes[0], " (an approximation, not the aesthetic model)" if rates.is_stand_in else ""
        mean = np.mean([float(row[axis]) for row in rows])
        click.echo(f"best of {best_of} by {kind}{hint}: mean {axis} {mean:.3f}")


def _rate(bad: Sequence[int], written: Sequence[Sequence[int]]) -> str:
    total = sum(map(len, written))
    share = sum(bad) / max(total, 1)
    return f"{sum(bad)} of {total} ({share:.2%}), in {sum(map(bool, bad))} of {len(bad)} pieces"


if __name__ == "__main__":
    main()
