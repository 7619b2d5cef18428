"""smart.push, smart.card and ``model.base``: a run goes to a hub on this machine, and comes back."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hub_server
import programs
import pytest
import soundfile
from click.testing import CliRunner, Result
from hub_server import READER, TOKEN, Hub

from smart.files import sha256
from smart.model_card import write_card
from smart.push import main

METRICS = [
    {"step": 0, "held_out/reward": 6.9, "held_out/judge": -1.8, "held_out/kl": -1e-9, "held_out/vendi": 29.5},
    {"step": 10, "reward/mean": 7.4, "held_out/reward": 7.5, "held_out/judge": -2.0, "held_out/kl": 0.1},
    {"step": 20, "reward/mean": 7.6, "held_out/reward": 7.6, "held_out/judge": -2.1, "held_out/kl": 0.2,
     "held_out/vendi": 29.1},
]  # fmt: skip


@pytest.fixture
def tuned(tmp_path: Path, base: Path) -> Path:
    """The folder of a finished run, as far as a card reads it."""
    from smart.config import dumps, load

    run = tmp_path / "secret" / "waltz"
    run.mkdir(parents=True)
    words = [f"model.base={base}", "run.seed=7", "grpo.iterations=20", f"run.folder={run.parent}", "rewards=[]"]
    (run / "config.toml").write_text(dumps(load("quickstart.toml", words)))
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in METRICS))
    rewards = {
        name: {"n": 64, "reward": 7.0 + place, "standard_error": 0.05} for place, name in enumerate(("base", "tuned"))
    }
    rewards["difference"] = {"reward": 1.0, "standard_error": 0.07}
    (run / "summary.json").write_text(json.dumps(rewards))
    (run / "log.txt").write_text(
        f"run {run}: base {base} on cpu, 0 of 20 iterations done\n"
        "soundfont: TimGM6mb.sf2, SHA-256 82475b91a76de15cb28a104707d3247ba932e228bada3f47bba63c6b31aaf7a1\n"
        "reward: Audiobox Aesthetics, /home/me/secret/checkpoint.pt (https://dl.fbaipublicfiles.com/x.pt), float32\n"
        "held-out score: plausibility (mean log-probability per token under the base model)\n"
    )
    shutil.copytree(base, run / "tuned")
    (run / "final").mkdir()
    for prompt in range(3):
        for name in ("base", "tuned"):
            soundfile.write(run / "final" / f"{prompt:02d}-{name}.wav", [[0.1 * prompt, 0.1 * len(name)]] * 800, 8000)
    (run / "reward_mean.png").write_bytes(b"\x89PNG")
    return run


# --- The card -------------------------------------------------------------------------------------------------------


def test_the_card_says_what_the_run_recorded(tuned: Path, base: Path) -> None:
    card = write_card(str(tuned))
    for fact in (
        "# waltz",
        f"| SHA-256 of the weights | {sha256(base / 'model.safetensors')} |",
        "| reward | Audiobox Aesthetics, checkpoint.pt (https://dl.fbaipublicfiles.com/x.pt), float32 |",
        "| licence of the reward | ce_proxy: MIT, as part of smart |",
        "| soundfont | TimGM6mb.sf2, SHA-256 82475b91",
        "20 iterations of 8 prompts x 8 completions",
        "7 for training",
        "| 7.000 ± 0.050 | 8.000 ± 0.050 | 1.000 ± 0.070 |",
        "| held-out score (judge) | -1.800 | -2.100 |",
        "| KL to the base, nats per token | 0.000 | 0.200 |",
        "which training does not optimise, is plausibility",
        "![Mean reward of each iteration's completions](reward_mean.png)",
    ):
        assert fact in card.text, fact
    assert "secret" not in card.text and str(tuned.parent) not in card.text, "the folders of a machine are private"
    assert [name for name in card.files if name.endswith(".flac")] == [
        "samples/00-base.flac", "samples/00-tuned.flac", "samples/01-base.flac", "samples/01-tuned.flac",
    ]  # fmt: skip
    assert write_card(str(tuned)).files == card.files, "a repeated push sends the same bytes"
    assert write_card(str(tuned / "tuned")).text == card.text, "the folder in the run stands for the run"


def test_weights_of_the_users_own_have_no_licence_of_smart(tuned: Path) -> None:
    from smart.config import dumps, load

    words = ["rewards=[]", "reward.kind=naturalness", "run.folder=x"]
    (tuned / "config.toml").write_text(dumps(load("quickstart.toml", words)))
    assert "naturalness: MIT, as part of smart; trained on POP909" in write_card(str(tuned)).text
    words += ["reward.options.model=mine.safetensors"]
    (tuned / "config.toml").write_text(dumps(load("quickstart.toml", words)))
    text = write_card(str(tuned)).text
    assert "naturalness: not part of smart" in text and "POP909 and" not in text


def test_what_was_not_recorded_is_not_claimed(tuned: Path) -> None:
    for name in ("summary.json", "log.txt", "reward_mean.png"):
        (tuned / name).unlink()
    shutil.rmtree(tuned / "final")
    (tuned / "metrics.jsonl").write_text(json.dumps(METRICS[1]) + "\n")
    card = write_card(str(tuned))
    assert "timgm (hash not recorded)" in card.text and not card.files
    assert "standard error" not in card.text and "held-out score" not in card.text and "Listen" not in card.text


def test_a_run_that_stopped_early_says_which_iteration(tuned: Path) -> None:
    with open(tuned / "log.txt", "a") as log:
        log.write("stopped early: KL; tuned/ is iteration 10, the best by the held-out score\n")
    text = write_card(str(tuned)).text
    assert "10 iterations of 8 prompts" in text and "after iteration 10" in text
    assert "| held-out score (judge) | -1.800 | -2.000 |" in text


def test_the_frontiers_advice(tuned: Path, tmp_path: Path) -> None:
    from smart import UserError

    advice = {"runs": {"waltz (beta 0.04)": {"keep": 10, "collapsed": [{"step": 20, "why": "x"}]}}}
    (tmp_path / "summary.json").write_text(json.dumps(advice))
    text = write_card(str(tuned), frontier=tmp_path).text
    assert "advises: keep iteration 10; 1 checkpoints had collapsed. This model is iteration 20." in text
    (tmp_path / "summary.json").write_text('{"runs": {"tango (beta 0.04)": {}}}')
    with pytest.raises(UserError, match="has no advice about the run waltz"):
        write_card(str(tuned), frontier=tmp_path)


def test_a_base_has_its_own_card_or_the_facts(base: Path) -> None:
    shipped = write_card("piano-small")
    assert shipped.text.startswith("# piano-small") and list(shipped.files) == ["loss.png"]
    assert "Phi-3, 2 layers x 32" in write_card(str(base)).text


def test_the_card_of_a_pretraining(tmp_path: Path, base: Path) -> None:
    from smart.config import PretrainConfig, dumps, load

    run = tmp_path / "learnt"
    run.mkdir()
    corpus = tmp_path / "secret" / "songs"
    corpus.mkdir(parents=True)
    (corpus / "manifest.json").write_text('{"pieces": {"train": 36, "test": 4}, "tokens": {"train": 5000, "test": 10}}')
    config = load("base.toml", [f"data.corpus={corpus}"], schema=PretrainConfig)
    (run / "config.toml").write_text(dumps(config))
    rows = [{"step": step, "loss": 3.0, "validation_loss": loss} for step, loss in ((1, 2.5), (2, 2.0), (3, 2.25))]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copytree(base, run / "base")
    text = write_card(str(run)).text
    assert "| data | corpus songs: 36 pieces for train, 4 pieces for test; 5,010 tokens |" in text
    assert "2.000 nats per token (perplexity 7.39), at step 2" in text and "| started from | random weights |" in text
    assert "secret" not in text


def test_records_that_are_damaged_are_one_line(tuned: Path) -> None:
    from smart import card

    (tuned / "config.toml").write_text("[grpo]\niterations = 20\n")
    result = CliRunner().invoke(card.main, [str(tuned)])
    assert result.exit_code == 2 and "its records are not those of a run" in result.output, result.output


# --- The hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub() -> Iterator[Hub]:
    with hub_server.serve() as server:
        yield server


@pytest.fixture
def here(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process's client asks that hub, with its token."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def environment(hub: Hub, folder: Path) -> dict[str, str]:
    """The same for a process."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
    return kept | own | {"NO_PROXY": "127.0.0.1"}


