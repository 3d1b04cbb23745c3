"""The checks themselves, each a function of the bench; see `textkv.conformance`."""

from __future__ import annotations

import io
import pickle
import tempfile
from collections.abc import Callable

import torch
from transformers import DynamicCache

from textkv.cache import MethodCache
from textkv.conformance.bench import Bench, NotApplicable, refused, same
from textkv.conformance.oracle import MASKED
from textkv.method import Method
from textkv.positions import RotarySpec
from textkv.segments.base import storage_bytes
from textkv.segments.tiered import TieredSegment


def full_budget_equals_full_cache(bench: Bench) -> None:
    """Budget enough for everything: prompt, decoding and a second turn give the logits of transformers' own cache."""
    if bench.policy.capabilities.lossy:
        raise NotApplicable("what is stored is not exact")
    ids, cache, plain = bench.ids[:1], bench.cache(bench.enough), bench.plain()
    for step in (ids[:, :60], ids[:, 60:61], ids[:, 61:62], ids[:, 62:80], ids[:, 80:81]):
        same(bench.run(cache, step), bench.run(plain, step), "a forward")


def equals_masked_full_attention(bench: Bench) -> None:
    """Decoding after eviction equals full attention in which the dropped tokens are masked."""
    if not bench.policy.capabilities.original_positions:
        raise NotApplicable("keys are moved to other positions")
    if bench.policy.capabilities.retrieves:
        raise NotApplicable("which tokens are seen changes at every step")
    if bench.policy.capabilities.merges:
        raise NotApplicable("kept tokens change to stand for dropped ones")
    if bench.policy.capabilities.lossy:
        raise NotApplicable("what is stored is not exact")
    ids, cache = bench.ids[:2], bench.cache()
    bench.run(cache, ids[:, :60])
    kept = {kind.number: _kept_mask(cache, kind.number, 60) for kind in cache.context.kinds if kind.governed}
    # What was kept is noted before decoding, since that may evict again.
    ours = bench.decode(cache, ids[:, 60:64])
    if bench.policy.capabilities.decode_eviction:
        raise NotApplicable("which tokens are kept changes at every step")
    bench.model.set_attn_implementation(MASKED)
    # A state is transformers' own to keep; all tokens of windows stay, so that the oracle masks them itself.
    plain = bench.plain() if cache.states else DynamicCache()
    with torch.no_grad():
        bench.model(ids[:, :60], past_key_values=plain)
        masked = [
            bench.model(ids[:, 60 + i : 61 + i], past_key_values=plain, kept=kept).logits for i in range(4)
        ]  # fmt: skip
    same(ours, torch.cat(masked, 1), "decoding")


def padded_batch_equals_single_runs(bench: Bench) -> None:
    """Rows of different length, padded on the left, give what each gives alone."""
    lengths, width = (80, 43, 30), 80  # so unequal that rows are not held as one rectangle
    mask = torch.stack([torch.arange(width) >= width - n for n in lengths]).long()
    ids = torch.zeros(3, width, dtype=torch.int64)
    for row, n in enumerate(lengths):
        ids[row, width - n :] = bench.ids[row, :n]
    cache = bench.cache()
    prompt = bench.run(cache, ids, mask)
    after = bench.decode(cache, bench.ids[:, 80:84], mask)
    for row, n in enumerate(lengths):
        alone = bench.cache()
        one = slice(row, row + 1)
        same(prompt[one, width - n :], bench.run(alone, bench.ids[one, :n]), f"the prompt of row {row}")
        same(after[one], bench.decode(alone, bench.ids[one, 80:84]), f"decoding of row {row}")


def second_turn_continues(bench: Bench) -> None:
    """After eviction the cache still counts every token seen, and a further prompt gets the next positions."""
    ids, cache, seen = bench.ids[:1], bench.cache(), []
    # Positions are read where the model turns its keys, if it does: the only place where a wrong one does harm.
    rotary = [m for n, m in bench.model.named_modules() if n.endswith("rotary_emb")][:1]

    def note(module, args, kwargs):
        given = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor) and not x.is_floating_point()]
        at = given[-1].reshape(-1, given[-1].shape[-1])[0].tolist()
        if seen[-len(at) :] != at:  # some models turn once for each kind of layer
            seen.extend(at)

    handles = [module.register_forward_pre_hook(note, with_kwargs=True) for module in rotary]
    try:
        bench.run(cache, ids[:, :50])
        bench.decode(cache, ids[:, 50:53])
        out = bench.run(cache, ids[:, 53:70])
        bench.decode(cache, ids[:, 70:72])
    finally:
        for handle in handles:
            handle.remove()
    assert not rotary or seen == list(range(72)), f"positions are not contiguous over turns: {seen}"
    assert cache.get_seq_length() == 72, f"the cache says {cache.get_seq_length()} tokens, 72 were seen"
    assert bool(out.isfinite().all()), "the second turn's logits are not finite"


