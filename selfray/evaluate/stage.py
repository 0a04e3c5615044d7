"""Encoders x tasks x dataset -> an evaluation directory.

Every encoder is judged by the same probes on the same patients. Probes are fitted on the train
split, what must be chosen is chosen on the validate split, every number is of the test split.

`results.jsonl` has one line a (encoder, task, target, metric, probe), and more fields where they
apply: `trained_on` a part of the train split, `subgroup` of the test images, `reference` of a
paired difference. Beside it lie `predictions.parquet` and `held_out.parquet`, from which every
number can be computed again, and tables of the main numbers as CSV and LaTeX.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from selfray.data.dataset import RadiographDataset, write_atomically
from selfray.errors import InputError, nearest
from selfray.evals.bootstrap import RESAMPLES
from selfray.evals.segmentation_decoders import require_decoder
from selfray.evaluate.benchmark import Benchmark, open_benchmark
from selfray.evaluate.held_out import (
    Fit,
    HeldOut,
    Judged,
    predictions_table,
    read_predictions,
)
from selfray.evaluate.judge import (
    FROZEN_PROBES,
    Protocol,
    can_run,
    describe_encoder,
    feature_directory,
    judge,
    require_probes,
    require_usable,
    slug,
)
from selfray.evaluate.kept_parts import write_table
from selfray.evaluate.leaks import (
    KnownTraining,
    find_leaks,
    pretraining_fingerprints,
    read_training_list,
)
from selfray.evaluate.presets import apply_preset, find_preset
from selfray.evaluate.replaced import remove_stale_page, say_what_differs
from selfray.evaluate.report_writing import (
    ImageTokens,
    ReportTask,
    judge_reports,
    tokens_of_encoder,
    tokens_of_features,
)
from selfray.evaluate.reported import (
    REPORT_VARIANTS,
    read_findings,
    require_readers,
    score_reports,
)
from selfray.evaluate.score import score
from selfray.evaluate.segmentation import judge_segmentation, require_segmenting
from selfray.evaluate.segmented import score_segmentation
from selfray.evaluate.tables import write_tables
from selfray.feature_directory import Features, open_features
from selfray.models.published import load_encoder
from selfray.report_config import validate_report_config

FORMAT_NAME = "selfray-evaluation"
VERSION = 2
SEGMENTATION = "segmentation"
REPORTS = "reports"
DEFAULT_TASKS = ("classification", "metadata")
TASKS = (*DEFAULT_TASKS, SEGMENTATION, REPORTS)

_RESULTS = "results.jsonl"
_SEGMENTED = "segmentation.parquet"
_REPORTED = "reports.parquet"
_SHOWN = 4  # targets in an error


# What `evaluation.json` says, the test images, the judged, and tables of label maps and reports.
_Evaluation = tuple[dict[str, Any], HeldOut, list[Judged], dict[str, pa.Table], dict[str, pa.Table]]


@dataclass(frozen=True)
class _Choice:
    """What was asked for."""

    encoders: tuple[str, ...]
    tasks: tuple[str, ...]
    protocol: Protocol
    decoders: tuple[str, ...]
    columns: tuple[str, ...]
    preset: str | None
    labels: tuple[str, ...]
    decoder_steps: int | None
    segmentation_size: int | None
    report: ReportTask | None
    training_lists: tuple[tuple[str, Path], ...]
    baseline: str | None
    seed: int

    def command(self, data: Path, out: Path) -> str:
        """The command that gives the same."""
        words = ["selfray", "evaluate", *self.encoders, "--data", str(data), "--out", str(out)]
        words += ["--preset", self.preset] if self.preset else ["--tasks", *self.tasks]
        words += ["--labels", *self.labels] if self.labels else []
        words += [*self.protocol.options(), "--seed", str(self.seed)]
        words += ["--decoders", *self.decoders]
        words += ["--decoder-steps", str(self.decoder_steps)] if self.decoder_steps else []
        if self.segmentation_size:
            words += ["--segmentation-size", str(self.segmentation_size)]
        words += self.report.options() if self.report else []
        words += ["--columns", *self.columns] if self.columns else []
        for encoder, file in self.training_lists:
            words += ["--training-list", encoder, str(file)]
        words += ["--baseline", self.baseline] if self.baseline else []
        return shlex.join(words)


def evaluate(
    encoders: Sequence[str],
    data: Path,
    out: Path,
    *,
    tasks: Sequence[str] | None = None,
    probes: Sequence[str] = FROZEN_PROBES,
    decoders: Sequence[str] = ("linear",),
    labels: Sequence[str] = (),
    decoder_steps: int | None = None,
    segmentation_size: int | None = None,
    report: ReportTask | None = None,
    columns: Sequence[str] = (),
    label_efficiency: bool = False,
    sites: bool = False,
    probe_seeds: int = 1,
    preset: str | None = None,
    training_lists: Sequence[tuple[str, Path]] = (),
    baseline: str | None = None,
    seed: int = 0,
) -> Path:
    """Judge encoders on a dataset's findings, patient records and masks.

    Features and finished parts are kept below `OUT`, so that the same command, interrupted or
    repeated with more encoders or probes, goes on with what is done.

    Args:
        encoders: Names, run directories, Hugging Face directories, `random:ARCH`, `pixels:pca`,
            `pixels:16x16`, or feature directories made from `data`.
        data: Dataset directory with train, validate and test splits.
        out: Evaluation directory.
        tasks: `classification` (the findings), `metadata` (sex, age, weight, BMI),
            `segmentation` (the masks), `reports` (written by a language model); default: the
            first two. None with a preset.
        probes: `linear`, `knn`, and those of `trained_protocols`: `sgd`, `sgd-crops`,
            `attentive`, `fine-tune`, `fine-tune-last-N`.
        decoders: Of segmentation: those of `segmentation_decoders.DECODERS`, also with
            `-fine-tuned` behind the name.
        labels: Mask labels and findings to segment; default: all mask labels.
        decoder_steps: For which decoders are trained; default: `segmentation.STEPS`.
        segmentation_size: Side of the encoders' input in segmentation, pixels; default: their own.
        report: How reports are written and read; default: by the recipe `tiny`.
        columns: Further columns of the dataset to predict, such as `view` or `site`.
        label_efficiency: Also fit linear probes on 1 to 100 % of the training patients.
        sites: Also fit linear probes on each site, and judge them on each.
        probe_seeds: How often trained probes and decoders are repeated, >= 1.
        preset: A published protocol by name, in place of tasks.
        training_lists: Encoders, each with a file that says which images it was trained on; see
            `read_training_list`. Several of one encoder count together.
        baseline: Compare each encoder with this one only; default: with each other one.
        seed: Of the bootstrap, 0 to 2**32 - 1.

    Returns:
        `out`.

    Raises:
        InputError: An empty split, no labels at all, unknown task, probe, column or baseline,
            features of another dataset, CheXbert or RadGraph cannot be opened, or `out` holds
            something else.
    """
    choice = _Choice(
        encoders=tuple(dict.fromkeys(encoders)),
        tasks=tuple(dict.fromkeys(DEFAULT_TASKS if tasks is None else tasks)),
        protocol=Protocol(tuple(dict.fromkeys(probes)), label_efficiency, sites, probe_seeds),
        decoders=tuple(dict.fromkeys(decoders)),
        columns=tuple(dict.fromkeys(columns)),
        preset=preset,
        labels=tuple(dict.fromkeys(labels)),
        decoder_steps=decoder_steps,
        segmentation_size=segmentation_size,
        report=(report or ReportTask()) if tasks is not None and REPORTS in tasks else report,
        training_lists=tuple(training_lists),
        baseline=baseline,
        seed=seed,
    )
    if preset and tasks is not None:
        raise InputError(f"preset {preset} says what is judged. Leave --tasks out.")
    _require_valid(choice)
    _require_evaluation_or_empty(out)
    benchmark, segmenting = _open(data, choice)
    listed = _training_lists(choice, benchmark)
    _require_encoders(choice, benchmark, segments=segmenting is not None)
    if choice.report is not None:
        require_readers(chexbert=choice.report.chexbert, radgraph=choice.report.radgraph)
    say_what_differs(out, choice.command(data, out), benchmark.data.fingerprint)
    out.mkdir(parents=True, exist_ok=True)
    features, judged = _judge(choice, benchmark, out)
    segmented = {} if segmenting is None else _segment(choice, benchmark, segmenting, out)
    reported = {} if choice.report is None else _report(choice, choice.report, benchmark, out)
    leaks = _leaks(benchmark, judged, features, listed)
    described = _what_was_asked(choice, benchmark, out, segments=segmenting is not None) | {
        "training_lists": {name: len(lines) for name, lines in listed.items()},
        "leaks": leaks,
    }
    _write(out, judged, segmented, reported, benchmark.held_out, described, baseline, seed)
    return out


def _what_was_asked(
    choice: _Choice, benchmark: Benchmark, out: Path, *, segments: bool
) -> dict[str, Any]:
    """For `evaluation.json`."""
    info, data = benchmark.data.info, benchmark.data.directory
    tasks = list(dict.fromkeys(target.task for target in benchmark.held_out.targets))
    tasks += [SEGMENTATION] * segments + [REPORTS] * (choice.report is not None)
    return {
        "command": choice.command(data, out),
        "data": str(data),
        "dataset": {
            name: info[name] for name in ("name", "origin", "fingerprint", "synthetic", "counts")
        },
        "tasks": tasks,
        "report": choice.report.description() if choice.report else None,
        "preset": choice.preset,
    }


def _judge(
    choice: _Choice, benchmark: Benchmark, out: Path
) -> tuple[dict[str, Features], list[Judged]]:
    """Features and predictions of every encoder, where there is anything to predict."""
    features: dict[str, Features] = {}
    judged = []
    for encoder in choice.encoders:
        if not benchmark.held_out.targets and can_run(encoder):
            judged.append(Judged(encoder, describe_encoder(load_encoder(encoder))))
            continue
        directory = feature_directory(encoder, benchmark, out, choice.protocol)
        features[encoder] = open_features(directory)
        judged.append(judge(encoder, features[encoder], benchmark, choice.protocol, out))
    return features, judged


def _segment(
    choice: _Choice, benchmark: Benchmark, labels: tuple[str, ...], out: Path
) -> dict[str, pa.Table]:
    """Scores of label maps of every encoder that is a network; no labels are all."""
    asked = (*labels, *([f"{choice.decoder_steps} steps"] if choice.decoder_steps else []))
    size = (f"{choice.segmentation_size} pixels",) if choice.segmentation_size else ()
    return {
        encoder: judge_segmentation(
            load_encoder(encoder),
            benchmark.data,
            out / SEGMENTATION / slug("\0".join((encoder, *size, *asked))),
            tokens=out / SEGMENTATION / "tokens" / slug("\0".join((encoder, *size))),
            decoders=choice.decoders,
            labels=labels or None,
            seeds=range(choice.protocol.seeds),
            steps=choice.decoder_steps,
            image_size=choice.segmentation_size,
        )
        for encoder in choice.encoders
        if can_run(encoder)
    }


def _report(
    choice: _Choice, task: ReportTask, benchmark: Benchmark, out: Path
) -> dict[str, pa.Table]:
    """Reports by every encoder, and what was read in them."""
    reported = {}
    for encoder in choice.encoders:
        changed = hashlib.sha256("\0".join(task.changed()).encode()).hexdigest()[:8]
        kept = out / REPORTS / (slug(encoder) + f"-{changed}" * bool(task.changed()))

        def tokens(rows: np.ndarray, encoder: str = encoder) -> ImageTokens:
            if can_run(encoder):
                which = hashlib.sha256(rows.tobytes()).hexdigest()[:8]
                place = out / REPORTS / "tokens" / f"{slug(encoder)}-{which}"
                return tokens_of_encoder(load_encoder(encoder), benchmark.data, rows, place)
            made = feature_directory(encoder, benchmark, out, choice.protocol)
            return tokens_of_features(open_features(made))

        first = task.config.seed
        table = judge_reports(
            tokens,
            benchmark.data,
            kept,
            config=task.config,
            seeds=range(first, first + choice.protocol.seeds),
        )
        reported[encoder] = read_findings(
            table,
            synthetic=benchmark.data.synthetic,
            chexbert=task.chexbert,
            radgraph=task.radgraph,
        )
    return reported


def _leaks(
    benchmark: Benchmark,
    judged: Sequence[Judged],
    features: Mapping[str, Features],
    listed: Mapping[str, frozenset[str]],
) -> list[dict[str, Any]]:
    """What the test split shares with training, said on stderr too."""
    known = {
        one.encoder: KnownTraining(
            tuple(one.description["training_data"]),
            listed.get(one.encoder, frozenset()),
            pretraining_fingerprints(one.encoder),
        )
        for one in judged
    }
    leaks = find_leaks(
        benchmark.data,
        {encoder: of.cls for encoder, of in features.items()},
        known,
        threads=len(os.sched_getaffinity(0)),
    )
    for leak in leaks:
        loudness = "note" if leak.kind == "pre-training" else "LEAK"
        print(f"evaluate: {loudness}: {leak.sentence}", file=sys.stderr)
    return [asdict(leak) for leak in leaks]


def _open(data: Path, choice: _Choice) -> tuple[Benchmark, tuple[str, ...] | None]:
    """The benchmark, and labels to segment: none named means all, None not to segment."""
    if choice.preset is None:
        tasks = [task for task in choice.tasks if task in DEFAULT_TASKS]
        labels = choice.labels if SEGMENTATION in choice.tasks else None
        required = labels is None and REPORTS not in choice.tasks
        benchmark = open_benchmark(data, tasks, choice.columns, required=required)
        if choice.protocol.sites and "site" not in benchmark.held_out.groups:
            raise InputError(
                f"{data} has test images of one site at most, and --sites needs two. Give the "
                "table of `selfray ingest` a column site, or leave --sites out."
            )
        return benchmark, labels
    applied = apply_preset(find_preset(choice.preset), RadiographDataset(data))
    findings = [target.column for target in applied.targets]
    labels = tuple(label for of in applied.label_maps.values() for label in of) or None
    columns = (*findings, *choice.columns)
    return open_benchmark(data, (), columns, required=labels is None), labels


def _training_lists(choice: _Choice, benchmark: Benchmark) -> dict[str, frozenset[str]]:
    """By encoder. One that names no image of the dataset is said: it may use other names."""
    listed: dict[str, frozenset[str]] = {}
    for encoder, file in choice.training_lists:
        listed[encoder] = listed.get(encoder, frozenset()) | read_training_list(file)
    for encoder, lines in listed.items():
        known = {*benchmark.data.column("image_id"), *benchmark.data.column("source_file")}
        digests = any(re.fullmatch("[0-9a-f]{64}", line) for line in lines)
        if not lines & known and not digests:
            print(
                f"evaluate: WARNING: none of {len(lines)} lines of {encoder}'s training list is an "
                "image_id or source_file of the dataset, so nothing can be found by it",
                file=sys.stderr,
            )
    return listed


def compare(evaluations: Sequence[Path], out: Path, *, baseline: str | None = None) -> Path:
    """Join earlier evaluations of one dataset, without running anything again.

    An encoder that several of them hold is called `ENCODER (EVALUATION)`, by the directory's name:
    they may differ in the report model, the segmentation decoder or the file at the encoder's path.

    Args:
        evaluations: Two or more evaluation directories with the same test images and seed.
        out: Evaluation directory to make.
        baseline: As for `evaluate`.

    Returns:
        `out`.

    Raises:
        InputError: An evaluation of other images, or one that is not finished or of an older
            version; one given twice.
    """
    _require_several(evaluations, out)
    parts = [_read(directory) for directory in evaluations]
    _name_apart(evaluations, parts)
    first_described, held_out, *_ = parts[0]
    judged: list[Judged] = []
    segmented: dict[str, pa.Table] = {}
    reported: dict[str, pa.Table] = {}
    for directory, (described, images, members, tables, reports) in zip(
        evaluations, parts, strict=True
    ):
        differing = _what_differs((described, images), (first_described, held_out))
        if differing:
            raise InputError(
                f"{directory} and {evaluations[0]} differ in {', '.join(differing)}. Compare "
                "evaluations of one dataset, tasks and seed."
            )
        if described["dataset"]["fingerprint"] != first_described["dataset"]["fingerprint"]:
            raise InputError(
                f"{directory} was evaluated on another dataset than {evaluations[0]}: the test "
                "images are the same, what probes were fitted on is not. Evaluate on one dataset."
            )
        judged += members
        segmented |= tables
        reported |= reports
    if len({_what_was_segmented(table) for table in segmented.values()}) > 1:
        raise InputError(
            "other labels or test images were segmented in one evaluation than in another. Repeat "
            "them with the same --labels."
        )
    if len({_what_was_reported(table) for table in reported.values()}) > 1:
        raise InputError(
            "another part of the reports was written, or for other studies, or findings were read "
            "otherwise in one evaluation than in another. Repeat them with the same --report "
            "options and --chexbert."
        )
    _require_baseline(baseline, [one.encoder for one in judged])
    kept = ("data", "dataset", "tasks", "preset")
    described = {name: first_described.get(name) for name in kept}
    configs = [of["report"] for of, *_ in parts if of.get("report")]
    described["report"] = (
        configs[0] if configs and configs.count(configs[0]) == len(configs) else None
    )
    described["training_lists"] = {
        k: n for of, *_ in parts for k, n in of["training_lists"].items()
    }
    described["leaks"] = [leak for of, *_ in parts for leak in of["leaks"]]
    words = ["selfray", "evaluate", "--compare", *map(str, evaluations), "--out", str(out)]
    described["command"] = shlex.join(words + (["--baseline", baseline] if baseline else []))
    fingerprint = first_described["dataset"]["fingerprint"]
    say_what_differs(out, str(described["command"]), fingerprint)
    out.mkdir(parents=True, exist_ok=True)
    seed = first_described["seed"]
    _write(out, judged, segmented, reported, held_out, described, baseline, seed)
    return out


def _require_several(evaluations: Sequence[Path], out: Path) -> None:
    if len(evaluations) < 2:
        raise InputError("one evaluation is given to --compare. Give two or more.")
    resolved = [directory.resolve() for directory in evaluations]
    twice = [str(one) for k, one in enumerate(evaluations) if resolved[k] in resolved[:k]]
    if twice:
        raise InputError(f"{twice[0]} is given to --compare twice. Leave one out.")
    if out.resolve() in resolved:
        raise InputError(f"{out} is one of the evaluations to compare. Give another --out.")
    _require_evaluation_or_empty(out)


def _name_apart(evaluations: Sequence[Path], parts: Sequence[_Evaluation]) -> None:
    """Call encoders that several evaluations hold by the evaluation too."""
    count = Counter(one.encoder for _, _, members, *_ in parts for one in members)
    names = [directory.resolve().name for directory in evaluations]
    if len(set(names)) < len(names):
        names = [str(directory) for directory in evaluations]
    for name, (described, _, members, *tables) in zip(names, parts, strict=True):
        new = {encoder: f"{encoder} ({name})" for encoder, n in count.items() if n > 1}
        for one in members:
            one.encoder = one.description["name"] = new.get(one.encoder, one.encoder)
        for of in (described["training_lists"], *tables):
            for encoder in list(of):
                of[new.get(encoder, encoder)] = of.pop(encoder)  # in the same order
        for leak in described["leaks"]:
            leak["encoder"] = new.get(leak["encoder"], leak["encoder"])


def _what_differs(
    one: tuple[dict[str, Any], HeldOut], other: tuple[dict[str, Any], HeldOut]
) -> list[str]:
    """Why two evaluations cannot be compared; nothing where they can."""
    (described, images), (its_described, its_images) = one, other
    if described["seed"] == its_described["seed"] and images.key == its_images.key:
        return []
    found = []
    if described["seed"] != its_described["seed"]:
        found.append(f"seed ({described['seed']} and {its_described['seed']})")
    tasks, its_tasks = (" + ".join(of["tasks"]) or "none" for of in (described, its_described))
    if tasks != its_tasks:
        found.append(f"tasks ({tasks} and {its_tasks})")
    if images.targets != its_images.targets:
        names, its_names = ({t.name for t in of.targets} for of in (images, its_images))
        only = sorted(names ^ its_names)
        shown = f" (only one has {', '.join(only[:_SHOWN])}{', …' * (len(only) > _SHOWN)})"
        found.append("targets" + shown * bool(only))
    if images.image_ids.tolist() != its_images.image_ids.tolist():
        found.append(f"test images ({len(images.image_ids)} and {len(its_images.image_ids)})")
    elif images.patients.tolist() != its_images.patients.tolist():
        found.append("patients of the test images")
    return found or ["labels of the test images"]


def _what_was_segmented(table: pa.Table) -> tuple[frozenset[str], tuple[str, ...]]:
    """Labels, and images in their order."""
    images = tuple(dict.fromkeys(table["image_id"].to_pylist()))
    return frozenset(table["label"].unique().to_pylist()), images


def _what_was_reported(table: pa.Table) -> tuple[tuple[str, ...], str, str | None]:
    """Studies in their order, the part that was written, and who read the findings."""
    images = tuple(dict.fromkeys(table["image_id"].to_pylist()))
    return images, table["section"][0].as_py(), table["reader"][0].as_py()


def _write(
    out: Path,
    judged: Sequence[Judged],
    segmented: Mapping[str, pa.Table],
    reported: Mapping[str, pa.Table],
    held_out: HeldOut,
    described: dict[str, Any],
    baseline: str | None,
    seed: int,
) -> None:
    lines = score(judged, held_out, seed=seed, baseline=baseline)
    lines += score_segmentation(segmented, seed=seed, baseline=baseline)
    lines += score_reports(reported, seed=seed, baseline=baseline)
    description = {
        "format": FORMAT_NAME,
        "version": VERSION,
        **described,
        "findings": [t.name for t in held_out.targets if t.task == "classification"],
        "encoders": [_described(one) for one in judged],
        "baseline": baseline,
        "seed": seed,
        "resamples": RESAMPLES,
        "metric_variants": REPORT_VARIANTS if reported else {},
        "versions": {
            package: version(package) for package in ("selfray", "torch", "numpy", "scikit-learn")
        },
    }
    text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
    shown = {
        "evaluation.json": json.dumps(description, indent=2).encode(),
        _RESULTS: text.encode(),  # last: its presence says that all of these belong together
    }
    remove_stale_page(out, shown)
    (out / _RESULTS).unlink(missing_ok=True)
    for file, tables in ((_SEGMENTED, segmented), (_REPORTED, reported)):
        if tables:
            write_table(out / file, _with_encoders(tables))
        else:
            (out / file).unlink(missing_ok=True)  # of a run with other tasks
    write_table(out / "held_out.parquet", held_out.table())
    write_table(out / "predictions.parquet", predictions_table(judged, held_out))
    write_tables(out, lines)
    for file, content in shown.items():
        write_atomically(out / file, content)


def _with_encoders(tables: Mapping[str, pa.Table]) -> pa.Table:
    """One table, with a column `encoder`."""
    return pa.concat_tables(
        table.append_column("encoder", pa.array([encoder] * len(table), pa.string()))
        for encoder, table in tables.items()
    )


def _by_encoder(file: Path) -> dict[str, pa.Table]:
    """What `_with_encoders` joined; empty where there is none."""
    if not file.exists():
        return {}
    table = pq.read_table(file)
    return {
        encoder: table.filter(pc.field("encoder") == encoder).drop_columns("encoder")
        for encoder in table["encoder"].unique().to_pylist()
    }


def _described(judged: Judged) -> dict[str, Any]:
    return {
        **judged.description,
        "features": judged.inputs,
        "settings": judged.settings,
        "undefined": [[*fit, why] for fit, why in judged.undefined.items()],
    }


def _read(directory: Path) -> _Evaluation:
    """What `_write` wrote."""
    try:
        described = json.loads((directory / "evaluation.json").read_text())
        if described["format"] != FORMAT_NAME or not (directory / _RESULTS).is_file():
            raise KeyError("format")
        if described["version"] != VERSION:
            raise InputError(
                f"{directory} is an evaluation of version {described['version']}, this program "
                f"compares version {VERSION}. Evaluate again, or update selfray."
            )
        held_out = HeldOut.of_table(pq.read_table(directory / "held_out.parquet"))
        judged = [_judged_of(encoder) for encoder in described["encoders"]]
        segmented = _by_encoder(directory / _SEGMENTED)
        reported = _by_encoder(directory / _REPORTED)
    except (OSError, ValueError, KeyError, TypeError) as cause:
        raise InputError(
            f"{directory} holds no finished evaluation. Give one made by `selfray evaluate`."
        ) from cause
    predictions = read_predictions(directory / "predictions.parquet", held_out)
    for one in judged:
        one.predictions = predictions.get(one.encoder, {})
    return described, held_out, judged, segmented, reported


def _judged_of(described: dict[str, Any]) -> Judged:
    described = dict(described)
    inputs, settings = described.pop("features"), described.pop("settings")
    undefined = {Fit(*fit): why for *fit, why in described.pop("undefined")}
    return Judged(described["name"], described, inputs, {}, undefined, settings)


def _require_valid(choice: _Choice) -> None:
    if not choice.encoders:
        raise InputError("no encoder was given. Name at least one, e.g. pixels:pca.")
    for encoder in choice.encoders:
        if not encoder.isprintable():
            raise InputError(
                f"encoder {encoder!a} holds a character that cannot be printed. Rename it."
            )
    for task in choice.tasks:
        if task not in TASKS:
            raise InputError(f"task {task!r} is unknown. {nearest(task, TASKS)}")
    if not choice.tasks:
        raise InputError(f"no task was given. Allowed: {', '.join(TASKS)}.")
    for decoder in choice.decoders:
        require_decoder(decoder)
    require_probes(choice.protocol.probes)
    if choice.labels and (choice.preset or SEGMENTATION not in choice.tasks):
        raise InputError("labels are for --tasks segmentation. Add it, or leave --labels out.")
    if choice.report is not None and (choice.preset or REPORTS not in choice.tasks):
        raise InputError(
            "how reports are written is for --tasks reports. Add it, or leave --report, --chexbert "
            "and --radgraph options out."
        )
    if choice.report is not None:
        validate_report_config(choice.report.config)
    if choice.segmentation_size is not None and choice.segmentation_size < 1:
        raise InputError(f"segmentation_size is {choice.segmentation_size}. Give 1 or more.")
    for name, _ in choice.training_lists:
        if name not in choice.encoders:
            raise InputError(
                f"training list of {name!r}, which is none of the encoders. "
                f"{nearest(name, choice.encoders)}"
            )
    if choice.protocol.seeds < 1:
        raise InputError(f"probe_seeds is {choice.protocol.seeds}. Give 1 or more.")
    if choice.decoder_steps is not None and choice.decoder_steps < 1:
        raise InputError(f"decoder_steps is {choice.decoder_steps}. Give 1 or more.")
    _require_baseline(choice.baseline, choice.encoders)
    if not 0 <= choice.seed < 2**32:
        raise InputError(f"seed is {choice.seed}. Allowed: 0 to {2**32 - 1}.")


def _require_encoders(choice: _Choice, benchmark: Benchmark, *, segments: bool) -> None:
    for encoder in choice.encoders:
        require_usable(encoder, benchmark, choice.protocol, segments=segments)
        if segments and can_run(encoder):
            require_segmenting(load_encoder(encoder), choice.decoders, choice.segmentation_size)


def _require_baseline(baseline: str | None, encoders: Sequence[str]) -> None:
    if baseline is not None and baseline not in encoders:
        raise InputError(
            f"baseline {baseline!r} is none of the encoders. {nearest(baseline, encoders)}"
        )


def _require_evaluation_or_empty(out: Path) -> None:
    kept = ("features", "judged", SEGMENTATION, REPORTS)
    ours = (out / "evaluation.json").is_file() or any((out / name).is_dir() for name in kept)
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not ours)):
        raise InputError(
            f"{out} exists and holds no evaluation. Give a new directory, or remove it."
        )
