"""How varied a set of pieces is, and how similar each is to the pieces of a corpus.

A policy that has found a piece with a high reward may write it again and again. Several measures show this; each is
lowest (0 or 1) if all pieces are the same:

- the Vendi score (Friedman and Dieng 2023): the effective number of different pieces, exp of the entropy of the
  eigenvalues of K/N, for a kernel K of symbolic vectors or of audio vectors;
- the mean distance of two piano rolls, 0 for copies and 1 if they have no sounding cell in common;
- the share of different n-grams of notes, encoded so that transposition does not matter.

Drums have no pitch, so drum tracks are left out of all symbolic measures. A piece without other notes is "empty"; all
empty pieces count as copies of each other and as different from any other piece.

``distinct_rewards`` turns the similarity of pieces within a group into a bonus that training can optimise.
"""

import itertools
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from symusic.core import ScoreTick

BEATS = 16  # quarter notes from the beginning: about ten seconds, as in the paper's figure 6
PER_BEAT = 4
STEPS = 12  # per quarter note, for n-grams: the vocabulary's grid
RUN = 8  # transitions between notes; shorter runs occur in every scale and trill, so they do not count as copied

SECONDS = 10.0  # that are rated in training
WINDOW_SECONDS, STEP_SECONDS, MEL_BANDS, MEL_HZ = 0.064, 0.5, 64, (50.0, 7500.0)

Floats = npt.NDArray[np.float32]
Hashes = npt.NDArray[np.uint64]


class Nearest(NamedTuple):
    """For each of N pieces, the most similar music in the corpus."""

    piece: npt.NDArray[np.int64]  # (N,) index of the corpus piece with the most similar opening; -1 without a corpus
    similarity: npt.NDArray[np.float64]  # (N,) 0..1, cosine of the openings in the best transposition
    copied: npt.NDArray[np.float64]  # (N,) 0..1, share of the piece's runs of notes that occur in some corpus piece
    longest: npt.NDArray[np.int64]  # (N,) notes in the longest passage also in a corpus piece; 0: fewer than RUN + 1


