"""smart.pretrain: its parts, then whole runs, also killed, resumed and of two processes."""

import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import curve, pretrain, rewrite, run, start

from smart import UserError
from smart.config import Data, Optimisation, PretrainConfig
from smart.corpus import Corpus
from smart.distributed import World
from smart.model import build_model, load_base, save_base
from smart.pretrain import Pretraining, _compiles, evaluate, learning_rate, missing_to_compile, next_token_loss
from smart.tokens import build_grammar, build_tokenizer, vocabulary


def piece(length: int, first: int = 21) -> np.ndarray[Any, Any]:
    """Distinct, recognisable ids."""
    return (first + np.arange(length)).astype(np.uint16)


def test_a_split_without_pieces_is_a_users_mistake(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Corpus, "split", lambda self, name: [piece(9)] if name == "train" else [])
    run = Pretraining(replace(PretrainConfig(), data=Data(corpus=str(corpus))))
    run.world = World(torch.device("cpu"), rank=0, size=1)
    with pytest.raises(UserError, match=rf"corpus {corpus}: its validation split is empty; build a larger corpus"):
        run._find_parts()


def test_learning_rate_by_hand() -> None:
    settings = Optimisation(steps=1100, warmup=100, learning_rate=1e-3, final_learning_rate=1e-5)
    assert learning_rate(0, settings) == pytest.approx(1e-5)
    assert learning_rate(99, settings) == pytest.approx(1e-3)
    assert learning_rate(100, settings) == pytest.approx(1e-3)
    assert learning_rate(600, settings) == pytest.approx((1e-3 + 1e-5) / 2)
    assert learning_rate(1100, settings) == pytest.approx(1e-5)


def test_padding_is_no_target(tiny_model: Any) -> None:
    tokens = torch.randint(3, 413, (2, 9), generator=torch.Generator().manual_seed(0))
    padded = torch.cat([tokens, torch.zeros(2, 7, dtype=torch.int64)], dim=1)
    with torch.no_grad():
        loss = next_token_loss(tiny_model, tokens, 0)
        torch.testing.assert_close(next_token_loss(tiny_model, padded, 0), loss)
        logp = tiny_model(input_ids=tokens).logits[:, :-1].log_softmax(-1)
        torch.testing.assert_close(loss, -logp.gather(-1, tokens[:, 1:, None]).mean())


def test_evaluation_does_not_depend_on_the_batch(tiny_model: Any) -> None:
    tokens = torch.randint(3, 413, (5, 12), generator=torch.Generator().manual_seed(0))
    tokens[1, 4:] = 0
    tokens[4, 9:] = 0
    alone = World(torch.device("cpu"))
    whole = evaluate(tiny_model, tokens, 0, 5, alone)
    assert evaluate(tiny_model, tokens, 0, 2, alone) == pytest.approx(whole, rel=1e-5)
    with torch.no_grad():
        assert whole == pytest.approx(next_token_loss(tiny_model, tokens, 0).item(), rel=1e-5)


