"""Recipes: the YAML dialect, inheritance, overrides, and mistakes told by file, line and key."""

from __future__ import annotations

import argparse
import re
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from llmkit import config
from llmkit.cli import build_parser
from llmkit.config import Config, UserError, dump, flatten, known_keys, load, parse_yaml, validate
from llmkit.inference.command import TEMPERATURE
from llmkit.inference.config import SamplingConfig
from llmkit.stages import STAGES, load_recipe
from llmkit.training.config import SampleConfig


class Inner(Config):
    """An inner section."""

    lr: float = 1e-3
    steps: int = Field(1, ge=1)
    on: bool = False
    betas: tuple[float, float] = (0.9, 0.95)


class Entry(Config):
    """An entry of a list."""

    path: str
    weight: float = Field(1.0, gt=0)


class Outer(Config):
    """A recipe."""

    name: str
    inner: Inner = Inner()
    maybe: Inner | None = None
    entries: tuple[Entry, ...] = ()
    kind: Literal["a", "b"] = "a"

    @model_validator(mode="after")
    def _check(self) -> Outer:
        if self.name == "bad":
            raise ValueError("name is bad: choose another")
        return self


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write(text: str | bytes, name: str = "r.yaml") -> Path:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text.encode() if isinstance(text, str) else text)
        return file

    return write


def told(run: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as error:
        run()
    return str(error.value)


# --- the dialect -----------------------------------------------------------------------------------------------------

SCALARS = {
    "3e-4": 3e-4, "1E5": 1e5, "-2.5e+3": -2500.0, "5.": 5.0, ".5": 0.5, "1_000": 1000, "0x1F": 31, "+1": 1, "-0": 0,
    "true": True, "False": False, "yes": "yes", "no": "no", "on": "on", "Off": "Off", "y": "y", "n": "n", "NO": "NO",
    "010": "010", "0o17": "0o17", "1:30": "1:30", "12:30:45": "12:30:45", "2020-01-01": "2020-01-01", "1e": "1e",
    "2020-01-01T00:00:00Z": "2020-01-01T00:00:00Z", "1.2.3": "1.2.3", "~": None, "null": None, "": None, "nil": "nil",
    ".inf": float("inf"), "-.inf": float("-inf"), "'3'": "3", "=": "=", "!!str 5": "5", "!!float 5": 5.0, "中": "中",
}  # fmt: skip


@pytest.mark.parametrize("text", SCALARS)
def test_scalars_are_those_of_yaml_1_2(text: str) -> None:
    """B52: a learning rate is a number; no word, time or date becomes something else."""
    value = parse_yaml(f"a: {text}")[0]["a"]
    assert value == SCALARS[text] and type(value) is type(SCALARS[text])


def test_the_dialect_is_what_safe_load_is_not() -> None:
    """Guards the reason for a loader of our own: what PyYAML makes of the same text."""
    naive = yaml.safe_load("{a: 3e-4, b: no, c: 010, d: 1:30, e: 2020-01-01}")
    assert naive["a"] == "3e-4" and naive["b"] is False and naive["c"] == 8 and naive["d"] == 90
    assert not isinstance(naive["e"], str)


REFUSED = {
    "a: 1\nb: 2\na: 3": "f:3: duplicate key 'a'",
    "a: {b: 1, b: 2}": "f:1: duplicate key 'b'",
    "1: 2": "f:1: a key must be text (got '1'): quote it",
    "null: 2": "f:1: a key must be text (got 'null'): quote it",
    "true: 2": "f:1: a key must be text (got 'true'): quote it",
    "a:\tb": "f:1:3: found character '\\t' that cannot start any token",
    "a: 1\n\tb: 2": "f:2:1: found character '\\t' that cannot start any token",
    "a: b\0": "f: not YAML: unacceptable character #x0000",
    'a: 1\nb: "\\0"': "f:2: a NUL character is no text",
    'a: 1\nb: "x\\ud800"': "f:2: half of a surrogate pair is no text",
    'a: 1\n"\\ud800": 2': "f:2: half of a surrogate pair is no text",
    "a: 1\nb: !!binary aGVs": "f:2: !!binary: only plain values are read",
    "a: !!set {b}": "f:1: !!set: only plain values are read",
    "a: !!timestamp 2020-01-01": "f:1: !!timestamp: only plain values are read",
    "a: !!python/object/apply:os.system [x]": "f:1: !!python/object/apply:os.system: only",
    "a: !foo x": "f:1: !foo: only plain values are read",
    "a: <<": "f:1: !!merge: only plain values are read",
    "a: 1\nb: !!int x": "f:2: not of the type that its tag !!int says",
    "a: !!bool x": "f:1: not of the type that its tag !!bool says",
    "a: !!float x": "f:1: not of the type that its tag !!float says",
    "a: !!null x": "f:1: not of the type that its tag !!null says",
    "a: !!int [1]": "f:1:4: expected a scalar node",
    "a: " + 5000 * "9": "f:1: a number of 5000 digits: at most 300 are read",
    "a: &x [*x]": "f:1: nested more than 32 levels deep",
    "a: " + 40 * "[" + 40 * "]": "f:1: nested more than 32 levels deep",
    "[" * 100_000: "f: nested more than 32 levels deep",
    "a: *x": "f:1:4: found undefined alias 'x'",
    "a: 1\n---\nb: 2": "f:2:1: but found another document",
    "%YAML 9.9\n---\na: 1": "f:1:1: found incompatible YAML document",
    "a: 'x": "f:1:6: found unexpected end of stream",
    "{": "f:1:2: expected the node content",
    "a: {<<: 5}": "f:1:9: expected a mapping",
    "x: &x {a: 1}\ny: {<<: *x, <<: *x}": "f:2: duplicate key '<<'",
}


@pytest.mark.parametrize("text", REFUSED, ids=range(len(REFUSED)))
def test_what_no_recipe_needs_is_refused_by_line(text: str) -> None:
    assert told(lambda: parse_yaml(text, "f")).startswith(REFUSED[text])


def test_alias_bomb() -> None:
    """Nine lists of nine aliases each would be 3 billion values: refused before it is built, in no time."""
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(9 * [f'*{chr(97 + i)}'])}]\n" for i in range(9)
    )
    assert "more than 20000 values once aliases are expanded" in told(lambda: parse_yaml(bomb, "f"))
    merges = "a: &a {k: v}\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} {{<<: [{', '.join(9 * [f'*{chr(97 + i)}'])}]}}\n" for i in range(9)
    )
    assert "more than 20000 values" in told(lambda: parse_yaml(merges, "f"))


