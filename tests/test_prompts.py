"""smart.prompts: the right tokens, uniformly, and the same ones for the same seed."""

from typing import Any

import numpy as np
import pytest
import torch

from smart import UserError
from smart.prompts import KINDS, draw
from smart.tokens import build_tokenizer, unplayable, vocabulary

FORM = {
    "procedural": ["Bar", "TimeSig", "Position", "Tempo"],
    "first_note": ["Bar", "TimeSig", "Position", "Tempo", "Pitch", "Velocity", "Duration"],
    "bos": ["BOS"],
    "dataset": ["Bar", "TimeSig", "Position", "Tempo"],
}


def pieces(tokenizer: Any) -> list[np.ndarray[Any, Any]]:
    """Two openings: 3/4 at the slowest tempo, and 6/8 with its tempo after a first note."""
    vocab = tokenizer.vocab
    first = [
        "Bar_None",
        "TimeSig_3/4",
        "Position_0",
        "Tempo_40.0",
        "Pitch_60",
        "Velocity_63",
        "Duration_1.0.12",
    ]
    second = ["Bar_None", "TimeSig_6/8", "Position_0", "Pitch_60", "Velocity_63", "Duration_1.0.12"]
    second += ["Position_12", "Tempo_250.0", "Bar_None", "TimeSig_4/4", "Position_0", "Tempo_40.0"]
    return [np.array([vocab[token] for token in piece], dtype=np.uint16) for piece in (first, second)]


@pytest.mark.parametrize("kind", KINDS)
def test_form_and_seed(kind: str, tokenizer: Any) -> None:
    def make(seed: int) -> torch.Tensor:
        return draw(kind, 50, tokenizer, torch.Generator().manual_seed(seed), pieces=pieces(tokenizer))

    prompts = make(1)
    names = {number: token.split("_")[0] for token, number in tokenizer.vocab.items()}
    assert prompts.dtype == torch.int64
    assert all([names[token] for token in row] == FORM[kind] for row in prompts.tolist())
    assert torch.equal(prompts, make(1))
    assert kind == "bos" or not torch.equal(prompts, make(2))


def test_the_stream_goes_on_where_it_was(tokenizer: Any) -> None:
    generator = torch.Generator().manual_seed(7)
    draw("procedural", 5, tokenizer, generator)
    state = generator.get_state()
    second = draw("procedural", 5, tokenizer, generator)
    generator.set_state(state)
    assert torch.equal(draw("procedural", 5, tokenizer, generator), second)


def test_time_signatures_and_tempi_are_uniform(tokenizer: Any) -> None:
    prompts = draw("procedural", 15 * 64 * 40, tokenizer, torch.Generator().manual_seed(3))
    for column, choices in ((1, 15), (3, 64)):
        _, counts = prompts[:, column].unique(return_counts=True)
        assert len(counts) == choices  # each of them occurs
        expected = len(prompts) / choices
        chi_square = float(((counts - expected) ** 2 / expected).sum())
        assert chi_square < choices - 1 + 4 * (2 * (choices - 1)) ** 0.5  # four standard deviations


def test_dataset_prompts_are_the_pieces_first_signs(tokenizer: Any) -> None:
    prompts = draw("dataset", 200, tokenizer, torch.Generator().manual_seed(1), pieces=pieces(tokenizer))
    vocab = tokenizer.vocab
    three = [vocab[token] for token in ("Bar_None", "TimeSig_3/4", "Position_0", "Tempo_40.0")]
    six = [vocab[token] for token in ("Bar_None", "TimeSig_6/8", "Position_0", "Tempo_250.0")]
    assert {tuple(row) for row in prompts.tolist()} == {tuple(three), tuple(six)}


@pytest.mark.parametrize("kind", KINDS)
def test_form_with_many_instruments(kind: str) -> None:
    tokenizer = build_tokenizer("all")
    names = {number: token.split("_")[0] for token, number in tokenizer.vocab.items()}
    prompts = draw(kind, 3000, tokenizer, torch.Generator().manual_seed(1), pieces=pieces(tokenizer))
    forms = [FORM[kind]]
    if kind == "first_note":
        forms = [[*FORM[kind][:4], "Program", pitch, "Velocity", "Duration"] for pitch in ("Pitch", "PitchDrum")]
    assert all([names[token] for token in row] in forms for row in prompts.tolist())
    mask = torch.ones(len(prompts), prompts.shape[1] - 1, dtype=torch.bool)
    assert not unplayable(prompts, 1, mask, tokenizer).any()


def test_first_notes_are_uniform_over_programs_and_drums() -> None:
    tokenizer = build_tokenizer("all")
    facts = vocabulary(tokenizer)
    prompts = draw("first_note", 129 * 400, tokenizer, torch.Generator().manual_seed(5))
    _, counts = prompts[:, 4].unique(return_counts=True)
    assert len(counts) == 129
    assert float(((counts - 400) ** 2 / 400).sum()) < 128 + 4 * (2 * 128) ** 0.5  # four standard deviations
    drums = prompts[:, 4] == facts.drum_program_id
    for rows, ids in ((prompts[drums], facts.drum_ids), (prompts[~drums], facts.pitch_ids)):
        assert set(rows[:, 5].tolist()) == set(ids)


def test_mistakes(tokenizer: Any) -> None:
    generator = torch.Generator()
    with pytest.raises(UserError, match=r"prompts\.corpus"):
        draw("dataset", 1, tokenizer, generator)
    with pytest.raises(UserError, match="piece 0 of the corpus has no tempo"):
        draw("dataset", 1, tokenizer, generator, pieces=[pieces(tokenizer)[0][:3]])
    with pytest.raises(ValueError, match="'tune': expected one of procedural"):
        draw("tune", 1, tokenizer, generator)
