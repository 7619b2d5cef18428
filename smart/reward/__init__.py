"""Rewards: they rate audio on named axes, each on a scale from 1 to 10.

A reward takes clips of mono audio (N, S), float32 at the reward's own sample rate, and returns one (N,)
float32 tensor per axis. ``load_reward`` finds one by name: the built-in ``audiobox`` and ``ce_proxy``, or
any that an installed package registers in the entry-point group ``smart.rewards``.

A rating that could not be computed is NaN, never 0, so that averages can leave it out and count it. A clip
is rated NaN if it has no samples, if it holds a NaN or an infinity, or if the reward could not rate it (an
infinite rating counts as NaN, too). Other clips of the batch are unaffected.
"""

import functools
import importlib.metadata
import inspect
import math
import numbers
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import EntryPoint
from typing import Any

import torch

from smart import UserError
from smart.files import parse_json

__all__ = ["ENTRY_POINT_GROUP", "Reward", "available_rewards", "load_reward", "read_options", "resample"]

ENTRY_POINT_GROUP = "smart.rewards"
# entry points, so that a reward's module is imported only when that reward is loaded
BUILT_IN = {
    "audiobox": EntryPoint("audiobox", "smart.reward.audiobox:Audiobox", ENTRY_POINT_GROUP),
    "ce_proxy": EntryPoint("ce_proxy", "smart.reward.ce_proxy:CEProxy", ENTRY_POINT_GROUP),
}

# the defaults of torchaudio.functional.resample, which prepared the audio for the published models
LOWPASS_WIDTH = 6  # zero crossings of the sinc kept on either side
ROLLOFF = 0.99  # cut-off as a fraction of the lower Nyquist frequency
MAX_KERNEL = 1 << 25  # entries; 128 MiB in float32


class Reward:
    """Base class of every reward; a subclass sets the attributes and implements ``rate``.

    Attributes:
        axes: names of the ratings, most important first; ``combine`` uses the first alone by default.
        sample_rate: the sample rate in Hz that ``score`` expects (``resample`` converts).
        provenance: one line for the log: which weights, from where, which revision or hash.
        is_stand_in: True for an approximation of another rating; every log then says so.
        name: the reward's name in messages; ``load_reward`` sets it to the requested kind.
        device: the device on which ``rate`` gets its audio.
        weights: axis -> its weight in ``combine``.
    """

    axes: tuple[str, ...] = ()
    sample_rate: int = 0
    provenance: str = ""
    is_stand_in: bool = False

    def __init__(self, *, device: str | torch.device = "cpu") -> None:
        self.name = type(self).__name__
        self.device = _check_device(device)
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
        lengths = _check_clips(audio, lengths)
        clips, sound = _silence_beyond(audio, lengths)
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


def load_reward(
    kind: str,
    *,
    weights: Mapping[str, float] | None = None,
    device: str | torch.device = "cpu",
    **options: Any,
) -> Reward:
    """Build a reward by name.

    Args:
        kind: ``audiobox``, ``ce_proxy``, or a name that an installed package registers.
        weights: axis -> weight of ``Reward.combine``; None: the reward's first axis.
        device: the device on which the reward computes.
        options: passed to the reward, for example ``model=`` and ``dtype=`` of ``audiobox``.

    Raises:
        UserError: no such kind, axis, option or device; a third-party reward cannot be imported or is not a
            ``Reward``; or the reward itself is not available, for example because its weights are missing.
    """
    factory = _find_factory(kind)
    _check_options(kind, factory, options)
    _check_device(device)
    reward = factory(device=device, **options)
    if not isinstance(reward, Reward):
        raise UserError(
            f'reward "{kind}" built a {type(reward).__name__}, expected a smart.reward.Reward; '
            "this is a bug in the package that registers it"
        )
    reward.name = kind
    reward.set_weights(weights)
    return reward


