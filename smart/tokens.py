"""Facts of the vocabulary, and the way between token ids and notes, through MidiTok's REMI and symusic.

The vocabulary is the paper's (section 3.2): 413 tokens, one stream of piano notes written as
``Bar TimeSig Position [Tempo] (Pitch Velocity Duration)*``. A position is a twelfth of the beat that the time
signature names (an eighth in n/8), counted from the bar line, and a duration is counted in the same unit.
"""

import json
import re
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from miditok import REMI, TokenizerConfig, TokSequence
from symusic import Note, Score, Tempo, TimeSignature, Track

from smart import UserError

FILE_NAME = "tokenizer.json"
PIANO_PROGRAMS = range(8)  # General MIDI 1-8 (paper section 3.1), zero-based
SPECIALS = ("PAD", "BOS", "EOS", "PRE", "SUF", *(f"INF{number}" for number in range(1, 17)))
HUB_SECONDS = 5.0  # how long the hub may take to answer before it counts as out of reach


@dataclass(frozen=True)
class Vocabulary:
    """The ids of a tokenizer's tokens, by what they mean, each tuple in increasing order of id."""

    size: int
    pad_id: int
    bos_id: int
    eos_id: int
    bar_id: int
    position0_id: int
    time_signature_ids: tuple[int, ...]
    tempo_ids: tuple[int, ...]
    position_ids: tuple[int, ...]
    pitch_ids: tuple[int, ...]
    velocity_ids: tuple[int, ...]
    duration_ids: tuple[int, ...]


def build_tokenizer() -> REMI:
    """The tokenizer of the paper's piano model: 413 tokens, the ids of the authors' published model."""
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
            use_programs=False,
            use_pitchdrum_tokens=False,
            remove_duplicated_notes=True,
        )
    )


def load_tokenizer(path_or_hub_id: str | Path) -> REMI:
    """A tokenizer from ``tokenizer.json``: the file, a folder that holds it, or a model's id on the hub.

    The hub is asked only when no such path exists. Raises ``UserError`` where there is no such tokenizer, the hub
    cannot be reached, or the file is not that of an untrained REMI tokenizer.
    """
    path = Path(path_or_hub_id)
    if path.is_dir():
        path = path / FILE_NAME
    if path.is_file():
        return _read_tokenizer(path)
    name = str(path_or_hub_id)
    if path.exists() or Path(path_or_hub_id).exists() or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise UserError(
            f"tokenizer {name!r}: expected {FILE_NAME}, a folder that holds it, or a hub id such as owner/name"
        )
    return _read_tokenizer(_download(name))


def _download(hub_id: str) -> Path:
    """The hub's ``tokenizer.json``, from the local cache where the hub is out of reach."""
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache

    advice = f"download {FILE_NAME} of {hub_id} elsewhere and give the folder that holds it instead"
    try:  # the hub client alone would retry for half a minute
        with urllib.request.urlopen(
            urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=HUB_SECONDS
        ):
            pass
    except urllib.error.HTTPError:
        pass  # an answer, whatever it says
    except OSError as error:
        cached = try_to_load_from_cache(hub_id, FILE_NAME)
        if isinstance(cached, str):
            return Path(cached)
        raise UserError(
            f"tokenizer {hub_id!r}: no such path here, and {constants.ENDPOINT} is out of reach ({error}); {advice}"
        ) from None
    try:
        return Path(hf_hub_download(hub_id, FILE_NAME))
    except Exception as error:  # the hub client raises dozens of kinds; all mean that it cannot be had
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"tokenizer {hub_id!r}: the hub does not give it ({reason}); {advice}") from None


