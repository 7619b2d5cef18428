"""smart.reproduce: the order of steps, what is done again, failures, kills; and the whole of it, tiny."""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import programs
import pytest

from smart import UserError, published
from smart.config import load, to_dict
from smart.corpus import Corpus
from smart.files import hold, sha256
from smart.reproduce.book import Book, Step, hold_out, perform
from smart.reproduce.command import main
from smart.reproduce.page import write_page
from smart.reproduce.steps import SMOKE, Found, drop_checkpoints, each_alone, plan, retune, variants
from smart.reward import load_reward


def step(name: str, code: str, *after: str, **more: object) -> Step:
    """A step that runs some Python in a process, as a program of the package would run."""
    words = ("timeit", "-n", "1", "-r", "1", f"import pathlib; here = pathlib.Path(r'{{out}}', '{name}'); {code}")
    return Step(name, f"step {name}", words, ("*.txt",), after=after, **more)  # type: ignore[arg-type]


def writes(name: str, text: str, *after: str) -> Step:
    """Writes ``text`` and what the steps before it wrote; says so in order.log."""
    read = " + ".join([repr(text), *(f"(here.parent / {other!r} / 'made.txt').read_text()" for other in after)])
    log = f"open(here.parent / 'order.log', 'a').write({name!r} + ' ')"
    return step(name, f"(here / 'made.txt').write_text({read}); {log}", *after)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def go(out: Path, *steps: Step) -> Book:
    book = Book(out)
    with hold_out(out) as lock:
        perform(steps, out, book, lock)
    return book


def order(out: Path) -> str:
    return (out / "order.log").read_text()


def test_finished_steps_are_passed_over_and_what_depends_on_a_change_is_done_again(out: Path) -> None:
    first, second, third = writes("first", "a"), writes("second", "b", "first"), writes("third", "c")
    book = go(out, first, second, third)
    assert order(out) == "first second third " and (out / "second" / "made.txt").read_text() == "ba"
    assert book.rows["second"]["outputs"] == {"made.txt": sha256(out / "second" / "made.txt")}
    go(out, first, second, third)
    assert order(out) == "first second third ", "nothing was to do"

    go(out, writes("first", "A"), second, third)  # another command
    assert order(out) == "first second third first second " and (out / "second" / "made.txt").read_text() == "bA"
    assert (out / "replaced" / "second-1" / "made.txt").read_text() == "ba", "what was made before is kept"
    go(out, writes("first", "A")._replace(given="another configuration"), second, third)
    assert order(out) == "first second third first second first ", "the same result changes nothing further on"

    (out / "second" / "made.txt").write_text("damaged")
    go(out, writes("first", "A")._replace(given="another configuration"), second, third)
    moved = out.rename(out.with_name("elsewhere"))
    go(moved, writes("first", "A")._replace(given="another configuration"), second, third)
    assert order(moved) == "first second third first second first second ", "a folder may be moved"


def test_a_step_that_fails_names_itself_its_log_and_its_exit_code(out: Path) -> None:
    broken = step("broken", "print('no room left', flush=True); import os; os._exit(7)")
    with pytest.raises(click.ClickException) as raised:
        go(out, writes("first", "a"), broken, writes("third", "c"))
    assert raised.value.exit_code == 7
    assert "step broken failed with exit code 7" in raised.value.message
    assert str(out / "logs" / "broken.log") in raised.value.message and "no room left" in raised.value.message
    assert "no room left" in (out / "logs" / "broken.log").read_text()
    go(out, writes("first", "a"), writes("broken", "b"), writes("third", "c"))
    assert order(out) == "first broken third "
    with pytest.raises(click.ClickException, match="did not write"):
        go(out, step("empty", "pass"))


