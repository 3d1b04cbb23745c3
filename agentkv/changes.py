"""An agent that reads of each screenshot only what changed since the one before.

Most of a page stays as it is from step to step. A patch with the same pixels at the same place has its keys and values
in the cache already: they are taken over, the keys turned to where the patch stands now (`textkv.turning`), so that the
current picture is whole and of an earlier one there is left what has changed since. Only the other patches are told.
One whose keys a method has dropped from more than half of the heads is told again, as little is left to take over.

What is taken over is not what would be read now: it has seen the earlier screens, not what came since. So a decision
differs from the persistent agent's, and by how much is to be measured (`python -m eval.persistent`). Left where they
were read, the keys were of no use to the embedded agent, which knows whole pictures. The vision tower looks at whole
screenshots as before.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from transformers import PreTrainedModel

from agentkv.agent import Decision, FrameKept
from agentkv.models import History, Prompt
from agentkv.persistent import Episode, PersistentAgent
from agentkv.spans import runs
from agentkv.standin import stands_in
from textkv import resolve_method
from textkv.turning import check_turns, turn

HALF = 0.5
"""Share of layers x stored heads that must still hold a token for it to be taken over."""
FEATURES = "get_image_features"


@dataclass(frozen=True)
class InPart(Prompt):
    """A prompt that tells parts of its screenshots.

    Attributes:
        told: per screenshot, bool [tokens]: which of its tokens are in the prompt.
        places: per screenshot, int64 [tokens]: the column of each of its tokens, which may lie in an earlier one.
        turns: per screenshot, int64 [tokens]: rotary positions (in time) of its own tokens.
        whole: columns of the prompt that tells them whole.
    """

    told: Sequence[torch.Tensor] = ()
    places: Sequence[torch.Tensor] = ()
    turns: Sequence[torch.Tensor] = ()
    whole: int = 0

    @property
    def columns(self) -> int:
        """Tokens of the prompt with all its screenshots."""
        return self.whole


def in_part(prompt: Prompt, told: Sequence[torch.Tensor], model: PreTrainedModel) -> InPart:
    """A prompt without the tokens that are not told, and with the rotary positions, which a chat with holes does not
    show.

    Args:
        told: per screenshot, bool [tokens]; of the first all, of the others at least one.
    """
    names = ("input_ids", "attention_mask", "mm_token_type_ids")
    ids, mask, kinds = (prompt.inputs[name] for name in names)
    stays = torch.ones(ids.shape[1], dtype=torch.bool)
    for (start, end), part in zip(prompt.spans, told, strict=True):
        stays[start:end] = part
    column = stays.cumsum(0) - 1
    inputs = {name: x[:, stays] if name in names else x for name, x in prompt.inputs.items()}
    rotary, _ = _owner(model).get_rope_index(
        ids, image_grid_thw=prompt.inputs["image_grid_thw"], mm_token_type_ids=kinds, attention_mask=mask
    )
    inputs["position_ids"] = rotary[:, :, stays]
    places: list[torch.Tensor] = []
    spans, turns = [], []
    for (start, end), part in zip(prompt.spans, told, strict=True):
        own = column[start:end]
        places.append(torch.where(part, own, places[-1]) if places and len(places[-1]) == len(own) else own)
        spans.append((int(own[part][0]), int(own[-1]) + 1))
        turns.append(rotary[0, 0, start:end].cpu())
    return InPart(inputs, spans, prompt.frames, prompt.pictures, told, places, turns, len(stays))


def _owner(model: PreTrainedModel) -> Any:
    """The part of a model that makes its image features."""
    inner = getattr(model, "model", None)
    return inner if hasattr(inner, FEATURES) else model


_NOW = threading.local()


@contextmanager
def only(model: PreTrainedModel, told: Sequence[torch.Tensor]) -> Iterator[None]:
    """A context in which a model is given of its images, in order, the features of these tokens: bool [tokens] each."""
    with stands_in(_owner(model), FEATURES, _in_part):
        _NOW.told = told
        try:
            yield
        finally:
            _NOW.told = None


def _in_part(features: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(features)  # transformers' generate reads its arguments' names
    def get(*args: Any, **options: Any) -> Any:
        out, told = features(*args, **options), getattr(_NOW, "told", None)
        if told is not None:
            out["pooler_output"] = _cut(out["pooler_output"], told)
            if out.get("deepstack_features") is not None:
                out["deepstack_features"] = [_cut(layer, told) for layer in out["deepstack_features"]]
        return out

    return get


def _cut(images: Sequence[torch.Tensor], told: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return tuple(seen[part.to(seen.device)] for seen, part in zip(images, told, strict=True))


class ChangesAgent(PersistentAgent):
    """A `PersistentAgent` that takes over what it has read of the parts of a page that did not change.

    Arguments are those of `Agent`. Raises ValueError for a method whose keys cannot be turned, or that asks how a
    screenshot's tokens lie in a grid, and for a model that does not turn its keys by the place in a picture (M-RoPE).
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        model, method = self.adapter.model, resolve_method(self.method, self.budget)
        if not all(hasattr(_owner(model), name) for name in (FEATURES, "get_rope_index")):
            raise ValueError(
                f"{type(model).__name__} does not tell a patch's place by its position: use --cache persistent, which "
                "reads whole screenshots"
            )
        if method.needs().grids:
            raise ValueError(
                f"{self.method} asks how a screenshot's tokens lie in its grid, and of a screenshot that is told in "
                "part they lie nowhere: use --cache persistent"
            )
        check_turns(model, method)
        self._begin()

    def _begin(self) -> None:
        self._told: list[torch.Tensor] = []
        self._places: list[torch.Tensor] = []
        self._pixels: torch.Tensor | None = None  # of the newest screenshot that was told, [tokens, values]
        self._at = torch.zeros(0, dtype=torch.int64)  # where each token of a screenshot stands, by its column

    def _begun(self, goal: str, base: int) -> Episode:
        self._begin()
        return super()._begun(goal, base)

    def _prompt(self, history: History, screenshot: Image.Image, viewport: tuple[int, int]) -> tuple[InPart, int]:
        prompt, known = super()._prompt(history, screenshot, viewport)
        told = list(self._told)
        for number, pixels in enumerate(self._tokens(prompt, known), known):
            part = torch.ones(len(pixels), dtype=torch.bool)
            # What is read in the same forward cannot be turned before it: then all are told whole.
            if number == known > 0 and prompt.grids[number - 1] == prompt.grids[number]:
                part = (pixels != self._pixels).any(1) | (self._share(self._places[-1]) < HALF)
                part[0] |= not part.any()  # a screenshot without a token would be none
            told.append(part)
        return in_part(prompt, told, self.adapter.model), known

    def _tokens(self, prompt: Prompt, known: int) -> list[torch.Tensor]:
        """Pixels of the new screenshots, on the CPU: [tokens, values] each."""
        merge = self.adapter.processor.merge_size**2
        sizes = prompt.inputs["image_grid_thw"][known:].prod(1).tolist()
        patches = prompt.inputs["pixel_values"].cpu().split(sizes)
        return [of_one.reshape(len(of_one) // merge, -1) for of_one in patches]

    def _share(self, places: torch.Tensor) -> torch.Tensor:
        """Share of layers x stored heads that hold the tokens at these columns: int64 [tokens] -> fp32 [tokens]."""
        kept = self.talk.cache.at_rest.kept
        positions = torch.cat([layer.reshape(-1) for layer in kept]).long()
        heads = sum(layer.shape[1] for layer in kept)
        counts = torch.bincount(positions[positions >= 0], minlength=int(places.max()) + 1).cpu()
        return counts[places].float() / heads

    def _forget(self, prompt: InPart, first: int) -> None:
        """Lets go of what lies in screenshots before step `first` and is in none that is shown."""
        gone = first - self._episode.base
        if gone <= 0 or not self._places:
            return
        lost = torch.zeros(self.talk.cache.tokens_seen, dtype=torch.bool)
        for start, end in prompt.spans[:gone]:
            lost[start:end] = True
        needed = torch.cat(prompt.places[gone:])
        lost[needed[needed < len(lost)]] = False
        lost &= ~self.talk.forgotten
        if lost.any():
            self.talk.cache.forget([runs(lost)])
        self._episode.forgotten = gone

    def _take_over(self, prompt: InPart) -> None:
        """What the newest screenshot shares with the one before stands in it from now on."""
        over = ~prompt.told[-1]
        columns, at = prompt.places[-1][over], prompt.turns[-1][over]
        delta = torch.zeros(1, self.talk.cache.tokens_seen, dtype=torch.int32)
        delta[0, columns] = (at - self._at[columns]).int()
        if delta.any():
            turn(self.talk.cache, self.adapter.model, delta)
            self._at[columns] = at

    def _answer(self, prompt: InPart, known: int) -> Decision:
        if known:
            self._take_over(prompt)
        return super()._answer(prompt, known)

    def _where(self, prompt: InPart) -> dict[str, Any]:
        """Also of screenshots that left, if something of them is in one that is shown."""
        gone = F.pad(self.talk.forgotten, (0, prompt.inputs["input_ids"].shape[1]))
        return {"spans": [[(start, end) for start, end in prompt.spans if not gone[start:end].all()]]}

    def _shown(self, prompt: InPart, known: int) -> AbstractContextManager[None]:
        stack = ExitStack()
        stack.enter_context(super()._shown(prompt, known))
        stack.enter_context(only(self.adapter.model, prompt.told[known:]))
        return stack

    def _remember(self, prompt: InPart, known: int) -> None:
        super()._remember(prompt, known)
        self._told, self._places = list(prompt.told), list(prompt.places)
        self._at = F.pad(self._at, (0, prompt.inputs["input_ids"].shape[1] - len(self._at)))
        for part, places, at in list(zip(prompt.told, prompt.places, prompt.turns, strict=True))[known:]:
            self._at[places[part]] = at[part]
        self._pixels = self._tokens(prompt, known)[-1]

    def _kept(self, prompt: InPart) -> tuple[FrameKept, ...]:
        first = self._episode.forgotten
        shown = zip(prompt.places[first:], prompt.grids[first:], strict=True)
        return tuple(FrameKept(self._share(places).view(grid).numpy()) for places, grid in shown)
