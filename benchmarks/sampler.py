"""Sampling speed: smart.sampler compared with transformers' ``generate`` on the same weights and with a limit.

    python benchmarks/sampler.py [--rows 64 --tokens 256 --hidden 512 ...] [--json out.json]

The defaults are the paper's model and batch: 4 layers x 512, 413 tokens, 8 prompts x 8 completions of 256
tokens. No completion ends early, so both do the same work. After a warm-up the two alternate, so that a slow
moment of the machine affects both, and medians are reported. The ratio is the median of the paired ratios.

The limit is the best that the machine could do with this algorithm: the operations of the matrix products at the
rate of one large product in the same dtype, plus the cache bytes that attention reads at the rate of a plain sum
over memory; both rates are measured after the runs. Norms, activations, the random draw and all overhead are not
included. A table comes first, JSON last.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import common
import torch
from transformers import GenerationConfig, Phi3Config, Phi3ForCausalLM

from smart.sampler import Sampler


def build(options: argparse.Namespace) -> Any:
    """A random Phi-3 of the requested size, float32, on the device."""
    positions = options.prompt + options.tokens
    torch.manual_seed(0)
    return (
        Phi3ForCausalLM(
            Phi3Config(
                vocab_size=options.vocabulary,
                hidden_size=options.hidden,
                intermediate_size=options.intermediate,
                num_hidden_layers=options.layers,
                num_attention_heads=options.heads,
                num_key_value_heads=options.kv_heads or options.heads,
                max_position_embeddings=positions,
                original_max_position_embeddings=positions,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
            )
        )
        .eval()
        .to(options.device)
    )


def contestants(
    model: Any, dtype: torch.dtype, options: argparse.Namespace
) -> tuple[Callable[[int], Any], Callable[[int], Any]]:
    """(ours, theirs): each samples a batch with the given number of tokens and returns it, (N, P+T)."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(
        3, options.vocabulary, (options.rows // options.group_size, options.prompt), generator=generator
    )
    sampler = Sampler(model, pad_id=0, eos_id=None, dtype=dtype)
    copy = build(options).to(dtype)
    rows = prompts.repeat_interleave(options.group_size, 0).to(options.device)
    settings = GenerationConfig(do_sample=True, top_k=0, use_cache=True, pad_token_id=0)
    copy.generation_config = settings

    def ours(tokens: int) -> Any:
        return sampler.sample(prompts, max_new_tokens=tokens, group_size=options.group_size, generator=generator).tokens

    def theirs(tokens: int) -> Any:
        return copy.generate(rows, attention_mask=torch.ones_like(rows), max_new_tokens=tokens)

    return ours, theirs


def work(options: argparse.Namespace, dtype: torch.dtype) -> tuple[float, float]:
    """(operations of the matrix products, bytes of the cache that attention reads) of one batch."""
    head = options.hidden // options.heads
    kv = (options.kv_heads or options.heads) * head
    layer = options.hidden * (options.hidden + 2 * kv + options.hidden + 3 * options.intermediate)
    prompts = options.rows // options.group_size
    positions = prompts * options.prompt + options.rows * (options.tokens - 1)
    logits = prompts + options.rows * (options.tokens - 1)
    operations = 2 * (positions * options.layers * layer + logits * options.hidden * options.vocabulary)
    read = sum(options.prompt + step for step in range(1, options.tokens))
    size = 4 if options.device == "cpu" or dtype == torch.float32 else 2
    return float(operations), float(2 * options.layers * options.rows * kv * read * size)


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Both samplers in one dtype: median seconds, tokens per second, ratio, limit."""
    dtype = common.DTYPES[name]
    ours, theirs = contestants(build(options), dtype, options)
    shape = (options.rows, options.prompt + options.tokens)

    def whole(contestant: Callable[[int], Any]) -> None:
        drawn = contestant(options.tokens)
        assert drawn.shape == shape, f"expected {shape}, got {tuple(drawn.shape)}"

    ways = {"smart": partial(whole, ours), "generate": partial(whole, theirs)}
    times = common.alternate(ways, options.repeats, options.device)
    common.trace(options.profile, ways["smart"])
    operations, read = work(options, dtype)
    flops, bandwidth = common.matmul_rate(dtype, options.device), common.memory_rate(options.device)
    limit = operations / flops + read / bandwidth
    median = {name: statistics.median(taken) for name, taken in times.items()}
    drawn_tokens = options.rows * options.tokens
    return {
        "dtype": name,
        "smart_seconds": median["smart"],
        "smart_seconds_all": times["smart"],
        "generate_seconds": median["generate"],
        "generate_seconds_all": times["generate"],
        "smart_tokens_per_second": drawn_tokens / median["smart"],
        "generate_tokens_per_second": drawn_tokens / median["generate"],
        "ratio": common.ratio(times["generate"], times["smart"]),
        "matmul_gflop": operations / 1e9,
        "matmul_gflop_per_second": flops / 1e9,
        "cache_gb": read / 1e9,
        "memory_gb_per_second": bandwidth / 1e9,
        "limit_seconds": limit,
        "times_limit": median["smart"] / limit,
    }


def parse() -> argparse.Namespace:
    parser = common.parser(__doc__)
    for name, default, text in (
        ("rows", 64, "sequences in the batch"),
        ("group-size", 8, "sequences per prompt"),
        ("prompt", 4, "tokens per prompt"),
        ("tokens", 256, "tokens to sample per sequence"),
        ("layers", 4, "layers of the model"),
        ("hidden", 512, "width of the model"),
        ("heads", 8, "attention heads"),
        ("kv-heads", 0, "key-value heads; 0: as many as attention heads"),
        ("intermediate", 2048, "width of the feed-forward layers"),
        ("vocabulary", 413, "tokens in the vocabulary"),
        ("repeats", 5, "timed runs of each sampler"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default: {default})")
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=sorted(common.DTYPES),
        default=list(common.DTYPES),
        help="precisions (default: both)",
    )
    options = common.parse(parser)
    if options.group_size < 1 or options.rows % options.group_size:
        parser.error(f"--rows {options.rows}: expected a multiple of --group-size {options.group_size}")
    return options


def main() -> None:
    options = parse()
    results = [measure(name, options) for name in options.dtypes]
    print(f"{'dtype':<10}{'smart':>10}{'generate':>10}{'ratio':>8}{'tokens/s':>10}{'limit':>10}{'x limit':>9}")
    for r in results:
        print(
            f"{r['dtype']:<10}{r['smart_seconds']:>8.2f} s{r['generate_seconds']:>8.2f} s{r['ratio']:>8.2f}"
            f"{r['smart_tokens_per_second']:>10.0f}{r['limit_seconds']:>8.2f} s{r['times_limit']:>9.2f}"
        )
    common.report("sampler", options, {"results": results})


if __name__ == "__main__":
    main()
