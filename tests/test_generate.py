"""smart.generate: openings, windows, continuations, the best of several, and the whole command."""

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st
from symusic import Note, Score, Tempo, TimeSignature, Track

from smart import UserError
from smart.files import hold
from smart.generate.command import main
from smart.generate.pieces import plan
from smart.generate.writer import WINDOW, Writer, last_bars, opening, unplayable_tokens
from smart.reward import load_reward, resample
from smart.sampler import Sampler
from smart.tokens import build_grammar, build_tokenizer, decode, encode, vocabulary

TOKENIZER = build_tokenizer()
FACTS = vocabulary(TOKENIZER)


def song(bars: int, seed: int = 0, **changes: Any) -> Score:
    """Quarters in 3/4 on two piano tracks, at two tempos, and a violin."""
    draw = random.Random(seed)
    score = Score(480)
    score.tempos.append(Tempo(0, 100))
    score.tempos.append(Tempo(1440 * (bars // 2), 60))
    score.time_signatures.append(TimeSignature(0, 3, 4))
    for program in (0, 2, 40):
        track = Track(program=program)
        for beat in range(3 * bars):
            track.notes.append(Note(480 * beat, 470, draw.randint(40, 80), draw.randint(40, 100)))
        score.tracks.append(track)
    return score


def piano_tokens(score: Score) -> list[int]:
    from smart.tokens import merge_piano

    return encode(TOKENIZER, merge_piano(score, (21, 108)))


def test_an_opening_is_the_prompt_of_training() -> None:
    names = {number: name for name, number in TOKENIZER.vocab.items()}
    found = [names[token] for token in opening(TOKENIZER, "7/8", 121.0)]
    assert found == ["Bar_None", "TimeSig_7/8", "Position_0", "Tempo_120.0"]


@pytest.mark.parametrize(
    ("signature", "tempo", "text"),
    [
        ("7/16", 120.0, r"--time-signature 7/16: expected one of 2/2, "),
        ("4/4", 300.0, "--tempo 300: expected 40 to 250"),
    ],
)
def test_what_the_vocabulary_lacks_is_refused(signature: str, tempo: float, text: str) -> None:
    with pytest.raises(UserError, match=text):
        opening(TOKENIZER, signature, tempo)


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(1, 14), st.integers(60, 500), st.integers(0, 5))
def test_last_bars_sound_like_the_end_of_the_piece(bars: int, wanted: int, longest: int, seed: int) -> None:
    whole = piano_tokens(song(bars, seed))
    end = last_bars(whole, FACTS, bars=wanted, longest=longest)
    kept = end.count(FACTS.bar_id)
    assert end[0] == FACTS.bar_id and len(end) <= longest and 1 <= kept <= min(wanted, bars)
    if kept < min(wanted, bars):  # another bar does not fit
        place = [i for i, token in enumerate(whole) if token == FACTS.bar_id][-kept - 1]
        assert len(whole) - place >= longest
    all_of_it, its_end = decode(TOKENIZER, whole), decode(TOKENIZER, end)
    shift = 3 * all_of_it.ticks_per_quarter * (bars - kept)
    expected = [(n.time - shift, n.end - shift, n.pitch, n.velocity) for n in all_of_it.tracks[0].notes]
    heard = [(n.time, n.end, n.pitch, n.velocity) for n in its_end.tracks[0].notes]
    assert heard == [note for note in expected if note[0] >= 0]

    def tempo(score: Any, tick: int) -> float:
        return float([t.qpm for t in score.tempos if t.time <= tick][-1])

    for tick in range(0, its_end.end(), its_end.ticks_per_quarter):
        assert tempo(its_end, tick) == tempo(all_of_it, tick + shift)


def test_a_bar_too_long_for_the_window_loses_its_beginning() -> None:
    whole = piano_tokens(song(1))
    end = last_bars(whole, FACTS, bars=4, longest=12)
    assert len(end) <= 12 and end[-3:] == whole[-3:]


def make_writer(model: Any) -> Writer:
    return Writer(Sampler(model, pad_id=FACTS.pad_id, eos_id=FACTS.eos_id), FACTS, 1.0, 0, 1.0)


def test_a_short_piece_is_what_the_sampler_draws(tiny_model: Any) -> None:
    prompts = [opening(TOKENIZER, "4/4", 120.0), opening(TOKENIZER, "3/4", 90.0)] * 2
    written = make_writer(tiny_model).write(prompts, 40, torch.Generator().manual_seed(5), None)
    sampler = Sampler(tiny_model, pad_id=FACTS.pad_id, eos_id=FACTS.eos_id)
    rollout = sampler.sample(torch.tensor(prompts), max_new_tokens=40, generator=torch.Generator().manual_seed(5))
    for row, tokens, mask in zip(written, rollout.tokens[:, 4:], rollout.mask, strict=True):
        assert row == [token for token in tokens[mask].tolist() if token != FACTS.eos_id]


def test_a_long_piece_is_written_in_windows(tiny_model: Any) -> None:
    """If EOS is forbidden, every piece has exactly the requested length, and obeys the grammar across windows."""
    grammar = build_grammar(TOKENIZER)
    endless = replace(grammar, allowed=grammar.allowed.clone())
    endless.allowed[:, FACTS.eos_id] = False
    prompts = [opening(TOKENIZER, "4/4", 120.0), opening(TOKENIZER, "6/8", 60.0)]
    length = 2 * WINDOW + 30
    writer = make_writer(tiny_model)
    written = writer.write(prompts, length, torch.Generator().manual_seed(1), endless)
    assert [len(row) for row in written] == [length, length]
    assert unplayable_tokens(prompts, written, grammar) == [0, 0]
    assert writer.write(prompts, length, torch.Generator().manual_seed(1), endless) == written
    free = writer.write(prompts, length, torch.Generator().manual_seed(1), None)
    assert sum(unplayable_tokens(prompts, free, grammar)) > 0  # a random model writes much that cannot be played


# --- The command --------------------------------------------------------------------------------------------------


def generate(*arguments: Any) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def table(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "pieces.csv").read_text().splitlines()))


