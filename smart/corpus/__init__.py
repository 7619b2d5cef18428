"""Folders of MIDI files -> shards of tokens: the public names of this package, which import neither MidiTok nor torch.

``Corpus`` reads what ``smart corpus build`` wrote. The other modules build it: ``build`` walks the folders, ``readers``
gives each file to a worker process (``ReaderPool``), ``midi`` and ``piece`` check and convert it there, ``remi``
tokenises it, and ``shards`` stores the tokens. ``sustain`` lengthens the notes of a score by its pedal.
"""

from smart.corpus.midi import BARS, Limits, Piece, Reading, Reject, check_structure
from smart.corpus.pedal import sustain
from smart.corpus.readers import ReaderPool
from smart.corpus.shards import MANIFEST, SPLITS, Corpus, ShardWriter, Split

__all__ = [
    "BARS",
    "MANIFEST",
    "SPLITS",
    "Corpus",
    "Limits",
    "Piece",
    "ReaderPool",
    "Reading",
    "Reject",
    "ShardWriter",
    "Split",
    "check_structure",
    "sustain",
]
