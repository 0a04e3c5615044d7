"""Dice of each decoder on each encoder, and what it costs.

    python benchmarks/segmentation.py [DATASET OUT] --encoders selfray/phantom --decoders linear

Without a dataset, on a phantom of 200 patients that is drawn and thrown away. Prints a line an
encoder and decoder: mean Dice over the test images that have a label, by groups of the phantom's
labels, and CPU seconds (all threads together), which other work on the machine changes less than
the clock. What OUT holds already is not made again, and then costs nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from selfray.data.dataset import RadiographDataset
from selfray.data.phantom import write_phantom
from selfray.evals.segmentation_decoders import DECODERS, FINE_TUNED
from selfray.evaluate.segmentation import judge_segmentation
from selfray.models.published import load_encoder

GROUPS = {"lungs": "_lung", "zones": "_zone", "heart": "heart", "ribs": "ribs"}


def group_dice(table: pa.Table) -> dict[str, float]:
    """Mean over labels of the mean over images that have them."""
    found: dict[str, list[float]] = {}
    for row in table.to_pylist():
        if row["truth_pixels"]:
            found.setdefault(row["label"], []).append(row["dice"])
    means = {label: float(np.mean(values)) for label, values in found.items()}
    return {
        group: float(np.mean(values))
        for group, ending in GROUPS.items()
        if (values := [mean for label, mean in means.items() if label.endswith(ending)])
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="?", type=Path)
    parser.add_argument("out", nargs="?", type=Path)
    parser.add_argument("--encoders", nargs="+", default=["selfray/phantom"])
    names = [name + ending for name in DECODERS for ending in ("", FINE_TUNED)]
    parser.add_argument("--decoders", nargs="+", default=["linear"], choices=names)
    parser.add_argument("--labels", nargs="+")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--image-size", type=int)
    options = parser.parse_args()
    if options.data is not None and options.out is None:
        parser.error("OUT is missing: where tokens and decoders are kept")
    with tempfile.TemporaryDirectory() as scratch:
        if options.data is None:
            write_phantom(Path(scratch) / "data", patients=200, size=128)
        data = RadiographDataset(options.data or Path(scratch) / "data")
        compare(data, options.out or Path(scratch) / "out", options)


def compare(data: RadiographDataset, out: Path, options: argparse.Namespace) -> None:
    """Print a line an encoder and decoder."""
    for name in options.encoders:
        folder = out / hashlib.sha256(name.encode()).hexdigest()[:8]
        for decoder in options.decoders:
            start = time.process_time()
            table = judge_segmentation(
                load_encoder(name),
                data,
                folder,
                tokens=folder / "tokens",
                decoders=[decoder],
                labels=options.labels,
                steps=options.steps,
                image_size=options.image_size,
            )
            dice = "  ".join(f"{group} {value:.3f}" for group, value in group_dice(table).items())
            print(f"{name}  {decoder}  {dice}  {time.process_time() - start:.0f} CPU s")


if __name__ == "__main__":
    main()
