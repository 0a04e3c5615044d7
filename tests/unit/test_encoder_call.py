"""`load_encoder(name)(images)`: what may be an image, and what is refused before it misleads."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from radiograph_files import write_dicom

import selfray
from selfray.data.radiograph import read_radiograph
from selfray.errors import InputError
from selfray.models.published import SHIPPED

SHAPES = [(90, 70), (64, 64), (131, 90), (65, 200)]


@pytest.fixture(scope="module")
def encoder():
    return selfray.load_encoder("random:vit_pico/16@64")


def pixels(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Random, and the ends of the range are reached, so that stretching changes nothing."""
    drawn = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    drawn[0, 0], drawn[-1, -1] = 0, 255
    return drawn


def by_hand(encoder, arrays) -> tuple[torch.Tensor, torch.Tensor]:
    """The network on one image at a time."""
    found = [encoder.model(encoder.preprocess(array)[None]) for array in arrays]
    rows = [tokens.patches.detach().reshape(4, 4, -1).permute(2, 0, 1) for tokens in found]
    return torch.cat([tokens.cls for tokens in found]).detach(), torch.stack(rows)


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_a_list_gives_the_features_of_each_in_order(encoder, batch_size):
    arrays = [pixels(shape, seed) for seed, shape in enumerate(SHAPES)]
    cls, patches = encoder(arrays, batch_size=batch_size)
    expected = by_hand(encoder, arrays)
    torch.testing.assert_close(cls, expected[0], atol=2e-5, rtol=0)
    torch.testing.assert_close(patches, expected[1], atol=2e-5, rtol=0)
    assert cls.is_inference() and (expected[0][0] - expected[0][1]).abs().max() > 0.01


