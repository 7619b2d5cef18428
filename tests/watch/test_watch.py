"""smart watch: what it reads of runs that grow, change and vanish, and what it refuses."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
from symusic import Score
from watch_server import Server

from smart import UserError
from smart.listen import in_words
from smart.render import score_notes
from smart.watch.runs import Metrics, Missing, Runs


@pytest.fixture(scope="module")
def runs(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two copies of a run, and of much that is none."""
    folder = tmp_path_factory.mktemp("watch") / "runs"
    shutil.copytree(finished, folder / "one", symlinks=True)
    shutil.copytree(finished, folder / "<b>two & 100%", symlinks=True)
    (folder / "no run").mkdir()
    (folder / "a file").write_text("x")
    (folder / "link").symlink_to(folder / "one")
    shutil.copytree(folder / "one", folder / ".hidden", symlinks=True)
    shutil.copytree(folder / "one", folder / "new\nline", symlinks=True)
    (folder.parent / "config.toml").write_text("[secret]\n")
    return folder


@pytest.fixture(scope="module")
def server(runs: Path) -> Iterator[Server]:
    with Server(runs) as running:
        yield running


@pytest.fixture
def run(runs: Path, tmp_path: Path) -> Path:
    """A copy of a run, for a test that changes it."""
    return Path(shutil.copytree(runs / "one", tmp_path / "runs" / "one", symlinks=True))


def get(server: Server, path: str, **options: Any) -> httpx.Response:
    return httpx.get(server.url + path, timeout=60, **options)


def test_only_runs_are_listed(server: Server) -> None:
    listed = get(server, "/runs").json()["runs"]
    assert {each["name"] for each in listed} == {"one", "<b>two & 100%"}
    one = next(each for each in listed if each["name"] == "one")
    assert (one["step"], one["total"], one["finished"], one["program"]) == (6, 6, True, "grpo")
    assert get(server, "/runs/%3Cb%3Etwo%20%26%20100%25/config").json()["run"]["name"] == "r"


@pytest.mark.parametrize(
    "path",
    [
        "/runs/../config.toml", "/runs/..%2F..%2Fetc/config", "/runs/%2e%2e/config", "/runs/./config",
        "/runs/link/config", "/runs/.hidden/config", "/runs/new%0Aline/config", "/runs/no%20run/config",
        "/runs/a%20file/config", "/runs/one%00/config", "/runs/one%5C..%5Cone/config", "/runs/%FF%FE/config",
        "/runs/" + "x" * 5000 + "/config", "/runs/none/metrics", "/runs/one/sets/tuned",
        "/runs/one/sets/final/../samples",
        "/runs/one/sets/samples/0", "/runs/one/pieces/final/config.toml", "/runs/one/pieces/final/..%2Fconfig.toml",
        "/runs/one/pieces/tuned/model.safetensors", "/runs/one/pieces/final/..%2F..%2F00.wav",
        "/runs/one/pieces/samples/..%2Ffinal/00.wav", "/runs/one/pieces/samples/00000003/00.wav.wav",
        "/runs/one/completions/7", "/runs/one/completions/99999999999999999999", "/runs/one/completions/1/6.json",
        "/runs/one/completions/1/-1.json", "/runs/one/completions/1/0.toml", "/static/..%2Fapp.py", "/static/app.py",
    ],
)  # fmt: skip
def test_what_is_no_part_of_a_run_is_refused(server: Server, path: str) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as line:  # no client that tidies the path
        line.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        reply = b"".join(iter(lambda: line.recv(65536), b"")).decode()
    head, _, body = reply.partition("\r\n\r\n")
    assert head.startswith("HTTP/1.1 404 ") and "secret" not in body and body.count("\n") == 0


def test_the_page_is_told_without_an_error(server: Server) -> None:
    """Browsers log every 404 as an error, and a run that the page shows may be deleted at any time."""
    for path in ("/runs/none/metrics", "/runs/one/sets/samples/00000099", "/runs/one/completions/7"):
        reply = get(server, path, headers={"x-watch": "page"})
        assert reply.status_code == 204 and "or no longer" in reply.headers["x-watch"]


def test_a_link_in_a_run_that_leads_out_is_refused(run: Path) -> None:
    secret = run.parent.parent / "secret.mid"
    secret.write_bytes((run / "final" / "00-tuned.mid").read_bytes())
    (run / "final" / "07-tuned.mid").symlink_to(secret)
    reader = Runs(run.parent)
    with pytest.raises(Missing):
        reader.file("one", "final", "07-tuned.mid")
    assert reader.file("one", "final", "00-tuned.mid").is_file()


