"""The listening study: excerpts, orders, and a server that loses, duplicates and reveals nothing."""

import asyncio
import contextlib
import csv
import hashlib
import json
import shutil
import signal
import socket
import sqlite3
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from urllib.parse import quote, urlencode

import httpx
import numpy as np
import pytest
import soundfile
from click.testing import CliRunner
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from starlette.requests import Request
from starlette.testclient import TestClient
from study_server import RATE, SECONDS, Server, answer, build, consent, make_wavs, postgres, serving, take_part

from smart.plots import plain
from smart.study import app, eraser, loudness
from smart.study import build as building
from smart.study.app import Buckets, Limits, make_app
from smart.study.command import main
from smart.study.export import COLUMNS, ratings_csv
from smart.study.folder import Excerpt, Study
from smart.study.order import order, with_checks
from smart.study.ratings import read_ratings, read_study
from smart.study.store import Store

PROMPTS, SYSTEMS = 3, ("zebra", "yak")


@pytest.fixture(scope="module")
def wavs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return make_wavs(tmp_path_factory.mktemp("wavs"), SYSTEMS, PROMPTS + 2)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory, wavs: list[str]) -> Path:
    """Three prompts of two systems, two practice items, two repeats and the silent excerpt."""
    out = tmp_path_factory.mktemp("built") / "study"
    build(out, wavs, "--prompts", str(PROMPTS), "--repeats", "2", "--silence", "--completion-code", "--power", "4")
    return out


