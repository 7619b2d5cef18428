"""``smart study build``: excerpts of several systems for the same prompts and seeds, ready for listeners.

Each excerpt is padded with silence or cut to one length, brought to one loudness (``smart.study.loudness``), and
written as 16-bit stereo WAV. So all files have the same size and header; they get the same modification time and are
written in the order of their names. A name is a keyed hash of system and prompt; the key comes from the operating
system's random source and is not kept, since names could be recomputed from a seed that can be guessed.

The folder appears in one rename, after everything in it has been written. Until then the work is in a hidden folder
next to it; after an interruption the same command continues from there.
"""

import contextlib
import hmac
import io
import json
import os
import secrets
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click
import numpy as np
import numpy.typing as npt

from smart import UserError, __version__
from smart.files import hold, parse_json, sha256, split_name, sync, write_atomically
from smart.render import checked_soundfont, with_pad_bytes, write_wav
from smart.run import ACCEPT, changes, digests, files_changed, progress
from smart.study import loudness
from smart.study.folder import AUDIO, CHECK, CONSENT, FORMAT, KEY, KEY_COLUMNS, Design, write_csv, write_design
from smart.study.power import Population, Power, simulate_power

if TYPE_CHECKING:  # it imports torch, which a folder of WAV files does not need
    from smart.rollout import System

QUESTION = "How much do you enjoy this audio? Rate from 1 to 10."  # the paper's
LOW, HIGH = "not at all", "very much"
SETTINGS = ("prompts", "practice", "repeats", "silence", "seconds", "sample_rate", "seed")  # options kept in a design
BLOCK = 8  # prompts sampled together; an interruption loses at most these
EFFECTS = (0.4, 0.8, Population().effect)  # differences of mean ratings; the last is the paper's
INSTANT = 1577836800  # 2020-01-01: the modification time of every file in audio/


class Clip(NamedTuple):
    """A system's audio (2, S) for one prompt, float32 in [-1, 1]."""

    system: int
    prompt: int
    seed: int
    audio: npt.NDArray[np.float32]


class Recordings(NamedTuple):
    """A folder of WAV files as a system: the n-th file by name belongs to prompt n."""

    name: str
    folder: Path
    files: list[Path]


def recordings(text: str) -> Recordings | None:
    """``NAME=FOLDER`` or ``FOLDER`` as a folder of WAV files; None if it is not one."""
    name, path = split_name(text)
    folder = Path(path)
    found = sorted(file for file in folder.iterdir() if file.suffix.lower() == ".wav") if folder.is_dir() else []
    return Recordings(name or folder.resolve().name, folder, found) if found else None


def find_model(text: str) -> "System":
    from smart.rollout import find_system

    return find_system(text)


def origin(system: "Recordings | System") -> Path:
    return system.folder if isinstance(system, Recordings) else system.model


def read_wav(path: Path, sample_rate: int, seconds: float) -> npt.NDArray[np.float32]:
    """Audio (2, S) of a mono or stereo file, at most its first ``seconds``; ``UserError`` for anything else."""
    import soundfile

    try:
        most = round(seconds * sample_rate)
        audio, rate = soundfile.read(with_pad_bytes(path), frames=most, dtype="float32", always_2d=True)
    except (OSError, soundfile.SoundFileError) as error:
        raise UserError(f"{path}: cannot be read as audio ({error})") from None
    if rate != sample_rate:
        raise UserError(f"{path}: has {rate} samples per second, expected {sample_rate} (see --sample-rate)")
    if audio.shape[1] > 2 or not np.isfinite(audio).all():
        raise UserError(f"{path}: expected one or two channels of finite samples, found {audio.shape[1]} channels")
    stereo: npt.NDArray[np.float32] = np.broadcast_to(audio.T, (2, len(audio))).copy()
    return stereo


