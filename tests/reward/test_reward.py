"""smart.reward: the base class, finding rewards by name, and the resampler."""

import importlib
import math
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smart import UserError
from smart.reward import Reward, available_rewards, load_reward, resample

DOCS = Path(__file__).parents[2] / "docs" / "rewards.md"


class Level(Reward):
    """Mean and peak of |x| over a clip; a test chooses the third axis."""

    axes = ("MEAN", "PEAK", "EXTRA")
    sample_rate = 8000

    def __init__(self, *, extra: Any = None, device: str = "cpu") -> None:
        super().__init__(device=device)
        self.extra = extra
        self.calls: list[tuple[torch.Tensor, torch.Tensor]] = []

    def rate(self, audio: torch.Tensor, lengths: torch.Tensor) -> Mapping[str, torch.Tensor]:
        self.calls.append((audio, lengths))
        extra = torch.zeros(len(audio)) if self.extra is None else self.extra
        return {"MEAN": audio.abs().sum(1) / lengths, "PEAK": audio.abs().amax(1), "EXTRA": extra}


# --- score


@given(st.lists(st.integers(0, 12), max_size=6), st.sampled_from([math.nan, math.inf, 1e30]), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_a_clip_is_rated_by_its_own_samples_only(lengths: list[int], garbage: float, seed: int) -> None:
    audio = torch.randn(len(lengths), 12, generator=torch.Generator().manual_seed(seed))
    for row, length in enumerate(lengths):
        audio[row, length:] = garbage
    before = audio.clone()
    scores = Level().score(audio, torch.tensor(lengths, dtype=torch.int64))
    for row, length in enumerate(lengths):
        clip = audio[row, :length].double().abs()
        expected = [clip.mean(), clip.max()] if length else [math.nan, math.nan]
        torch.testing.assert_close(
            torch.stack([scores["MEAN"][row], scores["PEAK"][row]]),
            torch.tensor(expected, dtype=torch.float32),
            equal_nan=True,
        )
    torch.testing.assert_close(audio, before, equal_nan=True, rtol=0, atol=0)  # the caller's audio does not change


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_damaged_clip_is_nan_and_its_neighbours_are_not_touched(bad: float) -> None:
    audio = torch.rand(4, 100, generator=torch.Generator().manual_seed(0))
    clean = Level().score(audio)
    audio[1, 50] = bad
    reward = Level()
    scores = reward.score(audio)
    for axis in reward.axes:
        assert scores[axis].isnan().tolist() == [False, True, False, False]
        assert torch.equal(scores[axis][[0, 2, 3]], clean[axis][[0, 2, 3]])
    assert all(bool(seen.isfinite().all()) for seen, _ in reward.calls)


def test_what_the_reward_gives_up_on_is_nan() -> None:
    scores = Level(extra=torch.tensor([1.0, math.nan, math.inf, -math.inf])).score(torch.ones(4, 5))
    assert scores["EXTRA"].isnan().tolist() == [False, True, True, True]
    assert not scores["MEAN"].isnan().any()


@pytest.mark.parametrize("shape", [(0, 10), (3, 0), (0, 0)])
def test_nothing_to_rate(shape: tuple[int, int]) -> None:
    reward = Level()
    scores = reward.score(torch.zeros(shape))
    assert reward.calls == []
    for axis in reward.axes:
        assert scores[axis].shape == (shape[0],)
        assert scores[axis].dtype == torch.float32
        assert bool(scores[axis].isnan().all())
    assert reward.combine(scores).shape == (shape[0],)


@pytest.mark.parametrize(
    ("audio", "lengths", "error", "message"),
    [
        (np.zeros((1, 4), np.float32), None, TypeError, "float32 tensor.*ndarray"),
        (torch.zeros(1, 4, dtype=torch.float64), None, TypeError, "float32.*float64"),
        (torch.zeros(4), None, ValueError, r"\(N, S\).*\(4,\)"),
        (torch.zeros(1, 2, 4), None, ValueError, r"\(N, S\).*\(1, 2, 4\)"),
        (torch.zeros(2, 4), torch.tensor([4]), ValueError, r"\(2,\).*\(1,\)"),
        (torch.zeros(2, 4), torch.tensor([4.0, 4.0]), TypeError, "int64.*float32"),
        (torch.zeros(2, 4), [4, 4], TypeError, "int64.*list"),
        (torch.zeros(2, 4), torch.tensor([5, 4]), ValueError, r"0\.\.4.*4\.\.5"),
        (torch.zeros(2, 4), torch.tensor([4, -1]), ValueError, r"0\.\.4.*-1\.\.4"),
    ],
)
def test_wrong_arguments_are_named(audio: Any, lengths: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Level().score(audio, lengths)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (torch.zeros(3), r"Level.*EXTRA.*\(2,\).*\(3,\)"),
        (torch.zeros(2, 1), r"Level.*EXTRA.*\(2,\).*\(2, 1\)"),
        (torch.zeros(2, dtype=torch.float64), "Level.*EXTRA.*float32.*float64"),
        ([0.0, 0.0], "Level.*EXTRA.*tensor.*list"),
    ],
)
def test_a_reward_that_returns_nonsense_is_named(extra: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        Level(extra=extra).score(torch.ones(2, 5))


def test_a_reward_that_forgets_an_axis_is_named() -> None:
    class Forgetful(Level):
        def rate(self, audio: torch.Tensor, lengths: torch.Tensor) -> Mapping[str, torch.Tensor]:
            return {"MEAN": torch.zeros(len(audio)), "OTHER": torch.zeros(len(audio))}

    class Bare(Level):
        def rate(self, audio: torch.Tensor, lengths: torch.Tensor) -> Any:
            return torch.zeros(len(audio))

    with pytest.raises(ValueError, match=r"Forgetful.*MEAN.*PEAK.*EXTRA.*OTHER"):
        Forgetful().score(torch.ones(1, 5))
    with pytest.raises(ValueError, match=r"Bare.*mapping.*Tensor"):
        Bare().score(torch.ones(1, 5))


def test_a_class_without_axes_or_rate_cannot_be_used() -> None:
    class NoAxes(Reward):
        sample_rate = 8000

    class NoRate(Reward):
        axes = ("A",)
        sample_rate = 8000

    with pytest.raises(TypeError, match=r"NoAxes.*axes"):
        NoAxes()
    with pytest.raises(NotImplementedError, match=r"NoRate.*rate"):
        NoRate().score(torch.ones(1, 5))


# --- combine


@given(
    st.lists(st.floats(-3, 3).map(lambda w: round(w, 2)), min_size=3, max_size=3).filter(any),
    st.lists(st.lists(st.floats(1, 10, width=32), min_size=4, max_size=4), min_size=3, max_size=3),
)
def test_combine_is_the_weighted_mean(weights: list[float], values: list[list[float]]) -> None:
    reward = Level()
    reward.set_weights(dict(zip(reward.axes, weights, strict=True)))
    combined = reward.combine({a: torch.tensor(v) for a, v in zip(reward.axes, values, strict=True)})
    expected = np.array(weights) @ np.array(values) / np.abs(weights).sum()
    np.testing.assert_allclose(combined.numpy(), expected, rtol=1e-5, atol=1e-5)


def test_combine_defaults_to_the_first_axis_and_keeps_nan() -> None:
    reward = Level()
    scores = {
        "MEAN": torch.tensor([2.0, 3.0]),
        "PEAK": torch.tensor([math.nan, 5.0]),
        "EXTRA": torch.zeros(2),
    }
    assert torch.equal(reward.combine(scores), scores["MEAN"])
    reward.set_weights({"MEAN": 1.0, "PEAK": 0.0})
    assert torch.equal(reward.combine(scores), scores["MEAN"])  # an axis with weight 0 is ignored
    reward.set_weights({"MEAN": 1, "PEAK": 1})
    assert reward.combine(scores).isnan().tolist() == [True, False]
    with pytest.raises(ValueError, match=r"Level.*PEAK"):
        reward.combine({"MEAN": scores["MEAN"]})


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"LOUD": 1.0}, 'no axis "LOUD".*MEAN, PEAK, EXTRA'),
        ({"MEAN": "1"}, "axis MEAN.*finite number.*'1'"),
        ({"PEAK": True}, "axis PEAK.*finite number.*True"),
        ({"PEAK": math.nan}, "axis PEAK.*finite number.*nan"),
        ({"PEAK": -math.inf}, "axis PEAK.*finite number.*-inf"),
        ({"MEAN": 0.0, "PEAK": 0}, "other than 0.*MEAN, PEAK, EXTRA"),
        ({}, "other than 0.*MEAN, PEAK, EXTRA"),
        (["MEAN"], "table of axis = number.*MEAN, PEAK, EXTRA"),
    ],
)
def test_wrong_weights_are_named(weights: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Level().set_weights(weights)


# --- load_reward, and packages that register rewards


def install(folder: Path, name: str, entry_points: Mapping[str, str], version: str = "1.0") -> None:
    """The metadata that an installer writes for a distribution with these rewards."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = "\n".join(f"{kind} = {value}" for kind, value in entry_points.items())
    (info / "entry_points.txt").write_text(f"[smart.rewards]\n{lines}\n")
    importlib.invalidate_caches()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the import path; modules imported from it are removed again afterwards."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    for name in [n for n, m in sys.modules.items() if str(getattr(m, "__file__", "")).startswith(str(folder))]:
        del sys.modules[name]


def fenced(heading: str) -> list[tuple[str, str]]:
    """(language, text) of the fenced blocks under one heading of docs/rewards.md."""
    section = DOCS.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"```(\w+)\n(.*?)```", section, flags=re.DOTALL)


def test_the_example_of_the_docs_works_as_an_installed_package(site: Path) -> None:
    blocks = [block for block in fenced("A reward of your own") if block[0] != "sh"]
    (_, module), (_, project_file) = blocks[:2]
    assert len(module.splitlines()) <= 25
    project = tomllib.loads(project_file)["project"]
    entries = project["entry-points"]["smart.rewards"]
    (site / f"{project['name']}.py").write_text(module, encoding="utf-8")
    install(site, project["name"], entries, project["version"])

    (kind,) = entries
    assert available_rewards()[kind] == f"{project['name']} {project['version']}"
    reward = load_reward(kind, top=10000.0, weights={"BRIGHT": 1.0})
    assert isinstance(reward, Reward)
    assert reward.name == kind
    assert not reward.is_stand_in
    seconds = torch.arange(reward.sample_rate) / reward.sample_rate
    tones = torch.stack([torch.sin(2 * math.pi * hz * seconds) for hz in (500, 5000)] + [0 * seconds])
    combined = reward.combine(reward.score(tones))
    torch.testing.assert_close(combined[:2], 1 + 9 * torch.tensor([0.05, 0.5]), atol=1e-3, rtol=0)
    assert bool(combined[2].isnan())  # silence
    with pytest.raises(UserError, match='reward "bright" has no option "botom"; its options are: top'):
        load_reward(kind, botom=1.0)


def test_an_unknown_kind_lists_what_exists(site: Path) -> None:
    install(site, "acme-rewards", {"acme": "acme:Reward"})
    with pytest.raises(UserError, match=r'no reward "ce_poxy".*audiobox.*ce_proxy.*acme \(acme-rewards 1\.0\)'):
        load_reward("ce_poxy")


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        ("import a_package_that_is_not_there", "ModuleNotFoundError"),
        ("raise OSError('no such library')", "OSError: no such library"),
        ("pass", "AttributeError"),
    ],
)
def test_a_failing_import_names_the_package(site: Path, module: str, reason: str) -> None:
    (site / "acme_module.py").write_text(module)
    install(site, "acme-rewards", {"acme": "acme_module:Acme"}, "2.5")
    with pytest.raises(UserError, match=rf'"acme" of package acme-rewards 2\.5 .*{reason}') as caught:
        load_reward("acme")
    assert "\n" not in str(caught.value)


def test_faults_of_a_registered_reward_are_named(site: Path) -> None:
    (site / "acme_module.py").write_text(
        "value = 3\ndef number(*, device): return 3\ndef needy(*, device, path): return path\n"
    )
    install(site, "acme", {k: f"acme_module:{k}" for k in ("value", "number", "needy")})
    with pytest.raises(UserError, match=r'"value" of package acme 1\.0 is a int, expected a class or a function'):
        load_reward("value")
    with pytest.raises(UserError, match=r'"number" built a int, expected a smart\.reward\.Reward'):
        load_reward("number")
    with pytest.raises(UserError, match=r'"needy" needs the option "path"'):
        load_reward("needy")
    install(site, "acme-too", {"number": "acme_module:number"})
    with pytest.raises(UserError, match=r"several packages \(acme 1\.0, acme-too 1\.0\)"):
        load_reward("number")


def test_a_package_cannot_take_over_a_built_in_name(site: Path) -> None:
    from smart.reward.ce_proxy import CEProxy

    (site / "impostor.py").write_text("def make(*, device): raise AssertionError('called')\n")
    install(site, "impostor", {"ce_proxy": "impostor:make"})
    with pytest.warns(UserWarning, match=r'impostor 1\.0 registers a reward "ce_proxy".*ignored'):
        reward = load_reward("ce_proxy")
    assert type(reward) is CEProxy
    assert available_rewards()["ce_proxy"] == "smart"


def test_built_in_rewards_refuse_what_they_do_not_know() -> None:
    with pytest.raises(UserError, match='reward "ce_proxy" has no option "model"'):
        load_reward("ce_proxy", model="x")
    with pytest.raises(UserError, match=r'"audiobox" has no option "size"; its options are: model, dtype, batch_size'):
        load_reward("audiobox", size=3)
    with pytest.raises(UserError, match=r'no axis "PQ".*CE'):
        load_reward("ce_proxy", weights={"PQ": 1.0})
    with pytest.raises(UserError, match='no device "gpu"'):
        load_reward("ce_proxy", device="gpu")
    with pytest.raises(UserError, match='device "cuda:99" is not available'):
        load_reward("ce_proxy", device="cuda:99")


def test_importing_the_room_loads_no_reward() -> None:
    code = (
        "import sys, smart.reward\n"
        "heavy = 'smart.reward.audiobox smart.reward.ce_proxy audiobox_aesthetics huggingface_hub'\n"
        "loaded = set(heavy.split()) & set(sys.modules)\n"
        "assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# --- resample


def direct(x: npt.NDArray[np.float64], from_rate: int, to_rate: int) -> npt.NDArray[np.float64]:
    """The interpolation formula with times in seconds, output by output, in float64."""
    cutoff = 0.99 * min(from_rate, to_rate)
    inputs = np.arange(len(x)) / from_rate
    out = []
    for j in range(math.ceil(len(x) * to_rate / from_rate)):
        u = cutoff * (j / to_rate - inputs)
        window = np.where(np.abs(u) < 6, np.cos(np.pi * u / 12) ** 2, 0.0)
        out.append(np.sum(x * np.sinc(u) * window) * cutoff / from_rate)
    return np.array(out)


@pytest.mark.parametrize(
    ("from_rate", "to_rate"),
    [
        (44100, 16000),
        (48000, 16000),
        (22050, 16000),
        (16000, 44100),
        (16000, 48000),
        (32000, 22050),
        (7, 5),
        (5, 7),
    ],
)
@pytest.mark.parametrize("samples", [1, 50, 1000])
def test_resample_evaluates_its_formula(from_rate: int, to_rate: int, samples: int) -> None:
    x = torch.randn(samples, dtype=torch.float64, generator=torch.Generator().manual_seed(samples))
    expected = direct(x.numpy(), from_rate, to_rate)
    np.testing.assert_allclose(resample(x, from_rate, to_rate).numpy(), expected, atol=1e-12)
    np.testing.assert_allclose(resample(x.float(), from_rate, to_rate).numpy(), expected, atol=3e-6)


@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 200))
@settings(max_examples=60, deadline=None)
def test_resample_length_and_formula_for_any_rates(from_rate: int, to_rate: int, samples: int) -> None:
    x = torch.randn(samples, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = resample(x, from_rate, to_rate)
    assert y.shape == (math.ceil(samples * to_rate / from_rate),)
    if from_rate != to_rate:
        np.testing.assert_allclose(y.numpy(), direct(x.numpy(), from_rate, to_rate), atol=1e-12)


@pytest.mark.parametrize("from_rate", [44100, 48000, 22050])
def test_resample_reproduces_tones_without_delay(from_rate: int) -> None:
    """A sampled sine becomes the same sine sampled at the new rate: right gain, phase and time."""
    to_rate, hz = 16000, torch.tensor([60.0, 440.0, 2000.0, 5000.0], dtype=torch.float64)[:, None]
    old = torch.sin(2 * math.pi * hz * torch.arange(from_rate // 2) / from_rate + 0.3)
    new = torch.sin(2 * math.pi * hz * torch.arange(to_rate // 2) / to_rate + 0.3)
    middle = slice(50, -50)  # near the ends the signal's edge is visible
    error = (resample(old, from_rate, to_rate) - new)[:, middle].abs().amax(1)
    assert error[:3].max() < 1e-3
    assert error[3] < 1e-2  # such a short filter ripples near its cut-off
    steady = resample(torch.ones(from_rate), from_rate, to_rate)[middle]
    assert (steady - 1).abs().max() < 1e-3


def test_resample_agrees_with_another_resampler_on_band_limited_noise() -> None:
    signal = pytest.importorskip("scipy.signal")
    noise = np.random.default_rng(0).standard_normal(44100)
    spectrum = np.fft.rfft(noise)
    spectrum[np.fft.rfftfreq(44100, 1 / 44100) > 5000] = 0
    x = np.fft.irfft(spectrum)
    ours = resample(torch.from_numpy(x), 44100, 16000).numpy()
    theirs = signal.resample(x, 16000)  # by Fourier transform: exact for a periodic band-limited signal
    middle = slice(100, -100)
    assert np.abs(ours - theirs)[middle].max() < 0.01 * np.abs(theirs).max()


def test_resample_removes_what_the_new_rate_cannot_hold() -> None:
    tone = torch.sin(2 * math.pi * 12000 * torch.arange(44100) / 44100)
    assert resample(tone, 44100, 16000)[100:-100].abs().max() < 1e-2  # -40 dB


def test_resample_shapes_types_and_equal_rates() -> None:
    x = torch.randn(2, 3, 441)
    y = resample(x, 44100, 16000)
    assert y.shape == (2, 3, 160)
    torch.testing.assert_close(y[1, 2], resample(x[1, 2], 44100, 16000))
    assert resample(x, 16000, 16000) is x
    assert resample(x[..., :0], 44100, 16000).shape == (2, 3, 0)
    assert resample(x[:0], 44100, 16000).shape == (0, 3, 160)
    assert resample(x.double(), 48000, 16000).dtype == torch.float64


@pytest.mark.parametrize(
    ("audio", "from_rate", "to_rate", "error", "message"),
    [
        (torch.zeros(3, dtype=torch.int16), 2, 1, TypeError, "float.*int16"),
        (torch.tensor(1.0), 2, 1, TypeError, r"\(\.\.\., S\)"),
        (np.zeros(3), 2, 1, TypeError, "tensor.*ndarray"),
        (torch.zeros(3), 0, 1, ValueError, "positive.*0"),
        (torch.zeros(3), 44100.0, 16000, ValueError, "whole.*44100.0"),
        (torch.zeros(3), 44101, 16000, UserError, "44101 Hz to 16000 Hz.*44100 or 48000"),
    ],
)
def test_resample_names_wrong_arguments(
    audio: Any, from_rate: Any, to_rate: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        resample(audio, from_rate, to_rate)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_resample_on_cuda_keeps_float32_precision() -> None:
    x = torch.randn(2, 44100, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(resample(x.cuda(), 44100, 16000).cpu(), resample(x, 44100, 16000), atol=3e-6, rtol=0)
