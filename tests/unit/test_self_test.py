"""`selfray encoders --check` passes what is right, and each of its checks can fail."""

import hashlib
import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load, save_file
from transformers import AutoModel, BitImageProcessorPil

from selfray.cli import main
from selfray.errors import InputError
from selfray.models import self_test as checked
from selfray.models.encoder import Encoder, Tokens
from selfray.models.encoder_directory import save_encoder
from selfray.models.encoder_listing import encoder_details, encoder_table
from selfray.models.golden import VALUES, fixed_images
from selfray.models.preprocessing import Preprocessing
from selfray.models.published import SHIPPED, load_encoder
from selfray.models.self_test import self_test
from selfray.models.vit import Shape, VisionTransformer


@pytest.fixture
def directory(tmp_path):
    torch.manual_seed(0)
    model = VisionTransformer(Shape(48, 2, 3), patch_size=14, image_size=56, layerscale_init=1.0)
    card = {"synthetic": True, "data": []}
    save_encoder(model, tmp_path / "encoder", mean=0.53, std=0.26, card=card)
    return tmp_path / "encoder"


def change(directory, name: str, factor: float) -> None:
    file = directory / "model.safetensors"
    tensors = load(file.read_bytes())
    save_file({key: t * factor if name in key else t for key, t in tensors.items()}, file)


def forget_golden_values(directory) -> None:
    description = json.loads((directory / "selfray.json").read_text())
    (directory / "selfray.json").write_text(json.dumps({**description, "golden_cls": None}))


def refusal(name) -> str:
    with pytest.raises(InputError) as error:
        list(self_test(str(name)))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_fixed_images_are_the_same_on_every_machine():
    images = fixed_images()
    digest = hashlib.sha256(np.stack(images).tobytes()).hexdigest()
    assert digest == "12d79c792e49d4eacad24105da831960c981af3c0da20021100ea0ec983d2792"
    assert all((image.min(), image.max()) == (0, 255) for image in images)


@pytest.mark.parametrize("name", [path.parent.name for path in SHIPPED.glob("*/config.json")])
def test_golden_values_of_the_shipped_encoder_are_those_of_transformers(name):
    golden = json.loads((SHIPPED / name / "selfray.json").read_text())["golden_cls"]
    processor = BitImageProcessorPil.from_pretrained(SHIPPED / name)
    inputs = processor([Image.fromarray(image) for image in fixed_images()], return_tensors="pt")
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(SHIPPED / name).eval()(**inputs).last_hidden_state
    assert np.shape(golden) == (2, VALUES)
    scale = hidden[:, 0].abs().max()
    assert (hidden[:, 0, :VALUES] - torch.tensor(golden)).abs().max() < 2e-5 * scale


