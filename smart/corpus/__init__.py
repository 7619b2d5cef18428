"""Folders of MIDI files -> shards of tokens: the public names of this package, which import neither MidiTok nor torch.

``Corpus`` reads what ``smart corpus build`` wrote. The others build it: ``build`` walks the folders and keeps its
``state``, ``readers`` gives each file to a worker process (``ReaderPool``), ``midi`` and ``piece`` check and convert it
there, ``remi`` tokenises it, and ``shards`` stores the tokens. Every program reads MIDI files with ``score``, finds
their bars with ``bars``, and changes them with ``events``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smart.corpus import events
    from smart.corpus.bars import Bars, fit_bars, signatures_of
    from smart.corpus.midi import BARS, Limits, Piece, Reading, Reject, read_bytes
    from smart.corpus.readers import ReaderPool
    from smart.corpus.score import check_length, open_score, played, read_score
    from smart.corpus.shards import MANIFEST, SPLITS, Corpus, ShardWriter, Split
else:

    def __getattr__(name: str) -> Any:
        """The public names; they need numpy, and ``python -m smart.corpus`` names it in one line if it is missing."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        if name == "events":
            return import_module("smart.corpus.events")
        modules = (import_module(f"smart.corpus.{part}") for part in ("bars", "midi", "readers", "score", "shards"))
        return next(vars(module)[name] for module in modules if name in vars(module))


__all__ = [
    "BARS",
    "MANIFEST",
    "SPLITS",
    "Bars",
    "Corpus",
    "Limits",
    "Piece",
    "ReaderPool",
    "Reading",
    "Reject",
    "ShardWriter",
    "Split",
    "check_length",
    "events",
    "fit_bars",
    "open_score",
    "played",
    "read_bytes",
    "read_score",
    "signatures_of",
]
