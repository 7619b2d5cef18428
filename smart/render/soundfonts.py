"""Find soundfonts, and check a file before a synthesiser sees it."""

import importlib.util
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from smart import Failure, UserError


class _Known(NamedTuple):
    """A soundfont with a short name: where to get it, and the file names under which people keep it."""

    title: str
    url: str
    file: str  # the name to save it under
    stems: tuple[str, ...]  # lower case, letters and digits only; the first found wins
    debian: str = ""  # the package that installs it


# Table 3 of the paper, and the small General MIDI soundfont that pretty_midi carries
_MUSESCORE_URL = "https://musescore.org/en/handbook/3/soundfonts-and-sfz-files"
_KNOWN = {
    "timgm": _Known(
        "TimGM6mb",
        "https://github.com/craffel/pretty-midi",
        "TimGM6mb.sf2",
        ("timgm6mb",),
        "timgm6mb-soundfont",
    ),
    "musescore": _Known(
        "MuseScore General",
        _MUSESCORE_URL,
        "MuseScore_General.sf2",
        ("musescoregeneral", "musescoregeneralfull"),
        "musescore-general-soundfont",
    ),
    "fluidr3": _Known("FluidR3 GM", _MUSESCORE_URL, "FluidR3_GM.sf2", ("fluidr3gm", "fluidr3"), "fluid-soundfont-gm"),
    "grandeur": _Known(
        "The Grandeur D",
        "https://musical-artifacts.com/artifacts/2992",
        "The Grandeur D.sf2",
        ("thegrandeurd",),
    ),
    "sgm": _Known(
        "SGM-V2.01-XG-2.04",
        "https://archive.org/details/SGM-V2.01",
        "SGM-V2.01-XG-2.04.sf2",
        ("sgmv201xg204", "sgmv201"),
    ),
    "yamaha": _Known(
        "Yamaha-C5-Salamander-JNv5_1",
        "https://sites.google.com/site/soundfonts4u/",
        "Yamaha-C5-Salamander-JNv5_1.sf2",
        ("yamahac5salamanderjnv51",),
    ),
}
_SUFFIXES = (".sf2", ".sf3")
_OWN_FOLDER = "~/.local/share/soundfonts"


def find_soundfont(name_or_path: str | os.PathLike[str]) -> Path:
    """The file of a soundfont, given by its path or by a short name.

    Short names: ``timgm`` (it comes with pretty_midi) and those of the paper's Table 3: ``musescore``, ``fluidr3``,
    ``grandeur``, ``sgm``, ``yamaha``. Their files are looked for, under the names by which they are published, in the
    folders of the environment variable SMART_SOUNDFONTS (separated by ``:``), ~/.local/share/soundfonts,
    /usr/share/sounds/sf2, /usr/share/sounds/sf3 and /usr/share/soundfonts. A file whose path is the short name itself
    takes precedence.

    Raises ``UserError`` for a short name whose soundfont is not found (the message says where to get it), and for a
    word that is neither a file nor a short name. A path is returned unchecked: see ``check_soundfont``.
    """
    text = os.fspath(name_or_path)
    path = Path(os.path.expanduser(text))  # unlike pathlib's, it keeps a ~user who does not exist
    known = _KNOWN.get(text.lower())
    if path.is_file() or (known is None and (path.suffix or os.sep in text)):
        return path
    if known is None:
        raise UserError(
            f"soundfont {text!r} is neither a file nor a short name: {_WHAT_TO_GIVE}, or one of the names "
            + ", ".join(_KNOWN)
        )
    found = _search(known)
    if found is None:
        raise UserError(_how_to_get(text.lower(), known))
    return found


def package_of(name: str) -> str:
    """The Debian package that installs the soundfont of a short name; empty if there is none."""
    known = _KNOWN.get(name.lower())
    return known.debian if known else ""


def short_name(path: str | os.PathLike[str]) -> str | None:
    """The short name of a soundfont, by the name of its file; None if it has none."""
    stem = _plain(Path(path).stem)
    return next((name for name, known in _KNOWN.items() if stem in known.stems), None)


def available_soundfonts() -> dict[str, Path]:
    """The soundfonts with a short name that are on this machine: short name -> file."""
    return {name: path for name, known in _KNOWN.items() if (path := _search(known)) is not None}


def _folders() -> list[Path]:
    """The folders that are searched for soundfonts, in order."""
    own = [folder for folder in os.environ.get("SMART_SOUNDFONTS", "").split(os.pathsep) if folder]
    usual = [_OWN_FOLDER, "/usr/share/sounds/sf2", "/usr/share/sounds/sf3", "/usr/share/soundfonts"]
    return [Path(os.path.expanduser(folder)) for folder in (*own, *usual)]


def _search(known: _Known) -> Path | None:
    folders = _folders()
    if known is _KNOWN["timgm"]:
        spec = importlib.util.find_spec("pretty_midi")  # finds its folder without importing it
        if spec is not None and spec.submodule_search_locations:
            folders[:0] = map(Path, spec.submodule_search_locations)
    for folder in folders:
        try:
            files = sorted(file for file in folder.iterdir() if file.suffix.lower() in _SUFFIXES)
        except OSError:  # most of these folders do not exist on most machines
            continue
        by_stem = {(_plain(file.stem), file.suffix.lower()): file for file in files if file.is_file()}
        for suffix in _SUFFIXES:  # sf2 first: it loads in a tenth of the time and takes less memory
            for stem in known.stems:
                if (stem, suffix) in by_stem:
                    return by_stem[stem, suffix]
    return None