def test_only_pages_of_this_machine_may_ask(server: Server) -> None:
    assert get(server, "/runs", headers={"host": f"localhost:{server.port}"}).status_code == 200
    for headers in ({"host": f"evil.example:{server.port}"}, {"host": ""}, {"sec-fetch-site": "cross-site"}):
        assert get(server, "/runs", headers=headers).status_code == 403
    reply = get(server, "/", headers={"sec-fetch-site": "cross-site"})  # a link to the page is none of its data
    assert reply.status_code == 200 and "default-src 'none'" in reply.headers["content-security-policy"]
    assert httpx.post(f"{server.url}/runs").status_code == 405
    listening = subprocess.run(["cat", "/proc/net/tcp", "/proc/net/tcp6"], capture_output=True, text=True).stdout
    assert f"0100007F:{server.port:04X}" in listening and f"00000000:{server.port:04X}" not in listening


def test_metrics_are_sent_once(server: Server, runs: Path) -> None:
    all_lines = [json.loads(line) for line in (runs / "one" / "metrics.jsonl").read_text().splitlines()]
    first = get(server, "/runs/one/metrics").json()
    assert first["first"] == 0 and first["rows"] == all_lines
    more = get(server, f"/runs/one/metrics?version={first['version']}&seen=5").json()
    assert more["first"] == 5 and more["rows"] == all_lines[5:]
    for wrong in ("version=other&seen=5", f"version={first['version']}&seen=999", "seen=x"):
        assert get(server, f"/runs/one/metrics?{wrong}").json()["rows"] == all_lines


def test_a_metrics_file_that_grows_and_is_replaced(tmp_path: Path) -> None:
    path, metrics = tmp_path / "metrics.jsonl", Metrics()
    path.write_text('{"step": 1, "a": 1.5}\n{"step": 2, "a"')
    version, rows = metrics.look(path)
    assert rows == [{"step": 1, "a": 1.5}]
    with open(path, "a") as file:
        file.write(': NaN, "b": "x"}\nnot JSON\n[1]\n{"a": 3}\n{"step": 3, "a": ' + "9" * 400 + "}\n")
    assert metrics.look(path) == (version, [{"step": 1, "a": 1.5}, {"step": 2, "a": None, "b": None}])
    with open(path, "a") as file:
        file.write('{"step": 4}\n')
    assert metrics.look(path)[1][-1] == {"step": 4}
    path.write_text('{"step": 1, "a": 2.5}\n' + '{"step": 2}\n' * 30)  # the same file, overwritten with more
    again, rows = metrics.look(path)
    assert again != version and rows[0] == {"step": 1, "a": 2.5} and len(rows) == 31
    other = tmp_path / "other"
    other.write_text('{"step": 1, "a": 2.5}\n')
    os.replace(other, path)  # cut back, as a resumed run does
    assert metrics.look(path)[1] == [{"step": 1, "a": 2.5}] and metrics.look(path)[0] != again


def test_pieces_come_in_pairs_with_their_ratings(server: Server, runs: Path) -> None:
    sets = get(server, "/runs/one/sets").json()
    assert sets[:2] == ["final", "held_out/00000006"] and "samples/00000006" in sets and "held_out/00000000" not in sets
    for name, labels in {"final": ["base", "tuned"], "held_out/00000006": ["base", "iteration 6"]}.items():
        pairs = get(server, f"/runs/one/sets/{name}").json()["pairs"]
        assert [pair["number"] for pair in pairs] == [0, 1]
        for clip, label in zip(pairs[1]["clips"], labels, strict=True):
            assert clip["label"] == label and set(clip["ratings"]) == {"reward", "CE"}
            midi = get(server, f"/runs/one/pieces/{clip['folder']}/{clip['file']}.mid").content
            assert midi == (runs / "one" / clip["folder"] / f"{clip['file']}.mid").read_bytes()
            np.testing.assert_allclose(clip["notes"], score_notes(Score.from_midi(midi))[:, :4], atol=1e-4)
            audio, rate = soundfile.read(runs / "one" / clip["folder"] / f"{clip['file']}.wav")
            assert clip["seconds"] == len(audio) / rate and clip["silent"] == (np.abs(audio).max() < 1e-3)
    (first, *_) = get(server, "/runs/one/sets/samples/00000003").json()["pairs"]
    assert [clip["label"] for clip in first["clips"]] == ["iteration 3"]


def test_the_ratings_of_samples_are_those_of_the_batch(runs: Path) -> None:
    ratings = json.loads((runs / "one" / "samples" / "00000003" / "ratings.json").read_text())
    rows = pq.read_table(runs / "one" / "completions", filters=[("step", "=", 3)]).to_pylist()
    assert ratings == {f"{row:02d}": {key: rows[row][key] for key in ("reward", "CE")} for row in (0, 1)}


