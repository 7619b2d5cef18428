"""Does a device compute what a CPU does? Each function compares one part of a run and returns its rows of the table.

All take the device, so that they also run on a CPU, where every part agrees with itself.

Axes: B prompts, N sequences, P prompt length, T completion length, S audio samples.
"""

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from smart.doctor.check import FAILED, Check, compare, measured
from smart.logprobs import completion_logits, logprobs_and_entropy, token_logprobs
from smart.model import load_base, save_base
from smart.render import Notes, RenderPool, bank
from smart.reward import Reward
from smart.run import checkpoint
from smart.sampler import Rollout, Sampler

SHORT_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
# nats: the largest and the mean difference of a token's log-probability; a kernel may add in another order
LOGPROBS = {
    torch.float32: {"largest": 1e-3, "mean": 1e-4},
    torch.bfloat16: {"largest": 0.3, "mean": 0.03},
}
# share of the tokens before which two samplers with the same random numbers have drawn the same: a rounding that turns
# one draw parts a row for good
ALIKE = {torch.float32: 0.9, torch.bfloat16: 0.2}
GRADIENT = {torch.float32: 1e-3, torch.bfloat16: 0.1}  # norm of the difference, relative to the gradient's
RATING = {"float32": 1e-3, "bfloat16": 0.1}  # points of ten
LEAST_SNR = 55.0  # dB, of a clip of the note bank against the synthesiser


# The sampler --------------------------------------------------------------------------------------------------


def sampler(
    model: Any,
    prompts: torch.Tensor,
    *,
    device: torch.device,
    dtype: torch.dtype,
    eos_id: int | None,
    group_size: int = 8,
    tokens: int = 256,
) -> list[Check]:
    """Compare the sampler's log-probabilities: graph, step by step, uncached forward pass, and CPU in float32.

    ``model`` is on the CPU, ``prompts`` (B, P) int64. Two batches are drawn with one sampler; before the second, whose
    prompts are padded, the weights change in place: a graph must see that.
    """
    pad_id = int(model.config.pad_token_id)
    truth, moved = copy.deepcopy(model), copy.deepcopy(model).to(device)
    one, other = (Sampler(moved, pad_id=pad_id, eos_id=eos_id, dtype=dtype) for _ in range(2))
    other.step_by_step()
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    by_steps, by_forward, by_cpu, common = [], [], [], []
    padded = prompts.clone()
    padded[::2, 0] = pad_id
    for number, rows in enumerate((prompts, padded)):
        if number:
            _disturb(truth)
            with torch.no_grad():
                for there, here in zip(moved.parameters(), truth.parameters(), strict=True):
                    there.copy_(here)
        options: dict[str, Any] = {"max_new_tokens": tokens, "group_size": group_size}
        drawn = [each.sample(rows, generator=torch.Generator().manual_seed(number), **options) for each in (one, other)]
        rollout, alike = drawn[0], same_draws(*drawn)
        width = alike.shape[1]
        common.append(alike.float().sum().item() / max(rollout.mask[:, :width].sum().item(), 1))
        by_steps.append((drawn[0].logprobs[:, :width] - drawn[1].logprobs[:, :width])[alike])
        with torch.no_grad(), autocast:
            forward = token_logprobs(moved, rollout.tokens, rows.shape[1], micro_batch=16)
        by_forward.append((forward - rollout.logprobs)[rollout.mask])
        mask = rollout.mask.cpu()
        with torch.no_grad():
            exact = token_logprobs(truth, rollout.tokens.cpu(), rows.shape[1], micro_batch=16)
        by_cpu.append((exact - rollout.logprobs.cpu())[mask])
    name, limits = f"sampler {SHORT_NAMES[dtype]}", LOGPROBS[dtype]
    lower = "--set sampling.dtype=float32" if dtype == torch.bfloat16 else "--set run.device=cpu"
    found = [
        compare(f"{name}, uncached", _spread(by_forward), limits, f"{lower} (and grpo.precision likewise)"),
        compare(f"{name}, CPU", _spread(by_cpu), limits, lower),
    ]
    if device.type != "cpu":
        if not one._graphs:
            return [
                Check(f"{name}, graph", FAILED, "no CUDA graph could be captured; runs sample step by step"),
                *found,
            ]
        values = _spread(by_steps) | {"parted": 1 - min(common)}
        found.insert(0, compare(f"{name}, graph", values, limits | {"parted": 1 - ALIKE[dtype]}, NO_GRAPH))
    return found


