"""Pairs of reports for tests: alike and not, empty, repeated words, numbers, other scripts."""

from __future__ import annotations

import numpy as np

_WORDS = [
    "no", "the", "heart", "is", "lungs", "clear", "effusion", "effusions", "small",
    "right-sided", "pneumothorax", "x-ray", "2.5", "cm", "opacity", "opacities", "normal",
    "size", "and", "or", "of", "mild", "cardiomegaly", "t5-t6", "patient's",
]  # fmt: skip
_OTHERS = (
    "胸部X线显示右下肺炎。",
    "心影不大，双肺清晰",
    "胸水はありません。",
    "Большое сердце, плеврального выпота нет.",
    "لا يوجد انصباب جنبي",
    "हृदय का आकार सामान्य है।",
    "Größe des Herzens normal, kein Erguß.",
)


def report_pairs(count: int, seed: int = 0) -> tuple[list[str], list[str]]:
    """References and candidates; about a tenth of each has no word."""
    rng = np.random.default_rng(seed)

    def text() -> str:
        kind = rng.integers(10)
        if kind == 0:
            return str(rng.choice(["", " \n", "___", "..."]))
        if kind == 1:
            return " ".join(rng.choice(_OTHERS, rng.integers(1, 4)))
        if kind == 2:
            return " ".join([str(rng.choice(_WORDS))] * int(rng.integers(1, 9)))
        chosen = rng.choice(_WORDS, rng.integers(1, 30))
        marks = rng.choice(["", "", "", ".", ",", ":", "?!", " -", "/"], len(chosen))
        return " ".join(f"{w}{m}" for w, m in zip(chosen, marks, strict=True)).capitalize()

    references = [text() for _ in range(count)]
    candidates = []
    for reference in references:
        cut = reference.split()
        keep = rng.random(len(cut)) < 0.7
        alike = " ".join(w for w, kept in zip(cut, keep, strict=True) if kept)
        candidates.append(
            str(
                rng.choice(
                    ["", text(), reference, alike, f"{alike} {text()}"],
                    p=[0.08, 0.3, 0.04, 0.3, 0.28],
                )
            )
        )
    return references, candidates
