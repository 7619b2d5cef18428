"""Draw a pair of pieces of a run, by its base and its tuned model for the same prompt, as piano rolls.

python examples/piano_rolls.py runs/quickstart rolls.png       the first pair
python examples/piano_rolls.py runs/quickstart rolls.png 3     another one
"""

import sys
from pathlib import Path

from symusic import Score

from smart.plots import piano_rolls

if len(sys.argv) < 3:
    sys.exit(__doc__)
run, picture, *number = sys.argv[1:]
pair = {name: Path(run, "final", f"{int(number[0] if number else 0):02d}-{name}.mid") for name in ("base", "tuned")}
piano_rolls({name: Score.from_midi(path.read_bytes()) for name, path in pair.items()}, Path(picture))
