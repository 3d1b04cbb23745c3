"""Rows that are computed again are those that the model used."""

import pytest
import torch

from textkv import release
from textkv.models.loading import load
from textkv.rag import Reader
from textkv.rag.watched import Watched

TEXT = "the code of falcon is amber 47 . the code of heron is rusty 12 . question : the code of falcon is"


def read(cache="full", budget=None, drafted=5):
    reader = Reader(*load("mini"), cache=cache, budget=budget)
    text = Watched.empty(reader)
    ids = reader.tokenizer(TEXT).input_ids
    text.read(ids[:-drafted])
    for token in ids[-drafted:]:
        text.read([token])
    return text, list(range(len(ids) - drafted, len(ids)))


def test_rows_and_states_are_those_of_the_model():
    text, places = read()
    rows = text.rows(places)
    model = release(text.reader.model)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(torch.tensor([text.ids]), output_attentions=True, output_hidden_states=True, use_cache=False)
    expected = torch.stack(out.attentions)[:, 0, :, places]
    assert torch.allclose(rows, expected, atol=1e-5)
    last = torch.stack(out.hidden_states[1:])[:, 0]
    weights = (torch.arange(1, len(last) + 1) / 2.0).softmax(0)
    assert torch.allclose(text.pooled, (weights[:, None, None] * last).sum(0), atol=1e-4)


def test_evicted_tokens_have_no_column():
    text, places = read("critic", 0.5)
    rows = text.rows(places)
    assert torch.allclose(rows.sum(-1), torch.ones(rows.shape[:-1]), atol=1e-5)
    for number, layer in enumerate(text.layers):
        held = set(layer.held_positions().flatten().tolist())
        gone = [n for n in range(len(text.ids)) if n not in held]
        assert gone and rows[number][..., gone].abs().max() == 0


def test_a_method_that_moves_keys_is_refused():
    reader = Reader(*load("mini"), cache="streaming_llm", budget=0.5)
    with pytest.raises(ValueError, match="streaming_llm turns keys"):
        Watched.empty(reader)
