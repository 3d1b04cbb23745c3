"""Searches while an answer is written: forks equal a new prefill, and policies search as often as they say."""

from math import inf

import pytest
import torch

from textkv.models.loading import load
from textkv.rag import Index, Reader
from textkv.rag.atlas import Atlas, calibrated
from textkv.rag.commands import main
from textkv.rag.dynamic import Desk, DynamicReader, Interval, Limits, Never
from textkv.rag.invented import World
from textkv.rag.trigger import MODES, Trigger
from textkv.rag.watched import Watched

WORLD = World.drawn(3, stories=4)
QUESTION = WORLD.questions(2)[0].text


@pytest.fixture(scope="module")
def index():
    return Index(WORLD.chunks())


def reader(index, policy, cache="full", budget=None, **limits):
    limits = Limits(**({"passages": 1, "most": 16} | limits))
    return DynamicReader(Reader(*load("mini"), cache, budget), index, policy, limits, begun="Answer:")


def atlas(mode, theta=0.0):
    return Atlas(Trigger(mode=mode, theta=theta, tau=1.0), draft=6)


@pytest.mark.parametrize("mode", MODES)
def test_a_trigger_out_of_reach_is_a_single_search(index, mode):
    single, never = (reader(index, policy).ask(QUESTION) for policy in (Never(), atlas(mode, inf)))
    assert never.text == single.text and never.queries == single.queries == (QUESTION,)
    assert never.prefill_tokens == single.prefill_tokens and never.scores and not single.scores


@pytest.mark.parametrize("policy", [Interval(4), atlas("received"), atlas("outgoing")])
@pytest.mark.parametrize("cache, budget", [("full", None), ("critic", 0.5)])
def test_searches_are_limited_and_passages_are_read_once(index, policy, cache, budget):
    answer = reader(index, policy, cache, budget, searches=3).ask(QUESTION)
    assert 2 <= len(answer.queries) <= 3
    assert len(set(answer.passages)) == len(answer.passages) <= 3


@pytest.mark.parametrize("policy", [Interval(4), atlas("received")])
def test_a_fork_goes_on_as_a_new_prefill_would(index, policy):
    made = reader(index, policy, passages=2)
    drafts = []
    begin = made._begin

    def noted(*given):
        draft = begin(*given)
        drafts.append((list(draft.text.ids), draft.logits))
        return draft

    made._begin = noted
    made.ask(QUESTION)
    assert len(drafts) > 1
    model = made.reader.model
    for ids, logits in drafts:
        with torch.no_grad():
            fresh = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
        assert torch.allclose(logits, fresh, atol=1e-3)


def test_nothing_triggers_right_after_a_search_the_first_one_included(index):
    for first, guarded in ((True, 3), (False, 0)):
        made = DynamicReader(Reader(*load("mini")), index, Never(), Limits(guard=3, first=first))
        desk = Desk(made._head.fork(), index, 1, 0)
        if first:
            desk.search(QUESTION)
        draft = made._begin(desk, QUESTION)
        assert draft.guarded - draft.start == guarded
        later = made._begin(desk, QUESTION, draft, draft.start) if first else draft
        assert later.guarded - len(later.text.ids) == guarded


def test_a_search_brings_what_does_not_lie_there_yet(index):
    desk = Desk(Watched.empty(Reader(*load("mini"))), index, 1, 0)
    assert desk.search(QUESTION) and desk.search(QUESTION) and not desk.search("?!")
    first, second = index.search(QUESTION, 2)
    assert desk.passages == [first, second] and desk.queries == [QUESTION, QUESTION, "?!"]
    assert desk.read == len(desk.text.ids) == len(desk.text.pooled)


def test_an_interval_searches_after_so_many_tokens(index):
    answer = reader(index, Interval(5), searches=99, most=16).ask(QUESTION)
    assert len(answer.queries) == 1 + 3


def test_theta_is_a_quantile_of_scores(index):
    notes = reader(index, atlas("outgoing", inf))
    scores = sorted(notes.ask(QUESTION).scores)
    assert calibrated(notes, [QUESTION], 1.0) == pytest.approx(0.8 * scores[-1])
    with pytest.raises(ValueError, match="quantile=2"):
        calibrated(notes, [QUESTION], 2)


def test_no_documents_is_no_search():
    assert reader(None, Never()).ask(QUESTION).queries == ()


@pytest.mark.parametrize("mode", MODES)
def test_the_command_says_what_it_searched_for(tmp_path, capsys, mode):
    place = str(tmp_path / "index")
    Index(WORLD.chunks()).save(place)
    given = ["ask", QUESTION, "--index", place, "--model", "mini", "--tokens", "8", "--atlas", mode, "--theta", "0"]
    assert main([*given, "--cache", "critic(0.5)"]) == 0
    said = capsys.readouterr().out
    assert f"search 1: {QUESTION}" in said and "cache critic" in said


def test_refusals(index):
    for call, said in (
        (lambda: Interval(0), "span=0"),
        (lambda: Atlas(Trigger(mode="received", theta=0.0), draft=1), "draft=1"),
        (lambda: Limits(searches=0), "searches=0"),
        (lambda: reader(index, Never()).ask(" ?"), "has no word"),
        (lambda: reader(index, Never()).ask("Xyzzy"), "nothing in the index"),
    ):
        with pytest.raises(ValueError, match=said):
            call()
