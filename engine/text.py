"""Prompts -> text embeddings: tokenise, batch by length, run; and the table they are kept in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from engine.bundle import Bundle
from engine.session import Tower
from engine.shards import bundle_metadata, embedding_column, embedding_type
from engine.stages import overlapped
from engine.tokenizer import load_tokenizer, tokenize

BATCH_SIZE = {
    "cpu": 16,  # some hundred prompts make batches for every lane, and one of 8 tokens a prompt fills a matrix product
    "gpu": 64,  # of one shape, like its length
}


def embed_prompts(
    bundle: Bundle,
    prompts: Sequence[str],
    provider: str = "auto",
    *,
    device_id: int = 0,
    threads: int | None = None,
    started: Callable[[str], None] = lambda _: None,
) -> NDArray[np.float32]:
    """(N, dim) float32 unit rows, in the order of the prompts. `started` hears one line about what runs them.

    Raises ClipmillError for a bundle without tokenizer and for a prompt longer than the context (never cut).
    """
    input_ids, eos_position = tokenize(load_tokenizer(bundle), prompts, bundle.architecture.context_length)
    return embed_tokens(
        bundle, input_ids, eos_position, provider, device_id=device_id, threads=threads, started=started
    )


def embed_tokens(
    bundle: Bundle,
    input_ids: NDArray[np.int64],
    eos_position: NDArray[np.int64],
    provider: str = "auto",
    *,
    device_id: int = 0,
    threads: int | None = None,
    started: Callable[[str], None] = lambda _: None,
) -> NDArray[np.float32]:
    """(N, dim) float32 unit rows, in the order of the token ids (N, L) and EOS positions (N,), both int64.

    Prompts that are the same up to their EOS are embedded once. What else is embedded with a prompt, and how far it is
    padded, changes its embedding by float rounding at most (measured on the embedded model: by nothing); the order in
    which prompts are given changes nothing at all.
    """
    shape = {"batch": BATCH_SIZE["gpu"], "length": bundle.architecture.context_length}
    tower = Tower(bundle, "text", provider, device_id=device_id, threads=threads, shape=shape)
    started(f"{tower.provider} ({tower.why})")
    unique_ids, unique_eos, places = _unique(input_ids, eos_position)

    def run(rows: slice) -> NDArray[np.float32]:
        ids, eos = unique_ids[rows], unique_eos[rows]
        if tower.shape:  # the one of a GPU
            short = (0, tower.shape["batch"] - len(ids))
            ids = np.pad(ids, (short, (0, tower.shape["length"] - ids.shape[1])))
            eos = np.pad(eos, short)
        else:
            ids = ids[:, : eos.max() + 1]
        return tower.run({"input_ids": ids, "eos_position": eos})[: rows.stop - rows.start]

    embeddings = np.empty((len(unique_ids), tower.dim), dtype=np.float32)
    batches = _longest_first(len(unique_ids), BATCH_SIZE["gpu" if tower.shape else "cpu"])
    with closing(overlapped(run, batches, tower.lanes, tower.lanes)) as embedded:
        for rows, rows_embedded in zip(batches, embedded, strict=True):
            embeddings[rows] = rows_embedded
    return embeddings[places]


def _unique(
    input_ids: NDArray[np.int64], eos_position: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """The distinct prompts' ids (U, L) and EOS positions (U,), the shortest first; and which of them each is, (N,)."""
    after_end = np.arange(input_ids.shape[1]) > eos_position[:, None]
    # sorted by column, so by length before all else
    prompts = np.column_stack([eos_position, np.where(after_end, 0, input_ids)])
    unique, places = np.unique(prompts, axis=0, return_inverse=True)
    return unique[:, 1:], unique[:, 0], places.reshape(-1)  # NumPy 2.0 alone gives it a second axis


def _longest_first(rows: int, batch_size: int) -> list[slice]:
    """Batches of rows that are sorted by length; the short ones come last, so that the lanes end together."""
    return [slice(max(stop - batch_size, 0), stop) for stop in range(rows, 0, -batch_size)]


def text_table(bundle: Bundle, prompts: Sequence[str], embeddings: NDArray[np.float32]) -> pa.Table:
    """Prompts and their embeddings as a table: prompt string, embedding FixedSizeList<float32>[dim]."""
    kind = embedding_type(bundle.architecture.embedding_dim, "float32")
    schema = pa.schema({"prompt": pa.string(), "embedding": kind}, metadata=bundle_metadata(bundle))
    return pa.Table.from_arrays([pa.array(prompts, pa.string()), embedding_column(embeddings, kind)], schema=schema)
