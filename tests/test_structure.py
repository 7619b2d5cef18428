"""The rooms: programs use rooms, rooms use the ground, programs never import each other (an ast walk)."""

import ast
import configparser
import os
import subprocess
import sys
from pathlib import Path

import pytest

import smart

PACKAGE = Path(smart.__file__).parent
GROUND = {
    "config",
    "tokens",
    "model",
    "hub",
    "files",
    "distributed",
    "published",
    "workers",
    "cores",
    "gpu",
    "packages",
    "process",
    "system",
    "style",
    "web",
}
ROOMS = {
    "logprobs",
    "prompts",
    "sampler",
    "render",
    "rollout",
    "reward",
    "plots",
    "features",
    "diversity",
    "guard",
    "intervals",
    "corpus",
    "run",
    "model_card",
    "listen",
    "meters",
    "crops",
}
PROGRAMS = {
    "grpo",
    "pretrain",
    "generate",
    "push",
    "card",
    "config.command",
    "corpus.command",
    "demo",
    "doctor",
    "evaluate",
    "reproduce",
    "study",
    "watch",
    "reward.calibrate",
    "reward.naturalness",
}


def modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")
        found[name] = path
    return found


def imports(path: Path) -> set[str]:
    """Names of smart's own modules that a file imports, at its top or inside functions."""
    known, found = set(modules()), set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}: relative import"
            continue
        found |= {name.removeprefix("smart.") for name in names if name.startswith("smart.")} & known
    return found


# modules that are a program's own
PARTS = {"objective": "grpo", "tuning": "grpo", "reward.command": "reward.calibrate"}


def owner(name: str) -> str:
    """The program whose module this is, where a program is a package; else the room or the file."""
    program = next((program for program in PROGRAMS if f"{name}.".startswith(f"{program}.")), None)
    return PARTS.get(name) or program or name.partition(".")[0]


def test_every_module_has_its_place() -> None:
    assert {owner(name) for name in modules()} - {"", "__main__"} == GROUND | ROOMS | PROGRAMS


@pytest.mark.parametrize("name", sorted(set(modules()) - {"", "__main__"}))
def test_arrows_point_down(name: str) -> None:
    used = {each for each in imports(modules()[name]) if owner(each) != owner(name)}
    if not name.endswith("__main__"):
        assert not {owner(each) for each in used} & PROGRAMS, "nothing imports a program"
    if owner(name) in GROUND:
        assert not {owner(each) for each in used} & ROOMS, "the ground stands on itself"
    if owner(name) not in PROGRAMS:
        assert "config" not in used, "only programs read the configuration"


DOORS = {"config", "render", "listen", "corpus", "run", "rollout", "sampler"}
# used as modules: events.read_file; checkpoint.save; bank.NoteBank, which imports torch
MODULES = {"corpus.events", "run.checkpoint", "render.bank"}


@pytest.mark.parametrize("name", sorted(set(modules()) - {"", "__main__"}))
def test_a_folder_is_entered_by_its_door(name: str) -> None:
    inside = {each for each in imports(modules()[name]) if each.partition(".")[0] != name.partition(".")[0]}
    passed = {
        each for each in inside if "." in each and each.partition(".")[0] in DOORS and owner(each) not in PROGRAMS
    }
    assert not passed - MODULES


def test_the_algorithm_is_read_in_one_sitting() -> None:
    text = (PACKAGE / "grpo.py").read_text(encoding="utf-8")
    tree = ast.parse(text)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert len(text.splitlines()) <= 300
    assert max((node.end_lineno or 0) - node.lineno + 1 for node in functions) <= 60
    inner = [
        inside.name for node in functions for inside in ast.walk(node) if inside is not node and inside in functions
    ]
    assert not inner, "no function inside another"
    assert len(imports(PACKAGE / "grpo.py")) <= 12