NO_GRAPH = "nothing: a run finds this in its first iteration and then samples step by step; please report it"


def _disturb(model: Any) -> None:
    """Change all weights in place, by a tenth: enough to show in bfloat16."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weights in model.parameters():
            weights.add_(0.1 * weights.std() * torch.randn(weights.shape, generator=generator))


def same_draws(one: Rollout, other: Rollout) -> torch.Tensor:
    """(N, T) bool, T the shorter of both: where two samplers have drawn the same tokens so far."""
    width = min(one.mask.shape[1], other.mask.shape[1])
    first, second = (part.tokens[:, -part.mask.shape[1] :][:, :width] for part in (one, other))
    return (first == second).cumprod(1).bool() & one.mask[:, :width] & other.mask[:, :width]


def _spread(differences: Sequence[torch.Tensor]) -> dict[str, float]:
    """The largest and the mean absolute difference; NaN if there is none to compare."""
    together = torch.cat([part.flatten() for part in differences]).abs()
    if not len(together):
        return {"largest": math.nan, "mean": math.nan}
    return {"largest": together.max().item(), "mean": together.mean().item()}


# The reward ---------------------------------------------------------------------------------------------------


def reward(
    name: str,
    build: Callable[..., Reward],
    audio: torch.Tensor,
    lengths: torch.Tensor,
    *,
    device: torch.device,
    dtypes: Sequence[str] = ("float32",),
    choice: bool = False,
) -> list[Check]:
    """Compare ratings on ``device`` with those of a CPU in float32, in points of ten.

    ``build(device=..., [dtype=...])`` makes the reward; ``choice`` says that it takes a dtype. ``audio`` (N, S).
    """
    options = {"dtype": "float32"} if choice else {}
    expected = build(device="cpu", **options).score(audio, lengths)
    found = []
    for dtype in dtypes:
        options = {"dtype": dtype} if choice else {}
        rated = build(device=device, **options).score(audio.to(device), lengths)
        gap = max((rated[axis].cpu() - values).abs().max().item() for axis, values in expected.items())
        remedy = "--set reward.options.dtype=float32"
        if dtype == "float32":
            remedy = "unset NVIDIA_TF32_OVERRIDE if it is set, else --set run.device=cpu"
        label = f"{name} {dtype}" if choice else name
        found.append(compare(label, {"difference": gap}, {"difference": RATING[dtype]}, remedy))
    return found


# The renderer -------------------------------------------------------------------------------------------------


def note_bank(
    soundfont: Path, clips: Sequence[Notes], *, device: torch.device, sample_rate: int, seconds: float
) -> list[Check]:
    """Compare clips mixed on ``device`` from stored notes with those of a render worker."""
    mixer = bank.NoteBank(soundfont, sample_rate=sample_rate, seconds=seconds, device=device)
    found, again = mixer.try_render(clips), mixer.try_render(clips)
    with RenderPool(soundfont, sample_rate=sample_rate, seconds=seconds, workers=1) as pool:
        expected = [torch.from_numpy(audio) for audio in pool.map(clips)]
    noise, changed, left = -math.inf, 0.0, 0
    for mixed, repeated, rendered in zip(found, again, expected, strict=True):
        if not (isinstance(mixed, torch.Tensor) and isinstance(repeated, torch.Tensor)):
            left += 1
            continue
        error = (mixed.cpu().double() - rendered).square().sum() / rendered.double().square().sum()
        noise = max(noise, 10 * math.log10(max(error.item(), 1e-30)))
        changed = max(changed, (mixed - repeated).abs().max().item())
    name, remedy = "note bank, workers", "--set render.backend=pool"
    if left == len(clips):
        return [measured(name, {"left to the workers": left}, f"of {len(clips)} clips")]
    values = {"noise in dB": noise, "second time": changed, "left to the workers": float(left)}
    return [compare(name, values, {"noise in dB": -LEAST_SNR, "second time": 0.0}, remedy)]


# Learning -----------------------------------------------------------------------------------------------------


def learn(
    policy: Any, rollout: Rollout, advantages: torch.Tensor, *, micro_batch: int, autocast: torch.autocast
) -> None:
    """Add to the policy's gradient that of the GRPO loss on the policy that sampled: its ratio is 1, its KL term 0.

    ``advantages`` (N,), on the rollout's device.
    """
    tokens, mask, _ = rollout
    length = tokens.shape[1] - mask.shape[1]
    weights = mask / mask.sum()
    for rows in torch.arange(len(tokens), device=tokens.device).split(micro_batch):
        with autocast:
            logits = completion_logits(policy, tokens[rows], length)
        logp, _ = logprobs_and_entropy(logits, tokens[rows, length:])
        del logits
        (-(advantages[rows, None] * logp) * weights[rows]).sum().backward()


def gradient(
    model: Any, rollout: Rollout, *, device: torch.device, dtypes: Sequence[torch.dtype], micro_batch: int = 16
) -> list[Check]:
    """Compare the gradient of one update on ``device``, in each precision, with a CPU's in float32.

    ``model`` and ``rollout`` are on the CPU; every other completion is better than the rest.
    """
    advantages = torch.ones(len(rollout.tokens))
    advantages[::2] = -1

    def of(place: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
        policy = copy.deepcopy(model).to(place)
        autocast = torch.autocast(place.type, dtype, enabled=dtype != torch.float32)
        moved = Rollout(*(part.to(place) for part in rollout))
        learn(policy, moved, advantages.to(place), micro_batch=micro_batch, autocast=autocast)
        return [weights.grad.cpu() for weights in policy.parameters()]

    expected = of(torch.device("cpu"), torch.float32)
    size = _norm(expected)
    found = []
    for dtype in dtypes:
        gap = _norm([a - b for a, b in zip(of(device, dtype), expected, strict=True)]) / size
        remedy = "--set grpo.precision=float32" if dtype == torch.bfloat16 else "--set run.device=cpu"
        name = f"gradient {SHORT_NAMES[dtype]}"
        found.append(compare(name, {"difference": gap}, {"difference": GRADIENT[dtype]}, remedy))
    return found


def _norm(parts: Sequence[torch.Tensor]) -> float:
    return math.sqrt(sum(part.double().square().sum().item() for part in parts))


def resume(model: Any, tokenizer: Any, folder: Path, *, device: torch.device) -> list[Check]:
    """Save and resume an optimiser, as a run does: it must continue exactly, and as a CPU's does up to rounding."""

    def start(policy: Any) -> torch.optim.Optimizer:
        fused = next(policy.parameters()).device.type == "cuda"
        return torch.optim.AdamW(policy.parameters(), lr=1e-3, weight_decay=0.0, fused=fused)

    def steps(policy: Any, optimizer: torch.optim.Optimizer, many: range) -> None:
        for step in many:
            generator = torch.Generator().manual_seed(step)
            for weights in policy.parameters():
                weights.grad = torch.randn(weights.shape, generator=generator).to(weights.device)
            optimizer.step()

    policy, exact = copy.deepcopy(model).to(device), copy.deepcopy(model)
    optimizer, on_cpu = start(policy), start(exact)
    generator, again = (torch.Generator(device).manual_seed(seed) for seed in (3, 4))
    steps(policy, optimizer, range(3))

    def write(target: Path) -> None:
        save_base(policy, tokenizer, target)
        checkpoint.write_state(target, policy, optimizer, sampler=generator)

    checkpoint.save(folder, 3, write)
    last = checkpoint.latest(folder)
    assert last is not None
    resumed = load_base(last, device=device)[0]
    restored = start(resumed)
    checkpoint.read_state(last, resumed, restored, sampler=again)
    steps(policy, optimizer, range(3, 6))
    steps(resumed, restored, range(3, 6))
    steps(exact, on_cpu, range(6))
    values = {
        "resumed": _largest(policy, resumed),
        "CPU": _largest(policy, exact),
        "random numbers": (_drawn(generator) - _drawn(again)).abs().max().item(),
    }
    limits = {"resumed": 0.0, "CPU": 1e-5, "random numbers": 0.0}
    return [compare("checkpoint", values, limits, "do not use --resume on this machine; please report this")]


def _drawn(generator: torch.Generator) -> torch.Tensor:
    return torch.rand(8, generator=generator, device=generator.device).cpu()


def _largest(one: Any, other: Any) -> float:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max((a.detach().cpu() - b.detach().cpu()).abs().max().item() for a, b in pairs)
