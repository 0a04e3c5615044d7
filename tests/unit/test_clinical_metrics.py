"""Clinical agreement against scikit-learn; CheXbert and RadGraph through stand-ins of them."""

from __future__ import annotations

import json
import sys
import warnings
from collections import OrderedDict
from contextlib import contextmanager
from types import ModuleType

import numpy as np
import pytest
import torch
from sklearn.metrics import precision_recall_fscore_support
from torch import nn
from transformers import BertConfig, BertModel, BertTokenizer

from selfray.errors import InputError
from selfray.evals.bootstrap import PatientResamples, PatientsLeftOut
from selfray.evals.clinical_metrics import (
    CHEXBERT_FINDINGS,
    CHEXBERT_FIVE,
    CLINICAL_METRICS,
    chexbert_labels,
    clinical_estimates,
    clinical_resampled,
    clinical_tests,
    radgraph_f1,
    require_chexbert,
    require_radgraph,
    score_estimate,
    score_test,
)
from selfray.evals.paired_tests import PatientSwaps

FINDINGS = ("effusion", "nodule", "edema", "fracture")
N = 150


def labels(seed):
    """Truth, and what two encoders said; `fracture` has no positive, `edema` is never said."""
    rng = np.random.default_rng(seed)
    truth = (rng.random((N, 4)) < [0.4, 0.15, 0.2, 0]).astype(float)
    said = [np.abs(truth - (rng.random((N, 4)) < p)) for p in (0.1, 0.4)]
    for one in said:
        one[:, 2] = 0
    return truth, *said


def expected(truth, said):
    """By scikit-learn, whose zeros of findings without a positive are not ours."""
    defined = truth.any(axis=0)
    options = {"zero_division": 0}
    each = precision_recall_fscore_support(truth, said, **options)[:3]
    micro = precision_recall_fscore_support(truth, said, average="micro", **options)[:3]
    macro = precision_recall_fscore_support(
        truth[:, defined], said[:, defined], average="macro", **options
    )[:3]
    found = {}
    for k, metric in enumerate(CLINICAL_METRICS):
        for f, name in enumerate(FINDINGS):
            found[name, metric] = each[k][f] if defined[f] else np.nan
        found["micro", metric], found["macro", metric] = micro[k], macro[k]
    return found


def test_points_and_resamples_are_scikit_learns_of_the_reports_written_out():
    truth, said, _ = labels(0)
    patients = np.random.default_rng(1).integers(0, 60, N)
    resamples = PatientResamples(patients, count=20)
    estimates = clinical_estimates(FINDINGS, truth, said, resamples, PatientsLeftOut(patients))
    points = {key: estimate.point for key, estimate in estimates.items()}
    assert points == pytest.approx(expected(truth, said), rel=1e-12, nan_ok=True)
    assert points["edema", "f1"] == points["edema", "precision"] == 0
    for r in range(20):
        rows = np.repeat(np.arange(N), resamples.multiplicity[r][resamples.patient_of_image])
        found = {key: e.resampled[r] for key, e in estimates.items() if not np.isnan(e.point)}
        wanted = {key: v for key, v in expected(truth[rows], said[rows]).items() if key in found}
        assert found == pytest.approx(wanted, rel=1e-12)


def test_a_resample_without_a_finding_takes_its_point_in_the_macro():
    truth = np.array([[1, 1], [1, 0], [0, 0], [1, 0]], float)
    said = np.array([[1, 1], [0, 1], [0, 0], [1, 0]], float)
    patients = np.arange(4)
    resamples = PatientResamples(patients, count=50)
    found = clinical_estimates(("a", "b"), truth, said, resamples, PatientsLeftOut(patients))
    lacking = resamples.multiplicity[:, 0] == 0
    np.testing.assert_array_equal(np.isnan(found["b", "f1"].resampled), lacking)
    a = found["a", "f1"].resampled[lacking]
    np.testing.assert_allclose(found["macro", "f1"].resampled[lacking], (a + 2 / 3) / 2)


