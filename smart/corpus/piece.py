"""From the bytes of one MIDI file to one tokenised piece, or the reason why it is left out.

``PieceReader.read`` does it; ``serve`` does it in a process of its own, with limits, for files that nobody
trusts. What is kept (paper section 3.1): the piano tracks (General MIDI 1-8), merged, without duplicate
notes, and of these only pieces without overfull bars, with few empty bars, and long enough for a prompt and a
bar. Beside the paper's rules, ``Limits`` refuses what is no music: files that are truncated, or whose
division, tempo, length or silences are absurd.
"""

import contextlib
import hashlib
import os
import re
import signal
import stat
import struct
import sys
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

if os.environ.get("SMART_MIDI_WORKER") == "1":
    # MidiTok imports torch, for data loaders that we do not use, wherever it is installed; a worker that
    # hides it starts three times as fast and takes a quarter of the memory
    sys.modules["torch"] = None  # type: ignore[assignment]

from symusic.core import ScoreTick

from smart.corpus.remi import FastRemi
from smart.tokens import all_tracks, decode, encode, load_tokenizer, merge_piano, vocabulary

TOKEN = np.dtype("<u2")
CRASHED_BY_MEMORY = 77  # exit code of a worker that ran out of memory


@dataclass(frozen=True)
class Limits:
    """What a file may hold, and what reading it may cost."""

    max_bar_notes: int = 300  # paper section 3.1
    max_empty_bars: float = 0.2  # share of all bars; paper section 3.1
    min_bars: int = 2  # with notes: one for a prompt, one for what follows it
    max_bytes: int = 16 << 20
    max_notes: int = 200_000  # the longest real piece seen has 33,000
    max_quarters: int = 50_000  # quarter notes; seven hours at 120
    max_silence: float = 120.0  # seconds before and between notes
    max_tail: float = (
        1800.0  # seconds from the last event to the end, which is cut off; the longest real one seen: 1,461
    )
    min_division: int = 12  # ticks a quarter: fewer cannot tell a beat's twelfths apart
    max_division: int = 30_720
    min_tempo: float = 4.0  # quarters a minute; the slowest real one seen is 4.5
    max_tempo: float = 10_000.0  # the fastest real one seen is 7,300
    seconds: float = 20.0  # wall-clock time for one file
    megabytes: int = 1024  # memory for one file, beyond what a worker needs at rest


