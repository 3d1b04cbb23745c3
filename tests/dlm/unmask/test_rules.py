"""The rules that finish block after block: schedules, orders, thresholds, on random logits and a toy canvas."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dlm.unmask import Sampling, list_rules, resolve_unmask
from dlm.unmask.schedule import ScheduleStep, even_quota, ranks, timestep_quota, timestep_shares
from tests.dlm.unmask.boards import END, MASK, SPEC, VOCAB, Toy, canvas, play, whole

# "edit" and "wino" write slots again, see their tests.
BLOCK_RULES = [name for name in list_rules() if name not in ("guided", "edit", "wino")]
EXPRESSIONS = [*BLOCK_RULES, "threshold(0.2)", "factor(2.0)", "origin(compat=True)", "entropy(compat=True)",
               "maskgit_plus(alg_temp=0.5)", "confidence(confidence_eos_eot_inf=True)"]  # fmt: skip


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- schedules ------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 100), st.integers(1, 100))
def test_even_quota_adds_up_to_the_block_for_every_count_and_steps(masks, steps):
    left, given_out = masks, []
    for i in range(steps):
        given_out.append(even_quota(ScheduleStep([steps - i], [left], [left], [left]))[0])
        left -= given_out[-1]
    assert given_out == [masks // steps + (i < masks % steps) for i in range(steps)]


def commits(masks: int, steps: int) -> list[int]:
    shares, left, out = timestep_shares(torch.tensor([steps]), 1e-3), masks, []
    for i in range(steps):
        out.append(int(timestep_quota(ScheduleStep([steps - i], [i], [left], [left]), shares)))
        left -= out[-1]
    return out


@pytest.mark.parametrize(
    "masks, steps, empty, last",
    [(256, 256, 1, 2), (512, 512, 1, 2), (768, 768, 1, 2), (1024, 1024, 2, 3), (2048, 2048, 3, 4), (512, 256, 0, 3)],
)
def test_timestep_schedule_in_fp32_has_the_known_empty_steps(masks, steps, empty, last):
    out = commits(masks, steps)
    assert sum(out) == masks and out[-1] == last
    assert out[:empty] == [0] * empty and out.count(0) == empty


def test_compat_run_has_an_empty_first_step_and_the_even_one_has_none():
    old = play("entropy(compat=True)", canvas(gen=64, block=64), Toy()).history.sum((1, 2))
    new = play("entropy", canvas(gen=64, block=64), Toy()).history.sum((1, 2))
    assert old.tolist() == [0] + [1] * 62 + [2] and new.tolist() == [1] * 64


def test_each_row_has_its_own_quota():
    board = canvas(batch=2, gen=12, block=12)
    board.commit(torch.tensor([[-1], [3]]).expand(2, 1), torch.zeros(2, 1).long(), torch.ones(2, 1).bool())
    slots = torch.tensor([[-1] * 6, [4, 5, 6, 7, 8, 9]])
    board.commit(slots, torch.zeros_like(slots), slots >= 0)  # 12 and 5 masks left
    history = play("confidence", board, Toy(), steps=5).history
    assert history.sum(2).T.tolist() == [[3, 3, 2, 2, 2], [1, 1, 1, 1, 1]]
    fractions = timestep_shares(torch.tensor([4, 4]), 1e-3)
    # int of a third of each
    assert timestep_quota(ScheduleStep([3, 3], [1, 1], [12, 5], [12, 5]), fractions).tolist() == [3, 1]


@pytest.mark.parametrize("steps, expected", [(3, [4, 4, 2]), (5, [2, 2, 2, 2, 2]), (10, [1] * 10), (50, [1] * 10)])
def test_short_last_block_and_steps_that_do_not_divide(steps, expected):
    assert play("confidence", canvas(gen=10, block=4), Toy(), steps=steps).history.sum((1, 2)).tolist() == expected


# ---- orders ---------------------------------------------------------------------------------------------------------


def test_equal_scores_go_by_the_lowest_slot_and_closed_slots_come_last():
    score = torch.tensor([[1.0, 3.0, 3.0, -torch.inf, torch.nan, 3.0]])
    free = torch.tensor([[True, True, True, True, True, False]])
    assert ranks(score, free).tolist() == [[2, 0, 1, 3, 4, 5]]


def test_one_block_is_pure_diffusion_in_the_order_of_confidence():
    board, toy = canvas(gen=12, block=12), Toy(bigram=0.0)
    logits = toy(board.ids)[0, 3:]
    logits[:, MASK] = -torch.inf
    order = logits.softmax(1).amax(1).argsort(descending=True)
    played = play("confidence", board, toy)
    assert played.history[:, 0].long().argmax(1).tolist() == (order + 3).tolist()
    assert torch.equal(played.text[0], logits.argmax(1))


@pytest.mark.parametrize("rule", ["confidence", "random", "entropy", "threshold(1)"])
def test_blocks_of_one_are_greedy_from_left_to_right(rule):
    board, toy = canvas(batch=2, gen=9, block=1), Toy(bigram=2.0)
    played = play(rule, board, toy, generator=seeded())
    text = canvas(batch=2, gen=9).ids
    for slot in range(3, 12):
        logits = toy(text)[:, slot]
        logits[:, MASK] = -torch.inf
        text[:, slot] = logits.argmax(1)
    assert torch.equal(played.text, text[:, 3:])
    assert played.history.long().argmax(2).tolist() == [[s, s] for s in range(3, 12)]


@pytest.mark.parametrize(
    "rule, measure",
    [
        ("maskgit_plus", lambda p: p[0]),
        ("topk_margin", lambda p: p[0] - p[1:2].sum()),
        ("entropy", lambda p: torch.special.xlogy(p, p).sum()),
    ],
)
@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.5}, {"temperature": 0.7, "top_p": 0.8}])
def test_dream_measures_what_it_draws_from(rule, measure, options):
    board, toy = canvas(gen=10, block=10), Toy(bigram=0.0)
    logits = toy(board.ids)[0, 3:].double()
    logits[:, MASK] = -torch.inf
    scores = []
    for z in logits / (options.get("temperature") or 1.0):
        p = z.softmax(0).sort(descending=True).values
        if "top_p" in options:
            p = p[: int((p.cumsum(0) <= options["top_p"]).sum()) + 1]
        p = p[: options.get("top_k", VOCAB)]
        scores.append(float(measure(p / p.sum())))
    played = play(rule, board, toy, sampling=Sampling(**options), generator=seeded())
    order = played.history[:, 0].long().argmax(1) - 3
    if rule == "maskgit_plus" and "temperature" in options:
        return  # ranks by the drawn token's probability: see test_sampling
    assert order.tolist() == sorted(range(10), key=lambda i: -scores[i])


def test_alg_temp_draws_slots_in_proportion_to_softmax():
    free = torch.ones(1, 4, dtype=torch.bool)
    board = canvas(gen=4, block=4)
    unmasker = resolve_unmask("maskgit_plus(alg_temp=0.5)").begin(board, SPEC, seeded(), 4)
    unmasker.sampler.there = free
    score = torch.tensor([0.1, 0.4, 0.9, 0.6])
    step = ScheduleStep([4], [0], [4], [4])
    first = [int(unmasker.rule.accept(score[None], free, step, unmasker)[0].long().argmax()) for _ in range(4000)]
    assert torch.allclose(torch.bincount(torch.tensor(first)) / 4000, (score / 0.5).softmax(0), atol=0.03)


def test_origin_writes_each_mask_by_chance_and_all_in_the_last_step():
    board = canvas(gen=8, block=8, batch=400)
    history = play("origin", board, Toy(), steps=4, generator=seeded()).history.sum(2).float()  # [4, 400]
    assert len(history) == 4 and torch.allclose(history.mean(1), torch.full((4,), 2.0), atol=0.2)
    assert history.std(1).min() > 0.5  # by chance, not by quota


def test_random_order_depends_on_the_generator_alone():
    orders = [play("random", canvas(), Toy(), generator=seeded(i)).history for i in (1, 1, 2)]
    assert torch.equal(orders[0], orders[1]) and not torch.equal(orders[0], orders[2])


# ---- several tokens per forward -------------------------------------------------------------------------------------


def accept(rule, score):
    """What a rule writes of the confidences [r] of one block, one token per step being the least."""
    board = canvas(gen=len(score), block=len(score))
    unmasker = resolve_unmask(rule).begin(board, SPEC, None, len(score))
    masks = [len(score)]
    free = torch.ones(1, len(score), dtype=torch.bool)
    return unmasker.rule.accept(torch.tensor(score)[None], free, ScheduleStep(masks, [0], masks, masks), unmasker)[0]


def test_threshold_one_is_one_token_per_step_and_zero_a_block_per_forward():
    assert play("threshold(1)", canvas(gen=12, block=4), Toy()).history.sum((1, 2)).tolist() == [1] * 12
    assert play("threshold(0)", canvas(gen=12, block=4), Toy()).history.sum((1, 2)).tolist() == [4, 4, 4]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=8), st.floats(0, 1, width=32))
def test_threshold_writes_the_best_and_all_that_reach_it(score, tau):
    written = accept(f"threshold({tau})", score)
    best = max(range(len(score)), key=lambda i: (score[i], -i))
    assert written.tolist() == [i == best or c >= tau for i, c in enumerate(score)]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=8), st.floats(0.125, 3, width=32))
def test_factor_writes_the_ranks_before_the_first_that_fails(score, f):
    order = sorted(range(len(score)), key=lambda i: (-score[i], i))
    n = next((r for r, i in enumerate(order) if not (r + 2) * (1 - torch.tensor(score[i])) < f), len(score))
    assert accept(f"factor({f})", score).nonzero()[:, 0].tolist() == sorted(order[: max(1, n)])


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(0, 1, width=32), min_size=1, max_size=8), st.floats(0.125, 3, width=32),
    st.floats(0, 2, width=32), st.integers(0, 7), st.floats(0, 1, width=32),
)  # fmt: skip
def test_factor_grows_with_f_and_never_when_a_confidence_falls(score, f, more, which, share):
    n = int(accept(f"factor({f})", score).sum())
    assert int(accept(f"factor({f + more})", score).sum()) >= n
    fallen = [c * share if i == which else c for i, c in enumerate(score)]
    assert int(accept(f"factor({f})", fallen).sum()) <= n


def test_factor_writes_a_lone_mask_but_not_a_last_rank_that_fails():
    assert accept("factor(0.01)", [0.0]).tolist() == [True]
    assert accept("factor(1.0)", [0.99, 0.1]).tolist() == [True, False]
    assert accept("factor(1.0)", [0.99, 0.5, 0.98]).tolist() == [True, False, True]
    assert accept("factor(1.0)", [0.99, 0.7, 0.999]).tolist() == [True, False, True]  # 4 * 0.3 >= 1: the third rank


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0, 2, width=32), min_size=1, max_size=8), st.floats(0, 3, width=32))
def test_entropy_bound_writes_while_the_entropies_before_stay_below(entropy, bound):
    order, written, total = sorted(range(len(entropy)), key=lambda i: (entropy[i], i)), [], torch.tensor(0.0)
    for i in order:
        if float(total) > bound:
            break
        written.append(i)
        total += entropy[i]
    assert accept(f"entropy_bound({bound})", [-e for e in entropy]).nonzero()[:, 0].tolist() == sorted(written)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.none() | st.floats(0, 1, width=32), min_size=1, max_size=9), st.floats(0, 1, width=32))
def test_hierarchical_writes_the_surest_of_each_run(score, low):
    """None stands for a slot that is written already."""
    masks = [i for i, c in enumerate(score) if c is not None]
    if not masks:
        return
    runs = [[masks[0]]]
    for before, i in zip(masks, masks[1:], strict=False):
        runs.append([i]) if i > before + 1 else runs[-1].append(i)

    def surest(of):
        return max(of, key=lambda i: (score[i], -i))

    tau = float(torch.tensor(0.9))  # a score of exactly fp32's 0.9 is below Python's
    wanted = {surest(masks)} | {i for i in masks if score[i] >= tau}
    wanted |= {surest(run) for run in runs if score[surest(run)] >= low}
    free = torch.tensor([[c is not None for c in score]])
    left = [len(masks)]
    rule = resolve_unmask(f"hierarchical(low={low})")
    given = torch.tensor([[0.95 if c is None else c for c in score]])  # what stands at a written slot is not read
    written = rule.accept(given, free, ScheduleStep(left, [0], left, left), None) & free
    assert set(written[0].nonzero()[:, 0].tolist()) == wanted


def test_hierarchical_below_low_writes_one():
    assert accept("hierarchical", [0.1, 0.3, 0.2]).tolist() == [False, True, False]
    assert accept("hierarchical(low=0.3)", [0.1, 0.3, 0.95]).tolist() == [False, False, True]


@pytest.mark.parametrize(
    "rule", ["threshold(1)", "factor(0.0001)", "confidence", "origin", "random", "hierarchical(1,low=1)"]
)
def test_steps_bound_the_forwards_of_every_rule(rule):
    assert len(play(rule, canvas(gen=12, block=4), Toy(), steps=6, generator=seeded()).history) <= 6


# ---- what holds for all ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", EXPRESSIONS)
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_p": 0.9}])
def test_every_rule_ends_without_a_mask_and_without_suppressed_tokens(rule, options):
    toy = Toy()
    toy.place[:, MASK] += 50.0  # the model puts its whole mass on the mask
    toy.place[:, 5] += 20.0
    rule = resolve_unmask(rule)
    rule = resolve_unmask(type(rule)(**{**vars(rule), "suppress": (5,), "logits_eos_inf": True}))
    played = play(rule, canvas(batch=3, gen=10, block=4), toy, generator=seeded(), sampling=Sampling(**options))
    assert not torch.isin(played.text, torch.tensor([MASK, 5, END])).any()
    assert played.history.sum(0)[:, 3:].eq(1).all() and not played.history[:, :, :3].any()


@pytest.mark.parametrize(
    "rule", ["confidence", "entropy(compat=True)", "maskgit_plus", "threshold(0.15)", "factor(1.6)"]
)
def test_a_batch_gives_each_row_what_it_gives_alone(rule):
    toy = Toy(bigram=2.0)
    rows = play(rule, canvas(batch=4, gen=12, block=4), toy)
    for row in range(4):
        board = canvas(batch=4, gen=12, block=4)
        board.take_rows(torch.tensor([row]))
        alone = play(rule, board, toy)
        assert torch.equal(alone.text[0], rows.text[row])
        steps = [h for h in rows.history[:, row] if h.any()]
        assert torch.equal(torch.stack(steps), torch.stack([h for h in alone.history[:, 0] if h.any()]))


def test_ends_are_written_last_where_confidence_forgets_them():
    toy = Toy(bigram=0.0)
    toy.place[[2, 5], END] += 30.0  # two sure ends
    first = play("confidence", canvas(gen=8, block=8), toy).history[:2, 0].nonzero()[:, 1]
    assert set(first.tolist()) == {3 + 2, 3 + 5}
    late = play("confidence(confidence_eos_eot_inf=True)", canvas(gen=8, block=8), toy)
    assert set(late.history[-2:, 0].nonzero()[:, 1].tolist()) == {3 + 2, 3 + 5}
    assert late.text[0, [2, 5]].tolist() == [END, END]


def test_candidates_are_the_active_block_inside_the_reach():
    board = canvas(batch=2, gen=10, block=4)
    done = torch.tensor([[3, 5, -1, -1], [3, 4, 5, 6]])
    board.commit(done, torch.zeros_like(done), done >= 0)
    unmasker = resolve_unmask("confidence").begin(board, SPEC, None, 10)
    assert unmasker.candidates(board, whole(board)).tolist() == [[4, 6, -1, -1], [7, 8, 9, 10]]
    logit_window = (torch.tensor([0, 8]), torch.tensor([6, 13]))
    # As wide as the most masks that a row has there: nothing else goes through the head and the softmax.
    assert unmasker.candidates(board, logit_window).tolist() == [[4, -1, -1], [8, 9, 10]]
    # A rule that looks at what stands between its masks has them in their places.
    unmasker = resolve_unmask("hierarchical").begin(board, SPEC, None, 10)
    assert unmasker.candidates(board, logit_window).tolist() == [[-1, 4, -1, -1], [-1, 8, 9, 10]]


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(EXPRESSIONS), st.integers(1, 9), st.integers(1, 9), st.integers(0, 30))
def test_any_lengths(rule, gen, block, extra):
    board = canvas(batch=2, gen=gen, block=min(block, gen))
    steps = board.blocks + extra
    played = play(rule, board, Toy(), steps=steps, generator=seeded())
    # ssd promises the tokens of one a forward, whatever number of steps is asked for
    most = max(steps, gen) if rule.startswith("ssd") else steps
    assert len(played.history) <= most and math.prod(played.text.shape) == int(played.history.sum())


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "expression, message",
    [
        ("treshold", "unknown unmasking rule 'treshold'; did you mean threshold"),
        ("zzz", "unknown unmasking rule 'zzz'; known: confidence, edit, entropy"),
        ("confidence+random", r"a rule stands alone; leave out \+random"),
        ("threshold('a')", "tau='a' is not a number"),
        ("threshold(-0.1)", r"tau=-0.1 is not in \[0, 1\]"),
        ("entropy_bound(-1)", "bound=-1 is not in .*; use an entropy, diffusers has 0.1"),
        ("hierarchical(low=2)", "low=2 is not in .*; use a probability, the authors' are tau=0.9 and low=0.4"),
        ("factor(0)", "f=0 is not in .*; use a factor above 0"),
        ("threshold(0.9, f=1)", "its arguments are: .*tau"),
        ("entropy(alg_temp=-1)", "alg_temp=-1 is not in .*; use 0 for the strict order"),
        ("entropy(eps=0)", "eps=0 is not in .*; use the authors' 1e-3"),
        ("confidence(suppress=3)", "suppress=3 is not numbers in brackets"),
        (
            "confidence(suppress=(-3,))",
            r"suppress=\(-3,\) is no tuple of token ids; use for example suppress=\(126081,\)",
        ),
        ("guided", "the rule guided needs a guide"),
    ],
)
def test_errors_of_expressions(expression, message):
    with pytest.raises(ValueError, match=message):
        resolve_unmask(expression)


def test_errors_of_a_generation():
    with pytest.raises(ValueError, match="steps=2 are fewer than the 3 blocks; use at least 3 steps or longer blocks"):
        resolve_unmask("confidence").begin(canvas(gen=12, block=4), SPEC, None, 2)
    elsewhere = SimpleNamespace(device=torch.device("cuda:0"))
    with pytest.raises(ValueError, match="generator is on cuda:0 and the canvas on cpu; build it as torch.Generator"):
        resolve_unmask("random").begin(canvas(), SPEC, elsewhere, 12)


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_expressions_build_the_rule_again(name):
    assert resolve_unmask(resolve_unmask(name).expression) == resolve_unmask(name)
