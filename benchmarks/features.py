"""Features from files: against the path that a user of RAD-DINO has, in ratios of one run.

    python benchmarks/features.py [--images 16] [--repeats 3] [--out DIR]

Writes radiograph-like images of 2,000 x 2,500 pixels as JPEG and as 12-bit DICOM, and a ViT-B/14
for 518 pixels with random weights in RAD-DINO's files. Measured in turn, so many times: the
publisher's class `RadDino` (package `rad_dino`, or the same ten lines with transformers where it is
not installed), one image a call; and `selfray features` at each precision, without the time that
either needs to load, convert, check and calibrate, which is told apart. Then preprocessing alone,
the model alone, and memory by number of images. Prints a table, and with --out draws it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

# Processes that decode read this file too, and need nothing of it.
if __name__ != "__mp_main__":
    import cv2
    import numpy as np
    import pydicom
    import torch
    from PIL import Image
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import (
        DigitalXRayImageStorageForPresentation,
        ExplicitVRLittleEndian,
        generate_uid,
    )

    from selfray import features
    from selfray.data.dataset import DatasetInfo, DatasetWriter, encode_png
    from selfray.data.image_source import open_images
    from selfray.feature_directory import FeatureWriter
    from selfray.models.encoder_directory import save_encoder
    from selfray.models.published import load_encoder
    from selfray.models.vit import build_vit

HEIGHT, WIDTH = 2500, 2000
PRECISIONS = ("exact", "bf16", "int8")
PREPROCESSED_AGAIN = 4  # times the files, so that a run takes seconds


def radiograph(seed: int) -> np.ndarray:
    """Smooth structures of two sizes and noise, 0..1, float32 [HEIGHT, WIDTH]."""
    draws = np.random.default_rng(seed)
    image = 0.05 * draws.normal(size=(HEIGHT, WIDTH)).astype(np.float32)
    for grid, weight in (((12, 10), 1.0), ((300, 240), 0.15)):
        coarse = draws.normal(size=grid).astype(np.float32)
        image += weight * cv2.resize(coarse, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
    return (image - image.min()) / np.ptp(image)


def write_dicom(file: Path, image: np.ndarray) -> None:
    header = Dataset()
    header.file_meta = FileMetaDataset()
    header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    header.file_meta.MediaStorageSOPClassUID = DigitalXRayImageStorageForPresentation
    header.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    header.SOPClassUID = DigitalXRayImageStorageForPresentation
    header.SOPInstanceUID = header.file_meta.MediaStorageSOPInstanceUID
    header.Modality = "DX"
    header.Rows, header.Columns = image.shape
    header.SamplesPerPixel, header.PixelRepresentation = 1, 0
    header.PhotometricInterpretation = "MONOCHROME2"
    header.BitsAllocated, header.BitsStored, header.HighBit = 16, 12, 11
    header.PixelData = (image * 4095).astype(np.uint16).tobytes()
    header.save_as(file, enforce_file_format=True)


def write_files(place: Path, images: int) -> dict[str, Path]:
    folders = {kind: place / kind for kind in ("JPEG", "DICOM")}
    for folder in folders.values():
        folder.mkdir()
    for number in range(images):
        image = radiograph(number)
        pixels = (image * 255).astype(np.uint8)
        Image.fromarray(pixels).save(folders["JPEG"] / f"{number:04d}.jpg", quality=90)
        write_dicom(folders["DICOM"] / f"{number:04d}.dcm", image)
    return folders


class Publisher:
    """The class `RadDino` of the package `rad_dino`, on files of ours."""

    def __init__(self, directory: Path) -> None:
        try:
            from rad_dino import RadDino

            RadDino._REPO = str(directory)
            self._encoder, self.name = RadDino(), "rad_dino"
            self.preprocess = lambda image: self._encoder.preprocess(image)["pixel_values"]
            self.extract = self._encoder.extract_features
            self.model = self._encoder.model
        except ImportError:
            from transformers import AutoImageProcessor, AutoModel

            self.name = "transformers, as rad_dino calls it"
            self.model = AutoModel.from_pretrained(directory).eval()
            processor = AutoImageProcessor.from_pretrained(directory, use_fast=False)
            self.preprocess = lambda image: processor(image, return_tensors="pt")["pixel_values"]
            self.extract = self._extract

    def _extract(self, image: Image.Image) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.inference_mode():
            tokens = self.model(pixel_values=self.preprocess(image)).last_hidden_state
        return tokens[:, 0], tokens[:, 1:].unflatten(1, (37, 37)).permute(0, 3, 1, 2)


def opened(file: Path) -> Image.Image:
    """As a user would for that class: DICOM by pydicom, darkest pixel 0, brightest 255."""
    if file.suffix != ".dcm":
        return Image.open(file)
    pixels = pydicom.dcmread(file).pixel_array.astype(np.float32)
    pixels = (pixels - pixels.min()) / (pixels.max() - pixels.min()) * 255
    return Image.fromarray(np.rint(pixels).astype(np.uint8))


def publishers_features(publisher: Publisher, folder: Path, out: Path) -> float:
    """Seconds from the first file to features on the disk."""
    started = time.perf_counter()
    cls, means = [], []
    for file in sorted(folder.iterdir()):
        token, patches = publisher.extract(opened(file))
        cls.append(token)
        means.append(patches.mean((2, 3)))
    np.save(out / "cls.npy", torch.cat(cls).numpy())
    np.save(out / "patch_mean.npy", torch.cat(means).numpy())
    return time.perf_counter() - started


@dataclass
class Prepared:
    """`selfray features` after its start, ready to extract the same images again and again."""

    folder: Path
    encoder: str
    precision: str
    place: Path

    def __post_init__(self) -> None:
        started = time.perf_counter()
        self.images = open_images(self.folder)
        self.source = features._open_source(self.encoder, self.images, False, None)
        self.manifest = features._manifest(
            self.encoder, self.images, self.source, self.precision
        )  # fmt: skip
        writer = FeatureWriter(self.place / "first")
        self.work = features._begin(self.source, self.images, writer, self.manifest, "auto")
        self.backend = writer.manifest["backend"]
        self.fidelity = writer.manifest.get("fidelity")
        self.start_seconds = time.perf_counter() - started
        self.count = 0

    def seconds(self) -> float:
        """Of one extraction, from the first file to the directory."""
        self.count += 1
        writer = FeatureWriter(self.place / f"run{self.count}")
        started = time.perf_counter()
        writer.begin(self.manifest)
        writer.open(self.manifest)
        features._extract_missing(self.work, self.images, writer, "features")
        writer.finish(self.images.table())
        return time.perf_counter() - started


def interleaved(runs: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each by name, every one in turn."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats):
        for name, run in runs.items():
            found[name].append(run())
            print(f"  {repeat + 1}/{repeats} {name}: {found[name][-1]:.2f} s", file=sys.stderr)
    return found


def table(
    title: str, seconds: dict[str, list[float]], images: int, baseline: str
) -> tuple[str, dict[str, list[float]]]:
    """Lines to print; and the ratio to the baseline of the same turn, of each."""
    lines, ratios = [title], {}
    width = max(map(len, seconds))
    for name, values in seconds.items():
        ratios[name] = [b / v for b, v in zip(seconds[baseline], values, strict=True)]
        speed = images / statistics.median(values)
        low, middle, high = min(ratios[name]), statistics.median(ratios[name]), max(ratios[name])
        lines.append(
            f"  {name:{width}}  {speed:8.2f} images/s   {middle:5.2f} x ({low:.2f} to {high:.2f})"
        )
    return "\n".join(lines), ratios


def end_to_end(
    folder: Path, publisher: Publisher, encoder: Path, place: Path, repeats: int
) -> tuple[str, dict[str, list[float]]]:
    images = len(list(folder.iterdir()))
    ours = {p: Prepared(folder, str(encoder), p, place / f"{folder.name}-{p}") for p in PRECISIONS}
    baseline_out = place / f"{folder.name}-publisher"
    baseline_out.mkdir()

    def publishers() -> float:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        return publishers_features(publisher, folder, baseline_out)

    def ours_at(precision: str) -> Callable[[], float]:
        def run() -> float:
            torch.set_num_threads(1)  # as `selfray features` has it
            return ours[precision].seconds()

        return run

    runs = {publisher.name: publishers} | {f"selfray {p}": ours_at(p) for p in PRECISIONS}
    seconds = interleaved(runs, repeats)
    text, ratios = table(f"End to end from {folder.name}", seconds, images, publisher.name)
    expected = np.load(baseline_out / "cls.npy")
    for precision, prepared in ours.items():
        found = np.load(prepared.place / "run1" / "cls.npy")
        norms = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
        cosine = ((found * expected).sum(1) / norms).min()
        text += (
            f"\n    {precision}: {prepared.backend}; least cosine with the publisher's CLS "
            f"{cosine:.6f}; {prepared.start_seconds:.0f} s before the first image"
        )
    return text, ratios


def preprocessing(
    folder: Path, publisher: Publisher, encoder: Path, repeats: int
) -> tuple[str, dict[str, list[float]]]:
    """From a JPEG file to what the model is given."""
    images, files, workers = open_images(folder), sorted(folder.iterdir()), features._decoders()
    ours_source = features._EncoderSource(load_encoder(str(encoder)), False, None)
    readings = {"exact": ours_source._exact_reading(), "bf16, int8": ours_source._near_reading()}

    def publishers() -> float:
        torch.set_num_threads(workers)
        started = time.perf_counter()
        for _ in range(PREPROCESSED_AGAIN):
            for file in files:
                publisher.preprocess(opened(file))
        return time.perf_counter() - started

    def ours(reading: features._Reading) -> float:
        """For as many images as the publisher's, timed over the middle of a longer run.

        The processes are there before the clock starts, and as many images are ahead of their use
        when it starts as when it stops.
        """
        timed = PREPROCESSED_AGAIN * len(files)
        found = reading.of(images, list(range(len(files))) * (3 * PREPROCESSED_AGAIN))
        for _ in range(timed):
            next(found)
        started = time.perf_counter()
        for _ in range(timed):
            torch.from_numpy(np.asarray(next(found)))
        return time.perf_counter() - started

    runs = {publisher.name: publishers} | {
        f"selfray {name}": partial(ours, reading) for name, reading in readings.items()
    }
    seconds = interleaved(runs, repeats)
    images_timed = PREPROCESSED_AGAIN * len(files)
    return table("Preprocessing alone, from JPEG", seconds, images_timed, publisher.name)


def model_alone(
    publisher: Publisher, prepared: dict[str, Prepared], encoder: Path, images: int, repeats: int
) -> tuple[str, dict[str, list[float]]]:
    squares = np.random.default_rng(0).integers(0, 256, (images, 1, 518, 518), np.uint8)
    pixel_values = load_encoder(str(encoder)).preprocessing.normalise(torch.from_numpy(squares))

    @torch.inference_mode()
    def publishers() -> float:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        started = time.perf_counter()
        for image in pixel_values:
            publisher.model(pixel_values=image[None])
        return time.perf_counter() - started

    def ours_at(precision: str) -> Callable[[], float]:
        def run() -> float:
            torch.set_num_threads(1)
            work = prepared[precision].work
            step = work.batch_size
            batches = [squares[i : i + step] for i in range(0, images, step)]
            started = time.perf_counter()
            with ThreadPoolExecutor(work.concurrency) as pool:
                list(pool.map(work.infer, batches))
            return time.perf_counter() - started

        return run

    runs = {"transformers SDPA": publishers} | {f"selfray {p}": ours_at(p) for p in PRECISIONS}
    return table("Model alone", interleaved(runs, repeats), images, "transformers SDPA")


MEMORY = """
import sys, threading, time
from pathlib import Path
from selfray.features import extract_features

