"""A model card, written from a run's own records: configuration, log, metrics, summary and samples.

Everything in it was measured or recorded by the run; what was not is left out or said to be unknown. Of paths, only the
last name appears, since a card is public.
"""

import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from smart import UserError, __version__, brief, hub
from smart.files import parse_json, parse_toml, sha256
from smart.model import FILES, SHIPPED
from smart.reward import licence
from smart.rollout import System, find_system
from smart.run import CONFIG, read_metrics

Table = Mapping[str, Any]

# held-out metrics in the card, and what they are called there
HELD_OUT = {
    "held_out/reward": "reward",
    "held_out/judge": "held-out score (judge)",
    "held_out/kl": "KL to the base, nats per token",
    "held_out/vendi": "Vendi score: effective number of different pieces",
    "held_out/distance": "mean distance of two pieces, 0 to 1",
    "held_out/distinct_4grams": "share of distinct 4-grams",
    "held_out/pitches": "effective number of pitches",
    "held_out/silent_rate": "share of silent clips",
}
NAMES = ("base", "tuned")
CLIPS = 2  # prompts of which base and tuned model can be heard


class Card(NamedTuple):
    """A model, the text of its card, and the files that the card shows."""

    model: Path  # folder in the form of a base
    text: str
    files: dict[str, Path | bytes]  # name on the hub -> file, or its contents


def write_card(model: str, *, hub_id: str = "", frontier: Path | None = None) -> Card:
    """The card of a run (a folder, RUN@STEP, RUN@base) or of a base (a folder, or the name of a shipped one).

    ``hub_id`` is where the card will be; ``frontier`` a folder that `smart evaluate frontier` wrote. Raises
    ``UserError`` if there is no such model, or its records cannot be read.
    """
    system = find_system(model)
    if system.run is None and (system.model.parent / CONFIG).is_file() and system.model.name in ("tuned", "base"):
        system = find_system(str(system.model.parent))  # the model of a run, named by its folder
    if system.run is None or (system.step == 0 and not (system.run / "base").is_dir()):
        return _base_card(system, hub_id)
    config = _read(system.run / CONFIG)
    write = _tuned if "grpo" in config else _pretrained
    try:
        return write(system, system.run, config, hub_id, frontier)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f"run {system.run}: its records are not those of a run ({brief(error)})") from error


# --- Cards ----------------------------------------------------------------------------------------------------------


def _base_card(system: System, hub_id: str) -> Card:
    """The card that is in a base's folder, with its figures; if there is none, the facts that the files hold."""
    own = system.model / "README.md"
    if own.is_file():
        figures: dict[str, Path | bytes] = {path.name: path for path in sorted(system.model.glob("*.png"))}
        return Card(system.model, own.read_text(encoding="utf-8-sig"), figures)
    lines = [*_head(hub_id or system.name), "A base model for symbolic music.", ""]
    return Card(system.model, _joined([*lines, *_table(_architecture(system.model)), *_use(hub_id)]), {})


def _pretrained(system: System, run: Path, config: Table, hub_id: str, _: Path | None) -> Card:
    rows = read_metrics(run)
    best = min((row for row in rows if row.get("validation_loss") is not None), key=lambda row: row["validation_loss"])
    settings = config["optimisation"]
    facts = _architecture(system.model) | {
        "started from": _base_name(config["model"]["base"]) or "random weights",
        "data": _corpus(Path(config["data"]["corpus"])),
        "training": f"{rows[-1]['step']} steps of {settings['batch']} rows of up to {config['data']['crop']} tokens, "
        f"learning rate {settings['learning_rate']:g}",
        "best validation loss": f"{best['validation_loss']:.3f} nats per token "
        f"(perplexity {math.exp(best['validation_loss']):.2f}), at step {best['step']}",
        "seed": config["run"]["seed"],
    }
    files: dict[str, Path | bytes] = {}
    lines = [*_head(hub_id or system.name), "A base model for symbolic music, trained on tokenised MIDI files.", ""]
    lines += [*_table(facts), *_figure(run / "loss.png", "Training and validation loss", files)]
    last = max((run / "samples").glob("*/"), default=run / "samples")
    lines += _listen({f"piece {path.stem}": path for path in sorted(last.glob("*.wav"))[: 2 * CLIPS]}, hub_id, files)
    return Card(system.model, _joined([*lines, *_use(hub_id)]), files)