def fit(audio: npt.NDArray[np.float32], samples: int) -> npt.NDArray[np.float32]:
    """The first ``samples`` of a clip (2, S), padded with silence if it is shorter."""
    return np.pad(audio[:, :samples], ((0, 0), (0, max(samples - audio.shape[1], 0))))


# --- An unfinished build ----------------------------------------------------------------------------------------


class Work:
    """The hidden folder of an unfinished build: its settings, and one file for each finished clip."""

    def __init__(self, out: Path, settings: dict[str, Any], *, accept: bool = False) -> None:
        self.accepted: list[Any] = []  # changes of files since the build was begun
        self.folder = out.with_name(f".{out.name}.work")
        self.clips = self.folder / "clips"
        for path in (self.folder, self.clips, self.folder / "study"):
            if path.is_symlink():  # it would be written into what the link points to
                raise UserError(f"--out {out}: {path} is a link, which no build made; remove it")
        try:
            self.clips.mkdir(parents=True, exist_ok=True)
            self._held = contextlib.ExitStack()
            self._held.enter_context(hold(self.folder))
        except BlockingIOError:
            raise UserError(f"--out {out}: another build is writing this folder; wait until it has finished") from None
        except OSError as error:
            raise UserError(f"--out {out}: cannot be written ({error.strerror})") from None
        path = self.folder / "settings.json"
        try:
            self._compare(path, settings, accept)
        except UserError as error:
            self.close()
            raise UserError(f"--out {out}: {self.folder} holds an unfinished build {error.message}") from None
        kept = {**settings, "accepted": self.accepted}
        write_atomically(path, json.dumps(kept, sort_keys=True).encode())

    def _compare(self, path: Path, settings: dict[str, Any], accept: bool) -> None:
        if not path.exists():
            return
        try:
            before = dict(parse_json(path.read_text(encoding="utf-8", errors="replace")))
            self.accepted = list(before.pop("accepted", ()))
            changed = changes(before, json.loads(json.dumps(settings)))
        except (ValueError, TypeError, AttributeError):
            raise UserError("whose settings cannot be read; delete it") from None
        if not changed:
            return
        only_files = files_changed(before, settings)
        if not (only_files and accept):
            also = f", or continue with {ACCEPT}" if only_files else ""
            raise UserError(
                f"with other settings ({'; '.join(changed)}); give the same options to continue it, or delete it{also}"
            )
        self.accepted.append(changed)

    def path(self, system: int, prompt: int) -> Path:
        return self.clips / f"{system}-{prompt}.npz"

    def put(self, clip: Clip) -> None:
        packed = io.BytesIO()
        np.savez(packed, audio=clip.audio, seed=clip.seed)
        write_atomically(self.path(clip.system, clip.prompt), packed.getvalue())

    def get(self, system: int, prompt: int) -> Clip:
        """A finished clip. Raises various errors if it is damaged, which the checksums of a zip file show."""
        packed = io.BytesIO(self.path(system, prompt).read_bytes())
        with np.load(packed, allow_pickle=False) as found:
            return Clip(system, prompt, int(found["seed"]), found["audio"])

    def has(self, system: int, prompt: int) -> bool:
        """Whether a clip is finished and as it was written; a damaged one is reported, and will be made again."""
        path = self.path(system, prompt)
        if not path.exists():
            return False
        try:
            clip = self.get(system, prompt)
        except Exception as error:  # a damaged zip file raises nearly anything
            click.echo(f"Warning: {path} is damaged and will be made again ({type(error).__name__})", err=True)
            return False
        return clip.audio.ndim == 2

    def close(self) -> None:
        self._held.close()


# --- The folder ---------------------------------------------------------------------------------------------------


