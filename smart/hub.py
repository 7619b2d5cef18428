"""Files of a model on the Hugging Face hub: from the local cache, downloaded, or uploaded.

The package uses the network for nothing else (but for trackers that a run asks for), and only if the user names a hub
id.
"""

import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from smart import Failure, UserError, brief
from smart.files import sha256

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


WEIGHTS = "model.safetensors"
AGAIN = "nothing was changed here; repeat the command, which sends only what is missing"


class Uploaded(NamedTuple):
    """Where an upload went."""

    url: str
    private: bool


def upload(hub_id: str, files: Mapping[str, Path | bytes], *, private: bool = False, update: bool = False) -> Uploaded:
    """Put ``files`` (name -> path or contents; ``WEIGHTS`` is among them) into the model ``hub_id``, in one commit.

    It makes the model if there is none. An interrupted upload leaves the model without new files; repeating it sends
    only what the hub lacks. A model with other weights is only replaced with ``update`` (the hub keeps its history).

    Raises ``UserError`` if the hub does not accept the token or the name, or the name is taken, and ``Failure`` if the
    upload fails for another reason.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
    from huggingface_hub.utils import disable_progress_bars

    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{hub_id}: HF_HUB_OFFLINE is set, so that nothing can be uploaded; unset it")
    if get_token() is None:
        raise UserError(f"{hub_id}: the hub asks for a token to upload: run `hf auth login`, or set HF_TOKEN")
    if not sys.stderr.isatty():
        disable_progress_bars()
    api = HfApi()
    with _in_one_line(hub_id), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the client's advice on a card's metadata
        is_private = _make(api, hub_id, files, private=private, update=update)
        contents = [(name, str(file) if isinstance(file, Path) else file) for name, file in files.items()]
        api.create_commit(
            hub_id,
            [CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in contents],
            commit_message="Upload model and card",
        )
    return Uploaded(f"{api.endpoint}/{hub_id}", is_private)


def _make(api: Any, hub_id: str, files: Mapping[str, Path | bytes], *, private: bool, update: bool) -> bool:
    """Make the model, or check that it may be written; returns whether it is private."""
    try:
        api.create_repo(hub_id, private=private)
        return private
    except Exception as error:
        if _status(error) != 409:
            raise
    found = api.model_info(hub_id, files_metadata=True)  # it exists: is it what an earlier attempt made?
    there = {one.rfilename: one for one in found.siblings or () if one.rfilename != ".gitattributes"}
    if private and not found.private:
        raise UserError(f"{hub_id} exists and is public; choose another name, or make it private on the hub")
    lfs = getattr(there.get(WEIGHTS), "lfs", None)
    weights = files[WEIGHTS]
    same = lfs is not None and isinstance(weights, Path) and lfs.sha256 == sha256(weights)
    if there and not same and not update:
        raise UserError(
            f"{hub_id} is taken: it holds other files; choose another name, or replace it with --update "
            "(the hub keeps its history)"
        )
    return bool(found.private)


@contextmanager
def _in_one_line(hub_id: str) -> Iterator[None]:
    """Turn the client's errors into one line each."""
    from huggingface_hub.errors import HFValidationError

    try:
        yield
    except (UserError, Failure):
        raise
    except HFValidationError as error:
        raise UserError(f"{hub_id!r} is not a name that the hub accepts ({brief(error)})") from None
    except Exception as error:  # the client raises dozens of kinds
        match _status(error):
            case 401:
                raise UserError(
                    f"{hub_id}: the hub does not accept your token: run `hf auth login`, or set HF_TOKEN"
                ) from error
            case 403:
                owner = hub_id.partition("/")[0]
                raise UserError(
                    f"{hub_id}: your token may not write there; use one with write access to {owner}'s models, "
                    "or choose a name of your own account"
                ) from error
        raise Failure(f"the upload to {hub_id} failed ({brief(error)}); {AGAIN}") from error


def _status(error: BaseException | None) -> int | None:
    """The HTTP status of an error, or of one that caused it."""
    while error is not None:
        if (status := getattr(getattr(error, "response", None), "status_code", None)) is not None:
            return int(status)
        error = error.__cause__
    return None