def test_a_render_worker_imports_no_torch() -> None:
    code = "import sys, smart.render; print([m for m in ('torch', 'transformers', 'symusic') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_importing_the_programs_opens_no_connection() -> None:
    code = """
import socket, sys
def refuse(*args, **kwargs): raise AssertionError(f"network at import: {args}")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import smart.__main__, smart.grpo, smart.pretrain, smart.generate, smart.corpus.build, smart.demo.build, smart.doctor
import smart.evaluate.report, smart.evaluate.rate, smart.evaluate.soundfonts, smart.evaluate.hacks
import smart.evaluate.frontier
import smart.reward.audiobox, smart.reward.calibrate, smart.reward.naturalness.program
import smart.push, smart.card, smart.model_card
import smart.watch.serve
import smart.study.build, smart.study.serve, smart.study.app, smart.study.analyse, smart.study.power
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_every_program_is_a_subcommand_and_is_imported_only_when_asked_for() -> None:
    from click.testing import CliRunner

    from smart.__main__ import PROGRAMS as SUBCOMMANDS
    from smart.__main__ import main

    assert set(SUBCOMMANDS) == {name.removesuffix(".command").rpartition(".")[2] for name in PROGRAMS}
    for name in SUBCOMMANDS:
        result = CliRunner().invoke(main, [name, "--help"])
        assert result.exit_code == 0 and "Usage:" in result.output, result.output
    shown = CliRunner().invoke(main, ["--help"]).output
    assert all(f"  {name} " in shown for name in SUBCOMMANDS)


def test_help_and_misspelt_keys_are_answered_without_what_is_slow_to_import() -> None:
    """Every program's and command's help, and mistakes on the command line, one after another in one process."""
    code = """
import runpy, sys
import click
from smart.__main__ import PROGRAMS, main

def answer(*words):
    try:
        main(words, prog_name="smart", standalone_mode=False)
    except click.ClickException as error:
        print(error.format_message())

for name in PROGRAMS:
    answer(name, "--help")
    answer(name, "--no-such-option")
    for command in getattr(main.get_command(click.Context(main), name), "commands", ()):
        answer(name, command, "--help")
answer("grpo", "--set", "grpo.betaa=1")
answer("pretrain", "--set", "data.crops=9")
answer("reproduce", "--set", "grpo.betaa=2", "--out", "nowhere")
for name in (*PROGRAMS, "reward.calibrate", "reward.naturalness"):
    sys.argv[1:] = ["--help"]
    found = "smart" if name in ("calibrate", "naturalness") else f"smart.{name}"
    try:
        runpy.run_module(found, run_name="__main__", alter_sys=True)
    except SystemExit as error:
        assert not error.code
