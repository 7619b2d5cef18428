"""The reward of the paper: Meta Audiobox Aesthetics (Tjandra et al. 2025), with the axes CE, CU, PC and PQ.

The network is ``audiobox_aesthetics.model.aes.AesMultiOutput``. This module wraps it as the package's
``AesPredictor`` does, but without importing torchaudio: it cuts a clip into windows of 10 s at 16 kHz, pads the
last one with zeros and masks them, and averages the windows' ratings, weighted by their length and
de-normalised with the checkpoint's mean and standard deviation. Windows are padded to 10 s even if all clips
of a batch are shorter: the encoder's first layer normalises over time, so the zeros affect the rating.
"""

import functools
import hashlib
import numbers
import os
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from smart import UserError, brief, hub
from smart.files import parse_json
from smart.published import REWARD
from smart.reward import Reward
from smart.reward.precision import exact_float32

__all__ = ["Audiobox", "check"]

HUB_ID = REWARD
CHECKPOINT_URL = "https://dl.fbaipublicfiles.com/audiobox-aesthetics/checkpoint.pt"
CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"  # as PyTorchModelHubMixin saves them

AXES = ("CE", "CU", "PC", "PQ")
SAMPLE_RATE = 16_000
WINDOW = 10 * SAMPLE_RATE  # samples; also the hop
FEATURES_AT_A_TIME = 32  # of a window's 499, on a CPU: the first layer then holds 2,000 frames x 512

# the arguments of AesMultiOutput that the original checkpoint stores; its loader ignores the others
CHECKPOINT_ARGUMENTS = (
    "proj_num_layer",
    "proj_ln",
    "proj_act_fn",
    "proj_dropout",
    "nth_layer",
    "use_weighted_layer_sum",
    "precision",
    "normalize_embed",
    "output_dim",
)
# the old and new names of torch for the two parts of a weight-normalised convolution
WEIGHT_NORM_NAMES = (
    (".weight_g", ".parametrizations.weight.original0"),
    (".weight_v", ".parametrizations.weight.original1"),
)


