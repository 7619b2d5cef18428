"""The files in a study's folder.

``study.json`` (the design), ``consent.txt``, ``audio/`` (excerpts under anonymous names), ``check.wav``,
``manifest.csv`` and ``manifest.json`` (what a page may know), ``key.csv`` (what made which excerpt: never served),
``preregistration.md``; the server adds ``ratings.sqlite``.
"""

import csv
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import NamedTuple

from smart import UserError
from smart.files import parse_json, placeholders, sha256
from smart.study.order import Trial, order, with_checks

DESIGN, KEY, CONSENT, CHECK, AUDIO = "study.json", "key.csv", "consent.txt", "check.wav", "audio"
FORMAT = 1
# what made an excerpt, how loudness matching changed it, and the hash of its file
KEY_COLUMNS = [
    "excerpt", "kind", "system", "prompt", "seed", "silent", "limited", "lufs_before", "peak_before", "gain_db",
    "lufs_after", "peak_after", "seconds_of_audio", "sha256",
]  # fmt: skip


@dataclass(frozen=True)
class Design:
    """``study.json``. ``question``, ``low`` and ``high`` may be edited until the first participant begins."""

    format: int
    study: str  # a random id; all orders follow from it, so it is a secret
    question: str
    low: str  # what 1 means, and what 10 means
    high: str
    systems: list[str]
    prompts: int
    practice: int
    repeats: int
    silence: bool
    seconds: float
    sample_rate: int
    lufs: float  # of every excerpt that is not silent
    seed: int  # of the music
    listeners: int  # planned
    completion_code: bool

    @property
    def rated(self) -> int:
        """Rated trials per participant, without practice."""
        return self.prompts * len(self.systems) + self.repeats + self.silence


class Excerpt(NamedTuple):
    """A row of ``key.csv``. ``kind``: "main", "practice" or "silence", for which the last three are empty."""

    name: str
    kind: str
    system: str
    prompt: str
    seed: str


class Study:
    """A study's folder, checked. Raises ``UserError`` that names what is missing or has changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.design = read_design(folder)
        self.excerpts: dict[str, Excerpt] = {}
        self.placeholders: list[str] = []  # of the draft of the consent text that are still to be filled in
        try:
            with open(folder / KEY, encoding="utf-8-sig", newline="") as file:
                for row in csv.DictReader(file, restval=""):
                    name = row["excerpt"]
                    if not name.isalnum():  # which also keeps it inside the folder
                        raise ValueError(f"{name!r} is not the name of an excerpt")
                    self.excerpts[name] = Excerpt(name, row["kind"], row["system"], row["prompt"], row["seed"])
                    if sha256(self.audio(name)) != row["sha256"]:
                        raise UserError(f"{self.audio(name)} differs from the built file; build the study again")
        except (OSError, KeyError, ValueError, AttributeError, csv.Error) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"study {folder}: {KEY} or an excerpt cannot be read ({error})") from None
        design = self.design
        main = design.prompts * len(design.systems)
        expected = {"main": main, "practice": design.practice, "silence": int(design.silence)}
        kinds = Counter(each.kind for each in self.excerpts.values())
        if dict(kinds) != {kind: count for kind, count in expected.items() if count}:
            wanted = ", ".join(f"{count} {kind}" for kind, count in expected.items())
            raise UserError(f"study {folder}: {KEY} does not list what {DESIGN} says: {wanted}")
        if set(self._names) != set(product(design.systems, map(str, range(design.prompts)))):
            raise UserError(f"study {folder}: {KEY} does not list every prompt of every system")
        self.consent  # noqa: B018  # read now, so that a mistake is found before the first participant arrives

    def audio(self, excerpt: str) -> Path:
        return self.folder / AUDIO / f"{excerpt}.wav"

    def trials(self, slot: int) -> list[Trial]:
        """The trials of participant number ``slot``: practice first, then everything that is rated."""
        design = self.design
        secret = int(design.study, 16)
        practice = sorted(name for name, each in self.excerpts.items() if each.kind == "practice")
        silence = next((name for name, each in self.excerpts.items() if each.kind == "silence"), None)
        heard = [
            self._names[design.systems[system], str(prompt)]
            for prompt, system in order(design.prompts, len(design.systems), slot, secret)
        ]
        rated = with_checks(heard, design.repeats, silence, slot, secret)
        return [*(Trial(name, "practice") for name in practice), *rated]

    @cached_property
    def _names(self) -> dict[tuple[str, str], str]:
        return {(each.system, each.prompt): name for name, each in self.excerpts.items() if each.kind == "main"}

    @cached_property
    def consent(self) -> tuple[str, list[str]]:
        """The version of the consent text (as stated in it, with a hash of the text), and its paragraphs."""
        path = self.folder / CONSENT
        try:
            text = path.read_text(encoding="utf-8-sig").strip()
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read ({error})") from None
        first, _, rest = text.partition("\n")
        if not first.lower().startswith("version:") or not rest.strip():
            raise UserError(f"{path}: expected a first line 'Version: NAME', then the text")
        self.placeholders = placeholders(rest)
        version = f"{first.partition(':')[2].strip()} ({hashlib.sha256(text.encode()).hexdigest()[:8]})"
        return version, [" ".join(part.split()) for part in rest.split("\n\n") if part.strip()]


def read_design(folder: Path) -> Design:
    """``study.json``; raises ``UserError`` if it is not valid."""
    path = folder / DESIGN
    if not path.is_file():
        raise UserError(f"study {folder}: has no {DESIGN}; build a study with smart study build")
    try:
        values = parse_json(path.read_text(encoding="utf-8-sig"))
        design = Design(**values)
        json.dumps(values, ensure_ascii=False).encode()  # a lone surrogate is valid JSON, but not valid text
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    for each in fields(Design):
        value = getattr(design, each.name)
        expected = (int, float) if each.type is float else each.type if isinstance(each.type, type) else list
        if not isinstance(value, expected) or (isinstance(value, bool) and each.type is not bool):
            raise UserError(
                f"{path}: {each.name} = {value!r} is not of type {getattr(each.type, '__name__', each.type)}"
            )
    if design.format != FORMAT:
        raise UserError(
            f"{path}: format {design.format} is not known (expected {FORMAT}); use the version of smart that built it"
        )
    excerpts = design.prompts * len(design.systems)
    checks = {  # of the values that ``smart study build`` writes
        "study": re.fullmatch(r"[0-9a-f]{1,64}", design.study),
        "systems": design.systems
        and all(isinstance(name, str) for name in design.systems)
        and len(set(design.systems)) == len(design.systems),
        "prompts": design.prompts >= 1,
        "practice": 0 <= design.practice <= 1000,
        "repeats": 0 <= design.repeats <= excerpts // 2,
        "seconds": 0.1 <= design.seconds <= 600,
    }
    for name, passed in checks.items():
        if not passed:
            raise UserError(f"{path}: {name} = {getattr(design, name)!r:.60} is not what smart study build writes")
    return design


def write_design(folder: Path, design: Design) -> None:
    (folder / DESIGN).write_text(json.dumps(asdict(design), indent=1) + "\n", encoding="utf-8")


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(columns)
        table.writerows(rows)