def test_the_grammar_penalty_is_the_probability_of_what_cannot_be_played(tiny_model: Any, tokenizer: Any) -> None:
    """Checked token by token, with the state of one row; a place in the middle of a bar does not count as an error."""
    grammar, facts = build_grammar(tokenizer), vocabulary(tokenizer)
    names = ["Bar_None", "TimeSig_4/4", "Position_12", "Tempo_121.29", "Program_0", "Pitch_60", "Velocity_63"]
    piece = [facts.bos_id, *(tokenizer.vocab[name] for name in names if name in tokenizer.vocab)]
    tokens = torch.tensor([[*piece, facts.pad_id, facts.pad_id], [tokenizer.vocab["Position_4"], *piece[1:], 1, 1]])
    tokens[1, -2:] = facts.pad_id
    with torch.no_grad():
        probability = tiny_model(input_ids=tokens).logits[:, :-1].float().softmax(dim=2)
        expected = []
        for row, length in ((0, len(piece)), (1, len(piece))):
            for place in range(length - 1):
                allowed = grammar.playable(grammar.read(tokens[row : row + 1, : place + 1]))[0]
                allowed[tokens[row, place + 1]] = True
                expected.append(-probability[row, place, allowed].sum().log())
        plain = next_token_loss(tiny_model, tokens, facts.pad_id)
        penalised = next_token_loss(tiny_model, tokens, facts.pad_id, grammar=grammar, weight=3.0)
        both = next_token_loss(tiny_model, tokens, facts.pad_id, grammar=grammar, weight=3.0, reduction="sum")
    torch.testing.assert_close(penalised - plain, 3.0 * torch.stack(expected).mean(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(both, penalised * len(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["batch", "evaluate_rows"])
def test_every_process_needs_a_row(name: str) -> None:
    changes: dict[str, Any] = {"batch": 2, "evaluate_rows": 2} | {name: 1}
    settings = replace(PretrainConfig().optimisation, **changes)
    run = Pretraining(replace(PretrainConfig(), data=Data(corpus="somewhere"), optimisation=settings))
    run.world = World(torch.device("cpu"), rank=0, size=2)
    with pytest.raises(UserError, match=rf"optimisation\.{name} = 1: expected at least one row for each of 2"):
        run._find_parts()


@pytest.mark.parametrize(
    ("device", "there", "missing"),
    [
        ("cuda", {"gcc", "triton"}, []),
        ("cuda", {"clang", "triton"}, []),
        ("cuda", {"/opt/cc", "triton"}, []),  # which CC names
        ("cuda", {"g++", "triton"}, ["a C compiler"]),
        ("cuda", {"gcc"}, ["the package triton"]),
        ("cpu", {"g++"}, []),
        ("cpu", {"gcc"}, ["a C++ compiler"]),
    ],
)
def test_what_compiling_needs(
    device: str, there: set[str], missing: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", "/opt/cc")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: name if name in there else None)
    monkeypatch.setattr("smart.pretrain.find_spec", lambda name: name if name in there else None)
    (tmp_path / "Python.h").touch()
    found = missing_to_compile(device, tmp_path)
    assert len(found) == len(missing) and all(map(str.startswith, found, missing)), found
    assert "Python.h" in missing_to_compile(device, tmp_path / "none")[-1]
    kind = torch.device(device)
    assert _compiles("auto", kind, found) == (device == "cuda" and not found) and not _compiles("off", kind, found)
    if found:
        with pytest.raises(UserError, match=rf"compile = 'on': torch\.compile needs {re.escape(missing[0])}"):
            _compiles("on", kind, found)


# --- Whole runs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", ["base-small.toml", "base.toml"])
@pytest.mark.slow
def test_pretraining_killed_and_resumed_gives_the_same_curve(config: str, corpus: Path, tmp_path: Path) -> None:
    status, output = run("pretrain", *pretrain(corpus, tmp_path / "a", config), fresh=config == "base-small.toml")
    assert status == 0, output
    whole = tmp_path / "a" / "r"

    process = start("pretrain", *pretrain(corpus, tmp_path / "b", config))
    while len(list((tmp_path / "b").glob("r/checkpoints/0*"))) < 1:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.communicate()
    status, output = run("pretrain", *pretrain(corpus, tmp_path / "b", config), "--resume")
    assert status == 0, output

    assert curve(tmp_path / "b" / "r") == curve(whole)
    assert [row["step"] for row in curve(whole)] == [3, 6, 9, 12]
    assert curve(whole)[-1]["validation_loss"] < curve(whole)[0]["validation_loss"]
    for name in ("base/model.safetensors", "samples/00000012/00.mid"):
        assert (tmp_path / "b" / "r" / name).read_bytes() == (whole / name).read_bytes()
    load_base(whole / "base")

    for newest in (whole / "checkpoints").glob("0*"):
        rewrite(newest, "progress.json", b'{"pace": "allegro"}')
    status, output = run("pretrain", *pretrain(corpus, tmp_path / "a", config), "--resume")
    assert status == 2 and "progress.json cannot be read" in output and "Traceback" not in output, output


@pytest.mark.slow
def test_pretraining_asked_to_stop_saves_and_goes_on_with_the_same_curve(corpus: Path, tmp_path: Path) -> None:
    long = ["--set", "optimisation.steps=400", "--set", "optimisation.evaluate_every=100"]
    status, output = run("pretrain", *pretrain(corpus, tmp_path / "a"), *long)
    assert status == 0, output
    process = start("pretrain", *pretrain(corpus, tmp_path / "b"), *long)
    folder = tmp_path / "b" / "r"
    while not (folder / "checkpoints" / "00000100").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and f"Continue with: {sys.executable} -m smart.pretrain" in output
    (last,) = sorted((folder / "checkpoints").iterdir())[-1:]
    assert 100 < int(last.name) < 400 and int(last.name) % 100  # within a stretch between two evaluations
    status, output = run("pretrain", "--config", str(folder / "config.toml"), "--resume")
    assert status == 0, output
    assert curve(folder) == curve(tmp_path / "a" / "r")
    weights = "base/model.safetensors"
    assert (folder / weights).read_bytes() == (tmp_path / "a" / "r" / weights).read_bytes()


@pytest.mark.slow
def test_two_processes_learn_what_one_does(corpus: Path, tmp_path: Path) -> None:
    """Rows of different lengths, an odd number of them: the mean over the batch's tokens is not one of means."""
    uneven: dict[str, Any] = {
        "data.crop": 1024,
        "optimisation.batch": 5,
        "optimisation.steps": 3,
        "optimisation.evaluate_every": 1,
    }
    uneven["optimisation.precision"] = "float32"
    extra = [part for key, value in uneven.items() for part in ("--set", f"{key}={value}")]
    status, output = run("pretrain", *pretrain(corpus, tmp_path / "one"), *extra)
    assert status == 0, output
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = [*torchrun, "-m", "smart.pretrain", *pretrain(corpus, tmp_path / "two"), *extra]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "and 1 more" in done.stderr
    one, two = curve(tmp_path / "one" / "r"), curve(tmp_path / "two" / "r")
    assert [row["step"] for row in two] == [1, 2, 3]  # one metrics file
    for key in ("loss", "gradient_norm"):
        assert two[0][key] == pytest.approx(one[0][key], rel=1e-5)  # before rounding is amplified by AdamW
        assert two[2][key] == pytest.approx(one[2][key], rel=1e-4)
    assert two[2]["validation_loss"] == pytest.approx(one[2]["validation_loss"], rel=1e-5)


@pytest.mark.slow
def test_pretraining_goes_on_from_a_base(corpus: Path, base: Path, tmp_path: Path) -> None:
    status, output = run(
        "pretrain", *pretrain(corpus, tmp_path), "--set", f"model.base={base}", "--set", "optimisation.steps=3"
    )
    assert status == 0, output
    before, after = load_base(base)[0], load_base(tmp_path / "r" / "base")[0]
    assert after.config.num_hidden_layers == before.config.num_hidden_layers == 2  # the base's own architecture
    change = max((p - q).abs().max().item() for p, q in zip(before.parameters(), after.parameters(), strict=True))
    assert 0 < change < 0.01


def test_a_base_with_another_vocabulary_is_refused(corpus: Path, tmp_path: Path) -> None:
    other = build_tokenizer("all")
    save_base(build_model(other, layers=1, hidden=16, heads=2, intermediate=16), other, tmp_path / "other")
    status, output = run("pretrain", *pretrain(corpus, tmp_path), "--set", f"model.base={tmp_path / 'other'}")
    assert status == 2 and "its vocabulary is not that of corpus" in output
    assert "Traceback" not in output and not (tmp_path / "r").exists()


@pytest.mark.slow
def test_compiled_pretraining_learns_the_same(corpus: Path, tmp_path: Path) -> None:
    if not any(map(shutil.which, ("g++", "clang++"))):
        pytest.skip("torch.compile needs a C++ compiler")
    for name in ("on", "off"):
        status, output = run(
            "pretrain", *pretrain(corpus, tmp_path / name), "--set", f"optimisation.compile={name}", fresh=True
        )
        assert status == 0, output
    for on, off in zip(curve(tmp_path / "on" / "r"), curve(tmp_path / "off" / "r"), strict=True):
        assert on["loss"] == pytest.approx(off["loss"], rel=1e-4)
        assert on["validation_loss"] == pytest.approx(off["validation_loss"], rel=1e-4)
