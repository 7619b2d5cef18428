"""What tuning and pretraining share: a run's command line, folder, checkpoints, files and signals.

``smart.run.checkpoint`` is used as a module: ``checkpoint.save``, ``checkpoint.latest``.
"""

from smart.run.command import (
    accept_option,
    backend_option,
    in_one_line,
    pedal_option,
    progress,
    run_command,
    soundfont_option,
    temperature_option,
    tokens_option,
    workers_option,
)
from smart.run.folder import (
    CONFIG,
    NEEDED,
    SETTINGS,
    Opening,
    changes,
    check_names,
    check_packages,
    check_resumable,
    claim_folder,
    confirm_settings,
    hold_folder,
    open_run_folder,
    text_changes,
)
from smart.run.run import Run
from smart.run.sources import ACCEPT, digests, files_changed, files_in, model_digests
from smart.run.stop import StopRequest
from smart.run.stopwatch import Span, Stopwatch
from smart.run.tracker import METRICS, Tracker, read_metrics, summarise

__all__ = [
    "ACCEPT",
    "CONFIG",
    "METRICS",
    "NEEDED",
    "SETTINGS",
    "Opening",
    "Run",
    "Span",
    "StopRequest",
    "Stopwatch",
    "Tracker",
    "accept_option",
    "backend_option",
    "changes",
    "check_names",
    "check_packages",
    "check_resumable",
    "claim_folder",
    "confirm_settings",
    "digests",
    "files_changed",
    "files_in",
    "hold_folder",
    "in_one_line",
    "model_digests",
    "open_run_folder",
    "pedal_option",
    "progress",
    "read_metrics",
    "run_command",
    "soundfont_option",
    "summarise",
    "temperature_option",
    "text_changes",
    "tokens_option",
    "workers_option",
]
