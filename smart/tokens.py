"""The vocabulary, and the conversion between token ids and notes, with MidiTok's REMI and symusic.

The vocabulary is the paper's (section 3.1): 413 tokens, one stream of piano notes written as ``Bar TimeSig
(Position [Tempo] (Pitch Velocity Duration)*)*``. Positions count twelfths of the time signature's beat (an
eighth note in n/8) from the bar line; durations have the same unit.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from smart import UserError, hub
from smart.files import parse_json

if TYPE_CHECKING:  # imported where they are used: a command line needs none of them, the corpus's workers no torch
    import torch
    from miditok import REMI
    from symusic.core import ScoreTick

FILE_NAME = "tokenizer.json"
LARGEST_FILE = 4 << 20  # bytes of a tokenizer's file
LARGEST_NUMBER = 1000  # in a tokenizer's file, also of entries in a list: MidiTok makes that many tokens
MOST_TOKENS = 1 << 16  # of a vocabulary: shards hold 16 bits per token
PIANO_PROGRAMS = range(8)  # General MIDI 1-8 (paper section 3.1), zero-based
DRUM_PROGRAM = "Program_-1"
SPECIALS = ("PAD", "BOS", "EOS", "PRE", "SUF", *(f"INF{number}" for number in range(1, 17)))


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer's ids by their meaning; tuples are in increasing order."""

    size: int
    pad_id: int
    bos_id: int
    eos_id: int
    bar_id: int
    position0_id: int
    time_signature_ids: tuple[int, ...]
    tempo_ids: tuple[int, ...]
    position_ids: tuple[int, ...]
    pitch_ids: tuple[int, ...]  # without drums
    drum_ids: tuple[int, ...]  # keys of drum kits; empty in a piano vocabulary
    program_ids: tuple[int, ...]  # empty in a piano vocabulary
    drum_program_id: int  # the one of program_ids that plays drums; -1 if none does
    velocity_ids: tuple[int, ...]
    duration_ids: tuple[int, ...]


def build_tokenizer(instruments: str = "piano") -> REMI:
    """The tokenizer of the paper's piano model: 413 tokens with the ids of the authors' published model.

    ``instruments="all"`` adds a Program token before every note and separate pitches for drums: the extension to
    many instruments that the paper leaves to later work.
    """
    from miditok import REMI, TokenizerConfig

    if instruments not in ("piano", "all"):
        raise ValueError(f"instruments: expected 'piano' or 'all', got {instruments!r}")
    everything = instruments == "all"
    return REMI(
        TokenizerConfig(
            pitch_range=(21, 108),
            beat_res={(0, 4): 12},
            num_velocities=32,
            special_tokens=list(SPECIALS),
            use_tempos=True,
            num_tempos=64,
            tempo_range=(40, 250),
            log_tempos=False,
            use_time_signatures=True,
            time_signature_range={8: [3, 5, 6, 7, 9, 10, 11, 12], 4: [2, 3, 4, 5, 6], 2: [2, 3]},
            use_programs=everything,
            one_token_stream_for_programs=everything,
            use_pitchdrum_tokens=everything,
            drums_pitch_range=(27, 87),  # the keys of the General MIDI 2 drum sets
            remove_duplicated_notes=True,
        )
    )


def load_tokenizer(path_or_hub_id: str | Path) -> REMI:
    """A tokenizer from ``tokenizer.json``: the file, a folder that contains it, or a model's id on the hub.

    The hub is asked only if no such path exists. Raises ``UserError`` if there is no such tokenizer, the hub
    cannot be reached, or the file does not describe an untrained REMI tokenizer.
    """
    path = Path(os.path.expanduser(path_or_hub_id))
    if path.is_dir():
        path = path / FILE_NAME
    if path.is_file():
        return _read_tokenizer(path)
    name = str(path_or_hub_id)
    if Path(name).exists() or not hub.is_hub_id(name):
        raise UserError(
            f"tokenizer {name!r}: no such tokenizer; expected {FILE_NAME}, a folder that contains it, "
            "or a hub id such as owner/name"
        )
    try:
        (path,) = hub.fetch(name, [FILE_NAME])
    except UserError as error:
        raise UserError(
            f"tokenizer {name!r}: there is no such local path, and {error.message}; "
            f"download {FILE_NAME} on another machine and give the folder that contains it"
        ) from None
    return _read_tokenizer(path)


