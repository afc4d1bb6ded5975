"""The evaluation as its user meets it: settings that follow from the source, results as JSON, what is done again."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from caco_fast import evaluation
from caco_fast.cli.evaluate import main
from caco_fast.errors import UserError
from caco_fast.evaluation import evaluate, load_settings, markdown, read_results
from caco_fast.pretrained import open_source
from caco_fast.training import train
from tests.engine.tiny_run import config, write_images

ROOT = Path(__file__).resolve().parents[1]
SMALL = ("knn.k=[5]", "device=cpu", "cpu_threads=1")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two steps on 40 images, with 10 to evaluate on."""
    place = tmp_path_factory.mktemp("run")
    train(config(write_images(place / "images"), "trainer.max_steps=2", "evaluation.every_epochs=0"), place / "small")
    return place / "small"


def test_a_run_is_evaluated_on_its_own_data(run: Path) -> None:
    found = evaluate(str(run), ["knn"], SMALL)["knn"]
    record = json.loads((run / "evaluation" / "knn.json").read_text())
    assert record["metrics"] == found["metrics"]
    assert record["headline"] == next(iter(found["metrics"]))
    assert record["source"]["kind"] == "run" and record["source"]["step"] == 2
    assert record["settings"]["data.source"] == "folder"
    assert record["settings"]["knn.k"] == [5]
    assert torch.__version__.startswith(record["versions"]["torch"])
    assert 0 <= next(iter(record["metrics"].values())) <= 100


def test_the_same_evaluation_is_not_done_twice(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = evaluate(str(run), ["knn"], SMALL)["knn"]
    calls = []
    entry = evaluation.PROTOCOLS["knn"]
    counted = type(entry)(lambda *given: calls.append(0) or entry.run(*given), entry.config, entry.help)
    monkeypatch.setitem(evaluation.PROTOCOLS, "knn", counted)
    assert evaluate(str(run), ["knn"], SMALL)["knn"] == first
    # Another number of threads finds the same.
    assert evaluate(str(run), ["knn"], (*SMALL[:-1], "cpu_threads=2"))["knn"] == first
    assert not calls
    evaluate(str(run), ["knn"], (*SMALL, "again=true"))
    evaluate(str(run), ["knn"], (*SMALL, "knn.k=[6]"))
    assert len(calls) == 2


def test_a_damaged_result_is_measured_anew(run: Path) -> None:
    first = evaluate(str(run), ["knn"], SMALL)["knn"]
    path = run / "evaluation" / "knn.json"
    path.write_text(path.read_text()[:100])
    assert evaluate(str(run), ["knn"], SMALL)["knn"]["metrics"] == first["metrics"]


def test_defaults_follow_from_the_run(run: Path) -> None:
    source = open_source(str(run))
    own = load_settings([], source)
    assert source.config is not None and own.data.path == source.config.data.path
    assert (own.data.source, own.data.eval_size, own.precision) == ("folder", None, "f32")
    other = load_settings(["data.source=cifar10", "data.path=there"], source)
    assert (other.data.source, other.data.path) == ("cifar10", "there")


def test_files_of_other_weights_are_cropped_as_published() -> None:
    source = open_source("random:resnet18")
    data = load_settings(["data.path=there"], source).data
    assert (data.eval_resize, data.eval_size) == (256, 224)
    data = load_settings(["data.path=there", "data.eval_size=192"], source).data
    assert (data.eval_resize, data.eval_size) == (256, 192)
    assert load_settings(["data.source=cifar10", "data.path=there"], source).data.eval_size is None


def test_the_table_shows_results_beside_published_ones(run: Path) -> None:
    evaluate(str(run), ["knn"], SMALL)
    results = read_results(run / "evaluation")
    shown = markdown(results)
    assert shown.splitlines()[2].startswith("| knn | top1_k5")
    results["knn"]["published"] = [{"who": "CaCo", "value": 70.9, "where": "Table I"}]
    results["knn"]["standard_error"] = 0.94
    assert "± 0.9 | 70.9 CaCo |" in markdown(results)


def test_two_ranks_find_the_same_as_one(run: Path, tmp_path: Path) -> None:
    alone = evaluate(str(run), ["knn"], (*SMALL, f"out={tmp_path / 'alone'}"))["knn"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(ROOT / "tools" / "evaluate.py"), str(run), "knn", *SMALL, f"out={tmp_path / 'two'}"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "two" / "knn.json").read_text())["metrics"] == alone["metrics"]


@pytest.mark.parametrize(
    "arguments, line",
    [
        ([], "SOURCE: found none"),
        (["knn.k=[5]"], "SOURCE: found none"),
        (["random:resnet18"], "PROTOCOL: found none"),
        (["random:resnet18", "kn"], "protocol: found 'kn', expected one of"),
        (["random:resnet18", "knn", "knn"], "PROTOCOL: found knn twice"),
        (["random:resnet18", "knn", "knn.temperature=0.1"], "unknown setting 'knn.temperature'; did you mean"),
        (["random:resnet18", "knn", "precision=f8"], "precision: found 'f8', expected one of auto, f32"),
        (["random:resnet18", "knn", "device=cuda:7"], "device: found 'cuda:7', but torch"),
        (["random:resnet18", "knn", "device=cpu", "precision=fp16"], "precision: fp16 needs a GPU"),
        (["random:resnet18", "knn"], "data.path: found nothing"),
        (["nowhere", "knn"], "nowhere"),
        (["random:resnet18", "knn", "data.path=/nowhere"], "data.path: /nowhere doesn't exist"),
        (["--table", "nowhere"], "--table nowhere: found no results"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    if "cuda:7" in str(arguments) and torch.cuda.is_available():
        pytest.skip("for a machine without a GPU")
    assert main(arguments) == 2
    errors = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error:")]
    assert len(errors) == 1 and line in errors[0], errors


def test_pickled_classes_are_loaded_only_if_trusted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = open_source("random:resnet18").backbone.state_dict()
    torch.save({"state_dict": weights, "args": argparse.Namespace(lr=1)}, tmp_path / "w.pth")
    images = write_images(tmp_path / "images", train=4, test=2)
    arguments = [str(tmp_path / "w.pth"), "knn", "backbone.name=resnet18", f"data.path={images}", f"out={tmp_path}"]
    assert main(arguments) == 2
    assert "holds a argparse.Namespace, whose loading could run code" in capsys.readouterr().err
    assert main([*arguments, "--trust", "data.workers=0", "knn.k=[3]", "device=cpu"]) == 0


def test_help_and_settings_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    assert "knn" in capsys.readouterr().out
    assert main(["--print-config"]) == 0
    shown = capsys.readouterr().out
    assert "knn:" in shown and "# numbers of neighbours that vote" in shown


def test_a_folder_that_can_not_be_made_is_one_line(run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="out: can't make"):
        evaluate(str(run), ["knn"], (*SMALL, f"out={tmp_path / 'file' / 'in'}"))