def test_held_out_pieces_are_for_the_same_prompts(runs: Path) -> None:
    folders = [runs / "one" / "held_out" / f"{step:08d}" for step in (0, 6)]
    for piece in ("00.mid", "01.mid"):
        base, policy = (Score.from_file(folder / piece) for folder in folders)
        assert base.tempos == policy.tempos and base.time_signatures == policy.time_signatures
    # every two iterations there is a measurement, every three the run keeps pieces
    assert sorted(path.name for path in folders[0].parent.iterdir()) == ["00000000", "00000004", "00000006"]


def test_completions_are_tabulated_and_rendered_when_asked_for(server: Server, runs: Path) -> None:
    assert get(server, "/runs/one/completions").json() == [1, 2, 3, 4, 5, 6]
    rows = pq.read_table(runs / "one" / "completions", filters=[("step", "=", 3)]).to_pylist()
    table = get(server, "/runs/one/completions/3").json()
    assert [each["ratings"]["reward"] for each in table] == [row["reward"] for row in rows]
    assert [each["length"] for each in table] == [len(row["tokens"]) - row["prompt_length"] for row in rows]
    assert all(each["prompt"].endswith("beats a minute") for each in table)
    # row 0 is also among the samples: the same music, and the same audio
    clip = get(server, "/runs/one/completions/3/0.json").json()
    kept = runs / "one" / "samples" / "00000003" / "00.mid"
    np.testing.assert_allclose(clip["notes"], score_notes(Score.from_file(kept))[:, :4], atol=1e-3)
    assert get(server, "/runs/one/completions/3/0.wav").content == kept.with_suffix(".wav").read_bytes()
    assert get(server, "/runs/one/completions/3/0.mid").content == kept.read_bytes()


def test_what_is_half_written_or_damaged_is_left_out(run: Path) -> None:
    reader = Runs(run.parent)
    (run / "summary.json").unlink()
    (run / "samples" / "00000009").mkdir()
    shutil.copy(
        run / "final" / "00-tuned.mid", run / "samples" / "00000009" / "00.mid"
    )  # its ratings are not there yet
    assert reader.sets("one")[0].name == "held_out/00000006"
    (run / "completions" / "00000008.parquet").write_bytes(b"PAR1")
    (run / "completions" / ".00000010.parquet.tmp").write_bytes(b"")
    assert reader.completion_steps("one") == [1, 2, 3, 4, 5, 6]
    (run / "config.toml").write_text("[grpo\n")
    assert reader.overview()[0]["total"] is None and reader.config("one") == {}
    (run / "config.toml").write_text('grpo = 1\noptimisation = "x"\nwhen = 2020-01-01\nbig = 1e400\n')
    assert reader.overview()[0]["total"] is None and reader.config("one")["when"] == "2020-01-01"
    json.dumps(reader.config("one"), allow_nan=False)
    (run / "metrics.jsonl").unlink()
    assert reader.metrics("one", "", 0)["rows"] == [] and reader.overview()[0]["name"] == "one"
    (run / "final" / "ratings-base.json").write_text("[")
    (run / "final" / "00-base.wav").write_bytes(b"RIFF")
    (run / "summary.json").write_text("{}")
    clip = reader.pieces("one", "final")["pairs"][0]["clips"][0]
    assert clip["audio"] is None and clip["ratings"] == {}
    shutil.rmtree(run)
    assert reader.overview() == []
    with pytest.raises(Missing):
        reader.sets("one")


def test_one_run_or_no_folder(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, run.parent / "two", symlinks=True)
    assert Runs(run).names() == ["one"] and Runs(run.parent).names() == ["one", "two"]
    for wrong in (tmp_path / "none", run / "config.toml"):
        with pytest.raises(UserError, match=r"cannot be read .*; give a folder of runs"):
            Runs(wrong)


def test_a_port_that_is_taken(server: Server, runs: Path) -> None:
    words = [sys.executable, "-m", "smart.watch", str(runs), "--port", str(server.port)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2 and f"Error: --port {server.port}: is already in use" in done.stderr


def test_it_ends_with_a_signal_and_its_worker_too(runs: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*")}
    with Server(runs) as server:
        assert get(server, "/runs/one/completions/1/0.wav").status_code == 200
        pid = server.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").parent.parent
        workers = [int(word) for task in children.iterdir() for word in (task / "children").read_text().split()]
        assert workers
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(20) == 0
    assert not [worker for worker in workers if Path(f"/proc/{worker}").exists()]
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("*")} == before  # it only reads


def test_prompts_in_words() -> None:
    assert in_words(["Bar_None", "TimeSig_2/4", "Position_0", "Tempo_93.33"]) == "2/4, 93 beats a minute"
    assert in_words(["TimeSig_3/8", "Tempo_120.0", "Program_24", "Pitch_61"]).endswith(
        "program 25, first note C sharp 4"
    )
    assert in_words(["BOS_None"]) == "an empty beginning"