def read_options(texts: Sequence[str]) -> dict[str, Any]:
    """Options for ``load_reward`` from texts of the form KEY=VALUE, as ``--reward-option`` takes them.

    A value that parses as JSON (a number, true) becomes that value; any other stays text. Raises ``UserError`` if
    a text has another form.
    """
    options = {}
    for text in texts:
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise UserError(f"--reward-option {text!r}: expected KEY=VALUE, for example model=weights/audiobox")
        try:
            options[key] = parse_json(value)
        except ValueError:
            options[key] = value
    return options


def available_rewards() -> dict[str, str]:
    """Every kind that ``load_reward`` knows -> the package that provides it."""
    found = dict.fromkeys(BUILT_IN, "smart")
    for entry in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        found.setdefault(entry.name, _package(entry))
    return found


def resample(audio: torch.Tensor, from_rate: int, to_rate: int) -> torch.Tensor:
    """Change the sample rate by windowed-sinc interpolation, as torchaudio's resample does by default.

    With f and t the two rates divided by their greatest common divisor and B = 0.99 min(f, t), output j is
    sum_i x[i] h(j/t - i/f), where h(u) = (B/f) sinc(B u) cos^2(pi B u / 12) for |B u| < 6 and 0 beyond, and
    x is 0 outside its range (band-limited interpolation: J. O. Smith, "Digital Audio Resampling"). The
    filter is symmetric, so it adds no delay.

    Args:
        audio: (..., S) float32 or float64, any device.
        from_rate: sample rate of ``audio`` in Hz.
        to_rate: sample rate of the result in Hz.

    Returns:
        (..., ceil(S * to_rate / from_rate)), same type and device; ``audio`` itself if the rates are equal.

    Raises:
        TypeError, ValueError: ``audio`` is not a float tensor, or a rate is not a positive whole number.
        UserError: the rates' common divisor is so small that the filter bank would not fit in memory.
    """
    if not isinstance(audio, torch.Tensor) or audio.dtype not in (torch.float32, torch.float64) or audio.ndim < 1:
        got = f"{audio.dtype} {tuple(audio.shape)}" if isinstance(audio, torch.Tensor) else type(audio).__name__
        raise TypeError(f"audio must be a float32 or float64 tensor (..., S), got {got}")
    for rate in (from_rate, to_rate):
        if isinstance(rate, bool) or not isinstance(rate, int) or rate <= 0:
            raise ValueError(f"a sample rate must be a positive whole number of Hz, got {rate!r}")
    if from_rate == to_rate:
        return audio
    samples = audio.shape[-1]
    target = -(-samples * to_rate // from_rate)
    if audio.numel() == 0:
        return audio.new_zeros((*audio.shape[:-1], target))
    # cuDNN rounds float32 convolutions to TensorFloat-32: 10 bits, too few for audio; float64 stays exact
    exact = torch.float64 if audio.is_cuda else audio.dtype
    kernel, stride, width = _resampling_kernel(from_rate, to_rate, exact, audio.device)
    padded = torch.nn.functional.pad(audio.reshape(-1, 1, samples).to(exact), (width, width + stride))
    phases = torch.nn.functional.conv1d(padded, kernel, stride=stride)  # (M, t, frames), t outputs each
    resampled = phases.transpose(1, 2).reshape(*audio.shape[:-1], -1)[..., :target]
    return resampled.to(audio.dtype)


@functools.lru_cache(maxsize=8)
def _resampling_kernel(
    from_rate: int, to_rate: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, int, int]:
    """The filter bank (t, 1, f + 2 width) of ``resample``, its stride f, and width: the taps before a frame."""
    divisor = math.gcd(from_rate, to_rate)
    f, t = from_rate // divisor, to_rate // divisor
    band = min(f, t) * ROLLOFF
    width = math.ceil(LOWPASS_WIDTH * f / band)
    if t * (f + 2 * width) > MAX_KERNEL:
        raise UserError(
            f"cannot resample {from_rate} Hz to {to_rate} Hz: their common divisor {divisor} is too small; "
            "choose a usual sample rate such as 44100 or 48000"
        )
    tap = torch.arange(-width, width + f, dtype=torch.float64) / f  # time of each input, f of them per frame
    phase = torch.arange(t, dtype=torch.float64) / t  # time of each output
    u = ((tap[None, :] - phase[:, None]) * band).clamp(-LOWPASS_WIDTH, LOWPASS_WIDTH)  # the window is 0 at the ends
    kernel = band / f * torch.sinc(u) * torch.cos(math.pi * u / (2 * LOWPASS_WIDTH)) ** 2
    return kernel[:, None].to(device=device, dtype=dtype), f, width


def _find_factory(kind: str) -> Callable[..., Reward]:
    """The callable that builds a kind; built-in names come first and cannot be replaced."""
    third_party = [e for e in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP) if e.name == kind]
    packages = ", ".join(sorted(_package(e) for e in third_party))
    if kind in BUILT_IN:
        if third_party:
            warnings.warn(
                f'package {packages} registers a reward "{kind}", but that name is built in; it is ignored',
                stacklevel=3,
            )
        return BUILT_IN[kind].load()
    if not third_party:
        known = ", ".join(f"{name} ({package})" for name, package in available_rewards().items())
        raise UserError(
            f'there is no reward "{kind}"; choose one of: {known}; installed packages can add more '
            f'in the entry-point group "{ENTRY_POINT_GROUP}"'
        )
    if len(third_party) > 1:
        raise UserError(f'reward "{kind}" is registered by several packages ({packages}); uninstall all but one')
    try:
        factory = third_party[0].load()
    except Exception as error:  # another package's module may raise anything when it is imported
        raise UserError(
            f'reward "{kind}" of package {packages} could not be imported ({type(error).__name__}: {error}); '
            "fix or reinstall that package"
        ) from error
    if not callable(factory):
        raise UserError(
            f'reward "{kind}" of package {packages} is a {type(factory).__name__}, expected a class or a function'
        )
    return factory


