"""What a GRPO run optimises and what judges it: the rewards, targets, soundfonts and judge of a configuration.

``smart.tuning`` finds them before any work starts and uses them.
"""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from smart.config import Config, to_dict
from smart.cores import usable_cores
from smart.corpus import MANIFEST
from smart.distributed import World
from smart.diversity import alikeness, distinct_rewards
from smart.files import write_atomically
from smart.guard import PLAUSIBILITY, Judge, default_judge, optimised_axes
from smart.model import FILES
from smart.render import Renderer, draw_fonts
from smart.reward import Mixture, Reward, load_reward, real
from smart.reward.mixture import Part, as_one, load_part, single_parts
from smart.rollout import Batch, Fonts
from smart.run import digests, files_in
from smart.tokens import decode


def tables(config: Config) -> list[dict[str, Any]]:
    """All rewards of a configuration as plain tables."""
    return [to_dict(one) for one in config.all_rewards]


def reward_finders(config: Config, device: torch.device, given: Reward | None) -> list[Callable[[], Part]]:
    """Functions that load the rewards; ``given`` replaces those of the configuration."""
    if given is not None:
        return [lambda: Part("", given, deadline=config.reward.deadline)]
    return [partial(load_part, table, device) for table in tables(config)]


def identify(
    config: Config,
    *,
    base: Path,
    soundfonts: Sequence[Path],
    rewards: Sequence[Part],
    judge: Reward | None,
    judge_soundfont: Path | None,
    **_: object,
) -> dict[str, str]:
    """What a run is made of: name -> SHA-256 of a file or folder, or the description of a reward."""
    settings = to_dict(config)
    paths = {f"model.base/{name}": base / name for name in FILES}
    paths |= {f"render.soundfont {name}": path for name, path in zip(config.render.fonts, soundfonts, strict=True)}
    tables = {"reward": settings["reward"], "guard.judge": settings["guard"]["judge"]}
    tables |= {f"rewards.{number}": table for number, table in enumerate(settings["rewards"])}
    for name, table in tables.items():
        paths |= files_in({key: table[key] for key in ("options", "real") if key in table}, f"{name}.")
    if judge_soundfont is not None:
        paths["guard.soundfont"] = judge_soundfont
    if config.prompts.kind == "dataset":
        paths["prompts.corpus"] = Path(config.prompts.corpus).expanduser() / MANIFEST
    described = {part.name or part.reward.name: part.reward for part in rewards}
    if judge is not None:
        described["guard.judge"] = judge
    return digests(paths) | {f"reward {name}": reward.provenance for name, reward in described.items()}


def find_named_judge(config: Config, device: torch.device) -> Reward | None:
    """The reward that ``guard.judge`` names; None for "auto" and "plausibility"."""
    return None if config.guard.judge.kind == "auto" else _load_judge(config, device, config.guard.judge.kind)


def find_judge(config: Config, device: torch.device, reward: Reward, named: Reward | None) -> Reward | None:
    """The reward that judges, ``named`` or what "auto" stands for; None if it needs no other reward."""
    if named is not None or config.guard.judge.kind != "auto" or not config.track.held_out_every:
        return named
    if config.guard.soundfont:
        return reward
    return _load_judge(config, device, default_judge(reward))


def _load_judge(config: Config, device: torch.device, kind: str | None) -> Reward | None:
    wanted = config.guard.judge
    if kind is None or kind == PLAUSIBILITY or not config.track.held_out_every:
        return None
    return load_reward(kind, weights=wanted.weights or None, device=device, **wanted.options)


def make_judge(config: Config, reward: Reward, other: Reward | None, pool: Renderer | None) -> Judge:
    """The judge of a run; ``pool`` renders for it if it has a soundfont of its own."""
    wanted = config.guard
    return Judge(
        reward,
        other,
        deadline=wanted.judge.deadline,
        plausible=wanted.judge.kind == PLAUSIBILITY,
        pool=pool,
        soundfont=wanted.soundfont if pool else "",
    )


