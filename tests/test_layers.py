"""The imports between the parts: a lower layer never imports a higher one, nor does a part another of its layer."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "caco_fast"

# Lowest first. Parts of the ground layer may use each other; parts of any other layer may not.
GROUND = (
    "apex",
    "benchmarking",
    "configs",
    "distributed",
    "errors",
    "host",
    "provenance",
    "settings",
    "settings_tree",
    "storage",
    "typed_yaml",
)
LAYERS = (
    GROUND,
    ("ops",),
    ("bank", "selftest"),
    ("data", "models", "optim"),
    ("methods",),
    ("evaluate",),
    ("engine",),
    ("config",),
    ("pretrained",),
    ("build", "scale"),
    ("protocols", "export"),
    ("evaluation", "embed"),
    ("report",),
    ("figures",),
    ("training",),
    ("cli", "api"),
    ("__main__",),
)
# What `import caco_fast` reaches: its face loads bank and methods when their names are used.
FACE = "methods"
LEVEL = {part: level for level, layer in enumerate(LAYERS) for part in layer}
MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")
MODULES += sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.glob("*/__init__.py"))


def imports(source: str) -> Iterator[str]:
    """Dotted names of all that a module imports, also inside of functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)


def part_of(module: str) -> str:
    """bank/learnable.py -> bank, config.py -> config"""
    return module.split("/")[0].removesuffix(".py")


def violations(module: str, source: str) -> list[str]:
    part, found = part_of(module), []
    for name in imports(source):
        if name.startswith("."):
            found.append(f"{name} is relative")
        root, _, rest = name.partition(".")
        other = rest.split(".")[0]
        # The compiled kernels belong to no layer.
        if root != "caco_fast" or other in (part, "_C"):
            continue
        free = part in GROUND and other in GROUND
        if LEVEL.get(other, LEVEL[FACE]) >= LEVEL[part] and not free:
            found.append(f"{name} is no lower than {part}")
    return found


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_downwards(module: str) -> None:
    assert part_of(module) in LEVEL, f"{part_of(module)} has no layer yet: give it one here and in CONTRIBUTING"
    assert violations(module, (PACKAGE / module).read_text()) == []


@pytest.mark.parametrize(
    "module, source",
    [
        ("ops/tiling.py", "from caco_fast.bank import LearnableBank"),
        ("data/views/pil.py", "import caco_fast.models"),
        ("bank/memory.py", "def f():\n    from caco_fast.engine.trainer import Trainer"),
        ("models/encoder.py", "from . import backbone"),
        ("errors.py", "from caco_fast import config"),
        ("provenance.py", "import caco_fast"),
        ("provenance.py", "from caco_fast import __version__"),
        ("data/views/pil.py", "import torch, caco_fast as package"),
    ],
)
def test_the_rule_sees_a_violation(module: str, source: str) -> None:
    assert len(violations(module, source)) == 1


@pytest.mark.parametrize("module", [module for module in MODULES if module.startswith("ops/")])
def test_ops_knows_torch_the_machine_and_the_kernels_only(module: str) -> None:
    for name in imports((PACKAGE / module).read_text()):
        root, _, rest = name.partition(".")
        if root == "caco_fast":
            assert rest.split(".")[0] in ("ops", "errors", "host", "_C"), name
        else:
            assert root == "torch" or root in sys.stdlib_module_names, name


def test_nothing_imports_tools_or_tests() -> None:
    for module in MODULES:
        for name in imports((PACKAGE / module).read_text()):
            assert name.split(".")[0] not in ("tools", "tests"), f"{module}: {name}"


def loaded_after(statements: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after these imports."""
    script = f"{statements}\nimport json, sys; print(json.dumps([n for n in sys.modules if '.' not in n]))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_import_of_the_package_loads_nothing_heavy() -> None:
    assert not loaded_after("import caco_fast") & {"torch", "timm", "matplotlib", "omegaconf", "rich"}


def test_import_of_bank_and_ops_loads_torch_alone() -> None:
    loaded = loaded_after("import caco_fast.ops, caco_fast.bank")
    assert "torch" in loaded
    assert not loaded & {"timm", "torchvision", "matplotlib", "omegaconf", "rich", "tensorboard"}


def test_no_import_touches_cuda() -> None:
    script = "import caco_fast.training, torch; print(torch.cuda.is_initialized())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr
