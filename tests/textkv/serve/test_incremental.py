"""Answers told token by token are what the tokenizer writes of all tokens at once, for every kind of tokenizer."""

import random

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from textkv.mini import load_mini
from textkv.serve.answers import Answer
from textkv.serve.engine import special_ids

HARD = (
    "plain words, and more of them.",
    "  two blanks before , and a blank before a stop . He 's here",
    "tabs\tand\n\n\nlines \n with blanks   at the end  ",
    "漢字とかな、한국어, русский, ελληνικά, עברית, العربية, हिन्दी, ไทย",
    "e\u0301 a\u0308\u0323 combining; é ä whole; \u200d\u200b nothing to see",
    "🙂👩‍👩‍👧‍👦🇩🇪👍🏽 and 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 beyond sixteen bits",
    "a sign for damage \ufffd\ufffd that is meant, \ufffd",
    "<tool_call>{\"x\": [1, 2]}</tool_call> ▁ low line",
)  # fmt: skip
BYTES = [f"<0x{n:02X}>" for n in range(256)]
TURN, KEPT = "<|turn|>", "<think>"
CORPUS = [text for text in HARD for _ in range(3)] + ["the man who came home saw his old house"] * 5


def byte_level():
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(CORPUS[-9:], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    return made


def sentence_piece_bpe():
    """As Llama 2 and Mistral have it: bytes for what is not known, a blank before the first word."""
    vocab = {piece: n for n, piece in enumerate(["<unk>", *BYTES, "▁", *"aehimnorstw", "he", "▁t", "▁the", "▁a", "▁▁"])}
    merges = [("h", "e"), ("▁", "t"), ("▁t", "he"), ("▁", "a"), ("▁", "▁")]
    made = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return made


def sentence_piece_unigram():
    known = sorted({c for text in CORPUS[-9:] for c in text.replace(" ", "▁")})
    pieces = [("<unk>", -20.0), *((b, -15.0) for b in BYTES), *((c, -5.0) for c in known), ("▁the", -2.0), ("▁", -3.0)]
    made = Tokenizer(models.Unigram(list(dict(pieces).items()), unk_id=0, byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")])
    return made


def word_piece():
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece(cleanup=True)
    made.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=400, special_tokens=["[UNK]"]))
    return made


def words_with_ends():
    made = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.WhitespaceSplit(), decoders.BPEDecoder("</w>")
    trainer = trainers.BpeTrainer(vocab_size=400, end_of_word_suffix="</w>", special_tokens=["<unk>"])
    made.train_from_iterator(CORPUS, trainer)
    return made


@pytest.fixture(
    scope="module", params=[byte_level, sentence_piece_bpe, sentence_piece_unigram, word_piece, words_with_ends, "mini"]
)
def tokenizer(request):
    if request.param == "mini":
        return load_mini()[1]
    made = PreTrainedTokenizerFast(tokenizer_object=request.param())
    made.add_special_tokens({"additional_special_tokens": [TURN]})
    made.add_tokens([AddedToken(KEPT, special=False)])
    return made


def whole(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def told(tokenizer, ids, stop=()):
    answer = Answer(lambda few: whole(tokenizer, few), stop, special_ids(tokenizer))
    return "".join([*map(answer.add, ids), answer.end()]), answer


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("text", HARD)
def test_hard_texts(tokenizer, text):
    for said in (text, f"{KEPT}{text}{KEPT} {text}", f"{TURN}{text}{TURN}{TURN} {text}{TURN}{KEPT}{text}"):
        ids = ids_of(tokenizer, said)
        assert told(tokenizer, ids)[0] == whole(tokenizer, ids)


def test_any_mixture_of_hard_texts_cut_and_joined(tokenizer):
    dice = random.Random(5)
    for _ in range(300):
        ids = []
        for _ in range(dice.randint(1, 6)):
            text = dice.choice([*HARD, TURN, KEPT, " ", "  ", "▁"])
            start = dice.randrange(len(text))
            ids += ids_of(tokenizer, text[start : start + dice.randint(1, 12)])
        assert told(tokenizer, ids)[0] == whole(tokenizer, ids)


def test_any_tokens_at_all_never_fail_and_whole_texts_are_whole(tokenizer):
    dice, size = random.Random(6), len(tokenizer)
    for _ in range(200):
        ids = [dice.randrange(size) for _ in range(dice.randint(0, 40))]
        given, expected = told(tokenizer, ids)[0], whole(tokenizer, ids)
        if "\ufffd" not in given + expected:
            assert given == expected


def test_stop_strings_across_tokens(tokenizer):
    dice = random.Random(7)
    for _ in range(300):
        ids = ids_of(tokenizer, dice.choice(HARD) + dice.choice(HARD))
        text = whole(tokenizer, ids)
        if not text:
            continue
        start = dice.randrange(len(text))
        stop = text[start : start + dice.randint(1, 5)]
        given, answer = told(tokenizer, ids, [stop])
        assert answer.stopped and given == text[: text.index(stop)]


def test_an_answer_costs_what_it_is_long():
    """So many tokens are decoded together at most, however long an answer is."""
    tokenizer, seen = PreTrainedTokenizerFast(tokenizer_object=sentence_piece_bpe()), []

    def decode(ids):
        seen.append(len(ids))
        return whole(tokenizer, ids)

    ids = ids_of(tokenizer, "".join(HARD) * 20)
    answer = Answer(decode)
    assert "".join([*map(answer.add, ids), answer.end()]) == whole(tokenizer, ids)
    assert len(ids) > 5_000 and max(seen) <= 16 and len(seen) <= 2 * len(ids) + 1


@pytest.mark.parametrize("text", ["  a b  ", "\n\n", "a  \n", "  a   STOP", "STOP"])
def test_without_blanks_at_both_ends(text):
    answer = Answer(lambda ids: "".join(map(chr, ids)), ["STOP"], strip=True)
    given = [*map(answer.add, map(ord, text)), answer.end()]
    assert "".join(given) == text.partition("STOP")[0].strip() and answer.stopped == ("STOP" in text)
