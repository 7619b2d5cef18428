"""smart.meters: the same music in other time signatures, by hand and by what is heard."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from miditok import REMI, TokenizerConfig

from smart.meters import FACTORS, Meters
from smart.tokens import build_grammar, build_tokenizer, decode, unplayable, vocabulary


def ids(tokenizer: Any, names: str) -> np.ndarray[Any, np.dtype[np.int64]]:
    """``4/4`` is a time signature, ``@2`` a position, ``T80`` a tempo, ``60:1.6`` a note of a beat and six twelfths."""
    tempos = {name: float(name[6:]) for name in tokenizer.vocab if name.startswith("Tempo_")}
    out = []
    for name in names.split():
        if name == "|":
            out.append("Bar_None")
        elif "/" in name:
            out.append(f"TimeSig_{name}")
        elif name[0] == "@":
            out.append(f"Position_{name[1:]}")
        elif name[0] == "T":
            out.append(min(tempos, key=lambda each: abs(tempos[each] - float(name[1:]))))
        else:
            pitch, duration = name.split(":")
            out += [f"Pitch_{pitch}", "Velocity_63", f"Duration_{duration}.12"]
    return np.array([tokenizer.vocab[name] for name in out])


def heard(tokenizer: Any, tokens: Any) -> np.ndarray[Any, Any]:
    """(notes, 3): onset and duration in seconds, and pitch."""
    score = decode(tokenizer, tokens).to("second")
    notes = [(note.start, note.duration, note.pitch) for track in score.tracks for note in track.notes]
    return np.array(notes).reshape(-1, 3)


@pytest.mark.parametrize(
    "signature, factor, expected",
    [
        ("4/4", 1, "| 4/4 @0 T120 60:1.0 @36 62:4.0 | 4/4 @24 T100 64:0.6"),
        ("3/4", 1, "| 3/4 @0 T120 60:1.0 | 3/4 @0 62:4.0 | 3/4 @0 T100 64:0.6"),
        ("6/8", 1, "| 6/8 @0 T60 60:1.0 @36 62:4.0 | 6/8 @0 T50 64:0.6"),
        ("12/8", 2, "| 12/8 @0 T120 60:2.0 @72 62:4.0 @144 T100 64:1.0"),
        ("2/4", Fraction(1, 2), "| 2/4 @0 T60 60:0.6 @18 62:2.0 | 2/4 @12 T50 64:0.3"),
        ("2/2", Fraction(1, 2), "| 2/2 @0 T120 60:0.6 @18 62:2.0 | 2/2 @12 T100 64:0.3"),
    ],
)
def test_rewriting_by_hand(tokenizer: Any, signature: str, factor: Any, expected: str) -> None:
    music = ids(tokenizer, "| 4/4 @0 T120 60:1.0 @36 62:4.0 | 4/4 @24 T100 64:0.6")
    if signature == "12/8":  # 12 beats of 12 steps: the third note begins the second bar
        expected = expected.replace("@144 ", "| 12/8 @0 ")
    written = Meters(tokenizer).rewrite(music, int(music[3]), tokenizer.vocab[f"TimeSig_{signature}"], Fraction(factor))
    assert written.tolist() == ids(tokenizer, expected).tolist()


def test_a_row_from_the_middle_states_its_tempo(tokenizer: Any) -> None:
    """The tempo in force is written at position 0, also before a first note that comes later, and silent bars stay."""
    music = ids(tokenizer, "| 3/4 | 3/4 @6 60:1.0")
    tempo = int(ids(tokenizer, "T80")[0])
    written = Meters(tokenizer).rewrite(music, tempo, tokenizer.vocab["TimeSig_2/4"], Fraction(1))
    assert written.tolist() == ids(tokenizer, "| 2/4 @0 T80 | 2/4 @18 60:1.0").tolist()


def test_what_cannot_be_written_is_not_offered(tokenizer: Any) -> None:
    meters = Meters(tokenizer)

    def factors(names: str, signature: str) -> list[Fraction]:
        music = ids(tokenizer, names)
        return meters.factors(music, int(music[3]), tokenizer.vocab[f"TimeSig_{signature}"])

    assert factors("| 4/4 @0 T120 60:1.0", "5/4") == [Fraction(1, 2), 1, 2]  # 360 is too fast
    assert factors("| 4/4 @0 T120 60:1.0 @3 62:1.0", "5/4") == [1, 2]  # position 1.5 does not exist
    assert factors("| 4/4 @0 T120 60:1.0", "7/8") == [1, 2, 3, 4]  # 30 is too slow
    assert factors("| 4/4 @0 T120 60:4.0", "7/8") == [1, 2, 3, 4]  # although the note is cut
    assert factors("| 4/4 @0 T120 60:1.0 | 4/4 @0 T240 60:1.0", "5/4") == [Fraction(1, 2), 1]
    assert factors("| 4/4 @0 T120 60:1.0 | 6/8 @0 60:1.0", "5/4") == []


def test_vocabularies_with_other_steps() -> None:
    """Durations that a vocabulary lacks become the nearest that it has; half of an odd number of steps has no place."""
    for resolution in ({(0, 4): 8, (4, 12): 4}, {(0, 1): 12, (1, 4): 4}, {(0, 4): 5}):
        tokenizer = REMI(TokenizerConfig(beat_res=resolution, use_tempos=True, use_time_signatures=True))
        meters = Meters(tokenizer)
        signature = tokenizer.vocab["TimeSig_3/4"]
        tempo = min(meters.tempos, key=lambda each: abs(meters.tempos[each] - 80))
        for duration in (name for name in tokenizer.vocab if name.startswith("Duration_")):
            names = ["Bar_None", "TimeSig_3/4", "Position_0", "Pitch_60", "Velocity_63", duration]
            music = np.array([tokenizer.vocab[name] for name in names])
            found = meters.factors(music, tempo, signature)
            assert (Fraction(1, 2) in found) == (meters.steps % 2 == 0)
            for factor in found:
                steps = meters.durations[int(meters.rewrite(music, tempo, signature, factor)[-1])]
                wanted = float(meters.durations[int(music[-1])] * factor)
                assert abs(steps - wanted) == min(abs(each - wanted) for each in meters.durations.values())


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_the_music_sounds_the_same(data: Any) -> None:
    """Onsets move only by the rounding of the tempo, durations also by that of a step, and all tokens can be played."""
    tokenizer = build_tokenizer()
    meters, facts, grammar = Meters(tokenizer), vocabulary(tokenizer), build_grammar(tokenizer)
    name = {number: token for token, number in tokenizer.vocab.items()}
    signature = data.draw(st.sampled_from(facts.time_signature_ids))
    beats, unit = map(int, name[signature].split("_")[1].split("/"))
    tempo = data.draw(st.sampled_from(facts.tempo_ids))
    music: list[int] = []
    for bar in range(data.draw(st.integers(1, 4))):
        music += [facts.bar_id, signature]
        steps = sorted(data.draw(st.sets(st.integers(0, 12 * beats - 1), max_size=4)) | ({0} if bar == 0 else set()))
        for step in steps:
            music.append(tokenizer.vocab[f"Position_{step}"])
            music += [tempo] if bar == step == 0 else []
            music += [data.draw(st.sampled_from(facts.pitch_ids)), facts.velocity_ids[9]]
            music.append(facts.duration_ids[data.draw(st.integers(0, 11))])  # at most a beat: four beats if written
    row = np.array(music)
    before = heard(tokenizer, row)
    other = data.draw(st.sampled_from(facts.time_signature_ids))
    for factor in meters.factors(row, tempo, other):
        assert factor in FACTORS
        written = meters.rewrite(row, tempo, other, factor)
        after = heard(tokenizer, written)
        wanted = float(name[tempo][6:]) * float(factor) * unit / int(name[other].split("/")[1])
        rounding = wanted / meters.tempos[int(written[3])]
        step = 60 / wanted * 4 / int(name[other].split("/")[1]) / 12  # seconds
        assert np.array_equal(before[:, 2], after[:, 2])
        np.testing.assert_allclose(after[:, 0], before[:, 0] * rounding, atol=2e-3, rtol=1e-3)
        np.testing.assert_allclose(after[:, 1], before[:, 1] * rounding, atol=step * rounding + 2e-3)
        signatures = written[np.isin(written, facts.time_signature_ids)]
        assert set(signatures.tolist()) == {other}
        tokens = torch.from_numpy(written)[None]
        assert not unplayable(tokens, 1, torch.ones(1, len(written) - 1), grammar).any()