def _tuned(system: System, run: Path, config: Table, hub_id: str, frontier: Path | None) -> Card:
    log = (run / "log.txt").read_text(encoding="utf-8", errors="replace") if (run / "log.txt").is_file() else ""
    rows, settings = read_metrics(run), config["grpo"]
    step = _step(system, run, log, rows[-1]["step"])
    rewards = [one for one in (config["reward"], *config.get("rewards", ())) if one["kind"] != "none"]
    names = " and ".join(one["kind"] for one in rewards)
    base = config["model"]["base"]
    facts = _architecture(system.model) | {
        "base": f"[{base}](https://huggingface.co/{base})" if _on_hub(base) else _base_name(base),
        "data of the base": _data_of(base),
        "reward": _last(log, "reward: ") or names,
        "weights of the reward": "; ".join(
            f"{one['kind']}: " + ", ".join(f"{axis} {weight:g}" for axis, weight in one["weights"].items())
            for one in rewards
            if one["weights"]
        ),
        "licence of the reward": "; ".join(
            f"{one['kind']}: {licence(one['kind'], one.get('options', {}))}" for one in rewards
        ),
        "soundfont": "; ".join(_lines(log, "soundfont: ")) or _soundfonts(config["render"]),
        "prompts": config["prompts"]["kind"],
        "training": f"{step} iterations of {settings['prompts']} prompts x {settings['group_size']} completions of "
        f"up to {config['sampling']['max_new_tokens']} tokens, learning rate {settings['learning_rate']:g}, "
        f"beta {settings['beta']:g}",
        "seeds": f"{config['run']['seed']} for training, {config['run']['seed']} + 2^32 for held-out prompts, "
        f"{config['run']['seed']} + 2^31 for the final comparison",
    }
    files: dict[str, Path | bytes] = {}
    tags = ("reinforcement-learning", "grpo")
    lines = _head(hub_id or system.name, *tags, base=base if _on_hub(base) else "")
    lines += [f"A model of symbolic music, tuned with GRPO so that {names} rates its rendered audio higher.", ""]
    compared = system.model == run / "tuned"  # with the base, when the run ended
    lines += [*_table(facts), "## Measured", "", *(_comparison(run) if compared else ())]
    lines += [*_held_out(rows, step, _last(log, "held-out score: ")), *_advice(frontier, run, step)]
    lines += _figure(run / "reward_mean.png", "Mean reward of each iteration's completions", files)
    clips = {
        f"prompt {prompt + 1}, {name}": run / "final" / f"{prompt:02d}-{name}.wav"
        for prompt in range(CLIPS if compared else 0)
        for name in NAMES
    }
    lines += _listen({title: path for title, path in clips.items() if path.is_file()}, hub_id, files)
    lines += [*_use(hub_id), "## Limits", ""]
    lines += [
        "A reward is not taste: a model can learn what the reward overlooks. Compare it with its base before you use "
        "it. The licences of the base and of its data also apply to this model.",
        "",
    ]
    return Card(system.model, _joined(lines), files)


# --- Parts of a card ------------------------------------------------------------------------------------------------


def _head(title: str, *tags: str, base: str = "") -> list[str]:
    """The metadata that the hub reads, and the title."""
    base_model = [f"base_model: {base}"] if base else []
    tagged = ", ".join(("music", "midi", "symbolic-music", *tags))
    return ["---", "library_name: smart", *base_model, f"tags: [{tagged}]", "---", "", f"# {title}", ""]


