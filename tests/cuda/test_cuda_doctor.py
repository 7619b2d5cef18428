"""smart doctor --gpu on the simulated device: it finds agreement where there is, and names what was broken."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from audiobox_weights import thin_architecture
from checks import EOS, some_prompts, tiny
from click.testing import CliRunner
from simulated_cuda import CPU, CUDA, simulated

import smart.doctor.command
from smart.config import load
from smart.doctor import agreement, gpu, speed
from smart.doctor.check import BAD, DIFFERS, FAILED, OK, SKIPPED, Check, compare
from smart.doctor.made_up import random_audiobox, random_clip, waves
from smart.render import bank, find_soundfont
from smart.reward import load_reward
from smart.run import Span, checkpoint
from smart.sampler import Rollout, Sampler
from smart.tokens import build_tokenizer

BOTH = (torch.float32, torch.bfloat16)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    with simulated():
        card = SimpleNamespace(name="simulated", total_memory=8 << 30, major=8, minor=6)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: card)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda *_: None)
        yield CUDA


def verdicts(rows: list[Check]) -> dict[str, str]:
    return {row.name: row.verdict for row in rows}


def sampler(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    prompts = some_prompts([4, 4])
    return verdicts(agreement.sampler(tiny(), prompts, device=device, dtype=dtype, eos_id=EOS, group_size=2, tokens=20))


def rollout() -> Rollout:
    tokens = torch.randint(3, 413, (6, 16), generator=torch.Generator().manual_seed(2))
    mask = torch.arange(12) < torch.tensor([12, 5, 7, 9, 4, 12])[:, None]
    return Rollout(tokens, mask, torch.full((6, 12), -3.0) * mask)


@pytest.mark.parametrize("dtype", BOTH)
def test_the_sampler_agrees(device: torch.device, dtype: torch.dtype) -> None:
    found = sampler(device, dtype)
    assert len(found) == 3 and set(found.values()) == {OK}, found


def test_a_graph_that_reads_old_weights_differs(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from smart.sampler import graph

    weights_of, read = graph.weights_of, []

    def stale(net: Any) -> list[torch.Tensor]:
        read.append(net)
        return weights_of(read[0])  # the first batch's casts, which are copied onto themselves

    monkeypatch.setattr(graph, "weights_of", stale)
    found = sampler(device, torch.bfloat16)
    assert set(found.values()) == {DIFFERS}, found


def test_a_capture_that_fails_is_named(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("operation not permitted")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    monkeypatch.setattr(Sampler, "_captures", True, raising=False)  # what it remembers ends with this test
    found = sampler(device, torch.float32)
    assert found["sampler float32, graph"] == FAILED and found["sampler float32, CPU"] == OK, found
    capsys.readouterr()


def test_a_pass_over_other_tokens_differs(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    token_logprobs = agreement.token_logprobs

    def late(model: Any, tokens: torch.Tensor, length: int, **options: Any) -> torch.Tensor:
        moved = torch.cat([tokens[:, :length], tokens[:, length:].roll(1, 1)], 1)
        return token_logprobs(model, moved if tokens.is_cuda else tokens, length, **options)

    monkeypatch.setattr(agreement, "token_logprobs", late)
    found = sampler(device, torch.float32)
    assert found["sampler float32, uncached"] == DIFFERS and found["sampler float32, graph"] == OK, found


def test_ratings_agree(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    def check() -> str:
        audio, lengths = waves(2.0)
        (row,) = agreement.reward("ce_proxy", lambda **o: load_reward("ce_proxy", **o), audio, lengths, device=device)
        return row.verdict

    assert check() == OK
    describe = load_reward("ce_proxy").rate.__globals__["describe"]
    louder = lambda clip: describe(clip) + (0.02 if clip.is_cuda else 0)  # noqa: E731
    monkeypatch.setitem(load_reward("ce_proxy").rate.__globals__, "describe", louder)
    assert check() == DIFFERS


def test_audiobox_agrees_in_both_precisions(device: torch.device, tmp_path: Path) -> None:
    with thin_architecture():
        folder, (audio, lengths) = str(random_audiobox(tmp_path)), waves()
        rows = agreement.reward(
            "audiobox", lambda **options: load_reward("audiobox", model=folder, **options), audio[:2], lengths[:2],
            device=device, dtypes=("float32", "bfloat16"), choice=True,
        )  # fmt: skip
    assert verdicts(rows) == {"audiobox float32": OK, "audiobox bfloat16": OK}


def test_the_note_bank_agrees_with_a_worker(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    def check() -> Check:
        clips = [random_clip(np.random.default_rng(3), count=5, seconds=2.0)]
        (row,) = agreement.note_bank(find_soundfont("timgm"), clips, device=device, sample_rate=22050, seconds=2.0)
        return row

    assert check().verdict == OK
    try_render = bank.NoteBank.try_render

    def off(mixer: Any, clips: Any) -> list[Any]:
        return [audio.roll(1, 1) for audio in try_render(mixer, clips)]  # type: ignore[union-attr]

    monkeypatch.setattr(bank.NoteBank, "try_render", off)
    row = check()
    assert row.verdict == DIFFERS and row.remedy == "--set render.backend=pool"


def test_the_gradient_agrees(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    found = verdicts(agreement.gradient(tiny(), rollout(), device=device, dtypes=BOTH, micro_batch=4))
    assert found == {"gradient float32": OK, "gradient bfloat16": OK}
    learn = agreement.learn

    def forget(policy: Any, rollout: Rollout, *args: Any, **options: Any) -> None:
        few = Rollout(*(part[:4] if part.is_cuda else part for part in rollout))
        learn(policy, few, *args, **options)

    monkeypatch.setattr(agreement, "learn", forget)
    found = verdicts(agreement.gradient(tiny(), rollout(), device=device, dtypes=BOTH, micro_batch=4))
    assert set(found.values()) == {DIFFERS}


def test_a_checkpoint_is_resumed(device: torch.device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (row,) = agreement.resume(tiny(), build_tokenizer(), tmp_path / "a", device=device)
    assert row.verdict == OK, row
    read_state = checkpoint.read_state

    def without_moments(folder: Path, model: Any, optimizer: Any, **generators: Any) -> None:
        read_state(folder, model, optimizer, **generators)
        for state in optimizer.state.values():
            state["exp_avg"].zero_()

    monkeypatch.setattr(checkpoint, "read_state", without_moments)
    (row,) = agreement.resume(tiny(), build_tokenizer(), tmp_path / "b", device=device)
    assert row.verdict == DIFFERS and row.values["resumed"] > 0 and row.values["random numbers"] == 0


SMALL = (
    "grpo.prompts=2", "grpo.group_size=2", "grpo.micro_batch=3", "sampling.max_new_tokens=20", "render.workers=1",
    "render.seconds=1.0", "render.sample_rate=22050", "render.soundfont=timgm",
)  # fmt: skip


@pytest.mark.parametrize("music", [True, False])
def test_iterations_are_timed(device: torch.device, music: bool) -> None:
    config = load("quickstart.toml", SMALL)
    rows = speed.iterations(
        config, tiny(), build_tokenizer(), load_reward("ce_proxy", device=device), find_soundfont("timgm"),
        device=device, music=music, counted=1,
    )  # fmt: skip
    found = {row.name: row for row in rows}
    assert list(found) == ["seconds", "overlap", "memory"] and found["memory"].verdict == OK
    seconds = dict(found["seconds"].values)
    assert seconds.pop("iteration") == pytest.approx(sum(seconds.values())) and min(seconds.values()) > 0
    assert found["overlap"].values["rendering"] > 0


def test_overlap_counts_what_two_lanes_did_at_once() -> None:
    spans = [
        Span("generate", 0.0, 4.0, "main"), Span("render", 3.0, 5.0, "a"), Span("render", 3.5, 6.0, "b"),
        Span("rate", 5.5, 6.5, "within"), Span("wait", 4.0, 5.5, "within"),
    ]  # fmt: skip
    values = speed.overlap(spans, 1).values
    assert list(values.values()) == [4.5, 1.5, 1.0, 0.5, 1.5]


def test_a_limit_is_kept_by_numbers_only() -> None:
    for value, verdict in ((1.0, OK), (1.1, DIFFERS), (float("nan"), DIFFERS)):
        row = compare("x", {"gap": value}, {"gap": 1.0}, "switch it off")
        assert row.verdict == verdict and bool(row.remedy) == (verdict == DIFFERS)


def parts_of(**work: Callable[[], list[Check]]) -> Callable[..., Iterator[gpu.Part]]:
    return lambda *_: iter(work.items())


@pytest.mark.parametrize(
    ("error", "verdict", "code"),
    [
        (None, OK, 0),
        (torch.OutOfMemoryError("CUDA out of memory"), FAILED, 1),
        (RuntimeError("CUDA error: no kernel image is available"), FAILED, 1),
        (ImportError("No module named 'audiobox_aesthetics'"), SKIPPED, 0),
    ],
)
def test_the_command_goes_on_after_a_failure(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, error: Exception | None, verdict: str, code: int
) -> None:
    def work() -> list[Check]:
        if error is not None:
            raise error
        return [compare("one", {"gap": 0.0}, {"gap": 1.0}, "")]

    last = lambda: [compare("last", {"gap": 0.0}, {"gap": 1.0}, "")]  # noqa: E731
    monkeypatch.setattr(gpu, "parts", parts_of(one=work, last=last))
    done = CliRunner().invoke(smart.doctor.command.main, ["--gpu"])
    assert done.exit_code == code, done.output
    found = json.loads(done.output.splitlines()[-1])
    assert found["ok"] == (code == 0)
    states = {row["name"]: row["verdict"] for row in found["checks"]}
    assert states == {"device": "measured", "one": verdict, "last": OK}
    assert ("not as it should be: one" in done.output) == (verdict in BAD)


@pytest.mark.slow
def test_the_whole_check(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """All parts of the command, tiny, with nothing that the package does not ship."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(gpu, "load_base", lambda *_: (tiny(), build_tokenizer()))
    monkeypatch.setattr(gpu, "build_model", lambda *_: tiny())
    monkeypatch.setattr(gpu, "LONG", 24)
    overrides = [word for text in SMALL for word in ("--set", text)]
    with thin_architecture():
        done = CliRunner().invoke(smart.doctor.command.main, ["--gpu", *overrides])
    assert done.exit_code == 0, done.output
    found = json.loads(done.output.splitlines()[-1])
    names = " ".join(row["name"] for row in found["checks"])
    for part in ("sampler", "ce_proxy", "audiobox", "note bank", "gradient", "checkpoint", "seconds", "memory"):
        assert part in names


def test_without_a_gpu_it_is_one_line() -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    done = CliRunner().invoke(smart.doctor.command.main, ["--gpu"])
    assert done.exit_code == 2 and done.output.count("\n") == 1 and "GPU" in done.output


def test_all_parts_agree_on_a_cpu(tmp_path: Path) -> None:
    """There is nothing to differ: the limits hold, and no part needs CUDA."""
    rows = agreement.sampler(tiny(), some_prompts([4, 4]), device=CPU, dtype=BOTH[0], eos_id=EOS, tokens=20)
    rows += agreement.gradient(tiny(), rollout(), device=CPU, dtypes=BOTH)
    rows += agreement.resume(tiny(), build_tokenizer(), tmp_path, device=CPU)
    assert len(rows) == 5 and set(verdicts(rows).values()) == {OK}
