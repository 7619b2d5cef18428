"""Shards: what was written is read, and damage is refused."""

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpora import build_small, song

from smart import UserError
from smart.corpus import Corpus, ShardWriter, Split, shards
from smart.corpus.build import build
from smart.files import sha256


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy it before changing it."""
    return build_small(tmp_path_factory.mktemp("small"))


def test_the_door_is_light() -> None:
    """Programs that only read tokens, and the processes that start workers, wait for no parser and no torch."""
    heavy = ("torch", "transformers", "miditok", "symusic")
    code = f"import sys; from smart.corpus import *; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_shards_hold_what_was_written(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    pieces = [random.integers(0, 413, random.integers(1, 50)).astype("<u2") for _ in range(100)]
    writer = ShardWriter(tmp_path, "train", shard_tokens=200)
    places = [writer.add(piece.tobytes()) for piece in pieces]
    listed = writer.close()
    assert len(listed) > 5 and places[0] == (0, 0) and places[-1][0] == len(listed) - 1
    assert all(shard["tokens"] <= 200 for shard in listed)
    split = Split(tmp_path, listed)
    assert len(split) == 100 and split.tokens == sum(map(len, pieces))
    assert split.lengths().tolist() == [len(piece) for piece in pieces]
    for index in (*range(100), -1, -100):
        np.testing.assert_array_equal(split[index], pieces[index])
    assert [len(piece) for piece in split[10:13]] == [len(piece) for piece in pieces[10:13]]
    for index in (100, -101):
        with pytest.raises(IndexError):
            split[index]
    assert split[0].dtype == np.uint16 and not split[0].flags.writeable and not split[0].flags.owndata
    assert not list(tmp_path.glob("*.tmp"))


def test_a_piece_longer_than_a_shard_has_its_own(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "test", shard_tokens=10)
    for size in (4, 30, 4):
        writer.add(bytes(2 * size))
    assert [shard["tokens"] for shard in writer.close()] == [4, 30, 4]


def test_empty_splits_are_empty(tmp_path: Path) -> None:
    folder = tmp_path / "midi"
    folder.mkdir()
    song(0).dump_midi(folder / "only.mid")
    build([folder], tmp_path / "out")
    corpus = Corpus(tmp_path / "out")
    sizes = {name: len(corpus.split(name)) for name in shards.SPLITS}
    assert sorted(sizes.values()) == [0, 0, 1]
    empty = corpus.split(min(sizes, key=lambda name: sizes[name]))
    assert empty.tokens == 0 and empty.lengths().tolist() == [] and list(empty) == []
    with pytest.raises(ValueError, match="expected one of train, validation, test"):
        corpus.split("training")


def _spoil(name: str, change: Any) -> Any:
    def spoil(folder: Path) -> None:
        path = next(folder.glob(name))
        data = bytearray(path.read_bytes())
        path.write_bytes(change(data))

    return spoil


def _flip(data: bytearray) -> bytearray:
    data[len(data) // 2] ^= 1
    return data


def _forge(change: Any) -> Any:
    """Change a shard's entry in the manifest, or its index, and have the manifest's hash agree."""

    def forge(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        shard = manifest["splits"]["train"]["shards"][0]
        index = folder / f"{shard['name']}.idx.npy"
        change(shard, index)
        shard["index_sha256"] = sha256(index)
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return forge


def _flood(tokens: Path, shard: dict[str, Any]) -> None:
    tokens.write_bytes(b"\xff" * tokens.stat().st_size)
    shard["sha256"] = sha256(tokens)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), "unfinished or not a corpus"),
        (_spoil("manifest.json", lambda data: data[:100]), "cannot be read"),
        (_spoil("manifest.json", lambda data: b"[]"), "cannot be read"),
        (_spoil("manifest.json", lambda data: data.replace(b'"format": 1', b'"format": 99')), "has format 99"),
        (lambda folder: next(folder.glob("train*.bin")).unlink(), "is missing"),
        (_spoil("train*.bin", lambda data: data[:-2]), "bytes, expected"),
        (_spoil("train*.bin", _flip), "not as it was written"),
        (_spoil("train*.npy", _flip), "not as it was written"),
        (_spoil("tokenizer/tokenizer.json", _flip), "not the one that wrote the tokens"),
        (_forge(lambda shard, file: shard.update(name="/elsewhere/train-00000")), "is not the name of a shard"),
        (_forge(lambda shard, file: shard.update(name="../out/train-00000")), "is not the name of a shard"),
        (_forge(lambda shard, file: shard.update(pieces=shard["pieces"] + 1)), "does not divide"),
        (_forge(lambda shard, file: shard.update(pieces=0)), "train-00000 is empty"),
        (_forge(lambda shard, file: file.write_bytes(b"junk" * 100)), "train-00000.idx.npy cannot be read"),
        (_forge(lambda shard, file: file.write_bytes(b"")), "train-00000.idx.npy cannot be read"),
        (_forge(lambda shard, file: file.write_bytes(pickle.dumps([1]))), "train-00000.idx.npy cannot be read"),
        (_forge(lambda shard, file: np.save(file, np.load(file)[::-1].copy())), "does not divide"),
        (_forge(lambda shard, file: np.save(file, np.load(file).astype(float))), "does not divide"),
        (_forge(lambda shard, file: file.rename(file.parents[1] / "x") and file.symlink_to("../x")), "leaves the fol"),
        (_forge(lambda shard, file: _flood(file.parent / "train-00000.bin", shard)), "holds token 65535"),
    ],
)
def test_damaged_corpora_are_refused(small: Path, tmp_path: Path, spoil: Any, message: str) -> None:
    shutil.copytree(small, tmp_path / "out")
    Corpus(tmp_path / "out", verify=True)
    spoil(tmp_path / "out")
    with pytest.raises(UserError, match=message) as raised:
        Corpus(tmp_path / "out", verify=True)
    assert "\n" not in str(raised.value) and "smart corpus build" in str(raised.value)


def test_damaged_tokens_are_refused_when_a_split_is_used(small: Path, tmp_path: Path) -> None:
    """A program opens a corpus without ``verify``; what it reads of it is checked all the same."""
    shutil.copytree(small, tmp_path / "out")
    corpus = Corpus(tmp_path / "out")
    _spoil("train*.bin", _flip)(tmp_path / "out")
    with pytest.raises(UserError, match=r"train-00000\.bin is not as it was written"):
        corpus.split("train")
    with pytest.raises(UserError, match=r"train-00000\.bin is not as it was written"):
        Corpus(tmp_path / "out").split("train")
    assert Corpus(tmp_path / "out").split("test") is not None


def test_no_corpus_at_all(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        Corpus(tmp_path / "none")
    with pytest.raises(UserError, match="unfinished or not a corpus"):
        Corpus(tmp_path)
