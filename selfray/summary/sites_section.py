"""Sites: whether a probe of one site works at another, and how much features say of the machine."""

from __future__ import annotations

from statistics import fmean

from selfray.summary.inputs import Evaluation
from selfray.summary.judged_cells import probe_name
from selfray.summary.markup import escaped, figure, listed
from selfray.summary.number_cells import (
    Line,
    by_probe,
    encoder_head,
    first_shown,
    fixed,
    head,
    interval,
    measure_title,
    number_cell,
    table,
)
from selfray.summary.verdict import readable_names

_SITE = "site "  # before the name in `trained_on`
_ALL = "all of the train split"
_ANYWHERE = ""  # place of the reason why a site has no probe
_MAIN_METRICS = {"auroc": 0.5, "r2": 0.0}
"""Metrics that are shown, with the value of an encoder that knows nothing."""
_MACHINE = ("site", "scanner", "view")
_DEEPEST = 50
"""Percent of colour in the deepest cell: above it, text is hard to read in one of the schemes."""

_Matrix = dict[tuple[str, str], Line]
"""By site of the training and site of the test."""


def sites_section(evaluation: Evaluation, note: str) -> str:
    """What is known of sites adds to the results of one evaluation.

    Args:
        evaluation: Read by `read_evaluation`.
        note: What each caption begins with.

    Returns:
        HTML, empty when there is neither a probe of one site nor a prediction of site, scanner or
        view.
    """
    names = readable_names(evaluation.encoders)
    parts = _transfer(evaluation, note) + _machine(evaluation, names, note)
    return f"<h3>Sites and machines</h3>{parts}" if parts else ""


def _transfer(evaluation: Evaluation, note: str) -> str:
    lines = [
        line
        for line in evaluation.results
        if line["metric"] in _MAIN_METRICS
        and _trained_on(line) is not None
        and (_is_cell(line) or _has_no_probe(line))
    ]
    return "".join(
        _transfer_of_probe(probe_name(probe), found, evaluation, note)
        for probe, found in by_probe(lines).items()
        if any(_is_cell(line) and "trained_on" in line for line in found)
    )


def _is_cell(line: Line) -> bool:
    return line.get("grouped_by") == "site" and "subgroup" in line


def _has_no_probe(line: Line) -> bool:
    """Whether this says why nothing could be fitted on a site."""
    return "trained_on" in line and "grouped_by" not in line and line["value"] is None


def _trained_on(line: Line) -> str | None:
    """The site whose training patients a probe was fitted on, or `_ALL`; None for other parts."""
    part = str(line.get("trained_on", _SITE + _ALL))
    return part.removeprefix(_SITE) if part.startswith(_SITE) else None


def _transfer_of_probe(probe: str, lines: list[Line], evaluation: Evaluation, note: str) -> str:
    names = readable_names(evaluation.encoders)
    found: dict[tuple[str, str], dict[str, _Matrix]] = {}
    for line in lines:
        matrices = found.setdefault((line["target"], line["metric"]), {})
        cell = _trained_on(line) or _ALL, str(line["subgroup"]) if _is_cell(line) else _ANYWHERE
        matrices.setdefault(line["encoder"], {})[cell] = line
    found = {
        m: matrices for m, matrices in found.items() if any(map(_is_transfer, matrices.values()))
    }
    first = first_shown(found, evaluation.findings)
    html = figure(
        _maps(first, found[first], names),
        f"{note}<b>From site to site, {escaped(measure_title(*first))}, probe {escaped(probe)}.</b>"
        " Each row: a probe fitted on the training patients of one site; each column: the test "
        "patients of one site, with 95 % intervals by resampling them. Framed: the same site; last "
        "row, for comparison: a probe of all training patients. "
        "Deeper colour is higher, on one scale for all encoders. Compare within a column: sites "
        "differ in how hard their patients are.",
    )
    others = [m for m in found if m != first]
    if others:
        maps = "".join(
            f"<h4>{escaped(measure_title(*m))}</h4>{_maps(m, found[m], names)}" for m in others
        )
        caption = f"{note}From site to site as above, target by target, probe {escaped(probe)}."
        html += (
            "<details><summary>From site to site, each of the other targets</summary>"
            f"{figure(maps, caption)}</details>"
        )
    return html


def _is_transfer(matrix: _Matrix) -> bool:
    return any(trained != _ALL and tested != _ANYWHERE for trained, tested in matrix)