def piano_roll(score: ScoreTick, *, beats: int = BEATS, per_beat: int = PER_BEAT) -> Floats:
    """(beats * per_beat, 128) float32: 1 if a pitch sounds in a cell of time, counted from the beginning.

    A note fills each cell in which it sounds, and always the one in which it begins.
    """
    notes, cells = _notes(score), beats * per_beat
    first = notes["time"] * per_beat // score.ticks_per_quarter
    last = -(-(notes["time"] + notes["duration"]) * per_beat // score.ticks_per_quarter)  # rounded up
    last = np.maximum(last, first + 1)
    edges = np.zeros((cells + 1, 128), np.int64)
    np.add.at(edges, (np.minimum(first, cells), notes["pitch"]), 1)
    np.add.at(edges, (np.minimum(last, cells), notes["pitch"]), -1)
    return (np.cumsum(edges, axis=0)[:cells] > 0).astype(np.float32)


def symbolic_vector(score: ScoreTick, *, beats: int = BEATS) -> Floats:
    """(beats * 4 * 12,) float32: onsets by sixteenth and pitch class, of unit length; zero for an empty piece.

    Octave, loudness and duration do not matter, but transposition does (``nearest`` compensates for it).
    """
    notes, cells = _notes(score), beats * PER_BEAT
    cell = notes["time"] * PER_BEAT // score.ticks_per_quarter
    place = (cell * 12 + notes["pitch"] % 12)[cell < cells]
    return _unit(np.bincount(place, minlength=cells * 12))


def audio_vector(audio: npt.NDArray[Any], sample_rate: int, *, seconds: float = SECONDS) -> Floats:
    """Mean magnitude of the first ``seconds`` by half second and mel band (64), of unit length; zero for silence.

    ``audio`` is (C, S) or (S,); the result is (2 * seconds * 64,) float32. Gain does not matter. Magnitudes tell pieces
    apart better than decibels, with which any two piano clips have a cosine of 0.9, as soft sounds count nearly as
    much as loud ones.
    """
    signal = np.atleast_2d(np.asarray(audio, np.float32)).mean(axis=0)[: round(seconds * sample_rate)]
    size = round(WINDOW_SECONDS * sample_rate)
    signal = np.pad(signal, (0, max(size - len(signal), 0)))
    frames = np.lib.stride_tricks.sliding_window_view(signal, size)[:: size // 2]
    bins = 1 << (size - 1).bit_length()  # a power of two, for a fast transform
    power = np.abs(np.fft.rfft(frames * np.hanning(size).astype(np.float32), bins, axis=1)) ** 2
    bands = np.sqrt(power @ _mel_filters(bins, sample_rate))
    steps = round(seconds / STEP_SECONDS)
    step = np.minimum(np.arange(len(bands)) * (size // 2) / (STEP_SECONDS * sample_rate), steps - 1).astype(int)
    total = np.zeros((steps, MEL_BANDS))
    np.add.at(total, step, bands)
    return _unit((total / np.maximum(np.bincount(step, minlength=steps), 1)[:, None]).ravel())


def kernel(vectors: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Cosine similarities (N, N) of non-negative vectors (N, D) of unit length, such as those above.

    They lie in [0, 1], with 1 on the diagonal. Zero vectors (empty pieces, silent clips) have similarity 1 to each
    other and 0 to all others.
    """
    vectors = np.asarray(vectors, np.float64)
    empty = ~vectors.any(axis=1)
    vectors = vectors / np.where(empty, 1, np.linalg.norm(vectors, axis=1))[:, None]  # of unit length in float64, too
    similar = np.clip(vectors @ vectors.T, 0, 1)
    similar[np.ix_(empty, empty)] = 1
    np.fill_diagonal(similar, 1)
    return similar


def vendi_score(similarities: npt.NDArray[Any]) -> float:
    """exp of the entropy of the eigenvalues of K/N (Friedman and Dieng 2023, definition 3.1): 1 to N.

    ``similarities`` is K (N, N), symmetric, with ones on the diagonal. m different pieces, k copies of each, give m.
    Raises ``ValueError`` for another shape or if there is no piece.
    """
    count = len(similarities)
    if not count or similarities.shape != (count, count):
        raise ValueError(f"similarities: expected (N, N) with N >= 1, got {similarities.shape}")
    shares = np.linalg.eigvalsh(similarities / count)
    shares = shares[shares > 0]
    return float(np.clip(np.exp(-(shares * np.log(shares)).sum()), 1, count))


def mean_pairwise_distance(rolls: npt.NDArray[Any]) -> float:
    """Mean Jaccard distance of all pairs of piano rolls, 1 - |both| / |either|: 0 for copies, 1 for disjoint rolls.

    ``rolls`` is (N, T, 128), zeros and ones. Two empty rolls are copies. The mean of no pairs is 0.
    """
    cells = np.asarray(rolls, np.float32).reshape(len(rolls), -1)
    if len(cells) < 2:
        return 0.0
    both, filled = cells @ cells.T, cells.sum(axis=1)
    either = filled[:, None] + filled[None] - both
    alike = np.where(either > 0, both / np.maximum(either, 1), 1.0)
    return float(1 - alike[np.triu_indices(len(cells), 1)].mean())


def distinct_ngrams(pieces: Sequence[ScoreTick], n: int = 4) -> float:
    """Number of different n-grams of notes in ``pieces`` over the number of all, 0 to 1; 0 if there are none.

    A note is encoded as its interval and onset difference to the note before it and its duration, both times in
    twelfths of a quarter note, so transposition and position do not matter. n such notes in a row (with the note
    before them, n + 1 notes) are an n-gram.
    """
    grams = np.concatenate([np.empty(0, np.uint64), *(_runs(piece, n) for piece in pieces)])
    return len(np.unique(grams)) / max(len(grams), 1)


def nearest(pieces: Sequence[ScoreTick], corpus_pieces: Iterable[ScoreTick], *, chunk: int = 2048) -> Nearest:
    """For each of ``pieces``, the most similar of ``corpus_pieces`` (read once, in order): is it composed or copied?

    Two measures, both independent of transposition: how similar the openings are (``symbolic_vector``, the best of
    twelve rotations of the pitch classes), and which runs of ``RUN`` transitions (nine notes, as in
    ``distinct_ngrams``) occur anywhere in a corpus piece. An empty piece is similar only to empty corpus pieces, and
    copies nothing.
    """
    count = len(pieces)
    vectors = np.stack([symbolic_vector(piece) for piece in pieces]) if count else np.empty((0, BEATS * PER_BEAT * 12))
    cells = vectors.reshape(count, BEATS * PER_BEAT, 12)
    turned = np.concatenate([np.roll(cells, shift, axis=2) for shift in range(12)]).reshape(
        12 * count, BEATS * PER_BEAT * 12
    )
    empty = ~vectors.any(axis=1)
    runs = [_runs(piece, RUN) for piece in pieces]
    owner = np.repeat(np.arange(count), [len(part) for part in runs])  # the piece of each run
    wanted = np.concatenate([np.empty(0, np.uint64), *runs])
    found = np.zeros(len(wanted), bool)
    index, best, longest = np.full(count, -1), np.full(count, -1.0), np.zeros(count, np.int64)
    begin = 0
    corpus = iter(corpus_pieces)
    while batch := list(itertools.islice(corpus, chunk)):
        theirs = np.stack([symbolic_vector(piece) for piece in batch])
        similar = np.clip(turned @ theirs.T, 0, 1).reshape(12, count, len(batch)).max(axis=0).astype(np.float64)
        similar[np.ix_(empty, ~theirs.any(axis=1))] = 1
        if count:
            most = similar.argmax(axis=1)
            value = similar[np.arange(count), most]
            index, best = np.where(value > best, begin + most, index), np.maximum(best, value)
        for piece in batch:
            hit = np.isin(wanted, _runs(piece, RUN))
            if hit.any():
                found |= hit
                longest = np.maximum(longest, _longest_streaks(hit, owner, count))
        begin += len(batch)
    runs_of = np.bincount(owner, minlength=count)
    copied = np.bincount(owner, weights=found, minlength=count) / np.maximum(runs_of, 1)
    return Nearest(index, np.maximum(best, 0.0), copied, np.where(longest > 0, longest + RUN, 0))


def summary(
    scores: Sequence[ScoreTick],
    audio: Sequence[npt.NDArray[Any] | None] | None = None,
    sample_rate: int | None = None,
    groups: Sequence[Hashable] | None = None,
) -> dict[str, float]:
    """These measures over all pieces, by name: ``vendi``, ``distance``, ``distinct_4grams``, ``empty_rate``.

    ``audio`` (one clip per piece; None if it is missing) adds ``vendi_audio``. ``groups`` (one label per piece, such as
    its prompt) adds ``*_within``: the mean over groups of each measure within a group; groups without a clip are left
    out of ``vendi_audio_within``. Raises ``ValueError`` if there is no piece, or if the lengths differ.
    """
    count = len(scores)
    if not count or any(part is not None and len(part) != count for part in (audio, groups)):
        raise ValueError(f"expected at least one piece, and one clip and label per piece, got {count} pieces")
    if audio is not None and sample_rate is None:
        raise ValueError("audio needs a sample_rate")
    vectors = np.stack([symbolic_vector(score) for score in scores])
    rolls = np.stack([piano_roll(score) for score in scores])
    heard = {
        row: audio_vector(clip, sample_rate)
        for row, clip in enumerate(audio or ())
        if clip is not None and sample_rate is not None
    }

    def measure(rows: Sequence[int]) -> dict[str, float]:
        found = {
            "vendi": vendi_score(kernel(vectors[rows])),
            "distance": mean_pairwise_distance(rolls[rows]),
            "distinct_4grams": distinct_ngrams([scores[row] for row in rows]),
        }
        if clips := [heard[row] for row in rows if row in heard]:
            found["vendi_audio"] = vendi_score(kernel(np.stack(clips)))
        return found

    result = measure(range(count)) | {
        "empty_rate": float(np.mean([not len(_notes(score)["time"]) for score in scores]))
    }
    if groups is not None:
        members: dict[Hashable, list[int]] = {}
        for row, label in enumerate(groups):
            members.setdefault(label, []).append(row)
        within = [measure(rows) for rows in members.values()]
        for name in [name for name in result if name != "empty_rate"]:
            values = [found[name] for found in within if name in found]
            result[f"{name}_within"] = float(np.mean(values))
    return result


def alikeness(pieces: list[Any], group_size: int) -> torch.Tensor:
    """Similarities (B, G, G) float32, 0 to 1, within each group; ``pieces`` are N = B x G scores, group after group."""
    vectors = [symbolic_vector(piece) for piece in pieces]
    groups = [vectors[first : first + group_size] for first in range(0, len(vectors), group_size)]
    return torch.from_numpy(np.stack([kernel(np.stack(group)) for group in groups])).float()


def distinct_rewards(rewards: torch.Tensor, alike: torch.Tensor, *, weight: float) -> torch.Tensor:
    """Rewards (N,) with a bonus for differing from the rest of the group: r_i + weight (1 - mean of k_ij over j != i).

    ``alike`` (B, G, G) holds the similarities k, 0 to 1, within each group, N = B x G. Both completions in k come from
    the policy, so the gradient of these rewards is that of E[r] + weight/2 Q, where Q = E[1 - k(o, o')] is Rao's
    quadratic entropy (Rao 1982, "Diversity and dissimilarity coefficients"). A group whose members are all equally
    similar gets the same advantages as in plain GRPO. DRA-GRPO (Chen et al. 2025) divides rewards by 1 + sum of k_ij
    instead, which would drown ratings of about 7 that differ by 0.3. Rewards that are not finite stay so, and do not
    count as members of their group.
    """
    if alike.ndim != 3 or alike.shape[1] != alike.shape[2] or alike.shape[:2].numel() != len(rewards):
        raise ValueError(f"alike: expected (B, G, G) for {len(rewards)} rewards, got {tuple(alike.shape)}")
    rated = rewards.view(alike.shape[:2]).isfinite()
    others = rated[:, None, :] & ~torch.eye(alike.shape[1], dtype=torch.bool, device=alike.device)
    mean = alike.where(others, 0).sum(dim=2) / others.sum(dim=2).clamp(min=1)
    return rewards + weight * (1 - mean).flatten()


def _notes(score: ScoreTick) -> dict[str, npt.NDArray[np.int64]]:
    """Columns time, duration and pitch of all notes except drums."""
    columns = [track.notes.numpy() for track in score.tracks if not track.is_drum]
    none = np.empty(0, np.int64)
    return {
        name: np.concatenate([none, *(part[name] for part in columns)]).astype(np.int64)
        for name in ("time", "duration", "pitch")
    }


def _runs(score: ScoreTick, n: int) -> Hashes:
    """A 64-bit hash of each n transitions in a row, (max(notes - n, 0),); equal runs have equal hashes."""
    notes, division = _notes(score), score.ticks_per_quarter
    order = np.lexsort((notes["duration"], notes["pitch"], notes["time"]))
    time, duration, pitch = (notes[name][order] for name in ("time", "duration", "pitch"))
    if len(pitch) <= n:
        return np.empty(0, np.uint64)
    # differences first, then rounding (half up, to STEPS per quarter): independent of the passage's position
    onset, length = ((ticks * 2 * STEPS + division) // (2 * division) for ticks in (np.diff(time), duration[1:]))
    code = np.diff(pitch) + 128 | np.minimum(onset, 0xFFFF) << 8 | np.minimum(length, 0xFFFF) << 24
    mixed = code.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)  # overflow is intended: a multiplicative hash
    mixed ^= mixed >> np.uint64(29)
    total = np.zeros(len(code) - n + 1, np.uint64)
    for step in range(n):
        total = total * np.uint64(0xBF58476D1CE4E5B9) + mixed[step : len(mixed) - n + 1 + step]
        total ^= total >> np.uint64(32)
    return total


def _longest_streaks(hit: npt.NDArray[np.bool_], owner: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
    """(count,) length of the longest streak of True in ``hit`` for each owner; ``owner`` is sorted."""
    same = np.append(False, (owner[1:] == owner[:-1]) & hit[1:] & hit[:-1])
    place = np.arange(len(hit))
    begun = np.maximum.accumulate(np.where(same, 0, place))  # where the current streak began
    longest = np.zeros(count, np.int64)
    np.maximum.at(longest, owner[hit], (place - begun + 1)[hit])
    return longest


def _mel_filters(size: int, sample_rate: int) -> Floats:
    """(size // 2 + 1, MEL_BANDS) triangles, evenly spaced on the mel scale."""

    def mel(hertz: Any) -> Any:
        return 2595 * np.log10(1 + np.asarray(hertz) / 700)

    lowest, highest = mel(MEL_HZ)
    edges = np.linspace(lowest, highest, MEL_BANDS + 2)
    bins = mel(np.fft.rfftfreq(size, 1 / sample_rate))[:, None]
    rising, falling = (bins - edges[:-2]) / (edges[1] - edges[0]), (edges[2:] - bins) / (edges[1] - edges[0])
    return np.maximum(np.minimum(rising, falling), 0).astype(np.float32)


def _unit(vector: npt.NDArray[Any]) -> Floats:
    length = float(np.sqrt((vector.astype(np.float64) ** 2).sum()))
    return (vector / (length or 1.0)).astype(np.float32)
