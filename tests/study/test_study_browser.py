"""The study in a real browser: by keyboard, on a phone that loses its network, fifty at once with a killed server."""

import asyncio
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from study_server import SECONDS, Server, build, make_wavs, needed, serving, take_part

pytestmark = pytest.mark.slow

TRIALS = 30
PHONE = {"width": 360, "height": 740}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fifteen prompts of two systems, and one practice item."""
    place = tmp_path_factory.mktemp("browser")
    build(place / "study", make_wavs(place, ("base", "tuned"), 16), "--practice", "1", "--completion-code")
    return place / "study"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = shutil.which("chromium")
    needed("chromium", path)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--autoplay-policy=no-user-gesture-required"]
        )
        yield opened
        opened.close()


@pytest.fixture
def server(study: Path, tmp_path: Path) -> Iterator[Server]:
    with serving(study, tmp_path) as running:
        yield running


class Visitor:
    """A page in a separate browser context, and everything that went wrong in it."""

    def __init__(self, browser: Any, server: Server, **options: Any) -> None:
        self.context = browser.new_context(**options)
        self.context.set_default_timeout(15_000)
        self.server, self.wrong = server, list[str]()
        self.page = self.open()

    def open(self) -> Any:
        page = self.context.new_page()
        page.on("console", lambda line: self.wrong.append(line.text) if line.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: self.wrong.append(str(error)))
        page.on("request", lambda request: self._look(request.url))
        return page

    def _look(self, url: str) -> None:
        if not url.startswith((self.server.url, f"blob:{self.server.url}")):
            self.wrong.append(f"a request to {url}")

    def begin(self, link: str) -> None:
        """Click through to the first trial."""
        self.page.goto(link)
        self.page.check("[name=agree]")
        self.page.click("[type=submit]")
        self.page.check("[value=second]")
        self.page.click("[type=submit]")

    def position(self) -> int | None:
        """The position of the trial that is ready to be heard; None at the end."""
        self.page.wait_for_selector("#play:not([disabled]), #code")
        shown = self.page.get_attribute("main", "data-position")
        return None if shown is None else int(shown)

    def rate(self, rating: int) -> None:
        """Hear the excerpt and rate it."""
        self.page.click("#play")
        self.page.wait_for_selector("#scale:not([disabled])")
        self.page.check(f"[name=rating][value='{rating}']", force=True)  # the invisible input covers its number
        self.page.click("#send")

    def left(self, position: int) -> None:
        """Wait until that trial is over."""
        self.page.wait_for_function("p => document.querySelector('main').dataset.position !== p", arg=str(position))


def ratings(server: Server) -> dict[str, dict[int, int]]:
    """Ratings by participant and position; none may occur twice."""
    found: dict[str, dict[int, int]] = {}
    for row in server.export():
        assert int(row["position"]) not in found.setdefault(row["participant"], {})
        found[row["participant"]][int(row["position"])] = int(row["rating"])
    return found


def test_a_participant_takes_the_whole_study_with_the_keyboard(browser: Any, server: Server) -> None:
    visitor = Visitor(browser, server, reduced_motion="reduce")
    page, link = visitor.page, server.invite(1)[0]
    press = page.keyboard.press
    titles = []

    def look() -> None:
        """Check what screen readers rely on, on every page."""
        titles.append(page.title())
        assert page.locator("h1").count() == page.locator("main").count() == 1
        assert page.get_attribute("html", "lang") == "en"
        unnamed = "input:not([type=hidden])"
        names = page.eval_on_selector_all(unnamed, "all => all.map(each => each.labels.length)")
        assert all(count >= 1 for count in names)

    page.goto(link)
    look()
    for key in ("Tab", "Space", "Tab", "Enter"):
        press(key)
    page.wait_for_selector("#play:not([disabled])")
    look()
    for key in ("Tab", "Enter", "Tab", "Space", "ArrowDown", "Tab", "Enter"):
        press(key)
    sent = {}
    while (position := visitor.position()) is not None:
        if position in (0, 1, 2):
            look()
            assert page.evaluate("document.activeElement.tagName") in ("H1", "BODY")
        press("7")  # too early, so nothing is chosen
        assert page.locator("[name=rating]:checked").count() == 0 and page.is_disabled("#send")
        press("Tab")
        assert page.evaluate("document.activeElement.id") == "play"
        press("Space")
        page.wait_for_selector("#scale:not([disabled])")
        assert "You can rate it now" in page.inner_text("[role=status]")
        sent[position] = position % 10 + 1
        press("0" if sent[position] == 10 else str(sent[position]))
        if position == 5:  # the arrows change it, as in any group of radio buttons
            press("ArrowRight")
            sent[5] += 1
        if position == 1:
            tree = page.locator("#scale").aria_snapshot()
            assert 'group "How much do you enjoy this audio? Rate from 1 to 10."' in tree
            assert 'radio "1, not at all"' in tree and 'radio "10, very much"' in tree and 'radio "4"' in tree
        press("Enter")
        visitor.left(position)
    look()
    assert len(page.inner_text("#code")) == 8
    assert len(set(titles)) == len(titles)  # each step has a different title
    del sent[0]  # practice
    assert ratings(server) == {"p0001": sent} and len(sent) == TRIALS
    rows = server.export()
    assert all(SECONDS * 0.95 <= float(row["listened_s"]) <= SECONDS * 1.05 for row in rows)
    assert all(row["play_count"] == "1" and "Chrome" in row["user_agent"] for row in rows)
    assert len({row["session"] for row in rows}) == 1
    assert visitor.wrong == []
    visitor.context.close()


def test_a_phone_that_loses_the_network_after_every_trial(browser: Any, server: Server) -> None:
    """In turn, the network comes back, the page is closed first, or another browser takes over first."""
    options: dict[str, Any] = {"viewport": PHONE, "has_touch": True, "color_scheme": "dark"}
    link = server.invite(1)[0]
    visitor = Visitor(browser, server, **options)
    visitor.begin(link)
    visitor.rate(5)
    visitor.left(0)
    sent: dict[int, int] = {}
    for position in range(1, TRIALS + 1):
        assert visitor.position() == position
        assert visitor.page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        sent[position] = position % 10 + 1
        visitor.context.set_offline(True)
        visitor.rate(sent[position])
        visitor.page.wait_for_function("() => document.querySelector('#status').innerText.includes('no connection')")
        if position % 10 == 5:
            other = Visitor(browser, server, **options)
            other.page.goto(link)
            assert other.position() == position  # the server has not received it
            other.rate(sent[position] % 10 + 1)
            other.left(position)
            sent[position] = sent[position] % 10 + 1  # the first rating to arrive counts
            assert other.wrong == []
            other.context.close()
        if position % 2:
            visitor.context.set_offline(False)
        else:
            visitor.page.close()
            visitor.context.set_offline(False)
            visitor.page = visitor.open()
            visitor.page.goto(link)
        visitor.left(position)
    assert visitor.position() is None
    assert ratings(server) == {"p0001": sent}
    assert visitor.page.evaluate("localStorage.length") == 0  # nothing is left on the device
    assert [line for line in visitor.wrong if "net::ERR_INTERNET_DISCONNECTED" not in line] == []
    visitor.context.close()


def test_fifty_at_once_and_a_server_that_is_killed(browser: Any, server: Server) -> None:
    """Forty-seven without a browser and three with one; SIGKILL twice. No rating is lost, duplicated or mixed up."""
    links = server.invite(50)
    acknowledged: list[dict[int, int]] = [{} for _ in links]

    def rating(person: int, position: int) -> int:
        return (position * (person % 7 + 1) + person) % 10 + 1

    async def crowd() -> None:
        limits = httpx.Limits(max_connections=60, max_keepalive_connections=60)
        async with httpx.AsyncClient(timeout=20, limits=limits) as client:
            await asyncio.gather(*(
                take_part(client, link, lambda position, n=person: rating(n, position), acknowledged[person])
                for person, link in enumerate(links[:47])
            ))  # fmt: skip

    thread = threading.Thread(target=lambda: asyncio.run(crowd()))
    thread.start()
    visitors = {person: Visitor(browser, server) for person in (47, 48, 49)}
    for person, visitor in visitors.items():
        visitor.begin(links[person])
    for position in range(TRIALS + 1):
        for person, visitor in visitors.items():
            assert visitor.position() == position
            visitor.rate(rating(person, position))
        for person, visitor in visitors.items():
            visitor.left(position)
            acknowledged[person][position] = rating(person, position)
        if position in (7, 20):
            server.stop(signal.SIGKILL)
            server.start()
    thread.join(timeout=100)
    assert not thread.is_alive()
    for person, visitor in visitors.items():
        assert visitor.position() is None, person
        assert [line for line in visitor.wrong if "net::ERR_" not in line] == []
        visitor.context.close()
    counted = [{place: value for place, value in each.items() if place > 0} for each in acknowledged]
    assert all(len(each) == TRIALS for each in counted)
    found = sorted(sorted(each.items()) for each in ratings(server).values())
    assert found == sorted(sorted(each.items()) for each in counted)
    assert counted[3] == {place: rating(3, place) for place in range(1, TRIALS + 1)}


def test_what_was_passed_over_was_not_heard(browser: Any, server: Server) -> None:
    visitor = Visitor(browser, server)
    page = visitor.page
    visitor.begin(server.invite(1)[0])
    visitor.rate(5)
    visitor.left(0)
    assert visitor.position() == 1
    # the first playback skips most of the sound, as when a listener seeks with a key on the headphones
    page.evaluate("""() => {
        const play = HTMLMediaElement.prototype.play;
        HTMLMediaElement.prototype.play = function () {
            HTMLMediaElement.prototype.play = play;
            const playing = play.call(this);
            const jump = () => { this.currentTime = this.duration - 0.02; };
            this.readyState ? jump() : this.addEventListener("loadedmetadata", jump, { once: true });
            return playing;
        };
    }""")
    page.click("#play")
    page.wait_for_function("() => document.querySelector('#play').innerText === 'Play again'")
    assert page.get_attribute("#scale", "disabled") is not None
    page.click("#play")  # this time all of it
    page.wait_for_selector("#scale:not([disabled])")
    assert visitor.wrong == []
    visitor.context.close()


def test_a_page_of_somebody_else_stores_nothing(browser: Any, server: Server) -> None:
    """A captive portal answers 200 with HTML, a proxy 404 with HTML, each for a rating, a page and a sound."""
    visitor = Visitor(browser, server)
    link = server.invite(1)[0]
    visitor.begin(link)
    page, left = visitor.page, {"ratings": 3, "": 2, "audio/1": 2}

    def portal(route: Any) -> None:
        part = route.request.url.removeprefix(link).strip("/")
        if left.get(part, 0) and route.request.resource_type in ("fetch", "xhr"):
            left[part] -= 1
            status = 404 if left[part] % 2 else 200
            route.fulfill(
                status=status, content_type="text/html", body="<html><main>Log in to Hotel WiFi</main></html>"
            )
        else:
            route.continue_()

    page.route("**/*", portal)
    page.evaluate("""() => {
        window.seen = [];  // what the status said, and how many answers were stored at that instant
        const note = () => seen.push([document.querySelector("#status").textContent, Object.keys(localStorage).length]);
        new MutationObserver(note).observe(document.body, { subtree: true, childList: true, characterData: true });
    }""")
    for position in (0, 1):  # the practice item, and the first excerpt
        assert visitor.position() == position
        page.click("#play")
        page.wait_for_selector("#scale:not([disabled])")
        page.check("[name=rating][value='7']", force=True)
        page.click("#send")
        visitor.left(position)
    seen = page.evaluate("seen")
    shown = next(text for text, stored in seen if "login page" in text and stored == 1)  # the answer is kept
    assert not any(left.values()) and "are kept on this device" in shown
    assert [given[1] for given in ratings(server).values()] == [7]
    visitor.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(scheme: str, browser: Any, server: Server) -> None:
    """WCAG 2.2, 1.4.3: at least 4.5 to 1."""
    visitor = Visitor(browser, server, color_scheme=scheme)
    visitor.page.goto(server.invite(1)[0])

    def luminance(colour: str) -> float:
        values = [int(part) / 255 for part in colour.strip("rgba()").split(",")[:3]]
        linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in values]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    read = "each => [getComputedStyle(each).color, getComputedStyle(each).backgroundColor]"
    back = visitor.page.eval_on_selector("body", read)[1]
    for selector in ("body", ".small", "footer", "a", "button"):
        colour, own = visitor.page.eval_on_selector(selector, read)
        levels = sorted((luminance(colour), luminance(back if own == "rgba(0, 0, 0, 0)" else own)))
        assert (levels[1] + 0.05) / (levels[0] + 0.05) >= 4.5, selector
    assert visitor.wrong == []
    visitor.context.close()
