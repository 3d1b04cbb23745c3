"""An agent whose cache lives from step to step: each step reads its own screenshot and nothing that was read before.

The prompt of a step must begin with the prompt and answer of the step before. The authors' layouts do not: the task
stands behind the last screenshot, or older steps become lines of text. So the chat is told in a layout that only grows:
the task's words with the first screenshot, then the goal once more beside every other. A screenshot that leaves the
history is forgotten in place (`MethodCache.forget`): no later token sees it, and those that came meanwhile keep what
they saw of it, which a fresh prompt would not.

Where a method cannot take back what the chat no longer has (an answer that is told otherwise than it was said), or the
past does not fit, the screenshots that are shown are read again as one new prompt.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from PIL import Image
from transformers import LogitsProcessorList

from agentkv.agent import Agent, Decision, kept_frames
from agentkv.answering import PrefillClock
from agentkv.grammars import Frame
from agentkv.models import History, Prompt
from agentkv.tower import shown
from textkv import Conversation


@dataclass
class _Episode:
    """What was told since step `base`: every screenshot's grid and frame, and how many of the first are forgotten."""

    talk: Conversation
    goal: str
    base: int
    grids: list[torch.Tensor] = field(default_factory=list)
    frames: list[Frame] = field(default_factory=list)
    forgotten: int = 0

    def goes_on(self, goal: str, history: History) -> bool:
        """Whether a decision is the next one of this episode."""
        return self.goal == goal and len(history) == self.base + len(self.grids)


class PersistentAgent(Agent):
    """An `Agent` that keeps its cache until the next episode begins. Arguments and errors are those of `Agent`.

    Attributes:
        talk: the conversation of the episode, None before its first step. It can be saved, loaded and forked.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._episode: _Episode | None = None

    @property
    def talk(self) -> Conversation | None:
        """The conversation of the episode."""
        return None if self._episode is None else self._episode.talk

    def start(self, env: Any) -> None:
        """A new episode: what was read is let go of."""
        self._episode = None

    @torch.inference_mode()
    def decide(self, goal: str, history: History, screenshot: Image.Image, viewport: tuple[int, int]) -> Decision:
        """Read the new turn, compress, decode greedily, parse. Never raises for what the model says."""
        first = next((step for step, (image, _) in enumerate(history) if image is not None), len(history))
        if self._episode is None or not self._episode.goes_on(goal, history):
            self._episode = self._begun(goal, first)
        prompt, known = self._prompt(history, screenshot, viewport)
        if known and not self._can_go_on(prompt, known):
            # What is shown is read as a prompt of its own, from its oldest screenshot on.
            steps = self.talk.cache.trajectory
            self._episode = self._begun(goal, first)
            self.talk.cache.follow(steps)
            prompt, known = self._prompt(history, screenshot, viewport)
        self._forget(prompt, first)
        return self._answer(prompt, known)

    def _begun(self, goal: str, base: int) -> _Episode:
        return _Episode(Conversation(self.adapter.model, self.method, self.budget), goal, base)

    def _prompt(self, history: History, screenshot: Image.Image, viewport: tuple[int, int]) -> tuple[Prompt, int]:
        """The whole chat, and how many of its screenshots were told before: only the others' pixels are in it."""
        episode = self._episode
        known = len(episode.grids)
        new = [image for image, _ in history[episode.base + known :] if image is not None] + [screenshot]
        answers = [text for _, text in history[episode.base :]]
        prompt = self.adapter.growing(
            episode.goal, answers, new, episode.grids, episode.frames, viewport, number=episode.base + 1
        )
        return prompt, known

    def _can_go_on(self, prompt: Prompt, known: int) -> bool:
        """Whether no screenshot that was told before would have to be read again."""
        talk = self._episode.talk
        told = talk.dialogue(**prompt.inputs, known_images=known)
        return talk.foresee(told).reused >= prompt.spans[known - 1][1]

    def _forget(self, prompt: Prompt, first: int) -> None:
        """Lets go of the screenshots before step `first`."""
        episode = self._episode
        gone = first - episode.base
        if gone > episode.forgotten:
            episode.talk.cache.forget([prompt.spans[episode.forgotten : gone]])
            episode.forgotten = gone

    def _answer(self, prompt: Prompt, known: int) -> Decision:
        episode, adapter = self._episode, self.adapter
        talk, spans, grids = episode.talk, prompt.spans[episode.forgotten :], prompt.grids[episode.forgotten :]
        clock, begin = PrefillClock(), perf_counter()
        with shown(adapter.model, prompt.pictures):
            out = talk.generate(
                **prompt.inputs,
                known_images=known,
                spans=[spans],
                grids=[grids],
                max_new_tokens=self.max_new_tokens,
                do_sample=False,
                logits_processor=LogitsProcessorList([clock]),
            )
        columns = prompt.inputs["input_ids"].shape[1]
        answer = out[0, columns:].tolist()
        end = perf_counter()
        new = prompt.inputs["image_grid_thw"][known:]
        episode.grids += list(new.cpu())
        episode.frames += prompt.frames[known:]
        text, frames = adapter.words_of(answer), episode.frames[episode.forgotten :]
        action, left_out = self._understood(text, self._cut(answer), frames[-1])
        rest, gone = talk.cache.at_rest, talk.cache.context.gone
        return Decision(
            text=text,
            action=action,
            left_out=left_out,
            prompt_tokens=columns - (0 if gone is None else int(gone[0])),
            reused_tokens=talk.last.reused - (0 if gone is None else int(gone[0])),
            decode_tokens=len(answer),
            seconds_prefill=clock.time - begin,
            seconds_decode=end - clock.time,
            kv_bytes=rest.kv_bytes,
            kv_bytes_peak=talk.cache.peak_bytes,
            kv_bytes_full=rest.full_bytes,
            tokens_stored=float(rest.tokens_stored),
            spans=tuple((int(s), int(e)) for s, e in spans),
            frames=kept_frames(rest.kept, spans, grids),
            frame=frames[-1],
        )
