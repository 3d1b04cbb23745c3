"""Guided unmasking: what is written, what the guider's cache holds, and rows that go on at their own pace."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from dlm.canvas import Canvas
from dlm.models.decoding_spec import DecodingSpec
from dlm.unmask import Guided, Guider, Sampling, resolve_unmask
from dlm.unmask.accept import DraftScores
from tests.dlm.unmask.boards import END, MASK, SPEC, VOCAB, Opinion, Toy, canvas, onehot, play, whole


def qwen(seed: int = 0, vocab: int = VOCAB, positions: int = 200) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocab, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=positions, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.mul_(8)  # random weights are nearly indifferent otherwise
    return model


def places(seed: int = 0, share: float = 0.7, prompt: int = 3) -> Opinion:
    """A guider that agrees with Toy(bigram=0) at about this share of places and wants token 0 elsewhere."""
    toy = Toy(bigram=0.0)
    toy.place[:, MASK] = -torch.inf
    agrees = torch.rand(200, generator=torch.Generator().manual_seed(seed)) < share
    return Opinion(lambda tokens: onehot(int(toy.place[len(tokens) - prompt].argmax()) * int(agrees[len(tokens)])))


def contrary(seed: int) -> Opinion:
    """A guider that disagrees with every draft: no draft is the mask; the rest of its opinion is random."""
    table = torch.randn(100, VOCAB, generator=torch.Generator().manual_seed(seed))
    return Opinion(lambda tokens: table[len(tokens)] + onehot(MASK))


def greedy(board: Canvas, toy: Toy) -> torch.Tensor:
    """Left to right, one token at a time."""
    ids = board.ids.clone()
    for slot in range(board.prompt, board.length):
        ids[:, slot] = toy(ids)[:, slot].index_fill(1, torch.tensor(MASK), -torch.inf).argmax(1)
    return ids[:, board.prompt :]


def alone(board: Canvas, row: int) -> Canvas:
    """One row of a fresh board, its padding cut off."""
    start = int(board.real_start[row])
    gen = board.length - board.prompt
    ids = board.ids[row : row + 1, start : board.prompt]
    return Canvas(ids, gen_length=gen, block_length=board.block_length, mask_id=MASK, shift=0)


# ---- what is written ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["exact", "topk", "relative", "threshold"])
def test_a_guider_that_always_disagrees_gives_greedy_text_one_token_per_forward(rule):
    toy, expected = Toy(bigram=2.0), greedy(canvas(batch=2), Toy(bigram=2.0))
    for seed in (0, 1):
        guided = Guided(rule, k=1) if rule in ("topk", "relative") else Guided(rule)
        played = play(guided, canvas(batch=2), toy, guide=Guider(contrary(seed)))
        assert torch.equal(played.text, expected)
        assert (played.history.sum(2) == 1).all() and len(played.history) == 12


@pytest.mark.parametrize("window, forwards", [(None, 1), (128, 1), (5, 3), (4, 3), (1, 12)])
def test_a_guider_that_knows_the_draft_gives_one_forward_per_window(window, forwards):
    played = play(Guided(window=window), canvas(), Toy(bigram=0.0), guide=Guider(places(share=1.0)))
    assert len(played.history) == forwards
    assert torch.equal(played.text, greedy(canvas(), Toy(bigram=0.0)))


def test_the_window_ends_where_the_cache_policy_ends():
    def block_of(board):
        return torch.zeros(board.batch, dtype=torch.int64), board.block_start(board.active + 1)

    played = play("guided", canvas(block=4), Toy(bigram=0.0), guide=Guider(places(share=1.0)), logit_window=block_of)
    assert played.history.sum((1, 2)).tolist() == [4, 4, 4]


def test_text_is_written_from_the_left_and_is_always_the_models_own():
    played = play("guided", canvas(gen=30), Toy(bigram=0.0), guide=Guider(places()))
    assert 1 < len(played.history) < 30
    slots = torch.cat([step.nonzero()[:, 0] for step in played.history[:, 0]])
    assert slots.tolist() == list(range(3, 33))
    assert torch.equal(played.text, greedy(canvas(gen=30), Toy(bigram=0.0)))  # its drafts do not depend on the text


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_mask_is_never_written_and_the_end_comes_within_a_round_per_token(temperature):
    toy = Toy()
    toy.place[:, MASK] += 60.0
    played = play(
        "guided('topk', k=12)", canvas(batch=2), toy, guide=Guider(qwen()), sampling=Sampling(temperature),
        generator=torch.Generator().manual_seed(0), limit=12 + 1,
    )  # fmt: skip
    assert not (played.text == MASK).any()


def test_ends_of_both_models_are_the_same_event():
    toy = Toy(bigram=0.0)
    toy.place[4, END] += 40.0
    text = greedy(canvas(), toy)[0].tolist()
    for own in (7, END):  # the guider ends with 7, or with the model's own token
        says = Opinion(lambda tokens, own=own: onehot([*text[:4], own, *text[5:]][len(tokens) - 3]), ends=(7,))
        assert len(play("guided", canvas(), toy, guide=Guider(says)).history) == 1
    deaf = Opinion(lambda tokens: onehot([*text[:4], 8, *text[5:]][len(tokens) - 3]), ends=(7,))
    assert len(play("guided", canvas(), toy, guide=Guider(deaf)).history) == 3


# ---- the guider's cache ---------------------------------------------------------------------------------------------


def trace(rule: Guided, board: Canvas, toy: Toy, guide: Guider) -> tuple[torch.Tensor, list[list[int]], dict]:
    """Text, the columns of the guider's caches after each round, statistics."""
    unmasker, columns = resolve_unmask(rule, guide=guide).begin(board, SPEC, None, 99), []
    while not board.done:
        round_of(unmasker, board, toy)
        unmasker.verifier.settle(board)
        columns.append(unmasker.verifier.cache_columns)
    return board.generated, columns, unmasker.stats