def described(config: Config, reward: Reward, judge: Judge | None) -> list[str]:
    """What the log says about all this at the beginning."""
    lines = [f"reward: {reward.provenance or reward.name}"]
    if len(config.render.fonts) > 1:
        lines.append(f"soundfonts ({config.render.soundfont_use}): {', '.join(config.render.fonts)}")
    if judge is not None:
        lines.append(f"held-out score: {judge.name}")
        if why := doubts(config, reward, judge):
            lines.append(f"Warning: the held-out score is no second opinion: {why}")
    return lines


def stand_ins(reward: Reward) -> list[str]:
    """The names of the rewards that only imitate another one."""
    return [part.name or part.reward.name for part in single_parts(reward) if part.reward.is_stand_in]


def doubts(config: Config, reward: Reward, judge: Judge) -> str:
    """Why the judge is no second opinion; empty if it is one."""
    if judge.pool is not None and config.guard.soundfont in config.render.fonts:
        return f"guard.soundfont = {config.guard.soundfont!r} is one of the soundfonts that the reward is heard through"
    shared = optimised_axes(reward, judge)
    return f"training optimises {', '.join(shared)}; name another guard.judge" if shared else ""


def summed_rewards(config: Config, reward: Reward, batch: Batch, tokenizer: Any) -> torch.Tensor:
    """The rewards (N,) to learn from: the ratings, plus a bonus for diversity if ``grpo.diversity`` is above 0."""
    settings, rewards = config.grpo, batch.rated.rewards
    if isinstance(reward, Mixture) and settings.target_of == "group":
        rewards = reward.add(reward.earned(batch.rated.scores, settings.group_size))
    if not settings.diversity:
        return rewards
    pieces = [decode(tokenizer, row) for row in batch.rollout.tokens.cpu()]
    return distinct_rewards(rewards, alikeness(pieces, settings.group_size), weight=settings.diversity)


def by_name(reward: Reward, batch: Batch) -> dict[str, npt.NDArray[np.float32]]:
    """The finite values of a batch, (n,) each: "reward", which is optimised, and each of several rewards by name."""
    found = {"reward": batch.rated.rewards}
    if isinstance(reward, Mixture):
        values = reward.values(batch.rated.scores)
        found |= {part.name: each for part, each in zip(reward.parts, values, strict=True)}
    return {name: values[values.isfinite()].numpy() for name, values in found.items()}


def each_reward(config: Config, reward: Reward, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """What each of the K rewards with a weight gives, up to its target, (K, N), and their weights (K,)."""
    if not isinstance(reward, Mixture):
        return batch.rated.rewards[None], torch.ones(1)
    group_size = config.grpo.group_size if config.grpo.target_of == "group" else None
    counted = reward.part_weights > 0
    return reward.earned(batch.rated.scores, group_size)[counted], reward.part_weights[counted]


def find_targets(
    config: Config, parts: Sequence[Part], soundfonts: Sequence[Path], folder: Path, world: World
) -> dict[str, float]:
    """The number of each target "real", by the name of the reward; a resumed run keeps those that it began with."""
    wanted, path, render = real.real_targets(tables(config), parts), folder / real.TARGETS, config.render
    if not wanted:
        return {}
    if world.lead and not path.is_file():
        workers = render.workers or usable_cores()
        options: dict[str, Any] = {"sample_rate": render.sample_rate, "seconds": render.seconds, "workers": workers}
        found = {name: real.measure(target, soundfonts, **options) for name, target in wanted.items()}
        write_atomically(path, json.dumps(found).encode())
    world.wait()
    return real.read_targets(folder)


def check_rewards(config: Config, parts: Sequence[Part], soundfonts: Sequence[Path]) -> None:
    """Raise ``UserError`` if the rewards cannot be combined, or if a target "real" cannot be found."""
    as_one(parts)
    for target in real.real_targets(tables(config), parts).values():
        real.check(target, soundfonts)


def fonts_of(config: Config, number: int, groups: int) -> list[Fonts] | None:
    """The soundfonts through which each group of batch ``number`` is heard; None if there is one soundfont.

    Batches of training are counted from 1; 0 is for measurements, which all use the same.
    """
    many = len(config.render.fonts)
    if many == 1:
        return None
    if config.render.soundfont_use == "average":
        return [tuple(range(many))] * groups
    return [(font,) for font in draw_fonts(many, groups, seed=config.run.seed, number=number)]
