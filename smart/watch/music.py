"""Completions as music: notes immediately, audio on request, rendered as their run renders."""

import io
import threading
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from smart import UserError
from smart.listen import in_words, rows_of
from smart.render import SILENT, RenderPool, draw_fonts, find_soundfont, load_soundfile, score_notes
from smart.watch.runs import Missing, Runs

TOKENIZER = "tokenizer.json"
KEPT = 16  # rendered clips in memory, 1.8 MB each at 44.1 kHz and ten seconds


class Music:
    """Decodes and renders completions of ``runs``; one worker process renders, and is started when it is needed."""

    def __init__(self, runs: Runs) -> None:
        self.runs = runs
        self._lock = threading.Lock()
        self._tokenizers: dict[bytes, Any] = {}
        self._pool: RenderPool | None = None
        self._settings: tuple[Any, ...] = ()
        self._rendered: OrderedDict[Any, bytes] = OrderedDict()

    def close(self) -> None:
        """End the worker."""
        with self._lock:
            if self._pool is not None:
                self._pool.close()
            self._pool, self._settings = None, ()

    def table(self, name: str, step: int) -> list[dict[str, Any]]:
        """One iteration's completions without their notes: ratings, length in tokens, and the prompt in words."""
        tokenizer = self._tokenizer(name)
        words = {number: token for token, number in tokenizer.vocab.items()}
        table = []
        for number, row in enumerate(self.runs.completions(name, step)):
            tokens, start = row.pop("tokens"), row.pop("prompt_length")
            row.pop("step")
            names = [words.get(token, "?") for token in tokens[:start]]
            numbers = {key: value for key, value in row.items() if isinstance(value, int | float) and value == value}
            table.append(
                {"row": number, "prompt": in_words(names), "tokens": " ".join(names), "length": len(tokens) - start}
                | {"ratings": numbers}
            )
        return table

    def clip(self, name: str, step: int, row: int) -> dict[str, Any]:
        """A completion as the page draws it, rendered if it was not already."""
        notes = score_notes(self.score(name, step, row))
        audio = self.wav(name, step, row)
        levels, rate = load_soundfile().read(io.BytesIO(audio), dtype="float32", always_2d=True)
        silent = not levels.size or float(np.abs(levels).max()) < SILENT
        return {"notes": rows_of(notes), "audio": True, "seconds": len(levels) / rate, "silent": silent}

    def score(self, name: str, step: int, row: int) -> Any:
        """A completion as a ``symusic.Score``."""
        from smart.tokens import decode

        return decode(self._tokenizer(name), self._row(name, step, row)["tokens"])

    def _row(self, name: str, step: int, row: int) -> dict[str, Any]:
        rows = self.runs.completions(name, step)
        if not 0 <= row < len(rows):
            raise Missing("There is no such completion.")
        return rows[row]

    def wav(self, name: str, step: int, row: int) -> bytes:
        """A completion as a WAV file of 16 bits, rendered with its run's settings.

        Of several soundfonts it is the one that was drawn for its group, or the first if their ratings were averaged.
        """
        score = self.score(name, step, row)
        settings = _settings(self.runs.config(name), step, self._row(name, step, row)["group"])
        key = settings, score.dumps_midi()
        with self._lock:  # one at a time: a run may need the cores
            if key not in self._rendered:
                audio = self._open(settings).submit(score).result()
                file = io.BytesIO()
                load_soundfile().write(file, audio.T, settings[1], subtype="PCM_16", format="WAV")
                self._rendered[key] = file.getvalue()
                while len(self._rendered) > KEPT:
                    self._rendered.popitem(last=False)
            self._rendered.move_to_end(key)
            return self._rendered[key]

    def _open(self, settings: tuple[str, int, float]) -> RenderPool:
        if self._pool is None or settings != self._settings:
            if self._pool is not None:
                self._pool.close()
            soundfont, sample_rate, seconds = settings
            self._pool = RenderPool(find_soundfont(soundfont), sample_rate=sample_rate, seconds=seconds, workers=1)
            self._settings = settings
        return self._pool

    def _tokenizer(self, name: str) -> Any:
        """A run's tokenizer, from whichever of its models is there."""
        run = self.runs.find(name)
        checkpoints = sorted((run / "checkpoints").glob("[0-9]*"), reverse=True)
        for folder in (run / "tuned", run / "base", *checkpoints):
            with suppress(OSError, UserError):  # a checkpoint may be deleted meanwhile
                return self._read(folder / TOKENIZER)
        raise Missing("This run has no checkpoint yet, whose tokenizer is needed to read the completions.")

    def _read(self, path: Path) -> Any:
        from smart.tokens import load_tokenizer

        saved = path.read_bytes()
        if saved not in self._tokenizers:
            self._tokenizers[saved] = load_tokenizer(path)
        return self._tokenizers[saved]


def _settings(config: Mapping[str, Any], step: int, group: int) -> tuple[str, int, float]:
    """Soundfont, sample rate and seconds for a completion. Raises ``Missing`` if the configuration is not readable."""
    try:
        render = config["render"]
        rate, seconds, several = int(render["sample_rate"]), float(render["seconds"]), render.get("soundfonts", [])
        fonts = [str(font) for font in several] or [str(render["soundfont"])]
        font = 0
        if len(fonts) > 1 and render["soundfont_use"] == "draw":
            groups, seed = int(config["grpo"]["prompts"]), int(config["run"]["seed"])
            font = draw_fonts(len(fonts), groups, seed=seed, number=step)[group]
    except (LookupError, TypeError, ValueError, AttributeError):
        raise Missing("The configuration of this run does not say how to render.") from None
    return fonts[font], rate, seconds
