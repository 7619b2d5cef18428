"""``smart doctor --gpu``: prove that this machine's GPU computes what a CPU does, and measure what a run takes on it.

Everything is at hand or made up: nothing is downloaded. Each part that fails is named, and the others still run.
"""

import json
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from smart import UserError, __version__, brief, hub
from smart.config import Config
from smart.doctor import agreement, speed
from smart.doctor.check import BAD, FAILED, LESS_MEMORY, MEASURED, SKIPPED, Check, finite
from smart.doctor.made_up import random_audiobox, random_clip, waves
from smart.model import FILES, SHIPPED, build_model, load_base
from smart.prompts import draw
from smart.render import find_soundfont
from smart.reward import Reward, audiobox, load_reward
from smart.sampler import Rollout, Sampler
from smart.tokens import build_tokenizer, vocabulary

BOTH = (torch.float32, torch.bfloat16)
LONG = 256  # tokens of the completions that are compared
FONTS = ("timgm", "fluidr3", "musescore")  # what stands in for a soundfont that is not here
Part = tuple[str, Callable[[], list[Check]]]


def parts(config: Config, device: torch.device, folder: Path) -> Iterator[Part]:
    """The parts of the check, by name; ``folder`` is for temporary files."""
    model, tokenizer = load_base("piano-small")
    facts = vocabulary(tokenizer)
    prompts = draw("procedural", 8, tokenizer, torch.Generator().manual_seed(0))
    for dtype in BOTH:
        yield (
            f"sampler {agreement.SHORT_NAMES[dtype]}",
            partial(agreement.sampler, model, prompts, device=device, dtype=dtype, eos_id=facts.eos_id, tokens=LONG),
        )
    audio, lengths = waves()
    yield (
        "ce_proxy",
        partial(agreement.reward, "ce_proxy", partial(load_reward, "ce_proxy"), audio, lengths, device=device),
    )
    weights = find_audiobox(config, folder)
    dtypes = ("float32", "bfloat16")

    def rate() -> list[Check]:
        build = partial(load_reward, "audiobox", model=weights())
        return agreement.reward("audiobox", build, audio, lengths, device=device, dtypes=dtypes, choice=True)

    yield "audiobox", rate

    def mix() -> list[Check]:
        rng, render = np.random.default_rng(1), config.render
        clips = [random_clip(rng, seconds=render.seconds) for _ in range(4)]
        rate, seconds = render.sample_rate, render.seconds
        return agreement.note_bank(font(config), clips, device=device, sample_rate=rate, seconds=seconds)

    yield "note bank", mix

    def learn() -> list[Check]:
        return agreement.gradient(model, written(model, prompts, facts.eos_id), device=device, dtypes=BOTH)

    yield "gradient", learn
    yield "checkpoint", partial(agreement.resume, model, tokenizer, folder / "checkpoints", device=device)

    def iterate() -> list[Check]:
        base, vocab, real = find_base_or_random(config)
        rate, soundfont, render = reward_of(config, weights, device), font(config), config.render
        text = (
            f"{config.grpo.prompts * config.grpo.group_size} completions of {config.sampling.max_new_tokens} tokens; "
            f"base {config.model.base if real else 'of random weights'}; reward {rate.provenance or rate.name}; "
            f"{soundfont.name}; {render.backend}, workers: {render.workers or 'one per core'}"
        )
        rows = speed.iterations(config, base, vocab, rate, soundfont, device=device, music=real)
        return [Check("iteration", MEASURED, text), *rows]

    yield "iteration", iterate


def attempt(name: str, work: Callable[[], list[Check]]) -> list[Check]:
    """What a part found; what it lacks or how it failed, if it did."""
    try:
        return work()
    except (UserError, ImportError) as error:
        return [Check(name, SKIPPED, error.message if isinstance(error, UserError) else brief(error))]
    except torch.OutOfMemoryError as error:
        return [Check(name, FAILED, brief(error), remedy=LESS_MEMORY)]
    except Exception as error:  # a driver, a kernel or a library may raise anything; the other parts still tell
        return [Check(name, FAILED, brief(error), remedy="--set run.device=cpu")]


