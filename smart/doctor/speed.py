"""How long iterations of a configuration take on a device, stage by stage, what overlaps, and how much memory it takes.

An iteration is that of ``smart.tuning``, without measuring, logging and saving.
"""

import copy
import statistics
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from smart.config import Config
from smart.distributed import World
from smart.doctor.agreement import learn
from smart.doctor.check import LESS_MEMORY, Check, compare, measured
from smart.doctor.made_up import MusicInstead
from smart.logprobs import Reference
from smart.model import pick_precision
from smart.prompts import draw
from smart.render import Renderer, open_renderer
from smart.reward import Reward
from smart.rollout import Batches, Scorer
from smart.run import Span, Stopwatch
from smart.sampler import Sampler
from smart.tokens import vocabulary

STAGES = ("generate", "reference", "score", "learn")


def iterations(
    config: Config,
    model: Any,
    tokenizer: Any,
    reward: Reward,
    soundfont: Path,
    *,
    device: torch.device,
    music: bool,
    counted: int = 2,
) -> list[Check]:
    """Time ``counted`` iterations of ``config`` after one that warms up; ``model`` is on the CPU.

    ``music``: the model writes music. If not, clips of 70 notes are rendered instead of what it writes.
    """
    settings, render = config.grpo, config.render
    precision = pick_precision(settings.precision, device)
    autocast = torch.autocast(device.type, precision, enabled=precision != torch.float32)
    policy, watch, facts = copy.deepcopy(model).to(device), Stopwatch(), vocabulary(tokenizer)
    reference = Reference(
        policy, temperature=config.sampling.temperature, micro_batch=settings.micro_batch, autocast=autocast
    )
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6, weight_decay=0.0, fused=device.type == "cuda")
    sampler = Sampler(
        policy, pad_id=facts.pad_id, eos_id=facts.eos_id, dtype=pick_precision(config.sampling.dtype, device)
    )
    # "dataset" prompts have the same form
    kind = "procedural" if config.prompts.kind == "dataset" else config.prompts.kind
    prompts = draw(kind, settings.prompts, tokenizer, torch.Generator().manual_seed(0)).to(device)
    opened: AbstractContextManager[Renderer] = open_renderer(
        render.backend, soundfont, sample_rate=render.sample_rate, seconds=render.seconds,
        workers=render.workers or None, deadline=render.deadline, device=device,
        bank_megabytes=render.bank_megabytes,
    )  # fmt: skip
    laps: list[dict[str, float]] = []
    spans: list[Span] = []
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what earlier work has left reserved
        torch.cuda.reset_peak_memory_stats(device)
    with opened as renderer:
        pool = renderer if music else MusicInstead(renderer, render.seconds)
        scorer = Scorer(tokenizer, pool, reward, sample_rate=render.sample_rate, seconds=render.seconds)
        options = {key: getattr(config.sampling, key) for key in ("max_new_tokens", "temperature", "top_k", "top_p")}
        batches = Batches(scorer, World(device), **options)
        for number in range(counted + 1):
            generator = torch.Generator(device).manual_seed(number)
            watch.restart()
            drawn = batches.draw(sampler, prompts, group_size=settings.group_size, generator=generator, stopwatch=watch)
            watch.lap("generate")
            ref_logp = reference.logprobs(drawn.rollout)
            watch.lap("reference")
            batch = batches.rate(drawn, ref_logp)
            drawn.clips.free_audio()
            watch.lap("score")
            advantages = torch.ones(len(batch.rollout.tokens), device=device)
            optimizer.zero_grad(set_to_none=True)
            learn(policy, batch.rollout, advantages, micro_batch=settings.micro_batch, autocast=autocast)
            torch.nn.utils.clip_grad_norm_(policy.parameters(), settings.max_grad_norm).item()
            optimizer.step()
            _finish(device)
            watch.lap("learn")
            if number:
                laps.append(watch.metrics())
                spans += watch.spans
    seconds = {key: statistics.median(lap[f"seconds/{key}"] for lap in laps) for key in (*STAGES, "iteration")}
    return [measured("seconds", seconds, "s"), overlap(spans, counted), *memory(device)]


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def overlap(spans: Sequence[Span], count: int) -> Check:
    """How much of the rendering, and of the rating, was done while something else was, in seconds per iteration."""
    stages = {
        stage: [span for span in spans if span.stage == stage] for stage in ("generate", "render", "rate", "wait")
    }
    total = {stage: sum(span.end - span.start for span in found) / count for stage, found in stages.items()}
    values = {
        "rendering": total["render"],
        "of that while sampling": _common(stages["render"], stages["generate"]) / count,
        "rating": total["rate"],
        "of that while rendering": _common(stages["rate"], _merged(stages["render"])) / count,
        "waiting for clips": total["wait"],
    }
    return measured("overlap", values, "s")


def _common(some: Sequence[Span], others: Sequence[Span]) -> float:
    """Seconds of ``some`` spans that lie within ``others``, which do not overlap each other."""
    return sum(max(0.0, min(a.end, b.end) - max(a.start, b.start)) for a in some for b in others)


def _merged(spans: Sequence[Span]) -> list[Span]:
    """The same times as spans that do not overlap each other."""
    found: list[Span] = []
    for span in sorted(spans, key=lambda span: span.start):
        if found and span.start <= found[-1].end:
            found[-1] = found[-1]._replace(end=max(found[-1].end, span.end))
        else:
            found.append(span)
    return found


def memory(device: torch.device) -> list[Check]:
    """The most memory that tensors took on the device so far, and what torch reserved for them, against the card's."""
    if device.type != "cuda":
        return []
    total = torch.cuda.get_device_properties(device).total_memory
    tensors, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    values = {"GiB of tensors": tensors / 2**30, "GiB reserved": reserved / 2**30, "of the card": reserved / total}
    return [compare("memory", values, {"of the card": 0.95}, LESS_MEMORY)]
