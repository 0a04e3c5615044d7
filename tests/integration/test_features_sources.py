"""Features straight from files, at each precision, over processes; what cannot be used is named."""

import csv
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, load_dataset
from PIL import Image
from radiograph_files import die_of_dark, soft_image, write_dicom

import selfray.inference
from selfray.cli import main
from selfray.data.image_source import FolderImages, open_images
from selfray.data.radiograph import read_eight_bits
from selfray.errors import InputError, Interrupted
from selfray.feature_directory import FeatureWriter, open_features
from selfray.features import extract_features
from selfray.models.preprocessing import Preprocessing
from selfray.models.published import load_encoder

ENCODER = "random:vit_pico/16@64"


def eight_bits(seed: int, height: int = 150, width: int = 120) -> np.ndarray:
    return soft_image(height, width, white=255, seed=seed).astype(np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine good files of four kinds, two bad ones, and one that is no image."""
    folder = tmp_path_factory.mktemp("archive")
    for number in range(3):
        place = folder / "MUELLER^HANS" / f"{number}.dcm"
        place.parent.mkdir(exist_ok=True)
        write_dicom(place, soft_image(150, 120, seed=number))
    for number in range(3, 6):
        Image.fromarray(eight_bits(number)).save(folder / f"{number}.png")
    for number in range(6, 8):
        Image.fromarray(eight_bits(number)).save(folder / f"{number}.jpg", quality=95)
    Image.fromarray(soft_image(150, 120, white=60_000, seed=8).astype(np.uint16)).save(
        folder / "8.tif"
    )
    (folder / "MUELLER^HANS" / "damaged.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"\1" * 40)
    Image.fromarray(np.full((150, 120), 7, np.uint8)).save(folder / "4b.png")
    (folder / "notes.txt").write_text("not an image")
    return folder


def features_of(folder: Path, out: Path, **options) -> Path:
    return extract_features(ENCODER, folder, out, **options)


def test_a_folders_features_are_the_encoders_own_and_rows_do_not_shift(folder, tmp_path):
    features = open_features(features_of(folder, tmp_path / "f", patch_tokens=True))
    with (tmp_path / "f.files.csv").open() as file:
        path_of = {line["image_id"]: line["path"] for line in csv.DictReader(file)}
    ids = features.rows["image_id"].to_pylist()
    paths = [folder / path_of[image_id] for image_id in ids]
    assert sorted(path.name for path in paths) == [
        "0.dcm", "1.dcm", "2.dcm", "3.png", "4.png", "5.png", "6.jpg", "7.jpg", "8.tif"
    ]  # fmt: skip
    cls, patches = load_encoder(ENCODER)(paths)
    np.testing.assert_allclose(features.cls, cls, atol=2e-5)
    np.testing.assert_allclose(features.patch_mean, patches.mean((2, 3)), atol=2e-5)
    tokens = np.load(tmp_path / "f" / "patch_tokens.npy", mmap_mode="r")
    assert tokens.dtype == np.float16 and tokens.shape == (9, 4, 4, 128)
    np.testing.assert_allclose(tokens, patches.permute(0, 2, 3, 1), atol=2e-3)
    left_out = [json.loads(x) for x in (tmp_path / "f" / "left_out.jsonl").read_text().splitlines()]
    assert {path_of[line["image_id"]] for line in left_out} == {
        "4b.png", "MUELLER^HANS/damaged.dcm"
    }  # fmt: skip
    assert any("constant" in line["reason"] for line in left_out)
    assert features.manifest["left_out"] == 2
    assert features.manifest["arrays"]["cls"]["shape"] == [9, 128]


def test_no_file_name_is_in_the_output_and_the_list_is_for_the_owner_alone(folder, tmp_path):
    out = features_of(folder, tmp_path / "f")
    text = b"".join(file.read_bytes() for file in out.iterdir())
    assert not any(name in text for name in (b"MUELLER", b"damaged.dcm", folder.name.encode()))
    assert stat.S_IMODE((tmp_path / "f.files.csv").stat().st_mode) == 0o600


def test_features_open_with_numpy_pyarrow_and_datasets(folder, tmp_path):
    features = open_features(features_of(folder, tmp_path / "f"))
    table = features.to_arrow()
    assert pa.types.is_fixed_size_list(table.schema.field("cls").type)
    dataset = Dataset(table).with_format("numpy")
    np.testing.assert_array_equal(dataset["cls"][:], features.cls)
    rows = load_dataset("parquet", data_files=str(tmp_path / "f" / "rows.parquet"), split="train")
    assert (
        rows["image_id"][:]
        == pq.read_table(tmp_path / "f" / "rows.parquet")["image_id"].to_pylist()
    )
    assert np.load(tmp_path / "f" / "cls.npy", mmap_mode="r").shape == (9, 128)


def test_a_changed_folder_is_refused_by_name(folder, tmp_path):
    for number in range(2):
        Image.fromarray(eight_bits(number)).save(tmp_path / f"{number}.png")
    extract_features(ENCODER, tmp_path, tmp_path.with_name("changed"))
    Image.fromarray(eight_bits(3)).save(tmp_path / "1.png")
    with pytest.raises(InputError, match="features of another dataset"):
        extract_features(ENCODER, tmp_path, tmp_path.with_name("changed"))


def test_a_folder_in_which_nothing_can_be_used_is_refused_with_reasons(tmp_path):
    (tmp_path / "a").mkdir()
    for name in "xy":
        Image.fromarray(np.full((99, 99), 7, np.uint8)).save(tmp_path / "a" / f"{name}.png")
    with pytest.raises(InputError, match="none of 2 images can be used: 2 × is constant"):
        features_of(tmp_path / "a", tmp_path / "f")
    assert not list(tmp_path.glob("f*"))
    (tmp_path / "b").mkdir()
    with pytest.raises(InputError, match="holds no DICOM, PNG, JPEG or TIFF"):
        features_of(tmp_path / "b", tmp_path / "f")
    with pytest.raises(InputError, match="is not a directory"):
        features_of(tmp_path / "c", tmp_path / "f")


TWO_PROCESSES = """
import sys
import selfray.feature_directory
from selfray.cli import main

if __name__ == "__main__":
    selfray.feature_directory.CHUNK_ROWS = 2
    sys.exit(main(sys.argv[1:]))
"""


def test_bad_images_at_the_places_that_are_looked_at_first_do_not_matter(tmp_path):
    (tmp_path / "few good").mkdir()
    for number in range(60):
        pixels = eight_bits(number) if number in (7, 41) else np.full((99, 99), 7, np.uint8)
        Image.fromarray(pixels).save(tmp_path / "few good" / f"{number:02d}.png")
    features = open_features(features_of(tmp_path / "few good", tmp_path / "f", precision="bf16"))
    assert features.rows["image_id"].to_pylist() == ["00000007", "00000041"]
    assert features.manifest["left_out"] == 58 and features.manifest["fidelity"]["images"] == 2


def test_a_finished_directory_is_looked_at_before_it_is_believed(folder, tmp_path, capsys):
    out = features_of(folder, tmp_path / "f", precision="bf16")
    features_of(folder, out, precision="bf16")
    assert "is finished, nothing to do" in capsys.readouterr().err
    with pytest.raises(InputError, match="features by openvino-bf16, asked for torch"):
        features_of(folder, out, precision="bf16", backend="torch")
    os.truncate(out / "cls.npy", 200)
    with pytest.raises(InputError, match="missing or damaged"):
        features_of(folder, out, precision="bf16")
    (out / "manifest.json").write_text('{"format": "selfray-features"}')
    with pytest.raises(InputError, match="holds no features"):
        features_of(folder, out, precision="bf16")


def test_a_link_as_output_stands_for_its_target_and_a_mount_point_is_refused(
    folder, tmp_path, monkeypatch
):
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    features_of(folder, tmp_path / "link")
    assert len(open_features(tmp_path / "target").cls) == 9
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "mount")
    (tmp_path / "mount").mkdir()
    with pytest.raises(InputError, match="is a mount point"):
        features_of(folder, tmp_path / "mount")
    assert not (tmp_path / "mount.partial").exists()


def test_two_commands_do_not_write_the_same_directory(folder, tmp_path):
    with (
        FeatureWriter(tmp_path / "f"),
        pytest.raises(InputError, match="is being written by another command"),
    ):
        features_of(folder, tmp_path / "f")
    assert len(open_features(features_of(folder, tmp_path / "f")).cls) == 9


def test_what_can_never_work_is_refused_before_anything_is_written(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("selfray.models.openvino_graph.has_openvino", lambda **_: False)
    for words in ({"precision": "int8"}, {"backend": "openvino"}):
        with pytest.raises(InputError, match=r"pip install 'selfray\[openvino\]'"):
            features_of(folder, tmp_path / "f", **words)
    assert not list(tmp_path.iterdir())


ORPHANS = """
import sys
from pathlib import Path
from selfray.data.isolated import each_in_processes

if __name__ == "__main__":
    for _ in each_in_processes(bytes, [3_000_000] * 999, 1):
        print("begun", flush=True)
        sys.stdin.read()
"""


def test_decoding_processes_end_when_their_parent_is_killed(tmp_path):
    (tmp_path / "script.py").write_text(ORPHANS)
    parent = subprocess.Popen(
        [sys.executable, str(tmp_path / "script.py")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert parent.stdout is not None
    assert parent.stdout.readline() == b"begun\n"
    parent.kill()
    # The pipe ends when the last process that has it is gone; the others look once a second.
    assert parent.communicate(timeout=30)[0] == b""


def test_two_processes_write_what_one_does(folder, tmp_path):
    whole = open_features(features_of(folder, tmp_path / "one"))
    (tmp_path / "script.py").write_text(TWO_PROCESSES)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    words = ["features", ENCODER, "--data", str(folder), "--out", str(tmp_path / "two")]
    done = subprocess.run(
        [*launch, str(tmp_path / "script.py"), *words],
        capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("wrote ") == 1
    split = open_features(tmp_path / "two")
    np.testing.assert_allclose(split.cls, whole.cls, atol=1e-6)
    assert split.rows.equals(whole.rows)
    assert not (tmp_path / "two.partial").exists()


# Precision


@pytest.mark.parametrize(
    ("precision", "backend", "chosen", "least"),
    [
        ("exact", "openvino", "openvino-float32", 0.9999999),
        ("bf16", "auto", "openvino-bf16", 0.9999),
        ("bf16", "torch", "torch-bfloat16", 0.9999),
        ("int8", "auto", "openvino-int8-static", 0.998),
    ],
)
def test_a_promise_is_kept_on_every_image(folder, tmp_path, precision, backend, chosen, least):
    exact = open_features(features_of(folder, tmp_path / "exact"))
    out = features_of(folder, tmp_path / "f", precision=precision, backend=backend)
    found = open_features(out)
    assert found.manifest["backend"] == chosen
    cosine = torch.cosine_similarity(torch.tensor(found.cls[:]), torch.tensor(exact.cls[:]))
    assert cosine.min() >= least
    assert found.manifest["fidelity"]["cosine"] >= least
    assert (found.cls != exact.cls).any()  # it was another backend indeed
    assert not (out / "quantised").exists()


def test_a_promise_that_is_not_kept_leads_to_the_next_backend_with_a_warning(
    folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(selfray.inference.COSINE, "int8", 1 - 1e-9)
    out = features_of(folder, tmp_path / "f", precision="int8")
    assert open_features(out).manifest["backend"] == "torch-float32"
    warned = capsys.readouterr().err
    for name in ("openvino-int8-static", "openvino-int8-dynamic", "openvino-bf16"):
        assert f"{name} does not keep the promise of --precision int8: least cosine 0.9" in warned


@pytest.mark.parametrize(("noise", "whole"), [(0, False), (60, True)])
def test_images_are_read_whole_where_less_is_too_far_off(tmp_path, capsys, noise, whole):
    y, x = np.mgrid[:640, :520] / 520
    for number in range(8):
        waves = 128 + 60 * np.sin(3 * x + number) * np.cos(2 * y * (1 + number))
        waves += np.random.default_rng(number).normal(0, noise, x.shape) if noise else 0
        pixels = np.clip(waves, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.jpg", quality=95)
    exact = open_features(features_of(tmp_path, tmp_path.with_name(f"exact{whole}")))
    found = open_features(
        features_of(tmp_path, tmp_path.with_name(f"int8{whole}"), precision="int8")
    )
    assert found.manifest["reads_reduced"] != whole
    assert ("as the faster way is too far off" in capsys.readouterr().err) == whole
    cosine = torch.cosine_similarity(torch.tensor(found.cls[:]), torch.tensor(exact.cls[:]))
    assert cosine.min() >= 0.998


def test_an_interrupted_int8_extraction_goes_on_with_the_same_graph(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("selfray.feature_directory.CHUNK_ROWS", 2)
    whole = open_features(features_of(folder, tmp_path / "whole", precision="int8"))
    finish = FeatureWriter.finish_chunk
    count = 0

    def interrupted(self, chunk, left_out):
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        finish(self, chunk, left_out)

    monkeypatch.setattr(FeatureWriter, "finish_chunk", interrupted)
    with pytest.raises(Interrupted):
        features_of(folder, tmp_path / "f", precision="int8")
    monkeypatch.setattr(FeatureWriter, "finish_chunk", finish)
    graph = tmp_path / "f.partial" / "quantised" / "openvino-int8-static.bin"
    assert graph.exists()
    again = open_features(features_of(folder, tmp_path / "f", precision="int8"))
    np.testing.assert_array_equal(again.cls, whole.cls)


SILENT = """
import sys
from pathlib import Path
from selfray.features import extract_features

if __name__ == "__main__":
    encoder, data, out = sys.argv[1:]
    extract_features(encoder, Path(data), Path(out), precision="int8")
    assert "nncf" in sys.modules and sys.modules["openvino_telemetry"] is None
    assert not any(name.startswith("openvino_telemetry.") for name in sys.modules)
"""


def test_openvino_reports_to_nobody(folder, tmp_path):
    (tmp_path / "script.py").write_text(SILENT)
    words = [str(tmp_path / "script.py"), ENCODER, str(folder), str(tmp_path / "f")]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


SIGNALLED = """
import os, signal, threading
import openvino
from openvino import opset13
from selfray.models.openvino_graph import openvino_core

parameter = opset13.parameter([1, 3])
graph = openvino.Model([opset13.relu(parameter)], [parameter], "graph")
compiled = [openvino_core().compile_model(graph, "CPU")]
elsewhere = threading.Thread(target=compiled.clear)
elsewhere.start()
elsewhere.join()
try:
    os.kill(os.getpid(), signal.SIGINT)
    signal.pause()
except KeyboardInterrupt:
    print("the signal is met")
"""


def test_a_signal_after_openvino_has_been_used_does_not_end_the_process():
    done = subprocess.run([sys.executable, "-c", SIGNALLED], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "the signal is met\n"), done.stderr[-2000:]


# Reading


def test_a_jpeg_is_decoded_at_a_part_of_its_size_and_stays_near_the_publishers_resize(tmp_path):
    file = tmp_path / "a.jpg"
    Image.fromarray(soft_image(1250, 1000, white=255).astype(np.uint8)).save(file, quality=90)
    shapes = {n: read_eight_bits(file, at_least=n).shape for n in (1000, 501, 500, 251, 249)}
    assert shapes == {
        1000: (1250, 1000), 501: (1250, 1000), 500: (625, 500), 251: (625, 500), 249: (313, 250),
    }  # fmt: skip
    preprocessing = Preprocessing(252, (0.5,) * 3, (0.25,) * 3, 252)
    whole = preprocessing.square(read_eight_bits(file)).astype(int)
    half = read_eight_bits(file, at_least=479)
    for square in (preprocessing.square, preprocessing.square_nearly):
        assert np.abs(square(half).astype(int) - whole).mean() < 1  # of 255


def test_large_gray_images_are_averaged_down_and_others_resized_as_by_the_publisher():
    preprocessing = Preprocessing(64, (0.5,) * 3, (0.25,) * 3, 70)
    large = soft_image(280, 348, white=255).astype(np.uint8)
    blocks = large.reshape(70, 4, 87, 4).mean((1, 3))
    found = preprocessing.square_nearly(large)
    assert found.shape == (1, 64, 64)
    assert np.abs(found[0] - blocks[3:67, 11:75]).max() <= 0.5  # rounded to whole gray values
    assert (found != preprocessing.square(large)).any()
    for pixels in (large[:130, :150], np.stack([large] * 3, 2)):
        np.testing.assert_array_equal(
            preprocessing.square_nearly(pixels), preprocessing.square(pixels)
        )


def test_images_of_8_bits_are_left_as_they_are_and_deeper_ones_stretched(tmp_path):
    low = np.tile(np.arange(100, 200, dtype=np.uint8), (100, 1))
    Image.fromarray(low).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_eight_bits(tmp_path / "a.png"), low)
    Image.fromarray(low.astype(np.uint16) * 300).save(tmp_path / "b.png")
    stretched = read_eight_bits(tmp_path / "b.png")
    assert stretched.min() == 0 and stretched.max() == 255
    write_dicom(tmp_path / "c.dcm", low.astype(np.uint16))
    np.testing.assert_array_equal(read_eight_bits(tmp_path / "c.dcm"), stretched)


def test_a_decoder_that_crashes_costs_its_own_file_alone(tmp_path):
    for number in range(18):
        pixels = eight_bits(number) // (5 if number == 7 else 1)
        Image.fromarray(pixels).save(tmp_path / f"{number:02d}.png")
    found = list(FolderImages(tmp_path).prepared(range(18), die_of_dark, workers=1))
    assert [n for n, outcome in enumerate(found) if isinstance(outcome, str)] == [7]
    assert "crashed" in found[7]


def test_a_dataset_and_its_folder_are_told_apart(micro_data, folder):
    assert isinstance(open_images(folder), FolderImages)
    assert not isinstance(open_images(micro_data), FolderImages)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--precision", "int4"], "int4"),
        (["--backend", "tensorrt"], "tensorrt"),
        (["--precision", "int8", "--backend", "torch"], "has no int8"),
        (["--batch-size", "0"], "batch_size is 0"),
    ],
)
def test_wrong_options_are_refused_in_one_line(folder, tmp_path, capsys, words, said):
    command = ["features", ENCODER, "--data", str(folder), "--out", str(tmp_path / "f"), *words]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "f").exists()