def test_anchors_and_merge_keys(write: Callable[..., Path]) -> None:
    """Own keys win over merged ones, the first merged mapping over later ones; errors stand where the value does."""
    text = "x: &x {lr: 1, steps: 2}\ny: &y {lr: 3, on: true}\nz: {<<: [*x, *y], steps: 9}"
    assert parse_yaml(text)[0]["z"] == {"lr": 1, "steps": 9, "on": True}
    file = write(
        "name: a\ninner: &i {lr: x}\nentries: [{path: p, weight: 1, <<: &j {weight: 0}}]\nmaybe: {<<: [*i, &k {lr: y}]}"
    )
    assert told(lambda: load(Outer, file)).splitlines() == [
        f"{file}:2: inner.lr: expected a number (got 'x')",
        f"{file}:2: maybe.lr: expected a number (got 'x')",
    ]
    file = write("name: a\ninner: &i\n  lr: 1\n  steps: 0\nmaybe:\n  <<: *i\n  on: 3\n")
    assert told(lambda: load(Outer, file)).splitlines() == [
        f"{file}:4: inner.steps: must be greater than or equal to 1 (got 0)",
        f"{file}:4: maybe.steps: must be greater than or equal to 1 (got 0)",
        f"{file}:7: maybe.on: expected a boolean (got 3)",
    ]


