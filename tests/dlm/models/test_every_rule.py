"""Every family of models with every unmasking rule and every cache, on tiny random weights: exact settings write what
no cache writes, rows of a ragged batch are those alone and leave when they are finished.
"""

from __future__ import annotations

import pytest
import torch

from dlm.cache import list_caches, resolve_cache
from dlm.decode import decode
from dlm.models import load_model
from dlm.prompts import pad_left
from dlm.unmask import list_rules, parse_rule
from tests.dlm.models import slow_blocks as slow
from tests.dlm.models.checkpoints import published, write

RULES = [
    "confidence", "edit(0.3,0.2,rounds=2)", "entropy", "entropy(compat=True,alg_temp=0.5)", "entropy_bound(0.5)",
    "factor(1.0)", "hierarchical(0.3,low=0.1)", "klass(0.2,1.0)", "maskgit_plus", "origin(compat=True)", "origin",
    "random", "ssd(3)", "threshold(0.3)", "topk_margin", "wino(0.2,0.3)",
]  # fmt: skip
# Settings that compute everything anew, or in a block-causal model whatever a finished block does not keep.
EXACT = {
    "whole": ["prefix(refresh=1)", "dual(refresh=1)", "freecache(refresh=1)", "dkv(1)", "dllm-cache(1,1,0)",
              "elastic(64,refresh=1)"],
    "blocks": ["block", "block(fold=False)", "freecache", "prefix", "dual", "block+suffix(0)", "dkv(1)", "block+full"],
}  # fmt: skip
STALE = {
    "whole": ["prefix", "dual", "dual+suffix(4)", "freecache", "freecache(0)+suffix(2)", "freecache+kivi(4)", "dkv(3)",
              "dllm-cache(5,3,0.4)", "elastic(6,0.95)", "dual('commit_first')"],
    "blocks": ["dkv(3)", "freecache(0)", "block+kivi(4)", "freecache+snapkv(0.5)", "dual+suffix(2)"],
}  # fmt: skip
FAMILIES = [*slow.CONFIGS, "llada", "Dream"]
LENGTHS = (3, 14, 8)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("every")
    folders = {f: write(root / f, config, slow.random_state(f)) for f, config in slow.CONFIGS.items()}
    folders |= {f: published(root / f, f) for f in ("llada", "Dream")}
    return {f: load_model(folder)[0] for f, folder in folders.items()}


def test_nothing_is_left_out():
    assert {parse_rule(rule).name for rule in RULES} == set(list_rules()) - {"guided"}
    caches = [*EXACT["whole"], *EXACT["blocks"], *STALE["whole"], *STALE["blocks"]]
    assert {resolve_cache(cache).name.partition("+")[0] for cache in caches} == set(list_caches()) - {"none"}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("family", FAMILIES)
def test_caches_and_rows(models, family, rule):
    model = models[family]
    kind = "blocks" if model.decoding_spec.block else "whole"
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, 60, (n,), generator=generator).tolist() for n in LENGTHS]
    options = {"gen_length": 9, "unmask": rule, "block_length": "auto" if kind == "blocks" else 5}
    if not rule.startswith("ssd"):
        options["steps"] = 6
    if model.decoding_spec.shift and rule.startswith("wino"):
        with pytest.raises(ValueError, match="a model whose rows predict their own slots"):
            decode(model, torch.tensor([prompts[0]]), **options)
        return

    def run(cache, rows):
        seeds = [torch.Generator().manual_seed(row) for row in rows]
        try:
            return decode(model, *pad_left([prompts[row] for row in rows], 61), cache=cache, generator=seeds, **options)
        except ValueError as error:
            assert rule.partition("(")[0] in str(error), cache  # refused by the rule, which names itself
            return None

    # All pairs would take minutes: every rule meets half of a family's exact caches, and every family's rules all.
    turn = RULES.index(rule) + FAMILIES.index(family)
    want = run("none", range(3))
    assert not bool((want.ids == 60).any())
    for cache in EXACT[kind][turn % 2 :: 2]:
        got = run(cache, range(3))
        assert got is None or torch.equal(got.ids, want.ids), cache
    caches = [*EXACT[kind], *STALE[kind]]
    for cache in (caches[turn % len(caches)], STALE[kind][turn % len(STALE[kind])]):
        if (together := run(cache, range(3))) is None:
            continue
        alone = [run(cache, [row]) for row in range(3)]
        assert together.ids.tolist() == [one.ids[0].tolist() for one in alone], cache
        assert together.stats.committed == [one.stats.committed[0] for one in alone], cache
        # What is less than a token through all layers `elastic` counts with the next forward.
        more = together.stats.query_tokens - sum(one.stats.query_tokens for one in alone)
        assert more == 0 or (cache.startswith("elastic") and 0 <= more < 3), cache
