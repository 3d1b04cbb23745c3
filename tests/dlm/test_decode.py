"""The loop: exact steps, ends of text, guidance, forced first slots, statistics, and every request that cannot work."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from dlm.cache import list_caches, resolve_cache
from dlm.decode import StuckError, decode
from dlm.models import DecodingSpec
from dlm.unmask import Choice, list_rules, parse_rule
from tests.dlm.toys import END, MASK, PAD, VOCAB, Counter, Rule, Unmasker, dream, llada, prompts, traced


class Script:
    """A model that writes row r's text[r], the first slots most surely."""

    def __init__(self, *texts: list[int], prompt: int = 3) -> None:
        self.decoding_spec = DecodingSpec(MASK, (END, END - 5), PAD, 0, 256, "confidence")
        self.texts, self.prompt = torch.tensor(texts), prompt

    def __call__(self, input_ids, *, position_ids, past_key_values, logits_rows, attention_mask):
        positions = position_ids.gather(1, logits_rows).clamp(min=self.prompt) - self.prompt
        # The prompt's first token is its row's number: rows that are finished do not come here any more.
        texts = self.texts[input_ids[:, 0] % len(self.texts)]
        logits = torch.zeros(*positions.shape, VOCAB)
        sure = 12.0 - 0.5 * positions.float()
        return SimpleNamespace(logits=logits.scatter(2, texts.gather(1, positions)[..., None], sure[..., None]))


def script(*texts, rule=None, **options):
    model = Script(*texts)
    ids = torch.arange(len(texts))[:, None].repeat(1, 3)
    options = {"gen_length": 8, "block_length": 4, "cache": "none", **options}
    return decode(model, ids, unmask=rule or Rule(), **options)


@pytest.mark.parametrize("eos, forwards", [("stop", 3), ("fill", 3), ("none", 8)])
def test_end_of_text(eos, forwards):
    got = script([5, 6, END, 7, 8, 9, 1, 2], eos=eos)
    assert got.stats.forwards == forwards
    assert got.ids.tolist() == [[5, 6, END, 7, 8, 9, 1, 2] if eos == "none" else [5, 6] + [END] * 6]
    assert got.stats.committed == [forwards] and got.stats.text_tokens == [2]


class Backwards(Unmasker):
    """Commits from the right."""

    def choose(self, logits, slots, canvas):
        last = slots == slots.max(1, keepdim=True).values
        return Choice(logits.argmax(-1), last & (slots >= 0))


class BackwardsRule(Rule):
    def begin(self, canvas, spec, generator, steps):
        return Backwards(self)


def test_an_end_waits_for_the_masks_before_it():
    """The text behind the end is overwritten, the slots before it are written, whichever way ends are treated."""
    for eos in ("stop", "fill"):
        got = script([5, END, 7, 8, 1, 1, 1, 1], rule=BackwardsRule(), eos=eos)
        assert got.ids.tolist() == [[5] + [END] * 7]
        assert got.stats.forwards == 4


class EndFirst(Unmasker):
    """Commits an end of text first, then from the right."""

    def choose(self, logits, slots, canvas):
        tokens = logits.argmax(-1)
        order = slots + canvas.length * (tokens == END) * (slots >= 0)
        return Choice(tokens, (order == order.max(1, keepdim=True).values) & (slots >= 0))


class EndFirstRule(Rule):
    def begin(self, canvas, spec, generator, steps):
        return EndFirst(self)


@pytest.mark.parametrize("eos, forwards", [("stop", 8), ("fill", 5), ("none", 8)])
def test_fill_saves_the_masks_behind_an_early_end(eos, forwards):
    text = [5, 6, 7, 8, END, 1, 2, 3]
    got = script(text, rule=EndFirstRule(), eos=eos, block_length=8)
    assert got.stats.forwards == forwards
    assert got.ids.tolist() == [text if eos == "none" else text[:4] + [END] * 4]


