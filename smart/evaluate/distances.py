"""How far the pieces of a system are from real ones: by the distribution of each MIDI feature of the paper."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import ks_2samp

from smart.corpus import Corpus
from smart.evaluate.pieces import Sample
from smart.features import FEATURES, is_empty, midi_features
from smart.intervals import Floats
from smart.run import progress
from smart.tokens import decode

MOST = 500  # real pieces
PROMPT = 4  # tokens of a prompt: a real opening has as many more than a completion


def openings(corpus: Corpus, tokens: int) -> list[Any]:
    """The first ``tokens`` tokens of up to ``MOST`` pieces of a corpus, evenly spaced over all its splits."""
    splits = [corpus.split(name) for name in ("train", "validation", "test")]
    places = [(split, row) for split in splits for row in range(len(split))]
    kept = [places[number * len(places) // MOST] for number in range(MOST)] if len(places) > MOST else places
    return [
        decode(corpus.tokenizer, split[row][:tokens])
        for split, row in progress(kept, total=len(kept), unit="piece", desc="real pieces")
    ]


def distances(sample: Sample, corpus: Corpus) -> dict[str, dict[str, float]]:
    """The Kolmogorov-Smirnov distance, 0 to 1, of each feature of each system from that of real pieces; and the mean.

    Pitches and velocities are those of all notes; the other features have one value per piece. Pieces without notes
    are left out. The real pieces are the openings of those in ``corpus``, as long as a completion with its prompt.
    """
    length = int(sample.settings["max_new_tokens"]) + PROMPT
    real = _pooled([midi_features(score) for score in openings(corpus, length) if not is_empty(score)])
    found = {}
    for system in sample.systems:
        columns = sample.columns[system]
        rows = [row for row, empty in enumerate(columns["empty"]) if not empty]
        own = _pooled([{name: columns[name][row] for name in FEATURES} for row in rows])
        far = {name: float(ks_2samp(own[name], real[name], method="asymp").statistic) for name in own if name in real}
        found[system] = far | ({"mean": float(np.mean(list(far.values())))} if far else {})
    return found


def _pooled(pieces: Sequence[dict[str, Any]]) -> dict[str, Floats]:
    """Feature -> all its values over the pieces; empty without pieces."""
    if not pieces:
        return {}
    return {
        name: np.concatenate([np.ravel(np.asarray(each[name], np.float64)) for each in pieces]) for name in FEATURES
    }
