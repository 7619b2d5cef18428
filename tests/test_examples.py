"""Run every example, shortened, with only what the package ships."""

import sys
from pathlib import Path

import programs

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_a_reward_of_my_own_tunes_the_shipped_base_and_a_pair_is_drawn(tmp_path: Path) -> None:
    script = EXAMPLES / "reward_of_my_own.py"
    assert len(script.read_text(encoding="utf-8").splitlines()) <= 40
    small = ["grpo.iterations=1", "grpo.prompts=2", "grpo.group_size=2", "sampling.max_new_tokens=48"]
    small += ["track.final_prompts=2", "render.workers=1"]
    done = programs.run([sys.executable, script, *small], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "brightness"
    assert "reward: Brightness" in (run / "log.txt").read_text()
    assert 'kind = "Brightness"' in (run / "config.toml").read_text(), "a resumed run must not use a different reward"
    assert (run / "tuned" / "model.safetensors").is_file() and (run / "final" / "00-tuned.wav").is_file()
    picture = tmp_path / "rolls.png"
    done = programs.run([sys.executable, EXAMPLES / "piano_rolls.py", run, picture], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000
