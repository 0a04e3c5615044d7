"""Print every dependency of pyproject.toml at its lower bound, as a file for `pip install -c`."""

from __future__ import annotations

import re
import tomllib
from itertools import chain
from pathlib import Path

PROJECT = Path(__file__).parents[1] / "pyproject.toml"


def lowest_versions() -> list[str]:
    """`name==lower bound` of every dependency and of every extra's."""
    project = tomllib.loads(PROJECT.read_text())["project"]
    wanted = chain(project["dependencies"], *project["optional-dependencies"].values())
    return [re.sub(r"^([\w.-]+)>=([\w.]+),<[\w.]+$", r"\1==\2", line) for line in wanted]


if __name__ == "__main__":
    print("\n".join(lowest_versions()))
