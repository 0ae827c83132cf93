"""415 prompts through the text tower, prompts a second: clipmill against transformers, padded either way people pad.

"padded to the context" is `padding="max_length"`, 77 tokens, as CLIP was trained and many scripts have it;
"padding=True" pads to the longest prompt of the batch. Both take batches of 64 in the order given. The ViT-B/32 of
random weights has no tokenizer, so all get the ids of the embedded model's, which are valid in the larger vocabulary.
Tokenising and loading count for none, except that clipmill's time holds the opening of its session: each call opens it.

    python benchmarks/text.py --rounds 2
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from bundles import bundles_option, get_bundle, model_option
from measure import ratio, report, speeds, table, take_turns, timed, unit_rows
from numpy.typing import NDArray
from rivals import transformers_model

from engine.machine import usable_cpus
from engine.text import embed_tokens
from engine.tokenizer import tokenize
from export.checkpoint import load_checkpoint
from export.verify import cosines
from probes.prompts import fill_template, read_prompts

PROMPTS = 415  # as many as the thesis' largest vocabulary has
TEMPLATES = (
    "{}", "a photo of {}", "a photo: {}", "a picture of {}", "a blurry photo of {}", "a drawing of {}",
    "a close-up of {}", "a painting of {}", "a sketch of {}", "{} on a table", "{} in the rain",
    "a photo of {} at night", "one of many photos of {}",
)  # fmt: skip
BATCH_SIZE = 64  # of transformers
SAME = 0.9999  # the least cosine of two fp32 towers that embed the same prompts
CONTEXT, LONGEST = "transformers, padded to the context", "transformers, padding=True"

Embed = Callable[[], NDArray[np.float32]]


@click.command()
@click.option("--rounds", default=2, show_default=True, help="Turns of each contestant.")
@model_option
@bundles_option
def main(rounds: int, model: str, bundles: Path | None) -> None:
    """Prompts/s of clipmill and of transformers."""
    torch.set_num_threads(usable_cpus())
    reference = transformers_model(load_checkpoint(model))
    ids, eos = _tokens(reference.config.text_config)
    embedders: dict[str, Embed] = {
        CONTEXT: partial(_transformers, reference, ids, eos, to_context=True),
        LONGEST: partial(_transformers, reference, ids, eos, to_context=False),
    }
    embeddings: dict[str, NDArray[np.float32]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        bundle = get_bundle(model, "fp32", bundles or Path(temporary))  # an int8 bundle has the same text tower
        embedders["clipmill"] = partial(embed_tokens, bundle, ids, eos, "cpu", threads=usable_cpus())
        contestants = {name: timed(partial(_keep, embeddings, name, embed)) for name, embed in embedders.items()}
        seconds = take_turns(contestants, rounds)
    found: dict[str, dict[str, Any]] = {
        name: {
            "prompts_per_second": speeds(PROMPTS, taken),
            "ratio_to_context": ratio(seconds[CONTEXT], taken),
            "ratio_to_longest": ratio(seconds[LONGEST], taken),
            **cosines(embeddings[name], embeddings[CONTEXT]),
        }
        for name, taken in seconds.items()
    }
    if found["clipmill"]["min_cosine"] < SAME:
        raise click.ClickException("the contestants embed different things: their times cannot be compared")
    rows = [
        [name, *values["prompts_per_second"].values()]
        + [f"{values[key]:.2f}" for key in ("ratio_to_context", "ratio_to_longest")]
        + [f"{values[key]:.6f}" for key in ("min_cosine", "min_centred_cosine")]
        for name, values in found.items()
    ]
    header = ["", "prompts/s", "slowest", "fastest", "x context", "x padding=True", "min cos", "centred min"]
    tokens = {
        "mean": float(eos.mean()) + 1,
        "longest": int(eos.max()) + 1,
        "context": reference.config.text_config.max_position_embeddings,
    }
    note = "{longest} tokens at most, {mean:.1f} in the mean; the context is {context}".format(**tokens)
    result = {"prompts": PROMPTS, "tokens": tokens, "rounds": rounds, "model": model, "contestants": found}
    report("text", f"{table(header, rows)}\n\n{PROMPTS} prompts of {note}", result)


def _tokens(config: Any) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Ids (415, L) and EOS positions (415,), with the start and the end that the measured model knows."""
    prompts = [prompt for template in TEMPLATES for prompt in fill_template(template, read_prompts("generic-32"))]
    mini = load_checkpoint("mini")
    assert mini.tokenizer is not None
    tokenizer = mini.tokenizer.backend_tokenizer
    ids, eos_position = tokenize(tokenizer, prompts[:PROMPTS], config.max_position_embeddings)
    start, end = tokenizer.encode("").ids
    is_start, is_end = ids == start, ids == end
    ids[is_start], ids[is_end] = config.bos_token_id, config.eos_token_id
    return ids, eos_position


def _transformers(
    model: Any, ids: NDArray[np.int64], eos: NDArray[np.int64], *, to_context: bool
) -> NDArray[np.float32]:
    """As after `tokenizer(prompts, padding=...)`, which gives the attention mask too."""
    length = model.config.text_config.max_position_embeddings
    ids = np.pad(ids, ((0, 0), (0, length - ids.shape[1])), mode="edge")
    attention_mask = (np.arange(length) <= eos[:, None]).astype(np.int64)
    features = []
    with torch.inference_mode():
        for start in range(0, len(ids), BATCH_SIZE):
            rows = slice(start, start + BATCH_SIZE)
            columns = slice(None if to_context else eos[rows].max() + 1)
            batch = (torch.from_numpy(array[rows, columns]) for array in (ids, attention_mask))
            features.append(model.get_text_features(*batch))
    return unit_rows(torch.cat(features).numpy())


def _keep(embeddings: dict[str, NDArray[np.float32]], name: str, embed: Embed) -> None:
    embeddings[name] = embed()


if __name__ == "__main__":
    main()
