"""Datasets that an encoder was trained on, found again in what a dataset says of itself."""

from __future__ import annotations

import re
from collections.abc import Sequence

# Words of datasets' names that say nothing of which one it is.
_GENERIC = frozenset({"chest", "chestx", "cxr", "private", "xray", "radiographs", "challenge"})


def mentioned(training_data: Sequence[str], *texts: str) -> list[str]:
    """Those of an encoder's training datasets whose name one of the texts has a word of.

    Args:
        training_data: Common names, such as `NIH ChestX-ray14`.
        texts: Name and origin of a dataset, the name of a folder.
    """
    said = {word for text in texts for word in _words(text)}
    return [name for name in training_data if (_words(name) - _GENERIC) & said]


def _words(text: str) -> set[str]:
    return {word for word in re.split(r"[^a-z0-9]+", text.lower()) if len(word) >= 3}
