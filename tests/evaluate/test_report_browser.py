"""The page of a report in a real browser (Debian's Chromium, headless), opened from file://."""

from pathlib import Path
from typing import Any

import pytest
from browser import launched
from test_report import Make, make, run, two_systems  # noqa: F401 -- make is a fixture

pytestmark = pytest.mark.slow


def test_it_plays_and_fits_a_phone(make: Make, tmp_path: Path) -> None:  # noqa: F811
    assert run("report", make("t", two_systems()), "--out", tmp_path / "out").exit_code == 0
    page_file = tmp_path / "out" / "index.html"
    with launched() as browser:
        for width in (390, 1280):
            wrong: list[str] = []
            page: Any = browser.new_page(viewport={"width": width, "height": 800})
            page.on("console", lambda line, wrong=wrong: wrong.append(line.text))
            page.on("pageerror", lambda error, wrong=wrong: wrong.append(str(error)))
            page.goto(page_file.as_uri())
            assert page.evaluate("document.documentElement.scrollWidth") == width
            for image in page.locator("img").all():
                box = image.bounding_box()
                assert box["x"] >= 0 and box["x"] + box["width"] <= width and box["width"] > 0.3 * width
            for cell in page.get_by_role("columnheader", name="tuned", exact=True).all():
                box = cell.bounding_box()
                assert box["x"] + box["width"] <= width
            sound = page.get_by_label("tuned, Prompt 0").element_handle()
            sound.evaluate("audio => audio.play()")
            page.wait_for_function("audio => audio.currentTime > 0.1", arg=sound)
            assert wrong == []
