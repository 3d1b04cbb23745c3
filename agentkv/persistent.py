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

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from PIL import Image
from transformers import LogitsProcessorList

from agentkv.agent import Agent, Decision, FrameKept, kept_frames
from agentkv.answering import PrefillClock
from agentkv.grammars import Frame
from agentkv.models import History, Prompt
from agentkv.tower import shown
from textkv import Conversation


@dataclass
class Episode:
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
        self._episode: Episode | None = None

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

    def _begun(self, goal: str, base: int) -> Episode:
        return Episode(Conversation(self.adapter.model, self.method, self.budget), goal, base)

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

    def _where(self, prompt: Prompt) -> dict[str, Any]:
        """Where the screenshots lie that are shown, as `Conversation.generate` takes it."""
        first = self._episode.forgotten
        return {"spans": [prompt.spans[first:]], "grids": [prompt.grids[first:]]}

    def _shown(self, prompt: Prompt, known: int) -> AbstractContextManager[None]:
        """A context in which the model reads the prompt's new screenshots."""
        return shown(self.adapter.model, prompt.pictures)

    def _remember(self, prompt: Prompt, known: int) -> None:
        """What was told is told."""
        self._episode.grids += list(prompt.inputs["image_grid_thw"][known:].cpu())
        self._episode.frames += prompt.frames[known:]

    def _left(self, prompt: Prompt) -> int:
        """Tokens of the screenshots that left the history since the chat was begun."""
        return sum(rows * columns for rows, columns in prompt.grids[: self._episode.forgotten])

    def _kept(self, prompt: Prompt) -> tuple[FrameKept, ...]:
        """What is left of each screenshot that is shown."""
        first = self._episode.forgotten
        return kept_frames(self.talk.cache.at_rest.kept, prompt.spans[first:], prompt.grids[first:])

    def _answer(self, prompt: Prompt, known: int) -> Decision:
        talk, adapter, columns = self.talk, self.adapter, prompt.inputs["input_ids"].shape[1]
        clock, begin = PrefillClock(), perf_counter()
        with self._shown(prompt, known):
            out = talk.generate(
                **prompt.inputs,
                **self._where(prompt),
                known_images=known,
                max_new_tokens=self.max_new_tokens,
                do_sample=False,
                logits_processor=LogitsProcessorList([clock]),
            )
        answer = out[0, columns:].tolist()
        end = perf_counter()
        self._remember(prompt, known)
        text, frame = adapter.words_of(answer), prompt.frames[-1]
        action, left_out = self._understood(text, self._cut(answer), frame)
        rest, whole, gone = talk.cache.at_rest, prompt.columns - self._left(prompt), int(talk.forgotten.sum())
        return Decision(
            text=text,
            action=action,
            left_out=left_out,
            prompt_tokens=whole,
            reused_tokens=whole - talk.last.read,
            decode_tokens=len(answer),
            seconds_prefill=clock.time - begin,
            seconds_decode=end - clock.time,
            kv_bytes=rest.kv_bytes,
            kv_bytes_peak=talk.cache.peak_bytes,
            kv_bytes_full=round(rest.full_bytes * whole / (columns - gone)),
            tokens_stored=float(rest.tokens_stored),
            spans=tuple((int(s), int(e)) for s, e in prompt.spans[self._episode.forgotten :]),
            frames=self._kept(prompt),
            frame=frame,
        )
