"""The test images: who they are of, what is known of them, and what encoders predicted for them.

Both are kept in an evaluation directory, so that every number can be computed again, and encoders
compared, without running an encoder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from selfray.errors import InputError
from selfray.evaluate.kept_parts import read_part, write_part

Kind = Literal["binary", "number"]
ALL_TRAINING = "all"
SITE = "site "  # before a site's name, where a probe was fitted on that site alone
_LABEL, _GROUP = "label: ", "group: "  # prefixes of column names


class Judgeable(NamedTuple):
    """Something that is predicted.

    Attributes:
        name: Of a finding or a record; `view=PA` for one value of a category.
        kind: How it is judged.
        task: `classification` or `metadata`.
        family: Whose mean is taken with those of the same family: `macro` for findings, the
            category's name for its values, empty for a target by itself.
    """

    name: str
    kind: Kind
    task: str
    family: str


class Fit(NamedTuple):
    """One fitted probe of one target.

    Attributes:
        target: Its name.
        probe: The protocol: `linear`, `knn`, `sgd`, ...
        trained_on: Which part of the train split: `all`, `5 % of patients`, `8 a class`, `site A`.
        seed: Of a protocol that draws; 0 where nothing is drawn.
    """

    target: str
    probe: str
    trained_on: str = ALL_TRAINING
    seed: int = 0


@dataclass(frozen=True)
class HeldOut:
    """The test images.

    Attributes:
        image_ids: [n].
        patients: [n] identifiers.
        targets: What is predicted, K.
        labels: float64 [n, K]: 1/0 or a value, NaN where it is not known.
        groups: By attribute (`sex`, `age`, `view`, ...), the group of each image, [n] of str or
            None.
    """

    image_ids: np.ndarray
    patients: np.ndarray
    targets: tuple[Judgeable, ...]
    labels: np.ndarray
    groups: Mapping[str, np.ndarray]

    def target(self, name: str) -> Judgeable:
        """The target of that name."""
        return self.targets[self._index[name]]

    def known(self, name: str) -> np.ndarray:
        """Labels of one target, [n]."""
        return self.labels[:, self._index[name]]

    def family(self, name: str) -> list[str]:
        """Targets whose mean is called by that name."""
        return [t.name for t in self.targets if t.family == name]

    @property
    def key(self) -> str:
        """Of the images, their patients and labels: equal for evaluations that can be compared."""
        digest = hashlib.sha256(repr(self.targets).encode())
        for values in (self.image_ids, self.patients):
            digest.update("\0".join(values).encode())
        digest.update(np.ascontiguousarray(self.labels).tobytes())
        return digest.hexdigest()

    @property
    def _index(self) -> dict[str, int]:
        return {target.name: k for k, target in enumerate(self.targets)}

    def table(self) -> pa.Table:
        """For the evaluation directory."""
        columns: dict[str, pa.Array] = {
            "image_id": pa.array(self.image_ids, pa.string()),
            "patient_id": pa.array(self.patients, pa.string()),
        }
        for target, labels in zip(self.targets, self.labels.T, strict=True):
            columns[_LABEL + target.name] = pa.array(labels, pa.float64(), from_pandas=True)
        for attribute, groups in self.groups.items():
            columns[_GROUP + attribute] = pa.array(groups, pa.string())
        described = json.dumps([target._asdict() for target in self.targets])
        return pa.table(columns).replace_schema_metadata({"targets": described})

    @classmethod
    def of_table(cls, table: pa.Table) -> HeldOut:
        """What `table` gave."""
        described = json.loads((table.schema.metadata or {})[b"targets"])
        targets = tuple(Judgeable(**target) for target in described)
        labels = [_floats(table[_LABEL + target.name]) for target in targets]
        groups = {
            name.removeprefix(_GROUP): np.array(table[name].to_pylist(), object)
            for name in table.column_names
            if name.startswith(_GROUP)
        }
        return cls(
            image_ids=np.array(table["image_id"].to_pylist(), object),
            patients=np.array(table["patient_id"].to_pylist(), dtype=str),
            targets=targets,
            labels=np.stack(labels, axis=1) if labels else np.empty((len(table), 0)),
            groups=groups,
        )


@dataclass
class Judged:
    """What one encoder predicted for the test images.

    Attributes:
        encoder: As the user named it.
        description: Weights, preprocessing and the like, for `evaluation.json`.
        inputs: By probe, the features it saw: `cls`, `cls+patch_mean`, `image`, ...
        predictions: By fit, [n]: probabilities of binary targets, the unit of numbers.
        undefined: By fit, why there are no predictions.
        settings: By probe, what was chosen for it (penalties, learning rates).
    """

    encoder: str
    description: dict[str, Any]
    inputs: dict[str, str] = field(default_factory=dict)
    predictions: dict[Fit, np.ndarray] = field(default_factory=dict)
    undefined: dict[Fit, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def add(self, other: Judged) -> None:
        """Take over what another part of the judging gave."""
        for name in ("inputs", "predictions", "undefined", "settings"):
            getattr(self, name).update(getattr(other, name))


def write_judged(file: Path, judged: Judged, key: str) -> None:
    """Keep a part of the judging.

    Args:
        file: Parquet file.
        judged: Of one encoder.
        key: Of everything that the predictions depend on.
    """
    columns = {json.dumps(list(fit)): values for fit, values in judged.predictions.items()}
    kept = {
        "encoder": judged.encoder,
        "description": judged.description,
        "inputs": judged.inputs,
        "undefined": [[*fit, why] for fit, why in judged.undefined.items()],
        "settings": judged.settings,
    }
    table = pa.table(columns).replace_schema_metadata({"judged": json.dumps(kept)})
    write_part(file, table, {"key": key})


def read_judged(file: Path, key: str) -> Judged | None:
    """A kept part, or None where there is none; see `read_part`."""
    table = read_part(file, {"key": key})
    if table is None:
        return None
    kept = json.loads((table.schema.metadata or {})[b"judged"])
    return Judged(
        kept["encoder"],
        kept["description"],
        kept["inputs"],
        {_fit(json.loads(name)): table[name].to_numpy() for name in table.column_names},
        {_fit(fit): why for *fit, why in kept["undefined"]},
        kept["settings"],
    )


def predictions_table(judged: Sequence[Judged], held_out: HeldOut) -> pa.Table:
    """Every prediction with its label, one row an (image, encoder, fit)."""
    tables = []
    for one in judged:
        for fit, predictions in one.predictions.items():
            n = len(predictions)
            columns = {
                "image_id": pa.array(held_out.image_ids, pa.string()),
                "patient_id": pa.array(held_out.patients, pa.string()),
                "encoder": pa.array([one.encoder] * n, pa.string()),
                "probe": pa.array([fit.probe] * n, pa.string()),
                "trained_on": pa.array([fit.trained_on] * n, pa.string()),
                "probe_seed": pa.array([fit.seed] * n, pa.int64()),
                "target": pa.array([fit.target] * n, pa.string()),
                "label": pa.array(held_out.known(fit.target), pa.float64(), from_pandas=True),
                "prediction": pa.array(predictions, pa.float64()),
            }
            tables.append(pa.table(columns))
    schema = pa.schema(
        [(name, pa.string()) for name in ("image_id", "patient_id", "encoder", "probe")]
        + [("trained_on", pa.string()), ("probe_seed", pa.int64()), ("target", pa.string())]
        + [("label", pa.float64()), ("prediction", pa.float64())]
    )
    return pa.concat_tables(tables) if tables else schema.empty_table()


def read_predictions(file: Path, held_out: HeldOut) -> dict[str, dict[Fit, np.ndarray]]:
    """Predictions by encoder and fit from what `predictions_table` gave.

    Raises:
        InputError: The file is missing, damaged, or of other images.
    """
    try:
        table = pq.read_table(file)
        names = ("encoder", "target", "probe", "trained_on", "probe_seed")
        keys = list(zip(*(table[name].to_pylist() for name in names), strict=True))
        values, images = table["prediction"].to_numpy(), table["image_id"].to_pylist()
    except (OSError, ValueError, KeyError, pa.ArrowInvalid) as cause:
        raise InputError(
            f"{file} cannot be read. Evaluate again with this version of selfray."
        ) from cause
    n = len(held_out.image_ids)
    found: dict[str, dict[Fit, np.ndarray]] = {}
    for start in range(0, len(keys), n):
        if images[start : start + n] != held_out.image_ids.tolist():
            raise InputError(f"{file} is of other images than held_out.parquet beside it.")
        encoder, *fit = keys[start]
        found.setdefault(encoder, {})[_fit(fit)] = values[start : start + n]
    return found


def _fit(values: Sequence[Any]) -> Fit:
    target, probe, trained_on, seed = values
    return Fit(target, probe, trained_on, seed)


def _floats(column: pa.ChunkedArray) -> np.ndarray:
    return np.array([np.nan if v is None else v for v in column.to_pylist()], np.float64)
