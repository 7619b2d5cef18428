"""Checks that the tests of the CUDA paths share; the tests of mutations show that they can fail."""

import __future__

import contextlib
import inspect
import textwrap
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tiny_model
from simulated_cuda import DEFAULT, Device, simulated
from torch import Tensor

from smart.run import Stopwatch
from smart.sampler import Rollout, Sampler
from smart.tokens import build_grammar, build_tokenizer

PAD, EOS = 0, 2


def tiny(seed: int = 3) -> Any:
    return make_tiny_model(build_tokenizer(), seed)


def some_prompts(lengths: list[int]) -> Tensor:
    """(B, P) int64, left-padded."""
    width, generator = max(lengths), torch.Generator().manual_seed(1)
    rows = torch.randint(3, 413, (len(lengths), width), generator=generator)
    for row, length in zip(rows, lengths, strict=True):
        row[: width - length] = PAD
    return rows


def sampled(model: Any, prompts: Tensor, *, captured: bool, sampler: Sampler | None = None, **options: Any) -> Rollout:
    """Sample with a captured step, or step by step; asserts that it was done in this way."""
    dtype, eos = options.pop("dtype", None), options.pop("eos_id", EOS)
    sampler = sampler or Sampler(model, pad_id=PAD, eos_id=eos, dtype=dtype)
    with pytest.MonkeyPatch.context() as patch:
        if not captured:
            patch.setattr("smart.sampler.sample.GRAPH_DEVICES", set())
        before = len(sampler._graphs)
        rollout = sampler.sample(prompts, generator=torch.Generator().manual_seed(5), **options)
    assert bool(sampler._graphs) if captured else len(sampler._graphs) == before, "no graph could be captured"
    return rollout


def assert_same_rollout(one: Rollout, other: Rollout, dtype: torch.dtype | None = torch.float32) -> None:
    """The same tokens; in bfloat16, where attention over other numbers of places rounds otherwise, until they part."""
    one, other = one.to("cpu"), other.to("cpu")
    if dtype == torch.bfloat16:
        length = min(one.mask.shape[1], other.mask.shape[1])
        first, second = (part.tokens[:, -part.mask.shape[1] :][:, :length] for part in (one, other))
        common = (first == second).cumprod(1).bool() & one.mask[:, :length]
        apart = (one.logprobs[:, :length] - other.logprobs[:, :length]).abs()[common]
        assert common[:, 0].all() and common.float().mean() > 0.2, f"they part at once: {common.sum(1).tolist()}"
        assert apart.max() < 0.2
        return
    assert torch.equal(one.tokens, other.tokens)
    assert torch.equal(one.mask, other.mask)
    torch.testing.assert_close(one.logprobs, other.logprobs, atol=1e-3, rtol=0)


def check_captured_step(lengths: list[int], dtype: torch.dtype, **options: Any) -> Device:
    """A graph gives what the steps give one by one; it is captured as it must be, and waits no more than it must."""
    with simulated() as device:
        model, prompts = tiny().to("cuda"), some_prompts(lengths).to("cuda")
        options = {"max_new_tokens": 36, "group_size": 3, "dtype": dtype, **options}
        rollout = sampled(model, prompts, captured=True, **options)
        places = dict(device.places)
        assert_same_rollout(rollout, sampled(model, prompts, captured=False, **options), dtype)
    captures = [entry for entry in device.log if entry[0] == "capture"]
    assert len(captures) == 1 and captures[0][2] == "thread_local", device.log
    stream = captures[0][1]
    waits = [entry[1:] for entry in device.log if entry[0] == "wait"]
    assert waits == [(stream, DEFAULT), (DEFAULT, stream)], "the streams do not wait for each other"
    assert not any("not warmed up" in entry[0] for entry in device.log), "captured without a warm-up"
    slow = [key for key in device.attention if "math" in key[1]]
    assert not slow, slow
    between = sum(many for (kind, place), many in places.items() if kind == "wait" and "smart/sampler" in place)
    assert device.counts["replay"] >= 16 and between < 20, places
    return device


