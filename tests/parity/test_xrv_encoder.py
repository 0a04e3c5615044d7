"""`xrv:NAME`: features and preprocessing equal torchxrayvision's own."""

from pathlib import Path

import numpy as np
import pytest
import torch
from publisher_files import (
    assert_same,
    convert,
    gray_images,
    in_order,
    randomise,
    refusal,
    whole_object,
)
from safetensors.torch import load_file, save_file
from torch import nn

from selfray.errors import InputError
from selfray.models.published import load_encoder
from selfray.models.xrv_encoder import TRAINING_DATA

xrv = pytest.importorskip("torchxrayvision")

NAME = "densenet121-res224-all"


@pytest.fixture(scope="module")
def theirs() -> nn.Module:
    torch.manual_seed(0)
    model = xrv.models.DenseNet(num_classes=18)
    randomise(model)
    return model.eval()


@pytest.fixture
def published_file(theirs, tmp_path, monkeypatch) -> Path:
    """The file that torchxrayvision downloads, a whole pickled network, where it puts it."""
    monkeypatch.setattr(xrv.utils, "get_cache_dir", lambda: f"{tmp_path}/")
    file = tmp_path / Path(xrv.models.model_urls[NAME]["weights_url"]).name
    torch.save(theirs, file)
    return file


@pytest.fixture
def converted_file(theirs, published_file) -> Path:
    file = published_file.with_suffix(".safetensors")
    save_file(theirs.state_dict(), file)
    return file


def test_features_equal_torchxrayvisions(published_file, converted_file):
    whole = xrv.models.DenseNet(weights=NAME)  # reads the published file
    encoder = load_encoder(f"xrv:{NAME}")
    images = torch.stack([encoder.preprocess(pixels) for pixels in gray_images()[:2]])
    with torch.no_grad():
        expected, maps = whole.features2(images), torch.relu(whole.features(images))
    cls, patches = encoder.features(images)
    assert_same(cls, expected)
    assert_same(patches, maps)
    torch.testing.assert_close(in_order(patches).mean(1), cls, atol=1e-4, rtol=1e-4)
    assert (encoder.width, encoder.grid, encoder.image_size) == (1024, (7, 7), 224)


def test_preprocessing_equals_torchxrayvisions(converted_file):
    encoder = load_encoder(f"xrv:{NAME}")
    for pixels in gray_images():
        # Its example scripts/process_image.py.
        image = xrv.datasets.normalize(pixels, 255)[None]
        image = xrv.datasets.XRayResizer(224)(xrv.datasets.XRayCenterCrop()(image))
        found = encoder.preprocess(pixels)
        assert found.shape == (1, 224, 224) and found.dtype == torch.float32
        assert torch.equal(found, torch.from_numpy(image))
    halves = np.repeat(np.array([0, 255], np.uint8), 112)[:, None].repeat(224, axis=1)
    black_to_white = encoder.preprocess(halves)
    assert (black_to_white.min(), black_to_white.max()) == (-1024, 1024)
    assert (0 - encoder.mean) / encoder.std == -1024
    with pytest.raises(InputError, match="pixels are colour, allowed: gray"):
        encoder.preprocess(np.zeros((30, 30, 3), np.uint8))


def test_a_pickled_network_is_refused_and_read_when_converted(theirs, published_file):
    said = refusal(f"xrv:{NAME}")
    assert "holds more than tensors" in said and published_file.name in said
    # To unpickle a network of torchxrayvision takes its import, which takes long.
    torch.save(whole_object(theirs.state_dict()), published_file)
    convert(said)
    assert load_encoder(f"xrv:{NAME}").training_data[0] == "NIH ChestX-ray14"


def test_a_missing_and_an_unexpected_parameter_are_named(converted_file):
    tensors = {name: t.clone() for name, t in load_file(converted_file).items()}
    del tensors["features.norm5.bias"]
    save_file({**tensors, "features.norm6.bias": torch.zeros(2)}, converted_file)
    said = refusal(f"xrv:{NAME}")
    assert "missing (features.norm5.bias)" in said and "unexpected (features.norm6.bias)" in said


def test_absent_weights_and_unknown_names_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(xrv.utils, "get_cache_dir", lambda: f"{tmp_path}/")
    said = refusal("xrv:densenet121-res224-nih")
    assert f"{tmp_path}/nih-densenet121-d121-tw-lr001-rot45-tr15-sc15-seed0-best.pt" in said
    assert "Did you mean 'densenet121-res224-nih'" in refusal("xrv:densenet121-res224-nhi")


def test_all_densenets_of_torchxrayvision_have_a_name():
    theirs = {name for name in xrv.models.model_urls if name.startswith("densenet121-")}
    assert theirs == set(TRAINING_DATA)
