"""smart.reward.audiobox against the official predictor, on random weights in both official formats."""

import json
import math
import os
import random
import shutil
import socket
import subprocess
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from audiobox_weights import TRANSFORM, random_network, thin_architecture

from smart import UserError
from smart.hub import SECONDS
from smart.reward import audiobox, load_reward

aes = pytest.importorskip("audiobox_aesthetics.model.aes")
RATE = 16000


class Weights(NamedTuple):
    """One random model in both official formats, and the official predictor with it."""

    folder: Path
    checkpoint: Path
    official: Any


def save_both(network: Any, folder: Path) -> tuple[Path, Path]:
    """The two official formats; the checkpoint carries keys that the official loader drops."""
    network.save_pretrained(folder / "hub")
    arguments = {key: getattr(network, key) for key in audiobox.CHECKPOINT_ARGUMENTS} | {"precision": "32"}
    torch.save(
        {
            "state_dict": {f"model.{key}": value for key, value in network.state_dict().items()},
            "model_cfg": arguments | {"freeze_encoder": True, "target": "not read"},
            "target_transform": TRANSFORM,
            "epoch": 3,
        },
        folder / "checkpoint.pt",
    )
    return folder / "hub", folder / "checkpoint.pt"


def official_predictor(checkpoint: Path) -> Any:
    """AesPredictor; its file imports torchaudio, but only uses it to resample between equal rates."""

    def resample(wav: torch.Tensor, orig_freq: int, new_freq: int) -> torch.Tensor:
        assert orig_freq == new_freq
        return wav

    kept = {name: sys.modules.pop(name, None) for name in ("torchaudio", "audiobox_aesthetics.infer")}
    module: Any = types.ModuleType("torchaudio")
    module.functional = types.SimpleNamespace(resample=resample)
    sys.modules["torchaudio"] = module
    try:
        with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
            warnings.simplefilter("ignore")  # of its imports and of weight_norm
            patch.setattr(torch.cuda, "is_available", lambda: False)  # it would choose that device by itself
            patch.setattr(torch.backends.mps, "is_available", lambda: False)
            from audiobox_aesthetics.infer import AesPredictor

            return AesPredictor(checkpoint_pth=str(checkpoint), data_col="path")
    finally:
        for name, old in kept.items():
            sys.modules.pop(name, None)
            if old is not None:
                sys.modules[name] = old


def official_scores(predictor: Any, clips: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The official ratings of clips (S,) at 16 kHz; axis -> (N,)."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Support for mismatched key_padding_mask")
        rows = predictor.forward([{"path": clip[None], "sample_rate": RATE} for clip in clips])
    return {axis: torch.tensor([row[axis] for row in rows]) for axis in audiobox.AXES}


def make_clips(*seconds: float) -> list[torch.Tensor]:
    """Decaying notes over a little noise, different in each clip, (S,) float32."""
    clips = []
    for seed, duration in enumerate(seconds):
        rng = np.random.default_rng(seed)
        t = np.arange(round(duration * RATE)) / RATE
        clip = rng.normal(0, 0.01 * (1 + seed), len(t))
        for onset in np.arange(0, duration, 0.25 + 0.1 * seed):
            hz = 110 * 2 ** (rng.integers(0, 36) / 12)
            clip += np.where(t >= onset, np.exp(-3 * (t - onset)) * np.sin(2 * np.pi * hz * (t - onset)), 0)
        clips.append(torch.from_numpy(clip / np.abs(clip).max()).float())
    return clips


def batch(clips: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    lengths = torch.tensor([len(clip) for clip in clips])
    return torch.nn.utils.rnn.pad_sequence(clips, batch_first=True, padding_value=9.0), lengths


def difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    assert list(left) == list(right) == list(audiobox.AXES)
    return max(float((left[axis] - right[axis]).abs().max()) for axis in left)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Weights]:
    """The same architecture, but thin: 3 layers of 48 channels over 32-channel convolutions."""
    with thin_architecture():
        folder, checkpoint = save_both(random_network(1), tmp_path_factory.mktemp("small"))
        yield Weights(folder, checkpoint, official_predictor(checkpoint))