def check_graph_used_again(dtype: torch.dtype | None) -> None:
    """One graph for batches of other lengths; it remembers nothing, and sees moved weights, in place or not."""
    with simulated() as device:
        model = tiny().to("cuda")
        sampler = Sampler(model, pad_id=PAD, eos_id=EOS, dtype=dtype)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
        other = {name: value.clone() for name, value in tiny(seed=4).to("cuda").state_dict().items()}

        def step() -> None:
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()

        def other_parameters() -> None:
            for module in model.modules():
                for name, parameter in list(module._parameters.items()):
                    if parameter is not None:
                        setattr(module, name, torch.nn.Parameter(parameter.detach() * 1.1))

        captures = 1
        reload = lambda: model.load_state_dict(other)  # noqa: E731
        for change, new in ((lambda: None, 0), (step, 0), (reload, 0), (other_parameters, 1)):
            change()
            captures += new
            for lengths, limit in (([4, 4], 28), ([2, 6], 26)):
                prompts = some_prompts(lengths).to("cuda")
                options: dict[str, Any] = {"max_new_tokens": limit, "group_size": 2, "dtype": dtype}
                rollout = sampled(model, prompts, captured=True, sampler=sampler, **options)
                assert_same_rollout(rollout, sampled(model, prompts, captured=False, **options), dtype)
            assert sum(entry[0] == "capture" for entry in device.log) == captures


def check_other_options() -> None:
    """One sampler, other options from batch to batch: none uses another's graph, or changes what was drawn before."""
    grammar = build_grammar(build_tokenizer())
    stricter = grammar.allowed.clone()
    notes = (grammar.position < 0) & (torch.arange(len(stricter)) != grammar.bar_id)
    stricter[:, notes & (torch.arange(len(stricter)) % 3 == 0)] = False
    assert stricter.any(1)[grammar.allowed.any(1)].all()
    with simulated():
        model = tiny().to("cuda")
        sampler = Sampler(model, pad_id=PAD, eos_id=EOS)
        drawn: list[tuple[Rollout, Rollout]] = []
        for lengths, filters in (
            ([4, 4], {}),
            ([4, 4], {"temperature": 0.7}),
            ([4, 4], {"top_k": 5}),
            ([1, 1], {"grammar": grammar}),
            ([2, 3], {"grammar": grammar}),  # the same graph
            ([2, 3], {"grammar": replace(grammar, allowed=stricter)}),
        ):
            prompts, options = some_prompts(lengths).to("cuda"), {"max_new_tokens": 24, "group_size": 2, **filters}
            rollout = sampled(model, prompts, captured=True, sampler=sampler, **options)
            drawn.append((rollout, sampled(model, prompts, captured=False, **options)))
        for one, other in drawn:
            assert_same_rollout(one, other)


def check_rows_that_end() -> None:
    """A batch whose rows all end early is left early, and has nothing of the one before, whose rows did not end."""
    with simulated() as device:
        model, prompts = tiny().to("cuda"), some_prompts([4, 4]).to("cuda")
        sampler = Sampler(model, pad_id=PAD, eos_id=EOS)
        options: dict[str, Any] = {"max_new_tokens": 60, "group_size": 2, "top_k": EOS + 1}
        widths = []
        for _ in range(2):
            with device.counted() as counts:
                rollout = sampled(model, prompts, captured=True, sampler=sampler, **options)
            assert_same_rollout(rollout, sampled(model, prompts, captured=False, **options))
            widths.append(rollout.mask.shape[1])
            with torch.no_grad():
                model.lm_head.weight.zero_()  # of equal logits the lowest ids are kept: one token in three is EOS
        assert widths[0] == 60 > 32 > widths[1] and counts["replay"] == 32, (widths, counts)


