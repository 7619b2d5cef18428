"""Renderers of several soundfonts behind one, and which soundfont each group of completions is heard through."""

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import numpy as np

from smart.render.pool import Renderer
from smart.render.synth import Audio


class SeveralRenderers:
    """A ``Renderer`` with several soundfonts; the first is used where none is named. Use it as a context manager."""

    def __init__(self, openers: Sequence[Callable[[], AbstractContextManager[Renderer]]]) -> None:
        self.renderers: list[Renderer] = []
        self._openers = openers
        self._opened = ExitStack()

    def __enter__(self) -> "SeveralRenderers":
        with ExitStack() as opened:
            self.renderers = [opened.enter_context(open_one()) for open_one in self._openers]
            self._opened = opened.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._opened.__exit__(*error)

    def submit(self, score: Any, font: int = 0) -> Future[Audio]:
        """Start rendering a score with the soundfont of this index."""
        return self.renderers[font].submit(score)

    def fallback_fraction(self, clips: Collection[Future[Audio]]) -> float | None:
        """Share of these finished clips that a fallback rendered; None without a fallback."""
        shares = [renderer.fallback_fraction(clips) for renderer in self.renderers]
        known = [share for share in shares if share is not None]
        return sum(known) if known else None

    def fallback_kinds(self, clips: Collection[Future[Audio]]) -> dict[str, float]:
        """The same share by the kind of its reason."""
        found: dict[str, float] = {}
        for renderer in self.renderers:
            for kind, share in renderer.fallback_kinds(clips).items():
                found[kind] = found.get(kind, 0.0) + share
        return found


def draw_fonts(fonts: int, groups: int, *, seed: int, number: int) -> list[int]:
    """The index of a soundfont for each group of batch ``number``; it depends on nothing else, so that runs resume."""
    return np.random.default_rng((seed, number)).integers(fonts, size=groups).tolist()
