"""The commands of each page of docs/, for a reader who has made the README's first run and its corpus."""

from pathlib import Path

import pytest
from pages import PAGES, README, commands, furnish, give

pytestmark = pytest.mark.slow
WITH_COMMANDS = [page for page in PAGES if commands(page)]
BEFORE = ("--config quickstart.toml", "--out my-corpus")  # how the README's commands end that each page builds on


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reader")
    furnish(folder)
    before = [command for command in commands(README) if command.endswith(BEFORE)]
    assert len(before) == len(BEFORE)
    for command in before:
        give(command, folder)
    return folder


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=lambda page: page.name)
def test_every_command_of_a_page_works(page: Path, reader: Path) -> None:
    for command in commands(page):
        give(command, reader)
