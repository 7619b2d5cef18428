"""Ears: small networks that tell piano music from its corruptions, as rewards ``naturalness`` and ``naturalness_mel``.

A network hears the spectra of ten seconds (``smart.reward.spectra``) and answers one number, trained so that it is
higher for a real excerpt than for a corruption (``python -m smart.reward.naturalness train``). A few networks form an
ear; the least of their answers counts, so that a policy gains nothing in one member's blind spot. With members
standardised to the real excerpts held out in training, the rating on the axis NA is

    NA = 1 + 9 sigmoid(scale * min over members + offset)

where scale and offset put the median real excerpt at 7 and the median corruption at 3.

The file of an ear is a safetensors file: float16 weights, and everything else as JSON in its metadata.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn

from smart import UserError
from smart.files import parse_json, write_atomically
from smart.reward.precision import exact_float32
from smart.reward.reward import Reward, check_clips, silence_beyond
from smart.reward.spectra import KINDS, SAMPLE_RATE, WINDOW, hear

__all__ = ["AXIS", "LAYOUTS", "Ear", "Layout", "MelEar", "Network", "Scale", "channels_last", "save_ear"]

AXIS = "NA"
LOWEST, HIGHEST = 1.0, 10.0
FORMAT = "smart.ear"
VERSION = 2
SHIPPED = Path(__file__).with_name("ears")
HIDDEN = 64  # width of the layer before the answer


@dataclass(frozen=True)
class Layout:
    """The shape of a network: what it hears, and its two-dimensional convolutions."""

    spectra: str  # a kind of smart.reward.spectra
    channels: tuple[int, ...]
    kernels: tuple[tuple[int, int], ...]  # semitones or bands, frames
    strides: tuple[tuple[int, int], ...]
    width: int  # channels of the layers along time
    dilations: tuple[int, ...] = (1, 2, 4, 8)
    heads: int = 4


LAYOUTS = {
    "log": Layout("log", (16, 32, 64), ((13, 3), (3, 3), (3, 3)), ((1, 2), (2, 1), (2, 1)), 96, (1, 2, 4, 8, 16)),
    "mel": Layout("mel", (16, 32, 64), ((7, 5), (3, 3), (3, 3)), ((2, 2), (2, 2), (2, 1)), 96),
}


class Network(nn.Module):
    """Spectra (N, channels, bands, frames), uint8 -> one number and an embedding per clip.

    Convolutions over bands and frames, one over all bands, then layers along time: dilated convolutions, and attention,
    which hears what comes back. Statistics over time close it.
    """

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout
        wide, bands, _ = KINDS[layout.spectra]
        stages: list[nn.Module] = []
        for channels, kernel, stride in zip(layout.channels, layout.kernels, layout.strides, strict=True):
            padding = (kernel[0] // 2, kernel[1] // 2)
            stages += [
                nn.Conv2d(wide, channels, kernel, stride, padding, bias=False),
                nn.BatchNorm2d(channels),
                nn.ReLU(),
            ]
            wide, bands = channels, (bands + 2 * padding[0] - kernel[0]) // stride[0] + 1
        stages += [nn.Conv2d(wide, layout.width, (bands, 1), bias=False), nn.BatchNorm2d(layout.width), nn.ReLU()]
        self.pattern = nn.Sequential(*stages)
        self.along = nn.ModuleList(
            nn.Sequential(
                nn.Conv1d(layout.width, layout.width, 3, padding=dilation, dilation=dilation, bias=False),
                nn.BatchNorm1d(layout.width),
                nn.ReLU(),
            )
            for dilation in layout.dilations
        )
        self.norm = nn.LayerNorm(layout.width)
        self.attend = nn.Linear(layout.width, 3 * layout.width)
        self.attended = nn.Linear(layout.width, layout.width)
        self.describe = nn.Linear(3 * layout.width, HIDDEN)
        self.answer = nn.Linear(HIDDEN, 1)
        self.dropout = nn.Dropout(0.1)
        self.origin: torch.Tensor
        self.register_buffer("origin", torch.zeros(3 * layout.width))  # mean statistics of real music

    def statistics(self, spectra: torch.Tensor) -> torch.Tensor:
        """Mean, maximum and standard deviation over time of each channel, (N, 3 * width)."""
        x = self.pattern(spectra.to(self.answer.weight.dtype) * (1 / 128) - 0.5).squeeze(2)  # (N, W, T)
        for layer in self.along:
            x = x + layer(x)
        x = x.transpose(1, 2)  # (N, T, W)
        split = self.attend(self.norm(x)).unflatten(2, (3, self.layout.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(*split.unbind(0))  # (N, H, T, W / H)
        x = x + self.attended(mixed.transpose(1, 2).flatten(2))
        return torch.cat([x.mean(dim=1), x.amax(dim=1), x.float().std(dim=1).to(x)], dim=1)

    def embed(self, spectra: torch.Tensor) -> torch.Tensor:
        """How the statistics differ from those of real music in general, (N, 3 * width).

        The layer before the answer holds hardly more than the answer: all music points the same way there.
        """
        return self.statistics(spectra) - self.origin

    def forward(self, spectra: torch.Tensor) -> torch.Tensor:
        """The answer, (N,): higher for music, without a scale."""
        hidden = nn.functional.gelu(self.describe(self.dropout(self.statistics(spectra))))
        return self.answer(hidden).squeeze(1)

    def fused(self) -> "Network":
        """A copy for use, in which each batch normalisation is part of its convolution."""
        copy = Network(self.layout)
        copy.load_state_dict(self.state_dict())
        copy.eval()
        for stage in (copy.pattern, *copy.along):
            for place, layer in enumerate(stage):
                if isinstance(layer, nn.BatchNorm2d | nn.BatchNorm1d):
                    stage[place - 1] = nn.utils.fusion.fuse_conv_bn_eval(stage[place - 1], layer)
                    stage[place] = nn.Identity()
        return copy


@dataclass(frozen=True)
class Scale:
    """From the members' answers to ratings."""

    mean: tuple[float, ...]  # of each member's answers to real excerpts
    deviation: tuple[float, ...]
    factor: float
    offset: float

    def rating(self, answers: torch.Tensor) -> torch.Tensor:
        """Ratings (N,) float32 of the members' answers (N, M)."""
        standard = (answers.cpu().double() - torch.tensor(self.mean)) / torch.tensor(self.deviation)
        inside = torch.sigmoid(self.factor * standard.amin(dim=1) + self.offset)
        return (LOWEST + (HIGHEST - LOWEST) * inside).float()


