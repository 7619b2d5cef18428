"""Excerpts of a folder of MIDI files and their corruptions, rendered and stored as spectra.

Everything is drawn from the seed and the number of an excerpt, so that an interrupted preparation continues where it
stopped, and files are read only when they are drawn.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import click
import numpy as np
import torch

from smart import UserError
from smart.corpus import Limits, Reject, played, read_bytes, read_score
from smart.files import parse_json, sha256, write_atomically
from smart.render import Notes, RenderError, load_soundfont, render_notes, score_notes
from smart.reward.naturalness.corruptions import ALL, KINDS, SECONDS, corrupt
from smart.reward.spectra import SAMPLE_RATE, hear

ON, LONG, PITCH, LOUD, PROGRAM = range(5)
FEWEST = 12  # notes of an excerpt
SHARD = 64  # excerpts of one file of spectra
MIDI = (".mid", ".midi")
REAL = "real"
# General MIDI pianos: mostly the grand; others, so that timbre says nothing
PROGRAMS = (0, 0, 0, 0, 0, 0, 0, 1, 1, 2, 4, 5)
TESTED = 8  # of this many pieces, one is held out
ROOMS = 0.5  # share of the excerpts to train on that sound in a room, so that a recording's place says nothing


class Pieces:
    """The MIDI files of folders, split by a hash of their content: most for training, some held out.

    Args:
        folders: searched with their subfolders.
        part: (K, N): only the K-th of N parts of the files, which share none.

    Raises:
        UserError: not a folder, or too few files.
    """

    def __init__(self, folders: Sequence[Path], part: tuple[int, int] = (1, 1)) -> None:
        self.train: list[Path] = []
        self.held_out: list[Path] = []
        which, parts = part
        digest, count = hashlib.sha256(), 0
        for folder in folders:
            if not folder.is_dir():
                raise UserError(f"--midi {folder} is not a folder; give one with MIDI files")
            for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in MIDI and path.is_file()):
                count += 1
                content = hashlib.blake2b(path.read_bytes(), digest_size=8).digest()
                number = int.from_bytes(content, "big")
                if number % parts == which - 1:
                    digest.update(content)
                    (self.held_out if number // parts % TESTED == 0 else self.train).append(path)
        self.digest = digest.hexdigest()
        if not self.train or not self.held_out:
            raise UserError(
                f"--midi holds {count} MIDI files, of which {len(self.train)} are for training and "
                f"{len(self.held_out)} held out; at least one of each is needed, some hundreds are better"
            )

    @property
    def all(self) -> list[Path]:
        """Every file, for a test of an ear that was trained on others."""
        return sorted(self.train + self.held_out)


def read_piece(path: Path) -> Notes:
    """All notes of a MIDI file but drums, as piano, held by the pedal. Raises ``Reject`` for a damaged one."""
    limits = Limits()
    score = played(read_score(read_bytes(path, limits), limits))
    try:
        notes = score_notes(score, max_beats=math.inf)
    except ValueError as error:
        raise Reject("absurd notes", str(error)) from None
    notes = notes[(notes[:, 5] == 0) & (notes[:, PITCH] >= 21) & (notes[:, PITCH] <= 108) & (notes[:, LOUD] > 0)]
    notes[:, PROGRAM] = 0
    return notes


def draw_excerpt(piece: Notes, draw: np.random.Generator) -> Notes | None:
    """Ten seconds from a random place, in another key, tempo and touch; None where the piece has too few notes."""
    if len(piece) < FEWEST:
        return None
    pace = float(draw.uniform(0.8, 1.25))
    for _ in range(8):
        start = piece[draw.integers(len(piece)), ON] - 0.001
        end = start + SECONDS * pace
        notes = piece[(piece[:, ON] >= start) & (piece[:, ON] < end)].copy()
        notes[:, ON] = (notes[:, ON] - start) / pace
        notes[:, LONG] /= pace
        if len(notes) >= FEWEST and notes[-1, ON] > 7.5 and np.diff(notes[:, ON]).max() < 3:
            break
    else:
        return None
    lead = draw.choice([0.0, draw.uniform(0, 0.5)])
    notes[:, ON] += lead - notes[0, ON]
    room = int(21 - notes[:, PITCH].min()), int(108 - notes[:, PITCH].max())
    notes[:, PITCH] += np.clip(draw.integers(-6, 7), *room)
    if draw.random() < 0.15:
        notes[:, LOUD] = draw.integers(50, 115)
    else:
        middle = notes[:, LOUD].mean()
        notes[:, LOUD] = middle + (notes[:, LOUD] - middle) * draw.uniform(0.6, 1.2) + draw.uniform(-12, 12)
    notes[:, LOUD] = np.clip(np.round(notes[:, LOUD]), 8, 127)
    if draw.random() < 0.3:  # a policy's notes are on a grid of twelve a beat
        step = 60 / draw.uniform(80, 160) / 12
        notes[:, ON] = np.round(notes[:, ON] / step) * step
        notes[:, LONG] = np.maximum(np.round(notes[:, LONG] / step), 1) * step
    if draw.random() < 0.3:  # without pedal
        notes[:, LONG] = np.minimum(notes[:, LONG], draw.uniform(0.3, 1.0))
    if draw.random() < 0.1:  # a piece that ends
        notes = notes[notes[:, ON] < draw.uniform(5.5, 9)]
    return notes[notes[:, ON] < SECONDS]


class Maker:
    """Draws, corrupts and renders excerpts, each from its own number."""

    def __init__(self, paths: Sequence[Path], soundfonts: Sequence[Path], seed: int, spectra: str) -> None:
        self.paths, self.seed, self.spectra = paths, seed, spectra
        self.fonts = [load_soundfont(path) for path in soundfonts]
        self.pieces: dict[int, Notes | None] = {}

    def _piece(self, number: int) -> Notes | None:
        if number not in self.pieces:
            if len(self.pieces) > 300:
                self.pieces.pop(next(iter(self.pieces)))
            try:
                self.pieces[number] = read_piece(self.paths[number])
            except Reject:
                self.pieces[number] = None
        return self.pieces[number]

    def excerpt(self, draw: np.random.Generator) -> Notes:
        """An excerpt of any piece. Raises ``UserError`` where a hundred pieces have none."""
        for _ in range(100):
            piece = self._piece(int(draw.integers(len(self.paths))))
            notes = None if piece is None else draw_excerpt(piece, draw)
            if notes is not None and len(notes) >= 8:
                return notes
        raise UserError("of 100 MIDI files, none has ten seconds of at least 12 notes; check --midi")

    def audio(self, notes: Notes, font: int, program: int = 0, rate: int = SAMPLE_RATE) -> torch.Tensor:
        """Mono audio (S,) of notes."""
        notes = notes.copy()
        notes[:, PROGRAM] = program
        if not len(notes):
            return torch.zeros(rate)
        try:
            audio = render_notes(self.fonts[font], notes, sample_rate=rate, seconds=SECONDS)
        except RenderError as error:
            raise UserError(f"a soundfont cannot play an excerpt: {error}") from None
        return torch.from_numpy(audio).mean(dim=0)

    def clips(
        self, number: int, corruptions: Sequence[str], grand: bool = False, font: int | None = None
    ) -> tuple[list[torch.Tensor], int]:
        """Audio (S,) of excerpt ``number`` and each of its corruptions, and the number of their soundfont.

        ``grand``: always as a grand piano in no room. ``font``: through this soundfont, instead of one that is drawn.
        """
        draw = np.random.default_rng((self.seed, number))
        notes, other = self.excerpt(draw), self.excerpt(draw)
        drawn = int(draw.integers(len(self.fonts)))
        font = drawn if font is None else font
        program = 0 if grand else int(draw.choice(PROGRAMS))
        played = [notes, *(corrupt(name, notes, other, draw) for name in corruptions)]
        heard = [self.audio(clip, font, program) for clip in played]
        if not grand and draw.random() < ROOMS:
            heard = in_a_room(heard, draw)
        return heard, font

    def group(self, number: int, corruptions: Sequence[str], grand: bool = False) -> tuple[torch.Tensor, int]:
        """The same as spectra (1 + K, channels, bands, frames)."""
        clips, font = self.clips(number, corruptions, grand)
        return torch.stack([hear(clip, self.spectra) for clip in clips]), font

    def kinds(self, number: int, many: int) -> list[str]:
        """Which corruptions excerpt ``number`` gets in training."""
        draw = np.random.default_rng((self.seed, number, 1))
        weight = np.array([kind.weight for kind in KINDS.values()])
        chosen = draw.choice(len(KINDS), many, replace=False, p=weight / weight.sum())
        return [list(KINDS)[k] for k in chosen]


def prepare(
    maker: Maker,
    folder: Path,
    many: int,
    kinds: Callable[[int], Sequence[str]],
    *,
    together: int = SHARD,
    grand: bool = False,
) -> Iterator[int]:
    """Store ``many`` excerpts, each with the corruptions ``kinds(number)``; yields each one's number when it is done.

    Of every ``together`` excerpts, NUMBER.npy holds the spectra (E, 1 + K, channels, bands, frames) uint8, NUMBER.harm
    their harm (E, 1 + K) float32, 0 for the real excerpt, and NUMBER.font their soundfonts (E,). What a folder has
    already is kept, if it has the checksums that NUMBER.sha256 holds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for first in range(0, many, together):
        numbers = range(first, min(first + together, many))
        file = folder / f"{first:06d}.npy"
        if _is_whole(file, len(numbers)):
            yield from numbers
            continue
        groups, harm, fonts = [], [], []
        for number in numbers:
            names = kinds(number)
            spectra, font = maker.group(number, names, grand)
            groups.append(spectra.numpy())
            harm.append([0.0, *(ALL[name].harm for name in names)])
            fonts.append(font)
            yield number
        arrays = {".font": np.array(fonts), ".harm": np.array(harm, np.float32), ".npy": np.stack(groups)}
        sums = {suffix: _store(file.with_suffix(suffix), array) for suffix, array in arrays.items()}
        write_atomically(file.with_suffix(SUMS), json.dumps(sums).encode())


