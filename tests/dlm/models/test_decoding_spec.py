"""The spec: what it takes from a config, and which nonsense it refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from dlm.models import DecodingSpec, DreamConfig, DreamModel, LLaDAConfig, LLaDAModelLM

SPEC = DecodingSpec(mask_id=60, eos_ids=(61,), pad_id=61, shift=0, context_limit=128, unmask="confidence")


def test_cards_of_the_published_models() -> None:
    llada = LLaDAModelLM.decoding_spec_of(LLaDAConfig(mask_token_id=126336), end_ids=(126081, 126348))
    assert llada == DecodingSpec(126336, (126081, 126348), 126081, 0, 4096, "confidence", vocabulary=126464)
    dream = DreamModel.decoding_spec_of(DreamConfig(mask_token_id=151666), end_ids=(151643, 151645))
    expected = DecodingSpec(151666, (151643, 151645), 151643, 1, 131072, "entropy", context_advised=2048)
    assert dream == replace(expected, vocabulary=152064)


def test_ends_may_be_several_and_padding_falls_back_on_the_first() -> None:
    config = LLaDAConfig(mask_token_id=5, eos_token_id=[1, 2], pad_token_id=None)
    spec = LLaDAModelLM.decoding_spec_of(config)
    assert (spec.eos_ids, spec.pad_id) == ((1, 2), 1)


def test_a_short_model_advises_no_more_than_it_has() -> None:
    config = DreamConfig(mask_token_id=151666, max_position_embeddings=512)
    assert DreamModel.decoding_spec_of(config).context_advised == 512


def test_a_config_without_end_and_padding_is_refused() -> None:
    config = LLaDAConfig(mask_token_id=5, eos_token_id=None, pad_token_id=None)
    with pytest.raises(ValueError, match="neither pad_token_id nor eos_token_id; add one"):
        LLaDAModelLM.decoding_spec_of(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_id": -1}, "mask_id=-1 is below 0"),
        ({"eos_ids": (3, -2)}, r"eos_ids=\(3, -2\) is below 0"),
        ({"mask_id": 61}, "mask_id=61 is also the padding or an end"),
        ({"shift": 2}, "shift=2 is neither 0"),
        ({"context_limit": 0}, "context_limit=0 is below 1"),
    ],
)
def test_nonsense_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SPEC, **changes)
