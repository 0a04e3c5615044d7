"""Draw what `study_language.sh` measured: kinds of encoders side by side, seeds as dots."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

KINDS = {
    r"images-\d+$": ("images alone", "#0072b2"),
    r"reports-\d+$": ("images and reports", "#d55e00"),
    r"^random:": ("random weights", "#6b6b6b"),
    r"^pixels:": ("PCA of the pixels", "#8a6d00"),
}
MEASURES = [
    ("findings\nmacro-AUROC", "macro", "auroc", "linear"),
    ("sex\nAUROC", "sex", "auroc", "linear"),
    ("age\nR²", "age_years", "r2", "linear"),
    ("weight\nR²", "weight_kg", "r2", "linear"),
    ("BMI\nR²", "bmi", "r2", "linear"),
    ("segmentation\nmean Dice", "macro", "dice", "linear"),
    ("reports\nclinical F1", "macro", "clinical_f1", "language-model"),
    ("reports\nROUGE-L", "findings", "rouge_l", "language-model"),
]


def kind_of(encoder: str) -> tuple[str, str]:
    """Name and colour of an encoder's kind.

    Raises:
        SystemExit: It is of none of the study's.
    """
    for pattern, kind in KINDS.items():
        if re.search(pattern, encoder):
            return kind
    sys.exit(f"{encoder} is no encoder of the study. Give the evaluation of study_language.sh.")


def draw(lines: list[dict], file: Path) -> None:
    """One panel a measure; a dot an encoder, its 95 % interval, a bar the mean over seeds."""
    figure, panels = plt.subplots(2, 4, figsize=(11, 5.6), constrained_layout=True)
    for axes, (title, target, metric, probe) in zip(panels.flat, MEASURES, strict=True):
        found: dict[tuple[str, str], list[dict]] = {}
        for line in lines:
            key = (line["target"], line["metric"], line["probe"])
            whole = not ({"reference", "subgroup", "trained_on"} & line.keys())
            if key == (target, metric, probe) and whole and line["value"] is not None:
                found.setdefault(kind_of(line["encoder"]), []).append(line)
        for place, ((name, colour), of) in enumerate(found.items()):
            mean = sum(line["value"] for line in of) / len(of)
            axes.plot([place - 0.32, place + 0.32], [mean, mean], color=colour, lw=1.2, label=name)
            for k, line in enumerate(of):
                x = place + (k - (len(of) - 1) / 2) * 0.22
                axes.plot([x, x], [line["ci_low"], line["ci_high"]], color=colour, lw=1, alpha=0.6)
                axes.plot(x, line["value"], "o", ms=4.5, color=colour)
        axes.set_title(title, fontsize=10)
        axes.set_xticks([])
        axes.grid(axis="y", lw=0.4)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(
        "Synthetic phantom: encoders that saw the same images, by supervision. Dot: one seed with "
        "its 95 % interval by patient; bar: mean over seeds",
        fontsize=9.5,
    )
    figure.savefig(file, dpi=130)


def main() -> None:
    """Read the evaluation, write the figure."""
    if len(sys.argv) != 3:
        sys.exit("usage: draw_language_study.py EVALUATION FIGURE.png")
    results = Path(sys.argv[1]) / "results.jsonl"
    draw([json.loads(line) for line in results.read_text().splitlines()], Path(sys.argv[2]))
    print(f"wrote {sys.argv[2]}")


if __name__ == "__main__":
    main()
