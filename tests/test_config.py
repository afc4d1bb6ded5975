"""The configuration: files, overrides, and the line that each mistake gets."""

import dataclasses
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from caco_fast.config import config_class, describe, flat_settings, load_config, settings_of, to_yaml
from caco_fast.data import ViewConfig
from caco_fast.errors import UserError
from caco_fast.methods import METHODS
from caco_fast.settings import setting

CONFIGS = sorted((Path(__file__).resolve().parents[1] / "caco_fast" / "configs").glob("*.yaml"))


def fields_with_owner(kind: Any, owner: str = "") -> Iterator[tuple[str, dataclasses.Field]]:
    for f in dataclasses.fields(kind):
        yield f"{owner}{f.name}", f
        value = getattr(kind() if isinstance(kind, type) else kind, f.name)
        for item in value if isinstance(value, list) else [value]:
            if dataclasses.is_dataclass(item):
                yield from fields_with_owner(item, f"{owner}{f.name}.")


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(text: str, name: str = "mine.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def error_of(path: Path | None, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        load_config(path, overrides)
    line = str(error.value)
    assert "\n" not in line
    return line


def test_there_are_configs() -> None:
    assert {"quickstart", "cifar10_resnet18", "imagenet_resnet50_200ep_batch1024"} <= {path.stem for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_loads_and_comes_back_from_its_own_text(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    assert config.method in METHODS
    for text in (to_yaml(config), describe(config)):
        (tmp_path / "again.yaml").write_text(text)
        assert load_config(tmp_path / "again.yaml") == config
    assert pickle.loads(pickle.dumps(config)) == config


@pytest.mark.parametrize(
    "name, settings",
    [
        ("imagenet_resnet50_200ep_batch1024", {"trainer.epochs": 200, "trainer.batch_size": 1024}),
        ("imagenet_resnet50_200ep_batch4096", {"trainer.epochs": 200, "trainer.batch_size": 4096}),
        ("imagenet_resnet50_800ep_batch4096", {"trainer.epochs": 800, "trainer.batch_size": 4096}),
        ("imagenet_resnet50_multicrop_800ep_batch2048", {"trainer.epochs": 800, "trainer.batch_size": 2048}),
    ],
)
def test_published_recipe(name: str, settings: dict[str, Any]) -> None:
    """docs/method.md, CaCo: recipe; no default of the code may change it unseen."""
    found = settings_of(load_config(next(path for path in CONFIGS if path.stem == name)))
    wanted = {
        **settings,
        **{"backbone.name": "resnet50", "backbone.stem": "imagenet"},
        **{"projector.layers": 3, "projector.hidden": 2048, "projector.dim": 256, "projector.bias": False},
        **{"caco.bank_size": 65536, "caco.bank_lr": 3.0, "caco.bank_momentum": 0.9, "caco.norm": "implicit"},
        **{"caco.temperature": 0.08, "caco.bank_temperature": 0.08, "caco.warm_start_temperature": 0.2},
        **{"caco.warm_start_steps": 0, "optimizer.name": "lars", "optimizer.lr": 0.3, "optimizer.scale_lr": True},
        **{"optimizer.momentum": 0.9, "optimizer.weight_decay": 1.5e-6, "optimizer.trust": 0.001},
        **{"schedule.warmup_epochs": 10.0, "schedule.final_ratio": 0.01, "schedule.key_momentum": 0.99},
        **{"schedule.key_momentum_rises": True, "schedule.per": "epoch", "caco.warm_start_key_momentum": 0.999},
        **{"views.0.size": 224, "views.0.blur_p": 1.0, "views.0.solarize_p": 0.0, "views.0.blur_sigma": (0.1, 2.0)},
        **{"views.1.size": 224, "views.1.blur_p": 0.1, "views.1.solarize_p": 0.2, "views.1.grey_p": 0.2},
        **{"views.0.jitter_p": 0.8, "views.0.brightness": 0.4, "views.0.contrast": 0.4, "views.0.saturation": 0.2},
        **{"views.0.hue": 0.1, "views.0.flip_p": 0.5, "views.0.scale": (0.2, 1.0), "views.1.scale": (0.2, 1.0)},
    }
    if "multicrop" in name:
        crops = {"count": 2, "size": 224, "scale": (0.14, 1.0)}, {"count": 6, "size": 96, "scale": (0.05, 0.14)}
        colours = {"jitter_p": 0.8, "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "grey_p": 0.2}
        for i, crop in enumerate(crops):
            view = crop | colours | {"blur_p": 0.5, "blur_sigma": (0.1, 2.0), "solarize_p": 0.0, "flip_p": 0.5}
            wanted |= {f"views.{i}.{name}": value for name, value in view.items()}
        assert "views.2.size" not in found
    assert {key: found[key] for key in wanted} == wanted


def test_describe_lists_every_setting_with_its_help() -> None:
    config = load_config(None)
    lines = describe(config).splitlines()
    for name, f in fields_with_owner(config):
        leaf = name.rsplit(".", 1)[-1]
        mine = [
            line for line in lines if line.strip().lstrip("- ").startswith(f"{leaf}:") and f.metadata["help"] in line
        ]
        assert mine, f"{name} is not shown with its help"


def test_every_field_has_one_line_of_help() -> None:
    for name, f in fields_with_owner(config_class()):
        help = f.metadata.get("help", "")
        assert help.strip() and "\n" not in help, f"{name} has no help"


def test_override_changes_one_setting_and_nothing_else() -> None:
    before, after = settings_of(load_config(CONFIGS[0])), settings_of(load_config(CONFIGS[0], ["optimizer.lr=1e-3"]))
    assert {key for key in before if before[key] != after[key]} == {"optimizer.lr"}
    assert after["optimizer.lr"] == 0.001


@pytest.mark.parametrize(
    "override, key, value",
    [
        ("views.0.size=160", "views.0.size", 160),
        ("views.0.scale=[0.1,1]", "views.0.scale", (0.1, 1.0)),
        ("trainer.precision=f32", "trainer.precision", "f32"),
        ("trainer.joint_views=on", "trainer.joint_views", "on"),
        ("caco.bank_size=37268", "caco.bank_size", 37268),
        ("schedule.key_momentum_rises=false", "schedule.key_momentum_rises", False),
        ("data.eval_size=null", "data.eval_size", None),
        ("data.path=/a b/c=d:e", "data.path", "/a b/c=d:e"),
        ("run.folder=", "run.folder", ""),
        ("evaluation.k=[1,2]", "evaluation.k", [1, 2]),
        ("backbone.options={layers: [1, 1, 1, 1]}", "backbone.options", {"layers": [1, 1, 1, 1]}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_overrides(override: str, key: str, value: Any) -> None:
    assert settings_of(load_config(None, [override]))[key] == value


def test_the_last_override_wins_over_the_file(write: Any) -> None:
    path = write("trainer: {epochs: 3}\n")
    assert load_config(path).trainer.epochs == 3
    assert load_config(path, ["trainer.epochs=4", "trainer.epochs=5"]).trainer.epochs == 5


def test_views_of_a_file_replace_the_default_and_take_overrides(write: Any) -> None:
    path = write("views: [{size: 96}, {count: 6, size: 32}]\n")
    config = load_config(path, ["views.1.count=4"])
    assert config.views == [ViewConfig(size=96), ViewConfig(count=4, size=32)]
    assert "did you mean 'views.0.size'?" in error_of(path, "views.1.sise=3")


def test_a_base_is_changed_by_the_file_on_top_of_it(write: Any) -> None:
    write("trainer: {epochs: 3, batch_size: 8}\n", "first.yaml")
    write("base: first.yaml\ntrainer: {epochs: 4}\n", "second.yaml")
    path = write("base: second.yaml\nmethod: moco\n")
    config = load_config(path)
    assert (config.method, config.trainer.epochs, config.trainer.batch_size) == ("moco", 4, 8)


@pytest.mark.parametrize(
    "override, line",
    [
        ("optimiser.lr=1", "argument 'optimiser.lr=1': unknown setting 'optimiser'; did you mean 'optimizer'?"),
        ("optimizer.Ir=1", "unknown setting 'optimizer.Ir'; did you mean 'optimizer.lr'?"),
        ("caco.momentum=1", "unknown setting 'caco.momentum'; did you mean 'caco.bank_momentum'?"),
        ("epochs=3", "unknown setting 'epochs'; did you mean 'trainer.epochs'?"),
        ("zzzz=1", "unknown setting 'zzzz'; --print-config lists every setting"),
        ("optimizer.lr=fast", 'optimizer.lr: found "fast", expected a number'),
        ("optimizer.lr=not in use", 'optimizer.lr: found "not in use", expected a number'),
        ("trainer.epochs=1.5", "trainer.epochs: found 1.5, expected a whole number"),
        ("trainer.epochs=", 'trainer.epochs: found "", expected a whole number'),
        ("caco.bank_size=null", "caco.bank_size: found null, expected a whole number"),
        ("run.folder=null", "argument 'run.folder=null': run.folder: found null, expected text"),
        ("optimizer=lars", 'optimizer: found "lars", expected a group of settings'),
        ("views.3.size=3", "views[3]: a group of settings is expected there, or its list is not that long"),
        ("views.0.scale=[0.1]", "views[0].scale: found [0.1], expected a list of 2 numbers"),
        ("views=[{size: big}]", "size: found 'big', expected a whole number"),
        ("data.mean=[grey]", 'data.mean[0]: found "grey", expected a number'),
        ("data.eval_size=big", 'data.eval_size: found "big", expected a whole number or null'),
        ("schedule.key_momentum_rises=maybe", 'found "maybe", expected true or false'),
        ("trainer.epochs=???", "trainer.epochs: ??? is no value"),
        ("optimizer.lr", "argument 'optimizer.lr': expected key=value, e.g. optimizer.lr=0.1"),
        ("=3", "argument '=3': expected key=value"),
        ("data.mean=[", "argument 'data.mean=[': the value is not valid YAML"),
        ("backbone.options={strict: on}", "backbone.options.strict: found on, expected true or"),
        ("method=cocoa", "method: found 'cocoa', expected one of caco, "),
        ("run.folder=${nowhere}", "run.folder: ${...} refers to another setting's value"),
    ],
)
def test_a_bad_override_is_named(override: str, line: str) -> None:
    assert line in error_of(None, override)


@pytest.mark.parametrize(
    "text, line",
    [
        ("optimizer: {lrr: 1}", "unknown setting 'optimizer.lrr'; did you mean 'optimizer.lr'?"),
        ("optimiser: {lr: 1}", "unknown setting 'optimiser'; did you mean 'optimizer'?"),
        ("trainer: {epochs: many}", 'trainer.epochs: found "many", expected a whole number'),
        ("trainer: [1, 2]", "[1, 2]: a group of settings is expected there"),
        ("- 1", "found a list, expected a mapping of settings"),
        ("trainer: {epochs: 1", "not valid YAML"),
        ("trainer: {epochs: 1}\nrun: {plain: yes}\ntrainer: {seed: 1}", "trainer: found in line 1 and in line 3"),
        ("views: [{size: 8, size: 9}]", "views[0].size: found in line 1 and in line 1, expected once"),
        ("trainer: !!python/name:os.system x", "trainer: found the tag tag:yaml.org,2002:python/name:os.system"),
        ("views: &a [*a]", "not valid YAML: a part of it contains itself"),
        ("base: none.yaml", "base: none.yaml: found no such file, expected"),
        ("base: mine.yaml", "is its own base"),
    ],
)
def test_a_bad_file_is_named(write: Any, text: str, line: str) -> None:
    path = write(text)
    found = error_of(path)
    assert line in found and str(path.parent) in found


def test_a_missing_file_a_folder_and_a_binary_file_are_named(tmp_path: Path) -> None:
    assert error_of(tmp_path / "none.yaml").startswith(f"--config {tmp_path}/none.yaml: found no such file, ")
    assert error_of(tmp_path) == f"--config {tmp_path}: Is a directory"
    (tmp_path / "image.yaml").write_bytes(b"\xff\xd8\xff\xe0")
    assert "not valid YAML" in error_of(tmp_path / "image.yaml")


def test_an_empty_file_gives_the_defaults(write: Any) -> None:
    assert load_config(write("")) == load_config(None) == config_class()()


def test_settings_of_another_version_are_compared_by_name() -> None:
    text = "trainer: {epoch: 3}\nviews: [{size: 8}, {size: 4}]\nevaluation: {k: [1, 2]}"
    wanted = {"trainer.epoch": 3, "views.0.size": 8, "views.1.size": 4, "evaluation.k": [1, 2]}
    assert flat_settings(yaml.safe_load(text)) == wanted


def test_a_mutable_default_is_copied_for_every_instance() -> None:
    @dataclasses.dataclass
    class Mine:
        items: list[int] = setting([1], "numbers")

    Mine().items.append(2)
    assert Mine().items == [1]


def test_an_empty_mapping_clears_the_options_of_a_file(write: Any) -> None:
    quickstart = next(path for path in CONFIGS if path.stem == "quickstart")
    config = load_config(quickstart, ["backbone.name=vit_tiny_patch16_224", "backbone.options={}"])
    assert config.backbone.options == {}
    config = load_config(write("base: quickstart\nbackbone: {name: vit_tiny_patch16_224, options: {}}\ntrainer: {}\n"))
    assert config.backbone.options == {}
    assert config.trainer.epochs == 12


def test_an_unknown_method_is_named_before_its_section(write: Any) -> None:
    for line in (error_of(None, "cocoa.size=3", "method=cocoa"), error_of(write("cocoa: {size: 3}\nmethod: cocoa"))):
        assert line.startswith("method: found 'cocoa', expected one of caco, ")
    assert load_config(write("method: cocoa"), ["method=moco"]).method == "moco"