def _read_tokenizer(path: Path) -> REMI:
    """Build the tokenizer of a ``tokenizer.json``; only its configuration is taken from the file."""
    from miditok import REMI, TokenizerConfig

    wanted = "expected an untrained REMI tokenizer, saved by MidiTok"
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise ValueError(f"it has more than {LARGEST_FILE:,} bytes")
        saved = parse_json(path.read_text(encoding="utf-8-sig"))
        config, kind = saved["config"], saved["tokenization"]
        version = str(saved.get("miditok_version", config.get("miditok_version", "3.1")))
        inclusive = tuple(int(part) for part in version.split(".")[:2]) >= (3, 1)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"tokenizer {path}: cannot be read ({error!r}); {wanted}") from None
    if kind != "REMI" or "_model" in saved:
        raise UserError(f"tokenizer {path} is a {'trained ' if '_model' in saved else ''}{kind}; {wanted}")
    try:
        if not inclusive:  # up to MidiTok 3.0 a pitch range excludes its upper end; since 3.1 it includes it
            for key in {"pitch_range", "drums_pitch_range"} & config.keys():
                config[key] = [config[key][0], config[key][1] - 1]
        for key in {"beat_res", "beat_res_rest"} & config.keys():
            config[key] = {tuple(map(int, beats.split("_"))): steps for beats, steps in config[key].items()}
        units = config["time_signature_range"].items()
        config["time_signature_range"] = {int(unit): beats for unit, beats in units}
        config.setdefault("additional_params", {})
        # of a bend range only the number of steps makes tokens; its ends are usually thousands
        counted = [value for key, value in config.items() if key != "pitch_bend_range"]
        counted += config.get("pitch_bend_range", [])[2:]
        for number in _numbers(counted):
            if not abs(number) <= LARGEST_NUMBER:  # NaN as well
                raise ValueError(f"{float(number):g} in its configuration, at most {LARGEST_NUMBER} expected")
        if (tokens := _declared_tokens(config)) > MOST_TOKENS:
            raise ValueError(f"it makes about {tokens:,} tokens, at most {MOST_TOKENS:,} expected")
        tokenizer = REMI(TokenizerConfig.from_dict(config))
        vocabulary(tokenizer)
    except Exception as error:  # MidiTok does not check values: a wrong one may raise anything
        raise UserError(f"tokenizer {path} gives no piano vocabulary ({error!r}); {wanted}") from None
    return tokenizer


def _declared_tokens(config: dict[str, Any]) -> int:
    """About how many tokens MidiTok would make of what a configuration multiplies: beats by their steps."""
    steps = [(beats, int(each)) for key in ("beat_res", "beat_res_rest") for beats, each in config.get(key, {}).items()]
    durations = sum((beats[1] - beats[0]) * each for beats, each in steps)
    longest_bar = max((max(beats, default=4) for beats in config["time_signature_range"].values()), default=4)
    return durations + max((each for _, each in steps), default=0) * longest_bar + len(config.get("special_tokens", ()))


def _numbers(value: Any) -> Iterator[float]:
    """All numbers in nested containers, including keys, and the number of their entries."""
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, list | tuple):
        yield len(value)
        for each in value:
            yield from _numbers(each)
    elif isinstance(value, int | float):
        yield value


