"""Run and evaluation directories as the stages write them, for the tests of the summary."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from selfray.data.dataset import DatasetInfo, DatasetWriter, encode_png

FINDINGS = ("effusion", "nodule")
ENCODER = "random:vit_nano/14@56"


def write_dataset(out: Path, *, synthetic: bool = True, patients: int = 12) -> Path:
    """Two noise images a patient, in all three splits."""
    info = DatasetInfo("tiny", "test", "MIT", synthetic, FINDINGS, (), "noise")
    writer, noise = DatasetWriter(out, info), np.random.default_rng(0)
    for number in range(2 * patients):
        patient = number // 2
        writer.add(
            {
                "image": encode_png(noise.integers(0, 256, (60, 70), dtype=np.uint8)),
                "image_id": f"image-{number}",
                "patient_id": f"secret-patient-{patient}",
                "study_id": f"secret-study-{number}",
                "split": ("train", "validate", "test")[patient % 3],
                "view": "LL" if number % 2 else "PA",
                "effusion": number % 2,
                "nodule": None if number % 5 == 0 else int(number % 3 == 0),
            }
        )
    writer.finish()
    return out


def write_run(
    out: Path, *, steps: int = 8, probes: dict[int, float | None] | None = None, **config: Any
) -> Path:
    """A finished run with a probe every 4 steps, or with those that are given."""
    out.mkdir(parents=True)
    settings = {"recipe": "demo", "steps": steps, "batch_size": 4, "data": [], **config}
    (out / "config.json").write_text(json.dumps(settings))
    environment = {"command": "selfray pretrain demo", "torch": "2.13", "cpu_count": 2, "gpus": []}
    (out / "environment.json").write_text(json.dumps(environment))
    probes = {0: 0.6, 4: 0.7, 8: 0.65} if probes is None else probes
    lines: list[dict[str, Any]] = []
    for step in range(steps + 1):
        if step:
            terms = {f"loss_{t}": 1.0 + step for t in ("dino_global", "dino_local", "ibot")}
            lines.append(
                {"kind": "step", "step": step, "loss": 9.0 - step, **terms, "loss_koleo": 0.0,
                 "learning_rate": 1e-3, "teacher_entropy": 5.0, "mean_cosine": 0.2,
                 "gradient_norm": 0.5 * step, "images_per_second": 8.0}
            )  # fmt: skip
        if step in probes:
            value = probes[step]
            lines.append({"kind": "probe", "step": step, "macro_auroc": value, "sex_auroc": value})
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (out / "DONE").write_text(f"{steps} steps\n")
    return out


def result(encoder: str, target: str, metric: str, value: float | None, **fields: Any) -> dict:
    """A line of `results.jsonl`; the interval reaches 0.05 to either side."""
    low, high = (None, None) if value is None else (value - 0.05, value + 0.05)
    line = {"encoder": encoder, "task": "t", "target": target, "metric": metric, "value": value}
    line |= {"ci_low": low, "ci_high": high, "n": 812, "n_patients": 402, "split": "test"}
    return line | {"seed": 0, "probe": "linear"} | fields


def write_evaluation(
    out: Path, lines: list[dict], *, data: Path | None = None, **dataset: Any
) -> Path:
    """An evaluation with these results."""
    out.mkdir(parents=True)
    (out / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    described = {"name": "tiny", "origin": "test", "synthetic": True, "counts": {"images": 24}}
    info = {
        "format": "selfray-evaluation",
        "command": "selfray evaluate run --data data",
        "dataset": described | dataset,
        "data": str(data),
        "findings": list(FINDINGS),
        "resamples": 1000,
        "seed": 0,
        "versions": {"torch": "2.13"},
    }
    (out / "evaluation.json").write_text(json.dumps(info))
    return out


RECORDS = ("age_years", "weight_kg", "bmi")


def write_judged_evaluation(
    out: Path,
    *,
    encoders: tuple[str, ...] = ("run", "other/encoder", "pixels:pca"),
    findings: tuple[str, ...] = FINDINGS,
    probes: tuple[str, ...] = ("linear", "knn"),
    images: int = 400,
    **described: Any,
) -> Path:
    """An evaluation of version 2 with every kind of line, and predictions of linear probes.

    The numbers follow from the positions of encoder, probe and target; the predictions are drawn.
    """
    lines: list[dict[str, Any]] = []
    # Of a part of the train split and of the test images: no number of the main tables.
    lines.append(_judged_line(encoders[0], "macro", "auroc", 0.111, trained_on="5 % of patients"))
    lines.append(_judged_line(encoders[0], "macro", "auroc", 0.222, grouped_by="sex", subgroup="F"))
    for k, encoder in enumerate(encoders):
        for j, probe in enumerate(probes):
            for target, metric, value in _judged_numbers(findings, 0.9 - 0.07 * k - 0.02 * j):
                lines.append(_judged_line(encoder, target, metric, value, probe=probe, best=k == 0,
                                          like_best=k == 1, probe_seeds=3))  # fmt: skip
    for target, metric in [("macro", "auroc"), ("sex", "auroc"), *((r, "r2") for r in RECORDS)]:
        for k, encoder in enumerate(encoders):
            fields = {"of_metric": metric, "probability_best": 0.75 if k == 0 else 0.25}
            line = _judged_line(encoder, target, "rank", float(k + 1), **fields)
            lines.append(line | {"ci_low": max(1, k), "ci_high": min(len(encoders), k + 2)})
    for k, encoder in enumerate(encoders):
        for reference in encoders:
            for target in ("macro", "sex", *findings):
                if reference != encoder:
                    value = 0.07 * (encoders.index(reference) - k)
                    fields = {"reference": reference, "p_value": 0.0123, "test": "DeLong"}
                    fields |= {"p_holm": 0.0456} if target in findings else {}
                    lines.append(_judged_line(encoder, target, "auroc_difference", value, **fields))
    write_evaluation(out, lines)
    described = {"findings": list(findings), "version": 2, "leaks": []} | described
    info = json.loads((out / "evaluation.json").read_text()) | described
    (out / "evaluation.json").write_text(json.dumps(info))
    write_predictions(out, encoders, findings, images)
    return out


def _judged_numbers(findings: tuple[str, ...], value: float) -> list[tuple[str, str, float]]:
    binary = ("auroc", "auprc", "sensitivity_at_90_specificity", "brier", "ece")
    numbers = [("macro", m, value) for m in ("auroc", "auprc", "dice")]
    numbers += [(t, m, value - 0.1) for t in (*findings, "sex") for m in binary]
    numbers += [("view", "auroc", value), ("view=PA", "auroc", value)]
    metrics = (("r2", 0.5), ("mae", -7.0), ("pearson", 0.4), ("spearman", 0.3))
    return numbers + [(t, m, value - less) for t in RECORDS for m, less in metrics]


def _judged_line(encoder: str, target: str, metric: str, value: float, **fields: Any) -> dict:
    records = ("sex", "view", "view=PA", *RECORDS)
    task = "metadata" if target in records else "classification"
    fields = {"features": "cls+patch_mean", "n_positive": 84, "prevalence": 0.21} | fields
    return result(encoder, target, metric, value, task=task, **fields)


def write_predictions(
    out: Path, encoders: tuple[str, ...], findings: tuple[str, ...], images: int
) -> None:
    """`predictions.parquet`: calibrated probabilities, numbers with noise, a label unknown."""
    noise, tables = np.random.default_rng(0), []
    ids = [f"secret-image-{i}" for i in range(images)]
    patients = [f"secret-patient-{i // 2}" for i in range(images)]
    for encoder in encoders:
        for target in (*findings, *RECORDS):
            if target in RECORDS:
                labels = noise.normal(60, 15, images)
                predictions = labels + noise.normal(0, 9, images)
            else:
                predictions = noise.beta(1, 4, images)
                labels = (noise.random(images) < predictions).astype(float)
            labels[0] = np.nan
            for trained_on, seed in (("all", 0), ("all", 1), ("5 % of patients", 0)):
                first = trained_on == "all" and seed == 0
                columns = {"image_id": ids, "patient_id": patients, "encoder": [encoder] * images}
                columns |= {"probe": ["linear"] * images, "trained_on": [trained_on] * images}
                columns |= {"probe_seed": [seed] * images, "target": [target] * images}
                columns |= {"label": pa.array(labels, from_pandas=True)}
                tables.append(pa.table(columns | {"prediction": predictions if first else labels}))
    pq.write_table(pa.concat_tables(tables), out / "predictions.parquet")


class Page(HTMLParser):
    """A page taken apart: tags with attributes, text, and rows of `data-value` by table."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.captions: list[str] = []
        self.open: list[str] = []
        self.unbalanced: list[str] = []
        self.words = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "figcaption":
            self.captions.append("")
        if tag not in {"meta", "link", "img", "br", "wbr"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.unbalanced.append(tag)

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in {"style", "script"}:
            return
        self.words += data
        if "figcaption" in self.open:
            self.captions[-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        """The attributes of every such tag."""
        return [attributes for name, attributes in self.tags if name == tag]
