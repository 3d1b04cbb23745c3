"""Elastic-Cache against a slow loop over one row, and the settings in which it is something else."""

from __future__ import annotations

import pytest
import torch

from dlm.cache import resolve_cache
from dlm.decode import decode
from dlm.models.backbone import full_tables, rope_tables
from tests.dlm.toys import MASK, Rule, dream, llada, prompts, traced


def attend(layer, q, k, v):
    group = q.shape[1] // k.shape[1]
    p = (q @ k.repeat_interleave(group, 1).mT * layer.scaling).softmax(-1)
    return p, layer.to_out((p @ v.repeat_interleave(group, 1)).transpose(1, 2).flatten(2))


class Slow:
    """One row; every store is a list of whole tensors, and rows are picked out by lists of slots."""

    def __init__(self, model, window: int, gamma: float) -> None:
        self.model, self.window, self.gamma = model, window, gamma
        self.x, self.q, self.k, self.v, self.watched = [], [], [], [], []
        self.counts: list[list[int]] = []

    def __call__(self, ids: list[int], recent: list[int]) -> torch.Tensor:
        model, n = self.model, len(ids)
        tables = rope_tables(torch.arange(n)[None], model.rotated, model.config.rope_theta)
        look = [i for i in range(n) if ids[i] == MASK][: self.window]
        first, shift = not self.x, model.decoding_spec.shift
        need = set(look) | set(recent)
        need |= {i - 1 for i in need if shift and i}
        rows = list(range(n)) if first else sorted(need | {i for i in self.watched if i is not None})
        fresh, hidden, counts = list(range(n)), model.embed(torch.tensor([ids])), []
        watched: list[int | None] = []
        for i, layer in enumerate(model.layers):
            if first:
                self.x.append(hidden)
            self.x[i] = self.x[i].clone()
            self.x[i][:, fresh] = hidden[:, fresh]
            normed = layer.input_norm(self.x[i][:, rows])
            q, k = layer.qk(normed, full_tables(tuple(t[:, rows] for t in tables)))
            v = layer.v(normed)
            if first:
                self.q.append(q), self.k.append(k), self.v.append(v)
            old = attend(layer, self.q[i], self.k[i], self.v[i])[0]
            for store, new in ((self.q, q), (self.k, k), (self.v, v)):
                store[i] = store[i].clone()
                store[i][:, :, rows] = new
            now, out = attend(layer, self.q[i], self.k[i], self.v[i])
            counts.append(len(rows))
            part = self.x[i][:, rows] + out[:, rows]
            part = part + layer.ffn(part)
            hidden = self.x[i].clone()
            hidden[:, rows] = part
            fresh = rows
            text = [s for s in range(n) if ids[s] != MASK]
            mass = now[0][:, look].sum((0, 1))
            watched.append(max(text, key=lambda s: float(mass[s])))
            if not first and len(rows) < n:
                t = self.watched[i]
                cosine = torch.cosine_similarity(old[0, :, t], now[0, :, t], dim=-1).mean()
                rows = list(range(n)) if cosine < self.gamma else rows
        self.watched = watched
        self.counts.append(counts)
        return model.head(model.final_norm(hidden))[0]


@pytest.mark.parametrize("make", [llada, dream])
@pytest.mark.parametrize("gamma", [-1, 0.995, 0.9999])
@torch.no_grad()
def test_it_is_the_slow_loop(make, gamma):
    model, ids = make(3), prompts(5)[0]
    shift = model.decoding_spec.shift
    slow, row, recent, trail = Slow(model, 4, gamma), ids[0].tolist() + [MASK] * 10, [], []

    def same(canvas, slots, logits):
        nonlocal recent
        want = slow(row, recent)
        there = slots[0] >= 0
        assert slots[0][there].tolist() == [i for i in range(15) if row[i] == MASK][:4]
        assert torch.allclose(logits[0][there], want[slots[0][there] - shift], atol=1e-4)
        trail.append(canvas)
        return logits

    def after(canvas, stats):
        nonlocal row, recent
        now = canvas.ids[0].tolist()
        recent = [i for i in range(15) if now[i] != row[i]]
        row = now

    got = decode(model, ids, gen_length=10, block_length=None, cache=f"elastic(4, {gamma})", unmask="threshold(0.3)",
                 eos="none", logits_hook=same, on_step=after)  # fmt: skip
    assert got.stats.query_tokens == sum(sum(counts) for counts in slow.counts) // 3
    kinds = {len(set(counts)) for counts in slow.counts[1:]}
    # Some forwards find drift in the middle of the layers, others none.
    assert kinds == {1} if gamma == -1 else 2 in kinds


