"""Build, find, load and save a base model: transformers' Phi3ForCausalLM with its MidiTok tokenizer.

A base is a folder in the hub's format: ``config.json``, ``model.safetensors``, ``tokenizer.json``. Weights are read
from safetensors only, so loading a base never runs code that came with it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors import SafetensorError, safe_open

from smart import UserError, brief, cores, gpu, hub
from smart.files import copy_mode, parse_json
from smart.tokens import FILE_NAME, Vocabulary, load_tokenizer, save_tokenizer, vocabulary

if TYPE_CHECKING:  # imported where they are used: finding a base takes seconds less without them
    import torch
    from transformers import Phi3ForCausalLM

SHIPPED = Path(__file__).parent / "bases"
FILES = ("config.json", "model.safetensors", "tokenizer.json")
LARGEST_CONFIG = 1 << 20  # bytes of a config.json
FEWEST_POSITIONS = 16  # of a base: a prompt and a few tokens after it


def pick_device(name: str) -> torch.device:
    """The device to compute on, for which torch is set up: "auto" is CUDA if there is a GPU, else the CPU.

    Raises ``UserError`` if CUDA or an Apple GPU ("mps", experimental) is requested but not available, and, for "auto"
    as well, if the machine has an NVIDIA card that cannot be used (``smart.gpu``).
    """
    import torch

    if name == "mps":
        if not torch.backends.mps.is_available():
            raise UserError("device 'mps': PyTorch sees no Apple GPU; use run.device = 'cpu', or --device cpu")
        cores.limit_threads("mps")
        return torch.device("mps")
    if name != "cpu" and (problem := gpu.problem() or (gpu.cpu_build() if name == "cuda" else None)):
        raise UserError(
            f"device {name!r}: {problem.found}; {problem.remedy}, or use the CPU (run.device = 'cpu', or --device cpu)"
        )
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("run.device = 'cuda', but PyTorch sees no CUDA GPU; use run.device = 'cpu' or 'auto'")
    # torch prefers cuDNN's attention on recent GPUs, but that builds a plan for every length, and lengths keep changing
    torch.backends.cuda.enable_cudnn_sdp(False)
    device = torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
    cores.limit_threads(device.type)
    return device


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """ "auto" is bfloat16 on CUDA and float32 on a CPU."""
    import torch

    wants_bf16 = name == "bfloat16" or (name == "auto" and device.type == "cuda")
    return torch.bfloat16 if wants_bf16 else torch.float32


def build_model(
    tokenizer: Any,
    *,
    layers: int = 4,
    hidden: int = 512,
    heads: int = 8,
    intermediate: int = 2048,
    max_positions: int = 2048,
    seed: int = 0,
) -> Phi3ForCausalLM:
    """A Phi-3 model with random weights over ``tokenizer``'s vocabulary (paper section 3.1: 4 layers x 512)."""
    import torch
    from transformers import Phi3Config, Phi3ForCausalLM

    if hidden % heads or (hidden // heads) % 2:
        raise UserError(f"hidden = {hidden}: expected a multiple of 2 x heads = {2 * heads}")
    facts = vocabulary(tokenizer)
    config = Phi3Config(
        vocab_size=facts.size,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=max_positions,
        original_max_position_embeddings=max_positions,
        bos_token_id=facts.bos_id,
        eos_token_id=facts.eos_id,
        pad_token_id=facts.pad_id,
        use_cache=False,
    )
    with torch.random.fork_rng(devices=[]):  # transformers draws from the global generator: restore it afterwards
        torch.manual_seed(seed)
        return Phi3ForCausalLM(config).eval()


def find_base(path_or_hub_id: str) -> Path:
    """The folder of a base, given a shipped name, a local folder, or a hub id (downloaded into the hub's cache)."""
    for folder in (Path(os.path.expanduser(path_or_hub_id)), SHIPPED / path_or_hub_id):
        if folder.is_dir():
            missing = [name for name in FILES if not (folder / name).is_file()]
            if missing:
                raise UserError(f"base {path_or_hub_id!r}: {folder} lacks {', '.join(missing)}")
            return folder
    names = sorted(folder.name for folder in SHIPPED.iterdir() if folder.is_dir()) if SHIPPED.is_dir() else []
    if not hub.is_hub_id(path_or_hub_id):
        raise UserError(
            f"base {path_or_hub_id!r}: no such folder; expected a folder with {', '.join(FILES)}, "
            f"a shipped base ({', '.join(names) or 'none'}) or a hub id such as owner/name"
        )
    try:
        return hub.fetch(path_or_hub_id, FILES)[0].parent
    except UserError as error:
        raise UserError(
            f"base {path_or_hub_id!r}: there is no such local folder, and {error.message}; "
            f"download its {', '.join(FILES)} on another machine and set model.base to that folder"
        ) from None


def load_base(
    path_or_hub_id: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> tuple[Phi3ForCausalLM, Any]:
    """Model (in ``eval`` mode) and tokenizer of a base; ``dtype`` None is float32.

    Raises ``UserError`` if the base cannot be found or read, is not a Phi-3 model, or does not fit its tokenizer.
    """
    import torch
    from transformers import GenerationConfig, Phi3Config, Phi3ForCausalLM

    folder = find_base(str(path_or_hub_id))
    tokenizer = load_tokenizer(folder)
    config = check_base(folder, vocabulary(tokenizer))
    try:
        with _quiet():
            loaded: Any = Phi3ForCausalLM.from_pretrained(
                folder,
                config=Phi3Config.from_dict(config),
                generation_config=GenerationConfig(),  # else it reads another file, or config.json once more
                local_files_only=True,
                use_safetensors=True,
                attn_implementation="sdpa",
                output_loading_info=True,
            )
        model, info = loaded
    except (OSError, SafetensorError, MemoryError) as error:
        raise _unreadable(folder, error) from None
    except Exception as error:  # the weights were looked at before: transformers objects to another value
        raise UserError(f"base {folder}: config.json declares what cannot be built ({brief(error)})") from None
    for what in ("missing", "unexpected"):  # transformers would continue with random weights
        if names := sorted(info[f"{what}_keys"]):
            raise UserError(f"base {folder}: model.safetensors has {what} weights for its config.json: {names[0]}, ...")
    return model.to(device=device, dtype=dtype or torch.float32).eval(), tokenizer


def check_base(folder: Path, facts: Vocabulary) -> dict[str, Any]:
    """The model configuration in a base's folder, checked against its weights and vocabulary before it is built.

    Special tokens are those of the vocabulary: the configuration may lack them, or give two of them one id. Raises
    ``UserError`` for a model that this package cannot run, or that does not fit its weights or its vocabulary.
    """
    path = folder / "config.json"
    try:
        if path.stat().st_size > LARGEST_CONFIG:
            raise ValueError(f"it has more than {LARGEST_CONFIG:,} bytes")
        config = parse_json(path.read_text(encoding="utf-8"))
        kind = config["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"base {folder}: config.json is not a model configuration ({error})") from None
    if kind != "phi3":
        raise UserError(f"base {folder}: model_type is {kind!r}, expected 'phi3'")
    if "quantization_config" in config:
        raise UserError(f"base {folder}: its weights are quantised, expected unquantised ones")
    for key in ("rope_parameters", "rope_scaling"):
        scaling = config.get(key) or {}
        rope = scaling.get("rope_type", scaling.get("type", "default")) if isinstance(scaling, dict) else scaling
        if rope != "default":
            raise UserError(f"base {folder}: its rotary embeddings are {rope!r}, expected plain ones ('default')")
    _check_numbers(folder, config)
    size = _size(folder, config)
    if size.vocabulary != facts.size:
        raise UserError(
            f"base {folder}: the model has {size.vocabulary} tokens, but its tokenizer has {facts.size}; "
            "expected the same number"
        )
    if (context := min(size.positions, size.window or size.positions)) < FEWEST_POSITIONS:
        raise UserError(f"base {folder}: it reads {context} tokens at once, expected at least {FEWEST_POSITIONS}")
    _check_weights(folder, size)
    for key in ("num_labels", "id2label", "label2id"):  # for classifiers; a table would be built of them
        config.pop(key, None)
    return config | {"pad_token_id": facts.pad_id, "bos_token_id": facts.bos_id, "eos_token_id": facts.eos_id}


# between which numbers these lie, without the ends
NUMBERS = {
    "rope_theta": (0, math.inf),
    "rms_norm_eps": (0, 1),
    "attention_dropout": (-1e-9, 1),
    "resid_pdrop": (-1e-9, 1),
    "embd_pdrop": (-1e-9, 1),
    "initializer_range": (0, math.inf),
    "partial_rotary_factor": (0, 1 + 1e-9),
}


def _check_numbers(folder: Path, config: dict[str, Any]) -> None:
    """Raise ``UserError`` for a value with which a model would compute nothing but NaN, or fail while it learns."""
    rope = [table for key in ("rope_parameters", "rope_scaling") if isinstance(table := config.get(key), dict)]
    for table in (config, *rope):
        for key, (low, high) in NUMBERS.items():
            value = table.get(key)
            if value is not None and not (type(value) in (int, float) and low < value < high):
                expected = "a positive number" if high == math.inf else f"a number from {low:.0f} to {high:.0f}"
                raise UserError(f"base {folder}: config.json: {key} is {value!r:.60}, expected {expected}")


class _Size(NamedTuple):
    """What a configuration declares; defaults are those of transformers' Phi3Config."""

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    positions: int
    window: int

    def shapes(self) -> dict[str, list[int]]:
        """The shape of every tensor of the weights."""
        heads, kv_heads = self.heads * self.head_dim, self.kv_heads * self.head_dim
        layer = {
            "input_layernorm": [self.hidden],
            "post_attention_layernorm": [self.hidden],
            "self_attn.qkv_proj": [heads + 2 * kv_heads, self.hidden],
            "self_attn.o_proj": [self.hidden, heads],
            "mlp.gate_up_proj": [2 * self.intermediate, self.hidden],
            "mlp.down_proj": [self.hidden, self.intermediate],
        }
        ends = {
            "model.embed_tokens.weight": [self.vocabulary, self.hidden],
            "model.norm.weight": [self.hidden],
            "lm_head.weight": [self.vocabulary, self.hidden],
        }
        return ends | {
            f"model.layers.{number}.{name}.weight": shape
            for number in range(self.layers)
            for name, shape in layer.items()
        }


def _size(folder: Path, config: dict[str, Any]) -> _Size:
    def whole(key: str, default: int, high: int = 1 << 20, low: int = 1) -> int:
        value = config.get(key)
        if value is None:
            return default
        if type(value) is not int or not low <= value <= high:
            raise UserError(f"base {folder}: config.json: {key} is {value!r}, expected a number from {low} to {high:,}")
        return value

    hidden, heads = whole("hidden_size", 3072), whole("num_attention_heads", 32)
    positions = whole("max_position_embeddings", 4096, 1 << 24)
    whole("original_max_position_embeddings", positions, 1 << 24)
    return _Size(
        whole("vocab_size", 32064),
        hidden,
        whole("intermediate_size", 8192),
        whole("num_hidden_layers", 32, 1 << 12),
        heads,
        whole("num_key_value_heads", heads),
        whole("head_dim", max(hidden // heads, 1)),
        positions,
        whole("sliding_window", 0, 1 << 24),
    )


def _check_weights(folder: Path, size: _Size) -> None:
    """Compare the declared shapes with those in the header of the weights' file."""
    try:
        with safe_open(folder / "model.safetensors", framework="pt") as weights:
            found = {name: list(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    except Exception as error:  # SafetensorError, OSError, ...: the file is damaged
        raise _unreadable(folder, error) from None
    declared = size.shapes()
    for name in declared.keys() & found.keys():
        if declared[name] != found[name]:
            raise UserError(
                f"base {folder}: model.safetensors holds {name} with shape {found[name]}, "
                f"but config.json declares {declared[name]}"
            )
    if len(declared) > 2 * len(found):  # building so many layers without weights would never end
        raise UserError(
            f"base {folder}: model.safetensors has missing weights for its config.json, which declares "
            f"{len(declared)} tensors; it holds {len(found)}"
        )


def _unreadable(folder: Path, error: Exception) -> UserError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return UserError(f"base {folder}: model.safetensors cannot be read ({reason}); download or train it again")


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide transformers' progress bars, useless for models of this size, and its tables of mismatched weights."""
    from transformers.utils import logging as transformers_logging

    shown, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if shown:
            transformers_logging.enable_progress_bar()


def context_length(model: Any) -> int:
    """The most tokens, prompt and completion together, that a model can read and write."""
    config = model.config
    return min(config.max_position_embeddings, config.sliding_window or config.max_position_embeddings)


def save_base(model: Phi3ForCausalLM, tokenizer: Any, folder: Path) -> None:
    """Write ``folder`` in the format that ``load_base`` and the hub read."""
    folder.mkdir(parents=True, exist_ok=True)
    with _quiet():
        model.save_pretrained(folder, safe_serialization=True)
    (folder / "generation_config.json").unlink(missing_ok=True)  # sampling uses our settings only
    save_tokenizer(tokenizer, folder)
    copy_mode(folder / "model.safetensors", folder / FILE_NAME)
