"""smart.evaluate: statistics checked by hand, tables that survive a kill, and a self-contained page."""

import csv
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from conftest import make_tiny_model
from safetensors.torch import load_file, save_file
from scipy import stats
from symusic import Note, Score, Tempo, TimeSignature, Track

from smart import UserError, plots
from smart.diversity import vendi_score
from smart.evaluate import sample as sampling
from smart.evaluate.command import main
from smart.evaluate.pieces import FEATURES as MEASURES
from smart.evaluate.report import (
    Comparison,
    Sample,
    compare,
    diversity,
    in_a_sentence,
    interval,
    paper_rows,
    read,
    verdict,
)
from smart.evaluate.sample import METADATA, finish, read_settings, row, schema
from smart.evaluate.statistics import Estimate, Paired, holm, jackknife, mean, paired
from smart.features import FEATURES, midi_features
from smart.model import SHIPPED, save_base
from smart.rollout import Piece
from smart.tokens import build_tokenizer, decode, encode, save_tokenizer

TOKENIZER = build_tokenizer()
RATE = 8000


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


# --- Statistics ---------------------------------------------------------------------------------------------------


def test_a_mean_and_its_interval() -> None:
    draws = np.random.default_rng(3).normal(5, 2, 400)
    found = mean([*draws, math.nan, math.inf])
    assert found.n == 400 and found.value == pytest.approx(draws.mean())
    low, high = stats.t.interval(0.95, 399, draws.mean(), stats.sem(draws))
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.02)
    moved = mean(3 * draws + 1)
    assert moved[:3] == pytest.approx([3 * part + 1 for part in found[:3]])
    assert mean(draws) == mean(draws) and mean(draws, seed=2).low != mean(draws).low
    one, none = mean([4.0]), mean([math.nan])
    assert one.value == 4 and one.n == 1 and math.isnan(one.low) and none.n == 0 and math.isnan(none.value)


def test_paired_differences_by_hand() -> None:
    before, after = [1.0, 2.0, 3.0, 4.0, math.nan, 5.0], [2.0, 4.0, 3.0, 8.0, 1.0, math.nan]
    found = paired(before, after)  # differences 1, 2, 0, 4
    assert found.difference.value == 1.75 and found.difference.n == found.cohen.n == 4
    assert found.cohen.value == pytest.approx(1.75 / math.sqrt(35 / 12))
    assert found.cliff.value == 0.75
    assert found.t_test == pytest.approx(stats.ttest_rel([2, 4, 3, 8], [1, 2, 3, 4]).pvalue)
    assert found.wilcoxon == pytest.approx(0.25)  # three positive ranks: 2 of the 8 sign patterns are as extreme
    back = paired(after, before)
    assert back.difference.value == -1.75 and back.cliff.value == -0.75
    assert (back.t_test, back.wilcoxon) == pytest.approx((found.t_test, found.wilcoxon))
    assert (back.difference.low, back.difference.high) == pytest.approx((-found.difference.high, -found.difference.low))


def test_a_known_effect_is_found() -> None:
    draws = np.random.default_rng(5)
    before, noise = draws.normal(6, 1, 1000), draws.normal(0, 1, 1000)
    noise = (noise - noise.mean()) / noise.std(ddof=1)
    found = paired(before, before + 0.5 + noise)
    assert found.cohen.value == pytest.approx(0.5) and found.difference.value == pytest.approx(0.5)
    error = 1.96 * math.sqrt(1 / 1000 + 0.5**2 / 2000)  # standard error of d for normal differences, times 1.96
    assert (found.cohen.low, found.cohen.high) == pytest.approx((0.5 - error, 0.5 + error), abs=0.01)
    expected = 2 * stats.norm.cdf(0.5) - 1  # the share above zero minus the share below
    assert found.cliff.low < expected < found.cliff.high
    assert max(found.t_test, found.wilcoxon) < 1e-20
    assert min(paired(before, before + noise)[3:]) > 0.1


@pytest.mark.parametrize(
    ("difference", "value", "t_test", "wilcoxon"),
    [
        ([0.0, 0.0, 0.0], 0.0, math.nan, math.nan),
        ([0.3, 0.3, 0.3, 0.3], 0.3, math.nan, 0.125),
        ([2.0], 2.0, math.nan, 1.0),
    ],
)
def test_what_is_not_defined_is_no_number(
    difference: list[float], value: float, t_test: float, wilcoxon: float
) -> None:
    found = paired([6.1] * len(difference), np.array(difference) + 6.1)
    assert found.difference.value == pytest.approx(value) and math.isnan(found.cohen.value)
    assert (found.t_test, found.wilcoxon) == pytest.approx((t_test, wilcoxon), nan_ok=True)
    nothing = paired([math.nan], [1.0])
    assert nothing.difference.n == 0 and math.isnan(nothing.wilcoxon)


