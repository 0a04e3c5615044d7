"""DINOv2's weights as Meta publishes them: `dinov2_vitb14_pretrain.pth` and the like."""

from __future__ import annotations

from pathlib import Path

from selfray.models.encoder import Encoder, vit_encoder
from selfray.models.plain_vit import vit_of
from selfray.models.preprocessing import Preprocessing
from selfray.models.weights_file import load_exactly, read_tensors, sha256_of, weights_in

# DINOv2's dinov2/data/transforms.py, `make_classification_eval_transform`.
_PREPROCESSING = Preprocessing(
    224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), shortest_edge=256, odd_margin="even"
)


def read_original(name: str, directory: Path) -> Encoder:
    """Read a file of DINOv2's own, without or with registers.

    Its position embeddings are for 37 x 37 patches and become 16 x 16 as in DINOv2's hub: with
    0.1 patch added to the scale, or antialiased with registers (its dinov2/hub/backbones.py).

    Args:
        name: What was asked for.
        directory: With the file, or the file itself.

    Raises:
        InputError: The file is missing, damaged, holds more than tensors, or its parameters are
            not exactly those of a DINOv2 encoder.
    """
    weights = weights_in(directory, "dinov2_vit*")
    tensors = read_tensors(weights)
    model = vit_of(tensors, weights)
    load_exactly(model, tensors, weights)
    model.position_interpolation = "bicubic-antialias" if model.registers else "bicubic-offset"
    return vit_encoder(name, model, _PREPROCESSING, weights_sha256=sha256_of(weights))
