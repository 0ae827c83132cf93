"""Prompts -> token ids and EOS positions, by the `tokenizers` library on the bundle's tokenizer.json."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from engine.bundle import Bundle
from engine.errors import ClipmillError


def load_tokenizer(bundle: Bundle) -> Tokenizer:
    """The bundle's tokenizer, without the padding and truncation that tokenizer.json may ask for."""
    if not bundle.has_tokenizer:
        raise ClipmillError(
            f"the bundle {bundle.name} has no tokenizer ({bundle.source.model} has no vocabulary), so it cannot embed "
            "prompts; name another with --model"
        )
    tokenizer = Tokenizer.from_file(str(bundle.path / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def tokenize(
    tokenizer: Tokenizer, prompts: Sequence[str], context_length: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(input_ids (N, L), eos_position (N,)), both int64; L is the longest prompt's number of tokens.

    Prompts are padded with the EOS token, which the causal mask keeps from mattering. A prompt longer than
    `context_length` is a ClipmillError: cut silently, it would mean something else.
    """
    eos = tokenizer.encode("").ids[-1]
    ids = [encoding.ids for encoding in tokenizer.encode_batch(list(prompts))]
    for prompt, tokens in zip(prompts, ids, strict=True):
        if len(tokens) > context_length:
            raise ClipmillError(
                f"a prompt has {len(tokens)} tokens, the model reads {context_length} (start and end included): "
                f"{_shortened(prompt)!r}; shorten it in --prompts"
            )
    input_ids = np.full((len(ids), max(map(len, ids))), eos, dtype=np.int64)
    for row, tokens in zip(input_ids, ids, strict=True):
        row[: len(tokens)] = tokens
    # the first EOS, as in the reference: a prompt may hold the token's own text
    return input_ids, (input_ids == eos).argmax(axis=1).astype(np.int64)


def _shortened(prompt: str, length: int = 80) -> str:
    return prompt if len(prompt) <= length else prompt[: length - 3] + "..."
