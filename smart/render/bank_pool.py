"""Rendering with stored notes on a device, and worker processes for clips that the bank cannot mix (``BankPool``)."""

import os
import queue
import threading
import weakref
from collections import Counter
from collections.abc import Collection, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import torch

from smart import Failure
from smart.render.bank import NoteBank
from smart.render.envelopes import Unfit
from smart.render.notes import Notes, to_notes
from smart.render.pool import RenderPool
from smart.render.soundfonts import check_unchanged
from smart.render.synth import Audio, RenderError


def cache_folder() -> Path:
    """Where stored notes are kept between runs: $XDG_CACHE_HOME/smart/bank, by default ~/.cache/smart/bank."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "smart" / "bank"


class BankPool:
    """A ``Renderer`` that mixes clips from a ``NoteBank``; use it as a context manager.

    A thread renders the submitted clips, up to ``batch`` at once. A clip that the bank does not support goes to a
    ``RenderPool`` of ``workers`` processes, which starts with the first such clip. ``clips`` counts all clips,
    ``fallbacks`` those that went to the pool, and ``reasons`` why they did.

    Raises ``UserError`` if the soundfont is missing, damaged or not a soundfont.
    """

    def __init__(
        self,
        soundfont: str | os.PathLike[str],
        *,
        sample_rate: int = 44100,
        seconds: float = 10.0,
        workers: int | None = None,
        deadline: float = 30.0,
        device: str | torch.device = "cpu",
        max_bytes: int = 2 << 30,
        cache: str | os.PathLike[str] | None = None,
        batch: int = 64,
    ) -> None:
        self.bank = NoteBank(
            soundfont, sample_rate=sample_rate, seconds=seconds, device=device, max_bytes=max_bytes, cache=cache
        )
        self.batch = batch
        self.clips = self.fallbacks = 0
        self.reasons: Counter[str] = Counter()
        # the clips that went to the pool, and the kind of the reason
        self._left: weakref.WeakKeyDictionary[Future[Audio], str] = weakref.WeakKeyDictionary()
        self._settings: dict[str, Any] = {
            "sample_rate": sample_rate, "seconds": seconds, "workers": workers, "deadline": deadline,
        }  # fmt: skip
        self._pool: RenderPool | None = None
        self._lock = threading.Lock()  # for _closed: nothing is put into _jobs after the None of close
        self._closed = False
        self._jobs: queue.SimpleQueue[tuple[Future[Audio], Notes] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="note-bank", daemon=True)
        self._thread.start()

    def __enter__(self) -> "BankPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, score: Any) -> Future[Audio]:
        """Like ``RenderPool.submit``."""
        notes = to_notes(score)
        future: Future[Audio] = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError("this BankPool is closed")
            self._jobs.put((future, notes))
        return future

    def fallback_fraction(self, clips: Collection[Future[Audio]]) -> float:
        """Share of these finished clips that the worker pool rendered; 0 for no clips."""
        return sum(clip in self._left for clip in clips) / max(len(clips), 1)

    def fallback_kinds(self, clips: Collection[Future[Audio]]) -> dict[str, float]:
        """The same share by the kind of the reason (``Unfit.kind``), of those that occurred."""
        kinds = Counter(self._left[clip] for clip in clips if clip in self._left)
        return {kind: many / len(clips) for kind, many in sorted(kinds.items())}

    def close(self) -> None:
        """Cancel the clips that wait, and close the pool if it was started. May be repeated."""
        with self._lock:
            first, self._closed = not self._closed, True
            if first:
                self._jobs.put(None)
        if self._thread is not threading.current_thread():
            self._thread.join()
        if self._pool is not None:
            self._pool.close()

    def _work(self) -> None:
        """The life of the thread: the clips that wait are one batch."""
        ended = False
        while not ended:
            jobs = [self._jobs.get()]
            while len(jobs) < self.batch and not self._jobs.empty():
                jobs.append(self._jobs.get())
            ended = None in jobs
            due = [job for job in jobs if job is not None]
            if self._closed:
                for future, _ in due:
                    future.cancel()
            due = [job for job in due if job[0].set_running_or_notify_cancel()]
            if due:
                self._answer(due)
            del jobs, due  # or their clips would be kept until the next ones come

    def _answer(self, jobs: list[tuple[Future[Audio], Notes]]) -> None:
        try:
            try:
                answers: Sequence[Audio | Unfit] = self.bank.render_on_host([notes for _, notes in jobs])
            except (RenderError, torch.OutOfMemoryError) as error:
                answers = [Unfit("failure", f"the note bank failed: {error}")] * len(jobs)
            for (future, notes), answer in zip(jobs, answers, strict=True):
                self.clips += 1
                if isinstance(answer, Unfit):
                    self.fallbacks += 1
                    self.reasons[answer] += 1
                    self._left[future] = answer.kind
                    self._pool = self._pool or self._start_pool()
                    self._pool.submit(notes).add_done_callback(partial(_pass_on, future))
                else:
                    future.set_result(answer)
        except Exception as error:  # whatever it is, the callers are told
            for future, _ in jobs:
                if not future.done():
                    # without its traceback, which holds this frame and so the audio of all of them: a cycle
                    future.set_exception(error.with_traceback(None))

    def _start_pool(self) -> RenderPool:
        pool = RenderPool(self.bank.soundfont, **self._settings)
        try:
            check_unchanged(self.bank.soundfont, self.bank.soundfont_state)
        except Failure:
            pool.close()
            raise
        return pool


def _pass_on(future: "Future[Audio]", done: "Future[Audio]") -> None:
    """Give ``future`` the outcome of the same clip in the pool."""
    if done.cancelled():
        future.set_exception(RenderError("the pool was closed before this clip was rendered"))
    elif (error := done.exception()) is not None:
        future.set_exception(error)
    else:
        future.set_result(done.result())
