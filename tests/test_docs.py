"""The documentation's commands, run from top to bottom as a reader would, at a size that a test can afford."""

import os
import random
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from test_runs import HELD_OUT

from smart.config import shipped

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

if not (ROOT / "README.md").is_file():
    pytest.skip("the documentation is not part of an installed package", allow_module_level=True)

# a whole run in seconds: what each program is given beside what the page says
SHORT = {
    "smart.grpo": {
        "grpo.iterations": 2, "grpo.prompts": 2, "grpo.group_size": 2, "sampling.max_new_tokens": 24,
        "render.workers": 1, "render.seconds": 2.0, "track.final_prompts": 2, "track.checkpoint_every": 1,
    },
    "benchmarks/iteration.py": {
        "grpo.group_size": 2, "sampling.max_new_tokens": 24, "render.workers": 1, "render.seconds": 2.0,
    },
    "smart.pretrain": {
        "architecture.hidden": 24, "architecture.heads": 2, "architecture.layers": 1, "optimisation.steps": 2,
        "optimisation.batch": 2, "optimisation.evaluate_every": 1, "optimisation.evaluate_rows": 2,
        "optimisation.samples": 2, "data.crop": 32,
    },
}  # fmt: skip
SMALL = {
    "smart.generate": "--tokens 24",
    "smart.demo": "--prompts 2 --tokens 24 --seconds 2 --sample-rate 22050",
    "smart.evaluate frontier": "-n 4 --best-of 2 --checkpoints 2",
    "smart.evaluate sample": "-n 4 --tokens 24 --seconds 2 --workers 1",
    "smart.reproduce": "--list",
    "smart.study build": "--prompts 2 --repeats 1 --tokens 24 --seconds 2 --workers 1 --power 5",
    "mypy": "--version",  # its settings are in the repository's root
    "benchmarks/reward.py": "--clips 2 --rounds 1 --dtypes bfloat16",
    "benchmarks/sampler.py": "--repeats 1",
}


def commands() -> list[str]:
    """Every line of every sh block, in the order of the pages."""
    found = []
    for page in PAGES:
        for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S):
            found += [line for line in block.splitlines() if line and not line.startswith("#")]
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the pages' examples name: MIDI files, rated clips, and the repository's own files."""
    from symusic import Note, Score, Tempo, TimeSignature, Track

    folder = tmp_path_factory.mktemp("reader")
    for name in ("benchmarks", "configs", "docs", "tests"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "my-midi").mkdir()
    for piece in range(40):
        draw = random.Random(piece)
        score = Score(480)
        score.tempos.append(Tempo(0, 100))
        score.time_signatures.append(TimeSignature(0, 4, 4))
        track = Track(program=0)
        for beat in range(24):
            track.notes.append(Note(480 * beat, 480, draw.randint(40, 80), draw.randint(30, 120)))
        score.tracks.append(track)
        score.dump_midi(folder / "my-midi" / f"{piece}.mid")
    (folder / "my-clips").mkdir()
    rows = ["clip,CE"]
    random_ = np.random.default_rng(0)
    time = np.arange(5 * 16000) / 16000
    for clip in range(10):
        pitches = 220 * 2 ** (random_.integers(0, 24, 2 + clip) / 12)
        notes = [np.sin(2 * np.pi * pitch * time) * ((time * 4 + index) % 3 < 1) for index, pitch in enumerate(pitches)]
        soundfile.write(folder / "my-clips" / f"{clip}.wav", 0.1 * np.sum(notes, axis=0), 16000)
        rows.append(f"{clip}.wav,{3 + 0.5 * clip}")
    (folder / "my-scores.csv").write_text("\n".join(rows))
    rows = ["participant,excerpt,system,prompt,rating"]
    for person in range(4):
        for number in range(12):
            excerpt = f"{number},{('base', 'tuned')[number % 2]},{number // 2}"
            rows.append(f"p{person},{excerpt},{3 + person + number % 2 + random_.integers(3)}")
    (folder / "my-ratings.csv").write_text("\n".join(rows))
    return folder


def test_every_command_works_in_the_order_of_the_pages(place: Path) -> None:
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(place / "hub")}
    env |= {"HOME": str(place), "SMART_SOUNDFONTS": ""}
    ran = 0
    for command in commands():
        installs = re.match(r"sh install\.sh( test)? && ", command)
        words = shlex.split(command[installs.end() :] if installs else command)
        assert words[0] in (".venv/bin/python",), f"{command}: a command that this test does not know"
        words[0] = sys.executable
        program = words[words.index("-m") + 1] if "-m" in words else words[1]
        if program == "torch.distributed.run":  # what it runs
            program = words[-words[::-1].index("-m")]
        if program == "pytest":
            words += ["--collect-only", "tests/test_config.py"]
        for key, value in SHORT.get(program, {}).items():
            words += ["--set", f"{key}={value}"]
        place_of = words.index(program)
        for named in (program, " ".join(words[place_of : place_of + 2])):  # a program, or one of its commands
            words += SMALL.get(named, "").split()
        if "--resume" in words:  # its own configuration is the short one already
            words = words[: words.index("--resume") + 1]
        done = subprocess.run(words, cwd=place, env=env, capture_output=True, text=True, timeout=300)
        assert "Traceback" not in done.stderr, f"{command}\n{done.stderr}"
        if "paper.toml" in words:
            assert done.returncode == 2 and "are missing" in done.stderr, f"{command}\n{done.stderr}"
        else:
            assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        ran += 1
    assert ran >= 10
    subprocess.run(["sh", "-n", str(ROOT / "install.sh")], check=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_of_the_pages_runs(page: Path, tmp_path: Path) -> None:
    """The README's snippets as they stand; docs/rewards.md has tests of its own."""
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    if page.name == "rewards.md":
        assert blocks
        return
    for block in blocks:
        subprocess.run([sys.executable, "-c", block], check=True, cwd=tmp_path, timeout=120)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_names_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (page.parent / target).exists(), target
    for name in re.findall(r"`(?:configs/)?([\w-]+\.toml)`", text):
        assert name in {*shipped(), "config.toml", "pyproject.toml"}, name


def test_every_logged_metric_is_defined() -> None:
    """docs/metrics.md names each metric that the code logs."""
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    logged = set()
    for name in ("grpo.py", "guard.py", "scoring.py", "pretrain.py"):
        code = (ROOT / "smart" / name).read_text(encoding="utf-8")
        logged |= set(re.findall(r'"((?:reward|completions|clips|seconds|policy|render|samples)/[a-z_]+)"', code))
    logged |= {"loss", "validation_loss", "validation_perplexity", "gradient_norm", "tokens", "tokens_per_second"}
    logged |= {f"policy/{key}" for key in ("kl", "ratio", "clip_fraction", "dlogp_max", "loss", "entropy", "grad_norm")}
    logged |= HELD_OUT
    assert len(logged) > 15
    assert not {metric for metric in logged if f"`{metric}`" not in page}