def fork_is_independent(bench: Bench) -> None:
    """A fork goes on like the original would, and neither sees the other's tokens."""
    ids, cache = bench.ids[:1], bench.cache()
    bench.run(cache, ids[:, :50])
    other = cache.fork()
    first = bench.decode(other, ids[:, 60:64])
    bench.decode(cache, ids[:, 70:74])
    again = bench.cache()
    bench.run(again, ids[:, :50])
    same(first, bench.decode(again, ids[:, 60:64]), "the fork")


def crop_or_refusal(bench: Bench) -> None:
    """Tokens since the last eviction can be taken back exactly; anything else is refused with ValueError."""
    ids, cache = bench.ids[:1], bench.cache()
    bench.run(cache, ids[:, :50])
    kept = cache.fork()
    bench.decode(cache, ids[:, 50:54])
    if not cache.is_croppable:
        refused(lambda: cache.crop(-4), "crop although the method says that it cannot")
        raise NotApplicable("crop is refused with a clear error")
    if cache.states or any(kind.window is not None for kind in cache.context.kinds):
        refused(lambda: cache.crop(-4), "crop although a state or a window has moved on")
        raise NotApplicable("the model itself has let go of what it would see again")
    if any(layer.since_eviction < 4 for layer in cache.context.layers):
        refused(lambda: cache.crop(-4), "crop of tokens before the last eviction")
        raise NotApplicable("tokens were moved while these were decoded, and crop is refused with a clear error")
    cache.crop(-4)
    same(bench.decode(cache, ids[:, 60:63]), bench.decode(kept, ids[:, 60:63]), "decoding after crop")
    if cache.at_rest.tokens_stored < 50:
        refused(lambda: cache.crop(-30), "crop beyond the last eviction")


def chunked_prompt_equals_whole(bench: Bench) -> None:
    """A prompt announced with `begin` and fed in chunks keeps what it would have kept in one forward."""
    ids, whole, chunked = bench.ids[:1], bench.cache(), bench.cache()
    bench.run(whole, ids[:, :60])
    chunked.begin(tokens=60)
    for chunk in ids[:, :60].split((1, 24, 33, 2), 1):
        bench.run(chunked, chunk)
    same(bench.decode(chunked, ids[:, 60:64]), bench.decode(whole, ids[:, 60:64]), "decoding after chunks")


def rows_can_be_reordered(bench: Bench) -> None:
    """Beams: reordering, repeating and selecting rows moves everything that belongs to a row."""
    order = torch.tensor([2, 0, 1])
    cache, moved = bench.cache(), bench.cache()
    bench.run(cache, bench.ids[:, :50])
    bench.run(moved, bench.ids[:, :50])
    moved.reorder_cache(order)
    step = bench.ids[:, 50:53]
    same(bench.decode(moved, step[order]), bench.decode(cache, step)[order], "decoding after a reorder")
    twice = bench.cache()
    bench.run(twice, bench.ids[:2, :50])
    twice.batch_repeat_interleave(2)
    twice.batch_select_indices(torch.tensor([0, 2]))
    alone = bench.cache()
    bench.run(alone, bench.ids[:2, :50])
    same(bench.decode(twice, step[:2]), bench.decode(alone, step[:2]), "decoding after repeat and select")


