"""Paths and text files as people have them: ``=`` and ``~`` in a path, byte order marks, .WAV, odd chunks."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from smart import UserError
from smart.config import load
from smart.files import parse_json, parse_toml, split_name
from smart.model import find_base, save_base
from smart.render import read_audio
from smart.rollout import find_system
from smart.study.build import read_wav, recordings


def wave(seconds: float = 0.5, rate: int = 44100, *chunks: bytes) -> bytes:
    """A WAV file of a tone, 16 bits, mono; ``chunks`` come before its samples."""
    samples = (8000 * np.sin(np.arange(int(seconds * rate)) / 10)).astype("<i2").tobytes()
    head = b"fmt " + struct.pack("<IHHIIHH", 16, 1, 1, rate, 2 * rate, 2, 16)
    body = b"WAVE" + head + b"".join(chunks) + b"data" + struct.pack("<I", len(samples)) + samples
    return b"RIFF" + struct.pack("<I", len(body)) + body


def test_a_name_ends_at_the_first_equals_sign_of_what_is_no_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "lr=0.1").mkdir()
    for text, expected in (
        ("lr=0.1", ("", "lr=0.1")),
        ("lr=0.1@20", ("", "lr=0.1@20")),
        (f"{tmp_path}/lr=0.1", ("", f"{tmp_path}/lr=0.1")),
        (f"mine={tmp_path}/lr=0.1", ("mine", f"{tmp_path}/lr=0.1")),
        ("mine=~/lr=0.1", ("mine", f"{tmp_path}/lr=0.1")),
        ("~/lr=0.1", ("", f"{tmp_path}/lr=0.1")),
        ("mine=piano-small", ("mine", "piano-small")),
        ("=x", ("", "=x")),
    ):
        assert split_name(text) == expected


def test_models_and_recordings_are_found_under_such_paths(
    tmp_path: Path, tiny_model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    save_base(tiny_model, tokenizer, tmp_path / "base=x")
    for text, name in (("base=x", "base=x"), ("a=base=x", "a"), ("~/base=x", "base=x"), ("a=~/base=x", "a")):
        found = find_system(text)
        assert (found.name, found.model.resolve()) == (name, tmp_path / "base=x")
    assert find_base("~/base=x") == tmp_path / "base=x"
    (tmp_path / "lr=0.1").mkdir()
    for name in ("b.WAV", "a.wav", "c.Wav"):
        (tmp_path / "lr=0.1" / name).write_bytes(wave())
    for text, name in (("lr=0.1", "lr=0.1"), (f"mine={tmp_path}/lr=0.1", "mine"), ("mine=~/lr=0.1", "mine")):
        runs = recordings(text)
        assert runs is not None and runs.name == name
        assert [file.name for file in runs.files] == ["a.wav", "b.WAV", "c.Wav"]


def test_a_configuration_may_have_a_byte_order_mark_and_a_home_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / "mine.toml"
    path.write_text('\ufeff[run]\nfolder = "~/runs"\n[render]\nsoundfont = "~/my.sf2"\n', encoding="utf-8")
    config = load("~/mine.toml", ["model.base=~/base", "prompts.corpus=~/corpus"])
    assert config.run.folder == f"{tmp_path}/runs" and config.render.soundfont == f"{tmp_path}/my.sf2"
    assert config.model.base == f"{tmp_path}/base" and config.prompts.corpus == f"{tmp_path}/corpus"


def test_a_byte_order_mark_in_front_of_any_text_counts_for_nothing() -> None:
    assert parse_json('\ufeff{"a": 1}') == parse_json(b'\xef\xbb\xbf{"a": 1}') == parse_toml("\ufeffa = 1") == {"a": 1}


def test_an_option_may_begin_with_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from smart.corpus.command import main

    monkeypatch.setenv("HOME", str(tmp_path))
    result = CliRunner().invoke(main, ["build", "--midi", "~/none", "--out", "~/corpus"])
    assert f"--midi {tmp_path}/none: no such folder" in result.output


def test_a_wave_file_may_lack_a_pad_byte(tmp_path: Path) -> None:
    odd = b"LIST" + struct.pack("<I", 15) + b"INFOIART" + struct.pack("<I", 3) + b"abc"
    whole = tmp_path / "whole.wav"
    whole.write_bytes(wave())
    for number, chunks in enumerate(([odd], [odd, odd], [odd + b"\0", odd], [odd + b"\0"])):
        path = tmp_path / f"{number}.wav"
        path.write_bytes(wave(0.5, 44100, *chunks))
        assert np.array_equal(read_audio(path)[0], read_audio(whole)[0])
        assert np.array_equal(read_wav(path, 44100, 1.0), read_wav(whole, 44100, 1.0))


def test_an_unusual_rate_names_its_file(tmp_path: Path) -> None:
    from smart.evaluate.command import main
    from smart.reward.calibrate import read_clip

    path = tmp_path / "odd.wav"
    path.write_bytes(wave(0.2, 44101))
    result = CliRunner().invoke(main, ["rate", str(path), "--reward", "ce_proxy"])
    assert result.exit_code == 2
    assert str(path) in result.output and "cannot resample 44101 Hz" in result.output
    with pytest.raises(UserError, match=r"odd\.wav: cannot resample 44101 Hz"):
        read_clip(path)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("none/x.png", "the folder .* does not exist"), ("x.xyz", "ends in one of"), ("x", "ends in one")],
)
def test_a_plot_that_cannot_be_written_is_refused_first(tmp_path: Path, name: str, reason: str) -> None:
    from smart.corpus.stats import check_picture

    with pytest.raises(UserError, match=rf"--plot .*{reason}"):
        check_picture(tmp_path / name)
    check_picture(tmp_path / "x.PDF")
