"""Bar lines where the song has them, in time signatures that a vocabulary has: ``fit_bars``.

A vocabulary knows a few time signatures. A bar of another one becomes several of those (7/4: 4/4 and 3/4), and bars
that are too short join their neighbours (a pickup of 1/4 and a bar of 4/4: 5/4). A signature in the middle of a bar
ends that bar, which becomes a shorter one. MidiTok would drop such signatures, or move them to the next bar line.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from smart.corpus.midi import Reject

if TYPE_CHECKING:  # imported where it is used: a command line needs no parser
    from symusic.core import ScoreTick

Signature = tuple[int, int]
EIGHTH = Fraction(1, 2)  # all lengths of bars are in quarter notes
TOLERANCE = Fraction(1, 24)  # a signature so close to a bar line is on it: half of a position in a beat of a quarter
MOST_JOINED = 8  # irregular bars that become one
MOST_PARTS = 16  # bars that one becomes
IRREGULAR = "bars read in other time signatures"


class Bars(NamedTuple):
    """How the bars of a song are read. ``lines`` are the song's own bar lines, the first at 0, the last at its end."""

    lines: npt.NDArray[np.int64]  # (bars + 1,) ticks
    signatures: Any  # TimeSignatureTickList, for the tokenizer
    remark: str  # which bars are read in other time signatures; empty if none are


def fit_signatures(score: ScoreTick, known: frozenset[Signature], signatures: Any) -> str:
    """Put the ``signatures`` of a song in order for ``score``, a part of it, in place; returns the remark.

    Those of the score stay as they are where each is known and begins on a bar line, as in nearly every file.
    """
    sections = _sections(signatures, score.ticks_per_quarter)
    fits = all(signature in known for _, signature in sections)
    for (start, signature), (stop, _) in pairwise(sections):
        fits &= (stop - start) % _length(signature) == 0
    if fits:
        return ""
    last = max((int(track.notes.numpy()["time"].max()) for track in score.tracks if len(track.notes)), default=0)
    bars = fit_bars(signatures, score.ticks_per_quarter, last + 1, known)
    score.time_signatures = bars.signatures
    return bars.remark


class _Bar(NamedTuple):
    start: Fraction
    length: Fraction
    signature: Signature  # the song's, also of a bar that is cut short


def signatures_of(vocab: dict[str, int]) -> frozenset[Signature]:
    """The time signatures of a vocabulary."""
    names = (name.removeprefix("TimeSig_").split("/") for name in vocab if name.startswith("TimeSig_"))
    return frozenset((int(beats), int(unit)) for beats, unit in names)


def fit_bars(signatures: Any, division: int, end: int, known: frozenset[Signature]) -> Bars:
    """Fit the bars of a song with these ``signatures`` (TimeSignatureTickList) up to tick ``end`` into those ``known``.

    Raises ``Reject`` if a bar has a length that no signature can express, not even together with its neighbours.
    """
    from symusic.core import TimeSignatureTick, TimeSignatureTickList

    bars = _song_bars(_sections(signatures, division), Fraction(end, division))
    starts = [*(bar.start for bar in bars), bars[-1].start + bars[-1].length]
    lines = np.array([round(start * division) for start in starts])
    changed: dict[str, None] = {}
    fitted: list[tuple[Fraction, Signature]] = []
    at = bars[0].start
    for group in _groups(bars, known):
        length = sum((bar.length for bar in group), Fraction(0))
        if len(group) == 1 and _regular(group[0], known):
            read = [group[0].signature]
        else:
            read = [*_express(length, group[-1].signature[1], known)]
            changed[f"{' + '.join(map(_named, group))} as {' + '.join(map(_shown, read))}"] = None
        for signature in read:
            if not fitted or fitted[-1][1] != signature:
                fitted.append((at, signature))
            at += _length(signature)
    shown = [*changed][:3] + ["..."] * (len(changed) > 3)
    return Bars(
        lines,
        TimeSignatureTickList([TimeSignatureTick(round(start * division), *each) for start, each in fitted]),
        f"{IRREGULAR}: {', '.join(shown)}" if changed else "",
    )


def _sections(signatures: Any, division: int) -> list[tuple[Fraction, Signature]]:
    """Where each time signature begins. It is 4/4 until the first; impossible and repeated ones count for nothing."""
    columns = signatures.numpy()
    at = {0: (4, 4)}
    for time, beats, unit in zip(columns["time"], columns["numerator"], columns["denominator"], strict=True):
        if time >= 0 and beats > 0 and int(unit) in (1, 2, 4, 8, 16, 32, 64):
            at[int(time)] = (int(beats), int(unit))
    found: list[tuple[Fraction, Signature]] = []
    for time in sorted(at):
        if not found or at[time] != found[-1][1]:
            found.append((Fraction(time, division), at[time]))
    return found


