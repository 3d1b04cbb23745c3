"""Rewards by hand, advantages of a group, and numbers that are none."""

import pytest
import torch

from textkv.rag.invented import World
from textkv.rag.rewards import Reward, RewardError, advantages, exact_match, fidelity, word_f1

PASSAGES = ["The lighthouse of Varn was built by Ilse Korr.", "Ilse Korr was born in Tolm."]


def test_exact_match_and_f1_leave_articles_and_signs_out():
    assert exact_match("The Ilse Korr.", "ilse korr") == 1 and exact_match("Korr Ilse", "Ilse Korr") == 0
    assert word_f1("built by Ilse Korr", "Ilse Korr") == pytest.approx(2 * 2 / 6)
    assert word_f1("", "x") == 0 == word_f1("x", "y") and word_f1("the", "") == 1


def test_fidelity_by_hand():
    assert fidelity("Ilse Korr", PASSAGES) == 1
    assert fidelity("Tolm", PASSAGES) == 1
    # Words 2/3, pairs 1/2, subsequence 2/3.
    assert fidelity("Ilse Korr sang", PASSAGES) == pytest.approx((2 / 3 + 1 / 2 + 2 / 3) / 3)
    assert fidelity("", PASSAGES) == fidelity("nobody", PASSAGES) == fidelity("x", []) == 0


def test_the_reward_is_seven_parts_fidelity_and_three_quality():
    reward = Reward()
    assert reward(["Tolm"], ["Tolm"], [PASSAGES]) == [1.0]
    assert reward(["Ilse Korr"], ["Tolm"], [PASSAGES]) == [0.7]
    assert Reward(limit=0.5)(["Tolm"], ["Tolm"], [PASSAGES]) == [0.5]


def test_a_reward_that_is_no_number_is_refused():
    class Broken:
        def embed(self, texts):
            return torch.full((len(texts), 2), float("nan"))

    with pytest.raises(RewardError, match="reward of 'Tolm' is nan"):
        Reward(embeds=Broken())(["Tolm"], ["Tolm"], [PASSAGES])


def test_advantages_of_a_group():
    made = torch.tensor(advantages([0.0, 1.0, 0.0, 1.0, 0.3, 0.3, 0.3, 0.3], 4)).view(2, 4)
    assert made.tolist() == [[-1, 1, -1, 1], [0, 0, 0, 0]]
    # The deviation is floored: a small difference stays small.
    assert advantages([0.50, 0.51], 2) == pytest.approx([-0.05, 0.05])
    with pytest.raises(ValueError, match="group=1"):
        advantages([1.0], 1)
    with pytest.raises(ValueError, match="3 rewards"):
        advantages([1.0, 2.0, 3.0], 2)


@pytest.mark.parametrize("wrong", [{"faithful": -1.0}, {"faithful": 0.0, "good": 0.0}, {"limit": 0.0}])
def test_refusals(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Reward(**wrong)


def test_an_invented_world_repeats_itself_and_no_names():
    world = World.drawn(4)
    assert world == World.drawn(4) != World.drawn(5)
    names = [name for s in world.stories for name in (s.town, *s.person.split(), s.home)]
    assert len(set(names)) == len(names) and len(world.chunks()) == 3 * len(world.stories)
    for question in world.questions(2):
        assert question.hops == 2 and question.answer in question.steps[-1] and question.answer not in question.text
    with pytest.raises(ValueError, match="stories=0"):
        World.drawn(1, 0)
    with pytest.raises(ValueError, match="hops=3"):
        world.questions(3)