class Reject(Exception):
    """A file is left out: ``reason``, one of a few, by which rejects are counted; ``detail`` about this file."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Piece:
    """A tokenised file."""

    digest: bytes  # 16 bytes, of its onsets and pitches
    tokens: bytes  # (L,) little-endian uint16, without BOS and EOS
    notes: int
    bars: int
    seconds: float


def check_structure(data: bytes, limits: Limits) -> int:
    """Walk the chunks and events of a MIDI file. Raises ``Reject`` where they are not what they say they are.

    The parser would take some truncated files for short ones, follow a header that lies, and skip what it does
    not know. Bytes after the last track, and after the end of a track within its chunk, are no fault: real
    files have them. Returns the ticks from a track's last note or controller to its end, of all tracks the most.
    """
    if not data:
        raise Reject("empty file")
    if len(data) < 14 or data[:4] != b"MThd":
        raise Reject("not a MIDI file", f"starts with {data[:4]!r}")
    header, kind, tracks, division = struct.unpack(">IHHH", data[4:14])
    if header != 6:
        raise Reject("wrong header", f"it gives its length as {header}, expected 6")
    if kind not in (0, 1):
        raise Reject("MIDI format", f"format {kind}, expected 0 or 1")
    if not limits.min_division <= division <= limits.max_division:
        wanted = f"expected {limits.min_division} to {limits.max_division} ticks a quarter"
        raise Reject("absurd division", f"{division:#06x}, {wanted}")
    place, found, silence = 14, 0, 0
    while place + 8 <= len(data):
        name, length = struct.unpack(">4sI", data[place : place + 8])
        place += 8 + length
        if name == b"MTrk":
            found += 1
            if place > len(data):
                raise Reject("truncated", f"track {found} should go on for {place - len(data)} bytes")
            silence = max(silence, _check_track(data, place - length, place, f"track {found}"))
    if found < tracks:
        raise Reject("truncated", f"{found} tracks, the header says {tracks}")
    if found > tracks:  # format 0 with several tracks is heard of, and read as what it is
        raise Reject("wrong header", f"it says {tracks} tracks, there are {found}")
    return silence


_DELTA, _DATA = rb"[\x80-\xff]{0,3}+[\x00-\x7f]", rb"[\x00-\x7f]"
# as many messages to channels as follow each other, those with running status too
_MESSAGES = re.compile(
    b"(?:%(t)b(?:[\x80-\xbf\xe0-\xef]%(d)b{2}(?:%(t)b%(d)b{2})*+|[\xc0-\xdf]%(d)b(?:%(t)b%(d)b)*+))*+"
    % {b"t": _DELTA, b"d": _DATA}
)
_META_OR_SYSEX = re.compile(b"(%b)(\xff%b|\xf0)(%b)" % (_DELTA, _DATA, _DELTA))  # time, what it is, its length
_META_LENGTHS = {b"\xff\x2f": 0, b"\xff\x51": 3, b"\xff\x58": 4}  # end of track, tempo, time signature


def _check_track(data: bytes, start: int, end: int, name: str) -> int:
    """Walk one track, regular expressions over its messages. Returns the ticks after the last, 0 if it has none."""
    if data[end - 3 : end] != b"\xff\x2f\x00":
        raise Reject("truncated", f"{name} has no end")
    place, rest, has_messages = start, 0, False
    while True:
        messages = _MESSAGES.match(data, place, end)
        assert messages  # it matches the empty string
        if messages.end() > place:
            place, rest, has_messages = messages.end(), 0, True
        event = _META_OR_SYSEX.match(data, place, end)
        if event is None:
            raise Reject(
                "malformed event", f"{name}, byte {place - start}: {data[place : min(place + 8, end)].hex(' ')}"
            )
        delta, kind, length = event[1], event[2], _quantity(event[3])
        place, rest = event.end() + length, rest + _quantity(delta)
        cut = kind == b"\xf0" and not data[event.end() : place].endswith(b"\xf7")
        if cut or place > end or length != _META_LENGTHS.get(kind, length):
            raise Reject("malformed event", f"{name}, byte {event.start() - start}: {event[0].hex(' ')}")
        if kind == b"\xff\x2f":
            return rest if has_messages else 0


def _quantity(data: bytes) -> int:
    """A variable-length quantity."""
    value = 0
    for byte in data:
        value = value << 7 | byte & 0x7F
    return value


def gather(score: ScoreTick) -> dict[str, npt.NDArray[np.int64]]:
    """The notes of all tracks, (notes,) each: time, duration, pitch, voice (program, drums 128); sorted by time."""
    columns = [
        {**track.notes.numpy(), "voice": np.full(len(track.notes), 128 if track.is_drum else track.program)}
        for track in score.tracks
    ]
    names = ("time", "duration", "pitch", "voice")
    notes = {name: np.concatenate([[], *(part[name] for part in columns)]).astype(np.int64) for name in names}
    order = np.argsort(notes["time"], kind="stable")
    return {name: column[order] for name, column in notes.items()}


def check_notes(score: ScoreTick, notes: dict[str, npt.NDArray[np.int64]], tail: int, limits: Limits) -> float:
    """The length in seconds of ``notes``, which ``tail`` silent ticks follow.

    Raises ``Reject`` for what is absurd, before costly work on it.
    """
    onsets = notes["time"]
    sounding = np.maximum.accumulate(onsets + notes["duration"])
    division = score.ticks_per_quarter
    if onsets[0] < 0 or notes["duration"].min() < 0 or sounding[-1] >= 2**31:
        raise Reject("absurd times", "ticks overflow 31 bits")
    quarters = onsets[-1] / division
    if quarters > limits.max_quarters:
        raise Reject("too long", f"{quarters:.0f} quarter notes, expected at most {limits.max_quarters}")
    # no bar of the vocabulary is shorter than a quarter, so as many notes within one stand in a bar, or
    # nearly so
    crowd = limits.max_bar_notes
    if len(onsets) > crowd and (onsets[crowd:] - onsets[:-crowd]).min() < division:
        raise Reject("too many notes in a bar", f"over {crowd} within a quarter note")
    tempos = score.tempos.numpy()
    if len(tempos["mspq"]):
        longest, shortest = float(tempos["mspq"].max()), float(tempos["mspq"].min())  # microseconds a quarter
        slow, fast = (60e6 / length if length > 0 else np.inf for length in (longest, shortest))
        if slow < limits.min_tempo or fast > limits.max_tempo:
            wanted = f"expected {limits.min_tempo:g} to {limits.max_tempo:g} quarters a minute"
            raise Reject("absurd tempo", f"{slow:.4g} to {fast:.4g}, {wanted}")
    starts = seconds_at(onsets, tempos, division)
    stops = seconds_at(sounding, tempos, division)
    silence = float(max(starts[0], (starts[1:] - stops[:-1]).max(initial=0.0)))
    if silence > limits.max_silence:
        raise Reject("long silence", f"{silence:.0f} s, expected at most {limits.max_silence:.0f} s")
    after = tail * float(np.append(500_000, tempos["mspq"])[-1]) / 1e6 / division
    if after > limits.max_tail:
        raise Reject("long silence", f"{after:.0f} s at the end, expected at most {limits.max_tail:.0f} s")
    return float(stops[-1])


def seconds_at(
    ticks: npt.NDArray[np.int64], tempos: dict[str, npt.NDArray[Any]], per_quarter: int
) -> npt.NDArray[np.float64]:
    """Seconds at each of ``ticks``; ``tempos`` has columns time and mspq, sorted; 120 a minute before the first."""
    changes = np.append(0, tempos["time"]).astype(np.float64)
    length = np.append(500_000, tempos["mspq"]) / 1e6 / per_quarter  # of a tick
    begins = np.append(0.0, np.cumsum(np.diff(changes) * length[:-1]))
    which = np.searchsorted(changes, ticks, side="right") - 1
    return np.asarray(begins[which] + (ticks - changes[which]) * length[which])


def content_hash(score: ScoreTick) -> bytes:
    """16 bytes that depend on nothing but the onsets, in quarter notes, pitches and programs of the notes."""
    notes, division = gather(score), score.ticks_per_quarter
    # twelfths of a quarter, rounded half up in whole numbers: the same for any division that is a multiple of another
    onsets = (notes["time"] * 24 + division) // (2 * division)
    keys = np.sort((notes["voice"] << 48) + onsets * 128 + notes["pitch"], kind="stable")
    keys = keys[np.append(True, np.diff(keys) != 0)[: len(keys)]]
    return hashlib.blake2b(keys.astype("<i8").tobytes(), digest_size=16).digest()


class PieceReader:
    """Reads MIDI files for one tokenizer, within ``limits``; all tracks where its vocabulary has programs."""

    def __init__(self, tokenizer: Any, limits: Limits) -> None:
        self.tokenizer, self.limits = tokenizer, limits
        self.facts = vocabulary(tokenizer)
        self.is_pitch = np.zeros(self.facts.size, dtype=bool)
        self.is_pitch[[*self.facts.pitch_ids, *self.facts.drum_ids]] = True
        self.fast = FastRemi(tokenizer) if FastRemi.supports(tokenizer) else None

    def read(self, data: bytes) -> Piece:
        """The piece in the bytes of a MIDI file. Raises ``Reject`` with the reason where it is left out."""
        tail = check_structure(data, self.limits)
        try:
            score = ScoreTick.from_midi(data)
        except (RuntimeError, ValueError, OverflowError) as error:
            raise Reject("cannot be parsed", str(error).splitlines()[0][:200]) from None
        raw = sum(len(track.notes) for track in score.tracks)
        if raw > self.limits.max_notes:  # before any work in proportion to it
            raise Reject("too many notes", f"{raw}, expected at most {self.limits.max_notes}")
        if self.tokenizer.config.use_programs:
            score = all_tracks(score)
        else:
            score = merge_piano(score, tuple(self.tokenizer.config.pitch_range))
        if not len(score.tracks):
            raise Reject("no notes" if self.tokenizer.config.use_programs else "no piano notes")
        seconds = check_notes(score, gather(score), tail, self.limits)
        tokens = self._tokens(score)
        notes, bars = self._check_bars(tokens)
        return Piece(content_hash(score), tokens.astype(TOKEN).tobytes(), notes, bars, seconds)

    def _tokens(self, score: ScoreTick) -> npt.NDArray[np.int64]:
        """Tokens of ``score`` that decode to music which encodes to the same tokens. Raises ``Reject``."""
        try:
            tokens = self._encode(score)
            for _ in range(3):
                again = self._encode(self._decode(tokens))
                if np.array_equal(again, tokens):
                    return tokens
                tokens = again
        except (ValueError, KeyError, IndexError, ZeroDivisionError) as error:
            raise Reject("cannot be tokenised", f"{type(error).__name__}: {error}"[:200]) from None
        raise Reject("no round trip", "its tokens do not decode to music with the same tokens")

    def _encode(self, score: ScoreTick) -> npt.NDArray[np.int64]:
        return self.fast.encode(score) if self.fast else np.array(encode(self.tokenizer, score))

    def _decode(self, tokens: npt.NDArray[np.int64]) -> ScoreTick:
        return self.fast.decode(tokens) if self.fast else decode(self.tokenizer, tokens)

    def _check_bars(self, tokens: npt.NDArray[np.int64]) -> tuple[int, int]:
        """Numbers of notes and bars. Raises ``Reject`` by the paper's rules."""
        bar = np.cumsum(tokens == self.facts.bar_id) - 1
        counts = np.bincount(bar[self.is_pitch[tokens]], minlength=bar[-1] + 1)
        empty, filled = float((counts == 0).mean()), int((counts > 0).sum())
        limits = self.limits
        if counts.max() > limits.max_bar_notes:
            raise Reject("too many notes in a bar", f"{counts.max()}, expected at most {limits.max_bar_notes}")
        if empty > limits.max_empty_bars:
            raise Reject("too many empty bars", f"{empty:.0%}, expected at most {limits.max_empty_bars:.0%}")
        if filled < limits.min_bars:
            raise Reject("too short", f"{filled} bars with notes, expected at least {limits.min_bars}")
        return int(counts.sum()), len(counts)


