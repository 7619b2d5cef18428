"""``resample``: audio at another sample rate, as torchaudio would make it."""

import functools
import math

import torch

from smart import UserError
from smart.reward.precision import exact_float32

# the defaults of torchaudio.functional.resample, which prepared the audio for the published models
LOWPASS_WIDTH = 6  # zero crossings of the sinc kept on either side
ROLLOFF = 0.99  # cut-off as a fraction of the lower Nyquist frequency
MAX_KERNEL = 1 << 25  # entries; 128 MiB in float32


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
    with exact_float32():
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
    return kernel[:, None].to(dtype).to(device), f, width
