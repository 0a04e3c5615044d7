"""selfray export: whole or not at all, described, and refused where it cannot be right."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from export_snippets import NETWORKS, export_into_small_files, random_vit, write_encoder
from safetensors.torch import load_file, save_file

from selfray.cli import main
from selfray.export import FORMATS, stage, vit_files
from selfray.export.card import LIBRARIES, SNIPPETS
from selfray.export.stage import export_encoder
from selfray.models.encoder import vit_encoder
from selfray.models.huggingface import preprocessor_config
from selfray.models.preprocessing import Preprocessing
from selfray.models.published import ENCODERS_VARIABLE, load_encoder

PICO = "random:vit_pico/14@28"


def run(encoder: object, to: str, out: Path) -> int:
    return main(["export", str(encoder), "--to", to, "--out", str(out)])


def refused(capsys, encoder: object, to: str, out: Path, code: int = 2) -> str:
    before = sorted(out.parent.rglob("*"))
    assert run(encoder, to, out) == code
    assert sorted(out.parent.rglob("*")) == before, "nothing is written, nothing left behind"
    said = capsys.readouterr().err
    assert said.startswith("selfray export: ") and said.count("\n") == 1
    return said


def test_every_format_is_told_everywhere():
    assert FORMATS.keys() == stage._FORMATS.keys() == LIBRARIES.keys() == SNIPPETS.keys()


# Formats


def dinov2_shapes(network: str) -> dict[str, tuple[int, ...]]:
    """Parameters of DINOv2's `DinoVisionTransformer` with `block_chunks=0`: width 48, 2 blocks.

    Written down from dinov2/models/vision_transformer.py and dinov2/layers/{block, attention, mlp,
    swiglu_ffn, layer_scale, patch_embed}.py of facebookresearch/dinov2.
    """
    registers, ffn = NETWORKS[network]
    shapes = {
        "cls_token": (1, 1, 48),
        "pos_embed": (1, 17, 48),
        "mask_token": (1, 48),
        "patch_embed.proj.weight": (48, 3, 14, 14),
        "patch_embed.proj.bias": (48,),
        "norm.weight": (48,),
        "norm.bias": (48,),
    }
    if registers:
        shapes["register_tokens"] = (1, registers, 48)
    hidden = (int(4 * 48 * 2 / 3) + 7) // 8 * 8  # SwiGLUFFNFused
    linear = {"attn.qkv": (144, 48), "attn.proj": (48, 48)}
    linear |= (
        {"mlp.fc1": (192, 48), "mlp.fc2": (48, 192)}
        if ffn == "mlp"
        else {"mlp.w12": (2 * hidden, 48), "mlp.w3": (48, hidden)}
    )
    for block in ("blocks.0.", "blocks.1."):
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
            shapes[block + name] = (48,)
        shapes |= {f"{block}ls1.gamma": (48,), f"{block}ls2.gamma": (48,)}
        for name, shape in linear.items():
            shapes |= {f"{block}{name}.weight": shape, f"{block}{name}.bias": shape[:1]}
    return shapes


@pytest.mark.parametrize("network", NETWORKS)
def test_names_and_shapes_for_dinov2_are_those_of_its_class(network, tmp_path):
    write_encoder(tmp_path / "encoder", network)
    export_encoder(str(tmp_path / "encoder"), "dinov2", tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "backbone_compatible.safetensors")
    assert {name: tuple(t.shape) for name, t in tensors.items()} == dinov2_shapes(network)
    arguments = json.loads((tmp_path / "out" / "dinov2_arguments.json").read_text())
    registers, ffn = NETWORKS[network]
    assert arguments == {
        "img_size": 56, "patch_size": 14, "embed_dim": 48, "depth": 2, "num_heads": 3,
        "mlp_ratio": 4, "init_values": 1.0, "block_chunks": 0, "num_register_tokens": registers,
        "ffn_layer": {"mlp": "mlp", "swiglu": "swiglufused"}[ffn],
        "interpolate_antialias": bool(registers), "interpolate_offset": 0.0,
    }  # fmt: skip


@pytest.mark.parametrize("to", ["huggingface", "dinov2"])
def test_what_this_package_reads_is_the_encoder_again(to, tmp_path):
    encoder = write_encoder(tmp_path / "encoder", "registers")
    export_encoder(str(tmp_path / "encoder"), to, tmp_path / "out")
    again = load_encoder(str(tmp_path / "out"))
    assert again.synthetic and again.preprocessing == encoder.preprocessing
    images = torch.randn(2, 3, 70, 42)
    for found, expected in zip(again.features(images), encoder.features(images), strict=True):
        assert torch.equal(found, expected)


def test_preprocessing_that_transformers_cannot_say_is_not_said_wrongly(tmp_path):
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    fits = preprocessor_config(Preprocessing(42, mean, std, 48))
    assert fits is not None and fits["size"] == {"shortest_edge": 48}
    assert fits["crop_size"] == {"height": 42, "width": 42} and fits["image_mean"] == list(mean)
    for other in (
        Preprocessing(42, mean, std),
        Preprocessing(42, mean, std, 48, filter="bilinear"),
        Preprocessing(42, mean, std, 48, resized_as="float"),
        Preprocessing(42, mean, std, 48, odd_margin="even"),
    ):
        assert preprocessor_config(other) is None
        vit_files.write_huggingface(vit_encoder("e", random_vit("mlp"), other), tmp_path)
        assert not (tmp_path / "preprocessor_config.json").exists()


# What lies beside


@pytest.mark.parametrize("to", ["huggingface", "dinov2", "timm", "torch"])
def test_the_directory_says_what_it_is(to, tmp_path):
    encoder = write_encoder(tmp_path / "secret place" / "encoder")
    export_encoder(str(tmp_path / "secret place" / "encoder"), to, tmp_path / "out")
    out = tmp_path / "out"
    record = json.loads((out / "export.json").read_text())
    assert record["format"] == to and record["weights_sha256"] == encoder.weights_sha256
    for name, digest in record["files"].items():
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == digest
    assert json.loads((out / "preprocessing.json").read_text()) == json.loads(
        json.dumps(encoder.preprocessing.description())
    )
    card = (out / "README.md").read_text()
    for told in (encoder.weights_sha256, "thorax", "CC0", "recipe", "macro_auroc: 0.625",
                 "synthetic phantom", "## Licence", "## Limits", "not for diagnosis",
                 f"library_name: {LIBRARIES[to]}", "[batch, 3, 56, 56]"):  # fmt: skip
        assert told in card, told
    assert "secret" not in card + (out / "export.json").read_text()
    assert len({file.stat().st_mode for file in out.iterdir()}) == 1


def test_a_published_encoder_stays_its_publishers(tmp_path, monkeypatch):
    write_encoder(tmp_path / "microsoft" / "rad-dino")
    (tmp_path / "microsoft" / "rad-dino" / "selfray.json").unlink()
    monkeypatch.setenv(ENCODERS_VARIABLE, str(tmp_path))
    export_encoder("microsoft/rad-dino", "dinov2", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    for told in ("published by Microsoft Health Futures under the licence MIT", "A conversion",
                 "license: mit", "MIMIC-CXR", "huggingface.co/microsoft/rad-dino"):  # fmt: skip
        assert told in card, told
    assert "phantom" not in card and "Horizontal flips" not in card


def test_random_weights_are_called_so(tmp_path):
    export_encoder("random:vit_pico/14@28", "dinov2", tmp_path / "out")
    assert "nothing was learned" in (tmp_path / "out" / "README.md").read_text()


# Whole or not at all


def test_the_same_export_may_be_repeated_and_another_may_not(tmp_path, capsys):
    write_encoder(tmp_path / "encoder")
    write_encoder(tmp_path / "other", "registers")
    out = tmp_path / "out"
    assert run(tmp_path / "encoder", "dinov2", out) == 0
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    (out / "left over").write_text("")
    assert run(tmp_path / "encoder", "dinov2", out) == 0
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["encoder", "other", "out"]
    capsys.readouterr()
    for encoder, to in (("encoder", "torch"), ("other", "dinov2")):
        said = refused(capsys, tmp_path / encoder, to, out)
        assert "holds encoder for dinov2. Choose another path." in said


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_nothing_else_is_overwritten(kind, tmp_path, capsys):
    out = tmp_path / "out"
    if kind == "folder":
        out.mkdir()
        (out / "thesis.txt").write_text("years")
    else:
        out.write_text("years")
    said = refused(capsys, "random:vit_pico/14@28", "dinov2", out)
    assert "exists and is no export" in said


def test_an_empty_folder_may_be_filled(tmp_path):
    (tmp_path / "out").mkdir()
    assert run("random:vit_pico/14@28", "dinov2", tmp_path / "out") == 0
    assert (tmp_path / "out" / "export.json").is_file()


def test_what_reads_back_otherwise_is_not_kept(tmp_path, capsys, monkeypatch):
    write_encoder(tmp_path / "encoder")
    right = vit_files.to_huggingface

    def wrong(state):
        renamed = right(state)
        renamed["layernorm.bias"] = renamed["layernorm.bias"] + 1e-3
        return renamed

    monkeypatch.setattr(vit_files, "to_huggingface", wrong)
    said = refused(capsys, tmp_path / "encoder", "huggingface", tmp_path / "out", code=1)
    assert "huggingface: cls differs by" in said and "Nothing was written" in said


@pytest.mark.parametrize("to", ["huggingface", "dinov2", "torch"])
def test_an_encoder_whose_features_are_all_0_is_refused(to, tmp_path, capsys):
    write_encoder(tmp_path / "encoder")
    file = tmp_path / "encoder" / "model.safetensors"
    save_file({name: t * 0 for name, t in load_file(file).items()}, file)
    said = refused(capsys, tmp_path / "encoder", to, tmp_path / "out")
    assert "cls of images of noise have a root mean square of 0, allowed: more than 0" in said


def test_too_little_room_is_told_before_anything_is_written(tmp_path, capsys, monkeypatch):
    needed = 2.2 * sum(t.nbytes for t in load_encoder(PICO).model.state_dict().values())
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=int(needed) - 1))
    monkeypatch.setattr(stage, "_write", None)
    said = refused(capsys, PICO, "torch", tmp_path / "out")
    assert f"needs {needed / 1e6:.1f} MB there. Make room" in said


@pytest.mark.parametrize("to", ["torch", "timm", "dinov2"])
def test_a_file_that_cannot_grow_is_one_line(to, tmp_path):
    code, said = export_into_small_files(PICO, to, tmp_path / "out")
    assert code == 2 and said.count("\n") == 1, said
    assert said.startswith("selfray export: ") and "File too large" in said
    assert not any(tmp_path.iterdir())


def test_a_parameter_too_few_is_told_though_no_feature_needs_it(tmp_path, capsys, monkeypatch):
    write_encoder(tmp_path / "encoder")
    right = vit_files.to_huggingface
    monkeypatch.setattr(
        vit_files,
        "to_huggingface",
        lambda state: {k: t for k, t in right(state).items() if "mask_token" not in k},
    )
    said = refused(capsys, tmp_path / "encoder", "huggingface", tmp_path / "out", code=1)
    assert "missing_keys" in said


def test_without_the_runtime_it_is_written_and_called_not_verified(tmp_path, capsys, monkeypatch):
    write_encoder(tmp_path / "encoder")
    monkeypatch.setattr(stage, "find_spec", lambda name: None)
    assert run(tmp_path / "encoder", "huggingface", tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "not verified: transformers is not installed" in said
    assert "python -m pip install transformers" in said
    assert json.loads((tmp_path / "out" / "export.json").read_text())["read_back"] is None


def test_a_missing_package_is_named_with_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(stage, "find_spec", lambda name: None)
    said = refused(capsys, "random:vit_pico/14@28", "onnx", tmp_path / "out")
    assert "onnx needs onnx and onnxscript. Install: python -m pip install onnx onnxscript" in said


def test_the_output_says_the_difference_and_how_to_open_it(tmp_path, capsys):
    assert run("random:vit_small/14@28", "timm", tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert '"vit_small_patch14_dinov2"' in said and "img_size=28, num_classes=0" in said
    assert said.endswith(f"wrote {tmp_path / 'out'}\n")
    assert run("random:vit_pico/14@28", "torch", tmp_path / "torch") == 0
    said = capsys.readouterr().out
    assert "read back by torch" in said and "cls 0.0e+00" in said


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("export e --to onx --out o", "Did you mean 'onnx'?"),
        ("export e --out o", "--to"),
        ("export e --to onnx", "--out"),
        ("export random:vit_none --to onnx --out o", "vit_none"),
    ],
)
def test_wrong_words_are_one_line(words, told, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stage, "find_spec", lambda name: object())
    assert main(words.split()) == 2
    said = capsys.readouterr().err
    assert told in said and said.count("\n") == 1 and not list(tmp_path.iterdir())