def test_encodings_and_sizes(write: Callable[..., Path]) -> None:
    assert load(Outer, write("\ufeffname: 中文\r\n")).name == "中文"
    file = write(b"name: \xff")
    assert told(lambda: load(Outer, file)) == f"{file}: not UTF-8 at byte 6: save it as UTF-8"
    file = write("name: a".encode("utf-16"))
    assert "not UTF-8 at byte 0" in told(lambda: load(Outer, file))
    file = write("# " + "x" * config.MAX_BYTES)
    assert "bytes is no recipe: at most" in told(lambda: load(Outer, file))
    for text in ("", "# only a comment\n", "---\n", "{}"):
        file = write(text)
        line = 2 if text == "---\n" else 1
        assert told(lambda file=file: load(Outer, file)) == f"{file}:{line}: name: missing: this key has no default"
    for text, got in (("[1]", "[1]"), ("word", "'word'"), ("3", "3")):
        file = write(text)
        assert (
            told(lambda file=file: load(Outer, file))
            == f"{file}:1: a recipe is a mapping of keys to values (got {got})"
        )


def test_files_that_cannot_be_read(write: Callable[..., Path], tmp_path: Path) -> None:
    file = write("name: a", "demo.yaml")
    assert told(lambda: load(Outer, tmp_path / "dmo.yaml")) == (
        f"recipe not found: {tmp_path / 'dmo.yaml'} - did you mean {file}?"
    )
    assert told(lambda: load(Outer, tmp_path)).startswith("recipe not found")
    assert told(lambda: load(Outer, tmp_path / "no" / "x.yaml")).startswith("recipe not found")
    assert told(lambda: load(Outer, "configs/pretrain/dmeo.yaml")).startswith("recipe not found: configs/pretrain/dmeo")


# --- base ------------------------------------------------------------------------------------------------------------


def test_base_is_inherited_key_by_key(write: Callable[..., Path]) -> None:
    write("name: a\ninner: {lr: 1, steps: 2}\nentries: [{path: x}, {path: y}]", "a.yaml")
    write("base: a.yaml\ninner: {steps: 3}", "b.yaml")
    got = load(Outer, write("base: ../b.yaml\nentries: [{path: z}]\ninner: {on: true}", "sub/c.yaml"))
    assert got.name == "a" and got.inner == Inner(lr=1.0, steps=3, on=True)
    assert [e.path for e in got.entries] == ["z"], "a list replaces a list"


def test_base_may_name_a_shipped_recipe(write: Callable[..., Path]) -> None:
    file = write("base: configs/pretrain/demo.yaml\nsteps: 7")
    assert load_recipe(file).steps == 7 and load_recipe(file).stage == "pretrain"


def test_mistakes_in_a_base_stand_where_they_are(write: Callable[..., Path]) -> None:
    below = write("name: a\ninner:\n  lrr: 1\n", "a.yaml")
    file = write("base: a.yaml\n\nkind: c\n", "b.yaml")
    assert told(lambda: load(Outer, file)).splitlines() == [
        f"{below}:3: inner.lrr: unknown key - did you mean 'lr'?",
        f"{file}:3: kind: expected 'a' or 'b' (got 'c')",
    ]


def test_bases_that_lead_nowhere(write: Callable[..., Path], tmp_path: Path) -> None:
    a = write("base: b.yaml", "a.yaml")
    b = write("base: a.yaml", "b.yaml")
    assert told(lambda: load(Outer, a)) == f"{b}:1: base: runs in a circle: {a} -> {b} -> {a}"
    own = write("base: own.yaml", "own.yaml")
    assert "runs in a circle" in told(lambda: load(Outer, own))
    c = write("name: x\nbase: bb.yaml", "c.yaml")
    hint = f"{c}:2: base: recipe not found: {tmp_path / 'bb.yaml'} - did you mean {b}?"
    assert told(lambda: load(Outer, c)) == hint
    for value, got in (("3", "3"), ("[a.yaml]", "['a.yaml']"), ("{x: 1}", "{'x': 1}"), ("true", "True")):
        file = write(f"name: x\nbase: {value}", "d.yaml")
        assert told(lambda: load(Outer, file)) == f"{file}:2: base: a file name is expected (got {got})"  # noqa: B023
    for n in range(40):
        write(f"base: n{n + 1}.yaml", f"n{n}.yaml")
    assert "more than 32 recipes" in told(lambda: load(Outer, tmp_path / "n0.yaml"))


