"""smart.model: bases in the hub's format, and the errors of damaged ones."""

import json
import math
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from smart import UserError
from smart.model import SHIPPED, build_model, context_length, find_base, load_base, pick_device, save_base
from smart.tokens import vocabulary


@pytest.fixture
def base(tiny_model: Any, tokenizer: Any, tmp_path: Path) -> Path:
    save_base(tiny_model, tokenizer, tmp_path / "base")
    return tmp_path / "base"


def test_saved_in_the_hubs_form_and_loaded_again(base: Path, tiny_model: Any) -> None:
    assert sorted(path.name for path in base.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    model, tokenizer = load_base(base)
    assert not model.training
    assert len(tokenizer.vocab) == 413
    for name, weights in tiny_model.state_dict().items():
        assert torch.equal(model.state_dict()[name], weights), name
    assert load_base(base, dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_the_umask_decides_who_may_read_a_base(tiny_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        save_base(tiny_model, tokenizer, tmp_path / "base")
    finally:
        os.umask(before)
    assert {oct(path.stat().st_mode & 0o777) for path in (tmp_path / "base").iterdir()} == {"0o640"}


def test_a_byte_order_mark_before_a_base_s_texts_changes_nothing(base: Path, tiny_model: Any) -> None:
    for name in ("config.json", "tokenizer.json"):
        (base / name).write_bytes(b"\xef\xbb\xbf" + (base / name).read_bytes())
    model, tokenizer = load_base(base)
    assert len(tokenizer.vocab) == 413
    assert all(torch.equal(model.state_dict()[name], weights) for name, weights in tiny_model.state_dict().items())


def test_a_folder_as_transformers_and_miditok_publish_it(tokenizer: Any, tmp_path: Path) -> None:
    """A base in the format of the paper's on the hub: Phi-3 with 413 tokens, written without smart."""
    from transformers import Phi3Config, Phi3ForCausalLM

    config = Phi3Config(
        vocab_size=413, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    published = Phi3ForCausalLM(config)
    published.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, loaded = load_base(tmp_path)
    assert loaded.vocab == tokenizer.vocab
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(model(input_ids=tokens).logits, published.eval()(input_ids=tokens).logits)


def test_paper_size(tokenizer: Any) -> None:
    model = build_model(tokenizer)
    config = model.config
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (4, 512, 8)
    assert (config.intermediate_size, config.vocab_size) == (2048, 413)
    facts = vocabulary(tokenizer)
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (
        facts.pad_id,
        facts.bos_id,
        facts.eos_id,
    )


def test_weights_follow_the_seed_and_leave_the_global_generator(tokenizer: Any) -> None:
    size = {"layers": 1, "hidden": 16, "heads": 2, "intermediate": 16}
    before = torch.random.get_rng_state()
    one, same, other = (build_model(tokenizer, **size, seed=seed).lm_head.weight for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(one, same) and not torch.equal(one, other)
    with pytest.raises(UserError, match="multiple of 2 x heads"):
        build_model(tokenizer, hidden=30, heads=4)


def test_shipped_bases_load_and_are_small() -> None:
    for folder in SHIPPED.iterdir():
        model, _ = load_base(folder.name)
        assert sum(weights.numel() for weights in model.parameters()) > 1e6
        assert sum(path.stat().st_size for path in folder.iterdir()) <= 20e6
        assert "alidation loss" in (folder / "README.md").read_text(encoding="utf-8")


def test_mistakes(base: Path, tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"no such folder; expected a folder with config\.json.*piano-small"):
        load_base("no-such-base")
    with pytest.raises(UserError, match="no such folder"):
        load_base(tmp_path / "nowhere")

    (base / "model.safetensors").rename(base / "kept")
    with pytest.raises(UserError, match=r"lacks model\.safetensors"):
        load_base(base)
    (base / "kept").rename(base / "model.safetensors")

    weights = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read"):
        load_base(base)
    (base / "model.safetensors").write_bytes(pickle.dumps({"lm_head.weight": [1.0]}))
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read"):
        load_base(base)
    (base / "model.safetensors").write_bytes(weights)

    config = json.loads((base / "config.json").read_text())
    for change, message in (
        ({"model_type": "llama"}, "model_type is 'llama', expected 'phi3'"),
        ({"vocab_size": 400}, r"model\.safetensors cannot be read|expected the same number"),
        ({"num_hidden_layers": 3}, r"missing weights .*model\.layers\.2"),
        ({"num_hidden_layers": 10**12}, r"num_hidden_layers is 1000000000000, expected a number"),
        ({"hidden_size": 10**7}, r"hidden_size is 10000000, expected a number"),
        ({"num_attention_heads": 0}, r"num_attention_heads is 0, expected a number"),
        ({"hidden_act": "nosuch"}, r"config\.json declares what cannot be built \(.*nosuch"),
        ({"dtype": "int8"}, r"config\.json declares what cannot be built \(.*int8"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"its weights are quantised"),
    ):
        (base / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=message):
            load_base(base)
    (base / "config.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"config\.json is not a model configuration"):
        load_base(base)
    (base / "config.json").write_text("[]")
    with pytest.raises(UserError, match=r"config\.json is not a model configuration"):
        load_base(base)


def test_weights_that_the_model_does_not_know_are_refused(base: Path) -> None:
    weights = load_file(base / "model.safetensors")
    weights["model.layers.9.mlp.down_proj.weight"] = torch.zeros(2, 2)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"unexpected weights .*model\.layers\.9"):
        load_base(base)


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"base 'owner/name': .*set model\.base to that folder") as caught:
        find_base("owner/name")
    assert "\n" not in caught.value.message
    for name in ("owner/my--model", "owner/model.git", "owner/model."):  # a name that the hub never uses
        with pytest.raises(UserError, match=r"base 'owner/.*set model\.base to that folder") as caught:
            find_base(name)
        assert "\n" not in caught.value.message


def test_device() -> None:
    assert pick_device("cpu").type == "cpu"
    if not torch.cuda.is_available():
        assert pick_device("auto").type == "cpu"
        with pytest.raises(UserError, match="no CUDA GPU"):
            pick_device("cuda")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"intermediate_size": 524288}, r"mlp\.\w+\.weight with shape .* but config\.json declares"),
        ({"intermediate_size": 1 << 40}, r"intermediate_size is 1099511627776, expected a number from 1 to"),
        ({"hidden_size": "large"}, r"hidden_size is 'large', expected a number"),
        ({"num_hidden_layers": 4000}, r"missing weights for its config\.json, which declares 24003 tensors"),
        ({"vocab_size": 500_000}, r"the model has 500000 tokens, but its tokenizer has 413"),
        ({"max_position_embeddings": 8}, r"reads 8 tokens at once, expected at least 16"),
        ({"sliding_window": 4}, r"reads 4 tokens at once, expected at least 16"),
        ({"rope_parameters": {"rope_type": "longrope"}}, r"rotary embeddings are 'longrope', expected plain ones"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, r"embeddings are 'linear'"),
        ({"rope_parameters": "yarn"}, r"embeddings are 'yarn'"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": math.nan}}, r"rope_theta is nan, expected a posit"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 0}},
            r"rope_theta is 0, expected a positive",
        ),
        ({"rms_norm_eps": "x"}, r"rms_norm_eps is 'x', expected a number from 0 to 1"),
        ({"attention_dropout": 2.0}, r"attention_dropout is 2\.0, expected a number from"),
    ],
)
def test_a_base_that_cannot_run_is_refused_before_it_is_built(
    base: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], message: str
) -> None:
    from transformers import Phi3ForCausalLM

    monkeypatch.setattr(Phi3ForCausalLM, "from_pretrained", None)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=message):
        load_base(base)


@pytest.mark.parametrize(
    "change",
    [{"pad_token_id": 1}, {"pad_token_id": 2, "eos_token_id": 1}, {"pad_token_id": None}, {"pad_token_id": 9999}],
)
def test_special_tokens_are_those_of_the_vocabulary(base: Path, change: dict[str, Any]) -> None:
    """Whatever the configuration says, padding is padding, and the beginning of a piece is none."""
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | change | {"num_labels": 3_000_000}))
    model, tokenizer = load_base(base)
    facts = vocabulary(tokenizer)
    found = model.config
    assert (found.pad_token_id, found.bos_token_id, found.eos_token_id) == (facts.pad_id, facts.bos_id, facts.eos_id)
    assert model.model.embed_tokens.padding_idx == facts.pad_id


def test_a_window_limits_the_context(base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"sliding_window": 128}))
    assert context_length(load_base(base)[0]) == 128
