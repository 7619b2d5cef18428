"""``reference``: how near a clip is to the user's own pieces, in the space of an embedding.

    load_reward("reference", folder="my-pieces")

With c the mean of the unit embeddings of the excerpts in the folder, a clip with embedding e rates

    5.5 + 4.5 cos(e, c) min(1, (R / |e|)^2)

so that 10 points in the direction of the folder's mean, and 1 in the opposite one. R is the length that a tenth of the
folder's embeddings exceed: noise may have the right direction, but lies further out than music. Silence rates 1.

An ear's embedding is centred on real music, so this direction is how the folder differs from other music.
``frechet_distance`` compares two whole sets, for reports. An embedding is "clap", or that of a reward with a method
``embed``, by default ``EMBEDDING``.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch

from smart import UserError, brief
from smart.render import checked_soundfont
from smart.reward import load_reward
from smart.reward.precision import exact_float32
from smart.reward.real import find_pieces, read_excerpts
from smart.reward.resampling import resample
from smart.reward.reward import Reward, check_device

EMBEDDING = "naturalness"  # the kind of the reward whose embedding is the default
CLAP = "laion/clap-htsat-unfused"
LOWEST, HIGHEST = 1.0, 10.0
TOGETHER = 8  # clips embedded at once
SECONDS = 10.0  # of an excerpt

Vectors = npt.NDArray[np.float64]


@runtime_checkable
class Embedder(Protocol):
    """What makes vectors of clips: a reward with a method ``embed``, or ``Clap``."""

    sample_rate: int
    provenance: str

    def embed(self, audio: torch.Tensor) -> torch.Tensor:
        """(N, D) float32 vectors of mono clips (N, S) float32 at ``sample_rate``."""
        ...


class Clap:
    """The audio embedding of a CLAP model (Wu et al. 2023), through transformers, at 48 kHz.

    ``model`` is a hub id or a folder with ``config.json``, ``model.safetensors`` (or ``pytorch_model.bin``) and
    ``preprocessor_config.json``.
    """

    sample_rate = 48000

    def __init__(self, model: str = CLAP, *, device: str | torch.device = "cpu") -> None:
        from transformers import ClapFeatureExtractor, ClapModel

        self.device = check_device(device)
        try:
            loaded: Any = ClapModel.from_pretrained(model)
            self._extract: Any = ClapFeatureExtractor.from_pretrained(model)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"CLAP model {model} cannot be loaded ({brief(error)}); give the folder of a download as "
                "reward.options.model"
            ) from error
        self._model = loaded.to(self.device).eval()
        self.sample_rate = int(self._extract.sampling_rate)
        self.provenance = f"CLAP {model}"

    @exact_float32()
    @torch.inference_mode()
    def embed(self, audio: torch.Tensor) -> torch.Tensor:
        # a clip longer than the model's window would be cropped at random: only its beginning is heard
        most = int(self._extract.nb_max_samples)
        waves = list(audio[:, :most].cpu().numpy())
        features = self._extract(waves, sampling_rate=self.sample_rate, return_tensors="pt")
        found = self._model.get_audio_features(**{name: value.to(self.device) for name, value in features.items()})
        return (found if isinstance(found, torch.Tensor) else found.pooler_output).float()


def load_embedder(kind: str, *, device: str | torch.device = "cpu", model: str = "") -> Embedder:
    """An embedding by name: "clap", or the kind of a reward that has one; ``model`` is for CLAP.

    Raises ``UserError`` if there is no such reward, or if it has no embedding.
    """
    if kind == "clap":
        return Clap(model or CLAP, device=device)
    if model:
        raise UserError(f'reference: model = {model!r} is for embedding = "clap", not for "{kind}"')
    reward = load_reward(kind, device=device)
    if not isinstance(reward, Embedder):
        raise UserError(f'reference: reward "{kind}" has no embedding; expected "{EMBEDDING}" or "clap"')
    return reward


def embed_clips(embedder: Embedder, clips: Sequence[tuple[npt.NDArray[np.float32], int]]) -> torch.Tensor:
    """(N, D) float32 vectors of clips (audio (S,), sample rate), in order; no vector depends on the other clips."""
    waves = [resample(torch.from_numpy(audio), rate, embedder.sample_rate) for audio, rate in clips]
    return _embed(embedder, waves)


def _embed(embedder: Embedder, waves: Sequence[torch.Tensor]) -> torch.Tensor:
    """Clips of the same length are embedded together, without padding, which would be heard."""
    rows: dict[int, list[int]] = {}
    for row, wave in enumerate(waves):
        rows.setdefault(len(wave), []).append(row)
    vectors: dict[int, torch.Tensor] = {}
    for alike in rows.values():
        for begin in range(0, len(alike), TOGETHER):
            part = alike[begin : begin + TOGETHER]
            found = embedder.embed(torch.stack([waves[row] for row in part]))
            if found.ndim != 2 or len(found) != len(part):
                raise ValueError(f"embed: expected ({len(part)}, D), got {tuple(found.shape)}")
            vectors |= dict(zip(part, found.float().cpu(), strict=True))
    return torch.stack([vectors[row] for row in range(len(waves))])


def frechet_distance(one: Vectors, other: Vectors) -> float:
    """Frechet distance of two sets of vectors, (N, D) and (M, D), as if each were normal (Heusel et al. 2017).

    |mean - mean'|^2 + trace(C + C' - 2 (C C')^(1/2)), C with N - 1. It is biased upwards for few vectors: compare only
    sets of the same size. NaN if a set has fewer than two vectors.
    """
    if min(len(one), len(other)) < 2:
        return math.nan
    one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
    gap = one.mean(0) - other.mean(0)
    # the trace of (C C')^(1/2) is the sum of the singular values of A B^T with C = A^T A and C' = B^T B
    a, b = ((each - each.mean(0)) / math.sqrt(len(each) - 1) for each in (one, other))
    together = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return float(max(gap @ gap + (a**2).sum() + (b**2).sum() - 2 * together, 0.0))


class Nearness(Reward):
    """Nearness to a folder of MIDI or audio files.

    Args:
        folder: excerpts of ten seconds are taken from its files (``smart.reward.real``).
        embedding: "clap", or the kind of a reward with an embedding.
        model: for CLAP, a hub id or a folder.
        soundfont: plays the MIDI files; choose the run's.
    """

    axes = ("NEAR",)

    def __init__(
        self,
        folder: str,
        *,
        embedding: str = EMBEDDING,
        model: str = "",
        soundfont: str = "timgm",
        device: str | torch.device = "cpu",
    ) -> None:
        files = find_pieces(folder)
        self.embedder = load_embedder(embedding, device=device, model=model)
        self.sample_rate = self.embedder.sample_rate
        super().__init__(device=device)
        self.vectors = self._read(files, checked_soundfont(soundfont))  # (M, D) of the folder's excerpts
        self.centre = _unit(self.vectors).mean(dim=0)
        self.reach = self.vectors.norm(dim=1).quantile(0.9)
        names = hashlib.sha256("\n".join(path.name for path in files).encode()).hexdigest()[:12]
        self.provenance = (
            f"nearness to {len(self.vectors)} excerpts of {Path(folder).name} (names {names}) in {embedding}: "
            f"{self.embedder.provenance}"
        )

    def _read(self, files: Sequence[Path], soundfont: Path) -> torch.Tensor:
        excerpts = list(read_excerpts(files, [soundfont], sample_rate=44100, seconds=SECONDS))
        if len(excerpts) < 2:
            raise UserError(f"reference: {len(excerpts)} of {len(files)} files can be heard; expected at least 2")
        vectors = embed_clips(self.embedder, excerpts)
        if not vectors.isfinite().all():
            raise UserError("reference: the embedding of a file in the folder is not finite; find and remove that file")
        return vectors

    def embed(self, audio: torch.Tensor) -> torch.Tensor:
        """(N, D) vectors of clips (N, S): those of the embedding."""
        return self.embedder.embed(audio)

    def rate(self, audio: torch.Tensor, lengths: torch.Tensor) -> Mapping[str, torch.Tensor]:
        vectors = _embed(self.embedder, [wave[:length] for wave, length in zip(audio, lengths.tolist(), strict=True)])
        cosine = torch.nn.functional.cosine_similarity(vectors, self.centre[None], dim=1)
        near = cosine * (self.reach / vectors.norm(dim=1)).clamp(max=1).square()
        rating = (LOWEST + (HIGHEST - LOWEST) * (near + 1) / 2).clamp(LOWEST, HIGHEST).float()
        return {"NEAR": rating.where(audio.cpu().abs().amax(dim=1) > 0, LOWEST)}


def _unit(vectors: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(vectors, dim=1)