SUMS = ".sha256"  # of the other files of the same name, as JSON; written last


def _is_whole(file: Path, many: int) -> bool:
    """Whether a file holds at least so many excerpts, and all that belongs to it is as it was written."""
    kept = file.with_suffix(SUMS)
    if not kept.exists():
        return False
    try:
        sums = parse_json(kept.read_bytes())
        whole = all(sums[suffix] == sha256(file.with_suffix(suffix)) for suffix in (".font", ".harm", ".npy"))
        if whole and len(np.load(file, mmap_mode="r", allow_pickle=False)) >= many:
            return True
    except (OSError, ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        click.echo(f"Warning: {file} or what belongs to it is damaged; its excerpts are rendered again", err=True)
    return False


def _store(file: Path, array: np.ndarray) -> str:
    """Write a whole file, or none; returns its SHA-256."""
    write_atomically(file, partial(np.save, arr=array, allow_pickle=False))
    return sha256(file)


class Stored:
    """The stored excerpts of a folder, read as they are needed."""

    def __init__(self, folder: Path, many: int) -> None:
        files = sorted(folder.glob("*.npy"))
        self.spectra = [np.load(file, mmap_mode="r", allow_pickle=False) for file in files]
        self.harm = [np.load(file.with_suffix(".harm"), allow_pickle=False) for file in files]
        self.places = [(f, row) for f, harm in enumerate(self.harm) for row in range(len(harm))][:many]

    def clip(self, group: int, place: int) -> torch.Tensor:
        """Spectra (channels, bands, frames) uint8: of the excerpt itself (0) or of one of its corruptions."""
        file, row = self.places[group]
        return torch.from_numpy(np.array(self.spectra[file][row, place]))

    def batch(self, groups: Sequence[int], kept: int, draw: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Spectra (E (1 + kept), channels, bands, frames) uint8, and harm, of excerpts with ``kept`` corruptions."""
        spectra, harm = [], []
        for group in groups:
            file, row = self.places[group]
            rows = [0, *(1 + draw.permutation(self.harm[file].shape[1] - 1)[:kept])]
            spectra.append(self.spectra[file][row][rows])
            harm.append(self.harm[file][row][rows])
        return torch.from_numpy(np.concatenate(spectra)), torch.from_numpy(np.concatenate(harm))


def in_a_room(clips: Sequence[torch.Tensor], draw: np.random.Generator) -> list[torch.Tensor]:
    """Clips (S,) in one and the same room, which echoes for 0.2 to 1.8 s (RT60), up to as loud as the piano itself."""
    rt60, level, dull = draw.uniform(0.2, 1.8), draw.uniform(0.05, 1.0), draw.uniform(-1.0, 0.0)
    samples = int(rt60 * SAMPLE_RATE)
    tones = np.fft.rfft(draw.standard_normal(samples))
    noise = np.fft.irfft(tones * np.linspace(1, len(tones), len(tones)) ** (dull / 2), samples)  # high tones are softer
    echo = noise * np.exp(-6.9 * np.arange(samples) / samples)
    echo *= level / np.sqrt((echo**2).sum())
    echo[0] += 1.0
    room = torch.from_numpy(echo).float()
    found = []
    for clip in clips:
        size = 1 << (len(clip) + samples).bit_length()
        found.append(torch.fft.irfft(torch.fft.rfft(clip, size) * torch.fft.rfft(room, size), size)[: len(clip)])
    return found


def not_music(spectra: str, many: int, seed: int) -> torch.Tensor:
    """Spectra (many, channels, bands, frames) uint8 of what is no music: noise of all colours, tones, clicks, hum."""
    draw = torch.Generator().manual_seed(seed)
    samples = round(SECONDS * SAMPLE_RATE)
    time = torch.arange(samples) / SAMPLE_RATE
    hz = torch.fft.rfftfreq(samples, 1 / SAMPLE_RATE).clamp(min=20)

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=draw))

    clips = []
    for number in range(many):
        noise = torch.fft.rfft(torch.randn(samples, generator=draw))
        noise = torch.fft.irfft(noise * hz ** uniform(-1.2, 0.2), samples)
        noise = noise / noise.abs().max()
        match number % 6:
            case 0:
                clip = noise
            case 1:  # in bursts
                clip = noise * (torch.sin(2 * torch.pi * uniform(0.3, 6) * time) > 0)
            case 2:  # steady tones
                clip = sum(
                    (torch.sin(2 * torch.pi * uniform(40, 2500) * time) for _ in range(1 + number % 4)), 0 * time
                )
            case 3:  # a sweep
                clip = torch.sin(2 * torch.pi * (uniform(40, 400) + uniform(10, 200) * time) * time)
            case 4:  # clicks
                clip = (torch.arange(samples) % int(uniform(800, 16_000)) == 0).float()
            case _:  # a band of noise
                centre, width = uniform(60, 4000), uniform(0.05, 1)
                band = torch.exp(-((torch.log2(hz / centre) / width) ** 2))
                clip = torch.fft.irfft(torch.fft.rfft(noise) * band, samples)
        clips.append(hear(clip[: int(uniform(0.1, 1) * samples)] if number % 5 == 0 else clip, spectra))
    return torch.stack(clips)
