"""Check whether this machine can run a configuration, and list how to fix what is missing.

It checks what the given configuration needs, and nothing else. It uses the network only if the configuration names a
model on the Hugging Face hub that is not in the local cache, and even then it downloads nothing.
"""

import math
import os
import platform
import shlex
import shutil
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np

from smart import UserError, __version__, gpu, hub
from smart.config import Config, TrainedReward, completed, dumps, load
from smart.files import is_empty, lacks, placeholders
from smart.render import checked_soundfont, find_soundfont, package_of
from smart.run import check_packages, check_resumable
from smart.system import available_memory

READY, MISSING, NOTE = "ready", "MISSING", "note"
FEWEST_BYTES = 5 << 29  # of memory: the quickstart's processes together take up to 2.2 GiB


class Finding(NamedTuple):
    """One row: a state, what was found, and its remedy: a command or, if there is none, a sentence."""

    state: str
    found: str
    remedy: str = ""


def _python() -> Finding:
    found = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    if not (3, 11) <= sys.version_info[:2] <= (3, 14):
        return Finding(NOTE, f"{found}; expected Python 3.11 to 3.14", "PYTHON=python3.12 sh install.sh")
    if platform.system() != "Linux":
        return Finding(NOTE, f"{found}, which has not been tried; smart is tested on Linux")
    return Finding(READY, found)


def _packages(config: Config | None) -> Finding:
    try:
        check_packages(config.track.also if config else ())
    except UserError as error:
        found, _, remedy = error.message.rpartition(": ")
        return Finding(MISSING, found, remedy)
    try:
        transformers = version("transformers")
    except PackageNotFoundError:  # it may be on the path without having been installed
        transformers = "of unknown version"
    return Finding(READY, f"smart {__version__}, transformers {transformers}, and all other packages that a run needs")


def _study() -> Finding:
    needed = ("pandas", "pyloudnorm", "sqlalchemy", "starlette", "statsmodels", "uvicorn")
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        return Finding(NOTE, f"only listening studies need {', '.join(missing)}", "sh install.sh study")
    return Finding(READY, "listening studies can be served and analysed")


