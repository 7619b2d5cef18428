"""How TinySoundFont plays a voice: the envelopes of a region.

``law_of`` turns a region's generators into times and gains; ``stored`` lists the variants of the region that are
rendered once; ``pieces_of`` cuts voices into stretches with one formula for the gain (see ``smart.render.bank``). All
of it is small and runs on the CPU; ``smart.render.mixing`` adds up the samples.
"""

import math
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from smart.render.regions import Values

BLOCK = 64  # samples between two steps of the synthesiser's envelopes
_STEEPNESS = 9.226  # an exponential segment falls by exp(-9.226) in its time
_FAST_RELEASE = 0.01  # seconds, where a region gives none
FOREVER = 1 << 40  # samples


class Law(NamedTuple):
    """How a region plays one key at one velocity; times in samples."""

    left: float  # gain
    right: float
    delay: int
    attack: int
    hold: int
    decay: int  # the time in which the level would fall by exp(-9.226)
    decay_until: int  # the time after which it has reached ``sustain``
    sustain: float
    release: int
    # the modulation envelope, if the filter follows it
    mod_hold: int
    mod_decay: int  # the time in which it would reach 0
    mod_decay_until: int  # the time after which it has reached ``mod_sustain``
    mod_sustain: float
    mod_release: int
    drop: float  # the fraction by which the modulation is lowered in the last of the stored rows
    rows: int  # stored rows; 1 if the filter does not move


class Unfit(str):
    """Why a clip cannot be played from a bank; ``kind`` is the same as a name, for counting."""

    kind: str

    def __new__(cls, kind: str, reason: str) -> "Unfit":
        made = super().__new__(cls, reason)
        made.kind = kind
        return made


# The law of the synthesiser ---------------------------------------------------------------------------------


def not_linear(values: Values) -> Unfit | None:
    """Why a region cannot be played from a bank; None if it can."""
    filtered = values["mod_env_to_filter"]
    for wrong, kind, reason in (
        (values["exclusive_class"], "exclusive_class", "an exclusive class, which cuts off other notes"),
        (values["vib_lfo_to_pitch"] or values["mod_lfo_to_pitch"], "vibrato", "a vibrato"),
        (values["mod_lfo_to_volume"], "tremolo", "a tremolo"),
        (values["mod_lfo_to_filter"], "filter_oscillator", "a filter that follows an oscillator"),
        (values["mod_env_to_pitch"], "pitch_envelope", "a pitch that follows an envelope"),
        (values["modes"] == 3, "loop_end", "a loop that ends with the key"),
        (filtered and max(values["mod_delay"], values["mod_attack"]) >= -11950, "filter_attack",
         "a filter that follows an attack"),
    ):  # fmt: skip
        if wrong:
            return Unfit(kind, f"a region with {reason}")
    return None


_NO_ENVELOPE = {
    **dict.fromkeys(("delay", "attack", "hold", "decay", "release"), -12000),
    **dict.fromkeys(("sustain", "key_to_hold", "key_to_decay"), 0),
}
_NO_MODULATION = {
    **dict.fromkeys(("mod_delay", "mod_attack", "mod_hold", "mod_decay"), -12000),
    **dict.fromkeys(("mod_sustain", "mod_key_to_hold", "mod_key_to_decay"), 0),
}
_NO_OSCILLATORS = {
    **dict.fromkeys(("mod_lfo_delay", "vib_lfo_delay"), -12000),
    **dict.fromkeys(("mod_lfo_frequency", "vib_lfo_frequency"), 0),
}


def alone(values: Values) -> Values:
    """The region's generators, changed to play on the left only, at full gain."""
    return values | _NO_OSCILLATORS | {"pan": -500, "attenuation": 0, "exclusive_class": 0}


def bare(values: Values) -> Values:
    """As ``alone``, and without the envelope: only what shapes the sound while the key is held."""
    modulation = {"mod_release": -12000} | ({} if values["mod_env_to_filter"] else _NO_MODULATION)
    return alone(values) | _NO_ENVELOPE | modulation


def stored(values: Values, law: Law) -> list[Values]:
    """The variants of a region that are stored: with the modulation as it is, then lowered in equal steps."""
    lowered = np.linspace(1, 1 - law.drop, law.rows) * values["mod_env_to_filter"]
    return [bare(values) | {"mod_env_to_filter": round(amount)} for amount in lowered.tolist()]


def _seconds(timecents: float) -> float:
    """Timecents as seconds, in 32 bits as the synthesiser computes them."""
    return float(np.float32(2.0) ** np.float32(timecents / 1200)) if timecents >= -11950 else 0.0


