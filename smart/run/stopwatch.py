"""Where the time of an iteration went."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from smart.files import write_atomically


class Span(NamedTuple):
    """One piece of work: its stage, when it began and ended (``time.perf_counter``), and who did it."""

    stage: str
    start: float
    end: float
    lane: str


class Stopwatch:
    """Where the time of an iteration went.

    ``laps`` are the stages of the main thread, one after another, in seconds; ``spans`` all that was timed, also what
    went on within a lap or beside it in other threads. A span belongs to the iteration in which it ended.
    """

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self.spans: list[Span] = []
        self._last = time.perf_counter()

    def restart(self) -> None:
        """Begin the next iteration; what other threads have finished since the last lap belongs to it."""
        # in one step, since they may be adding spans; spans lie in the order of their ends
        del self.spans[: sum(span.end <= self._last for span in self.spans)]
        self.laps = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """End ``stage`` now."""
        now = time.perf_counter()
        self.laps[f"seconds/{stage}"] = now - self._last
        self.span(stage, self._last, now, "main")
        self._last = now

    def span(self, stage: str, start: float, end: float, lane: str) -> None:
        """Note a piece of work; any thread may."""
        self.spans.append(Span(stage, start, end, lane))

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """A span of the main thread within a lap."""
        start = time.perf_counter()
        yield
        self.span(stage, start, time.perf_counter(), "within")

    def metrics(self) -> dict[str, float]:
        """Seconds of each lap, their sum ``seconds/iteration``, and the seconds of the other stages, added up."""
        beside: dict[str, float] = {}
        for stage, start, end, lane in list(self.spans):
            if lane != "main" and end <= self._last:
                beside[f"seconds/{stage}"] = beside.get(f"seconds/{stage}", 0.0) + end - start
        return self.laps | {"seconds/iteration": sum(self.laps.values())} | beside

    def write(self, path: Path) -> Path:
        """All spans as a trace for Chrome's and Perfetto's viewers, a track for each lane; returns the path."""
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
