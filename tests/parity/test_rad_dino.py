"""`selfray.RadDino` equals the class of the package rad_dino, on the same files."""

import inspect
import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Dinov2Config, Dinov2Model

from selfray import RadDino
from selfray.errors import InputError

rad_dino = pytest.importorskip("rad_dino")

TOLERANCE = 2e-5
# The fields of huggingface.co/microsoft/rad-dino, a sixteenth of its width and of its blocks, and
# 56 pixels where it has 518.
CONFIG = {
    "apply_layernorm": True, "architectures": ["Dinov2Model"],
    "attention_probs_dropout_prob": 0.0, "drop_path_rate": 0.0, "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0, "hidden_size": 48, "image_size": 56, "initializer_range": 0.02,
    "layer_norm_eps": 1e-06, "layerscale_value": 1.0, "mlp_ratio": 4, "model_type": "dinov2",
    "num_attention_heads": 3, "num_channels": 3, "num_hidden_layers": 2,
    "out_features": ["stage2"], "out_indices": [2], "patch_size": 14, "qkv_bias": True,
    "reshape_hidden_states": True, "stage_names": ["stem", "stage1", "stage2"],
    "torch_dtype": "float32", "transformers_version": "4.41.0", "use_swiglu_ffn": False,
}  # fmt: skip
PREPROCESSOR = {
    "_valid_processor_keys": [
        "images", "do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale",
        "rescale_factor", "do_normalize", "image_mean", "image_std", "do_convert_rgb",
        "return_tensors", "data_format", "input_data_format",
    ],
    "crop_size": {"height": 56, "width": 56}, "do_center_crop": True, "do_convert_rgb": True,
    "do_normalize": True, "do_rescale": True, "do_resize": True,
    "image_mean": [0.5307, 0.5307, 0.5307], "image_processor_type": "BitImageProcessor",
    "image_std": [0.2583, 0.2583, 0.2583], "resample": 3,
    "rescale_factor": 0.00392156862745098, "size": {"shortest_edge": 56},
}  # fmt: skip


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Theirs and ours, from one directory with random weights."""
    directory = tmp_path_factory.mktemp("rad-dino")
    torch.manual_seed(0)
    model = Dinov2Model(Dinov2Config(**CONFIG))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.empty_like(parameter).normal_(std=0.1))
    model.save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps(CONFIG))
    (directory / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    theirs = type("Theirs", (rad_dino.RadDino,), {"_REPO": str(directory)})()
    return theirs, RadDino(directory)


def picture(height: int, width: int, mode: str = "L", seed: int = 0) -> Image.Image:
    """Smooth and not symmetric, with noise; white and black are reached."""
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    channels = [np.sin(rows / (9 + c) + seed) + np.cos(columns / (7 + 2 * c)) for c in range(3)]
    values = np.stack(channels, -1) * 64 + 128 + random.normal(0, 20, (height, width, 3))
    image = Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))
    return image.convert(mode)


PICTURES = {
    "gray": picture(80, 70),
    "portrait": picture(131, 90),
    "landscape": picture(90, 131),
    "native": picture(56, 56),
    "enlarged": picture(41, 40),
    "long": picture(57, 300),
    "colour": picture(75, 97, "RGB"),
    "palette": picture(75, 97, "P"),
    "one bit": picture(75, 97, "1"),
    "opaque": picture(75, 97, "RGBA"),
    "several": [picture(80, 70), picture(131, 90, "RGB", 1), picture(60, 171, seed=2)],
}


@pytest.mark.parametrize("name", PICTURES)
def test_preprocessing_and_features_equal(both, name):
    theirs, ours = both
    images = PICTURES[name]
    expected, found = theirs.preprocess(images), ours.preprocess(images)
    assert found.keys() == expected.keys()
    assert found.pixel_values.dtype == expected["pixel_values"].dtype
    torch.testing.assert_close(found.pixel_values, expected["pixel_values"], atol=TOLERANCE, rtol=0)
    for mine, wanted in (
        *zip(ours.extract_features(images), theirs.extract_features(images), strict=True),
        *zip(ours(images), theirs(images), strict=True),
        *zip(ours.encode(found), theirs.encode(expected), strict=True),
        (ours.extract_cls_token(images), theirs.extract_cls_token(images)),
        (ours.extract_patch_tokens(images), theirs.extract_patch_tokens(images)),
    ):
        torch.testing.assert_close(mine, wanted, atol=TOLERANCE, rtol=0)
        assert wanted.std() > 0.1  # a constant would agree with a constant
        assert mine.requires_grad == wanted.requires_grad
        assert mine.is_inference() == wanted.is_inference()


def test_patch_tokens_are_laid_out_equally(both):
    theirs, ours = both
    tokens = torch.randn(2, 16, 48)
    assert torch.equal(ours.reshape_patch_tokens(tokens), theirs.reshape_patch_tokens(tokens))


def test_every_public_method_is_there_with_the_same_arguments():
    for name, theirs in vars(rad_dino.RadDino).items():
        if callable(theirs) and name not in ("__init__", "forward"):  # forward(*args) there
            expected = list(inspect.signature(theirs).parameters)
            assert list(inspect.signature(getattr(RadDino, name)).parameters) == expected, name


def test_it_is_a_module_that_can_be_moved_and_saved(both):
    theirs, ours = both
    assert ours.device == theirs.device == torch.device("cpu")
    assert (ours.training, ours.model.training) == (theirs.training, theirs.model.training)
    state = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    assert sum(t.numel() for t in state.values()) == sum(p.numel() for p in theirs.parameters())
    assert ours.load_state_dict(state) == theirs.load_state_dict(theirs.state_dict())
    assert all(p.requires_grad for p in ours.parameters())


def test_what_they_clip_silently_is_refused(both):
    theirs, ours = both
    deep = Image.fromarray(np.full((60, 60), 40_000, np.uint16))
    assert theirs.preprocess(deep)["pixel_values"].unique().numel() == 1
    with pytest.raises(InputError, match="I;16"):
        ours.preprocess(deep)


def test_a_missing_encoder_is_refused_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="encoder microsoft/rad-dino is not on this machine"):
        RadDino()
