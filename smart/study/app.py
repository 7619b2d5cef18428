"""The pages of a study, as an ASGI application.

A participant's link, ``/s/TOKEN``, is their whole session: in any browser it shows the step that they have reached, and
everything below it belongs to them alone. Audio is requested by position; excerpts differ only in their sound, never in
a page, name or header. Pages are rendered here; ``study.js`` plays the audio, sends answers until they are
acknowledged, and fetches the next page. Nothing is loaded from other sites, and no cookie is set.
"""

import asyncio
import re
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import jinja2
import sqlalchemy as sa
from sqlalchemy.engine import RowMapping
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from smart import UserError
from smart.files import parse_json
from smart.study.export import ratings_csv
from smart.study.folder import CHECK
from smart.study.store import Answer, Refused, Store
from smart.study.tell import tell
from smart.web import HEADERS  # no referrer: an address holds the participant's token

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

LONGEST_BODY = 16 * 1024  # bytes
BODY_SECONDS = 10.0  # until a request's body must have arrived
BLOCK = 64 * 1024  # bytes of a sound that are read and sent at a time
BLOCK_SECONDS = 30.0  # until the client must have taken a block
MOST_SOUNDS = 4  # sent to one link at the same time
ASSETS = {"study.css": "text/css", "study.js": "text/javascript", "icon.svg": "image/svg+xml"}
RAW_HEADERS = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
NAME = re.compile(r"[0-9a-f]{32}")  # made by the browser: ``client_id`` and ``session`` of an answer
NUMBER = re.compile(r"\d{1,9}", re.ASCII)  # Python refuses to convert thousands of digits
PREFIX = re.compile(r"(?:/[\w.~-]+)*", re.ASCII)
BYTES = re.compile(r"bytes=(\d{0,18})-(\d{0,18})", re.ASCII)


class Buckets:
    """A rate limit for each key: ``burst`` events at once, then ``rate`` events per second."""

    def __init__(self, rate: float, burst: float) -> None:
        self.rate, self.burst = rate, burst
        self._levels: dict[str, tuple[float, float]] = {}
        self._lock = threading.Lock()

    def wait(self, key: str) -> float:
        """Seconds until the next event is allowed; 0 if one is allowed now, which is then counted."""
        with self._lock:
            instant = time.monotonic()
            if len(self._levels) > 10_000:  # forget keys that have been quiet long enough to be full again
                full = self.burst / self.rate
                self._levels = {name: each for name, each in self._levels.items() if instant - each[1] < full}
            level, before = self._levels.get(key, (self.burst, instant))
            level = min(level + (instant - before) * self.rate, self.burst)
            if level < 1:
                self._levels[key] = (level, instant)
                return (1 - level) / self.rate
            self._levels[key] = (level - 1, instant)
            return 0.0


class Limits:
    """Rates for a study whose excerpts last ``seconds``. A participant makes three requests per excerpt.

    In that time a link may make twenty, an address a thousand (a whole classroom may share it). Guessed links, admin
    tokens and enrolments are counted separately, by address, so that guessing locks out no participant with a link.
    """

    def __init__(self, seconds: float) -> None:
        self.links = Buckets(20 / seconds, 60)
        self.addresses = Buckets(1000 / seconds, 2000)
        self.guesses = Buckets(1 / 6, 20)
        self.enrolments = Buckets(1, 100)


def too_many(wait: float) -> HTTPException:
    return HTTPException(429, "Too many requests. Please wait a moment.", {"retry-after": str(int(wait) + 1)})


