"""BLEU against coco's scorer; CheXbert and RadGraph by their own packages, with random weights."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from report_pairs import report_pairs

from selfray.evals.clinical_metrics import chexbert_labels, radgraph_f1
from selfray.evals.text_metrics import text_resampled, text_statistics, words

TRANSFORMERS = pytest.importorskip("transformers")
VOCABULARY = (
    "[PAD] [UNK] [CLS] [SEP] [MASK] a b no heart lung effusion ##s clear small . , is normal "
    "opacity right"
)
TEXTS = [
    "No effusion. Heart is normal, lung clear.",
    "Small effusions, right lung opacity.",
    "lung clear",
    "heart normal heart",
    "  ",
    "opacity right lung. " * 20,
]


def bert(folder):
    """A tiny BERT's config and tokenizer."""
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text(VOCABULARY.replace(" ", "\n"))
    TRANSFORMERS.BertTokenizer.from_pretrained(folder).save_pretrained(folder)
    config = TRANSFORMERS.BertConfig(
        vocab_size=len(VOCABULARY.split()), hidden_size=16, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=16,
    )  # fmt: skip
    config.save_pretrained(folder)
    return config


def test_bleu_is_cocos():
    bleu = pytest.importorskip("pycocoevalcap.bleu.bleu")
    references, candidates = report_pairs(1000)
    truth, said = (
        {k: [" ".join(words(text))] for k, text in enumerate(side)}
        for side in (references, candidates)
    )
    expected, _ = bleu.Bleu(4).compute_score(truth, said, verbose=0)
    found = text_resampled(text_statistics(references, candidates), np.ones((1, 1000)))
    # It adds 1e-9 to each count of n-grams and to the words of references.
    for order in range(4):
        assert found[f"bleu_{order + 1}"][0] == pytest.approx(expected[order], rel=1e-9)


def test_chexbert_labels_are_those_of_its_package(tmp_path, monkeypatch):
    package = pytest.importorskip("f1chexbert.f1chexbert")
    config = bert(tmp_path)
    with monkeypatch.context() as patch:
        local = SimpleNamespace(from_pretrained=lambda name: config)
        patch.setattr(package, "AutoConfig", local)
        torch.manual_seed(0)
        network = package.bert_labeler(inference=True).eval()
    for parameter in network.parameters():  # so large that labels differ from text to text
        torch.nn.init.normal_(parameter)
    state = {f"module.{name}": tensor for name, tensor in network.state_dict().items()}
    torch.save({"model_state_dict": state, "epoch": 1}, tmp_path / "chexbert.pth")
    found = chexbert_labels(TEXTS, tmp_path)
    tokenizer = TRANSFORMERS.BertTokenizer.from_pretrained(tmp_path)
    for text, labels in zip(TEXTS, found, strict=True):
        numbers = tokenizer(text.strip())["input_ids"]
        batch = torch.tensor([numbers])
        with torch.no_grad():
            classes = [o.argmax().item() for o in network(batch, torch.ones(batch.shape))]
        # Of 13: blank, positive, negative, uncertain; of the last: no, yes.
        wanted = [int(c in (1, 3)) for c in classes]
        assert labels.tolist() == wanted
    assert 0 < found.mean() < 1 and len(np.unique(found, axis=0)) > 1


def dygie(folder):
    """A folder of RadGraph's layout, whose config names a BERT that is not on this machine."""
    (folder / "vocabulary").mkdir()
    (folder / "vocabulary" / "non_padded_namespaces.txt").write_text("*tags\n*labels\n")
    for kind, names in (("ner", "Anatomy\nObservation"), ("relation", "modify\nlocated_at")):
        (folder / "vocabulary" / f"radgraph__{kind}_labels.txt").write_text(f"\n{names}\n")
    named = {"bert": {"model_name": "none/such", "max_length": 32}}
    model = {
        "type": "dygie", "embedder": {"token_embedders": named}, "initializer": {},
        "module_initializer": {}, "feature_size": 4, "max_span_width": 3,
        "target_task": "relation",
        "feedforward_params": {"num_layers": 1, "hidden_dims": 8, "dropout": 0.0},
        "loss_weights": {"ner": 1.0, "relation": 1.0, "coref": 0.0, "events": 0.0},
        "modules": {
            "ner": {}, "relation": {"spans_per_word": 0.5},
            "coref": {"spans_per_word": 0.3, "max_antecedents": 10},
            "events": {
                "trigger_spans_per_word": 0.3, "argument_spans_per_word": 0.3,
                "loss_weights": {"trigger": 1.0, "arguments": 1.0},
            },
        },
    }  # fmt: skip
    reader = {"max_span_width": 3, "token_indexers": named}
    (folder / "config.json").write_text(json.dumps({"dataset_reader": reader, "model": model}))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_radgraph_runs_offline_in_its_package_and_scores_entities_and_relations(
    tmp_path, monkeypatch
):
    pytest.importorskip("radgraph")
    from radgraph import radgraph as module
    from radgraph.dygie.models.dygie import DyGIE
    from radgraph.rewards import exact_entity_token_if_rel_exists_reward

    bert(tmp_path / "bert")
    dygie(tmp_path)
    torch.save({"x": torch.ones(1)}, tmp_path / "weights.th")

    def keep(network, state, strict):
        torch.manual_seed(1)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter)
        torch.save(network.state_dict(), tmp_path / "weights.th")

    references, candidates = TEXTS[:4], [TEXTS[1], TEXTS[1], TEXTS[0], "  "]
    with monkeypatch.context() as patch:  # the only way to the network's shapes
        patch.setattr(DyGIE, "load_state_dict", keep)
        patch.setattr(module.torch, "load", lambda *_, **__: {"x": torch.ones(1)})
        radgraph_f1(["lung clear"], ["lung clear"], tmp_path)
    annotations = []
    forward = module.RadGraph.forward

    def listen(network, texts):
        annotations.append((texts, forward(network, texts)))
        return annotations[-1][1]

    monkeypatch.setattr(module.RadGraph, "forward", listen)
    assert radgraph_f1(references, references, tmp_path).tolist() == [1, 1, 1, 1]
    found = radgraph_f1(references, candidates, tmp_path)
    texts, read = annotations[-1]
    assert texts == [*candidates[:3], *references[:3]]
    wanted = [
        exact_entity_token_if_rel_exists_reward(read[str(k)], read[str(k + 3)]) for k in range(3)
    ]
    assert found.tolist() == [*wanted, 0]
    assert found[1] == 1 and 0 < found[0] < 1
