"""smart.config: every shipped file loads, every mistake is named."""

import dataclasses
import json
import re
import string
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smart import UserError
from smart.__main__ import main
from smart.config import SHIPPED, Config, PretrainConfig, dumps, find, load, shipped, to_dict

ROOT = Path(__file__).parent.parent
BASES = {"base.toml", "base-small.toml"}


@pytest.mark.parametrize("name", shipped())
def test_shipped_config_loads_and_round_trips(name: str, tmp_path: Path) -> None:
    schema = PretrainConfig if name in BASES else Config
    config = load(name, schema=schema)
    (tmp_path / "again.toml").write_text(dumps(config), encoding="utf-8")
    assert load(tmp_path / "again.toml", schema=schema) == config


def test_paper_numbers() -> None:
    paper = load("paper.toml")
    grpo, sampling = paper.grpo, paper.sampling
    assert (grpo.prompts, grpo.group_size, grpo.iterations, grpo.inner_epochs) == (8, 8, 200, 1)
    assert (grpo.beta, grpo.learning_rate, grpo.clip, grpo.max_grad_norm) == (0.04, 1e-4, 0.2, 1.0)
    assert (sampling.max_new_tokens, sampling.temperature, sampling.top_k) == (256, 1.0, 0)
    assert (paper.render.seconds, paper.render.sample_rate, paper.run.seed) == (10.0, 48000, 1)
    assert (paper.model.base, paper.prompts.kind) == ("lucacasini/metamidipianophi3_4L", "procedural")


def test_the_papers_other_runs_differ_from_it_only_where_they_say() -> None:
    def flat(name: str) -> dict[str, object]:
        config = load(name)
        return {
            f"{section}.{key}": value
            for section, values in to_dict(config).items()
            for key, value in dict(values).items()
        }

    paper = flat("paper.toml")
    for name, keys in {
        "paper-1000.toml": {"grpo.iterations": 1000},
        "paper-1000-beta0.toml": {"grpo.iterations": 1000, "grpo.beta": 0.0},
        "paper-dataset.toml": {"prompts.kind": "dataset"},
    }.items():
        other = flat(name)
        assert {key: value for key, value in other.items() if paper[key] != value and key != "run.name"} == keys


def test_the_papers_run_with_two_rewards_differs_in_them_alone() -> None:
    paper, other = to_dict(load("paper.toml")), to_dict(load("paper-two-rewards.toml"))
    assert not paper.pop("rewards") and paper.pop("reward")["kind"] == "audiobox" == other["rewards"][0]["kind"]
    assert [(one["kind"], one["target"]) for one in other.pop("rewards")] == [
        ("audiobox", "real"),
        ("naturalness", "real"),
    ]
    assert other.pop("reward")["kind"] == "none"
    paper["run"].pop("name"), other["run"].pop("name")
    assert other == paper