@pytest.mark.parametrize("name", ["selfray/phantom", "random:vit_pico", "random:vit_small"])
def test_what_has_golden_values_passes(name, capsys):
    assert main(["encoders", "--check", name]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{name}: whole") and "golden values: equal within" in out
    assert ("transformers' Dinov2Model: equal" in out) == (name == "selfray/phantom")


def test_an_encoder_without_golden_values_prints_what_another_machine_must_print(directory):
    forget_golden_values(directory)
    lines = list(self_test(str(directory)))
    assert lines == list(self_test(str(directory)))
    assert "no golden values are known" in lines[3]
    change(directory, "encoder.layer.1.mlp.fc2.weight", 1.5)
    assert lines[3] != list(self_test(str(directory)))[3]


def test_weights_that_changed_a_little_miss_their_golden_values(directory):
    change(directory, "encoder.layer.1.mlp.fc2.weight", 1.001)
    assert "differ from its golden values by" in refusal(directory)


def test_weights_that_do_not_look_at_the_image_are_refused(directory):
    change(directory, "lambda1", 1e-6)
    assert "two different images have nearly the same features (cosine 1.0" in refusal(directory)


@pytest.mark.parametrize("golden", [True, False])
def test_weights_of_nothing_but_zeros_are_refused(golden, directory, capsys):
    change(directory, "", 0.0)
    if not golden:
        forget_golden_values(directory)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "have nearly the same features (cosine nan" in refusal(directory)
    assert main(["encoders", str(directory), "--check"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_what_is_not_a_number_in_transformers_is_no_agreement(directory, monkeypatch):
    model = AutoModel.from_pretrained(directory)
    torch.nn.init.constant_(model.layernorm.bias, torch.nan)
    monkeypatch.setattr(AutoModel, "from_pretrained", lambda *_, **__: model)
    assert "differ from those of transformers' Dinov2Model by nan" in refusal(directory)


def test_features_that_overflow_are_refused(directory):
    change(directory, "layernorm.weight", 3e38)
    assert "features are not finite" in refusal(directory)


def test_transformers_is_asked_where_it_can_be(directory, monkeypatch):
    forget_golden_values(directory)
    assert "transformers' Dinov2Model: equal within" in list(self_test(str(directory)))[-1]

    def disturbed(name: str) -> Encoder:
        encoder = load_encoder(name)
        with torch.no_grad():
            encoder.vit.pos_embed.add_(torch.linspace(0, 0.01, 48))
        return encoder

    monkeypatch.setattr(checked, "load_encoder", disturbed)
    assert "differ from those of transformers' Dinov2Model by" in refusal(directory)


class _Network(torch.nn.Module):
    """Sums of the image; with something of the batch where that is asked for."""

    def __init__(self, of_batch: float = 0.0) -> None:
        super().__init__()
        self.of_batch = of_batch

    def forward(self, images: torch.Tensor) -> Tokens:
        patches = images.unfold(2, 14, 14).unfold(3, 14, 14).flatten(4).mean(1).flatten(1, 2)
        cls = patches.mean(1) + self.of_batch * patches.mean()
        return Tokens(cls, patches)


class _BlindPatches(_Network):
    """Patches of which none knows the image."""

    def forward(self, images: torch.Tensor) -> Tokens:
        cls, patches = super().forward(images)
        return Tokens(cls, torch.ones_like(patches))


class _OnlyBatches(_Network):
    """What one image alone gives is not a number."""

    def forward(self, images: torch.Tensor) -> Tokens:
        cls, patches = super().forward(images)
        return Tokens(cls if len(images) > 1 else cls * torch.nan, patches)


class _NoNumbers(Preprocessing):
    """A pixel is lost on the way."""

    def __call__(self, pixels: np.ndarray) -> torch.Tensor:
        prepared = super().__call__(pixels)
        prepared[0, 0, 0] = torch.nan
        return prepared


class _WrongRange(Preprocessing):
    """Says one mean and standard deviation, and forgets to divide by 255."""

    def __call__(self, pixels: np.ndarray) -> torch.Tensor:
        return super().__call__(pixels) * 255


def encoder_of(network: _Network, preprocessing: type = Preprocessing, **more) -> Encoder:
    fields = {"mean": (0.5,) * 3, "std": (0.25,) * 3, "shortest_edge": 56} | more
    return Encoder("stub:", network, preprocessing(56, **fields), width=196, grid=(4, 4))


@pytest.mark.parametrize(
    ("encoder", "said"),
    [
        (encoder_of(_Network()), None),
        (encoder_of(_Network(of_batch=1.0)), "other features alone than in a batch"),
        (encoder_of(_BlindPatches()), "two different images have the same features of patches"),
        (encoder_of(_OnlyBatches()), "other features alone than in a batch"),
        (encoder_of(_Network(), _NoNumbers), "the preprocessing is of another range of values"),
        (encoder_of(_Network(), _WrongRange), "the preprocessing is of another range of values"),
        (encoder_of(_Network(), mean=(128.0,) * 3), "mean 128 and standard deviation 0.25"),
        (encoder_of(_Network(), std=(64.0,) * 3), "mean 0.5 and standard deviation 64"),
    ],
)
def test_a_network_or_preprocessing_that_is_wrong_is_refused(encoder, said, monkeypatch):
    monkeypatch.setattr(checked, "load_encoder", lambda name: encoder)
    if said is None:
        assert len(list(self_test("stub:"))) == 4
    else:
        assert said in refusal("stub:")


def test_the_table_and_the_details_tell_what_a_user_needs(directory, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("SELFRAY_ENCODERS", str(tmp_path))
    line = next(line for line in encoder_table() if line.startswith("microsoft/rad-dino "))
    assert line.split()[1:5] == ["no", "518", "768", "37×37"] and "MIT, Microsoft" in line
    told = "\n".join(encoder_details("microsoft/rad-dino"))
    for expected in (
        "MIMIC-CXR", "model.safetensors", "huggingface.co/microsoft/rad-dino",
        "$SELFRAY_ENCODERS/microsoft/rad-dino", "dino_head.safetensors (optional)",
    ):  # fmt: skip
        assert expected in told
    (tmp_path / "microsoft").mkdir()
    directory.rename(tmp_path / "microsoft" / "rad-dino")
    assert "here           yes" in "\n".join(encoder_details("microsoft/rad-dino"))
    assert load_encoder("microsoft/rad-dino").width == 48
    told = "\n".join(encoder_details("random:vit_pico/16@64"))
    assert "patches [128, 4, 4]" in told and "mean [0.5307, 0.5307, 0.5307]" in told
