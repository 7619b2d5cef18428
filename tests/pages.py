"""The documentation's commands, as a reader would give them, at a size that a test can afford."""

import os
import random
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import programs
import pytest
import soundfile

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))

if not README.is_file():
    pytest.skip("the documentation is not part of an installed package", allow_module_level=True)

# a whole run in seconds: the arguments added to those on the page
SHORT = {
    "smart.grpo": {
        "grpo.iterations": 2, "grpo.prompts": 3, "grpo.group_size": 2, "sampling.max_new_tokens": 64,
        "render.workers": 1, "render.seconds": 4.0, "track.final_prompts": 2, "track.checkpoint_every": 1,
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
    "smart.doctor": "--set run.name=another",  # the quickstart was run with other settings than the page's: SHORT
    "smart.generate": "--tokens 24",
    "smart.demo": "--prompts 2 --tokens 24 --seconds 2 --sample-rate 22050",
    "smart.evaluate rerate": "--samples 2 --workers 1",
    "smart.evaluate frontier": "-n 4 --best-of 2 --checkpoints 2",
    "smart.evaluate sample": "-n 4 --tokens 24 --seconds 2 --workers 1",
    "smart.reproduce": "--list",
    "smart.reward.naturalness train": "--excerpts 8 --corruptions 1 --held-out 8 --members 1 --steps 2 --batch 2",
    "smart.reward.naturalness test": "--excerpts 2 --kind loop",
    "smart.study build": "--prompts 2 --repeats 1 --tokens 24 --seconds 2 --workers 1 --power 5",
    "mypy": "--version",  # its settings are in the repository's root
    "benchmarks/reward.py": "--clips 2 --rounds 1 --dtypes bfloat16",
    "benchmarks/learner.py": "--rounds 1 --layers 2 --hidden 32 --heads 2 --intermediate 48",
    "benchmarks/sampler.py": "--repeats 1 --layers 2 --hidden 32 --heads 2 --intermediate 48",
}
FRESH = {"pytest", "smart.demo"}  # no other test starts these as a fresh process


def commands(page: Path) -> list[str]:
    """Every line of every sh block."""
    found = []
    for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S):
        found += [line for line in block.splitlines() if line and not line.startswith("#")]
    return found


def furnish(folder: Path) -> None:
    """Put into a folder what the pages' examples name: MIDI files, rated clips, and the repository's own files."""
    from symusic import Note, Score, Tempo, TimeSignature, Track

    for name in ("benchmarks", "configs", "docs", "tests"):
        (folder / name).symlink_to(ROOT / name)
    reward = re.search(
        r'```python\n("""A reward for bright.*?)```', (ROOT / "docs/rewards.md").read_text("utf-8"), re.S
    )
    assert reward is not None
    (folder / "brightness.py").write_text(reward[1], encoding="utf-8")
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
    pairs = [f"{high}.wav,{low}.wav" for high in range(10) for low in range(high)]
    (folder / "my-pairs.csv").write_text("\n".join(["better,worse", *pairs]))
    rows = ["participant,excerpt,system,prompt,rating"]
    for person in range(4):
        for number in range(12):
            excerpt = f"{number},{('base', 'tuned')[number % 2]},{number // 2}"
            rows.append(f"p{person},{excerpt},{3 + person + number % 2 + random_.integers(3)}")
    (folder / "my-ratings.csv").write_text("\n".join(rows))


def give(command: str, folder: Path) -> None:
    """Give a page's command in a reader's folder."""
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hub"), "HOME": str(folder)}
    env |= {"SMART_SOUNDFONTS": ""}
    installs = re.match(r"sh install\.sh( test)? && ", command)
    words = shlex.split(command[installs.end() :] if installs else command)
    assert words[0] in (".venv/bin/python",), f"{command}: a command that this test does not know"
    words[0] = sys.executable
    program = words[-words[::-1].index("-m")] if "-m" in words else words[1]  # what torchrun runs, where it does
    if program == "pytest":
        words = [*words[: words.index(program) + 1], "--collect-only", "tests/test_config.py"]
    for key, value in SHORT.get(program, {}).items():
        words += ["--set", f"{key}={value}"]
    place_of = words.index(program)
    for named in (program, " ".join(words[place_of : place_of + 2])):  # a program, or one of its commands
        words += SMALL.get(named, "").split()
    if "--resume" in words:  # its own configuration is the short one already
        words = words[: words.index("--resume") + 1]
    before = set(os.listdir(folder))
    done = programs.run(words, fresh=program in FRESH, cwd=folder, env=env)
    assert "Traceback" not in done.stderr, f"{command}\n{done.stderr}"
    if "paper.toml" in words:
        assert done.returncode == 2 and "are missing" in done.stderr, f"{command}\n{done.stderr}"
    else:
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    left = set(os.listdir(folder)) - before - {word.rpartition("=")[2] for word in words} - {"runs"}
    assert not left, f"{command}\nleaves {left}, which it does not name"