# --- overrides -------------------------------------------------------------------------------------------------------

RECIPE = "name: a\ninner:\n  lr: 1\nmaybe: {lr: 5, steps: 5}\nentries: [{path: x}, {path: y, weight: 2}]\n"
OVERRIDES: dict[str, tuple[str, Any]] = {
    "inner.lr=3e-4": ("inner.lr", 3e-4),
    "name=a=b": ("name", "a=b"),
    "name=no": ("name", "no"),
    "name='3'": ("name", "3"),
    "name=你好 world": ("name", "你好 world"),
    "entries.1.path=z": ("entries.1.path", "z"),
    "entries.0.weight=3": ("entries.0.weight", 3.0),
    "entries=[]": ("entries", []),
    "entries=[{path: q}]": ("entries.0.path", "q"),
    "inner={steps: 4}": ("inner.lr", 1.0),
    "inner.betas=[0.1, 0.2]": ("inner.betas.0", 0.1),
    "inner.betas={}": ("inner.betas", None),
    "maybe=null": ("maybe", None),
    "maybe=": ("maybe", None),
    "maybe.on=true": ("maybe.on", True),
}


@pytest.mark.parametrize("text", [t for t in OVERRIDES if t != "inner.betas={}"])
def test_overrides(text: str, write: Callable[..., Path]) -> None:
    key, value = OVERRIDES[text]
    got = flatten(load(Outer, write(RECIPE), [text]).model_dump(mode="json"))
    assert got[key] == value


def test_overrides_apply_in_order_and_make_sections(write: Callable[..., Path]) -> None:
    got = load(Outer, write("name: a"), ["maybe.lr=1", "maybe.lr=2", "maybe.steps=3"])
    assert got.maybe == Inner(lr=2.0, steps=3)


BAD_OVERRIDES = {
    "inner.lr": "expected key.sub=value",
    "=3": "expected key.sub=value",
    "inner..lr=3": "expected key.sub=value",
    ".inner=3": "expected key.sub=value",
    "x" + 50 * ".x" + "=1": "expected key.sub=value",
    "entries.7.path=z": "the list has 2 entries, so the last is 1",
    "entries.²=z": "entries",
    "entries." + 5000 * "9" + "=z": "entries",
    "inner.lrr=3": "inner.lrr: unknown key - did you mean 'lr'?",
    "inner.lr=": "inner.lr: expected a number (got None)",
    "inner.lr=abc": "inner.lr: expected a number (got 'abc')",
    "inner.lr=[": "expected the node content",
    "inner=3": "inner: expected an object (got 3)",
    "inner={lr: abc}": "inner.lr: expected a number (got 'abc')",
    "inner={steps: 0}": "inner.steps: must be greater than or equal to 1 (got 0)",
    "name=bad": "name is bad: choose another",
    "name={a: *x}": "found undefined alias",
    "inner.lr=.nan": "inner.lr: expected a finite number (got nan)",
    "name=!!binary aGVs": "!!binary: only plain values are read",
    'name="\\0"': "a NUL character is no text",
}


@pytest.mark.parametrize("text", BAD_OVERRIDES, ids=range(len(BAD_OVERRIDES)))
def test_a_bad_override_is_named(text: str, write: Callable[..., Path]) -> None:
    message = told(lambda: load(Outer, write(RECIPE), [text]))
    where = r".*r\.yaml:\d+" if text == "name=bad" else re.escape(f"override '{text}'")
    assert re.match(where + ": ", message) and BAD_OVERRIDES[text] in message


# --- mistakes --------------------------------------------------------------------------------------------------------


