"""Encoder files that are not what they should be end a command in one line, with exit code 2."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from publisher_files import convert, whole_object
from safetensors.torch import load, save_file

from selfray.cli import main
from selfray.data.phantom import write_phantom
from selfray.models.encoder_directory import save_encoder
from selfray.models.vit import Shape, VisionTransformer

Damage = Callable[[Path], None]
CARD = {"synthetic": True, "data": []}


def network(width: int = 48) -> VisionTransformer:
    torch.manual_seed(0)
    model = VisionTransformer(Shape(width, 2, 3), patch_size=14, image_size=56)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.empty_like(parameter).normal_(std=0.1))
    return model.eval()


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("good") / "encoder"
    save_encoder(network(), directory, mean=0.53, std=0.26, card=CARD)
    return directory


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("data") / "phantom"
    write_phantom(out, patients=3, size=64, seed=0, sites=("A",))
    return out


def with_field(file: str, field: str, value: object) -> Damage:
    def damage(directory: Path) -> None:
        content = json.loads((directory / file).read_text())
        (directory / file).write_text(json.dumps({**content, field: value}))

    return damage


def with_tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    def damage(directory: Path) -> None:
        file = directory / "model.safetensors"
        tensors = load(file.read_bytes())
        save_file({**tensors, name: change(tensors[name])}, file)

    return damage


def with_bytes(file: str, change: Callable[[bytes], bytes]) -> Damage:
    def damage(directory: Path) -> None:
        (directory / file).write_bytes(change((directory / file).read_bytes()))

    return damage


def not_a_number(tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat([tensor[:-1], torch.tensor([torch.nan])])


def without_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()


def of_another_width(directory: Path) -> None:
    save_encoder(network(96), directory / "wide", mean=0.53, std=0.26, card=CARD)
    shutil.copy(directory / "wide" / "model.safetensors", directory)


def renamed_pickle(directory: Path) -> None:
    torch.save(network().state_dict(), directory / "model.safetensors")


def pickled_module(directory: Path) -> None:
    without_weights(directory)
    torch.save(network(), directory / "pytorch_model.bin")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 346345912\n"
NORM, KEY = "layernorm.bias", "encoder.layer.0.attention.attention.key.weight"
DAMAGED: dict[str, tuple[Damage, str]] = {
    "no weights": (without_weights, "has no model.safetensors"),
    "truncated": (with_bytes("model.safetensors", lambda b: b[:5000]), "cannot be read"),
    "last byte missing": (with_bytes("model.safetensors", lambda b: b[:-1]), "cannot be read"),
    "empty": (with_bytes("model.safetensors", lambda b: b""), "cannot be read"),
    "pointer": (with_bytes("model.safetensors", lambda b: POINTER), "Git LFS's pointer"),
    "another width": (of_another_width, "config.json asks for [1, 1, 48]"),
    "unknown kind": (with_field("config.json", "model_type", "resnet"), "model_type is 'resnet'"),
    "kind of lists": (with_field("config.json", "model_type", ["dinov2"]), "model_type is ["),
    "not a number": (with_tensor(NORM, not_a_number), f"{NORM} holds values that are not finite"),
    "integers": (with_tensor(NORM, lambda t: t.long()), "norm.bias is int64, expected float32"),
    "no shape": (with_tensor(NORM, lambda t: t[0]), "norm.bias is [], config.json asks for"),
    "parts differ": (with_tensor(KEY, lambda t: t[:, :5].contiguous()), "have different or no"),
    "renamed pickle": (renamed_pickle, "renamed to safetensors, and is not opened"),
    "pickled module": (pickled_module, "holds more than tensors, which can run any code"),
    "no JSON": (with_bytes("config.json", lambda b: b"<html>"), "config.json is no JSON"),
    "nested JSON": (with_bytes("config.json", lambda b: b"[" * 99_999), "config.json is no JSON"),
    "negative width": (with_field("config.json", "hidden_size", -48), "hidden_size is -48, allow"),
    "width in words": (with_field("config.json", "hidden_size", "48"), "hidden_size is '48'"),
    "heads": (with_field("config.json", "num_attention_heads", 5), "no multiple of num_attention"),
    "no heads": (with_field("config.json", "num_attention_heads", 0), "num_attention_heads is 0"),
    "endless": (with_field("config.json", "num_hidden_layers", 10**7), "allowed: one whole number"),
    "odd patch": (with_field("config.json", "patch_size", 16), "config.json: image_size is 56"),
    "mean of 0 to 255": (
        with_field("preprocessor_config.json", "image_mean", [135.0] * 3),
        "image_mean is [135.0, 135.0, 135.0], allowed: three each of 0 to 1",
    ),
    "no spread": (with_field("preprocessor_config.json", "image_std", [0, 0, 0]), "image_std is"),
    "crop in words": (
        with_field("preprocessor_config.json", "crop_size", {"height": "56", "width": "56"}),
        "crop_size.height is '56'",
    ),
    "no crop": (with_field("preprocessor_config.json", "crop_size", None), "crop_size is None"),
    "factor": (with_field("preprocessor_config.json", "rescale_factor", "x"), "rescale_factor is"),
}


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr of a command that ends with 2."""
    assert main(words) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "Traceback" not in err
    return err


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_encoder_is_refused_in_one_line(case, good, data, tmp_path, capsys):
    damage, said = DAMAGED[case]
    directory = tmp_path / "encoder"
    shutil.copytree(good, directory)
    damage(directory)
    out = tmp_path / "features"
    for words in (
        ["features", str(directory), "--data", str(data), "--out", str(out)],
        ["encoders", "--check", str(directory)],
        ["encoders", str(directory)],
    ):
        message = refused(words, capsys)
        assert said in message and message.startswith(f"selfray {words[0]}: {directory}")
    assert not out.exists()


def test_the_undamaged_encoder_is_accepted(good, data, tmp_path, capsys):
    out = tmp_path / "features"
    assert main(["features", str(good), "--data", str(data), "--out", str(out)]) == 0
    assert main(["encoders", str(good), "--check"]) == 0
    assert (out / "cls.npy").exists() and "golden values: equal" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("microsoft/rad-dno", "microsoft/rad-dino"),
        ("selfray/phantm", "selfray/phantom"),
        ("facebook/dinov2-bas", "facebook/dinov2-base"),
        ("random:vit_smal", "vit_small"),
    ],
)
def test_a_name_with_a_typing_error_is_answered_by_the_nearest(name, nearest, data, capsys):
    for words in (
        ["features", name, "--data", str(data), "--out", "nowhere/features"],
        ["encoders", "--check", name],
    ):
        assert f"Did you mean '{nearest}'?" in refused(words, capsys)


def test_a_check_without_a_name_says_what_is_missing(capsys):
    assert "--check NAME is missing" in refused(["encoders", "--check"], capsys)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
def test_the_command_that_converts_a_pickled_network_leads_out(file, good, tmp_path, capsys):
    directory = tmp_path / "it's $HOME & more"
    shutil.copytree(good, directory)
    tensors = load((directory / "model.safetensors").read_bytes())
    without_weights(directory)
    torch.save(whole_object(tensors), directory / file)
    convert(refused(["encoders", str(directory), "--check"], capsys))
    assert main(["encoders", str(directory), "--check"]) == 0