def law_of(values: Values, pitch: int, velocity: int, sample_rate: int) -> Law:
    """The times and gains that TinySoundFont computes from a region's generators."""

    def samples(seconds: float) -> int:
        return int(np.float32(seconds) * np.float32(sample_rate))

    def keyed(name: str, prefix: str) -> float:
        scale = values[f"{prefix}key_to_{name}"]
        if not scale:
            return _seconds(values[f"{prefix}{name}"])
        timecents = values[f"{prefix}{name}"] + scale * (60 - pitch)
        return 0.0 if timecents < -10000 else float(np.float32(2.0) ** np.float32(timecents / 1200))

    loudness = -0.1 * values["attenuation"] + 20 * math.log10(velocity / 127)
    gain = 10 ** (loudness / 20) if loudness > -100 else 0.0
    pan = values["pan"] / 1000
    decay = samples(keyed("decay", ""))
    sustain = 10 ** (-0.1 * values["sustain"] / 20) if values["sustain"] < 1000 else 0.0
    release = samples(_seconds(values["release"]) or _FAST_RELEASE)
    mod_decay, mod_sustain = keyed("decay", "mod_"), 1 - values["mod_sustain"] / 1000
    mod_release = samples(_seconds(values["mod_release"]) or _FAST_RELEASE)
    # lowered by as much as it falls until the release is down by 50 dB, in eighths; one row per 250 cents
    drop = min(max(round(8 * 0.62 * release / mod_release), 1), 8) / 8 if values["mod_env_to_filter"] else 0.0
    rows = min(1 + math.ceil(drop * abs(values["mod_env_to_filter"]) / 250), 8)
    return Law(
        left=gain * math.sqrt(0.5 - pan),
        right=gain * math.sqrt(0.5 + pan),
        delay=samples(_seconds(values["delay"])),
        attack=samples(_seconds(values["attack"])),
        hold=samples(keyed("hold", "")),
        decay=decay,
        decay_until=int(-math.log(sustain) * decay / _STEEPNESS) if sustain else decay,
        sustain=sustain,
        release=release,
        mod_hold=samples(keyed("hold", "mod_")),
        mod_decay=samples(mod_decay),
        mod_decay_until=samples(mod_decay * (1 - mod_sustain)),
        mod_sustain=mod_sustain,
        mod_release=mod_release,
        drop=drop,
        rows=rows,
    )


# The gains of voices ----------------------------------------------------------------------------------------

LEFT = 5  # column of a voice's left gain; before it are on, off, stop, start and length, after it the rest of its law


class Grid:
    """The blocks in which the synthesiser steps its envelopes, on the time line of all clips, one after the other.

    Events cut the time line into stretches from ``starts`` (e,) to ``ends`` (e,), which follow each other without a
    gap; blocks are counted from the start of each.
    """

    def __init__(self, starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]) -> None:
        self.starts, self.ends = torch.from_numpy(starts), torch.from_numpy(ends)
        self.many = (self.ends - self.starts + BLOCK - 1) // BLOCK  # blocks of each stretch
        self.first = self.many.cumsum(0) - self.many  # the number of its first block
        self.blocks = int(self.many.sum())
        self.total = int(ends[-1])  # samples

    def number(self, time: torch.Tensor) -> torch.Tensor:
        """The number of the first block that starts at ``time`` or later; ``blocks`` if there is none."""
        stretch = torch.searchsorted(self.starts, time, right=True) - 1
        number = self.first[stretch] + (time - self.starts[stretch] + BLOCK - 1) // BLOCK
        return torch.where(time < self.total, number, self.blocks)

    def start(self, number: torch.Tensor) -> torch.Tensor:
        """When a block starts; ``FOREVER`` for one after the last."""
        stretch = torch.searchsorted(self.first, number, right=True) - 1
        return torch.where(number < self.blocks, self.starts[stretch] + BLOCK * (number - self.first[stretch]), FOREVER)


class Pieces(NamedTuple):
    """Stretches of voices in which the gain is (base + slope tau) exp(-fall tau), tau samples after ``origin``."""

    first: torch.Tensor  # (p,) the first block of each
    last: torch.Tensor  # the block after its last
    origin: torch.Tensor
    shift: torch.Tensor  # from a time to the place of its sample in the store
    base: torch.Tensor  # (2, p) left and right
    slope: torch.Tensor  # (2, p)
    fall: torch.Tensor  # (p,)


