"""Each export, opened by its own runtime, gives the encoder's features."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from export_snippets import NETWORKS, export_into_small_files, opened, random_vit, write_encoder
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from selfray.cli import main
from selfray.export import FORMATS, graphs, stage
from selfray.export.stage import export_encoder
from selfray.export.vit_files import write_huggingface, write_timm
from selfray.models.encoder import Encoder, Tokens, vit_encoder
from selfray.models.preprocessing import Preprocessing
from selfray.models.published import load_encoder
from selfray.models.timm_names import timm_arguments, to_timm
from selfray.models.vit import ARCHITECTURES, build_vit

ROOT = Path(__file__).parents[2]
RUNTIMES = {
    "huggingface": ("transformers",),
    "dinov2": ("dinov2",),  # with its repository on the Python path
    "timm": ("timm",),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("openvino",),
    "torch": (),
}
GRAPHS = ("onnx", "openvino", "torch")
TOLERANCE = 2e-5


def need(to: str) -> None:
    for package in RUNTIMES[to]:
        pytest.importorskip(package)


def assert_opens(to: str, encoder: Encoder, folder: Path, batches: tuple[int, ...]) -> None:
    for batch in batches:
        torch.manual_seed(batch)
        channels = len(encoder.preprocessing.mean)
        images = torch.randn(batch, channels, encoder.image_size, encoder.image_size)
        for found, expected in zip(
            opened(to, encoder, folder, images), encoder.features(images), strict=True
        ):
            assert expected.std() > 0.05
            torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("to", FORMATS)
def test_the_runtime_gives_the_encoders_features_at_any_batch_size(to, network, tmp_path):
    need(to)
    encoder = write_encoder(tmp_path / "encoder", network)
    assert "read back by" in export_encoder(str(tmp_path / "encoder"), to, tmp_path / "out")
    assert_opens(to, encoder, tmp_path / "out", (1, 2, 5))


class _Pooling(nn.Module):
    """A network of no family: one channel, a grid of 3 x 3, the mean of it pooled."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 8, 5, stride=16)

    def forward(self, images):
        patches = torch.tanh(self.convolution(images)).flatten(2).transpose(1, 2)
        return Tokens(patches.mean(1), patches)


@pytest.fixture
def of_another_family(monkeypatch):
    torch.manual_seed(0)
    preprocessing = Preprocessing(48, (0.5,), (0.2,), 48)
    encoder = Encoder("pooling", _Pooling(), preprocessing, width=8, grid=(3, 3))
    monkeypatch.setattr(stage, "load_encoder", lambda name: encoder)
    monkeypatch.setattr(stage, "recorded_card", lambda name: {})
    monkeypatch.setattr("selfray.export.card.recorded_card", lambda name: {})
    return encoder


@pytest.mark.parametrize("to", GRAPHS)
def test_graphs_are_of_any_family(to, of_another_family, tmp_path):
    need(to)
    export_encoder("pooling", to, tmp_path / "out")
    assert_opens(to, of_another_family, tmp_path / "out", (1, 3))


