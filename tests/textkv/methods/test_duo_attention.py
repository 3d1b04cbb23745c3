"""DuoAttention: exact kept sets, sizes by budget, heads without a pattern, bytes, refusals."""

import json
import runpy
import sys
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from tests.compare import mismatch
from tests.textkv import tiny
from tests.textkv.duo.toy import GATES, duo, feed, full_set, kept, pattern_file
from textkv import MethodCache, resolve_method
from textkv.conformance import check_method
from textkv.duo.mean_qk import mean_qk_scores
from textkv.duo.pattern import Pattern
from textkv.method import REGISTRY
from textkv.methods import duo_attention
from textkv.methods.duo_attention import DuoAttention, Sizes
from textkv.segments.split import SplitSegment


@pytest.fixture
def pattern(tmp_path):
    return pattern_file(tmp_path)


def test_the_kept_set_of_the_specification(model_of, pattern):
    model = model_of("llama")
    cache = MethodCache(model, duo(pattern, sparsity=0.5))
    feed(model, cache, tiny.text_ids(8), 8)
    assert full_set(cache) == {(1, 0), (1, 1), (2, 1)}
    assert kept(cache, 0, 0) == kept(cache, 2, 0) == [0, 1, 5, 6, 7] and kept(cache, 2, 1) == list(range(8))


@pytest.mark.parametrize(("n", "expected"), [(5, [0, 1, 2, 3, 4]), (6, [0, 1, 3, 4, 5])])
def test_the_first_token_to_leave_is_the_one_after_the_sinks(model_of, pattern, n, expected):
    model = model_of("llama")
    for chunks in (n, 1):
        cache = MethodCache(model, duo(pattern, sparsity=1.0))
        feed(model, cache, tiny.text_ids(n), chunks)
        assert kept(cache, 1, 1) == expected


def test_sparsity_zero_is_the_full_cache(model_of, pattern):
    model, ids = model_of("llama"), tiny.text_ids(30)
    expected = feed(model, MethodCache(model, "full"), ids, (20, 1, 1, 8))
    assert torch.equal(feed(model, MethodCache(model, duo(pattern, sparsity=0.0)), ids, (20, 1, 1, 8)), expected)