# --- equal to the official predictor


@pytest.mark.slow
def test_full_size_equals_the_official_predictor(tmp_path: Path) -> None:
    folder, checkpoint = save_both(random_network(0), tmp_path)
    clips = make_clips(10.0, 2.7)
    expected = official_scores(official_predictor(checkpoint), clips)
    spread = [float(values.std()) for values in expected.values()]
    assert min(spread) > 2e-3  # the clips get different ratings
    assert max(spread) > 0.1
    for model in (folder, checkpoint):
        reward = load_reward("audiobox", model=str(model))
        assert difference(reward.score(*batch(clips)), expected) < 1e-3
        shutil.rmtree(model) if model.is_dir() else model.unlink()  # 380 MB each


@pytest.mark.parametrize("form", ["folder", "checkpoint"])
def test_any_length_equals_the_official_predictor(small: Weights, form: str) -> None:
    reward = load_reward("audiobox", model=str(getattr(small, form)))
    clips = make_clips(0.3, 1.0, 9.99, 10.0, 10.02, 14.5, 20.0, 27.0)
    expected = official_scores(small.official, clips)
    assert all(float(values.std()) > 0.05 for values in expected.values())
    scores = reward.score(*batch(clips))
    assert difference(scores, expected) < 1e-4
    assert all(values.dtype == torch.float32 and values.shape == (len(clips),) for values in scores.values())
    for clip, row in zip(clips, range(len(clips)), strict=True):  # alone, without padding of the batch
        alone = reward.score(clip[None])
        assert difference(alone, {axis: values[row : row + 1] for axis, values in expected.items()}) < 1e-4


@pytest.mark.parametrize("samples", [1, 319, 320, 321, 159_679, 159_681, 159_999, 160_001])
def test_lengths_at_the_edges_of_frames_and_windows(small: Weights, samples: int) -> None:
    clip = make_clips(11.0)[0][:samples]
    scores = load_reward("audiobox", model=str(small.folder)).score(clip[None])
    assert difference(scores, official_scores(small.official, [clip])) < 1e-4


def test_faint_loud_shifted_and_silent_clips(small: Weights) -> None:
    """The first layer normalises over time; its mean and variance must be right even if they are extreme."""
    clip = make_clips(10.0)[0]
    clips = [clip * 1e-4, clip * 30, clip * 0.1 + 0.8, torch.zeros(10 * RATE)]
    scores = load_reward("audiobox", model=str(small.folder)).score(torch.stack(clips))
    assert difference(scores, official_scores(small.official, clips)) < 1e-4


@pytest.mark.parametrize("dtype, bound", [("float32", 1e-5), ("bfloat16", 0.15)])
def test_both_ways_to_convolve_agree(small: Weights, dtype: str, bound: float) -> None:
    """As matrix products, as on a CPU, and by the network's own layers, as on a GPU."""
    reward = load_reward("audiobox", model=str(small.folder), dtype=dtype)
    clips = batch(make_clips(2.0, 10.0, 13.0))
    products = reward.score(*clips)
    reward._convolutions = None
    assert 0 < difference(products, reward.score(*clips)) < bound


@pytest.mark.parametrize("taps", [1, 5, 128])
@pytest.mark.parametrize("frames", [1, 63, 499])
def test_the_positional_convolution_by_fourier_transforms(taps: int, frames: int) -> None:
    generator = torch.Generator().manual_seed(taps * frames)
    convolution = torch.nn.Conv1d(12, 12, taps, padding=taps // 2, groups=3).double().requires_grad_(False)
    for parameter in convolution.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    x = torch.randn(2, 12, frames, generator=generator)
    exact = convolution(x.double())[..., :frames].float()
    found = audiobox._PositionalConvolution(convolution.float(), 499)(x)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-6 * exact.abs().max().item())


