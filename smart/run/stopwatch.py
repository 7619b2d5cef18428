"""Measure where the time of an iteration goes."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from smart.files import write_atomically


class Span(NamedTuple):
    """One piece of work."""

    stage: str
    start: float  # seconds, ``time.perf_counter``
    end: float
    lane: str  # "main", "within" a stage of the main thread, or the name of the thread that did it


class Stopwatch:
    """Times the stages of an iteration.

    ``laps`` are the consecutive stages of the main thread, in seconds. ``spans`` are all timed pieces of work: laps,
    parts of laps, and the work of other threads. A span belongs to the iteration in which it ended.
    """

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self.spans: list[Span] = []
        self._last = time.perf_counter()

    def restart(self) -> None:
        """Begin the next iteration where the last lap ended; it includes what other threads have finished since."""
        # a single statement, since other threads may be adding spans; spans are ordered by their end
        del self.spans[: sum(span.end <= self._last for span in self.spans)]
        self.laps = {}

    def lap(self, stage: str) -> None:
        """End a stage of the main thread, which began at the last lap."""
        now = time.perf_counter()
        self.laps[f"seconds/{stage}"] = now - self._last
        self.span(stage, self._last, now, "main")
        self._last = now

    def span(self, stage: str, start: float, end: float, lane: str) -> None:
        """Add a piece of work; any thread may call this."""
        self.spans.append(Span(stage, start, end, lane))

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Time the block as a span of the main thread within a lap."""
        start = time.perf_counter()
        yield
        self.span(stage, start, time.perf_counter(), "within")

    def metrics(self) -> dict[str, float]:
        """Seconds per lap, their sum ``seconds/iteration``, and the total seconds of each other stage."""
        others: dict[str, float] = {}
        for stage, start, end, lane in list(self.spans):
            if lane != "main" and end <= self._last:
                others[f"seconds/{stage}"] = others.get(f"seconds/{stage}", 0.0) + end - start
        return self.laps | {"seconds/iteration": sum(self.laps.values())} | others

    def write(self, path: Path) -> Path:
        """Write all spans as a trace for Chrome's or Perfetto's viewer, one track per lane; returns the path."""
        spans = sorted(self.spans, key=lambda span: span.start)
        lanes = sorted({span.lane for span in spans}, key=lambda lane: (lane != "main", lane != "within", lane))
        zero = spans[0].start if spans else 0.0
        events: list[dict[str, Any]] = [
            {"ph": "M", "name": "thread_name", "pid": 1, "tid": lanes.index(lane), "args": {"name": lane}}
            for lane in lanes
        ]
        events += [
            {"ph": "X", "name": stage, "pid": 1, "tid": lanes.index(lane), "ts": 1e6 * (start - zero),
             "dur": 1e6 * (end - start)}
            for stage, start, end, lane in spans
        ]  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps({"traceEvents": events}).encode())
        return path
