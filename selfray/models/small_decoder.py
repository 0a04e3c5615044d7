"""A small language model to train from scratch, with a tokenizer learned from the reports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from selfray.errors import InputError
from selfray.models.byte_pairs import train_byte_pairs
from selfray.models.language_model import LanguageModel
from selfray.models.language_model_files import transformers_library

_PAD, _END = "<pad>", "<end>"
_LONGEST = 4096  # positions; rotary embeddings cost nothing for those that are not used
_FEED_FORWARD = 8 / 3  # widths, rounded up to 32: a gated layer as large as one of 4 without gate


def small_decoder(
    texts: Sequence[str], *, width: int, depth: int, heads: int, vocabulary: int, seed: int
) -> LanguageModel:
    """A Llama with random weights and byte pairs of the texts.

    Args:
        texts: Of the training reports, prompts included; not empty.
        width: Divisible by 2 * heads.
        depth: Blocks.
        heads: Of attention.
        vocabulary: Tokens at most, >= 258: the bytes, padding and the end.
        seed: Of the weights.

    Raises:
        InputError: No text.

    Reference:
        Touvron et al., Llama 2, arXiv 2307.09288.
    """
    if not any(text.strip() for text in texts):
        raise InputError("the training reports hold no text, from which no decoder can learn.")
    library = transformers_library("the small decoder")
    tokenizer = _trained_tokenizer(texts, vocabulary)
    end, pad = tokenizer.convert_tokens_to_ids([_END, _PAD])
    config = library.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=-(-int(width * _FEED_FORWARD) // 32) * 32,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        max_position_embeddings=_LONGEST,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=pad,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = library.LlamaForCausalLM(config)
    return LanguageModel(network, tokenizer, "{image}{prompt}\n", end, pad)


def _trained_tokenizer(texts: Sequence[str], vocabulary: int) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=train_byte_pairs(texts, vocabulary, (_PAD, _END), exact=True),
        pad_token=_PAD,
        eos_token=_END,
        clean_up_tokenization_spaces=False,
    )
