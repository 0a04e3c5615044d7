"""The page: what was made, is it any good, how did training go, what does the encoder see."""

from __future__ import annotations

import base64
import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import selfray
from selfray.data.dataset import RadiographDataset, write_atomically
from selfray.errors import InputError
from selfray.evaluate.replaced import PAGE_MARK
from selfray.summary.calibration_section import calibration_section
from selfray.summary.charts import share_styles
from selfray.summary.differences_section import differences_section
from selfray.summary.efficiency_section import efficiency_section
from selfray.summary.findings_section import findings_section
from selfray.summary.inputs import Evaluation, Inputs, Run, find_inputs, number
from selfray.summary.leaks import leak_notes
from selfray.summary.markup import PHANTOM, command, escaped, facts
from selfray.summary.method_section import method_section
from selfray.summary.pictures_section import pictures_section
from selfray.summary.protocols_section import protocols_section
from selfray.summary.ranks_section import ranks_section
from selfray.summary.records_section import records_section
from selfray.summary.reports_section import reports_section, reports_verdict
from selfray.summary.results_section import results_section
from selfray.summary.segmentation_section import segmentation_section
from selfray.summary.sites_section import sites_section
from selfray.summary.style import CSS, SCRIPT
from selfray.summary.subgroups_section import subgroups_section
from selfray.summary.training_section import training_section
from selfray.summary.verdict import evaluation_verdict, readable_names, run_verdict

_OF_RESULTS = (
    results_section,
    records_section,
    ranks_section,
    differences_section,
    findings_section,
    calibration_section,
    protocols_section,
    efficiency_section,
    subgroups_section,
    sites_section,
    segmentation_section,
    reports_section,
)


def write_summary(directory: Path) -> Path:
    """Write `summary.html` for what a directory holds.

    Args:
        directory: A run, an evaluation, or a directory that holds such at most two levels down.
            A run may be in progress. The runs that an evaluation judged are shown with it.

    Returns:
        Path of the page: one file without any external request.

    Raises:
        InputError: There is neither a run nor an evaluation.
    """
    inputs = find_inputs(directory)
    page = directory / "summary.html"
    write_atomically(page, _page(inputs).encode("utf-8"))
    return page


def _page(inputs: Inputs) -> str:
    results = "".join(_results(evaluation, inputs) for evaluation in inputs.evaluations)
    sections = [f'<section id="results">{results}</section>'] if results else []
    sections += [training_section(inputs.runs, _run_is_synthetic)] if inputs.runs else []
    sections.append(pictures_section(inputs))
    sections.append(_provenance(inputs))
    title = _title(inputs)
    sheet, body = share_styles("\n".join(sections))
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'"
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{escaped(title)}</title>\n<link rel="icon" href="data:,">\n'
        f"<style>{CSS}{sheet}</style>\n</head>\n<body>\n{_header(title, inputs)}\n<main>\n"
        f"{body}\n</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def _results(evaluation: Evaluation, inputs: Inputs) -> str:
    name = str(evaluation.dataset.get("name", evaluation.path.name))
    which = f": {evaluation.path.resolve().name}" if len(inputs.evaluations) > 1 else ""
    note = _phantom_note(evaluation, inputs)
    body = "".join(section(evaluation, note) for section in _OF_RESULTS)
    return f"<h2>Results on {escaped(name + which)}</h2>{body}"


def _title(inputs: Inputs) -> str:
    judged = sorted({str(e.dataset.get("name", e.path.name)) for e in inputs.evaluations})
    if not judged:
        names = ", ".join(run.path.resolve().name for run in inputs.runs)
        return f"Pre-training of an image encoder: {names}"
    made = "pre-trained and judged" if inputs.runs else "judged"
    return f"Image encoders, {made} on {', '.join(judged)}"


