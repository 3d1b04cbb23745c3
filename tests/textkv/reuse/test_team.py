"""Teams: who reads whom, in which order, and what a team may not be."""

from __future__ import annotations

import pytest

from textkv.mini import load_mini
from textkv.reuse.kvcomm import Dense, KVComm, Prefix, Team

ROLES = {"ann": "the code of the list", "bob": "the question is of", "cid": "the falcon is old"}
ASKED = {"document": "the old king of the river is a friend of the baker", "question": "the code of the falcon is"}


@pytest.fixture(scope="module")
def mini():
    model, tokenizer = load_mini()
    model.generation_config.eos_token_id = None
    return model, tokenizer


@pytest.mark.parametrize(
    ("make", "reads"),
    [
        (Team.chain, {"ann": (), "bob": ("ann",), "cid": ("bob",)}),
        (Team.star, {"ann": (), "bob": (), "cid": ("ann", "bob")}),
        (Team.full, {"ann": (), "bob": ("ann",), "cid": ("ann", "bob")}),
    ],
)
def test_each_agent_reads_those_before_it(mini, make, reads) -> None:
    engine = Dense(*mini, 3)
    team = make(engine, ROLES)
    assert team.order[-1] == "cid"
    for name, others in reads.items():
        assert engine.templates[name].names == ("document", "question", *others)
    calls = team.run(ASKED)
    assert [call.agent for call in calls] == list(team.order)


@pytest.mark.parametrize("make", [Team.chain, Team.star, Team.full])
def test_a_team_that_shares_answers_as_the_dense_one(mini, make) -> None:
    dense, sharing = make(Dense(*mini, 3), ROLES), make(KVComm(*mini, 3), ROLES)
    truth = dense.run(ASKED)
    for reused in (False, True):
        calls = sharing.run(ASKED)
        assert [call.reused for call in calls] == [reused] * 3
        assert [call.answer.ids for call in calls] == [call.answer.ids for call in truth]


def test_shared_text_first_is_plain_prefix_reuse(mini) -> None:
    dense, prefix = (Team.chain(kind(*mini, 3), ROLES, layout="shared") for kind in (Dense, Prefix))
    ours, truth = prefix.run(ASKED), dense.run(ASKED)
    assert [call.answer.ids for call in ours] == [call.answer.ids for call in truth]
    assert [call.reused for call in ours] == [False, True, True]


def test_teams_that_cannot_be_are_refused(mini) -> None:
    def refused(match: str, *args, **how) -> None:
        with pytest.raises(ValueError, match=match):
            Team(Dense(*mini, 3), *args, **how)

    refused("in a circle: ", ROLES, [("ann", "bob"), ("bob", "ann")])
    refused("unknown agent 'dan'", ROLES, [("dan", "ann")])
    refused("at least 1 agent", {}, [])
    refused("name of a shared text", {"document": "x"}, [])
    refused("cannot be told from text", {"Ann B": "x", "bob": "y"}, [("Ann B", "bob")])
    refused("cannot be told from text", {"ann": "you are {x} there"}, [])
    refused("layout='first'", ROLES, [], layout="first")
    for make in (Team.chain, Team.star, Team.full):
        with pytest.raises(ValueError, match="at least 1 agent"):
            make(Dense(*mini, 3), {})
    twice = Team(Dense(*mini, 3), ROLES, [("ann", "bob"), ("ann", "bob")])
    assert twice.engine.templates["bob"].names.count("ann") == 1
    with pytest.raises(ValueError, match="check 'answer'"):
        Team.chain(Dense(*mini, 3), ROLES).run(ASKED | {"answer": "x"})
    with pytest.raises(ValueError, match="a text or a picture, not 5"):
        Team.chain(Dense(*mini, 3), ROLES).run(ASKED | {"question": 5})
