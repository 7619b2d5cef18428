"""``--resume``: which run it finds, and what happens if the files that a run was made of have changed."""

import json
import shutil
from pathlib import Path

import pytest
from runs import arguments, assert_same_run, run

from smart import UserError
from smart.reward.ce_proxy import SHIPPED
from smart.run import check_names, claim_folder
from smart.run.sources import SOURCES, check_sources, digest, files_in

A, B = "a" * 64, "b" * 64


def test_sources_are_kept_and_compared(tmp_path: Path) -> None:
    before = {"render.soundfont": A, "model.base": A, "reward": "one"}
    assert check_sources(tmp_path, before, accept=False, step=0) == []
    assert check_sources(tmp_path, before, accept=False, step=4) == []
    now = {"render.soundfont": B, "model.base": A, "reward": "two"}
    with pytest.raises(
        UserError, match=r"render\.soundfont has changed \(SHA-256 was aaaaaaaaaaaa\.\.\. and is bbb"
    ) as error:
        check_sources(tmp_path, now, accept=False, step=4)
    assert "reward was 'one' and is 'two'" in error.value.message and "model.base" not in error.value.message
    assert "--accept-changes" in error.value.message
    (line,) = check_sources(tmp_path, now, accept=True, step=4)
    assert line.startswith("accepted after step 4 (--accept-changes): render.soundfont has changed")
    assert check_sources(tmp_path, now, accept=False, step=6) == []
    record = json.loads((tmp_path / SOURCES).read_text())
    assert record == {"sources": now, "accepted": [{"step": 4, "before": before, "now": now}]}
    (tmp_path / SOURCES).write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        check_sources(tmp_path, now, accept=False, step=6)
    (tmp_path / SOURCES).unlink()  # a run of an older version
    (line,) = check_sources(tmp_path, now, accept=False, step=6)
    assert "was not recorded before iteration 6" in line


def test_files_among_settings_are_found_and_a_folder_has_a_digest(tmp_path: Path) -> None:
    (tmp_path / "pieces").mkdir()
    (tmp_path / "pieces" / "a").write_text("a")
    (tmp_path / "fit.json").write_text("{}")
    settings = {
        "kind": "ce_proxy",
        "options": {"coefficients": str(tmp_path / "fit.json"), "n": 3, "x": "\0", "long": "x" * 5000},
        "rewards": [{"real": str(tmp_path / "pieces")}],
    }
    found = files_in(settings, "reward.")
    assert found == {
        "reward.options.coefficients": tmp_path / "fit.json", "reward.rewards.0.real": tmp_path / "pieces",
    }  # fmt: skip
    first = digest(tmp_path / "pieces")
    (tmp_path / "pieces" / "a").rename(tmp_path / "pieces" / "b")
    assert digest(tmp_path / "pieces") != first


def test_a_claimed_folder_accepts_changed_files_and_nothing_else(tmp_path: Path) -> None:
    def settings(seed: int, sha: str) -> dict[str, object]:
        return {"seed": seed, "models": {"base": {"sha256": sha}}}

    out = tmp_path / "out"
    assert claim_folder(out, settings(1, A), accept=False) == []
    with pytest.raises(UserError, match=r"models\.base\.sha256 was 'a+' and is 'b+'.*continue with --accept-changes"):
        claim_folder(out, settings(1, B), accept=False)
    with pytest.raises(UserError, match="seed was 1 and is 2") as error:
        claim_folder(out, settings(2, B), accept=True)
    assert "--accept-changes" not in error.value.message
    (changed,) = claim_folder(out, settings(1, B), accept=True)
    assert "models.base.sha256" in changed[0]
    assert claim_folder(out, settings(1, B), accept=False) == [changed]


@pytest.mark.slow
def test_names_that_a_file_system_takes_for_one_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_names(["Base", "base"], tmp_path, "the models")  # here they are two
    monkeypatch.setattr("smart.run.folder.ignores_case", lambda _: True)
    check_names(["base", "tuned"], tmp_path, "the models")
    with pytest.raises(UserError, match=r"the models 'Base' and 'base' would share files .*; rename one"):
        check_names(["Base", "tuned", "base"], tmp_path, "the models")


def test_with_nothing_to_resume_nothing_begins(base: Path, tmp_path: Path) -> None:
    for program, words in (("grpo", arguments(base, tmp_path)), ("pretrain", ["--set", f"run.folder={tmp_path}"])):
        status, output = run(program, *words, "--resume")
        if program == "grpo":
            assert status == 2 and "nothing to resume, since it has no config.toml" in output, output
        assert status == 2 and "Traceback" not in output and not list(tmp_path.iterdir())
    status, output = run("grpo", *arguments(base, tmp_path), "--accept-changes")
    assert status == 2 and "add --resume" in output


@pytest.mark.slow
def test_a_moved_run_is_found_where_its_configuration_lies(
    base: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = shutil.copytree(finished, tmp_path / "my runs = here" / "renamed", symlinks=True)
    for newest in sorted((moved / "checkpoints").glob("0*"))[1:]:
        shutil.rmtree(newest)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    status, output = run("grpo", "--config", str(moved / "config.toml"), "--resume")
    assert status == 0, output
    assert_same_run(moved, finished)
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.slow
def test_a_run_notices_that_its_files_were_exchanged(base: Path, tmp_path: Path) -> None:
    fitted, copy = tmp_path / "fit.json", tmp_path / "base"
    shutil.copyfile(SHIPPED, fitted)
    shutil.copytree(base, copy)
    words = arguments(copy, tmp_path, **{"grpo.iterations": 2, "reward.options.coefficients": fitted})
    status, output = run("grpo", *words)
    assert status == 0, output
    before = (tmp_path / "r" / "metrics.jsonl").read_bytes()
    found = json.loads(fitted.read_text())
    found["intercept"] += 1
    fitted.write_text(json.dumps(found))
    (copy / "config.json").write_text((copy / "config.json").read_text() + "\n")
    status, output = run("grpo", *words, "--resume")
    assert status == 2 and "reward.options.coefficients has changed" in output, output
    assert "model.base/config.json has changed" in output and "soundfont" not in output
    assert (tmp_path / "r" / "metrics.jsonl").read_bytes() == before
    status, output = run("grpo", *words, "--resume", "--accept-changes")
    assert status == 0, output
    assert "accepted after step 2 (--accept-changes): model.base" in (tmp_path / "r" / "log.txt").read_text()
