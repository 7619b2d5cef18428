"""The page of ``smart watch`` and its data, as an ASGI application that only reads.

``watch.js`` asks for ``/runs`` every two seconds, and then for what has changed. Requests that come from another site,
or by another name than this machine's own, are refused, so that no web page can read the runs through the browser.
"""

from collections.abc import Awaitable, Callable, MutableMapping
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from smart import Failure, UserError, brief
from smart.listen import asset
from smart.render import RenderError
from smart.watch.music import Music
from smart.watch.runs import Missing, Runs
from smart.web import HEADERS

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

PAGE = "x-watch"  # header of the page's own requests, and of the answer that gives the reason for sending nothing
HERE = ("127.0.0.1", "localhost")  # names of this machine, by which a browser may ask
RAW_HEADERS = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
TYPES = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
SOUNDS = {".mid": "audio/midi", ".wav": "audio/wav"}


class Guard:
    """Wraps the application: adds headers, and refuses what does not come from this machine's own pages."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return

        async def send_with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *RAW_HEADERS]}
            await send(message)

        given = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        host = given.get("host", "").rpartition(":")[0] or given.get("host", "")
        foreign = given.get("sec-fetch-site") in ("cross-site", "same-site") and scope["path"] != "/"
        if host not in HERE or foreign:
            answer = Response("This page answers only http://127.0.0.1 and http://localhost.", 403)
            await answer(scope, receive, send_with_headers)
            return
        await self.app(scope, receive, send_with_headers)


class Pages:
    """The endpoints. They are plain functions, which Starlette runs in threads."""

    def __init__(self, runs: Runs, music: Music) -> None:
        self.runs, self.music = runs, music
        pages = files("smart.watch") / "pages"
        own = {name: (pages / name).read_text(encoding="utf-8") for name in ("watch.css", "watch.js", "icon.svg")}
        self.assets = {"player.css": asset("player.css"), "player.js": asset("player.js"), **own}
        self.page = (pages / "watch.html").read_text(encoding="utf-8")

    def index(self, request: Request) -> Response:
        return Response(self.page, media_type="text/html")

    def asset(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in self.assets:
            raise HTTPException(404, "There is no such page.")
        return Response(self.assets[name], media_type=TYPES[name.rpartition(".")[2]])

    def overview(self, request: Request) -> Response:
        return JSONResponse({"folder": self.runs.title, "runs": self.runs.overview()})

    def config(self, request: Request) -> Response:
        name = request.path_params["run"]
        self.runs.find(name)
        return JSONResponse(self.runs.config(name))

    def metrics(self, request: Request) -> Response:
        asked = request.query_params
        seen = asked.get("seen", "0")
        first = int(seen) if seen.isascii() and seen.isdecimal() and len(seen) < 10 else 0
        return JSONResponse(self.runs.metrics(request.path_params["run"], asked.get("version", ""), first))

    def sets(self, request: Request) -> Response:
        return JSONResponse([each.name for each in self.runs.sets(request.path_params["run"])])

    def pieces(self, request: Request) -> Response:
        return JSONResponse(self.runs.pieces(request.path_params["run"], request.path_params["set"]))

    def piece(self, request: Request) -> Response:
        path = self.runs.file(*(request.path_params[name] for name in ("run", "folder", "file")))
        return Response(path.read_bytes(), media_type=SOUNDS[path.suffix])

    def completion_steps(self, request: Request) -> Response:
        return JSONResponse(self.runs.completion_steps(request.path_params["run"]))

    def completions(self, request: Request) -> Response:
        return JSONResponse(self.music.table(request.path_params["run"], request.path_params["step"]))

    def completion(self, request: Request) -> Response:
        """A completion: its notes as JSON, or as a file."""
        which = (request.path_params["run"], request.path_params["step"], request.path_params["row"])
        kind = request.path_params["kind"]
        if kind == "json":
            return JSONResponse(self.music.clip(*which))
        if kind == "wav":
            return Response(self.music.wav(*which), media_type=SOUNDS[".wav"])
        if kind == "mid":
            return Response(self.music.score(*which).dumps_midi(), media_type=SOUNDS[".mid"])
        raise HTTPException(404, "There is no such page.")


def failed(request: Request, error: Exception) -> Response:
    """What is not there, or no longer, and what could not be read or rendered: one line that the page shows."""
    if isinstance(error, HTTPException):
        return Response(error.detail, error.status_code)
    if isinstance(error, Missing | FileNotFoundError | NotADirectoryError):
        text = str(error) if isinstance(error, Missing) else "This is no longer there."
        if PAGE in request.headers:  # browsers log an answer of 404 as an error, but a run may be deleted at any time
            return Response(status_code=204, headers={PAGE: text})
        return Response(text, 404)
    text = error.message if isinstance(error, UserError | Failure) else brief(error)
    return Response(text, 503)


def make_app(runs: Runs, music: Music) -> Starlette:
    """The application."""
    pages = Pages(runs, music)
    routes = [
        Route("/", pages.index),
        Route("/static/{name}", pages.asset),
        Route("/runs", pages.overview),
        Route("/runs/{run}/config", pages.config),
        Route("/runs/{run}/metrics", pages.metrics),
        Route("/runs/{run}/sets", pages.sets),
        Route("/runs/{run}/sets/{set:path}", pages.pieces),
        Route("/runs/{run}/pieces/{folder:path}/{file}", pages.piece),
        Route("/runs/{run}/completions", pages.completion_steps),
        Route("/runs/{run}/completions/{step:int}", pages.completions),
        Route("/runs/{run}/completions/{step:int}/{row:int}.{kind}", pages.completion),
    ]
    kinds = (HTTPException, Missing, UserError, Failure, RenderError, OSError, ValueError, TypeError, LookupError)
    handlers: Any = dict.fromkeys(kinds, failed)
    return Starlette(routes=routes, exception_handlers=handlers, middleware=[Middleware(Guard)])
