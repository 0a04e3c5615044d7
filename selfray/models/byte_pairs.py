"""Tokenizers of byte pairs that are learned from reports: no text of any script is unknown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from selfray.models.language_model_files import transformers_library

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def train_byte_pairs(
    texts: Iterable[str], vocabulary: int, special: Sequence[str], *, exact: bool
) -> Tokenizer:
    """Learn a tokenizer of pairs of bytes.

    Args:
        texts: To learn from.
        vocabulary: Number of tokens, at most; the 256 bytes and the special ones are always there.
        special: Tokens that no text has, which get the first numbers.
        exact: Whether tokens give back their text to the letter, as writing needs; otherwise
            capitals count as small letters, and a word is the same at the beginning of a text.

    Reference:
        Sennrich et al., Neural machine translation of rare words with subword units, ACL 2016;
        on bytes as in Radford et al., Language models are unsupervised multitask learners, 2019.
    """
    transformers_library("a tokenizer of reports")  # which needs the library of tokenizers
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    if exact:
        tokenizer.decoder = decoders.ByteLevel()  # type: ignore
    else:
        normal = [normalizers.NFKC(), normalizers.Lowercase()]
        tokenizer.normalizer = normalizers.Sequence(normal)  # type: ignore
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=not exact)  # type: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=2,  # of what occurs once, nothing can be learned
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
