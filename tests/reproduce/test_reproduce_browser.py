"""The page of a reproduction in a real browser (Debian's Chromium, headless), opened from file://."""

from pathlib import Path
from typing import Any

import pytest
from browser import launched
from test_reproduce import finished, out, step  # noqa: F401 -- finished and out are fixtures

from smart.config import load
from smart.reproduce.book import Book
from smart.reproduce.page import write_page
from smart.reproduce.steps import Found
from smart.reward import load_reward

pytestmark = pytest.mark.slow


def test_its_tables_fit_a_phone(finished: Path) -> None:  # noqa: F811
    book, one = Book(finished), step("samples", f"print('{'a long command ' * 20}')")
    book.rows[one.name] = {"seconds": 90.0}
    found = Found(base=Path("base"), reward=load_reward("ce_proxy"), corpus=None, soundfonts=[])
    page_file = write_page([one], finished, book, load("paper.toml"), found, smoke=False)
    with launched() as browser:
        for width in (390, 1280):
            page: Any = browser.new_page(viewport={"width": width, "height": 800})
            page.goto(page_file.as_uri())
            page.locator("summary").click()
            assert page.evaluate("document.documentElement.scrollWidth") == width
            for table in page.locator(".wide").all():
                assert table.evaluate("table => table.scrollWidth <= table.clientWidth"), table.inner_text()
            label = "td => getComputedStyle(td, '::before').content"
            minutes = page.get_by_text("1.5", exact=True).first
            assert minutes.is_visible() and minutes.evaluate(label) == ('"minutes"' if width == 390 else "none")
