"""What two reports say of the patient: findings in common, by labels or by CheXbert and RadGraph.

CheXbert and RadGraph are networks of others, whose packages and weights are neither dependencies
nor downloaded here; without them there is one line that says which file is needed, and from where.
"""

from __future__ import annotations

import io
import json
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch

from selfray.errors import InputError
from selfray.evals.bootstrap import Estimate, PatientResamples, PatientsLeftOut, mean_estimate
from selfray.evals.paired_tests import PatientSwaps, PermutationTest, mean_test
from selfray.evals.report_estimates import report_estimates, report_tests
from selfray.evals.text_metrics import weighted_mean
from selfray.models.weights_file import load_exactly, read_tensors
from selfray.progress import progress_bar

CLINICAL_METRICS = ("precision", "recall", "f1")
MICRO, MACRO = "micro", "macro"

CHEXBERT_FINDINGS = (
    "enlarged_cardiomediastinum", "cardiomegaly", "lung_opacity", "lung_lesion", "edema",
    "consolidation", "pneumonia", "atelectasis", "pneumothorax", "pleural_effusion",
    "pleural_other", "fracture", "support_devices", "no_finding",
)  # fmt: skip
"""In the order of CheXbert's outputs (Smit et al., EMNLP 2020)."""
CHEXBERT_FIVE = ("cardiomegaly", "edema", "consolidation", "atelectasis", "pleural_effusion")
"""The five on which CheXpert is scored (Irvin et al., AAAI 2019)."""

CLINICAL_VARIANTS: dict[str, str] = {
    "labels": (
        "precision, recall and F1 of findings that the candidate states against those that the "
        "reference states; 0 where a finding that references state is never stated; a finding "
        "that no reference states is not defined and not in the macro mean; micro of all labels"
    ),
    "chexbert": (
        "labels as above by CheXbert (Smit et al. 2020), package f1chexbert: positive and "
        "uncertain are 1, negative and not mentioned 0, of 14 findings or of 5"
    ),
    "radgraph": (
        "mean over reports of RG_ER: F1 of entities with their label and whether they have a "
        "relation, package radgraph, model radgraph, reward_level partial; 0 where a report is "
        "empty or has no entity"
    ),
}
"""All that tells each variant from others."""

_CHEXBERT_FILES = ("chexbert.pth", "config.json", "vocab.txt")
_CHEXBERT_SOURCE = (
    "chexbert.pth is in StanfordAIMI/RRG_scorers, the others are in google-bert/bert-base-uncased, "
    "both on huggingface.co"
)
_RADGRAPH_FILES = (
    "config.json", "weights.th", "vocabulary/non_padded_namespaces.txt", "vocabulary/*_labels.txt",
    "bert/config.json",
)  # fmt: skip
_RADGRAPH_SOURCE = (
    "unpack radgraph.tar.gz from StanfordAIMI/RRG_scorers on huggingface.co there, and put "
    "config.json and tokenizer files of the BERT that its config.json names into bert/"
)
_SHOWN = 200  # characters of a package's error
_PAIRS = 16  # of reports between two updates of the bar

Key = tuple[str, str]  # finding, "micro" or "macro"; metric


def clinical_resampled(
    findings: Sequence[str], truth: np.ndarray, predicted: np.ndarray, weights: np.ndarray
) -> dict[Key, np.ndarray]:
    """Precision, recall and F1 of each finding and of all labels together (micro).

    Where a finding has no positive in the weighted truth, it is not defined: no report could have
    been right about it. Where it has, and is never predicted, all three are 0. F1 is
    2 TP / (2 TP + FP + FN).

    Args:
        findings: K names.
        truth: [n, K]: 1 where the reference states the finding, 0 where not, NaN where that is
            not known, which leaves the label out.
        predicted: [n, K], 1 or 0, of the candidates.
        weights: [r, n], >= 0, such as how often each report was drawn.

    Returns:
        By (finding, metric) and ("micro", metric), float64 [r], 0 to 1 or NaN.

    Reference:
        scikit-learn's `precision_recall_fscore_support(zero_division=0)` with `sample_weight`; it
        counts 0 for a finding that is not defined here.
    """
    said = np.where(np.isnan(truth), False, predicted == 1)
    hits = (truth == 1) & said
    # TP, positives in the truth, positives in the candidates; [r, K + 1], the last of all labels.
    counts = [weights @ columns.astype(float) for columns in (hits, truth == 1, said)]
    sums = [np.concatenate([c, c.sum(axis=1, keepdims=True)], axis=1) for c in counts]
    right, true, stated = sums
    found = {}
    with np.errstate(invalid="ignore", divide="ignore"):
        for metric, of in zip(CLINICAL_METRICS, (stated, true, (stated + true) / 2), strict=True):
            values = np.where(true > 0, right / np.where(of > 0, of, 1), np.nan)
            found |= {(name, metric): values[:, k] for k, name in enumerate((*findings, MICRO))}
    return found


