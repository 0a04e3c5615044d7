"""Chest radiographs in, a judged image encoder out.

From Python: `load_encoder(name)(images)` gives features, `RadDino` stands in for the class of the
package rad_dino.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_MODULES = {"load_encoder": "selfray.models.published", "RadDino": "selfray.rad_dino"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)  # late, because torch takes seconds


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
