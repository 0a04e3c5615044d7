"""Pictures: attention, patch tokens and neighbours of the encoder that the page is about."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from selfray.data.dataset import RadiographDataset
from selfray.errors import InputError
from selfray.feature_directory import Features
from selfray.summary.inputs import Evaluation, Inputs, Run
from selfray.summary.markup import PHANTOM, escaped, figure, listed
from selfray.summary.pictures import (
    EXAMPLES,
    Example,
    Neighbour,
    choose_rows,
    data_uri,
    draw_examples,
    find_features,
    nearest_neighbours,
)
from selfray.summary.verdict import readable_names, subjects

_ENCODERS = 3
"""At most so many encoders of an evaluation are drawn: each adds a second and 150 kB."""


def pictures_section(inputs: Inputs) -> str:
    """The section for the judged encoders of all evaluations, or for each run if there is none."""
    parts, seen = [], set[tuple[str, Any]]()
    # Those with results first: there lie the features that neighbours are found by.
    for evaluation in sorted(inputs.evaluations, key=lambda e: not e.results):
        for k, encoder in enumerate(_drawn(evaluation, inputs.runs)):
            shown = (encoder, evaluation.dataset.get("fingerprint"))
            if shown not in seen:  # evaluations of one encoder on the same images look alike
                parts.append(_of_evaluation(evaluation, encoder, first=k == 0))
            seen.add(shown)
    if not parts:
        parts = [_of_run(run) for run in inputs.runs]
    body = "".join(parts) or "<p>No encoder is recorded, so there is nothing to draw.</p>"
    return f'<section id="pictures"><h2>Pictures</h2>{body}</section>'


def _drawn(evaluation: Evaluation, runs: list[Run]) -> list[str]:
    """The first that is judged, and of the others those that were pre-trained here."""
    here = {run.path.resolve() for run in runs}
    judged = subjects(evaluation.encoders) if evaluation.encoders else []
    return (judged[:1] + [e for e in judged[1:] if Path(e).resolve() in here])[:_ENCODERS]


def _of_evaluation(evaluation: Evaluation, encoder: str, *, first: bool) -> str:
    head = f"<h3>{escaped(readable_names(evaluation.encoders)[encoder])}</h3>"
    try:
        dataset = open_data(evaluation.info.get("data"), evaluation.dataset.get("fingerprint"))
        features = find_features(evaluation.path, encoder)
    except InputError as error:
        return f"{head}{_left_out(error)}"
    name = features.manifest["encoder"] if features is not None else encoder
    return head + _examples(name, dataset) + (_neighbours(features, dataset) if first else "")


def _of_run(run: Run) -> str:
    head = f"<h3>{escaped(run.path.resolve().name)}</h3>"
    try:
        dataset = open_data(run.data[0] if run.data else None, None)
    except InputError as error:
        return f"{head}{_left_out(error)}"
    return (
        head
        + _examples(str(run.path), dataset)
        + '<p class="note">Nearest neighbours need the features of all images: '
        "<code>selfray evaluate</code> makes them, and its summary shows them.</p>"
    )


def open_data(path: Any, fingerprint: Any) -> RadiographDataset:
    """The dataset of an evaluation or a run.

    Args:
        path: As it was recorded.
        fingerprint: Likewise; None where it is not known.

    Raises:
        InputError: It is not recorded, not there, or holds other data by now.
    """
    if not isinstance(path, str):
        raise InputError("it is not recorded where the data lies.")
    dataset = RadiographDataset(path)
    if fingerprint is not None and dataset.fingerprint != fingerprint:
        raise InputError(f"{path} holds other data by now (the fingerprint differs).")
    return dataset


def _left_out(error: Exception) -> str:
    return f'<p class="note">Left out: {escaped(error)}</p>'


def _note(dataset: RadiographDataset) -> str:
    return f"{PHANTOM}. " if dataset.synthetic else ""


def _examples(name: str, dataset: RadiographDataset) -> str:
    from selfray.models.published import load_encoder

    if name.startswith("pixels:"):
        return '<p class="note">Pixels have no attention and no patch tokens.</p>'
    print(f"summary: drawing what {name} sees", file=sys.stderr)
    try:
        encoder = load_encoder(name)
        if not encoder.has_attention:
            return (
                f'<p class="note">{escaped(name)} has no attention of a CLS token to draw: it is '
                "no DINOv2-type vision transformer.</p>"
            )
        examples = draw_examples(encoder, dataset, choose_rows(dataset, EXAMPLES, healthy=True))
    except InputError as error:
        return _left_out(error)
    cards = "".join(map(_example, examples))
    caption = (
        f"{_note(dataset)}<b>What the encoder looks at.</b> Of each three: the radiograph as the "
        f"encoder is given it ({encoder.image_size} × {encoder.image_size} pixels); attention of "
        "the CLS token in the last block, mean over heads, from dark violet (low) to yellow "
        "(high); over the radiograph, the first three principal components of the patch tokens as "
        f"red, green and blue, fitted on these {len(examples)} images together, so that like "
        "colour means like features. "
        f"Patches are {encoder.patch_size} × {encoder.patch_size} pixels; maps are interpolated."
    )
    return figure(f'<div class="examples">{cards}</div>', caption) + _heads(examples[0], dataset)


def _example(example: Example) -> str:
    what = _what(example.findings, example.view)
    pictures = (
        (example.radiograph, f"Radiograph, {what}"),
        (example.attention, f"Attention of the CLS token over it, mean over heads; {what}"),
        (example.patches, f"Patch tokens of it as colour; {what}"),
    )
    images = "".join(_img(pixels, alt) for pixels, alt in pictures)
    return figure(f'<div class="triple">{images}</div>', escaped(what), kind="example")


def _heads(example: Example, dataset: RadiographDataset) -> str:
    tiles = "".join(
        figure(_img(pixels, f"Attention of head {k} over the first radiograph"), f"head {k}")
        for k, pixels in enumerate(example.heads, start=1)
    )
    caption = f"{_note(dataset)}<b>Each head by itself,</b> on the first radiograph."
    return figure(f'<div class="heads">{tiles}</div>', caption)


def _neighbours(features: Features | None, dataset: RadiographDataset) -> str:
    if features is None:
        return _left_out(
            InputError("the evaluation has no features of this encoder to find neighbours by.")
        )
    try:
        rows = nearest_neighbours(features, dataset)
    except InputError as error:
        return _left_out(error)
    strips = "".join(
        f'<div class="neighbours">{"".join(_tile(n, k == 0) for k, n in enumerate(row))}</div>'
        for row in rows
    )
    caption = (
        f"{_note(dataset)}<b>Nearest neighbours.</b> Left, framed: a test image. Right of it: the "
        "images of other patients, of any split, whose CLS tokens are nearest (cosine), with the "
        "findings that they share with it. Labels were not used to find them."
    )
    return figure(strips, caption)


def _tile(neighbour: Neighbour, is_query: bool) -> str:
    view = f"{neighbour.view} · " if neighbour.view else ""
    if is_query:
        what = f"{view}{listed(neighbour.shared) or 'no finding'}"
        return figure(_img(neighbour.radiograph, f"Query: {what}", "query"), escaped(what))
    shared = f"shares {listed(neighbour.shared)}" if neighbour.shared else "shares no finding"
    further = f"; also {listed(neighbour.others)}" if neighbour.others else ""
    what = f"{view}{neighbour.cosine:.3f} · {shared}{further}"
    return figure(_img(neighbour.radiograph, f"Neighbour: {what}"), escaped(what))


def _what(findings: tuple[str, ...], view: str) -> str:
    return ", ".join(part for part in (view, listed(findings) or "no finding labelled") if part)


def _img(pixels: Any, alt: str, kind: str = "") -> str:
    height, width = pixels.shape[:2]
    attribute = f' class="{kind}"' if kind else ""
    return (
        f'<img src="{data_uri(pixels)}" alt="{escaped(alt)}" width="{width}" height="{height}"'
        f"{attribute}>"
    )
