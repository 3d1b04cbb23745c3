"""The mini text model's tokenizer: whole words for what the tasks speak of, byte-pair pieces for everything else.

A byte-level BPE whose vocabulary also holds every word of `words.py` (with its leading blank). A word in the
vocabulary is taken whole; any other text falls to learned pieces and in the end to single bytes, so all text encodes
and decodes without loss. `<s>` is put in front unless special tokens are switched off.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from textkv.mini.words import all_words

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
LEARNED = 1200  # bytes and learned pieces; with the words it stays below 2,000


def build_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Learn the pieces from `texts` and add the task words. The same texts give the same ids."""
    learner = Tokenizer(models.BPE())
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learner.pre_tokenizer = split
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    settings = {"vocab_size": LEARNED, "initial_alphabet": alphabet, "show_progress": False, "min_frequency": 2}
    learner.train_from_iterator(texts, trainers.BpeTrainer(**settings))
    learned = json.loads(learner.to_str())["model"]
    words = [split.pre_tokenize_str(" " + word)[0][0] for word in all_words()]
    pieces = sorted(learned["vocab"], key=learned["vocab"].__getitem__)
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys([BOS, EOS, PAD, *words, *pieces]))}
    merges = [tuple(pair) for pair in learned["merges"]]
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    made.pre_tokenizer, made.decoder = split, decoders.ByteLevel()
    made.add_special_tokens([BOS, EOS, PAD])
    made.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, vocabulary[BOS])])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token=BOS, eos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False
    )