def save_tokenizer(tokenizer: REMI, folder: str | Path) -> None:
    """Write ``folder/tokenizer.json`` in MidiTok's format."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder / FILE_NAME)


def vocabulary(tokenizer: REMI) -> Vocabulary:
    """The ids of ``tokenizer`` by meaning. Raises ``ValueError`` naming the missing token of a piano vocabulary."""
    vocab: dict[str, int] = tokenizer.vocab

    def one(token: str) -> int:
        if token not in vocab:
            raise ValueError(f"the vocabulary has no {token} token")
        return vocab[token]

    def every(kind: str) -> tuple[int, ...]:
        return tuple(sorted(number for token, number in vocab.items() if token.startswith(f"{kind}_")))

    for kind in ("TimeSig", "Tempo", "Position", "Pitch", "Velocity", "Duration"):
        if not every(kind):
            raise ValueError(f"the vocabulary has no {kind} token")

    return Vocabulary(
        size=len(vocab),
        pad_id=one("PAD_None"),
        bos_id=one("BOS_None"),
        eos_id=one("EOS_None"),
        bar_id=one("Bar_None"),
        position0_id=one("Position_0"),
        time_signature_ids=every("TimeSig"),
        tempo_ids=every("Tempo"),
        position_ids=every("Position"),
        pitch_ids=every("Pitch"),
        drum_ids=every("PitchDrum"),
        program_ids=every("Program"),
        drum_program_id=vocab.get(DRUM_PROGRAM, -1),
        velocity_ids=every("Velocity"),
        duration_ids=every("Duration"),
    )


def duration_steps(value: str, steps: int) -> int:
    """The length that a Duration token names, such as 1.6.12 (beats, part, parts), in ``steps`` to a beat."""
    beats, part, parts = map(int, value.split("."))
    return (beats * parts + part) * steps // parts


def merge_piano(score: ScoreTick, pitch_range: tuple[int, int] = (0, 127)) -> ScoreTick:
    """The notes of all piano tracks of ``score`` as one track; drums and other programs are left out.

    Pitches outside ``pitch_range`` (ends included) are left out as well, and so are changes of tempo and time
    signature after the last onset, which affect no note and would only add empty bars. Of notes with the same
    onset and pitch the longest is kept. If no notes remain, the result has no track. ``score`` is not changed.
    """
    from symusic.core import NoteTickList, ScoreTick, TempoTickList, TimeSignatureTickList, TrackTick

    merged = ScoreTick(score.ticks_per_quarter)
    columns = [
        track.notes.numpy()
        for track in score.tracks
        if not track.is_drum and track.program in PIANO_PROGRAMS and len(track.notes)
    ]
    notes = {name: np.concatenate([part[name] for part in columns]) for name in columns[0]} if columns else {}
    if notes:
        inside = (notes["pitch"] >= pitch_range[0]) & (notes["pitch"] <= pitch_range[1])
        notes = {name: column[inside] for name, column in notes.items()}
    if not notes or not len(notes["time"]):
        merged.tempos, merged.time_signatures = score.tempos.copy(), score.time_signatures.copy()
        return merged
    order = np.lexsort((-notes["duration"], notes["pitch"], notes["time"]))
    time, pitch = notes["time"][order], notes["pitch"][order]
    order = order[np.append(True, (np.diff(time) != 0) | (np.diff(pitch) != 0))]
    track = TrackTick()
    track.notes = NoteTickList.from_numpy(*(column[order] for column in notes.values()))
    merged.tracks.append(track)
    last = int(time[-1])
    merged.tempos = _until(score.tempos, last, TempoTickList)
    merged.time_signatures = _until(score.time_signatures, last, TimeSignatureTickList)
    return merged


def all_tracks(score: ScoreTick) -> ScoreTick:
    """A copy of all tracks of ``score`` that have notes, including drums, without changes after the last onset."""
    from symusic.core import ScoreTick, TempoTickList, TimeSignatureTickList

    whole = ScoreTick(score.ticks_per_quarter)
    last = 0
    for track in score.tracks:
        if len(track.notes):
            whole.tracks.append(track.copy())
            whole.tracks[-1].notes.sort()
            last = max(last, int(track.notes.numpy()["time"].max()))
    whole.tempos = _until(score.tempos, last, TempoTickList)
    whole.time_signatures = _until(score.time_signatures, last, TimeSignatureTickList)
    return whole


def _until(events: Any, last: int, kind: Any) -> Any:
    """Events of a symusic list up to tick ``last``, sorted by tick (stable)."""
    columns = events.numpy()
    order = np.argsort(columns["time"], kind="stable")
    order = order[columns["time"][order] <= last]
    return kind.from_numpy(*(column[order] for column in columns.values()))


def encode(tokenizer: REMI, score: ScoreTick) -> list[int]:
    """The token ids of ``score`` as one stream, without BOS and EOS.

    A score without notes gives only its opening tokens, so count notes where they matter. Raises ``ValueError``
    if ``score`` has no ticks per quarter, or if it has several tracks with notes but the vocabulary has no
    programs: see ``merge_piano``.
    """
    if score.ticks_per_quarter < 1:
        raise ValueError(f"ticks per quarter: expected at least 1, got {score.ticks_per_quarter}")
    encoded = tokenizer.encode(score)
    streams = encoded if isinstance(encoded, list) else [encoded]
    if len(streams) != 1:
        raise ValueError(f"expected one track with notes, got {len(streams)}: merge them first")
    return [int(token) for token in streams[0].ids]


def decode(tokenizer: REMI, ids: Sequence[int] | npt.NDArray[Any] | torch.Tensor) -> ScoreTick:
    """The music of ``ids``: a one-dimensional list, array or tensor of any length, including 0.

    Any sequence of the vocabulary's ids is decoded: special tokens are skipped, and so is a Pitch that is not
    followed by Velocity and Duration. Notes are sorted by onset; tempos and time signatures are sorted, too, with
    one per tick (the last). Raises ``ValueError`` for an id outside the vocabulary or another shape, ``TypeError``
    for numbers that are not integers.
    """
    from miditok import TokSequence
    from symusic.core import TempoTickList, TimeSignatureTickList

    array = np.asarray(ids.detach().cpu() if hasattr(ids, "detach") else ids)
    if array.ndim != 1:
        raise ValueError(f"ids: expected one dimension, got shape {tuple(array.shape)}")
    if array.size and array.dtype.kind not in "iu":
        raise TypeError(f"ids: expected integers, got {array.dtype}")
    size = len(tokenizer.vocab)
    if array.size and not 0 <= int(array.min()) <= int(array.max()) < size:
        raise ValueError(f"ids: expected 0 to {size - 1}, got {int(array.min())} to {int(array.max())}")
    sequence = TokSequence(ids=array.tolist())
    score: ScoreTick = tokenizer.decode(sequence if tokenizer.one_token_stream else [sequence])
    # positions that go backwards leave events out of order, but ticks can only be converted to seconds in order
    score.tempos = last_of_each_tick(score.tempos, TempoTickList)
    score.time_signatures = last_of_each_tick(score.time_signatures, TimeSignatureTickList)
    for track in score.tracks:
        track.notes.sort()
    return score


def last_of_each_tick(events: Any, kind: Any) -> Any:
    """A symusic list of events, sorted by tick; of events at the same tick the last is kept."""
    columns = events.numpy()
    times = columns["time"]
    if np.all(np.diff(times) > 0):
        return events
    order = np.argsort(times, kind="stable")
    order = order[np.append(np.diff(times[order]) > 0, True)]
    return kind.from_numpy(*(column[order] for column in columns.values()))


class Place(NamedTuple):
    """The state of N rows of tokens that decides which token may come next. (N,) int64 each."""

    token: torch.Tensor  # the last token
    position: torch.Tensor  # number of the last Position in this bar, -1 before the first
    bar_positions: torch.Tensor  # how many positions this bar has


@dataclass(frozen=True)
class Grammar:
    """Which tokens may follow which, as tables over the vocabulary (V); made by ``build_grammar``.

    A token may come next if it may follow the last one; a Position must also be after the last Position in its bar
    and inside the bar. At any ``Place``, however it was reached, at least one token may come next.
    """

    allowed: torch.Tensor  # (V, V) bool: row = token, column = next token
    position: torch.Tensor  # (V,) int64: the number of a Position token, -1 for other tokens
    bar_positions: torch.Tensor  # (V,) int64: positions per bar of a TimeSig token, 0 for other tokens
    bar_id: int
    default_positions: int  # per bar before the first TimeSig token

    def to(self, device: Any) -> Grammar:
        return replace(
            self,
            allowed=self.allowed.to(device),
            position=self.position.to(device),
            bar_positions=self.bar_positions.to(device),
        )

    def read(self, tokens: torch.Tensor) -> Place:
        """The state after rows of tokens (N, L), L >= 1. Padding on the left does not matter."""
        return Place(*(part[:, -1] for part in self.read_all(tokens)))

    def read_all(self, tokens: torch.Tensor) -> Place:
        """The state after each of the tokens (N, L), as (N, L)."""
        position, bar_positions = self.position[tokens], self.bar_positions[tokens]
        counted = (position >= 0) | (tokens == self.bar_id)
        return Place(
            tokens, _latest(position, counted, -1), _latest(bar_positions, bar_positions > 0, self.default_positions)
        )

    def step(self, place: Place, tokens: torch.Tensor) -> Place:
        """The state after one more token per row, (N,), allowed or not. Does not synchronise with the device."""
        position, bar_positions = self.position[tokens], self.bar_positions[tokens]
        return Place(
            tokens,
            position.where((position >= 0) | (tokens == self.bar_id), place.position),
            bar_positions.where(bar_positions > 0, place.bar_positions),
        )

    def playable(self, place: Place) -> torch.Tensor:
        """(N, V) bool: which tokens may come next. Does not synchronise with the device."""
        later = self.position > place.position[:, None]
        within = self.position < place.bar_positions[:, None]
        return self.allowed[place.token] & ((self.position < 0) | (later & within))


def _latest(values: torch.Tensor, counted: torch.Tensor, default: int) -> torch.Tensor:
    """Of ``values`` (N, L), the last one up to each place that is ``counted``; ``default`` where there is none."""
    import torch

    places = torch.arange(values.shape[1], device=values.device).expand_as(values)
    last = places.masked_fill(~counted, -1).cummax(1).values
    return values.gather(1, last.clamp(min=0)).masked_fill(last < 0, default)


def allowed_transitions(tokenizer: REMI) -> torch.Tensor:
    """(V, V) bool: ``[a, b]`` is True if token ``b`` may follow token ``a`` in a piece.

    By token type, from MidiTok's graph of types, restricted to what its encoder writes: special tokens do not occur
    in a piece, and only a bar line follows them, as after BOS; a time signature only follows a bar line, since
    elsewhere it would change the length of a bar that has begun; EOS may come wherever a bar line may. If drums have
    separate pitches, these follow the drum program and nothing else. (The decoder would play other sequences, too: a
    Pitch after the drum program as the drum with that number, a PitchDrum after another program as the pitch with
    that number, and a note without a program with the program of the note before it.)
    """
    import torch

    graph: dict[str, set[str]] = tokenizer.tokens_types_graph
    specials = {token.split("_")[0] for token in tokenizer.special_tokens}
    after = {kind: set(followers) for kind, followers in graph.items() if kind not in specials}
    for kind, followers in after.items():
        followers.intersection_update(after)
        if kind != "Bar":
            followers.discard("TimeSig")
        if "Bar" in followers:
            followers.add("EOS")
    after |= {kind: {"Bar"} for kind in specials}
    kinds = [""] * len(tokenizer.vocab)
    for token, number in tokenizer.vocab.items():
        kinds[number] = token.split("_")[0]
    names = sorted(set(kinds))
    table = torch.tensor([[b in after.get(a, ()) for b in names] for a in names])
    index = torch.tensor([names.index(kind) for kind in kinds])
    allowed = table[index[:, None], index]
    facts = vocabulary(tokenizer)
    if facts.drum_ids:
        for program in facts.program_ids:
            allowed[program, list(facts.pitch_ids if program == facts.drum_program_id else facts.drum_ids)] = False
    return allowed


def build_grammar(tokenizer: REMI) -> Grammar:
    """The grammar of ``tokenizer``'s vocabulary; build it once if you call ``unplayable`` often."""
    import torch

    facts = vocabulary(tokenizer)
    steps = int(tokenizer.config.max_num_pos_per_beat)
    position = torch.full((facts.size,), -1)
    bar_positions = torch.zeros(facts.size, dtype=torch.int64)
    for token, number in tokenizer.vocab.items():
        kind, value = token.split("_", 1)
        if kind == "Position":
            position[number] = int(value)
        elif kind == "TimeSig":
            bar_positions[number] = int(value.split("/")[0]) * steps
    return Grammar(allowed_transitions(tokenizer), position, bar_positions, facts.bar_id, 4 * steps)


