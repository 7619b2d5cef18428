"""Folders of MIDI files -> shards of tokens: the public names of this package.

``Corpus`` reads what ``smart corpus build`` wrote. The other modules build it: ``build`` walks the
folders, ``readers`` gives each file to a worker process, ``piece`` is one file there, ``remi`` tokenises
it, ``shards`` keeps it.
"""

from smart.corpus.shards import MANIFEST, SPLITS, Corpus, ShardWriter, Split, read_manifest

__all__ = ["MANIFEST", "SPLITS", "Corpus", "ShardWriter", "Split", "read_manifest"]