@pytest.mark.parametrize("pattern_given", [True, False])
def test_sparsity_one_is_streaming_llm_at_original_positions(model_of, pattern, pattern_given):
    model, ids = model_of("llama"), tiny.text_ids(40)
    chunks = (24, *[1] * 16)
    expected = feed(model, MethodCache(model, "streaming_llm(sinks=2,positions='original')", "8t"), ids, chunks)
    method = duo(pattern if pattern_given else None, sparsity=1.0, recent=6)
    assert not mismatch(feed(model, MethodCache(model, method), ids, chunks), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("chunk", [1, 5, 30])
def test_the_prompts_chunks_do_not_change_which_tokens_are_kept(model_of, pattern, chunk):
    model, ids = model_of("llama"), tiny.text_ids(30)
    cache = MethodCache(model, duo(pattern, sparsity=0.5, prefill="chunks"))
    cache.begin(tokens=30)
    feed(model, cache, ids, chunk)
    assert kept(cache, 0, 1) == [0, 1, 27, 28, 29] and kept(cache, 1, 0) == list(range(30))


def test_sizes_by_hand():
    # 6 heads x 36 tokens: 2 heads of 90 leave 36 for 4 windows of 9 (64:256 -> 1 sink).
    assert DuoAttention(budget=resolve_method("snapkv", 0.4).budget).sizes(90, 6) == Sizes(2, 1, 8)
    assert resolve_method(duo(), "20t").sizes(100, 8) == Sizes(1, 2, 3)
    assert resolve_method(duo(), "20t").sizes(20, 8) == Sizes(8, 2, 3)
    # 8 x 30 = 240: 2 heads of 100 leave 40 for 6 windows of 5.
    assert resolve_method(duo(), "30t").sizes(100, 8) == Sizes(2, 2, 3)
    assert resolve_method(duo(sparsity=0.25)).sizes(100, 6) == Sizes(4, 2, 3)
    assert resolve_method("duo_attention", "1t").sizes(100, 6) == Sizes(0, 0, 1)


@settings(max_examples=200, deadline=None)
@given(
    heads=st.integers(1, 64), seen=st.integers(2, 5000), tokens=st.integers(1, 5000),
    sinks=st.integers(1, 64), recent=st.integers(1, 256),
)  # fmt: skip
def test_sizes_keep_the_budget_and_shrink_with_the_stream(heads, seen, tokens, sinks, recent):
    method = DuoAttention(sinks=sinks, recent=recent, budget=resolve_method("full", f"{tokens}t").budget)
    size, window = method.sizes(seen, heads), min(seen, sinks + recent)
    assert size.recent >= 1 and 0 <= size.sinks <= sinks and size.recent <= recent
    if size.full < heads:
        window = size.sinks + size.recent
        assert size.full * seen + (heads - size.full) * window <= heads * min(tokens, seen)
        assert window >= min(sinks + recent, max(1, tokens // 4))
    assert method.sizes(seen + 1, heads).full <= size.full


def test_without_a_pattern_heads_rank_by_how_far_their_mean_query_looks(model_of):
    model, ids = model_of("llama"), tiny.text_ids(60)
    best = mean_qk_scores(model, [ids]).flatten().sort(descending=True).indices[:3].tolist()
    for chunk in (60, 17):
        cache = MethodCache(model, duo(sparsity=0.5))
        cache.begin(tokens=60)
        feed(model, cache, ids, chunk)
        assert full_set(cache) == {(n // 2, n % 2) for n in best}


def test_heads_can_rank_by_what_the_last_queries_would_lose(model_of):
    model, ids = model_of("llama"), tiny.text_ids(60)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        shares = torch.stack(model(ids, output_attentions=True).attentions)[:, 0]
    far = shares[:, :, -32:, 2 : 60 - 3].sum((2, 3)).unflatten(1, (2, 2)).mean(2)
    best = far.flatten().sort(descending=True).indices[:3].tolist()
    cache = MethodCache(model, duo(sparsity=0.5, ranking="last_queries"))
    feed(model, cache, ids, 60)
    assert full_set(cache) == {(n // 2, n % 2) for n in best}


def test_keys_that_cannot_be_turned_back_are_told_with_the_mend():
    model = LlamaForCausalLM(
        LlamaConfig(**tiny.TEXT, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    ).eval()
    with pytest.raises(ValueError, match="'dynamic' changes its frequencies.*ranking='last_queries'"):
        MethodCache(model, duo(sparsity=0.5))
    for quiet in (duo(sparsity=0.5, ranking="last_queries"), duo(sparsity=0.0), duo(sparsity=1.0)):
        feed(model, MethodCache(model, quiet), tiny.text_ids(12), 12)


@pytest.mark.parametrize("way", ["forgotten", "frozen"])
def test_heads_rank_by_the_tokens_that_are_there(model_of, way):
    """The tokens of a prompt's chunks may be more than those that its end finds, or fewer."""
    model, ids = model_of("llama"), tiny.text_ids(60)
    cache = MethodCache(model, duo(sparsity=0.5))
    cache.begin(tokens=60)
    feed(model, cache, ids[:, :20], 20)
    cache.freeze(way == "frozen")
    feed(model, cache, ids[:, 20:40], 20)
    cache.freeze(False)
    if way == "forgotten":
        cache.forget([[(5, 12)]])
    seen = []
    real = duo_attention.far_score
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(duo_attention, "far_score", lambda q, k, *rest: seen.append(k) or real(q, k, *rest))
        feed(model, cache, ids[:, 40:], 20)
    assert len(seen) == 3 and sorted({len(kept(cache, layer, head)) for layer in range(3) for head in range(2)})[0] == 5
    if way == "frozen":  # of the first layer, whose keys no other token changes: the mean over all 60
        held = MethodCache(model, "full")
        feed(model, held, ids, 60)
        keys = held.layers[0].stored().keys
        plain = cache.layers[0].rotary.turn(keys, -torch.arange(60)[None]).mean(2)[0]
        assert not mismatch(seen[0], plain, atol=1e-5, rtol=0)


def test_a_row_that_a_later_turn_brings_nothing_keeps_its_heads(model_of):
    model, ids = model_of("llama"), tiny.text_ids(40, batch=2)
    cache = MethodCache(model, duo(), "30t")
    feed(model, cache, ids, 40)
    before = full_set(cache, 1)
    # 70 columns: those of the first turn, and 30 of a second that has words for the first row alone
    seen = torch.cat([torch.ones(2, 40), torch.tensor([[1.0], [0.0]]).expand(-1, 30)], 1).long()
    model(tiny.text_ids(30, batch=2), attention_mask=seen, past_key_values=cache)
    assert before and full_set(cache, 1) == before and len(full_set(cache, 0)) < len(before)


@pytest.mark.parametrize("prefill", ["full_then_trim", "chunks"])
def test_a_row_that_begins_in_a_later_block_is_divided_by_its_own_first_prompt(model_of, pattern, prefill):
    model, method = model_of("llama"), duo(pattern, sparsity=0.5, prefill=prefill)
    cache, one, seen = MethodCache(model, method), MethodCache(model, method), torch.ones(2, 50).long()
    seen[1, :33] = 0
    for part, cut in zip(tiny.text_ids(50, batch=2).split((30, 20), 1), (30, 50), strict=True):
        model(part, attention_mask=seen[:, :cut], past_key_values=cache)
    feed(model, one, tiny.text_ids(17), 17)
    assert [x.lengths()[1].tolist() for x in cache.layers] == [x.lengths()[0].tolist() for x in one.layers]


def test_what_came_last_is_nothing_to_a_cache_that_is_emptied(model_of, pattern):
    model, cache = model_of("llama"), MethodCache(model_of("llama"), duo(pattern, sparsity=0.5, prefill="chunks"))
    ids = tiny.text_ids(40, batch=2)
    model(ids, attention_mask=torch.ones(2, 40).long(), past_key_values=cache)
    seen = torch.ones(2, 41).long()
    seen[1, -1] = 0
    model(ids[:, :1], attention_mask=seen, past_key_values=cache)
    assert cache.context.came is None
    cache.reset()
    feed(model, cache, ids, 40)
    assert full_set(cache, 0) == full_set(cache, 1)


def test_rows_without_a_pattern_have_heads_of_their_own(model_of):
    model, ids = model_of("llama"), tiny.text_ids(60, batch=3)
    cache = MethodCache(model, duo(sparsity=0.5))
    feed(model, cache, ids, 60)
    alone = []
    for row in range(3):
        one = MethodCache(model, duo(sparsity=0.5))
        feed(model, one, ids[row : row + 1], 60)
        alone.append(full_set(one))
    assert [full_set(cache, row) for row in range(3)] == alone and len(set(map(frozenset, alone))) > 1


@pytest.mark.parametrize("with_pattern", [True, False])
def test_a_budget_in_tokens_turns_heads_to_streaming_in_later_turns(model_of, pattern, with_pattern):
    model, ids = model_of("llama"), tiny.text_ids(120)
    cache = MethodCache(model, duo(pattern if with_pattern else None), "24t")
    sets = []
    for part in ids.split(40, 1):
        feed(model, cache, part, 40)
        sets.append(full_set(cache))
        assert cache.at_rest.tokens_stored <= 24
    # 6 x 24 = 144 tokens: 3 x 40 + 3 x 5, then 1 x 80 + 5 x 5, then 1 x 120 would leave less than 5 x 5.
    assert [len(s) for s in sets] == [3, 1, 0] and sets[1] < sets[0]
    if with_pattern:
        assert sets[0] == {(1, 0), (1, 1), (2, 1)} and sets[1] == {(1, 0)}


def test_a_share_fixes_the_heads_at_the_first_prompt(model_of, pattern):
    model, ids = model_of("llama"), tiny.text_ids(120)
    cache = MethodCache(model, duo(pattern), 0.4)
    feed(model, cache, ids[:, :40], 40)
    first = full_set(cache)
    feed(model, cache, ids[:, 40:], (1, 1, 78))
    assert full_set(cache) == first and cache.at_rest.tokens_stored <= 0.4 * 120


def test_a_prompt_within_the_budget_stays_exact(model_of, pattern):
    model, ids = model_of("llama"), tiny.text_ids(30)
    cache = MethodCache(model, duo(pattern), "30t")
    expected = feed(model, MethodCache(model, "full"), ids, (29, 1))
    assert torch.equal(feed(model, cache, ids, (29, 1)), expected)
    assert not isinstance(cache.layers[0].segments[0], SplitSegment)


def test_bytes_follow_the_papers_formula(model_of, pattern):
    model = model_of("llama")
    cache = MethodCache(model, duo(pattern, sparsity=0.5, sinks=4, recent=12))
    feed(model, cache, tiny.text_ids(200), 200)
    content = sum(
        x.untyped_storage().nbytes() for layer in cache.layers for x in layer.tensors().values()
        if x.is_floating_point()
    )  # fmt: skip
    # A ring has one slot more than it keeps, for the token that a step still sees.
    assert content / cache.full_bytes() == pytest.approx(0.5 + 0.5 * (4 + 12 + 1) / 200)
    assert cache.kv_bytes() <= 1.12 * content


def test_decoding_grows_full_heads_only(model_of, pattern):
    model = model_of("llama")
    cache = MethodCache(model, duo(pattern, sparsity=0.5))
    feed(model, cache, tiny.text_ids(50), (20, *[1] * 30))
    assert cache.layers[0].lengths().tolist() == [[5, 5]] and cache.layers[1].lengths().tolist() == [[50, 50]]
    assert cache.layers[2].lengths().tolist() == [[5, 50]]


@pytest.mark.parametrize("budget", [0.4, "20t"])
def test_conforms_with_a_pattern(pattern, budget):
    outcomes = {c.name: c.outcome for c in check_method(f"duo_attention(pattern={pattern!r})", budget)}
    assert outcomes["bytes_are_really_gone"] == outcomes["copies_survive_saving"] == "passed"


def test_the_authors_released_files_are_read(model_of, tmp_path):
    model = model_of("llama")
    (tmp_path / "full_attention_heads.tsv").write_text("\n".join("\t".join(map(str, row)) for row in GATES))
    (tmp_path / "config.json").write_text(json.dumps({"sink_size": 128, "recent_size": 256}))
    for path in (tmp_path, tmp_path / "full_attention_heads.tsv"):
        cache = MethodCache(model, duo(str(path), sparsity=0.5))
        feed(model, cache, tiny.text_ids(20), 20)
        assert full_set(cache) == {(1, 0), (1, 1), (2, 1)}


def test_a_pattern_of_another_model_is_refused(model_of, tmp_path):
    model = model_of("llama")
    Pattern(torch.rand(4, 8), sinks=2, recent=4).save(tmp_path / "duo_attention.json")
    cache = MethodCache(model, duo(str(tmp_path), sparsity=0.5))
    with pytest.raises(ValueError, match=r"gates of \(4, 8\) .* the model has \(3, 2\); identify the heads of this"):
        feed(model, cache, tiny.text_ids(8), 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("sinks=0", "sinks=0, recent=256, window=32: each needs at least 1 token"),
        ("recent=0", "recent=0"),
        ("sparsity=1.5", r"sparsity=1.5: a share of heads lies in \[0, 1\]; use e.g. 0.5"),
        ("prefill='strict'", "use 'full_then_trim' or 'chunks'"),
        ("ranking='gates'", "use 'mean_qk' or 'last_queries'"),
        ("prefill='chunks',sparsity=0.5", "give pattern=... and sparsity=..."),
        ("pattern='nowhere.json'", "there is no nowhere.json; make one with `python -m textkv.methods.duo_attention"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        resolve_method(f"duo_attention({arguments})")


def test_sparsity_and_budget_together_are_refused(pattern):
    with pytest.raises(ValueError, match="sparsity=0.5 and budget=0.4 both say how much to keep; give one"):
        resolve_method(duo(pattern, sparsity=0.5), 0.4)


def test_tokens_cannot_be_taken_back(model_of, pattern):
    model = model_of("llama")
    cache = MethodCache(model, duo(pattern, sparsity=0.5))
    feed(model, cache, tiny.text_ids(20), 20)
    with pytest.raises(ValueError, match="evicts while decoding"):
        cache.crop(-1)


def test_the_method_file_is_a_quiet_command(tmp_path, monkeypatch, capsys):
    """`python -m` runs the file a second time, after its package has imported it: without a warning."""
    monkeypatch.setitem(REGISTRY, "duo_attention", DuoAttention)
    monkeypatch.setattr(sys, "argv", ["duo_attention", "identify", "--model", str(tmp_path), "--steps", "0"])
    with warnings.catch_warnings(), pytest.raises(SystemExit):
        warnings.simplefilter("error")
        runpy.run_module("textkv.methods.duo_attention", run_name="__main__")
    assert "--steps: 0 is not" in capsys.readouterr().err
