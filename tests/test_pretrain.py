"""smart.pretrain's parts; whole runs are in test_runs.py."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from smart import UserError
from smart.config import Data, Optimisation
from smart.distributed import World
from smart.pretrain import Crops, evaluate, learning_rate, next_token_loss
from smart.tokens import build_tokenizer, vocabulary


def piece(length: int, first: int = 21) -> np.ndarray[Any, Any]:
    """Distinct, recognisable ids."""
    return (first + np.arange(length)).astype(np.uint16)


def test_short_pieces_are_whole_and_padded(tokenizer: Any) -> None:
    facts = vocabulary(tokenizer)
    rows = Crops([piece(5)], facts, Data(crop=16)).batch(4, np.random.default_rng(0))
    expected = [facts.bos_id, *piece(5).tolist(), facts.eos_id] + [facts.pad_id] * 9
    assert rows.tolist() == [expected] * 4


def test_a_split_without_pieces_is_a_users_mistake(tokenizer: Any) -> None:
    with pytest.raises(UserError, match="corpus somewhere: a split that training needs is empty"):
        Crops([], vocabulary(tokenizer), Data(corpus="somewhere"))


def test_crops_are_windows_of_the_piece(tokenizer: Any) -> None:
    facts = vocabulary(tokenizer)
    whole = [facts.bos_id, *piece(300, 100).tolist(), facts.eos_id]
    rows = Crops([piece(300, 100)], facts, Data(crop=32)).batch(500, np.random.default_rng(0)).tolist()
    starts = {whole.index(row[0]) for row in rows}
    assert all(row == whole[whole.index(row[0]) :][:32] for row in rows)
    assert len(starts) > 200 and min(starts) < 10 and max(starts) > 260  # from everywhere


def test_tokens_are_seen_in_proportion(tokenizer: Any) -> None:
    """A piece ten times as long is drawn ten times as often."""
    crops = Crops([piece(62, 21), np.resize(piece(100, 200), 638)], vocabulary(tokenizer), Data(crop=64))
    rows = crops.batch(4000, np.random.default_rng(1))
    share = (rows == 21).any(dim=1).float().mean().item()
    assert share == pytest.approx(1 / 11, abs=4 * math.sqrt(1 / 11 / 4000))


def test_openings(tokenizer: Any) -> None:
    facts = vocabulary(tokenizer)
    rows = Crops([piece(300, 100)], facts, Data(crop=16, openings=1.0)).batch(400, np.random.default_rng(1))
    assert set(rows[:, 0].tolist()) == {facts.bos_id, 100}
    assert (rows[:, 0] == facts.bos_id).float().mean().item() == pytest.approx(0.5, abs=0.1)


def test_transposition_moves_every_pitch_alike_and_nothing_else(tokenizer: Any) -> None:
    facts = vocabulary(tokenizer)
    pitches, others = facts.pitch_ids, facts.velocity_ids
    music = np.array([facts.bar_id, pitches[40], others[3], pitches[44], others[7], pitches[-1]], dtype=np.uint16)
    rows = Crops([music], facts, Data(crop=8, transpose=5)).batch(300, np.random.default_rng(2))
    shifts = rows[:, 2] - pitches[40]
    assert set(shifts.tolist()) == {-5, -4, -3, -2, -1, 0}  # the highest key cannot go up
    assert torch.equal(rows[:, 4] - pitches[44], shifts) and torch.equal(rows[:, 6] - pitches[-1], shifts)
    assert (rows[:, [1, 3, 5]] == torch.tensor([facts.bar_id, others[3], others[7]])).all()


def test_transposition_leaves_drums_and_programs_alone() -> None:
    tokenizer = build_tokenizer("all")
    names = ["Program_48", "Pitch_60", "Velocity_63", "Duration_1.0.12"]
    names += ["Program_-1", "PitchDrum_27", "Velocity_63", "Duration_1.0.12"]
    names += ["Program_33", "Pitch_40", "Velocity_63", "Duration_1.0.12", "Program_-1", "PitchDrum_87"]
    music = np.array([tokenizer.vocab[name] for name in names], dtype=np.uint16)
    rows = Crops([music], vocabulary(tokenizer), Data(crop=16, transpose=5)).batch(300, np.random.default_rng(2))
    seen = set()
    for row in rows.tolist():
        heard = [tokenizer[token] for token in row[1:15]]
        shift = int(heard[1].removeprefix("Pitch_")) - 60
        seen.add(shift)
        expected = [f"Pitch_{60 + shift}" if name == "Pitch_60" else name for name in names]
        assert heard == [f"Pitch_{40 + shift}" if name == "Pitch_40" else name for name in expected]
    assert seen == set(range(-5, 6))


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
