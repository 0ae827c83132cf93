"""A CLIP tokenizer of 900 entries, trained on the captions.

CLIP's vocabulary is 256 byte symbols, the same 256 closing a word, one entry for each merge, and the two special tokens
last. The merges are learned from the small corpus of captions.py, and nothing is left to chance: the tokenizer of the
shipped checkpoint comes out again, entry for entry.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizerFast
from transformers.models.clip.tokenization_clip import bytes_to_unicode

from export.mini_clip.captions import tokenizer_corpus

CONTEXT_LENGTH = 32

_START = "<|startoftext|>"
_END = "<|endoftext|>"
_WORD_END = "</w>"

# Of two equally frequent pairs the one with the lower ids is merged first, and the trainer numbers the letters that
# close a word in the order of a hash table, new in each training. Eight ties of this corpus depend on it; this order
# settles them as they fell when the shipped checkpoint was trained.
_FIRST_ENDINGS = "srelxdcty"


def build_tokenizer() -> CLIPTokenizerFast:
    """The tokenizer of the mini CLIP: context of 32 tokens, start token last but one, end token (also padding) last."""
    merges = _learn_merges()
    byte_symbols = list(bytes_to_unicode().values())
    entries = byte_symbols + [symbol + _WORD_END for symbol in byte_symbols] + ["".join(merge) for merge in merges]
    # Two merge paths may spell one entry; it keeps its first place.
    vocabulary = [*dict.fromkeys(entries), _START, _END]
    with TemporaryDirectory() as folder:
        vocab_file = Path(folder, "vocab.json")
        merges_file = Path(folder, "merges.txt")
        ids = {entry: position for position, entry in enumerate(vocabulary)}
        vocab_file.write_text(json.dumps(ids, ensure_ascii=False), encoding="utf-8")
        lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
        merges_file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return CLIPTokenizerFast(str(vocab_file), str(merges_file), model_max_length=CONTEXT_LENGTH)


def _learn_merges() -> list[tuple[str, str]]:
    corpus = tokenizer_corpus()
    letters = sorted({letter for sentence in corpus for letter in sentence if letter != " "})
    endings = [*_FIRST_ENDINGS, *(letter for letter in letters if letter not in _FIRST_ENDINGS)]
    trainer = trainers.BpeTrainer(
        # The corpus runs out of pairs well before 1,200 entries: every word of it ends as one token.
        vocab_size=1200,
        min_frequency=1,
        end_of_word_suffix=_WORD_END,
        # Naming every symbol here fixes its id.
        special_tokens=letters + [letter + _WORD_END for letter in endings],
        show_progress=False,
    )
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix=_WORD_END, unk_token=_END))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(corpus, trainer)
    return [(left, right) for left, right in json.loads(tokenizer.to_str())["model"]["merges"]]