def round_of(unmasker, board: Canvas, toy: Toy) -> None:
    slots = unmasker.candidates(board, whole(board))
    logits = toy(board.ids).gather(1, slots.clamp(min=0)[..., None].expand(-1, -1, VOCAB))
    choice = unmasker.choose(logits, slots, board)
    board.commit(slots, choice.tokens, choice.commit)


def test_chunks_change_neither_text_nor_cache():
    traces = [trace(Guided("topk", k=30, chunk=chunk), canvas(gen=25), Toy(), Guider(qwen())) for chunk in (1, 4, 1000)]
    texts, columns, stats = zip(*traces, strict=True)
    assert torch.equal(texts[0], texts[1]) and torch.equal(texts[0], texts[2])
    assert columns[0] == columns[1] == columns[2]
    rounds = stats[2]["guider_forwards"]
    assert stats[0]["guider_forwards"] > stats[1]["guider_forwards"] > rounds == len(columns[2])
    assert stats[0]["accepted"] == stats[1]["accepted"] == stats[2]["accepted"]
    assert sum(n * rounds for n, rounds in stats[0]["accepted"].items()) == 25


def test_after_each_round_the_cache_holds_the_text_but_its_last_token():
    board, seen = canvas(gen=20), []
    guide = Guider(qwen())
    unmasker = resolve_unmask("guided('topk', k=24)", guide=guide).begin(board, SPEC, None, 20)
    while not board.done:
        round_of(unmasker, board, Toy())
        unmasker.verifier.settle(board)
        end = board.length - int(board.left_cpu[0])
        assert unmasker.verifier.cache_columns == [end - 1]
        guider_cache = unmasker.verifier.caches[0]
        fresh = guide.model(board.ids[:, : end - 1], use_cache=True).past_key_values
        for ours, true in zip(guider_cache.cache.layers, fresh.layers, strict=True):
            torch.testing.assert_close(ours.keys, true.keys, rtol=1e-4, atol=1e-4)
        seen.append(end)
    assert len(seen) > 3


def slow_guided(board: Canvas, toy: Toy, guide: Guider, rule: Guided) -> torch.Tensor:
    """One row, no cache: every round the guider reads all text and drafts anew."""
    ids, p = board.ids.clone(), board.prompt
    while p < board.length:
        drafts = toy(ids)[0, p:].index_fill(1, torch.tensor(MASK), -torch.inf).argmax(1)
        logits = guide.model(torch.cat([ids[0, :p], drafts[:-1]])[None]).logits[0, p - 1 :]
        agreed = rule.acceptance()(DraftScores(logits.clone(), drafts, torch.tensor([END])), None)
        n = max(1, int(agreed.long().cumprod(0).sum()))
        ids[0, p : p + n] = drafts[:n]
        p += n
    return ids[:, board.prompt :]


@torch.inference_mode()
@pytest.mark.parametrize("rule", ["guided('topk', k=24)", "guided('aggressive', chunk=3)", "guided('threshold')"])
def test_the_cache_gives_what_reading_anew_gives(rule):
    toy, guide = Toy(), Guider(qwen())
    rule = resolve_unmask(rule, guide=guide)
    expected = slow_guided(canvas(gen=25), toy, guide, rule)
    assert torch.equal(play(rule, canvas(gen=25), toy).text, expected)


@torch.inference_mode()
@pytest.mark.parametrize("method", [None, "full"])
def test_ragged_rows_get_what_they_get_alone(method):
    def board():
        return canvas(batch=4, prompt=6, gen=20, pads=(0, 3, 5, 1))

    guide = Guider(qwen(), method=method)
    rule = resolve_unmask("guided('topk', k=24, chunk=7)", guide=guide)
    rows = play(rule, board(), Toy(prompt=6))
    taken = rows.history.sum(2)
    assert len({tuple(column.tolist()) for column in taken.T}) == 4  # no two rows keep the same pace
    for row in range(4):
        single = alone(board(), row)
        played = play(rule, single, Toy(prompt=single.prompt))
        assert torch.equal(played.text[0], rows.text[row])
        assert played.history.sum(2)[:, 0].tolist() == [n for n in taken[:, row].tolist() if n]


