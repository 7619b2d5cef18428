"""Debian's Chromium, headless, for tests of pages; a test file that imports this is skipped where there is none."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
BROWSER = shutil.which("chromium")
if BROWSER is None:
    if os.environ.get("CI") == "true":
        raise RuntimeError("no Chromium is installed: apt-get install chromium")
    pytest.skip("no Chromium is installed: apt-get install chromium", allow_module_level=True)


@contextmanager
def launched() -> Iterator[Any]:
    """A browser that plays audio without being clicked first."""
    arguments = ["--no-sandbox", "--autoplay-policy=no-user-gesture-required"]
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=BROWSER, args=arguments)
        yield opened
        opened.close()
