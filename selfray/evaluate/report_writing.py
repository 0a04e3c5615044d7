"""Encoder -> reports of the test images, by a language model and by what it must beat.

Below the stage's directory lie, for each seed, `seed-K/model/` (what `selfray generate` opens) and
`WRITER.parquet`, what a writer wrote. What is there is not made again; a training or a writing that
was interrupted goes on where it was.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from selfray.data.dataset import RadiographDataset, write_atomically
from selfray.data.report_text import cut_at_sentence
from selfray.errors import InputError
from selfray.evals.report_generation import generate_reports
from selfray.evals.report_model import ReportExamples, ReportModel, encode_examples, fit_prompts
from selfray.evals.report_model_directory import save_report_model
from selfray.evals.report_training import TrainingStage, train_report_model
from selfray.evaluate.kept_parts import claim_directory, read_part, write_part
from selfray.evaluate.patch_tokens import PatchTokens
from selfray.evaluate.report_studies import ReportStudies, report_studies
from selfray.feature_directory import Features
from selfray.models.encoder import Encoder
from selfray.models.language_memory import LanguageUse
from selfray.models.language_model import LanguageModel, open_language_model
from selfray.models.language_model_files import hash_of_source
from selfray.models.precision import computes_in_bfloat16
from selfray.models.small_decoder import small_decoder
from selfray.progress import progress_bar
from selfray.report_config import ReportConfig, report_recipe, tiny

LANGUAGE_MODEL = "language-model"
OTHER_IMAGE = "other-patients-image"
NEAREST = "nearest-neighbour"
OTHER_NEIGHBOUR = "other-patients-neighbour"
MOST_FREQUENT = "most-frequent"
WRITERS = {
    LANGUAGE_MODEL: "the language model, given the image",
    OTHER_IMAGE: "the same language model, given another patient's image: what text alone gives",
    NEAREST: "the report of the training image with the nearest features",
    OTHER_NEIGHBOUR: "the nearest neighbour of another patient's image: retrieval by chance",
    MOST_FREQUENT: "the most frequent report of the train split",
}
"""Who writes, and what that says."""


@dataclass(frozen=True)
class ReportTask:
    """How reports are written, and by whom their findings are read.

    Attributes:
        config: Of the report model.
        chexbert: Folder with CheXbert's weights; see `chexbert_labels`.
        radgraph: Folder with RadGraph's; see `radgraph_f1`.
    """

    config: ReportConfig = field(default_factory=tiny)
    chexbert: Path | None = None
    radgraph: Path | None = None

    def changed(self) -> list[str]:
        """The recipe's name, if not `tiny`, and the fields that differ from it, as options."""
        words = [] if self.config.recipe == "tiny" else ["--report-recipe", self.config.recipe]
        before = _flat(asdict(report_recipe(self.config.recipe)))
        for name, value in _flat(asdict(self.config)).items():
            if value != before[name]:
                values = value if isinstance(value, tuple) else (value,)
                words += [f"--report.{name.replace('_', '-')}", *map(_word, values)]
        return words

    def options(self) -> list[str]:
        """The options that give the same."""
        words = self.changed()
        words += ["--chexbert", str(self.chexbert)] if self.chexbert else []
        return words + (["--radgraph", str(self.radgraph)] if self.radgraph else [])

    def description(self) -> dict[str, Any]:
        """For `evaluation.json`."""
        return {"config": asdict(self.config), "writers": WRITERS}


_WRITING_BATCH = 64  # reports at a time
_TOO_LONG = "leave the report no room among the language model's positions"
_SHUFFLE = 0x5265  # keeps the stream of other patients' images apart from others of the seed

_COLUMNS = pa.schema(
    [
        ("image_id", pa.string()),
        ("patient_id", pa.string()),
        ("writer", pa.string()),
        ("seed", pa.int64()),
        ("section", pa.string()),  # what is written
        ("prompt", pa.string()),
        ("reference", pa.string()),
        ("generated", pa.string()),
    ]
)