def clinical_estimates(
    findings: Sequence[str],
    truth: np.ndarray,
    predicted: np.ndarray,
    resamples: PatientResamples,
    left_out: PatientsLeftOut,
) -> dict[Key, Estimate]:
    """Metrics of findings, micro and macro, with what their intervals need.

    Evidence is the patients with a report that states the finding: the reference, or for precision
    the candidate. The macro is the mean over findings that are defined.

    Args:
        findings: K names.
        truth: [n, K], 1, 0 or NaN.
        predicted: [n, K], 1 or 0.
        resamples: Of the patients of the n reports.
        left_out: Of the same patients.

    Returns:
        By (finding, metric), ("micro", metric) and ("macro", metric).
    """
    evidence: dict[Key, float] = {}
    for metric in CLINICAL_METRICS:
        stated = (predicted if metric == "precision" else truth) == 1
        for k, name in enumerate((*findings, MICRO)):
            rows = stated.any(axis=1) if name == MICRO else stated[:, k]
            evidence[name, metric] = len(np.unique(resamples.patient_of_image[rows]))

    def metrics(weights: np.ndarray) -> dict[Key, np.ndarray]:
        return clinical_resampled(findings, truth, predicted, weights)

    found = report_estimates(metrics, resamples, left_out, evidence)
    for metric in CLINICAL_METRICS:
        found[MACRO, metric] = mean_estimate([found[name, metric] for name in findings])
    return found


def clinical_tests(
    findings: Sequence[str],
    truth: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
    swaps: PatientSwaps,
) -> dict[Key, PermutationTest]:
    """Is one encoder's metric higher than another's? Patients' labels are swapped.

    Args:
        findings: K names.
        truth: [n, K], 1, 0 or NaN.
        first: [n, K], 1 or 0, of the reports by one encoder.
        second: [n, K], by another.
        swaps: Of the patients of the n reports.

    Returns:
        By (finding, metric), ("micro", metric) and ("macro", metric).
    """
    twice, both = np.concatenate([truth, truth]), np.concatenate([first, second])

    def metrics(weights: np.ndarray) -> dict[Key, np.ndarray]:
        return clinical_resampled(findings, twice, both, weights)

    found = report_tests(metrics, swaps)
    for metric in CLINICAL_METRICS:
        found[MACRO, metric] = mean_test([found[name, metric] for name in findings])
    return found


def score_estimate(
    scores: np.ndarray, resamples: PatientResamples, left_out: PatientsLeftOut
) -> Estimate:
    """The mean of one score a report, such as RadGraph's, with what its interval needs.

    Args:
        scores: [n].
        resamples: Of the patients of the n reports.
        left_out: Of the same patients.
    """
    return report_estimates(
        lambda weights: {"mean": weighted_mean(scores, weights)},
        resamples,
        left_out,
        {"mean": resamples.n_patients},
    )["mean"]


def score_test(first: np.ndarray, second: np.ndarray, swaps: PatientSwaps) -> PermutationTest:
    """Is one encoder's mean score higher than another's? Patients' scores are swapped.

    Args:
        first: [n], of the reports by one encoder.
        second: [n], by another.
        swaps: Of the patients of the n reports.
    """
    both = np.concatenate([first, second])
    return report_tests(lambda weights: {"mean": weighted_mean(both, weights)}, swaps)["mean"]


def chexbert_labels(texts: Sequence[str], weights: Path) -> np.ndarray:
    """What CheXbert reads in reports: 1 for stated or uncertain, 0 for negated or not mentioned.

    The network and its reading of the output are those of the package f1chexbert (`bert_labeler`,
    `F1CheXbert.get_label` in its mode "rrg"). The package's own constructor would download three
    files and read one by unpickling; here they are read from a folder, and of the checkpoint
    tensors only, with PyTorch's restricted unpickler.

    Args:
        texts: n reports.
        weights: Folder with chexbert.pth and bert-base-uncased's config.json and vocab.txt.

    Returns:
        int64 [n, 14], in the order of `CHEXBERT_FINDINGS`.

    Raises:
        InputError: The package or a file is missing or damaged, or the checkpoint is not
            CheXbert's.

    Reference:
        Smit et al., CheXbert, EMNLP 2020.
    """
    labeler = _open_chexbert(weights)
    labeler.model.to(labeler.device)
    labels: dict[str, list[int]] = {}
    distinct = dict.fromkeys(text.strip() for text in texts)
    with torch.inference_mode(), progress_bar(total=len(distinct), desc="CheXbert") as bar:
        for text in distinct:
            labels[text] = labeler.label(labeler, text)
            bar.update()
    found = [labels[text.strip()] for text in texts]
    return np.array(found, np.int64).reshape(-1, len(CHEXBERT_FINDINGS))


