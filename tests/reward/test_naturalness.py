"""python -m smart.reward.naturalness: corruptions, excerpts, the loss, and training from a folder to a file."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors import safe_open
from safetensors.torch import load_file
from symusic import ControlChange, Note, Score, Tempo, Track

from smart.corpus import Reject
from smart.render import Notes, check_notes
from smart.reward import load_reward
from smart.reward.ear import LAYOUTS, Ear, Network
from smart.reward.naturalness import training
from smart.reward.naturalness.command import main
from smart.reward.naturalness.corruptions import ALL, HELD_OUT, KINDS, corrupt
from smart.reward.naturalness.excerpts import Pieces, draw_excerpt, not_music, read_piece
from smart.reward.naturalness.measure import EVERY, REAL, auc
from smart.reward.naturalness.program import _centre
from smart.reward.naturalness.training import augment, pair_loss
from smart.reward.spectra import KINDS as SPECTRA

ON, LONG, PITCH, LOUD = range(4)


def piece(seed: int, seconds: float = 30.0) -> Notes:
    """Notes of two hands in a scale, n x 6."""
    draw = np.random.default_rng(seed)
    scale = np.array([p for p in range(36, 90) if (p + seed) % 12 in (0, 2, 4, 5, 7, 9, 11)])
    on = np.arange(0, seconds, 0.25)
    low = scale[np.clip(4 + np.cumsum(draw.integers(-1, 2, len(on))), 0, 12)]
    high = scale[np.clip(18 + np.cumsum(draw.integers(-2, 3, len(on))), 14, len(scale) - 1)]
    rows = [(t, 0.3, p, v, 0, 0) for t, two in zip(on, zip(low, high, strict=True), strict=True)
            for p, v in zip(two, draw.integers(50, 100, 2), strict=True)]  # fmt: skip
    return np.array(rows, np.float64)


def write(path: Path, notes: Notes) -> None:
    score = Score(480)
    score.tempos.append(Tempo(0, qpm=120.0))
    score.tracks.append(Track(program=0))
    for on, long, pitch, loud, *_ in notes.tolist():
        score.tracks[0].notes.append(Note(round(on * 960), round(long * 960), int(pitch), int(loud)))
    score.dump_midi(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("midi")
    for number in range(16):
        write(made / f"{number}.mid", piece(number))
    return made


# --- corruptions


@pytest.mark.parametrize("kind", list(ALL))
def test_a_corruption_changes_notes_and_leaves_them_playable(kind: str) -> None:
    draw = np.random.default_rng(1)
    notes, other = piece(1, 10.0), piece(2, 10.0)
    kept = notes.copy()
    made = [corrupt(kind, notes, other, draw) for _ in range(20)]
    assert np.array_equal(notes, kept), "the excerpt itself is not touched"
    for clip in made:
        check_notes(clip)
        assert clip.shape[1] == 6 and len(clip)
        assert clip[:, ON].max() < 10 and ((clip[:, PITCH] >= 21) & (clip[:, PITCH] <= 108)).all()
        assert (clip[:, LOUD] >= 1).all() and not np.array_equal(clip, notes)
    again = np.random.default_rng(1)
    assert all(np.array_equal(corrupt(kind, notes, other, again), clip) for clip in made)


def test_the_measured_corruptions_do_what_their_names_say() -> None:
    draw = np.random.default_rng(0)
    notes = piece(3, 10.0)
    off = corrupt("half of the notes a semitone off", notes, notes, draw)
    moved = np.abs(np.sort(off[:, PITCH])[:, None] - np.sort(notes[:, PITCH])[None]).min(axis=1)
    assert len(off) == len(notes) and moved.max() <= 1
    hand = corrupt("right hand a semitone up", notes, notes, draw)
    assert 0.2 * len(notes) < hand[:, PITCH].sum() - notes[:, PITCH].sum() < 0.8 * len(notes)
    cells = corrupt("half-second cells shuffled", notes, notes, draw)
    assert np.allclose(np.sort(cells[:, ON] % 0.5), np.sort(notes[:, ON] % 0.5))
    assert sorted(cells[:, PITCH]) == sorted(notes[:, PITCH])
    assert not set(HELD_OUT) & set(KINDS)


# --- excerpts


def test_the_pedal_holds_notes(tmp_path: Path) -> None:
    score = Score(480)
    score.tempos.append(Tempo(0, qpm=60.0))  # a quarter is a second
    score.tracks.append(Track(program=5))
    notes = [(0, 60), (1, 60), (1, 64), (4, 67)]
    score.tracks[0].notes.extend(Note(480 * at, 240, pitch, 80) for at, pitch in notes)
    score.tracks[0].controls.extend(ControlChange(480 * at, 64, value) for at, value in ((0, 127), (3, 0)))
    score.dump_midi(tmp_path / "pedal.mid")
    found = read_piece(tmp_path / "pedal.mid")
    assert found[:, :3].tolist() == [[0, 1, 60], [1, 2, 60], [1, 2, 64], [4, 0.5, 67]]
    assert not found[:, 4].any()


def test_damaged_files_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "bad.mid").write_bytes(b"MThd\x00\x00\x00\x06\x00\x01\x00\x01\x01\xe0MTrk\x00\x00\xff\xff")
    with pytest.raises(Reject):
        read_piece(tmp_path / "bad.mid")


def test_excerpts_are_ten_seconds_of_the_piece() -> None:
    draw = np.random.default_rng(0)
    for _ in range(50):
        notes = draw_excerpt(piece(1), draw)
        assert notes is not None
        check_notes(notes)
        assert 0 <= notes[0, ON] <= 0.5 and notes[-1, ON] < 10 and len(notes) >= 12
    assert draw_excerpt(piece(1, 2.0), draw) is None


def test_parts_share_no_piece_and_held_out_ones_are_not_trained_on(folder: Path) -> None:
    whole = Pieces([folder])
    assert len(whole.all) == 16 and not set(whole.train) & set(whole.held_out)
    halves = [path for k in (1, 2) for path in _all_of(folder, (k, 2))]
    assert sorted(halves) == whole.all


def test_a_folder_that_is_named_twice_is_drawn_from_twice_as_often(folder: Path) -> None:
    once, twice = Pieces([folder]), Pieces([folder, folder])
    assert sorted(twice.train) == sorted(2 * once.train) and sorted(twice.held_out) == sorted(2 * once.held_out)


def _all_of(folder: Path, part: tuple[int, int]) -> list[Path]:
    try:
        return Pieces([folder], part).all
    except ValueError:  # a half of so few pieces may hold none out
        return [path for path in Pieces([folder]).all if path not in Pieces([folder], (3 - part[0], 2)).all]


@pytest.mark.parametrize("kind", list(SPECTRA))
def test_what_is_no_music_has_spectra_too(kind: str) -> None:
    clips = not_music(kind, 12, seed=0)
    assert clips.shape == (12, *SPECTRA[kind])
    assert torch.equal(clips, not_music(kind, 12, seed=0))


# --- the loss and its figures


def test_the_loss_is_the_one_worked_out_by_hand() -> None:
    answers = torch.tensor([2.0, 1.0, 0.0, 0.0, 0.5, -1.0])  # two excerpts: real, light, heavy
    harm = torch.tensor([0.0, 0.4, 0.8, 0.0, 0.4, 0.5])

    def loss(better: float, worse: float) -> float:
        return float(np.log1p(np.exp(worse - better)))

    within = [(1, 2, 1), (1, 2, 0), (0.25, 1, 0), (1, 0, 0.5), (1, 0, -1)]  # weight, better, worse
    across = [(1, 2, 0.5), (1, 2, -1), (1, 0, 1), (1, 0, 0), (0.25, 0.5, 0), (0.25, -1, 0)]
    parts = [sum(w * loss(a, b) for w, a, b in pairs) / sum(w for w, _, _ in pairs) for pairs in (within, across)]
    assert float(pair_loss(answers, harm, 2)) == pytest.approx(sum(parts) / 2)


def test_the_area_under_the_curve_counts_ties_half() -> None:
    assert auc([3, 1], [2, 0]) == 0.75
    assert auc([1, 1], [1, 0]) == 0.75
    assert np.isnan(auc([], [1]))


def test_silence_stays_silent_and_keys_move() -> None:
    spectra = torch.zeros(6, *SPECTRA["log"], dtype=torch.uint8)
    spectra[:, :, 40] = 200
    moved = augment(spectra, torch.Generator().manual_seed(0), 4)
    bands = (moved[:, 0, :, 0] > 0).nonzero()[:, 1]
    assert len(bands) == 6 and len(set(bands.tolist())) > 1 and ((bands >= 36) & (bands <= 44)).all()


# --- the program

SMALL = ["--excerpts=12", "--corruptions=2", "--held-out=8", "--members=2", "--steps=3", "--batch=4"]
SMALL += ["--precision=float32", "--spectra=mel"]


def train(folder: Path, out: Path, *more: str) -> Result:
    words = ["train", "--midi", str(folder), "--out", str(out), "--work", str(out.with_suffix(".work"))]
    return CliRunner().invoke(main, [*words, *SMALL, *more])


def flip(file: Path) -> None:
    """Flip a bit near the end of a file."""
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)


def contents(file: Path) -> tuple[dict[str, str], dict[str, bytes]]:
    """Metadata and tensors; safetensors writes its metadata in no fixed order."""
    with safe_open(file, "pt") as opened:
        tensors = {name: opened.get_tensor(name).numpy().tobytes() for name in opened.keys()}  # noqa: SIM118
        return opened.metadata(), tensors


def test_an_embedding_is_centred_on_the_real_excerpts() -> None:
    """With the origin that training finds, the mean embedding of the real excerpts is 0; corruptions do not count."""
    torch.manual_seed(0)
    network = Network(LAYOUTS["mel"]).eval()
    spectra = torch.randint(0, 256, (3, len(EVERY), *SPECTRA["mel"]), dtype=torch.uint8)
    stored = SimpleNamespace(places=[0, 1, 2], clip=lambda group, place: spectra[group, place])
    network.origin = _centre(network, stored)  # type: ignore[arg-type]  # all it needs of a Stored
    real, other = (network.embed(spectra[:, place]).mean(dim=0) for place in (EVERY.index(REAL), 1))
    assert real.abs().max() < 1e-2 < other.abs().max()  # the file's weights have 16 bits


@pytest.mark.slow
def test_training_from_a_folder_to_a_reward_and_again_after_it_was_interrupted(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smart.reward.naturalness.program.EVERY_STEPS", 1)
    monkeypatch.setattr(training, "NOT_MUSIC", 6)
    whole = tmp_path / "whole.safetensors"
    result = train(folder, whole)
    assert result.exit_code == 0, result.output
    assert (
        "AUC" in result.output and "half-second cells shuffled" in result.output and f"wrote {whole}" in result.output
    )
    ear = load_reward("naturalness", model=whole)
    assert isinstance(ear, Ear) and ear.facts["pieces"] + ear.facts["held_out_pieces"] == 16
    assert 5 < ear.real["NA"] < 9 and set(ear.real_by_soundfont) == {"timgm"}  # 7 where it learnt, here held out
    assert len(ear.facts["curves"]) == 2 and [entry[0] for entry in ear.facts["curves"][0]] == [1, 2, 3]

    assert load_file(whole)["1.origin"].abs().max() > 0.01  # every network has one

    run, calls = training.Trainer.run, [0]

    def stops(self: training.Trainer) -> object:
        for figures in run(self):
            calls[0] += 1
            if calls[0] == 5:  # the second network, its second step
                raise KeyboardInterrupt
            yield figures

    part = tmp_path / "part.safetensors"
    monkeypatch.setattr(training.Trainer, "run", stops)
    assert train(folder, part).exit_code != 0
    monkeypatch.setattr(training.Trainer, "run", run)
    last = sorted((tmp_path / "part.work" / "train").glob("*.npy"))[-1]
    last.unlink()  # as if it had stopped while rendering, too
    harm = last.with_name("000000.harm")
    flip(harm if last.name == "000000.npy" else last.with_name("000000.npy"))
    again = train(folder, part)
    assert again.exit_code == 0, again.output
    assert contents(part) == contents(whole)
    file = part.with_suffix(".work") / "member-0.safetensors"
    flip(file)
    assert "its checksum is not the recorded one" in train(folder, part, "--overwrite").output
    flip(file)
    flip(part.with_suffix(".work") / "test" / "000000.npy")
    again = train(folder, part, "--overwrite")
    assert "is damaged; its excerpts are rendered again" in again.output and contents(part) == contents(whole)

    other = train(folder, part, "--overwrite", "--seed", "2")
    assert other.exit_code == 2 and "holds excerpts of other pieces, soundfonts or settings" in other.output
    settings = train(folder, part, "--overwrite", "--learning-rate", "0.1")
    assert settings.exit_code == 2 and "cannot be continued" in settings.output
    exists = train(folder, part)
    assert exists.exit_code == 2 and "already exists" in exists.output
    damaged = tmp_path / "part.work" / "member-0.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    assert "cannot be continued" in train(folder, part, "--overwrite").output

    words = ["test", str(whole), "--midi", str(folder), "--excerpts", "2", "--kind", "loop", "--out"]
    tested = CliRunner().invoke(main, [*words, str(tmp_path / "figures.json")])
    assert tested.exit_code == 0, tested.output
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert set(figures["kinds"]) == {"real", "loop"} and "weights" in figures["ear"]
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--midi", "{empty}"), "holds 0 MIDI files"),
        (("--midi", "{empty}/none"), "is not a folder"),
        (("--midi", "{folder}", "--soundfonts", "nothing"), "neither a file nor a short name"),
        (("--midi", "{folder}", "--part", "3/2"), "expected K/N"),
        (("--midi", "{folder}", "--out", "{empty}/none/ear"), "does not exist"),
        (("--midi", "{short}"), "none has ten seconds"),
    ],
)
def test_a_users_mistake_is_one_clear_line(folder: Path, tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    empty, short = tmp_path / "empty", tmp_path / "short"
    empty.mkdir()
    short.mkdir()
    for number in range(16):
        write(short / f"{number}.mid", piece(number, 1.0))
    out = () if "--out" in words else ("--out", str(tmp_path / "ear"))
    filled = [word.format(empty=empty, folder=folder, short=short) for word in words]
    result = CliRunner().invoke(main, ["train", *out, *filled, *SMALL])
    assert result.exit_code == 2 and said in result.output, result.output
    assert "Traceback" not in result.output


def test_an_unknown_kind_is_named(folder: Path) -> None:
    result = CliRunner().invoke(main, ["test", "naturalness", "--midi", str(folder), "--kind", "noise"])
    assert result.exit_code == 2 and 'there is no corruption "noise"' in result.output