def _word(value: Any) -> str:
    """A value as the command line reads it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Fields of nested groups, by `group.field`."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        group = isinstance(value, dict)
        flat |= _flat(value, f"{prefix}{name}.") if group else {prefix + name: value}
    return flat


@dataclass(frozen=True)
class ImageTokens:
    """What a report model is given of images.

    Attributes:
        name: Of the encoder.
        weights_sha256: Of its weights.
        device: To compute on.
        array: [N, h, w, D], may be memory-mapped.
        rows: int64 [N], which rows of the dataset these are, ascending.
    """

    name: str
    weights_sha256: str
    device: torch.device
    array: np.ndarray
    rows: np.ndarray

    def places(self, rows: np.ndarray) -> np.ndarray:
        """Where rows of the dataset are in the array."""
        return np.searchsorted(self.rows, rows)


def tokens_of_encoder(
    encoder: Encoder, data: RadiographDataset, rows: np.ndarray, out: Path
) -> ImageTokens:
    """Its patch tokens of some images, made once and kept.

    Args:
        encoder: Frozen; its device is used.
        data: Whose images.
        rows: int64 [N], ascending.
        out: Directory to keep them in.
    """
    array = PatchTokens(encoder, data, rows, out).of_last_block()
    return ImageTokens(encoder.name, encoder.weights_sha256, encoder.device, array, rows)


def tokens_of_features(features: Features) -> ImageTokens:
    """Features without patches, of all images of a dataset, as one token an image."""
    array = np.asarray(features.cls)[:, None, None, :]
    manifest = features.manifest
    return ImageTokens(
        manifest["encoder"],
        manifest["weights_sha256"],
        torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        array,
        np.arange(len(array)),
    )


def judge_reports(
    open_tokens: Callable[[np.ndarray], ImageTokens],
    data: RadiographDataset,
    out: Path,
    *,
    config: ReportConfig,
    seeds: Sequence[int] = (0,),
) -> pa.Table:
    """Train report models on frozen patch tokens, and write a report for each test study.

    Trained on train, the step chosen on validate, the reports are of the test split; one image a
    study (`report_studies`).

    Args:
        open_tokens: What an encoder makes of the images in some rows of the dataset, ascending.
        data: With reports in each split.
        out: Directory of this encoder and config, made if need be.
        config: Of the report model.
        seeds: Of weights, order and which image another patient's is, each >= 0.

    Returns:
        One row a (test study, writer, seed): see `_COLUMNS`.

    Raises:
        InputError: No reports, a language model that is not usable, or `out` is of something else.
        RunStopped: The loss is not finite.
    """
    studies = report_studies(data, config.target, config.prompt_sections)
    tokens = open_tokens(np.sort(np.concatenate([of.rows for of in studies.values()])))
    _say_left_out(tokens.name, studies)
    source = config.language_model
    language = hash_of_source(Path(source)) if source else ""
    judging = _Judging(tokens, data, config, studies, language)
    judging.require_other_patients()
    # Checkpoints and half-written reports do not know what they are of: the directory does.
    claim_directory(out, judging.made_of)
    nearest = judging.copied(NEAREST, out)
    tables = [nearest, judging.copied(MOST_FREQUENT, out)]
    for seed in seeds:
        tables.append(judging.of_other_patients(nearest, seed))
        tables += judging.written(replace(config, seed=seed), out / f"seed-{seed}")
    return pa.concat_tables(tables)


def _say_left_out(encoder: str, studies: dict[str, ReportStudies]) -> None:
    for split, of in studies.items():
        reasons = ", ".join(f"{count} {why}" for why, count in of.left_out.items())
        print(
            f"reports {encoder}: {len(of.rows)} studies of {split}"
            + (f"; left out: {reasons}" if reasons else ""),
            file=sys.stderr,
        )


@dataclass(frozen=True)
class _Judging:
    tokens: ImageTokens
    data: RadiographDataset
    config: ReportConfig
    studies: dict[str, ReportStudies]
    language_model: str  # SHA-256 of its weights; empty for the small decoder

    @property
    def made_of(self) -> dict[str, Any]:
        """What an encoder's directory is of, beside what its name says."""
        return {
            "weights_sha256": self.tokens.weights_sha256,
            "fingerprint": self.data.fingerprint,
            "language model": self.language_model,
        }

    def require_other_patients(self) -> None:
        """Refuse a test split of one patient before anything is trained."""
        other_patients(self._patients(self.studies["test"]), 0)

    def copied(self, writer: str, out: Path) -> pa.Table:
        """Reports that are taken from the train split as they are."""
        train, test = self.studies["train"], self.studies["test"]
        if writer == MOST_FREQUENT:
            most = Counter(train.targets).most_common(1)[0][0]
            return self._table(writer, 0, [most] * len(test.targets))
        part, identity = out / f"{writer}.parquet", self._identity(self.config)
        kept = read_part(part, identity)
        if kept is None:
            kept = self._table(writer, 0, [train.targets[i] for i in self._nearest()])
            write_part(part, kept, identity)
        return kept

    def of_other_patients(self, nearest: pa.Table, seed: int) -> pa.Table:
        """What the nearest neighbour gives, each study having another patient's.

        A seed's other patients are those whose images the language model of that seed is given, so
        that both are judged by the same shuffle; several seeds average over shuffles.
        """
        texts = nearest["generated"].to_pylist()
        others = other_patients(self._patients(self.studies["test"]), seed)
        return self._table(OTHER_NEIGHBOUR, seed, [texts[i] for i in others])

    def written(self, config: ReportConfig, out: Path) -> list[pa.Table]:
        """What the language model writes, given the image and given another patient's."""
        parts = {writer: out / f"{writer}.parquet" for writer in (LANGUAGE_MODEL, OTHER_IMAGE)}
        identity = self._identity(config)
        kept = {writer: read_part(part, identity) for writer, part in parts.items()}
        found = [table for table in kept.values() if table is not None]
        if len(found) == len(parts):
            return found
        test, tokens = self.studies["test"], self.tokens
        model = self._trained(config, out)
        shown = {
            LANGUAGE_MODEL: test.rows,
            OTHER_IMAGE: test.rows[other_patients(self._patients(test), config.seed)],
        }
        prompts = self._fitting_prompts(model, config)
        tables = []
        for writer, rows in shown.items():
            table = kept[writer]
            if table is None:
                texts = _write(
                    model, tokens.array, tokens.places(rows), prompts, config,
                    out / f".{writer}.jsonl", f"{tokens.name}: {writer}",
                )  # fmt: skip
                table = self._table(writer, config.seed, texts)
                write_part(parts[writer], table, identity)
                (out / f".{writer}.jsonl").unlink(missing_ok=True)
            tables.append(table)
        return tables

    def _trained(self, config: ReportConfig, out: Path) -> ReportModel:
        tokens = self.tokens
        examples = {
            split: ReportExamples(tokens.array, tokens.places(of.rows), of.prompts, of.targets)
            for split, of in self.studies.items()
        }
        train = examples["train"]
        side = min(config.visual_tokens, tokens.array.shape[1])  # no more than there are
        visual = side**2 or tokens.array.shape[1] * tokens.array.shape[2]
        texts = [*train.prompts, *train.targets]
        language = _language_model(config, texts, visual, self.tokens.device, out)
        for note in language.notes:
            print(f"reports {self.tokens.name}: {note}", file=sys.stderr)
        model = ReportModel(
            language,
            tokens.array.shape[-1],
            visual_side=side,
            projector_layers=config.projector_layers,
            seed=config.seed,
        ).to(self.tokens.device)
        encoded = {
            split: encode_examples(
                model, examples[split], config.max_target_tokens, cut_at_sentence
            )
            for split in ("train", "validate")
        }
        cut, n = encoded["train"], len(train.targets)
        longer = f"training reports are longer than {config.max_target_tokens} tokens"
        self._say_cut(cut.cut, n, longer)
        self._say_cut(cut.cut_prompts, n, f"training prompts {_TOO_LONG}")
        done = train_report_model(
            model,
            encoded["train"],
            encoded["validate"],
            training_stages(config),
            batch_size=config.batch_size,
            micro_batch=config.micro_batch,
            check_every=config.checkpoint_every,
            bfloat16=computes_in_bfloat16(config.precision, self.tokens.device),
            activation_checkpointing=config.activation_checkpointing,
            image_dropout=config.image_dropout,
            seed=config.seed,
            out=out / "training",
            word_steps=config.word_steps,
        )
        about = {
            "encoder": self.tokens.name,
            "weights_sha256": self.tokens.weights_sha256,
            "grid": list(self.tokens.array.shape[1:3]),
            "synthetic": self.data.synthetic,
            "config": asdict(config),
            "step": done.step,
        }
        if not (out / "model").exists():
            save_report_model(model, out / "model", about=about, whole=False)
        return model

    def _fitting_prompts(self, model: ReportModel, config: ReportConfig) -> list[str]:
        """Those of the test split, after which a report fits into the language model."""
        visual = model.visual_count(self.tokens.array)
        prompts, cut = fit_prompts(
            model, self.studies["test"].prompts, visual, config.max_new_tokens, cut_at_sentence
        )
        self._say_cut(cut, len(prompts), f"test prompts {_TOO_LONG}")
        return prompts

    def _say_cut(self, cut: int, of: int, what: str) -> None:
        if cut:
            told = f"{cut} of {of} {what} and end early"
            print(f"reports {self.tokens.name}: {told}", file=sys.stderr)

    def _nearest(self) -> np.ndarray:
        """For each test study the training study of the most alike mean patch token (cosine)."""
        tokens = self.tokens
        means = {
            split: np.stack(
                [
                    np.asarray(tokens.array[place], np.float32).mean(axis=(0, 1))
                    for place in tokens.places(self.studies[split].rows)
                ]
            )
            for split in ("train", "test")
        }
        centre, spread = means["train"].mean(axis=0), means["train"].std(axis=0)
        scaled = {split: (m - centre) / np.maximum(spread, 1e-6) for split, m in means.items()}
        # An encoder may say the same of every image; then all are equally near.
        unit = {
            s: m / np.maximum(np.linalg.norm(m, axis=1, keepdims=True), 1e-6)
            for s, m in scaled.items()
        }
        return (unit["test"] @ unit["train"].T).argmax(axis=1)

    def _patients(self, studies: ReportStudies) -> np.ndarray:
        return self.data.column("patient_id")[studies.rows].astype(str)

    def _table(self, writer: str, seed: int, texts: Sequence[str]) -> pa.Table:
        test = self.studies["test"]
        n = len(test.rows)
        columns = [
            pa.array(self.data.column("image_id")[test.rows], pa.string()),
            pa.array(self._patients(test), pa.string()),
            pa.array([writer] * n, pa.string()),
            pa.array([seed] * n, pa.int64()),
            pa.array([self.config.target] * n, pa.string()),
            *(pa.array(of, pa.string()) for of in (test.prompts, test.targets, texts)),
        ]
        return pa.table(columns, schema=_COLUMNS)

    def _identity(self, config: ReportConfig) -> dict[str, Any]:
        return {**self.made_of, "config": asdict(config)}