def test_a_step_that_was_begun_goes_on(out: Path) -> None:
    """With what says so on its command line, in the folder that it left; where it changed since, in a new one."""
    code = "(here / 'half').exists() and (here / 'made.txt').write_text('whole'); (here / 'half').touch(); "
    begun = step("slow", code + "1 / len(list(here.glob('*.txt')))")
    with pytest.raises(click.ClickException, match="exit code 1"):
        go(out, begun)
    go(out, begun._replace(resume=("resumed = True",)))  # resume is no part of what decides the result
    assert (out / "slow" / "made.txt").read_text() == "whole"
    log = (out / "logs" / "slow.log").read_text().splitlines()
    commands = [line for line in log if line.startswith("$ ")]
    assert ["resumed = True" in line for line in commands] == [False, True]

    with pytest.raises(click.ClickException):
        go(out, begun._replace(given="changed"))
    assert not (out / "slow" / "made.txt").exists() and (out / "replaced" / "slow-1" / "made.txt").exists()


def test_a_program_that_refuses_to_go_on_once_it_is_finished_is_not_started_again(out: Path) -> None:
    done = step("corpus", "(here / 'made.txt').write_text('x'); 1 / 0")._replace(last="made.txt")
    with pytest.raises(click.ClickException):
        go(out, done)  # as if killed between its last write and our note of it
    assert go(out, done).is_done(done)


def test_one_process_at_a_time_and_only_in_a_folder_of_its_own(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go(out, writes("first", "a"))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with hold_out(out), pytest.raises(UserError, match="another process works in it"), hold_out(out):
        pass
    foreign = out.with_name("foreign")
    foreign.mkdir()
    (foreign / "thesis.txt").touch()
    with pytest.raises(UserError, match="holds something else"):
        Book(foreign)
    for text in ("{", "[]", '{"first": 1}', '{"first": {"key": "k"}}', '{"first": {"key": "k", "seconds": "x"}}'):
        (out / "state.json").write_text(text)
        with pytest.raises(UserError, match=r"state\.json cannot be read"):
            Book(out)


DRIVER = """
import sys
sys.path[:0] = {tests!r}
from pathlib import Path
from test_reproduce import go, step, writes
go(Path({out!r}), writes("first", "a"), step("slow", {code!r}), writes("third", "c", "first"))
"""


def drive(out: Path, code: str) -> subprocess.Popen[str]:
    program = DRIVER.format(tests=[str(folder) for folder in Path(__file__).parents[:2]], out=str(out), code=code)
    return programs.start([sys.executable, "-c", program], stderr=subprocess.PIPE)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[Any] | None = None) -> None:
    end = time.monotonic() + 240
    while not condition():
        if time.monotonic() > end or (process and process.poll() is not None):
            if process:
                process.kill()
            raise AssertionError("what was waited for did not happen")
        time.sleep(0.02)


SLOW = "import time; (here / 'pid').touch(); time.sleep(600)"