@pytest.mark.parametrize("count", [3, 5, 10, 20])
def test_intervals_of_few_values_cover_what_they_claim(count: int) -> None:
    """Of means of rounded differences of ratings, of Cohen's d and of Cliff's delta; percentiles cover 82% of five."""
    draws = np.random.default_rng(count)
    effect, spread, studies = 0.8, 1.5, 300
    truth = {"difference": effect, "cohen": effect / spread, "cliff": 2 * stats.norm.cdf(effect / spread) - 1}
    covered = dict.fromkeys(truth, 0)
    for _ in range(studies):
        found = paired(np.full(count, 5.0), 5 + np.round(draws.normal(effect, spread, count), 2), scale=(1, 10))
        for name, value in truth.items():
            estimate = getattr(found, name)
            covered[name] += estimate.low <= value <= estimate.high or math.isnan(estimate.low)
            assert math.isnan(estimate.low) or estimate.low <= estimate.value <= estimate.high
        assert not found.difference.low < -9 and not found.difference.high > 9 and not abs(found.cliff.high) > 1
    low, high = stats.binom.ppf([0.0001, 0.9999], studies, 0.95) / studies
    assert low <= covered["difference"] / studies <= high
    assert min(covered.values()) / studies >= 0.90


def test_what_few_or_equal_values_cannot_tell_is_left_out_and_said() -> None:
    two = paired([5.0, 5.0], [6.0, 6.1])
    assert all(math.isnan(each.low) and each.why == "too few" for each in two[:3])
    assert verdict(1, two.difference) == "cannot be told"
    equal = paired([5.0] * 40, [6.0] * 40)
    assert equal.difference.value == 1 and math.isnan(equal.difference.low) and equal.difference.why == "all equal"
    assert equal.cliff.value == equal.cliff.high == 1 and 0.8 < equal.cliff.low < 1  # of 40 that rise, not of all
    wide = mean([1.0, 10.0, 1.0], scale=(1, 10))
    assert wide.why == "as wide as the scale" and interval(wide) == "4.000 (as wide as the scale)"
    edge = mean([9.9, 10.0, 9.0, 9.8], scale=(1, 10))
    assert edge.high == 10 and edge.low > 8
    assert interval(Estimate(math.nan, math.nan, math.nan, 0, "too few")) == "–"


def test_a_family_is_the_same_for_both_tests() -> None:
    assert holm([0.01, math.nan, 0.02], 3).tolist() == pytest.approx([0.03, math.nan, 0.04], nan_ok=True)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, math.nan, 0.03]).tolist() == pytest.approx([0.03, 0.06, math.nan, 0.06], nan_ok=True)
    assert holm([0.5, 0.6]).tolist() == [1.0, 1.0] and holm([]).tolist() == []


def test_the_jackknife_of_a_mean_is_its_standard_error() -> None:
    values = np.random.default_rng(1).normal(size=10)
    found = jackknife(lambda rows: {"mean": float(values[list(rows)].mean())}, 10)["mean"]
    error = stats.t.ppf(0.975, 9) * stats.sem(values)  # ten groups have nine degrees of freedom
    assert found[:4] == pytest.approx((values.mean(), values.mean() - error, values.mean() + error, 10))
    inside = jackknife(lambda rows: {"mean": float(values[list(rows)].mean())}, 10, {"mean": (0, 5)})["mean"]
    assert inside.low == 0 and inside.high == found.high
    alike = jackknife(lambda rows: {"rate": 0.0}, 20)["rate"]
    assert alike.value == 0 and math.isnan(alike.high) and alike.why == "all equal"
    alone = jackknife(lambda rows: {"mean": 2.0}, 1)["mean"]
    assert alone.value == 2 and math.isnan(alone.low)


# --- Tables made by hand ------------------------------------------------------------------------------------------