def training_stages(config: ReportConfig) -> list[TrainingStage]:
    """The stages of a config that have steps."""
    projector, language = config.projector, config.language
    stages = []
    if projector.steps:
        stages.append(
            TrainingStage("none", projector.steps, projector.learning_rate, projector.warmup)
        )
    if language.steps:
        lora = {
            "rank": language.lora_rank,
            "alpha": language.lora_alpha,
            "dropout": language.lora_dropout,
            "targets": language.lora_targets,
        }
        stages.append(
            TrainingStage(
                language.trained,
                language.steps,
                language.learning_rate,
                language.warmup,
                language.weight_decay,
                lora if language.trained == "lora" else None,
                language.projector,
            )
        )
    return stages


def other_patients(patients: np.ndarray, seed: int) -> np.ndarray:
    """A permutation that gives every study another patient's.

    Args:
        patients: [n], identifiers.
        seed: Of the order of the patients.

    Raises:
        InputError: More than half of the studies are of one patient.
    """
    names, of = np.unique(patients, return_inverse=True)
    most = int(np.bincount(of).max())
    if 2 * most > len(patients):
        raise InputError(
            f"{most} of the {len(patients)} test studies with a report are of one patient, so that "
            "not each can be given another patient's image. Give a test split of more patients."
        )
    order = np.random.default_rng([seed, _SHUFFLE]).permutation(len(names))
    # Grouped by patient, a shift by the largest group leaves nobody within their own.
    grouped = np.argsort(order[of], kind="stable")
    permutation = np.empty(len(patients), np.int64)
    permutation[grouped] = np.roll(grouped, most)
    return permutation