def test_the_fill_is_the_end_that_the_row_wrote():
    assert script([5, 6, END - 5, 1, 1, 1, 1, 1]).ids.tolist() == [[5, 6] + [END - 5] * 6]


def test_rows_that_end_early_do_not_stop_others():
    got = script([END, 1, 1, 1, 1, 1, 1, 1], [5, 6, 7, 8, 9, 1, 2, 3])
    assert got.ids.tolist() == [[END] * 8, [5, 6, 7, 8, 9, 1, 2, 3]]
    assert got.stats.forwards == 8 and got.stats.row_forwards == 9
    assert got.stats.query_tokens == 9 * 11 and got.stats.committed == [1, 8]
    assert got.stats.tokens_per_forward == 1.0


def test_statistics():
    steps = []
    got = script([1, 2, 3, 4, 5, 6, 7, 8], rule=Rule(quota=2), on_step=lambda canvas, stats: steps.append(stats))
    stats = got.stats
    assert [s.forwards for s in steps] == [1, 2, 3, 4] and [sum(s.committed) for s in steps] == [2, 4, 6, 8]
    assert stats.tokens_per_forward == 2.0 and stats.text_tokens == [8]
    assert stats.guider_forwards == 7 and stats.extra == {"note": "toy"}
    assert stats.seconds >= steps[0].seconds > 0


def test_logits_hook_constrains_what_is_written():
    def no_sevens(canvas, slots, logits):
        assert slots.shape == logits.shape[:2]
        return logits.index_fill(-1, torch.tensor(7), -torch.inf)

    assert 7 not in script([7, 7, 3, 4, 7, 6, 7, 8], logits_hook=no_sevens).ids


def test_one_block_is_pure_diffusion_and_blocks_of_one_read_from_the_left():
    model, (ids, _) = llada(), prompts(5)
    canvas = torch.cat([ids, ids.new_full((1, 6), MASK)], 1)
    left = canvas.clone()

    def best():
        with torch.no_grad():
            logits = model(canvas).logits.index_fill(-1, torch.tensor(MASK), -torch.inf)
        value, token = logits.softmax(-1).max(-1)
        return value.masked_fill(canvas != MASK, -1), token

    for _ in range(6):
        value, token = best()
        canvas[0, value.argmax()] = token[0, value.argmax()]
    diffusion, canvas = canvas, left
    for slot in range(5, 11):
        canvas[0, slot] = best()[1][0, slot]
    options = dict(gen_length=6, unmask="confidence", cache="none", eos="none")
    assert torch.equal(decode(model, ids, block_length=None, **options).ids, diffusion[:, 5:])
    assert torch.equal(decode(model, ids, block_length=1, **options).ids, canvas[:, 5:])


def test_the_shift_matters():
    model, (ids, _) = dream(), prompts(5)
    options = dict(gen_length=6, block_length=6, cache="none", eos="none")
    assert not torch.equal(decode(model, ids, **options).ids, decode(Unshifted(model), ids, **options).ids)


class Unshifted:
    """The same network, said to predict its own slots."""

    def __init__(self, model) -> None:
        self.model, self.decoding_spec = model, replace(model.decoding_spec, shift=0)

    def __call__(self, *args, **kwargs):
        return self.model(*args, **kwargs)


# ---- guidance -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [llada, dream])
def test_guidance_is_the_formula(make):
    model, (ids, _) = make(), prompts(5)
    slots, logits = traced(model, ids, "none", cfg_scale=1.5)[1][0]
    canvas = torch.cat([ids, ids.new_full((1, 12), MASK)], 1)
    blind = canvas.clone()
    blind[:, :5] = MASK
    with torch.no_grad():
        given, alone = model(canvas).logits, model(blind).logits
    mixed = (alone + 2.5 * (given - alone))[0, slots[0, slots[0] >= 0] - model.decoding_spec.shift]
    assert torch.allclose(mixed[..., :MASK], logits[0, slots[0] >= 0][..., :MASK], atol=1e-4)


