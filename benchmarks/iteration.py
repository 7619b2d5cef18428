"""Whole iterations of smart.grpo: the seconds of each stage, compared with the busiest resource and with a peer.

    python benchmarks/iteration.py --config paper.toml [--set SECTION.KEY=VALUE ...] [--iterations 3] [--json FILE]
    python benchmarks/iteration.py --config paper.toml --random-weights --set render.soundfont=timgm
    python benchmarks/iteration.py --config paper.toml ... --peer PYTHON [--rounds 3]

It calls ``smart.grpo.train`` and reads the run's metrics.jsonl; figures are medians. The first iteration warms up and
is left out, and so is the last one with ``grpo.rollouts_ahead``, which samples nothing. The configuration is measured
as it is, except for the number of iterations and the work at the end of a run. ``--random-weights`` replaces weights on
the hub with random ones of the same architecture (the paper's base, Audiobox Aesthetics): they take the same time per
token and clip, but write few notes.

Then each stage runs by itself on the last iteration's completions. A resource's time is the sum of the stages that use
it: on CUDA the GPU generates, scores and learns and the CPU renders; without CUDA the CPU does everything. No order of
the stages can make an iteration shorter than the time of its busiest resource; with ``grpo.rollouts_ahead`` this holds
on average, since some of an iteration's work is done in the one before.

``--peer`` names the interpreter of an environment made from benchmarks/peers/requirements.txt. In a separate process,
TRL's trainer with the recipe of the paper's public code then runs on the same base, reward and sizes, alternating with
ours; the ratio is the median over rounds.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import pyarrow.parquet as pq
import torch

from smart import UserError, hub
from smart.config import Config, dumps, load
from smart.doctor.made_up import random_audiobox
from smart.grpo import token_logprobs, train
from smart.model import build_model, find_base, load_base, pick_device, pick_precision, save_base
from smart.render import RenderPool, find_soundfont
from smart.reward import load_reward
from smart.reward.audiobox import HUB_ID
from smart.run import read_metrics
from smart.sampler import Sampler
from smart.tokens import build_tokenizer, decode, vocabulary

# one after another; other timed work overlaps with them (docs/metrics.md)
LAPS = ("save", "generate", "reference", "score", "learn", "record")
PEER = Path(__file__).parent / "peers" / "grpo_trl.py"


def resolve(options: argparse.Namespace, folder: Path) -> Config:
    """The configuration to measure; its run and its random weights are in ``folder``."""
    config: Config = load(options.config, options.overrides)
    if options.random_weights:
        if hub.is_hub_id(config.model.base) and not Path(config.model.base).is_dir():
            tokenizer = build_tokenizer()
            save_base(build_model(tokenizer), tokenizer, folder / "base")
            config = dataclasses.replace(config, model=dataclasses.replace(config.model, base=str(folder / "base")))
        if config.reward.kind == "audiobox":
            weights = str(random_audiobox(folder / "audiobox"))
            reward = dataclasses.replace(config.reward, options=config.reward.options | {"model": weights})
            config = dataclasses.replace(config, reward=reward)
    many = 1 + options.iterations + config.grpo.rollouts_ahead
    return dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, folder=str(folder / "runs"), device=options.device),
        grpo=dataclasses.replace(config.grpo, iterations=many),
        track=dataclasses.replace(
            config.track,
            checkpoint_every=many,
            samples_every=many + 1,
            trace_every=many - config.grpo.rollouts_ahead,  # the last one that samples
            final_prompts=2,
            held_out_every=0,
        ),
    )


def named(config: Config, name: str) -> Config:
    return dataclasses.replace(config, run=dataclasses.replace(config.run, name=name))


def stages(config: Config) -> dict[str, list[float]]:
    """Seconds of each stage in the run's counted iterations; "iteration" is the whole iteration."""
    run, end = Path(config.run.folder) / config.run.name, config.grpo.iterations - config.grpo.rollouts_ahead
    rows = read_metrics(run)[1:end]
    keys = [key for key in rows[0] if key.startswith("seconds/")]
    return {key.removeprefix("seconds/"): [row[key] for row in rows] for key in keys}


