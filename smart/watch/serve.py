"""Serve the page of ``smart watch`` on this machine."""

import contextlib
from pathlib import Path

from smart import web
from smart.watch.app import make_app
from smart.watch.music import Music
from smart.watch.runs import Runs


def serve(folder: Path, port: int) -> None:
    """Serve until a signal comes. Raises ``UserError`` if the folder cannot be read or the port cannot be used."""
    with contextlib.ExitStack() as opened:
        runs = Runs(folder)
        listening = opened.enter_context(web.listen("127.0.0.1", port, named="--port {port}"))
        music = Music(runs)
        opened.callback(music.close)
        web.serve(make_app(runs, music), listening, lambda address: [f"watch: {address}/ (Ctrl-C ends it)"])