def test_evidence_is_patients_whose_report_states_the_finding():
    truth = np.array([[1, 0], [1, 0], [1, 1], [0, 0]], float)
    said = np.array([[0, 0], [0, 1], [1, 1], [1, 1]], float)
    patients = ["p", "p", "q", "r"]
    found = clinical_estimates(
        ("a", "b"), truth, said, PatientResamples(patients), PatientsLeftOut(patients)
    )
    evidence = {key: estimate.evidence for key, estimate in found.items() if key[0] != "macro"}
    assert evidence == {
        ("a", "recall"): 2, ("a", "f1"): 2, ("a", "precision"): 2,
        ("b", "recall"): 1, ("b", "f1"): 1, ("b", "precision"): 3,
        ("micro", "recall"): 2, ("micro", "f1"): 2, ("micro", "precision"): 3,
    }  # fmt: skip


def test_unknown_labels_are_left_out():
    truth, said, _ = labels(3)
    unknown = truth.copy()
    unknown[50:, 1] = np.nan
    found = clinical_resampled(FINDINGS, unknown, said, np.ones((1, N)))
    known = expected(truth[:50], said[:50])
    assert found["nodule", "f1"][0] == pytest.approx(known["nodule", "f1"])
    flat = np.isfinite(unknown)
    micro = precision_recall_fscore_support(truth[flat], said[flat], average="binary")[:3]
    for metric, value in zip(CLINICAL_METRICS, micro, strict=True):
        assert found["micro", metric][0] == pytest.approx(value)


def test_nothing_that_weighs_gives_no_number_and_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        truth, said, _ = labels(0)
        for found in (
            clinical_resampled(FINDINGS, truth, said, np.zeros((1, N))),
            clinical_resampled(FINDINGS, np.zeros((N, 4)), said, np.ones((1, N))),
        ):
            assert all(np.isnan(value).all() for value in found.values())


def test_a_swap_test_is_that_of_swapped_labels():
    truth, first, second = labels(4)
    patients = np.random.default_rng(5).integers(0, 50, N)
    swaps = PatientSwaps(patients, count=10)
    found = clinical_tests(FINDINGS, truth, first, second, swaps)
    swapped = swaps.multiplicity[:, swaps.patient_of_image].astype(bool)
    for m in range(10):
        a = expected(truth, np.where(swapped[m][:, None], second, first))
        b = expected(truth, np.where(swapped[m][:, None], first, second))
        for key, test in found.items():
            wanted = a[key] - b[key]
            if not np.isnan(wanted):
                assert test.swapped[m] == pytest.approx(wanted, abs=1e-12)
    assert found["macro", "f1"].p < 0.2 and found["effusion", "f1"].difference > 0
    assert np.isnan(found["fracture", "f1"].p)


def test_a_score_a_report_has_its_mean_interval_and_test():
    rng = np.random.default_rng(6)
    patients = rng.integers(0, 40, N)
    first, second = rng.random((2, N))
    resamples = PatientResamples(patients, count=5)
    found = score_estimate(first, resamples, PatientsLeftOut(patients))
    weights = resamples.multiplicity[:, resamples.patient_of_image]
    wanted = [np.average(first, weights=w) for w in weights]
    np.testing.assert_allclose(found.resampled, wanted, rtol=1e-12)
    assert found.point == pytest.approx(first.mean())
    swaps = PatientSwaps(patients, count=5)
    signs = 1 - 2.0 * swaps.multiplicity[:, swaps.patient_of_image]
    test = score_test(first, second, swaps)
    np.testing.assert_allclose(test.swapped, signs @ (first - second) / N, atol=1e-12)


# The networks of others: stand-ins with the signatures of f1chexbert 0.0.2 and radgraph 0.1.18.


class Labeler(nn.Module):
    """Says what the number of the first word is, as f1chexbert's `bert_labeler` says labels."""

    def __init__(self, inference=False):
        super().__init__()
        config = sys.modules["f1chexbert.f1chexbert"].AutoConfig.from_pretrained(
            "bert-base-uncased"
        )
        self.bert = BertModel(config)
        self.linear_heads = nn.ModuleList([nn.Linear(config.hidden_size, 4) for _ in range(13)])
        self.linear_heads.append(nn.Linear(config.hidden_size, 2))


class NoDownload:
    @classmethod
    def from_pretrained(cls, name):
        raise AssertionError(f"{name} would be downloaded")


class F1CheXbert:
    def __init__(self):
        raise AssertionError("the constructor downloads")

    def get_label(self, report, mode="rrg"):
        encoded = self.tokenizer.encode_plus(self.tokenizer.tokenize(report))["input_ids"]
        assert encoded[0] == self.tokenizer.cls_token_id
        assert encoded[-1] == self.tokenizer.sep_token_id
        assert not self.model.training and not torch.is_grad_enabled()
        F1CheXbert.asked.append(report)
        return [int(self.model.linear_heads[0].bias[0].item() == 7), *encoded[1:-1], *[0] * 13][:14]


