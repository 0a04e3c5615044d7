"""Language models from disk: what is read, what is refused, and what each refusal says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from report_model_data import CHAT, TEXTS, decoder, model_directory, opened

from selfray.errors import InputError
from selfray.models import language_memory
from selfray.models.language_memory import LanguageUse, MemoryPlan, plan_memory
from selfray.models.language_model import PLAIN_TEMPLATE, open_language_model
from selfray.models.language_model_files import network_without_weights, read_config
from selfray.models.small_decoder import small_decoder

CPU = torch.device("cpu")
# config.json of lmsys/vicuna-7b-v1.5.
VICUNA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096,
    "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "torch_dtype": "float16",
}  # fmt: skip


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return model_directory(tmp_path / "llama", "llama")


def edit(file: Path, **changed: Any) -> None:
    content = json.loads(file.read_bytes()) | changed
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def said(directory: Path, template: str = "") -> str:
    with pytest.raises(InputError) as error:
        opened(directory, template)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_chat_template_says_where_image_and_prompt_stand(tmp_path: Path) -> None:
    language = opened(model_directory(tmp_path / "chat", "llama", chat_template=CHAT))
    assert language.template == "<user>{image}\n{prompt}\n<reply>"
    assert not language.notes
    ids = language.before_image() + language.after_image("Cough.")
    assert language.tokenizer.decode(ids) == "<user>\nCough.\n<reply>"


def test_without_chat_template_image_and_prompt_stand_on_lines_and_it_is_said(llama: Path) -> None:
    language = opened(llama)
    assert language.template == PLAIN_TEMPLATE
    assert any("no chat template" in note for note in language.notes)


def test_a_given_template_counts_more_than_the_models(tmp_path: Path) -> None:
    directory = model_directory(tmp_path / "chat", "llama", chat_template=CHAT)
    assert (
        opened(directory, "USER: {image} {prompt} BOT:").template == "USER: {image} {prompt} BOT:"
    )


@pytest.mark.parametrize(
    "template", ["{image}", "{prompt}", "{prompt} {image}", "{image}{image}{prompt}"]
)
def test_a_template_without_both_places_is_refused(template: str, llama: Path) -> None:
    assert "must have {image} once and, after it, {prompt} once" in said(llama, template)


def test_without_padding_token_the_end_token_fills_up_and_it_is_said(tmp_path: Path) -> None:
    language = opened(model_directory(tmp_path / "nopad", "llama", pad_token=None))
    assert language.pad_id == language.end_id
    assert any("no padding token" in note for note in language.notes)


def test_without_end_token_it_is_refused(llama: Path) -> None:
    edit(llama / "tokenizer_config.json", eos_token=None)
    edit(llama / "config.json", eos_token_id=None)
    assert "neither the tokenizer nor config.json has an end token" in said(llama)


def test_the_end_token_of_the_configuration_is_taken_where_the_tokenizer_has_none(
    llama: Path,
) -> None:
    edit(llama / "tokenizer_config.json", eos_token=None)
    assert opened(llama).end_id == decoder().end_id


@pytest.mark.parametrize("vocabulary", [600, 258])
def test_the_tokenizer_of_another_model_is_refused(vocabulary: int, llama: Path) -> None:
    texts = [*TEXTS, *(f"word{i:03d} word{i:03d}" for i in range(500))]
    other = small_decoder(texts, width=32, depth=1, heads=2, vocabulary=vocabulary, seed=0)
    other.tokenizer.save_pretrained(llama)
    known = len(other.tokenizer)
    assert f"the tokenizer knows {known} tokens and the language model has 320" in said(llama)


def test_pickled_weights_are_refused(llama: Path) -> None:
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    assert "pickled weights only (pytorch_model.bin)" in said(llama)


def test_missing_weights_and_a_missing_part_are_said(llama: Path) -> None:
    (llama / "model.safetensors").unlink()
    assert "no model.safetensors" in said(llama)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (llama / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "names 1 files, of which 1 are missing" in said(llama)


def test_damaged_weights_and_those_of_another_configuration_are_refused(llama: Path) -> None:
    edit(llama / "config.json", num_hidden_layers=3)
    assert "parameters are missing" in said(llama)
    edit(llama / "config.json", num_hidden_layers=2, intermediate_size=96)
    assert "of another shape" in said(llama)
    weights = (llama / "model.safetensors").read_bytes()
    (llama / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert "Copy it anew" in said(llama)


@pytest.mark.parametrize(("kind", "message"), [
    ("dinov2", "no causal language model"), ("mine", "code that comes with a model is not run"),
    (None, "model_type is None"),
])  # fmt: skip
def test_a_network_that_is_no_known_language_model_is_refused(
    kind: str | None, message: str, llama: Path
) -> None:
    edit(llama / "config.json", model_type=kind, auto_map={"AutoModelForCausalLM": "evil.Model"})
    (llama / "evil.py").write_text("raise SystemExit('it ran')")
    assert message in said(llama)


def test_code_beside_a_known_network_is_not_run(llama: Path) -> None:
    edit(llama / "config.json", auto_map={"AutoModelForCausalLM": "evil.Model"})
    (llama / "evil.py").write_text("raise SystemExit('it ran')")
    assert type(opened(llama).network).__name__ == "LlamaForCausalLM"


def test_a_directory_that_is_none_and_a_damaged_gguf_file_are_refused(tmp_path: Path) -> None:
    assert "config.json is missing" in said(tmp_path / "nothing")
    assert "is missing. Give a GGUF file" in said(tmp_path / "nothing.gguf")
    (tmp_path / "empty").mkdir()
    assert "config.json is missing" in said(tmp_path / "empty")


@pytest.mark.parametrize("content", [b"", b"GG", b"PK\3\4 and more"])
def test_a_file_that_is_no_gguf_is_refused_and_nothing_is_made(
    content: bytes, tmp_path: Path
) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "mine.gguf").write_bytes(content)
    assert f"is no GGUF file: it begins with {content[:4]!r}" in said(tmp_path / "mine.gguf")
    assert list(tmp_path.iterdir()) == [tmp_path / "mine.gguf"]


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_a_gguf_file_that_is_cut_off_is_refused_and_nothing_is_made(
    share: float, tmp_path: Path
) -> None:
    gguf = pytest.importorskip("gguf")
    file = tmp_path / "cut.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_tensor("token_embd.weight", np.ones((64, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    whole = file.read_bytes()
    gguf.GGUFReader(file)  # whole, it is read
    file.write_bytes(whole[: int(share * len(whole))])
    assert "is cut off, damaged, or of a kind" in said(file)
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("left", [(), ("tokenizer_config.json",)])
def test_a_missing_tokenizer_is_said_with_the_file_and_where_it_comes_from(
    name: str, left: tuple[str, ...], tmp_path: Path
) -> None:
    directory = model_directory(tmp_path / "model", name)
    for file in directory.glob("tokenizer*"):
        if file.name not in left:
            file.unlink()
    message = said(directory)
    assert "has no tokenizer: tokenizer.json is missing" in message
    assert "from where config.json came from" in message
    assert "backend" not in message


@pytest.mark.parametrize(("file", "content"), [
    ("tokenizer.json", "{"), ("tokenizer.json", "[]"), ("tokenizer_config.json", "[]"),
    ("tokenizer.json", '{"version": "1.0", "model": {"type": "Nope"}}'),
])  # fmt: skip
def test_a_damaged_tokenizer_is_said(file: str, content: str, llama: Path) -> None:
    (llama / file).write_text(content)
    assert "its tokenizer cannot be read" in said(llama)


@pytest.mark.parametrize("content", ['{"weight_map": ["a"]}', '{"weight_map": {}}', "{}"])
def test_an_index_that_names_no_file_is_refused(content: str, llama: Path) -> None:
    (llama / "model.safetensors").unlink()
    (llama / "model.safetensors.index.json").write_text(content)
    assert "names 0 files" in said(llama)


def test_a_text_encoder_is_no_language_model(llama: Path) -> None:
    config = transformers.CLIPTextConfig(
        vocab_size=320, hidden_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    config.save_pretrained(llama)
    assert "no causal language model" in said(llama)


def vicuna(directory: Path) -> Path:
    """Its sizes, without weights: a file that takes no room on disk."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(VICUNA))
    with (directory / "model.safetensors").open("wb") as file:
        file.truncate(13_476_839_424)
    return directory


