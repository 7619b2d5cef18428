"""Tokenised pieces on disk: written once, read through memory maps.

A corpus is a folder::

    manifest.json            what is in it; written last, so a folder without it is unfinished
    tokenizer/tokenizer.json
    train-00000.bin          tokens of whole pieces, one after another, little-endian uint16
    train-00000.idx.npy      int64 (pieces + 1,): where each piece starts, in tokens; the last entry is the end
    train-00001.bin ...      and so on; validation-*, test-* likewise

The other files (tables of pieces and rejects) are for people, and the manifest lists them too.
"""

import hashlib
import os
import re
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from smart import UserError
from smart.files import open_new, parse_json, sha256, write_atomically

SPLITS = ("train", "validation", "test")
MANIFEST = "manifest.json"
FORMAT = 1
DTYPE = np.dtype("<u2")
NAME = re.compile(rf"(?:{'|'.join(SPLITS)})-\d{{5,}}", re.ASCII)  # the name of a shard
SHARD_TOKENS = 1 << 26  # 128 MiB per shard


class ShardWriter:
    """Writes the pieces of one split in the order given, one shard at a time; memory does not grow with them."""

    def __init__(self, folder: Path, split: str, *, shard_tokens: int = SHARD_TOKENS) -> None:
        self.folder, self.split, self.limit = folder, split, shard_tokens
        self.shards: list[dict[str, Any]] = []
        self._file: IO[bytes] | None = None
        self._starts = array("q", [0])
        self._digest = hashlib.sha256()

    def add(self, tokens: bytes) -> tuple[int, int]:
        """Append one piece, given as the bytes of its tokens; returns its shard and its index in the shard."""
        if self._file is not None and self._starts[-1] + len(tokens) // DTYPE.itemsize > self.limit:
            self._finish_shard()
        if self._file is None:
            self._path(".bin.tmp").unlink(missing_ok=True)  # left by a killed build
            self._file = open_new(self._path(".bin.tmp"))
        self._file.write(tokens)
        self._digest.update(tokens)
        self._starts.append(self._starts[-1] + len(tokens) // DTYPE.itemsize)
        return len(self.shards), len(self._starts) - 2

    def close(self) -> list[dict[str, Any]]:
        """Finish the last shard; returns the entries for the split's shards in the manifest."""
        if self._file is not None:
            self._finish_shard()
        return self.shards

    def _path(self, suffix: str) -> Path:
        return self.folder / f"{self.split}-{len(self.shards):05d}{suffix}"

    def _finish_shard(self) -> None:
        assert self._file is not None
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._path(".bin.tmp"), self._path(".bin"))
        starts = np.array(self._starts, dtype="<i8")
        write_atomically(self._path(".idx.npy"), lambda file: np.save(file, starts))
        self.shards.append(
            {
                "name": self._path("").name,
                "pieces": len(starts) - 1,
                "tokens": int(starts[-1]),
                "sha256": self._digest.hexdigest(),
                "index_sha256": sha256(self._path(".idx.npy")),
            }
        )
        self._file, self._starts, self._digest = None, array("q", [0]), hashlib.sha256()


