"""Reward heads: the formula, that they learn, and that nothing of theirs reaches the model."""

import pytest
import torch

from textkv.models.loading import load
from textkv.rag.heads import RewardHeads, last_states
from textkv.rag.rewards import Reward


def test_a_head_is_the_formula():
    heads, h = RewardHeads(6), torch.randn(3, 6)
    for number, head in enumerate(heads.heads):
        first, _, last = head
        by_hand = torch.tanh(h @ first.weight.T + first.bias) @ last.weight[0] + last.bias
        torch.testing.assert_close(heads(h)[:, number], by_hand)


def test_heads_learn_what_is_measured():
    heads = RewardHeads(8, rate=1e-2)
    states = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    measured = [(float(row[0] > 0), float(row[1] > 0)) for row in states]
    errors = [heads.learn(states, measured) for _ in range(150)]
    assert errors[-1] < errors[0] / 10
    assert Reward().joined(heads.predicted(states), [""] * 32)[0] == pytest.approx(
        0.7 * measured[0][0] + 0.3 * measured[0][1], abs=0.4
    )


def test_the_model_is_left_as_it_is_and_padding_changes_no_state(tmp_path):
    model, tokenizer = load("mini")
    before = {name: p.clone() for name, p in model.named_parameters()}
    prompts, answers = ["the code of falcon is", "so the lamp by the door of the house is"], [" amber 47", " red"]
    states = last_states(model, tokenizer, prompts, answers)
    for number in range(2):
        alone = last_states(model, tokenizer, prompts[number : number + 1], answers[number : number + 1])
        torch.testing.assert_close(states[number], alone[0], atol=1e-4, rtol=1e-4)
    heads = RewardHeads(states.shape[1])
    heads.learn(states, [(1.0, 0.0), (0.0, 1.0)])
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) and p.grad is None, name
    heads.save(tmp_path)
    again = RewardHeads(states.shape[1], seed=1)
    again.load(tmp_path)
    assert torch.equal(again(states), heads(states))
    for wrong in (RewardHeads(3), RewardHeads(states.shape[1])):
        place = tmp_path if wrong.heads[0][0].in_features == 3 else tmp_path / "none"
        with pytest.raises(ValueError, match="^[^\n]*begin anew$"):
            wrong.load(place)
