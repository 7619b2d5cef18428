"""Atomic checkpoints and exact resume.

A checkpoint is a folder ``<root>/<step, 8 digits>/``. Its files are written to a hidden folder next to it, listed with
their SHA-256 in ``manifest.json`` and flushed to the disk; then the folder is renamed. A crash at any time leaves the
previous checkpoint as it was. Only safetensors and JSON are read back.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click
from safetensors import SafetensorError

from smart import UserError
from smart.files import copy_mode, link, parse_json, sha256, sync, temporary_name

if TYPE_CHECKING:
    import torch

MANIFEST = "manifest.json"
STATE = "state.safetensors"
BEST = "best"


def save(root: Path, step: int, write: Callable[[Path], None], *, keep: int = 0, best: int | None = None) -> Path:
    """Save what ``write(folder)`` writes as checkpoint ``step``, then delete all but the ``keep`` newest (0: keep all).

    Checkpoints after ``step`` are damaged, or the run would have continued from them: they are not counted, and stay.
    The checkpoint of step ``best`` is never deleted, and the link ``<root>/best`` points to it (None: no link; a file
    system without links has none either). Returns the checkpoint's folder. Raises ``OSError`` or ``SafetensorError`` if
    it cannot be written (disk full, read-only, quota); existing checkpoints stay as they are.
    """
    root.mkdir(parents=True, exist_ok=True)
    _sweep(root)
    final = root / f"{step:08d}"
    temporary = temporary_name(final)
    temporary.mkdir()
    try:
        write(temporary)
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        sums = {str(path.relative_to(temporary)): sha256(path) for path in files}
        (temporary / MANIFEST).write_text(json.dumps({"step": step, "sha256": sums}, indent=1), encoding="utf-8")
        for path in files:
            copy_mode(path, temporary / MANIFEST)
        for path in [*files, temporary / MANIFEST, temporary]:
            sync(path)
        if final.exists():  # from before the run was resumed from an older checkpoint
            shutil.rmtree(final)
        os.replace(temporary, final)
        sync(root)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    tidy(root, step, keep=keep, best=best)
    return final


def tidy(root: Path, step: int, *, keep: int = 0, best: int | None = None) -> None:
    """Update the link and delete old checkpoints, as in ``save``; also called in case a process was killed before."""
    _sweep(root)
    if best is not None and os.path.realpath(root / BEST) != os.path.realpath(root / f"{best:08d}"):
        link(root / BEST, f"{best:08d}")
    if keep:
        for old in [old for old in steps(root) if old <= step][:-keep]:
            if old != best:
                shutil.rmtree(root / f"{old:08d}", ignore_errors=True)


def _sweep(root: Path) -> None:
    """Delete what a killed process left half written."""
    for leftover in root.glob(".*.tmp"):
        if leftover.is_symlink():
            leftover.unlink()
        shutil.rmtree(leftover, ignore_errors=True)
    (root / f".{BEST}.link").unlink(missing_ok=True)


def steps(root: Path) -> list[int]:
    """Steps that have a checkpoint folder, oldest first; only ``verify`` shows whether they are intact."""
    return sorted(int(path.name) for path in root.glob("[0-9]" * 8) if path.is_dir())


def verify(folder: Path) -> None:
    """Raise ``UserError`` with the first file of a checkpoint that is missing or differs from what was written."""
    try:
        sums = parse_json((folder / MANIFEST).read_text(encoding="utf-8"))["sha256"]
        names = {str(name): str(digest) for name, digest in sums.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"checkpoint {folder}: {MANIFEST} cannot be read ({type(error).__name__})") from None
    for name, digest in names.items():
        path = folder / name
        try:
            if not path.resolve().is_relative_to(folder.resolve()):
                raise UserError(f"checkpoint {folder}: {MANIFEST} names {name!r}, outside the folder")
            if not path.is_file():
                raise UserError(f"checkpoint {folder}: {name} is missing")
            found = sha256(path)
        except UserError:
            raise
        except OSError as error:  # a disk that cannot be read, a name that is too long
            raise UserError(f"checkpoint {folder}: {name} cannot be read ({error.strerror})") from None
        except (ValueError, RuntimeError):  # a null byte, half of a surrogate pair, or a link to itself
            raise UserError(f"checkpoint {folder}: {MANIFEST} names {name!r}, which cannot be a file name") from None
        if found != digest:
            raise UserError(f"checkpoint {folder}: {name} is damaged (its SHA-256 is not the recorded one)")


def latest(root: Path) -> Path | None:
    """The newest checkpoint that is intact, or None if there is none yet.

    Damaged ones are skipped, with a warning on stderr. Raises ``UserError`` if all are damaged.
    """
    damaged: list[str] = []
    for step in reversed(steps(root)):
        folder = root / f"{step:08d}"
        try:
            verify(folder)
        except UserError as error:
            if error.exit_code == 1:  # too many open files, say: it may be intact
                raise
            damaged.append(error.message)
            click.echo(f"Warning: {error.message}; trying the one before it", err=True)
            continue
        return folder
    if damaged:
        raise UserError(f"no checkpoint in {root} can be used: {'; '.join(damaged)}; start over with --overwrite")
    return None


def write_state(
    folder: Path, model: torch.nn.Module, *optimizers: torch.optim.Optimizer, **generators: torch.Generator
) -> None:
    """Write the optimisers' states (by parameter name) and the states of ``generators`` into a checkpoint."""
    from safetensors.torch import save_file  # it imports torch, which is not needed to find a checkpoint

    tensors = {f"rng.{name}": generator.get_state() for name, generator in generators.items()}
    for name, parameter in model.named_parameters():
        for optimizer in optimizers:
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{key}.{name}"] = value.detach().cpu().contiguous()
    save_file(tensors, folder / STATE)


def read_state(
    folder: Path, model: torch.nn.Module, *optimizers: torch.optim.Optimizer, **generators: torch.Generator
) -> None:
    """Restore what ``write_state`` wrote. Raises ``UserError`` if it cannot be read or does not fit the model."""
    import torch

    tensors = read_tensors(folder / STATE)
    names = {parameter: name for name, parameter in model.named_parameters()}
    try:
        for name, generator in generators.items():
            generator.set_state(tensors[f"rng.{name}"])
        for optimizer in optimizers:
            muon = isinstance(optimizer, torch.optim.Muon)
            # AdamW keeps its step counter on the CPU unless it is fused
            fused = bool(optimizer.param_groups[0].get("fused"))
            for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
                name, state = names[parameter], optimizer.state[parameter]
                for key in ("momentum_buffer",) if muon else ("step", "exp_avg", "exp_avg_sq"):
                    value = tensors[f"optimizer.{key}.{name}"]
                    if key != "step" and value.shape != parameter.shape:
                        raise RuntimeError(f"optimizer.{key}.{name} is {tuple(value.shape)}")
                    state[key] = value.to(parameter.device) if key != "step" or fused else value
    except (KeyError, RuntimeError) as error:
        raise UserError(f"checkpoint {folder}: {STATE} does not fit this run ({error})") from None


def weights_digest(model: torch.nn.Module) -> str:
    """The SHA-256 of a model's parameters, by name."""
    import torch

    found = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        found.update(f"{name}\0{parameter.dtype}\0{tuple(parameter.shape)}\0".encode())
        found.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def read_tensors(path: Path) -> Mapping[str, torch.Tensor]:
    """All tensors of a safetensors file, by name. Raises ``UserError`` if it cannot be read."""
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read as safetensors ({error})") from None
