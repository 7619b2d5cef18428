"""Tables that are read back: damage of any bit is found, and crafted tables are refused before they are read."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smart import UserError
from smart.evaluate import pieces, sealed
from smart.evaluate.sample import METADATA, is_whole, schema
from smart.tokens import build_tokenizer, save_tokenizer

AXES = ["ce_proxy.CE"]


def rows(count: int, system: str = "base") -> list[dict[str, Any]]:
    draws = np.random.default_rng(count)
    return [
        {
            "system": system, "prompt": prompt, "seed": int(draws.integers(1 << 60)), "tokens": [4, 5, 6, 7],
            "prompt_length": 4, "length": 0, "logprobs": -1.5, "seconds": 1.0, "failed": False, "silent": False,
            "empty": True, "number_of_notes": 0, "polyphony_rate": 0.0, "empty_beat_rate": 1.0, "pitch_range": 0,
            "scale_consistency": math.nan, "velocity_range": 0, "pitches": [], "velocities": [],
            "audio_vector": None if prompt == 1 else draws.random(20).astype(np.float32),
            "ce_proxy.CE": float(draws.normal(5, 1)),
        }
        for prompt in range(count)
    ]  # fmt: skip


def test_a_table_comes_back_as_it_was_written(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(rows(5), schema(AXES)).replace_schema_metadata({"smart": "{}"})
    sealed.write_table(tmp_path / "t", table, compression="zstd")
    found = sealed.read_table(tmp_path / "t")
    assert found.to_pylist()[0].keys() == table.to_pylist()[0].keys() and found.schema.metadata == {b"smart": b"{}"}
    assert (
        found.drop_columns(["scale_consistency"]).to_pylist() == table.drop_columns(["scale_consistency"]).to_pylist()
    )
    pq.write_table(table, tmp_path / "other")
    assert sealed.read_table(tmp_path / "other", sealed=False).num_rows == 5
    with pytest.raises(sealed.Damaged, match="has no checksum"):
        sealed.read_table(tmp_path / "other")


def test_a_flipped_bit_is_found_or_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = pa.Table.from_pylist(rows(8), schema(AXES))
    path, draws = tmp_path / "000000.parquet", np.random.default_rng(0)
    sealed.write_table(path, table)
    whole = path.read_bytes()
    expected = repr(sealed.read_table(path).to_pydict())
    found = 0
    for _ in range(400):
        data = bytearray(whole)
        data[draws.integers(len(data))] ^= 1 << int(draws.integers(8))
        path.write_bytes(data)
        try:
            assert repr(sealed.read_table(path).to_pydict()) == expected
        except sealed.Damaged:
            found += 1
            assert not is_whole(path) and "will be sampled again" in capsys.readouterr().err
    assert found > 100  # the others are in statistics and padding


# --- Crafted tables -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(build_tokenizer(), folder)
    return (folder / "tokenizer.json").read_text()


def settings(**changes: Any) -> dict[str, Any]:
    return {
        "systems": ["base"], "models": {"base": {"step": None, "sha256": "0" * 64}}, "prompts": "procedural",
        "count": 2, "soundfont_sha256": "1" * 64,
        "rewards": {"ce_proxy": {"axes": ["CE"], "provenance": "made", "stand_in": True}}, **changes,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"count": 10**11}, "its settings say 100000000000"),
        ({"count": -1}, "its setting count is -1"),
        ({"count": 2.0}, "its setting count is 2.0"),
        ({"count": True}, "its setting count is True"),
        ({"systems": []}, "its setting systems"),
        ({"systems": "base"}, "its setting systems"),
        ({"systems": ["base", "base"]}, "its setting systems"),
        ({"systems": ["base", "x"]}, "its setting models"),
        ({"models": {"base": 1}}, "its setting models"),
        ({"rewards": []}, "its setting rewards"),
        ({"rewards": {"ce_proxy": {"axes": "CE"}}}, "its setting rewards"),
        ({"rewards": {"x": {"axes": ["A"], "provenance": "", "stand_in": False}}}, "its column 'x.A' is None"),
        ({"prompts": "others"}, "its setting prompts"),
        ({"prompts": ["others"]}, "its setting prompts"),
        ({"soundfont_sha256": None}, "its setting soundfont_sha256"),
    ],
)
def test_crafted_settings_are_named(tmp_path: Path, tokenizer: str, changed: dict[str, Any], message: str) -> None:
    provenance = {"settings": settings(**changed), "tokenizers": {"base": tokenizer}}
    table = pa.Table.from_pylist(rows(2), schema(AXES)).replace_schema_metadata({METADATA: json.dumps(provenance)})
    sealed.write_table(tmp_path / "t.parquet", table)
    with pytest.raises(UserError) as raised:
        pieces.read(tmp_path / "t.parquet")
    assert message in str(raised.value) and "t.parquet" in str(raised.value)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({}, ""),
        ({"ce_proxy.CE": 1e30}, "'ce_proxy.CE' has values from"),
        ({"number_of_notes": -3}, "'number_of_notes' has values from"),
        ({"polyphony_rate": 1e9}, "'polyphony_rate' has values from"),
        ({"pitches": [200]}, "'pitches' has values from"),
        ({"tokens": [-5]}, "'tokens' has values from"),
        ({"tokens": None}, "'tokens' lacks values"),
        ({"prompt": 0}, "does not have the prompts 0 to 1"),
        ({"prompt": None}, "'prompt' lacks values"),
        ({"system": "other"}, "does not have the prompts 0 to 1"),
        ({"audio_vector": [0.5]}, "rows of several lengths"),
        ({"tokens": [2**31 - 1]}, "not of the vocabulary of base"),
    ],
)
def test_crafted_values_are_named(tmp_path: Path, tokenizer: str, changed: dict[str, Any], message: str) -> None:
    provenance = {"settings": settings(), "tokenizers": {"base": tokenizer}}
    made = rows(2)
    made[0] |= {"audio_vector": made[0]["audio_vector"]}
    made[1] |= {"audio_vector": made[0]["audio_vector"], **changed}
    table = pa.Table.from_pylist(made, schema(AXES)).replace_schema_metadata({METADATA: json.dumps(provenance)})
    pq.write_table(table, tmp_path / "t.parquet")  # as a program that makes no digests
    if not message:
        assert pieces.read(tmp_path / "t.parquet").systems == ["base"]
        return
    with pytest.raises(UserError) as raised:
        pieces.read(tmp_path / "t.parquet")
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_a_table_that_swells_is_not_read(tmp_path: Path, tokenizer: str) -> None:
    """A billion equal values take no space in a file."""
    count = 3_000_000
    provenance = {"settings": settings(count=count), "tokenizers": {"base": tokenizer}}
    table = pa.table({"prompt": pa.array(np.zeros(count, np.int32))})
    table = table.replace_schema_metadata({METADATA: json.dumps(provenance)})
    pq.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(UserError, match="more values than a file of its size can hold"):
        pieces.read(tmp_path / "t.parquet")