def alone(config: Config, run: Path) -> dict[str, float]:
    """Seconds of each stage by itself, on the last iteration's completions; learning as logged: it never overlaps."""
    device = pick_device(config.run.device)
    precision = pick_precision(config.grpo.precision, device)
    model, tokenizer = load_base(run / "tuned", device=device)
    facts = vocabulary(tokenizer)
    rows = pq.read_table(sorted((run / "completions").glob("*.parquet"))[-1]).to_pylist()
    rows = [row for row in rows if row["step"] == config.grpo.iterations]
    length = rows[0]["prompt_length"]
    pieces = [torch.tensor(row["tokens"]) for row in rows]
    tokens = torch.nn.utils.rnn.pad_sequence(pieces, batch_first=True, padding_value=facts.pad_id)
    scores = [decode(tokenizer, row) for row in tokens]
    sampler = Sampler(
        model, pad_id=facts.pad_id, eos_id=facts.eos_id, dtype=pick_precision(config.sampling.dtype, device)
    )
    reward = load_reward(config.all_rewards[0].kind, device=device, **config.all_rewards[0].options)

    def generate() -> None:
        sampler.sample(
            tokens[:: config.grpo.group_size, :length].to(device),
            max_new_tokens=config.sampling.max_new_tokens,
            group_size=config.grpo.group_size,
            temperature=config.sampling.temperature,
            top_k=config.sampling.top_k,
            top_p=config.sampling.top_p,
            generator=torch.Generator(device).manual_seed(0),
        )

    def reference() -> None:
        with torch.no_grad(), torch.autocast(device.type, precision, enabled=precision != torch.float32):
            for part in tokens.to(device).split(config.grpo.micro_batch):
                token_logprobs(model, part, length)

    def score() -> None:
        for waves in audio.split(16):
            reward.score(waves)

    # full-length clips: a clip's length changes little, since Audiobox pads it to ten seconds
    audio = torch.randn(len(tokens), round(config.render.seconds * reward.sample_rate)).clamp(-3, 3) / 3
    with RenderPool(
        find_soundfont(config.render.fonts[0]),
        sample_rate=config.render.sample_rate,
        seconds=config.render.seconds,
        workers=config.render.workers or None,
    ) as pool:
        ways: dict[str, Callable[[], Any]] = {
            "generate": generate,
            "reference": reference,
            "render": lambda: list(pool.map(scores)),
            "score": score,
        }
        times = {name: common.alternate({name: way}, 1, device.type)[name][0] for name, way in ways.items()}
    return times | {"learn": statistics.median(stages(config)["learn"])}


def quietly(function: Callable[[Config], Path], config: Config) -> Path:
    """Call ``function`` without what it prints, since that names files that are deleted at the end."""
    with contextlib.redirect_stdout(io.StringIO()):
        return function(config)


def measure(options: argparse.Namespace, config: Config) -> dict[str, Any]:
    made: list[Path] = []
    memory = common.peak_memory(lambda: made.append(quietly(train, config)), options.device)
    run = made[0]
    if options.timeline:
        shutil.copyfile(max((run / "traces").glob("*.json")), options.timeline)
    times = stages(config)
    medians = {stage: statistics.median(taken) for stage, taken in times.items()}
    by_itself = alone(config, run)
    on_gpu = ("generate", "reference", "score", "learn") if options.device == "cuda" else ()
    own = {
        "GPU": sum(taken for stage, taken in by_itself.items() if stage in on_gpu),
        "CPU": sum(taken for stage, taken in by_itself.items() if stage not in on_gpu),
    }
    busiest = max(own, key=lambda resource: own[resource])
    if options.profile:
        once = dataclasses.replace(config, grpo=dataclasses.replace(config.grpo, iterations=1))
        common.trace(options.profile, lambda: quietly(train, named(once, "profiled")))
    return {
        "seconds": medians,
        "seconds_all": times,
        "share": {stage: medians[stage] / medians["iteration"] for stage in LAPS},
        "seconds_alone": by_itself,
        "peak_memory_gb": memory,
        "busiest_resource": busiest,
        "busiest_seconds": own[busiest],
        "times_busiest": medians["iteration"] / own[busiest],
    }