def key_of(folder: Path) -> list[dict[str, str]]:
    with open(folder / "key.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# --- Loudness -----------------------------------------------------------------------------------------------------


def test_loudness_is_that_of_the_recommendation() -> None:
    """BS.1770: a full-scale sine of 997 Hz in one channel is at -3.01 LUFS; in both it is 3.01 dB more."""
    sine = np.sin(2 * np.pi * 997 * np.arange(2 * 48000) / 48000)
    one = np.stack([sine, 0 * sine]).astype(np.float32)
    assert loudness.measure(one, 48000).lufs == pytest.approx(-3.01, abs=0.05)
    assert loudness.measure(one[[0, 0]] / 10, 48000).lufs == pytest.approx(-20.0, abs=0.05)


def test_true_peak_lies_between_the_samples() -> None:
    """A sine at a quarter of the rate, sampled 45 degrees off its peaks: samples of 0.707, a peak of 1."""
    sine = np.sin(np.pi / 2 * np.arange(4800) + np.pi / 4)[None].repeat(2, 0).astype(np.float32)
    assert np.abs(sine).max() < 0.71
    assert loudness.measure(sine, 48000).peak == pytest.approx(0, abs=0.2)


@pytest.mark.parametrize("level", [0.0, 1e-5, 1e-6])
def test_silence_has_no_loudness(level: float) -> None:
    clip = (level * np.random.default_rng(0).standard_normal((2, 16000))).astype(np.float32)
    assert loudness.measure(clip, 16000).silent


def test_all_clips_get_one_loudness_and_none_clips() -> None:
    calm, spiky = loudness.Loudness(-20.0, -5.0), loudness.Loudness(-40.0, -12.0)
    silent = loudness.Loudness(-np.inf, -np.inf)
    target, gains = loudness.gains([calm, spiky, silent], -23.0)
    assert target == -29.0  # at which the spiky one reaches -1 dB
    assert gains == [-9.0, 11.0, 0.0]
    assert loudness.gains([calm, silent], -23.0) == (-23.0, [-3.0, 0.0])
    target, gains = loudness.gains([calm, loudness.Loudness(-60.0, -12.0)], -23.0)
    assert target == loudness.LOWEST_TARGET and gains == [-15.0, 11.0]  # one odd clip does not silence the rest


# --- Building -----------------------------------------------------------------------------------------------------


def test_files_tell_nothing_but_their_sound(study: Path) -> None:
    """Name, size, header and modification time are the same, or random."""
    files = sorted((study / "audio").iterdir())
    assert len(files) == PROMPTS * 2 + 2 + 1
    assert len({path.stat().st_size for path in files}) == 1
    assert len({path.stat().st_mtime for path in files}) == 1
    assert len({path.read_bytes()[:44] for path in files}) == 1
    (length,) = struct.unpack("<I", files[0].read_bytes()[40:44])
    assert length == files[0].stat().st_size - 44  # no chunk after the data
    assert {path.stem for path in files} == {row["excerpt"] for row in key_of(study)}


def test_names_cannot_be_computed_again(study: Path, wavs: list[str], tmp_path: Path) -> None:
    build(tmp_path / "again", wavs, "--prompts", str(PROMPTS), "--repeats", "2", "--silence")
    first, second = key_of(study), key_of(tmp_path / "again")
    assert not {row["excerpt"] for row in first} & {row["excerpt"] for row in second}
    made = [{(row["system"], row["prompt"], row["sha256"]) for row in rows} for rows in (first, second)]
    assert made[0] == made[1]  # the same sound
    pairs = [
        [[(made.excerpts[t.excerpt].system, made.excerpts[t.excerpt].prompt) for t in made.trials(n)] for n in range(6)]
        for made in (Study(study), Study(tmp_path / "again"))
    ]
    assert pairs[0] != pairs[1]  # nor can orders


def test_key_says_what_matching_did(study: Path) -> None:
    for row in key_of(study):
        audio, rate = soundfile.read(study / "audio" / f"{row['excerpt']}.wav", dtype="float32")
        now = loudness.measure(audio.T, rate)
        assert (rate, len(audio)) == (RATE, round(SECONDS * RATE))
        assert hashlib.sha256((study / "audio" / f"{row['excerpt']}.wav").read_bytes()).hexdigest() == row["sha256"]
        if row["kind"] == "silence":
            assert row["silent"] == "1" and not audio.any() and not row["system"]
            continue
        assert now.lufs == pytest.approx(-23, abs=0.05) and now.peak <= -1
        assert float(row["lufs_before"]) + float(row["gain_db"]) == pytest.approx(now.lufs, abs=0.05)
        assert {row["kind"]} == {"practice" if int(row["prompt"]) >= PROMPTS else "main"}
    kinds = Counter(row["kind"] for row in key_of(study))
    assert kinds == {"main": PROMPTS * 2, "practice": 2, "silence": 1}


def test_silent_clips_stay_silent_and_long_ones_are_cut(tmp_path: Path) -> None:
    runs = make_wavs(tmp_path, ("a", "b"), 2, seconds=0.5)
    soundfile.write(tmp_path / "a" / "00.wav", np.zeros((RATE, 2)), RATE)
    click = np.zeros(RATE)
    click[50] = 0.9  # a peak far above its loudness: it would clip at the loudness of the others
    soundfile.write(tmp_path / "b" / "01.wav", click, RATE)
    said = build(tmp_path / "study", runs, "--prompts", "2", "--practice", "0")
    assert "silent, left unchanged: a, prompt 0" in said
    assert "LUFS instead of -23.0" in said
    rows = {(row["system"], row["prompt"]): row for row in key_of(tmp_path / "study")}
    assert rows["a", "0"]["silent"] == "1" and rows["a", "0"]["gain_db"] == "0.00"
    levels = {name: float(row["lufs_after"]) for name, row in rows.items() if row["silent"] == "0"}
    assert max(float(row["peak_after"]) for row in rows.values()) <= -0.99
    audio, _ = soundfile.read(tmp_path / "study" / "audio" / f"{rows['a', '1']['excerpt']}.wav")
    assert len(audio) == round(SECONDS * RATE)
    assert max(levels.values()) - min(levels.values()) < 0.1 or any(row["limited"] == "1" for row in rows.values())


def test_manifests_hold_no_secret(study: Path) -> None:
    """They are for other tools: stimulus, excerpt, practice and seconds, but no system, prompt, seed or check."""
    with open(study / "manifest.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    variables = json.loads((study / "manifest.json").read_text(encoding="utf-8"))
    assert [{name: str(value) for name, value in each.items()} for each in variables] == rows
    assert list(rows[0]) == ["stimulus", "excerpt", "practice", "seconds"]
    assert all((study / row["stimulus"]).is_file() for row in rows)
    assert sum(row["practice"] == "1" for row in rows) == 2
    assert [row["excerpt"] for row in rows] == sorted(row["excerpt"] for row in rows)


def test_preregistration_is_filled_with_the_design(study: Path) -> None:
    text = (study / "preregistration.md").read_text(encoding="utf-8")
    assert "zebra and yak" in text and "all 6 excerpts" in text and "2 practice items" in text
    assert "-23.0 LUFS" in text and "one silent excerpt" in text and "{{" not in text
    assert "of 4 simulated studies" in text and "a difference of 1.221: " in text


def test_a_study_is_never_overwritten_and_goes_on_after_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = make_wavs(tmp_path, ("a", "b"), 2)
    out = tmp_path / "study"
    words = ["--runs", *runs, "--out", str(out), "--prompts", "2", "--practice", "0", "--sample-rate", str(RATE)]
    words += ["--power", "0"]
    with monkeypatch.context() as patch:
        patch.setattr(building, "assemble", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert CliRunner().invoke(main, ["build", *words]).exit_code != 0
    assert not out.exists()
    changed = CliRunner().invoke(main, ["build", *words, "--seed", "2"])
    assert changed.exit_code == 2 and "other settings" in changed.output
    for path in (tmp_path / "a" / "00.wav", tmp_path / "b" / "01.wav"):
        path.write_bytes(b"is not read again")
    refused = CliRunner().invoke(main, ["build", *words])
    assert refused.exit_code == 2 and "files.a/00.wav" in refused.output and "files.b/01.wav" in refused.output
    done = CliRunner().invoke(main, ["build", *words, "--accept-changes"])
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "study"]
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    again = CliRunner().invoke(main, ["build", *words])
    assert again.exit_code == 2 and "already exists" in again.output
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_damage_to_a_finished_clip_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Any flipped bit: the clip is the same, or is made again, and that is said."""
    work, draws = building.Work(tmp_path / "study", {}), np.random.default_rng(0)
    sound = draws.normal(size=(2, 50)).astype(np.float32)
    work.put(building.Clip(0, 1, 7, sound))
    assert work.has(0, 1) and not work.has(0, 2) and not capsys.readouterr().err
    whole = work.path(0, 1).read_bytes()
    for _ in range(150):
        data = bytearray(whole)
        data[draws.integers(len(data))] ^= 1 << int(draws.integers(8))
        work.path(0, 1).write_bytes(data)
        if work.has(0, 1):
            clip = work.get(0, 1)
            assert clip.seed == 7 and np.array_equal(clip.audio, sound)
        else:
            assert "is damaged and will be made again" in capsys.readouterr().err
    work.close()


def test_models_get_the_same_prompts_and_seeds_and_go_on_where_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One model under two names makes the same pieces, and so does a build that was interrupted and continued."""
    monkeypatch.setattr(building, "BLOCK", 1)
    runs = ["--runs", "a=piano-small", "b=piano-small", "--prompts", "2", "--practice", "0", "--power", "0"]
    runs += ["--seconds", "1", "--sample-rate", str(RATE), "--tokens", "24", "--workers", "1"]
    made = []
    for name in ("whole", "parts"):
        out, put, count = tmp_path / name, building.Work.put, 0

        def stop(self: building.Work, clip: building.Clip, put: Any = put) -> None:
            nonlocal count
            count += 1
            if count == 3:
                raise KeyboardInterrupt
            put(self, clip)

        if name == "parts":
            with monkeypatch.context() as patch:
                patch.setattr(building.Work, "put", stop)
                assert CliRunner().invoke(main, ["build", *runs, "--out", str(out)]).exit_code == 1
            assert len(list((tmp_path / ".parts.work" / "clips").iterdir())) == 2 and not out.exists()
        done = CliRunner().invoke(main, ["build", *runs, "--out", str(out)])
        assert done.exit_code == 0, done.output
        made.append({(row["system"], row["prompt"], row["seed"]): row["sha256"] for row in key_of(out)})
    assert made[0] == made[1] and len({seed for _, _, seed in made[0]}) == 2
    for (_, prompt, seed), digest in made[0].items():
        assert made[0]["a", prompt, seed] == digest


@pytest.mark.parametrize("name", ["", "clips", "study"])
def test_a_planted_link_is_not_followed(name: str, wavs: list[str], tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    link = tmp_path / ".study.work" / name
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(tmp_path / "precious")
    words = ["build", "--runs", *wavs, "--out", str(tmp_path / "study"), "--prompts", "3", "--practice", "0"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 2 and "is a link, which no build made; remove it" in done.output, done.output
    assert not list((tmp_path / "precious").iterdir())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (["--prompts", "9"], "5 WAV files, but 9 are needed"),
        (["--sample-rate", "44100"], "16000 samples per second, expected 44100"),
        (["--repeats", "4"], "at most half of the 6 excerpts"),
        (["{zebra}"], "called 'zebra'"),
        (["nowhere"], "nowhere"),
        (["--out", "{there}"], "already exists"),
        (["--out", "{there}/a/b"], "does not exist"),
    ],
)
def test_mistakes_of_a_build_are_named_in_one_line(
    change: list[str], told: str, wavs: list[str], tmp_path: Path
) -> None:
    words = ["--runs", *wavs, "--out", str(tmp_path / "study"), "--prompts", "3", "--practice", "0"]
    words += [
        "--power",
        "0",
        "--sample-rate",
        str(RATE),
        *(each.format(zebra=wavs[0], there=tmp_path) for each in change),
    ]
    done = CliRunner().invoke(main, ["build", *words])
    assert done.exit_code == 2 and told in done.output, done.output
    assert not (tmp_path / "study").exists()


def redesign(**changes: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / "study.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes), encoding="utf-8")

    return change


def renumber(path: Path) -> None:
    """Number the prompts from 1 instead of 0."""
    rows = list(csv.reader(path.read_text(encoding="utf-8").splitlines()))
    place = rows[0].index("prompt")
    for row in rows[1:]:
        row[place] = str(int(row[place]) + 1) if row[place] else ""
    path.write_text("".join(",".join(row) + "\n" for row in rows), encoding="utf-8")


def test_a_byte_order_mark_before_a_key_counts_for_nothing(study: Path, tmp_path: Path) -> None:
    """Spreadsheets write one."""
    copy = tmp_path / "study"
    shutil.copytree(study, copy)
    for name in ("key.csv", "study.json", "consent.txt"):
        (copy / name).write_bytes(b"\xef\xbb\xbf" + (study / name).read_bytes())
    assert Study(copy).excerpts == Study(study).excerpts
    assert read_study(copy) == read_study(study)


def test_what_is_not_a_study_is_named(study: Path, tmp_path: Path) -> None:
    import shutil

    for damage, told in (
        (lambda folder: (folder / "study.json").unlink(), "has no study.json"),
        (lambda folder: (folder / "study.json").write_text("{}"), "study.json: cannot be read"),
        (lambda folder: next((folder / "audio").iterdir()).write_bytes(b""), "differs from the built file"),
        (lambda folder: (folder / "key.csv").unlink(), "key.csv"),
        (lambda folder: (folder / "key.csv").write_bytes(b"excerpt,kind\n" + b"a" * 200_000), "key.csv"),
        (
            lambda folder: (folder / "key.csv").write_text("excerpt,kind\n../../secret,main"),
            "not the name of an excerpt",
        ),
        (lambda folder: (folder / "consent.txt").write_text("Hello"), "Version: NAME"),
        (redesign(repeats=4), "repeats = 4 is not what"),
        (redesign(study="-ff"), "study = '-ff' is not what"),
        (redesign(seconds=0), "seconds = 0 is not what"),
        (redesign(seconds=float("nan")), "seconds = nan is not what"),
        (redesign(prompts=0), "prompts = 0 is not what"),
        (redesign(prompts=10**9), "does not list what study.json says"),
        (redesign(practice=0), "does not list what study.json says"),
        (redesign(silence=False), "does not list what study.json says"),
        (redesign(systems=["zebra", "zebra"]), "systems = ['zebra', 'zebra'] is not what"),
        (redesign(systems=["zebra", 3]), "systems = ['zebra', 3] is not what"),
        (redesign(systems=["zebra", "gnu"]), "does not list every prompt of every system"),
        (redesign(question="\ud800"), "cannot be read"),
        (lambda folder: renumber(folder / "key.csv"), "does not list every prompt of every system"),
        (lambda folder: (folder / "check.wav").unlink(), "check.wav is missing"),
    ):
        copy = Path(shutil.copytree(study, tmp_path / "copy"))
        damage(copy)
        done = CliRunner().invoke(main, ["serve", str(copy), "--port", "0"])
        assert done.exit_code == 2 and told in done.output, done.output
        shutil.rmtree(copy)


# --- Orders -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("prompts", "systems"), [(15, 2), (4, 3), (3, 3), (5, 2), (7, 1), (1, 2)])
def test_orders_are_balanced_over_positions_and_carry_over(prompts: int, systems: int) -> None:
    count = prompts * systems
    rows = count if count % 2 == 0 else 2 * count
    for block in range(2):
        heard = [order(prompts, systems, block * rows + slot, seed=5) for slot in range(rows)]
        places = Counter((place, excerpt) for row in heard for place, excerpt in enumerate(row))
        assert len(places) == count**2 and set(places.values()) == {rows // count}
        pairs = Counter(pair for row in heard for pair in pairwise(row))
        assert len(pairs) == count * (count - 1) and set(pairs.values()) == {rows // count}
        for start in range(0, rows, systems):  # even for so few participants
            for together in zip(*heard[start : start + systems], strict=True):
                assert {system for _, system in together} == set(range(systems))
                assert len({prompt for prompt, _ in together}) == 1


def test_orders_differ_between_participants_and_show_no_pattern() -> None:
    heard = [order(15, 2, slot, seed=1) for slot in range(90)]
    assert len({tuple(row) for row in heard}) == 90
    assert order(15, 2, 7, seed=1) == heard[7] and order(15, 2, 7, seed=2) != heard[7]
    runs = [sum(a[1] != b[1] for a, b in pairwise(row)) for row in heard]
    assert 10 < np.mean(runs) < 19  # of 29 neighbouring pairs; an alternation would change at all 29


def test_repeats_and_silence_come_in_the_second_half() -> None:
    main = [str(number) for number in range(30)]
    places: Counter[int] = Counter()
    for slot in range(200):
        trials = with_checks(main, 3, "silence", slot, seed=1)
        assert [trial.excerpt for trial in trials if trial.kind == "main"] == main
        again = [trial.excerpt for trial in trials if trial.kind == "repeat"]
        assert len(set(again)) == 3 and set(again) <= set(main[:10])
        checks = [place for place, trial in enumerate(trials) if trial.kind != "main"]
        assert len(checks) == 4 and min(checks) >= 15 and max(checks) < 33
        places.update(checks)
    assert len(places) == 18  # every possible position occurs


# --- The server ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def server(request: pytest.FixtureRequest, study: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    place = tmp_path_factory.mktemp("served")
    if request.param == "sqlite":
        with serving(study, place, "--open") as running:
            yield running
    else:
        with postgres() as database, serving(study, place, "--open", database=database) as running:
            yield running


@pytest.fixture
def client() -> Iterator[httpx.Client]:
    with httpx.Client(timeout=30) as opened:
        yield opened


def admin_csv(server: Server) -> str:
    return httpx.get(f"{server.url}/export", headers={"authorization": f"Bearer {server.token}"}).text


def rated(server: Server, link: str) -> list[dict[str, str]]:
    """This participant's rows of the export: those of the newest one, as each test adds a participant."""
    rows = server.export()
    newest = max((row["participant"] for row in rows), default="")
    return [row for row in rows if row["participant"] == newest]


def hear(client: httpx.Client, link: str, position: int) -> None:
    assert client.get(f"{link}/audio/{position}").status_code == 200
    time.sleep(SECONDS)


def test_a_participant_takes_the_whole_study(server: Server, tmp_path: Path) -> None:
    link, sent = server.invite(1)[0], {}

    async def run() -> None:
        async with httpx.AsyncClient(timeout=30, headers={"user-agent": '=cmd|" /C calc"!A1'}) as client:
            await take_part(client, link, lambda position: position % 10 + 1, sent)
            thanks = await client.get(link)
            assert "Thank you" in thanks.text and 'id="code"' in thanks.text

    asyncio.run(run())
    rows, made = rated(server, link), Study(server.folder)
    assert list(rows[0]) == COLUMNS
    assert [int(row["position"]) for row in rows] == list(range(1, PROMPTS * 2 + 4))
    assert {int(row["position"]): int(row["rating"]) for row in rows} | {0: 1, -1: 10} == sent
    kinds = {trial.excerpt: trial.kind for trial in made.trials(0)}
    assert set(kinds.values()) == {"practice", "main", "repeat", "silence"}
    for row in rows:
        of = made.excerpts[row["excerpt"]]
        assert (row["system"], row["prompt"], row["seed"]) == (of.system, of.prompt, of.seed)
        assert (row["check"] == "silence") == (of.kind == "silence")
        assert row["user_agent"] == '\'=cmd|" /C calc"!A1'  # so that no spreadsheet takes it for a formula
        assert row["version"] == made.consent[0] and row["utc"].endswith("Z") and row["play_count"] == "1"
    again = [row["excerpt"] for row in rows if row["repeat"] == "1"]
    assert len(again) == 2 and all(Counter(row["excerpt"] for row in rows)[each] == 2 for each in again)
    assert len({row["excerpt"] for row in rows}) == PROMPTS * 2 + 1
    (tmp_path / "ratings.csv").write_text(admin_csv(server), encoding="utf-8")
    read, lacking = read_ratings(tmp_path / "ratings.csv")  # as the analysis does
    assert [rating.rating for rating in read] == [float(row["rating"]) for row in rows] and not lacking
    assert [bool(rating.check) for rating in read].count(True) == 1 and sum(rating.repeat for rating in read) == 2


def test_orders_go_to_participants_in_turn(server: Server, client: httpx.Client) -> None:
    """The next participant hears the other system of the same prompt at each position."""
    links = server.invite(2)
    for link in links:
        consent(client, link)
    made = Study(server.folder)
    store = Store(made, *server.database[1:])
    slots = {person["slot"] for person in store.overview()}
    store.close()
    assert slots == set(range(len(slots)))


def test_a_rating_is_stored_once_whatever_is_sent(server: Server, client: httpx.Client) -> None:
    link = server.invite(1)[0]
    consent(client, link)
    for position in (-1, 0):
        hear(client, link, position)
        assert client.post(f"{link}/ratings", json=answer(position, 5)).json()["rating"] == 5
    hear(client, link, 1)
    sent = answer(1, 7)

    async def at_once() -> list[httpx.Response]:
        async with httpx.AsyncClient(timeout=30) as many:
            return await asyncio.gather(*(many.post(f"{link}/ratings", json=sent) for _ in range(12)))

    stored = {"rating": 7, "position": 1, "client_id": sent["client_id"]}
    assert [(each.status_code, each.json()) for each in asyncio.run(at_once())] == [(200, stored)] * 12
    assert client.post(f"{link}/ratings", json=sent).json()["rating"] == 7
    assert client.post(f"{link}/ratings", json=answer(1, 2)).json()["rating"] == 7  # the first one counts
    assert client.post(f"{link}/ratings", json=answer(-1, 9)).json()["rating"] == 5
    assert [(row["position"], row["rating"]) for row in rated(server, link)] == [("1", "7")]
    assert 'data-position="2"' in client.get(link).text


def test_what_was_not_heard_cannot_be_rated(server: Server, client: httpx.Client) -> None:
    link = server.invite(1)[0]
    post = f"{link}/ratings"
    assert client.post(post, json=answer(-1, 5)).status_code == 409  # no consent
    assert client.get(f"{link}/audio/-1").status_code == 404
    consent(client, link)
    assert client.post(post, json=answer(-1, 5)).status_code == 409  # the audio was never requested
    assert client.get(f"{link}/audio/-1").status_code == 200
    early = client.post(post, json=answer(-1, 5))
    assert early.status_code == 409 and early.headers["retry-after"] == "1"  # not long enough ago
    time.sleep(SECONDS)
    assert client.post(post, json=answer(-1, 5, listened_s=0.6 * SECONDS)).status_code == 409
    assert client.post(post, json=answer(-1, 5, play_count=0)).status_code == 409
    assert client.post(post, json=answer(0, 5)).status_code == 409  # another excerpt's turn
    assert client.get(f"{link}/audio/1").status_code == 404  # only the next one may be fetched ahead
    assert client.get(f"{link}/audio/0").status_code == 200
    assert client.post(post, json=answer(-1, 5)).status_code == 200
    # fetched long enough ago, but the previous excerpt was only just rated
    assert client.post(post, json=answer(0, 5)).status_code == 409


@pytest.mark.parametrize(
    "change",
    [
        {"rating": 0}, {"rating": 11}, {"rating": 5.5}, {"rating": "5"}, {"rating": True}, {"rating": None},
        {"position": "x"}, {"position": 2**70}, {"client_id": "short"}, {"client_id": "'; DROP TABLE ratings; --"},
        {"session": "=1+1"}, {"listened_s": float("nan")}, {"listened_s": -1}, {"play_count": -1},
        {"response_ms": 1e99},
    ],
    ids=str,
)  # fmt: skip
def test_answers_are_checked(change: dict[str, Any], server: Server, client: httpx.Client) -> None:
    link = server.invite(1)[0]
    consent(client, link)
    sent = json.dumps(answer(-1, 5) | change)
    refused = client.post(f"{link}/ratings", content=sent, headers={"content-type": "application/json"})
    assert refused.status_code == 400 and next(iter(change)) in refused.json()["error"]


def test_requests_that_are_no_answers(server: Server, client: httpx.Client) -> None:
    link = server.invite(1)[0]
    for sent in (b"", b"[]", b"null", b"\xff", b'{"position": 1}'):
        assert client.post(f"{link}/ratings", content=sent).status_code == 409  # the consent comes first
    consent(client, link)
    for sent in (b"", b"[]", b"null", b"\xff", b'{"position": 1}'):
        assert client.post(f"{link}/ratings", content=sent).status_code == 400
    assert client.post(f"{link}/ratings", content=b"x" * 20_000).status_code == 413
    assert client.post(f"{link}/ratings", content=iter([b"x" * 9000] * 3)).status_code == 413  # without a length
    for method, path, status in (
        ("PUT", link, 405),
        ("GET", f"{link}/ratings", 405),
        ("GET", f"{link}/audio/..%2f..%2fkey.csv", 404),
        ("GET", f"{server.url}/static/..%2f..%2fstore.py", 404),
        ("GET", f"{server.url}/key.csv", 404),
        ("GET", f"{link}/audio/99", 404),
    ):
        assert client.request(method, path).status_code == status, path


def test_no_response_tells_a_system_or_anything_of_another(server: Server, client: httpx.Client) -> None:
    """Nothing sent to two participants contains names of systems or excerpts, or the other one's token."""
    links = server.invite(2)
    seen: dict[str, list[httpx.Response]] = {}
    for link in links:
        got = [client.get(link)]
        consent(client, link)
        for position in (-1, 0, 1, 2, 3):
            got += [client.get(link), client.get(f"{link}/audio/{position}"), client.head(f"{link}/audio/{position}")]
            time.sleep(SECONDS)
            got.append(client.post(f"{link}/ratings", json=answer(position, 6)))
        seen[link] = [*got, client.get(f"{link}/withdraw"), client.get(f"{link}/sound"), client.get(f"{link}/x")]
    seen[""] = [client.get(server.url + path) for path in ("/", "/static/study.js", "/static/study.css", "/admin")]
    secret = {*SYSTEMS} | {row["excerpt"] for row in key_of(server.folder)}
    secret |= {hashlib.sha256(link.rpartition("/")[2].encode()).hexdigest() for link in links}
    for link, responses in seen.items():
        others = {other.rpartition("/")[2] for other in links if other != link}
        for response in responses:
            text = (str(response.url) + str(response.headers) + response.content.decode("latin-1")).lower()
            assert not [word for word in secret | others if word.lower() in text], response.url
            assert not {"etag", "last-modified", "set-cookie", "server"} & set(response.headers)
            assert response.headers["referrer-policy"] == "no-referrer"
            assert "script-src 'self'" in response.headers["content-security-policy"]
            assert "http" not in response.text.replace("http://www.w3.org/2000/svg", "").lower() or not link
    audio = [each for each in seen[links[0]] if "/audio/" in str(each.url) and each.request.method == "GET"]
    plain_headers = [{name: value for name, value in each.headers.items() if name != "date"} for each in audio]
    assert all(headers == plain_headers[0] for headers in plain_headers)  # lengths too


def test_nobody_answers_for_another(server: Server, client: httpx.Client) -> None:
    mine, other = server.invite(2)
    for link in (mine, other):
        consent(client, link)
    hear(client, mine, -1)
    assert client.post(f"{other}/ratings", json=answer(-1, 3)).status_code == 409  # they have not heard it
    assert client.post(f"{mine}/ratings", json=answer(-1, 8)).json()["rating"] == 8
    for forged in (mine[:-1], mine + "x", f"{server.url}/s/", f"{server.url}/s/1", f"{server.url}/s/p0001"):
        assert client.get(forged).status_code == 404
        assert client.post(f"{forged}/ratings", json=answer(-1, 3)).status_code in (404, 405)


def test_parts_of_the_audio_may_be_asked_for(server: Server, client: httpx.Client) -> None:
    link = server.invite(1)[0]
    consent(client, link)
    url = f"{link}/audio/-1"
    whole = client.get(url).content
    size = len(whole)
    for asked, expected in (
        ("bytes=0-", whole), ("bytes=100-199", whole[100:200]), ("bytes=-10", whole[-10:]), ("bytes=0-0", whole[:1]),
        (f"bytes=10-{size + 5}", whole[10:]), (f"bytes=-{size + 5}", whole),
    ):  # fmt: skip
        part = client.get(url, headers={"range": asked})
        assert part.status_code == 206 and part.content == expected
        start = size - len(expected) if asked.startswith("bytes=-") else int(asked[6:].partition("-")[0])
        assert part.headers["content-range"] == f"bytes {start}-{start + len(expected) - 1}/{size}"
    beyond = client.get(url, headers={"range": f"bytes={size}-"})
    assert beyond.status_code == 416 and beyond.headers["content-range"] == f"bytes */{size}"
    for odd in ("bytes=0-1,3-4", "bytes=-", "seconds=1-2", "bytes=5-2"):
        assert client.get(url, headers={"range": odd}).status_code in (200, 416)
    audio, rate = soundfile.read(__import__("io").BytesIO(whole))
    assert (len(audio), rate) == (round(SECONDS * RATE), RATE)


def test_a_sound_is_read_as_it_is_sent(tmp_path: Path) -> None:
    """One part, and no more of the file; or the whole file, one block at a time."""
    import tracemalloc

    path, sent = tmp_path / "sound.wav", 0
    with path.open("wb") as file:
        file.truncate(64 << 20)

    async def send(message: Any) -> None:
        nonlocal sent
        sent += len(message.get("body", b""))

    for asked, size in (("bytes=40000000-40000000", 1), ("", 64 << 20)):
        request = Request({"type": "http", "headers": [(b"range", asked.encode())]})
        sent = 0
        tracemalloc.start()
        asyncio.run(app.send_wav(request, path, Counter(), "link")({}, None, send))  # type: ignore[arg-type]  # not used
        assert sent == size and tracemalloc.get_traced_memory()[1] < 1 << 20
        tracemalloc.stop()


def test_who_takes_nothing_or_sends_nothing_is_not_waited_for(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of five requests for a sound that is never read, the fifth is refused. A body that never arrives gets a 408."""
    monkeypatch.setattr(app, "BODY_SECONDS", 0.1)
    monkeypatch.setattr(app, "BLOCK_SECONDS", 0.3)
    store = Store(Study(study), f"sqlite:///{tmp_path / 'ratings.sqlite'}")
    pages, link = make_app(store), f"/s/{store.invite(1)[0]}"

    async def ask(method: str, path: str, body: bool, reads: bool) -> int:
        status = []

        async def receive() -> dict[str, Any]:
            if not body:
                await asyncio.Event().wait()
            return {"type": "http.request"}

        async def send(message: Any) -> None:
            status.append(message.get("status"))
            if message["type"] == "http.response.body" and not reads:
                await asyncio.Event().wait()

        scope = {"type": "http", "method": method, "path": path, "headers": [], "query_string": b"", "client": ("x", 1)}
        await pages(scope, receive, send)
        return int(status[0])

    async def run() -> None:
        assert await ask("POST", f"{link}/check", False, True) == 408
        slow = [asyncio.create_task(ask("GET", f"{link}/sound", True, False)) for _ in range(4)]
        await asyncio.sleep(0.15)
        assert await ask("GET", f"{link}/sound", True, True) == 429
        assert await asyncio.gather(*slow) == [200] * 4
        assert await ask("GET", f"{link}/sound", True, True) == 200

    asyncio.run(run())
    store.close()


def test_withdrawal_deletes_everything(server: Server, client: httpx.Client) -> None:
    link = server.invite(1)[0]
    consent(client, link)
    sitting = "fedcba9876543210" * 2
    for position in (-1, 0, 1):
        hear(client, link, position)
        client.post(f"{link}/ratings", json=answer(position, 4, session=sitting))
    assert sitting in {row["session"] for row in server.export()}
    before = len(server.export())
    assert "Delete my data" in client.get(f"{link}/withdraw").text and len(server.export()) == before
    assert "has been deleted" in client.post(f"{link}/withdraw").text
    for path in ("", "/withdraw", "/audio/1"):
        assert client.get(link + path).status_code == 404
    assert client.post(f"{link}/ratings", json=answer(2, 4)).status_code == 404
    assert len(server.export()) == before - 1
    if not server.database:  # not even in the space that SQLite keeps of deleted rows
        kept = b"".join(path.read_bytes() for path in server.folder.glob("ratings.sqlite*"))
        stored = hashlib.sha256(link.rpartition("/")[2].encode()).hexdigest()
        assert sitting.encode() not in kept and stored.encode() not in kept
    else:
        import psycopg

        with psycopg.connect(server.database[1]) as database:
            for table in ("ratings", "trials", "participants"):
                column = "id" if table == "participants" else "participant"
                alive = "SELECT id FROM participants WHERE slot IS NOT NULL OR version IS NULL"
                left = database.execute(f"SELECT count(*) FROM {table} WHERE {column} NOT IN ({alive})".encode())
                assert left.fetchone() == (0,)


def test_admin(server: Server, client: httpx.Client) -> None:
    for headers in (
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": server.token},
    ):
        refused = client.get(f"{server.url}/export", headers=headers)
        assert refused.status_code == 401 and "participant" not in refused.text
    url = f"{server.url}/admin"
    assert client.post(url, data={"token": "wrong", "action": "invite", "number": "1"}).status_code == 401
    page = client.post(url, data={"token": server.token, "action": "invite", "number": "2"})
    links = [line for line in page.text.replace("<li>", "\n").replace("</li>", "\n").splitlines() if "/s/" in line]
    assert len(links) == 2 and len(set(links)) == 2 and all(link.startswith(server.url) for link in links)
    consent(client, links[0])
    overview = client.post(url, data={"token": server.token, "action": "overview"}).text
    number = overview.count('scope="row"')
    name = overview.split('scope="row">')[-1][:5]
    assert "passed" in overview and name.startswith("p")
    left = client.post(url, data={"token": server.token, "action": "withdraw", "number": name}).text
    assert left.count('scope="row"') == number - 1 and client.get(links[0]).status_code == 404
    assert client.post(url, data={"token": server.token, "action": "withdraw", "number": name}).status_code == 400
    csv_page = client.post(url, data={"token": server.token, "action": "export"})
    assert (
        csv_page.headers["content-type"].startswith("text/csv")
        and "attachment" in csv_page.headers["content-disposition"]
    )
    assert csv_page.text.splitlines()[0] == ",".join(COLUMNS)


def test_open_enrolment_makes_a_link_by_a_form_only(server: Server, client: httpx.Client) -> None:
    assert client.get(f"{server.url}/join").status_code == 200
    first = client.post(f"{server.url}/join")
    assert first.status_code == 303 and len(first.headers["location"]) > 30
    assert "Before you begin" in client.get(f"{server.url}/{first.headers['location']}").text
    assert client.post(f"{server.url}/join").headers["location"] != first.headers["location"]


def test_headphones_are_asked_about_twice_at_most(server: Server, client: httpx.Client) -> None:
    link = server.invite(1)[0]
    version = Study(server.folder).consent[0]
    assert client.post(f"{link}/consent", data={"agree": "yes", "version": "old"}).status_code == 303
    assert "Before you begin" in client.get(link).text  # the text is not the one that was shown
    client.post(f"{link}/consent", data={"agree": "yes", "version": version})
    assert "Headphones" in client.get(link).text
    assert 'role="alert"' in client.post(f"{link}/check", data={"tone": "first", "again": "no"}).text
    assert "Headphones" in client.get(link).text
    assert client.post(f"{link}/check", data={"tone": "third", "again": "yes"}).status_code == 303
    assert "Practice 1 of 2" in client.get(link).text


def test_nothing_is_stored_before_consent_and_what_was_answered_stays(
    server: Server, client: httpx.Client, capfd: pytest.CaptureFixture[str]
) -> None:
    link = server.invite(1)[0]
    version = Study(server.folder).consent[0]
    store = Store(Study(server.folder), *server.database[1:])

    def stored() -> dict[str, Any]:
        return dict(store.find(link.rpartition("/")[2]) or {})

    assert client.post(f"{link}/check", data={"tone": "second"}).status_code == 303
    assert stored()["headphones"] is None and stored()["consented"] is None
    client.post(f"{link}/consent", data={"agree": "yes", "version": version})
    first = stored()
    time.sleep(0.01)
    client.post(f"{link}/consent", data={"agree": "yes", "version": version})
    assert stored() == first and first["consented"]
    for given_ in ("passed", "failed"):  # of two simultaneous answers, the first one stays
        store.checked(first["id"], given_)
    assert stored()["headphones"] == "passed"
    store.close()


def test_a_disk_that_fails_is_no_failure_of_the_pages(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing excerpt, and a log that cannot be emptied after a withdrawal, which takes effect nevertheless."""
    import shutil

    made = Study(Path(shutil.copytree(study, tmp_path / "study")))
    store = Store(made)
    client = TestClient(make_app(store), follow_redirects=False)
    link = f"/s/{store.invite(1)[0]}"
    consent(client, link)  # type: ignore[arg-type]  # a TestClient is a client of httpx
    for path in (made.folder / "audio").iterdir():
        path.unlink()
    gone = client.get(f"{link}/audio/-1")
    assert gone.status_code == 503 and gone.headers["retry-after"] and "No such file" in capsys.readouterr().err

    def fail(own: sqlite3.Connection) -> str:
        raise sqlite3.OperationalError("disk I/O error")

    monkeypatch.setattr(eraser, "_truncate", fail)
    assert "have been deleted" in client.post(f"{link}/withdraw").text
    assert "(disk I/O error); trying again" in capsys.readouterr().err and client.get(link).status_code == 404
    store.close()


def test_a_changed_consent_is_shown_again(study: Path, tmp_path: Path, client: httpx.Client) -> None:
    with serving(study, tmp_path) as server:
        link = server.invite(1)[0]
        consent(client, link)
        hear(client, link, -1)
        assert client.post(f"{link}/ratings", json=answer(-1, 4)).status_code == 200
        assert server.stop() == 0
        path = server.folder / "consent.txt"
        path.write_text(path.read_text(encoding="utf-8").replace("Version: 1", "Version: 2"), encoding="utf-8")
        server.start("--new-admin-token")
        assert "has changed since" in client.get(link).text
        assert client.post(f"{link}/ratings", json=answer(0, 4)).status_code == 409
        client.post(f"{link}/consent", data={"agree": "yes", "version": Study(server.folder).consent[0]})
        assert 'data-position="0"' in client.get(link).text  # at the same step, in the same order
        page = client.get(f"{server.url}/join")
        assert page.status_code == 404 and client.post(f"{server.url}/join").status_code == 404  # not opened


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_no_acknowledged_rating_is_lost_when_the_server_is_killed(kind: str, study: Path, tmp_path: Path) -> None:
    """Six participants at once; SIGKILL twice; each continues when the server is back."""
    import contextlib

    with contextlib.ExitStack() as stack:
        database = stack.enter_context(postgres()) if kind == "postgresql" else ""
        server = stack.enter_context(serving(study, tmp_path, database=database))
        links = server.invite(6)
        acknowledged: list[dict[int, int]] = [{} for _ in links]

        async def run() -> None:
            async with httpx.AsyncClient(timeout=5) as client:
                people = [
                    asyncio.create_task(
                        take_part(
                            client, link, lambda position, n=number: (position + n) % 10 + 1, acknowledged[number]
                        )
                    )
                    for number, link in enumerate(links)
                ]
                for wanted in (8, 36):
                    while sum(map(len, acknowledged)) < wanted:
                        await asyncio.sleep(0.01)
                    await asyncio.to_thread(server.stop, signal.SIGKILL)
                    await asyncio.to_thread(server.start)
                await asyncio.gather(*people)

        asyncio.run(run())
        people: dict[str, dict[int, int]] = {}
        for row in server.export():
            assert int(row["position"]) not in people.setdefault(row["participant"], {}), "duplicate"
            people[row["participant"]][int(row["position"])] = int(row["rating"])
        rated_ = [{place: value for place, value in each.items() if place > 0} for each in acknowledged]
        assert sorted(map(sorted, (each.items() for each in people.values()))) == sorted(
            map(sorted, (each.items() for each in rated_))
        )
        assert all(len(each) == PROMPTS * 2 + 3 for each in rated_)


@pytest.mark.slow
def test_start_and_stop(study: Path, tmp_path: Path, client: httpx.Client) -> None:
    with serving(study, tmp_path) as server:
        first = server.token
        kept = b"".join(path.read_bytes() for path in server.folder.glob("ratings.sqlite*"))
        assert first.encode() not in kept and (server.folder / "ratings.sqlite").stat().st_mode & 0o077 == 0
        taken = CliRunner().invoke(main, ["serve", str(server.folder), "--port", str(server.port)])
        assert taken.exit_code == 2 and taken.output.count("\n") == 1 and "is already in use" in taken.output
        assert server.stop() == 0  # SIGTERM
        server.token = ""
        server.start()
        assert server.token == ""  # it was shown once
        server.stop(signal.SIGINT)
        server.start("--new-admin-token")
        assert server.token not in ("", first)
        assert client.get(f"{server.url}/export", headers={"authorization": f"Bearer {first}"}).status_code == 401
        assert server.export() == []
        with sqlite3.connect(server.folder / "ratings.sqlite") as file:
            assert file.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        out = tmp_path / "ratings.csv"
        for words, code, told in (
            (["--out", str(out)], 0, "0 ratings by 0 participants"),
            (["--out", str(out)], 2, "already exists"),
            (["--out", str(out), "--overwrite"], 0, "0 ratings"),
            (["--out", str(tmp_path / "no" / "where")], 2, "cannot be written"),
            (["--out", "-x", "--database", "mysql://x/y"], 2, "expected a sqlite or a postgresql URL"),
            (["--out", "-x", "--database", "postgresql://host:port/x"], 2, "is not a URL"),
            (["--out", "-x", "--database", "postgresql://nobody:secret@127.0.0.1:1/x"], 2, "cannot be used"),
        ):
            done = CliRunner().invoke(main, ["export", str(server.folder), *words])
            assert done.exit_code == code and told in done.output and "secret" not in done.output, done.output
    assert out.read_text() == ",".join(COLUMNS) + "\n"


def test_a_database_belongs_to_one_study(study: Path, wavs: list[str], tmp_path: Path) -> None:
    build(tmp_path / "other", wavs, "--prompts", "2")
    url = f"sqlite:///{tmp_path / 'ratings.sqlite'}"
    out = str(tmp_path / "out.csv")
    assert CliRunner().invoke(main, ["export", str(study), "--database", url, "--out", out]).exit_code == 0
    done = CliRunner().invoke(main, ["invite", str(tmp_path / "other"), "--database", url])
    assert done.exit_code == 2 and "another study" in done.output


def test_a_studys_own_database_is_in_its_folder_whatever_that_is_called(study: Path, tmp_path: Path) -> None:
    import shutil

    for name in ("study?", "50%25", "a b#c"):
        folder = Path(shutil.copytree(study, tmp_path / name))
        assert CliRunner().invoke(main, ["invite", str(folder)]).exit_code == 0
        assert (folder / "ratings.sqlite").stat().st_size > 0
    assert {path.name for path in tmp_path.iterdir()} == {"study?", "50%25", "a b#c"}


def test_invitations_are_links_that_cannot_be_guessed(study: Path, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'ratings.sqlite'}"
    words = ["invite", str(study), "-n", "50", "--database", url, "--address", "https://study.example/"]
    links = CliRunner().invoke(main, words).output.split()
    assert len(set(links)) == 50
    assert all(link.startswith("https://study.example/s/") and len(link.rpartition("/")[2]) == 32 for link in links)
    kept = b"".join(path.read_bytes() for path in tmp_path.glob("ratings.sqlite*"))
    assert not [link for link in links if link.rpartition("/")[2].encode() in kept]


# --- Rates --------------------------------------------------------------------------------------------------------


def test_a_flood_is_stopped_and_others_are_not(
    wavs: list[str], study: Path, tmp_path: Path, client: httpx.Client
) -> None:
    """The limits of a study with excerpts of ten seconds."""
    with serving(study, tmp_path) as server:
        design = json.loads((server.folder / "study.json").read_text())
        (server.folder / "study.json").write_text(json.dumps(design | {"seconds": 10.0}))
        server.stop()
        server.start()
        flood, calm = server.invite(2)
        statuses = [client.get(flood).status_code for _ in range(90)]
        assert statuses[:60] == [200] * 60 and statuses[-1] == 429
        assert int(client.get(flood).headers["retry-after"]) >= 1
        assert client.get(calm).status_code == 200
        guesses = [client.get(f"{server.url}/s/{number:032d}").status_code for number in range(40)]
        assert guesses[:15] == [404] * 15 and guesses[-1] == 429
        tokens = [client.get(f"{server.url}/export").status_code for _ in range(3)]
        assert tokens == [429] * 3  # guesses of any kind are counted together
        assert client.get(calm).status_code == 200  # guesses do not lock out participants with a link
        assert (
            client.get(f"{server.url}/export", headers={"authorization": f"Bearer {server.token}"}).status_code == 200
        )


def test_fifty_participants_share_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten-second excerpts for half an hour, all from one address, all starting at once: nobody has to wait."""
    instant = 0.0
    monkeypatch.setattr("smart.study.app.time.monotonic", lambda: instant)
    limits = Limits(10.0)
    for second in range(1800):
        instant = float(second)
        for person in range(50):
            for _ in range(12 if second == 0 else 4 if second % 10 == 0 else 0):
                assert limits.addresses.wait("address") == 0 and limits.links.wait(str(person)) == 0
    assert all(limits.enrolments.wait("address") == 0 for _ in range(50))


def test_buckets_fill_again_and_forget(monkeypatch: pytest.MonkeyPatch) -> None:
    instant = 0.0
    monkeypatch.setattr("smart.study.app.time.monotonic", lambda: instant)
    buckets = Buckets(rate=2, burst=3)
    assert [buckets.wait("a") for _ in range(4)] == [0, 0, 0, 0.5]
    instant = 0.5
    assert [buckets.wait("a"), buckets.wait("a") > 0, buckets.wait("b")] == [0, True, 0]
    for number in range(20_000):
        instant += 1
        buckets.wait(str(number))
    assert len(buckets._levels) <= 10_001


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1"])
def test_formulas_are_defused(text: str) -> None:
    assert plain(text) == f"'{text}" and plain("Mozilla/5.0 (=)") == "Mozilla/5.0 (=)" and plain(-1) == -1


def test_formulas_of_a_key_from_others_are_defused_in_the_export() -> None:
    rating = {
        "participant": 1, "session": "s", "position": 1, "excerpt": "a", "rating": 3, "play_count": 1,
        "listened_s": 1.0, "response_ms": 5, "kind": "main", "user_agent": "=1", "stored": 0.0, "version": "+1",
    }  # fmt: skip
    made = SimpleNamespace(excerpts={"a": Excerpt("a", "main", "@x", "-1", "=2")})
    store: Any = SimpleNamespace(rows=lambda: [rating], study=made)
    (row,) = csv.DictReader(ratings_csv(store).splitlines())
    columns = ("system", "prompt", "seed", "user_agent", "version")
    assert [row[name] for name in columns] == ["'@x", "'-1", "'=2", "'=1", "'+1"]


# --- Requests of all kinds ----------------------------------------------------------------------------------------


class Fuzzed(NamedTuple):
    client: TestClient
    store: Store
    token: str
    admin: str


@pytest.fixture(scope="module")
def fuzzed(study: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fuzzed]:
    """The application in this process, so that its exceptions reach the test, and a participant in mid-study."""
    made = Study(study)
    store = Store(made, f"sqlite:///{tmp_path_factory.mktemp('fuzzed') / 'ratings.sqlite'}")
    limits = Limits(1e-9)  # no request is refused for its rate
    limits.guesses = limits.enrolments = limits.links
    client = TestClient(make_app(store, limits=limits, open_enrolment=True), follow_redirects=False)
    token, admin = store.invite(1)[0], store.admin_token()
    assert admin
    consent(client, f"/s/{token}")  # type: ignore[arg-type]  # a TestClient is a client of httpx
    yield Fuzzed(client, store, token, admin)
    store.close()


def any_json() -> st.SearchStrategy[Any]:
    plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=40)
    return st.recursive(plain, lambda some: st.lists(some) | st.dictionaries(st.text(max_size=10), some), max_leaves=8)


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    kind = draw(st.sampled_from(["bytes", "form", "json", "nearly"]))
    if kind == "bytes":
        return draw(st.binary(max_size=200))
    if kind == "form":
        names = st.sampled_from(["agree", "version", "tone", "again", "token", "action", "number"])
        return urlencode(draw(st.lists(st.tuples(names | st.text(max_size=5), st.text(max_size=20))))).encode()
    if kind == "json":
        return json.dumps(draw(any_json())).encode()
    sent = answer(draw(st.integers(-3, 9)), draw(st.integers(-1, 12)))
    sent[draw(st.sampled_from(sorted(sent)))] = draw(any_json())
    return json.dumps(sent).encode()


PLACES = ("", "/consent", "/check", "/sound", "/audio/-1", "/audio/{any}", "/ratings", "/withdraw", "/{any}")


@st.composite
def addresses(draw: st.DrawFn) -> str:
    anything = quote(draw(st.text(max_size=30)), safe=draw(st.sampled_from(["", "/", "/.%"])))
    inside = draw(st.sampled_from(PLACES)).replace("{any}", anything)
    roots = ["/s/{token}" + inside, f"/s/{anything}{inside}", "/", "/join", "/admin", "/export", f"/static/{anything}"]
    return draw(st.sampled_from(roots))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    method=st.sampled_from(["GET", "POST", "HEAD", "PUT", "OPTIONS"]),
    address=addresses(),
    body=bodies(),
    headers=st.dictionaries(
        st.sampled_from(["range", "user-agent", "authorization", "content-type", "cookie", "host"]),
        st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_categories=("Cc",)), max_size=40)
        | st.from_regex(r"bytes=[0-9]{0,22}-[0-9]{0,22}", fullmatch=True),
    ),
)
@example(method="POST", address="/s/{token}/ratings", body=b"[" * 16_000, headers={})  # deeper than Python recurses
@example(method="POST", address="/s/{token}/consent", body=b"a=1&" * 21, headers={})  # more fields than are read
@example(method="POST", address="/admin", body=b"token={admin}&action=invite&number=" + b"9" * 5000, headers={})
@example(method="POST", address="/admin", body=b"token={admin}&action=withdraw&number=" + b"9" * 5000, headers={})
@example(method="GET", address="/s/{token}/audio/-1", body=b"", headers={"range": f"bytes={'9' * 5000}-"})
@example(method="GET", address="/s/{token}/audio/-1", body=b"", headers={"range": f"bytes=-{'9' * 5000}"})
@pytest.mark.slow
def test_any_request_is_answered_and_none_stores_nonsense(
    fuzzed: Fuzzed, method: str, address: str, body: bytes, headers: dict[str, str]
) -> None:
    address = address.replace("{token}", fuzzed.token)
    if "withdraw" in address and method == "POST":
        address = address.replace(fuzzed.token, "x")  # or the participant would be deleted
    body = body.replace(b"{admin}", fuzzed.admin.encode())
    sent = {name: value.encode("latin-1") for name, value in headers.items() if name != "host" or value.strip()}
    reply = fuzzed.client.request(method, address, content=body, headers=sent)  # type: ignore[arg-type]  # bytes are fine
    assert reply.status_code < 500, (reply.status_code, reply.text)
    assert reply.headers["x-content-type-options"] == "nosniff" and "Traceback" not in reply.text
    for row in fuzzed.store.rows():
        assert 1 <= row["rating"] <= 10 and row["play_count"] >= 0 and row["response_ms"] >= 0


@pytest.mark.parametrize(
    "sent",
    [
        b"\x00" * 1000,
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\nHost: a\r\n\r\n",
        b"POST /join HTTP/1.1\r\nHost: a\r\nContent-Length: -5\r\n\r\n",
        b"POST /join HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 20_000 + b"\r\n",
        b"POST /join HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\nhalf",
    ],
)
def test_what_is_no_request_disturbs_nobody(server: Server, client: httpx.Client, sent: bytes) -> None:
    with (
        contextlib.suppress(ConnectionError),  # the server may hang up before it has read everything
        socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection,
    ):
        connection.sendall(sent)
        with contextlib.suppress(OSError):  # ENOTCONN, which is not a ConnectionError: the server has already hung up
            connection.shutdown(socket.SHUT_WR)
        answered = connection.recv(1 << 16)
        assert not answered or (answered.startswith(b"HTTP/1.1 ") and b" 500 " not in answered.splitlines()[0])
    assert client.get(f"{server.url}/").status_code == 200 and server.process.poll() is None
