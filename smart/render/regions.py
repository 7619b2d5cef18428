"""Read the regions of a soundfont as TinySoundFont does (``read_regions``), and write variants (``write_variant``).

A preset (a program, or a drum kit) is a list of regions: one sample each, for a range of keys and velocities, with its
generators: pitch, envelopes, filter. Several may respond to one note. The synthesiser adds the generators of the preset
to those of the instrument and clamps the sum (SoundFont 2.04, section 9.4); so does ``read_regions``, for the
generators that the synthesiser knows. ``write_variant`` writes a soundfont with the same samples whose presets are
single regions with generators that the caller chooses. So the synthesiser can play one region alone, or without its
envelope.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from smart import UserError
from smart.render.soundfonts import find_chunks

# records of the format (SoundFont 2.04, section 7)
_HEADER = np.dtype(
    [("name", "S20"), ("preset", "<u2"), ("bank", "<u2"), ("bag", "<u2"), ("unused", "<u4", (3,))]
)  # a preset
_INSTRUMENT = np.dtype([("name", "S20"), ("bag", "<u2")])
_BAG = np.dtype([("generator", "<u2"), ("modulator", "<u2")])
_GENERATOR = np.dtype([("operator", "<u2"), ("amount", "<i2")])
_MODULATOR_SIZE, _SAMPLE_SIZE = 10, 46
MAX_RECORDS = 65_535  # as many as 16 bits can number
# limits on one file: tables can refer to each other so that a small file fills the memory. The most detailed General
# MIDI soundfonts, of many gigabytes, have tens of thousands of regions with 10 to 30 generators each
MAX_REGIONS, MAX_STEPS = 100_000, 5_000_000

_INSTRUMENT_OPERATOR, _KEYS, _VELOCITIES, _SAMPLE, _MODES, _CLASS, _ROOT = 41, 43, 44, 53, 54, 57, 58
# operator -> name, lowest and highest sum; times are in timecents, and -12000 or less means no time at all
_SUMS = {
    5: ("mod_lfo_to_pitch", -12000, 12000), 6: ("vib_lfo_to_pitch", -12000, 12000),
    7: ("mod_env_to_pitch", -12000, 12000), 8: ("filter_cutoff", 1500, 13500), 9: ("filter_q", 0, 960),
    10: ("mod_lfo_to_filter", -12000, 12000), 11: ("mod_env_to_filter", -12000, 12000),
    13: ("mod_lfo_to_volume", -960, 960), 17: ("pan", -500, 500),
    21: ("mod_lfo_delay", -12000, 5000), 22: ("mod_lfo_frequency", -16000, 4500),
    23: ("vib_lfo_delay", -12000, 5000), 24: ("vib_lfo_frequency", -16000, 4500),
    25: ("mod_delay", -12000, 5000), 26: ("mod_attack", -12000, 8000), 27: ("mod_hold", -12000, 5000),
    28: ("mod_decay", -12000, 8000), 29: ("mod_sustain", 0, 1000), 30: ("mod_release", -12000, 8000),
    31: ("mod_key_to_hold", -1200, 1200), 32: ("mod_key_to_decay", -1200, 1200),
    33: ("delay", -12000, 5000), 34: ("attack", -12000, 8000), 35: ("hold", -12000, 5000),
    36: ("decay", -12000, 8000), 37: ("sustain", 0, 1440), 38: ("release", -12000, 8000),
    39: ("key_to_hold", -1200, 1200), 40: ("key_to_decay", -1200, 1200), 48: ("attenuation", 0, 1440),
    51: ("coarse_tune", -32768, 32767), 52: ("fine_tune", -32768, 32767), 56: ("scale_tuning", -32768, 32767),
}  # fmt: skip
# operator -> name, shift: addresses in samples; those of the same name add up
_ADDRESSES = {
    0: ("start", 0), 1: ("end", 0), 2: ("loop_start", 0), 3: ("loop_end", 0),
    4: ("start", 15), 12: ("end", 15), 45: ("loop_start", 15), 50: ("loop_end", 15),
}  # fmt: skip
_DEFAULTS = {
    **dict.fromkeys([name for name, *_ in _SUMS.values()], 0),
    **dict.fromkeys([name for name, _ in _ADDRESSES.values()], 0),
    **dict.fromkeys(("delay", "attack", "hold", "decay", "release", "mod_lfo_delay", "vib_lfo_delay"), -12000),
    **dict.fromkeys(("mod_delay", "mod_attack", "mod_hold", "mod_decay", "mod_release"), -12000),
    "filter_cutoff": 13500,
    "scale_tuning": 100,
}

Values = dict[str, int]  # name of a generator -> its amount, in the format's own units


class Region(NamedTuple):
    """One sample of a preset: the notes that it plays, and how it sounds."""

    keys: tuple[int, int]  # lowest and highest
    velocities: tuple[int, int]
    values: Values  # every generator of ``_SUMS`` and ``_ADDRESSES``, and sample, root, modes, exclusive_class


class _Zone(NamedTuple):
    keys: tuple[int, int]
    velocities: tuple[int, int]
    values: Values

    def apply(self, operator: int, amount: int) -> "_Zone":
        values = self.values
        if operator in _SUMS:
            values = values | {_SUMS[operator][0]: amount}
        elif operator in _ADDRESSES:
            name, shift = _ADDRESSES[operator]
            values = values | {name: values.get(name, 0) + (amount << shift)}
        elif operator == _KEYS:
            return self._replace(keys=(amount & 255, amount >> 8 & 255))
        elif operator == _VELOCITIES:
            return self._replace(velocities=(amount & 255, amount >> 8 & 255))
        elif operator == _MODES:
            values = values | {"modes": {1: 1, 3: 3}.get(amount & 3, 0)}
        elif operator == _CLASS:
            values = values | {"exclusive_class": amount & 0xFFFF}
        elif operator == _ROOT:
            values = values | {"root": amount}
        return self._replace(values=values)


class _TooMany(Exception):
    """The tables describe more regions or generators than the limits allow."""


@dataclass
class _Effort:
    """How much of a file has been read."""

    steps: int = 0  # zones and their generators
    regions: int = 0

    def add(self, *, steps: int = 0, regions: int = 0) -> None:
        self.steps += steps
        self.regions += regions
        if self.steps > MAX_STEPS or self.regions > MAX_REGIONS:
            raise _TooMany


def read_regions(path: str | Path) -> dict[tuple[int, int], list[Region]]:
    """(bank, program) -> the regions of every preset of a soundfont, in the synthesiser's order.

    Raises ``UserError`` for a file whose tables contradict themselves, or describe more than ``MAX_REGIONS`` regions or
    ``MAX_STEPS`` generators.
    """
    try:
        tables = _tables(Path(path))
    except (KeyError, ValueError, struct.error):
        raise UserError(f"soundfont {path} is damaged: its tables are missing or cut short") from None
    headers, instruments = tables["phdr"], tables["inst"]
    presets: dict[tuple[int, int], list[Region]] = {}
    effort = _Effort()
    try:
        for header, following in pairwise(headers):
            key = int(header["bank"]), int(header["preset"])
            presets.setdefault(key, [])  # of two presets with the same number the first is played
            regions: list[Region] = []
            common = _Zone((0, 127), (0, 127), {})
            for place, zone in enumerate(_zones(tables, "p", header, following, effort)):
                current, played = common, False
                for operator, amount in zone:
                    if operator != _INSTRUMENT_OPERATOR:
                        current = current.apply(operator, amount)
                    elif (amount := amount & 0xFFFF) < len(instruments):
                        owner, after = instruments[amount], instruments[amount + 1]
                        regions += _instrument_regions(tables, owner, after, current, effort)
                        played = True
                if place == 0 and not played:
                    common = current
            presets[key] = presets[key] or regions
    except IndexError:
        raise UserError(f"soundfont {path} is damaged: its tables point outside themselves") from None
    except _TooMany:
        raise UserError(
            f"soundfont {path} is damaged, or too large: expected at most {MAX_REGIONS:,} regions "
            f"and {MAX_STEPS:,} generators in its presets"
        ) from None
    return presets


def _tables(path: Path) -> dict[str, npt.NDArray[Any]]:
    kinds = {"phdr": _HEADER, "pbag": _BAG, "pgen": _GENERATOR, "inst": _INSTRUMENT, "ibag": _BAG, "igen": _GENERATOR}
    with path.open("rb") as file:
        chunks = find_chunks(file)
        return {name: np.frombuffer(_read(file, *chunks[name.encode()]), kind) for name, kind in kinds.items()}


def _read(file: IO[bytes], start: int, length: int) -> bytes:
    file.seek(start)
    return file.read(length)


def _zones(
    tables: dict[str, npt.NDArray[Any]], level: str, owner: Any, following: Any, effort: _Effort
) -> Iterator[list[tuple[int, int]]]:
    """The generators (operator, amount) of each zone of a preset ("p") or an instrument ("i")."""
    bags = tables[f"{level}bag"]["generator"]
    generators = tables[f"{level}gen"]
    for place in range(int(owner["bag"]), int(following["bag"])):
        zone = generators[bags[place] : bags[place + 1]]
        effort.add(steps=1 + len(zone))
        yield zone.tolist()


def _instrument_regions(
    tables: dict[str, npt.NDArray[Any]], owner: Any, following: Any, preset: _Zone, effort: _Effort
) -> list[Region]:
    regions = []
    common = _Zone((0, 127), (0, 127), {**_DEFAULTS, "root": -1, "modes": 0, "exclusive_class": 0})
    for place, zone in enumerate(_zones(tables, "i", owner, following, effort)):
        current, played = common, False
        for operator, amount in zone:
            if operator != _SAMPLE:
                current = current.apply(operator, amount)
                continue
            keys, velocities = _meet(current.keys, preset.keys), _meet(current.velocities, preset.velocities)
            played = True
            if keys[0] <= keys[1] and velocities[0] <= velocities[1]:
                effort.add(regions=1)
                regions.append(Region(keys, velocities, _sum(current.values, preset.values, amount & 0xFFFF)))
        if place == 0 and not played:
            common = current
    return regions


def _meet(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    return max(a[0], b[0]), min(a[1], b[1])


def _sum(instrument: Values, preset: Values, sample: int) -> Values:
    values = dict(instrument)
    for name, low, high in _SUMS.values():
        values[name] = min(max(instrument[name] + preset.get(name, 0), low), high)
    for name, _ in _ADDRESSES.values():
        values[name] = instrument[name] + preset.get(name, 0)
    return values | {"sample": sample}


def write_variant(path: str | Path, target: IO[bytes], presets: Sequence[Sequence[Values]]) -> None:
    """Write to ``target`` the soundfont of ``path`` with other presets: program p of bank b is ``presets[b][p]``.

    Each is one region for every key and velocity. Raises ``ValueError`` for more presets than the format can number.
    """
    programs = [(bank, program, values) for bank, row in enumerate(presets) for program, values in enumerate(row)]
    amounts = [_generators(values) for *_, values in programs]
    starts = np.cumsum([0, *(len(rows) for rows in amounts)])
    if max(starts[-1], len(programs)) > MAX_RECORDS:
        raise ValueError(f"{len(programs)} regions with {starts[-1]} generators: at most {MAX_RECORDS} fit")
    many = len(programs)
    headers, instruments = np.zeros(many + 1, _HEADER), np.zeros(many + 1, _INSTRUMENT)
    headers["bag"] = instruments["bag"] = np.arange(many + 1)
    headers["bank"][:many] = [bank for bank, *_ in programs]
    headers["preset"][:many] = [program for _, program, _ in programs]
    preset_bags, instrument_bags = np.zeros(many + 1, _BAG), np.zeros(many + 1, _BAG)
    preset_bags["generator"], instrument_bags["generator"] = np.arange(many + 1), starts
    preset_generators = np.zeros(many + 1, _GENERATOR)
    preset_generators["operator"][:many] = _INSTRUMENT_OPERATOR
    preset_generators["amount"][:many] = np.arange(many).astype("<u2").view("<i2")
    generators = np.array([*(row for rows in amounts for row in rows), (0, 0)], _GENERATOR)
    nothing = bytes(_MODULATOR_SIZE)
    with Path(path).open("rb") as source:
        chunks = find_chunks(source)
        samples = b"smpl" if b"smpl" in chunks else b"smpo"
        tables = b"pdta" + b"".join(
            name + len(data).to_bytes(4, "little") + data
            for name, data in (
                (b"phdr", headers.tobytes()), (b"pbag", preset_bags.tobytes()), (b"pmod", nothing),
                (b"pgen", preset_generators.tobytes()), (b"inst", instruments.tobytes()),
                (b"ibag", instrument_bags.tobytes()), (b"imod", nothing), (b"igen", generators.tobytes()),
                (b"shdr", _read(source, *chunks[b"shdr"])),
            )
        )  # fmt: skip
        start, length = chunks[samples]
        sound = b"sdta" + samples + length.to_bytes(4, "little")
        whole = 4 + 8 + len(sound) + length + 8 + len(tables)
        target.write(b"RIFF" + whole.to_bytes(4, "little") + b"sfbk")
        target.write(b"LIST" + (len(sound) + length).to_bytes(4, "little") + sound)
        source.seek(start)
        _copy(source, target, length)
        target.write(b"LIST" + len(tables).to_bytes(4, "little") + tables)
        target.flush()


def _copy(source: IO[bytes], target: IO[bytes], length: int) -> None:
    while length:
        data = source.read(min(length, 1 << 22))
        if not data:
            raise UserError("the soundfont was cut short while it was being read")
        target.write(data)
        length -= len(data)


def _generators(values: Values) -> list[tuple[int, int]]:
    """The records of one region: the values that differ from the format's defaults, the sample last."""
    rows = [(operator, values[name]) for operator, (name, *_) in _SUMS.items() if values[name] != _DEFAULTS[name]]
    for operator, (name, shift) in _ADDRESSES.items():
        amount = values[name] >> 15 if shift else values[name] & 0x7FFF
        if amount:
            rows.append((operator, amount))
    for operator, name, default in ((_MODES, "modes", 0), (_CLASS, "exclusive_class", 0), (_ROOT, "root", -1)):
        if values[name] != default:
            rows.append((operator, _signed(values[name])))
    return [*rows, (_SAMPLE, _signed(values["sample"]))]


def _signed(amount: int) -> int:
    return amount - 0x10000 if amount > 0x7FFF else amount
