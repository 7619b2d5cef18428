"""smart.generate: songs that are continued or of which bars are written anew keep everything else as it is."""

import csv
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from symusic.core import ScoreTick

from smart import UserError
from smart.corpus import Limits, read_score
from smart.corpus.events import END_OF_TRACK, Event, MidiFile, read_file
from smart.generate.command import main
from smart.generate.fill import fill_song
from smart.generate.song import Song, continue_song, read_song
from smart.generate.writer import WINDOW, Writer
from smart.logprobs import token_logprobs
from smart.sampler import Sampler
from smart.tokens import build_grammar, build_tokenizer, save_tokenizer, vocabulary

TOKENIZER: Any = build_tokenizer()
FACTS = vocabulary(TOKENIZER)
QUARTER, BAR = 480, 1920
TITLE = "ピアノ".encode("shift_jis")


def heard(data: bytes) -> ScoreTick:
    return read_score(data, Limits()).score


def ids(*names: str) -> list[int]:
    return [TOKENIZER.vocab[name] for name in names]


def note(tick: int, length: int, pitch: int, channel: int = 0) -> list[Event]:
    return [Event(tick, bytes([0x90 | channel, pitch, 80])), Event(tick + length, bytes([0x80 | channel, pitch, 0]))]


def track(*events: Event) -> list[Event]:
    body = sorted(events, key=lambda event: event.tick)
    return [*body, Event(body[-1].tick, END_OF_TRACK)]


def tempo(tick: int, quarters_per_minute: float) -> Event:
    return Event(tick, b"\xff\x51\x03" + round(60e6 / quarters_per_minute).to_bytes(3, "big"))


def time_signature(tick: int, beats: int, power: int) -> Event:
    return Event(tick, b"\xff\x58\x04" + bytes([beats, power, 24, 8]))