def pieces_of(voices: torch.Tensor, at: torch.Tensor, grid: Grid) -> Pieces:
    """The pieces of ``voices`` (n, 21) float64: attack, hold, decay, sustained level, release.

    Times of a voice count from the start of its clip, which is at sample ``at`` (n,) of the time line: so the pieces of
    a clip do not depend on where it lies.
    """
    on, off, stop, start, length = voices[:, :LEFT].T
    gains = voices[:, LEFT : LEFT + 2].T
    delay, attack, hold, decay, until, sustain, release = voices[:, LEFT + 2 : LEFT + 9].T
    mod_hold, mod_decay, mod_until, mod_sustain, mod_release, drop, many = voices[:, LEFT + 9 :].T

    def after(time: torch.Tensor, duration: torch.Tensor) -> torch.Tensor:
        """The first block at least ``duration`` after ``time``, or ``time`` itself without a duration."""
        block = grid.start(grid.number((time + duration).long() + at)) - at
        return torch.where(duration > 0, block.double(), time)

    def modulation(time: torch.Tensor) -> torch.Tensor:
        """The level of the modulation envelope while the key is held."""
        since = time - on - mod_hold
        return torch.where(since < mod_until, 1 - since.clamp(min=0) / mod_decay.clamp(min=1), mod_sustain)

    begin = after(on, delay)
    full = after(begin, attack)
    fading = after(full, hold)
    settled = after(fading, torch.where(decay > 0, until.clamp(min=1), 0))
    zero, one = torch.zeros_like(on), torch.ones_like(on)
    rise, fade, fall = one / attack.clamp(min=1), _STEEPNESS / decay.clamp(min=1), _STEEPNESS / release
    end = torch.minimum(stop, on + length - BLOCK)  # of the clip, of the sample
    end = torch.minimum(end, after(off, release))
    level = torch.where(
        off < full,
        (off - begin).clamp(min=0) * rise,
        torch.where(off < fading, one, torch.where(off < settled, torch.exp(-fade * (off - fading)), sustain)),
    )
    held_until = torch.minimum(off, end)
    rows = [  # from, to, origin, base, slope, fall, row
        (begin, torch.minimum(full, held_until), begin, zero, rise, zero, zero),
        (full, torch.minimum(fading, held_until), full, one, zero, zero, zero),
        (fading, torch.minimum(settled, held_until), fading, one, zero, fade, zero),
        (settled, held_until, settled, sustain, zero, zero, zero),
    ]
    # After note-off the modulation falls in a straight line to 0; that of the first row holds, falls and stays. Their
    # ratio gives the place between the rows; we take it to be a straight line from each turn of the two to the next.
    turns = [mod_hold + on, mod_hold + on + mod_until, off + mod_release]
    turns = [torch.minimum(torch.maximum(turn, off), torch.minimum(off + mod_release, end)) for turn in turns]
    moves = many > 1

    def place(time: torch.Tensor) -> torch.Tensor:
        """The place between the rows, from 0 to ``many`` - 1; beyond these the nearest two are extrapolated."""
        held = modulation(time)
        ratio = modulation(off) * (1 - (time - off) / mod_release).clamp(min=0) / held.clamp(min=1e-3)
        return torch.where(moves & (held > 1e-3), (1 - ratio) / drop.clamp(min=1e-3) * (many - 1), zero)

    last = (many - 2).clamp(min=0)
    for since, to in pairwise([off, *turns, end]):
        here = place(since)
        speed = (place(to) - here) / (to - since).clamp(min=1) if to is not end else zero
        start_place = here - speed * (since - off)
        for row in range(int(last.amax()) + 1 if len(last) else 0):
            low = torch.where(speed == 0, -FOREVER, since + (row - here) / speed)  # when it passes this row
            high = torch.where(speed == 0, FOREVER, since + (row + 1 - here) / speed)  # and the next
            low, high = torch.where(speed < 0, high, low), torch.where(speed < 0, low, high)
            at_first, at_last = row == 0, row == last
            low = torch.where(at_last & (speed < 0), since, low)
            high = torch.where(at_last & (speed > 0), to, high)
            if at_first:
                low, high = torch.where(speed > 0, since, low), torch.where(speed < 0, to, high)
            stays = row == torch.minimum(here.clamp(min=0).floor(), last)
            used = (row <= last) & ((speed != 0) | stays)
            low = torch.minimum(torch.maximum(low, since), to)
            high = torch.where(used, torch.minimum(torch.maximum(high, since), to), low)
            rows += [
                (low, high, off, level * (row + 1 - start_place), -level * speed, fall, zero + row),
                (low, high, off, level * (start_place - row), level * speed, fall, zero + row + 1),
            ]
    since, to, origin, base, slope, falling, row_number = (torch.cat(column) for column in zip(*rows, strict=True))
    gains, at = gains.repeat(1, len(rows)), at.repeat(len(rows))
    shift = (start - on).repeat(len(rows)) + row_number * length.repeat(len(rows))
    heard = (to > since) & (gains.amax(dim=0) * (base.abs() + slope.abs()) > 0)
    at, gains = at[heard], gains[:, heard]
    return Pieces(
        first=grid.number(since[heard].long() + at),
        last=grid.number(to[heard].long() + at),
        origin=origin[heard].long() + at,
        shift=shift[heard].long() - at,
        base=(gains * base[heard]).float(),
        slope=(gains * slope[heard]).float(),
        fall=falling[heard].float(),
    )