def _read_tokenizer(path: Path) -> REMI:
    """Read ``tokenizer.json``; every key is checked first, since MidiTok turns unknown ones into attributes."""
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"tokenizer {path}: expected a JSON file written by MidiTok ({error})") from None
    if not isinstance(saved, dict) or not isinstance(saved.get("config"), dict):
        raise UserError(f"tokenizer {path}: expected a JSON file written by MidiTok, with its 'config'")
    if saved.get("tokenization") != "REMI":
        raise UserError(f"tokenizer {path}: tokenization is {saved.get('tokenization')!r}, expected 'REMI'")
    foreign = sorted(
        key
        for key in saved
        if key not in ("config", "tokenization", "has_bpe") and not key.endswith("_version")
    )
    if foreign:
        raise UserError(
            f"tokenizer {path}: unknown {', '.join(foreign)}; expected an untrained REMI tokenizer"
        )
    config = saved["config"]
    try:
        written_by = str(saved.get("miditok_version", config.get("miditok_version", "3.1")))
        if tuple(int(part) for part in written_by.split(".")[:2]) < (3, 1):
            # up to MidiTok 3.0 the upper end of a pitch range was exclusive; since 3.1 it is part of the range
            for key in ("pitch_range", "drums_pitch_range"):
                if key in config:
                    config[key] = [config[key][0], config[key][1] - 1]
        for key in ("beat_res", "beat_res_rest"):
            if key in config:
                config[key] = {
                    tuple(int(end) for end in beats.split("_")): steps for beats, steps in config[key].items()
                }
        config["time_signature_range"] = {
            int(unit): beats for unit, beats in config["time_signature_range"].items()
        }
        config.setdefault("additional_params", {})
        tokenizer = REMI(TokenizerConfig.from_dict(config))
        vocabulary(tokenizer)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, ZeroDivisionError) as error:
        raise UserError(
            f"tokenizer {path}: its configuration does not make a vocabulary ({error!r})"
        ) from None
    return tokenizer


