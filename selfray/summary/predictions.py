"""Predictions that an evaluation keeps, without the columns that say whose they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

Predicted = tuple[np.ndarray, np.ndarray]
"""Labels and predictions of the images whose label is known, float64 [n] each."""


def read_predictions(evaluation: Path) -> dict[tuple[str, str, str], Predicted]:
    """Read `predictions.parquet`; empty where there is none that can be read.

    Args:
        evaluation: Evaluation directory.

    Returns:
        By encoder, target and probe: probabilities of binary targets, the unit of numbers. Probes
        of the whole train split only, the first seed of those that have several.
    """
    file = evaluation / "predictions.parquet"
    keys = ["encoder", "target", "probe"]
    try:
        known = set(pq.read_schema(file).names)
        # Evaluations of version 1 knew neither parts of the train split nor seeds.
        whole = [("trained_on", "=", "all")] if "trained_on" in known else None
        wanted = [*keys, *({"probe_seed"} & known), "label", "prediction"]
        table = pq.read_table(file, columns=wanted, filters=whole, read_dictionary=keys)
        coded = [_codes(table[name]) for name in keys]
        values = [_floats(table[name]) for name in wanted[3:]]
    except (OSError, ValueError, KeyError, pa.ArrowException):
        return {}
    seeds, labels, predictions = values if len(values) == 3 else (None, *values)
    found: dict[tuple[str, str, str], Predicted] = {}
    flat = np.ravel_multi_index(
        [codes for codes, _ in coded], [max(len(names), 1) for _, names in coded]
    )
    order = np.argsort(flat, kind="stable")
    groups: list[np.ndarray] = np.split(order, np.flatnonzero(np.diff(flat[order])) + 1)
    for rows in groups:
        if not len(rows):
            continue
        first = int(rows[0])
        encoder, target, probe = (str(names[int(codes[first])]) for codes, names in coded)
        rows = rows if seeds is None else rows[seeds[rows] == seeds[rows].min()]
        rows = rows[np.isfinite(labels[rows]) & np.isfinite(predictions[rows])]
        found[encoder, target, probe] = labels[rows], predictions[rows]
    return found


def _codes(column: pa.ChunkedArray) -> tuple[np.ndarray, list]:
    """A column of names as positions in the list of different names."""
    plain = column.cast(pa.string()).combine_chunks().dictionary_encode()
    return plain.indices.to_numpy(zero_copy_only=False), plain.dictionary.to_pylist()


def _floats(column: pa.ChunkedArray) -> np.ndarray:
    return column.cast(pa.float64()).to_numpy(zero_copy_only=False)