def written(model: Any, prompts: torch.Tensor, eos_id: int | None) -> Rollout:
    """Completions that the model writes on the CPU."""
    sampler = Sampler(model, pad_id=int(model.config.pad_token_id), eos_id=eos_id)
    return sampler.sample(prompts, max_new_tokens=LONG // 2, group_size=4, generator=torch.Generator().manual_seed(2))


# What is at hand ----------------------------------------------------------------------------------------------


def font(config: Config) -> Path:
    """The configured soundfont, or one that is here. Raises ``UserError`` if there is none."""
    for name in (config.render.fonts[0], *FONTS):
        try:
            return find_soundfont(name)
        except UserError:
            continue
    return find_soundfont(config.render.fonts[0])


def find_base_or_random(config: Config) -> tuple[Any, Any, bool]:
    """The configured base if it is here, else a random one of the paper's size; its tokenizer; whether it is real."""
    name = config.model.base
    if Path(name).is_dir() or (SHIPPED / name).is_dir() or hub.find_cached(name, FILES):
        return *load_base(name), True
    tokenizer = build_tokenizer()
    return build_model(tokenizer), tokenizer, False


def find_audiobox(config: Config, folder: Path) -> Callable[[], str]:
    """Finds weights of Audiobox: the configured ones if they are here, else random ones, written at the first call."""
    made: list[str] = []

    def find() -> str:
        name = str(config.all_rewards[0].options.get("model", audiobox.HUB_ID))
        if Path(name).expanduser().exists() or hub.find_cached(name, (audiobox.CONFIG_FILE, audiobox.WEIGHTS_FILE)):
            return name
        if not made:
            made.append(str(random_audiobox(folder / "audiobox")))
        return made[0]

    return find


def reward_of(config: Config, weights: Callable[[], str], device: torch.device) -> Reward:
    """The configured reward, with weights that are here."""
    options = dict(config.all_rewards[0].options)
    if config.all_rewards[0].kind == "audiobox":
        options["model"] = weights()
    return load_reward(
        config.all_rewards[0].kind, weights=config.all_rewards[0].weights or None, device=device, **options
    )


# The table ----------------------------------------------------------------------------------------------------


def describe(device: torch.device) -> Check:
    """The device and the versions that matter."""
    found = f"torch {torch.__version__} on {platform.machine()}"
    if device.type != "cuda":
        return Check("device", MEASURED, f"{device}, {found}")
    card = torch.cuda.get_device_properties(device)
    name = f"{card.name}, compute capability {card.major}.{card.minor}, {card.total_memory / 2**30:.0f} GiB"
    return Check("device", MEASURED, f"{name}; {found}, CUDA {torch.version.cuda}")


def run(config: Config, device: torch.device) -> bool:
    """Run all parts, print the table as they end and JSON last; returns whether all is well."""
    began = time.perf_counter()
    rows: list[Check] = []
    with tempfile.TemporaryDirectory() as folder:
        todo: Iterator[Part] = iter([("device", lambda: [describe(device)]), *parts(config, device, Path(folder))])
        for name, work in todo:
            for row in attempt(name, work):
                rows.append(row)
                click.echo(f"{row.verdict:9} {row.name:26} {row.found}")
                if row.remedy:
                    click.echo(f"{'':9} {'':26} -> {row.remedy}")
    bad = [row.name for row in rows if row.verdict in BAD]
    took = time.perf_counter() - began
    click.echo(f"\n{'not as it should be: ' + ', '.join(bad) if bad else 'all as on a CPU'} ({took:.0f} s)")
    click.echo(
        json.dumps(
            {
                "program": "doctor", "version": __version__, "device": str(device), "torch": torch.__version__,
                "ok": not bad, "seconds": round(took, 1),
                "checks": [row._asdict() | {"values": finite(row.values)} for row in rows],
            }
        )
    )  # fmt: skip
    return not bad
