"""smart.render.bank: what it mixes is what the synthesiser plays, and what it cannot mix goes to the pool."""

import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clips import tiny_soundfont

from smart import Failure, UserError
from smart.render import Notes, RenderError, RenderPool, find_soundfont, load_soundfont, regions, render_notes
from smart.render.bank import NoteBank
from smart.render.bank_pool import BankPool
from smart.render.regions import read_regions, write_variant
from smart.reward import load_reward, resample
from smart.rollout import Clips, Scorer
from smart.sampler import Rollout

RATE, SECONDS = 22050, 3.0
DRUMS = 1


@pytest.fixture(scope="module")
def soundfont() -> Any:
    return load_soundfont("timgm")


@pytest.fixture(scope="module")
def bank() -> NoteBank:
    return NoteBank("timgm", sample_rate=RATE, seconds=SECONDS)


def music(seed: int, count: int = 40, programs: tuple[int, ...] = (0,), keys: tuple[int, int] = (30, 100)) -> Notes:
    """(count, 6) notes over a little more than a clip; every third repeats a pitch, every fifth is very short."""
    rng = np.random.default_rng(seed)
    pitch = rng.integers(*keys, count)
    pitch[::3] = pitch[0]
    duration = rng.uniform(0.05, 1.5, count)
    duration[::5] = rng.uniform(0, 0.004, len(duration[::5]))
    program = rng.choice(programs, count)
    onset = rng.uniform(0, SECONDS + 0.2, count)
    columns = (onset, duration, pitch, rng.integers(1, 128, count), program, np.zeros(count))
    return np.stack([np.asarray(column, np.float64) for column in columns], axis=1)


def note(
    onset: float, duration: float, pitch: int, velocity: int = 100, program: int = 0, drum: int = 0
) -> list[float]:
    return [onset, duration, pitch, velocity, program, drum]


def snr(expected: np.ndarray[Any, Any], found: torch.Tensor) -> float:
    """Signal-to-noise ratio in dB."""
    assert found.dtype == torch.float32 and tuple(found.shape) == expected.shape
    noise = np.square(found.cpu().numpy().astype(np.float64) - expected).sum()
    return 10 * math.log10(np.square(expected, dtype=np.float64).sum() / noise) if noise else math.inf


CLIPS = {
    "piano": music(1),
    "dense": music(2, 200),
    "one note": [note(0.1, 1.0, 60)],
    "to the end": [note(0, 1.0, 60), note(2.9, 9.0, 64), note(SECONDS, 1.0, 67)],
    "past the end": [note(0, 0.5, 60), note(0.5, 0.001, 72)],
    "retriggers": [note(0.1 * k, 0.5, 60, 20 + k) for k in range(25)],
    "legato": [note(0.2 * k, 0.2, 48 + k % 3) for k in range(12)],
    "one sample long": [note(0.2 * k, 0, 60 + k) for k in range(10)],
    "every velocity": [note(0.02 * k, 0.1, 40 + k % 40, k + 1) for k in range(127)],
    "high keys": music(3, keys=(94, 109)),
    "low keys": music(4, keys=(21, 30)),
    "a kick and a snare": [note(0.3 * k, 0.1, (36, 38)[k % 2], drum=DRUMS) for k in range(8)],
    "notes outside of every region": [note(0, 1, 60), note(0.5, 1, 0, drum=DRUMS)],
}


@pytest.mark.parametrize("name", CLIPS)
def test_a_clip_is_what_the_synthesiser_plays(bank: NoteBank, soundfont: Any, name: str) -> None:
    notes = CLIPS[name]
    (found,) = bank.render([notes])
    assert snr(render_notes(soundfont, notes, sample_rate=RATE, seconds=SECONDS), found) >= 50


@pytest.mark.parametrize("rate", [16000, 44100, 48000])
def test_other_sample_rates(soundfont: Any, rate: int) -> None:
    notes = music(7, 15)
    (found,) = NoteBank("timgm", sample_rate=rate, seconds=2.0).render([notes])
    assert snr(render_notes(soundfont, notes, sample_rate=rate, seconds=2.0), found) >= 50