def test_a_model_too_big_is_refused_before_its_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parameters are Vicuna-7B's, 6.74 billion; AdamW of float32 takes 16 bytes each."""
    directory = vicuna(tmp_path / "vicuna")
    monkeypatch.setattr(language_memory, "free_memory", lambda _device: 24_000_000_000)
    use = LanguageUse(
        CPU, tokens=2048, bfloat16=True, trained="full", activation_checkpointing=True
    )
    with pytest.raises(InputError) as error:
        open_language_model(directory, template="", cache=tmp_path, use=use)
    message = str(error.value)
    assert "27.0 GB for weights, 80.9 GB for gradients and the optimizer" in message
    assert "cpu has 24.0 GB free" in message
    assert "--report.language.trained lora" in message and "--report.micro-batch" in message
    assert "\n" not in message


def test_writing_keeps_keys_and_values_and_no_gradients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Vicuna-7B: 32 blocks of a key and a value of 4096 numbers of 2 bytes are 0.5 MiB a token."""
    directory = vicuna(tmp_path / "vicuna")
    network = network_without_weights(read_config(directory), directory)
    uses = [LanguageUse(CPU, tokens, torch.bfloat16, bfloat16=True) for tokens in (0, 1000)]
    none, some = (plan_memory(network, use) for use in uses)
    assert none == MemoryPlan(2 * 6_738_415_616, 0, 0)
    assert some.weights == none.weights and some.optimizer == 0
    a_block_and_logits = 1000 * (34 * 4096 + 8 * 32_000)
    assert some.activations == 1000 * 2**19 + a_block_and_logits
    monkeypatch.setattr(language_memory, "free_memory", lambda _device: 12_000_000_000)
    with pytest.raises(
        InputError, match=r"13\.5 GB for weights, 0\.9 GB for keys, values"
    ) as error:
        open_language_model(directory, template="", cache=tmp_path, use=uses[1])
    assert "--report" not in str(error.value)  # nothing is trained


def test_keys_and_values_are_planned_as_the_library_keeps_them(tmp_path: Path) -> None:
    for name in ("llama", "qwen2", "gpt2", "opt"):
        network = opened(model_directory(tmp_path / name, name)).network
        with torch.no_grad():
            cache = network(torch.zeros(3, 10, dtype=torch.long), use_cache=True).past_key_values
        kept = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
        planned = plan_memory(network, LanguageUse(CPU, tokens=30)).activations
        config = network.config
        others = 30 * (34 * 2 * config.hidden_size + 8 * config.vocab_size)
        assert planned - others == kept, name


def test_adapters_of_layers_that_are_not_there_are_refused_before_weights_are_read(
    tmp_path: Path,
) -> None:
    use = LanguageUse(CPU, 0, trained="lora", lora_rank=4, lora_targets=("q_proj", "v_prj"))
    with pytest.raises(InputError, match=r"'v_prj', and no linear .* Did you mean 'v_proj'"):
        open_language_model(vicuna(tmp_path / "vicuna"), template="", cache=tmp_path, use=use)


def test_adapters_and_gradients_are_planned_as_peft_makes_them(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    for name, targets in (("llama", ("all-linear",)), ("llama", ("self_attn.q_proj", "v_proj")),
                          ("gpt2", ("all-linear",))):  # fmt: skip
        directory = tmp_path / f"{name}-{len(targets)}"
        if not directory.exists():
            model_directory(directory, name)
        config = read_config(directory)
        empty = network_without_weights(config, directory)
        use = LanguageUse(
            CPU, 0, torch.bfloat16, bfloat16=True, trained="lora", lora_rank=4, lora_targets=targets
        )
        plan = plan_memory(empty, use)
        real = opened(directory).network
        base = sum(p.numel() for p in real.parameters())
        modules = "all-linear" if targets == ("all-linear",) else list(targets)
        adapted = get_peft_model(real, LoraConfig(r=4, target_modules=modules))
        learned = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        assert plan == MemoryPlan(2 * base + 4 * learned, 12 * learned, 0)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Qwen2ForCausalLM"])
def test_planned_activations_are_about_those_that_pytorch_keeps(name: str) -> None:
    """What one block more saves for the backward pass, counted by PyTorch's own hooks."""
    kept = []
    for depth in (1, 2):
        kind = getattr(transformers, name)
        config = kind.config_class(
            vocab_size=16, hidden_size=256, intermediate_size=688, num_hidden_layers=depth,
            num_attention_heads=4, num_key_value_heads=4, bos_token_id=None, eos_token_id=1,
            pad_token_id=0,
        )  # fmt: skip
        network = kind(config)
        weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
        storages: dict[int, torch.UntypedStorage] = {}

        def pack(tensor: torch.Tensor, into: dict = storages, leave: set = weights) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in leave:
                into[storage.data_ptr()] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            network(torch.zeros(2, 128, dtype=torch.long))
        plan = plan_memory(network, LanguageUse(CPU, tokens=256, trained="full"))
        kept.append((sum(s.nbytes() for s in storages.values()), plan.activations))
    measured, planned = (kept[1][i] - kept[0][i] for i in (0, 1))
    assert 0.75 < planned / measured < 1.5


def test_a_network_that_looks_ahead_is_no_language_model(llama: Path) -> None:
    """BERT's weights load as a causal model without its mask, and would see what they write."""
    config = transformers.BertConfig(
        vocab_size=len(json.loads((llama / "tokenizer.json").read_bytes())["model"]["vocab"]) + 2,
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.BertForMaskedLM(config).save_pretrained(llama)
    edit(llama / "config.json", eos_token_id=1)
    assert "no causal language model" in said(llama)


def test_weights_that_are_not_finite_are_named(llama: Path) -> None:
    network = transformers.AutoModelForCausalLM.from_pretrained(llama)
    network.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    network.save_pretrained(llama)
    assert "weights of model.layers.0.mlp.up_proj.weight are not finite" in said(llama)


def test_a_chat_template_that_fails_is_said(tmp_path: Path) -> None:
    directory = model_directory(tmp_path / "chat", "llama", chat_template="{{ nothing() }}")
    assert "chat template of the language model cannot be used" in said(directory)
