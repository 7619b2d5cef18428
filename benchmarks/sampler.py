"""Sampling speed: smart.sampler against transformers' ``generate`` on the same weights, and against a limit.

    python benchmarks/sampler.py [--rows 64 --tokens 256 --hidden 512 ...] [--json out.json]

The defaults are the paper's model and batch: 4 layers x 512, 413 tokens, 8 prompts x 8 completions of 256
tokens. Nothing ends a completion, so both do the same work. After a warm-up the two alternate, in turned
order, and medians are reported, so that a slow moment of the machine falls on both. The ratio is the median
of the paired ratios.

The limit is what the machine could do at best with this algorithm: the operations of the matrix products at
the rate of one large product in the same dtype, plus the bytes of the cache that attention reads at the rate
of a plain sum over memory; both rates are measured here, after the runs. It leaves out norms, activations,
the draw and all overhead. A table comes first, JSON last.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import GenerationConfig, Phi3Config, Phi3ForCausalLM

from smart.sampler import Sampler

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def build(options: argparse.Namespace) -> Any:
    """A random Phi-3 of the size asked for, float32, on the device."""
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


def seconds(function: Callable[[], Any], device: str) -> float:
    """Wall time of one call, the device's work included."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def contestants(
    model: Any, dtype: torch.dtype, options: argparse.Namespace
) -> tuple[Callable[[int], Any], Callable[[int], Any]]:
    """(ours, theirs): each draws a batch of the given number of tokens and returns it, (N, P+T)."""
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


def rates(dtype: torch.dtype, device: str) -> tuple[float, float]:
    """(operations a second of a large matrix product, bytes a second of a sum over memory), best of 8."""
    a, b = (torch.randn(2048, 2048, device=device).to(dtype) for _ in range(2))
    memory = torch.ones(64 * 2**20, device=device)  # 256 MiB, beyond any cache
    product = min(seconds(lambda: a @ b, device) for _ in range(8))
    total = min(seconds(memory.sum, device) for _ in range(8))
    return 2 * 2048**3 / product, memory.numel() * 4 / total


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Both samplers in one dtype: medians in seconds, tokens a second, ratio, limit."""
    dtype = DTYPES[name]
    ours, theirs = contestants(build(options), dtype, options)
    shape = (options.rows, options.prompt + options.tokens)
    for contestant in (ours, theirs):
        drawn = contestant(options.tokens)  # the warm-up is a whole run: memory is mapped, kernels are chosen
        assert drawn.shape == shape, f"expected {shape}, got {tuple(drawn.shape)}"
    times: dict[Any, list[float]] = {ours: [], theirs: []}
    for repeat in range(options.repeats):
        for contestant in (ours, theirs) if repeat % 2 == 0 else (theirs, ours):
            times[contestant].append(seconds(partial(contestant, options.tokens), options.device))
    operations, read = work(options, dtype)
    flops, bandwidth = rates(dtype, options.device)
    limit = operations / flops + read / bandwidth
    median = statistics.median(times[ours])
    drawn_tokens = options.rows * options.tokens
    return {
        "dtype": name,
        "smart_seconds": median,
        "smart_seconds_all": times[ours],
        "generate_seconds": statistics.median(times[theirs]),
        "generate_seconds_all": times[theirs],
        "smart_tokens_per_second": drawn_tokens / median,
        "generate_tokens_per_second": drawn_tokens / statistics.median(times[theirs]),
        "ratio": statistics.median(t / o for o, t in zip(times[ours], times[theirs], strict=True)),
        "matmul_gflop": operations / 1e9,
        "matmul_gflop_per_second": flops / 1e9,
        "cache_gb": read / 1e9,
        "memory_gb_per_second": bandwidth / 1e9,
        "limit_seconds": limit,
        "times_limit": median / limit,
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Sampling speed against transformers' generate and a limit.")
    for name, default, text in (
        ("rows", 64, "sequences in the batch"),
        ("group-size", 8, "sequences of one prompt"),
        ("prompt", 4, "tokens of a prompt"),
        ("tokens", 256, "tokens drawn for each sequence"),
        ("layers", 4, "layers of the model"),
        ("hidden", 512, "width of the model"),
        ("heads", 8, "attention heads"),
        ("kv-heads", 0, "key-value heads; 0: as many as attention heads"),
        ("intermediate", 2048, "width of the feed-forward layers"),
        ("vocabulary", 413, "tokens of the vocabulary"),
        ("repeats", 5, "timed runs of each"),
        ("threads", 0, "CPU threads; 0: torch's choice"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default: {default})")
    parser.add_argument("--dtypes", nargs="+", choices=sorted(DTYPES), default=list(DTYPES))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, help="also write the JSON to this file")
    options = parser.parse_args()
    if options.group_size < 1 or options.rows % options.group_size:
        parser.error(f"--rows {options.rows}: expected a multiple of --group-size {options.group_size}")
    return options


def main() -> None:
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    results = [measure(name, options) for name in options.dtypes]
    print(f"{'dtype':<10}{'smart':>10}{'generate':>10}{'ratio':>8}{'tokens/s':>10}{'limit':>10}{'x limit':>9}")
    for r in results:
        print(
            f"{r['dtype']:<10}{r['smart_seconds']:>8.2f} s{r['generate_seconds']:>8.2f} s{r['ratio']:>8.2f}"
            f"{r['smart_tokens_per_second']:>10.0f}{r['limit_seconds']:>8.2f} s{r['times_limit']:>9.2f}"
        )
    report = {
        "benchmark": "sampler",
        "options": {k: v for k, v in vars(options).items() if k != "json"},
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "machine": torch.cuda.get_device_name() if options.device == "cuda" else platform.processor(),
        "results": results,
    }
    text = json.dumps(report, indent=2)
    if options.json:
        options.json.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
