"""Settings are read by their type: alone on a command line, and in a file."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from caco_fast.config import load_config, to_yaml
from caco_fast.errors import UserError
from caco_fast.settings import setting
from caco_fast.typed_yaml import read, read_argument

# Texts that YAML 1.1 or Python would take for something else.
TEXTS = ("20240501_1230", "1.10", "off", "on", "no", "yes", "true", "010", "1e-1", "1:30", "2024-05-01", "~/runs", ".5")
# What a command line may hold besides, and a file only in quotes.
BARE = ("/d/run #3", "[1", "{a}", "a: b", "- 1", " padded ", "*", "%x", "it's", "'", "~", "\\n")


@dataclass(frozen=True)
class Inner:
    name: str = setting("", "text")
    rate: float = setting(0.0, "number")


@dataclass(frozen=True)
class Outer:
    inner: Inner = field(default_factory=Inner)
    many: list[Inner] = setting([], "a list of sections")
    names: list[str] = setting([], "texts")
    options: dict[str, Any] = setting({}, "anything")
    switch: bool = setting(False, "switch")
    count: int | None = setting(None, "whole number")


@pytest.mark.parametrize("kind", [str, str | None])
@pytest.mark.parametrize("text", TEXTS + BARE)
def test_text_is_taken_as_it_is_on_a_command_line(kind: Any, text: str) -> None:
    assert read_argument(text, kind) == text


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_taken_as_it_is_in_a_file(text: str) -> None:
    found = read(f"inner: {{name: {text}}}\nmany: [{{name: {text}}}]\nnames: [{text}, x]", Outer)
    assert found == {"inner": {"name": text}, "many": [{"name": text}], "names": [text, "x"]}


def test_quotes_around_a_whole_text_are_those_of_yaml() -> None:
    assert read_argument('"null"', str | None) == "null"
    assert read_argument("'a #b'", str) == "a #b"
    assert read_argument("null", str | None) is None
    assert read_argument("", str) == ""


@pytest.mark.parametrize("kind", [float, float | None])
@pytest.mark.parametrize(
    "text, value", [("1e-1", 0.1), ("1E5", 1e5), ("010", 10), ("-.5", -0.5), ("3", 3), (".inf", float("inf"))]
)
def test_a_number_is_decimal(kind: Any, text: str, value: float) -> None:
    assert read_argument(text, kind) == read(f"inner: {{rate: {text}}}", Outer)["inner"]["rate"] == value


@pytest.mark.parametrize("text, value", [("1_000", 1000), ("0x10", 16), ("1:30", "1:30"), ("null", None), ("~", None)])
def test_a_whole_number(text: str, value: Any) -> None:
    assert read_argument(text, int | None) == read(f"count: {text}", Outer)["count"] == value


@pytest.mark.parametrize("word, value", [("on", True), ("Yes", True), ("true", True), ("off", False), ("no", False)])
def test_a_switch_takes_the_words_of_yaml(word: str, value: bool) -> None:
    assert read_argument(word, bool) is read(f"switch: {word}", Outer)["switch"] is value


def test_options_of_any_type_take_numbers_truth_values_and_text() -> None:
    text = "{rate: 1e-1, deep: [010, {x: true}], kind: 20240501_1230, none: null, quoted: 'off', on: 1}"
    wanted = {"rate": 0.1, "deep": [10, {"x": True}], "kind": "20240501_1230", "none": None, "quoted": "off", "on": 1}
    assert read_argument(text, dict[str, Any]) == read(f"options: {text}", Outer)["options"] == wanted


def test_options_of_any_type_refuse_a_word_that_may_be_either() -> None:
    with pytest.raises(UserError, match="^options.a.b: found off, expected true or false, or 'off' in quotes as text$"):
        read("options: {a: {b: off}}", Outer)


def test_anchors_and_merged_mappings_stay() -> None:
    text = "inner: &a {name: off, rate: 1}\nmany: [*a, {<<: *a, rate: 2}, {name: x, <<: [*a]}]"
    inner = {"name": "off", "rate": 1}
    assert read(text, Outer)["many"] == [inner, {**inner, "rate": 2}, {**inner, "name": "x"}]


def test_retyped_settings_reach_the_configuration(tmp_path: Any) -> None:
    settings = ["run.folder=20240501_1230", "wandb.name=1.10", "data.path=/d/run #3", "wandb.mode=off"]
    config = load_config(None, [*settings, "trainer.joint_views=on", "backbone.options={drop_path_rate: 1e-1}"])
    found = (config.run.folder, config.wandb.name, config.data.path, config.wandb.mode, config.trainer.joint_views)
    assert found == ("20240501_1230", "1.10", "/d/run #3", "off", "on")
    assert config.backbone.options == {"drop_path_rate": 0.1}
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "again.yaml") == config