def test_nothing_outside_rounds_float32(small: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    audio, lengths = batch(make_clips(1.0))
    reward = load_reward("audiobox", model=small.folder)
    seen = set()

    def forward(*given: Any, **options: Any) -> Any:
        seen.add((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
        return encode(*given, **options)

    encode = reward._network.wavlm_model.encoder.forward
    monkeypatch.setattr(reward._network.wavlm_model.encoder, "forward", forward)
    expected = reward.score(audio, lengths)
    torch.set_float32_matmul_precision("high")
    try:
        assert difference(reward.score(audio, lengths), expected) == 0
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen == {("highest", False)}


def test_batching_order_and_neighbours_do_not_change_ratings(small: Weights) -> None:
    clips = make_clips(3.0, 21.0, 10.0, 0.5, 12.0)
    whole = load_reward("audiobox", model=str(small.folder), batch_size=64).score(*batch(clips))
    for size in (1, 2, 3):
        reward = load_reward("audiobox", model=str(small.folder), batch_size=size)
        assert difference(reward.score(*batch(clips)), whole) < 1e-5
        reversed_scores = reward.score(*batch(clips[::-1]))
        assert difference({axis: values.flip(0) for axis, values in reversed_scores.items()}, whole) < 1e-5


def test_a_pass_of_one_window_leaves_no_trace_of_neighbours(small: Weights) -> None:
    """So a clip can be rated as it arrives, alone; larger passes are always those of the same neighbours."""
    clips = make_clips(3.0, 21.0, 10.0)
    reward = load_reward("audiobox", model=str(small.folder))
    whole = reward.score(*batch(clips))
    alone = [reward.score(clip[None]) for clip in clips]
    assert difference({axis: torch.cat([one[axis] for one in alone]) for axis in whole}, whole) == 0.0
    together = [load_reward("audiobox", model=str(small.folder), batch_size=size).together for size in (1, 8, 64)]
    assert (reward.together, together) == (1, [1, 8, 16])


def test_skipping_the_mask_of_full_windows_changes_nothing(small: Weights) -> None:
    reward = load_reward("audiobox", model=str(small.folder))
    full, short = make_clips(10.0, 10.0)
    alone = reward.score(full[None])
    beside = reward.score(*batch([full, short[:RATE]]))  # one padded window: the batch is masked
    assert difference(alone, {axis: values[:1] for axis, values in beside.items()}) < 1e-5


def test_the_position_bias_is_computed_once(small: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in every pass, on the host; and it is the encoder's, bit for bit."""
    attention = sys.modules["audiobox_aesthetics.model.wavlm"].MultiheadAttention
    reward, clips = load_reward("audiobox", model=str(small.folder)), batch(make_clips(3.0, 21.0, 10.0))
    computed, bucket = [], attention._relative_positions_bucket

    def counted(self: Any, positions: torch.Tensor, **options: Any) -> Any:
        computed.append(positions.shape)
        return bucket(self, positions, **options)

    monkeypatch.setattr(attention, "_relative_positions_bucket", counted)
    scores = [reward.score(*clips) for _ in range(2)]
    assert computed == [(499, 499)]
    del reward._network.wavlm_model.encoder.layers[0].self_attn.compute_bias  # the encoder's own again
    scores.append(reward.score(*clips))
    assert len(computed) > 3
    assert difference(scores[0], scores[1]) == difference(scores[0], scores[2]) == 0.0


def test_damaged_and_empty_clips_are_nan_beside_good_ones(small: Weights) -> None:
    reward = load_reward("audiobox", model=str(small.folder))
    clips = make_clips(2.0, 2.0, 12.0, 2.0)
    expected = official_scores(small.official, clips)
    audio, lengths = batch(clips)
    audio[1, 77] = math.nan
    lengths[3] = 0
    scores = reward.score(audio, lengths)
    for axis in audiobox.AXES:
        assert scores[axis].isnan().tolist() == [False, True, False, True]
        torch.testing.assert_close(scores[axis][[0, 2]], expected[axis][[0, 2]], atol=1e-4, rtol=0)


def test_bfloat16_agrees_with_float32(small: Weights) -> None:
    clips = make_clips(4.0, 10.0, 13.0)
    exact = load_reward("audiobox", model=str(small.folder)).score(*batch(clips))
    rounded = load_reward("audiobox", model=str(small.folder), dtype="bfloat16").score(*batch(clips))
    assert 0 < difference(exact, rounded) < 0.15  # on the scale of 1 to 10, and it did round
    assert all(values.dtype == torch.float32 for values in rounded.values())


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_agrees_with_the_official_predictor(small: Weights) -> None:
    clips = make_clips(0.3, 10.0, 14.5)
    expected = official_scores(small.official, clips)
    scores = load_reward("audiobox", model=str(small.folder), device="cuda").score(*batch(clips))
    assert difference(scores, expected) < 1e-3


# --- no side effects


def numpy_key() -> tuple[list[int], int]:
    """State of numpy's global generator."""
    state: Any = np.random.get_state(legacy=False)  # noqa: NPY002 -- the one that the encoder draws from
    return state["state"]["key"].tolist(), state["state"]["pos"]


def test_no_generator_is_consumed_and_nothing_is_in_training_mode(small: Weights) -> None:
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002 -- the global generator must not change
    random.seed(5)
    states = torch.get_rng_state(), numpy_key(), random.getstate()
    reward = load_reward("audiobox", model=str(small.folder))
    clips = batch(make_clips(3.0, 12.0))
    first, second = reward.score(*clips), reward.score(*clips)
    assert difference(first, second) == 0.0
    assert torch.equal(torch.get_rng_state(), states[0])
    assert numpy_key() == states[1]
    assert random.getstate() == states[2]
    assert not any(values.requires_grad for values in first.values())


def test_a_broken_torchaudio_is_never_imported(small: Weights, tmp_path: Path) -> None:
    (tmp_path / "torchaudio").mkdir()
    (tmp_path / "torchaudio" / "__init__.py").write_text("raise OSError('libcudart.so.13: no such file')\n")
    code = (
        "import sys, torch, torchaudio_probe\n"
        "from smart.reward import audiobox\n"
        f"audiobox.check({str(small.folder)!r})\n"
        "assert 'torchaudio' not in sys.modules\n"
        "print('fine')"
    )
    (tmp_path / "torchaudio_probe.py").write_text(
        "try:\n    import torchaudio\nexcept OSError:\n    pass\nelse:\n    raise SystemExit('not broken')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == "fine\n", done.stderr


# --- formats


def test_both_names_of_weight_normalisation_load(small: Weights, tmp_path: Path) -> None:
    """torch has named the two parts weight_g and weight_v, or parametrizations.weight.original0 and 1."""
    saved = torch.load(small.checkpoint, weights_only=True)
    names = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}
    state = saved["state_dict"]
    changed = 0
    for old, new in names.items():
        for key in [k for k in state if k.endswith(f".{old}")]:
            state[key.removesuffix(old) + new] = state.pop(key)
            changed += 1
    assert changed == 2
    torch.save(saved, tmp_path / "other.pt")
    clips = batch(make_clips(2.0))
    expected = load_reward("audiobox", model=str(small.checkpoint)).score(*clips)
    assert difference(load_reward("audiobox", model=str(tmp_path / "other.pt")).score(*clips), expected) == 0.0


def test_half_precision_files_compute_in_float32(small: Weights, tmp_path: Path) -> None:
    saved = torch.load(small.checkpoint, weights_only=True)
    saved["state_dict"] = {key: value.half() for key, value in saved["state_dict"].items()}
    torch.save(saved, tmp_path / "half.pt", _use_new_zipfile_serialization=False)  # and an older container
    clips = batch(make_clips(2.0))
    scores = load_reward("audiobox", model=str(tmp_path / "half.pt")).score(*clips)
    expected = load_reward("audiobox", model=str(small.checkpoint)).score(*clips)
    assert difference(scores, expected) < 0.1


def test_a_downloaded_model_is_found_in_the_cache(
    small: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    revision = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--facebook--audiobox-aesthetics"
    shutil.copytree(small.folder, repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    audiobox.check()
    reward = load_reward("audiobox", weights={"CE": 1.0})
    origin = f"facebook/audiobox-aesthetics from the Hugging Face hub, revision {revision}"
    assert reward.provenance == f"Audiobox Aesthetics, {origin}, float32"
    assert not reward.is_stand_in
    (repository / "snapshots" / revision / "config.json").unlink()
    with pytest.raises(UserError, match="offline"):
        audiobox.check()


def test_provenance_of_a_local_copy_tells_its_hash(small: Weights, tmp_path: Path) -> None:
    import hashlib

    digest = hashlib.sha256((small.folder / "model.safetensors").read_bytes()).hexdigest()
    reward = load_reward("audiobox", model=str(small.folder), dtype="bfloat16")
    assert str(small.folder) in reward.provenance
    assert f"sha256 {digest[:16]}" in reward.provenance
    assert "bfloat16" in reward.provenance
    assert "\n" not in reward.provenance


# --- what cannot be loaded


def refused(model: Any, *expected: str, built_only: bool = False) -> None:
    """Building and checking fail with one line that names the reason, the sources and the remedy."""
    calls: list[Callable[[], object]] = [lambda: load_reward("audiobox", model=model)]
    if not built_only:
        calls.append(lambda: audiobox.check(model))
    for call in calls:
        with pytest.raises(UserError) as caught:
            call()
        message = caught.value.message
        remedies = ("facebook/audiobox-aesthetics", audiobox.CHECKPOINT_URL, "[reward.options] model =")
        for part in (*expected, *remedies):
            assert part in message, message
        assert "\n" not in message


def test_missing_files_are_named(small: Weights, tmp_path: Path) -> None:
    refused(str(tmp_path / "nowhere" / "x"), str(tmp_path / "nowhere"), "there is no such folder or file")
    refused("weights/checkpoint.pt", "there is no such folder or file")
    refused("just-a-name", "there is no such folder or file")
    refused(str(tmp_path), "the folder has no config.json and no model.safetensors")
    shutil.copy(small.folder / "config.json", tmp_path)
    refused(str(tmp_path), "the folder has no model.safetensors")
    refused(str(small.folder / "model.safetensors"), "give its folder")


@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
def test_damaged_files_are_named(small: Weights, tmp_path: Path, damage: str) -> None:
    folder, checkpoint = tmp_path / "hub", tmp_path / "checkpoint.pt"
    shutil.copytree(small.folder, folder)
    shutil.copy(small.checkpoint, checkpoint)
    for path in (folder / "model.safetensors", checkpoint):
        whole = path.read_bytes()
        path.write_bytes({"truncated": whole[: len(whole) // 2], "empty": b"", "text": b"<html>404</html>"}[damage])
    refused(str(folder), "model.safetensors is damaged or not a safetensors file")
    refused(str(checkpoint), "damaged or not a checkpoint of plain tensors")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ("{", "config.json cannot be read (JSONDecodeError"),
        ("[]", "config.json must hold an object, got list"),
        ("{}", "target_transform must hold mean and std of CE, CU, PC, PQ"),
        (json.dumps({"target_transform": TRANSFORM | {"PQ": {"mean": 3.0}}}), "target_transform must hold"),
    ],
)
def test_damaged_configurations_are_named(small: Weights, tmp_path: Path, config: str, reason: str) -> None:
    shutil.copy(small.folder / "model.safetensors", tmp_path)
    (tmp_path / "config.json").write_text(config)
    refused(str(tmp_path), reason)


def test_a_configuration_of_another_size_is_named(small: Weights, tmp_path: Path) -> None:
    shutil.copy(small.folder / "model.safetensors", tmp_path)
    config = {"target_transform": TRANSFORM, "proj_num_layer": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused(str(tmp_path), "tensors are missing or misshapen, e.g. proj_layer.CE", built_only=True)
    (tmp_path / "config.json").write_text(json.dumps(config | {"proj_num_layer": 10**12}))
    refused(str(tmp_path), "its configuration is not usable (proj_num_layer = 1000000000000)", built_only=True)
    (tmp_path / "config.json").write_text(json.dumps(config | {"proj_act_fn": "swish"}))
    refused(str(tmp_path), "its configuration is not usable", built_only=True)


def test_other_checkpoints_are_named(small: Weights, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"

    def changed(**parts: Any) -> str:
        saved = torch.load(small.checkpoint, weights_only=True) | parts
        torch.save({key: value for key, value in saved.items() if value is not None}, path)
        return str(path)

    state = torch.load(small.checkpoint, weights_only=True)["state_dict"]
    some = next(iter(state))
    refused(changed(model_cfg=None, target_transform=None), "has no model_cfg, no target_transform")
    refused(changed(model_cfg={"precision": "32"}), "model_cfg of the checkpoint has no proj_num_layer")
    refused(changed(state_dict={"encoder.weight": torch.zeros(2)}), "it is a different model")
    refused(
        changed(state_dict=state | {"model.more": torch.zeros(2)}),
        "do not belong to the model, e.g. more",
        built_only=True,
    )
    refused(
        changed(state_dict={key: value for key, value in state.items() if key != some}),
        f"1 of {len(state)} tensors are missing or misshapen, e.g. {some.removeprefix('model.')}",
        built_only=True,
    )
    refused(
        changed(state_dict=state | {some: torch.full_like(state[some], math.nan)}),
        f"tensor {some.removeprefix('model.')} holds NaN",
        built_only=True,
    )


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    torch.save({"state_dict": Trap()}, tmp_path / "checkpoint.pt")
    refused(str(tmp_path / "checkpoint.pt"), "not a checkpoint of plain tensors")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float16"}, '"float32" or "bfloat16", got \'float16\''),
        ({"batch_size": 0}, "at least 1, got 0"),
        ({"batch_size": 2.0}, "at least 1, got 2.0"),
        ({"model": 3}, "hub id, a folder or a file, got 3"),
        ({"model": ""}, "hub id, a folder or a file, got ''"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_reward("audiobox", **options)
    assert message in caught.value.message


def ask_a_hub_at(port: int, cache: Path) -> tuple[str, float]:
    """The error of a new process for the default model if the hub is this local port, and its seconds."""
    code = (
        "import time, smart.reward.audiobox as audiobox, huggingface_hub.hf_api\n"
        "start = time.perf_counter()\n"
        "try:\n"
        "    audiobox.check()\n"
        "except audiobox.UserError as error:\n"
        "    print(time.perf_counter() - start, error.message)"
    )
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=clean | {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(cache), "NO_PROXY": "127.0.0.1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    seconds, _, message = done.stdout.partition(" ")
    assert message, done.stderr
    return message.strip(), float(seconds)


@pytest.mark.parametrize("hub", ["refuses", "is silent"])
@pytest.mark.slow
def test_an_unreachable_hub_is_given_up_on_within_seconds(hub: str, tmp_path: Path) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if hub == "is silent":
            server.listen(8)  # the kernel accepts connections, but no answer comes
        message, seconds = ask_a_hub_at(server.getsockname()[1], tmp_path)
    assert "Hugging Face hub cannot provide it" in message
    assert audiobox.CHECKPOINT_URL in message
    assert "[reward.options] model =" in message
    assert "\n" not in message
    assert seconds < 3 * SECONDS  # plain downloads retry for 20 s and more