class Ear(Reward):
    """How much a clip sounds like piano music that somebody wrote or played, rather than like a corruption of it.

    Longer clips are heard in windows of 10 s, whose ratings are averaged, weighted by length; silence follows a shorter
    one. A window without sound is rated 1. Each clip is heard alone, so that its rating does not depend on the batch.

    Args:
        model: file written by ``python -m smart.reward.naturalness train``; None: the one that ships.
        device: the device on which spectra and networks are computed.

    Attributes:
        real: axis -> the median rating of real excerpts that were held out in training.
        real_by_soundfont: soundfont -> the same through this soundfont alone; by short name where it has one.
        facts: what the training wrote about itself: data, corruptions heard, figures.

    Raises:
        UserError: the file is missing or was not written by the training program.
    """

    axes = (AXIS,)
    sample_rate = SAMPLE_RATE
    together = 1  # clips are heard one at a time
    shipped = "naturalness"

    def __init__(self, *, model: str | os.PathLike[str] | None = None, device: str | torch.device = "cpu") -> None:
        super().__init__(device=device)
        path = Path(SHIPPED / f"{self.shipped}.safetensors" if model is None else model)
        self._layout, self._scale, self.facts, members, digest = _load(path)
        self._members = [member.to(self.device) for member in members]
        self.real_by_soundfont: dict[str, dict[str, float]] = {
            name: {AXIS: float(value)} for name, value in self.facts.get("real", {}).items()
        }
        self.real: dict[str, float] = {AXIS: float(self.facts.get("median", math.nan))}
        source = "shipped weights" if model is None else f"weights {model}"
        self.provenance = (
            f"an ear of {len(members)} networks that hear {self._layout.spectra} spectra, trained on "
            f"{self.facts.get('pieces', '?')} pieces; {source}, SHA-256 {digest[:12]}"
        )

    @property
    def spectra(self) -> str:
        """The kind of spectra that it hears: "log" or "mel"."""
        return self._layout.spectra

    def rate(self, audio: torch.Tensor, lengths: torch.Tensor) -> dict[str, torch.Tensor]:
        """Ratings of clips (N, S) of ``lengths`` (N,) samples; {"NA": (N,) float32}."""
        answers, silent, clip, weight = self._answers(audio, lengths)
        rated = torch.where(silent, LOWEST, self._scale.rating(answers))
        total = torch.zeros(len(audio)).index_add(0, clip, weight)
        share = weight / total[clip]  # exactly 1 where a clip is one window, whose rating is then exactly the network's
        return {AXIS: torch.zeros(len(audio)).index_add(0, clip, rated * share)}

    @exact_float32()
    @torch.inference_mode()
    def embed(self, audio: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """How each clip's statistics differ from those of real music: (N, D) float32 on the CPU.

        Arguments as of ``score``; windows of a longer clip are averaged. NaN for clips that ``score`` rates NaN.
        """
        lengths = check_clips(audio, lengths)
        clips, sound = silence_beyond(audio, lengths)
        found = torch.full((len(audio), 3 * self._layout.width * len(self._members)), math.nan)
        for row in sound.nonzero().squeeze(1).tolist():
            windows = list(self._windows(clips[row].to(self.device), int(lengths[row])))
            weight = torch.tensor([float(length) for _, length in windows])
            with self._repeatable():
                each = torch.stack(
                    [torch.cat([m.embed(spectra[None])[0] for m in self._members]) for spectra, _ in windows]
                ).cpu()
            found[row] = (each * (weight / weight.sum())[:, None]).sum(dim=0)
        return found

    @exact_float32()
    def answers(self, spectra: torch.Tensor) -> torch.Tensor:
        """What the members answer to spectra (N, channels, bands, frames) uint8, one clip at a time: (N, M)."""
        with torch.inference_mode(), self._repeatable():
            each = [torch.cat([m(row[None].to(self.device)) for m in self._members]) for row in spectra]
        return torch.stack(each).cpu()

    def _answers(
        self, audio: torch.Tensor, lengths: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of each window: the members' answers (W, M), whether it is silent, its clip and its length."""
        answers, silent, clip, weight = [], [], [], []
        for row, length in enumerate(lengths.tolist()):
            for spectra, samples in self._windows(audio[row], length):
                answers.append(self.answers(spectra[None])[0])
                silent.append(not bool(spectra.any()))
                clip.append(row)
                weight.append(float(samples))
        return torch.stack(answers), torch.tensor(silent), torch.tensor(clip), torch.tensor(weight)

    def _windows(self, clip: torch.Tensor, length: int) -> Sequence[tuple[torch.Tensor, int]]:
        """Spectra and length of each window of a clip."""
        parts = clip[:length].split(WINDOW)
        return [(hear(part, self._layout.spectra), len(part)) for part in parts]

    def _repeatable(self) -> AbstractContextManager[Any]:
        """On a GPU, convolutions always by the same algorithm."""
        if self.device.type != "cuda":
            return nullcontext()
        return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)


class MelEar(Ear):
    """A second ear, trained on other pieces, that hears mel spectra: a judge of what the first one rewards."""

    shipped = "naturalness_mel"


def channels_last(network: Network) -> Network:
    """The same network, with its weights in the order in which a CPU reads them fastest."""
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def save_ear(path: Path, members: Sequence[Network], scale: Scale, facts: Mapping[str, Any]) -> None:
    """Write an ear to one file, whole or not at all."""
    tensors = {
        f"{number}.{name}": value.detach().half().contiguous()
        for number, member in enumerate(members)
        for name, value in member.fused().state_dict().items()
    }
    about = {"layout": asdict(members[0].layout), "members": len(members), "scale": asdict(scale), "facts": dict(facts)}
    text = {"format": FORMAT, "version": str(VERSION), "about": json.dumps(about, allow_nan=False, sort_keys=True)}
    write_atomically(path, safetensors.torch.save(tensors, metadata=text))


def _load(path: Path) -> tuple[Layout, Scale, dict[str, Any], list[Network], str]:
    """Layout, scale, facts, members and SHA-256 of the file of an ear."""
    again = "train it with: python -m smart.reward.naturalness train --midi DIR --soundfonts timgm --out FILE"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"ear {path} cannot be read ({error.strerror}); {again}") from error
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            text = file.metadata() or {}
        tensors = safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise UserError(f"ear {path} is not a safetensors file ({error}); {again}") from error
    if text.get("format") != FORMAT or text.get("version") != str(VERSION):
        raise UserError(f'ear {path}: expected a safetensors file of the format "{FORMAT}" {VERSION}; {again}')
    try:
        about = parse_json(text["about"])
        shape: dict[str, Any] = {
            k: tuple(map(_fixed, v)) if isinstance(v, list) else v for k, v in about["layout"].items()
        }
        layout, numbers = Layout(**shape), about["scale"]
        scale = Scale(
            tuple(map(float, numbers["mean"])),
            tuple(map(float, numbers["deviation"])),
            float(numbers["factor"]),
            float(numbers["offset"]),
        )
        members = []
        for number in range(about["members"]):
            start = f"{number}."
            network = Network(layout).fused()
            network.load_state_dict({k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)})
            members.append(channels_last(network.eval().requires_grad_(False)))
        facts = dict(about["facts"])
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = str(error).splitlines()[0][:100]
        raise UserError(f"ear {path} is damaged ({type(error).__name__}: {reason}); {again}") from error
    return layout, scale, facts, members, hashlib.sha256(data).hexdigest()


def _fixed(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
