"""smart.run: a run's files, and cutting them back to a step."""

import json
import math
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import click
import numpy as np
import pytest
import soundfile
import torch
from click.testing import CliRunner
from matplotlib.image import imread
from safetensors import SafetensorError
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from smart import Failure, UserError
from smart.plots import curves, timeline
from smart.render import read_audio, write_wav
from smart.run import Stopwatch, Tracker, claim_folder, open_run_folder, read_metrics, run_command, summarise

CONFIG = '[run]\nname = "a"\n\n[grpo]\nbeta = 0.04\n\n[render]\nworkers = 2\n'


def test_prepare_never_loses_a_run(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "a"

    def begin(config: str = CONFIG, *, resume: bool = False, overwrite: bool = False) -> None:
        with open_run_folder(folder, config, resume=resume, overwrite=overwrite):
            with pytest.raises(UserError, match="another process is working in it"):
                open_run_folder(folder, config, resume=True, overwrite=False).__enter__()
            with pytest.raises(UserError, match="another process is working in it"):
                open_run_folder(folder, config, resume=False, overwrite=True).__enter__()

    begin()
    (folder / "metrics.jsonl").write_text("kept")
    with pytest.raises(UserError, match="already exists"):
        begin()
    begin(CONFIG.replace("workers = 2", "workers = 1"), resume=True)
    with pytest.raises(UserError, match=r"grpo\.beta was 0\.04 and is 0\.0"):
        begin(CONFIG.replace("0.04", "0.0"), resume=True)
    assert (folder / "metrics.jsonl").read_text() == "kept"
    begin(overwrite=True)
    assert [path.name for path in folder.iterdir()] == ["config.toml"]


def test_a_run_that_was_half_deleted_is_not_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that replaces it dies before any deletion: the checkpoints go before the metrics they go on from."""
    for kept in range(1, 6):
        folder = tmp_path / str(kept)
        for name in ("zebra", "checkpoints", "a"):
            (folder / name).mkdir(parents=True)
        (folder / "metrics.jsonl").write_text("1")
        (folder / "config.toml").write_text(CONFIG)
        child = os.fork()
        if not child:
            left = [kept]

            def dies(*_: object, left: list[int] = left) -> None:
                left[0] -= 1
                if not left[0]:
                    os._exit(9)

            for function, name in ((os.unlink, "unlink"), (os.rmdir, "rmdir")):
                real = function
                monkeypatch.setattr(os, name, lambda *a, real=real, **k: (dies(), real(*a, **k)))
            open_run_folder(folder, CONFIG, resume=False, overwrite=True).__enter__()
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        assert (folder / "config.toml").exists()
        assert (folder / "metrics.jsonl").exists() or not (folder / "checkpoints").exists()
        with open_run_folder(folder, CONFIG, resume=False, overwrite=True):
            assert [path.name for path in folder.iterdir()] == ["config.toml"]


def test_a_kill_at_the_first_write_leaves_nothing_in_the_way(tmp_path: Path) -> None:
    for overwrite in (False, True):
        folder = tmp_path / str(overwrite)
        folder.mkdir()
        (folder / ".config.toml.0123456789abcdef.tmp").write_text("[ru")
        with pytest.raises(UserError, match=r"nothing to resume, since it has no config\.toml"):
            open_run_folder(folder, CONFIG, resume=True, overwrite=False).__enter__()
        with open_run_folder(folder, CONFIG, resume=False, overwrite=overwrite):
            assert [path.name for path in folder.iterdir()] == ["config.toml"]


def test_a_name_that_no_folder_can_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a folder cannot have that name"):
        open_run_folder(tmp_path / "a\0b", CONFIG, resume=False, overwrite=False).__enter__()


def test_prepare_deletes_nothing_that_is_not_a_run(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years")
    with pytest.raises(UserError, match=r"has no config\.toml, so it is not a run"):
        open_run_folder(tmp_path, CONFIG, resume=False, overwrite=True).__enter__()
    assert (tmp_path / "thesis.tex").exists()
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path)
    for name in ("file", "link"):
        with pytest.raises(UserError, match="is not a folder"):
            open_run_folder(tmp_path / name, CONFIG, resume=False, overwrite=True).__enter__()


def test_settings_that_are_no_text_are_refused(tmp_path: Path) -> None:
    claim_folder(tmp_path, {"n": "a"})
    (tmp_path / "settings.json").write_bytes(b'{"n": "\xff"}')
    with pytest.raises(UserError, match="other settings"):
        claim_folder(tmp_path, {"n": "a"})


def test_a_resumed_run_writes_what_an_uninterrupted_one_does(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    def steps(folder: Path, first: int, last: int, start: int) -> None:
        with Tracker(folder, start=start) as run:
            for step in range(first, last + 1):
                run.metrics(step, {"reward/mean": step / 3, "bad": math.nan})
                run.completions([{"step": step, "tokens": [1, 2, step]}])
                if step % 2 == 0:
                    run.flush(step)

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
    steps(whole, 1, 6, 0)
    steps(cut, 1, 5, 0)
    with open(cut / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "rew')  # killed in the middle of a line
    steps(cut, 3, 6, 2)  # resumed from the checkpoint of step 2
    assert (cut / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    assert read_metrics(cut)[0] == {"step": 1, "reward/mean": 1 / 3, "bad": None}
    for folder in (whole, cut):
        assert [row["step"] for row in pq.read_table(folder / "completions").to_pylist()] == [1, 2, 3, 4, 5, 6]
        events = EventAccumulator(str(folder / "tensorboard"))
        events.Reload()
        points = events.Scalars("reward/mean")
        assert [point.step for point in points] == [1, 2, 3, 4, 5, 6]
        assert [point.value for point in points] == pytest.approx([step / 3 for step in range(1, 7)])


def program(
    train: Callable[..., None], monkeypatch: pytest.MonkeyPatch, folder: Path = Path("nowhere")
) -> click.Command:
    """A program whose module has this ``train``, with runs in ``folder``."""
    monkeypatch.setitem(sys.modules, "program_of_a_test", SimpleNamespace(train=train))
    config = SimpleNamespace(run=SimpleNamespace(folder=str(folder), name="it's mine"))
    return run_command("program_of_a_test", lambda *_: config, default="quickstart.toml", help="")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried to ..."),
        RuntimeError("can't start new thread"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the documentation"),
        OSError(122, "Disk quota exceeded"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_memory_and_disk_that_do_not_suffice_are_one_line(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(*_: object, **options: object) -> None:
        raise error

    (tmp_path / "it's mine").mkdir()
    (tmp_path / "it's mine" / "config.toml").touch()
    done = CliRunner().invoke(program(train, monkeypatch, tmp_path), [])
    assert done.exit_code == 1 and done.output.count("\n") == 1
    assert ("not enough memory" in done.output) != ("the run could not be written" in done.output)
    _, found, command = done.output.partition("; everything saved so far is kept; continue with: ")
    words = [sys.executable, "-m", "program_of_a_test", "--config", f"{tmp_path}/it's mine/config.toml", "--resume"]
    assert found and shlex.split(command) == words, "it can be pasted into a shell"
    begun = CliRunner().invoke(program(train, monkeypatch), [])
    assert begun.output.endswith("; nothing was begun: repeat the command\n")


def test_a_bug_is_not_taken_for_a_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def train(*_: object, **options: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    assert isinstance(CliRunner().invoke(program(train, monkeypatch), []).exception, RuntimeError)


def test_a_home_of_nobody_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def train(*_: object, **options: object) -> None:
        Path("~nobody-of-this-name/x.sf2").expanduser()

    done = CliRunner().invoke(program(train, monkeypatch), [])
    assert done.exit_code == 2 and done.output == (
        "Error: a path begins with ~, and the home directory that it stands for is unknown\n"
    )


def test_damaged_metrics_are_named_and_the_others_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = [b'{"step": 2, "a"', b"[]", b"\xff\xfe", b"[" * 100_000, b'{"a": 3}', b'{"step": "3"}']
    lines = [b'{"step": 1, "a": 1}', *bad, b'{"step": 4}', b'{"step": 5']
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
    assert read_metrics(tmp_path) == [{"step": 1, "a": 1}, {"step": 4}]
    told = capsys.readouterr().err.splitlines()
    assert [line.partition("line ")[2] for line in told] == [f"{n} is damaged and left out" for n in range(2, 8)]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_audio_that_is_no_sound_is_refused(tmp_path: Path, value: float) -> None:
    audio = np.zeros(100, np.float32)
    audio[50] = value
    soundfile.write(tmp_path / "a.wav", audio, 16000, subtype="FLOAT")
    with pytest.raises(UserError, match=r"a\.wav holds samples that are not finite"):
        read_audio(tmp_path / "a.wav")
    (tmp_path / "b.wav").write_bytes((tmp_path / "a.wav").read_bytes()[:30])
    with pytest.raises(UserError, match=r"b\.wav cannot be read as wav, flac, mp3 or ogg"):
        read_audio(tmp_path / "b.wav")


def test_wav_is_what_was_heard(tmp_path: Path) -> None:
    audio = np.random.default_rng(0).uniform(-1, 1, (2, 1000)).astype(np.float32)
    write_wav(tmp_path / "a.wav", audio, 22050)
    read, rate = soundfile.read(tmp_path / "a.wav")
    assert rate == 22050
    np.testing.assert_allclose(read.T, audio, atol=1 / 32000)


def of(rewards: dict[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """What was optimised, of the base and the tuned model."""
    return {name: {"reward": values} for name, values in rewards.items()}


def test_summary_by_hand(tmp_path: Path) -> None:
    rewards = {"base": np.array([1, 2, 3], np.float32), "tuned": np.array([4, 5, 6, 7], np.float32)}
    text = summarise(tmp_path, of(rewards))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["base"] == pytest.approx({"n": 3, "reward": 2, "standard_error": 1 / math.sqrt(3)})
    error = math.sqrt(1 / 3 + 5 / 3 / 4)
    assert summary["difference"] == pytest.approx({"reward": 3.5, "standard_error": error})
    assert f"= {3.5 / error:.1f} standard errors" in text and str(tmp_path / "tuned") in text
    assert "standard errors" not in summarise(tmp_path, of({"base": np.ones(2), "tuned": np.ones(2)}))


def test_a_summary_of_several_rewards_names_each(tmp_path: Path) -> None:
    each = {"reward": np.arange(3.0), "ear": np.array([5.0, 6.0, 7.0]), "rules": np.array([])}
    text = summarise(tmp_path, {"base": each, "tuned": each | {"ear": np.array([8.0, 9.0])}})
    assert "ear: 6.000 -> 8.500" in text and "rules" not in text
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["base"]["rewards"] == {"ear": 6.0} and summary["tuned"]["rewards"] == {"ear": 8.5}


def test_too_few_ratings_to_compare_end_in_one_line(tmp_path: Path) -> None:
    for base in ([], [1.0]):
        with pytest.raises(Failure, match=rf"{len(base)} of the base model, 3 of the tuned model; expected at least 2"):
            summarise(tmp_path, of({"base": np.array(base, np.float32), "tuned": np.ones(3, np.float32)}))
    assert not list(tmp_path.iterdir())


def test_curves_are_drawn(tmp_path: Path) -> None:
    with Tracker(tmp_path) as run:
        for step in range(1, 30):
            run.metrics(step, {"reward/mean": math.sin(step)})
    path = curves(tmp_path, ("reward/mean",), "reward", step="iteration")
    assert path == tmp_path / "reward_mean.png"
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 5000
    with pytest.raises(UserError, match=r"has no metrics\.jsonl"):
        curves(tmp_path / "nowhere", ("a",), "b", step="step")


def test_stopwatch_adds_up() -> None:
    watch = Stopwatch()
    watch.lap("one")
    with watch.timed("within_two"):
        pass
    watch.lap("two")
    assert list(watch.laps) == ["seconds/one", "seconds/two"]
    assert all(value >= 0 for value in watch.laps.values())
    watch.span("render", 1.0, 3.0, "worker-1")
    watch.span("render", 2.0, 2.5, "worker-2")
    watch.span("render", 3.0, math.inf, "worker-1")  # it goes on into the next iteration
    metrics = watch.metrics()
    assert metrics["seconds/iteration"] == sum(watch.laps.values())  # what went on beside is not counted twice
    assert metrics["seconds/render"] == 2.5 and 0 <= metrics["seconds/within_two"] <= metrics["seconds/two"]
    watch.restart()
    assert [span.start for span in watch.spans] == [3.0] and not watch.laps


def test_a_trace_holds_every_span_in_its_lane(tmp_path: Path) -> None:
    watch = Stopwatch()
    watch.lap("generate")
    start = watch.spans[0].start
    watch.span("render", start + 1.0, start + 3.0, "worker-1")
    watch.write(tmp_path / "traces" / "1.json")
    events = json.loads((tmp_path / "traces" / "1.json").read_text())["traceEvents"]
    lanes = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    spans = {event["name"]: event for event in events if event["ph"] == "X"}
    assert lanes == {0: "main", 1: "worker-1"}
    assert (spans["generate"]["ts"], spans["generate"]["tid"], spans["render"]["tid"]) == (0, 0, 1)
    figure = timeline(tmp_path / "traces" / "1.json")
    assert figure == tmp_path / "traces" / "1.png" and figure.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert spans["render"]["ts"] == pytest.approx(1e6) and spans["render"]["dur"] == pytest.approx(2e6)


def test_the_legend_of_a_timeline_fits(tmp_path: Path) -> None:
    """With all stages of an iteration, nothing is cut off at the edge of the figure."""
    watch = Stopwatch()
    watch.lap("save")
    start = watch.spans[0].start
    for number, stage in enumerate(["generate", "render", "reference", "score", "wait", "rate", "learn", "record"]):
        watch.span(stage, start + number, start + number + 0.5, "main")
    watch.write(tmp_path / "1.json")
    image = imread(timeline(tmp_path / "1.json"))[..., :3]
    for edge in (image[:, 0], image[:, -1], image[0], image[-1]):
        assert (edge == 1).all()
