"""What ``smart naturalness train`` and ``test`` do."""

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from tqdm import tqdm

from smart import UserError, __version__, brief
from smart.files import parse_json, write_atomically
from smart.render import checked_soundfont, short_name
from smart.reward import load_reward
from smart.reward.ear import AXIS, LAYOUTS, Ear, Network, Scale, channels_last, save_ear
from smart.reward.naturalness.corruptions import HELD_OUT, KINDS
from smart.reward.naturalness.excerpts import REAL, Maker, Pieces, Stored, prepare
from smart.reward.naturalness.measure import EVERY, report, table
from smart.reward.naturalness.training import Recipe, Trainer, digest_of
from smart.reward.spectra import hear

EVERY_STEPS = 25  # between two saved states of a network in training
REAL_AT, CORRUPTED_AT = 7.0, 3.0  # the ratings of the median real excerpt and of the median corruption
HELD_OUT_SEED = 1_000_003  # added to the seed


def train_ear(
    *,
    folders: Sequence[Path],
    soundfonts: Sequence[str],
    out: Path,
    work: Path | None,
    spectra: str,
    part: tuple[int, int],
    excerpts: int,
    corruptions: int,
    held_out: int,
    members: int,
    steps: int,
    batch: int,
    learning_rate: float,
    precision: str,
    seed: int,
) -> None:
    """Write the file ``out``. Arguments as in the command's help; raises ``UserError`` for mistakes in them."""
    if not out.parent.is_dir():
        raise UserError(f"folder {out.parent} of --out does not exist; create it first")
    fonts = [checked_soundfont(name) for name in soundfonts]
    pieces = Pieces(folders, part)
    kept, work = work is not None, work or out.with_name(out.name + ".work")
    about = {
        "spectra": spectra, "part": list(part), "seed": seed, "corruptions": corruptions, "pieces": pieces.digest,
        "kinds": {name: [kind.harm, kind.weight] for name, kind in KINDS.items()},
        "soundfonts": [hashlib.sha256(font.read_bytes()).hexdigest() for font in fonts],
    }  # fmt: skip
    recipe = Recipe(
        steps=steps, excerpts=batch, kept=min(2, corruptions), learning_rate=learning_rate,
        warmup=min(50, steps // 8), bfloat16=precision == "bfloat16",
    )  # fmt: skip
    if work.is_symlink() and not kept:  # its name can be guessed
        raise UserError(f"{work} is a link; remove it, or choose another --work")
    _claim(work, about)
    click.echo(f"{len(pieces.train)} pieces to train on, {len(pieces.held_out)} held out; work in {work}")
    maker = Maker(pieces.train, fonts, seed, spectra)
    _count(prepare(maker, work / "train", excerpts, partial(maker.kinds, many=corruptions)), excerpts, "rendering")
    stored = Stored(work / "train", excerpts)
    networks, curves = [], []
    for number in range(members):
        network, curve = _train_member(work, number, Trainer(LAYOUTS[spectra], recipe, stored, 1000 * seed + number))
        networks.append(network)
        curves.append(curve)
    tester, kinds = Maker(pieces.held_out, fonts, seed + HELD_OUT_SEED, spectra), EVERY[1:]
    tests = prepare(tester, work / "test", held_out, lambda number: kinds, together=8, grand=True)
    _count(tests, held_out, "rendering tests")
    chosen = [
        int(font) for file in sorted((work / "test").glob("*.font")) for font in np.load(file, allow_pickle=False)
    ][:held_out]
    tested = Stored(work / "test", held_out)
    answers = _answers(networks, tested)
    for network in networks:
        network.origin = _centre(network, tested)
    names = [short_name(font) or font.name for font in fonts]
    scale, facts = calibrated(answers, chosen, names)
    facts |= _real(tester, networks, scale, names, held_out) | {
        "pieces": len(set(pieces.train)), "held_out_pieces": len(set(pieces.held_out)), "excerpts": excerpts,
        "recipe": asdict(recipe), "settings": about, "curves": curves, "heard": list(KINDS), "never": list(HELD_OUT),
        "program": f"smart {__version__}, torch {torch.__version__}",
    }  # fmt: skip
    save_ear(out, networks, scale, facts)
    click.echo(table({kind: scale.rating(each).numpy() for kind, each in answers.items()}, chosen, names))
    if not kept:
        shutil.rmtree(work)
    click.echo(f"wrote {out} ({out.stat().st_size / 1e6:.1f} MB)")


def test_ear(
    *,
    ear: str,
    folders: Sequence[Path],
    soundfonts: Sequence[str],
    excerpts: int,
    kinds: Sequence[str],
    seed: int,
    out: Path | None,
) -> None:
    """Print the figures of an ear, and write them to ``out``. Raises ``UserError`` for mistakes in the arguments."""
    unknown = sorted(set(kinds) - set(EVERY))
    if unknown:
        raise UserError(f'there is no corruption "{unknown[0]}"; choose from: {", ".join(EVERY[1:])}')
    reward = load_reward(ear) if ear in ("naturalness", "naturalness_mel") else Ear(model=ear)
    assert isinstance(reward, Ear)
    fonts = [checked_soundfont(name) for name in soundfonts]
    maker = Maker(Pieces(folders).all, fonts, seed, reward.spectra)
    wanted = [REAL, *(kind for kind in EVERY[1:] if kind in kinds or not kinds)]
    found: dict[str, list[float]] = {kind: [] for kind in wanted}
    chosen = []
    for number in tqdm(range(excerpts), desc="testing", unit="excerpt"):
        clips, font = maker.clips(number, wanted[1:], grand=True)
        chosen.append(font)
        for kind, clip in zip(wanted, clips, strict=True):
            found[kind].append(float(reward.score(clip[None])[AXIS]))
    ratings = {kind: np.array(values, np.float32) for kind, values in found.items()}
    names = [short_name(font) or font.name for font in fonts]
    click.echo(table(ratings, chosen, names))
    if out is not None:
        figures = {
            "ear": reward.provenance,
            "excerpts": excerpts,
            "seed": seed,
            "kinds": report(ratings, chosen, names),
        }
        write_atomically(out, (json.dumps(figures, indent=1) + "\n").encode())
        click.echo(f"wrote {out}")


def calibrated(
    answers: Mapping[str, torch.Tensor], fonts: Sequence[int], names: Sequence[str]
) -> tuple[Scale, dict[str, Any]]:
    """The scale of an ear, and the figures of its file, from what its members answer: kind -> (E, M)."""
    real = answers[REAL]
    mean, deviation = real.mean(dim=0), real.std(dim=0).clamp(min=1e-3)
    standard = {kind: ((value - mean) / deviation).amin(dim=1) for kind, value in answers.items()}
    high = float(standard[REAL].median())
    low = float(torch.cat([standard[kind] for kind in KINDS]).median())
    logits = [float(np.log(x / (1 - x))) for x in ((REAL_AT - 1) / 9, (CORRUPTED_AT - 1) / 9)]
    factor = (logits[0] - logits[1]) / max(high - low, 1e-3)
    scale = Scale(tuple(mean.tolist()), tuple(deviation.tolist()), factor, logits[0] - factor * high)
    ratings = {kind: scale.rating(value).numpy() for kind, value in answers.items()}
    return scale, {"median": float(np.median(ratings[REAL])), "kinds": report(ratings, fonts, names)}


def _real(
    maker: Maker, networks: Sequence[Network], scale: Scale, names: Sequence[str], many: int
) -> dict[str, dict[str, float]]:
    """The median rating of the same held-out excerpts through each soundfont."""
    fused = _usable(networks)
    medians = {}
    for font, name in enumerate(names):
        answers = []
        for number in tqdm(range(many), desc=f"real pieces, {name}", unit="excerpt"):
            clip = hear(maker.clips(number, (), grand=True, font=font)[0][0], maker.spectra)[None]
            with torch.inference_mode():
                answers.append(torch.cat([network(clip) for network in fused]))
        medians[name] = round(float(scale.rating(torch.stack(answers)).median()), 4)
    return {"real": medians}


@torch.inference_mode()
def _centre(network: Network, stored: Stored) -> torch.Tensor:
    """The mean statistics (3 * width,) of the real excerpts, with the weights of the file."""
    (fused,) = _usable([network])
    place = EVERY.index(REAL)
    clips = (stored.clip(group, place)[None] for group in range(len(stored.places)))
    return torch.cat([fused.statistics(clip) for clip in clips]).mean(dim=0)


def _usable(networks: Sequence[Network]) -> list[Network]:
    """The networks as the file stores them."""
    return [channels_last(network.fused().half().float()) for network in networks]


def _answers(networks: Sequence[Network], stored: Stored) -> dict[str, torch.Tensor]:
    """kind -> what the networks answer to each excerpt, (E, M), one clip at a time, with the weights of the file."""
    fused = _usable(networks)
    found: dict[str, torch.Tensor] = {}
    with torch.inference_mode():
        for place, kind in enumerate(tqdm(EVERY, desc="testing", unit="kind")):
            clips = (stored.clip(group, place)[None] for group in range(len(stored.places)))
            found[kind] = torch.stack([torch.cat([network(clip) for network in fused]) for clip in clips])
    return found


def _claim(work: Path, about: dict[str, Any]) -> None:
    """Make the work folder, or continue in one of the same settings."""
    file = work / "settings.json"
    (work / "train").mkdir(parents=True, exist_ok=True)
    if file.is_file():
        try:
            found = parse_json(file.read_text(encoding="utf-8"))
        except ValueError:
            found = None
        if found != about:
            raise UserError(
                f"{work} holds excerpts of other pieces, soundfonts or settings; remove it, or choose another --work"
            )
    else:
        write_atomically(file, json.dumps(about, indent=1).encode())


def _count(numbers: Iterable[int], total: int, what: str) -> None:
    for _ in tqdm(numbers, total=total, desc=what, unit="excerpt"):
        pass


def _train_member(work: Path, number: int, trainer: Trainer) -> tuple[Network, list[list[float]]]:
    """Train a network, or finish it from where it stopped; returns it and its curve: step, loss, share in order."""
    file = work / f"member-{number}.safetensors"
    curve: list[list[float]] = []
    if file.is_file():
        try:
            with safe_open(file, "pt") as opened:
                kept = (opened.metadata() or {}).get("sha256")
            state = load_file(file)
            if kept != digest_of(state):
                raise ValueError("its checksum is not the recorded one")
            curve = trainer.restore(state)
        except (SafetensorError, KeyError, RuntimeError, ValueError) as error:
            raise UserError(
                f"{file} cannot be continued ({brief(error)}); remove it to train that network again"
            ) from error
    steps, name = trainer.recipe.steps, f"network {number + 1}"
    bar = tqdm(trainer.run(), total=steps, initial=trainer.step, desc=name, unit="step")
    recent: list[dict[str, float]] = []
    for figures in bar:
        recent.append(figures)
        if trainer.step % EVERY_STEPS == 0 or trainer.step == steps:
            means = [float(np.mean([each[key] for each in recent])) for key in ("loss", "right")]
            curve.append([trainer.step, *(round(value, 4) for value in means)])
            bar.set_postfix_str(f"loss {means[0]:.3f}, {means[1]:.1%} in order")
            recent.clear()
            state = trainer.state(curve)
            write_atomically(file, save(state, metadata={"sha256": digest_of(state)}))
    return trainer.network, curve
