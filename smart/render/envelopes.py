"""How TinySoundFont plays a voice: the envelopes of a region, and weighted sums of stored samples that follow them.

``law_of`` turns a region's generators into times and gains; ``stored`` lists the variants of the region that are
rendered once; ``mix`` adds them up, block by block, as the synthesiser would (see ``smart.render.bank``).
"""

import math
from itertools import pairwise
from typing import NamedTuple

import numpy as np
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


# The law of the synthesiser ---------------------------------------------------------------------------------


def not_linear(values: Values) -> str | None:
    """Why a region cannot be played from a bank; None if it can."""
    filtered = values["mod_env_to_filter"]
    for wrong, reason in (
        (values["exclusive_class"], "an exclusive class, which cuts off other notes"),
        (values["vib_lfo_to_pitch"] or values["mod_lfo_to_pitch"], "a vibrato"),
        (values["mod_lfo_to_volume"], "a tremolo"),
        (values["mod_lfo_to_filter"], "a filter that follows an oscillator"),
        (values["mod_env_to_pitch"], "a pitch that follows an envelope"),
        (values["modes"] == 3, "a loop that ends with the key"),
        (filtered and max(values["mod_delay"], values["mod_attack"]) >= -11950, "a filter that follows an attack"),
    ):
        if wrong:
            return f"a region with {reason}"
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


# Sums of rows -----------------------------------------------------------------------------------------------

LEFT = 5  # column of a voice's left gain; before it are on, off, stop, start and length, after it the rest of its law


def blocks_between(starts: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """First samples (nb,) of the blocks; events cut the time into stretches from ``starts`` to ``ends``."""
    many = (ends - starts + BLOCK - 1) // BLOCK
    return starts.repeat_interleave(many) + BLOCK * count_up(many)


class _Pieces(NamedTuple):
    """Stretches of voices in which the gain is (base + slope tau) exp(-fall tau), tau samples after ``origin``."""

    first: torch.Tensor  # (p,) the first block of each
    last: torch.Tensor  # the block after its last
    origin: torch.Tensor
    base: torch.Tensor
    slope: torch.Tensor
    fall: torch.Tensor
    shift: torch.Tensor  # from a time to the place of its sample in the store


def _pieces(voices: torch.Tensor, side: int, blocks: torch.Tensor) -> _Pieces:
    """The pieces of ``voices`` (n, 21) on one side: attack, hold, decay, sustained level, release."""
    on, off, stop, start, length = voices[:, :LEFT].T
    gain = voices[:, side]
    delay, attack, hold, decay, until, sustain, release = voices[:, LEFT + 2 : LEFT + 9].T
    mod_hold, mod_decay, mod_until, mod_sustain, mod_release, drop, many = voices[:, LEFT + 9 :].T
    grid = torch.cat([blocks.double(), blocks.new_full((1,), FOREVER).double()])

    def after(time: torch.Tensor, duration: torch.Tensor) -> torch.Tensor:
        """The first block at least ``duration`` after ``time``, or ``time`` itself without a duration."""
        block = grid[torch.searchsorted(grid, time + duration).clamp(max=len(grid) - 1)]
        return torch.where(duration > 0, block, time)

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
        for row in range(int(last.amax()) + 1):
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
    gains = gain.repeat(len(rows))
    shift = (start - on).repeat(len(rows)) + row_number * length.repeat(len(rows))
    sounds = (to > since) & (gains * (base.abs() + slope.abs()) > 0)
    since, to, origin, shift = since[sounds].long(), to[sounds].long(), origin[sounds].long(), shift[sounds].long()
    return _Pieces(
        torch.searchsorted(blocks, since),
        torch.searchsorted(blocks, to),
        origin,
        (gains * base)[sounds].float(),
        (gains * slope)[sounds].float(),
        falling[sounds].float(),
        shift,
    )


def mix(store: torch.Tensor, voices: torch.Tensor, side: int, blocks: torch.Tensor, total: int) -> torch.Tensor:
    """The sum of ``voices`` on one side, (total,): for every block, the weighted sum of one row from each voice."""
    device = store.device
    if not len(voices):
        return torch.zeros(total, device=device)
    pieces = _pieces(voices, side, blocks)
    # blocks between two bounds have the same pieces, which ``members`` lists, one stretch after the other
    bounds = torch.unique(torch.cat([pieces.first, pieces.last, torch.tensor([0, len(blocks)], device=device)]))
    low, high = torch.searchsorted(bounds, pieces.first), torch.searchsorted(bounds, pieces.last)
    piece = torch.arange(len(low), device=device).repeat_interleave(high - low)
    stretch = low[piece] + count_up(high - low)
    members = piece[torch.sort(stretch, stable=True).indices]
    sizes = torch.bincount(stretch, minlength=len(bounds) - 1)
    many = sizes.repeat_interleave(bounds.diff())  # (nb,) number of pieces of each block
    before = many.cumsum(0)  # (nb,) pieces of all blocks up to and including this one
    member = (sizes.cumsum(0) - sizes).repeat_interleave(bounds.diff()) - (before - many)
    lengths = torch.diff(blocks, append=torch.tensor([total], device=device))
    windows = store.as_strided((len(store) - BLOCK + 1, BLOCK), (1, 1))
    most = 1 << (22 if device.type == "cuda" else 15)  # rows at a time: on a CPU they should fit into its cache
    if not len(piece):
        return torch.zeros(total, device=device)
    steps = torch.arange(most, max(most, int(before[-1])), most, device=device)
    cuts = [0, *torch.searchsorted(before, steps, right=True).tolist(), len(blocks)]
    filled = torch.arange(BLOCK, device=device) < lengths[:, None]  # an event cuts a block short
    out = torch.empty(total, device=device)
    sampled = [0, *torch.cat([blocks, blocks.new_tensor([total])])[torch.tensor(cuts[1:], device=device)].tolist()]
    for index, (cut, following) in enumerate(pairwise(cuts)):
        if following == cut:
            continue
        own = many[cut:following]
        offsets = own.cumsum(0) - own
        block = torch.arange(cut, following, device=device).repeat_interleave(own)
        place = torch.arange(len(block), device=device) + (before[cut] - many[cut])
        which = members[member[block] + place]
        time = blocks[block]
        since = (time - pieces.origin[which]).float()
        gain = (pieces.base[which] + pieces.slope[which] * since) * torch.exp(-pieces.fall[which] * since)
        rows = windows[pieces.shift[which] + time]
        numbers = torch.arange(len(rows), device=device)
        sums = torch.nn.functional.embedding_bag(numbers, rows, offsets, mode="sum", per_sample_weights=gain)
        out[sampled[index] : sampled[index + 1]] = sums[filled[cut:following]]
    return out


def count_up(many: torch.Tensor) -> torch.Tensor:
    return torch.arange(int(many.sum()), device=many.device) - (many.cumsum(0) - many).repeat_interleave(many)