def _song_bars(sections: Sequence[tuple[Fraction, Signature]], end: Fraction) -> list[_Bar]:
    """The song's own bars up to the one in which ``end`` lies, or which it ends; at least one."""
    bars: list[_Bar] = []
    at = Fraction(0)
    for number, (_, signature) in enumerate(sections):
        length = _length(signature)
        stop = sections[number + 1][0] if number + 1 < len(sections) else end + length
        while at < min(stop, end or TOLERANCE * 2) - TOLERANCE:
            rest = stop - at
            if rest >= length - TOLERANCE:
                rest = length
            elif abs(rest - (eighths := round(rest / EIGHTH) * EIGHTH)) <= TOLERANCE:  # a tick beside it, rounded
                rest = eighths
            bars.append(_Bar(at, rest, signature))
            at += rest
    return bars or [_Bar(Fraction(0), _length(sections[-1][1]), sections[-1][1])]


def _groups(bars: Sequence[_Bar], known: frozenset[Signature]) -> Iterator[list[_Bar]]:
    """Bars that are read together: one, or as many as it takes for a length that signatures can express."""
    waiting: list[_Bar] = []
    group: list[_Bar] = []
    for number, bar in enumerate(bars):
        if not group and _regular(bar, known):
            if waiting:
                yield waiting
            waiting = [bar]
            continue
        group.append(bar)
        length = sum((each.length for each in group), Fraction(0))
        ends_section = number + 1 == len(bars) or bars[number + 1].signature != bar.signature
        if _can_express(length, known):
            if waiting:
                yield waiting
            waiting, group = group, []
        elif ends_section and waiting and _can_express(length + sum(each.length for each in waiting), known):
            waiting, group = [*waiting, *group], []  # the line of the section that follows stays
        elif len(group) >= MOST_JOINED:
            break
    while group and group[-1] is bars[-1] and len(group) < MOST_JOINED:  # the last bars: more of them would come
        group = [*group, bars[-1]]
        if _can_express(sum((each.length for each in group), Fraction(0)), known):
            yield from ([waiting] if waiting else [])
            waiting, group = group, []
    if group:
        place = f"{float(group[0].start):g} quarter notes from the start"
        raise Reject("irregular bars", f"{_named(group[0])}, {place}, fits no time signature of the vocabulary")
    if waiting:
        yield waiting


def _regular(bar: _Bar, known: frozenset[Signature]) -> bool:
    return bar.signature in known and bar.length == _length(bar.signature)


def _length(signature: Signature) -> Fraction:
    return Fraction(4 * signature[0], signature[1])


def _shown(signature: Signature) -> str:
    return f"{signature[0]}/{signature[1]}"


def _named(bar: _Bar) -> str:
    if bar.length == _length(bar.signature):
        return _shown(bar.signature)
    return f"{float(bar.length):.3g} quarter notes of {_shown(bar.signature)}"


def _can_express(length: Fraction, known: frozenset[Signature]) -> bool:
    return bool(_express(length, 4, known))


@cache
def _express(length: Fraction, unit: int, known: frozenset[Signature]) -> tuple[Signature, ...]:
    """The fewest bars, and of these the most equal ones, whose lengths add up; none if there are no such bars.

    Their unit is ``unit`` where that takes no more bars.
    """
    every, same = (
        _split(length, tuple(sorted({_length(each) for each in known if each[1] in units})))
        for units in ({each[1] for each in known}, {unit})
    )
    parts = same if same and len(same) == len(every) else every
    fitting = ([each for each in known if _length(each) == part] for part in parts)
    return tuple(min(some, key=lambda each: (each[1] != unit, each[1] != 4, each)) for some in fitting)


def _split(length: Fraction, lengths: tuple[Fraction, ...]) -> tuple[Fraction, ...]:
    """``length`` as a sum of the fewest of ``lengths``, largest first; empty if it is none."""
    if not lengths or (length / EIGHTH).denominator > max((part / EIGHTH).denominator for part in lengths):
        return ()
    for count in range(1, MOST_PARTS + 1):
        if count * lengths[0] <= length <= count * lengths[-1] and (found := _into(length, count, lengths)):
            return found
    return ()


@cache
def _into(length: Fraction, count: int, lengths: tuple[Fraction, ...]) -> tuple[Fraction, ...]:
    if count == 1:
        return (length,) if length in lengths else ()
    for first in lengths:
        if first * count >= length and (rest := _into(length - first, count - 1, lengths)):
            return (first, *rest)
    return ()