def save_tokenizer(tokenizer: REMI, folder: str | Path) -> None:
    """Write ``folder/tokenizer.json`` in MidiTok's own form."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder / FILE_NAME)


def vocabulary(tokenizer: REMI) -> Vocabulary:
    """The ids of ``tokenizer`` by meaning. Raises ``ValueError`` naming what a piano vocabulary lacks."""
    vocab: dict[str, int] = tokenizer.vocab

    def of(kind: str) -> tuple[int, ...]:
        found = tuple(sorted(number for token, number in vocab.items() if token.startswith(f"{kind}_")))
        if not found:
            raise ValueError(f"the vocabulary holds no {kind} token")
        return found

    for token in ("PAD_None", "BOS_None", "EOS_None", "Bar_None", "Position_0"):
        if token not in vocab:
            raise ValueError(f"the vocabulary holds no {token}")
    return Vocabulary(
        size=len(vocab),
        pad_id=vocab["PAD_None"],
        bos_id=vocab["BOS_None"],
        eos_id=vocab["EOS_None"],
        bar_id=vocab["Bar_None"],
        position0_id=vocab["Position_0"],
        time_signature_ids=of("TimeSig"),
        tempo_ids=of("Tempo"),
        position_ids=of("Position"),
        pitch_ids=of("Pitch"),
        velocity_ids=of("Velocity"),
        duration_ids=of("Duration"),
    )


def merge_piano(score: Score) -> Score:
    """The notes of all piano tracks of ``score`` as one piano track; drums and other programs are left out.

    Tempo and time-signature changes after the last onset are left out too: they sound nowhere, and would only add
    empty bars. Of notes with the same onset and pitch the longest stays. ``score`` is not changed; notes are
    sorted by onset, then pitch.
    """
    tracks = [track for track in score.tracks if not track.is_drum and track.program in PIANO_PROGRAMS]
    merged = Score(score.ticks_per_quarter)
    if not any(len(track.notes) for track in tracks):
        merged.tempos, merged.time_signatures = score.tempos.copy(), score.time_signatures.copy()
        return merged
    columns = [track.notes.numpy() for track in tracks]
    notes = {name: np.concatenate([part[name] for part in columns]) for name in columns[0]}
    order = np.lexsort((-notes["duration"], notes["pitch"], notes["time"]))
    notes = {name: column[order] for name, column in notes.items()}
    first = np.ones(len(order), dtype=bool)
    first[1:] = (np.diff(notes["time"]) != 0) | (np.diff(notes["pitch"]) != 0)
    notes = {name: column[first] for name, column in notes.items()}
    track = Track(program=0)
    track.notes = Note.from_numpy(**notes)
    merged.tracks.append(track)
    last = int(notes["time"][-1])
    merged.tempos = _until(score.tempos, last, Tempo)
    merged.time_signatures = _until(score.time_signatures, last, TimeSignature)
    return merged


def _until(events: Any, last: int, kind: Any) -> Any:
    """Events of a symusic list up to tick ``last``, sorted by tick; of equal ticks the order is kept."""
    if not len(events):
        return events.copy()
    columns = events.numpy()
    order = np.argsort(columns["time"], kind="stable")
    order = order[columns["time"][order] <= last]
    return kind.from_numpy(**{name: column[order] for name, column in columns.items()})


def encode(tokenizer: REMI, score: Score) -> list[int]:
    """The token ids of ``score``, one stream, without BOS and EOS.

    A score without notes gives its opening tokens alone, so count notes where they matter. Raises ``ValueError``
    where ``score`` has several tracks with notes and the vocabulary has no programs (see ``merge_piano``), or no
    ticks per quarter.
    """
    if score.ticks_per_quarter < 1:
        raise ValueError(f"ticks per quarter: expected at least 1, got {score.ticks_per_quarter}")
    encoded = tokenizer.encode(score)
    streams = encoded if isinstance(encoded, list) else [encoded]
    if len(streams) != 1:
        raise ValueError(f"expected one track with notes, got {len(streams)}: merge them first")
    return [int(token) for token in streams[0].ids]


def decode(tokenizer: REMI, ids: Sequence[int] | npt.NDArray[Any] | torch.Tensor) -> Score:
    """The music of ``ids`` (a one-dimensional list, array or tensor of any length) at twelfths of the shortest beat.

    Any sequence of the vocabulary's ids is decoded: special tokens are passed over, and so is a Pitch that is not
    followed by its Velocity and Duration. Raises ``ValueError`` for an id outside the vocabulary or another shape.
    """
    array = ids.detach().cpu().numpy() if isinstance(ids, torch.Tensor) else np.asarray(ids)
    if array.ndim != 1:
        raise ValueError(f"ids: expected one dimension, got shape {tuple(array.shape)}")
    if array.size and array.dtype.kind not in "iu":
        raise TypeError(f"ids: expected integers, got {array.dtype}")
    if array.size and not 0 <= int(array.min()) <= int(array.max()) < len(tokenizer.vocab):
        raise ValueError(
            f"ids: expected 0 to {len(tokenizer.vocab) - 1}, got {int(array.min())} to {int(array.max())}"
        )
    sequence = TokSequence(ids=array.tolist())
    score = tokenizer.decode(sequence if tokenizer.one_token_stream else [sequence])
    # positions that run backwards leave events out of order, and two at one tick: the later token holds
    score.tempos = _last_of_each_tick(score.tempos, Tempo)
    score.time_signatures = _last_of_each_tick(score.time_signatures, TimeSignature)
    for track in score.tracks:
        track.notes.sort()
    return score


def _last_of_each_tick(events: Any, kind: Any) -> Any:
    columns = events.numpy()
    times = columns["time"]
    if np.all(np.diff(times) > 0):
        return events
    order = np.argsort(times, kind="stable")
    order = order[np.append(np.diff(times[order]) > 0, True)]
    return kind.from_numpy(**{name: column[order] for name, column in columns.items()})


@dataclass(frozen=True)
class Grammar:
    """Which tokens may follow which, as tables over the vocabulary (V); made by ``build_grammar``."""

    allowed: torch.Tensor  # (V, V) bool: row = token, column = the token after it
    position: torch.Tensor  # (V,) int64: number of a Position token, -1 for others
    bar_positions: torch.Tensor  # (V,) int64: positions in a bar of this TimeSig token, 0 for others
    bar_id: int
    default_positions: int  # in a bar before any TimeSig token


def allowed_transitions(tokenizer: REMI) -> torch.Tensor:
    """(V, V) bool: ``[a, b]`` tells whether token ``b`` may follow token ``a`` in a piece.

    By token type, from MidiTok's own graph of types, narrowed to what its encoder writes: special tokens stand in
    no piece; BOS is followed by a bar line; a time signature follows a bar line only, since elsewhere it would
    change the length of a bar that has begun; the end may come wherever a bar line may, but not after a time
    signature, which would leave its bar empty.
    """
    graph: dict[str, set[str]] = tokenizer.tokens_types_graph
    specials = {token.split("_")[0] for token in tokenizer.special_tokens}
    after = {kind: set(followers) for kind, followers in graph.items() if kind not in specials}
    for kind, followers in after.items():
        followers &= after.keys()
        if kind != "Bar":
            followers.discard("TimeSig")
        if "Bar" in followers and kind not in ("Bar", "TimeSig"):
            followers.add("EOS")
    after["BOS"] = {"Bar"}
    kinds = [""] * len(tokenizer.vocab)
    for token, number in tokenizer.vocab.items():
        kinds[number] = token.split("_")[0]
    names = sorted(set(kinds))
    table = torch.tensor([[b in after.get(a, ()) for b in names] for a in names])
    index = torch.tensor([names.index(kind) for kind in kinds])
    return table[index[:, None], index]


def build_grammar(tokenizer: REMI) -> Grammar:
    """The grammar of ``tokenizer``'s vocabulary; make it once and pass it to ``unplayable``."""
    facts = vocabulary(tokenizer)
    steps = tokenizer.config.max_num_pos_per_beat
    position = torch.full((facts.size,), -1)
    bar_positions = torch.zeros(facts.size, dtype=torch.int64)
    for token, number in tokenizer.vocab.items():
        kind, value = token.split("_", 1)
        if kind == "Position":
            position[number] = int(value)
        elif kind == "TimeSig":
            bar_positions[number] = int(value.split("/")[0]) * steps
    return Grammar(allowed_transitions(tokenizer), position, bar_positions, facts.bar_id, 4 * steps)


