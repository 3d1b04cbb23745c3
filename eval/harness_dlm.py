"""Diffusion language models in the LM Evaluation Harness: tasks that generate text, answered by `dlm.decode`.

The canvas has `--gen-length` masks whatever a task asks for, since its length is part of how such a model answers; a
task's stop strings end the answer. Tasks that score continuations are refused: the model has no likelihood of a text
in one forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dlm.config import DecodingConfig
from dlm.decode import decode_prompts
from dlm.ends import cut_at
from dlm.models import answer_text, text_ids
from dlm.unmask import Guider

PREFIX = "dlm"
FIGURES = ("forwards", "query_tokens", "guider_forwards", "row_forwards", "seconds")


class DiffusionLM(LM):
    """A diffusion model as the harness asks it.

    Args:
        config: how to decode; its `stop` is the task's.
        guide: of a guided rule.
        batch: prompts that are answered together.
        seed: of the random numbers; prompt i has seed + i.

    Attributes:
        totals: what all answers cost, by the names of `dlm.stats.Stats`.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: DecodingConfig,
        guide: Guider | None = None, batch: int = 1, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.guide, self.batch, self.seed = guide, batch, seed
        self.totals: dict[str, float] = dict.fromkeys(FIGURES, 0)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The answers, cut at the first stop string of their task.

        Raises:
            ValueError: a prompt that the model cannot go on from, or one that is too long.
        """
        found: list[str] = []
        for first in tqdm(range(0, len(requests), self.batch), disable=disable_tqdm, desc="answers"):
            part = [request.args for request in requests[first : first + self.batch]]
            stops = [_stops(options) for _, options in part]
            # A batch has one list of stop strings; the harness sends one task after the other.
            common = stops[0] if all(one == stops[0] for one in stops) else ()
            prompts = [text_ids(self.tokenizer, text) for text, _ in part]
            done = decode_prompts(self.model, prompts, replace(self.config, stop=common), self.guide,
                                  self.seed + first, tokenizer=self.tokenizer)  # fmt: skip
            for name in FIGURES:
                self.totals[name] += getattr(done.stats, name)
            for row, stop in zip(done.ids.tolist(), stops, strict=True):
                text = answer_text(self.tokenizer, row, self.model.decoding_spec.eos_ids)
                cut = cut_at(text, stop)
                found.append(text if cut is None else cut)
        return found

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Raises ValueError: a diffusion model has no likelihood of a continuation in one forward."""
        raise ValueError("this task scores continuations, and a diffusion model has no likelihood of them; use a task "
                         "of output_type generate_until")  # fmt: skip

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Raises ValueError, as `loglikelihood`."""
        return [score for score, _ in self.loglikelihood(requests)]

    @property
    def tokenizer_name(self) -> str:
        """The name that the harness keeps answers by."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The messages as one text."""
        return self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt
        )


def _stops(options: dict[str, Any]) -> tuple[str, ...]:
    until: str | Sequence[str] | None = options.get("until")
    return () if not until else (until,) if isinstance(until, str) else tuple(one for one in until if one)
