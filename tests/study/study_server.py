"""A study of short excerpts, a real server process and a participant without a browser, shared by two test files."""

import asyncio
import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import soundfile

SECONDS = 0.2
RATE = 16000
POSTGRES = os.environ.get("SMART_TEST_POSTGRES", "")


def needed(what: str, found: object) -> None:
    """Skip the test if ``what`` is missing; in continuous integration fail instead."""
    if not found:
        assert os.environ.get("CI") != "true", f"{what} is required in continuous integration"
        pytest.skip(f"no {what}")


def make_wavs(folder: Path, systems: tuple[str, ...], count: int, seconds: float = SECONDS) -> list[str]:
    """Write folders of WAV files, each a chord with a different loudness; returns the values for --runs."""
    time = np.arange(round(seconds * RATE)) / RATE
    for number, system in enumerate(systems):
        (folder / system).mkdir(parents=True)
        for clip in range(count):
            draw = np.random.default_rng([number, clip])
            chord = sum(np.sin(2 * np.pi * pitch * time) for pitch in draw.uniform(200, 900, 3))
            soundfile.write(folder / system / f"{clip:02d}.wav", 0.3 * draw.uniform(0.1, 1) * chord, RATE)
    return [str(folder / system) for system in systems]


def build(out: Path, runs: list[str], *options: str) -> str:
    """Run ``smart study build`` in this process; returns its output."""
    from click.testing import CliRunner

    from smart.study.command import main

    words = ["build", "--runs", *runs, "--out", str(out), "--sample-rate", str(RATE), "--seconds", str(SECONDS)]
    words += ["--power", "0", *options]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    return done.output


class Server:
    """``smart study serve`` on a free port, which stays the same after a restart."""

    def __init__(self, folder: Path, *options: str, database: str = "") -> None:
        self.folder, self.options, self.port, self.token = folder, options, 0, ""
        self.database = ["--database", database] if database else []
        self.start()

    def start(self, *options: str) -> None:
        words = ["serve", str(self.folder), "--port", str(self.port), *self.database, *self.options, *options]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "smart.study", *words], stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("admin token"):
                self.token = line.split()[-1]
            if line.startswith("study:"):
                self.url = line.split()[-1].removesuffix("join").rstrip("/")
                self.port = int(self.url.rpartition(":")[2])
            if line.startswith("admin:"):
                return
        raise AssertionError("the server did not start")

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        code = self.process.wait(timeout=20)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code

    def invite(self, count: int) -> list[str]:
        from smart.study.folder import Study
        from smart.study.store import Store

        store = Store(Study(self.folder), *self.database[1:])
        try:
            return [f"{self.url}/s/{token}" for token in store.invite(count)]
        finally:
            store.close()

    def export(self) -> list[dict[str, str]]:
        import csv
        import io

        answer = httpx.get(f"{self.url}/export", headers={"authorization": f"Bearer {self.token}"})
        assert answer.status_code == 200, answer.text
        return list(csv.DictReader(io.StringIO(answer.text, newline="")))


@contextmanager
def serving(study: Path, place: Path, *options: str, database: str = "") -> Iterator[Server]:
    """A server for a copy of ``study``."""
    server = Server(Path(shutil.copytree(study, place / "study")), *options, database=database)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.stop()


@contextmanager
def postgres() -> Iterator[str]:
    """The URL of an empty database, dropped afterwards."""
    needed("PostgreSQL (SMART_TEST_POSTGRES holds no URL)", POSTGRES)
    import psycopg

    name = f"smart_{secrets.token_hex(6)}"
    with psycopg.connect(POSTGRES, autocommit=True) as database:
        database.execute(f"CREATE DATABASE {name}".encode())
        try:
            yield f"{POSTGRES.rpartition('/')[0]}/{name}"
        finally:
            database.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


def consent(client: httpx.Client, link: str) -> None:
    """Consent and pass the headphone check, up to the first trial."""
    from re import search

    version = search(r'name="version" value="([^"]+)"', client.get(link).text)
    assert version
    assert client.post(f"{link}/consent", data={"agree": "yes", "version": version[1]}).status_code == 303
    assert client.post(f"{link}/check", data={"tone": "second"}).status_code == 303


def answer(position: int, rating: int, **changes: Any) -> dict[str, Any]:
    """An answer as study.js sends it."""
    return {
        "position": position, "rating": rating, "client_id": secrets.token_hex(16), "session": "0123456789abcdef" * 2,
        "play_count": 1, "listened_s": SECONDS, "response_ms": 5, **changes,
    }  # fmt: skip


async def ask(client: httpx.AsyncClient, method: str, url: str, **options: Any) -> httpx.Response:
    """Repeat a request until it is answered, as study.js does: if the server is down or busy, wait and try again."""
    for _ in range(600):
        try:
            response = await client.request(method, url, **options)
        except httpx.TransportError:
            await asyncio.sleep(0.1)
            continue
        if response.status_code in (429, 503) or "retry-after" in response.headers:
            await asyncio.sleep(0.1)
            continue
        return response
    raise AssertionError(f"{url} did not answer")


async def take_part(client: httpx.AsyncClient, link: str, rate: Any, acknowledged: dict[int, int]) -> None:
    """Take a whole study; ``rate(position)`` gives the ratings; acknowledged ones go into ``acknowledged``.

    Every third rating is sent twice, as if a reply had been lost.
    """
    from re import search

    page = (await ask(client, "GET", link)).text
    version = search(r'name="version" value="([^"]+)"', page)
    if version:
        await ask(client, "POST", f"{link}/consent", data={"agree": "yes", "version": version[1]})
        await ask(client, "POST", f"{link}/check", data={"tone": "second"})
    while found := search(r'data-position="(-?\d+)"', (await ask(client, "GET", link)).text):
        for position in range(int(found[1]), int(found[1]) + 5):  # the page is loaded only for every fifth trial
            if (await ask(client, "GET", f"{link}/audio/{position}")).status_code != 200:
                break  # after the last one
            await asyncio.sleep(SECONDS)
            sent = answer(position, rate(position))
            for _ in range(2 if position % 3 == 0 else 1):
                reply = await ask(client, "POST", f"{link}/ratings", json=sent)
                assert reply.status_code == 200, reply.text
                acknowledged[position] = reply.json()["rating"]
