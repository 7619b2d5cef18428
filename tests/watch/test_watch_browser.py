"""The page of smart watch in a real browser (Debian's Chromium, headless), while a real run writes."""

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import soundfile
from browser import launched
from runs import arguments, start
from symusic import Score
from watch_server import Server

from smart.render import score_notes

pytestmark = pytest.mark.slow


PATIENCE = 120_000  # milliseconds, on a busy machine


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched() as opened:
        yield opened


class Visitor:
    """A page in a separate browser context, which must log no error and ask nobody else for anything."""

    def __init__(self, browser: Any, server: Server, **options: Any) -> None:
        self.context = browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | options))
        self.page = self.context.new_page()
        self.page.set_default_timeout(PATIENCE)
        self.server, self.wrong = server, list[str]()
        self.page.on("console", lambda line: self.wrong.append(line.text))
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("request", lambda request: self._look(request.url))

    def _look(self, url: str) -> None:
        if not url.startswith((f"{self.server.url}/", f"blob:{self.server.url}/")):
            self.wrong.append(f"a request to {url}")

    def __enter__(self) -> Any:
        return self.page

    def __exit__(self, kind: Any, *_: Any) -> None:
        self.context.close()
        assert kind is not None or self.wrong == []


@pytest.fixture(scope="module")
def server(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two finished runs, which differ in a setting; one has a hostile name."""
    folder = tmp_path_factory.mktemp("watch") / "runs"
    shutil.copytree(finished, folder / "one", symlinks=True)
    hostile = Path(shutil.copytree(finished, folder / "<img src=x onerror=alert(1)> 100%", symlinks=True))
    config = (hostile / "config.toml").read_text()
    (hostile / "config.toml").write_text(config.replace("beta = 0.04", "beta = 0.5"))
    os.utime(folder / "one" / "config.toml", (time.time() + 60,) * 2)  # the newest
    with Server(folder) as running:
        yield running


def step_of(page: Any) -> int:
    text = page.locator("#runs tbody tr td").first.inner_text()
    return int(text.split(" of ")[0]) if " of " in text else -1


def listen(page: Any, clip: Any) -> None:
    """Play a clip until its playhead has moved."""
    clip.locator("button.play").click()
    audio = clip.locator("audio").element_handle()
    page.wait_for_function("audio => audio.currentTime > 0.2 && !audio.paused", arg=audio)
    assert float(clip.locator(".playhead").get_attribute("x1")) > 0.1


def assert_drawn(clip: Any, midi: Path) -> None:
    """The roll of a clip is what its MIDI file says."""
    with soundfile.SoundFile(midi.with_suffix(".wav")) as file:
        seconds = file.frames / file.samplerate
    notes = score_notes(Score.from_midi(midi.read_bytes()))
    notes = notes[notes[:, 0] < seconds]
    drawn = clip.locator("rect.note").evaluate_all(
        "all => all.map(n => ['x', 'data-pitch', 'data-velocity'].map(name => Number(n.getAttribute(name))))"
    )
    np.testing.assert_allclose(np.array(drawn).reshape(-1, 3), notes[:, [0, 2, 3]], atol=1e-4)
    assert len(notes)


def test_a_run_is_seen_while_it_writes(browser: Any, base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    folder.mkdir()
    with Server(folder) as server, Visitor(browser, server) as page:
        page.goto(server.url)
        page.get_by_text("There is no run yet.").wait_for()
        page.evaluate("window.mark = 1")  # a reload would forget it
        changes = {"grpo.iterations": 12, "track.samples_every": 2, "run.name": "live"}
        run = start("grpo", "--config", "quickstart.toml", *arguments(base, folder, **changes))
        try:
            page.get_by_role("heading", name="live").wait_for()
            seen = []  # iterations, as the page goes from one to the next
            while not seen or seen[-1] < 12:
                now = step_of(page)
                seen += [now] if now >= 0 and now not in seen else []
                page.wait_for_timeout(100)
                assert run.poll() in (None, 0), run.stdout and run.stdout.read()
            assert len(seen) > 2 and seen == sorted(seen) and page.evaluate("window.mark") == 1
            page.locator("#sets option", has_text="the end: base and tuned model").wait_for(state="attached")
            assert page.locator("#sets").input_value() == "final"  # the newest is shown without being asked for
            assert run.wait(60) == 0
        finally:
            run.kill()
            run.communicate()
        page.locator("#runs tbody", has_text="finished").wait_for()
        folder = folder / "live"
        options = page.locator("#sets option").evaluate_all("all => all.map(each => each.value)")
        assert options[:3] == ["final", "held_out/00000012", "samples/00000012"]
        page.locator("#pairs .clip").first.wait_for()
        for side, clip in zip(
            ("base", "tuned"), page.locator("#pairs .pair").first.locator(".clip").all(), strict=True
        ):
            assert_drawn(clip, folder / "final" / f"00-{side}.mid")
            listen(page, clip)
        page.locator("#sets").select_option("held_out/00000004")
        page.locator("#pairs .clip h4", has_text="iteration 4").first.wait_for()
        base_clip, policy_clip = page.locator("#pairs .pair").nth(1).locator(".clip").all()
        assert_drawn(base_clip, folder / "held_out" / "00000000" / "01.mid")
        assert_drawn(policy_clip, folder / "held_out" / "00000004" / "01.mid")
        rated = json.loads((folder / "held_out" / "00000004" / "ratings.json").read_text())["01"]["CE"]
        assert f"{rated:.2f}" in page.locator("#pairs .pair").nth(1).get_by_role("table").inner_text()
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        judge = page.locator(".chart", has_text="Judge")
        assert f"Iteration 12: {rows[-1]['held_out/judge']:.3g}" in judge.inner_text()
        assert judge.locator("circle").count() == sum("held_out/judge" in row for row in rows)
        page.wait_for_function("() => document.querySelector('#steps').value === '12'")
        shutil.rmtree(folder)  # deleted while it is shown
        page.get_by_text("live is no longer there.").first.wait_for()
        page.get_by_text("There is no run yet.").wait_for()


def test_the_table_sorts_and_plays(browser: Any, server: Server) -> None:
    with Visitor(browser, server) as page:
        page.goto(f"{server.url}/#run=one")
        rows = page.locator("#completions tbody tr")
        rows.first.wait_for()
        rewards = [float(row.locator("td").nth(1).inner_text()) for row in rows.all()]
        assert rewards == sorted(rewards, reverse=True) and len(rewards) == 6
        assert page.locator("#completions th").nth(1).get_attribute("aria-sort") == "descending"
        page.get_by_role("button", name="Sort by Reward").click()
        assert [float(row.locator("td").nth(1).inner_text()) for row in rows.all()] == rewards[::-1]
        page.get_by_role("button", name="Play completion 0", exact=True).click()
        clip = page.locator("#completions .clip")
        clip.wait_for()
        page.wait_for_function("audio => audio.currentTime > 0.2", arg=clip.locator("audio").element_handle())
        drawn = clip.locator("rect.note").count()
        reply = httpx.get(f"{server.url}/runs/one/completions/6/0.mid", timeout=60)
        notes = score_notes(Score.from_midi(reply.content))
        assert drawn == (notes[:, 0] < float(clip.locator("input").get_attribute("max"))).sum()
        page.get_by_role("button", name="Sort by Advantage").click()  # what is open stays open
        assert page.locator("#completions .clip").count() == 1
        page.get_by_role("button", name="Play completion 0", exact=True).click()
        assert page.locator("#completions .clip").count() == 0
        page.locator("#steps").select_option("2")
        page.wait_for_function("() => document.querySelector('#table-box').getAttribute('aria-busy') === null")
        assert rows.count() == 6


def test_runs_are_compared(browser: Any, server: Server) -> None:
    with Visitor(browser, server) as page:
        page.goto(f"{server.url}/#run=one")
        page.get_by_text("Tick other runs above").wait_for()
        page.get_by_role("checkbox", name="Compare with <img").check()
        table = page.locator("#differences table")
        table.wait_for()
        assert table.locator("tbody").inner_text().split() == ["grpo.beta", "0.04", "0.5"]
        assert page.locator(".chart", has_text="Reward").locator("path.curve").count() == 4  # two metrics of two runs
        assert "<img src=x" in page.locator("#legend").inner_text()
        page.reload()  # the address remembers what was compared
        page.locator("#differences table").wait_for()
        page.locator("details summary").click()
        assert "grpo.iterations" in page.locator("#settings").inner_text()
        page.locator("#more").select_option("policy/entropy")
        assert page.locator(".chart", has_text="policy/entropy").count() == 1


def test_the_keyboard_is_enough(browser: Any, server: Server) -> None:
    with Visitor(browser, server, reduced_motion="reduce") as page:
        page.goto(f"{server.url}/#run=one")
        page.locator("#completions tbody tr").first.wait_for()

        def go_to(name: str) -> None:
            for _ in range(120):
                page.keyboard.press("Tab")
                now = "document.activeElement.getAttribute('aria-label') || document.activeElement.id"
                if page.evaluate(now).startswith(name):
                    return
            raise AssertionError(f"{name} is not reached")

        go_to("Reward, iterations")
        page.keyboard.press("Home")
        assert page.locator(".chart").first.locator(".readout").inner_text().startswith("Iteration 0: ")
        page.keyboard.press("ArrowRight")
        assert page.get_by_role("status").inner_text().startswith("Iteration 1: ")
        go_to("Play base, prompt 0")
        page.keyboard.press("Enter")
        page.wait_for_function("() => document.querySelector('#pairs audio').currentTime > 0.1")
        go_to("Sort by Reward")
        page.keyboard.press("Space")
        assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "Sort by Reward"
        go_to("Play completion")
        page.keyboard.press("Enter")
        page.locator("#completions .clip").wait_for()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone(browser: Any, server: Server, scheme: str) -> None:
    phone = {"viewport": {"width": 390, "height": 800}, "color_scheme": scheme, "has_touch": True, "is_mobile": True}
    with Visitor(browser, server, **phone) as page:
        page.goto(f"{server.url}/#run=one&with=" + "%3Cimg%20src%3Dx%20onerror%3Dalert(1)%3E%20100%25")
        page.locator("#differences table").wait_for()
        page.locator("#completions tbody button").first.click()
        page.locator("#completions .clip").wait_for()
        page.locator("details summary").click()
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        for table in ("#runs", "#completions", "#differences table"):
            wide, box = page.locator(table).evaluate("node => [node.scrollWidth, node.parentNode.clientWidth]")
            assert wide <= box
        small = page.locator("button:visible, input:visible, select:visible").evaluate_all(
            "all => all.filter(node => node.getBoundingClientRect().height < 20).map(node => node.outerHTML)"
        )
        assert small == []


def test_every_control_has_a_name(browser: Any, server: Server) -> None:
    with Visitor(browser, server) as page:
        page.goto(f"{server.url}/#run=one")
        page.locator("#completions tbody button").first.click()
        page.locator("#completions .clip").wait_for()
        tree = page.locator("body").aria_snapshot()
        assert not [kind for kind in ("button", "slider", "checkbox", "combobox", "link") if f"- {kind}\n" in tree]
        levels = page.evaluate("[...document.querySelectorAll('h1,h2,h3,h4')].map(node => Number(node.tagName[1]))")
        assert levels[0] == 1 and max(np.diff(levels)) <= 1
