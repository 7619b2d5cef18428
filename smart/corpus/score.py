"""From the bytes of a MIDI file to a score: ``read_score``, the one way in which every program reads one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from smart import UserError
from smart.corpus.events import end_hanging_notes, read_file, without_sysex
from smart.corpus.midi import Limits, Reject, check_structure, read_bytes

if TYPE_CHECKING:  # imported where it is used: a command line needs no parser
    from symusic.core import ScoreTick

LONGEST_SECONDS = 86_400  # the renderer takes no later onset and no longer note
HANGING = "notes without an end"


class ReadScore(NamedTuple):
    """A score; ``tail``: the ticks from a track's last note or controller to its end, the most of all tracks."""

    score: ScoreTick
    tail: int
    data: bytes  # the file as it was parsed: notes without an end have one, and SysEx in packets is left out
    hanging: int  # notes whose end the file does not say: see ``smart.corpus.events.end_hanging_notes``

    def remarks(self) -> list[str]:
        """What was read otherwise than the file has it."""
        return [f"{HANGING}: {self.hanging}"] if self.hanging else []


def read_score(data: bytes, limits: Limits) -> ReadScore:
    """The score in the bytes of a MIDI file. Raises ``Reject`` with the reason if there is none."""
    structure = check_structure(data, limits)  # the parser would accept a truncated file as a short one
    if structure.has_packets:
        data = without_sysex(read_file(data)).dumps()
    score = _parse(data)
    notes = sum(len(track.notes) for track in score.tracks)
    if max(notes, structure.note_ons) > limits.max_notes:  # before any work that grows with their number
        raise Reject("too many notes", f"{max(notes, structure.note_ons)}, expected at most {limits.max_notes}")
    hanging = 0
    if structure.note_ons > notes:  # the parser drops notes that never end
        ended, hanging = end_hanging_notes(read_file(data))
        data = ended.dumps()
        score = _parse(data)
    return ReadScore(score, structure.tail, data, hanging)


def played(found: ReadScore) -> ScoreTick:
    """The score as it sounds: notes that end under the pressed pedal last to its release."""
    from smart.corpus.pedal import sustain

    return sustain(found.score, found.data)


def _parse(data: bytes) -> ScoreTick:
    from symusic.core import ScoreTick

    try:
        return ScoreTick.from_midi(data)
    except (RuntimeError, ValueError, OverflowError) as error:
        raise Reject("cannot be parsed", str(error).splitlines()[0][:200]) from None


def check_length(score: ScoreTick, limits: Limits) -> None:
    """Raise ``Reject`` if any track, heard or not, has a note that is too late or too long to be played."""
    division = score.ticks_per_quarter
    for track in score.tracks:
        notes = track.notes.numpy()
        if len(notes["time"]) and (quarters := int(notes["time"].max()) / division) > limits.max_quarters:
            raise Reject("too long", f"{quarters:.0f} quarter notes, expected at most {limits.max_quarters}")
    seconds = float(score.to("second").end()) if score.note_num() else 0.0  # type: ignore[attr-defined]
    if not seconds <= LONGEST_SECONDS:
        raise Reject("too long", f"its notes last {seconds:.0f} s, expected at most {LONGEST_SECONDS} s")


def open_score(path: Path, *, pedal: bool = True) -> tuple[ScoreTick, list[str]]:
    """The score of a MIDI file as it will be heard, and what to tell the user about it, a phrase each.

    With ``pedal``, notes that end under the pressed pedal are lengthened to its release.

    Raises ``UserError`` if the file is missing, too large, damaged, no MIDI file or longer than a day.
    """
    limits = Limits()
    try:
        found = read_score(read_bytes(path, limits), limits)
        check_length(found.score, limits)
    except OSError as error:
        raise UserError(f"MIDI file {path}: cannot be read ({error.strerror})") from error
    except Reject as reject:
        raise UserError(f"MIDI file {path}: {': '.join(filter(None, reject.args))}") from reject
    said = []
    if not found.score.note_num():
        said.append("it has no notes, so that it is silent")
    if found.hanging:
        said.append(
            f"{found.hanging} {'note is' if found.hanging == 1 else 'notes are'} never released; "
            "such a note ends with the next release of its key, or with its track"
        )
    if unheard := unheard_messages(found.score):
        heard = "notes, the pedal, velocities" if pedal else "notes, velocities"
        said.append(f"{', '.join(unheard)} cannot be heard: only {heard}, programs and tempos are played")
    return played(found) if pedal else found.score, said


# what a message changes that is not played, and the value at which it changes nothing; the pedal (CC64) lengthens notes
_CONTROLLERS = {
    0: ("bank select (CC0)", 0),
    1: ("modulation (CC1)", 0),
    5: ("portamento time (CC5)", 0),
    7: ("volume (CC7)", 100),
    8: ("balance (CC8)", 64),
    10: ("pan (CC10)", 64),
    11: ("expression (CC11)", 127),
    65: ("portamento (CC65)", 0),
    66: ("sostenuto pedal (CC66)", 0),
    67: ("soft pedal (CC67)", 0),
}


def unheard_messages(score: ScoreTick) -> list[str]:
    """The controllers and pitch bends of tracks with notes that would change the sound, but are not played."""
    found: dict[str, None] = {}
    for track in score.tracks:
        if not len(track.notes):
            continue
        controls = track.controls.numpy()
        for number, (name, neutral) in _CONTROLLERS.items():
            if (controls["value"][controls["number"] == number] != neutral).any():
                found[name] = None
        if track.pitch_bends.numpy()["value"].any():
            found["pitch bends"] = None
    return [*found]
