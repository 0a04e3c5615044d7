"""Radiographs with their report and what a language model wrote, words that differ marked."""

from __future__ import annotations

import difflib
import re
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq

from selfray.data.dataset import RadiographDataset
from selfray.errors import InputError
from selfray.evaluate.report_writing import LANGUAGE_MODEL
from selfray.summary.inputs import Evaluation
from selfray.summary.markup import escaped, figure, listed
from selfray.summary.pictures import data_uri
from selfray.summary.pictures_section import open_data

_SIDE = 256  # pixels of a picture's longer side
_ENCODERS = 4
"""At most so many encoders have examples: each adds some 50 kB."""
_SHARES = (1.0, 0.8, 0.5, 0.2, 0.0)
"""Of the reports ordered by agreement: the best, the worst, and three between."""


def report_pictures(evaluation: Evaluation, names: dict[str, str], note: str) -> str:
    """Examples by each encoder's language model, from the best to the worst.

    Args:
        evaluation: With `reports.parquet`.
        names: Encoders as they are spoken of.
        note: What the caption begins with.

    Returns:
        HTML, all encoders but the first folded; a line that says why where there is nothing to
        show.
    """
    try:
        rows = pq.read_table(evaluation.path / "reports.parquet").to_pylist()
        dataset = open_data(evaluation.info.get("data"), evaluation.dataset.get("fingerprint"))
    except (OSError, InputError) as error:
        return f'<p class="note">Reports beside their images are left out: {escaped(error)}</p>'
    seed = min((row["seed"] for row in rows), default=0)
    shown = []
    for encoder, name in names.items():
        wanted = (encoder, LANGUAGE_MODEL, seed)
        mine = [row for row in rows if (row["encoder"], row["writer"], row["seed"]) == wanted]
        if mine:
            shown.append((name, _examples(mine, name, dataset, note)))
    folded = (
        f"<details><summary>Reports through {escaped(name)}</summary>{html}</details>"
        for name, html in shown[1:_ENCODERS]
    )
    return shown[0][1] + "".join(folded) if shown else ""


def _examples(rows: list[dict[str, Any]], name: str, dataset: RadiographDataset, note: str) -> str:
    ordered = sorted(rows, key=_agreement)
    places = dict.fromkeys(round(share * (len(ordered) - 1)) for share in _SHARES)
    cards = "".join(_card(ordered[place], dataset) for place in places)
    caption = (
        f"{note}<b>Reports by the language model that sees through {escaped(name)}.</b> "
        f"Of {len(ordered):,} test studies the one that agrees best in words, the one that agrees "
        "worst (last), and three between. Marked: words that only one of the two has there; "
        "below, where findings are read, which both state, which only the report, and which only "
        "the language model. The reports are shown as the dataset has them: share this page as "
        "you would share them."
    )
    return figure(f'<div class="reports">{cards}</div>', caption)


def _agreement(row: dict[str, Any]) -> tuple[float, str]:
    matcher = difflib.SequenceMatcher(
        None, _words(row["reference"]), _words(row["generated"]), autojunk=False
    )
    return matcher.ratio(), row["image_id"]


def _words(text: str) -> list[str]:
    return re.findall(r"\S+", text)


def _card(row: dict[str, Any], dataset: RadiographDataset) -> str:
    place = int(np.flatnonzero(dataset.column("image_id") == row["image_id"])[0])
    pixels = dataset.pixels(place)
    scale = _SIDE / max(pixels.shape)
    size = (max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale)))
    picture = data_uri(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA))
    truth, said = marked(row["reference"], row["generated"])
    prompt = f'<p class="prompt">{escaped(row["prompt"])}</p>' if row["prompt"] else ""
    return (
        f'<div class="report"><img src="{picture}" alt="Radiograph" width="{size[0]}" '
        f'height="{size[1]}"><div>{prompt}<p><b>Report</b> {truth}</p>'
        f"<p><b>Language model</b> {said}</p>{_findings(row)}</div></div>"
    )


def _findings(row: dict[str, Any]) -> str:
    """Which findings both state, and which only one of them; empty where nobody read them."""
    if row.get("reference_findings") is None or row.get("generated_findings") is None:
        return ""
    there, said = (dict.fromkeys(row[f"{of}_findings"]) for of in ("reference", "generated"))
    groups = {
        "found": [name for name in there if name in said],
        "missed": [name for name in there if name not in said],
        "invented": [name for name in said if name not in there],
    }
    told = " · ".join(
        f'<span class="{how}">{how}: {escaped(listed(names))}</span>'
        for how, names in groups.items()
        if names
    )
    return f'<p class="stated">{told or "no finding in either"}</p>'


def marked(reference: str, generated: str) -> tuple[str, str]:
    """Both texts as HTML; words that the other has not at that place are marked.

    Args:
        reference: The report of the dataset.
        generated: The language model's.
    """
    true, said = _words(reference), _words(generated)
    matcher = difflib.SequenceMatcher(None, _folded(true), _folded(said), autojunk=False)
    sides: tuple[list[str], list[str]] = ([], [])
    for kind, a, b, c, d in matcher.get_opcodes():
        for side, words in zip(sides, (true[a:b], said[c:d]), strict=True):
            if words:
                text = escaped(" ".join(words))
                side.append(text if kind == "equal" else f"<mark>{text}</mark>")
    return " ".join(sides[0]), " ".join(sides[1]) or "<i>nothing</i>"


def _folded(words: list[str]) -> list[str]:
    return [word.casefold().strip(".,;:") for word in words]
