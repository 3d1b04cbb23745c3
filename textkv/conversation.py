"""A conversation: one cache over several turns, for text and vision-language models.

Every turn gives the whole dialogue so far. What the cache has read is remembered, ids, mask and images, and compared:
an edited turn, a chat template that drops old reasoning, another dialogue altogether, or another image under the same
ids are found, and what follows the common beginning is taken back, or all is read again.

Vision-language models of the Qwen family keep the last prompt's rotary offset on the MODEL, so two conversations that
take turns would silently use each other's. And a later turn with a new image needs the new pixels with the positions of
the whole dialogue. Both are handled here: positions are always explicit, and only unseen images are sent.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from textkv import store
from textkv.budgets import Budget
from textkv.cache import MethodCache
from textkv.dialogue import Dialogue, SeenImage, find_images, unseen
from textkv.evidence import Spans
from textkv.method import Method
from textkv.screens import Grids
from textkv.together import places_pictures


@dataclass(frozen=True)
class Reuse:
    """What a turn found in the cache.

    Attributes:
        reused: columns of the prompt that were in the cache already.
        read: columns that this turn had to read.
        how: "new", nothing was in the cache; "continued", the dialogue goes on from all that was read; "cropped", what
            the dialogue no longer has was taken back; "read again", the cache was emptied.
        why: the same in words, with the place where the dialogue left what was read.
    """

    reused: int
    read: int
    how: Literal["new", "continued", "cropped", "read again"]
    why: str


class Conversation:
    """Turns that share one cache.

    Args:
        model: a text model, or a vision-language model with `get_rope_index` (the Qwen-VL families).
        method: as for `MethodCache`.
        budget: as for `MethodCache`.

    Attributes:
        cache: the cache.
        last: what the last turn found in the cache; None before the first.
    """

    def __init__(
        self, model: PreTrainedModel, method: str | Method = "full", budget: Budget | float | str | None = None
    ) -> None:
        self.model = model
        self.cache = MethodCache(model, method, budget)
        self.last: Reuse | None = None
        self._seen: Dialogue | None = None
        self._lost = ""

    def generate(
        self,
        input_ids: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        spans: Spans | None = None,
        grids: Grids | None = None,
        position_ids: torch.Tensor | None = None,
        known_images: int = 0,
        **options: Any,
    ) -> torch.Tensor:
        """Continues the conversation; every argument describes the WHOLE dialogue so far, as a processor gives it.

        What the cache holds is used as far as the dialogue begins with it in all rows, and `last` says how far that
        was. If a batch is padded on the left by another width than before, its columns have moved, and all is read
        again; so it is after beams or several sequences per row, and before decoding with drafts (`assistant_model`,
        `prompt_lookup_num_tokens`).

        Args:
            input_ids: int64 [batch, tokens].
            attention_mask: [batch, tokens], 0 at padding; None = all are tokens, but pad tokens at the left end.
            pixel_values: [patches of all images, features].
            image_grid_thw: int64 [images, 3], all images, oldest first.
            mm_token_type_ids: int64 [batch, tokens], 1 at image tokens.
            spans: columns of every screenshot per row, for methods that ask for them.
            grids: (rows, columns) of every screenshot's tokens per row, likewise.
            position_ids: int64 [3, batch, tokens], rotary positions of a dialogue that tells images in part; None = as
                the model counts them.
            known_images: so many of the first images were given in earlier turns and are the same: `pixel_values` has
                the others'. For one row.
            options: for `model.generate`.

        Returns:
            what `model.generate` returns: int64 [batch, tokens + generated].

        Raises:
            ValueError: a mask of another shape, or images without their grid, their token types, or their pixels.
        """
        told, inputs = self.begin_turn(
            input_ids,
            attention_mask=self._mask(input_ids, attention_mask, options),
            pixel_values=pixel_values,
            image_grid_thw=image_grid_thw,
            mm_token_type_ids=mm_token_type_ids,
            spans=spans,
            grids=grids,
            position_ids=position_ids,
            known_images=known_images,
            drafts=self._drafts(options),
        )
        out = self.model.generate(**inputs, past_key_values=self.cache, **options)
        self.end_turn(told, out if isinstance(out, torch.Tensor) else out.sequences)
        return out

    def begin_turn(
        self,
        input_ids: torch.Tensor,
        *,
        attention_mask: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        spans: Spans | None = None,
        grids: Grids | None = None,
        position_ids: torch.Tensor | None = None,
        known_images: int = 0,
        drafts: bool = False,
    ) -> tuple[Dialogue, dict[str, Any]]:
        """The first half of `generate`, for who runs the model otherwise: leaves in the cache what the dialogue begins
        with. Then the model reads the columns behind `cache.tokens_seen`, and `end_turn` says what it came to.

        Args:
            drafts: whether decoding is with drafts; all others as for `generate`, whose errors are these.

        Returns:
            the dialogue, for `end_turn`, and the arguments of the model's call.
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        told = self.dialogue(input_ids, attention_mask, pixel_values, image_grid_thw, mm_token_type_ids, known_images)
        found = self.foresee(told, drafts)
        lost = next((image for image in told.images[:known_images] if image.start >= found.reused), None)
        if lost is not None:
            raise ValueError(
                f"the image at column {lost.start} must be read again ({found.why}), and its pixels were not given: "
                "give those of all images"
            )
        self._return_to(found)
        self.last = found
        if self._visual:
            inputs |= self._positions(input_ids, attention_mask, image_grid_thw, mm_token_type_ids, position_ids)
            new = None if image_grid_thw is None else image_grid_thw[known_images:]
            inputs |= unseen(told.images[known_images:], self.last.reused, pixel_values, new)
        self.cache.begin(input_ids, spans=spans, grids=grids, attention_mask=attention_mask)
        # Until it is over, nobody knows how far it came.
        self._seen, self._lost = None, "the turn before did not finish"
        return told, inputs

    def end_turn(self, told: Dialogue, sequences: torch.Tensor) -> None:
        """Writes down what the cache has read: the last tokens generated are not among it.

        Args:
            told: what `begin_turn` gave.
            sequences: int64 [batch, tokens + generated].
        """
        held, rows = self.cache.tokens_seen, len(told.ids)
        if not rows == len(sequences) == self.cache.rows:
            self._lost = f"the turn before had {self.cache.rows} beams or sequences for {rows} rows"
            return
        mask = F.pad(told.mask, (0, sequences.shape[1] - told.columns), value=True)
        self._seen, self._lost = Dialogue(sequences.cpu(), mask, told.images).first(held), ""

    @property
    def _visual(self) -> bool:
        return self._turns_by_place or getattr(self.model.config, "image_token_id", None) is not None

    @property
    def _turns_by_place(self) -> bool:
        return places_pictures(self.model)

    def dialogue(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        known_images: int = 0,
        **ignored: torch.Tensor,
    ) -> Dialogue:
        """A dialogue in the form in which it is compared, for `foresee`; arguments and errors as for `generate`."""
        images = ()
        if self._visual:
            known = () if self._seen is None else self._seen.images[:known_images]
            if len(known) < known_images:
                raise ValueError(f"known_images={known_images}: {len(known)} images were given in earlier turns")
            images = find_images(input_ids, pixel_values, image_grid_thw, mm_token_type_ids, known)
        elif pixel_values is not None:
            raise ValueError(f"{type(self.model).__name__} takes no images here")
        # On the CPU: comparing a dialogue must not hold device memory from turn to turn.
        return Dialogue(input_ids.cpu(), attention_mask.bool().cpu(), images)

    def foresee(self, told: Dialogue, drafts: bool = False) -> Reuse:
        """What `generate` would find of a dialogue in the cache. Changes nothing.

        Args:
            drafts: whether the turn decodes with drafts.
        """
        held, columns = self.cache.tokens_seen, told.columns
        if not held and not self._lost:
            return Reuse(0, columns, "new", "the cache was empty")
        # With drafts, transformers feeds the whole prompt whatever the cache has read: it would be there twice.
        keep, why = (0, "decoding with drafts reads whole prompts") if drafts else self._known(told, held)
        # Nothing to take back: the common case, and the only one open to every method.
        if keep == held > 0:
            return Reuse(keep, columns - keep, "continued", f"the dialogue goes on from all {keep} columns read")
        if keep:
            try:
                self.cache.check_crop(held - keep)
            except ValueError as error:
                why = f"{why}, and what follows cannot be taken back: {error}"
            else:
                return Reuse(keep, columns - keep, "cropped", f"{why}: {held - keep} columns were taken back")
        return Reuse(0, columns, "read again", why)

    @property
    def forgotten(self) -> torch.Tensor:
        """Which columns of the first row were forgotten on demand, bool [columns seen] on the CPU."""
        gone = torch.zeros(self.cache.tokens_seen, dtype=torch.bool)
        told = self.cache.context.forgotten
        if told is not None:
            n = min(len(gone), told.shape[1])
            gone[:n] = told[0, :n]
        return gone

    @property
    def seen(self) -> Dialogue | None:
        """What the cache has read; None when nobody knows, as after an error or before the first turn."""
        return None if self._seen is None or self._lost else self._seen.first(self.cache.tokens_seen)

    def save(self, folder: str | Path) -> None:
        """Writes the conversation as `MethodCache.save` does its cache, with what was read beside it.

        Raises:
            ValueError: nothing was read yet, or nobody knows what; or a segment without a name to be saved under.
        """
        seen = self.seen
        if seen is None:
            raise ValueError(f"there is no dialogue to save: {self._lost or 'nothing was read yet'}")
        images = [[x.row, x.start, x.end, x.digest.hex(), x.grid] for x in seen.images]
        store.save(self.cache.context, Path(folder), self.model, {"ids": seen.ids, "mask": seen.mask, "images": images})

    @classmethod
    def load(cls, folder: str | Path, model: PreTrainedModel) -> Conversation:
        """Reads what `save` wrote, for the same model: the next turn goes on without reading anything again.

        Raises:
            ValueError: as for `MethodCache.load`, or a cache that was saved without its dialogue.
        """
        header = store.read_header(Path(folder))
        told = header["beside"]
        if not {"ids", "mask", "images"} <= told.keys():
            raise ValueError(f"{folder} holds a cache and not what it has read: use MethodCache.load")
        talk = cls(model, header["method"], header["budget"])
        store.fill(talk.cache.context, Path(folder), header, model)
        try:
            images = tuple(
                SeenImage(row, start, end, bytes.fromhex(digest), tuple(grid))
                for row, start, end, digest, grid in told["images"]
            )
            talk._seen = Dialogue(told["ids"], told["mask"], images)
            if talk._seen.ids.shape != (talk.cache.rows, talk.cache.tokens_seen):
                raise ValueError(f"its dialogue has {tuple(talk._seen.ids.shape)} tokens")
        except (TypeError, ValueError) as error:
            raise ValueError(f"{folder} is no whole conversation: {error}") from None
        return talk

    def fork(self) -> Conversation:
        """An independent copy, cache and all: both may go on in different directions."""
        other = copy.copy(self)
        other.cache = self.cache.fork()
        return other

    def _mask(self, ids: torch.Tensor, given: torch.Tensor | None, options: dict) -> torch.Tensor:
        """The attention mask [batch, tokens]. Where none is given, `model.generate` alone would also hide a pad token
        that the model itself has said, although the cache has read it as a token."""
        if given is not None:
            if given.shape != ids.shape:
                raise ValueError(
                    f"attention_mask of shape {tuple(given.shape)} beside input_ids of {tuple(ids.shape)}: give a mask "
                    "of the whole dialogue, 0 at padding"
                )
            return given
        config = options.get("generation_config") or self.model.generation_config
        pad, end = (options.get(name, getattr(config, name)) for name in ("pad_token_id", "eos_token_id"))
        # Where the pad token also ends a turn, it cannot be told from one that was said.
        if pad is None or pad in (end if isinstance(end, list | tuple) else [end]):
            return torch.ones_like(ids)
        return ((ids != pad).cumsum(1) > 0).long()

    def _drafts(self, options: dict) -> bool:
        """Whether tokens are drafted by another model, or looked up in the prompt."""
        config = options.get("generation_config") or self.model.generation_config
        lookup = options.get("prompt_lookup_num_tokens", getattr(config, "prompt_lookup_num_tokens", None))
        return options.get("assistant_model") is not None or lookup is not None

    # ---- what the cache has read -------------------------------------------------------------------------------

    def _return_to(self, found: Reuse) -> None:
        """Leaves in the cache what was found, or nothing."""
        if found.how == "cropped":
            self.cache.crop(found.reused - self.cache.tokens_seen)
            self._seen = self._seen.first(found.reused)
            self._forget_spans()
        elif found.how == "read again":
            self.cache.reset()
            self._seen, self._lost = None, ""

    def _known(self, told: Dialogue, held: int) -> tuple[int, str]:
        """How many columns of the dialogue can stay in the cache, which has read `held`, and why no more."""
        seen = self._seen
        if seen is None or held > seen.columns:
            return 0, self._lost or f"the cache has read {held} columns that this conversation did not give it"
        if len(seen.ids) != len(told.ids):
            return 0, f"the batch has {len(told.ids)} rows and had {len(seen.ids)}"
        common, why = seen.first(held).common(told)
        if common >= told.columns:
            # A model needs a column to go on from.
            common, why = told.columns - 1, f"the dialogue ends at column {told.columns}, within what was read"
        # Half an image cannot be read: the model puts its features in as one piece.
        return told.outside_images(common), why

    def _forget_spans(self) -> None:
        """Screenshots that are no longer read are none of the cache's."""
        real, rows = self._seen.mask.sum(1).tolist(), self.cache.spans
        self.cache.context.spans = [[x for x in row if x[1] <= n] for row, n in zip(rows, real, strict=bool(rows))]

    # ---- images ------------------------------------------------------------------------------------------------

    def _positions(
        self, ids: torch.Tensor, mask: torch.Tensor, grids: torch.Tensor | None, kinds: torch.Tensor | None,
        given: torch.Tensor | None,
    ) -> dict[str, torch.Tensor]:  # fmt: skip
        """Rotary positions int64 [4, batch, tokens] of the whole dialogue; the model's own offset is set right."""
        kinds = torch.zeros_like(ids) if kinds is None else kinds
        if not self._turns_by_place:
            return {"mm_token_type_ids": kinds}
        if given is None:
            rope, delta = self.model.model.get_rope_index(
                ids, image_grid_thw=grids, mm_token_type_ids=kinds, attention_mask=mask
            )
        else:
            rope, delta = given, (given.amax((0, 2)) + 1 - mask.sum(1))[:, None]
        # The model keeps the last prompt's offset on itself, whoever gave that prompt.
        self.model.model.rope_deltas = delta
        text = (mask.long().cumsum(1) - 1).clamp(min=0)
        return {"position_ids": torch.cat([text[None], rope.to(text)]), "mm_token_type_ids": kinds}
