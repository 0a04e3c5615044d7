"""The imports point one way: command line, stages, then data, objectives and evals, then models."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "selfray"

# Part of the package -> parts that it may import. A part is a module or a folder of modules, and
# the longest name that fits is the part of a module. Each may import itself and `errors`.
METHOD = {"distributed", "data", "models", "objectives", "evals"}
RUN = {
    "config", "checkpoint", "run_directory", "initialise", "probe", "run_encoder", "run_loop",
}  # fmt: skip
FEATURES = {"feature_directory", "inference", "pixel_baselines"}
STAGES = {
    "data.phantom", "data.ingest", "pretrain", "pretrain_language", "preview", "features",
    "evaluate", "generate", "summary", "export",
}  # fmt: skip
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "progress": set(),
    "config": set(),
    "recipes": {"config"},
    "distributed": set(),
    "data": {"progress"},
    "data.phantom": {"data", "progress"},
    "data.ingest": {"data", "progress"},
    "models": {"data", "distributed"},
    "objectives": {"models", "distributed"},
    "evals": {"models", "progress"},
    "evals.report_training": {"evals", "models", "progress", "data", "checkpoint"},
    "report_config": set(),
    "checkpoint": {"data"},
    "run_directory": {"config", "checkpoint", "data"},
    "initialise": {"config", "models", "objectives"},
    "probe": {"config", "data", "evals", "models", "objectives"},
    "run_loop": METHOD | RUN | {"progress"},
    "run_encoder": {"run_directory", "data", "models", "objectives"},
    "pretrain": METHOD | RUN | {"progress"},
    "pretrain_language": METHOD | RUN | {"progress"},
    "preview": METHOD | {"config", "pretrain", "pretrain_language", "run_loop"},
    "feature_directory": {"data"},
    "inference": {"models"},
    "pixel_baselines": {"data"},
    "features": METHOD | FEATURES | {"progress"},
    "evaluate": METHOD
    | {
        "features",
        "feature_directory",
        "progress",
        "report_config",
        "data.phantom",
        "evals.report_training",
    },
    "generate": {"evals", "models"},
    "summary": METHOD | RUN | {"feature_directory", "evaluate"},
    "export": {"models"},
    "field_options": {"config", "recipes", "report_config"},
    "cli": STAGES | {"config", "field_options", "recipes", "models"},
    "rad_dino": {"models"},
    "sklearn": {"models"},
    "__main__": {"cli"},
}
MODULES = sorted(PACKAGE.rglob("*.py"))


def _name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def _imported(path: Path) -> set[str]:
    """Every absolute name that a file imports, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            module = node.module or ""
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return names


def _part(module: str) -> str:
    fitting = [part for part in ALLOWED if f"{module}.".startswith(f"{part}.")]
    assert fitting, (
        f"selfray.{module} belongs to no part: add it to ALLOWED, and to ARCHITECTURE.md"
    )
    return max(fitting, key=len)


def _known(name: str) -> str | None:
    """The module of the package that a dotted name is, or None."""
    module = name.removeprefix("selfray.")
    path = PACKAGE.joinpath(*module.split("."))
    is_module = path.with_suffix(".py").exists() or (path / "__init__.py").exists()
    return module if name.startswith("selfray.") and is_module else None


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_imports_point_one_way(path: Path) -> None:
    if not _name(path):
        assert not {name for name in _imported(path) if name.startswith("selfray")}
        return
    part = _part(_name(path))
    for name in _imported(path):
        module = _known(name)
        # `from selfray.data import dataset` names the folder and the module; the module counts.
        if module is None or any(_known(n) and n.startswith(f"{name}.") for n in _imported(path)):
            continue
        assert _part(module) in ALLOWED[part] | {part, "errors"}, f"{part} imports selfray.{module}"


@pytest.mark.parametrize(
    ("folder", "unwanted"), [("data", "torch.nn"), ("objectives", "selfray.data")]
)
def test_a_part_does_not_know(folder: str, unwanted: str) -> None:
    for path in (PACKAGE / folder).rglob("*.py"):
        guilty = {name for name in _imported(path) if f"{name}.".startswith(f"{unwanted}.")}
        assert not guilty, path


def test_nothing_is_unpickled() -> None:
    for path in MODULES:
        unwanted = {"joblib", "dill", "torch.load"}
        unwanted |= {"pickle"} if path.name != "weights_file.py" else set()
        assert not _imported(path) & unwanted, path
        calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        guilty = [c for c in calls if ast.unparse(c.func) in {"torch.load", "torch.save"}]
        if path.name == "weights_file.py":  # the one place where publishers' files are read
            guilty = [c for c in guilty if "weights_only=True" not in ast.unparse(c)]
        assert not guilty, path


def test_every_imported_package_is_a_declared_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    optional = [line for name, lines in extras.items() if name != "dev" for line in lines]
    declared = {_normal(d) for d in [*project["dependencies"], *optional]}
    distributions = importlib.metadata.packages_distributions()
    for path in MODULES:
        for name in {name.split(".")[0] for name in _imported(path)}:
            if name in sys.stdlib_module_names or name in {"selfray", "tensorboard"}:
                continue
            owners = {_normal(owner) for owner in distributions.get(name, [name])}
            assert owners & declared, f"{path} imports {name}, which pyproject.toml does not name"


def _normal(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0].lower().replace("_", "-")


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["pretrain", "demo", "--help"]])
def test_help_imports_no_large_library(words: list[str]) -> None:
    script = (
        "import sys\nfrom selfray.cli import main\ntry:\n    main(sys.argv[1:])\n"
        "except SystemExit:\n    pass\nprint('\\nIMPORTED', *sorted(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *words], capture_output=True, text=True, check=True
    )
    imported = set(done.stdout.split("IMPORTED ")[1].split())
    large = {"torch", "numpy", "cv2", "pyarrow", "matplotlib", "sklearn", "scipy", "pydicom"}
    assert not imported & large