def _table(facts: Mapping[str, Any]) -> list[str]:
    """Two columns; facts that are empty are left out."""
    rows = [
        f"| {key} | {str(value).replace('|', chr(92) + '|')} |"
        for key, value in facts.items()
        if value not in ("", None)
    ]
    return ["| | |", "|---|---|", *rows, ""]


def _architecture(model: Path) -> dict[str, str]:
    from safetensors import safe_open

    try:
        config = parse_json((model / "config.json").read_text(encoding="utf-8"))
        with safe_open(model / hub.WEIGHTS, framework="numpy") as weights:
            count = sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
        shape = f"Phi-3, {config['num_hidden_layers']} layers x {config['hidden_size']}, {count:,} parameters"
        vocabulary = f"MidiTok REMI, {config['vocab_size']} tokens"
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"base {model}: its {' and '.join(FILES[:2])} cannot be read ({error})") from None
    return {"architecture": shape, "vocabulary": vocabulary, "SHA-256 of the weights": sha256(model / hub.WEIGHTS)}


def _comparison(run: Path) -> list[str]:
    """Base against tuned model on new prompts."""
    if not (run / "summary.json").is_file():
        return []
    summary = _read(run / "summary.json")
    cells = [
        f"{summary[name]['reward']:.3f} ± {summary[name]['standard_error']:.3f}" for name in (*NAMES, "difference")
    ]
    count = min(summary[name]["n"] for name in NAMES)
    return [
        f"Mean reward of {count} pieces of each for new prompts (± standard error):",
        "",
        "| base | tuned | difference |",
        "|---|---|---|",
        f"| {' | '.join(cells)} |",
        "",
    ]


def _held_out(rows: Sequence[Table], step: int, judge: str) -> list[str]:
    """Held-out measurements of the base, and the last ones at or before iteration ``step``."""
    measured = [row for row in rows if row.get("held_out/reward") is not None and row["step"] <= step]
    if len(measured) < 2 or measured[0]["step"] != 0:
        return []
    first, last = measured[0], measured[-1]
    lines = [
        f"On the held-out prompts of the run, before training and after iteration {last['step']}:",
        "",
        "| | base | tuned |",
        "|---|---|---|",
    ]
    for key, title in HELD_OUT.items():
        before, after = (row.get(key) for row in (first, last))
        if before is not None and after is not None:
            lines.append(f"| {title} | {abs(before) if abs(before) < 5e-4 else before:.3f} | {after:.3f} |")
    collapse = "Diversity has collapsed by the run's rule." if last.get("held_out/collapsed") else ""
    judged = f"The held-out score, which training does not optimise, is {judge}." if judge else ""
    return [*lines, "", " ".join(filter(None, (judged, collapse))), ""]


def _advice(frontier: Path | None, run: Path, step: int) -> list[str]:
    """What `smart evaluate frontier` advises about this run."""
    if frontier is None:
        return []
    summary = _read(frontier / "summary.json")
    name = run.resolve().name
    found = [entry for title, entry in summary.get("runs", {}).items() if title.startswith(f"{name} (beta ")]
    if not found:
        raise UserError(f"--frontier {frontier}: its summary.json has no advice about the run {name}")
    keep, collapsed = found[0]["keep"], len(found[0]["collapsed"])
    advice = f"keep iteration {keep}" if keep else "keep the base"
    other = "" if keep == step else f" This model is iteration {step}."
    return [f"`smart evaluate frontier` advises: {advice}; {collapsed} checkpoints had collapsed.{other}", ""]


def _figure(path: Path, title: str, files: dict[str, Path | bytes]) -> list[str]:
    if not path.is_file():
        return []
    files[path.name] = path
    return [f"![{title}]({path.name})", ""]


