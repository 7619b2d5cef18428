"""smart.demo: the page has what was sampled, rendered and rated; bad input ends with a one-line message."""

import base64
import hashlib
import io
import json
import math
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import soundfile
import torch
from click.testing import CliRunner
from conftest import HOSTILE, Demo
from symusic import Note, Score, Track

from smart.config import Config, dumps
from smart.demo.command import main
from smart.demo.page import Page, Section, quantise, rate
from smart.render import score_notes
from smart.reward import load_reward, resample
from smart.rollout import Piece, System, compose, find_system

pytestmark = pytest.mark.slow  # whole programs

RATE, COUNT = 22050, 2


class Parsed(HTMLParser):
    """Every element with its attributes, and the text of scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.words, self.inside = "", False
        self.feed(html)
        self.scripts = [(attributes, text) for (tag, attributes), text in self._pairs() if tag == "script"]
        self.style = next(text for (tag, _), text in self._pairs() if tag == "style")
        self.data = json.loads(next(text for attributes, text in self.scripts if attributes.get("id") == "data"))
        self.audio = [
            decode85(text) for attributes, text in self.scripts if (attributes.get("id") or "").startswith("audio-")
        ]

    def _pairs(self) -> Any:
        return zip(self.elements, self.texts, strict=True)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, dict(attrs)))
        self.texts.append("")
        self.inside = True

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.texts[-1] += data
        self.words += data

    def handle_endtag(self, tag: str) -> None:
        self.inside = False

    def pieces(self) -> dict[tuple[str, int], dict[str, Any]]:
        """(system, prompt) -> clip."""
        return {
            (system, pair["prompt"]): self.data["clips"][number]
            for section in self.data["sections"]
            for pair in section["pairs"]
            for system, number in pair["clips"].items()
        }


def decode85(text: str) -> bytes:
    return base64.b85decode(text.strip().replace(",", "<"))


def pcm(flac: bytes) -> npt.NDArray[np.int16]:
    """Audio (C, S), read by a different decoder than the page's."""
    file = soundfile.SoundFile(io.BytesIO(flac))
    assert (file.format, file.subtype, file.samplerate) == ("FLAC", "PCM_16", RATE)
    levels: npt.NDArray[np.int16] = file.read(dtype="int16").T
    return levels