def check_sound(sample_rate: int) -> npt.NDArray[np.float32]:
    """Three soft tones for the headphone check (2, S): the first and third on the right, the second on the left."""
    samples = int(0.5 * sample_rate)
    time = np.arange(samples) / sample_rate
    edge = np.minimum(1, np.minimum(time, time[::-1]) / 0.03)  # no clicks
    tone = 0.1 * edge * (np.sin(2 * np.pi * 440 * time) + 0.5 * np.sin(2 * np.pi * 880 * time))
    sound = np.zeros((2, 3 * samples + 2 * (samples // 2)), np.float32)
    for number, side in enumerate((1, 0, 1)):
        start = number * (samples + samples // 2)
        sound[side, start : start + samples] = tone
    return sound


def assemble(folder: Path, design: Design, clips: Sequence[Clip], target: float) -> tuple[Design, list[str]]:
    """Write a study's whole folder; returns the design with the loudness that was reached, and notes for the user."""
    audio = folder / AUDIO
    audio.mkdir(parents=True)
    samples = round(design.seconds * design.sample_rate)
    key = secrets.token_bytes(32)

    def name(*parts: object) -> str:
        return hmac.digest(key, json.dumps(parts).encode(), "sha256").hex()[:24]

    fitted = [fit(clip.audio, samples) for clip in progress(clips, desc="measuring")]
    before = [loudness.measure(clip, design.sample_rate) for clip in fitted]
    common, gains = loudness.gains(before, target)
    design = replace(design, lufs=common)
    rows: dict[str, tuple[Any, ...]] = {}
    notes = []
    for clip, sound, was, gain in zip(clips, fitted, before, gains, strict=True):
        kind = "main" if clip.prompt < design.prompts else "practice"
        changed = (sound * 10 ** (gain / 20)).astype(np.float32)
        limited = not was.silent and gain < common - was.lufs - 1e-9
        excerpt = name(clip.system, clip.prompt)
        rows[excerpt] = (changed, [kind, design.systems[clip.system], clip.prompt, clip.seed], was, gain, limited, clip)
    if design.silence:
        nothing = np.zeros((2, samples), np.float32)
        was = loudness.measure(nothing, design.sample_rate)
        rows[name("silence")] = (nothing, ["silence", "", "", ""], was, 0.0, False, None)
    table = []
    for excerpt, (changed, origin, was, gain, limited, source) in progress(sorted(rows.items()), desc="writing"):
        path = audio / f"{excerpt}.wav"
        write_wav(path, changed, design.sample_rate)
        os.utime(path, (INSTANT, INSTANT))
        now = loudness.measure(read_wav(path, design.sample_rate, design.seconds), design.sample_rate)
        length = min(source.audio.shape[1], samples) / design.sample_rate if source else 0.0
        table.append([
            excerpt, *origin, int(was.silent), int(limited), f"{was.lufs:.2f}", f"{was.peak:.2f}", f"{gain:.2f}",
            f"{now.lufs:.2f}", f"{now.peak:.2f}", f"{length:.3f}", sha256(path),
        ])  # fmt: skip
        which = f"{origin[1]}, prompt {origin[2]}"
        if was.silent and source:
            notes.append(f"silent, left unchanged: {which}")
        if limited:
            notes.append(f"{common - was.lufs - gain:.1f} dB quieter than the others, to avoid clipping: {which}")
    if common < target:
        notes.append(f"the excerpts are at {common:.1f} LUFS instead of {target:.1f}, so that none of them clips")
    write_csv(folder / KEY, KEY_COLUMNS, table)
    os.chmod(folder / KEY, 0o600)
    write_design(folder, design)
    tone = check_sound(design.sample_rate)
    measured = loudness.measure(tone, design.sample_rate)
    write_wav(
        folder / CHECK, tone * np.float32(10 ** (loudness.gains([measured], common)[1][0] / 20)), design.sample_rate
    )
    # which items are practice is no secret; systems, prompts and checks are, so the manifests leave them out
    public = [(f"{AUDIO}/{row[0]}.wav", row[0], int(row[1] == "practice"), design.seconds) for row in table]
    columns = ("stimulus", "excerpt", "practice", "seconds")
    write_csv(folder / "manifest.csv", columns, public)
    variables = [dict(zip(columns, row, strict=True)) for row in public]
    (folder / "manifest.json").write_text(json.dumps(variables, indent=1) + "\n", encoding="utf-8")
    return design, notes


def simulate(design: Design, studies: int) -> list[Power]:
    """Power for the planned listeners and each of ``EFFECTS``; empty if there is nothing to compare."""
    if not studies or len(design.systems) < 2 or design.prompts < 2:
        return []
    return [
        simulate_power(design.listeners, design.prompts, Population(effect=effect), studies=studies, seed=design.seed)
        for effect in EFFECTS
    ]


def write_texts(
    folder: Path, design: Design, sources: Mapping[str, str], options: Mapping[str, Any], power: Sequence[Power]
) -> None:
    """Write drafts for the user to complete: the consent text, and the preregistration with the design filled in."""
    import jinja2

    pages = files("smart.study") / "pages"
    (folder / CONSENT).write_text((pages / "consent.txt").read_text(encoding="utf-8"), encoding="utf-8")
    template = (pages / "preregistration.md").read_text(encoding="utf-8")
    environment = jinja2.Environment(  # no autoescape: this is Markdown, not HTML
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    text = environment.from_string(template).render(
        design=design, sources=sources, options=options, power=power, version=__version__
    )
    (folder / "preregistration.md").write_text(text, encoding="utf-8")


def publish(temporary: Path, out: Path) -> None:
    """Flush a finished folder to the disk and give it its name."""
    for path in [*temporary.rglob("*"), temporary]:
        sync(path)
    os.rename(temporary, out)
    sync(out.parent)


def refuse(out: Path) -> None:
    if out.is_symlink() or out.exists():
        raise UserError(f"--out {out}: already exists, and a study is never overwritten; choose another name")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: the folder {out.parent} does not exist")


def fill(work: Work, systems: Sequence["Recordings | System"], design: Design, options: dict[str, Any]) -> None:
    """Add every missing clip to ``work``: read its recording, or sample it from the model and render it."""
    wanted = design.prompts + design.practice
    for number, system in enumerate(systems):
        if isinstance(system, Recordings):
            if len(system.files) < wanted:
                raise UserError(
                    f"--runs {system.name}: has {len(system.files)} WAV files, but {wanted} are needed "
                    f"(--count {design.prompts} --practice {design.practice})"
                )
            for prompt in range(wanted):
                if not work.has(number, prompt):
                    work.put(
                        Clip(number, prompt, 0, read_wav(system.files[prompt], design.sample_rate, design.seconds))
                    )
    models = {system.name: number for number, system in enumerate(systems) if not isinstance(system, Recordings)}
    first = next((i for i in range(wanted) if not all(work.has(n, i) for n in models.values())), wanted)
    if first == wanted:
        return
    from smart.rollout import compose

    pieces = compose(
        [system for system in systems if not isinstance(system, Recordings)], count=wanted - first, first=first,
        seed=design.seed, seconds=design.seconds, sample_rate=design.sample_rate, batch=BLOCK, **options,
    )  # fmt: skip
    for piece in progress(pieces, desc="composing", total=len(models) * (wanted - first)):
        if piece.audio is None:
            raise UserError(f"--runs {piece.system}: prompt {piece.prompt} could not be rendered; try another --seed")
        work.put(Clip(models[piece.system], piece.prompt, piece.seed, piece.audio))


def _files(systems: Sequence["Recordings | System"], options: Mapping[str, Any]) -> dict[str, Path]:
    """What a study is made of: models or recordings, and if there are models, the soundfont and the corpus."""
    found: dict[str, Path] = {}
    for system in systems:
        if isinstance(system, Recordings):
            found |= {f"{system.name}/{file.name}": file for file in system.files}
            continue
        from smart.model import FILES

        found |= {f"model {system.name}/{name}": system.model / name for name in FILES}
        found["soundfont"] = Path(options["soundfont"])
        if options["corpus"]:
            found["corpus"] = Path(options["corpus"]) / "manifest.json"
    return found


def build(
    out: Path,
    systems: Sequence["Recordings | System"],
    design: Design,
    *,
    target: float,
    studies: int,
    options: dict[str, Any],
    accept: bool = False,
) -> list[str]:
    """Make the study's folder ``out``; returns notes for the user.

    ``target``: LUFS; ``studies``: how many to simulate for the power; ``options`` go to ``smart.rollout.compose``.
    ``accept``: continue an unfinished build although files that it was begun with have changed.
    """
    sources = {each.name: str(origin(each).resolve()) for each in systems}
    settings = {"target": target, "sources": sources} | {name: getattr(design, name) for name in SETTINGS}
    settings |= {name: value for name, value in options.items() if name != "workers"}  # they change no result
    settings["files"] = digests(_files(systems, options))
    work = Work(out, settings, accept=accept)
    try:
        fill(work, systems, design, options)
        wanted = design.prompts + design.practice
        pairs = [(system, prompt) for prompt in range(design.prompts) for system in range(len(systems))]
        pairs += [(prompt % len(systems), prompt) for prompt in range(design.prompts, wanted)]
        clips = [work.get(system, prompt) for system, prompt in pairs]
        made = work.folder / "study"
        shutil.rmtree(made, ignore_errors=True)
        design, notes = assemble(made, design, clips, target)
        power = simulate(design, studies)
        write_texts(made, design, sources, options, power)
        publish(made, out)
        shutil.rmtree(work.folder)
    except OSError as error:
        raise click.ClickException(
            f"the study could not be written ({error}); finished clips are kept: free disk space, "
            "then give the same command again"
        ) from error
    finally:
        work.close()
    notes += [f"accepted ({ACCEPT}): {'; '.join(changed)}" for changed in work.accepted]
    return notes + [
        f"{each.power:.0%} of {each.studies} simulated studies with {design.listeners} listeners find an effect of "
        f"{each.effect:g} (95% interval {each.power_low:.0%} to {each.power_high:.0%})"
        for each in power
    ]


def build_study(
    *,
    runs: tuple[str, ...],
    more: tuple[str, ...],
    out: Path,
    **given: Any,
) -> None:
    """Make the folder ``out``. Arguments as in the command's help; raises ``UserError`` for mistakes in them."""
    refuse(out)
    systems = [recordings(text) or find_model(text) for text in (*runs, *more)]
    names = [each.name for each in systems]
    if len(set(names)) < len(names):
        twice = max(names, key=names.count)
        raise UserError(f"--runs: two systems are called {twice!r}; rename one, as in {twice}-2=PATH")
    if given["repeats"] > given["prompts"] * len(names) // 2:
        count = given["prompts"] * len(names)
        raise UserError(f"--repeats {given['repeats']}: at most half of the {count} excerpts can be repeated")
    soundfont = checked_soundfont(given["soundfont"])
    options = {
        "prompts": "dataset" if given["corpus"] else "procedural", "corpus": given["corpus"] and str(given["corpus"]),
        "soundfont": str(soundfont), "max_new_tokens": given["tokens"], "temperature": given["temperature"],
        "backend": given["backend"], "workers": given["workers"],
    }  # fmt: skip
    design = Design(
        format=FORMAT, study=secrets.token_hex(8), question=QUESTION, low=LOW, high=HIGH, systems=names,
        **{name: given[name] for name in (*SETTINGS, "lufs", "listeners", "completion_code")},
    )  # fmt: skip
    for line in build(
        out, systems, design, target=given["lufs"], studies=given["power"], options=options,
        accept=given.get("accept_changes", False),
    ):  # fmt: skip
        click.echo(line)
    click.echo(f"{out}: {design.prompts} prompts x {len(names)} systems, {design.rated} trials for each participant")
    serve = shlex.join([sys.executable, "-m", "smart.study", "serve", str(out)])
    click.echo(f"complete {out / CONSENT} and {out / 'preregistration.md'}, then: {serve}")