def test_all_mistakes_at_once_in_the_order_of_the_file(write: Callable[..., Path]) -> None:
    """One line each, `file:line: key: what (got value)`, downwards; overrides last."""
    inner = "inner:\n  lr: 'x'\n  steps: 1.5\n  on: yes\n  betas: [1]\nzebra: 1\n"
    file = write("kind: c\n\nentries:\n  - path: x\n    weight: -1\n  - {wieght: 2}\n" + inner)
    assert told(lambda: load(Outer, file, ["maybe.steps=0"])).splitlines() == [
        f"{file}:1: name: missing: this key has no default",
        f"{file}:1: kind: expected 'a' or 'b' (got 'c')",
        f"{file}:5: entries.0.weight: must be greater than 0 (got -1)",
        f"{file}:6: entries.1.path: missing: this key has no default",
        f"{file}:6: entries.1.wieght: unknown key - did you mean 'weight'?",
        f"{file}:8: inner.lr: expected a number (got 'x')",
        f"{file}:9: inner.steps: expected an integer (got 1.5)",
        f"{file}:10: inner.on: expected a boolean (got 'yes')",
        f"{file}:11: inner.betas.1: missing: this key has no default",
        f"{file}:12: zebra: unknown key; known: name, inner, maybe, entries, kind",
        "override 'maybe.steps=0': maybe.steps: must be greater than or equal to 1 (got 0)",
    ]


def test_strict_types(write: Callable[..., Path]) -> None:
    """Nothing is guessed: text is no number, a number no text or truth, 1.0 no integer; an integer is a float."""
    assert load(Outer, write("name: a\ninner: {lr: 1}")).inner.lr == 1.0
    for key, value in {
        "name": "3", "name ": "true", "name  ": "null", "inner.lr": "'1'", "inner.lr ": "true", "inner.steps": "1.0",
        "inner.steps ": "'1'", "inner.on": "1", "inner.on ": "'true'", "inner.betas": "0.9", "entries": "{path: x}",
        "maybe": "[]", "inner": "null",
    }.items():  # fmt: skip
        message = told(lambda key=key, value=value: load(Outer, write("name: a"), [f"{key.strip()}={value}"]))
        assert key.strip() in message and "got" in message, (key, value, message)


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "1e400"])
def test_numbers_are_finite(value: str, write: Callable[..., Path]) -> None:
    file = write(f"name: a\ninner:\n  lr: {value}")
    assert told(lambda: load(Outer, file)).startswith(f"{file}:3: inner.lr: expected a finite number (got ")
    with pytest.raises(ValidationError):
        Inner(lr=float(value.replace(".", "")))


def test_a_long_value_is_cut(write: Callable[..., Path]) -> None:
    file = write(f"name: a\nkind: {'x' * 5000}")
    assert len(told(lambda: load(Outer, file))) < 250 + len(str(file))


def test_every_line_of_an_error_has_a_place() -> None:
    """Plain data without a file still names its source."""
    assert told(lambda: validate(Outer, {"name": 3})) == "<data>: name: expected a string (got 3)"


def test_known_keys() -> None:
    assert known_keys(Outer, ("inner",)) == ["lr", "steps", "on", "betas"]
    assert known_keys(Outer, ("entries", 0)) == ["path", "weight"] and known_keys(Outer, ("maybe",))[0] == "lr"
    assert known_keys(Outer, ("nothing",)) == []


# --- every configuration class there is ------------------------------------------------------------------------------


def classes(model: type[BaseModel], seen: dict[type[BaseModel], None] | None = None) -> list[type[BaseModel]]:
    """A recipe's class and all those inside it."""
    seen = {} if seen is None else seen
    if model not in seen:
        seen[model] = None
        for f in model.model_fields.values():
            for inner in config._models_in(f.annotation):
                classes(inner, seen)
    return list(seen)


