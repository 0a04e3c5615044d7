"""A network for OpenVINO, without a word to anybody outside the building."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Any

from torch.export import ExportedProgram

from selfray.errors import InputError


def require_openvino(*, int8: bool = False) -> None:
    """Refuse where OpenVINO is missing, and keep it and what makes int8 graphs from reporting.

    Its converter and nncf send what they are used for to the vendor, unless the user has opted
    out; where the package that does it cannot be imported, they go on without.

    Args:
        int8: Whether nncf is needed too.

    Raises:
        InputError: Says how to install it.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # pyright: ignore[reportArgumentType]
    if not has_openvino(int8=int8):
        raise InputError("OpenVINO is not installed. Run: pip install 'selfray[openvino]'")


def has_openvino(*, int8: bool = False) -> bool:
    """Whether OpenVINO can be imported, and nncf where int8 is wanted."""
    return all(find_spec(name) is not None for name in ("openvino", *(["nncf"] if int8 else [])))


@cache
def openvino_core() -> Any:
    """The one `openvino.Core` of this process, which lives as long as the process does.

    Its CPU plugin gives the thread that loads it an alternate signal stack, and unmaps that stack
    when it is unloaded, whatever thread that happens in. The next signal, such as Ctrl-C, would
    then end the process with a segmentation fault (seen in 2026.4.1).
    """
    import openvino  # pyright: ignore[reportMissingImports]

    return openvino.Core()


def openvino_model(program: ExportedProgram, shape: Sequence[int], outputs: Sequence[str]) -> Any:
    """Convert a program of one input.

    Args:
        program: With a free first dimension.
        shape: Of one input, without the batch.
        outputs: Names for them, in order.

    Returns:
        An `openvino.Model`, float32, its batch free.
    """
    require_openvino()
    # The frontend itself, since `openvino.convert_model` is what reports.
    from openvino.frontend import FrontEndManager  # pyright: ignore[reportMissingImports]
    from openvino.frontend.pytorch.fx_decoder import (  # pyright: ignore[reportMissingImports]
        TorchFXPythonDecoder,
    )

    frontend = FrontEndManager().load_by_framework("pytorch")
    with _without_warnings():
        decoder = TorchFXPythonDecoder.from_exported_program(program)
        model = frontend.convert(frontend.load(decoder))
    model.reshape([-1, *shape])
    for output, name in zip(model.outputs, outputs, strict=True):
        output.get_tensor().set_names({name})
    return model


@contextmanager
def _without_warnings() -> Iterator[None]:
    """OpenVINO tells, with tracebacks, of operations which it knows and a newer torch has not."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