class Split(Sequence[npt.NDArray[np.uint16]]):
    """The pieces of one split; ``split[i]`` is a read-only (L,) uint16 view into the memory map, without BOS, EOS."""

    def __init__(self, folder: Path, shards: Sequence[dict[str, Any]]) -> None:
        self._maps = [np.memmap(folder / f"{shard['name']}.bin", DTYPE, "r") for shard in shards]
        self._starts = [np.lib.format.open_memmap(folder / f"{shard['name']}.idx.npy", mode="r") for shard in shards]
        self._first = np.cumsum([0] + [int(shard["pieces"]) for shard in shards])
        self.tokens = sum(int(shard["tokens"]) for shard in shards)  # in all pieces together

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"piece {index} of {len(self)}")
        index = int(index) % len(self)
        shard = int(np.searchsorted(self._first, index, side="right")) - 1
        place = index - int(self._first[shard])
        starts = self._starts[shard]
        return np.asarray(self._maps[shard][starts[place] : starts[place + 1]])

    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens in each piece, (pieces,); read from the indices alone."""
        return np.concatenate([np.zeros(0, np.int64), *(np.diff(starts) for starts in self._starts)])


class Corpus:
    """A finished corpus: ``corpus.split("train")``, ``corpus.tokenizer``, ``corpus.manifest``.

    Opening checks the manifest, the size of every shard, every index and the tokenizer; the first use of a split reads
    all of its tokens and checks their hashes. ``verify=True`` does that for all splits at once, and checks that the
    tokens belong to the tokenizer's vocabulary. Raises ``UserError`` if the folder is not a corpus, or an unfinished or
    damaged one.
    """

    def __init__(self, folder: str | Path, *, verify: bool = False) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        for shard in self._shards():
            self._check(shard, verify)
        tokenizer = self.folder / "tokenizer" / "tokenizer.json"
        if not tokenizer.is_file() or sha256(tokenizer) != self.manifest["tokenizer"]["sha256"]:
            raise self._damaged(f"{tokenizer.name} is missing, or not the one that wrote the tokens")
        if verify:
            self._check_tokens()
        self._verified = verify
        self._splits: dict[str, Split] = {}

    def split(self, name: str) -> Split:
        """The pieces of ``train``, ``validation`` or ``test``. Raises ``UserError`` if a shard is damaged."""
        if name not in SPLITS:
            raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {name!r}")
        if name not in self._splits:
            if not self._verified:
                for shard in self.manifest["splits"][name]["shards"]:
                    self._check_hash(shard)
            self._splits[name] = Split(self.folder, self.manifest["splits"][name]["shards"])
        return self._splits[name]

    @property
    def tokenizer(self) -> Any:
        """The tokenizer that wrote the tokens (a new one each time)."""
        from smart.tokens import load_tokenizer  # imported late: reading tokens needs no MidiTok

        return load_tokenizer(self.folder / "tokenizer")

    def _shards(self) -> Iterator[dict[str, Any]]:
        for split in SPLITS:
            yield from self.manifest["splits"][split]["shards"]

    def _check(self, shard: dict[str, Any], verify: bool) -> None:
        tokens, index = (self.folder / f"{shard['name']}{suffix}" for suffix in (".bin", ".idx.npy"))
        for path in (tokens, index):
            if not path.is_file():
                raise self._damaged(f"{path.name} is missing")
            if path.resolve().parent != self.folder.resolve():
                raise self._damaged(f"{path.name} is a link that leaves the folder")
        if tokens.stat().st_size != shard["tokens"] * DTYPE.itemsize:
            raise self._damaged(
                f"{tokens.name} holds {tokens.stat().st_size} bytes, expected {shard['tokens'] * DTYPE.itemsize}"
            )
        if sha256(index) != shard["index_sha256"]:
            raise self._damaged(f"{index.name} is not as it was written")
        try:  # its hash is in a manifest that others may have written
            starts = np.lib.format.open_memmap(index, mode="r")
            sound = starts.dtype == np.dtype("<i8") and starts.shape == (shard["pieces"] + 1,)
            sound = sound and starts[0] == 0 and starts[-1] == shard["tokens"] and bool((np.diff(starts) >= 0).all())
        except (OSError, ValueError, EOFError) as error:
            raise self._damaged(f"{index.name} cannot be read ({error})") from None
        if not sound:
            raise self._damaged(f"{index.name} does not divide {shard['tokens']} tokens into {shard['pieces']} pieces")
        if verify:
            self._check_hash(shard)

    def _check_hash(self, shard: dict[str, Any]) -> None:
        tokens = self.folder / f"{shard['name']}.bin"
        if sha256(tokens) != shard["sha256"]:
            raise self._damaged(f"{tokens.name} is not as it was written")

    def _check_tokens(self) -> None:
        size = len(self.tokenizer.vocab)
        for shard in self._shards():
            largest = int(np.memmap(self.folder / f"{shard['name']}.bin", DTYPE, "r").max())
            if largest >= size:
                raise self._damaged(f"{shard['name']}.bin holds token {largest}, but the vocabulary has {size} tokens")

    def _damaged(self, what: str) -> UserError:
        return UserError(f"corpus {self.folder}: {what}; build it again with `smart corpus build`")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished corpus. Raises ``UserError`` if there is none, or it has another format."""
    path = folder / MANIFEST
    build = "build one with `smart corpus build --midi DIR --out DIR`"
    if not folder.is_dir():
        raise UserError(f"corpus {folder}: no such folder; {build}")
    if not path.is_file():
        raise UserError(f"corpus {folder}: no {MANIFEST}, so it is unfinished or not a corpus; {build}")
    try:
        manifest = parse_json(path.read_text(encoding="utf-8"))
        version = manifest["format"]
        shards = [shard for split in SPLITS for shard in manifest["splits"][split]["shards"]]
        well_formed = isinstance(manifest["tokenizer"]["sha256"], str) and all(
            isinstance(shard[key], kind)
            for shard in shards
            for key, kind in {
                "name": str,
                "pieces": int,
                "tokens": int,
                "sha256": str,
                "index_sha256": str,
            }.items()
        )
        for shard in shards if well_formed else ():
            if not NAME.fullmatch(shard["name"]):  # it could lead out of the folder
                raise ValueError(f"{shard['name']!r:.60} is not the name of a shard")
            if shard["pieces"] < 1 or shard["tokens"] < 1:
                raise ValueError(f"shard {shard['name']} is empty")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"corpus {folder}: {MANIFEST} cannot be read ({error!r}); {build}") from None
    if version != FORMAT or not well_formed:
        raise UserError(f"corpus {folder}: {MANIFEST} has format {version}, expected {FORMAT}; {build}")
    return dict(manifest)