def push(*words: Any) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def one_line(result: Result, code: int) -> str:
    """The line that a push ended with."""
    assert result.exit_code == code, result.output
    assert result.output.startswith("Error: ") and result.output.count("\n") == 1, result.output
    return result.output


@pytest.mark.slow
def test_a_run_goes_to_the_hub_and_comes_back(hub: Hub, tuned: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "smart.push", str(tuned), "me/waltz", "--private"]
    env = environment(hub, tmp_path)
    done = programs.run(command, fresh=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "9 files" in done.stdout and "private" in done.stdout and "--set model.base=me/waltz" in done.stdout
    model = hub.models["me/waltz"]
    assert model.private and model.commits == 1, "one commit: all of it, or nothing"
    assert set(model.files) - {".gitattributes"} == {
        "config.json", "model.safetensors", "tokenizer.json", "README.md", "reward_mean.png",
        *(f"samples/0{prompt}-{name}.flac" for prompt in (0, 1) for name in ("base", "tuned")),
    }  # fmt: skip
    card = model.files["README.md"].decode()
    assert "smart generate --model me/waltz" in card
    assert 'src="https://huggingface.co/me/waltz/resolve/main/samples/00-tuned.flac"' in card

    code = """
from pathlib import Path
from smart.model import find_base, load_base
folder = find_base("me/waltz")
model, tokenizer = load_base(folder)
print(folder, model.config.vocab_size)
"""
    back = programs.run([sys.executable, "-c", code], fresh=True, env=env, cwd=tmp_path, check=True)
    folder = Path(back.stdout.split()[0])
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (folder / name).read_bytes() == (tuned / "tuned" / name).read_bytes()

    again = programs.run(command, fresh=True, env=env, cwd=tmp_path)
    assert again.returncode == 0 and model.commits == 1, "nothing changed, so there is no second commit"


@pytest.mark.usefixtures("here")
def test_a_wrong_token(hub: Hub, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "write access to somebody's models" in one_line(push(base, "somebody/waltz"), 2)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    refused = one_line(push(base, "me/waltz"), 2)
    assert "me/waltz: the hub does not accept your token: run `hf auth login`, or set HF_TOKEN" in refused
    monkeypatch.setenv("HF_TOKEN", READER)
    assert "your token may not write there" in one_line(push(base, "me/waltz"), 2)
    monkeypatch.delenv("HF_TOKEN")
    assert "asks for a token" in one_line(push(base, "me/waltz"), 2)
    assert not hub.models and not hub.stored


@pytest.mark.usefixtures("here")
def test_a_name_that_is_taken(hub: Hub, base: Path) -> None:
    hub.models["me/waltz"] = other = hub_server.Model(private=False)
    other.files["model.safetensors"] = b"another"
    assert "me/waltz is taken: it holds other files" in one_line(push(base, "me/waltz"), 2)
    assert "exists and is public" in one_line(push(base, "me/waltz", "--private"), 2)
    assert other.files["model.safetensors"] == b"another" and not hub.stored
    done = push(base, "me/waltz", "--update")
    assert done.exit_code == 0, done.output
    assert other.files["model.safetensors"] == (base / "model.safetensors").read_bytes()


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("name", ["waltz", "me/a/b", "me/wal--tz", "me/waltz.git"])
def test_a_name_that_cannot_be(hub: Hub, base: Path, name: str) -> None:
    assert name in one_line(push(base, name), 2)
    assert not hub.models


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("where", ["POST /api/repos/create", "POST /api/models/me/waltz/commit/main"])
def test_a_push_that_fails_can_be_repeated(hub: Hub, tuned: Path, where: str) -> None:
    before = {path: path.read_bytes() for path in tuned.rglob("*") if path.is_file()}
    hub.fail = lambda request: 400 if request == where else None
    failed = one_line(push(tuned, "me/waltz"), 1)
    assert "the upload to me/waltz failed" in failed and "repeat the command" in failed
    assert not hub.models or set(hub.models["me/waltz"].files) == {".gitattributes"}, "no half of a model"
    assert before == {path: path.read_bytes() for path in tuned.rglob("*") if path.is_file()}
    hub.fail = lambda request: None
    sent = len(hub.stored)
    hub.asked.clear()
    assert push(tuned, "me/waltz").exit_code == 0
    assert len(hub.models["me/waltz"].files) == 10
    assert sum(request.startswith("PUT") for request in hub.asked) == len(hub.stored) - sent, "only what is missing"


@pytest.mark.slow
def test_an_interrupted_push_can_be_repeated(hub: Hub, tuned: Path, tmp_path: Path) -> None:
    reached, go_on = threading.Event(), threading.Event()

    def hang(request: str) -> int | None:
        if request.endswith("/commit/main"):
            reached.set()
            go_on.wait(60)
            return 0
        return None

    hub.fail = hang
    command = [sys.executable, "-m", "smart.push", str(tuned), "me/waltz"]
    env = environment(hub, tmp_path)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with programs.start(command, fresh=True, env=env, cwd=tmp_path, **pipes) as process:
        assert reached.wait(120)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    go_on.set()
    assert process.returncode == 1 and "interrupted; nothing was changed here; repeat the command" in errors, errors
    assert set(hub.models["me/waltz"].files) == {".gitattributes"}
    hub.fail = lambda request: None
    hub.asked.clear()
    programs.run(command, fresh=True, env=env, cwd=tmp_path, check=True)
    assert len(hub.models["me/waltz"].files) == 10 and not [one for one in hub.asked if one.startswith("PUT")]


@pytest.mark.usefixtures("here")
def test_a_hub_that_cannot_be_reached(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the discard port: refused
    assert "the upload to me/waltz failed" in one_line(push(base, "me/waltz"), 1)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in one_line(push(base, "me/waltz"), 2)