ALL = list(dict.fromkeys(c for recipe, _ in STAGES.values() for c in classes(recipe)))
SMALLEST: dict[str, dict[str, Any]] = {
    "tokenizer": {"stage": "tokenizer", "out": "o", "data": {"path": "x"}},
    "pretrain": {"stage": "pretrain", "out": "o", "data": {"path": "x"}, "model": {}},
    "sft": {"stage": "sft", "out": "o", "data": {"path": "x"}, "init_from": "m"},
    "grpo": {"stage": "grpo", "out": "o", "data": {"path": "x"}, "model": {}, "rewards": [{"kind": "exact"}]},
    "reward": {"stage": "reward", "objective": "classify", "out": "o", "data": {"path": "x"}, "model": {}},
    "ppo": {"stage": "ppo", "out": "o", "data": {"path": "x"}, "model": {}, "rewards": [{"kind": "exact"}]},
    "dpo": {"stage": "dpo", "out": "o", "data": {"path": "x"}, "init_from": "m"},
    "distill": {"stage": "distill", "out": "o", "data": {"path": "x"}, "model": {}, "teacher": "m"},
}


@pytest.mark.parametrize("cls", ALL, ids=lambda c: c.__name__)
def test_every_field_is_described(cls: type[BaseModel]) -> None:
    """Editors and the docs show these; a section is described by its class."""
    assert cls.__doc__ and "BaseModel" not in cls.__doc__ and issubclass(cls, Config)
    for name, f in cls.model_fields.items():
        assert f.description or config._models_in(f.annotation) or name == "stage", f"{cls.__name__}.{name}"


@pytest.mark.parametrize("cls", ALL, ids=lambda c: c.__name__)
def test_no_configuration_can_change(cls: type[BaseModel]) -> None:
    """Frozen, strict, no unknown keys, no NaN; defaults are what the field's own type allows."""
    got = {k: cls.model_config.get(k) for k in ("frozen", "strict", "extra", "allow_inf_nan")}
    assert got == {"frozen": True, "strict": True, "extra": "forbid", "allow_inf_nan": False}
    for name, f in cls.model_fields.items():
        assert not isinstance(f.default, list | dict | set), f"{cls.__name__}.{name}: a default that can be changed"
        assert f.default is not None or type(None) in typing.get_args(f.annotation), f"{cls.__name__}.{name}"


@pytest.mark.parametrize("stage", STAGES)
def test_dump_and_load_are_inverse(stage: str, write: Callable[..., Path]) -> None:
    """B53: what is written out is what is read again, defaults and all; so recipe.yaml of a run is its recipe."""
    recipe = validate(STAGES[stage][0], SMALLEST[stage])
    text = dump(recipe)
    assert load_recipe(write(text)) == recipe and dump(load_recipe(write(text))) == text
    assert set(yaml.safe_load(text)) == set(STAGES[stage][0].model_fields)


def shipped() -> Iterator[Path]:
    yield from sorted((Path(__file__).parent.parent / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("file", list(shipped()), ids=lambda f: "/".join(f.parts[-2:]))
def test_shipped_recipes_survive_a_round_trip(file: Path, write: Callable[..., Path]) -> None:
    if "stage:" in file.read_text("utf-8"):
        assert load_recipe(write(dump(load_recipe(file)))) == load_recipe(file)


def test_flatten() -> None:
    assert flatten({"a": {"b": 1}, "c": [2, {"d": 3}], "e": {}, "f": []}) == {
        "a.b": 1,
        "c.0": 2,
        "c.1.d": 3,
        "e": {},
        "f": [],
    }


def test_the_command_line_has_the_same_defaults() -> None:
    """B53: `generate` leaves out what isn't given, so SamplingConfig's defaults hold; its one own is that of samples.

    SamplingConfig's temperature is 1, which rollouts need to be on policy; text that people look at is drawn at 0.8, by
    `generate` as in `eval.samples`.
    """
    args = vars(build_parser().parse_args(["generate", "m", "--prompt", "p"]))
    assert not {k: v for k, v in args.items() if k in SamplingConfig.model_fields and v not in (None, [])}
    assert SampleConfig().temperature == TEMPERATURE == 0.8 and SamplingConfig().temperature == 1.0
    same = set(SamplingConfig.model_fields) - {"max_new_tokens", "temperature"}
    assert all(SamplingConfig.model_fields[n].default == SampleConfig.model_fields[n].default for n in same)
    commands = next(a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    assert set(SamplingConfig.model_fields) <= {a.dest for a in commands.choices["generate"]._actions}