peak = 0

def watch():
    global peak
    while True:
        status = Path("/proc/self/status").read_text()
        peak = max(peak, int(status.split("RssAnon:")[1].split()[0]))
        time.sleep(0.02)

if __name__ == "__main__":
    threading.Thread(target=watch, daemon=True).start()
    extract_features("random:vit_pico/16@64", Path(sys.argv[1]), Path(sys.argv[2]))
    print(peak // 1024)
"""


def memory(place: Path) -> str:
    """Peak memory of the process without mapped files, by number of small images."""
    lines = ["Peak memory, MB, of `selfray features` on small images"]
    (place / "memory.py").write_text(MEMORY)
    for images in (1_000, 10_000):
        info = DatasetInfo(
            name="small", origin="noise", licence="none", synthetic=True, findings=(),
            mask_labels=(), pixels="noise",
        )  # fmt: skip
        data = place / f"small{images}"
        writer = DatasetWriter(data, info)
        draws = np.random.default_rng(0)
        for number in range(images):
            pixels = draws.integers(0, 256, (64, 64), np.uint8)
            writer.add(
                {"image": encode_png(pixels), "image_id": f"{number}", "patient_id": f"{number}",
                 "study_id": f"{number}", "split": "train"}
            )  # fmt: skip
        writer.finish()
        words = [sys.executable, str(place / "memory.py"), str(data), str(place / f"m{images}")]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        lines.append(f"  {images:6} images: {done.stdout.strip()}")
        shutil.rmtree(data)
    return "\n".join(lines)


def draw(parts: dict[str, dict[str, list[float]]], file: Path) -> None:
    """Bars of the ratios, with their range."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        1, len(parts), figsize=(3.2 * len(parts), 3.6), layout="constrained"
    )
    colours = ("#8a8f98", "#9ecae1", "#4292c6", "#084594")
    for axis, (title, ratios) in zip(np.atleast_1d(axes), parts.items(), strict=True):
        for place, values in enumerate(ratios.values()):
            middle = statistics.median(values)
            error = [[middle - min(values)], [max(values) - middle]]
            axis.bar(place, middle, color=colours[place], yerr=error, capsize=3)
            axis.annotate(f"{middle:.2f}×", (place, max(values)), (0, 4),
                          textcoords="offset points", ha="center")  # fmt: skip
        names = [name.replace(" ", "\n", 1) for name in ratios]
        axis.set_xticks(range(len(names)), names, fontsize=7)
        axis.set_title(title, fontsize=9)
        axis.margins(y=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("speed, publisher's path = 1")
    figure.savefig(file, dpi=130)


def environment() -> str:
    versions = {name: __import__(name).__version__.split("-")[0]
                for name in ("torch", "transformers", "openvino")}  # fmt: skip
    cores = len(os.sched_getaffinity(0))
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"{platform.machine()}, {cores} cores; {named}"


def random_rad_dino(place: Path) -> Path:
    """RAD-DINO's files with random weights that make features depend on the image."""
    torch.manual_seed(0)
    model = build_vit("vit_base", patch_size=14, image_size=518, layerscale_init=0.5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and name.endswith("weight"):
                parameter.mul_(1.5)
    save_encoder(
        model, place / "rad-dino", mean=0.5307, std=0.2583, card={"synthetic": True, "data": []}
    )
    return place / "rad-dino"


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="folder for features.txt, .json and .png")
    arguments = parser.parse_args(words)
    done = (
        f"{arguments.images} images of {WIDTH} x {HEIGHT} pixels, {arguments.repeats} repeats in "
        "turn: median (lowest to highest)"
    )
    texts = [f"{environment()}\n{done}"]
    parts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        folders, encoder = write_files(place, arguments.images), random_rad_dino(place)
        publisher = Publisher(encoder)
        found = {
            p: Prepared(folders["JPEG"], str(encoder), p, place / f"alone-{p}") for p in PRECISIONS
        }
        text, parts["Model alone"] = model_alone(
            publisher, found, encoder, arguments.images, arguments.repeats
        )
        texts.append(text)
        text, parts["Preprocessing"] = preprocessing(
            folders["JPEG"], publisher, encoder, arguments.repeats
        )
        texts.append(text)
        for kind, folder in folders.items():
            text, parts[f"{kind} files to features"] = end_to_end(
                folder, publisher, encoder, place, arguments.repeats
            )
            texts.append(text)
        texts.append(memory(place))
    print("\n\n".join(texts))
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "features.txt").write_text("\n\n".join(texts) + "\n")
        (arguments.out / "features.json").write_text(json.dumps(parts, indent=2))
        draw(parts, arguments.out / "features.png")


if __name__ == "__main__":
    main()