slow = "torch transformers miditok symusic pyarrow matplotlib scipy pandas sqlalchemy jinja2"
print("slow:", [name for name in slow.split() if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("slow: []\n"), done.stdout
    for key in ("grpo.betaa = 1; did you mean grpo.beta", "data.crops = 9; did you mean data.crop", "grpo.betaa = 2"):
        assert f"unknown key {key}" in done.stdout
    for program in ("smart grpo", "smart evaluate rate", "python -m smart.grpo", "python -m smart.reward.calibrate"):
        assert f"Usage: {program} [OPTIONS]" in done.stdout


def test_a_package_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from click.testing import CliRunner

    from smart.__main__ import main

    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.delitem(sys.modules, "smart.evaluate.rate", raising=False)
    result = CliRunner().invoke(main, ["evaluate", "rate", "a.wav"])
    assert result.exit_code == 2 and "rate needs the package scipy, which is missing" in result.output


@pytest.mark.parametrize("arguments", [["-m", "smart"], ["-m", "smart.grpo"], ["-c", "import smart"]])
def test_without_any_dependency_one_line_says_so(arguments: list[str]) -> None:
    """Python without its site-packages, as after installing a wheel alone."""
    path = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run([sys.executable, "-S", *arguments], capture_output=True, text=True, env=path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "docs/install.md" in done.stderr or " -m pip install " in done.stderr  # where a wheel left its metadata


def test_a_wheel_without_its_dependencies_names_the_command_that_installs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from smart import packages

    wanted = ["torch>=2.6", "mido", "absent>=1", "more-absent[all]>=2", 'scipy; extra == "evaluate"']
    monkeypatch.setattr(packages, "requires", lambda name: wanted)
    assert packages.lacking() == f"{sys.executable} -m pip install 'absent>=1' 'more-absent[all]>=2'"


@pytest.mark.parametrize("package", ["numpy", "safetensors", "tinysoundfont"])
def test_a_missing_package_is_one_line_of_every_program(package: str, tmp_path: Path) -> None:
    """Started as a user starts them: a program that is a folder is imported before its ``__main__``."""
    (tmp_path / f"{package}.py").write_text(f"raise ModuleNotFoundError('No module named {package}', name='{package}')")
    from smart.__main__ import PROGRAMS as listed

    path = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{PACKAGE.parent}"}
    for name in listed:
        module = "smart.reward.naturalness" if name == "naturalness" else f"smart.{name}"
        module = "smart.reward.calibrate" if name == "calibrate" else module
        done = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, env=path)
        assert "Traceback" not in done.stderr, f"{name}: {done.stderr}"
        assert done.returncode == 0 or (done.returncode == 2 and package in done.stderr), (name, done.stderr)


@pytest.mark.parametrize("name", ["grpo", "generate", "evaluate"])
def test_without_the_renderer_every_program_names_the_command_that_installs_it(name: str) -> None:
    code = f"""
import sys
sys.modules["tinysoundfont"] = None
sys.argv = ["python -m smart.{name}", *{["rate", "a.wav"] if name == "evaluate" else []}]
from smart.__main__ import start
start({name!r})
"""
    group = code.replace(f'smart.{name}"', f'smart", {name!r}').replace(f"start({name!r})", "main()")
    group = group.replace("import start", "import main")
    for each in (code, group):
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", each], capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (2, ""), done.stderr
        assert done.stderr.endswith("which is missing: pip install --no-deps tinysoundfont\n")
        assert "None" not in done.stderr


def test_nothing_that_is_hard_to_install_is_required() -> None:
    """tinysoundfont and audiobox_aesthetics, which drag in pyaudio and torchaudio, stand in extras of their own."""
    settings = configparser.ConfigParser()
    settings.read(PACKAGE.parent / "setup.cfg")
    extras = settings["options.extras_require"]
    apart = {"sound": "tinysoundfont", "audiobox": "audiobox_aesthetics"}
    lists = [settings["options"]["install_requires"], *(extras[name] for name in extras if name not in apart)]
    assert all(package not in wanted for wanted in lists for package in apart.values())
    assert all(extras[name].strip().startswith(package) for name, package in apart.items())


def test_a_plain_checkout_needs_no_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found on PYTHONPATH, without an installation, the programs that record the version finish all the same."""
    import importlib.metadata
    import json

    import miditok  # noqa: F401  # it asks for its own version when it is imported
    from click.testing import CliRunner
    from symusic import Note, Score, Tempo, TimeSignature, Track

    from smart.__main__ import main

    installed = importlib.metadata.distribution

    def distribution(name: str) -> importlib.metadata.Distribution:
        if name in ("smart", "miditok"):
            raise importlib.metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr("importlib.metadata.distribution", distribution)
    score = Score(480)
    score.tempos.append(Tempo(0, qpm=120.0))
    score.time_signatures.append(TimeSignature(0, 4, 4))
    score.tracks.append(Track(program=0))
    score.tracks[0].notes.extend(Note(480 * beat, 480, 60 + beat, 80) for beat in range(16))
    (tmp_path / "midi").mkdir()
    score.dump_midi(tmp_path / "midi" / "scale.mid")
    corpus, table = tmp_path / "corpus", tmp_path / "pieces.parquet"
    for words in (
        ["--version"],
        ["corpus", "build", "--midi", tmp_path / "midi", "--out", corpus, "--workers", "1"],
        ["evaluate", "sample", "piano-small", "--out", table, "--n", "1", "--tokens", "8", "--workers", "1"],
    ):
        result = CliRunner().invoke(main, list(map(str, words)), catch_exceptions=False)
        assert result.exit_code == 0, result.output
    versions = json.loads((corpus / "manifest.json").read_text(encoding="utf-8"))["versions"]
    assert versions["smart"] == smart.__version__ and versions["miditok"] is None
    assert table.is_file()