def tiny_bert(folder):
    """Write config.json and vocab.txt of a BERT, and return its config."""
    vocabulary = "[PAD] [UNK] [CLS] [SEP] [MASK] clear effusion".split()  # noqa: SIM905
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    config = BertConfig(
        vocab_size=7, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
        intermediate_size=8,
    )  # fmt: skip
    config.save_pretrained(folder)
    return config


@pytest.fixture
def chexbert(tmp_path, monkeypatch):
    """A folder of CheXbert's files, tiny."""
    package, module = ModuleType("f1chexbert"), ModuleType("f1chexbert.f1chexbert")
    for name, value in (
        ("bert_labeler", Labeler), ("F1CheXbert", F1CheXbert), ("AutoConfig", NoDownload)
    ):  # fmt: skip
        setattr(module, name, value)
    package.f1chexbert = module
    monkeypatch.setitem(sys.modules, "f1chexbert", package)
    monkeypatch.setitem(sys.modules, "f1chexbert.f1chexbert", module)
    F1CheXbert.asked = []
    config = tiny_bert(tmp_path)
    module.AutoConfig = type("", (), {"from_pretrained": lambda name: config})
    network = Labeler()
    module.AutoConfig = NoDownload
    nn.init.constant_(network.linear_heads[0].bias, 7.0)
    state = OrderedDict((f"module.{name}", t) for name, t in network.state_dict().items())
    state["module.bert.embeddings.position_ids"] = torch.arange(512)[None]
    torch.save({"epoch": 3, "model_state_dict": state}, tmp_path / "chexbert.pth")
    return tmp_path


def test_chexbert_reads_local_files_and_each_text_once(chexbert):
    found = chexbert_labels(["clear", " Effusion", "clear ", ""], chexbert)
    assert found.shape == (4, len(CHEXBERT_FINDINGS))
    assert found[:, :2].tolist() == [[1, 5], [1, 6], [1, 5], [1, 0]]
    assert F1CheXbert.asked == ["clear", "Effusion", ""]
    assert sys.modules["f1chexbert.f1chexbert"].AutoConfig is NoDownload
    assert chexbert_labels([], chexbert).shape == (0, 14)


def test_the_five_are_among_the_fourteen():
    assert len(CHEXBERT_FINDINGS) == 14 and set(CHEXBERT_FIVE) < set(CHEXBERT_FINDINGS)


@contextmanager
def refused_in_one_line(match):
    with pytest.raises(InputError, match=match) as caught:
        yield
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["chexbert.pth", "config.json", "vocab.txt"])
def test_a_missing_file_of_chexbert_is_named_with_its_source(chexbert, name):
    (chexbert / name).unlink()
    with refused_in_one_line(f"has no {name}; .*StanfordAIMI/RRG_scorers"):
        chexbert_labels(["clear"], chexbert)


DAMAGE = {
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "other": lambda content: b"\xff\xfe\x00 other",
    "list": lambda content: b"[]",
}


def spoil(file, damage):
    file.write_bytes(DAMAGE[damage](file.read_bytes()))


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["chexbert.pth", "config.json", "vocab.txt"])
def test_a_damaged_file_of_chexbert_is_named_with_its_source(chexbert, name, damage):
    require_chexbert(chexbert)
    spoil(chexbert / name, damage)
    with refused_in_one_line(f"{name} .*bert-base-uncased"):
        require_chexbert(chexbert)


def test_another_networks_weights_are_refused(chexbert):
    torch.save({"model_state_dict": {"module.head": torch.ones(2)}}, chexbert / "chexbert.pth")
    with pytest.raises(InputError, match=r"missing .* unexpected"):
        chexbert_labels(["clear"], chexbert)


def test_a_checkpoint_that_would_run_code_is_not_opened(chexbert):
    torch.save({"model_state_dict": nn.Linear(1, 1)}, chexbert / "chexbert.pth")
    with pytest.raises(InputError, match="holds more than tensors"):
        chexbert_labels(["clear"], chexbert)


