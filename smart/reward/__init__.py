"""Rewards: they rate audio on named axes, each on a scale from 1 to 10.

A reward takes clips of mono audio (N, S), float32 at the reward's own sample rate, and returns one (N,)
float32 tensor per axis. ``load_reward`` finds one by name: a built-in one such as ``audiobox``, or
any that an installed package registers in the entry-point group ``smart.rewards``.

A rating that could not be computed is NaN, never 0, so that averages can leave it out and count it. A clip
is rated NaN if it has no samples, if it holds a NaN or an infinity, or if the reward could not rate it (an
infinite rating counts as NaN, too). Other clips of the batch are unaffected.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.metadata import EntryPoint
from typing import TYPE_CHECKING, Any

from smart import UserError
from smart.files import parse_json
from smart.reward import file

if TYPE_CHECKING:
    import torch

    from smart.reward.mixture import Mixture
    from smart.reward.resampling import resample
    from smart.reward.reward import NoteReward, Reward
else:

    def __getattr__(name: str) -> Any:
        """The names of this package that need torch, which is imported with the first of them."""
        modules = dict.fromkeys(("NoteReward", "Reward"), "smart.reward.reward")
        modules |= {"Mixture": "smart.reward.mixture", "resample": "smart.reward.resampling"}
        if name not in modules:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(modules[name]), name)


__all__ = [
    "ENTRY_POINT_GROUP",
    "Mixture",
    "NoteReward",
    "Reward",
    "available_rewards",
    "licence",
    "load_reward",
    "read_options",
    "resample",
]

ENTRY_POINT_GROUP = "smart.rewards"
# entry points, so that a reward's module is imported only when that reward is loaded
BUILT_IN = {
    "audiobox": EntryPoint("audiobox", "smart.reward.audiobox:Audiobox", ENTRY_POINT_GROUP),
    "ce_proxy": EntryPoint("ce_proxy", "smart.reward.ce_proxy:CEProxy", ENTRY_POINT_GROUP),
    "naturalness": EntryPoint("naturalness", "smart.reward.ear:Ear", ENTRY_POINT_GROUP),
    "naturalness_mel": EntryPoint("naturalness_mel", "smart.reward.ear:MelEar", ENTRY_POINT_GROUP),
    "reference": EntryPoint("reference", "smart.reward.reference:Nearness", ENTRY_POINT_GROUP),
    "symbolic": EntryPoint("symbolic", "smart.reward.symbolic:Symbolic", ENTRY_POINT_GROUP),
}


def load_reward(
    kind: str,
    *,
    weights: Mapping[str, float] | None = None,
    device: str | torch.device = "cpu",
    **options: Any,
) -> Reward:
    """Build a reward by name.

    Args:
        kind: ``audiobox``, ``ce_proxy``, ``naturalness``, ``naturalness_mel``, ``reference``, ``symbolic``, a name
            that an installed package registers, or a class in a file that the command line names
            (``smart.reward.file``).
        weights: axis -> weight of ``Reward.combine``; None: the reward's first axis, or all of ``symbolic``.
        device: the device on which the reward computes.
        options: passed to the reward, for example ``model=`` and ``dtype=`` of ``audiobox``.

    Raises:
        UserError: no such kind, axis, option or device; a third-party reward cannot be imported or is not a
            ``Reward``; or the reward itself is not available, for example because its weights are missing.
    """
    from smart.reward.reward import Reward, check_device

    factory = _find_factory(kind)
    _check_options(kind, factory, options)
    check_device(device)
    reward = factory(device=device, **options)
    if not isinstance(reward, Reward):
        raise UserError(
            f'reward "{kind}" built a {type(reward).__name__}, expected a smart.reward.Reward; '
            "this is a bug in the package that registers it"
        )
    reward.name = kind
    if file.is_named(kind):
        reward.provenance = "; ".join(filter(None, (reward.provenance, file.provenance(kind))))
    reward.set_weights(weights)
    return reward


def read_options(texts: Sequence[str]) -> dict[str, Any]:
    """Options for ``load_reward`` from texts of the form KEY=VALUE, as ``--reward-option`` takes them.

    A value that parses as JSON (a number, true) becomes that value; any other stays text. Raises ``UserError`` if
    a text has another form.
    """
    options = {}
    for text in texts:
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise UserError(f"--reward-option {text!r}: expected KEY=VALUE, for example model=weights/audiobox")
        try:
            options[key] = parse_json(value)
        except ValueError:
            options[key] = value
    return options


def licence(kind: str, options: Mapping[str, Any]) -> str:
    """The licence of a reward, for a model card: of its published weights, or of the package that provides it."""
    if kind in BUILT_IN and kind != "audiobox" and (options.get("model") or options.get("coefficients")):
        return "not part of smart: weights of the user's own"
    if kind == "audiobox":
        return "published weights and code: CC BY 4.0, parts of the code MIT (Meta, facebook/audiobox-aesthetics)"
    if kind.startswith("naturalness"):
        data = "POP909 and pianolatron (MIT), GiantMIDI-Piano (CC BY 4.0)"
        scores = ", public-domain scores of music21's corpus" if kind == "naturalness" else ""
        return f"MIT, as part of smart; trained on {data}{scores}"
    if kind in BUILT_IN:
        return "MIT, as part of smart"
    for entry in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        if entry.name == kind and entry.dist is not None:
            about = entry.dist.metadata
            stated = next((about[key] for key in ("License-Expression", "License") if key in about), "not stated")
            return f"{stated} (package {_package(entry)})"
    return "unknown: the package that provides it is not installed"


def available_rewards() -> dict[str, str]:
    """Every kind that ``load_reward`` knows -> the package that provides it."""
    found = dict.fromkeys(BUILT_IN, "smart")
    for entry in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        found.setdefault(entry.name, _package(entry))
    return found


def _find_factory(kind: str) -> Callable[..., Reward]:
    """The callable that builds a kind; built-in names come first and cannot be replaced."""
    if file.is_named(kind):
        return file.load_class(kind)
    third_party = [e for e in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP) if e.name == kind]
    packages = ", ".join(sorted(_package(e) for e in third_party))
    if kind in BUILT_IN:
        if third_party:
            warnings.warn(
                f'package {packages} registers a reward "{kind}", but that name is built in; it is ignored',
                stacklevel=3,
            )
        return BUILT_IN[kind].load()
    if not third_party and ".py:" in kind:
        raise UserError(f'reward "{kind}" is a class in a file: name that file with smart grpo --reward PATH/{kind}')
    if not third_party:
        known = ", ".join(f"{name} ({package})" for name, package in available_rewards().items())
        raise UserError(
            f'there is no reward "{kind}"; choose one of: {known}; installed packages can add more '
            f'in the entry-point group "{ENTRY_POINT_GROUP}"'
        )
    if len(third_party) > 1:
        raise UserError(f'reward "{kind}" is registered by several packages ({packages}); uninstall all but one')
    try:
        factory = third_party[0].load()
    except Exception as error:  # another package's module may raise anything when it is imported
        raise UserError(
            f'reward "{kind}" of package {packages} could not be imported ({type(error).__name__}: {error}); '
            "fix or reinstall that package"
        ) from error
    if not callable(factory):
        raise UserError(
            f'reward "{kind}" of package {packages} is a {type(factory).__name__}, expected a class or a function'
        )
    return factory


def _package(entry: EntryPoint) -> str:
    """Name and version of the distribution that registers an entry point."""
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else entry.module


def _check_options(kind: str, factory: Callable[..., Reward], options: Mapping[str, Any]) -> None:
    """Raise ``UserError`` for an option that the reward does not take, or if a required one is missing."""
    parameters = inspect.signature(factory).parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name != "device"]
    taken = ", ".join(p.name for p in named) or "none"
    if not any(p.kind == p.VAR_KEYWORD for p in parameters):
        for option in options:
            if option not in {p.name for p in named}:
                raise UserError(f'reward "{kind}" has no option "{option}"; its options are: {taken}')
    for parameter in named:
        if parameter.default is parameter.empty and parameter.name not in options:
            raise UserError(f'reward "{kind}" needs the option "{parameter.name}"; its options are: {taken}')
