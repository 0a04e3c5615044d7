"""A report model: layout, loss, batches, training, resume, generation, adapters, files."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from report_model_data import TEXTS, decoder, model_directory, opened, pairs, report_model, uncut
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from selfray.data.report_text import cut_at_sentence
from selfray.errors import InputError, RunStopped
from selfray.evals.report_generation import _Drawn, generate_reports
from selfray.evals.report_model import (
    EncodedExamples,
    Projector,
    ReportExamples,
    ReportModel,
    encode_examples,
    fit_prompts,
)
from selfray.evals.report_model_directory import open_report_model, save_report_model
from selfray.evals.report_training import TrainingStage, length_buckets, train_report_model
from selfray.evals.report_words import learn_words
from selfray.report_config import report_recipe

ARCHITECTURES = ("llama", "qwen2", "gpt2", "opt")
LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": ("all-linear",)}


def encoded(model: ReportModel, examples: ReportExamples) -> EncodedExamples:
    return encode_examples(model, examples, 100, uncut)


def trained(
    model: ReportModel, examples: EncodedExamples, stages: list[TrainingStage], out: Path, **changed
) -> Any:
    settings = {"batch_size": 4, "micro_batch": 2, "check_every": 3, "image_dropout": 0.0,
                "bfloat16": False, "activation_checkpointing": False, "seed": 3,
                "word_steps": 0}  # fmt: skip
    return train_report_model(model, examples, examples, stages, **(settings | changed), out=out)


def written(model: ReportModel, examples: ReportExamples, **changed: Any) -> list[str]:
    settings = {"batch_size": 8, "max_new_tokens": 60, "beams": 1, "candidates": 1,
                "bfloat16": False}  # fmt: skip
    texts = [""] * len(examples.rows)
    for places, found in generate_reports(
        model, examples.tokens, examples.rows, examples.prompts, **(settings | changed)
    ):
        for place, text in zip(places, found, strict=True):
            texts[place] = text
    return texts


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_loss_is_that_of_each_example_alone_by_the_library(name: str, tmp_path: Path) -> None:
    """In a batch of several lengths, against transformers' own loss without any filling up."""
    examples = pairs()
    model = report_model(opened(model_directory(tmp_path / name, name)), examples).eval()
    tokens = encoded(model, examples)
    with torch.no_grad():
        loss, count = model.loss_sum(tokens, np.arange(8))
        expected = 0.0
        for i in range(8):
            text = tokens.prompts[i] + tokens.targets[i]
            seen = torch.ones(1, dtype=torch.bool)
            embedded = model.embeddings(examples.tokens[[i]], [text], seen)
            labels = torch.full(embedded.shape[:2], -100)
            labels[0, -len(tokens.targets[i]) :] = torch.tensor(tokens.targets[i])
            mask = torch.ones_like(labels)
            each = model.network(inputs_embeds=embedded, attention_mask=mask, labels=labels).loss
            expected += float(each) * len(tokens.targets[i])
    assert count == sum(map(len, tokens.targets))
    # Sums of the same float32 numbers in another order.
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_the_loss_does_not_depend_on_the_prompt_as_a_target() -> None:
    examples = pairs()
    model = report_model(decoder(), examples)
    tokens = encoded(model, examples)
    longest = max(range(8), key=lambda i: len(tokens.prompts[i]))
    _, count = model.loss_sum(tokens, np.array([longest]))
    assert count == len(tokens.targets[longest])


def test_patch_tokens_are_averaged_over_equal_blocks() -> None:
    tokens = np.random.default_rng(1).normal(size=(2, 4, 4, 6)).astype(np.float16)
    model = report_model(decoder(), ReportExamples(tokens, np.arange(2), ["", ""], ["a", "b"]), 2)
    blocks = tokens.astype(np.float64).reshape(2, 2, 2, 2, 2, 6).mean(axis=(2, 4)).reshape(2, 4, 6)
    projected = model.projector.layers(torch.from_numpy(blocks).float())
    seen = torch.ones(2, dtype=torch.bool)
    assert model.visual_count(tokens) == 4
    # Averages of four float32 numbers, through layers of gain about 1.
    torch.testing.assert_close(model.visual(tokens, seen), projected, rtol=1e-5, atol=1e-5)


