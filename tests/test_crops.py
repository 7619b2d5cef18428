"""smart.crops: training rows, where they begin, and how they are moved."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from smart.crops import Crops
from smart.tokens import build_tokenizer, vocabulary


def piece(length: int, first: int = 21) -> np.ndarray[Any, Any]:
    """Distinct, recognisable ids."""
    return (first + np.arange(length)).astype(np.uint16)


def test_short_pieces_are_whole_and_padded(tokenizer: Any) -> None:
    facts = vocabulary(tokenizer)
    rows = Crops([piece(5)], tokenizer, crop=16).batch(4, np.random.default_rng(0))
    expected = [facts.bos_id, *piece(5).tolist(), facts.eos_id] + [facts.pad_id] * 9
    assert rows.tolist() == [expected] * 4


def test_crops_are_windows_of_the_piece(tokenizer: Any) -> None:
    facts = vocabulary(tokenizer)
    whole = [facts.bos_id, *piece(300, 100).tolist(), facts.eos_id]
    rows = Crops([piece(300, 100)], tokenizer, crop=32).batch(500, np.random.default_rng(0)).tolist()
    starts = {whole.index(row[0]) for row in rows}
    assert all(row == whole[whole.index(row[0]) :][:32] for row in rows)
    assert len(starts) > 200 and min(starts) < 10 and max(starts) > 260  # from everywhere


def test_tokens_are_seen_in_proportion(tokenizer: Any) -> None:
    """A piece ten times as long is drawn ten times as often."""
    crops = Crops([piece(62, 21), np.resize(piece(100, 200), 638)], tokenizer, crop=64)
    rows = crops.batch(4000, np.random.default_rng(1))
    share = (rows == 21).any(dim=1).float().mean().item()
    assert share == pytest.approx(1 / 11, abs=4 * math.sqrt(1 / 11 / 4000))


def test_openings(tokenizer: Any) -> None:
    facts = vocabulary(tokenizer)
    rows = Crops([piece(300, 100)], tokenizer, crop=16, openings=1.0).batch(400, np.random.default_rng(1))
    assert set(rows[:, 0].tolist()) == {facts.bos_id, 100}
    assert (rows[:, 0] == facts.bos_id).float().mean().item() == pytest.approx(0.5, abs=0.1)


def test_transposition_moves_every_pitch_alike_and_nothing_else(tokenizer: Any) -> None:
    facts = vocabulary(tokenizer)
    pitches, others = facts.pitch_ids, facts.velocity_ids
    music = np.array([facts.bar_id, pitches[40], others[3], pitches[44], others[7], pitches[-1]], dtype=np.uint16)
    rows = Crops([music], tokenizer, crop=8, transpose=5).batch(300, np.random.default_rng(2))
    shifts = rows[:, 2] - pitches[40]
    assert set(shifts.tolist()) == {-5, -4, -3, -2, -1, 0}  # the highest key cannot go up
    assert torch.equal(rows[:, 4] - pitches[44], shifts) and torch.equal(rows[:, 6] - pitches[-1], shifts)
    assert (rows[:, [1, 3, 5]] == torch.tensor([facts.bar_id, others[3], others[7]])).all()


def test_velocities_and_tempos_are_shifted_alike_within_their_range(tokenizer: Any) -> None:
    """Every velocity of a row moves by the same number of steps, every tempo by another, and nothing else moves."""
    facts = vocabulary(tokenizer)
    loud, fast = facts.velocity_ids, facts.tempo_ids
    whole = np.array([facts.bar_id, fast[5], facts.pitch_ids[40], loud[1], fast[7], facts.pitch_ids[3], loud[9]])
    rows = Crops([whole.astype(np.uint16)], tokenizer, crop=len(whole) + 2, velocity_shift=3, tempo_shift=4).batch(
        400, np.random.default_rng(0)
    )
    moved = rows[:, 1:-1].numpy() - whole
    assert not moved[:, [0, 2, 5]].any()
    assert (moved[:, 1] == moved[:, 4]).all() and (moved[:, 3] == moved[:, 6]).all()
    assert set(moved[:, 3].tolist()) == {-1, 0, 1, 2, 3}  # the softest velocity is one step from the end
    assert set(moved[:, 1].tolist()) == set(range(-4, 5))


def test_transposition_leaves_drums_and_programs_alone() -> None:
    tokenizer = build_tokenizer("all")
    names = ["Program_48", "Pitch_60", "Velocity_63", "Duration_1.0.12"]
    names += ["Program_-1", "PitchDrum_27", "Velocity_63", "Duration_1.0.12"]
    names += ["Program_33", "Pitch_40", "Velocity_63", "Duration_1.0.12", "Program_-1", "PitchDrum_87"]
    music = np.array([tokenizer.vocab[name] for name in names], dtype=np.uint16)
    rows = Crops([music], tokenizer, crop=16, transpose=5).batch(300, np.random.default_rng(2))
    seen = set()
    for row in rows.tolist():
        heard = [tokenizer[token] for token in row[1:15]]
        shift = int(heard[1].removeprefix("Pitch_")) - 60
        seen.add(shift)
        expected = [f"Pitch_{60 + shift}" if name == "Pitch_60" else name for name in names]
        assert heard == [f"Pitch_{40 + shift}" if name == "Pitch_40" else name for name in expected]
    assert seen == set(range(-5, 6))


def test_training_rows_in_every_time_signature(tokenizer: Any) -> None:
    facts = vocabulary(tokenizer)
    names = ["Bar_None", "TimeSig_4/4"]
    for position in (0, 12, 24, 36):
        names += [f"Position_{position}", f"Pitch_{60 + position}", "Velocity_63", "Duration_1.0.12"]
    bar = [tokenizer.vocab[name] for name in names]
    music = np.array([*bar[:3], facts.tempo_ids[15], *bar[3:], *bar * 30], dtype=np.uint16)

    def signatures(rows: Any) -> list[int]:
        """The only time signature of each row."""
        each = [set(row.tolist()) & set(facts.time_signature_ids) for row in rows]
        assert all(len(found) == 1 for found in each)
        return [found.pop() for found in each]

    rows = Crops([music], tokenizer, crop=64, meters=0.5, openings=0.3).batch(600, np.random.default_rng(0))
    found = signatures(rows)
    assert set(found) == set(facts.time_signature_ids)
    assert 0.4 < np.mean([each != tokenizer.vocab["TimeSig_4/4"] for each in found]) < 0.55  # 14 of 15 of the half
    rewritten = [row for row, each in zip(rows.tolist(), found, strict=True) if each != tokenizer.vocab["TimeSig_4/4"]]
    for row in rewritten:
        row = row[row[0] == facts.bos_id :]
        assert row[0] == facts.bar_id and row[2] == facts.position0_id and row[3] in facts.tempo_ids  # like a prompt
    plain = Crops([music], tokenizer, crop=64, openings=0.3).batch(600, np.random.default_rng(0))
    assert set(signatures(plain)) == {tokenizer.vocab["TimeSig_4/4"]}