def _consent(folder: Path) -> Finding:
    path = folder / "consent.txt"
    try:
        missing = placeholders(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return Finding(MISSING, f"{path}: cannot be read ({error})", "give the folder of a study, with --study")
    if missing:
        return Finding(NOTE, f"{path} still has placeholders: {', '.join(missing):.200}", "fill them in")
    return Finding(READY, f"{path} has no placeholders")


def _torch(config: Config | None) -> Finding:
    import torch

    if problem := gpu.problem():
        return Finding(NOTE if config is not None and config.run.device == "cpu" else MISSING, *problem)
    found = f"torch {torch.__version__}"
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        return Finding(
            READY, f"{found}, {torch.cuda.device_count()} CUDA device(s): {card.name}, {card.total_memory >> 30} GiB"
        )
    if config is not None and config.run.device == "cuda":
        return Finding(MISSING, f"{found} sees no CUDA GPU, but the configuration asks for one", "--set run.device=cpu")
    if problem := gpu.cpu_build():
        return Finding(NOTE, f"{problem.found}: runs use the CPU", problem.remedy)
    built = "built for CUDA, but this machine has no NVIDIA card" if torch.version.cuda else "CPU build"
    return Finding(READY, f"{found}, {built}: runs use the CPU")


def _cores(config: Config | None) -> Finding:
    from smart.cores import usable_cores

    cores = usable_cores()
    if config is not None and config.render.workers > cores:
        found = f"{cores} usable, fewer than render.workers = {config.render.workers}; workers will compete for them"
        return Finding(NOTE, found, "--set render.workers=0")
    return Finding(READY, f"{cores} usable")


def _memory() -> Finding:
    free = _available_memory()
    if free < FEWEST_BYTES:
        found = f"{free / 2**30:.1f} GiB available, less than the quickstart needs ({FEWEST_BYTES / 2**30:g} GiB)"
        return Finding(NOTE, found, "--set grpo.micro_batch=4 --set render.workers=1")
    return Finding(READY, f"{free / 2**30:.1f} GiB available")


def _available_memory() -> int:
    """Bytes of memory that this process may still use: the machine's, or its control group's if fewer."""
    free = available_memory()
    try:
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text(encoding="ascii").strip()
        if limit != "max":
            free = min(free, int(limit) - int((group / "memory.current").read_text(encoding="ascii")))
    except (OSError, ValueError):  # no control groups of version 2
        pass
    return free


def _disk(config: Config, base: Path | None) -> Finding:
    folder = Path(config.run.folder)
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"x")
    except OSError as error:
        return Finding(MISSING, f"{there} cannot be written ({error.strerror})", "--set run.folder=FOLDER")
    free = shutil.disk_usage(there).free
    weights = (base / "model.safetensors").stat().st_size if base else 0
    kept = config.track.keep_checkpoints or math.ceil(config.grpo.iterations / config.track.checkpoint_every)
    clips = (
        config.track.samples * (config.grpo.iterations // config.track.samples_every) + 2 * config.track.final_listen
    )
    clip = config.render.seconds * config.render.sample_rate * 4  # stereo, 16 bits
    need = int(3 * weights * (kept + 1) + weights + clips * clip)  # AdamW keeps two moments of every weight
    found = f"{free / 2**30:.1f} GiB free at {there}; the run writes about {need / 2**30:.2f} GiB"
    lacking = lacks(there)
    found += "".join(f"; its file system {lack}" for lack in lacking)
    if free < need:
        return Finding(MISSING, found, "--set track.keep_checkpoints=2, or --set run.folder=FOLDER on a larger disk")
    return Finding(NOTE if lacking else READY, found)


def _soundfont(config: Config) -> Finding:
    found = []
    for font in config.render.fonts:
        try:
            path = checked_soundfont(font)
        except UserError as error:
            package = package_of(font)
            return Finding(MISSING, error.message, f"sudo apt-get install {package}" if package else "")
        found.append(f"{path}, {path.stat().st_size / 2**20:.0f} MiB")
    return Finding(READY, "; ".join(found))


def _render(config: Config, soundfont: Finding) -> Finding:
    from smart.render import RenderPool

    if soundfont.state != READY:
        return Finding(NOTE, "not checked, because the soundfont is missing")
    path = find_soundfont(config.render.fonts[0])
    note = np.array([[0.0, 0.5, 60, 100, 0, 0]])  # smart.render.NOTE_COLUMNS: half a second of middle C
    try:
        with RenderPool(path, sample_rate=config.render.sample_rate, seconds=1.0, workers=1) as pool:
            audio = pool.submit(note).result()
    except (UserError, RuntimeError) as error:
        return Finding(MISSING, f"the synthesiser cannot play the soundfont: {error}", "--set render.soundfont=timgm")
    if not abs(audio).max() > 0:
        return Finding(
            NOTE, "the synthesiser loads the soundfont, but middle C is silent", "--set render.soundfont=timgm"
        )
    return Finding(READY, f"a worker process rendered middle C, {audio.shape[1] / config.render.sample_rate:.2f} s")


def _base(config: Config) -> tuple[Finding, Path | None]:
    from smart.model import FILES, find_base, load_base

    name = config.model.base
    if hub.is_hub_id(name) and not Path(name).is_dir() and hub.find_cached(name, FILES) is None:
        return _on_the_hub(name, FILES, "model.base"), None
    try:
        folder = find_base(name)
        model, _ = load_base(folder)
    except UserError as error:
        return Finding(MISSING, error.message, "--set model.base=piano"), None
    return Finding(
        READY, f"{folder}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} million parameters"
    ), folder


def _on_the_hub(name: str, files: tuple[str, ...], key: str) -> Finding:
    """A model that a run would download; this only asks whether it could."""
    download = f"{Path(sys.executable).parent / 'hf'} download {shlex.quote(name)}"
    try:
        hub.ask(name, files)
    except UserError as error:
        elsewhere = f"on a machine with access: {download} --local-dir FOLDER; copy FOLDER here; --set {key}=FOLDER"
        return Finding(MISSING, f"{name} is not in the cache, and {error.message}", elsewhere)
    return Finding(NOTE, f"{name} is not in the cache yet; the first run downloads it", download)


def _rewards(config: Config) -> Finding:
    found = [_reward(one) for one in config.all_rewards]
    missing = [one for one in found if one.state == MISSING]
    noted = [one for one in found if one.state == NOTE]
    worst = (missing or noted or found)[0]
    return worst if missing else worst._replace(found="; ".join(one.found for one in found))


def _reward(wanted: TrainedReward) -> Finding:
    from smart.reward import audiobox, load_reward

    if wanted.kind == "audiobox":
        model = str(wanted.options.get("model", audiobox.HUB_ID))
        here = Path(os.path.expanduser(model)).exists() or not hub.is_hub_id(model)
        files = (audiobox.CONFIG_FILE, audiobox.WEIGHTS_FILE)
        if not here and hub.find_cached(model, files) is None:
            return _on_the_hub(model, files, "reward.options.model")
        try:
            audiobox.check(model)
        except UserError as error:
            return Finding(MISSING, error.message, f"hf download {audiobox.HUB_ID}")
        return Finding(READY, f"audiobox with the weights of {model}")
    try:
        reward = load_reward(wanted.kind, weights=wanted.weights or None, **wanted.options)
    except UserError as error:
        return Finding(MISSING, error.message, "--set reward.kind=ce_proxy")
    return Finding(
        NOTE if reward.is_stand_in else READY,
        reward.provenance + (" (an approximation)" if reward.is_stand_in else ""),
    )


def _prompts(config: Config) -> Finding:
    from smart.corpus import Corpus

    if config.prompts.kind != "dataset":
        return Finding(READY, f"{config.prompts.kind}: needs no corpus")
    try:
        if not config.prompts.corpus:
            raise UserError("prompts.kind is dataset, but prompts.corpus is empty")
        pieces = Corpus(Path(config.prompts.corpus)).split(config.prompts.split)
    except UserError as error:
        return Finding(MISSING, error.message, "smart corpus build --midi FOLDER --out CORPUS")
    return Finding(READY, f"{len(pieces):,} pieces in {config.prompts.corpus}, split {config.prompts.split}")


def _run(config: Config) -> Finding:
    folder = Path(config.run.folder).expanduser() / config.run.name
    other = f"--set {shlex.quote(f'run.name={config.run.name}-2')}"
    if not folder.exists() or (folder.is_dir() and is_empty(folder)):
        return Finding(READY, f"{folder} will be created")
    try:
        check_resumable(folder, dumps(config), complete=completed)
    except UserError as error:  # the command below would be refused
        return Finding(MISSING, error.message, other)
    return Finding(NOTE, f"{folder} exists; --resume continues it", other)


def examine(path: str, overrides: tuple[str, ...], study: Path | None = None) -> dict[str, Finding]:
    """The finding of each check, in the order of the table; ``study`` (None: each in the current folder) is a study."""
    config: Config | None = None
    try:
        config = load(path, overrides)
        findings = {"configuration": Finding(READY, path)}
    except UserError as error:
        findings = {"configuration": Finding(MISSING, error.message, "correct that setting")}
    findings |= {
        "python": _python(),
        "packages": _packages(config),
        "torch": _torch(config),
        "cores": _cores(config),
        "memory": _memory(),
    }
    if config is not None:
        findings["base"], base = _base(config)
        findings["prompts"] = _prompts(config)
        findings["soundfont"] = _soundfont(config)
        findings["synthesiser"] = _render(config, findings["soundfont"])
        findings["reward"] = _rewards(config)
        findings["disk"] = _disk(config, base)
        findings["run"] = _run(config)
    findings["study"] = _study()
    designs = [*Path().glob("study.json"), *sorted(Path().glob("*/study.json"))]
    here = [path.parent for path in designs if (path.parent / "consent.txt").is_file()]
    for folder in [study] if study is not None else here:
        findings[f"consent of {folder.resolve().name}"] = _consent(folder)
    return findings
