"""The network as a graph, for runtimes that need neither its code nor this package.

Every graph has the input `images`, float32 [batch, C, S, S] as preprocessing gives it, and the
outputs `cls` [batch, D] and `patches` [batch, D, h, w]. Preprocessing is not inside: a resize is
done on 8-bit pixels of any size, and the graph would tie to one of them.
"""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._dynamo.exc import UserError
from torch.export import Dim, ExportedProgram

from selfray.errors import InputError
from selfray.models.encoder import Encoder
from selfray.models.openvino_graph import openvino_model

OUTPUTS = ("cls", "patches")
ONNX, OPENVINO, TORCH = "encoder.onnx", "encoder.xml", "encoder.pt2"

# A protocol buffer ends at 2 GiB; larger networks keep their weights in a file beside the graph.
_LARGEST_FILE = 2**31 - 2**26


class _Graph(nn.Module):
    """What an encoder does with preprocessed images, with names for what it returns."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.network, self.grid = encoder.model, encoder.grid

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """[B, C, S, S] to `cls` [B, D] and `patches` [B, D, h, w]."""
        tokens = self.network(images)
        patches = tokens.patches.transpose(1, 2).unflatten(2, self.grid)
        return {"cls": tokens.cls, "patches": patches}


def input_shape(encoder: Encoder) -> tuple[int, int, int]:
    """Channels, height and width of a preprocessed image."""
    return len(encoder.preprocessing.mean), encoder.image_size, encoder.image_size


def bytes_of_weights(encoder: Encoder) -> int:
    """Of all parameters and buffers, as they are in memory."""
    return sum(tensor.nbytes for tensor in encoder.model.state_dict().values())


@torch.no_grad()
def traced(encoder: Encoder) -> ExportedProgram:
    """The network for any number of images of its input size.

    Raises:
        InputError: Its code takes the number of images for a constant.
    """
    images = torch.zeros(2, *input_shape(encoder))  # 1 would become a constant of the graph
    sizes = {"images": {0: Dim("batch", min=1)}}
    try:
        return torch.export.export(_Graph(encoder).eval(), (images,), dynamic_shapes=sizes)
    except UserError as cause:
        raise InputError(
            f"{encoder.name} cannot become a graph for any number of images: its network's code "
            f"fixes what must stay free ({str(cause).splitlines()[0]}). There is no way around it "
            "here: use the encoder in selfray."
        ) from cause


def write_torch(encoder: Encoder, directory: Path) -> None:
    """`encoder.pt2`, a program that `torch.export.load` opens."""
    program = BytesIO()  # torch ends the process where it cannot write to a file
    torch.export.save(traced(encoder), program)
    (directory / TORCH).write_bytes(program.getbuffer())


def write_onnx(encoder: Encoder, directory: Path) -> None:
    """`encoder.onnx`, in float32; with `encoder.onnx.data` where it is larger than 2 GiB.

    Raises:
        InputError: ONNX has no operation for one of the network's.
    """
    program = traced(encoder)
    try:
        graph = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            input_names=["images"],
            output_names=list(OUTPUTS),
            dynamic_shapes={"images": {0: "batch"}},
        )
    except torch.onnx.OnnxExporterError as cause:
        raise InputError(
            f"{encoder.name} cannot become a graph of ONNX: torch {torch.__version__} does not "
            "translate one of its operations. Take openvino or torch."
        ) from cause
    assert graph is not None
    graph.save(directory / ONNX, external_data=bytes_of_weights(encoder) > _LARGEST_FILE)


def write_openvino(encoder: Encoder, directory: Path) -> None:
    """`encoder.xml` and `encoder.bin`, in float32.

    Raises:
        InputError: They cannot be written there.
    """
    import openvino  # pyright: ignore[reportMissingImports]

    model = openvino_model(traced(encoder), input_shape(encoder), OUTPUTS)
    try:
        openvino.save_model(model, directory / OPENVINO, compress_to_fp16=False)
    except RuntimeError as cause:
        if "iostream error" not in str(cause):  # what a C++ stream says that cannot be written to
            raise
        raise InputError(
            f"{directory.parent}: OpenVINO cannot write its files there: the disk is full, or "
            "files are limited to a smaller size. Make room, or give another path."
        ) from cause