class Audiobox(Reward):
    """Meta Audiobox Aesthetics: content enjoyment, content usefulness, production complexity and quality.

    Args:
        model: a hub id, a folder with config.json and model.safetensors, or the original checkpoint.pt.
        dtype: "float32", like the official predictor, or "bfloat16" (autocast: parameters stay float32).
        batch_size: windows of 10 s per forward pass; a larger one takes more memory and gives the same ratings.
            None: 8 on a GPU, 1 on a CPU, where more would only fill the caches and gain nothing.
        device: the device that holds the network.

    Raises:
        UserError: the weights are not available (the message says where to get them) or an option is wrong.
    """

    axes = AXES
    sample_rate = SAMPLE_RATE

    def __init__(
        self,
        *,
        model: str | os.PathLike[str] = HUB_ID,
        dtype: str = "float32",
        batch_size: int | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        super().__init__(device=device)
        if dtype not in ("float32", "bfloat16"):
            raise UserError(f'dtype of reward "audiobox" must be "float32" or "bfloat16", got {dtype!r}')
        if batch_size is None:
            batch_size = 1 if self.device.type == "cpu" else 8
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise UserError(f'batch_size of reward "audiobox" must be a whole number of at least 1, got {batch_size!r}')
        files = _find_local(model) or _find_cached(str(model)) or _download(str(model))
        network = _build(_read(files), files)
        self.batch_size = batch_size
        # a window's last bits depend on the others of its pass: matrix products of other sizes round differently
        self.together = min(batch_size, Reward.together)
        self.is_published = files.hub_id == HUB_ID  # by hub id; the origin of a folder or file is unknown
        self.provenance = f"Audiobox Aesthetics, {_provenance(files)}, {dtype}"
        self._network = network.to(self.device).eval().requires_grad_(False)
        precision = torch.bfloat16 if dtype == "bfloat16" else torch.float32
        self._autocast = torch.autocast(self.device.type, precision, enabled=precision != torch.float32)
        self._convolutions = None
        if self.device.type == "cpu":
            self._convolutions = _Convolutions(self._network.wavlm_model.feature_extractor, precision)
            encoder = self._network.wavlm_model.encoder
            convolution, _, activation = encoder.pos_conv  # the one between cuts off what an even number of taps adds
            frames = (WINDOW - self._convolutions.reach) // self._convolutions.hop + 1
            encoder.pos_conv = torch.nn.Sequential(_PositionalConvolution(convolution, frames), activation)
        self._padded = True
        # the bias of the positions depends on nothing but the number of frames, and the encoder would compute it on the
        # host and upload it in every pass
        first = self._network.wavlm_model.encoder.layers[0].self_attn
        first.compute_bias = functools.lru_cache(maxsize=1)(first.compute_bias)
        for layer in self._network.wavlm_model.encoder.layers:
            layer.self_attn.register_forward_pre_hook(self._float_mask, with_kwargs=True)

    @exact_float32()
    def rate(self, audio: torch.Tensor, lengths: torch.Tensor) -> dict[str, torch.Tensor]:
        """Rate clips (N, S) of ``lengths`` (N,) samples, as ``AesPredictor.forward`` does; axis -> (N,)."""
        windows = (lengths + WINDOW - 1) // WINDOW  # of each clip
        clip = torch.repeat_interleave(torch.arange(len(audio)), windows)  # (W,) over the windows of all clips
        start = (torch.arange(len(clip)) - (windows.cumsum(0) - windows)[clip]) * WINDOW
        valid = (lengths[clip] - start).clamp(max=WINDOW)  # samples of the window that belong to its clip
        predictions = torch.cat(
            [
                self._predict(audio, clip[part], start[part], valid[part])
                for part in torch.arange(len(clip)).split(self.batch_size)
            ],
            dim=1,
        )  # (axes, W)
        weight = valid.to(predictions) / WINDOW
        index = clip.to(predictions.device)
        total = predictions.new_zeros(len(audio)).index_add(0, index, weight)
        summed = predictions.new_zeros(len(AXES), len(audio)).index_add(1, index, predictions * weight)
        return dict(zip(AXES, summed / total, strict=True))

    def _predict(
        self, audio: torch.Tensor, clip: torch.Tensor, start: torch.Tensor, valid: torch.Tensor
    ) -> torch.Tensor:
        """De-normalised ratings (axes, B) float32 of B windows, each given by clip, start and samples."""
        wav = audio.new_zeros(len(clip), WINDOW)
        for row, (c, s, v) in enumerate(zip(clip.tolist(), start.tolist(), valid.tolist(), strict=True)):
            wav[row, :v] = audio[c, s : s + v]
        network = self._network
        padding = torch.arange(WINDOW, device=wav.device) >= valid.to(wav.device)[:, None]
        self._padded = bool((valid < WINDOW).any())
        with self._autocast, _numpy_state_kept():
            if self._convolutions is not None:
                features = self._convolutions(wav)  # (B, F, C)
            else:
                features = network.wavlm_model.feature_extractor(wav).transpose(1, 2)
            features = network.wavlm_model.layer_norm(features)
            padding = network.wavlm_model.forward_padding_mask(features, padding)  # (B, F)
            if network.wavlm_model.post_extract_proj is not None:
                features = network.wavlm_model.post_extract_proj(features)
            layers = network.wavlm_model.encoder(features, padding, layer=network.nth_layer - 1)[1]
        kept = (~padding).float().t()[:, :, None]  # (F, B, 1)
        count = kept.sum(dim=0).clamp(min=1)
        # means over time before the weighted sum over layers: the same result with a 500th of the memory
        means = torch.stack([(x.float() * kept).sum(dim=0) / count for x, _ in layers])  # (L, B, D)
        ratings = []
        for axis in AXES:
            embedding = torch.tensordot(network.layer_weights[axis].softmax(dim=0), means, dims=1)  # (B, D)
            if network.normalize_embed:
                embedding = torch.nn.functional.normalize(embedding, dim=-1)
            transform = network.target_transform[axis]
            ratings.append(network.proj_layer[axis](embedding).squeeze(-1) * transform["std"] + transform["mean"])
        return torch.stack(ratings)

    def _float_mask(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Pass attention its padding mask as floats, or no mask if no window is padded.

        torch adds the mask to the (float) position bias either way; a boolean mask raises a warning per layer.
        """
        padding = kwargs["key_padding_mask"]
        zeros = torch.zeros(padding.shape, device=padding.device)
        return args, kwargs | {"key_padding_mask": zeros.masked_fill(padding, -torch.inf) if self._padded else None}


class _Convolutions:
    """The encoder's convolutions (``ConvFeatureExtractionModel``) as matrix products on channels-last frames.

    This is for CPUs; a GPU has cuDNN. A window of 10 s is processed in pieces that fit a cache: the whole window
    would be 32,000 frames x 512 after the first layer. For this the first layer's normalisation over time is folded
    into its weights, since the mean and variance of a linear function of the samples follow from those of the
    samples. Nothing is approximated.
    """

    def __init__(self, extractor: Any, dtype: torch.dtype) -> None:
        convolutions = [layer[0] for layer in extractor.conv_layers]
        self.first, self.norm, self.dtype = convolutions[0], extractor.conv_layers[0][2], dtype
        # for each other layer: stride, number of taps, weights (taps x channels in, channels out)
        self.others = [
            (c.stride[0], c.kernel_size[0], c.weight.permute(2, 1, 0).flatten(0, 1).to(dtype)) for c in convolutions[1:]
        ]
        self.hop, self.reach = 1, 1  # samples from one feature to the next, and samples that one feature sees
        for convolution in convolutions:
            self.reach += (convolution.kernel_size[0] - 1) * self.hop
            self.hop *= convolution.stride[0]

    def __call__(self, wav: torch.Tensor) -> torch.Tensor:
        """Features (B, F, C) of windows (B, S)."""
        with torch.autocast(wav.device.type, enabled=False):
            return torch.stack([self._window(row) for row in wav])

    def _window(self, wav: torch.Tensor) -> torch.Tensor:
        """(S,) -> (F, C)."""
        weight, bias = self._normalised(self._frames(wav))
        starts = torch.arange((len(wav) - self.reach) // self.hop + 1) * self.hop
        pieces = [
            self._piece(self._frames(wav[part[0] : part[-1] + self.reach]), weight, bias)
            for part in starts.split(FEATURES_AT_A_TIME)
        ]
        return torch.cat(pieces)

    def _frames(self, wav: torch.Tensor) -> torch.Tensor:
        """The input of the first layer: (S,) -> (frames, taps)."""
        return wav.unfold(0, self.first.kernel_size[0], self.first.stride[0])

    def _piece(self, frames: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """All layers on these frames; ``weight`` (taps, C) and ``bias`` (C,) are the first layer's."""
        x = torch.addmm(bias, frames.to(self.dtype), weight)
        for stride, taps, weights in self.others:
            x = torch.nn.functional.gelu(x)
            count, width = (len(x) - taps) // stride + 1, x.shape[1]
            y = x.new_empty(count, weights.shape[1])
            for tap in range(0, taps, stride):  # as many taps as one stride holds, without a copy
                many = min(stride, taps - tap) * width
                part = x[tap:].as_strided((count, many), (stride * width, 1))
                rows = weights[tap * width : tap * width + many]
                y.addmm_(part, rows, beta=min(tap, 1))  # with beta 0 the old content of y is ignored
            x = y
        return torch.nn.functional.gelu(x)

    def _normalised(self, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The first layer's weights (taps, C) and bias (C,) with its normalisation over these frames (F, taps)."""
        exact = frames.double()
        mean = exact.mean(dim=0)
        centred = exact - mean
        weight = self.first.weight[:, 0].double()  # (C, taps)
        variance = ((weight @ (centred.t() @ centred / len(frames))) * weight).sum(dim=1)
        scale = self.norm.weight.double() / (variance + self.norm.eps).sqrt()
        bias = self.norm.bias.double() - weight @ mean * scale
        return (weight * scale[:, None]).t().to(self.dtype), bias.to(self.dtype)


class _PositionalConvolution(torch.nn.Module):
    """The encoder's positional convolution (128 taps, 16 groups of channels) by Fourier transforms; for CPUs.

    One product of channels per frequency takes a fortieth of the operations. It always computes in float32.
    """

    def __init__(self, convolution: Any, frames: int) -> None:
        super().__init__()
        taps, groups = convolution.kernel_size[0], convolution.groups
        with torch.no_grad():
            convolution(torch.zeros(1, convolution.in_channels, 1))  # this normalises its weights
            self.size = -(-(frames + taps - 1) // 64) * 64  # of the transforms: long enough that nothing wraps around
            weight = torch.nn.functional.pad(convolution.weight, (0, self.size - taps))
            weight = torch.fft.rfft(weight.roll(-convolution.padding[0], dims=-1)).conj_physical()
        # (frequencies, groups, channels in, channels out) and (C, 1)
        self.spectrum = weight.unflatten(0, (groups, -1)).permute(3, 0, 2, 1).contiguous()
        self.bias = convolution.bias[:, None]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, F) -> (B, C, F), F at most ``frames``."""
        spectrum = torch.fft.rfft(x.float(), n=self.size).unflatten(1, (self.spectrum.shape[1], -1))
        product = torch.matmul(spectrum.permute(3, 1, 0, 2), self.spectrum).permute(2, 1, 3, 0).flatten(1, 2)
        return (torch.fft.irfft(product, n=self.size)[..., : x.shape[-1]] + self.bias).to(x.dtype)


def check(model: str | os.PathLike[str] = HUB_ID) -> None:
    """Raise the ``UserError`` that building ``Audiobox(model=model)`` would, without building or downloading it.

    Local files are opened and their contents checked. A hub id that is not in the cache is looked up, which
    takes a few seconds at most if the hub does not answer.
    """
    files = _find_local(model) or _find_cached(str(model))
    if files is None:
        try:
            hub.ask(str(model), (WEIGHTS_FILE, CONFIG_FILE))
        except UserError as error:
            raise _unavailable(model, f"no such folder or file, and {error.message}") from error
    else:
        _read(files)
    _network_class()


class _Files(NamedTuple):
    """Paths of the weights; the original checkpoint has no ``config``, local files have no ``revision``."""

    weights: Path
    config: Path | None
    revision: str | None = None
    hub_id: str | None = None


class _Contents(NamedTuple):
    """What the files contain: the arguments of AesMultiOutput and its named tensors, not yet copied into memory."""

    arguments: dict[str, Any]
    state: dict[str, torch.Tensor]


def _unavailable(model: object, reason: str) -> UserError:
    """An error that says what is wrong with ``model``, where to get the weights and how to use a copy."""
    return UserError(
        f'no Audiobox Aesthetics weights from "{model}": {reason}. They are published as the Hugging Face '
        f"model {HUB_ID} ({CONFIG_FILE} and {WEIGHTS_FILE}) and as {CHECKPOINT_URL}; download either one and "
        'set the folder or the file: [reward.options] model = "PATH"'
    )


def _find_local(model: str | os.PathLike[str]) -> _Files | None:
    """The files of a folder or checkpoint; None if ``model`` can only be a hub id."""
    if not isinstance(model, (str, os.PathLike)) or not str(model):
        raise UserError(f'model of reward "audiobox" must be a hub id, a folder or a file, got {model!r}')
    path = Path(os.path.expanduser(model))  # unlike pathlib's, it leaves an unknown ~user as it is
    if path.is_dir():
        absent = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (path / name).is_file()]
        if absent:
            raise _unavailable(model, f"the folder has no {' and no '.join(absent)}")
        return _Files(path / WEIGHTS_FILE, path / CONFIG_FILE)
    if path.is_file():
        if path.suffix == ".safetensors":
            raise _unavailable(model, f"give its folder instead, which must also hold {CONFIG_FILE}")
        return _Files(path, None)
    if not hub.is_hub_id(str(model)) or path.suffix in (".pt", ".pth", ".ckpt", ".safetensors"):
        raise _unavailable(model, "there is no such folder or file")
    return None


def _find_cached(hub_id: str) -> _Files | None:
    """The files of a hub model if they are in the hub's cache, else None."""
    paths = hub.find_cached(hub_id, (WEIGHTS_FILE, CONFIG_FILE))
    return None if paths is None else _Files(paths[0], paths[1], paths[0].parent.name, hub_id)


def _download(hub_id: str) -> _Files:
    """Fetch a hub model into the hub's cache."""
    try:
        weights, config = hub.fetch(hub_id, (WEIGHTS_FILE, CONFIG_FILE))
    except UserError as error:
        raise _unavailable(hub_id, f"no such folder or file, and {error.message}") from error
    return _Files(weights, config, weights.parent.name, hub_id)


def _read(files: _Files) -> _Contents:
    """Open the files and check that they hold this model; tensors stay on disk until they are used."""
    shown = files.hub_id or files.weights
    contents = _read_checkpoint(files.weights) if files.config is None else _read_folder(files)
    transform = contents.arguments.get("target_transform")
    if not _is_transform(transform):
        raise _unavailable(shown, f"target_transform must hold mean and std of {', '.join(AXES)}, got {transform}")
    for prefix in ("wavlm_model.", *(f"{part}.{axis}" for axis in AXES for part in ("proj_layer", "layer_weights"))):
        if not any(name.startswith(prefix) for name in contents.state):
            raise _unavailable(shown, f"it is a different model: it has no tensors {prefix}*")
    return contents


def _read_folder(files: _Files) -> _Contents:
    """Read config.json and model.safetensors; missing settings keep the class's defaults."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    assert files.config is not None
    shown = files.hub_id or files.weights.parent
    try:
        config = parse_json(files.config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _unavailable(shown, f"{CONFIG_FILE} cannot be read ({brief(error)})") from error
    if not isinstance(config, dict):
        raise _unavailable(shown, f"{CONFIG_FILE} must hold an object, got {type(config).__name__}")
    try:
        state = load_file(files.weights)
    except (OSError, SafetensorError) as error:
        raise _unavailable(shown, f"{WEIGHTS_FILE} is damaged or not a safetensors file ({brief(error)})") from error
    fields = _network_class().__dataclass_fields__
    return _Contents({key: value for key, value in config.items() if key in fields}, state)


def _read_checkpoint(path: Path) -> _Contents:
    """Read the original checkpoint.pt: state_dict with the prefix "model.", model_cfg, target_transform."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged pickle may raise anything
        raise _unavailable(path, f"it is damaged or not a checkpoint of plain tensors ({brief(error)})") from error
    parts = ("state_dict", "model_cfg", "target_transform")
    absent = [key for key in parts if not isinstance(saved, dict) or not isinstance(saved.get(key), dict)]
    if absent:
        raise _unavailable(path, f"the checkpoint has no {', no '.join(absent)}")
    absent = [key for key in CHECKPOINT_ARGUMENTS if key not in saved["model_cfg"]]
    if absent:
        raise _unavailable(path, f"model_cfg of the checkpoint has no {', no '.join(absent)}")
    arguments = {key: saved["model_cfg"][key] for key in CHECKPOINT_ARGUMENTS}
    arguments["target_transform"] = saved["target_transform"]
    return _Contents(arguments, {str(key).removeprefix("model."): v for key, v in saved["state_dict"].items()})


def _is_transform(transform: Any) -> bool:
    """Whether this is axis -> {"mean": number, "std": number} for every axis."""
    return isinstance(transform, Mapping) and all(
        isinstance(transform.get(axis), Mapping)
        and all(isinstance(transform[axis].get(key), numbers.Real) for key in ("mean", "std"))
        for axis in AXES
    )


def _network_class() -> Any:
    """Import AesMultiOutput; its module needs no torchaudio, unlike ``audiobox_aesthetics.infer``."""
    try:
        from audiobox_aesthetics.model.aes import AesMultiOutput
    except ImportError as error:
        raise UserError(
            f'reward "audiobox" needs the package audiobox_aesthetics ({brief(error)}): '
            "pip install --no-deps audiobox_aesthetics"
        ) from error
    return AesMultiOutput


def _build(contents: _Contents, files: _Files) -> Any:
    """The network with the weights of ``contents``; every tensor must be present, of the right shape, and finite.

    Extra tensors are an error in a checkpoint and ignored in a folder, as in the official loader of each.
    """
    shown = files.hub_id or files.weights
    for name, value in contents.arguments.items():
        # so many layers or outputs would never be built
        if isinstance(value, int) and value > len(contents.state):
            raise _unavailable(shown, f"its configuration is not usable ({name} = {value})")
    # its constructor draws random weights: keep the global generators as they were
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*weight_norm", category=FutureWarning)
        try:
            network = _network_class()(**contents.arguments)
        except (TypeError, ValueError, KeyError, RuntimeError) as error:
            raise _unavailable(shown, f"its configuration is not usable ({brief(error)})") from error
    wanted = network.state_dict()
    state = {_known_name(name, wanted): tensor for name, tensor in contents.state.items()}
    unfit = [n for n, t in wanted.items() if n not in state or state[n].shape != t.shape]
    if unfit:
        raise _unavailable(shown, f"{len(unfit)} of {len(wanted)} tensors are missing or misshapen, e.g. {unfit[0]}")
    extra = sorted(set(state) - set(wanted))
    if extra and files.config is None:
        raise _unavailable(shown, f"{len(extra)} tensors do not belong to the model, e.g. {extra[0]}")
    damaged = next((n for n in wanted if not bool(state[n].isfinite().all())), None)
    if damaged:
        raise _unavailable(shown, f"it is damaged: tensor {damaged} holds NaN or infinite values")
    network.load_state_dict({name: state[name] for name in wanted})
    return network


def _known_name(name: str, wanted: Mapping[str, Any]) -> str:
    """A tensor's name in the installed torch: versions name weight normalisation differently."""
    for pair in WEIGHT_NORM_NAMES:
        for old, new in (pair, pair[::-1]):
            if name not in wanted and name.endswith(old) and name.removesuffix(old) + new in wanted:
                return name.removesuffix(old) + new
    return name


def _provenance(files: _Files) -> str:
    """Which weights these are: hub id and revision, or path and the first digits of their SHA-256."""
    if files.hub_id:
        return f"{files.hub_id} from the Hugging Face hub, revision {files.revision}"
    with files.weights.open("rb") as stream:
        return f"{files.weights}, sha256 {hashlib.file_digest(stream, 'sha256').hexdigest()[:16]}"


@contextmanager
def _numpy_state_kept() -> Iterator[None]:
    """Restore numpy's global generator: the encoder draws from it (layer drop) even in eval mode."""
    state = np.random.get_state()  # noqa: NPY002 -- the encoder draws from the legacy generator
    try:
        yield
    finally:
        np.random.set_state(state)  # noqa: NPY002 -- as above
