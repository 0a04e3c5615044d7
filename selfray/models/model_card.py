"""The model card: README.md of an encoder, which says what it is, of which data, and its limits."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

_APART = (
    "synthetic", "data", "licence", "validation", "position_interpolation", "golden_cls",
)  # fmt: skip


def model_card(
    card: Mapping[str, Any],
    *,
    title: str,
    about: Sequence[str],
    library: str,
    limits: Sequence[str],
    sections: Mapping[str, Sequence[str]] | None = None,
) -> str:
    """Write a model card, in the Hugging Face hub's form.

    Args:
        card: `synthetic` (bool: trained on phantoms), `data` (one mapping a dataset, with `name`,
            `origin`, `licence`), `validation` (results by name), `licence` of the weights where
            somebody gave one, and anything else, which is told as the recipe.
        title: First heading.
        about: Lines below it.
        library: The hub's name of what opens the files.
        limits: Lines of that section.
        sections: Lines of further sections, between `about` and the data.
    """
    licence = card.get("licence")
    tags = ["selfray", "chest-x-ray", *(["synthetic-phantom"] if card.get("synthetic") else [])]
    use = "Research on image features. Not a medical device, and not for diagnosis."
    told = {
        **(sections or {}),
        "Data": _data_lines(card.get("data", ())),
        "Recipe": _value_lines({k: v for k, v in card.items() if k not in _APART}),
        "Results": _value_lines(card.get("validation") or {}),
        "Licence": [
            f"{(licence or 'Not given').rstrip('.')}. The terms of the data it was trained on "
            "apply as well."
        ],
        "Limits": limits,
        "Intended use": [use],
    }
    lines = [
        "---",
        f"license: {_licence_tag(licence)}",
        f"library_name: {library}",
        "pipeline_tag: image-feature-extraction",
        f"tags: [{', '.join(tags)}]",
        "---",
        "",
        f"# {title}",
        "",
        *about,
        "",
    ]
    for heading, text in told.items():
        lines += [f"## {heading}", "", *text, ""]
    return "\n".join(lines)


def limits_of_training(synthetic: bool) -> list[str]:
    """What bounds an encoder that was trained here.

    Args:
        synthetic: Whether on phantoms only.
    """
    first = (
        "Trained on a **synthetic phantom**: drawn images, no patient. It has never seen a real "
        "radiograph, and nothing measured on phantoms says how it does on one."
        if synthetic
        else "Features follow the scanners, the people and the findings in the data above; "
        "elsewhere they must be judged anew."
    )
    return [
        first,
        "Features can hold age, sex and other personal attributes. Horizontal flips in "
        "pre-training make left and right alike.",
    ]


def _licence_tag(licence: str | None) -> str:
    """The hub knows licences by one word."""
    if not licence:
        return "unknown"
    return licence.lower() if re.fullmatch(r"[\w.-]+", licence) else "other"


def _data_lines(data: object) -> list[str]:
    if not isinstance(data, list | tuple):
        return [str(data)]
    if not data:
        return ["Not recorded."]
    return [
        "- " + "; ".join(f"{key}: {value}" for key, value in entry.items())
        if isinstance(entry, Mapping)
        else f"- {entry}"
        for entry in data
    ]


def _value_lines(values: Mapping[str, Any]) -> list[str]:
    return [f"- {key}: {json.dumps(value)}" for key, value in values.items()] or ["Not recorded."]
