"""``smart PROGRAM ...`` runs ``python -m smart.PROGRAM ...``; each program is imported only when it is called."""

import click

from smart import LazyGroup, __version__

PROGRAMS = {
    "grpo": "Tune a base model with a reward for how its music sounds.",
    "pretrain": "Train a base model on a tokenised corpus.",
    "generate": "Write music with a base or a tuned run.",
    "evaluate": "Sample models, rate and compare their pieces, draw the paper's figures.",
    "corpus": "Turn a folder of MIDI files into a tokenised corpus.",
    "demo": "Make a web page that plays pairs of pieces from two models.",
    "study": "Build and serve a listening study, export and analyse its ratings.",
    "doctor": "Check whether this machine can run a configuration.",
    "reproduce": "Run every experiment of the paper and compare the results on one page.",
    "calibrate": "Fit the ce_proxy reward to clips that you rated.",
}
MODULES = {
    "corpus": "smart.corpus.command",
    "reproduce": "smart.reproduce.command",
    "calibrate": "smart.reward.calibrate",
}


@click.group(cls=LazyGroup, programs=PROGRAMS, package="smart", modules=MODULES)
@click.version_option(__version__)
def main() -> None:
    """Tune symbolic music models with reinforcement learning from audio."""


if __name__ == "__main__":
    main(prog_name="smart")
