"""Rules of the house that a program can hold: sizes, bounds of dependencies, pins."""

from __future__ import annotations

import ast
import re
import runpy
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
SOURCES = [
    path for folder in ("selfray", "tests", "scripts", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
]  # fmt: skip
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
REQUIREMENTS = [Requirement(line) for line in sum(EXTRAS.values(), PROJECT["dependencies"])]
PINS = dict(
    line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
)


def _length(function: ast.FunctionDef) -> int:
    """Lines of a function without its docstring."""
    lines = function.end_lineno or 0
    first = function.body[0]
    docstring = ast.get_docstring(function) is not None
    spoken = (first.end_lineno or 0) - first.lineno + 1 if docstring else 0
    return lines - function.lineno + 1 - spoken


def test_no_file_exceeds_1000_lines_and_no_function_60() -> None:
    assert SOURCES
    for path in SOURCES:
        text = path.read_text()
        assert len(text.splitlines()) <= 1000, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert _length(node) <= 60, f"{path}: {node.name}"


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=lambda r: r.name)
def test_a_dependency_has_both_bounds_and_a_pin_within_them(requirement: Requirement) -> None:
    assert {part.operator for part in requirement.specifier} == {">=", "<"}
    pins = {canonicalize_name(name): version for name, version in PINS.items()}
    assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)])


def test_the_lowest_versions_are_those_of_the_bounds() -> None:
    lowest = runpy.run_path(str(ROOT / "scripts" / "lowest_versions.py"))["lowest_versions"]()
    assert len(lowest) == len(REQUIREMENTS)
    for line, requirement in zip(lowest, REQUIREMENTS, strict=True):
        name, version = line.split("==")
        assert name == requirement.name
        assert f">={version}" in re.split(",", str(requirement.specifier))


def test_every_target_of_the_readme_and_of_contributing_is_in_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for page in ("README.md", "CONTRIBUTING.md"):
        for target in re.findall(r"(?:^|`)make ([a-z-]+)", (ROOT / page).read_text(), re.M):
            assert f"\n{target}: " in makefile, target