def require_chexbert(weights: Path) -> None:
    """Open CheXbert and close it again, so that what lacks is said before anything is computed.

    Args:
        weights: As for `chexbert_labels`.

    Raises:
        InputError: As `chexbert_labels`.
    """
    _open_chexbert(weights)


def _open_chexbert(weights: Path) -> SimpleNamespace:
    """What the package's `get_label` asks of its object, the network on the CPU, and `label`."""
    package = _package("f1chexbert", "f1chexbert.f1chexbert", "CheXbert F1")
    _check_files(weights, _CHEXBERT_FILES, _CHEXBERT_SOURCE)
    model: Any = _chexbert(package, weights)
    return SimpleNamespace(
        tokenizer=_BertTokenizer(weights, model.bert.config.vocab_size),
        model=model,
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        label=package.F1CheXbert.get_label,
    )


class _BertTokenizer:
    """What f1chexbert asks of a tokenizer; transformers 5 no longer has `encode_plus`."""

    def __init__(self, folder: Path, words: int) -> None:
        from transformers import BertTokenizer

        with _opening(folder / "vocab.txt", _CHEXBERT_SOURCE):
            self._tokenizer = BertTokenizer.from_pretrained(folder)
            _check_words(len(self._tokenizer), words)
        self.tokenize = self._tokenizer.tokenize
        self.cls_token_id = self._tokenizer.cls_token_id
        self.sep_token_id = self._tokenizer.sep_token_id

    def encode_plus(self, tokens: list[str]) -> dict[str, list[Any]]:
        """The numbers of tokens, between those of [CLS] and [SEP]."""
        numbers = self._tokenizer.convert_tokens_to_ids(tokens)
        return {"input_ids": [self.cls_token_id, *numbers, self.sep_token_id]}


def _chexbert(package: ModuleType, weights: Path) -> torch.nn.Module:
    """The package's network, with CheXbert's weights."""
    from transformers import BertConfig

    # The package names bert-base-uncased, which would be looked for on the network.
    local = SimpleNamespace(from_pretrained=lambda name: BertConfig.from_pretrained(weights))
    with (
        _opening(weights / "config.json", _CHEXBERT_SOURCE),
        _replaced(package, "AutoConfig", local),
    ):
        network = package.bert_labeler(inference=True)
    file = weights / _CHEXBERT_FILES[0]
    with _opening(file, _CHEXBERT_SOURCE):
        tensors = {name.removeprefix("module."): t for name, t in read_tensors(file).items()}
        tensors.pop("bert.embeddings.position_ids", None)  # 0, 1, 2 ...: of earlier transformers
        load_exactly(network, tensors, file)
    return network.eval()


def radgraph_f1(references: Sequence[str], candidates: Sequence[str], model: Path) -> np.ndarray:
    """RadGraph F1 (RG_ER) of each pair of reports.

    Computed by the package radgraph on a CPU, where it reads its weights with PyTorch's restricted
    unpickler in every version. The package would look for its tokenizer and the shape of its BERT
    on the network; here they are in the folder.

    Args:
        references: n reports by radiologists.
        candidates: n generated reports.
        model: Folder with the unpacked radgraph.tar.gz (config.json, vocabulary, weights.th) and a
            folder bert with config.json and tokenizer of the model that its config.json names.

    Returns:
        float64 [n], 0 to 1; 0 where one is empty or has no entity.

    Raises:
        InputError: The package or a file is missing or damaged, or config.json is not RadGraph's.

    Reference:
        Jain et al., RadGraph, NeurIPS datasets 2021; Delbrouck et al., Improving the factual
        correctness of radiology report generation with semantic rewards, EMNLP findings 2022.
    """
    pairs = list(zip(references, candidates, strict=True))
    stated = [k for k, pair in enumerate(pairs) if all(text.strip() for text in pair)]
    scores = np.zeros(len(pairs))
    with _radgraph(model) as scorer, progress_bar(total=len(stated), desc="RadGraph") as bar:
        for start in range(0, len(stated), _PAIRS):
            rows = stated[start : start + _PAIRS]
            refs, hyps = ([pairs[k][side].strip() for k in rows] for side in (0, 1))
            with torch.inference_mode():
                scores[rows] = scorer(refs=refs, hyps=hyps)[1]
            bar.update(len(rows))
    return scores


def require_radgraph(model: Path) -> None:
    """Open RadGraph and close it again, so that what lacks is said before anything is computed.

    Args:
        model: As for `radgraph_f1`.

    Raises:
        InputError: As `radgraph_f1`.
    """
    with _radgraph(model):
        pass