def unplayable(
    tokens: torch.Tensor, prompt_length: int, mask: torch.Tensor, grammar: Grammar | REMI
) -> torch.Tensor:
    """Which completion tokens cannot be played: (N, T) bool, for ``tokens`` (N, P+T) and ``mask`` (N, T).

    A token is marked where it may not follow the token before it, or is a Position that does not come after the
    Position before it in the same bar, or lies beyond the end of the bar. Tokens outside ``mask`` are not marked.
    Raises ``ValueError`` where the shapes do not fit or the prompt is empty.
    """
    if (
        tokens.ndim != 2
        or prompt_length < 1
        or mask.shape != (tokens.shape[0], tokens.shape[1] - prompt_length)
    ):
        raise ValueError(
            f"expected tokens (N, P+T), P >= 1 and mask (N, T), got tokens {tuple(tokens.shape)}, P {prompt_length}, "
            f"mask {tuple(mask.shape)}"
        )
    if not isinstance(grammar, Grammar):
        grammar = build_grammar(grammar)
    device = tokens.device
    position = grammar.position.to(device)[tokens]  # (N, L), as all that follows
    bar_positions = grammar.bar_positions.to(device)[tokens]
    place = torch.arange(1, tokens.shape[1] + 1, device=device).expand_as(
        tokens
    )  # from 1: 0 stands for "none yet"

    def latest(which: torch.Tensor) -> torch.Tensor:
        return torch.where(which, place, 0).cummax(dim=1).values

    last_bar = latest(tokens == grammar.bar_id)
    last_position = torch.nn.functional.pad(latest(position >= 0), (1, 0))[
        :, :-1
    ]  # strictly before this token
    last_signature = latest(bar_positions > 0)
    before = position.gather(1, (last_position - 1).clamp(min=0))
    before = torch.where(last_position > last_bar, before, -1)
    end = bar_positions.gather(1, (last_signature - 1).clamp(min=0))
    end = torch.where(last_signature > 0, end, grammar.default_positions)
    bad = (position >= 0) & ((position <= before) | (position >= end))
    bad[:, 1:] |= ~grammar.allowed.to(device)[tokens[:, :-1], tokens[:, 1:]]
    return bad[:, prompt_length:] & mask.bool()
