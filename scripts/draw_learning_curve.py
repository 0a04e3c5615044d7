"""Draw a run's probe against the images that it has seen, beside features without a network.

    python scripts/draw_learning_curve.py RUN PNG

The baselines are probed on the same images as the run. The data has to be where the run found it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch

from selfray.config import RunConfig, from_json
from selfray.data.dataset import RadiographDataset
from selfray.features import PIXEL_ENCODERS, extract_features, open_features
from selfray.probe import Places, Probe

PANELS = {"macro_auroc": "findings, macro-AUROC", "sex_auroc": "sex, AUROC", "age_r2": "age, R²"}


def baseline(encoder: str, probe: Probe, data: Path) -> dict[str, Any]:
    """What the run's probe says of features that need no network."""
    with tempfile.TemporaryDirectory() as folder:
        cls = open_features(extract_features(encoder, data, Path(folder) / "features")).cls

        def of_places(places: Places) -> np.ndarray:
            return cls[[row for _, row in places]]

        return probe.score(of_places)


def draw(
    config: RunConfig, probes: list[dict[str, Any]], others: dict[str, Any], out: Path
) -> None:
    """One panel a measure: the run as a line, baselines as horizontal lines."""
    figure, axes = plt.subplots(1, len(PANELS), figsize=(11, 3.6), layout="constrained")
    seen = [record["step"] * config.batch_size / 1000 for record in probes]
    for axis, (key, title) in zip(axes, PANELS.items(), strict=True):
        axis.plot(seen, [record[key] for record in probes], "o-", ms=3, label="pre-trained")
        for style, (name, scores) in zip((":", "--"), others.items(), strict=True):
            axis.axhline(scores[key], ls=style, color="0.4", label=name)
        axis.set(title=title, xlabel="images seen, thousands")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    synthetic = RadiographDataset(config.data[0]).synthetic
    figure.suptitle(
        f"Recipe {config.recipe} from random weights, probes on {probes[0]['n']} validation images"
        + (" of the synthetic phantom" if synthetic else "")
    )
    figure.savefig(out, dpi=110)


def main() -> None:
    """Draw, and print the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    path = arguments.run / "config.json"
    config = from_json(path.read_text(), path)
    lines = (arguments.run / "metrics.jsonl").read_text().splitlines()
    probes = [record for line in lines if (record := json.loads(line))["kind"] == "probe"]
    data = Path(config.data[0])
    probe = Probe([RadiographDataset(data)], config, torch.device("cpu"))
    others = {name: baseline(name, probe, data) for name in PIXEL_ENCODERS}
    draw(config, probes, others, arguments.out)
    rows = {f"{p['step'] * config.batch_size:,} images": p for p in probes} | others
    for name, scores in rows.items():
        print(f"| {name} | {' | '.join(f'{scores[key]:.3f}' for key in PANELS)} |")


if __name__ == "__main__":
    main()
