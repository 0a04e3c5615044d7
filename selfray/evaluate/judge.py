"""From an encoder to its predictions for the test images, by the probes that were asked for.

Each part is kept as soon as it is done, so that an interrupted evaluation goes on after it.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from selfray.data.dataset import SPLITS
from selfray.errors import InputError, nearest
from selfray.evals.knn import NEIGHBOURS, knn_scores
from selfray.evals.label_efficiency import Drawn, label_efficiency
from selfray.evals.linear_probe import fit_probes, select
from selfray.evals.metrics import auroc_by_column
from selfray.evals.zero_shot import ensemble, prompts, zero_shot_scores
from selfray.evaluate.benchmark import Benchmark
from selfray.evaluate.held_out import SITE, Fit, Judged, read_judged, write_judged
from selfray.evaluate.trained_protocols import (
    TRAINED_PROTOCOLS,
    is_trained_protocol,
    judge_trained,
    require_trainable,
)
from selfray.feature_directory import Features, is_feature_directory, open_features
from selfray.features import extract_features, require_encoder
from selfray.models.encoder import Encoder
from selfray.models.published import load_encoder
from selfray.models.text_tower import open_text_tower, text_tower_sha256

FROZEN_PROBES = ("linear", "knn")
"""Probes that need nothing but CLS and mean patch tokens."""
ATTENTIVE = "attentive"
ZERO_SHOT = "zero-shot"
"""No probe at all: images are compared with sentences, by an encoder that learned from reports."""

FRACTIONS = (0.01, 0.05, 0.1, 0.5, 1.0)  # of the training patients
PER_CLASS = (8, 32)  # patients with and without a finding
DRAWS = 5  # of each

_DESCRIBED = ("weights_sha256", "synthetic", "preprocessing", "precision")


@dataclass(frozen=True)
class Protocol:
    """How encoders are judged.

    Attributes:
        probes: Which.
        label_efficiency: Whether linear probes are also fitted on parts of the training patients.
        sites: Whether linear probes are also fitted site by site.
        seeds: How often trained probes are repeated.
    """

    probes: tuple[str, ...] = FROZEN_PROBES
    label_efficiency: bool = False
    sites: bool = False
    seeds: int = 1

    @property
    def trained(self) -> list[str]:
        """Those of the probes that run the encoder."""
        return [probe for probe in self.probes if is_trained_protocol(probe)]

    def options(self) -> list[str]:
        """As words of the command line."""
        words = ["--probes", *self.probes]
        words += ["--label-efficiency"] if self.label_efficiency else []
        words += ["--sites"] if self.sites else []
        return words + (["--probe-seeds", str(self.seeds)] if self.seeds != 1 else [])


def judge(
    encoder: str, features: Features, benchmark: Benchmark, protocol: Protocol, out: Path
) -> Judged:
    """Fit every probe on one encoder.

    Args:
        encoder: Its name.
        features: Of every image of the benchmark's dataset.
        benchmark: What to predict.
        protocol: By which probes.
        out: Evaluation directory, in which finished parts are kept.
    """
    manifest = features.manifest
    described = {"name": encoder} | {name: manifest[name] for name in _DESCRIBED}
    described["training_data"] = list(manifest.get("training_data", ()))
    judged = Judged(encoder, described)
    key = _key(manifest, benchmark)
    for part, work in _parts(encoder, features, benchmark, protocol).items():
        file = out / "judged" / f"{slug(encoder)}-{part}-{key[:8]}.parquet"
        kept = read_judged(file, f"{key} {part}")
        if kept is None:
            print(f"evaluate {encoder}: {part}", file=sys.stderr)
            kept = Judged(encoder, described)
            work(kept)
            write_judged(file, kept, f"{key} {part}")
        judged.add(kept)
    return judged


def describe_encoder(encoder: Encoder) -> dict[str, Any]:
    """What `judge` says of an encoder, where no features are extracted."""
    return {
        "name": encoder.name,
        "weights_sha256": encoder.weights_sha256,
        "synthetic": encoder.synthetic,
        "preprocessing": encoder.preprocessing.description(),
        "precision": "exact",
        "training_data": list(encoder.training_data),
    }


def require_probes(probes: Sequence[str]) -> None:
    """Refuse unknown probes.

    Raises:
        InputError: None, or one that is unknown.
    """
    known = (*FROZEN_PROBES, ZERO_SHOT, *TRAINED_PROTOCOLS, "fine-tune-last-N")
    if not probes:
        raise InputError(f"no probe was given. Allowed: {', '.join(known)}.")
    for probe in probes:
        if probe not in (*FROZEN_PROBES, ZERO_SHOT) and not is_trained_protocol(probe):
            raise InputError(f"probe {probe!r} is unknown. {nearest(probe, known)}")


def require_usable(
    encoder: str, benchmark: Benchmark, protocol: Protocol, *, segments: bool
) -> None:
    """Refuse a wrong name now, and not when the encoders before it have taken their hours.

    Args:
        encoder: Name or feature directory.
        benchmark: What it will be judged on.
        protocol: By which probes.
        segments: Whether it is to segment too.

    Raises:
        InputError: There is no such encoder, its features are of other images, or more is needed
            than the features that are given.
    """
    if can_run(encoder):
        for probe in protocol.trained:
            require_trainable(probe, load_encoder(encoder))
    elif segments and not benchmark.held_out.targets:
        raise InputError(
            f"segmentation needs an encoder to run, and {encoder} is none. Leave it out."
        )
    if not is_feature_directory(Path(encoder)):
        require_encoder(encoder, benchmark.data)
        return
    manifest = open_features(Path(encoder)).manifest
    if manifest.get("left_out"):
        raise InputError(
            f"{encoder} leaves out {manifest['left_out']} images of the dataset, which do not "
            "decode. Make the dataset anew."
        )
    found = manifest["dataset"]["fingerprint"]
    if found != benchmark.data.fingerprint:
        raise InputError(
            f"{encoder} holds features of another dataset (fingerprint {found[:12]}, the data's is "
            f"{benchmark.data.fingerprint[:12]}). Extract them again from the data."
        )


def can_run(encoder: str) -> bool:
    """Whether it is a network, and no pixel baseline or directory of features."""
    return not (encoder.startswith("pixels:") or is_feature_directory(Path(encoder)))


def feature_directory(encoder: str, benchmark: Benchmark, out: Path, protocol: Protocol) -> Path:
    """Where the encoder's features are, made now if need be."""
    if is_feature_directory(Path(encoder)):
        return Path(encoder)
    patches = ATTENTIVE in protocol.probes and can_run(encoder)
    name = slug(encoder) + ("-patches" if patches else "")
    data = benchmark.data.directory
    return extract_features(encoder, data, out / "features" / name, patch_tokens=patches)