@contextmanager
def _radgraph(model: Path) -> Iterator[Callable[..., Any]]:
    """The package's scorer, and what it needs while it runs."""
    package = _package("radgraph", "radgraph", "RadGraph F1")
    _check_files(model, _RADGRAPH_FILES, _RADGRAPH_SOURCE)
    with (
        tempfile.TemporaryDirectory() as folder,
        redirect_stdout(io.StringIO()),  # it prints which device it uses
        _earlier_tokenizers(),
    ):
        _offline_copy(model, Path(folder) / "radgraph")
        _check_radgraph(model)
        with _opening(model, _RADGRAPH_SOURCE):
            scorer = package.F1RadGraph(
                reward_level="partial", model_type="radgraph", model_cache_dir=folder, cuda=-1
            )
        yield scorer


def _check_radgraph(model: Path) -> None:
    """Open what the package opens by itself, to name the file that is damaged."""
    from transformers import AutoConfig, AutoTokenizer

    bert = model / "bert"
    with _opening(bert / "config.json", _RADGRAPH_SOURCE):
        config = AutoConfig.from_pretrained(bert)
    with _opening(bert, _RADGRAPH_SOURCE):
        _check_words(len(AutoTokenizer.from_pretrained(bert, config=config)), config.vocab_size)
    with _opening(model / "weights.th", _RADGRAPH_SOURCE):
        read_tensors(model / "weights.th")


def _offline_copy(model: Path, folder: Path) -> None:
    """A folder as the package expects it, whose config names local files."""
    folder.mkdir()
    for name in ("vocabulary", "weights.th"):
        (folder / name).symlink_to((model / name).absolute())
    try:
        config = json.loads((model / "config.json").read_text())
        bert = str((model / "bert").absolute())
        config["dataset_reader"]["token_indexers"]["bert"]["model_name"] = bert
        config["model"]["embedder"]["token_embedders"]["bert"]["model_name"] = bert
    except (ValueError, KeyError, TypeError):
        raise InputError(
            f"{model / 'config.json'} is not RadGraph's: it names no BERT. Take it from "
            "radgraph.tar.gz in StanfordAIMI/RRG_scorers on huggingface.co."
        ) from None
    (folder / "config.json").write_text(json.dumps(config))


@contextmanager
def _earlier_tokenizers() -> Iterator[None]:
    """Give BERT's tokenizers what radgraph calls and transformers 5 no longer has."""
    from transformers import PreTrainedTokenizerBase as Base

    def with_special_tokens(self: Any, numbers: list[int]) -> list[int]:
        return [self.cls_token_id, *numbers, self.sep_token_id]

    lacking = {
        "encode_plus": Base.__call__,
        "build_inputs_with_special_tokens": with_special_tokens,
    }
    with ExitStack() as stack:
        for name, method in lacking.items():
            if not hasattr(Base, name):
                stack.enter_context(_replaced(Base, name, method))
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of a package for as long as the package needs it otherwise."""
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name) if before is None else setattr(owner, name, before)


def _package(name: str, module: str, metric: str) -> ModuleType:
    try:
        with warnings.catch_warnings():  # both turn warnings off for the whole process
            return import_module(module)
    except ImportError as cause:
        said = "" if cause.name in (None, name) else f" (it lacks {cause.name})"
        raise InputError(
            f"{metric} needs the package {name}, which cannot be imported{said}. "
            f"Run: pip install 'selfray[reports]' {name}"
        ) from None


def _check_words(found: int, wanted: int) -> None:
    if found != wanted:  # each word after a lost one would be another
        raise ValueError(f"its vocabulary has {found} words, config.json asks for {wanted}")


def _check_files(folder: Path, names: Sequence[str], source: str) -> None:
    """Refuse a folder that lacks a file, or whose file of that name or pattern is empty."""
    found = {name: sorted(folder.glob(name)) for name in names}
    missing = [name for name, files in found.items() if not files]
    if missing:
        raise InputError(
            f"{folder} has no {' and no '.join(missing)}; needed are {', '.join(names)}. "
            f"None is downloaded here: {source}."
        )
    for file in (file for files in found.values() for file in files):
        if not (file.is_file() and file.stat().st_size):
            what = "is empty" if file.is_file() else "is no file"
            raise InputError(f"{file} {what}. Take it anew: {source}.")


@contextmanager
def _opening(path: Path, source: str) -> Iterator[None]:
    """Say what cannot be opened, and where it is from; the packages raise errors of any kind."""
    try:
        yield
    except InputError as cause:  # names the file
        raise InputError(f"{cause} Where it is from: {source}.") from cause
    except Exception as cause:
        said = " ".join(str(cause).split()) or type(cause).__name__
        reason = said if len(said) <= _SHOWN else f"{said[:_SHOWN]} …"
        raise InputError(
            f"{path} cannot be opened: {reason.rstrip('.')}. Take it anew: {source}."
        ) from cause
