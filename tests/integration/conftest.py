"""An architecture so small that a whole run takes less than a second."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from micro_run import write_dataset

from selfray.models.vit import ARCHITECTURES, Shape


@pytest.fixture(scope="session", autouse=True)
def micro_architecture() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ARCHITECTURES, "vit_micro", Shape(24, 2, 2))
        yield


@pytest.fixture(scope="session")
def micro_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("micro") / "data").directory