def _listen(clips: Mapping[str, Path], hub_id: str, files: dict[str, Path | bytes]) -> list[str]:
    """Players for some clips, which become FLAC files."""
    import soundfile

    if not clips:
        return []
    lines = ["## Listen", ""]
    for title, path in clips.items():
        try:
            audio, rate = soundfile.read(path, dtype="int16")
        except (RuntimeError, OSError) as error:  # soundfile's own errors are RuntimeErrors
            raise UserError(f"{path} cannot be read ({error})") from None
        encoded = io.BytesIO()
        soundfile.write(encoded, audio, rate, format="FLAC")
        name = f"samples/{path.stem}.flac"
        files[name] = encoded.getvalue()
        place = f"https://huggingface.co/{hub_id}/resolve/main/{name}" if hub_id else name
        lines += [f'{title}: <audio controls src="{place}"></audio>', ""]
    return lines


def _use(hub_id: str) -> list[str]:
    name = hub_id or "USER/NAME"
    return [
        "## Use",
        "",
        "```text",
        f"smart generate --model {name} --out pieces",
        f"smart grpo --config quickstart.toml --set model.base={name}",
        "```",
        "",
        f"This card was written by smart {__version__} from the records of the model.",
        "",
    ]


# --- Records ---------------------------------------------------------------------------------------------------------


def _read(path: Path) -> Any:
    """A TOML or JSON file of a run."""
    try:
        text = path.read_text(encoding="utf-8")
        return parse_toml(text) if path.suffix == ".toml" else parse_json(text)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error})") from None


def _last(log: str, start: str) -> str:
    """The rest of the last line of a log that begins with ``start``, without the folders of paths."""
    found = _lines(log, start)
    return re.sub(r"(?<![\w:/.])~?(?:/[^/\s,;:()]+)+/(?=[^/\s])", "", found[-1]) if found else ""


def _lines(log: str, start: str) -> list[str]:
    """The different lines of a log that begin with ``start``, without it; a resumed run repeats its own."""
    return list(dict.fromkeys(line.removeprefix(start) for line in log.splitlines() if line.startswith(start)))


def _step(system: System, run: Path, log: str, last: int) -> int:
    """The iteration of a run's model."""
    if system.model != run / "tuned":
        return system.step or last
    early = re.findall(r"tuned/ is iteration (\d+)", log)
    return int(early[-1]) if early else last


def _on_hub(base: str) -> bool:
    return hub.is_hub_id(base) and not Path(base).exists() and not (SHIPPED / base).exists()


def _base_name(base: str) -> str:
    """A base without the folders around it; of a run's base or tuned model also the run."""
    path = Path(base)
    return "/".join(path.parts[-2:]) if path.name in ("base", "tuned") else path.name


def _data_of(base: str) -> str:
    """The data that a base was trained on, if it is recorded on this machine: by its run, or in its card."""
    for folder in (Path(base), SHIPPED / base):
        if (folder.parent / CONFIG).is_file():
            return _corpus(Path(_read(folder.parent / CONFIG).get("data", {}).get("corpus", "")))
        if (folder / "README.md").is_file():
            row = re.search(r"^\| data \| (.+) \|$", (folder / "README.md").read_text(encoding="utf-8"), re.M)
            return row[1] if row else ""
    return ""


def _corpus(folder: Path) -> str:
    """The corpus in ``folder``: its name and, if it is still there, its size."""
    if not (folder / "manifest.json").is_file():
        return folder.name
    manifest = _read(folder / "manifest.json")
    sizes = [f"{manifest['pieces'][split]:,} pieces for {split}" for split in manifest.get("pieces", {})]
    tokens = sum(manifest.get("tokens", {}).values())
    return f"corpus {folder.name}: {', '.join(sizes)}; {tokens:,} tokens"


def _soundfonts(render: Table) -> str:
    """The soundfonts of a run whose log does not name them with their hashes."""
    names = render.get("soundfonts") or [render["soundfont"]]
    return f"{', '.join(Path(name).name for name in names)} (hash not recorded)"


def _joined(lines: Sequence[str]) -> str:
    return "\n".join(lines).strip() + "\n"