def test_notes_that_begin_after_the_end_are_silence(bank: NoteBank) -> None:
    (found,) = bank.render([[note(SECONDS + 1, 0.5, 60, 90)]])
    assert found.shape == (2, int(RATE * SECONDS)) and not found.any()


def test_every_program_is_exact_or_refused(bank: NoteBank, soundfont: Any) -> None:
    """Across General MIDI: what is rendered agrees, several programs in one clip among it."""
    played = []
    for program in range(0, 128, 5):
        notes = [note(0, 0.4, 55, 90, program), note(0.2, 0.3, 62, 50, program), note(0.5, 0.5, 70, 70, program)]
        (found,) = bank.try_render([notes])
        if not isinstance(found, str):
            assert snr(render_notes(soundfont, notes, sample_rate=RATE, seconds=SECONDS), found) >= 50, program
            played.append(program)
    assert len(played) >= 3
    together = music(5, 30, tuple(played[:3]))
    (found,) = bank.render([together])
    assert snr(render_notes(soundfont, together, sample_rate=RATE, seconds=SECONDS), found) >= 50


def test_silence(bank: NoteBank) -> None:
    empty = np.empty((0, 6))
    unheard = [note(0, 1, 60, velocity=0)]
    for found in bank.render([empty, unheard]):
        assert tuple(found.shape) == (2, RATE) and not found.any()
    assert bank.render([]) == []


def test_a_clip_does_not_depend_on_its_batch_nor_on_the_order_of_its_notes(bank: NoteBank) -> None:
    clips = [music(seed, 10 + seed) for seed in range(6)]
    together = bank.render([*clips, np.empty((0, 6))])
    for clip, found in zip(clips, together, strict=False):
        assert torch.equal(bank.render([clip[::-1]])[0], found)