def test_every_form_of_the_same_image_gives_the_same(encoder, tmp_path):
    gray = pixels((90, 70))
    colour = np.repeat(gray[..., None], 3, axis=2)
    for name in ("image.png", "image.tif"):
        Image.fromarray(gray).save(tmp_path / name)
    Image.fromarray(gray.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    image = Image.fromarray(gray)
    forms = {
        "array": gray, "colour array": colour, "tensor": torch.from_numpy(gray),
        "colour tensor": torch.from_numpy(colour), "L": image, "RGB": image.convert("RGB"),
        "RGBA": image.convert("RGBA"), "LA": image.convert("LA"), "P": image.convert("P"),
        "path": tmp_path / "image.png", "string": str(tmp_path / "image.tif"),
        "16 bits": tmp_path / "deep.png", "list": [gray], "tuple": (image,),
        "generator": (form for form in [gray]),
        "array of paths": np.array([str(tmp_path / "image.png")]),
    }  # fmt: skip
    expected, _ = by_hand(encoder, [gray])
    for name, form in forms.items():
        cls, patches = encoder(form)
        assert patches.shape == (1, 128, 4, 4), name
        torch.testing.assert_close(cls, expected, atol=2e-5, rtol=0, msg=name)
    black_and_white = image.convert("1")
    found, _ = encoder(black_and_white)
    expected, _ = by_hand(encoder, [np.asarray(black_and_white).astype(np.uint8) * 255])
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


def test_a_files_darkest_pixel_becomes_black_and_its_brightest_white(encoder, tmp_path):
    stored = pixels((90, 70)).astype(np.uint16) * 11 + 300
    write_dicom(tmp_path / "image.dcm", stored)
    read = read_radiograph(tmp_path / "image.dcm").pixels.astype(np.float64)
    expected = np.rint((read - read.min()) / (read.max() - read.min()) * 255).astype(np.uint8)
    found, _ = encoder(tmp_path / "image.dcm")
    torch.testing.assert_close(found, by_hand(encoder, [expected])[0], atol=2e-5, rtol=0)


def test_the_encoder_follows_its_network_to_another_device(encoder):
    there = selfray.load_encoder("random:vit_pico/16@64")
    there.model.to("meta")
    cls, patches = there(pixels((90, 70)))
    assert there.device == cls.device == patches.device == torch.device("meta")


TRANSPARENT = Image.new("RGBA", (70, 70), (9, 9, 9, 128))


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (pixels((90, 70)) / 255, "float64, 0 to 1, allowed: uint8, 0 to 255. Values of another"),
        (torch.rand(90, 70), "allowed: uint8, 0 to 255. Values of another"),
        (pixels((90, 70)).astype(np.uint16) * 16, "uint16, 0 to 4080, allowed: uint8"),
        (np.ones((70, 70), bool), "bool, 1 to 1"),
        (pixels((3, 90, 70)), "uint8 [3, 90, 70], allowed: uint8 [H, W] or [H, W, 3]"),
        (np.zeros((0, 7), np.uint8), "uint8 [0, 7]"),
        (Image.fromarray(pixels((90, 70)).astype(np.uint16)), "mode I;16, allowed"),
        (Image.new("F", (70, 70)), "mode F, allowed"),
        (Image.new("CMYK", (70, 70)), "mode CMYK, allowed"),
        (TRANSPARENT, "transparent pixels"),
        ([pixels((90, 70)), 7], "image 1: a int is no image"),
        ([], "no image given"),
        ("nowhere/secret.png", "the file cannot be read from disk"),
        (["nowhere/secret.png"], "image 0: the file cannot be read from disk"),
    ],
)
def test_what_would_give_wrong_features_is_refused_in_one_line(encoder, image, said):
    with pytest.raises(InputError) as error:
        encoder(image)
    message = str(error.value)
    assert said in message and "\n" not in message and "secret" not in message


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (pixels((3, 90, 70)), "Channels go last: np.moveaxis(image, 0, 2); or give several gray"),
        (pixels((5, 90, 70)), "Give several images as a list: list(images)."),
        (pixels((5, 90, 70, 3)), "Give several images as a list: list(images)."),
        (pixels((90, 70, 1)), "Take the gray channel: image[..., 0]."),
        (pixels((90, 70, 4)), "Take the channels without transparency: image[..., :3]."),
        (pixels((1, 90, 70)), "Take the gray channel, or the only image: image[0]."),
        (np.zeros((0, 5), np.uint8), "It has no pixels"),
        (np.zeros(5, np.uint8), "Give the pixels in rows and columns."),
        (np.ones((), np.uint8), "Give the pixels in rows and columns."),
        (None, "a NoneType is no image"),
        (7, "a int is no image"),
        (np.array(None), "an array of object [] is no image"),
        (np.array("secret.png"), "[] is no image"),
        (np.array([["secret.png"]]), "image 0: an array of <U10 [1] is no image"),
        (np.ones((70, 70), complex), "an array of complex128 [70, 70] is no image"),
    ],
)
def test_pixels_of_a_wrong_shape_are_told_what_to_do_and_not_to_scale(encoder, image, said):
    with pytest.raises(InputError) as error:
        encoder(image)
    message = str(error.value)
    assert said in message and "cale" not in message and "secret" not in message


def test_an_encoder_may_be_given_as_a_path(tmp_path):
    directory = Path(shutil.copytree(SHIPPED / "phantom", tmp_path / "encoder"))
    image = pixels((90, 70))
    found, expected = (
        selfray.load_encoder(place)(image)[0] for place in (directory, str(directory))
    )
    assert torch.equal(found, expected)
    rad_dino = selfray.RadDino(directory)
    torch.testing.assert_close(rad_dino.extract_cls_token(image), expected, atol=2e-5, rtol=0)
    with pytest.raises(InputError, match="no image given"):
        rad_dino.extract_features([])


def test_pillow_images_of_16_bits_are_told_how_to_scale(encoder):
    with pytest.raises(InputError, match=r"clip its values at 255\. Scale it first"):
        encoder(Image.fromarray(pixels((90, 70)).astype(np.uint16)))
    with pytest.raises(InputError, match="batch_size is 0"):
        encoder(pixels((90, 70)), batch_size=0)


def test_importing_the_package_does_not_import_torch():
    script = "import sys, selfray; dir(selfray); print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"
    assert {"load_encoder", "RadDino"} <= set(dir(selfray))
    assert not hasattr(selfray, "load_encodr") and Path(selfray.__file__).exists()
