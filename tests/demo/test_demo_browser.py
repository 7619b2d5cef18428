"""The demo page in a real browser (Debian's Chromium, headless), opened from file://."""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from browser import launched
from conftest import HOSTILE, Demo
from symusic import Score
from test_demo import Parsed, a_piece, decode85, pcm

from smart.demo.page import Page, Section
from smart.render import score_notes
from smart.reward import load_reward

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched() as opened:
        yield opened


@pytest.fixture(params=[{}])
def page(browser: Any, demo: Demo, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The opened page. It must log no errors and request nothing but itself."""
    context = browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | request.param))
    opened, heard, asked = context.new_page(), [], []
    opened.on("console", lambda message: heard.append(message.text))
    opened.on("pageerror", lambda error: heard.append(str(error)))
    opened.on("request", lambda request: asked.append(request.url))
    opened.on("dialog", lambda dialog: dialog.accept())
    opened.goto(demo.page.as_uri())
    yield opened
    context.close()
    assert heard == []
    assert asked.count(demo.page.as_uri()) >= 1
    assert [url for url in asked if not url.startswith("blob:null/") and url != demo.page.as_uri()] == []


@pytest.fixture(scope="module")
def parsed(demo: Demo) -> Parsed:
    return Parsed(demo.page.read_text(encoding="utf-8"))


def clips(page: Any, pair: int = 0) -> Any:
    return page.locator(".pair").nth(pair).locator(".clip")


def audio(clip: Any, what: str) -> Any:
    return clip.locator("audio").evaluate(f"audio => audio.{what}")


def wait(page: Any, clip: Any, condition: str) -> None:
    page.wait_for_function(f"audio => {condition}", arg=clip.locator("audio").element_handle(), timeout=10_000)


def test_audio_plays_and_the_playhead_moves(page: Any) -> None:
    first, second = clips(page).all()
    play = first.get_by_role("button", name="Play piano-small, prompt 0")
    assert float(first.locator(".playhead").get_attribute("x1")) == 0
    play.click()
    wait(page, first, "audio.currentTime > 0.3")
    assert first.get_by_role("button", name="Pause piano-small, prompt 0").inner_text() == "Pause"
    assert 0.2 < float(first.locator(".playhead").get_attribute("x1")) <= audio(first, "duration")
    second.get_by_role("button", name="Play perturbed, prompt 0").click()  # one at a time
    wait(page, second, "audio.currentTime > 0.1")
    assert audio(first, "paused") and not audio(second, "paused")
    wait(page, second, "audio.ended")
    assert second.locator("button.play").inner_text() == "Play"


def test_one_player_switches_at_the_same_instant(page: Any) -> None:
    first, second = clips(page).all()
    pair = page.locator(".pair").first
    pair.get_by_role("button", name="Play piano-small in the player of both, prompt 0").click()
    wait(page, first, "audio.currentTime > 0.5")
    pair.get_by_role("button", name="Switch to perturbed at the same instant, prompt 0").click()
    wait(page, second, "!audio.paused && audio.currentTime > 0.4")  # not from its beginning
    assert audio(first, "paused") and abs(audio(second, "currentTime") - audio(first, "currentTime")) < 1
    pair.get_by_role("button", name="Pause perturbed in the player of both, prompt 0").click()
    assert audio(second, "paused")
    pair.get_by_role("button", name="Switch to piano-small at the same instant, prompt 0").click()  # silently
    assert audio(first, "paused") and abs(audio(second, "currentTime") - audio(first, "currentTime")) < 0.1


@pytest.mark.parametrize(
    "page",
    [{"viewport": {"width": 1280, "height": 800}}, {"viewport": {"width": 390, "height": 800}}],
    indirect=True,
    ids=["wide", "phone"],
)
def test_the_first_screen_has_something_to_hear(page: Any, parsed: Parsed) -> None:
    first = clips(page).first
    button = page.locator(".pair .switcher button").first.bounding_box()
    assert button["y"] + button["height"] <= 800
    opening = parsed.data["sections"][0]["pairs"][0]["opening"]
    signature, tempo = (word.split("_")[1] for word in opening.split()[1::2])
    heading = page.locator(".pair h3").first.inner_text()
    assert heading == f"Prompt 0: {signature}, {float(tempo):.0f} beats a minute"
    assert opening not in page.locator(".pair").first.inner_text()
    page.locator(".pair summary").first.click()  # on demand
    assert opening in page.locator(".pair").first.inner_text()
    seconds = first.locator(".seconds span").all_inner_texts()
    assert seconds[0] == "0 s" and [int(second) for second in seconds[1:]] == list(range(1, len(seconds)))
    span = float(first.locator("svg").get_attribute("viewBox").split()[2])
    top, height = (first.locator("svg").bounding_box()[name] for name in ("y", "height"))
    rows = float(first.locator("svg").get_attribute("viewBox").split()[3])
    notes = first.locator("rect.note")
    pitch, y = (float(notes.first.get_attribute(name)) for name in ("data-pitch", "y"))
    for name in first.locator(".pitches span").all():  # a name stands where the notes of that pitch are
        box = name.bounding_box()
        at = (box["y"] + box["height"] / 2 - top) / height * rows
        assert abs(at - (y + pitch + 0.5 - 12 * (int(name.inner_text()[1:]) + 1))) < 1
    assert span > 0


def test_the_roll_is_the_midi(page: Any, parsed: Parsed) -> None:
    for pair in range(2):
        for clip, name in zip(clips(page, pair).all(), ["piano-small", "perturbed"], strict=True):
            piece = parsed.pieces()[name, pair]
            notes = score_notes(Score.from_midi(decode85(piece["midi"])))
            notes = notes[notes[:, 0] < piece["seconds"]]
            drawn = clip.locator("rect.note").evaluate_all(
                "all => all.map(n => ['x', 'width', 'data-pitch', 'data-velocity', 'y', 'height']"
                ".map(name => Number(n.getAttribute(name))))"
            )
            onset, width, pitch, velocity, y, height = np.array(drawn).T
            np.testing.assert_allclose(onset, notes[:, 0], atol=1e-4)
            np.testing.assert_allclose(width, np.minimum(notes[:, 1], piece["seconds"] - notes[:, 0]), atol=2e-4)
            np.testing.assert_array_equal(pitch, notes[:, 2])
            np.testing.assert_array_equal(velocity, notes[:, 3])
            assert len(set(y + pitch)) == 1 and set(height) == {1}  # higher notes stand higher
            label = clip.locator("svg").get_attribute("aria-label")
            assert label.startswith(f"Piano roll of {name}, prompt {pair}: {len(notes)} note")


def test_seeking_by_click_and_by_key(page: Any, parsed: Parsed) -> None:
    clip = clips(page).first
    seconds = parsed.pieces()["piano-small", 0]["seconds"]
    axis = float(clip.locator("svg").get_attribute("viewBox").split()[2])
    box = clip.locator("svg").bounding_box()
    clip.locator("svg").click(position={"x": box["width"] * 0.25, "y": 20})
    position = clip.get_by_role("slider", name="Position in piano-small, prompt 0")
    assert float(position.input_value()) == pytest.approx(axis / 4, abs=0.06)
    clip.locator("button.play").click()  # it starts there
    wait(page, clip, f"audio.currentTime > {axis / 4 + 0.1}")
    clip.locator("button.play").click()
    assert audio(clip, "paused") and audio(clip, "currentTime") < axis / 4 + 1.5
    position.focus()
    before = audio(clip, "currentTime")
    page.keyboard.press("ArrowLeft")
    wait(page, clip, f"audio.currentTime < {before}")
    page.keyboard.press("Home")
    wait(page, clip, "audio.currentTime === 0")
    page.keyboard.press("End")  # no further than its end
    wait(page, clip, f"Math.abs(audio.currentTime - {seconds}) < 0.06")
    assert position.get_attribute("aria-valuetext") == f"{seconds:.1f} of {seconds:.1f} s"


def test_blind_listening_records_before_it_reveals(page: Any, parsed: Parsed) -> None:
    page.get_by_role("checkbox", name="Blind listening").check()
    pair = page.locator(".pair").first
    text = pair.inner_text() + pair.evaluate("node => node.outerHTML")
    for secret in ("piano-small", "perturbed", "CE", 'rect class="note"', "MIDI", "WAV", 'data-role="first"'):
        assert secret not in text
    first, second = clips(page).all()
    choose = pair.get_by_role("button", name="I prefer B, prompt 0")
    assert choose.get_attribute("aria-disabled") == "true"
    choose.press("Enter")  # not allowed before both were heard
    assert page.get_by_role("status").inner_text() == "Play both pieces before you choose."
    assert pair.locator(".reveal").count() == 0
    for clip in (first, second):
        clip.locator("button.play").click()
        wait(page, clip, "audio.currentTime > 0.3")
    assert choose.get_attribute("aria-disabled") == "false"
    choose.click()
    (choice,) = json.loads(page.evaluate("Object.values(localStorage)[0]"))["choices"].values()
    assert choice["choice"] == "B" and choice["preferred"] == choice["b"] and not choice["heard_open"]
    assert {choice["a"], choice["b"]} == {"piano-small", "perturbed"}
    assert choice["heard_a_s"] > 0.1
    ratings = [parsed.pieces()[choice[side], 0]["ratings"]["CE"] for side in "ab"]
    said = f"You prefer B, {choice['b']}. A is {choice['a']}, B is {choice['b']}. "
    said += f"CE: A {ratings[0]:.2f}, B {ratings[1]:.2f}."
    assert pair.locator(".reveal").inner_text() == said
    assert page.get_by_role("status").inner_text() == f"Prompt 0: {said}"
    assert page.evaluate("document.activeElement.className") == "reveal"
    agrees = int(ratings[1] > ratings[0])
    assert "1 choice. You preferred" in page.locator("#tally").inner_text()
    assert f"CE agrees with you in {agrees} of 1." in page.locator("#tally").inner_text()

    page.reload()  # choices survive it
    assert page.get_by_role("checkbox", name="Blind listening").is_checked()
    assert page.locator(".pair").first.locator(".reveal").inner_text() == said
    assert clips(page, 1).first.locator("h4").inner_text() == "A"
    with page.expect_download() as download:
        page.get_by_role("button", name="Save choices as CSV").click()
    (row,) = csv.DictReader(io.StringIO(download.value.path().read_text(encoding="utf-8")))
    assert row["section"] == HOSTILE and row["preferred"] == choice["b"] and row["seed"] == str(choice["seed"])
    assert row["page"] == parsed.data["id"] and row["utc"].endswith("Z")
    with page.expect_download() as download:
        page.get_by_role("button", name="Save choices as JSON").click()
    assert json.loads(download.value.path().read_text(encoding="utf-8")) == {"page": row["page"], "choices": [choice]}
    page.get_by_role("button", name="Delete choices").click()
    assert page.locator("#tally").inner_text() == "You have made no choices yet."
    assert page.locator(".reveal").count() == 0


def test_the_slider_goes_through_training(page: Any, parsed: Parsed) -> None:
    slider = page.get_by_role("slider", name="Training step")
    assert slider.get_attribute("aria-valuetext").endswith("(perturbed)")
    slider.focus()
    page.keyboard.press("ArrowLeft")
    assert slider.get_attribute("aria-valuetext") == "1 (perturbed at 1)" == page.locator(".at").inner_text()
    second = clips(page).nth(1)
    assert second.locator("h4").inner_text() == "perturbed at 1"
    piece = parsed.pieces()["perturbed at 1", 0]
    table = page.locator(".pair").first.get_by_role("table").inner_text()
    assert f"{piece['ratings']['CE']:.2f}" in table
    second.locator("button.play").click()
    wait(page, second, "audio.currentTime > 0.1")
    assert audio(second, "duration") == pytest.approx(piece["seconds"], abs=1e-3)
    means = [
        [parsed.pieces()[name, i]["ratings"]["CE"] for i in range(2)] for name in ("piano-small", "perturbed at 1")
    ]
    row = page.locator(".means tbody tr").inner_text().split()
    assert row[:3] == ["CE", *(f"{np.mean(values):.2f}" for values in means)]


def test_downloads_are_whole(page: Any, parsed: Parsed) -> None:
    for name in ("piano-small", "perturbed"):
        piece = parsed.pieces()[name, 1]
        with page.expect_download() as download:
            page.get_by_role("button", name=f"Save {name}, prompt 1, as MIDI").click()
        assert download.value.path().read_bytes() == decode85(piece["midi"])
        assert download.value.suggested_filename.endswith(f"prompt-01-{name}.mid")
        with page.expect_download() as download:
            page.get_by_role("button", name=f"Save {name}, prompt 1, as WAV").click()
        assert download.value.suggested_filename.endswith(f"prompt-01-{name}.wav")
        with soundfile.SoundFile(download.value.path()) as file:
            assert (file.format, file.subtype, file.samplerate) == ("WAV", "PCM_16", parsed.data["sample_rate"])
            np.testing.assert_array_equal(file.read(dtype="int16").T, pcm(parsed.audio[piece["audio"]]))


def test_the_keyboard_is_enough(page: Any) -> None:
    """From the top of the page with Tab, Space and Enter alone: go blind, play both pieces, choose."""

    def go_to(name: str) -> None:
        for _ in range(60):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.getAttribute('aria-label') || document.activeElement.id") == name:
                return
        raise AssertionError(f"{name} is not reached")

    go_to("blind")
    page.keyboard.press("Space")
    for label in "AB":
        go_to(f"Play {label}, prompt 0")
        page.keyboard.press("Enter")
        wait(page, clips(page).nth("AB".index(label)), "audio.currentTime > 0.1")
    go_to("No preference, prompt 0")
    page.keyboard.press("Space")
    assert page.locator(".reveal").inner_text().startswith("You have no preference. A is ")
    go_to(page.locator(".pair").first.get_by_role("button", name="as MIDI").first.get_attribute("aria-label"))


@pytest.mark.parametrize(
    "page",
    [
        {"viewport": {"width": 360, "height": 740}, "color_scheme": "dark", "has_touch": True, "is_mobile": True},
        {"viewport": {"width": 360, "height": 740}, "color_scheme": "light", "reduced_motion": "reduce"},
    ],
    indirect=True,
    ids=["dark", "calm"],
)
def test_it_fits_a_phone(page: Any) -> None:
    page.locator("details summary").first.click()
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    small = page.locator("button:visible, input:visible").evaluate_all(
        "all => all.filter(node => node.getBoundingClientRect().height < 20).map(node => node.outerHTML)"
    )
    assert small == []
    ink, paper = page.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    dark = page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    assert (sum(map(int, ink[4:-1].split(","))) > sum(map(int, paper[4:-1].split(",")))) is dark
    clip = clips(page).first
    clip.locator("button.play").click()
    page.wait_for_function(
        "line => Number(line.getAttribute('x1')) > 0.2", arg=clip.locator(".playhead").element_handle()
    )


def test_every_control_has_a_name(page: Any) -> None:
    page.get_by_role("checkbox", name="Blind listening").check()
    for blind in (True, False):
        page.locator("#blind").set_checked(blind)
        tree = page.locator("body").aria_snapshot()
        assert "- button\n" not in tree and "- slider\n" not in tree and "- checkbox\n" not in tree
        ids = page.evaluate("[...document.querySelectorAll('[id]')].map(node => node.id)")
        assert len(ids) == len(set(ids))
        levels = page.evaluate("[...document.querySelectorAll('h1,h2,h3,h4')].map(node => Number(node.tagName[1]))")
        assert levels[0] == 1 and max(np.diff(levels)) <= 1


def test_what_failed_or_is_silent_can_be_looked_at(browser: Any, tmp_path: Path) -> None:
    from smart.rollout import System

    systems = [System(name, Path(name), None, None) for name in ("one", "two")]
    made = Page(load_reward("ce_proxy"), 22050)
    made.add_section(Section("Pairs", systems[0], systems[1:], "procedural", None))
    made.add(a_piece("one", 0, None, 3), "a prompt")
    made.add(a_piece("two", 0, np.zeros((2, 22050), np.float32), 0), "a prompt")
    path = tmp_path / "page.html"
    path.write_text(made.html(title="T", rule=[], facts={}, models=[], configs={}), encoding="utf-8")
    context = browser.new_context()
    page = context.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(path.as_uri())
    assert "could not be rendered" in clips(page).nth(0).inner_text()
    assert "No notes in 1.0 seconds. The clip is silent." in clips(page).nth(1).inner_text()
    page.get_by_role("checkbox", name="Blind listening").check()
    page.locator("button.play").click()  # the only one that has audio
    page.get_by_role("button", name="I prefer A").click()
    assert page.locator(".reveal").count() == 1 and errors == []
    context.close()
