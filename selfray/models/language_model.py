"""Causal language models of Hugging Face's layout, and how a prompt with an image is laid out.

Files are read from disk only: no network, no pickled weights, no code that comes with a model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from selfray.errors import InputError, one_line
from selfray.models.huggingface import read_json
from selfray.models.language_memory import LanguageUse, require_memory
from selfray.models.language_model_files import (
    converted_gguf,
    hash_of,
    network_without_weights,
    quiet,
    read_config,
    read_network,
    transformers_library,
    weight_files,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IMAGE = "{image}"
PROMPT = "{prompt}"
PLAIN_TEMPLATE = "{image}\n{prompt}\n"
"""The layout for a language model that has no chat template and was given none."""

# Models round their vocabulary up, by 2 % at most among known ones (Phi-2: 50,295 of 51,200).
_LEAST_SHARE = 0.9

# Files that transformers makes a tokenizer from; tokenizer_config.json alone holds no vocabulary.
_VOCABULARIES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tekken.json")


@dataclass
class LanguageModel:
    """A causal language model with its tokenizer.

    Attributes:
        network: Takes `inputs_embeds`.
        tokenizer: Of the same vocabulary.
        template: Text with `{image}` once and `{prompt}` once, special tokens written out.
        end_id: Token that ends a report.
        pad_id: Fills places that nothing looks at; the end token where the tokenizer has none,
            which harms nothing, because no loss or mask is derived from it.
        source: Where the weights are from, as given; empty for the small decoder.
        sha256: Of the weights of `source`; empty for the small decoder.
        notes: What was missing and what is done instead, a line each.
    """

    network: PreTrainedModel
    tokenizer: Any  # PreTrainedTokenizerBase, whose types allow for every way to call it
    template: str
    end_id: int
    pad_id: int
    source: str = ""
    sha256: str = ""
    notes: tuple[str, ...] = field(default=())

    def before_image(self) -> list[int]:
        """Tokens before the visual tokens: the same in every example."""
        return self._ids(self.template.split(IMAGE)[0].replace(PROMPT, ""))

    def after_image(self, prompt: str) -> list[int]:
        """Tokens from the visual tokens to the report.

        Args:
            prompt: Plain text; what looks like a special token in it is only text.
        """
        before, after = self.template.split(IMAGE)[1].split(PROMPT)
        return self._ids(before) + self.text_ids(prompt) + self._ids(after)

    def prompt_room(self, visual: int, report: int) -> int | None:
        """Tokens that a prompt may have, so that a report ends within the positions.

        Args:
            visual: Visual tokens of the image.
            report: Tokens of the report, at most.

        Returns:
            >= 0; None where positions have no end.
        """
        known = getattr(self.network.config, "max_position_embeddings", None)
        around = len(self.before_image()) + len(self.after_image(""))
        return None if known is None else max(0, known - around - visual - report)

    def text_ids(self, text: str) -> list[int]:
        """Tokens of plain text, none of them special."""
        # Not verbose: who asks for the tokens of a long text is about to cut or to refuse it.
        return self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, verbose=False
        )["input_ids"]

    def ended(self, ids: list[int]) -> list[int]:
        """Tokens up to and with the end token, without what fills up after it."""
        return ids[: ids.index(self.end_id) + 1] if self.end_id in ids else ids

    def text(self, ids: list[int]) -> str:
        """The text of tokens up to the end token."""
        ids = ids[: ids.index(self.end_id)] if self.end_id in ids else ids
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def open_language_model(
    source: Path, *, template: str, cache: Path, use: LanguageUse
) -> LanguageModel:
    """Open a causal language model from disk, on the CPU.

    Args:
        source: A directory with `config.json`, safetensors and the tokenizer's files, or a GGUF
            file.
        template: Text with `{image}` and `{prompt}`; empty for the model's chat template, or
            `PLAIN_TEMPLATE` where it has none.
        cache: Where a GGUF file is converted to, once.
        use: What is done with it, for which there must be memory before weights are read.

    Raises:
        InputError: It is not there, damaged, of an unknown kind, has pickled weights only, needs
            code of its own, has another tokenizer, no token that ends a text, or no layer of a name
            that adapters are asked for; or it does not fit into memory.
    """
    library = transformers_library(str(source))

    def fits(place: Path, network: PreTrainedModel) -> None:
        require_memory(network, place, use)

    with quiet(library):
        directory = converted_gguf(source, cache, fits) if source.suffix == ".gguf" else source
        config = read_config(directory)
        files = weight_files(directory)
        empty = network_without_weights(config, directory)
        fits(directory, empty)
        tokenizer = _read_tokenizer(directory)
        _require_same_vocabulary(tokenizer, empty, directory)
        end_id = _end_id(tokenizer, directory)
        network = read_network(config, directory, use.dtype)
        _require_causal(network, directory)
    notes = []
    pad_id = tokenizer.pad_token_id
    if pad_id is None or pad_id == end_id:
        pad_id = end_id
        notes.append("no padding token of its own: the end token fills up, unseen by loss and mask")
    if not template:
        template = _chat_template(tokenizer) or PLAIN_TEMPLATE
        if template == PLAIN_TEMPLATE:
            notes.append("no chat template: image and prompt stand on lines of their own")
    _require_template(template)
    return LanguageModel(
        network, tokenizer, template, end_id, pad_id, str(source), hash_of(files), tuple(notes)
    )


@torch.inference_mode()
def _require_causal(network: PreTrainedModel, directory: Path) -> None:
    """Refuse weights that are not finite, and a network whose tokens look ahead, as BERT's do.

    Read by a network that looks ahead, a report would be copied in training and lost in writing.
    """
    for name, tensor in network.named_parameters():
        if not tensor.isfinite().all():
            raise InputError(f"{directory}: weights of {name} are not finite. Copy the model anew.")
    # Two texts that differ in their last token alone.
    ids = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 4]])
    logits = network(input_ids=ids, use_cache=False).logits[:, :-1].float()
    # Beyond what rounding may tell rows of a batch apart by, hundreds of its units.
    rounding = 1e-4 if network.dtype == torch.float32 else 5e-2
    if (logits[0] - logits[1]).abs().max() > rounding * logits.std():
        raise InputError(
            f"{directory} is no causal language model: what it says of a word depends on the words "
            "after it. Give one that generates text, such as Llama, Qwen or GPT."
        )


def _read_tokenizer(directory: Path) -> Any:
    from transformers import AutoTokenizer

    if not any(any(directory.glob(pattern)) for pattern in _VOCABULARIES):
        raise InputError(
            f"{directory} has no tokenizer: tokenizer.json is missing (older models: "
            "tokenizer.model, or vocab.json and merges.txt). Copy it and tokenizer_config.json "
            "from where config.json came from: they are published beside it."
        )
    try:
        return AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    except Exception as cause:  # the tokenizers library raises nothing narrower
        raise InputError(
            f"{directory}: its tokenizer cannot be read: {one_line(cause)}. Copy the tokenizer's "
            "files of the same model there."
        ) from cause


def _require_same_vocabulary(tokenizer: Any, network: Any, directory: Path) -> None:
    rows, known = network.get_input_embeddings().weight.shape[0], len(tokenizer)
    if known > rows or known < _LEAST_SHARE * rows:
        raise InputError(
            f"{directory}: the tokenizer knows {known} tokens and the language model has {rows}: "
            "they are of two models. Take both from the same one."
        )


def _end_id(tokenizer: Any, directory: Path) -> int:
    end = tokenizer.eos_token_id
    if end is None:
        # From the file: the library's class has a default that need not be the model's.
        end = read_json(directory / "config.json").get("eos_token_id")
        end = end[0] if isinstance(end, list) else end
    if end is None:
        raise InputError(
            f"{directory}: neither the tokenizer nor config.json has an end token (eos_token), "
            "without which no report ends. Name one in tokenizer_config.json."
        )
    return int(end)


def _chat_template(tokenizer: Any) -> str:
    """The model's chat template with image and prompt as one user's words; empty without one."""
    if not tokenizer.chat_template:
        return ""
    said = [{"role": "user", "content": f"{IMAGE}\n{PROMPT}"}]
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True))
    except TemplateError as cause:
        raise InputError(
            f"the chat template of the language model cannot be used ({one_line(cause)}). Give one "
            "with {image} and {prompt} by --report.prompt-template."
        ) from cause


def _require_template(template: str) -> None:
    if (template.count(IMAGE), template.count(PROMPT)) != (1, 1) or template.index(
        IMAGE
    ) > template.index(PROMPT):
        raise InputError(
            f"the prompt template must have {IMAGE} once and, after it, {PROMPT} once. Set "
            "--report.prompt-template."
        )