@pytest.mark.parametrize("cache", ["freecache(refresh=1)", "prefix(refresh=1)", "dual(refresh=1)", "dkv(1)",
                                   "dllm-cache(1,1,0)"])  # fmt: skip
def test_guidance_keeps_a_cache_for_both_halves(cache):
    model, (ids, _) = llada(), prompts(5)
    truth = traced(model, ids, "none", cfg_scale=0.8)[0]
    got = traced(model, ids, cache, cfg_scale=0.8)[0]
    plain = traced(model, ids, cache)[0]
    assert torch.equal(got.ids, truth.ids)
    assert got.stats.query_tokens == 2 * plain.stats.query_tokens and got.stats.forwards == plain.stats.forwards
    assert got.stats.cache_bytes == 2 * plain.stats.cache_bytes


# ---- the first slot of a block in shifted models --------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_commit_first_writes_the_first_slot_alone(cache):
    model, (ids, _) = dream(), prompts(5)
    for rule in (Rule(), Rule(quota=3), Rule(threshold=0.0)):
        _, seen = traced(model, ids, f"{cache}('commit_first')", Rule(rule.quota, rule.threshold))
        starts = [slots[0][slots[0] >= 0].tolist() for slots, _ in seen]
        assert [s for s in starts if len(s) == 1][0] == [5]
        assert {5, 9, 13} <= {s[0] for s in starts if len(s) == 1}
    quota, _ = traced(model, ids, f"{cache}('commit_first')")
    careful, _ = traced(model, ids, cache)
    # One token per step as ever; in the forwards inside a block the window is a token shorter.
    assert quota.stats.forwards == careful.stats.forwards == 12
    assert quota.stats.query_tokens == careful.stats.query_tokens - 9


def test_commit_first_changes_nothing_without_shift():
    model, (ids, _) = llada(), prompts(5)
    one, other = (traced(model, ids, cache)[0] for cache in ("dual", "dual('commit_first')"))
    assert torch.equal(one.ids, other.ids) and one.stats.query_tokens == other.stats.query_tokens


# ---- the whole grid, with the real rules ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guide():
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, eos_token_id=END,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).eval()