def serve(descriptor: int) -> None:
    """Answer paths, sent over a socket, with (path, ``Piece`` or (reason, detail)) each, until it is closed.

    Each file is read under a limit on wall-clock time and on memory, so bugs of native parsers end this
    process and no other. It is no sandbox: code that a file manages to run has all rights of the user.
    """
    import resource

    connection = Connection(descriptor)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        tokenizer_file, settings = connection.recv()
        limits = Limits(**settings)
        reader = PieceReader(load_tokenizer(tokenizer_file), limits)
        reader._tokens(ScoreTick(480))  # what is loaded lazily is loaded before memory is limited
        in_use = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        bound = in_use + (limits.megabytes << 20)
        resource.setrlimit(resource.RLIMIT_AS, (bound, bound))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        connection.send("ready")
        while True:
            path = connection.recv()
            # the default action of SIGALRM ends the process even inside native code that never returns
            signal.setitimer(signal.ITIMER_REAL, limits.seconds)
            answer = _answer(path, reader)
            signal.setitimer(signal.ITIMER_REAL, 0)
            connection.send((path, answer))


def _answer(path: bytes, reader: PieceReader) -> Piece | tuple[str, str]:
    try:
        if not stat.S_ISREG(mode := os.stat(path).st_mode) and not stat.S_ISDIR(mode):
            raise Reject("cannot be read", "not a regular file")  # opening a pipe would wait for its other end
        with open(path, "rb") as file:  # for a folder an error: that it is one, or that it may not be listed
            data = file.read(reader.limits.max_bytes + 1)
        if len(data) > reader.limits.max_bytes:
            raise Reject("too large", f"over {reader.limits.max_bytes} bytes")
        return reader.read(data)
    except Reject as reject:
        return reject.reason, reject.detail
    except MemoryError:
        os._exit(CRASHED_BY_MEMORY)  # its heap may be in pieces: a fresh process decides
    except OSError as error:
        return "cannot be read", str(error.strerror)
    except Exception as error:  # a parser's or tokenizer's bug on this file: a reject with its text, never silence
        return "cannot be tokenised", f"{type(error).__name__}: {error}".splitlines()[0][:200]