@pytest.fixture(scope="module")
def parsed(demo: Demo) -> Parsed:
    return Parsed(demo.page.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def pieces(demo: Demo) -> dict[tuple[str, int], Piece]:
    """The same pieces, sampled and rated without the page."""
    systems = [find_system("piano-small"), find_system(f"{demo.run}@1"), find_system(str(demo.run))]
    drawn = compose(
        systems, count=COUNT, soundfont="timgm", rewards=[load_reward("ce_proxy")], max_new_tokens=48, seconds=3.0,
        sample_rate=RATE, workers=1, batch=16, device="cpu",
    )  # fmt: skip
    names = {"perturbed@1": "perturbed at 1"}
    return {(names.get(piece.system, piece.system), piece.prompt): piece for piece in drawn}


def test_the_page_holds_every_piece(parsed: Parsed, pieces: dict[tuple[str, int], Piece]) -> None:
    assert set(parsed.pieces()) == set(pieces) and len(pieces) == 3 * COUNT
    (section,) = parsed.data["sections"]
    assert section["first"] == "piano-small"
    # checkpoint 2 is the tuned model itself, so it appears only once
    assert [(other["name"], other["step"]) for other in section["others"]] == [
        ("perturbed at 1", 1),
        ("perturbed", Config().grpo.iterations),
    ]
    assert [pair["seed"] for pair in section["pairs"]] == [pieces["perturbed", i].seed for i in range(COUNT)]
    assert all("TimeSig_" in pair["opening"] and "Tempo_" in pair["opening"] for pair in section["pairs"])


def test_its_audio_is_what_was_rendered_to_half_a_step_of_16_bits(
    parsed: Parsed, pieces: dict[tuple[str, int], Piece]
) -> None:
    for key, clip in parsed.pieces().items():
        heard, rendered = pcm(parsed.audio[clip["audio"]]), pieces[key].audio
        assert rendered is not None and heard.shape == rendered.shape
        assert clip["seconds"] == rendered.shape[1] / RATE
        assert np.abs(heard - np.minimum(rendered * 32768.0, 32767)).max() <= 0.5
        assert np.abs(heard.astype(int)).max() >= 32766  # still at full scale


def test_its_ratings_are_those_of_its_audio(parsed: Parsed, pieces: dict[tuple[str, int], Piece]) -> None:
    reward = load_reward("ce_proxy")
    for key, clip in parsed.pieces().items():
        wave = torch.from_numpy(pcm(parsed.audio[clip["audio"]]) / np.float32(32768)).mean(0)
        again = reward.score(resample(wave, RATE, reward.sample_rate)[None])["CE"].item()
        assert clip["ratings"] == {"CE": pytest.approx(again, abs=1e-6)}
        assert again == pytest.approx(pieces[key].scores["ce_proxy.CE"], abs=0.01)  # before the rounding
    assert len({clip["ratings"]["CE"] for clip in parsed.data["clips"]}) > COUNT


def test_its_notes_are_those_of_its_midi_and_of_the_piece(parsed: Parsed, pieces: dict[tuple[str, int], Piece]) -> None:
    for key, clip in parsed.pieces().items():
        kept = score_notes(Score.from_midi(decode85(clip["midi"])))
        np.testing.assert_allclose(clip["notes"], kept[:, :4], atol=1e-4)
        np.testing.assert_allclose(kept, score_notes(pieces[key].score))
        assert len(kept) > 3


def test_it_asks_for_nothing(parsed: Parsed) -> None:
    for tag, attributes in parsed.elements:
        for name in {"src", "href", "action", "data", "poster", "srcset"} & attributes.keys():
            assert (tag, attributes[name]) == ("link", "data:,") or (attributes[name] or "").startswith("#")
        assert not [name for name in attributes if name.startswith("on") or name == "style"]
    script = next(text for attributes, text in parsed.scripts if not attributes)
    assert not re.search(r"https?:(?!//www\.w3\.org/2000/svg)|fetch\(|XMLHttp|import\b|WebSocket|Beacon", script)
    assert not re.search(r"url\(|@import|https?:", parsed.style)
    policy = next(a["content"] for _, a in parsed.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'; ")
    for kind, text in (("script", script), ("style", parsed.style)):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy


def test_names_are_text(parsed: Parsed) -> None:
    assert HOSTILE in parsed.words and parsed.data["sections"][0]["title"] == HOSTILE
    assert not [tag for tag, _ in parsed.elements if tag == "img"]
    assert len([1 for attributes, _ in parsed.scripts if not attributes]) == 1


def test_it_says_where_it_comes_from(demo: Demo, parsed: Parsed) -> None:
    for model in (demo.run / "tuned", demo.run / "checkpoints" / "00000001", find_system("piano-small").model):
        assert hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest() in parsed.words
    assert str(demo.run.parent) not in parsed.words
    assert "TimGM6mb.sf2, SHA-256 " in parsed.words and "prompts are numbers 0 to 1 of seed 1" in parsed.words
    assert dumps(Config()) in parsed.words
    assert "ce_proxy is an approximation, not the aesthetic model" in parsed.words


def test_it_is_small_and_the_same_again(demo: Demo, parsed: Parsed) -> None:
    before = demo.page.read_bytes()
    fixed = 60_000 + 30 * sum(len(clip["notes"]) for clip in parsed.data["clips"])
    assert len(before) < 1.26 * sum(map(len, parsed.audio)) + fixed
    result = CliRunner().invoke(main, [*demo.arguments, "--out", str(demo.page)])
    assert (
        result.exit_code == 2 and "already exists; choose another file, or replace it with --overwrite" in result.output
    )
    assert demo.page.read_bytes() == before
    result = CliRunner().invoke(main, [*demo.arguments, "--out", str(demo.page), "--overwrite"])
    assert result.exit_code == 0, result.output
    assert demo.page.read_bytes() == before
    assert sorted(path.name for path in demo.page.parent.iterdir()) == ["page.html", "perturbed"]


def a_piece(system: str, prompt: int, audio: Any, notes: int) -> Piece:
    score = Score(480)
    score.tracks.append(Track())
    for note in range(notes):
        score.tracks[0].notes.append(Note(240 * note, 240, 60 + note, 90))
    return Piece(system, prompt, 7, [1, 2, 3], 1, score, audio, {}, 0.0, 2)


def test_what_failed_or_is_silent_is_shown() -> None:
    page = Page(load_reward("ce_proxy"), RATE)
    systems = [System(name, Path(name), None, None) for name in ("one", "two")]
    page.add_section(Section("Pairs", systems[0], systems[1:], "procedural", None))
    silence = np.zeros((2, RATE), np.float32)
    for piece in (a_piece("one", 0, None, 3), a_piece("two", 0, silence, 0)):
        page.add(piece, "a prompt")
    parsed = Parsed(page.html(title="T", rule=[], facts={}, models=[], configs={}))
    failed, silent = (parsed.pieces()[name, 0] for name in ("one", "two"))
    assert failed["audio"] is None and failed["ratings"] == {} and len(failed["notes"]) == 3
    assert silent["silent"] and not pcm(parsed.audio[silent["audio"]]).any()
    reward = load_reward("ce_proxy")
    assert silent["ratings"] == pytest.approx(rate(reward, quantise(silence), RATE))
    assert math.isfinite(silent["ratings"]["CE"])


def test_sections_share_audio() -> None:
    page = Page(load_reward("ce_proxy"), RATE)
    systems = [System(name, Path(name), None, None) for name in ("base", "tuned")]
    generator = np.random.default_rng(0)
    audio = [generator.uniform(-1, 1, (2, 500)).astype(np.float32) for _ in range(3)]
    for number in (1, 2):
        page.add_section(Section(f"Section {number}", systems[0], systems[1:], "procedural", None))
        page.add(a_piece("base", 0, audio[0], 2), "")
        page.add(a_piece("tuned", 0, audio[number], 2), "")
    parsed = Parsed(page.html(title="T", rule=[], facts={}, models=[], configs={}))
    assert len(parsed.audio) == 3
    assert [clip["audio"] for clip in parsed.data["clips"]] == [0, 1, 0, 2]
    for clip, heard in zip(parsed.data["clips"], [audio[0], audio[1], audio[0], audio[2]], strict=True):
        np.testing.assert_array_equal(pcm(parsed.audio[clip["audio"]]), quantise(heard))


def test_choices_are_saved_without_formulas() -> None:
    """Runs the page's own lines that write a CSV cell, in node."""
    if shutil.which("node") is None:
        pytest.skip("no node")
    script = files("smart.demo").joinpath("page.js").read_text(encoding="utf-8")
    found = re.search(r"const cell = .*?\n    };\n", script, re.DOTALL)
    assert found
    cells = ["=1+1", "-x", "@a", "plain", '=a"b', -1, 0.5]
    code = f"{found[0]}console.log(JSON.stringify({json.dumps(cells)}.map(cell)))"
    done = subprocess.run(["node", "-e", code], capture_output=True, text=True, check=True, timeout=60)
    assert json.loads(done.stdout) == ["'=1+1", "'-x", "'@a", "plain", '"\'=a""b"', "-1", "0.5"]


def test_full_scale_does_not_wrap_around() -> None:
    np.testing.assert_array_equal(quantise(np.float32([[1, -1, 0, 0.25]])), [[32767, -32768, 0, 8192]])


WRONG: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "nothing": (lambda run: [], "give the models to compare"),
    "both": (lambda run: ["--runs", "piano-small", str(run), "--section", "A", "a", "b"], "give the models to compare"),
    "no run": (lambda run: ["--runs", "piano-small", "runs/none"], "runs/none"),
    "one twice": (lambda run: ["--runs", str(run), str(run)], "both are called perturbed"),
    "no such step": (lambda run: ["--runs", "piano-small", str(run), "--steps", "1,7"], "7"),
    "no number": (lambda run: ["--runs", "piano-small", str(run), "--steps", "one"], "--steps one: expected all"),
    "no steps": (lambda run: ["--runs", str(run), "piano-small", "--steps", "all"], "piano-small has no checkpoints"),
    "no corpus": (lambda run: ["--runs", "piano-small", str(run), "--kind", "dataset"], "as --corpus"),
    "no reward": (lambda run: ["--runs", "piano-small", str(run), "--reward", "loudness"], "loudness"),
    "option": (lambda run: ["--runs", "piano-small", str(run), "--reward-option", "model=x"], "no option"),
    "soundfont": (lambda run: ["--runs", "piano-small", str(run), "--soundfont", "grand"], "grand"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_ends_with_one_line(case: str, demo: Demo, tmp_path: Path) -> None:
    arguments, expected = WRONG[case]
    result = CliRunner().invoke(main, [*arguments(demo.run), "--out", str(tmp_path / "page.html")])
    assert result.exit_code == 2 and expected in result.output, result.output
    assert isinstance(result.exception, SystemExit) and not list(tmp_path.iterdir())


def test_an_out_that_cannot_be(demo: Demo, tmp_path: Path) -> None:
    for out in (tmp_path, tmp_path / "none" / "page.html"):
        result = CliRunner().invoke(main, [*demo.arguments, "--out", str(out)])
        assert result.exit_code == 2 and f"--out {out}" in result.output, result.output


def test_prompts_are_of_the_kind_that_the_run_was_tuned_on(demo: Demo, tmp_path: Path) -> None:
    run = tmp_path / "from-the-start"
    run.mkdir()
    (run / "config.toml").write_text(dumps(Config()).replace('kind = "procedural"', 'kind = "bos"'), encoding="utf-8")
    (run / "tuned").symlink_to(demo.run / "tuned")
    out = tmp_path / "page.html"
    arguments = ["--runs", "piano-small", str(run), "--out", str(out), "--prompts", "1", "--tokens", "8"]
    result = CliRunner().invoke(main, [*arguments, "--workers", "1", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    (pair,) = Parsed(out.read_text(encoding="utf-8")).data["sections"][0]["pairs"]
    assert pair["opening"] == "BOS_None"