def _language_model(
    config: ReportConfig, texts: Sequence[str], visual_tokens: int, device: torch.device, out: Path
) -> LanguageModel:
    """The one that is named, once it is known to fit into memory, or a fresh small decoder."""
    decoder = config.decoder
    if not config.language_model:
        return small_decoder(
            texts,
            width=decoder.width,
            depth=decoder.depth,
            heads=decoder.heads,
            vocabulary=decoder.vocabulary,
            seed=config.seed,
        )
    language, bfloat16 = config.language, computes_in_bfloat16(config.precision, device)
    trained = language.trained if language.steps else "none"
    longest = visual_tokens + 2 * config.max_target_tokens  # as much again for the prompt
    use = LanguageUse(
        device,
        tokens=min(config.micro_batch, config.batch_size) * longest,
        # What is trained needs float32, or small updates are lost.
        dtype=torch.bfloat16 if bfloat16 and trained != "full" else torch.float32,
        bfloat16=bfloat16,
        trained=trained,
        lora_rank=language.lora_rank if trained == "lora" else 0,
        lora_targets=language.lora_targets,
        activation_checkpointing=config.activation_checkpointing,
    )
    return open_language_model(
        Path(config.language_model),
        template=config.prompt_template,
        cache=out.parent.parent / "language-models",
        use=use,
    )


