"""``smart grpo --reward FILE.py:CLASS``: a reward in a file that the user names, and only the user."""

from pathlib import Path
from typing import Any

import pytest
from runs import arguments, run

from smart import UserError
from smart.config import load
from smart.files import sha256
from smart.reward import file, load_reward

CODE = """
from smart.reward import Reward

class Loud(Reward):
    axes = ("LOUD",)
    sample_rate = 16000

    def __init__(self, *, top: float = 1.0, device: str = "cpu") -> None:
        super().__init__(device=device)
        self.top = top

    def rate(self, audio, lengths):
        return {"LOUD": 1 + 9 * audio.abs().amax(dim=1) / self.top}

class Quiet(Loud):
    pass

class Nothing:
    pass
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(file, "_named", {})
    (tmp_path / "mine").mkdir()
    path = tmp_path / "mine" / "my.py"
    path.write_text(CODE)
    return path


def test_a_class_is_found_only_in_a_file_that_was_named(mine: Path) -> None:
    with pytest.raises(UserError, match=r'reward "my.py:Loud" is a class in a file: name that file with .* --reward'):
        load_reward("my.py:Loud")
    assert file.name_file(f"{mine}:Loud") == "my.py:Loud"
    reward: Any = load_reward("my.py:Loud", top=2.0)
    assert (reward.name, reward.top) == ("my.py:Loud", 2.0)
    assert reward.provenance == f"my.py:Loud, SHA-256 {sha256(mine)}"
    assert file.named_files() == ["--reward", f"{mine}:Loud"]
    with pytest.raises(UserError, match='has no option "bottom"; its options are: top'):
        load_reward("my.py:Loud", bottom=1.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ce_proxy", "expected FILE.py:CLASS"),
        ("{mine}", "expected FILE.py:CLASS"),
        ("{mine}:not a name", "expected FILE.py:CLASS"),
        ("elsewhere/my.py:Loud", "there is no file elsewhere/my.py"),
        ("{mine}:Nothing", "Nothing is no subclass of smart.reward.Reward; those of the file: Loud, Quiet"),
        ("{mine}:Missing", "Missing is no subclass"),
        ("{broken}:Loud", "could not be imported .SyntaxError"),
    ],
)
def test_mistakes_are_named(mine: Path, text: str, message: str) -> None:
    broken = mine.parent / "broken.py"
    broken.write_text("class Loud(")
    with pytest.raises(UserError, match=message):
        load_reward(file.name_file(text.format(mine=mine, broken=broken)))


@pytest.mark.slow
def test_a_run_records_its_reward_and_is_resumed_only_with_it(mine: Path, base: Path) -> None:
    folder = mine.parent.parent
    common = arguments(base, folder, **{"grpo.iterations": 1, "track.held_out_every": 0, "reward.options.top": 2.0})
    status, output = run("grpo", "--config", "paper.toml", "--reward", f"{mine}:Loud", *common,
                         "--set", "render.soundfont=timgm", "--set", "reward.dtype=x")  # fmt: skip
    assert status == 2 and "unknown key reward.dtype" in output
    sound = ["--set", "render.soundfont=timgm", "--set", "render.sample_rate=22050"]
    status, output = run("grpo", "--config", "paper.toml", "--reward", f"{mine}:Loud", *common, *sound)
    assert status == 0, output
    assert f"reward: my.py:Loud, SHA-256 {sha256(mine)}" in output
    assert f"-m smart.demo --runs base={folder / 'r'}@base tuned={folder / 'r'} --out" in output
    config = load(folder / "r" / "config.toml")
    assert (config.reward.kind, config.reward.options) == ("my.py:Loud", {"top": 2.0})
    again = ["--config", str(folder / "r" / "config.toml"), "--resume"]
    status, output = run("grpo", *again)
    assert status == 2 and "name that file with smart grpo --reward" in output
    status, output = run("grpo", *again, "--reward", f"{mine}:Quiet")
    assert status == 2 and "reward.kind was 'my.py:Loud' and is 'my.py:Quiet'" in output
    status, output = run("grpo", *again, "--reward", f"{mine}:Loud")
    assert status == 0 and "1 of 1 iterations done" in output, output
    status, output = run("grpo", "--reward", f"{mine}:Loud", "--set", "reward.kind=ce_proxy")
    assert status == 2 and "--set chooses another reward" in output