def check_watched_rows() -> None:
    """``watch`` gets the rows as they were, which is only so where the copy was waited for."""
    with simulated() as device:
        model, prompts = tiny().to("cuda"), some_prompts([4, 3]).to("cuda")
        seen: list[tuple[Tensor, Tensor]] = []
        rollout = sampled(
            model,
            prompts,
            captured=True,
            max_new_tokens=80,
            group_size=4,
            eos_id=None,
            watch=lambda tokens, ended: seen.append((tokens.clone(), ended.clone())),
        )
        blocking = [place for kind, place in device.places if "smart/sampler" in place and "copy to the host" in place]
        tokens = rollout.tokens.cpu()
        assert len(seen) == 4 and device.counts["event"] == 4 and not blocking, blocking
        for rows, ended in seen:
            assert torch.equal(rows, tokens[:, : rows.shape[1]]) and not ended.any()


def check_steps_one_by_one(**filters: Any) -> None:
    """Without a graph it draws what a CPU draws, and the host rarely waits."""
    prompts = some_prompts([4, 2, 4])
    options: dict[str, Any] = {"max_new_tokens": 48, "group_size": 3, **filters}
    expected = sampled(tiny(), prompts, captured=False, **options)
    with simulated() as device:
        model = tiny().to("cuda")
        rollout = sampled(model, prompts.to("cuda"), captured=False, **options)
        assert device.counts["wait"] < 30, device.places
        assert rollout.tokens.is_cuda
        assert_same_rollout(rollout, expected)


@contextlib.contextmanager
def mutated(owner: Any, name: str, old: str, new: str) -> Iterator[None]:
    """Within the block, ``owner.name`` is a function whose source has ``new`` in place of ``old``."""
    function = inspect.unwrap(getattr(owner, name))
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(old) == 1, f"{name} has changed: {old!r} occurs {source.count(old)} times in it"
    made: dict[str, Any] = {}
    code = compile(
        source.replace(old, new), f"<{name}, mutated>", "exec", __future__.annotations.compiler_flag, dont_inherit=True
    )
    exec(code, function.__globals__, made)  # its own globals, so that it sees what is patched there
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, made[name])
        yield


RUN = {
    "grpo.iterations": 3, "grpo.prompts": 2, "grpo.group_size": 3, "grpo.micro_batch": 4, "render.seconds": 2.0,
    "sampling.max_new_tokens": 36, "render.workers": 1, "track.checkpoint_every": 2, "track.samples_every": 2,
    "track.samples": 1, "track.final_prompts": 3, "track.final_listen": 1, "track.held_out_every": 2,
    "track.held_out_prompts": 2, "run.device": "cuda", "run.name": "r",
    "reward.target": "none",
}  # fmt: skip


def tune(folder: Path, *, resume: bool = False, **changes: Any) -> Path:
    """A whole run, small; ``changes`` are settings, with __ in place of the dot. Returns its folder."""
    from smart.config import load
    from smart.grpo import train

    settings = RUN | {"run.folder": str(folder)} | {key.replace("__", "."): value for key, value in changes.items()}
    written = {key: f"'{value}'" if isinstance(value, str) else str(value).lower() for key, value in settings.items()}
    return train(
        load("quickstart.toml", ["rewards=[]", *(f"{key}={value}" for key, value in written.items())]), resume=resume
    )


@contextlib.contextmanager
def counted_stages(device: Device) -> Iterator[list[tuple[str, Counter[str]]]]:
    """A list that grows by one with every stage of every iteration of a run: its name, and what the device counted."""
    stages: list[tuple[str, Counter[str]]] = []
    lap, before = Stopwatch.lap, device.counts.copy()

    def counted_lap(watch: Stopwatch, stage: str) -> None:
        nonlocal before
        stages.append((stage, device.counts - before))
        before = device.counts.copy()
        lap(watch, stage)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stopwatch, "lap", counted_lap)
        yield stages
