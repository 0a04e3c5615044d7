"""An encoder by name: found, whole, and with the preprocessing that its publisher gave it."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load, load_file, save_file
from transformers import AutoModel, BitImageProcessorPil

from selfray.errors import InputError
from selfray.models import published
from selfray.models.encoder_directory import save_encoder
from selfray.models.huggingface import read_preprocessing
from selfray.models.preprocessing import Preprocessing
from selfray.models.published import (
    find_head,
    list_encoders,
    load_encoder,
)
from selfray.models.vit import Shape, VisionTransformer

TOLERANCE = 2e-5
CARD = {
    "synthetic": True,
    "data": [{"name": "thorax", "origin": "synthetic phantom", "licence": "CC0"}],
    "recipe": "demo",
    "step": 600,
    "licence": "MIT",
}

# The two files of huggingface.co/microsoft/rad-dino; the second without what names its own keys.
RAD_DINO_CONFIG = {
    "apply_layernorm": True, "architectures": ["Dinov2Model"],
    "attention_probs_dropout_prob": 0.0, "drop_path_rate": 0.0, "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0, "hidden_size": 768, "image_size": 518, "initializer_range": 0.02,
    "layer_norm_eps": 1e-06, "layerscale_value": 1.0, "mlp_ratio": 4, "model_type": "dinov2",
    "num_attention_heads": 12, "num_channels": 3, "num_hidden_layers": 12,
    "out_features": ["stage12"], "out_indices": [12], "patch_size": 14, "qkv_bias": True,
    "reshape_hidden_states": True,
    "stage_names": ["stem", *(f"stage{block}" for block in range(1, 13))],
    "torch_dtype": "float32", "transformers_version": "4.41.0", "use_swiglu_ffn": False,
}  # fmt: skip
RAD_DINO_PREPROCESSOR = {
    "crop_size": {"height": 518, "width": 518}, "do_center_crop": True, "do_convert_rgb": True,
    "do_normalize": True, "do_rescale": True, "do_resize": True,
    "image_mean": [0.5307, 0.5307, 0.5307], "image_processor_type": "BitImageProcessor",
    "image_std": [0.2583, 0.2583, 0.2583], "resample": 3,
    "rescale_factor": 0.00392156862745098, "size": {"shortest_edge": 518},
}  # fmt: skip


def small_vit(registers: int = 0, ffn: str = "mlp") -> VisionTransformer:
    """No parameter is zero or one, so that none can be forgotten unnoticed."""
    torch.manual_seed(0)
    model = VisionTransformer(
        Shape(48, 2, 3, ffn), patch_size=14, image_size=56, registers=registers
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.empty_like(parameter).normal_(std=0.1))
    return model.eval()


def write(model: VisionTransformer, directory: Path, **card) -> Path:
    save_encoder(model, directory, mean=0.53, std=0.26, card={**CARD, **card})
    return directory


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write(small_vit(), tmp_path / "encoder")


def edit(file: Path, **fields) -> None:
    content = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in {**content, **fields}.items() if v is not None}))


def refusal(name: str | Path) -> str:
    with pytest.raises(InputError) as error:
        load_encoder(str(name))
    assert "\n" not in str(error.value)
    return str(error.value)


# What is written


@pytest.mark.parametrize(("registers", "ffn"), [(0, "mlp"), (4, "mlp"), (0, "swiglu")])
def test_transformers_reads_the_same_features_from_what_is_saved(tmp_path, registers, ffn):
    model = small_vit(registers, ffn)
    directory = write(model, tmp_path / "encoder")
    theirs, info = AutoModel.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values()), info
    ours = load_encoder(str(directory))
    for height, width in ((56, 56), (70, 42)):
        images = torch.randn(2, 3, height, width)
        with torch.no_grad():
            expected = theirs.eval()(pixel_values=images).last_hidden_state
            kept = model(images)
        cls, patches = ours.features(images)
        torch.testing.assert_close(cls, expected[:, 0], atol=TOLERANCE, rtol=0)
        in_order = patches.flatten(2).transpose(1, 2)
        torch.testing.assert_close(in_order, expected[:, 1 + registers :], atol=TOLERANCE, rtol=0)
        assert torch.equal(cls, kept.cls) and torch.equal(in_order, kept.patches)


def test_transformers_reads_the_same_preprocessing_from_what_is_saved(directory):
    processor = BitImageProcessorPil.from_pretrained(directory)
    pixels = np.random.default_rng(0).integers(0, 256, (90, 70), dtype=np.uint8)
    expected = processor(Image.fromarray(pixels), return_tensors="pt")["pixel_values"][0]
    found = load_encoder(str(directory)).preprocess(pixels)
    assert (found - expected).abs().max() < 1 / 255


def test_what_was_saved_is_described(directory):
    encoder = load_encoder(str(directory))
    assert (encoder.mean, encoder.std) == (pytest.approx(0.53), pytest.approx(0.26))
    assert (encoder.image_size, encoder.patch_size, encoder.width) == (56, 14, 48)
    weights = (directory / "model.safetensors").read_bytes()
    assert encoder.weights_sha256 == hashlib.sha256(weights).hexdigest()
    assert encoder.synthetic and not encoder.model.training
    assert not load_encoder(str(write(small_vit(), directory, synthetic=False))).synthetic


def test_the_model_card_says_data_recipe_licence_limits_and_use(directory):
    card = (directory / "README.md").read_text()
    front, text = card.split("---\n")[1:]
    assert "license: mit\n" in front and "library_name: transformers\n" in front
    for told in ("synthetic phantom", "thorax", "CC0", "demo", "600",
                 "## Licence\n\nMIT. The terms", "## Limits", "## Intended use",
                 "not for diagnosis"):  # fmt: skip
        assert told in text, told
    real = (write(small_vit(), directory, synthetic=False, data=[]) / "README.md").read_text()
    assert "phantom" not in real


def test_whoever_may_read_the_config_may_read_the_weights(directory):
    assert len({path.stat().st_mode for path in directory.iterdir()}) == 1


def test_saving_replaces_an_encoder_whole_and_leaves_nothing_beside_it(directory):
    (directory / "left_over").write_text("of the encoder before")
    before = load_encoder(str(directory))
    write(small_vit(registers=2), directory)
    assert load_encoder(str(directory)).model.registers == 2
    assert before.model.registers == 0
    assert not (directory / "left_over").exists()
    assert [path.name for path in directory.parent.iterdir()] == ["encoder"]


def test_saving_that_fails_leaves_the_encoder_that_was_there(directory):
    before = (directory / "model.safetensors").read_bytes()
    with pytest.raises(TypeError):
        write(small_vit(registers=2), directory, step=object())  # cannot be written as JSON
    assert (directory / "model.safetensors").read_bytes() == before
    assert load_encoder(str(directory)).model.registers == 0
    write(small_vit(registers=2), directory)
    assert [path.name for path in directory.parent.iterdir()] == ["encoder"]


def test_saving_replaces_nothing_but_an_encoder(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with pytest.raises(InputError, match="is no encoder directory"):
        write(small_vit(), tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "years of work"


def test_heads_are_saved_beside_the_encoder_and_found(tmp_path):
    tensors = {"mlp.0.weight": torch.randn(4, 48), "last_layer.weight_g": torch.ones(9, 1)}
    run = tmp_path / "run"
    for name in (run, run / "encoder"):
        assert not name.exists()
    save_encoder(
        small_vit(), run / "encoder", mean=0.5, std=0.2, card=CARD, heads={"dino_head": tensors}
    )
    file = find_head(str(run))
    assert file == run / "encoder" / "dino_head.safetensors"
    assert all(torch.equal(tensors[name], found) for name, found in load_file(file).items())
    assert find_head(str(run), "ibot_head") is None
    assert find_head("random:vit_nano") is None


# What is read


def test_a_run_directory_stands_for_its_encoder(tmp_path, directory):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.json").write_text("{}")
    assert "run without an encoder yet" in refusal(run)
    shutil.move(directory, run / "encoder")
    assert load_encoder(str(run)).width == 48


def test_rad_dinos_own_files_are_understood(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(RAD_DINO_PREPROCESSOR))
    found = read_preprocessing(tmp_path)
    assert found == Preprocessing(518, (0.5307,) * 3, (0.2583,) * 3, shortest_edge=518)
    # Its configuration at a width and depth that a test can hold.
    small = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}
    model = VisionTransformer(Shape(48, 2, 3), patch_size=14, image_size=518)
    write(model, tmp_path / "encoder")
    (tmp_path / "encoder" / "config.json").write_text(json.dumps(RAD_DINO_CONFIG | small))
    shutil.copy(tmp_path / "preprocessor_config.json", tmp_path / "encoder")
    encoder = load_encoder(str(tmp_path / "encoder"))
    assert (encoder.image_size, encoder.patch_size, encoder.model.registers) == (518, 14, 0)
    assert (encoder.mean, encoder.std) == (pytest.approx(0.5307), pytest.approx(0.2583))
    with torch.device("meta"):
        whole = VisionTransformer(Shape(768, 12, 12), patch_size=14, image_size=518)
    # The published file, 346,345,912 bytes: 4 bytes a parameter and a header of some kilobytes.
    header = 346_345_912 - 4 * sum(p.numel() for p in whole.parameters())
    assert 8 < header < 40_000


def test_what_is_written_has_the_fields_of_rad_dinos_own_files(directory):
    ours = json.loads((directory / "config.json").read_text())
    assert set(RAD_DINO_CONFIG) - set(ours) == {"transformers_version"}
    ours = json.loads((directory / "preprocessor_config.json").read_text())
    assert set(ours) == set(RAD_DINO_PREPROCESSOR)


def test_dinov2s_own_parameter_names_are_read_too(directory):
    model = small_vit()
    for file in ("model.safetensors", "selfray.json"):
        (directory / file).unlink()
    save_file(model.state_dict(), directory / "backbone_compatible.safetensors")
    encoder = load_encoder(str(directory))
    images = torch.randn(1, 3, 56, 56)
    with torch.no_grad():
        assert torch.equal(encoder.features(images)[0], model(images).cls)
    assert encoder.model.position_interpolation == "bicubic-offset"


def test_an_encoder_continued_from_dinov2s_own_code_keeps_its_interpolation(directory):
    model = small_vit()
    model.position_interpolation = "bicubic-offset"
    images = torch.randn(1, 3, 70, 42)
    found, _ = load_encoder(str(write(model, directory))).features(images)
    with torch.no_grad():
        assert torch.equal(found, model(images).cls)
    edit(directory / "selfray.json", position_interpolation="nearest")
    assert "position_interpolation is 'nearest'" in refusal(directory)


def test_half_precision_weights_become_float32(directory):
    file = directory / "model.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(file).items()}, file)
    encoder = load_encoder(str(directory))
    assert {p.dtype for p in encoder.model.parameters()} == {torch.float32}
    torch.testing.assert_close(
        encoder.model.pos_embed, small_vit().pos_embed, atol=1e-3, rtol=1e-3, check_dtype=True
    )


def test_preprocessing_equals_transformers_bit_image_processor():
    for shortest_edge, size in ((56, 56), (64, 56)):
        mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        theirs = BitImageProcessorPil(
            size={"shortest_edge": shortest_edge},
            crop_size={"height": size, "width": size},
            image_mean=mean,
            image_std=std,
        )
        preprocessing = Preprocessing(size, mean, std, shortest_edge)
        for height, width in ((56, 56), (64, 64), (90, 131), (131, 90), (40, 41), (57, 300)):
            pixels = np.random.default_rng(height).integers(0, 256, (height, width), np.uint8)
            expected = theirs(Image.fromarray(pixels), return_tensors="np")["pixel_values"][0]
            found = preprocessing(pixels)
            assert found.dtype == torch.float32
            np.testing.assert_allclose(found, expected, atol=1e-6)


def test_pixels_of_another_kind_are_refused():
    preprocessing = Preprocessing(56, (0.5,) * 3, (0.2,) * 3, 56)
    for pixels in (np.zeros((60, 60), np.uint16), np.zeros((60, 60, 4), np.uint8)):
        with pytest.raises(InputError, match=r"allowed: uint8 \[H, W\]"):
            preprocessing(pixels)


def test_attention_of_the_class_token_is_a_share_of_each_patch(directory):
    attention = load_encoder(str(directory)).attention(torch.randn(2, 3, 56, 70))
    assert attention.shape == (2, 3, 20)
    assert (attention >= 0).all() and (attention.sum(-1) <= 1).all()


# Names


def test_random_weights_are_the_same_each_time_and_leave_torchs_state_alone():
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first = load_encoder("random:vit_nano/16@64")
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(8)
    again = load_encoder("random:vit_nano/16@64")
    assert first.weights_sha256 == again.weights_sha256
    assert first.weights_sha256 != load_encoder("random:vit_nano/16@80").weights_sha256
    assert (first.patch_size, first.image_size, first.width) == (16, 64, 192)
    assert not first.synthetic
    default = load_encoder("random:vit_nano")
    assert (default.patch_size, default.image_size) == (14, 224)


def test_a_published_name_is_taken_from_hugging_faces_cache(directory, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    repository = cache / "models--microsoft--rad-dino"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    shutil.move(directory, snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    encoder = load_encoder("microsoft/rad-dino")
    assert (encoder.name, encoder.width) == ("microsoft/rad-dino", 48)
    (snapshot / "model.safetensors").unlink()
    said = refusal("microsoft/rad-dino")
    assert "model.safetensors" in said and "huggingface.co/microsoft/rad-dino" in said


def test_shipped_encoders_are_found_and_listed(directory, monkeypatch):
    monkeypatch.setattr(published, "SHIPPED", directory.parent)
    assert load_encoder("selfray/encoder").width == 48
    assert "selfray/encoder" in refusal("selfray/encodr")
    shipped = list_encoders()[0]
    assert (shipped.name, shipped.input_size, shipped.width) == ("selfray/encoder", 56, 48)
    assert shipped.available and shipped.licence == "MIT"
    assert {"config.json", "model.safetensors"} <= set(shipped.files)


def test_the_list_holds_names_that_can_be_asked_for(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    names = {listing.name: listing for listing in list_encoders()}
    assert names["microsoft/rad-dino"].licence == "MIT"
    assert names["facebook/dinov2-giant"].width == 1536
    assert "facebook/dinov2-with-registers-small" in names
    assert not names["microsoft/rad-dino-maira-2"].available


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("random:vit_smal", "Did you mean 'vit_small'?"),
        ("random:vit-small", "random:ARCH[/PATCH[@SIZE]]"),
        ("random:vit_small/14@225", "Use 224 or 238"),
        ("random:vit_pico/0", "PATCH is 0. Use 1 to 64"),
        ("random:vit_pico/99999984@99999984", "PATCH is 99999984. Use 1 to 64"),
        ("random:vit_pico/16@99999984", "SIZE is 99999984. Use 4096 at most"),
        ("random:vit_pico/1@513", "SIZE is 513. Use 512 at most"),
        ("microsoft/raddino", "Did you mean 'microsoft/rad-dino'?"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(name, said):
    assert said in refusal(name)


# Files that are not whole


@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json", "model.safetensors"])
def test_a_missing_or_damaged_file_is_named(directory, file):
    content = (directory / file).read_bytes()
    (directory / file).write_bytes(content[: len(content) // 2])
    assert file in refusal(directory)
    (directory / file).unlink()
    assert file in refusal(directory)


def test_parameters_are_all_there_and_no_others(directory):
    file = directory / "model.safetensors"
    tensors = load(file.read_bytes())  # load_file would map what is overwritten below
    key = "encoder.layer.1.attention.attention.key.bias"
    save_file({name: t for name, t in tensors.items() if name != key}, file)
    assert f"1 missing ({key})" in refusal(directory)
    save_file({**tensors, "classifier.weight": torch.zeros(2)}, file)
    assert "1 unexpected (classifier.weight)" in refusal(directory)
    save_file({**tensors, "layernorm.bias": torch.zeros(47)}, file)
    assert "norm.bias is [47], config.json asks for [48]" in refusal(directory)


def test_pickled_weights_are_never_opened(directory):
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(b"not a pickle")
    assert "pytorch_model.bin holds more than tensors" in refusal(directory)


@pytest.mark.parametrize(
    ("file", "field", "value", "said"),
    [
        ("config.json", "hidden_act", "relu", "hidden_act is 'relu', allowed: 'gelu'"),
        ("config.json", "mlp_ratio", 2, "mlp_ratio is 2, allowed: 4"),
        ("config.json", "hidden_size", None, "'hidden_size' is missing"),
        ("config.json", "image_size", [56, 56], "image_size is [56, 56], allowed: one whole"),
        ("preprocessor_config.json", "resample", 2, "resample is 2, allowed: 3"),
        ("preprocessor_config.json", "do_normalize", False, "do_normalize is False"),
        ("preprocessor_config.json", "rescale_factor", 1.0, "rescale_factor is 1.0"),
        ("preprocessor_config.json", "image_mean", None, "image_mean is None, allowed: three"),
        ("preprocessor_config.json", "image_mean", [0.5], "allowed: three each"),
        ("preprocessor_config.json", "crop_size", {"height": 50, "width": 50}, "crop_size is 50"),
        ("preprocessor_config.json", "crop_size", {"height": 56, "width": 42}, "crop_size.width"),
        ("preprocessor_config.json", "size", {"shortest_edge": 42}, "less than the crop"),
    ],
)
def test_a_setting_of_another_kind_of_encoder_is_named(directory, file, field, value, said):
    edit(directory / file, **{field: value})
    assert said in refusal(directory)
