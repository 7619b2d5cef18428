"""smart.rollout: the same prompts and random numbers for every system, in any slice; what a system's name means."""

import gc
import math
import weakref
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_tiny_model

from smart import UserError
from smart.config import dumps, load
from smart.grpo import token_logprobs
from smart.model import build_model, find_base, load_base, save_base
from smart.render import RenderError, RenderPool, score_notes
from smart.reward import load_reward, resample
from smart.rollout import Piece, System, compare, compose, find_system, find_systems, is_the_papers, seed_of
from smart.run.checkpoint import save
from smart.tokens import build_tokenizer, decode

RATE = 22050
SMALL: dict[str, Any] = {
    "soundfont": "timgm", "sample_rate": RATE, "seconds": 2.0, "workers": 1, "max_new_tokens": 40, "batch": 4,
    "device": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module")
def systems(tmp_path_factory: pytest.TempPathFactory) -> list[System]:
    """The shipped base, a random model of its vocabulary, and one that knows all instruments."""
    folder = tmp_path_factory.mktemp("models")
    piano, everything = build_tokenizer(), build_tokenizer("all")
    save_base(make_tiny_model(piano), piano, folder / "tiny")
    model = build_model(everything, layers=1, hidden=32, heads=2, intermediate=32, seed=3)
    save_base(model, everything, folder / "band")
    return find_systems(["piano-small", str(folder / "tiny"), f"all={folder / 'band'}"])


@pytest.fixture(scope="module")
def whole(systems: list[System]) -> list[Piece]:
    return list(compose(systems, count=6, rewards=[load_reward("ce_proxy")], **SMALL))


def of(pieces: list[Piece], system: str) -> dict[int, Piece]:
    return {piece.prompt: piece for piece in pieces if piece.system == system}


def test_every_system_gets_the_same_prompts_and_seeds(systems: list[System], whole: list[Piece]) -> None:
    assert [(piece.system, piece.prompt) for piece in whole] == [
        (name, prompt)
        for block in (range(4), range(4, 6))
        for name in ("piano-small", "tiny", "all")
        for prompt in block
    ]
    names = {}
    for system in systems:
        tokenizer = load_base(system.model)[1]
        said = {number: token for token, number in tokenizer.vocab.items()}
        mine = of(whole, system.name)
        names[system.name] = [[said[token] for token in mine[i].tokens[: mine[i].prompt_length]] for i in range(6)]
        assert [mine[i].seed for i in range(6)] == [seed_of(1, i) for i in range(6)]
    assert names["piano-small"] == names["tiny"] == names["all"]
    assert len({tuple(prompt) for prompt in names["tiny"]}) == 6
    assert [part.split("_")[0] for part in names["tiny"][0]] == ["Bar", "TimeSig", "Position", "Tempo"]
    assert of(whole, "all")[0].tokens[0] != of(whole, "all")[0].tokens[1]
    assert of(whole, "piano-small")[0].tokens != of(whole, "tiny")[0].tokens


def test_audio_is_freed_with_its_block(systems: list[System], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without waiting for a collection of garbage, and before the next but one is drawn."""
    heard: list[Any] = []
    alive: list[int] = []
    draw = compare._draw

    def watched(*words: Any, **options: Any) -> Any:
        alive.append(sum(audio() is not None for audio in heard))
        return draw(*words, **options)

    monkeypatch.setattr(compare, "_draw", watched)
    gc.disable()
    try:
        for piece in compose(systems[:1], count=6, **{**SMALL, "batch": 2}):
            heard.append(weakref.ref(piece.audio))
            del piece
    finally:
        gc.enable()
    assert alive == [0, 0, 0] and len(heard) == 6


def test_a_clip_that_failed_is_asked_for_its_error() -> None:
    """Raised, the error would hold every frame that it passes, and the audio in them."""
    lost: Future[Any] = Future()
    lost.set_exception(RenderError("twice"))
    assert compare.rendered_audio(lost) is None
    error = lost.exception()
    assert error is not None and error.__traceback__ is None


def test_a_model_twice_writes_the_same_twice(systems: list[System]) -> None:
    pair = [systems[0], systems[0]._replace(name="again")]
    pieces = list(compose(pair, count=4, **SMALL))
    for one, two in zip(pieces[:4], pieces[4:], strict=True):
        assert one.tokens == two.tokens and one.logprobs == two.logprobs and one.scores == {}
        np.testing.assert_array_equal(one.audio, two.audio)


@pytest.mark.parametrize(("first", "count"), [(0, 6), (4, 2), (2, 3), (5, 1)])
def test_a_slice_is_a_part_of_the_whole(systems: list[System], whole: list[Piece], first: int, count: int) -> None:
    """Bit for bit, in another company of systems too."""
    pieces = list(compose(systems[:1], first=first, count=count, rewards=[load_reward("ce_proxy")], **SMALL))
    assert [piece.prompt for piece in pieces] == list(range(first, first + count))
    for piece in pieces:
        same = of(whole, "piano-small")[piece.prompt]
        assert (piece.tokens, piece.logprobs, piece.seed) == (same.tokens, same.logprobs, same.seed)
        np.testing.assert_array_equal(piece.audio, same.audio)
        assert piece.scores == pytest.approx(same.scores, abs=1e-4)


def test_another_seed_is_another_prompt_and_piece(systems: list[System], whole: list[Piece]) -> None:
    other = list(compose(systems[:1], count=6, seed=2, **SMALL))
    assert [piece.tokens[:4] for piece in other] != [of(whole, "piano-small")[i].tokens[:4] for i in range(6)]
    assert len({seed_of(seed, prompt) for seed in range(3) for prompt in range(1000)}) == 3000


def test_what_a_piece_says_of_itself_is_so(systems: list[System], whole: list[Piece]) -> None:
    """Audio, rating, log-probability and length against the plain way of computing each."""
    model, tokenizer = load_base(systems[0].model)
    reward = load_reward("ce_proxy")
    with RenderPool("timgm", sample_rate=RATE, seconds=2.0, workers=1) as pool:
        for piece in of(whole, "piano-small").values():
            assert piece.prompt_length == 4 and piece.length == len(piece.tokens) - 4 <= 40
            rows = torch.tensor([piece.tokens])
            with torch.no_grad():
                assert piece.logprobs == pytest.approx(token_logprobs(model, rows, 4).sum().item(), abs=1e-3)
            score = decode(tokenizer, piece.tokens)
            np.testing.assert_array_equal(score_notes(piece.score), score_notes(score))
            audio = pool.submit(score).result()
            assert piece.audio is not None
            np.testing.assert_array_equal(piece.audio, audio)
            clip = resample(torch.from_numpy(audio).mean(0), RATE, reward.sample_rate)[None]
            assert piece.scores == {"ce_proxy.CE": pytest.approx(reward.score(clip)["CE"].item(), abs=1e-4)}


def test_a_clip_that_fails_is_kept_without_audio_and_score(
    systems: list[System], whole: list[Piece], monkeypatch: pytest.MonkeyPatch
) -> None:
    render, asked = RenderPool._render, []

    def fails(pool: RenderPool, place: int, notes: Any) -> Any:
        asked.append(notes)
        if len(asked) == 2:
            raise RenderError("twice")
        return render(pool, place, notes)

    monkeypatch.setattr(RenderPool, "_render", fails)
    pieces = list(compose(systems[:1], count=4, rewards=[load_reward("ce_proxy")], **SMALL))
    (lost,) = [piece for piece in pieces if piece.audio is None]
    assert math.isnan(lost.scores["ce_proxy.CE"]) and lost.tokens == of(whole, "piano-small")[lost.prompt].tokens
    for piece in pieces:
        if piece is not lost:
            assert piece.scores == pytest.approx(of(whole, "piano-small")[piece.prompt].scores, abs=1e-4)


def test_rendering_overlaps_with_drawing(systems: list[System], monkeypatch: pytest.MonkeyPatch) -> None:
    """No block waits for its clips before the next has been drawn."""
    happened: list[str] = []
    import smart.rollout.compare as room

    draw, pieces = room._draw, room._pieces

    def drawing(*arguments: Any, **options: Any) -> Any:
        happened.append("draw")
        return draw(*arguments, **options)

    def rating(*arguments: Any) -> Iterator[Piece]:
        happened.append("rate")
        yield from pieces(*arguments)

    monkeypatch.setattr(room, "_draw", drawing)
    monkeypatch.setattr(room, "_pieces", rating)
    assert len(list(compose(systems[:1], count=12, **SMALL))) == 12
    assert happened == ["draw", "draw", "rate", "draw", "rate", "rate"]


def test_mistakes_are_named_before_anything_is_drawn(systems: list[System], tmp_path: Path) -> None:
    narrow = build_tokenizer()
    config = narrow.config
    config.tempo_range, config.num_tempos = (40, 250), 8
    narrow = type(narrow)(config)
    model = build_model(narrow, layers=1, hidden=32, heads=2, intermediate=32)
    save_base(model, narrow, tmp_path / "narrow")
    both = [systems[0], find_system(str(tmp_path / "narrow"))]
    with pytest.raises(UserError, match=r"narrow: its vocabulary has no Tempo_[\d.]+, which prompt \d+ contains"):
        compose(both, count=6, **SMALL)
    with pytest.raises(UserError, match="'dataset' need a corpus"):
        compose(systems, prompts="dataset", count=1, **SMALL)
    with pytest.raises(UserError, match="4000 new tokens were asked for, but it has room for 2040"):
        compose(systems, count=1, **SMALL | {"max_new_tokens": 4000})
    with pytest.raises(UserError, match="expected each once, got ce_proxy, ce_proxy"):
        compose(systems, count=1, rewards=[load_reward("ce_proxy")] * 2, **SMALL)
    with pytest.raises(UserError, match="two models are called 'piano-small'"):
        find_systems(["piano-small", "piano-small"])
    assert [s.name for s in find_systems(["piano-small", "b=piano-small"])] == ["piano-small", "b"]


def test_dataset_prompts_come_from_the_split(systems: list[System], tmp_path: Path) -> None:
    from symusic import Note, Score, Tempo, TimeSignature, Track

    from smart.corpus.build import build

    (tmp_path / "midi").mkdir()
    for number in range(40):
        score = Score(480)
        score.tempos.append(Tempo(0, 100))
        score.time_signatures.append(TimeSignature(0, 3, 4))
        score.tracks.append(Track(program=0))
        for beat in range(24):
            score.tracks[0].notes.append(Note(480 * beat, 480, 40 + number, 40 + beat))
        score.dump_midi(tmp_path / "midi" / f"{number}.mid")
    build([tmp_path / "midi"], tmp_path / "corpus")
    options = SMALL | {"prompts": "dataset", "corpus": tmp_path / "corpus"}
    for piece in compose(systems[1:], count=3, **options):
        signature, tempo = piece.score.time_signatures[0], piece.score.tempos[0]
        assert (signature.numerator, signature.denominator) == (3, 4) and tempo.qpm == pytest.approx(100, abs=0.1)


def test_the_papers_models_are_known_by_base_and_reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tmp_path / "cache"
    monkeypatch.setattr("smart.hub.find_cached", lambda *_: [base / "config.json"])
    assert is_the_papers(System("p", base, None, None)) and is_the_papers(System("r@base", base, tmp_path, 0))
    assert not is_the_papers(System("p", tmp_path, None, None)), "another base"
    for changed, expected in {
        "": True, "model.base=piano-small": False, "reward.kind=ce_proxy": False, "reward.options.model=mine": False,
    }.items():  # fmt: skip
        config = load("paper.toml", [changed] if changed else [])
        (tmp_path / "config.toml").write_text(dumps(config))
        assert is_the_papers(System("r", tmp_path / "tuned", tmp_path, 200)) == expected, changed


def test_a_run_is_a_system(tmp_path: Path) -> None:
    """A finished run gives its tuned model, an unfinished one its newest checkpoint, one without either is refused."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.toml").write_text('[model]\nbase = "piano-small"\n[grpo]\niterations = 9\n')
    with pytest.raises(UserError, match="has not saved a model yet"):
        find_system(str(run))
    base = find_base("piano-small")
    assert find_system(f"{run}@base") == System("run@base", base, run, 0)
    model, tokenizer = load_base("piano-small")
    for step in (3, 7):
        save(run / "checkpoints", step, lambda folder: save_base(model, tokenizer, folder))
    assert find_system(str(run)) == System("run", run / "checkpoints" / "00000007", run, 7)
    assert find_system(f"early={run}@3") == System("early", run / "checkpoints" / "00000003", run, 3)
    with pytest.raises(
        UserError, match=r"run@4: expected .*run@base, or .*run@STEP with the step of a checkpoint: 3, 7"
    ):
        find_system(f"{run}@4")
    save_base(model, tokenizer, run / "tuned")
    assert find_system(str(run)) == System("run", run / "tuned", run, 9)
    assert find_system(str(run / "tuned")) == System("tuned", run / "tuned", None, None)
    assert find_system("piano-small") == System("piano-small", base, None, None)
    with pytest.raises(UserError, match="no such folder"):
        find_system("nothing/here/at-all")


def test_a_pretraining_is_a_system(tmp_path: Path) -> None:
    run = tmp_path / "run"
    model, tokenizer = load_base("piano-small")
    save_base(model, tokenizer, run / "base")
    (run / "config.toml").write_text('[model]\nbase = ""\n')
    assert find_system(str(run)) == System("run", run / "base", run, None)
    assert find_system(f"{run}@base") == System("run@base", run / "base", run, 0)


def test_a_prompt_may_have_several_samples(systems: list[System], whole: list[Piece]) -> None:
    pieces = list(compose(systems[:1], count=2, samples=2, **SMALL))
    assert [(piece.prompt, piece.sample) for piece in pieces] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for first, second in (pieces[:2], pieces[2:]):
        same = of(whole, "piano-small")[first.prompt]
        assert (first.tokens, first.seed) == (same.tokens, same.seed)
        assert second.tokens[:4] == first.tokens[:4] and second.tokens != first.tokens and second.seed == first.seed
    assert list(compose(systems[:1], first=1, count=1, samples=2, **SMALL))[1].tokens == pieces[3].tokens