def bytes_are_really_gone(bench: Bench) -> None:
    """No tensor of keys or values is reachable beside those reported, and the bytes fit the budget."""
    cache = bench.cache()
    bench.run(cache, bench.ids[:1, :90])
    governed = cache.context.layers
    # Two ways to the same sum: what segments say they hold, and what can be reached from them.
    known = [x for layer in cache.layers if hasattr(layer, "segments") for x in layer.tensors().values()]
    for layer in cache.states:
        known += [x for of_kind in (layer.conv_states, layer.recurrent_states) for x in of_kind.values()]
    found = storage_bytes([x for x in _tensors_within(cache.layers, set()) if x.is_floating_point()])
    told = storage_bytes([x for x in known if x is not None and x.is_floating_point()])
    assert found == told, f"{told} bytes of keys and values reported, {found} reachable from the layers"
    # What waits in host memory may be more than the budget, which counts what a token sees.
    if not bench.policy.evicts or bench.policy.capabilities.retrieves:
        return
    allowed = bench.policy.allowance.count(90)
    stored = cache.at_rest.tokens_stored
    copies = 2 if bench.policy.capabilities.stores_query_heads else 1
    assert stored <= allowed, f"{stored} tokens stored per head, the budget allows {allowed}"
    # One slot of slack for a ring, and bookkeeping of at most 12 bytes a token and head.
    first, layers = governed[0], len(governed)
    per_token = 2 * first.head_dim * 4 + 12
    limit = copies * (allowed + 1) * first.kv_heads * layers * per_token + 256 * layers
    held = sum(layer.kv_bytes() for layer in governed) + cache.context.table_bytes()
    assert held <= limit, f"{held} bytes held where the budget allows {limit}"


def host_and_device_apart(bench: Bench) -> None:
    """Every storage counts on one side, the host's or the device's; and a decoded token sees no more than the budget of
    a method that retrieves."""
    cache = bench.cache()
    bench.run(cache, bench.ids[:2, :90])
    bench.decode(cache, bench.ids[:2, 90:94])
    layers = [layer for layer in cache.layers if hasattr(layer, "segments")]
    for layer in layers:
        held, host = storage_bytes(list(layer.tensors().values())), []
        for segment in layer.segments:
            host += segment.host_tensors().values()
        told = layer.kv_bytes() + storage_bytes(host)
        # What a library holds for an index is no tensor: it may add to what is told of the host.
        assert layer.host_bytes() >= storage_bytes(host), f"layer {layer.kind.number} tells too few bytes on the host"
        assert held == told, f"layer {layer.kind.number}: {held} bytes held, {told} told of host and device together"
    assert cache.report().host_bytes == cache.host_bytes(), "the report tells another number of bytes on the host"
    if not bench.policy.capabilities.retrieves or bench.policy.budget.is_full:
        return
    allowed = bench.policy.budget.count(90)
    tiers = [segment for layer in layers for segment in layer.segments if isinstance(segment, TieredSegment)]
    assert tiers and cache.host_bytes(), "nothing lies on the host"
    for segment in tiers:
        seen = int((segment.near() + segment.host.seen).max())
        assert seen <= allowed, f"a token sees {seen} others, the budget allows {allowed}"


def copies_survive_saving(bench: Bench) -> None:
    """Pickling and saving to safetensors give a cache that goes on alike; reset gives an empty one."""
    ids, cache = bench.ids[:1], bench.cache()
    bench.run(cache, ids[:, :50])
    pickled = pickle.load(io.BytesIO(pickle.dumps(cache)))
    pickled.bind(bench.model)
    with tempfile.TemporaryDirectory() as folder:
        cache.save(folder)
        loaded = MethodCache.load(folder, bench.model)
    expected = bench.decode(cache, ids[:, 50:54])
    same(bench.decode(pickled, ids[:, 50:54]), expected, "the pickled copy")
    same(bench.decode(loaded, ids[:, 50:54]), expected, "the saved copy")
    cache.reset()
    fresh = bench.cache()
    same(bench.run(cache, ids[:, 20:60]), bench.run(fresh, ids[:, 20:60]), "the prompt after a reset")
    same(bench.decode(cache, ids[:, 60:63]), bench.decode(fresh, ids[:, 60:63]), "decoding after a reset")


