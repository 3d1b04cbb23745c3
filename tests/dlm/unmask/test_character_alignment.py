"""A guider of another vocabulary: both tokenizations on one line of characters."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dlm.canvas import Canvas
from dlm.models.decoding_spec import DecodingSpec
from dlm.unmask import Guider, resolve_unmask
from dlm.unmask.accept import DraftScores
from dlm.unmask.character_alignment import AlignedVerifier, CharacterAligner
from tests.dlm.unmask.boards import Opinion, onehot, play
from tests.dlm.unmask.test_guided import qwen

PROSE = "the little hen had three red apples and the cow ate two apples so one apple is left over for a later day " * 3
ALPHABET = st.text(st.sampled_from([*"aehlprt 1+", "é", "猫", "🙂"]), min_size=1, max_size=24)


@cache
def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """dlm: byte-level, few merges; bytes: byte-level, many; words: with marked spaces, bytes only where it must."""
    special = ["<end>", "<mask>", "<user>"] if kind == "dlm" else ["<stop>", "<u>", "<v>"]
    if kind == "words":
        made = Tokenizer(models.BPE(byte_fallback=True))
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        made.decoder = decoders.Sequence([decoders.Metaspace(), decoders.ByteFallback(), decoders.Fuse()])
        bytes_ = [f"<0x{i:02X}>" for i in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special + bytes_, show_progress=False)
    else:
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=290 if kind == "dlm" else 340, special_tokens=special, show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )  # fmt: skip
    made.train_from_iterator([PROSE] if kind != "bytes" else [PROSE, "a cow and a hen had a later apple"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=special[0], additional_special_tokens=special[1:])


def ids(text: str, kind: str = "dlm") -> list[int]:
    return tokenizer(kind)(text, add_special_tokens=False)["input_ids"]


def special(name: str, kind: str = "dlm") -> int:
    return tokenizer(kind).convert_tokens_to_ids(name)


def spec() -> DecodingSpec:
    return DecodingSpec(special("<mask>"), (special("<end>"),), special("<end>"), 0, None, "confidence")


def guider(model, kind: str = "bytes", **options) -> Guider:
    return Guider(model, tokenizer=tokenizer(kind), dlm_tokenizer=tokenizer("dlm"), **options)


def board(prompt: list[int], gen: int) -> Canvas:
    return Canvas(torch.tensor([prompt]), gen_length=gen, block_length=gen, mask_id=special("<mask>"), shift=0)


def writer(prompt: list[int], answer: list[int]):
    """A diffusion model that drafts `answer` whatever the canvas holds."""
    logits = torch.stack([onehot(i, len(tokenizer("dlm"))) for i in prompt + answer])
    return lambda canvas_ids: logits[None].expand(len(canvas_ids), -1, -1)


def reader_of(tokens: list[int], kind: str) -> Opinion:
    """A guider that says `tokens` one after the other."""
    size = len(tokenizer(kind))
    stop = special("<stop>", kind)
    return Opinion(lambda seen: onehot([*tokens, stop][min(len(seen), len(tokens))], size), vocab=size, ends=(stop,))


# ---- the line -------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(ALPHABET, st.sampled_from(["bytes", "words"]), st.floats(0, 1))
def test_both_token_sequences_have_their_places(text, kind, share):
    theirs = tokenizer("dlm")(text, add_special_tokens=False, return_offsets_mapping=True)
    drafted = int(share * len(theirs["input_ids"]))
    line = CharacterAligner(guider(qwen(), kind), spec()).align(theirs["input_ids"], drafted)
    own = tokenizer(kind)(text, add_special_tokens=False, return_offsets_mapping=True)
    assert line.ids == own["input_ids"]
    assert list(zip(line.guider_starts, line.guider_ends, strict=True)) == [
        tuple(span) for span in own["offset_mapping"]
    ]
    first = max(drafted - 1, 0)
    # A token that is a part of a character ends where the character does: the tokenizer's own offsets say the same.
    assert line.dlm_ends == [-1] * first + [end for _, end in theirs["offset_mapping"]][first:]
    assert line.unmapped == len(text)


def test_special_tokens_take_one_place_and_become_what_they_are_to_the_guider():
    user, end = special("<user>"), special("<end>")
    sequence = [user, *ids("red hen"), end, *ids("cow"), user]
    own = (special("<u>", "bytes"), special("<v>", "bytes"))
    aligner = CharacterAligner(guider(reader_of([], "bytes"), specials={user: own}), spec())
    line = aligner.align(sequence, 0)
    assert line.ids == [*own, *ids("red hen", "bytes"), special("<stop>", "bytes"), *ids("cow", "bytes"), *own]
    assert line.dlm_ends[0] == 1 and line.dlm_ends[-1] == 13 == line.unmapped
    assert (line.guider_starts[-1], line.guider_ends[-1]) == (12, 13)
    nameless = CharacterAligner(guider(reader_of([], "bytes")), spec())
    assert nameless.align(sequence, 0).unmapped == 0  # a draft ends at a token without a name
    assert nameless.align(sequence, 1).unmapped == 12  # in the text it is only left out
    assert nameless.align(sequence, 1).ids[: len(ids("red hen", "bytes"))] == ids("red hen", "bytes")


# ---- what is written ------------------------------------------------------------------------------------------------

PROMPT, ANSWER = "three red apples and", " two apples so one 🙂 is left over"


@pytest.mark.parametrize("kind", ["bytes", "words"])
def test_a_guider_that_says_the_same_text_accepts_all_of_it(kind):
    prompt, answer = ids(PROMPT), [*ids(ANSWER), special("<end>")]
    model = reader_of(ids(PROMPT, kind) + ids(ANSWER, kind), kind)
    played = play("guided", board(prompt, len(answer)), writer(prompt, answer), spec=spec(), guide=guider(model, kind))
    assert played.text[0].tolist() == answer and len(played.history) == 1
    assert played.unmasker.stats["guider_forwards"] == 1


@pytest.mark.parametrize("kind", ["bytes", "words"])
@pytest.mark.parametrize("other", [" two apples so two 🙂 is", " two pears", " one", " two apples so one 🙃 is", ""])
def test_tokens_are_kept_up_to_the_first_that_the_guider_would_say_otherwise(kind, other):
    prompt, answer = ids(PROMPT), ids(ANSWER)
    mine, heard = tokenizer(kind)(ANSWER, add_special_tokens=False, return_offsets_mapping=True), ids(other, kind)
    wrong = next(i for i, token in enumerate(mine["input_ids"]) if i >= len(heard) or heard[i] != token)
    start = mine["offset_mapping"][wrong][0]
    spans = tokenizer("dlm")(ANSWER, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    expected = sum(end <= start for _, end in spans)
    model = reader_of(ids(PROMPT, kind) + heard, kind)
    played = play("guided", board(prompt, len(answer)), writer(prompt, answer), spec=spec(), guide=guider(model, kind))
    assert int(played.history[0].sum()) == max(1, expected)
    assert played.text[0].tolist() == answer


def test_a_draft_ends_at_a_special_token_that_has_no_name():
    prompt, answer = ids(PROMPT), [*ids(" two"), special("<user>"), *ids(" red")]
    model = reader_of(ids(PROMPT, "bytes") + ids(" two", "bytes") + ids(" red", "bytes"), "bytes")
    played = play("guided", board(prompt, len(answer)), writer(prompt, answer), spec=spec(), guide=guider(model))
    assert int(played.history[0].sum()) == len(ids(" two"))


class Anew(AlignedVerifier):
    """Reads everything anew at every round."""

    def _count_accepted(self, row, stream, first):
        logits = self.guide.model(torch.tensor([stream[:-1]])).logits[0, first - 1 :]
        seen = DraftScores(logits.clone(), torch.tensor(stream[first:]), self.ends)
        return int(self.accept(seen, None).long().cumprod(0).sum())


@torch.inference_mode()
@pytest.mark.parametrize("method", [None, "full"])
@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_the_cache_gives_what_reading_anew_gives(chunk, method):
    prompt, size = ids(PROMPT), len(tokenizer("bytes"))
    noise = torch.randn(60, len(tokenizer("dlm")), generator=torch.Generator().manual_seed(3))
    model = qwen(vocab=size)
    texts = []
    for anew in (True, False):
        guide = guider(model, method=None if anew else method)
        rule = resolve_unmask(f"guided('topk', k={size // 2}, chunk={chunk})", guide=guide)
        place = board(prompt, 16)
        unmasker = rule.begin(place, spec(), None, 16)
        if anew:
            unmasker.verifier = Anew(guide, place, spec(), rule.acceptance(), chunk, None)
        while not place.done:
            logit_window = torch.zeros(1).long(), torch.tensor([place.length])
            slots = unmasker.candidates(place, logit_window)
            # Drafts that depend on how far the text has come, so that the guider's text changes under its cache.
            logits = noise[slots.clamp(min=0) + int(place.left_cpu[0]) % 3]
            choice = unmasker.choose(logits, slots, place)
            place.commit(slots, choice.tokens, choice.commit)
            assert anew or unmasker.verifier.cache_columns == [len(unmasker.verifier.held[0])]
        texts.append((place.generated.tolist(), unmasker.stats["accepted"]))
    assert texts[0] == texts[1] and len(texts[0][1]) > 1


# ---- which way drafts go, and errors --------------------------------------------------------------------------------


def test_vocabularies_are_compared_by_token():
    assert not guider(reader_of([], "bytes")).shared_vocabulary
    assert Guider(reader_of([], "bytes"), tokenizer("dlm"), tokenizer("dlm")).shared_vocabulary
    words = {"a": 0, "b": 1, "<mask>": 2}

    def like(vocabulary):
        return SimpleNamespace(
            get_vocab=lambda: vocabulary, all_special_ids=[2], added_tokens_decoder={}, is_fast=True, eos_token_id=None
        )

    same = [{"a": 0, "b": 1}, {"a": 0, "b": 1, "c": 3}, words]
    other = [{"a": 0}, {"a": 1, "b": 0}, {"a": 0, "b": 1, "<mask>": 3}]
    model = reader_of([], "bytes")
    assert all(Guider(model, like(own), like(words)).shared_vocabulary for own in same)
    assert not any(Guider(model, like(own), like(words)).shared_vocabulary for own in other)


def test_errors():
    slow = SimpleNamespace(get_vocab=lambda: {"a": 1}, is_fast=False)
    with pytest.raises(ValueError, match="gives no character offsets .is_fast is False.; use a fast tokenizer"):
        Guider(reader_of([], "bytes"), slow, tokenizer("dlm"))
    guide = guider(reader_of([], "bytes"))
    with pytest.raises(ValueError, match=r"consists of special tokens; name what they are to it in Guider\(specials"):
        resolve_unmask("guided", guide=guide).begin(board([special("<user>")], 4), spec(), None, 4)
    guide.model.config.max_position_embeddings = 10
    prompt, answer = ids(PROMPT), ids(ANSWER)
    with pytest.raises(ValueError, match="of the guider's tokens and it has 10 positions; shorten"):
        play("guided", board(prompt, len(answer)), writer(prompt, answer), spec=spec(), guide=guide)
