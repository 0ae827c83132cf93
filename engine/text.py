"""Prompts -> text embeddings: tokenise, batch, run; and the table they are kept in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from engine.bundle import Bundle
from engine.session import Tower
from engine.shards import bundle_metadata, embedding_column, embedding_type
from engine.tokenizer import load_tokenizer, tokenize

BATCH_SIZE = 64


def embed_prompts(
    bundle: Bundle, prompts: Sequence[str], provider: str = "auto", *, threads: int | None = None
) -> NDArray[np.float32]:
    """(N, dim) float32 unit rows, in the order of the prompts.

    Raises ClipmillError for a bundle without tokenizer and for a prompt longer than the context (never cut).
    """
    input_ids, eos_position = tokenize(load_tokenizer(bundle), prompts, bundle.architecture.context_length)
    return embed_tokens(bundle, input_ids, eos_position, provider, threads=threads)


def embed_tokens(
    bundle: Bundle,
    input_ids: NDArray[np.int64],
    eos_position: NDArray[np.int64],
    provider: str = "auto",
    *,
    threads: int | None = None,
) -> NDArray[np.float32]:
    """(N, dim) float32 unit rows for token ids (N, L) and EOS positions (N,), both int64."""
    fixed = {"batch": BATCH_SIZE, "length": bundle.architecture.context_length}
    tower = Tower(bundle, "text", provider, threads=threads, fixed=fixed)
    embeddings = np.empty((len(input_ids), tower.dim), dtype=np.float32)
    for rows in _batches(len(input_ids)):
        ids, eos = input_ids[rows], eos_position[rows]
        if tower.provider == "cuda":  # its one shape
            short = (0, fixed["batch"] - len(ids))
            ids = np.pad(ids, (short, (0, fixed["length"] - ids.shape[1])), mode="edge")
            eos = np.pad(eos, short)
        else:  # nothing after the last EOS of a batch can matter
            ids = ids[:, : eos.max() + 1]
        embeddings[rows] = tower.run({"input_ids": ids, "eos_position": eos})[: rows.stop - rows.start]
    return embeddings


def _batches(rows: int) -> Iterator[slice]:
    for start in range(0, rows, BATCH_SIZE):
        yield slice(start, min(start + BATCH_SIZE, rows))


def text_table(bundle: Bundle, prompts: Sequence[str], embeddings: NDArray[np.float32]) -> pa.Table:
    """Prompts and their embeddings as a table: prompt string, embedding FixedSizeList<float32>[dim]."""
    kind = embedding_type(bundle.architecture.embedding_dim, "float32")
    schema = pa.schema({"prompt": pa.string(), "embedding": kind}, metadata=bundle_metadata(bundle))
    return pa.Table.from_arrays([pa.array(prompts, pa.string()), embedding_column(embeddings, kind)], schema=schema)