def _package(entry: EntryPoint) -> str:
    """Name and version of the distribution that registers an entry point."""
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else entry.module


def _check_options(kind: str, factory: Callable[..., Reward], options: Mapping[str, Any]) -> None:
    """Raise ``UserError`` for an option that the reward does not take, or if a required one is missing."""
    parameters = inspect.signature(factory).parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name != "device"]
    taken = ", ".join(p.name for p in named) or "none"
    if not any(p.kind == p.VAR_KEYWORD for p in parameters):
        for option in options:
            if option not in {p.name for p in named}:
                raise UserError(f'reward "{kind}" has no option "{option}"; its options are: {taken}')
    for parameter in named:
        if parameter.default is parameter.empty and parameter.name not in options:
            raise UserError(f'reward "{kind}" needs the option "{parameter.name}"; its options are: {taken}')


def _check_device(device: str | torch.device) -> torch.device:
    """The device; ``UserError`` if this machine does not have it."""
    try:
        checked = torch.device(device)
    except RuntimeError:
        raise UserError(f'there is no device "{device}"; write cpu, cuda or cuda:0') from None
    if checked.type == "cuda" and (not torch.cuda.is_available() or (checked.index or 0) >= torch.cuda.device_count()):
        raise UserError(
            f'device "{device}" is not available ({torch.cuda.device_count()} CUDA devices are visible); '
            "choose cpu or another one"
        )
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


def _check_clips(audio: Any, lengths: Any) -> torch.Tensor:
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


def _silence_beyond(audio: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Audio (N, S) with zeros past each clip's length, and which clips can be rated: (N,) bool on the CPU."""
    samples = audio.shape[1]
    if bool((lengths < samples).any()):
        beyond = torch.arange(samples, device=audio.device) >= lengths.to(audio.device)[:, None]
        audio = audio.masked_fill(beyond, 0.0)
    return audio, audio.isfinite().all(dim=1).cpu() & (lengths > 0)