def test_a_clip_does_not_depend_on_where_it_lies(bank: NoteBank, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between clips of odd lengths, cut into many parts, with a filter that moves after the note."""
    clips = [music(seed, 12, programs=(61, 0)) for seed in range(4)]
    odd = [[note(0, 0.1 + length / RATE, 60)] for length in (1, 63, 64, 65)]
    mixed = [clip for pair in zip(odd, clips, strict=True) for clip in pair]
    alone = [bank.try_render([clip])[0] for clip in mixed]
    for rows in (1 << 15, 50):
        monkeypatch.setattr("smart.render.mixing.ROWS_CPU", rows)
        for expected, found in zip(alone, bank.try_render(mixed), strict=True):
            assert (
                expected == found
                if isinstance(expected, str)
                else isinstance(found, torch.Tensor) and torch.equal(expected, found)
            )
        on_host = bank.render_on_host(mixed)
        assert all(isinstance(one, str) or np.array_equal(one, two) for one, two in zip(on_host, alone, strict=True))
    assert sum(not isinstance(one, str) for one in alone) >= 6


def test_a_small_store_lets_go_and_gives_the_same_audio(bank: NoteBank) -> None:
    clips = [music(seed, 12, keys=(50 + seed, 60 + seed)) for seed in range(5)]
    small = NoteBank("timgm", sample_rate=RATE, seconds=SECONDS, max_bytes=14 << 20)
    expected = bank.render(clips)
    for _ in range(2):
        for wanted, found in zip(expected, small.render(clips), strict=True):
            assert torch.equal(wanted, found)
        assert 0 < small.bytes <= small.max_bytes
    assert bank.bytes > small.max_bytes
    tiny = NoteBank("timgm", sample_rate=RATE, seconds=SECONDS, max_bytes=1 << 20)
    assert "more than 1,048,576 bytes" in (tiny.supports(clips[0]) or "")


def test_the_reward_hears_no_difference(bank: NoteBank, soundfont: Any) -> None:
    reward = load_reward("ce_proxy")
    for seed in range(4):
        notes = music(seed)
        clips = bank.render([notes])[0], render_notes(soundfont, notes, sample_rate=RATE, seconds=SECONDS)
        mono = [resample(torch.as_tensor(clip).mean(0), RATE, reward.sample_rate) for clip in clips]
        ours, reference = reward.score(torch.stack(mono))["CE"].tolist()
        assert ours == pytest.approx(reference, abs=0.02)


# What goes to the pool --------------------------------------------------------------------------------------


def test_what_is_not_linear_is_refused(bank: NoteBank) -> None:
    assert bank.supports(music(1)) is None
    hats = [note(0, 0.1, 42, drum=DRUMS), note(0.1, 0.1, 46, drum=DRUMS)]
    assert "exclusive class" in (bank.supports(hats) or "")
    with pytest.raises(ValueError, match="clip 1 is not for a note bank: a region with an exclusive class"):
        bank.render([music(1), hats])
    with pytest.raises(ValueError, match="pitch of note 0"):
        bank.render([[note(0, 1, 200)]])


def test_more_voices_than_the_synthesiser_has_are_refused(bank: NoteBank, monkeypatch: pytest.MonkeyPatch) -> None:
    chord = [note(0, 1, 40 + k) for k in range(20)]
    monkeypatch.setattr("smart.render.bank.MAX_VOICES", 20)
    assert bank.supports(chord) is None
    assert "20 voices" in (bank.supports([*chord, note(1.1, 1, 70)]) or "")  # the chord still dies away
    assert bank.supports([*chord[:10], *[note(2.9, 1, 50 + k) for k in range(10)]]) is None


def test_a_sound_that_disagrees_with_the_synthesiser_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison finds it when the law is wrong, whatever the reason."""
    monkeypatch.setattr("smart.render.envelopes._STEEPNESS", 5.0)
    wrong = NoteBank("timgm", sample_rate=RATE, seconds=SECONDS)
    assert "agree with the synthesiser to" in (wrong.supports(music(1)) or "")


def test_the_pool_takes_what_the_bank_does_not(soundfont: Any, tokenizer: Any) -> None:
    clips = [music(1), np.array([note(0, 0.5, 42, drum=DRUMS)]), np.empty((0, 6)), music(2)]
    with BankPool("timgm", sample_rate=RATE, seconds=SECONDS, workers=1) as pool:
        futures = [pool.submit(clip) for clip in clips]
        for clip, future in zip(clips, futures, strict=True):
            expected = render_notes(soundfont, clip, sample_rate=RATE, seconds=SECONDS)
            np.testing.assert_allclose(future.result(60), expected, atol=1e-3)
        assert (pool.clips, pool.fallbacks) == (4, 1)
        assert [pool.fallback_fraction(some) for some in (futures, futures[:1], futures[1:2], [])] == [0.25, 0, 1, 0]
        assert [pool.fallback_kinds(some) for some in (futures, futures[:1], [])] == [{"exclusive_class": 0.25}, {}, {}]
        assert list(pool.reasons) == ["a region with an exclusive class, which cuts off other notes"]
        with pytest.raises(ValueError, match="onset of note 0"):
            pool.submit([note(math.nan, 1, 60)])
        with RenderPool("timgm", sample_rate=RATE, seconds=SECONDS, workers=1) as reference:
            reward = load_reward("ce_proxy")
            tokens = [tokenizer.vocab[name] for name in ("Bar_None", "TimeSig_4/4", "Position_0", "Tempo_120.0")]
            tokens += [tokenizer.vocab[name] for name in ("Pitch_60", "Velocity_127", "Duration_1.0.12")]
            rollout = Rollout(torch.tensor([tokens]), torch.ones(1, 3, dtype=torch.bool), torch.zeros(1, 3))
            ours, theirs = (Scorer(tokenizer, each, reward, sample_rate=RATE) for each in (pool, reference))
            rated = [each.collect(Clips(each).submit_rest(rollout)).rewards.item() for each in (ours, theirs)]
            assert rated[0] == pytest.approx(rated[1], abs=0.02)
            assert reference.fallback_fraction(futures) is None and reference.fallback_kinds(futures) == {}
    pool.close()
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit(clips[0])


def test_the_copy_of_the_soundfont_has_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a run that is killed leaves none behind."""
    seen: list[list[Path]] = []

    def watched(*words: Any) -> None:
        write_variant(*words)
        seen.append(list(tmp_path.iterdir()))

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("smart.render.bank.write_variant", watched)
    assert NoteBank("timgm", sample_rate=RATE, seconds=1.0).render([[note(0, 1, 60)]])[0].any()
    assert seen == [[]]


# A soundfont that changes, or is made to do harm ------------------------------------------------------------


@pytest.mark.parametrize("igen", [b"", struct.pack("<HHHHHH", 57, 1, 54, 1, 53, 0) + bytes(4)])
def test_a_soundfont_that_is_replaced_is_noticed(tmp_path: Path, igen: bytes) -> None:
    """Before the bank takes more of it, or the first worker loads it for what the bank cannot do."""
    path = tmp_path / "font.sf2"
    replaced = {"igen": igen, "ibag": struct.pack("<HHHH", 0, 0, 3, 0)} if igen else {}
    path.write_bytes(tiny_soundfont(((0, 0), (0, 1)), **replaced))
    with BankPool(path, sample_rate=RATE, seconds=1.0, workers=1) as pool:
        if not igen:
            assert pool.submit([note(0, 1, 60)]).result(30).any()
        (tmp_path / "other.sf2").write_bytes(tiny_soundfont(((0, 0), (0, 1), (0, 2)), **replaced))
        (tmp_path / "other.sf2").replace(path)
        pool.bank._programs = {}  # as if another program were needed: here all have the same generators
        pool.bank._sounds.clear()
        for _ in range(2):
            with pytest.raises(Failure, match=r"font\.sf2 was changed while it was in use"):
                pool.submit([note(0, 1, 61)]).result(30)


def test_addresses_that_add_up_to_too_much_are_no_traceback(tmp_path: Path) -> None:
    path, far = tmp_path / "far.sf2", struct.pack("<HH", 4, 32767)  # start, in steps of 32,768 samples
    path.write_bytes(
        tiny_soundfont(
            igen=far + struct.pack("<HHHH", 54, 1, 53, 0) + bytes(4), ibag=struct.pack("<HHHH", 0, 0, 3, 0),
            pgen=far + struct.pack("<HH", 41, 0) + bytes(4), pbag=struct.pack("<HHHH", 0, 0, 2, 0),
        )
    )  # fmt: skip
    with pytest.raises(RenderError, match=r"far\.sf2 cannot be taken apart: .*out of bounds"):
        NoteBank(path, sample_rate=RATE, seconds=1.0).render([[note(0, 1, 60)]])


def test_a_file_that_becomes_another_while_it_is_read_is_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its size and time say that it is the same, and yet it is none."""
    monkeypatch.setattr("smart.render.bank.check_unchanged", lambda *_: None)
    path, whole = tmp_path / "font.sf2", tiny_soundfont()
    other = whole.replace(b"shdr", b"what").replace(b"igen", b"what")
    for damaged in (b"", whole[:10], other, whole[: len(whole) // 2]):
        path.write_bytes(whole)
        reader = NoteBank(path, sample_rate=RATE, seconds=1.0)
        path.write_bytes(damaged)
        with pytest.raises(RenderError, match=r"font\.sf2 cannot be taken apart"):
            reader.render([[note(0, 1, 60)]])
        with pytest.raises(UserError, match=r"font\.sf2 is damaged: its tables are missing or cut short"):
            read_regions(path)


def test_tables_that_repeat_themselves_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each preset plays all that there is: a file of some kilobytes would fill the memory."""
    path, presets, zones = tmp_path / "bomb.sf2", 12, 400
    bags = [0, zones] * (presets // 2) + [0]
    path.write_bytes(
        tiny_soundfont(
            phdr=b"".join(struct.pack("<20sHHHIII", b"x", at, 0, bag, 0, 0, 0) for at, bag in enumerate(bags)),
            pbag=b"".join(struct.pack("<HH", bag, 0) for bag in range(zones + 1)),
            pgen=struct.pack("<HH", 41, 0) * zones + bytes(4),
        )
    )
    assert len(read_regions(path)[0, 0]) == zones
    for limit in ("MAX_REGIONS", "MAX_STEPS"):
        with monkeypatch.context() as patch:
            patch.setattr(regions, limit, 2000)
            with pytest.raises(UserError, match=r"bomb\.sf2 is damaged, or too large: expected at most"):
                NoteBank(path, sample_rate=RATE, seconds=1.0)


# The cache --------------------------------------------------------------------------------------------------


def test_the_cache_spares_the_soundfont_and_survives_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes = [note(0, 1, 60), note(0.5, 1, 64)]
    first = NoteBank("timgm", sample_rate=RATE, seconds=SECONDS, cache=tmp_path)
    (expected,) = first.render([notes])
    files = sorted(tmp_path.rglob("*.safetensors"))
    assert len(files) == 2 and not list(tmp_path.rglob(".*"))

    def refuse(*_: object) -> None:
        raise AssertionError("the soundfont is loaded")

    def render_from_cache() -> torch.Tensor:
        with monkeypatch.context() as patch:
            patch.setattr(NoteBank, "_load", refuse)
            return NoteBank("timgm", sample_rate=RATE, seconds=SECONDS, cache=tmp_path).render([notes])[0]

    assert torch.equal(render_from_cache(), expected)
    whole = files[0].read_bytes()
    half = len(whole) // 2
    for damaged in (b"", whole[:half], whole[:half] + bytes([whole[half] ^ 1]) + whole[half + 1 :], b"\xff" * 100):
        files[0].write_bytes(damaged)
        again = NoteBank("timgm", sample_rate=RATE, seconds=SECONDS, cache=tmp_path)
        assert torch.equal(again.render([notes])[0], expected)
        assert torch.equal(render_from_cache(), expected), "what was damaged was not written anew"
    other = NoteBank("timgm", sample_rate=RATE, seconds=2.0, cache=tmp_path)  # another length, other files
    other.render([notes])
    assert len(list(tmp_path.rglob("*.safetensors"))) == 4


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    bank = NoteBank("timgm", sample_rate=RATE, seconds=SECONDS, cache=tmp_path / "file")
    with pytest.raises(UserError, match="cache"):
        bank.render([[note(0, 1, 60)]])


# Regions ----------------------------------------------------------------------------------------------------


def test_regions_are_the_synthesiser_s(tmp_path: Path, soundfont: Any) -> None:
    """Presets taken apart and written again sound as before: their generators were read and added up alike."""
    path = find_soundfont("timgm")
    presets = read_regions(path)
    assert len(presets) == 136 and presets[0, 0][0].keys == (0, 29)
    for preset in ((0, 0), (0, 4), (0, 48), (0, 61)):
        key = 60
        heard = [region for region in presets[preset] if region.keys[0] <= key <= region.keys[1]]
        heard = [region for region in heard if region.velocities[0] <= 100 <= region.velocities[1]]
        with (tmp_path / "variant.sf2").open("wb") as file:
            write_variant(path, file, [[region.values for region in heard]])
        variant = load_soundfont(tmp_path / "variant.sf2")
        notes = [note(0, 0.5, key, 100, program) for program in range(len(heard))]
        # every region is a program of its own: together they are the preset
        ours = render_notes(variant, notes, sample_rate=RATE, seconds=1.0)
        expected = render_notes(soundfont, [note(0, 0.5, key, 100, preset[1])], sample_rate=RATE, seconds=1.0)
        np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_tables_that_point_outside_are_named(tmp_path: Path) -> None:
    data = bytearray(find_soundfont("timgm").read_bytes())
    at = data.index(b"ibag") + 8
    data[at + 4 * 5 : at + 4 * 5 + 2] = b"\xff\xff"
    path = tmp_path / "damaged.sf2"
    path.write_bytes(bytes(data))
    presets = read_regions(path)  # a number too large ends a zone early, as in the synthesiser
    assert len(presets) == 136
    bags = data.index(b"phdr") + 8
    data[bags + 38 * 3 + 24 : bags + 38 * 3 + 26] = b"\xff\xff"
    path.write_bytes(bytes(data))
    with pytest.raises(UserError, match="tables point outside"):
        read_regions(path)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_agrees_with_the_synthesiser_and_with_itself(soundfont: Any) -> None:
    clips = [music(seed) for seed in range(4)]
    bank = NoteBank("timgm", sample_rate=RATE, seconds=SECONDS, device="cuda")
    first, second = bank.render(clips), bank.render(clips)
    for clip, found, again in zip(clips, first, second, strict=True):
        assert torch.equal(found, again)
        assert snr(render_notes(soundfont, clip, sample_rate=RATE, seconds=SECONDS), found) >= 50