def against_peer(options: argparse.Namespace, config: Config, folder: Path) -> dict[str, Any]:
    """Our iterations and the peer's, each round in two separate processes, in alternating order."""
    if config.all_rewards[0].kind != "audiobox" or config.prompts.kind != "procedural":
        raise UserError("--peer needs reward.kind = 'audiobox' and prompts.kind = 'procedural'; the peer has no others")
    settings = {
        "base": str(find_base(config.model.base)),
        "audiobox": str(config.all_rewards[0].options.get("model", HUB_ID)),
        "soundfont": str(find_soundfont(config.render.fonts[0])),
        "sample_rate": config.render.sample_rate,
        "seconds": config.render.seconds,
        "max_new_tokens": config.sampling.max_new_tokens,
        "temperature": config.sampling.temperature,
        "top_k": config.sampling.top_k,
        "seed": config.run.seed,
        **{
            key: getattr(config.grpo, key)
            for key in (
                *("prompts", "group_size", "micro_batch", "learning_rate"),
                *("beta", "clip", "max_grad_norm", "iterations"),
            )
        },
    }
    (folder / "peer.json").write_text(json.dumps(settings))

    def ours(index: int) -> list[float]:
        target = named(config, f"round-{index}")
        file = folder / f"round-{index}.toml"
        file.write_text(dumps(target), encoding="utf-8")
        call(sys.executable, "-m", "smart.grpo", "--config", str(file))
        return stages(target)["iteration"]

    def peers(index: int) -> list[float]:
        out = folder / "peer-out.json"
        settings = str(folder / "peer.json")
        call(options.peer, str(PEER), "--settings", settings, "--device", options.device, "--json", str(out))
        found.append(json.loads(out.read_text()))
        taken: list[float] = found[-1]["seconds_all"]["iteration"]
        return taken

    found: list[dict[str, Any]] = []
    times: dict[str, list[list[float]]] = {"smart": [], "peer": []}
    for index in range(options.rounds):
        for name, way in (("smart", ours), ("peer", peers)) if index % 2 == 0 else (("peer", peers), ("smart", ours)):
            times[name].append(way(index))
    medians = {name: [statistics.median(taken) for taken in rounds] for name, rounds in times.items()}
    return {
        "smart_seconds": statistics.median(medians["smart"]),
        "peer_seconds": statistics.median(medians["peer"]),
        "ratio": common.ratio(medians["peer"], medians["smart"]),
        "smart_seconds_all": times["smart"],
        "peer_seconds_all": times["peer"],
        "peer": found[-1],
    }


def call(*command: str) -> None:
    """Run a command; if it fails, raise ``UserError`` with the last line that it printed."""
    here = Path(__file__).parent
    path = os.pathsep.join(filter(None, [str(here.parent), str(here), os.environ.get("PYTHONPATH", "")]))
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})
    except OSError as error:
        raise UserError(f"{command[0]} cannot be run ({error.strerror})") from None
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "it printed nothing").splitlines()[-1]
        raise UserError(f"{' '.join(command[:3])} ... failed: {last}")


def main() -> None:
    parser = common.parser(__doc__)
    parser.set_defaults(device="auto")
    parser.add_argument(
        "--config", default="paper.toml", help="config file, or the name of a shipped one (default: %(default)s)"
    )
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="override one setting (repeatable)",
    )
    parser.add_argument("--iterations", type=common.whole, default=3, help="timed iterations (default: %(default)s)")
    parser.add_argument("--random-weights", action="store_true", help="use random weights for models on the hub")
    parser.add_argument(
        "--timeline", type=Path, help="also write a Chrome trace of the last iteration's stages to this"
    )
    parser.add_argument("--peer", metavar="PYTHON", help="also run the peer, with this Python interpreter")
    parser.add_argument(
        "--rounds", type=common.whole, default=3, help="runs of ours and of the peer with --peer (default: 3)"
    )
    options = common.parse(parser)
    options.device = pick_device(options.device).type
    if options.threads:
        os.environ["OMP_NUM_THREADS"] = str(options.threads)  # for the processes of --peer
    with tempfile.TemporaryDirectory() as temporary:
        try:
            config = resolve(options, Path(temporary))
            found = against_peer(options, config, Path(temporary)) if options.peer else measure(options, config)
        except UserError as error:
            parser.exit(2, f"Error: {error.message}\n")
    rows = config.grpo.prompts * config.grpo.group_size
    print(
        f"{rows} completions of up to {config.sampling.max_new_tokens} tokens, reward {config.all_rewards[0].kind}, "
        f"{options.iterations} iterations after a warm-up"
    )
    if options.peer:
        print(f"{'':10}{'s/iteration':>12}{'ratio':>8}")
        print(f"{'peer':10}{found['peer_seconds']:12.2f}{1:8.2f}")
        print(f"{'smart':10}{found['smart_seconds']:12.2f}{found['ratio']:8.2f}")
    else:
        print(f"{'stage':18}{'seconds':>9}{'share':>8}")
        for stage, taken in found["seconds"].items():
            share = f"{found['share'][stage]:8.1%}" if stage in LAPS else ""
            print(f"{stage:18}{taken:9.3f}{share}")
        print(f"{'by itself':18}{'seconds':>9}")
        for stage, taken in found["seconds_alone"].items():
            print(f"{stage:18}{taken:9.3f}")
        print(
            f"busiest: {found['busiest_resource']}, {found['busiest_seconds']:.2f} s of work per iteration; "
            f"the iteration takes {found['times_busiest']:.2f} times as long; peak {found['peak_memory_gb']:.1f} GB"
        )
    common.report("iteration", options, {"completions": rows, "reward": config.all_rewards[0].kind, **found})


if __name__ == "__main__":
    main()