def melody(bars: int, step: int = QUARTER) -> list[Event]:
    return [
        event for place in range(bars * BAR // step) for event in note(place * step, step - 10, 60 + place * 5 % 13)
    ]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six bars of piano and ten of strings; tempo, key and volume change after the piano; texts are not UTF-8."""
    path = tmp_path_factory.mktemp("song") / "song.mid"
    conductor = track(
        Event(0, b"\xff\x03" + bytes([len(TITLE)]) + TITLE),
        tempo(0, 100),
        tempo(7 * BAR, 60),
        time_signature(0, 4, 2),
        Event(5, b"\xf0\x03\x43\x12\x00"),
        Event(9, b"\xf7\x02\x00\xf7"),
        Event(8 * BAR, b"\xff\x59\x02\x02\x00"),  # D major
        Event(8 * BAR, b"\xff\x59\x02\xf7\xff"),  # no key
        tempo(11 * BAR, 200),  # after the end
    )
    pedal = [Event(2 * BAR + 7, b"\xb0\x40\x7f"), Event(3 * BAR + 9, b"\xb0\x40\x00")]
    tied = note(BAR - 240, 480, 40)  # into bar 2
    lyric = Event(2 * BAR + 5, b"\xff\x05" + bytes([len(TITLE)]) + TITLE)
    piano = track(Event(0, b"\xb0\x07\x50"), *melody(6), *pedal, *tied, lyric)
    strings = track(
        Event(0, b"\xc1\x30"), *(event for bar in range(10) for event in note(bar * BAR, BAR - 5, 50 + bar, channel=1)),
        Event(3 * BAR, b"\xe1\x00\x50"),
    )  # fmt: skip
    path.write_bytes(MidiFile(QUARTER, [conductor, piano, strings]).dumps())
    return path


@pytest.fixture(scope="module")
def song(file: Path) -> Song:
    save_tokenizer(TOKENIZER, file.parent)
    return read_song(file, "--continue", TOKENIZER, file.parent / "tokenizer.json")


def test_the_end_tempo_and_key_are_those_of_the_whole_song(song: Song) -> None:
    """The piano ends with bar 6, the strings with bar 10."""
    assert song.end == 10 * BAR and song.tokens.count(FACTS.bar_id) == 10
    going_on = continue_song(song, TOKENIZER)
    assert going_on.line == ids("Bar_None", "TimeSig_4/4", "Position_0", "Tempo_60.0")
    new = ids("Pitch_60", "Velocity_63", "Duration_1.0.12", "Bar_None", "TimeSig_3/4", "Position_0", "Tempo_80.0",
              "Pitch_62", "Velocity_63", "Duration_1.0.12")  # fmt: skip
    alone = going_on.alone(new)
    assert [(n.time / alone.ticks_per_quarter, n.pitch) for n in alone.tracks[0].notes] == [(0, 60), (4, 62)]
    assert [(t.time / alone.ticks_per_quarter, round(t.qpm)) for t in alone.tempos] == [(0, 60), (4, 80)]
    assert [(k.time, k.key) for k in alone.key_signatures] == [(0, 2)]
    joined = heard(going_on.joined(new))
    assert [(n.time, n.pitch) for n in joined.tracks[-1].notes] == [(10 * BAR, 60), (11 * BAR, 62)]
    assert [(t.time, round(t.qpm)) for t in joined.tempos] == [(0, 100), (7 * BAR, 60), (11 * BAR, 80)]
    assert [(s.time, s.numerator) for s in joined.time_signatures][-1] == (11 * BAR, 3)


def test_a_joined_file_keeps_every_event_of_the_song(song: Song, file: Path) -> None:
    before = read_file(file.read_bytes())
    new = ids("Pitch_60", "Velocity_63", "Duration_1.0.12")
    after = read_file(continue_song(song, TOKENIZER).joined(new))
    assert after.tracks[1:3] == before.tracks[1:3]
    kept = [event for event in before.tracks[0] if event.tick < song.end and event.data != END_OF_TRACK]
    assert after.tracks[0][: len(kept)] == kept
    assert {event.data[0] & 0x0F for event in after.tracks[3] if event.data[0] < 0xF0} == {2}  # a channel of its own


def test_a_continuation_of_7_4_begins_on_its_bar_line(tmp_path: Path) -> None:
    path = tmp_path / "seven.mid"
    path.write_bytes(MidiFile(QUARTER, [track(time_signature(0, 7, 2), *melody(6)[: 2 * 21])]).dumps())
    save_tokenizer(TOKENIZER, tmp_path)
    seven = read_song(path, "--continue", TOKENIZER, tmp_path / "tokenizer.json")
    assert seven.end == 21 * QUARTER and "7/4 as 4/4 + 3/4" in seven.remark
    going_on = continue_song(seven, TOKENIZER)
    assert going_on.line == ids("Bar_None", "TimeSig_4/4")
    joined = heard(going_on.joined(ids("Position_0", "Pitch_60", "Velocity_63", "Duration_1.0.12")))
    assert [n.time for n in joined.tracks[-1].notes] == [21 * QUARTER]
    assert [(s.time, s.numerator) for s in joined.time_signatures] == [(0, 7), (21 * QUARTER, 4)]
    assert fill_song(seven, 2, 2, TOKENIZER, WINDOW).signatures == ids("TimeSig_4/4", "TimeSig_3/4")


def outside(midi: MidiFile, start: int, stop: int) -> list[Counter[Event]]:
    """The events of each track but for the piano's notes that begin in a range, and the ends of tracks."""
    found = []
    for events in midi.tracks:
        counts: Counter[Event] = Counter()
        gone: list[int] = []
        for event in events:
            kind, pitch = event.data[0], event.data[1]
            if kind == 0x90 and start <= event.tick < stop:
                gone.append(pitch)
            elif kind == 0x80 and pitch in gone:
                gone.remove(pitch)
            else:
                counts[event] += event.data != END_OF_TRACK
        found.append(counts)
    return found


def test_all_but_the_named_bars_of_the_piano_stays_as_it_was(song: Song, file: Path) -> None:
    fill = fill_song(song, 2, 3, TOKENIZER, WINDOW)
    assert (fill.start, fill.stop) == (BAR, 3 * BAR)
    assert fill.before + ids("Bar_None", "TimeSig_4/4") == fill.prompt()
    new = ids("Position_0", "Pitch_61", "Velocity_63", "Duration_1.0.12", "Bar_None", "TimeSig_4/4", "Position_36",
              "Pitch_63", "Velocity_63", "Duration_3.0.12")  # fmt: skip
    before, after = read_file(file.read_bytes()), read_file(fill.midi(new))
    assert outside(after, BAR, 3 * BAR)[:3] == outside(before, BAR, 3 * BAR)
    assert after.tracks[0] == before.tracks[0] and after.tracks[2] == before.tracks[2]
    removed = sum(each.data[0] == 0x90 for each in before.tracks[1]) - sum(e.data[0] == 0x90 for e in after.tracks[1])
    assert removed == 8  # the tied note that begins before stays
    filled = heard(fill.midi(new)).tracks[-1]
    assert filled.name == "fill"
    assert [(n.time, n.end, n.pitch) for n in filled.notes] == [(BAR, BAR + 480, 61), (3 * BAR - 480, 3 * BAR, 63)]


def test_the_first_and_the_last_bars_can_be_filled(song: Song) -> None:
    first, last = fill_song(song, 1, 1, TOKENIZER, WINDOW), fill_song(song, 9, 10, TOKENIZER, WINDOW)
    assert first.prompt() == ids("Bar_None", "TimeSig_4/4", "Position_0", "Tempo_100.0")
    assert not last.after and last.before
    with pytest.raises(UserError, match="--bars 9-11: expected bars 1 to 10"):
        fill_song(song, 9, 11, TOKENIZER, WINDOW)


def test_a_pickup_is_filled_together_with_the_bar_that_it_is_read_with(tmp_path: Path) -> None:
    path = tmp_path / "pickup.mid"
    path.write_bytes(MidiFile(QUARTER, [track(time_signature(0, 1, 2), time_signature(480, 4, 2), *melody(3))]).dumps())
    save_tokenizer(TOKENIZER, tmp_path)
    pickup = read_song(path, "--fill", TOKENIZER, tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match="the model reads bars 1 and 2 as one; name both of them"):
        fill_song(pickup, 2, 3, TOKENIZER, WINDOW)
    assert fill_song(pickup, 1, 2, TOKENIZER, WINDOW).signatures == ids("TimeSig_5/4")


def test_every_version_keeps_bars_signatures_and_tempo(song: Song, tiny_model: Any) -> None:
    fill = fill_song(song, 3, 5, TOKENIZER, WINDOW)
    grammar = build_grammar(TOKENIZER)
    writer = Writer(Sampler(tiny_model, pad_id=FACTS.pad_id, eos_id=FACTS.eos_id), FACTS, 1.0, 0, 1.0)
    for tokens in (400, 12):  # enough for the bars, and too few
        written = fill.write(writer, 6, tokens, torch.Generator().manual_seed(1), grammar)
        assert written == fill.write(writer, 6, tokens, torch.Generator().manual_seed(1), grammar)
        assert len({tuple(row) for row in written}) == 6
        for row in written:
            assert [token for token in row if token in FACTS.time_signature_ids] == ids("TimeSig_4/4", "TimeSig_4/4")
            assert not {*FACTS.tempo_ids, FACTS.eos_id} & set(row)
            music = heard(fill.midi(row))
            inside = [n for part in music.tracks if part.name == "fill" for n in part.notes]
            assert len(inside) == fill.notes(row)
            assert all(n.time >= 2 * BAR and n.end <= 5 * BAR for n in inside)


def test_how_a_version_joins_is_the_likelihood_of_what_follows(song: Song, tiny_model: Any) -> None:
    """In a batch, padded, as alone; after the last bar it is that of the end."""
    versions = [ids("Position_0", "Pitch_61", "Velocity_63", "Duration_1.0.12"), []]
    for fill in (fill_song(song, 3, 3, TOKENIZER, WINDOW), fill_song(song, 10, 10, TOKENIZER, WINDOW)):
        following = fill.after[:128] or [FACTS.eos_id]
        for row, value in zip(versions, fill.join(tiny_model, versions), strict=True):
            whole = [*fill.before, *ids("Bar_None", "TimeSig_4/4"), *row]
            tokens = torch.tensor([whole + following])
            with torch.no_grad():
                alone = token_logprobs(tiny_model, tokens, len(whole)).mean()
            assert value == pytest.approx(float(alone), abs=1e-4)


def test_the_command_fills_bars(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["--fill", file, "--bars", "2-3", "--out", out, "-n", 1, "--best-of", 3, "--tokens", 60]
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    assert "best of 3 by how well they join: mean log-probability -" in result.output
    (row,) = csv.DictReader((out / "pieces.csv").read_text().splitlines())
    assert float(row["join"]) < 0 and row["unplayable"] == "0" and int(row["candidate"]) < 3
    before, after = read_file(file.read_bytes()), read_file((out / "0000.mid").read_bytes())
    assert outside(after, BAR, 3 * BAR)[: len(before.tracks)] == outside(before, BAR, 3 * BAR)
    assert sorted(path.name for path in out.iterdir()) == [
        ".pieces.sha256", "0000.mid", "0000.wav", "pieces.csv", "settings.json",
    ]  # fmt: skip
