"""Files of a model on the Hugging Face hub, from the local cache or downloaded.

The package uses the network for nothing else, and only if the user names a hub id.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from smart import UserError, brief

SECONDS = 5.0  # time for the hub to answer; after that it counts as unreachable


def is_hub_id(name: str) -> bool:
    """Whether ``name`` has the form owner/model."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) is not None


def find_cached(hub_id: str, files: Sequence[str]) -> list[Path] | None:
    """The paths of ``files`` if all of them are in the hub's cache, else None."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        paths = [try_to_load_from_cache(hub_id, name) for name in files]
    except HFValidationError:  # has the form owner/model, but is not a valid name; ``ask`` says why
        return None
    return [Path(path) for path in paths if isinstance(path, str)] if all(isinstance(p, str) for p in paths) else None


def ask(hub_id: str, files: Sequence[str]) -> None:
    """Raise ``UserError`` with the reason if the hub does not answer within seconds, or lacks one of ``files``.

    A download would first retry for half a minute.
    """
    from huggingface_hub import HfApi

    try:
        info = HfApi().model_info(hub_id, timeout=SECONDS)
    except Exception as error:  # the client raises dozens of kinds, with the same remedy
        raise UserError(f"the Hugging Face hub cannot provide it ({brief(error)})") from error
    present = {sibling.rfilename for sibling in info.siblings or ()}
    absent = [name for name in files if name not in present]
    if absent:
        raise UserError(f"that hub model has no {' and no '.join(absent)}")


def fetch(hub_id: str, files: Sequence[str]) -> list[Path]:
    """The paths of ``files``: cached, else downloaded. Raises ``UserError`` with the reason if that fails."""
    from huggingface_hub import hf_hub_download

    cached = find_cached(hub_id, files)
    if cached is not None:
        return cached
    ask(hub_id, files)
    try:
        return [Path(hf_hub_download(hub_id, name)) for name in files]
    except Exception as error:  # as in ask
        raise UserError(f"the download failed ({brief(error)})") from error
