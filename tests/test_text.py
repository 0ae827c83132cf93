"""Prompts -> text embeddings of the embedded model, against transformers' tokenizer and CLIPModel."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from engine.bundle import Bundle
from engine.errors import ClipmillError
from engine.session import Tower
from engine.text import embed_prompts, embed_tokens
from engine.tokenizer import load_tokenizer, tokenize
from export.checkpoint import MINI_CHECKPOINT

CONTEXT = 32  # of the embedded model, in tokens
FITS = "a photo of " + "cat " * 27  # exactly CONTEXT tokens with start and end
PROMPTS = [
    "a photo of a cat",
    "a",
    "",
    "   ",
    "A PHOTO OF A Cat!",
    "a   photo\tof\n a  cat ",
    "don't; it's 3.14 (or 100%)",
    "un café à Zürich, naïve Größe",
    "e\u0301 and \u00e9",  # decomposed and composed
    "猫の写真",
    "фото кота",
    "a 🐈 on a 🚲",
    "cat <|endoftext|> dog",
    "<|endoftext|>",
    "<|startoftext|> a ship",
    FITS,
]


@pytest.mark.parametrize("eos_token_id", [899, 2])
def test_embeddings_are_those_of_transformers(mini: Bundle, eos_token_id: int) -> None:
    """For both ways in which CLIPModel finds the end: by its id, and (old configs, id 2) as the highest id."""
    expected = reference_embeddings(PROMPTS, eos_token_id)
    # measured: 1.2e-7 at most
    np.testing.assert_allclose(embed_prompts(mini, PROMPTS, "cpu"), expected, rtol=0, atol=1e-5)


def test_order_is_kept_across_batches(mini: Bundle) -> None:
    things = ("cat", "dog", "ship", "truck", "frog", "bird", "deer", "horse", "airplane", "car")
    prompts = [f"{'a ' * (37 * n % 20)}{things[n % 10]} {n}" for n in range(150)]
    embeddings = embed_prompts(mini, prompts, "cpu")
    expected = reference_embeddings(prompts)
    np.testing.assert_allclose(embeddings, expected, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def alone(mini: Bundle) -> dict[str, NDArray[np.float32]]:
    """Prompts of one token to all that fit, in no order, and each one's embedding as a batch of its own."""
    words = ("cat", "a", "ship", "on", "blue", "the", "photo")
    prompts = [" ".join(words[(n + 3 * word) % 7] for word in range(1 + 11 * n % 17)) + f" {n}" for n in range(60)]
    tower, tokenizer = Tower(mini, "text", "cpu", threads=1), load_tokenizer(mini)
    tokens = {prompt: tokenize(tokenizer, [prompt], CONTEXT) for prompt in [*prompts, *PROMPTS]}
    return {prompt: tower.run({"input_ids": ids, "eos_position": eos})[0] for prompt, (ids, eos) in tokens.items()}


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_prompts_in_any_order_and_number_are_what_they_are_alone(
    mini: Bundle, alone: dict[str, NDArray[np.float32]], data: st.DataObject
) -> None:
    prompts = data.draw(st.lists(st.sampled_from(list(alone)), min_size=1, max_size=90))
    threads = data.draw(st.integers(1, 3))
    embeddings = embed_prompts(mini, prompts, "cpu", threads=threads)
    expected = np.stack([alone[prompt] for prompt in prompts])
    assert embeddings.dtype == np.float32
    np.testing.assert_allclose(embeddings, expected, rtol=0, atol=1e-6)  # measured: equal to the bit


def test_the_order_given_and_the_threads_leave_no_trace(mini: Bundle, alone: dict[str, NDArray[np.float32]]) -> None:
    """To the bit, whatever padding does: the same prompts make the same batches."""
    prompts = list(alone)
    embeddings = embed_prompts(mini, prompts, "cpu", threads=1)
    order = np.random.default_rng(0).permutation(len(prompts))
    for threads in (1, 2, 4):
        shuffled = embed_prompts(mini, [prompts[place] for place in order], "cpu", threads=threads)
        np.testing.assert_array_equal(shuffled, embeddings[order])


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, NDArray[np.int64]]]:
    """The feeds of every batch that runs."""
    batches: list[dict[str, NDArray[np.int64]]] = []
    run = Tower.run

    def watch(tower: Tower, feeds: Any) -> Any:
        batches.append(feeds)
        return run(tower, feeds)

    monkeypatch.setattr(Tower, "run", watch)
    return batches


