"""What a study keeps: withdrawals while somebody reads the database, clocks that go back, full disks, prefixes."""

import contextlib
import io
import sqlite3
import sys
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urljoin

import pytest
from click.testing import CliRunner
from starlette.testclient import TestClient
from study_server import SECONDS, answer, build, consent, make_wavs

from smart.doctor import command, machine
from smart.study import store
from smart.study.app import make_app
from smart.study.command import main
from smart.study.folder import Study
from smart.study.store import Store

SITTING = "fedcba9876543210" * 2


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two prompts of two systems, without practice."""
    place = tmp_path_factory.mktemp("built")
    build(place / "study", make_wavs(place, ("base", "tuned"), 2), "--prompts", "2", "--practice", "0")
    return place / "study"


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "ratings.sqlite"


def opened(study: Path, database: Path) -> Store:
    return Store(Study(study), f"sqlite:///{database}")


def begin(client: Any, made: Store, base: str = "") -> str:
    """A participant at the first excerpt."""
    link = f"{base}/s/{made.invite(1)[0]}"
    consent(client, link)
    return link


def rate(client: Any, link: str, position: int, **changes: Any) -> Any:
    assert client.get(f"{link}/audio/{position}").status_code == 200
    time.sleep(SECONDS)
    return client.post(f"{link}/ratings", json=answer(position, 4, **changes))


def until(true: Callable[[], bool]) -> None:
    for _ in range(300):
        if true():
            return
        time.sleep(0.1)
    raise AssertionError("it did not happen")


def test_a_withdrawal_while_somebody_reads_is_finished_later_and_nobody_waits(
    study: Path, database: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, log = opened(study, database), database.with_name("ratings.sqlite-wal")
    client = TestClient(make_app(made), follow_redirects=False)
    stays, goes = begin(client, made), begin(client, made)
    for position in (1, 2):
        assert rate(client, goes, position, session=SITTING).status_code == 200
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM ratings").fetchone()  # a backup or an analysis begins
        started = time.monotonic()
        page = client.post(f"{goes}/withdraw").text
        assert "have been deleted from the study" in page and "as soon as no other program reads" in page
        assert rate(client, stays, 1).status_code == 200
        assert time.monotonic() - started < 10  # SQLite would wait for its reader for 30 s, and ratings with it
        assert SITTING.encode() in log.read_bytes()
        assert "trying again in the background" in capsys.readouterr().err
        token = made.admin_token(renew=True)
        shown = client.post("/admin", data={"token": token, "action": "overview"}).text
        assert "still in the log of the database" in shown
        made.close()
        again = opened(study, database)  # after a restart the operator is told again
        assert "copies of their data are still in" in capsys.readouterr().err and not again.is_erased()
        assert SITTING.encode() in log.read_bytes()
        reader.execute("ROLLBACK")
        until(again.is_erased)
    until(lambda: "is empty now" in capsys.readouterr().err)
    assert not log.exists() or not log.stat().st_size
    assert SITTING.encode() not in database.read_bytes()
    again.close()


def test_a_withdrawal_that_nobody_hinders_is_finished_at_once(study: Path, database: Path) -> None:
    made = opened(study, database)
    client = TestClient(make_app(made), follow_redirects=False)
    link = begin(client, made)
    assert rate(client, link, 1, session=SITTING).status_code == 200
    assert "has been deleted" in client.post(f"{link}/withdraw").text and made.is_erased()
    kept = b"".join(path.read_bytes() for path in database.parent.glob("ratings.sqlite*"))
    assert SITTING.encode() not in kept
    made.close()


def test_a_clock_that_goes_back_refuses_no_rating(study: Path, database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of day jumps by hours; what counts is the clock that only goes forward."""
    day, passed = [1e9], [50.0]
    monkeypatch.setattr(store, "now", lambda: day[0])
    monkeypatch.setattr(store, "time", SimpleNamespace(monotonic=lambda: passed[0]))
    made = opened(study, database)
    client = TestClient(make_app(made), follow_redirects=False)
    link = begin(client, made)

    def later(seconds: float, jump: float = 0.0) -> None:
        passed[0] += seconds
        day[0] += seconds + jump

    def send(position: int) -> Any:
        return client.post(f"{link}/ratings", json=answer(position, 4))

    assert client.get(f"{link}/audio/1").status_code == 200
    later(SECONDS)
    assert send(1).status_code == 200
    assert client.get(f"{link}/audio/2").status_code == 200
    later(SECONDS / 2, jump=-3600)
    early = send(2)
    assert early.status_code == 409 and early.headers["retry-after"]
    later(SECONDS / 2)
    assert send(2).json()["rating"] == 4
    assert client.get(f"{link}/audio/3").status_code == 200
    later(SECONDS / 2, jump=3600)
    assert send(3).status_code == 409  # a clock that goes forward is no listening
    made.close()
    later(SECONDS / 4, jump=-7200)  # while the server is restarted: nothing is known of the hour before
    made = opened(study, database)
    client = TestClient(make_app(made), follow_redirects=False)
    assert send(3).status_code == 200
    made.close()