def test_what_looks_like_a_special_token_in_a_text_is_only_text() -> None:
    language = decoder()
    assert language.end_id not in language.text_ids("No effusion.<end> Nodule.")
    assert language.text(language.text_ids("No effusion.<end> Nodule.")) == (
        "No effusion.<end> Nodule."
    )
    assert language.end_id not in language.after_image("Cough <end>")


@pytest.mark.parametrize(
    "text", ["naïve 9,5 µm", "Плевральный выпот слева.", "胸腔积液。", "___ XXXX"]
)
def test_any_script_is_written_and_read_back(text: str) -> None:
    language = decoder()
    assert language.text([*language.text_ids(text), language.end_id, 5]) == text


def test_a_pass_has_each_example_once_in_batches_of_similar_lengths() -> None:
    lengths = np.random.default_rng(0).lognormal(4, 0.6, size=640).astype(int)
    batches = length_buckets(lengths, 8, seed=1, which_pass=0)
    assert sorted(np.concatenate(batches)) == list(range(640))
    filled = sum(lengths[b].max() * len(b) for b in batches) / lengths.sum()
    order = np.random.default_rng(2).permutation(640).reshape(-1, 8)
    plain = sum(lengths[b].max() * len(b) for b in order) / lengths.sum()
    # 16 batches of a window cut the spread of lengths within one to about a sixteenth.
    assert filled - 1 < (plain - 1) / 4
    again = length_buckets(lengths, 8, seed=1, which_pass=0)
    assert all((a == b).all() for a, b in zip(batches, again, strict=True))
    other = length_buckets(lengths, 8, seed=1, which_pass=1)
    assert any((a != b).any() for a, b in zip(batches, other, strict=True))


def test_gradients_of_parts_are_those_of_the_whole_batch(tmp_path: Path) -> None:
    examples = pairs()
    models = [report_model(decoder(), examples) for _ in range(2)]
    stages = [TrainingStage("full", 1, 1e-3)]
    for model, parts in zip(models, (4, 1), strict=True):
        trained(model, encoded(model, examples), stages, tmp_path / str(parts), micro_batch=parts)
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        # AdamW's first step is its learning rate in the sign of the gradient: 1e-3 of change,
        # where rounding of a gradient near 0 could show.
        assert float((a - b).detach().abs().max()) < 1e-4