def _plain(text: str) -> str:
    return "".join(letter for letter in text.lower() if letter.isalnum())


def _how_to_get(name: str, known: _Known) -> str:
    if name == "timgm":
        how = "it comes with the package pretty_midi (pip install pretty_midi)"
    else:
        how = (
            f"download it from {known.url} and put it as {known.file!r} into {_OWN_FOLDER} "
            "(or into a folder that SMART_SOUNDFONTS names), or give its path"
        )
    package = f"; Debian and Ubuntu have it as the package {known.debian}" if known.debian else ""
    return f"soundfont {name!r} ({known.title}) is not on this machine: {how}{package}"


# every chunk that the synthesiser requires, and the size of its records
_RECORDS = {
    b"phdr": 38, b"pbag": 4, b"pmod": 10, b"pgen": 4, b"inst": 22, b"ibag": 4, b"imod": 10, b"igen": 4,
    b"shdr": 46,
}  # fmt: skip


_WHAT_TO_GIVE = "give the path of an sf2 or sf3 file"


def checked_soundfont(name_or_path: str | os.PathLike[str]) -> Path:
    """``find_soundfont``, then ``check_soundfont``: raises ``UserError`` if it is missing or damaged."""
    path = find_soundfont(name_or_path)
    check_soundfont(path)
    return path


def check_soundfont(path: str | os.PathLike[str]) -> None:
    """Raise ``UserError``, in one line, if ``path`` is missing, a folder, empty, cut short or not a soundfont.

    This reads only the headers of the chunks, so it is fast for a file of any size. A damaged file can still pass; if
    it crashes the synthesiser, that happens in a worker of ``RenderPool``, which then does not start.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if path.is_dir():
            raise UserError(f"soundfont {path} is a folder: {_WHAT_TO_GIVE}")
        if not path.is_file():
            raise UserError(f"soundfont {path} is not a regular file: {_WHAT_TO_GIVE}")
        with path.open("rb") as file:
            problem = _find_problem(file, size)
    except FileNotFoundError:
        raise UserError(f"soundfont {path} does not exist: {_WHAT_TO_GIVE}") from None
    except UserError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise UserError(f"soundfont {path} cannot be read: {error}") from None
    if problem:
        raise UserError(f"soundfont {path} {problem}: download it again, or choose another")


def _find_problem(file: BinaryIO, size: int) -> str | None:
    """What is wrong with the chunks of a soundfont file of ``size`` bytes, or None."""
    if size == 0:
        return "is empty"
    head = file.read(12)
    if len(head) < 12 or head[:4] != b"RIFF" or head[8:] != b"sfbk":
        return "is not a soundfont (no RIFF header of type sfbk; an archive must be unpacked first)"
    declared = 8 + struct.unpack_from("<I", head, 4)[0]
    if declared > size:
        return f"is cut short: {size:,} bytes, but its header says {declared:,}"
    chunks = {name: length for name, (_, length) in find_chunks(file).items()}
    if max(chunks.get(b"smpl", 0), chunks.get(b"smpo", 0)) < 2:
        return "holds no samples"
    for name, record in _RECORDS.items():
        if name not in chunks or chunks[name] % record:
            return f"is damaged: its chunk {name.decode()} is missing or of the wrong size"
    for name, what in ((b"phdr", "presets"), (b"inst", "instruments"), (b"shdr", "samples")):
        if chunks[name] < 2 * _RECORDS[name]:  # the last record only marks the end
            return f"holds no {what}"
    return None


def find_chunks(file: BinaryIO) -> dict[bytes, tuple[int, int]]:
    """name -> (first byte, length) of the chunks of samples and tables in a file with a valid header."""
    file.seek(4)
    declared = 8 + struct.unpack("<I", file.read(4))[0]
    chunks: dict[bytes, tuple[int, int]] = {}
    for kind, start, length in _chunks(file, 12, declared):
        if kind != b"LIST" or length < 4:
            continue
        file.seek(start)
        if file.read(4) in (b"sdta", b"pdta"):
            chunks |= {name: (first, many) for name, first, many in _chunks(file, start + 4, start + length)}
    return chunks


def _chunks(file: BinaryIO, start: int, stop: int) -> Iterator[tuple[bytes, int, int]]:
    """(name, first byte, length) of the chunks between two offsets, up to the first that does not fit.

    Like the synthesiser, this assumes no padding after chunks of odd length.
    """
    while start + 8 <= stop:
        file.seek(start)
        name, length = struct.unpack("<4sI", file.read(8))
        start += 8
        if start + length > stop:
            return
        yield name, start, length
        start += length


def file_state(path: Path) -> tuple[int, int] | None:
    """The size and modification time of a file, which show whether it has changed; None if it does not exist."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def check_unchanged(soundfont: Path, state: tuple[int, int] | None) -> None:
    """Raise ``Failure`` if the file no longer has ``state``: later clips would be rendered with another soundfont."""
    if file_state(soundfont) != state:
        raise Failure(f"soundfont {soundfont} was changed while it was in use")