def forgotten_tokens_are_gone(bench: Bench) -> None:
    """`forget` drops what it names, twice as once, frees what it can and moves nothing else; and a method that keeps
    exact tokens then gives what full attention gives with these tokens masked."""
    ids, spans = bench.ids[:2], [[(5, 20), (40, 44)], [(30, 42)]]
    gone = torch.zeros(2, 60, dtype=torch.bool)
    for row, of_row in enumerate(spans):
        for start, stop in of_row:
            gone[row, start:stop] = True
    cache = bench.cache()
    bench.run(cache, ids[:, :60])
    for wrong in ([], [[(0, 5)]], [[(5, 5)], []], [[(-1, 3)], []], [[(50, 61)], []], [[(9, 3)], []]):
        refused(lambda wrong=wrong: cache.forget(wrong), f"forget({wrong})")
    # A refused request must have changed nothing: what follows would show it.
    before, kept = cache.kv_bytes(), _positions(cache)
    cache.forget(spans)
    assert cache.kv_bytes() <= before, f"{before} bytes before forgetting, {cache.kv_bytes()} after"
    for number, (old, now) in enumerate(zip(kept, _positions(cache), strict=True)):
        for row, heads in enumerate(old):
            for head, tokens in enumerate(heads):
                left = {x for x in tokens if not gone[row, x]}
                assert now[row][head] == left, f"layer {number}, row {row}, head {head}: {now[row][head] ^ left} differ"
    held, again = cache.kv_bytes(), _positions(cache)
    cache.forget(spans)
    assert (cache.kv_bytes(), _positions(cache)) == (held, again), "forgetting twice is not as once"
    assert cache.get_seq_length() == 60, "forgotten tokens still count: later ones keep their positions"
    out = bench.decode(cache, ids[:, 60:64])
    cache.forget([[(0, 61)], [(0, 61)]])
    late = bench.run(cache, ids[:, 64:76])
    assert bool(out.isfinite().all() and late.isfinite().all()), "logits after forgetting are not finite"
    known = bench.policy.capabilities
    if known.lossy or known.merges or not known.original_positions:
        raise NotApplicable("what is stored is not exact, stands for dropped tokens, or lies at other positions")
    if cache.states:
        raise NotApplicable("states remember what they have read")
    # With everything kept, forgetting is all that differs from full attention.
    cache, plain = bench.cache(bench.enough), bench.plain()
    mask = torch.cat([~gone, torch.ones(2, 16, dtype=torch.bool)], 1).long()
    for held in (cache, plain):
        bench.run(held, ids[:, :60])
    cache.forget(spans)
    for start, stop in ((60, 61), (61, 62), (62, 75), (75, 76)):
        with torch.no_grad():
            at = torch.arange(start, stop)[None].expand(2, -1)
            expected = bench.model(
                ids[:, start:stop], past_key_values=plain, attention_mask=mask[:, :stop], position_ids=at
            ).logits
        same(bench.run(cache, ids[:, start:stop]), expected, f"tokens {start} to {stop} after forgetting")


CHECKS: dict[str, Callable[[Bench], None]] = {
    check.__name__: check
    for check in (
        full_budget_equals_full_cache, equals_masked_full_attention, padded_batch_equals_single_runs,
        second_turn_continues, fork_is_independent, crop_or_refusal, chunked_prompt_equals_whole,
        rows_can_be_reordered, forgotten_tokens_are_gone, bytes_are_really_gone, host_and_device_apart,
        copies_survive_saving,
    )
}  # fmt: skip


def _kept_mask(cache: MethodCache, layer: int, columns: int) -> torch.Tensor:
    kept = cache.kept_positions(layer).long()
    mask = torch.zeros(*kept.shape[:2], columns + 1, dtype=torch.bool)
    return mask.scatter_(2, kept.masked_fill(kept < 0, columns), True)[..., :columns]


def _positions(cache: MethodCache) -> list[list[list[set[int]]]]:
    """The tokens that each head of each row holds, by layer."""
    return [
        [[{x for x in head if x >= 0} for head in row] for row in layer.held_positions().tolist()]
        for layer in cache.layers
        if hasattr(layer, "segments")
    ]


def _tensors_within(thing: object, seen: set[int]):
    """Every tensor reachable from an object through containers and attributes (weak references are not followed)."""
    if id(thing) in seen or isinstance(thing, type | Method | RotarySpec | str):
        return
    seen.add(id(thing))
    if isinstance(thing, torch.Tensor):
        yield thing
        return
    parts = thing.values() if isinstance(thing, dict) else thing if isinstance(thing, list | tuple | set) else ()
    for part in (*parts, *getattr(thing, "__dict__", {}).values()):
        yield from _tensors_within(part, seen)
