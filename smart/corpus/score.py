"""Read one MIDI file for listening to it: only what would make reading dangerous or wrong is refused."""

import stat
from pathlib import Path
from typing import TYPE_CHECKING

from smart import UserError
from smart.corpus.midi import Limits, Reject, check_structure

if TYPE_CHECKING:
    from symusic.core import ScoreTick


def read_score(path: Path) -> "ScoreTick":
    """Read a MIDI file. Raises ``UserError`` if it is missing, too large, damaged or not a MIDI file."""
    from symusic.core import ScoreTick

    limits = Limits()
    try:
        if not stat.S_ISREG(mode := path.stat().st_mode) and not stat.S_ISDIR(mode):
            raise Reject("not a regular file")  # opening a pipe would wait for a writer
        with path.open("rb") as file:
            data = file.read(limits.max_bytes + 1)
        if len(data) > limits.max_bytes:
            raise Reject("too large", f"over {limits.max_bytes} bytes")
        check_structure(data, limits)  # the parser would accept a truncated file as a short one
        score = ScoreTick.from_midi(data)
        if (notes := sum(len(track.notes) for track in score.tracks)) > limits.max_notes:
            raise Reject("too many notes", f"{notes}, expected at most {limits.max_notes}")
        return score
    except OSError as error:
        raise UserError(f"MIDI file {path}: cannot be read ({error.strerror})") from error
    except Reject as reject:
        raise UserError(f"MIDI file {path}: {': '.join(filter(None, reject.args))}") from reject
    except (RuntimeError, ValueError, OverflowError) as error:  # the parser's own errors
        raise UserError(f"MIDI file {path}: cannot be parsed ({str(error).splitlines()[0][:200]})") from error