def test_a_reply_names_the_answer_that_it_is_about(study: Path, database: Path) -> None:
    """By that the browser tells it from the page of a captive portal or a proxy."""
    made = opened(study, database)
    client = TestClient(make_app(made), follow_redirects=False)
    link = begin(client, made)
    sent = answer(1, 7)
    client.get(f"{link}/audio/1")
    time.sleep(SECONDS)
    stored = client.post(f"{link}/ratings", json=sent).json()
    assert stored == {"rating": 7, "position": 1, "client_id": sent["client_id"]}
    other = answer(1, 3)
    twice = client.post(f"{link}/ratings", json=other).json()
    assert twice == {"rating": 7, "position": 1, "client_id": other["client_id"]}
    wrong = answer(4, 3)
    refused = client.post(f"{link}/ratings", json=wrong)
    assert refused.status_code == 409 and refused.json()["client_id"] == wrong["client_id"]
    gone = client.post(f"{link}x/ratings", json=wrong)
    assert gone.status_code == 404 and gone.json()["client_id"] == wrong["client_id"]
    assert client.post(f"{link}/ratings", content=b"[").json()["client_id"] == ""
    made.close()


def test_a_log_on_a_full_disk_changes_no_answer(study: Path, database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    made = opened(study, database)
    client = TestClient(make_app(made), follow_redirects=False)
    link = begin(client, made)

    def fail(*_: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(made, "rate", fail)
    monkeypatch.setattr(sys, "stderr", Full())
    reply = client.post(f"{link}/ratings", json=answer(1, 4))
    assert reply.status_code == 503 and reply.headers["retry-after"]
    monkeypatch.undo()
    made.close()


class Links(HTMLParser):
    """The addresses in a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.found += [
            value for name, value in attributes if name in ("href", "src", "action", "data-base", "data-sound")
        ]


@pytest.mark.parametrize("prefix", ["", "/studies/piano"])
def test_every_link_stays_behind_a_prefix(study: Path, database: Path, prefix: str) -> None:
    """A web server in front takes the prefix off; pages, redirects and new links lead back to it."""
    made = opened(study, database)
    inner = make_app(made, open_enrolment=True)

    async def proxy(scope: Any, receive: Any, send: Any) -> None:
        assert scope["path"].startswith(f"{prefix}/"), scope["path"]
        headers = [*scope["headers"], (b"x-forwarded-prefix", prefix.encode())]
        await inner({**scope, "path": scope["path"].removeprefix(prefix), "headers": headers}, receive, send)

    client = TestClient(proxy, follow_redirects=False, base_url="http://here")

    def links(reply: Any) -> list[str]:
        found = [urljoin(str(reply.url), link) for link in Links(reply.text).found]
        if "location" in reply.headers:
            found.append(urljoin(str(reply.url), reply.headers["location"]))
        return found

    seen = [client.get(f"{prefix}/"), client.get(f"{prefix}/admin"), client.post(f"{prefix}/join")]
    page = links(seen[-1])[0]
    assert client.get(page).status_code == 200
    link = page.removeprefix("http://here")
    seen += [client.get(link), client.get(f"{link}/withdraw")]
    consent(client, link)  # type: ignore[arg-type]  # a TestClient is a client of httpx
    seen += [client.get(link), client.get(f"{prefix}/s/unknown"), client.get(f"{prefix}/nowhere/at/all")]
    token = made.admin_token(renew=True)
    shown = client.post(f"{prefix}/admin", data={"token": token, "action": "invite", "number": "1"})
    assert f"http://here{prefix}/s/" in shown.text
    every = {each for reply in [*seen, shown] for each in links(reply)}
    assert len(every) >= 8 and all(each.startswith(f"http://here{prefix}/") for each in every)
    for each in every:
        if "/static/" in each:
            assert client.get(each).status_code == 200
    made.close()


def test_a_draft_of_the_consent_text_is_said(study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(study.parent)
    found = machine._consent(Path("study"))
    assert found.state == machine.NOTE and "[names, institution]" in found.found
    monkeypatch.setattr(command, "examine", lambda path, overrides, folder: {"consent": machine._consent(folder)})
    result = CliRunner().invoke(command.main, ["--study", str(study)])
    assert "still has placeholders: [names, institution], [address]" in result.output
    assert Study(study).placeholders[1] == "[address]"

    class Stopped(Exception):
        pass

    def stop(*_: object) -> None:
        raise Stopped

    monkeypatch.setattr("smart.study.serve.Store", stop)
    result = CliRunner().invoke(main, ["serve", str(study), "--port", "0"])
    assert isinstance(result.exception, Stopped) and "consent.txt still has placeholders" in result.output