class F1RadGraph:
    def __init__(self, reward_level, model_type=None, *, model_cache_dir=None, cuda=None):
        assert (reward_level, model_type, cuda) == ("partial", "radgraph", -1)
        folder = f"{model_cache_dir}/radgraph"
        with open(f"{folder}/config.json") as file:  # noqa: PTH123
            config = json.load(file)
        named = config["dataset_reader"]["token_indexers"]["bert"]["model_name"]
        assert named == config["model"]["embedder"]["token_embedders"]["bert"]["model_name"]
        with open(f"{named}/config.json") as file:  # noqa: PTH123
            assert json.load(file)["hidden_size"] == 8
        state = torch.load(f"{folder}/weights.th", weights_only=True)
        nn.Linear(2, 1).load_state_dict(state)
        print("Using device: cpu")

    def __call__(self, refs, hyps):
        assert all(refs) and all(hyps) and len(refs) == len(hyps) <= 16
        scores = [
            float(len(hyp.split()) / len(ref.split())) for ref, hyp in zip(refs, hyps, strict=True)
        ]
        return np.mean(scores), scores, [], []


@pytest.fixture
def radgraph(tmp_path, monkeypatch):
    """A folder of RadGraph's files."""
    package = ModuleType("radgraph")
    package.F1RadGraph = F1RadGraph
    monkeypatch.setitem(sys.modules, "radgraph", package)
    (tmp_path / "vocabulary").mkdir()
    (tmp_path / "bert").mkdir()
    tiny_bert(tmp_path / "bert")
    BertTokenizer.from_pretrained(tmp_path / "bert").save_pretrained(tmp_path / "bert")
    for name in ("non_padded_namespaces", "radgraph__ner_labels"):
        (tmp_path / "vocabulary" / f"{name}.txt").write_text("*labels\n")
    torch.save(nn.Linear(2, 1).state_dict(), tmp_path / "weights.th")
    bert = {"bert": {"model_name": "a/name-on-the-network"}}
    config = {
        "dataset_reader": {"token_indexers": bert},
        "model": {"embedder": {"token_embedders": bert}},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_radgraph_scores_each_pair_from_local_files_and_prints_nothing(radgraph, capsys):
    references = ["a b", "", "a b c d", " "] * 10
    candidates = ["a", "a", "a", ""] * 10
    assert radgraph_f1(references, candidates, radgraph).tolist() == [0.5, 0, 0.25, 0] * 10
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "name",
    ["config.json", "weights.th", "bert/config.json", "vocabulary/non_padded_namespaces.txt"],
)
def test_a_missing_file_of_radgraph_is_named_with_its_source(radgraph, name):
    (radgraph / name).unlink()
    with refused_in_one_line(f"has no {name}; .*radgraph.tar.gz"):
        radgraph_f1(["a"], ["a"], radgraph)


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["config.json", "weights.th", "bert/config.json"])
def test_a_damaged_file_of_radgraph_is_named_with_its_source(radgraph, name, damage):
    require_radgraph(radgraph)
    spoil(radgraph / name, damage)
    with refused_in_one_line(f"{name}.*radgraph.tar.gz"):
        require_radgraph(radgraph)


def test_a_bert_of_radgraph_without_its_words_is_refused(radgraph):
    """Transformers makes a tokenizer of five special tokens, to which every word is unknown."""
    for file in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"):
        (radgraph / "bert" / file).unlink()
    with pytest.raises(InputError, match=r"bert cannot be opened: .*radgraph.tar.gz"):
        require_radgraph(radgraph)


def test_weights_of_radgraph_that_do_not_fit_are_refused(radgraph):
    torch.save(nn.Linear(3, 1).state_dict(), radgraph / "weights.th")
    with refused_in_one_line(r"cannot be opened: .*size mismatch.*radgraph.tar.gz"):
        require_radgraph(radgraph)


@pytest.mark.parametrize("content", ["{}", "[]", "no json", '{"dataset_reader": 3}'])
def test_another_models_config_is_refused(radgraph, content):
    (radgraph / "config.json").write_text(content)
    with pytest.raises(InputError, match="is not RadGraph's"):
        radgraph_f1(["a"], ["a"], radgraph)


@pytest.mark.parametrize(
    ("package", "call"),
    [
        ("f1chexbert", lambda folder: chexbert_labels(["clear"], folder)),
        ("radgraph", lambda folder: radgraph_f1(["clear"], ["clear"], folder)),
    ],
)
def test_a_missing_package_is_named_in_one_line(package, call, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with refused_in_one_line(f"needs the package {package}.* pip install"):
        call(tmp_path)