def _maps(measured: tuple[str, str], matrices: dict[str, _Matrix], names: dict[str, str]) -> str:
    lines = [line for matrix in matrices.values() for line in matrix.values()]
    values = [line["value"] for line in lines if line["value"] is not None]
    scale = _MAIN_METRICS[measured[1]], max(values, default=1.0)
    maps = "".join(
        _map(name, measured, matrices[encoder], scale)
        for encoder, name in names.items()
        if encoder in matrices
    )
    return f'<div class="heatmaps">{maps}</div>'


def _map(name: str, measured: tuple[str, str], matrix: _Matrix, scale: tuple[float, float]) -> str:
    trained = sorted({cell[0] for cell in matrix}, key=lambda site: (site == _ALL, site))
    tested = sorted({cell[1] for cell in matrix} - {_ANYWHERE})
    heads = head("trained on ↓, tested on →", "name") + "".join(map(head, map(escaped, tested)))
    rows = [
        f'<tr><th scope="row">{escaped(site)}</th>'
        + "".join(
            _cell(
                matrix.get((site, other)) or matrix.get((site, _ANYWHERE)), scale, own=site == other
            )
            for other in tested
        )
        + "</tr>"
        for site in trained
    ]
    title = measure_title(*measured)
    grid = table(heads, rows, told=f"{title} from site to site, {name}", kind="heat")
    return f"<div><h5>{escaped(name)}</h5>{grid}{_means(matrix)}</div>"


def _cell(line: Line | None, scale: tuple[float, float], *, own: bool) -> str:
    if line is None or line["value"] is None:
        return number_cell(line)
    low, high = scale
    depth = (line["value"] - low) / (high - low) if high > low else 0.0
    percent = round(_DEEPEST * min(max(depth, 0.0), 1.0))
    attributes = ' class="own" title="same site"' if own else ""
    return (
        f'<td{attributes} data-value="{line["value"]!r}" style="background:color-mix(in srgb, '
        f'var(--series-0) {percent}%, var(--paper))">{fixed(line["value"])}{interval(line)}</td>'
    )


def _means(matrix: _Matrix) -> str:
    """Own and other sites in a line, where there are both."""
    own, other = (
        [
            line["value"]
            for (trained, tested), line in matrix.items()
            if (trained == tested) == same and line["value"] is not None and trained != _ALL
        ]
        for same in (True, False)
    )
    if not own or not other:
        return ""
    return (
        f'<p class="note">Mean of the cells: same site {fixed(fmean(own))}, another site '
        f"{fixed(fmean(other))}.</p>"
    )


def _machine(evaluation: Evaluation, names: dict[str, str], note: str) -> str:
    lines = [
        line
        for line in evaluation.results
        if line["metric"] == "auroc"
        and line["target"].partition("=")[0] in _MACHINE
        and not ({"trained_on", "grouped_by"} & line.keys())
    ]
    return "".join(
        _machine_of_probe(probe_name(probe), found, names, note)
        for probe, found in by_probe(lines).items()
    )


def _machine_of_probe(probe: str, lines: list[Line], names: dict[str, str], note: str) -> str:
    cells = {(line["encoder"], line["target"]): line for line in lines}
    there = dict.fromkeys(line["target"] for line in lines)
    means = [target for target in _MACHINE if target in there]
    values = [target for target in there if "=" in target]
    html = figure(
        _machine_table(means or values, cells, names),
        f"{note}<b>How much of the features is about the machine, probe {escaped(probe)}.</b> "
        "AUROC of predicting where and how an image was made, mean over the categories, each "
        "against the rest, with 95 % intervals. This is a warning sign, not a merit: near 1.0, the "
        "features say which site, scanner or view an image is from, and a probe can take that for "
        "a finding wherever patients differ between them. 0.5: the features do not say. That they "
        "tell views apart is expected.",
    )
    if means and values:
        html += (
            "<details><summary>Each site, scanner and view</summary>"
            + figure(
                _machine_table(values, cells, names),
                f"{note}AUROC of each category against the rest, 95 % intervals.",
            )
            + "</details>"
        )
    return html


def _machine_table(
    targets: list[str], cells: dict[tuple[str, str], Line], names: dict[str, str]
) -> str:
    heads = head("Encoder") + "".join(
        head(f"{escaped(listed([target]))}, AUROC") for target in targets
    )
    rows = [
        f"<tr>{encoder_head(k, name)}"
        + "".join(number_cell(cells.get((encoder, target))) for target in targets)
        + "</tr>"
        for k, (encoder, name) in enumerate(names.items())
        if any(of == encoder for of, _ in cells)
    ]
    return table(heads, rows, told="How well site, scanner and view are predicted")
