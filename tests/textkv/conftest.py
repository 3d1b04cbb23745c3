"""Every model starts a test on our attention implementation's neighbour, sdpa, whatever the test before did."""

import pytest

from tests.textkv import tiny


@pytest.fixture
def model_of():
    """Builds (once) and resets a tiny model: `model_of("llama")`."""

    def get(family: str):
        model = tiny.build(family)
        text = family in tiny.TEXT_FAMILIES
        model.set_attn_implementation("sdpa" if text else {"text_config": "sdpa"})
        if hasattr(model.model, "rope_deltas"):
            model.model.rope_deltas = None
        return model

    return get