def piece(system: str, prompt: int, notes: Sequence[tuple[int, int, int]], rating: float | None) -> Piece:
    """A piece with notes (beat, pitch, velocity); without a rating its clip failed."""
    score = Score(12)
    score.tempos.append(Tempo(0, 120))
    score.time_signatures.append(TimeSignature(0, 4, 4))
    score.tracks.append(Track(program=0))
    for beat, pitch, velocity in notes:
        score.tracks[0].notes.append(Note(12 * beat, 12, pitch, velocity))
    tokens = encode(TOKENIZER, score)
    time = np.arange(RATE // 2) / RATE
    wave = sum((np.sin(2 * np.pi * 440 * 2 ** ((pitch - 69) / 12) * time) for _, pitch, _ in notes), 0 * time)
    audio = None if rating is None else np.stack([wave, wave]).astype(np.float32)
    rated = {"ce_proxy.CE": math.nan if rating is None else rating, "ce_proxy.PQ": 5.0}
    return Piece(system, prompt, 7, tokens, 4, decode(TOKENIZER, tokens), audio, rated, -10.0, len(tokens) - 4)


Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    save_tokenizer(TOKENIZER, tmp_path)
    text = (tmp_path / "tokenizer.json").read_text()

    def make(name: str, pieces: dict[str, list[Piece]], prompts: str = "procedural") -> Path:
        import pyarrow as pa

        axes = ["ce_proxy.CE", "ce_proxy.PQ"]
        rows = [row(one, RATE) for mine in pieces.values() for one in mine]
        pq.write_table(pa.Table.from_pylist(rows, schema(axes)), tmp_path / "part")
        settings = {
            "systems": list(pieces), "models": {system: {"step": None, "sha256": "0" * 64} for system in pieces},
            "prompts": prompts, "count": len(next(iter(pieces.values()))), "soundfont_sha256": "1" * 64,
            "rewards": {"ce_proxy": {"axes": ["CE", "PQ"], "provenance": "by <hand>", "stand_in": True}},
        }  # fmt: skip
        provenance = {"settings": settings, "given": list(pieces), "tokenizers": dict.fromkeys(pieces, text)}
        finish([tmp_path / "part"], tmp_path / f"{name}.parquet", list(pieces), provenance)
        return tmp_path / f"{name}.parquet"

    return make


def two_systems(count: int = 12) -> dict[str, list[Piece]]:
    """ "a<b" writes ever higher notes; "tuned" adds a low one and rates 1 higher, but failed on prompt 3."""
    draws = np.random.default_rng(0)
    base, tuned = [], []
    for prompt in range(count):
        notes = [(beat, 60 + (prompt + beat) % 12, 80) for beat in range(4)]
        rating = 5 + draws.normal()
        base.append(piece("a<b", prompt, notes if prompt else [], rating))
        more = [*notes, (5, 30, 40)]
        tuned.append(piece("tuned", prompt, more, None if prompt == 3 else rating + 1 + draws.normal() / 10))
    return {"a<b": base, "tuned": tuned}


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_a_row_says_what_the_piece_is() -> None:
    one = row(piece("x", 3, [(0, 60, 80), (1, 67, 40)], 6.5), RATE)
    assert set(one) == set(schema(["ce_proxy.CE", "ce_proxy.PQ"]).names) >= set(FEATURES)
    assert (one["failed"], one["silent"], one["empty"], one["seconds"]) == (False, False, False, 0.5)
    assert one["pitches"].tolist() == [60, 67] and one["velocity_range"] > 35
    lost, empty = row(piece("x", 0, [(0, 60, 80)], None), RATE), row(piece("x", 0, [], 2.0), RATE)
    assert lost["failed"] and not lost["silent"] and math.isnan(lost["ce_proxy.CE"]) and lost["audio_vector"] is None
    assert empty["silent"] and empty["empty"] and empty["number_of_notes"] == 0


def test_a_table_is_read_as_it_was_written(make: Make) -> None:
    pieces = two_systems()
    sample: Sample = read(make("t", pieces))
    assert sample.systems == ["a<b", "tuned"] and sample.axes == ["ce_proxy.CE", "ce_proxy.PQ"]
    for system, mine in pieces.items():
        wanted = [one.scores["ce_proxy.CE"] for one in mine]
        np.testing.assert_allclose(sample.measures[system]["ce_proxy.CE"], wanted, rtol=1e-6)
        for score, one in zip(sample.scores[system], mine, strict=True):
            assert midi_features(score)["pitches"].tolist() == midi_features(one.score)["pitches"].tolist()
    low = sample.measures["a<b"]
    assert math.isnan(low["pitch_range"][0]) and math.isnan(low["mean_pitch"][0]) and low["number_of_notes"][0] == 0
    assert low["mean_pitch"][1] == pytest.approx(62.5)


def test_comparisons_of_a_table(make: Make) -> None:
    found = {c.measure: c for c in compare(read(make("t", two_systems())))}
    assert {(c.before, c.after) for c in found.values()} == {("a<b", "tuned")}
    rating = found["ce_proxy.CE"]
    assert rating.found.difference.n == 11 and rating.found.difference.value == pytest.approx(1, abs=0.15)
    assert rating.found.cohen.value > 5 and rating.found.cliff.value == 1
    assert rating.t_test == rating.found.t_test  # the other axis never differs, so it adds no p-value to the correction
    assert rating.wilcoxon == rating.found.wilcoxon and math.isnan(found["ce_proxy.PQ"].wilcoxon)
    assert found["number_of_notes"].found.difference.value == pytest.approx((11 * 1 + 5) / 12)
    assert found["pitch_range"].found.difference.n == 11  # the empty piece has none


def test_diversity_counts_different_pieces(make: Make) -> None:
    notes = [[(beat, pitch, 80) for beat in range(4)] for pitch in (48, 52, 59)]
    same = [piece("same", prompt, notes[0], 5.0) for prompt in range(12)]
    three = [piece("three", prompt, notes[prompt % 3], 5.0) for prompt in range(12)]
    sample = read(make("t", {"same": same, "three": three}))
    one, many = diversity(sample, "same"), diversity(sample, "three")
    assert one["vendi"].value == pytest.approx(1) == pytest.approx(one["vendi_audio"].value)
    assert math.isnan(one["vendi"].low) and one["vendi"].why == "all equal"  # how they vary is not known then
    assert many["vendi"].value == pytest.approx(3) == pytest.approx(vendi_score(np.kron(np.eye(3), np.ones((4, 4)))))
    assert many["vendi"].low <= 3 <= many["vendi"].high and many["vendi"].n == 12
    assert many["distance"].value > one["distance"].value == 0


def test_a_verdict_goes_by_the_interval() -> None:
    up, unclear = Estimate(1.0, 0.5, 1.5, 9), Estimate(0.1, -0.2, 0.4, 9)
    assert verdict(1, up) == "as in the paper" and verdict(-1, up) == "the other way"
    assert verdict(1, unclear) == "no clear difference" and verdict(1, Estimate(1, math.nan, math.nan, 1)) != verdict(
        1, up
    )
    assert interval(Estimate(-0.5, -1.25, 12.0, 3)) == "−0.50 [−1.25, 12.00]"
    assert interval(Estimate(4.0, math.nan, math.nan, 1)) == "4.000"


# --- The page -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("papers", ["", "models", "reward", "both"])
def test_only_what_was_made_with_the_papers_base_and_reward_gets_a_verdict(make: Make, papers: str) -> None:
    sample = read(make("t", two_systems(24)))
    settings = sample.settings
    for model in settings["models"].values():
        model["is_the_papers"] = papers in ("models", "both")
    settings["rewards"]["ce_proxy"]["is_published"] = papers in ("reward", "both")
    means = {m: {s: mean(sample.measures[s][m]) for s in sample.systems} for m in (*sample.axes, *MEASURES)}
    rows = paper_rows(compare(sample), means, settings)
    verdicts = {row["measure"]: row["verdict"] for row in rows}
    ratings, features = verdicts["ce_proxy.CE"], {verdicts[each.title] for each in MEASURES.values()}
    assert (ratings == "as in the paper") == (papers == "both")
    assert (features == {""}) == (papers in ("", "reward"))


@pytest.mark.slow
def test_the_report_of_tables_and_a_run(make: Make, tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    lines = [f'{{"step": {step}, "reward/mean": {5 + step / 10}, "reward/std": 0.5}}\n' for step in range(1, 9)]
    (tmp_path / "first" / "metrics.jsonl").write_text("".join(lines) + '{"step": 9, "rew')  # cut off by a crash
    out = tmp_path / "out"
    result = run("report", make("t", two_systems()), "--run", tmp_path / "first", "--out", out)
    assert result.exit_code == 0, result.output
    page = (out / "index.html").read_text(encoding="utf-8")
    for figure in ("t-ratings", "t-features", "t-rolls", "reward-by-iteration"):
        assert (out / f"{figure}.png").read_bytes().startswith(b"\x89PNG")
        assert (out / f"{figure}.pdf").read_bytes().startswith(b"%PDF")
        assert rows_of(out / f"{figure}.csv")
    assert [row["mean"] for row in rows_of(out / "reward-by-iteration.csv")][:2] == ["5.1", "5.2"]
    bars = [row for row in rows_of(out / "t-ratings.csv") if row["panel"] == "ce_proxy.CE"]
    assert sum(int(row["count"]) for row in bars if row["system"] == "tuned") == 11
    assert sum(float(row["share"]) for row in bars if row["system"] == "a<b") == pytest.approx(1)
    rolls = rows_of(out / "t-rolls.csv")
    assert {float(row["share"]) for row in rolls if row["system"] == "tuned" and row["pitch"] == "30"} == {1.0}
    means = {(row["system"], row["measure"]): row for row in rows_of(out / "t-means.csv")}
    assert means["tuned", "ce_proxy.CE"]["n"] == "11" and float(means["tuned", "ce_proxy.PQ"]["mean"]) == 5
    # nothing is fetched, everything has a name
    assert not re.search(r"(src|href)=\"(?!data:|#)", page) and "url(" not in page and "<script" not in page
    images, captions = re.findall(r"<img [^>]*>", page), page.count("<caption>")
    assert len(images) == 6 and all(re.search(r'alt="[^"]{40,}"', image) for image in images)
    assert captions == page.count("<table") and "<th>" not in page
    assert "a&lt;b" in page and "a<b" not in page and "by &lt;hand&gt;" in page and "is an approximation" in page
    players = re.findall(r'<audio [^>]*aria-label="([^"]*)" src="data:audio/flac;base64,([^"]{100,})"', page)
    assert [label.partition(",")[0] for label, _ in players] == ["a&lt;b", "tuned"] * 2
    assert len({sound for _, sound in players}) > 1 and "while another soundfont was rated" in page
    first = re.sub(r"\s+", " ", page.split("<h1>")[1].split("</p>")[0])
    assert re.search(
        r"tuned is rated (higher|lower) than a&lt;b: [\d.]+ against [\d.]+ on average, a difference", first
    )
    assert all(f"figure {number})" in page for number in (2, 3, 4, 6)) and "prefers-color-scheme: dark" in page


def test_the_main_result_is_a_sentence() -> None:
    def said(low: float, value: float, high: float) -> str:
        found = Paired(*(Estimate(value, low, high, 9) for _ in range(3)), math.nan, math.nan)
        c = Comparison("base", "tuned", "CE", found, math.nan, math.nan)
        return in_a_sentence(c, Estimate(6.0, 5.0, 7.0, 9), Estimate(6.0 + value, 5.0, 7.0, 9))

    higher = said(0.2, 0.5, 0.8)
    assert higher.startswith("tuned is rated higher than base: 6.500 against 6.000 on average, ")
    assert higher.endswith("a difference between 0.200 and 0.800 (9 pairs).")
    assert "rated lower than" in said(-0.8, -0.5, -0.2) and "are rated alike" in said(-0.1, 0.1, 0.3)
    assert "too little to tell" in said(math.nan, 0.5, math.nan)


def test_a_figure_has_the_same_bytes_every_time(tmp_path: Path) -> None:
    values = {"x": np.array([1.5, 2.0, math.nan]), "y": np.array([3.5])}
    panel = plots.Panel("title", "x", "y", values, plots.edges_of(values.values(), bins=4))
    first, second = (plots.histograms([panel], tmp_path / name) for name in ("a", "b"))
    for one, two in zip(first, second, strict=True):
        assert one.read_bytes() == two.read_bytes()
    assert [row["count"] for row in rows_of(first[2])] == ["1", "1", "0", "0", "0", "0", "0", "1"]
    assert [row["share"] for row in rows_of(first[2])][:4] == ["0.5", "0.5", "0.0", "0.0"]


def test_names_of_systems_and_people_are_drawn_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are not read as mathematics, nor left out of the legend."""
    odd, panels = r"$\foo$", {r"$\foo$": np.array([1.0]), "_x": np.array([2.0])}
    panel = plots.Panel(odd, "x", "y", panels, plots.edges_of(panels.values(), bins=2))
    plots.histograms([panel], tmp_path / "histograms")
    plots.rewards_and_rolls(panel, dict.fromkeys(panels, np.ones((8, 128), np.float32)), tmp_path / "rolls", per_beat=4)
    rows = [{"step": step, "reward/mean": step} for step in range(3)]
    plots.rewards_by_iteration(dict.fromkeys(panels, rows), tmp_path / "iterations", odd)
    table = [(person, system, 3.0) for person in (odd, "$x_{") for system in panels]
    plots.ratings(table, list(panels), tmp_path / "ratings")
    assert len(list(tmp_path.glob("*.pdf"))) == 4
    figures: list[Any] = []
    monkeypatch.setattr(plots, "save", lambda figure, *_: figures.append(figure))
    plots.ratings(table, list(panels), tmp_path / "ratings")
    shown = [text.get_text() for text in figures[0].axes[0].get_legend().get_texts()]
    assert shown == [r"$\foo$ (n = 2)", "_x (n = 2)"]


def test_bins_hold_as_many_whole_numbers_each() -> None:
    for low, high in ((26, 76), (0, 29), (0, 30), (5, 5)):
        edges = plots.edges_of([np.arange(low, high + 1.0), np.array([math.nan])])
        counts = np.histogram(np.arange(low, high + 1), edges)[0]
        assert counts.sum() == high + 1 - low and len(counts) <= 30 and len(set(counts[:-1])) <= 1
    assert plots.edges_of([np.array([math.nan, 2.5])]).tolist()[::30] == [2.0, 3.0]
    assert plots.edges_of([np.array([math.nan])]).tolist()[::30] == [0.0, 1.0]


def test_a_single_piece_of_a_single_model(make: Make, tmp_path: Path) -> None:
    table = make("t", {"tuned": two_systems(1)["tuned"]}, "dataset")
    result = run("report", table, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert "against" not in page.split('id="reading"')[0] and "nan" not in re.sub(r'"data:[^"]*"', "", page).lower()
    assert rows_of(tmp_path / "out" / "t-comparisons.csv") == []
    means = {row["measure"]: row for row in rows_of(tmp_path / "out" / "t-means.csv")}
    assert means["ce_proxy.CE"]["n"] == "1" and means["ce_proxy.CE"]["mean_low"] == ""
    assert "figure 7" in page and "figure 3" not in page


def test_where_nothing_could_be_rendered_the_page_says_so(make: Make, tmp_path: Path) -> None:
    lost = {name: [piece(name, prompt, [], None) for prompt in range(3)] for name in ("x", "y")}
    result = run("report", make("t", lost), "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    (counted, *_) = re.findall(
        r'<th scope="row">x</th><td>3</td><td>(\d)</td>', (tmp_path / "out/index.html").read_text()
    )
    assert counted == "3"


def test_mistakes_are_one_line(make: Make, tmp_path: Path) -> None:
    table = make("t", two_systems(2))
    (tmp_path / "letter.parquet").write_text("dear")
    (tmp_path / "twin").mkdir()
    shutil.copy(table, tmp_path / "twin" / "t.parquet")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    large = f'{{"step": {10**300}, "reward/mean": 2}}'
    for name, line in (("words", '{"step": 1, "reward/mean": "high"}'), ("large", large)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(line + "\n")
    for arguments, text in (
        ([], "nothing to report"),
        ([tmp_path / "absent.parquet"], "no such file"),
        ([tmp_path / "letter.parquet"], "expected a table written by"),
        ([table, tmp_path / "twin" / "t.parquet"], "two tables are called 't'"),
        (["--run", tmp_path / "nowhere"], "has no metrics.jsonl"),
        (["--run", tmp_path / "empty"], "have no reward"),
        (["--run", tmp_path / "words"], "its metrics are damaged: reward/mean is 'high'"),
        (["--run", tmp_path / "large"], "its metrics are damaged: step is 10000"),
    ):
        result = run("report", *arguments, "--out", tmp_path / "out")
        assert result.exit_code == 2 and text in result.output and "Traceback" not in result.output, result.output
    with pytest.raises(UserError):
        read_settings(tmp_path / "part")  # a table, but not one of ours


# --- The whole way ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_command_goes_on_to_the_same_bytes_and_a_report(tmp_path: Path) -> None:
    save_base(make_tiny_model(TOKENIZER), TOKENIZER, tmp_path / "tiny")
    arguments = ["piano-small", tmp_path / "tiny", "-n", 70, "--tokens", 16, "--seconds", 1, "--sample-rate", 16000]
    arguments += ["--workers", 1, "--device", "cpu"]  # two blocks
    result = run("sample", *arguments, "--out", tmp_path / "whole.parquet")
    assert result.exit_code == 0 and "140 pieces in" in result.output and "is an approximation" in result.output, (
        result.output
    )
    out = tmp_path / "out.parquet"
    process = subprocess.Popen(
        [sys.executable, "-m", "smart.evaluate", "sample", *map(str, arguments), "--out", str(out)],
        stdout=subprocess.DEVNULL,
    )
    first = tmp_path / "out.parquet.parts" / "000000.parquet"
    while not first.is_file():
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    begun = first.stat().st_mtime_ns
    other = run("sample", *arguments, "--seed", 2, "--out", out)
    assert other.exit_code == 2 and "other settings (seed was 1 and is 2)" in other.output
    result = run("sample", *arguments, "--out", out, "--workers", 2)
    assert result.exit_code == 0, result.output
    assert out.read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    assert not first.parent.exists() and begun
    again = run("sample", *arguments, "--out", out)
    assert again.exit_code == 0 and "nothing to do" in again.output
    refused = run("sample", *arguments, "--temperature", 0.5, "--out", out)
    assert refused.exit_code == 2 and "temperature was 1.0 and is 0.5" in refused.output
    table = pq.read_table(out)
    assert table["prompt"].to_pylist() == [*range(70)] * 2
    assert table["seed"].to_pylist()[:70] == table["seed"].to_pylist()[70:]
    assert METADATA in table.schema.metadata and read_settings(out)["settings"]["rewards"]["ce_proxy"]["stand_in"]
    result = run("report", out, "--out", tmp_path / "report")
    assert result.exit_code == 0, result.output
    assert len(rows_of(tmp_path / "report" / "out-comparisons.csv")) == 9


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_model_that_was_exchanged_is_named_and_accepted(
    tmp_path: Path, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, out = shutil.copytree(SHIPPED / "piano-small", tmp_path / "base"), tmp_path / "t.parquet"
    arguments = ["sample", base, "-n", 2, "--tokens", 16, "--seconds", 1, "--workers", 1, "--device", "cpu"]
    arguments += ["--out", out]
    with monkeypatch.context() as interrupted:
        interrupted.setattr(sampling, "finish", lambda *_: 1 / 0)
        assert isinstance(run(*arguments).exception, ZeroDivisionError)
    changed = base / file
    if file == "model.safetensors":
        weights = load_file(changed)
        save_file({name: value * 1.01 for name, value in weights.items()}, changed, metadata={"format": "pt"})
    else:
        changed.write_bytes(changed.read_bytes() + b"\n")
    key = {"config.json": "config_sha256", "model.safetensors": "sha256", "tokenizer.json": "tokenizer_sha256"}[file]
    refused = run(*arguments)
    assert refused.exit_code == 2 and f"models.base.{key} was" in refused.output, refused.output
    assert "continue with --accept-changes" in refused.output and not out.exists()
    accepted = run(*arguments, "--accept-changes")
    assert accepted.exit_code == 0, accepted.output
    ((change,),) = read_settings(out)["accepted"]
    assert change.startswith(f"models.base.{key} was")
    assert run(*arguments).exit_code == 0, "the table says what it was made with"


def test_audio_is_saved_next_to_the_table(tmp_path: Path) -> None:
    import soundfile

    result = run(
        "sample", "x=piano-small", "-n", 2, "--tokens", 32, "--seconds", 1, "--sample-rate", 16000, "--workers", 1,
        "--audio", tmp_path / "audio", "--out", tmp_path / "t.parquet",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    table = pq.read_table(tmp_path / "t.parquet")
    assert sorted(path.name for path in (tmp_path / "audio").iterdir()) == [
        "0000-x.mid", "0000-x.wav", "0001-x.mid", "0001-x.wav",
    ]  # fmt: skip
    for prompt, seconds in enumerate(table["seconds"].to_pylist()):
        assert soundfile.info(tmp_path / "audio" / f"{prompt:04d}-x.wav").duration == pytest.approx(seconds, abs=1e-4)
        notes = midi_features(Score(tmp_path / "audio" / f"{prompt:04d}-x.mid"))["number_of_notes"]
        assert notes == table["number_of_notes"][prompt].as_py()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["piano-small", "piano-small"], "two models are called"),
        (["piano-small", "--prompts", "dataset"], "needs --corpus"),
        (["nowhere/at/all"], "no such folder"),
        (["piano-small", "--reward", "applause"], 'no reward "applause"'),
        (["piano-small", "--reward-option", "loud=1"], 'no option "loud"'),
        (["piano-small", "--soundfont", "absent.sf2"], "does not exist"),
        (["piano-small", "--out", "no/such/folder/t.parquet"], "does not exist; create it first"),
    ],
)
def test_what_cannot_be_sampled_is_one_line(arguments: list[str], text: str, tmp_path: Path) -> None:
    out = [] if "--out" in arguments else ["--out", tmp_path / "t.parquet"]
    result = run("sample", *arguments, "-n", 1, *out)
    assert result.exit_code == 2 and text in result.output and "Traceback" not in result.output, result.output
    assert list(tmp_path.iterdir()) == []


def random_piece(seed: int) -> Score:
    random_ = np.random.default_rng(seed)
    score = Score(480)
    score.tempos.append(Tempo(0, 100))
    score.time_signatures.append(TimeSignature(0, 4, 4))
    score.tracks.append(Track(program=0))
    for beat in range(24):
        score.tracks[0].notes.append(Note(480 * beat, 480, int(random_.integers(40, 90)), 80))
    return score


def test_what_was_copied_from_the_training_pieces_is_told_from_what_was_not(tmp_path: Path) -> None:
    from smart.corpus import Corpus
    from smart.corpus.build import build
    from smart.evaluate.report import closeness

    (tmp_path / "midi").mkdir()
    for number in range(40):
        random_piece(number).dump_midi(tmp_path / "midi" / f"{number}.mid")
    build([tmp_path / "midi"], tmp_path / "corpus")
    corpus = Corpus(tmp_path / "corpus")
    training = corpus.split("train")
    copies = [decode(corpus.tokenizer, training[number]).shift_pitch(2) for number in (3, 5)]
    scores = {"copies": copies, "own": [random_piece(100), random_piece(101)]}
    columns = {name: {"prompt": [0, 1]} for name in scores}
    sample = Sample(tmp_path / "t.parquet", {}, list(scores), [], {}, columns, scores)
    found = closeness(sample, corpus, tmp_path)
    assert found["copies"]["nearest"].value == pytest.approx(1) and found["copies"]["copied"].value == 1
    assert found["copies"]["longest"].value == 24
    assert found["own"]["copied"].value == 0 and found["own"]["nearest"].value < 0.7
    table = rows_of(tmp_path / "t-nearest.csv")
    assert [row["training_piece"] for row in table[:2]] == ["3", "5"] and len(table) == 4


def test_the_distance_from_real_pieces_is_that_of_the_distributions(tmp_path: Path) -> None:
    """0 for the pieces themselves, 1 for pitches that never occur in them."""
    from smart.corpus import Corpus
    from smart.corpus.build import build
    from smart.evaluate.distances import distances

    (tmp_path / "midi").mkdir()
    for number in range(40):
        random_piece(number).dump_midi(tmp_path / "midi" / f"{number}.mid")
    build([tmp_path / "midi"], tmp_path / "corpus")
    corpus = Corpus(tmp_path / "corpus")
    splits = [corpus.split(name) for name in ("train", "validation", "test")]
    same = [decode(corpus.tokenizer, split[row][:68]) for split in splits for row in range(len(split))]
    scores = {"same": same, "high": [score.shift_pitch(15) for score in same for _ in range(2)]}
    columns = {
        system: {name: [midi_features(score)[name] for score in pieces] for name in FEATURES}
        | {"empty": [False] * len(pieces)}
        for system, pieces in scores.items()
    }
    settings = {"settings": {"max_new_tokens": 64}}
    found = distances(Sample(tmp_path / "t.parquet", settings, list(scores), [], {}, columns, scores), corpus)
    assert set(found["same"].values()) == {0.0}
    pitches = [np.concatenate([midi_features(score)["pitches"] for score in scores[name]]) for name in ("same", "high")]
    grid = np.arange(128)
    by_hand = max(abs((pitches[0] <= x).mean() - (pitches[1] <= x).mean()) for x in grid)
    assert found["high"]["pitches"] == pytest.approx(by_hand) and found["high"]["scale_consistency"] == 0
    assert found["high"]["mean"] == pytest.approx(by_hand / 8 + found["high"]["empty_beat_rate"] / 8, abs=1e-9)