def _write(
    model: ReportModel,
    tokens: np.ndarray,
    places: np.ndarray,
    prompts: list[str],
    config: ReportConfig,
    kept: Path,
    name: str,
) -> list[str]:
    """Reports of all images; what is done is kept line by line, and not written again."""
    done = _read_lines(kept)
    missing = np.array([i for i in range(len(places)) if i not in done], np.int64)
    kept.parent.mkdir(parents=True, exist_ok=True)
    with (
        progress_bar(
            total=len(places), initial=len(done), unit="report", desc=f"write {name}"
        ) as bar,
        kept.open("a", encoding="utf-8") as lines,
    ):
        for batch, texts in generate_reports(
            model,
            tokens,
            places[missing],
            [prompts[i] for i in missing],
            batch_size=_WRITING_BATCH,
            max_new_tokens=config.max_new_tokens,
            beams=config.beams,
            candidates=config.candidates,
            bfloat16=computes_in_bfloat16(config.precision, model.device),
        ):
            for place, text in zip(missing[batch].tolist(), texts, strict=True):
                done[place] = text
                lines.write(json.dumps([place, text]) + "\n")
            lines.flush()
            bar.update(len(batch))
    return [done[i] for i in range(len(places))]


def _read_lines(file: Path) -> dict[int, str]:
    """What an interrupted writing left; a last line that is not whole does not count."""
    done: dict[int, str] = {}
    if file.exists():
        for line in file.read_text("utf-8").splitlines():
            try:
                place, text = json.loads(line)
            except ValueError:
                break
            done[place] = text
        # Anew, so that a torn line is not written on.
        whole = "".join(json.dumps([place, text]) + "\n" for place, text in done.items())
        write_atomically(file, whole.encode())
    return done