@pytest.mark.parametrize("to", [to for to in FORMATS if to not in GRAPHS])
def test_other_formats_are_of_dinov2_type_networks(to, of_another_family, tmp_path, capsys):
    assert main(["export", "pooling", "--to", to, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("selfray export: pooling is no DINOv2-type") and "onnx" in said
    assert said.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", GRAPHS)
def test_a_network_that_fixes_the_batch_is_refused(to, of_another_family, tmp_path, capsys):
    need(to)
    forward = of_another_family.model.forward
    of_another_family.model.forward = lambda images: forward(images.reshape(len(images), 1, 48, 48))
    assert main(["export", "pooling", "--to", to, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "pooling cannot become a graph for any number of images" in said
    assert said.count("\n") == 1 and not list(tmp_path.iterdir())


def test_an_operation_that_onnx_has_not_is_told(of_another_family, tmp_path, capsys):
    need("onnx")

    class Solves(nn.Module):
        def forward(self, images):
            tokens = images.mean(1)[:, :3, :3].flatten(1, 2)[..., None].expand(-1, -1, 8)
            return Tokens(torch.linalg.eigvalsh(images[:, 0])[:, :8], tokens)

    of_another_family.model = Solves().eval()
    assert main(["export", "pooling", "--to", "onnx", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "does not translate one of its operations" in said
    assert said.count("\n") == 1 and not list(tmp_path.iterdir())


def test_a_graph_of_onnx_names_its_free_dimension(tmp_path):
    need("onnx")
    import onnxruntime

    write_encoder(tmp_path / "encoder")
    export_encoder(str(tmp_path / "encoder"), "onnx", tmp_path / "out")
    session = onnxruntime.InferenceSession(tmp_path / "out" / "encoder.onnx")
    shapes = {v.name: v.shape for v in [*session.get_inputs(), *session.get_outputs()]}
    assert shapes == {
        "images": ["batch", 3, 56, 56], "cls": ["batch", 48], "patches": ["batch", 48, 4, 4],
    }  # fmt: skip
    assert {v.type for v in session.get_inputs()} == {"tensor(float)"}


def test_large_weights_lie_beside_the_graph(tmp_path, monkeypatch):
    need("onnx")
    monkeypatch.setattr(graphs, "_LARGEST_FILE", 0)
    encoder = write_encoder(tmp_path / "encoder")
    export_encoder(str(tmp_path / "encoder"), "onnx", tmp_path / "out")
    sizes = {file.name: file.stat().st_size for file in (tmp_path / "out").iterdir()}
    assert sizes["encoder.onnx.data"] > 200_000 > sizes["encoder.onnx"] / 2
    assert_opens("onnx", encoder, tmp_path / "out", (2,))


@pytest.mark.parametrize("to", ["onnx", "openvino"])
def test_a_graph_for_which_there_is_no_room_is_one_line(to, tmp_path):
    need(to)
    code, said = export_into_small_files("random:vit_pico/14@28", to, tmp_path / "out")
    assert code == 2 and said.count("\n") == 1, said
    assert said.startswith("selfray export: ")
    assert not any(tmp_path.iterdir())


def test_openvino_gets_full_precision_and_sends_nothing(tmp_path, monkeypatch):
    need("openvino")
    telemetry = pytest.importorskip("openvino_telemetry")
    import openvino

    for name in ("send_event", "start_session", "send_error", "__init__"):
        monkeypatch.setattr(
            telemetry.Telemetry, name, lambda *args, **kwargs: pytest.fail("it would report")
        )
    write_encoder(tmp_path / "encoder")
    export_encoder(str(tmp_path / "encoder"), "openvino", tmp_path / "out")
    model = openvino.Core().read_model(tmp_path / "out" / "encoder.xml")
    assert str(model.input("images").partial_shape) == "[?,3,56,56]"
    assert str(model.output("patches").partial_shape) == "[?,48,4,4]"
    kinds = {op.get_element_type() for op in model.get_ops() if op.get_type_name() == "Constant"}
    assert openvino.Type.f16 not in kinds


def test_timm_opens_the_directory_too(tmp_path):
    timm = pytest.importorskip("timm")
    encoder = write_encoder(tmp_path / "encoder", "swiglu with registers")
    export_encoder(str(tmp_path / "encoder"), "timm", tmp_path / "out")
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    images = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        tokens, pooled = model.forward_features(images), model(images)
    cls, patches = encoder.features(images)
    torch.testing.assert_close(pooled, cls, atol=TOLERANCE, rtol=0)
    found = tokens[:, 3:].transpose(1, 2).unflatten(2, (4, 4))
    torch.testing.assert_close(found, patches, atol=TOLERANCE, rtol=0)
    assert model.pretrained_cfg["mean"] == [0.53] * 3 and model.pretrained_cfg["crop_pct"] == 1


@pytest.mark.parametrize("network", NETWORKS)
def test_timms_own_conversion_of_the_dinov2_file_gives_what_is_written_for_timm(network, tmp_path):
    timm = pytest.importorskip("timm")
    from timm.models.vision_transformer import checkpoint_filter_fn

    encoder = write_encoder(tmp_path / "encoder", network)
    for to in ("dinov2", "timm"):
        export_encoder(str(tmp_path / "encoder"), to, tmp_path / to)
    name, arguments = timm_arguments(encoder.vit, 56)
    model = timm.create_model(name, **arguments)
    original = load_file(tmp_path / "dinov2" / "backbone_compatible.safetensors")
    theirs = checkpoint_filter_fn(original, model)
    ours = load_file(tmp_path / "timm" / "model.safetensors")
    assert theirs.keys() == ours.keys() == model.state_dict().keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in ours)


@pytest.mark.parametrize("registers", [0, 4, 2])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_timms_name_and_arguments_make_a_network_of_the_same_shapes(arch, registers):
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        ours = build_vit(arch, patch_size=14, image_size=70, registers=registers)
        name, arguments = timm_arguments(ours, 70)
        theirs = timm.create_model(name, **arguments)
    shapes = {key: tensor.shape for key, tensor in to_timm(ours.state_dict()).items()}
    assert shapes == {key: tensor.shape for key, tensor in theirs.state_dict().items()}
    assert theirs.blocks[0].attn.num_heads == ours.shape.heads
    named = arch in ("vit_small", "vit_base", "vit_large", "vit_giant")
    assert (set(arguments) <= {"img_size", "num_classes", "reg_tokens"}) == named


@pytest.mark.parametrize(
    ("to", "interpolation"),
    [("timm", "bicubic"), ("timm", "bicubic-offset"), ("huggingface", "bicubic-offset"),
     ("huggingface", "bicubic"), ("dinov2", "bicubic-offset"), ("dinov2", "bicubic")],
)  # fmt: skip
def test_positions_of_another_grid_are_those_of_the_encoder(to, interpolation, tmp_path):
    need(to)
    preprocessing = Preprocessing(42, (0.5,) * 3, (0.2,) * 3, 48)
    encoder = vit_encoder("small", random_vit("mlp", interpolation), preprocessing)
    write = {"timm": write_timm, "huggingface": write_huggingface}
    write.get(to, stage.write_dinov2)(encoder, tmp_path)
    if to == "timm":
        assert json.loads((tmp_path / "config.json").read_text())["model_args"]["img_size"] == 42
    assert_opens(to, encoder, tmp_path, (2,))


def test_the_snippets_of_the_document_run_and_give_the_features(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "export.md").read_text()
    pixels = np.random.default_rng(0).integers(0, 256, (171, 140), dtype=np.uint8)
    Image.fromarray(pixels).save("radiograph.png")
    installed = [to for to in FORMATS if all(map(_is_installed, RUNTIMES[to]))]
    assert {"huggingface", "torch"} <= set(installed)
    for command in re.findall(r"^selfray (export .+)", text, flags=re.M):
        if command.split()[3] in (*installed, "dinov2"):
            assert main(command.split()) == 0
    preprocessing, *blocks = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    assert len(blocks) == len(FORMATS)
    folder = next(to for to in (*GRAPHS, "dinov2") if to in (*installed, "dinov2"))
    names: dict = {}
    exec(preprocessing.replace("exports/onnx", f"exports/{folder}"), names)
    encoder = load_encoder("selfray/phantom")
    images = encoder.preprocess(pixels)[None]
    assert np.abs(names["images"] - images.numpy()).max() < 1e-6
    cls, patches = encoder.features(images)
    for to, block in zip(FORMATS, blocks, strict=True):
        assert f"exports/{to}" in block
        if to not in installed:
            continue
        exec(block, names)
        found = torch.as_tensor(names["patches"])
        if found.ndim == 3:
            found = found.transpose(1, 2).unflatten(2, encoder.grid)
        torch.testing.assert_close(torch.as_tensor(names["cls"]), cls, atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(found, patches, atol=TOLERANCE, rtol=0)


def _is_installed(package: str) -> bool:
    from importlib.util import find_spec

    return find_spec(package) is not None