def _header(title: str, inputs: Inputs) -> str:
    parts = [leak_notes(inputs.evaluations), _banner(inputs)]
    parts += [PAGE_MARK, f"<h1>{escaped(title)}</h1>"]
    for evaluation in inputs.evaluations:
        verdicts = [reports_verdict(evaluation)] if evaluation.reports else []
        if evaluation.results or not verdicts:
            verdicts.insert(0, evaluation_verdict(evaluation))
        parts += [_verdict(*verdict) for verdict in verdicts]
    if not inputs.evaluations:
        parts += [f'<p class="lede">{escaped(run_verdict(run))}</p>' for run in inputs.runs]
    parts.append(facts(_data_facts(inputs)))
    shown = [("results", "Results")] * bool(inputs.evaluations)
    shown += [("training", "Training")] * bool(inputs.runs)
    shown += [("pictures", "Pictures"), ("provenance", "How it was made")]
    links = "".join(f'<a href="#{anchor}">{name}</a>' for anchor, name in shown)
    return f'<header>{"".join(parts)}<nav aria-label="Sections">{links}</nav></header>'


def _verdict(opening: str, claims: list[tuple[str, str]]) -> str:
    items = "".join(f"<li><b>{escaped(who)}:</b> {escaped(told)}.</li>" for who, told in claims)
    verdict = f'<ul class="verdict">{items}</ul>' if items else ""
    return f'<p class="lede">{escaped(opening)}</p>{verdict}'


def _banner(inputs: Inputs) -> str:
    judged = [bool(e.dataset.get("synthetic")) for e in inputs.evaluations]
    trained = [_run_is_synthetic(run) for run in inputs.runs]
    if (judged and all(judged)) or (not judged and any(trained)):
        told = (
            "The radiographs of this page are drawn from a parametric anatomy and show no patient. "
            "Nothing here says how an encoder does on real radiographs."
        )
    elif any(judged) or any(trained) or any(map(_encoder_is_synthetic, inputs.evaluations)):
        told = "A part of what is compared here was trained or judged on drawn radiographs."
    else:
        return (
            '<p class="note">Where this page shows radiographs of patients, it may be kept and '
            "passed on only as they may.</p>"
        )
    return f'<p class="banner" role="note"><strong>{PHANTOM}.</strong> {told}</p>'


def _run_is_synthetic(run: Run) -> bool:
    return any(bool(data.get("synthetic")) for data in _data_of(run)) or bool(
        run.card.get("synthetic")
    )


def _encoder_is_synthetic(evaluation: Evaluation) -> bool:
    encoders = evaluation.info.get("encoders")
    listed = encoders if isinstance(encoders, list) else []
    return any(isinstance(e, dict) and bool(e.get("synthetic")) for e in listed)


def _phantom_note(evaluation: Evaluation, inputs: Inputs) -> str:
    """What the captions of an evaluation's figures begin with."""
    if evaluation.dataset.get("synthetic"):
        return f"{PHANTOM}. "
    trained = [r for r in inputs.runs if _run_is_synthetic(r)]
    if trained or _encoder_is_synthetic(evaluation):
        return "An encoder was trained on a synthetic phantom. "
    return ""


def _data_of(run: Run) -> list[dict[str, Any]]:
    """What is known of a run's data: from the datasets, else from the encoder's card."""
    described = []
    for path in run.data:
        try:
            described.append(RadiographDataset(path).info)
        except InputError:
            continue
    if described:
        return described
    listed = run.card.get("data")
    return [d for d in listed if isinstance(d, dict)] if isinstance(listed, list) else []


def _data_facts(inputs: Inputs) -> list[tuple[str, str]]:
    """Each dataset once, with what it served for."""
    uses: dict[str, list[str]] = {}
    for run in inputs.runs:
        for data in _data_of(run):
            uses.setdefault(_described(data), []).append("pre-trained on")
    for evaluation in inputs.evaluations:
        if evaluation.dataset:
            uses.setdefault(_described(evaluation.dataset), []).append("judged on")
    return [(" and ".join(dict.fromkeys(use)).capitalize(), text) for text, use in uses.items()]


