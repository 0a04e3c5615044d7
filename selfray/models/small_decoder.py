"""A small language model to train from scratch, with a tokenizer learned from the reports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from selfray.errors import InputError
from selfray.models.language_model import LanguageModel
from selfray.models.language_model_files import transformers_library

_PAD, _END = "<pad>", "<end>"
_LONGEST = 4096  # positions; rotary embeddings cost nothing for those that are not used
_FEED_FORWARD = 8 / 3  # widths, rounded up to 32: a gated layer as large as one of 4 without gate


def small_decoder(
    texts: Sequence[str], *, width: int, depth: int, heads: int, vocabulary: int, seed: int
) -> LanguageModel:
    """A Llama with random weights and byte-level byte pairs of the texts.

    Byte-level: any script can be written and read back exactly.

    Args:
        texts: Of the training reports, prompts included; not empty.
        width: Divisible by 2 * heads.
        depth: Blocks.
        heads: Of attention.
        vocabulary: Tokens at most, >= 258: the bytes, padding and the end.
        seed: Of the weights.

    Raises:
        InputError: No text, or a width that the heads do not divide.

    Reference:
        Touvron et al., Llama 2, arXiv 2307.09288; Sennrich et al., ACL 2016 (byte pairs).
    """
    if not any(text.strip() for text in texts):
        raise InputError("the training reports hold no text, from which no decoder can learn.")
    if width % (2 * heads):
        raise InputError(
            f"decoder.width {width} is no multiple of 2 * decoder.heads {heads}. Change one."
        )
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
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=2,
        special_tokens=[_PAD, _END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=_PAD,
        eos_token=_END,
        clean_up_tokenization_spaces=False,
    )
