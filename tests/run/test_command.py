"""smart.run.command: progress where there is no terminal; old names of options."""

from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner

from smart.__main__ import main
from smart.distributed import World
from smart.run import Opening, Run, command, progress

OLD = {
    ("evaluate", "sample"): {"--n": "--count", "--prompts": "--kind"},
    ("evaluate", "soundfonts"): {"--n": "--count"},
    ("evaluate", "frontier"): {"--n": "--count"},
    ("demo",): {"--prompts": "--count"},
    ("study", "build"): {"--prompts": "--count"},
    ("study", "power"): {"--prompts": "--count"},
}


def find(words: tuple[str, ...]) -> click.Command:
    found: Any = main
    for word in words:
        found = found.get_command(click.Context(found), word)
    return found


@pytest.mark.parametrize("words", OLD, ids=" ".join)
def test_old_names_of_options_work_and_are_not_shown(words: tuple[str, ...]) -> None:
    program = find(words)
    parser = program.make_parser(click.Context(program))
    shown = CliRunner().invoke(main, [*words, "--help"]).output
    for old, new in OLD[words].items():
        value = "dataset" if new == "--kind" else "7"
        taken = [parser.parse_args([option, value])[0] for option in (old, new)]
        assert taken[0] == taken[1] and value in taken[0].values()
        assert f"{new} " in shown and f"{old} " not in shown


def test_every_option_is_explained() -> None:
    """By a phrase that begins with a capital letter and ends with a full stop, before its default."""
    programs = [find((name,)) for name in main.list_commands(click.Context(main))]
    for program in [*programs, *(inner for one in programs for inner in getattr(one, "commands", {}).values())]:
        for option in program.params:
            if not isinstance(option, click.Option) or option.hidden:
                continue
            text = (option.help or "").partition("  [default")[0]
            assert len(text.split()) > 3, f"{program.name} {option.opts}: {text!r}"
            assert text[0].isupper() and text.endswith((".", ".)")), f"{program.name} {option.opts}: {text!r}"


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "SECONDS", 0.0)


@pytest.mark.usefixtures("often")
def test_progress_without_a_terminal_is_lines(capfd: pytest.CaptureFixture[str]) -> None:
    with progress(total=3, unit="iteration") as bar:
        bar.update()
        bar.set_postfix(reward="1.5")
        bar.update()
    lines = capfd.readouterr().err.splitlines()
    assert lines[-1].startswith("2/3 iterations, 00:00 passed, ") and lines[-1].endswith(" left, reward=1.5")
    assert not any("\r" in line or not line for line in lines)
    assert list(progress(range(3), show=False)) == [0, 1, 2]
    assert not capfd.readouterr().err


@pytest.mark.usefixtures("often")
def test_a_line_names_the_work(capfd: pytest.CaptureFixture[str]) -> None:
    assert list(progress(range(2), desc="rating")) == [0, 1]
    assert capfd.readouterr().err.splitlines()[-1].startswith("rating: 2/2 items, ")


def test_what_follows_the_iterations_has_its_own_bar(tmp_path: Path) -> None:
    """While base and tuned model are compared, the bar is not full."""
    run = Run(tmp_path, "", program="p", world=World(torch.device("cpu")), opening=Opening(), keep=0, sources={})
    run.bar = first = progress(total=3, initial=3, unit="iteration")
    run.next_bar(4, "step", "base against tuned")
    assert (run.bar.n, run.bar.total) == (0, 4) and first is not run.bar
    run.bar.close()


def test_short_work_writes_no_line(capfd: pytest.CaptureFixture[str]) -> None:
    assert list(progress(range(3), unit="piece")) == [0, 1, 2]
    assert not capfd.readouterr().err
