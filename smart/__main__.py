"""``smart PROGRAM ...`` is ``python -m smart.PROGRAM ...``; a program is imported only when it is asked for."""

import click

from smart import LazyGroup

PROGRAMS = {
    "grpo": "Tune a base model by how its music sounds.",
    "pretrain": "Train a base model on a tokenised corpus.",
    "generate": "Write music with a base or a tuned run.",
    "evaluate": "Sample, rate and compare; reports with the paper's figures.",
    "corpus": "Turn a folder of MIDI files into a tokenised corpus.",
    "demo": "Make a page to listen to: pairs from two models.",
    "study": "Run a listening study: build it, serve it, export and analyse its ratings.",
    "doctor": "Say whether this machine is ready for a run.",
    "reproduce": "Every experiment, table and figure of the paper, on one page.",
    "calibrate": "Fit the ce_proxy reward to clips that were rated.",
}
MODULES = {
    "corpus": "smart.corpus.command",
    "reproduce": "smart.reproduce.command",
    "calibrate": "smart.reward.calibrate",
}


@click.group(cls=LazyGroup, programs=PROGRAMS, package="smart", modules=MODULES)
@click.version_option(package_name="smart")
def main() -> None:
    """Tune symbolic music models with reinforcement learning from audio."""


if __name__ == "__main__":
    main(prog_name="smart")