@torch.inference_mode()
def test_the_guiders_cache_may_be_kept_by_a_method():
    toy = Toy(prompt=40)
    rule = Guided("topk", k=24)
    plain = play(rule, canvas(prompt=40, gen=16), toy, guide=Guider(qwen()))
    full = play(rule, canvas(prompt=40, gen=16), toy, guide=Guider(qwen(), method="full"))
    assert torch.equal(plain.text, full.text)
    for method in ("snapkv", "snapkv+adakv", "knorm"):
        small = play(rule, canvas(prompt=40, gen=16), toy, guide=Guider(qwen(), method=method, budget=0.25))
        guider_cache = small.unmasker.verifier.caches[0]
        assert not (small.text == MASK).any() and len(small.history) <= 16
        assert guider_cache.cache.tokens_seen == guider_cache.columns > 39
        stored = guider_cache.cache.layers[0].lengths().float().mean()
        assert stored == pytest.approx(0.25 * 39 + guider_cache.columns - 39, abs=1.5)  # drafts are whole


def test_a_finished_row_does_not_stop_the_others():
    guide = Guider(places(share=0.5, prompt=3))
    board = canvas(batch=2, gen=20)
    board.finish_row(torch.tensor([5, board.length]), torch.tensor([END, END]))  # the first row has two masks left
    assert board.left_cpu.tolist() == [3, 20]
    played = play("guided", board, Toy(bigram=0.0), guide=guide)
    assert torch.equal(played.text[1], greedy(canvas(batch=2, gen=20), Toy(bigram=0.0))[1])
    assert played.text[0, 3:].eq(END).all()


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"accept": "best"}, "accept='best' is not known"),
        ({"chunk": 0}, "chunk=0 is no number of tokens >= 1"),
        ({"window": 0}, "window=0 is no number of tokens >= 1"),
        ({"chunk": None}, "chunk=None is no number of tokens"),
        ({"k": 2}, "k=2: accept='exact' takes no parameter"),
    ],
)
def test_errors_of_the_rule(options, message):
    with pytest.raises(ValueError, match=message):
        Guided(**options)


def test_errors_of_the_guider():
    with pytest.raises(ValueError, match="dlm_tokenizer is missing: give both tokenizers, or none"):
        Guider(qwen(), tokenizer=SimpleNamespace())
    with pytest.raises(ValueError, match="method='window.*' cannot take rejected drafts back; use one of .*snapkv"):
        Guider(qwen(), method="window", budget=0.5)
    with pytest.raises(ValueError, match="budget=0.5 without a method; name one"):
        Guider(qwen(), budget=0.5)
    with pytest.raises(ValueError, match="the rule threshold takes no guide; use guided, or leave the guide out"):
        resolve_unmask("threshold", guide=Guider(qwen()))
    with pytest.raises(ValueError, match="the rule guided needs a guide"):
        Guided().begin(canvas(), SPEC, None, 12)


def begin(guide: Guider, board: Canvas):
    return resolve_unmask("guided", guide=guide).begin(board, SPEC, None, 12)


def test_errors_of_a_generation():
    with pytest.raises(ValueError, match="prompt and answer take 15 tokens and the guider has 14 positions; shorten"):
        begin(Guider(qwen(positions=14)), canvas())
    with pytest.raises(ValueError, match="the guider computes in torch.float64; load it in one of float16, bfloat16"):
        begin(Guider(qwen().double()), canvas())
    elsewhere = qwen().to("meta")
    with pytest.raises(ValueError, match="the guider is on meta and the canvas on cpu; move one of them"):
        begin(Guider(elsewhere), canvas())
    with pytest.raises(ValueError, match="a prompt is empty and a guider needs a token to read on from"):
        begin(Guider(qwen()), canvas(batch=2, prompt=2, pads=(0, 2)))
    with pytest.raises(ValueError, match="the guider has 41 tokens and the model 40; give Guider both tokenizers"):
        play("guided", canvas(), Toy(), guide=qwen(vocab=41))


def test_a_token_that_the_guider_lacks_is_written_but_not_read():
    spec = DecodingSpec(MASK, (END,), 37, 0, None, "confidence")
    toy = Toy(bigram=0.0)
    toy.place[:, 36:] = -9.0
    toy.place[[1, 5], 36] = 40.0  # the guider has ids below 36
    vocabulary = {f"t{i}": i for i in range(VOCAB)}
    theirs = SimpleNamespace(
        get_vocab=lambda: vocabulary, all_special_ids=[36, 37, END, MASK], added_tokens_decoder={}, is_fast=True
    )
    own = SimpleNamespace(get_vocab=lambda: {t: i for t, i in vocabulary.items() if i < 36}, eos_token_id=None)
    guide = Guider(qwen(vocab=36), tokenizer=own, dlm_tokenizer=theirs)
    assert guide.shared_vocabulary
    text = play("guided('topk', k=36)", canvas(gen=8), toy, guide=guide, spec=spec)
    assert text.history.sum((1, 2)).tolist() == [1, 1, 3, 1, 2] and text.text[0, [1, 5]].tolist() == [36, 36]