class Guard:
    """Wraps the application: limits request rates and body sizes, adds headers, answers if disk or database fail."""

    def __init__(self, app: Any, limits: Limits) -> None:
        self.app, self.limits = app, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        begun = False

        async def send_with_headers(message: MutableMapping[str, Any]) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                given = {name for name, _ in message["headers"]}
                more = [(name, value) for name, value in RAW_HEADERS if name not in given]
                message = {**message, "headers": [*message["headers"], *more]}
            await send(message)

        wait = self.limits.addresses.wait(scope["client"][0] if scope.get("client") else "")
        response: Response | None = None
        body: bytes | None = b""
        if wait:
            error = too_many(wait)
            response = Response(error.detail, error.status_code, error.headers)
        else:
            try:
                body = await asyncio.wait_for(read_body(receive), BODY_SECONDS)
                if body is None:
                    response = Response(f"At most {LONGEST_BODY} bytes may be sent.", 413, {"connection": "close"})
            except TimeoutError:
                response = Response("The request did not arrive in time.", 408, {"connection": "close"})
        if response is not None:
            await response(scope, receive, send_with_headers)
            return
        scope["body"] = body  # so that endpoints need not wait for it
        try:
            await self.app(scope, receive, send_with_headers)
        except (sa.exc.SQLAlchemyError, sqlite3.Error, OSError) as failure:
            # disk full, database gone, excerpt unreadable: the browser keeps the answer and retries
            reason = [*str(getattr(failure, "orig", failure)).strip().splitlines(), type(failure).__name__][0]
            tell(f"the database or the disk failed: {reason}")
            if begun:
                raise
            answer = Response("The server cannot store or send anything at the moment.", 503, {"retry-after": "5"})
            await answer(scope, receive, send_with_headers)


async def read_body(receive: Receive) -> bytes | None:
    """The body of a request; None if it is too long or did not arrive completely."""
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > LONGEST_BODY or message["type"] != "http.request":
            return None
        if not message.get("more_body"):
            return body