CACHES = [*list_caches(False), "freecache(0)", "dual('commit_first')", "freecache+snapkv(0.5)"]


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("rule", list_rules())
@pytest.mark.parametrize("make", [llada, dream])
def test_every_rule_with_every_cache(make, rule, cache, guide):
    model, (ids, mask) = make(), prompts(3, 5)
    policy = resolve_cache(cache)
    if (rule == "ssd" and not policy.still) or (rule == "edit" and not policy.whole_blocks):
        return  # refused, see test_ssd and test_edit
    if rule == "wino" and (make is dream or not (policy.still and policy.whole_blocks)):
        return  # refused, see test_wino
    got = decode(
        model, ids, mask, gen_length=8, block_length=4, cache=cache, unmask=rule,
        guide=guide if rule == "guided" else None, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert got.ids.shape == (2, 8) and MASK not in got.ids
    most = 9 + 2 * parse_rule(rule).idle  # further rounds of both blocks
    assert 1 <= got.stats.forwards <= most and sum(got.stats.committed) > 0
    assert (got.stats.guider_forwards > 0) == (rule == "guided")


def test_defaults_are_the_models_rule_and_the_guides():
    model, (ids, _) = llada(), prompts(5)
    own = decode(model, ids, gen_length=8, block_length=4)
    assert torch.equal(own.ids, decode(model, ids, gen_length=8, block_length=4, unmask="confidence").ids)


def test_sampling_is_handed_to_the_rule():
    model, (ids, _) = llada(), prompts(5)

    def draw(seed, **options):
        generator = torch.Generator().manual_seed(seed)
        return decode(model, ids, gen_length=8, block_length=4, eos="none", generator=generator, **options).ids.tolist()

    assert draw(0, temperature=2.0) == draw(0, temperature=2.0)
    assert len({str(draw(seed, temperature=2.0)) for seed in range(4)}) > 1
    assert draw(0, temperature=2.0, top_k=1) == draw(1)


# ---- what cannot work -----------------------------------------------------------------------------------------------

IDS = torch.ones(1, 4, dtype=torch.int64)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(gen_length=0), r"gen_length=0 fills the masks \(token 23\) of the input, and a row has none"),
        (dict(gen_length=-1), "gen_length=-1 is no number of tokens"),
        (dict(gen_length=8.0), "gen_length=8.0 is no number of tokens"),
        (dict(gen_length=8, block_length=0), "block_length=0 is no number of tokens"),
        (dict(gen_length=8, block_length=9), "block_length=9 is longer than gen_length=8; use at most that, or None"),
        (dict(gen_length=8, block_length=2, steps=3), "steps=3 do not reach gen_length=8: each of its 4 blocks of 2"),
        (dict(gen_length=8, block_length=2, steps=0), "steps=0 is no number of forwards"),
        (dict(gen_length=8, block_length=8, cfg_scale=-1), "cfg_scale=-1 is no strength of guidance"),
        (dict(gen_length=8, block_length=8, eos="cut"), "eos='cut': use 'stop', 'fill' or 'none'"),
        (dict(gen_length=253, block_length=8), "need 257 positions, the model has 256; .* generate at most 252"),
        (dict(gen_length=8, block_length=8, input_ids=IDS.int()), "input_ids are torch.int32 of shape"),
        (dict(gen_length=8, block_length=8, input_ids=IDS[0]), "input_ids are torch.int64 of shape \\[4\\]"),
        (dict(gen_length=8, block_length=8, input_ids=IDS[:0]), "at least one row"),
        (dict(gen_length=8, block_length=8, input_ids=IDS * MASK), f"a prompt contains the mask token {MASK}"),
        (
            dict(gen_length=8, block_length=8, attention_mask=torch.tensor([[1, 1, 1, 0]])),
            "padded on the right or inside; pad on the left",
        ),
        (dict(gen_length=8, block_length=8, attention_mask=torch.ones(1, 3)), "one value per token"),
        (dict(gen_length=8, block_length=8, cache="freecash"), "unknown cache 'freecash'; did you mean freecache"),
        (dict(gen_length=8, block_length=8, cache="freecache(2)"), "delay=2: use 0"),
        (dict(gen_length=8, block_length=8, cache="freecache(dalay=0)"), "its arguments are: delay, refresh$"),
        (dict(gen_length=8, block_length=8, cache="dkv(0)"), "refresh=0 is no number of forwards; use 1 or more"),
        (
            dict(gen_length=8, block_length=8, cache="prefix(refresh=True)"),
            "refresh=True is not a whole number or None",
        ),
        (dict(gen_length=8, block_length=8, cache="dual('hasty')"), "shift_mode='hasty': use 'careful'"),
        (dict(gen_length=8, block_length=8, cache="dllm-cache(ratio=1.5)"), "ratio=1.5 is no share of the response"),
        (dict(gen_length=8, block_length=8, cache="dllm-cache(0)"), "prompt_interval=0 is no number of forwards"),
        (
            dict(gen_length=8, block_length=8, cache="dllm-cache(gen_interval=None)"),
            "gen_interval=None is not a whole number",
        ),
        (dict(gen_length=8, block_length=8, unmask="threshold('x')"), "tau='x'"),
        (dict(gen_length=8, block_length=8, temperature=-1.0), "temperature=-1.0"),
        (dict(gen_length=8, input_ids=IDS * 24), "input_ids hold 24, and the model has tokens 0 to 23; use the ids of"),
        (dict(gen_length=8, input_ids=-IDS), "input_ids hold -1"),
        (dict(gen_length=8, generator=[7]), r"generator has 7, which is none; give torch.Generator\(\)"),
        (dict(gen_length=8, guide=llada()), "the guide is a LLaDAModelLM, a diffusion model; a guide reads from the"),
        (dict(gen_length=8, unmask=3), "unmask=3 is neither a text nor a Rule"),
    ],
)
def test_a_request_that_cannot_work_is_refused_before_the_first_forward(options, message):
    class Never:
        decoding_spec = llada().decoding_spec

        def __call__(self, *args, **kwargs):
            raise AssertionError("the model was run")

    ids = options.pop("input_ids", IDS)
    with pytest.raises(ValueError, match=message):
        decode(Never(), ids, **options)


