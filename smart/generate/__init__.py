"""Generate music with a base or a tuned run, as MIDI and WAV: ``python -m smart.generate --model runs/quickstart``.

``command`` is its command line, ``pieces`` writes a folder of pieces, ``writer`` their tokens; ``song`` reads a MIDI
file to continue it, and ``fill`` writes some of its bars anew. ``table`` keeps what is finished.
"""
