"""Soundfonts: where they are found, and that a damaged one hurts nobody."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clips import chunk, notes, tiny_soundfont
from hypothesis import given, settings
from hypothesis import strategies as st

from smart import UserError
from smart.render import RenderError, RenderPool, soundfonts


def refuse(path: Path | str) -> str:
    """The message with which a soundfont is refused: one line that names it."""
    with pytest.raises(UserError) as error:
        soundfonts.check_soundfont(path)
    message = error.value.message
    assert str(path) in message and "\n" not in message
    with pytest.raises(UserError):  # before any process is started
        RenderPool(str(path), workers=1)
    return message


def test_bad_soundfonts_are_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "font.sf2"
    good = tiny_soundfont()
    assert "does not exist" in refuse(path)
    assert "is a folder" in refuse(tmp_path)
    cases = [
        (b"", "is empty"),
        (np.random.default_rng(0).bytes(5000), "not a soundfont"),
        (b"PK\x03\x04" + bytes(100), "not a soundfont"),
        (chunk(b"RIFF", b"WAVE" + chunk(b"data", bytes(8))), "not a soundfont"),
        (good[:-100], "cut short"),
        (chunk(b"RIFF", b"sfbk"), "no samples"),
        (tiny_soundfont(pmod=bytes(7)), "pmod"),
        (tiny_soundfont(phdr=bytes(38)), "no presets"),
        (tiny_soundfont(shdr=bytes(46)), "no samples"),
        (good.replace(b"igen", b"what"), "igen"),
    ]
    for content, message in cases:
        path.write_bytes(content)
        assert message in refuse(path)
    path.write_bytes(good + b"trailing")
    soundfonts.check_soundfont(path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_soundfont_that_may_not_be_read(tmp_path: Path) -> None:
    path = tmp_path / "font.sf2"
    path.write_bytes(tiny_soundfont())
    path.chmod(0)
    assert "cannot be read" in refuse(path)


def test_every_beginning_of_a_soundfont_is_refused(tmp_path: Path) -> None:
    path, good = tmp_path / "font.sf2", tiny_soundfont()
    for length in range(0, len(good), 7):
        path.write_bytes(good[:length])
        with pytest.raises(UserError):
            soundfonts.check_soundfont(path)
    real = soundfonts.find_soundfont("timgm").read_bytes()
    for length in (13, 5000, len(real) // 2, len(real) - 1):
        path.write_bytes(real[:length])
        assert "cut short" in refuse(path)


@settings(max_examples=200, deadline=None)
@given(edits=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=20))
def test_damage_is_refused_or_passes_but_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, edits: list[Any]
) -> None:
    path, data = tmp_path_factory.getbasetemp() / "damaged.sf2", bytearray(tiny_soundfont())
    for place, value in edits:
        data[place % len(data)] = value
    path.write_bytes(data)
    try:
        soundfonts.check_soundfont(path)
    except UserError as error:
        assert "\n" not in error.message


@pytest.mark.parametrize("seed", range(8))
def test_damage_never_hurts_the_parent(tmp_path: Path, seed: int) -> None:
    path, data = tmp_path / "damaged.sf2", bytearray(tiny_soundfont())
    rng = np.random.default_rng(seed)
    for name in rng.permutation([b"phdr", b"pbag", b"pgen", b"inst", b"ibag", b"igen", b"shdr"])[:2]:
        body = data.index(name) + 8  # indices and offsets that the synthesiser follows blindly
        data[body + rng.integers(int.from_bytes(data[body - 4 : body], "little"))] = rng.integers(1, 256)
    path.write_bytes(data)
    try:
        with RenderPool(path, workers=1, deadline=5.0, load_deadline=5.0) as pool:
            audio = pool.submit(notes((0, 0.5, 60))).result()
            assert np.isfinite(audio).all() and np.abs(audio).max() <= 1
    except (UserError, RenderError):
        pass  # either is an honest answer


def test_a_soundfont_that_crashes_the_synthesiser(tmp_path: Path) -> None:
    path = tmp_path / "crash.sf2"
    path.write_bytes(tiny_soundfont(first_bag=60000))  # the synthesiser follows this index out of its memory
    soundfonts.check_soundfont(path)
    with pytest.raises(UserError, match=r"crash\.sf2 cannot be loaded.*died of signal 11"):
        RenderPool(path, workers=2)


def test_short_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert soundfonts.find_soundfont("timgm").name == "TimGM6mb.sf2"
    assert soundfonts.find_soundfont("some/where.sf2") == Path("some/where.sf2")
    with pytest.raises(UserError, match="yamaha"):
        soundfonts.find_soundfont("steinway")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SMART_SOUNDFONTS", f"{tmp_path}/nowhere{os.pathsep}{tmp_path}")
    names = {
        "musescore": "MuseScore_General_Full.sf3",
        "fluidr3": "FluidR3_GM.sf2",
        "grandeur": "The Grandeur D.sf2",
        "sgm": "SGM-v2.01.SF2",
        "yamaha": "Yamaha-C5-Salamander-JNv5.1.sf2",
    }
    for short, name in names.items():
        (tmp_path / name).write_bytes(tiny_soundfont())
        assert soundfonts.find_soundfont(short) == tmp_path / name
    (tmp_path / "MuseScore_General.sf2").write_bytes(tiny_soundfont())  # plain samples before compressed ones
    assert soundfonts.find_soundfont("MuseScore").name == "MuseScore_General.sf2"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "timgm").write_bytes(b"a file of that very name")
    assert soundfonts.find_soundfont("timgm") == Path("timgm")


def test_an_absent_soundfont_says_where_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soundfonts, "_folders", lambda: [tmp_path])
    for short, place, package in (
        ("musescore", "musescore.org", "musescore-general-soundfont"),
        ("fluidr3", "musescore.org", "fluid-soundfont-gm"),
        ("grandeur", "musical-artifacts.com/artifacts/2992", ""),
        ("sgm", "archive.org/details/SGM-V2.01", ""),
        ("yamaha", "sites.google.com/site/soundfonts4u", ""),
    ):
        with pytest.raises(UserError) as error:
            RenderPool(short, workers=1)
        assert place in error.value.message and package in error.value.message
        assert "SMART_SOUNDFONTS" in error.value.message and "\n" not in error.value.message