def test_a_shifted_model_needs_a_token_to_predict_from():
    ids, mask = prompts(3, 2)
    mask[1] = 0
    with pytest.raises(ValueError, match="a prompt is empty, and this model predicts each token from the row"):
        decode(dream(), ids, mask, gen_length=4, block_length=4)
    with pytest.raises(ValueError, match="a prompt is empty"):
        decode(dream(), ids[:, :0], gen_length=4, block_length=4)
    assert decode(llada(), ids, mask, gen_length=4, block_length=4).ids.shape == (2, 4)


def test_a_guider_that_does_not_fit_is_refused_before_the_first_forward(guide):
    class Never:
        decoding_spec = llada().decoding_spec

    options = dict(gen_length=8, block_length=8, guide=guide)
    with pytest.raises(ValueError, match="the guider has 24 tokens and the model 30; give Guider both tokenizers"):
        never = Never()
        never.decoding_spec = replace(Never.decoding_spec, vocabulary=30)
        decode(never, IDS, **options)
    with pytest.raises(ValueError, match="take 68 tokens and the guider has 64 positions; shorten the prompt or"):
        decode(Never(), IDS, **(options | {"gen_length": 64}))
    with pytest.raises(ValueError, match="a prompt is empty and a guider needs a token to read on from; begin it"):
        decode(Never(), IDS[:, :0], **options)


def test_a_model_that_insists_on_the_mask_still_ends():
    class Stubborn(Counter):
        def __call__(self, *args, **kwargs):
            out = super().__call__(*args, **kwargs)
            out.logits = torch.zeros_like(out.logits).index_fill(-1, torch.tensor(self.decoding_spec.mask_id), 50.0)
            return out

    got = decode(Stubborn(), IDS, gen_length=6, block_length=3, unmask="confidence")
    assert got.stats.forwards == 6 and 3 not in got.ids


def test_a_rule_that_stops_committing_is_told():
    class Lazy(Unmasker):
        def choose(self, logits, slots, canvas):
            return Choice(slots, torch.zeros_like(slots, dtype=torch.bool))

    class LazyRule(Rule):
        def begin(self, canvas, spec, generator, steps):
            return Lazy(self)

    with pytest.raises(StuckError, match="9 forwards committed nothing; the rule toy.* does not get on"):
        decode(Counter(), IDS, gen_length=4, block_length=4, unmask=LazyRule())


def test_advice_is_a_warning():
    model = Script([1] * 8)
    model.decoding_spec = DecodingSpec(MASK, (END,), PAD, 0, 256, "confidence", context_advised=10)
    with pytest.warns(UserWarning, match="take 11 positions, the model's authors advise at most 10"):
        decode(model, IDS[:, :3], gen_length=8, block_length=8, unmask=Rule())


def test_expressions_come_back():
    for text in ("freecache", "freecache(delay=0,refresh=4)", "dkv(refresh=4)", "dual(shift_mode='commit_first')",
                 "dllm-cache(ratio=0.5)", "none", "prefix(refresh=2)"):  # fmt: skip
        assert resolve_cache(text).expression == text and resolve_cache(resolve_cache(text)).expression == text
