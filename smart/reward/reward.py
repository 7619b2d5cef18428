"""``Reward``: what every reward is; a subclass only rates clips that have been checked.

``NoteReward`` is for rewards that rate the notes of a piece rather than its audio.
"""

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from smart import UserError


class Reward:
    """Base class of every reward; a subclass sets the attributes and implements ``rate``.

    Attributes:
        axes: names of the ratings, most important first; ``combine`` uses the first alone by default.
        sample_rate: the sample rate in Hz that ``score`` expects (``resample`` converts).
        provenance: one line for the log: which weights, from where, which revision or hash.
        reads_notes: True for a reward that needs the notes of a clip (``NoteReward``).
        is_stand_in: True for an approximation of another rating; every log then says so.
        together: the number of neighbouring clips that a run rates at once. 1: the rating of a clip does not depend on
            the others of its batch, not in a single bit, so each is rated as soon as it arrives.
        name: the reward's name in messages; ``load_reward`` sets it to the requested kind.
        device: the device on which ``rate`` gets its audio.
        weights: axis -> its weight in ``combine``.
    """

    axes: tuple[str, ...] = ()
    sample_rate: int = 0
    provenance: str = ""
    reads_notes: bool = False
    is_stand_in: bool = False
    together: int = 16

    def __init__(self, *, device: str | torch.device = "cpu") -> None:
        self.name = type(self).__name__
        self.device = check_device(device)
        if not self.axes or self.sample_rate <= 0:
            raise TypeError(
                f"reward {self.name} must set axes (got {self.axes!r}) and sample_rate (got {self.sample_rate!r})"
            )
        self.weights: dict[str, float] = {self.axes[0]: 1.0}

    def rate(self, audio: torch.Tensor, lengths: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """Rate clips that ``score`` has checked; a subclass implements this.

        Args:
            audio: (N, S) float32 on ``self.device``, N >= 1, finite; samples past a clip's length are 0.
            lengths: (N,) int64 on the CPU, samples of each clip, 1 to S.

        Returns:
            axis -> (N,) float32 on any device; NaN where a clip could not be rated.
        """
        raise NotImplementedError(f"reward {self.name} does not implement rate(audio, lengths)")

    @torch.inference_mode()
    def score(self, audio: torch.Tensor, lengths: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Rate a batch of clips on every axis.

        Args:
            audio: (N, S) float32, mono, at ``self.sample_rate``, on any device.
            lengths: (N,) int64, samples that belong to each clip, 0 to S; None: all S. Samples past a clip's
                length are ignored.

        Returns:
            axis -> (N,) float32 on the device of ``audio``; NaN for a clip of length 0, for one that holds a
            NaN or an infinity, and for one that the reward could not rate.

        Raises:
            TypeError, ValueError: an argument has another type or shape, or the reward's ``rate`` returned
                something other than documented.
        """
        lengths = check_clips(audio, lengths)
        clips, sound = silence_beyond(audio, lengths)
        scores = {
            axis: torch.full((len(audio),), math.nan, dtype=torch.float32, device=audio.device) for axis in self.axes
        }
        rows = sound.nonzero().squeeze(1)
        if len(rows) == 0:
            return scores
        if len(rows) < len(audio):
            clips = clips[rows.to(clips.device)]
        rated = self._check_rated(self.rate(clips.to(self.device), lengths[rows]), len(rows))
        for axis in self.axes:
            values = rated[axis].to(audio.device)
            scores[axis][rows.to(audio.device)] = torch.where(values.isfinite(), values, math.nan)
        return scores

    def combine(self, scores: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The value that training optimises: sum(w * s) / sum(|w|) over the weighted axes, (N,) float32.

        ``scores`` is the result of ``score``. A clip with a NaN on a weighted axis is NaN; axes with weight 0
        are ignored.
        """
        weights = {axis: w for axis, w in self.weights.items() if w != 0}
        absent = [axis for axis in weights if axis not in scores]
        if absent:
            raise ValueError(f"scores for reward {self.name} lack {absent}; got {list(scores)}")
        total = sum(abs(w) for w in weights.values())
        combined = torch.stack([scores[axis].float() * (w / total) for axis, w in weights.items()])
        return combined.sum(dim=0)

    def set_weights(self, weights: Mapping[str, float] | None) -> None:
        """Set the weights of ``combine``; None: the first axis alone.

        A negative weight rewards low ratings on its axis.

        Raises:
            UserError: an unknown axis, a weight that is not a finite number, or no weight other than 0.
        """
        self.weights = _check_weights(self.name, self.axes, {self.axes[0]: 1.0} if weights is None else weights)

    def _check_rated(self, rated: Any, count: int) -> Mapping[str, torch.Tensor]:
        """The result of a subclass's ``rate``; an error names the reward if it is malformed."""
        if not isinstance(rated, Mapping) or set(rated) != set(self.axes):
            got = sorted(rated) if isinstance(rated, Mapping) else type(rated).__name__
            raise ValueError(f"reward {self.name}: rate must return a mapping of the axes {list(self.axes)}, got {got}")
        for axis, values in rated.items():
            if not isinstance(values, torch.Tensor):
                raise TypeError(f"reward {self.name}: axis {axis} must be a tensor, got {type(values).__name__}")
            if values.shape != (count,) or values.dtype != torch.float32:
                raise ValueError(
                    f"reward {self.name}: axis {axis} must be float32 of shape ({count},), "
                    f"got {values.dtype} of shape {tuple(values.shape)}"
                )
        return rated


class NoteReward(Reward):
    """Base class of rewards that rate notes, not audio; a subclass sets ``axes`` and implements ``rate_notes``.

    It has every other attribute and method of a ``Reward``, but cannot rate clips.
    """

    sample_rate = 16000  # Hz; of no importance
    together = 1
    reads_notes = True

    def rate_notes(self, pieces: Sequence[Any]) -> Mapping[str, torch.Tensor]:
        """Rate N >= 1 pieces (``symusic.Score`` in ticks); returns axis -> (N,) float32 as ``Reward.rate`` does."""
        raise NotImplementedError(f"reward {self.name} does not implement rate_notes(pieces)")

    @torch.inference_mode()
    def score_notes(self, pieces: Sequence[Any]) -> dict[str, torch.Tensor]:
        """Rate a batch of N pieces on every axis: axis -> (N,) float32, NaN where a piece could not be rated.

        Raises ``TypeError`` or ``ValueError`` if ``rate_notes`` returned something other than documented.
        """
        if not pieces:
            return {axis: torch.empty(0) for axis in self.axes}
        rated = self._check_rated(self.rate_notes(pieces), len(pieces))
        return {axis: torch.where(rated[axis].isfinite(), rated[axis], math.nan) for axis in self.axes}

    def rate(self, audio: torch.Tensor, lengths: torch.Tensor) -> dict[str, torch.Tensor]:
        raise UserError(f'reward "{self.name}" rates notes, so it cannot rate audio')


def check_device(device: str | torch.device) -> torch.device:
    """The device; ``UserError`` if this machine does not have it."""
    try:
        checked = torch.device(device)
    except RuntimeError:
        raise UserError(f'there is no device "{device}"; write cpu, cuda, cuda:0 or mps') from None
    if checked.type == "cuda" and (not torch.cuda.is_available() or (checked.index or 0) >= torch.cuda.device_count()):
        raise UserError(
            f'device "{device}" is not available ({torch.cuda.device_count()} CUDA devices are visible); '
            "choose cpu or another one"
        )
    if checked.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(f'device "{device}" is not available: PyTorch sees no Apple GPU; choose cpu')
    return checked


def _check_weights(name: str, axes: tuple[str, ...], weights: Any) -> dict[str, float]:
    """The weights as floats; a ``UserError`` names the wrong axis and the possible ones."""
    choices = ", ".join(axes)
    if not isinstance(weights, Mapping):
        raise UserError(
            f'weights of reward "{name}" must be a table of axis = number, got {weights!r}; its axes are: {choices}'
        )
    for axis, weight in weights.items():
        if axis not in axes:
            raise UserError(f'reward "{name}" has no axis "{axis}"; its axes are: {choices}')
        number = isinstance(weight, numbers.Real) and not isinstance(weight, bool)
        if not number or not math.isfinite(weight):
            raise UserError(f'the weight of axis {axis} of reward "{name}" must be a finite number, got {weight!r}')
    if not any(weights.values()):
        raise UserError(f'reward "{name}" needs a weight other than 0 on at least one of its axes: {choices}')
    return {axis: float(weight) for axis, weight in weights.items()}


def check_clips(audio: Any, lengths: Any) -> torch.Tensor:
    """Lengths (N,) int64 on the CPU, after checking both arguments of ``Reward.score``."""
    if not isinstance(audio, torch.Tensor) or audio.dtype != torch.float32:
        got = audio.dtype if isinstance(audio, torch.Tensor) else type(audio).__name__
        raise TypeError(f"audio must be a float32 tensor (N, S), got {got}")
    if audio.ndim != 2:
        raise ValueError(f"audio must have the shape (N, S), mono, got {tuple(audio.shape)}")
    count, samples = audio.shape
    if lengths is None:
        return torch.full((count,), samples, dtype=torch.int64)
    if not isinstance(lengths, torch.Tensor) or lengths.dtype != torch.int64:
        got = lengths.dtype if isinstance(lengths, torch.Tensor) else type(lengths).__name__
        raise TypeError(f"lengths must be an int64 tensor (N,), got {got}")
    if lengths.shape != (count,):
        raise ValueError(f"lengths must have the shape ({count},), one per clip, got {tuple(lengths.shape)}")
    lengths = lengths.cpu()
    if bool(((lengths < 0) | (lengths > samples)).any()):
        raise ValueError(f"lengths must lie in 0..{samples} (S), got {int(lengths.min())}..{int(lengths.max())}")
    return lengths


def silence_beyond(audio: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Audio (N, S) with zeros past each clip's length, and which clips can be rated: (N,) bool on the CPU."""
    samples = audio.shape[1]
    if bool((lengths < samples).any()):
        beyond = torch.arange(samples, device=audio.device) >= lengths.to(audio.device)[:, None]
        audio = audio.masked_fill(beyond, 0.0)
    return audio, audio.isfinite().all(dim=1).cpu() & (lengths > 0)