@pytest.fixture(scope="module")
def midi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("song") / "song.mid"
    song(12).dump_midi(path)
    return path


def test_pieces_come_as_midi_and_wav(tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = generate("--out", out, "-n", 2, "--tokens", 96, "--tempo", 90, "--time-signature", "3/4", "--playable")
    assert result.exit_code == 0, result.output
    assert "without --playable:" in result.output and "with --playable:    0 of" in result.output
    assert [row["piece"] for row in table(out)] == ["0", "1"]
    for row in table(out):
        score = Score(out / row["file"].replace(".wav", ".mid"))
        assert score.tempos[0].qpm == pytest.approx(90, abs=0.1)
        assert (score.time_signatures[0].numerator, score.time_signatures[0].denominator) == (3, 4)
        assert score.note_num() == int(row["notes"]) > 5 and int(row["tokens"]) <= 96 and row["unplayable"] == "0"
        audio, rate = soundfile.read(out / row["file"])
        assert rate == 44100 and len(audio) / rate == pytest.approx(float(row["seconds"]), abs=0.01)
        assert abs(audio).max() == pytest.approx(1, abs=1e-3)
    settings = json.loads((out / "settings.json").read_text())
    assert (settings["model"], settings["temperature"], settings["top_p"], settings["seed"]) == ("piano", 1.0, 0.95, 1)
    other = generate("--out", tmp_path / "b", "-n", 2, "--tokens", 96, "--tempo", 90, "--time-signature", "3/4",
                     "--playable", "--seed", 2)  # fmt: skip
    assert other.exit_code == 0
    assert (tmp_path / "b" / "0000.mid").read_bytes() != (out / "0000.mid").read_bytes()


def test_the_bank_renders_what_the_pool_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for backend in ("pool", "bank"):
        assert not (tmp_path / "cache").exists()
        made = generate("--out", tmp_path / backend, "-n", 2, "--tokens", 48, "--seconds", 3, "--backend", backend)
        assert made.exit_code == 0, made.output
    assert any((tmp_path / "cache").rglob("*.safetensors"))
    for name in ("0000", "0001"):
        pool, bank = ((tmp_path / backend / f"{name}.mid").read_bytes() for backend in ("pool", "bank"))
        assert pool == bank
        pool, bank = (soundfile.read(tmp_path / backend / f"{name}.wav")[0] for backend in ("pool", "bank"))
        assert pool.shape == bank.shape and abs(pool - bank).max() < 1e-3


def test_overlapping_notes_of_one_key_sound_as_the_file_is_read() -> None:
    tokenizer = build_tokenizer()
    words = ["Pitch_60", "Velocity_63", "Duration_2.0.12", "Position_12", "Pitch_60", "Velocity_63", "Duration_0.6.12"]
    task = plan(tokenizer, None, 512, fill=None, bars=8, whole_song=False, tempo=120.0, time_signature="4/4")
    music = task.music([tokenizer[word] for word in words])
    (track,) = music.score.tracks
    assert [(note.time, note.duration) for note in track.notes] == [(0, 36), (24, 24)]  # the tokens: (0, 48), (24, 12)
    (again,) = Score.from_midi(music.midi).tracks
    assert [(note.time, note.duration) for note in again.notes] == [(0, 36), (24, 24)]


def test_a_continuation_leaves_the_song_as_it_was(midi: Path, tmp_path: Path) -> None:
    result = generate("--out", tmp_path / "out", "-n", 1, "--continue", midi, "--bars", 4, "--tokens", 90)
    assert result.exit_code == 0, result.output
    before, alone, joined = (
        Score(midi),
        Score(tmp_path / "out" / "0000.mid"),
        Score(tmp_path / "out" / "0000-joined.mid"),
    )
    assert [list(track.notes) for track in joined.tracks[:3]] == [list(track.notes) for track in before.tracks]
    assert [track.program for track in joined.tracks[:3]] == [0, 2, 40]
    (new,) = joined.tracks[3:]
    assert len(new.notes) > 3
    line = 12 * 3 * 480
    scale = 480 / alone.ticks_per_quarter
    assert [(n.time - line, n.pitch, n.velocity) for n in new.notes] == [
        (round(n.time * scale), n.pitch, n.velocity) for n in alone.tracks[0].notes
    ]
    assert alone.tempos[0].time == 0 and alone.tempos[0].qpm == pytest.approx(60, abs=0.1)  # as at the end of the song
    assert (alone.time_signatures[0].numerator, alone.time_signatures[0].denominator) == (3, 4)
    rest = float(table(tmp_path / "out")[0]["seconds"])
    seconds = soundfile.info(tmp_path / "out" / "0000-joined.wav").duration
    assert seconds == pytest.approx(4 * 3 * 1.0 + rest, abs=0.02)  # the last four bars, then what follows
    words = ("--continue", midi, "--bars", 4, "--tokens", 90, "--whole-song")
    assert generate("--out", tmp_path / "whole", "-n", 1, *words).exit_code == 0
    for name in ("0000.mid", "0000.wav", "0000-joined.mid"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    seconds = soundfile.info(tmp_path / "whole" / "0000-joined.wav").duration
    assert seconds == pytest.approx(6 * 3 * 0.6 + 6 * 3 * 1.0 + rest, abs=0.02)


def test_only_a_continuation_has_a_whole_song(tmp_path: Path) -> None:
    result = generate("--out", tmp_path / "out", "--whole-song")
    assert result.exit_code == 2 and "--whole-song needs --continue FILE" in result.output


def test_the_best_of_several_is_the_one_that_rates_best(tmp_path: Path) -> None:
    """The candidates of one piece are the same as that many pieces without --best-of."""
    length = ("--tokens", 64, "--seconds", 8)
    assert generate("--out", tmp_path / "all", "-n", 4, *length).exit_code == 0
    result = generate("--out", tmp_path / "best", "-n", 1, "--best-of", 4, "--reward", "ce_proxy", *length)
    assert result.exit_code == 0 and "best of 4 by ce_proxy (an approximation" in result.output, result.output
    reward = load_reward("ce_proxy")
    ratings = []
    for row in table(tmp_path / "all"):
        audio, rate = soundfile.read(tmp_path / "all" / row["file"], dtype="float32")
        mono = resample(torch.from_numpy(audio.mean(1)), rate, reward.sample_rate)
        ratings.append(reward.score(mono[None])["CE"].item())
    (chosen,) = table(tmp_path / "best")
    assert int(chosen["candidate"]) == int(np.argmax(ratings)) and max(ratings) > min(ratings) + 0.01
    assert float(chosen["CE"]) == pytest.approx(max(ratings), abs=0.01)
    name = f"{int(np.argmax(ratings)):04d}.mid"
    assert (tmp_path / "best" / "0000.mid").read_bytes() == (tmp_path / "all" / name).read_bytes()


@pytest.mark.slow
def test_a_killed_command_goes_on(tmp_path: Path) -> None:
    arguments = ["-n", "70", "--tokens", "16", "--seconds", "2"]  # two batches
    assert generate("--out", tmp_path / "whole", *arguments).exit_code == 0
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "smart.generate", "--out", str(out), *arguments],
        stdout=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    while not (out / "pieces.csv").is_file() or len((out / "pieces.csv").read_text().splitlines()) < 4:
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(table(out)) < 70
    with open(out / "pieces.csv", "a") as file:
        file.write("3,00")  # as a crash in the middle of a line leaves it
    result = generate("--out", out, *arguments)
    assert result.exit_code == 0, result.output
    for path in (tmp_path / "whole").iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes(), path.name
    assert generate("--out", out, *arguments).exit_code == 0  # nothing left to do
    for cut in ("piece,fi", "piece,file,notes,seconds,tokens,unplayable,candidate\n"):  # before the first piece
        (out / "pieces.csv").write_text(cut)
        assert generate("--out", out, *arguments).exit_code == 0
        assert (out / "pieces.csv").read_bytes() == (tmp_path / "whole" / "pieces.csv").read_bytes()


@pytest.mark.parametrize(
    "line",
    [
        b"1,\xff.wav\n",
        b"1,0001.wav,5,1.0,8,0,0,7,7\n",
        b"\n",
        b"1,0001.wav,5,1.0,x,0,0\n",
        b"1,0001.wav,99,1.00,8,0,0\n",
    ],
)
def test_a_damaged_table_is_named_and_made_up_for(tmp_path: Path, line: bytes) -> None:
    arguments = ["--out", tmp_path / "out", "-n", 3, "--tokens", 8, "--seconds", 1]
    assert generate(*arguments).exit_code == 0
    path = tmp_path / "out" / "pieces.csv"
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], line, lines[3]]))
    result = generate(*arguments)
    assert result.exit_code == 0 and "line 3 is damaged" in result.output, (result.output, result.exception)
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--model", "nothing/here/at-all"], "no such folder"),
        (["--tempo", "1000"], "--tempo 1000: expected 40 to 250"),
        (["--continue", "absent.mid"], "--continue absent.mid: no such file"),
        (["--continue", "text.mid"], "--continue text.mid: not a MIDI file"),
        (["--continue", "violin.mid"], "--continue violin.mid: no piano notes"),
        (["--continue", "song.mid", "--tempo", "90"], "a continuation keeps the song's own"),
        (["--continue", "song.mid", "--bars", "5-8"], "--bars 5-8: expected a number of bars"),
        (["--continue", "song.mid", "--fill", "song.mid", "--bars", "5"], "cannot be combined; choose one"),
        (["--fill", "song.mid"], "--fill needs --bars"),
        (["--fill", "song.mid", "--bars", "8-5"], "--bars 8-5: expected the bars to fill, such as 5-8"),
        (["--fill", "song.mid", "--bars", "12-13"], "--bars 12-13: expected bars 1 to 12"),
        (["--fill", "song.mid", "--bars", "2", "--reward", "ce_proxy"], "--reward and --fill cannot be combined"),
        (["--soundfont", "absent.sf2"], "does not exist"),
        (["--best-of", "2", "--reward", "applause"], 'there is no reward "applause"'),
        (["--best-of", "2", "--reward-option", "loud"], "expected KEY=VALUE"),
        (["--out", "full"], "holds something else"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], text: str, midi: Path, tmp_path: Path) -> None:
    (tmp_path / "song.mid").write_bytes(midi.read_bytes())
    (tmp_path / "text.mid").write_text("a letter, not a song")
    violin = song(4)
    violin.tracks = violin.tracks[2:]
    violin.dump_midi(tmp_path / "violin.mid")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letters.txt").write_text("mine")
    before = os.getcwd()
    os.chdir(tmp_path)
    try:
        result = generate(*([] if "--out" in arguments else ["--out", "out"]), "-n", 1, "--tokens", 8, *arguments)
    finally:
        os.chdir(before)
    assert result.exit_code == 2, result.output
    assert text in result.output and "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


def test_two_processes_do_not_write_into_one_folder(tmp_path: Path) -> None:
    arguments = ["--out", tmp_path / "out", "-n", 1, "--tokens", 8, "--seconds", 1]
    assert generate(*arguments).exit_code == 0
    with hold(tmp_path / "out"):
        result = generate(*arguments)
    assert result.exit_code == 2 and "another process is working in it" in result.output
    assert generate(*arguments).exit_code == 0


def test_other_settings_do_not_mix_with_what_is_there(tmp_path: Path) -> None:
    assert generate("--out", tmp_path / "out", "-n", 1, "--tokens", 8).exit_code == 0
    result = generate("--out", tmp_path / "out", "-n", 1, "--tokens", 9)
    assert result.exit_code == 2 and "other settings" in result.output