def test_a_killed_reproduction_takes_its_step_along_and_goes_on(out: Path) -> None:
    process = drive(out, SLOW)
    wait_for(lambda: (out / "slow" / "pid").is_file(), process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    wait_for(lambda: _free(out))  # which the step, asleep for ten minutes, holds as long as it lives
    go(out, writes("first", "a"), writes("slow", "b"), writes("third", "c", "first"))
    assert order(out) == "first slow third "


def _free(folder: Path) -> bool:
    try:
        with hold(folder):
            return True
    except BlockingIOError:
        return False


def test_ctrl_c_reaches_the_step_and_says_how_to_go_on(out: Path) -> None:
    process = drive(out, SLOW)
    wait_for(lambda: (out / "slow" / "pid").is_file(), process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode and "stopped in step slow; run the same command again to continue" in errors
    rows = json.loads((out / "state.json").read_text())
    assert "outputs" in rows["first"] and "outputs" not in rows["slow"] and "third" not in rows


def test_it_goes_on_when_nobody_reads_what_it_says(out: Path) -> None:
    process = drive(out, "import time; time.sleep(0.5); (here / 'made.txt').touch()")
    assert process.stderr is not None
    process.stderr.readline()
    process.stderr.close()
    assert process.wait(timeout=60) == 0
    assert (out / "third" / "made.txt").read_text() == "ca"


@pytest.mark.slow
def test_a_disk_that_takes_no_more_is_one_line(tmp_path: Path) -> None:
    """A limit on the size of a file, below that of a configuration."""
    words = [sys.executable, "-m", "smart.reproduce", "--smoke", "--out", str(tmp_path / "out")]
    done = programs.run(words, fresh=True, file_size=500, timeout=120)
    assert done.returncode == 1 and done.stderr.startswith("Error: ") and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.endswith("; run the same command again to continue\n")


def test_the_runs_are_those_of_the_shipped_configurations() -> None:
    """By hand, each could be started with its own file."""
    runs = variants(load("paper.toml"), "")
    names = ("paper", "paper-1000", "paper-1000-beta0", "paper-dataset")
    assert len(runs) == len(names)
    for config, name in zip(runs.values(), names, strict=True):
        ours, shipped = to_dict(config), to_dict(load(f"{name}.toml"))
        ours["run"].pop("name"), shipped["run"].pop("name")
        assert ours == shipped, name


def test_each_reward_is_also_tuned_with_alone_if_asked() -> None:
    config = load("quickstart.toml", ("rewards=[{kind='naturalness',target=6.5,weight=0.3}]", "reward.target=7.5"))
    runs = each_alone(config)
    assert list(runs) == [
        f"{name}{ending}" for name in ("together", "ce_proxy-alone", "naturalness-alone") for ending in ("", "-beta0")
    ]
    assert [one.kind for one in runs["together-beta0"].all_rewards] == ["ce_proxy", "naturalness"]
    alone = runs["naturalness-alone-beta0"]
    assert [(one.kind, one.target, one.weight) for one in alone.all_rewards] == [("naturalness", "none", 1.0)]
    assert alone.grpo.beta == 0 and runs["naturalness-alone"].grpo.beta == config.grpo.beta
    arguments: Any = (config, Path("corpus"), ["timgm"], [], "")
    more = {step.name: step for step in plan(*arguments, each_reward=True)}
    assert set(more) - {step.name for step in plan(*arguments)} == {*runs, "samples-rewards", "report-rewards"}
    rated = more["samples-rewards"].words
    assert [rated[place + 1] for place, word in enumerate(rated) if word == "--reward"] == [
        "ce_proxy", "naturalness", "naturalness_mel",
    ]  # fmt: skip
    with pytest.raises(UserError, match="--each-reward compares several rewards"):
        each_alone(load("paper.toml"))


def test_what_is_missing_for_the_papers_run_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from click.testing import CliRunner

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("SMART_SOUNDFONTS", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    result = CliRunner().invoke(main, ["--out", str(tmp_path / "out")])
    assert result.exit_code == 2 and not (tmp_path / "out").exists()
    for part in ("things are missing", "metamidipianophi3_4L", "yamaha", "grandeur", "Audiobox", "--corpus is needed"):
        assert part in result.output
    listed = CliRunner().invoke(main, ["--out", str(tmp_path / "out"), "--list"])
    assert listed.exit_code == 0 and "things are missing" in listed.output and "tuned-long-beta0" in listed.output
    assert not (tmp_path / "out").exists()
    wrong = CliRunner().invoke(main, ["--smoke", "--config", "paper.toml", "--out", str(tmp_path / "out")])
    assert wrong.exit_code == 2 and "leave out --config" in wrong.output


def test_every_step_is_a_command_that_its_program_takes(tmp_path: Path) -> None:
    """Without running them: each step's words against the options of the program that it starts."""
    from smart.__main__ import main as programs

    for config, corpus in ((load("paper.toml"), tmp_path), (load("quickstart.toml", SMOKE), None)):
        steps = plan(config, corpus, ["timgm", "fluidr3"], [Path("a recording.wav")], "")
        names = [step.name for step in steps]
        for place, step in enumerate(steps):
            assert set(step.after) <= set(names[:place]), f"{step.name} reads what is not there yet"
            module, *words = [word.replace("{out}", str(tmp_path)) for word in (*step.words, *step.resume)]
            context = click.Context(programs)
            command = programs.get_command(context, module.removeprefix("smart."))
            while isinstance(command, click.Group):
                context = click.Context(command, parent=context)
                chosen = command.get_command(context, words.pop(0))
                assert chosen is not None, step.words
                command = chosen
            parsed = command.make_context(step.name, words, parent=context)
            assert any(str(tmp_path) in str(value) for value in parsed.params.values()), "it writes into OUT"


@pytest.mark.slow
def test_what_the_base_writes_becomes_a_corpus_and_survives_a_kill(tmp_path: Path) -> None:
    """The first steps of the smoke test as a user starts them, killed while the second one works, and again."""
    out = tmp_path / "out"
    words = [sys.executable, "-m", "smart.reproduce", "--smoke", "--out", str(out), "--set", "render.workers=1"]
    words += ["--set", "sampling.max_new_tokens=40"]
    with programs.start(words, stderr=subprocess.DEVNULL) as process:
        wait_for(lambda: (out / "corpus").is_dir(), process)
        process.kill()
    first = json.loads((out / "state.json").read_text())["midi"]
    with programs.start(words, stderr=subprocess.PIPE) as process:
        wait_for(lambda: (out / "base").is_dir(), process)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
    assert "midi: the base writes 96 pieces - done before" in errors and "stopped in step base" in errors
    assert json.loads((out / "state.json").read_text())["midi"] == first
    corpus = Corpus(out / "corpus")
    assert all(len(corpus.split(split)) for split in ("train", "validation", "test"))


def test_the_smoke_tests_checkpoints_go_and_come_back_when_they_are_needed(out: Path) -> None:
    made = "; [(here / 'checkpoints' / '1' / name).write_text('x') for name in ('model.safetensors', 'manifest.json')]"
    tuned = step("tuned", "(here / 'checkpoints' / '1').mkdir(parents=True)" + made)
    tuned = tuned._replace(outputs=("checkpoints/*/manifest.json",))
    reads = "(here / 'made.txt').write_text((here.parent / 'tuned/checkpoints/1/model.safetensors').read_text())"
    steps = [tuned, step("frontier", reads, "tuned")]
    weights = out / "tuned" / "checkpoints" / "1" / "model.safetensors"
    book = go(out, *steps)
    drop_checkpoints(out)
    assert not weights.exists()
    retune(steps, book)
    assert all(book.is_done(one) for one in steps), "nothing needs them"
    steps[1] = steps[1]._replace(given="changed")
    retune(steps, book)
    assert not book.is_done(tuned)
    go(out, *steps)
    assert weights.is_file() and (out / "frontier" / "made.txt").read_text() == "x"


def test_a_kill_while_the_first_file_is_written_leaves_nothing_in_the_way(tmp_path: Path) -> None:
    """What an atomic write leaves beside its target is no other's folder: here, in a claimed folder, in a corpus."""
    from smart.corpus.build import _check_out
    from smart.run import claim_folder

    for name, begin in (("state.json", Book), ("settings.json", lambda out: claim_folder(out, {"n": 1}))):
        out = tmp_path / name
        out.mkdir()
        (out / f".{name}.tmp").write_text("{")
        begin(out)
        assert (out / name).is_file()
        (out / name).unlink()
        (out / "thesis.txt").touch()
        with pytest.raises(UserError, match="holds something else"):
            begin(out)
    corpus = tmp_path / "corpus"
    (corpus / ".work").mkdir(parents=True)
    (corpus / ".manifest.json.tmp").touch()
    _check_out(corpus, overwrite=False)


PNG = b"\x89PNG\r\n\x1a\n"
ESTIMATE = {"value": 0.5, "low": 0.25, "high": 0.75, "n": 8}


@pytest.fixture
def finished(out: Path) -> Path:
    """What the steps of a run with the paper's reward would have written, as far as the page reads it."""
    rated = {"n": 8, "reward": 6.0, "standard_error": 0.1}
    fit = {"law": "rl", "points": 2, "alpha": None, "beta": None, "residual": None, "why_not": "2 of 3 points"}
    run = {"keep": 40, "reward_against_base": ESTIMATE, "judge_against_base": ESTIMATE, "collapsed": []}
    frontier = {"runs": {"tuned (beta 0.04)": run}, "judge": "PQ", "prompts": 8, "rule": "a rule"}
    frontier["fits"] = [fit | {"series": "tuned (beta 0.04)", "measure": "reward"}]
    ratings = [f"{name},audiobox.{axis},{value}" for name, row in (
        ("silence", (3.25, 6.45, 1.70, 6.75)), ("white noise", (2.37, 4.65, 2.99, 4.79)),
        ("clips/Keith Jarrett - Solar.wav", (7.0, 7.0, 4.0, 7.0)), ("clips/mine.wav", (1.0, 2.0, 3.0, 4.0)),
    ) for axis, value in zip(published.AXES, row, strict=True)]  # fmt: skip
    texts = {
        "table-1/ratings.csv": "\n".join(["file,rating,mean", *ratings]),
        "table-2/soundfonts.csv": "soundfont,rating,n,mean,low,high,paper\n"
        "yamaha,audiobox.CE,10,6.5,6.4,6.6,6.53\nyamaha,audiobox.CU,10,6.5,6.4,6.6,7.705\nmine,audiobox.CE,10,6.5,,,",
        "report/procedural-paper.csv": "after,measure,paper,difference,difference_low,difference_high,verdict\n"
        "tuned,<b>Notes,more,2,1,3,as in the paper",
        "report/dataset-paper.csv": "after,measure,paper,difference,difference_low,difference_high,verdict",
        "hacks/hacks.csv": "probe,kind,rating,mean,low,high,difference,difference_low,difference_high,verdict",
        "frontier/summary.json": json.dumps(frontier),
        **{f"{name}/summary.json": json.dumps(dict.fromkeys(("base", "tuned", "difference"), rated))
           for name in variants(load("paper.toml"), "")},
        **{f"{name}/metrics.jsonl": '{"step": 0}\n{"step": 1, "seconds/iteration": 90}\n'
           for name in variants(load("paper.toml"), "")},
    }  # fmt: skip
    figures = ["table-2/soundfonts.png", "hacks/hacks.png", "frontier/frontier.png", "report/reward-by-iteration.png"]
    figures += [f"report/{kind}-{part}.png" for kind in ("procedural", "dataset") for part in PARTS]
    for name, content in (*texts.items(), *((figure, PNG) for figure in figures)):
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    (out / "state.json").write_text("{}")
    return out


PARTS = ("ratings", "features", "rolls")


def test_the_page_sets_the_paper_beside_ours_and_judges_only_what_can_be_compared(finished: Path) -> None:
    config = load("paper.toml")
    for is_published in (True, False):
        reward = load_reward("ce_proxy")
        reward.is_published = is_published  # type: ignore[attr-defined]  # as only audiobox has it
        found = Found(base=Path("base"), reward=reward, corpus=None, soundfonts=[])
        page = write_page([], finished, Book(finished), config, found, smoke=False).read_text()
        assert "3.24 / 3.25" in page and "7.48 / -" in page and "- / 1.00" in page
        assert "7.12 / 7.00" in page, "a recording that is called as a row of the paper's table"
        assert "6.53 / 6.500 [6.400, 6.600]" in page and "5.42 / -" in page and "- / 6.500 [-, -]" in page
        assert "+1.221 [0.613, 1.828]" in page and "it needs listeners" in page
        assert '<td data-label="minutes">1.5</td>' in page and "50 minutes" in page  # of 90 seconds
        assert "no law is fitted (2 of 3 points)" in page and "&lt;b&gt;Notes" in page
        assert page.count("data:image/png;base64,") == 10 and not re.search(r"(?:src|href)=.?(?:http|//)", page)
        assert ("agrees (at most 0.01 apart)" in page) == is_published  # silence
        assert ("differs (at most 1.00 apart)" in page) == is_published  # noise
        assert ("1 of 2 agree" in page) == is_published and ("as in the paper" in page) == is_published
    found = found._replace(reward=load_reward("ce_proxy"))
    page = write_page([], finished, Book(finished), config, found, smoke=True).read_text()
    links = re.findall(r'<li><a href="#([^"]+)">', page)
    assert len(links) == page.count("<h2") and all(f'id="{link}"' in page for link in links)
    fonts = finished / "table-2" / "soundfonts.csv"
    head, *lines = fonts.read_text().splitlines()
    fonts.write_text("\n".join([head, *(line for line in lines if "yamaha" in line)]) + "\n")
    one = write_page([], finished, Book(finished), config, found, smoke=True).read_text()
    assert page.count("<img") == one.count("<img") + 1, "no figure of a single soundfont"
    assert "This is the smoke test" in page and "as in the paper" not in page
