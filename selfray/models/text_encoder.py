"""Text encoders for language supervision: a small one from random weights, or a directory's.

Both are models of Hugging Face's transformers with their tokenizer, and written as such.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_model
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from selfray.errors import InputError, one_line
from selfray.models.byte_pairs import train_byte_pairs
from selfray.models.huggingface import WEIGHTS
from selfray.models.language_model_files import quiet, transformers_library

TOKENIZER = "tokenizer.json"
_PAD, _FIRST, _LAST = "[PAD]", "[CLS]", "[SEP]"
_SPECIAL = (_PAD, _FIRST, _LAST)
_VOCABULARIES = (TOKENIZER, "vocab.txt", "vocab.json", "*.model")


class Tokens(NamedTuple):
    """Texts as numbers.

    Attributes:
        ids: int64 [B, T], shorter texts padded.
        mask: int64 [B, T], 1 where a token is, 0 where padding.
    """

    ids: Tensor
    mask: Tensor

    def part(self, which: slice) -> Tokens:
        """Some of the texts."""
        return Tokens(self.ids[which], self.mask[which])

    def to(self, device: torch.device) -> Tokens:
        """The same on a device."""
        return Tokens(self.ids.to(device), self.mask.to(device))


class TextEncoder(nn.Module):
    """A text model and its tokenizer; a text is the mean of its tokens in the last layer.

    The mean is what encoders and decoders, with or without a token for the whole, all have.

    Args:
        model: Of transformers, with `last_hidden_state`.
        tokenizer: Of transformers.
        max_tokens: Longest text, with the tokens that begin and end it.
    """

    def __init__(self, model: Any, tokenizer: Any, max_tokens: int) -> None:
        super().__init__()
        self.model = model
        self.width: int = model.config.hidden_size
        self.max_tokens = max_tokens
        self._tokenizer = tokenizer

    def tokens(self, texts: Sequence[str]) -> Tokens:
        """Texts as numbers, cut after `max_tokens`."""
        pad = self._tokenizer.pad_token_id
        # Of an empty text some tokenizers make nothing, and a mean needs something.
        found = [torch.tensor(self._ids(text)[: self.max_tokens] or [pad]) for text in texts]
        mask = [torch.ones_like(ids) for ids in found]
        return Tokens(pad_sequence(found, True, pad), pad_sequence(mask, True))

    def fits(self, text: str) -> bool:
        """Whether a text is taken whole."""
        return len(self._ids(text)) <= self.max_tokens

    def _ids(self, text: str) -> list[int]:
        # Without padding and truncation: they are a state of the tokenizer that all threads share.
        # Not to warn of long texts: that they are long is what is asked.
        return self._tokenizer(text, verbose=False)["input_ids"]

    def forward(self, tokens: Tokens) -> Tensor:
        """[B, D] of B texts."""
        found = self.model(input_ids=tokens.ids, attention_mask=tokens.mask)
        weights = tokens.mask.unsqueeze(-1).to(found.last_hidden_state.dtype)
        return (found.last_hidden_state * weights).sum(1) / weights.sum(1).clamp(min=1)

    def save(self, directory: Path) -> None:
        """Write what `open_text_encoder` and transformers read.

        Args:
            directory: Exists.
        """
        self.model.config.architectures = [type(self.model).__name__]
        self.model.config.save_pretrained(directory)
        save_model(self.model, str(directory / WEIGHTS), metadata={"format": "pt"})
        self._tokenizer.save_pretrained(directory)


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> str:
    """Learn a tokenizer of byte pairs in small letters, with a token at either end of a text.

    Args:
        texts: To learn from.
        vocabulary: Number of tokens, at most; see `train_byte_pairs`.

    Returns:
        The content of a tokenizer.json.
    """
    tokenizer = train_byte_pairs(texts, vocabulary, _SPECIAL, exact=False)
    from tokenizers import processors

    tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore
        single=f"{_FIRST} $A {_LAST}",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (_FIRST, _LAST)],
    )
    return tokenizer.to_str(pretty=True)


def small_text_encoder(
    tokenizer: str, *, width: int, depth: int, heads: int, max_tokens: int, seed: int
) -> TextEncoder:
    """A BERT without dropout, from random weights.

    Args:
        tokenizer: From `train_tokenizer`.
        width: Of a token, a multiple of `heads`.
        depth: Number of blocks.
        heads: Attention heads a block.
        max_tokens: Longest text.
        seed: Of the weights.

    Raises:
        InputError: The tokenizer is damaged, or transformers is not installed.

    Reference:
        Devlin et al., BERT, NAACL 2019.
    """
    transformers = transformers_library("a text encoder")
    from tokenizers import Tokenizer

    try:
        own = Tokenizer.from_str(tokenizer)
    except Exception as cause:  # the library raises nothing narrower
        raise InputError(f"{TOKENIZER} is damaged ({cause}). Restore it from a copy.") from cause
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=own, pad_token=_PAD, cls_token=_FIRST, sep_token=_LAST,
        model_max_length=max_tokens,
    )  # fmt: skip
    config = transformers.BertConfig(
        vocab_size=own.get_vocab_size(),
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        max_position_embeddings=max_tokens,
        type_vocab_size=1,
        pad_token_id=own.token_to_id(_PAD),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.BertModel(config, add_pooling_layer=False)
    return TextEncoder(model, wrapped, max_tokens)


def open_text_encoder(directory: Path, max_tokens: int | None = None) -> TextEncoder:
    """A text model of Hugging Face's layout: an encoder (BERT) or a decoder (GPT), safetensors.

    A tokenizer without a pad token pads with its last, unknown or first token: padding is masked.

    Args:
        directory: Holds config.json, model.safetensors and a tokenizer.
        max_tokens: Longest text; None: what the model allows.

    Raises:
        InputError: No such directory, no safetensors, a model of another kind, code of its own, no
            tokenizer, or a `max_tokens` that the model does not allow.
    """
    transformers = transformers_library(str(directory))
    if not (directory / "config.json").is_file():
        raise InputError(
            f"{directory} is no Hugging Face model: config.json is missing. Give its directory."
        )
    if not any(directory.glob("*.safetensors")):
        raise InputError(
            f"{directory} has no *.safetensors, and pickled weights are not read. Convert them "
            "with transformers' save_pretrained."
        )
    local = {"local_files_only": True, "trust_remote_code": False}
    try:
        with quiet(transformers):
            config = transformers.AutoConfig.from_pretrained(directory, **local)
            _require_text_model(directory, config)
            model = transformers.AutoModel.from_pretrained(
                directory, config=config, dtype=torch.float32, use_safetensors=True, **local
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(directory, **local)
        _require_same_vocabulary(directory, model, tokenizer)
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError) as cause:
        raise InputError(
            f"{directory} cannot be opened as a text model ({one_line(cause)}). Give one of BERT's "
            "or GPT's kind with its tokenizer."
        ) from cause
    if tokenizer.pad_token_id is None:
        last = tokenizer.eos_token or tokenizer.unk_token
        tokenizer.pad_token = last or tokenizer.convert_ids_to_tokens(0)
    most = _longest(config, tokenizer)
    if max_tokens is not None and max_tokens > most:
        raise InputError(
            f"text.max_tokens is {max_tokens}, and {directory} takes {most} at most. Lower it."
        )
    return TextEncoder(model, tokenizer, max_tokens or most)


def _require_text_model(directory: Path, config: Any) -> None:
    whole = not getattr(config, "is_encoder_decoder", False)
    text = whole and not hasattr(config, "vision_config")
    if not text or not isinstance(getattr(config, "hidden_size", None), int):
        raise InputError(
            f"{directory} holds a model of kind {config.model_type}, not a text encoder or a "
            "decoder alone. Give one of BERT's or GPT's kind."
        )


def _require_same_vocabulary(directory: Path, model: Any, tokenizer: Any) -> None:
    rows, known = model.get_input_embeddings().num_embeddings, len(tokenizer)
    # Without files, transformers makes a tokenizer that knows no word.
    if known > rows or not any(any(directory.glob(name)) for name in _VOCABULARIES):
        raise InputError(
            f"{directory}: its tokenizer is missing or another model's ({known} tokens, the model "
            f"has {rows}). Copy the tokenizer's files of the same model there."
        )


def _longest(config: Any, tokenizer: Any) -> int:
    """Tokens that model and tokenizer allow; models without absolute positions tell no number."""
    positions = getattr(config, "max_position_embeddings", None) or 8192
    return min(positions, tokenizer.model_max_length)
