"""The model card of an export: whose encoder it is, of which data, and how its files are opened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from selfray.export.graphs import ONNX, OPENVINO, OUTPUTS, TORCH, input_shape
from selfray.export.vit_files import DINOV2_ARGUMENTS
from selfray.models.encoder import Encoder
from selfray.models.huggingface import ORIGINAL_WEIGHTS
from selfray.models.model_card import limits_of_training, model_card
from selfray.models.published import PUBLISHED, recorded_card
from selfray.models.timm_names import timm_arguments
from selfray.models.vit import VisionTransformer

LIBRARIES = {
    "huggingface": "transformers",
    "dinov2": "dinov2",
    "timm": "timm",
    "onnx": "onnx",
    "openvino": "openvino",
    "torch": "pytorch",
}
"""The hub's name of what opens a format."""

SNIPPETS = {
    "huggingface": """\
import torch
from transformers import AutoModel

encoder = AutoModel.from_pretrained("{folder}").eval()
with torch.inference_mode():
    tokens = encoder(pixel_values=torch.from_numpy(images)).last_hidden_state
cls, patches = tokens[:, 0], tokens[:, {first_patch}:]""",
    "dinov2": f"""\
import json
from pathlib import Path

import torch
from dinov2.models.vision_transformer import DinoVisionTransformer
from safetensors.torch import load_file

folder = Path("{{folder}}")
arguments = json.loads((folder / "{DINOV2_ARGUMENTS}").read_text())
encoder = DinoVisionTransformer(**arguments).eval()
encoder.load_state_dict(load_file(folder / "{ORIGINAL_WEIGHTS}"))  # strict
with torch.inference_mode():
    tokens = encoder.forward_features(torch.from_numpy(images))
cls, patches = tokens["x_norm_clstoken"], tokens["x_norm_patchtokens"]""",
    "timm": """\
import timm
import torch

encoder = timm.create_model(
    "{timm_name}",
    checkpoint_path="{folder}/model.safetensors",
    {timm_arguments},
).eval()
with torch.inference_mode():
    tokens = encoder.forward_features(torch.from_numpy(images))
cls, patches = tokens[:, 0], tokens[:, {first_patch}:]""",
    "onnx": f"""\
import onnxruntime

encoder = onnxruntime.InferenceSession("{{folder}}/{ONNX}")
cls, patches = encoder.run(["cls", "patches"], {{{{"images": images}}}})""",
    "openvino": f"""\
import openvino

hints = {{{{"INFERENCE_PRECISION_HINT": "f32"}}}}  # else bfloat16 where the processor has it
encoder = openvino.compile_model("{{folder}}/{OPENVINO}", "CPU", hints)
found = encoder({{{{"images": images}}}})
cls, patches = found["cls"], found["patches"]""",
    "torch": f"""\
import torch

encoder = torch.export.load("{{folder}}/{TORCH}").module()
with torch.inference_mode():
    found = encoder(torch.from_numpy(images))
cls, patches = found["cls"], found["patches"]""",
}
"""How each format is opened, with `images` a float32 array [batch, C, S, S]."""

# Fields of selfray.json that are no part of a model card.
_OF_THE_FILES = ("position_interpolation", "golden_cls")


def label(name: str) -> str:
    """An encoder's name for others: of a path, the last part only."""
    path = Path(name)
    return path.resolve().name if path.exists() else name


def snippet(to: str, encoder: Encoder, folder: str) -> str:
    """Python that opens an export."""
    told: dict[str, object] = {"folder": folder}
    if isinstance(encoder.model, VisionTransformer):
        name, arguments = timm_arguments(encoder.model, encoder.image_size)
        told["first_patch"] = 1 + encoder.model.registers
        told["timm_name"] = name
        told["timm_arguments"] = ", ".join(f"{key}={value}" for key, value in arguments.items())
    return SNIPPETS[to].format(**told)


def card_of(name: str, encoder: Encoder) -> dict[str, Any]:
    """The model card as data, for `model_card`."""
    recorded = recorded_card(name)
    if recorded:
        return {key: value for key, value in recorded.items() if key not in _OF_THE_FILES}
    card: dict[str, Any] = {"synthetic": encoder.synthetic, "data": list(encoder.training_data)}
    row = PUBLISHED.get(name)
    if row is not None:
        card |= {"publisher": row.publisher, "home": row.home, "licence": row.licence}
    return card


def export_card(to: str, name: str, encoder: Encoder, folder: str, card: dict[str, Any]) -> str:
    """README.md of an export.

    Args:
        to: The format.
        name: As for `load_encoder`.
        encoder: What it names.
        folder: Name of the export's directory.
        card: Of `card_of`.
    """
    row, source = PUBLISHED.get(name), label(name)
    made = f"published by {row.publisher} under the licence {row.licence}, " if row else ""
    return model_card(
        card,
        title=f"{source} for {LIBRARIES[to]}",
        about=[
            f"A conversion by selfray of the encoder `{source}`, {made}weights' SHA-256 "
            f"`{encoder.weights_sha256}`. The conversion changes names or form, no weight but "
            "position embeddings, where they had to be interpolated for the input.",
        ],
        library=LIBRARIES[to],
        limits=_limits(name, encoder),
        sections={
            "Input and output": _interface(to, encoder),
            "Use": ["```python", snippet(to, encoder, folder), "```"],
        },
    )


def _interface(to: str, encoder: Encoder) -> list[str]:
    channels, side, _ = input_shape(encoder)
    rows, columns = encoder.grid
    cls, patches = OUTPUTS
    grid = f"[batch, {encoder.width}, {rows}, {columns}]"
    in_a_row = f"[batch, {rows * columns}, {encoder.width}]"
    of_graph = to in ("onnx", "openvino", "torch")
    return [
        f"- `images`: float32 [batch, {channels}, {side}, {side}], as `preprocessing.json` says; "
        "normalised before, not inside.",
        f"- `{cls}`: float32 [batch, {encoder.width}]; `{patches}`: float32 "
        f"{grid if of_graph else in_a_row}.",
    ]


def _limits(name: str, encoder: Encoder) -> list[str]:
    if name.startswith("random:"):
        return ["Random weights: nothing was learned. A baseline to compare with."]
    if "recipe" in recorded_card(name):
        return limits_of_training(encoder.synthetic)
    return [limits_of_training(encoder.synthetic)[0], "What its publisher says of it applies."]