def test_bare_name_is_found_when_no_such_file_is_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find("quickstart.toml") == SHIPPED / "quickstart.toml"
    (tmp_path / "quickstart.toml").write_text("[run]\nname = 'mine'\n")
    assert load("quickstart.toml").run.name == "mine"
    with pytest.raises(UserError, match=r"no such file; shipped configs are .*paper\.toml"):
        find("papper.toml")
    with pytest.raises(UserError, match="no such file"):
        find("elsewhere/quickstart.toml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("grpo.betta=1", r"unknown key grpo.betta = 1; did you mean grpo.beta\?"),
        ("grop.beta=1", r"unknown key grop = \{'beta': 1\}; did you mean grpo\?"),
        ("grpo.beta=high", "grpo.beta = 'high': expected a number"),
        ("grpo.beta=nan", "grpo.beta = nan: expected a finite number"),
        (f"grpo.beta={'9' * 400}", r"grpo.beta = 9{57}\.\.\.: expected a finite number"),
        (f"grpo.beta=0x{'f' * 9000}", "grpo.beta = an integer of thousands of digits: expected a finite number"),
        (f"reward.weights.CE={'9' * 400}", "expected a table of finite numbers"),
        ("grpo.beta=true", "grpo.beta = True: expected a number"),
        ("grpo.iterations=2.0", r"grpo.iterations = 2.0: expected an integer"),
        ("grpo.iterations=0", "grpo.iterations = 0: expected a value at least 1"),
        ("grpo.clip=0", "grpo.clip = 0.0: expected a value greater than 0 and at most 1.0"),
        ("sampling.top_p=1.5", "sampling.top_p = 1.5: expected a value greater than 0 and at most 1.0"),
        ("prompts.kind=none", "prompts.kind = 'none': expected one of procedural, first_note, bos, dataset"),
        ("run.name=3", "run.name = 3: expected a string"),
        ("reward.weights.CE=high", r"reward.weights = \{'CE': 'high'\}: expected a table of finite numbers"),
        ("reward.options.weights.CE=1", "expected a table without 'weights'"),
        ("run=3", "expected section.key=value"),
        ("run.name", "expected section.key=value"),
        ("run.name.first=3", "run.name.first=3': name is not a section"),
    ],
)
def test_a_mistake_is_named(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load("quickstart.toml", [override])


def test_a_mistake_is_blamed_on_the_file_or_the_override(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("[grpo]\nbeta = -1\n[reward.weights]\nCE = 1\n")
    for overrides, source in (
        ([], str(file)),
        (["grpo.clip=0.1"], str(file)),
        (["grpo.beta=-2"], "--set 'grpo.beta=-2'"),
        (["grpo.beta=0", "grpo.betaa=1"], "--set 'grpo.betaa=1'"),
        (["grpo.beta=0", "reward.weights.CE=x"], f"{file} with --set 'reward.weights.CE=x'"),
    ):
        with pytest.raises(UserError) as raised:
            load(file, overrides)
        assert raised.value.message.startswith(f"{source}: "), raised.value.message


def test_overrides_take_toml_and_bare_words() -> None:
    config = load(
        "quickstart.toml",
        ["model.base=owner/name", "grpo.beta=1e-2", 'run.name="a b"', "reward.weights={CE=1, PQ=-0.5}"],
    )
    assert config.model.base == "owner/name"
    assert config.grpo.beta == 0.01
    assert config.run.name == "a b"
    assert config.reward.weights == {"CE": 1.0, "PQ": -0.5}


def test_a_run_name_cannot_leave_its_folder() -> None:
    for name in ("../up", "/tmp", "a/b", "", "."):
        with pytest.raises(UserError, match=r"run\.name"):
            load("quickstart.toml", [f"run.name={name!r}"])


def test_not_toml(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_bytes(b"\xff\xfe not toml")
    with pytest.raises(UserError, match="cannot be read as TOML"):
        load(tmp_path / "bad.toml")
    (tmp_path / "deep.toml").write_text(f"a = {'[' * 100_000}")
    with pytest.raises(UserError, match="nested too deeply"):
        load(tmp_path / "deep.toml")
    with pytest.raises(UserError, match=r"grpo\.beta"):  # anything that is not a TOML value is a word
        load("quickstart.toml", [f"grpo.beta={'[' * 100_000}"])


@given(
    st.dictionaries(st.text(min_size=1, max_size=8), st.text(max_size=20), max_size=3),
    st.floats(allow_nan=False, allow_infinity=False),
)
def test_dumps_round_trips_any_text(options: dict[str, str], number: float) -> None:
    import tomllib

    config = Config()
    reward = dataclasses.replace(config.reward, options={**options, "number": number})
    config = dataclasses.replace(config, reward=reward)
    assert tomllib.loads(dumps(config))["reward"]["options"] == {**options, "number": number}


@given(st.text(alphabet=string.printable, max_size=60))
def test_any_override_is_taken_or_refused_in_one_line(text: str) -> None:
    try:
        load("quickstart.toml", [text])
    except UserError as error:
        assert error.message


def toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{toml(key)} = {toml(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, str):
        return json.dumps(value).replace("\x7f", "\\u007f")
    return str(value).lower()


SECTIONS = to_dict(Config())
KEYS = sorted({key for section in SECTIONS.values() for key in section})
VALUES = st.recursive(
    st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats() | st.text(st.characters(codec="utf-8"), max_size=9),
    lambda some: st.lists(some, max_size=3) | st.dictionaries(st.text("ab ", max_size=2), some, max_size=3),
    max_leaves=6,
)


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.sampled_from([*SECTIONS, "other"]),
        VALUES | st.dictionaries(st.sampled_from([*KEYS, "other"]), VALUES, max_size=3),
        max_size=3,
    )
)
def test_any_toml_is_taken_or_refused_in_one_line(tmp_path: Path, values: dict[str, Any]) -> None:
    """Accepted values have the right types, and load again unchanged."""
    path = tmp_path / "any.toml"
    path.write_text("\n".join(f"{key} = {toml(value)}" for key, value in values.items()), encoding="utf-8")
    try:
        config = load(path)
    except UserError as error:
        assert str(path) in error.message and "\n" not in error.message
        return
    path.write_text(dumps(config), encoding="utf-8")
    assert load(path) == config


SEVERAL = """
[[rewards]]
kind = "ce_proxy"
target = "real"

[[rewards]]
kind = "symbolic"
name = "rules"
weight = 0.5
target = 8
options = { dissonance = "low", note_density = 6.0 }
"""


def test_several_rewards(tmp_path: Path) -> None:
    """They replace the default one; a ``[reward]`` in the file stays the first of them."""
    file = tmp_path / "several.toml"
    file.write_text(SEVERAL)
    config = load(file)
    assert [one.kind for one in config.all_rewards] == ["ce_proxy", "symbolic"]
    assert [one.target for one in config.all_rewards] == ["real", 8.0]
    assert config.rewards[1].options == {"dissonance": "low", "note_density": 6.0}
    assert [one.kind for one in load(file, ["reward.kind=audiobox"]).all_rewards] == [
        "audiobox",
        "ce_proxy",
        "symbolic",
    ]
    assert [one.kind for one in load(file, ["rewards=[]", "reward.kind=audiobox"]).all_rewards] == ["audiobox"]
    assert [one.kind for one in load("paper.toml").all_rewards] == ["audiobox"]
    file.write_text(dumps(config))
    assert load(file) == config
    overrides = ["rewards.rules.weight=2", "rewards.0.target=7.5", "rewards.ce_proxy.options.coefficients=x.json"]
    config = load(file, overrides)
    assert (config.rewards[0].target, config.rewards[1].weight) == (7.5, 2.0)
    assert config.rewards[0].options == {"coefficients": "x.json"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rewards.2.weight=1", "no table is called 2; expected 0 to 1, or a name"),
        ("rewards.weight=1", r"rewards has several tables; say which, as in rewards\.0\.weight"),
        ("rewards.rules.weigth=1", r"--set .*: unknown key rewards\.1\.weigth = 1; did you mean rewards\.1\.weight\?"),
        ("rewards.rules.weight=-1", r"rewards\.1\.weight = -1.0: expected a value at least 0"),
        ("rewards.0.target=high", "expected a finite number or one of none, real"),
        ("rewards.0.options.a.b=1", ""),
        ("render.soundfonts=timgm", "expected a list of strings"),
    ],
)
def test_a_mistake_in_several_rewards_is_named(tmp_path: Path, override: str, message: str) -> None:
    file = tmp_path / "several.toml"
    file.write_text(SEVERAL)
    if not message:
        assert load(file, [override]).rewards[0].options == {"a": {"b": 1}}
        return
    with pytest.raises(UserError, match=message):
        load(file, [override])


# --- smart config -----------------------------------------------------------------------------------------------------


def print_config(*words: object) -> str:
    result = CliRunner().invoke(main, ["config", *map(str, words)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("changed", [False, True])
@pytest.mark.parametrize("name", shipped())
def test_what_is_printed_is_the_same_configuration(name: str, changed: bool, tmp_path: Path) -> None:
    schema = PretrainConfig if name in BASES else Config
    (tmp_path / "again.toml").write_text(print_config(name, *(["--changed"] if changed else [])), encoding="utf-8")
    assert load(tmp_path / "again.toml", schema=schema) == load(name, schema=schema)


def test_what_differs_from_the_defaults_is_marked(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(SEVERAL)
    whole = print_config(tmp_path, "--set", "grpo.beta=0.1", "--set", "reward.options.a=1")
    assert "beta = 0.1  # default: 0.04\n" in whole and "\nclip = 0.2\n" in whole
    assert (
        print_config(tmp_path, "--changed", "--set", "grpo.beta=0.1")
        == """[reward]
kind = "none"  # default: "ce_proxy"

[[rewards]]
target = "real"  # default: "none"

[[rewards]]
kind = "symbolic"  # default: "ce_proxy"
name = "rules"  # default: ""
weight = 0.5  # default: 1.0
target = 8.0  # default: "none"

[rewards.options]
dissonance = "low"  # not set by default
note_density = 6.0  # not set by default

[grpo]
beta = 0.1  # default: 0.04
"""
    )
    result = CliRunner().invoke(main, ["config", "quickstart.toml", "--set", "grpo.betaa=1"])
    assert result.exit_code == 2 and "did you mean grpo.beta?" in result.output


def keys(schema: Any, prefix: str = "") -> list[str]:
    """Every key, dotted; tables in lists have those of another section."""
    found = []
    for name, kind in get_type_hints(schema).items():
        if dataclasses.is_dataclass(kind):
            found += keys(kind, f"{prefix}{name}.")
        else:
            found.append(f"{prefix}{name}")
    return found


def test_the_page_is_made_from_the_fields() -> None:
    """docs/configuration.md is up to date, and every key is on it and has a meaning."""
    page = print_config("--markdown")
    for key in {*keys(Config), *keys(PretrainConfig)} - {"rewards"}:
        assert f"`{key}`" in page, key
    lines = [line.split(" | ") for line in page.splitlines() if re.match(r"\| `\w+\.", line)]
    assert len(lines) > 70 and all(len(line) == 6 and len(line[4].split()) > 1 for line in lines)
    docs = ROOT / "docs" / "configuration.md"
    if docs.is_file():  # not part of an installed package
        again = "python -m smart.config --markdown > docs/configuration.md"
        assert docs.read_text(encoding="utf-8") == page, f"the page is out of date: {again}"