class Pages:
    """The endpoints. They are plain functions, which Starlette runs in threads."""

    def __init__(self, store: Store, limits: Limits, *, open_enrolment: bool = False) -> None:
        self.store, self.limits, self.open = store, limits, open_enrolment
        self.study, self.design = store.study, store.study.design
        self.templates = jinja2.Environment(
            loader=jinja2.PackageLoader("smart.study", "pages"), autoescape=True, trim_blocks=True, lstrip_blocks=True,
            undefined=jinja2.StrictUndefined,
        )  # fmt: skip
        pages = files("smart.study") / "pages"
        self.sending: Counter[str] = Counter()  # sounds being sent, by link
        self.assets = {name: (pages / name).read_bytes() for name in ASSETS}
        self.check_sound = self.study.folder / CHECK
        if not self.check_sound.is_file():
            raise UserError(f"{self.check_sound} is missing; build the study again")

    def html(self, request: Request, name: str, status: int = 200, **values: Any) -> Response:
        text = self.templates.get_template(name).render(design=self.design, root=root_of(request), **values)
        return Response(text, status, media_type="text/html")

    def message(self, request: Request, title: str, text: str, status: int = 200, **values: Any) -> Response:
        return self.html(request, "message.html", status, title=title, text=text, **({"join": False} | values))

    def link(self, request: Request) -> str:
        """A participant's link, seen from the page that is asked for."""
        return f"{root_of(request)}s/{request.path_params['token']}"

    # --- Participants

    def person(self, request: Request) -> RowMapping:
        """The participant whose link this is; 404 if there is none."""
        person = self.store.find(request.path_params["token"])
        if person is None:
            self.count(self.limits.guesses, request)
            raise HTTPException(404, "This link is not valid, or no longer valid. Please check that it is complete.")
        wait = self.limits.links.wait(person["token_hash"])
        if wait:
            raise too_many(wait)
        return person

    def count(self, buckets: Buckets, request: Request) -> None:
        wait = buckets.wait(request.client.host if request.client else "")
        if wait:
            raise too_many(wait)

    def consented(self, person: RowMapping) -> bool:
        """Whether a participant agreed to the current consent text; a changed text is shown again."""
        return bool(person["version"] == self.study.consent[0])

    def step(self, request: Request) -> Response:
        """The page for the step that a participant has reached."""
        person = self.person(request)
        base = self.link(request)
        version, paragraphs = self.study.consent
        if not self.consented(person):
            return self.html(
                request, "consent.html", base=base, version=version, paragraphs=paragraphs, again=person["version"]
            )
        if person["headphones"] is None:
            return self.html(request, "check.html", base=base, wrong=False)
        position = self.store.next_position(person["id"])
        if position is None:
            return self.html(request, "thanks.html", base=base, code=person["code"])
        return self.html(request, "trial.html", base=base, position=position)

    def consent(self, request: Request) -> Response:
        person, form = self.person(request), read_form(request)
        version = self.study.consent[0]
        if form.get("agree") == "yes" and form.get("version") == version:
            self.store.consent(person["id"], version)
        return RedirectResponse(self.link(request), 303)

    def check(self, request: Request) -> Response:
        """The second tone is the one on the left; a first wrong answer may be corrected."""
        person, form = self.person(request), read_form(request)
        base = self.link(request)
        answer = form.get("tone")
        if answer not in ("first", "second", "third", "unsure") or not self.consented(person):
            return RedirectResponse(base, 303)
        if answer in ("first", "third") and form.get("again") != "yes":
            return self.html(request, "check.html", base=base, wrong=True)
        self.store.checked(person["id"], {"second": "passed", "unsure": "unsure"}.get(answer, "failed"))
        return RedirectResponse(base, 303)

    def sound(self, request: Request) -> Response:
        return send_wav(request, self.check_sound, self.sending, self.person(request)["token_hash"])

    def audio(self, request: Request) -> Response:
        """The excerpt at a position in this participant's order."""
        person, position = self.person(request), request.path_params["position"]
        excerpt = None
        if self.consented(person) and re.fullmatch(r"-?\d{1,6}", position, re.ASCII):
            excerpt = self.store.serve(person["id"], int(position))
        if excerpt is None:
            raise HTTPException(404, "There is nothing to hear here yet.")
        return send_wav(request, self.study.audio(excerpt), self.sending, person["token_hash"])

    def rate(self, request: Request) -> Response:
        """Store an answer; the reply names it, and contains the rating that counts for its position."""
        person = self.person(request)
        if not self.consented(person):
            raise HTTPException(409, "Consent is missing.")
        agent = "".join(letter for letter in request.headers.get("user-agent", "") if letter.isprintable())[:300]
        answer = read_answer(request)
        counted = self.store.rate(person["id"], answer, agent, person["version"])
        return JSONResponse({"rating": counted, "position": answer.position, "client_id": answer.client_id})

    def withdraw(self, request: Request) -> Response:
        person = self.person(request)
        if request.method == "POST":
            erased = self.store.withdraw(person["id"])
            return self.message(request, "Your data are deleted", DELETED if erased else ERASING)
        return self.html(request, "withdraw.html", base=self.link(request))

    # --- Public pages

    def index(self, request: Request) -> Response:
        text = "To take part, please open the link that you were given."
        return self.message(
            request, "Listening study", "Thank you for your interest." if self.open else text, join=self.open
        )

    def join(self, request: Request) -> Response:
        """Create a link, if the study is open; it takes a form, so that link previews do not create any."""
        if not self.open:
            raise HTTPException(404, "This study is open to invited participants only.")
        if request.method != "POST":
            return self.index(request)
        self.count(self.limits.enrolments, request)
        return RedirectResponse(f"{root_of(request)}s/{self.store.invite(1)[0]}", 303)

    def asset(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in self.assets:
            raise HTTPException(404, "There is no such page.")
        return Response(self.assets[name], media_type=ASSETS[name], headers={"cache-control": "no-cache"})

    # --- Administration

    def admin(self, request: Request) -> Response:
        """A form, and the result of its action; every request carries the admin token."""
        if request.method != "POST":
            return self.html(request, "admin.html", **NOTHING)
        form = read_form(request)
        self.authorise(request, form.get("token", ""))
        action = form.get("action")
        if action == "export":
            return self.csv()
        shown: dict[str, Any] = dict(NOTHING)
        number = re.sub(r"^p", "", form.get("number", "").strip())
        if action == "invite":
            if not NUMBER.fullmatch(number) or not 1 <= int(number) <= 1000:
                raise HTTPException(400, "Expected a number of links from 1 to 1000.")
            origin = f"{request.url.scheme}://{request.url.netloc}{prefix_of(request)}"
            shown["links"] = [f"{origin}/s/{token}" for token in self.store.invite(int(number))]
        elif action == "withdraw":
            if not NUMBER.fullmatch(number) or int(number) not in {each["id"] for each in self.store.overview()}:
                raise HTTPException(400, "There is no participant with this number.")
            self.store.withdraw(int(number))
        shown |= {"people": self.store.overview(), "withdrawn": self.store.withdrawals()}
        shown["erased"] = self.store.is_erased()
        return self.html(request, "admin.html", **shown)

    def export(self, request: Request) -> Response:
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        self.authorise(request, token if kind.lower() == "bearer" else "")
        return self.csv()

    def authorise(self, request: Request, token: str) -> None:
        if not self.store.is_admin(token.strip()):
            self.count(self.limits.guesses, request)
            raise HTTPException(401, "The admin token is missing or wrong.", {"www-authenticate": "Bearer"})

    def csv(self) -> Response:
        headers = {"content-disposition": 'attachment; filename="ratings.csv"'}
        return Response(ratings_csv(self.store), media_type="text/csv", headers=headers)

    # --- Errors

    def failed(self, request: Request, error: Exception) -> Response:
        if isinstance(error, Refused):
            error = HTTPException(409, str(error), {"retry-after": "1"} if error.later else None)
        assert isinstance(error, HTTPException)
        if request.url.path.endswith("/ratings"):
            # by the answer's own name the browser knows that this is the server's reply, and not somebody else's page
            refused = {"error": error.detail, "client_id": name_of_answer(request)}
            return JSONResponse(refused, error.status_code, error.headers)
        response = self.message(request, "This did not work", error.detail, error.status_code)
        response.headers.update(error.headers or {})
        return response


NOTHING: dict[str, Any] = {"people": None, "links": None, "withdrawn": 0, "erased": True}  # shown at first
DELETED = "Everything that was stored about you has been deleted."
ERASING = (
    "Your data have been deleted from the study. A technical copy in the log of its database is overwritten as soon as "
    "no other program reads the database."
)


def root_of(request: Request) -> str:
    """The way from the page that is asked for up to the start page: all links are relative, so that a web server in
    front can serve the study under any path."""
    return "../" * (request.url.path.count("/") - 1)


def prefix_of(request: Request) -> str:
    """The path under which a web server in front serves the study, as it states it; "" if it states none."""
    prefix = request.headers.get("x-forwarded-prefix", "").rstrip("/")
    return prefix if PREFIX.fullmatch(prefix) else ""


def name_of_answer(request: Request) -> str:
    """The ``client_id`` of the answer that was sent; "" if it has none."""
    try:
        name = parse_json(request.scope["body"])["client_id"]
    except (ValueError, KeyError, TypeError):
        return ""
    return name if isinstance(name, str) and NAME.fullmatch(name) else ""


def read_form(request: Request) -> dict[str, str]:
    text = request.scope["body"].decode("utf-8", "replace")
    try:
        return {name: values[0] for name, values in parse_qs(text, max_num_fields=20).items()}
    except ValueError:
        raise HTTPException(400, "Expected a form of at most 20 fields.") from None


def read_answer(request: Request) -> Answer:
    """The JSON that ``study.js`` sends, with every field checked; a 400 names the field that is wrong."""
    try:
        sent = parse_json(request.scope["body"])
        values = {name: sent[name] for name in Answer._fields}
    except (ValueError, KeyError, TypeError):
        raise HTTPException(400, "Expected a JSON object with " + ", ".join(Answer._fields)) from None
    bounds = {"position": (-1000, 10**6), "rating": (1, 10), "play_count": (0, 10**6), "response_ms": (0, 10**9)}
    for name, (least, most) in bounds.items():
        if type(values[name]) is not int or not least <= values[name] <= most:
            raise HTTPException(400, f"{name}: expected a whole number from {least} to {most}")
    if type(values["listened_s"]) not in (int, float) or not 0 <= values["listened_s"] <= 10**6:
        raise HTTPException(400, "listened_s: expected a number of seconds")
    for name in ("client_id", "session"):
        if not isinstance(values[name], str) or not NAME.fullmatch(values[name]):
            raise HTTPException(400, f"{name}: expected 32 hexadecimal digits")
    return Answer(**values)


class Part(Response):
    """``length`` bytes of a sound file from ``start``, read while they are sent, so that slow clients hold no memory.

    ``sending`` counts the sounds being sent, by ``key``; more than ``MOST_SOUNDS`` at once are refused.
    """

    def __init__(
        self, path: Path, start: int, length: int, status: int, headers: dict[str, str], sending: Counter[str], key: str
    ) -> None:
        super().__init__(None, status, headers | {"content-length": str(length)}, "audio/wav")
        self.path, self.start, self.length, self.sending, self.key = path, start, length, sending, key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.sending[self.key] >= MOST_SOUNDS:
            error = too_many(1)
            await Response(error.detail, error.status_code, error.headers)(scope, receive, send)
            return
        self.sending[self.key] += 1
        try:
            await self.stream(send)
        except TimeoutError:  # the client takes no more: the server closes the connection
            return
        finally:
            self.sending[self.key] -= 1
            if not self.sending[self.key]:
                del self.sending[self.key]

    async def stream(self, send: Send) -> None:
        left = self.length
        with await run_in_threadpool(self.path.open, "rb") as file:
            file.seek(self.start)
            block = await run_in_threadpool(file.read, min(left, BLOCK))  # before the headers: a failure is a 503
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            while True:
                left -= len(block)
                more = bool(block) and left > 0
                message = {"type": "http.response.body", "body": block, "more_body": more}
                await asyncio.wait_for(send(message), BLOCK_SECONDS)
                if not more:
                    return
                block = await run_in_threadpool(file.read, min(left, BLOCK))


def send_wav(request: Request, path: Path, sending: Counter[str], key: str) -> Response:
    """A sound, or the requested part of it (one byte range; a request for several gets the whole sound)."""
    headers = {"accept-ranges": "bytes"}
    size = path.stat().st_size
    asked = BYTES.fullmatch(request.headers.get("range", ""))
    if asked is None or asked.groups() == ("", ""):
        return Part(path, 0, size, 200, headers, sending, key)
    first, last = asked.groups()
    start = int(first) if first else max(size - int(last), 0)
    end = min(int(last), size - 1) if first and last else size - 1
    if start > end:
        return Response(status_code=416, headers=headers | {"content-range": f"bytes */{size}"})
    headers["content-range"] = f"bytes {start}-{end}/{size}"
    return Part(path, start, end + 1 - start, 206, headers, sending, key)


def make_app(store: Store, *, limits: Limits | None = None, open_enrolment: bool = False) -> Starlette:
    """The application; ``open_enrolment`` lets anyone create a link at ``/join``."""
    limits = limits or Limits(store.study.design.seconds)
    pages = Pages(store, limits, open_enrolment=open_enrolment)
    routes = [
        Route("/", pages.index),
        Route("/join", pages.join, methods=["GET", "POST"]),
        Route("/static/{name}", pages.asset),
        Route("/admin", pages.admin, methods=["GET", "POST"]),
        Route("/export", pages.export),
        Route("/s/{token}", pages.step),
        Route("/s/{token}/consent", pages.consent, methods=["POST"]),
        Route("/s/{token}/check", pages.check, methods=["POST"]),
        Route("/s/{token}/sound", pages.sound),
        Route("/s/{token}/audio/{position}", pages.audio),
        Route("/s/{token}/ratings", pages.rate, methods=["POST"]),
        Route("/s/{token}/withdraw", pages.withdraw, methods=["GET", "POST"]),
    ]
    handlers: Any = {HTTPException: pages.failed, Refused: pages.failed}
    return Starlette(routes=routes, exception_handlers=handlers, middleware=[Middleware(Guard, limits=limits)])
