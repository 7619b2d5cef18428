"""The README's commands, run from top to bottom, and what else all pages say; see test_docs_pages.py."""

import re
import subprocess
import sys
from pathlib import Path

import programs
import pytest
from pages import PAGES, README, ROOT, commands, furnish, give
from runs import HELD_OUT

from smart.config import shipped


@pytest.mark.slow
def test_every_command_of_the_readme_works_in_its_order(tmp_path: Path) -> None:
    furnish(tmp_path)
    assert len(commands(README)) >= 10
    for command in commands(README):
        give(command, tmp_path)
    subprocess.run(["sh", "-n", str(ROOT / "install.sh")], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: str(page.relative_to(ROOT)))
def test_python_of_the_pages_runs(page: Path, tmp_path: Path) -> None:
    """The README's snippets as they stand; docs/rewards.md has tests of its own."""
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    if page.name == "rewards.md":
        assert blocks
        return
    for block in blocks:
        programs.run([sys.executable, "-c", block], check=True, cwd=tmp_path, timeout=120)


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_names_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (page.parent / target).exists(), target
    for name in re.findall(r"`(?:configs/)?([\w-]+\.toml)`", text):
        assert name in {*shipped(), "config.toml", "pyproject.toml"}, name
    tests = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    for name in re.findall(r"`(?:tests/)?(?:[\w]+/)?(test_\w+\.py)`", text):
        assert name in tests, name
    for name in re.findall(r"`(smart/[\w/]+(?:\.py|/))`", text):
        assert (ROOT / name).exists(), name


def test_every_logged_metric_is_defined() -> None:
    """docs/metrics.md names each metric that the code logs."""
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    logged = set()
    for path in (ROOT / "smart").rglob("*.py"):
        code = path.read_text(encoding="utf-8")
        logged |= set(re.findall(r'"((?:reward|completions|clips|seconds|policy|render|samples)/[a-z_]+)"', code))
    logged |= {"loss", "validation_loss", "validation_perplexity", "gradient_norm", "tokens", "tokens_per_second"}
    logged |= {f"policy/{key}" for key in ("kl", "ratio", "clip_fraction", "dlogp_max", "loss", "entropy", "grad_norm")}
    logged |= HELD_OUT
    assert len(logged) > 15
    assert not {metric for metric in logged if f"`{metric}`" not in page}