@pytest.mark.parametrize("make", [llada, dream])
def test_always_fresh_it_is_no_cache(make):
    model, (ids, mask) = make(), prompts(3, 9, 5)
    for options in (dict(refresh=1), dict(gamma=1.5)):
        text = ",".join(f"{k}={v}" for k, v in options.items())
        want, truth = traced(model, ids, "none", Rule(), attention_mask=mask)
        got, seen = traced(model, ids, f"elastic(12,{text})", Rule(), attention_mask=mask)
        if "refresh" in options:
            assert torch.equal(got.ids, want.ids)
            assert all(torch.allclose(a[1], b[1], atol=1e-5) for a, b in zip(truth, seen, strict=True))
        assert got.stats.query_tokens <= want.stats.query_tokens


@pytest.mark.parametrize("make", [llada, dream])
@pytest.mark.parametrize("cfg", [0.0, 0.7])
def test_a_batch_is_its_rows_alone(make, cfg):
    model, lengths = make(3), (3, 9, 5)
    ids, mask = prompts(*lengths)
    options = dict(gen_length=12, block_length=6, cache="elastic(5,0.99,2)", unmask="threshold(0.35)", cfg_scale=cfg)
    together = decode(model, ids, mask, **options)
    alone = [decode(model, ids[i : i + 1, 9 - n :], **options) for i, n in enumerate(lengths)]
    assert together.ids.tolist() == [one.ids[0].tolist() for one in alone]
    # Tokens are a mean over layers, and what is less than one at the end is not told.
    assert 0 <= together.stats.query_tokens - sum(one.stats.query_tokens for one in alone) < len(lengths)


@pytest.mark.parametrize(("gamma", "waits"), [(-1, 3), (1.5, 3)])
def test_drift_is_asked_for_only_where_layers_follow(gamma, waits, monkeypatch):
    """Of three layers: the rows of the first, and drift in two; or once, and then the rows of all that follow."""
    model, seen, plain = llada(3), [], torch.Tensor.__bool__

    def hook(canvas, slots, logits):
        seen.append(0)
        return logits

    def counted(tensor):
        if seen and model.running:
            seen[-1] += 1
        return plain(tensor)

    forward = model.forward

    def watched(*args, **kwargs):
        model.running = True
        try:
            return forward(*args, **kwargs)
        finally:
            model.running = False

    model.running = False
    monkeypatch.setattr(model, "forward", watched)
    monkeypatch.setattr(torch.Tensor, "__bool__", counted)
    decode(model, prompts(5)[0], gen_length=6, block_length=None, cache=f"elastic(4,{gamma})", unmask="confidence",
           eos="none", logits_hook=hook)  # fmt: skip
    assert seen[0] == seen[1] == waits  # of the forwards behind the first, which computes everything


def test_expressions_and_what_cannot_be():
    assert resolve_cache("elastic(8, gamma=0.8)").expression == "elastic(window=8,gamma=0.8)"
    for cache, message in (
        ("elastic(0)", "window=0 is no number of slots"),
        ("elastic(gamma='a')", "gamma='a' is not a number"),
        ("elastic+suffix(4)", "computes whole rows here and cannot leave slots out"),
        ("elastic", "does not compute them"),
    ):
        with pytest.raises(ValueError, match=message):
            decode(llada(), prompts(5)[0], gen_length=8, cache=cache, unmask="edit" if cache == "elastic" else Rule())
