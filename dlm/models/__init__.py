"""The diffusion models: native LLaDA, Dream, LLaDA2, SDAR and their kin for current transformers, what decoding must
know of them, and how to load the published checkpoints without remote code.
"""

from dlm.models.decoding_spec import DecodingSpec
from dlm.models.dream import DreamConfig, DreamModel
from dlm.models.llada import LLaDAConfig, LLaDAModelLM
from dlm.models.llada2 import LLaDA2MoeConfig, LLaDA2MoeModelLM
from dlm.models.loading import load_decoding_spec, load_model, register
from dlm.models.qwen import (
    FastDLLMConfig,
    FastDLLMForCausalLM,
    LLaDAMoEConfig,
    LLaDAMoEModelLM,
    SDARConfig,
    SDARForCausalLM,
    SDARMoeConfig,
    SDARMoeForCausalLM,
)
from dlm.models.text import answer_text, chat_ids, text_ids

__all__ = [
    "DecodingSpec",
    "DreamConfig",
    "DreamModel",
    "FastDLLMConfig",
    "FastDLLMForCausalLM",
    "LLaDA2MoeConfig",
    "LLaDA2MoeModelLM",
    "LLaDAConfig",
    "LLaDAMoEConfig",
    "LLaDAMoEModelLM",
    "LLaDAModelLM",
    "SDARConfig",
    "SDARForCausalLM",
    "SDARMoeConfig",
    "SDARMoeForCausalLM",
    "answer_text",
    "chat_ids",
    "load_decoding_spec",
    "load_model",
    "text_ids",
]

register()
