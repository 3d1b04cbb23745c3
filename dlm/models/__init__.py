"""The diffusion models: native LLaDA and Dream for current transformers, what decoding must know of them, and how to
load the published checkpoints without remote code.
"""

from dlm.models.decoding_spec import DecodingSpec
from dlm.models.dream import DreamConfig, DreamModel
from dlm.models.llada import LLaDAConfig, LLaDAModelLM
from dlm.models.loading import load_decoding_spec, load_model, register
from dlm.models.text import answer_text, chat_ids, text_ids

__all__ = [
    "DecodingSpec",
    "DreamConfig",
    "DreamModel",
    "LLaDAConfig",
    "LLaDAModelLM",
    "answer_text",
    "chat_ids",
    "load_decoding_spec",
    "load_model",
    "text_ids",
]

register()