def slug(encoder: str) -> str:
    """A file name for an encoder."""
    readable = re.sub(r"[^A-Za-z0-9]+", "-", encoder).strip("-")[-60:]
    return f"{readable}-{hashlib.sha256(encoder.encode()).hexdigest()[:8]}"


def _key(manifest: dict[str, Any], benchmark: Benchmark) -> str:
    """Changes with everything that predictions depend on but the part."""
    depends = [
        manifest[name] for name in ("weights_sha256", "preprocessing", "precision", "dataset")
    ]
    depends.append([list(target) for target in benchmark.held_out.targets])
    text = json.dumps(depends, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _parts(
    encoder: str, features: Features, benchmark: Benchmark, protocol: Protocol
) -> dict[str, Callable[[Judged], None]]:
    """What is to be done, by name."""
    parts: dict[str, Callable[[Judged], None]] = {}
    if "linear" in protocol.probes:
        parts["linear"] = lambda judged: _probe_linearly(judged, features, benchmark)
    if "knn" in protocol.probes:
        parts["knn"] = lambda judged: _probe_neighbours(judged, features, benchmark)
    if ZERO_SHOT in protocol.probes:
        # Text side and prompts are in the name: neither is told by the image encoder's weights.
        words = _hash_of_words(encoder, benchmark)[:8]
        parts[f"{ZERO_SHOT}-{words}"] = lambda judged: _ask_with_words(
            judged, encoder, features, benchmark
        )
    if protocol.label_efficiency:
        parts["label-efficiency"] = lambda judged: _probe_parts(judged, features, benchmark)
    if protocol.sites:
        parts["sites"] = lambda judged: _probe_sites(judged, features, benchmark)
    if protocol.trained and not can_run(encoder):
        print(
            f"evaluate {encoder}: no network, so {protocol.trained[0]} is left out", file=sys.stderr
        )
        return parts
    for probe in protocol.trained:
        for seed in range(protocol.seeds):
            parts[f"{probe}-seed{seed}"] = lambda judged, probe=probe, seed=seed: _train(
                judged, encoder, features, benchmark, probe, seed
            )
    return parts


def _probe_linearly(judged: Judged, features: Features, benchmark: Benchmark) -> None:
    data = {
        split: benchmark.features_of(split, features) for split in ("train", "validate", "test")
    }
    probes = fit_probes(data["train"], data["validate"])
    judged.inputs["linear"] = _arrays(features)
    judged.settings["linear"] = {"penalty": probes.strengths}
    judged.undefined |= {Fit(target, "linear"): why for target, why in probes.undefined.items()}
    for target, values in probes.predict(data["test"].features).items():
        judged.predictions[Fit(target, "linear")] = values


def _probe_neighbours(judged: Judged, features: Features, benchmark: Benchmark) -> None:
    """k-NN on CLS tokens, as published; k by AUROC on the validate split."""
    judged.inputs["knn"] = "cls"
    binary = [k for k, name in enumerate(benchmark.names) if name not in benchmark.numbers]
    if not binary:
        return
    names = [benchmark.names[k] for k in binary]
    broken = np.flatnonzero(~np.isfinite(features.cls).all(axis=1))
    if len(broken):
        raise InputError(f"features of row {broken[0]} are not finite. Extract them again.")
    train, validate = (benchmark.targets[split][:, binary] for split in ("train", "validate"))
    queries = features.cls[np.concatenate([benchmark.rows["validate"], benchmark.rows["test"]])]
    scores = knn_scores(features.cls[benchmark.rows["train"]], train, queries)
    on_validate = np.stack(
        [auroc_by_column(validate, scores[k][: len(validate)]) for k in NEIGHBOURS]
    )
    chosen: dict[str, int] = {}
    for t, best in enumerate(select(on_validate, NEIGHBOURS)):
        lacking = [
            split
            for split, labels in (("train", train[:, t]), ("validate", validate[:, t]))
            if len(np.unique(labels[~np.isnan(labels)])) < 2
        ]
        if lacking:
            why = f"the {lacking[0]} split lacks both classes"
            judged.undefined[Fit(names[t], "knn")] = why
        else:
            chosen[names[t]] = NEIGHBOURS[best]
            predictions = scores[NEIGHBOURS[best]][len(validate) :, t]
            judged.predictions[Fit(names[t], "knn")] = predictions
    judged.settings["knn"] = {"neighbours": chosen}


def _hash_of_words(encoder: str, benchmark: Benchmark) -> str:
    """Changes with what zero-shot classification depends on beside the images' features."""
    tower = text_tower_sha256(encoder) if can_run(encoder) else ""
    depends = [tower, *((name, prompts(name)) for name in _findings(benchmark))]
    return hashlib.sha256(json.dumps(depends).encode()).hexdigest()


def _findings(benchmark: Benchmark) -> list[str]:
    return [t.name for t in benchmark.held_out.targets if t.task == "classification"]


def _ask_with_words(judged: Judged, encoder: str, features: Features, benchmark: Benchmark) -> None:
    """Findings by sentences that state or deny them; nothing is fitted."""
    judged.inputs[ZERO_SHOT] = "cls"
    tower = open_text_tower(encoder) if can_run(encoder) else None
    findings = _findings(benchmark)
    for name in benchmark.names:
        if tower is None:
            judged.undefined[Fit(name, ZERO_SHOT)] = "the encoder has no text encoder beside it"
        elif name not in findings:
            judged.undefined[Fit(name, ZERO_SHOT)] = "only findings can be put into words"
    if tower is None:
        return
    cls = np.asarray(features.cls[benchmark.rows["test"]], np.float32)
    images = tower.images(torch.from_numpy(cls)).numpy()
    for name in findings:
        positive, negative = (ensemble(tower.texts(texts).numpy()) for texts in prompts(name))
        scores = zero_shot_scores(images, positive, negative, tower.logit_scale)
        judged.predictions[Fit(name, ZERO_SHOT)] = scores
    judged.settings[ZERO_SHOT] = {"prompts": {name: prompts(name) for name in findings}}


def _probe_parts(judged: Judged, features: Features, benchmark: Benchmark) -> None:
    """Linear probes on ever more of the training patients."""
    train, validate, test = (benchmark.features_of(s, features) for s in SPLITS)
    patients = benchmark.data.column("patient_id")[benchmark.rows["train"]]
    found = label_efficiency(
        train,
        validate,
        test.features,
        patients,
        fractions=FRACTIONS,
        per_class=PER_CLASS,
        seeds=range(DRAWS),
    )
    judged.inputs["linear"] = _arrays(features)
    for drawn, predictions in found.predictions.items():
        judged.predictions[_fit_of(drawn)] = predictions
    judged.undefined |= {_fit_of(drawn): why for drawn, why in found.undefined.items()}


def _fit_of(drawn: Drawn) -> Fit:
    return Fit(drawn.target, "linear", drawn.trained_on, drawn.seed)


def _probe_sites(judged: Judged, features: Features, benchmark: Benchmark) -> None:
    """Linear probes on each site by itself."""
    judged.inputs["linear"] = _arrays(features)
    sites = benchmark.data.column("site")
    for site in sorted({site for site in sites if site is not None}):
        data = {
            split: benchmark.features_of(split, features, sites == site)
            for split in ("train", "validate")
        }
        trained_on = f"{SITE}{site}"
        empty = [split for split, part in data.items() if not len(part.targets)]
        if empty:
            why = f"the site has no images in the {empty[0]} split"
            judged.undefined |= {Fit(t, "linear", trained_on): why for t in benchmark.names}
            continue
        probes = fit_probes(data["train"], data["validate"])
        test = benchmark.features_of("test", features)
        for target, predictions in probes.predict(test.features).items():
            judged.predictions[Fit(target, "linear", trained_on)] = predictions
        for target, why in probes.undefined.items():
            judged.undefined[Fit(target, "linear", trained_on)] = f"of the site, {why}"


def _train(
    judged: Judged, encoder: str, features: Features, benchmark: Benchmark, probe: str, seed: int
) -> None:
    found = judge_trained(
        probe,
        load_encoder(encoder),
        benchmark.data,
        benchmark.targets,
        benchmark.names,
        benchmark.numbers,
        benchmark.rows,
        features=features if probe == ATTENTIVE else None,
        seed=seed,
    )
    judged.inputs[probe] = {ATTENTIVE: "patch_tokens"}.get(probe, "image")
    judged.settings[f"{probe}, seed {seed}"] = found.settings
    judged.predictions |= {Fit(t, probe, seed=seed): p for t, p in found.values.items()}
    judged.undefined |= {Fit(t, probe, seed=seed): why for t, why in found.undefined.items()}


def _arrays(features: Features) -> str:
    return "cls" if features.patch_mean is None else "cls+patch_mean"
