"""Learning speed: the reference's log-probabilities and one policy update on a batch of the paper's size.

    python benchmarks/learner.py [--rows 64 --tokens 256 --micro 8 16 64] [--dtypes float32 bfloat16] [--json FILE]

It calls smart.grpo's ``token_logprobs`` and ``update`` (forward, backward, clipping, AdamW step) on a random Phi-3 and
random completions without padding, in each precision (bfloat16: autocast) and micro-batch size. All variants alternate;
medians are reported. The limit is the counted operations of the matrix products and attention, forward and backward, at
the measured rate of one large product in the same dtype: norms, activations, the softmax over the vocabulary and the
optimiser's step count as overhead.
"""

import argparse
import copy
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import common
import torch

from smart.config import Grpo
from smart.grpo import token_logprobs, update
from smart.model import build_model
from smart.sampler import Rollout
from smart.tokens import build_tokenizer


def batch(options: argparse.Namespace, vocabulary: int) -> tuple[Rollout, torch.Tensor]:
    """Random completions, none of which ends early, and random advantages (N,)."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, vocabulary, (options.rows, options.prompt + options.tokens), generator=generator)
    mask = torch.ones(options.rows, options.tokens, dtype=torch.bool)
    logprobs = torch.full((options.rows, options.tokens), -6.0)
    rollout = Rollout(tokens, mask, logprobs).to(options.device)
    return rollout, torch.randn(options.rows, generator=generator).to(options.device)


def ways(
    model: Any,
    policy: Any,
    optimizer: torch.optim.Optimizer,
    rollout: Rollout,
    advantages: torch.Tensor,
    dtype: str,
    micro: int,
    options: argparse.Namespace,
) -> dict[str, Callable[[], Any]]:
    """The two stages; each call processes the whole batch."""
    autocast = torch.autocast(options.device, common.DTYPES[dtype], enabled=dtype != "float32")
    settings = Grpo(micro_batch=micro)

    def reference() -> torch.Tensor:
        with torch.no_grad(), autocast:
            return torch.cat([token_logprobs(model, rows, options.prompt) for rows in rollout.tokens.split(micro)])

    ref_logp = reference()
    learn = partial(update, policy, optimizer, rollout, ref_logp, advantages, settings, autocast=autocast)
    return {"reference": reference, "update": learn}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    tokenizer = build_tokenizer()
    model = build_model(
        tokenizer,
        layers=options.layers,
        hidden=options.hidden,
        heads=options.heads,
        intermediate=options.intermediate,
    ).to(options.device)
    rollout, advantages = batch(options, model.config.vocab_size)
    policy = copy.deepcopy(model)  # shared by all variants: its weights do not affect the time
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6, weight_decay=0.0, fused=options.device == "cuda")
    both: dict[tuple[str, str, int], Callable[[], Any]] = {}
    for dtype in options.dtypes:
        for micro in options.micro:
            for stage, way in ways(model, policy, optimizer, rollout, advantages, dtype, micro, options).items():
                both[stage, dtype, micro] = way
    memory = {name: common.peak_memory(way, options.device) for name, way in both.items()}
    times = common.alternate(both, options.rounds, options.device, warm=True)
    rates = {dtype: common.matmul_rate(common.DTYPES[dtype], options.device) for dtype in options.dtypes}
    work = {stage: common.flops(both[stage, options.dtypes[0], options.micro[0]]) for stage in ("reference", "update")}
    common.trace(options.profile, both["update", options.dtypes[0], options.micro[0]])
    rows = []
    for (stage, dtype, micro), taken in sorted(times.items()):
        median = statistics.median(taken)
        rows.append(
            {
                "stage": stage,
                "dtype": dtype,
                "micro_batch": micro,
                "seconds": median,
                "seconds_all": taken,
                "tokens_per_second": rollout.mask.numel() / median,
                "peak_memory_gb": memory[stage, dtype, micro],
                "gflop": work[stage] / 1e9,
                "gflop_per_second": work[stage] / median / 1e9,
                "matmul_gflop_per_second": rates[dtype] / 1e9,
                "times_limit": median / (work[stage] / rates[dtype]),
            }
        )
    return {"parameters": model.num_parameters(), "results": rows}


def main() -> None:
    parser = common.parser(__doc__)
    for name, default, text in (
        ("rows", 64, "completions in the batch"),
        ("prompt", 4, "tokens per prompt"),
        ("tokens", 256, "tokens per completion"),
        ("layers", 4, "layers of the model"),
        ("hidden", 512, "width of the model"),
        ("heads", 8, "attention heads"),
        ("intermediate", 2048, "width of the feed-forward layers"),
        ("rounds", 3, "timed runs per variant"),
    ):
        parser.add_argument(f"--{name}", type=common.whole, default=default, help=f"{text} (default: {default})")
    parser.add_argument("--micro", nargs="+", type=common.whole, default=[8, 16, 64], help="micro-batch sizes")
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=sorted(common.DTYPES),
        default=list(common.DTYPES),
        help="precisions (default: both)",
    )
    options = common.parse(parser)
    found = measure(options)
    print(f"{options.rows} completions of {options.tokens} tokens, {found['parameters'] / 1e6:.1f} million parameters")
    print(f"{'stage':11}{'dtype':10}{'micro':>6}{'seconds':>9}{'tokens/s':>10}{'GB':>7}{'GFLOP/s':>9}{'x limit':>9}")
    for row in found["results"]:
        print(
            f"{row['stage']:11}{row['dtype']:10}{row['micro_batch']:6}{row['seconds']:9.3f}"
            f"{row['tokens_per_second']:10.0f}{row['peak_memory_gb']:7.2f}{row['gflop_per_second']:9.0f}"
            f"{row['times_limit']:9.2f}"
        )
    common.report("learner", options, found)


if __name__ == "__main__":
    main()