@pytest.mark.parametrize("stages", [
    [TrainingStage("none", 3, 1e-3), TrainingStage("full", 6, 1e-3)],
    [TrainingStage("none", 2, 1e-3), TrainingStage("lora", 7, 1e-3, lora=LORA | {"dropout": 0.1})],
])  # fmt: skip
@pytest.mark.parametrize("stop", [3, 6])
def test_an_interrupted_training_ends_with_the_same_weights_bit_for_bit(
    stages: list[TrainingStage], stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = pairs()
    whole, broken, resumed = (report_model(decoder(), examples) for _ in range(3))
    trained(whole, encoded(whole, examples), stages, tmp_path / "whole", image_dropout=0.2)

    calls = []
    plain = ReportModel.loss_sum

    def failing(self: ReportModel, *arguments: Any) -> Any:
        if self is broken and torch.is_grad_enabled():
            calls.append(0)
            if len(calls) > 2 * (stop + 1):  # two parts a step: within the second step after it
                raise KeyboardInterrupt
        return plain(self, *arguments)

    monkeypatch.setattr(ReportModel, "loss_sum", failing)
    with pytest.raises(KeyboardInterrupt):
        trained(broken, encoded(broken, examples), stages, tmp_path / "cut", image_dropout=0.2)
    done = trained(resumed, encoded(resumed, examples), stages, tmp_path / "cut", image_dropout=0.2)
    assert [check["step"] for check in done.checks] == sorted({3, 6, 9, stages[0].steps})
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_the_weights_are_those_of_the_lowest_validation_loss(tmp_path: Path) -> None:
    examples = pairs()
    model = report_model(decoder(), examples)
    tokens = encoded(model, examples)
    few = EncodedExamples(tokens.tokens, tokens.rows[:2], tokens.prompts[:2], tokens.targets[:2], 0)
    rest = EncodedExamples(
        tokens.tokens, tokens.rows[2:], tokens.prompts[2:], tokens.targets[2:], 0
    )
    done = train_report_model(
        model, few, rest, [TrainingStage("full", 40, 1e-2)], batch_size=2, micro_batch=2,
        check_every=4, image_dropout=0.0, bfloat16=False, activation_checkpointing=False, seed=0,
        out=tmp_path, word_steps=0,
    )  # fmt: skip
    losses = {check["step"]: check["validation_loss"] for check in done.checks}
    assert losses[done.step] == min(losses.values()) < losses[40]
    with torch.no_grad():
        loss, count = model.loss_sum(rest, np.arange(6))
    assert float(loss) / count == pytest.approx(losses[done.step], rel=1e-5)


def test_the_projector_learns_and_the_frozen_language_model_does_not(tmp_path: Path) -> None:
    examples = pairs()
    model = report_model(decoder(), examples)
    before = copy.deepcopy(model.state_dict())
    trained(model, encoded(model, examples), [TrainingStage("none", 2, 1e-2)], tmp_path)
    for name, value in model.state_dict().items():
        learned = name.startswith("projector.") and not name.endswith("no_image")
        assert torch.equal(value, before[name]) != learned, name


def test_stages_come_in_their_order_and_train_what_they_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = pairs()
    model = report_model(decoder(), examples)
    plain, found = ReportModel.loss_sum, []

    def noted(self: ReportModel, *arguments: Any) -> Any:
        if torch.is_grad_enabled():
            found.append(
                tuple(
                    sum(p.requires_grad for p in part.parameters())
                    for part in (self.projector.layers, self.network)
                )
            )
        return plain(self, *arguments)

    monkeypatch.setattr(ReportModel, "loss_sum", noted)
    of_projector, of_network = 4, len(list(model.network.parameters()))
    stages = [
        TrainingStage("none", 2, 1e-3),
        TrainingStage("full", 1, 1e-3, projector=False),
        TrainingStage("lora", 1, 1e-3, lora=LORA | {"targets": ("q_proj",)}),
    ]
    trained(model, encoded(model, examples), stages, tmp_path, micro_batch=4)
    # An adapter is two matrices, here for each of two blocks.
    assert found == [(of_projector, 0)] * 2 + [(0, of_network), (of_projector, 4)]


def test_a_training_of_other_settings_is_not_gone_on_with(tmp_path: Path) -> None:
    examples = pairs()
    model = report_model(decoder(), examples)
    stages = [TrainingStage("full", 3, 1e-3)]
    trained(model, encoded(model, examples), stages, tmp_path)
    longer = [TrainingStage("full", 4, 1e-3)]
    with pytest.raises(InputError, match="with other seed, stages, word_steps"):
        trained(model, encoded(model, examples), longer, tmp_path, seed=4, word_steps=25)


def test_a_loss_that_is_not_finite_stops_in_one_line(tmp_path: Path) -> None:
    examples = pairs()
    tokens = examples.tokens.copy()
    tokens[2] = np.inf
    examples = ReportExamples(tokens, examples.rows, examples.prompts, examples.targets)
    model = report_model(decoder(), examples)
    with pytest.raises(
        RunStopped, match=r"^the loss of the report model is nan at step \d"
    ) as said:
        trained(model, encoded(model, examples), [TrainingStage("full", 9, 1e-3)], tmp_path)
    assert "\n" not in str(said.value)


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> tuple[ReportModel, ReportExamples]:
    """The small decoder after it learned eight pairs by heart."""
    examples = pairs()
    model = report_model(decoder(), examples)
    stage = [TrainingStage("full", 150, 5e-3, warmup=0.1)]
    trained(
        model, encoded(model, examples), stage, tmp_path_factory.mktemp("learned"),
        batch_size=8, micro_batch=8, check_every=50, image_dropout=0.1,
    )  # fmt: skip
    return model, examples


def test_eight_pairs_are_learned_to_the_letter(learned: Any) -> None:
    model, examples = learned
    assert written(model, examples) == list(TEXTS)
    swapped = ReportExamples(
        examples.tokens, examples.rows[::-1], examples.prompts, examples.targets
    )
    assert written(model, swapped) != list(TEXTS)  # it is the image that decides


@pytest.mark.parametrize("beams", [1, 3])
def test_reports_are_the_same_one_by_one_and_in_batches(beams: int, learned: Any) -> None:
    model, examples = learned
    many = ReportExamples(  # images that it has not seen, on which it is unsure
        np.random.default_rng(5).normal(size=(8, 3, 3, 12)).astype(np.float16),
        examples.rows, examples.prompts, examples.targets,
    )  # fmt: skip
    single = written(model, many, batch_size=1, beams=beams)
    assert single == written(model, many, batch_size=8, beams=beams)
    assert len(set(single)) > 1


def test_greedy_reports_are_those_of_whole_forward_passes(learned: Any) -> None:
    """Without cache, batch or the library's loop: the likeliest token, one after another."""
    model, examples = learned
    language = model.language
    seen = torch.ones(1, dtype=torch.bool)
    for i in range(3):
        ids = language.after_image(examples.prompts[i])
        found: list[int] = []
        while len(found) < 60 and (not found or found[-1] != language.end_id):
            with torch.no_grad():
                embedded = model.embeddings(examples.tokens[[i]], [ids + found], seen)
                found.append(int(model.network(inputs_embeds=embedded).logits[0, -1].argmax()))
        one = ReportExamples(examples.tokens, np.array([i]), [examples.prompts[i]], [""])
        assert written(model, one) == [language.text(found)]


def test_a_drawn_report_depends_neither_on_its_batch_nor_on_the_run(learned: Any) -> None:
    model, examples = learned
    single = written(model, examples, batch_size=1, candidates=2, max_new_tokens=20)
    assert single == written(model, examples, batch_size=8, candidates=2, max_new_tokens=20)


def test_words_are_drawn_as_often_as_they_are_likely() -> None:
    """Within the nucleus: of 0.6, 0.3, 0.06 and 0.04 the first three, since 0.9 is below 0.95."""
    shares = np.array([0.06, 0.6, 0.04, 0.3])
    draws = 4000
    scores = torch.from_numpy(np.log(shares)).float().expand(draws, 4)
    drawn = _Drawn(range(draws), 0)(torch.zeros(draws, 0), scores).argmax(dim=1)
    expected = np.array([0.06, 0.6, 0.0, 0.3]) / 0.96
    found = np.bincount(drawn.numpy(), minlength=4) / draws
    # Four standard deviations of a share of 4,000 draws, at most 0.0316.
    assert np.abs(found - expected).max() < 4 * (0.25 / draws) ** 0.5
    assert found[2] == 0


def test_the_candidate_that_the_image_tells_most_about_is_taken(learned: Any) -> None:
    model, examples = learned
    one = ReportExamples(examples.tokens, examples.rows[:1], [""], [TEXTS[0]])
    ids = [model.language.after_image("")]
    seen = torch.ones(1, dtype=torch.bool)
    embedded = model.embeddings(one.tokens[:1], ids, seen)
    settings = GenerationConfig(
        max_new_tokens=60, do_sample=False, eos_token_id=model.language.end_id,
        pad_token_id=model.language.pad_id,
    )  # fmt: skip
    gains = {}
    for candidate in range(4):
        with torch.no_grad():
            report = model.network.generate(
                inputs_embeds=embedded, generation_config=settings,
                attention_mask=torch.ones(embedded.shape[:2]),
                logits_processor=[_Drawn(model.image_keys(one.tokens[:1]), candidate)],
            )[0].tolist()  # fmt: skip
            end = report.index(model.language.end_id) + 1
            logits = [
                model.network(
                    inputs_embeds=model.embeddings(one.tokens[:1], [ids[0] + report[:end]], shown)
                ).logits[0].double().log_softmax(dim=-1)
                for shown in (seen, ~seen)
            ]  # fmt: skip
        places = range(len(logits[0]) - end - 1, len(logits[0]) - 1)
        said = [sum(float(of[p, t]) for p, t in zip(places, report[:end], strict=True))
                for of in logits]  # fmt: skip
        gains[model.language.text(report)] = said[0] - said[1]
    assert written(model, one, candidates=4) == [max(gains, key=lambda text: gains[text])]


def test_the_projector_learns_words_and_then_may_stay(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 8, size=200)
    tokens = np.eye(8)[truth][:, None, None] + 0.1 * rng.normal(size=(200, 2, 2, 8))
    examples = ReportExamples(
        tokens.astype(np.float16), np.arange(200), [""] * 200, [TEXTS[i] for i in truth]
    )
    model = report_model(decoder(), examples)
    data = encoded(model, examples)
    model.scale_by(data.tokens, data.rows)
    gain = learn_words(model, data, data, 300, 0)
    # Eight equally frequent reports: knowing which saves ln 8 of the entropy of the report, and at
    # least that of its words' taken one by one, whose entropies add up to more.
    assert gain > np.log(8)
    few, again = report_model(decoder(), examples), report_model(decoder(), examples)
    few.scale_by(data.tokens, data.rows)
    learn_words(few, data, data, 25, 0)
    stages = [TrainingStage("full", 1, 1e-3, projector=False)]
    trained(again, data, stages, tmp_path, word_steps=25, seed=0, micro_batch=100)
    before = report_model(decoder(), examples).projector.layers.state_dict()
    for name, value in again.projector.layers.state_dict().items():
        assert torch.equal(value, few.projector.layers.state_dict()[name]), name
        assert not torch.equal(value, before[name]), name


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_merged_adapters_give_the_same_logits(name: str, tmp_path: Path) -> None:
    examples = pairs()
    model = report_model(opened(model_directory(tmp_path / name, name)), examples)
    stages = [TrainingStage("lora", 6, 1e-2, lora=LORA)]
    trained(model, encoded(model, examples), stages, tmp_path / "training")
    embedded = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        apart = model.network(inputs_embeds=embedded).logits
        merged = model.merged_network()(inputs_embeds=embedded).logits
        plain = opened(tmp_path / name).network.eval()(inputs_embeds=embedded).logits
    assert float((apart - plain).abs().max()) > 1e-3  # the adapters do something
    # W x + B A x against (W + B A) x: each output is a sum of at most 64 products, rounded at
    # 2^-24 each, in 2 blocks of 7 layers; the errors of layers add up.
    bound = 14 * 64 * 2**-24 * max(1.0, float(apart.abs().max()))
    assert float((apart - merged).abs().max()) < bound


@pytest.mark.parametrize("kind", ["decoder", "frozen", "lora", "lora whole", "full"])
def test_a_saved_model_writes_the_same_reports_and_prints_nothing(
    kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    examples = pairs()
    # Other libraries in the same process may have switched the bars off.
    transformers.utils.logging.enable_progress_bar()
    source = model_directory(tmp_path / "base", "llama")
    model = report_model(decoder() if kind == "decoder" else opened(source), examples)
    mode = {"decoder": "full", "frozen": "none", "full": "full"}.get(kind, "lora")
    stages = [TrainingStage(mode, 5, 1e-2, lora=LORA)]  # type: ignore[arg-type]
    trained(model, encoded(model, examples), stages, tmp_path / "training", check_every=5)
    capfd.readouterr()
    about = {"encoder": "selfray/phantom", "weights_sha256": "0" * 64}
    save_report_model(model, tmp_path / "saved", about=about, whole=kind == "lora whole")
    again = open_report_model(tmp_path / "saved", lambda place, text: opened(place, text))
    assert capfd.readouterr() == ("", "")  # no bars of the library
    assert transformers.utils.logging.is_progress_bar_enabled()
    texts = written(model, examples, max_new_tokens=20)
    assert written(again, examples, max_new_tokens=20) == texts
    names = {file.name for file in (tmp_path / "saved").iterdir()}
    assert ("adapter_model.safetensors" in names) == (kind == "lora")
    assert ("model.safetensors" in names) == (kind not in ("lora", "frozen"))
    assert not {name for name in names if name.endswith((".bin", ".pt", ".pkl"))}
    assert json.loads((tmp_path / "saved" / "report_model.json").read_bytes())["about"] == about


def test_adapters_of_another_language_model_are_refused(tmp_path: Path) -> None:
    examples = pairs()
    source = model_directory(tmp_path / "base", "llama")
    model = report_model(opened(source), examples)
    save_report_model(model, tmp_path / "saved", about={}, whole=False)
    model.network.lm_head.weight.data += 1
    model.network.save_pretrained(source)
    with pytest.raises(InputError, match="other weights"):
        open_report_model(tmp_path / "saved", lambda place, text: opened(place, text))


def test_a_long_target_is_cut_where_it_is_told_and_counted() -> None:
    examples = pairs()
    model = report_model(decoder(), examples)
    longest = len(model.language.text_ids(TEXTS[5]))

    def first_sentence(text: str, fits: Any) -> tuple[str, bool]:
        assert not fits(text) and fits(text.split(".")[0])
        return text.split(".")[0] + ".", True

    tokens = encode_examples(model, examples, longest, first_sentence)
    assert tokens.cut == 1
    assert model.language.text(tokens.targets[5]) == TEXTS[5].split(".")[0] + "."
    assert model.language.text(tokens.targets[0]) == TEXTS[0]
    assert all(target[-1] == model.language.end_id for target in tokens.targets)


def test_a_target_that_is_not_cut_enough_is_cut_by_tokens() -> None:
    examples = pairs()
    model = report_model(decoder(), examples)
    tokens = encode_examples(model, examples, 6, uncut)
    assert max(map(len, tokens.targets)) == 6
    assert all(target[-1] == model.language.end_id for target in tokens.targets)


def test_a_prompt_that_leaves_a_report_no_room_is_cut_and_counted(tmp_path: Path) -> None:
    examples = pairs()
    long = "Cough for days. " * 60
    examples = replace(examples, prompts=[long, *examples.prompts[1:]])
    model = report_model(opened(model_directory(tmp_path / "gpt2", "gpt2")), examples)
    tokens = encode_examples(model, examples, 30, cut_at_sentence)
    assert (tokens.cut_prompts, tokens.prompts[1]) == (1, model.language.after_image("Cough."))
    before = len(model.language.before_image())
    read = before + 9 + len(tokens.prompts[0]) + 30  # GPT-2 has 256 positions here
    sentence = len(model.language.text_ids(" Cough for days."))
    assert 256 - sentence < read <= 256
    kept = model.language.text(tokens.prompts[0])
    assert kept.endswith("Cough for days.")
    prompts, cut = fit_prompts(model, examples.prompts, 9, 246, cut_at_sentence)
    assert cut == 8 - list(examples.prompts).count("") and all(len(p) < 5 for p in prompts)


def test_tokens_of_a_long_text_are_counted_without_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever counts them is about to cut or to refuse the text."""
    language = opened(model_directory(tmp_path / "gpt2", "gpt2", model_max_length=16))
    said: list[str] = []
    logger = transformers.tokenization_utils_base.logger
    monkeypatch.setattr(logger, "warning", lambda text, *_: said.append(text))
    assert len(language.text_ids("~" * 300)) == 300
    assert not said


def test_an_empty_target_is_refused_by_its_position() -> None:
    examples = pairs()
    texts = [*examples.targets[:4], " \n", *examples.targets[5:]]
    examples = ReportExamples(examples.tokens, examples.rows, examples.prompts, texts)
    with pytest.raises(InputError, match="example 4 of the reports has an empty target"):
        encoded(report_model(decoder(), examples), examples)


def test_more_visual_tokens_than_positions_are_refused(tmp_path: Path) -> None:
    examples = pairs(side=17)
    model = report_model(opened(model_directory(tmp_path / "gpt2", "gpt2")), examples)
    with pytest.raises(InputError, match=r"knows 256 positions.*289 visual tokens"):
        encoded(model, examples)


def test_a_training_without_validation_is_refused(tmp_path: Path) -> None:
    examples = pairs()
    model = report_model(decoder(), examples)
    tokens = encoded(model, examples)
    none = EncodedExamples(tokens.tokens, tokens.rows[:0], [], [], 0)
    with pytest.raises(InputError, match="the validate split has no image with a report"):
        train_report_model(
            model, tokens, none, [TrainingStage("full", 1, 1e-3)], batch_size=2, micro_batch=2,
            check_every=1, image_dropout=0.0, bfloat16=False, activation_checkpointing=False,
            seed=0, out=tmp_path, word_steps=0,
        )  # fmt: skip


def test_bfloat16_learns_as_float32_does(tmp_path: Path) -> None:
    examples = pairs()
    losses = []
    for half in (False, True):
        model = report_model(decoder(), examples)
        done = trained(
            model, encoded(model, examples), [TrainingStage("full", 8, 5e-3)],
            tmp_path / str(half), bfloat16=half, activation_checkpointing=half, check_every=8,
            micro_batch=4,
        )  # fmt: skip
        losses.append(done.checks[-1]["validation_loss"])
    # bfloat16 rounds at 2^-8: a loss of a few nats within some percent after some steps.
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


def test_the_vicuna_recipe_runs_forward_and_back_on_its_own_sizes_without_memory() -> None:
    """Layout, loss and gradients of a Llama of Vicuna-7B's sizes, on the meta device."""
    config = report_recipe("vicuna-7b")
    language = decoder()
    with torch.device("meta"):
        network = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=32_000, hidden_size=4096, intermediate_size=11_008,
                num_hidden_layers=32, num_attention_heads=32, max_position_embeddings=4096,
            )
        )  # fmt: skip
        projector = Projector(768, 4096, config.projector_layers)
        seen = torch.ones(2, dtype=torch.bool)
        visual = projector(torch.empty(2, 37 * 37, 768), seen)
        text = network.get_input_embeddings()(torch.zeros(2, 20, dtype=torch.long))
        logits = network(
            inputs_embeds=torch.cat([visual, text], 1), logits_to_keep=torch.arange(1369, 1389)
        ).logits
        logits.sum().backward()
    assert logits.shape == (2, 20, 32_000)
    assert all(p.grad is not None for p in network.parameters() if p.ndim == 2 and p is not
               network.get_input_embeddings().weight)  # fmt: skip
    assert projector.layers[0].weight.grad.shape == (4096, 768)
    language.template = config.prompt_template
    assert "ASSISTANT:" in language.tokenizer.decode(language.after_image("Describe."))