def test_batches_are_of_one_length_or_nearly_and_the_longest_run_first(
    mini: Bundle, watched: list[dict[str, NDArray[np.int64]]]
) -> None:
    lengths = [3 + 7 * n % 20 for n in range(60)]  # in tokens: every one from 3 to 22, three times
    embed_prompts(mini, ["cat " * (length - 3) + str(n // 20) for n, length in enumerate(lengths)], "cpu", threads=1)
    ran = [feeds["eos_position"] + 1 for feeds in watched]
    assert [len(batch) for batch in ran] == [16, 16, 16, 12]
    assert [length for batch in ran[::-1] for length in batch] == sorted(lengths)
    assert [feeds["input_ids"].shape[1] for feeds in watched] == [batch.max() for batch in ran]


def test_the_same_prompt_is_embedded_once(mini: Bundle, watched: list[dict[str, NDArray[np.int64]]]) -> None:
    """Also where it is written in another way, and in whatever it is padded with."""
    prompts = ["a cat", "a dog", "A  CAT", "a cat", "a dog on a cat", "a"]
    input_ids, eos_position = tokenize(load_tokenizer(mini), prompts, CONTEXT)
    after = np.arange(input_ids.shape[1]) > eos_position[:, None]
    input_ids[after] = np.random.default_rng(0).integers(0, 900, after.sum())
    embeddings = embed_tokens(mini, input_ids, eos_position, "cpu")
    np.testing.assert_array_equal(embeddings[[2, 3]], embeddings[[0, 0]])
    assert sum(len(feeds["input_ids"]) for feeds in watched) == 4
    np.testing.assert_array_equal(embed_prompts(mini, prompts, "cpu"), embeddings)
    assert sum(len(feeds["input_ids"]) for feeds in watched) == 8


def test_a_prompt_that_goes_on_after_its_first_end_is_another_when_its_end_is(mini: Bundle) -> None:
    input_ids = np.array([[898, 320, 899, 320, 899]] * 2)
    embeddings = embed_tokens(mini, input_ids, np.array([2, 4]), "cpu")
    assert np.abs(embeddings[0] - embeddings[1]).max() > 1e-3


def test_batches_run_in_lanes(mini: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    together, run = threading.Barrier(2, timeout=20), Tower.run

    def meet(tower: Tower, feeds: Any) -> Any:
        together.wait()
        return run(tower, feeds)

    monkeypatch.setattr(Tower, "run", meet)
    assert embed_prompts(mini, [f"{n}" for n in range(4 * 16)], "cpu", threads=2).shape == (64, 128)


def test_no_prompts_are_no_embeddings(mini: Bundle) -> None:
    nothing = np.empty((0, 5), dtype=np.int64)
    assert embed_tokens(mini, nothing, np.empty(0, dtype=np.int64), "cpu").shape == (0, 128)


def test_what_a_prompt_is_padded_with_does_not_matter(mini: Bundle) -> None:
    """Not its batch-mates, not the length, not the tokens after its end."""
    input_ids, eos_position = tokenize(load_tokenizer(mini), PROMPTS, CONTEXT)
    together = embed_tokens(mini, input_ids, eos_position, "cpu")
    alone = np.concatenate([embed_prompts(mini, [prompt], "cpu") for prompt in PROMPTS])
    np.testing.assert_allclose(alone, together, rtol=0, atol=1e-6)  # measured: equal to the bit

    after = np.arange(input_ids.shape[1]) > eos_position[:, None]
    assert after.any()
    noise = np.random.default_rng(0).integers(0, 900, input_ids.shape)
    np.testing.assert_array_equal(embed_tokens(mini, np.where(after, noise, input_ids), eos_position, "cpu"), together)


def test_token_ids_are_those_of_transformers(mini: Bundle) -> None:
    from transformers import CLIPTokenizerFast

    expected = CLIPTokenizerFast.from_pretrained(MINI_CHECKPOINT)(PROMPTS, padding=True, return_tensors="np").input_ids
    input_ids, eos_position = tokenize(load_tokenizer(mini), PROMPTS, CONTEXT)
    np.testing.assert_array_equal(input_ids, expected)
    assert input_ids.shape[1] == CONTEXT
    assert [row.index(899) for row in expected.tolist()] == eos_position.tolist()


def test_token_ids_are_those_of_the_tokenizer_in_python(mini: Bundle) -> None:
    """CLIPTokenizer shares no code with the tokenizers library, nor its file: it reads vocab.json and merges.txt."""
    from transformers import CLIPTokenizer

    prompts = [prompt for prompt in PROMPTS if prompt.isascii() and "<|" not in prompt]
    expected = CLIPTokenizer.from_pretrained(MINI_CHECKPOINT)(prompts).input_ids
    input_ids, eos_position = tokenize(load_tokenizer(mini), prompts, CONTEXT)
    assert [row[: end + 1].tolist() for row, end in zip(input_ids, eos_position, strict=True)] == expected


@pytest.mark.parametrize("prompt", [FITS + "cat", "ship " * 40, "猫" * 40], ids=["by one", "by many", "unicode"])
def test_a_prompt_longer_than_the_context_is_named_and_never_cut(mini: Bundle, prompt: str) -> None:
    with pytest.raises(ClipmillError, match=r"the model reads 32 .* shorten it in --prompts") as refusal:
        embed_prompts(mini, ["a cat", prompt, "a dog"], "cpu")
    assert prompt[:70] in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_without_a_tokenizer_prompts_are_refused(random_vit_b_32: Bundle) -> None:
    with pytest.raises(ClipmillError, match=r"random-vit-b-32 has no tokenizer .* name another with --model"):
        embed_prompts(random_vit_b_32, ["a cat"], "cpu")


def reference_embeddings(prompts: list[str], eos_token_id: int = 899) -> NDArray[np.float32]:
    import torch
    from transformers import CLIPModel, CLIPTokenizerFast

    model = CLIPModel.from_pretrained(MINI_CHECKPOINT, dtype=torch.float32).eval()
    model.text_model.eos_token_id = eos_token_id
    tokens = CLIPTokenizerFast.from_pretrained(MINI_CHECKPOINT)(prompts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        return torch.nn.functional.normalize(model.get_text_features(**tokens)).numpy()
