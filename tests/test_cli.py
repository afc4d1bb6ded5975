"""The command line itself: its commands, its help without torch, and configurations by name."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from caco_fast import __version__, cli, configs, pretrain
from caco_fast.cli import train
from caco_fast.config import load_config, settings_of
from caco_fast.errors import UserError


def program(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "caco_fast", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=60)


def test_a_reader_that_leaves_early_is_no_error(monkeypatch):
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Closed())
    assert cli.main(["train", "--config", "quickstart", "--print-config"]) == 0


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help_under_its_own_name(command, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main([command, "--help"])
    assert left.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: caco-fast {command} ")


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["--help"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown and help in shown for name, (_, help) in cli.COMMANDS.items())


def test_no_command_an_unknown_one_and_the_version(capsys):
    assert cli.main([]) == 2
    assert "commands:" in capsys.readouterr().err
    with pytest.raises(SystemExit) as left:
        cli.main(["trian"])
    assert left.value.code == 2 and "'trian'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"caco-fast {__version__}\n"


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["train", "--list-configs"]], ids=" ".join)
def test_help_and_the_listing_need_no_torch(arguments, tmp_path):
    """A module named torch that cannot be imported lies in the working folder, which `python -m` looks into first."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    done = program(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout


def test_the_listing_has_a_line_for_each_configuration(capsys):
    assert train.main(["--list-configs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [path.stem for path in sorted(configs.FOLDER.glob("*.yaml"))]
    for path in configs.FOLDER.glob("*.yaml"):
        assert path.read_text().startswith("# "), f"{path.name}: the first comment says what it is"
    assert all(len(line.split()) > 4 for line in lines)


def test_settings_may_stand_on_both_sides_of_an_option(capsys):
    assert train.main(["trainer.epochs=3", "--config", "quickstart", "--print-config", "trainer.batch_size=64"]) == 0
    shown = capsys.readouterr().out
    assert "  epochs: 3 " in shown and "  batch_size: 64 " in shown


def test_a_mistyped_configuration_gets_one_line_with_the_nearest(capsys):
    assert train.main(["--config", "configs/quickstart.yaml"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: --config configs/quickstart.yaml: found no such file, ")
    assert printed.endswith("the nearest name is quickstart\n") and printed.count("\n") == 1


def test_only_one_rank_of_a_machine_says_what_is_wrong(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert train.main(["--config", "quikstart"]) == 2
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", configs.shipped())
def test_a_shipped_name_works_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = configs.FOLDER / f"{name}.yaml"
    assert configs.find_config(name) == configs.find_config(f"{name}.yaml") == file
    assert load_config(name) == load_config(file)


def test_a_file_has_priority_and_a_folder_has_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").mkdir()
    assert configs.find_config("quickstart") == configs.FOLDER / "quickstart.yaml"
    (tmp_path / "quickstart.yaml").write_text("trainer: {epochs: 7}")
    assert load_config("quickstart.yaml").trainer.epochs == 7
    assert load_config("quickstart").trainer.epochs == 12


def test_a_base_is_a_file_next_to_it_or_a_shipped_name(tmp_path):
    mine = tmp_path / "mine.yaml"
    for base in ("quickstart", "quickstart.yaml"):
        mine.write_text(f"base: {base}\ntrainer: {{epochs: 2}}")
        found, shipped = settings_of(load_config(mine)), settings_of(load_config("quickstart"))
        assert {key for key in found if found[key] != shipped[key]} == {"trainer.epochs"}
    (tmp_path / "quickstart.yaml").write_text("trainer: {batch_size: 32}")
    assert load_config(mine).trainer.batch_size == 32
    mine.write_text("base: imagenet_resnet50")
    with pytest.raises(UserError, match=r"mine\.yaml: base: imagenet_resnet50: .* nearest name is imagenet_resnet50_"):
        load_config(mine)


@pytest.mark.slow
def test_the_module_trains_in_another_folder(tmp_path):
    settings = ["trainer.max_steps=2", "caco.bank_size=256", "evaluation.every_epochs=0", "evaluation.baselines=false"]
    settings.append("run.report=false")
    arguments = ["train", "evaluation.linear_probe=false", "--config", "quickstart", *settings]
    done = program(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "runs" / "quickstart" / "summary.json").read_text())["steps"] == 2


def test_the_home_folder_is_meant_by_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "first.yaml").write_text("trainer: {epochs: 2}")
    (tmp_path / "second.yaml").write_text("base: ~/first.yaml\nrun: {folder: ~/runs/a}")
    assert load_config("~/second.yaml").trainer.epochs == 2
    called = []
    monkeypatch.setattr("caco_fast.training.train", lambda *arguments: called.append(arguments[1:]))
    assert train.main(["--config", "~/second.yaml", "--resume", "~/a.pt"]) == 0
    pretrain("quickstart", out="~/runs/b", resume="~/b.pt")
    assert [given[:2] for given in called] == [
        (tmp_path / f"runs/{name}", str(tmp_path / f"{name}.pt")) for name in "ab"
    ]


def test_training_without_a_configuration_says_so(capsys):
    assert train.main([]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: --config: found none, ") and line.count("\n") == 1
