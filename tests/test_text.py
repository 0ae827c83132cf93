"""Prompts -> text embeddings of the embedded model, against transformers' tokenizer and CLIPModel."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from engine.bundle import Bundle
from engine.errors import ClipmillError
from engine.text import BATCH_SIZE, embed_prompts, embed_tokens
from engine.tokenizer import load_tokenizer, tokenize
from export.towers import MINI_CHECKPOINT

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
    prompts = [f"{'a ' * (n // 10)}{things[n % 10]} {n}" for n in range(2 * BATCH_SIZE + 22)]
    embeddings = embed_prompts(mini, prompts, "cpu")
    expected = reference_embeddings(prompts)
    np.testing.assert_allclose(embeddings, expected, rtol=0, atol=1e-5)


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