def _described(data: dict[str, Any]) -> str:
    """A dataset in a line of HTML: name, origin, counts, fingerprint."""
    counts = data.get("counts")
    counts = counts if isinstance(counts, dict) else {"images": data.get("images")}
    told = [
        f"{counts[what]:,} {what}"
        for what in ("images", "patients", "studies")
        if number(counts.get(what)) is not None
    ]
    split = counts.get("split")
    if isinstance(split, dict):
        order = [s for s in ("train", "validate", "test") if number(split.get(s)) is not None]
        told.append("images to " + ", ".join(f"{s} {split[s]:,}" for s in order))
    text = (
        f"{escaped(data.get('name', 'unnamed'))} ({escaped(data.get('origin', 'origin unknown'))})"
    )
    text += "".join(f"; {escaped(one)}" for one in told)
    fingerprint = str(data.get("fingerprint") or "")
    return text + (f"; fingerprint <code>{escaped(fingerprint[:16])}</code>" if fingerprint else "")


def _provenance(inputs: Inputs) -> str:
    parts = [_run_provenance(run) for run in inputs.runs]
    parts += [_evaluation_provenance(e, inputs.directory) for e in inputs.evaluations]
    made = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, selfray {selfray.__version__}"
    return (
        f'<section id="provenance"><h2>How it was made</h2>{"".join(parts)}'
        f'<p class="note">This page was written {escaped(made)}.</p></section>'
    )


def _run_provenance(run: Run) -> str:
    environment = run.environment
    gpus = environment.get("gpus")
    hardware = [str(gpu) for gpu in gpus] if isinstance(gpus, list) else []
    if environment.get("cpu_count"):
        hardware.append(f"{environment['cpu_count']} CPU cores")
    if environment.get("platform"):
        hardware.append(str(environment["platform"]))
    versions = [f"{n} {environment[n]}" for n in ("selfray", "torch", "python") if n in environment]
    duration = f"{_duration(run.seconds)} in steps" if run.seconds else ""
    told = [
        ("Versions", ", ".join(versions)),
        ("Commit", environment.get("git_commit")),
        ("Hardware", ", ".join(hardware)),
        ("Duration", duration),
        ("Directory", run.path),
    ]
    config = json.dumps(run.config, indent=2, ensure_ascii=False)
    return (
        f"<h3>Run: {escaped(run.path.resolve().name)}</h3>{command(environment.get('command'))}"
        + facts([(name, escaped(value)) for name, value in told if value])
        + "<details><summary>Every setting of the run</summary>"
        + f"<pre>{escaped(config)}</pre></details>"
    )


def _evaluation_provenance(evaluation: Evaluation, directory: Path) -> str:
    info = evaluation.info
    versions = info.get("versions")
    versions = versions if isinstance(versions, dict) else {}
    resamples = number(info.get("resamples"))
    names = readable_names(evaluation.encoders)
    told = [
        ("Versions", ", ".join(f"{package} {found}" for package, found in versions.items())),
        ("Bootstrap", resamples and f"{resamples} resamples of patients, seed {info.get('seed')}"),
        ("Data", info.get("data")),
        *((names[e], f"{e}{_weights(info, e)}") for e in evaluation.encoders),
        ("Directory", evaluation.path),
    ]
    name = escaped(evaluation.path.resolve().name)
    return (
        f"<h3>Evaluation: {name}</h3>{command(info.get('command'))}"
        + method_section(evaluation, directory)
        + facts([(name, escaped(value)) for name, value in told if value])
    )


def _weights(info: dict[str, Any], encoder: str) -> str:
    listed = info.get("encoders")
    for one in listed if isinstance(listed, list) else []:
        if isinstance(one, dict) and one.get("name") == encoder and one.get("weights_sha256"):
            return f" (weights {str(one['weights_sha256'])[:16]})"
    return ""


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