def unplayable(tokens: torch.Tensor, prompt_length: int, mask: torch.Tensor, grammar: Grammar | REMI) -> torch.Tensor:
    """Which completion tokens cannot be played: (N, T) bool, for ``tokens`` (N, P+T) and ``mask`` (N, T).

    A token is marked if it may not follow the token before it, or if it is a Position that is not after the
    previous Position in its bar or is past the end of the bar: see ``Grammar``. Tokens outside ``mask`` are not
    marked. Raises ``ValueError`` if the shapes do not fit or the prompt is empty.
    """

    wanted = (tokens.shape[0], tokens.shape[-1] - prompt_length)
    if tokens.ndim != 2 or prompt_length < 1 or tuple(mask.shape) != wanted:
        raise ValueError(
            f"expected tokens (N, P+T), P >= 1 and mask (N, T); got tokens {tuple(tokens.shape)}, "
            f"P {prompt_length}, mask {tuple(mask.shape)}"
        )
    grammar = (grammar if isinstance(grammar, Grammar) else build_grammar(grammar)).to(tokens.device)
    before = Place(*(part[:, prompt_length - 1 : -1] for part in grammar.read_all(tokens)))
    after = tokens[:, prompt_length:]
    position = grammar.position[after]
    in_order = (position < 0) | ((position > before.position) & (position < before.bar_positions))
    return ~(grammar.allowed[before.token, after] & in_order) & mask.bool()
