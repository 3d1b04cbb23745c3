"""What one layer of a cache holds: segments, statistics per token, and how tokens leave, whoever lets them go."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from textkv.collector import EvidenceCollector, found_again
from textkv.context import Context
from textkv.kinds import LayerKind
from textkv.segments.base import Segment, Stored, keep_across, storage_bytes
from textkv.segments.dense import DenseSegment

OF_HEAD = "head."
"""How the names of statistics begin that a method keeps per head and not per token: they stay when tokens go."""


class Contents:
    """The part of a layer that methods work on; see `textkv.layer.Layer` for its attributes."""

    context: Context
    kind: LayerKind
    collector: EvidenceCollector
    segments: list[Segment]
    statistics: dict[str, torch.Tensor]
    trajectory: dict[str, torch.Tensor]
    since_eviction: int
    changes: int
    seen: int
    real_seen: torch.Tensor | None
    is_initialized: bool

    # ---- what methods use --------------------------------------------------------------------------------------

    def stored(self) -> Stored:
        """What the layer holds, all segments side by side, padded to one length (holes have position -1)."""
        self.tidy()
        parts = [segment.stored() for segment in self._known()]
        if len(parts) == 1:
            return parts[0]
        return Stored(*(torch.cat([getattr(p, f) for p in parts], 2) for f in ("keys", "values", "positions")))

    def held_positions(self) -> torch.Tensor:
        """The positions of `stored()`, without unpacking what is packed: int32 [batch, stored heads, n], -1 = hole."""
        self.tidy()
        parts = [segment.held_positions() for segment in self._known()]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    @property
    def whole(self) -> int | None:
        """Slots of a layer that is one rectangle of tokens, as far as the host knows; None = there are holes, or
        several segments. What a method asks at every decoded token is answered from this, not by the device."""
        segment = self.segments[0]
        if len(self.segments) == 1 and isinstance(segment, DenseSegment) and not segment.holes:
            return segment.slots
        return None

    @property
    def rectangle(self) -> Stored:
        """`stored()` of a layer that is `whole`, in whatever order the slots are: for what does not ask for one."""
        return self.segments[0].stored()

    def tidy(self) -> None:
        """Brings slots, and the statistics of their tokens, back into the order of positions after `drop_one`."""
        last = self.segments[-1]
        if not isinstance(last, DenseSegment) or last.in_order:
            return
        order = last.held_positions().argsort(-1)
        for name in self._of_tokens():
            known = self.statistics[name]
            self.statistics[name] = F.pad(known, (0, order.shape[-1] - known.shape[-1])).gather(-1, order)
        last.pick(order)
        last.in_order = True

    def statistic(self, name: str) -> torch.Tensor:
        """The numbers that a method keeps per stored token: fp32 [batch, stored heads, n], slot by slot of `stored()`.
        They move and go with their tokens; a token that came since they were set, or a hole, has 0. Set them through
        `statistics[name]`. (Those whose names begin with OF_HEAD have any width, and are asked for there.)
        """
        if self.whole is not None and name in self.statistics:
            known = self.statistics[name]
            return known if known.shape[-1] == self.whole else F.pad(known, (0, self.whole - known.shape[-1]))
        positions = self._counted()
        known = self.statistics.get(name, positions.new_zeros((*positions.shape[:2], 0), dtype=torch.float32))
        known = known[..., : positions.shape[-1]]
        known = F.pad(known, (0, positions.shape[-1] - known.shape[-1]))
        return known.masked_fill(positions < 0, 0)

    def _counted(self) -> torch.Tensor:
        """Positions of the tokens that statistics are of: int32 [batch, stored heads, n], -1 = hole."""
        return self.segments[-1].held_positions() if self.context.method.counts_last else self.held_positions()

    def _known(self) -> list[Segment]:
        """The segments without those that nothing ever came to: they do not know the shape of a token."""
        if len(self.segments) == 1:
            return self.segments
        return [segment for segment in self.segments if segment.tensors()] or self.segments[-1:]

    def _of_tokens(self) -> list[str]:
        """The statistics that tokens have, which move and go with them."""
        return [name for name in self.statistics if not name.startswith(OF_HEAD)]

    def keep(self, index: torch.Tensor) -> None:
        """Keeps slots `index` int64 [batch, kv_heads or 1, c] of `stored()`, ascending, -1 = hole; frees the others.
        The method's `on_evict` hears what stayed."""
        self.tidy()
        # Read before the segments change, since they are matched slot by slot.
        known = {name: self.statistic(name) for name in self._of_tokens()}
        before, counted, several = self.held_positions(), self._counted(), len(self.segments) > 1
        self.segments = keep_across(self.segments, index)
        self._changed()
        pick = index.expand(-1, before.shape[1], -1)
        for name, x in known.items():
            told = self.statistics[name].shape[-1]
            if several:  # each keeps its slots in its own way: what moved where is told by positions alone
                x = found_again(x, counted, self._counted())
            else:
                x = x.gather(-1, pick.clamp(min=0)).masked_fill(pick < 0, 0)
            if told < counted.shape[-1]:  # tokens that came since have 0: no room for that
                used = (x != 0).flatten(0, 1).any(0).nonzero()
                x = x[..., : int(used.max()) + 1 if len(used) else 0].clone()
            self.statistics[name] = x
        self.context.method.on_evict(self, before.gather(-1, pick.clamp(min=0)).masked_fill(pick < 0, -1))

    def drop_one(self, scores: torch.Tensor) -> Stored:
        """As `drop_lowest`, but that slots need not stay in order, so that next to nothing is moved: all but those of
        the newest tokens from the first that ever left on. Until `tidy`, which whatever looks at slots calls.

        Returns:
            What has left, [batch, stored heads, 1, ..].
        """
        segment = self.segments[0]
        # Of equal ones the newest: by position, as slots say nothing.
        others = scores > scores.amin(-1, keepdim=True)
        victim = segment.held_positions().masked_fill(others, -1).argmax(-1, keepdim=True)
        for name in self._of_tokens():
            x = self.statistic(name)
            self.statistics[name] = x.scatter(-1, victim, x[..., :1])[..., 1:].clone()
        gone = segment.take_out(victim)
        self._changed()
        self.context.method.on_evict(self, segment.held_positions())
        return gone

    def drop_lowest(self, scores: torch.Tensor) -> None:
        """Lets go of the one token of each head with the lowest score, fp32 [batch, stored heads, n], in a layer that
        is `whole`; of equal ones the newest. Slots stay in the order of positions. Asks nothing of the device."""
        n = scores.shape[-1]
        # argmin takes the first of equal ones: turned round, that is the newest.
        victim = n - 1 - scores.flip(-1).argmin(-1, keepdim=True)
        slots = torch.arange(n - 1, device=scores.device)
        # All slots but one, by arithmetic: a sort would cost more than the move.
        index = slots + (slots >= victim)
        self.statistics |= {name: self.statistic(name).gather(-1, index) for name in self._of_tokens()}
        self.segments[0].pick(index)
        self._changed()
        self.context.method.on_evict(self, self.segments[0].held_positions())

    def keep_mask(self, mask: torch.Tensor) -> None:
        """Keeps the slots where bool [batch, kv_heads, n] is True, each head its own number of them."""
        self.tidy()
        before = self.held_positions()
        # A hole is never kept, whatever a score says about its slot.
        mask = mask & (before >= 0)
        # Ragged heads show their tokens first and their missing slots last.
        order = (~mask).sort(dim=-1, stable=True).indices[..., : int(mask.sum(-1).max())]
        missing = ~mask.gather(-1, order)
        self.statistics |= {
            name: self.statistic(name).gather(-1, order).masked_fill(missing, 0) for name in self._of_tokens()
        }
        first, kept = 0, []
        for segment in self.segments:
            size = segment.held_positions().shape[2] if segment.tensors() else 0
            if not size:
                kept.append(segment)
                continue
            kept.append(segment.keep_mask(mask[..., first : first + size]))
            first += size
        self.segments = kept
        self._changed()
        self.context.method.on_evict(self, before.gather(-1, order).masked_fill(missing, -1))

    def forget(self, gone: torch.Tensor) -> None:
        """Drops the tokens at the logical positions where bool [batch, p] is True, whatever holds them."""
        if not self.is_initialized:
            return
        at = self.held_positions()
        known = (at >= 0) & (at < gone.shape[1])
        # A table by position, not a comparison with every span: spans may be many.
        table = gone[:, None].expand(-1, at.shape[1], -1)
        dropped = known & table.gather(-1, at.long().clamp(0, gone.shape[1] - 1))
        # Nothing of it is stored here: no statistic moves, and what was packed stays as it is.
        if not bool(dropped.any()):
            return
        stays = (at >= 0) & ~dropped
        if bool((stays == stays[:, :1]).all()):
            # One index for all heads, where they agree: segments that share positions can keep them shared.
            stays = stays[:, :1]
        # Holes come first: then the newest tokens of all heads stand in the last columns, where `crop` takes them.
        count = int(stays.sum(-1).max())
        order = stays.sort(dim=-1, stable=True).indices[..., stays.shape[-1] - count :]
        croppable = min(self.since_eviction, self._behind(gone))
        self.keep(order.masked_fill(~stays.gather(-1, order), -1))
        self.collector.moved(at, self.held_positions())
        # What came after all that is gone lies where it lay, and can still be taken back.
        self.since_eviction = croppable

    def _behind(self, gone: torch.Tensor) -> int:
        """The least number of tokens that any row has behind its last position in bool [batch, p]."""
        places = torch.arange(1, gone.shape[1] + 1, device=gone.device)
        return int((self.real_seen - (gone * places).amax(1).cpu()).min())

    def _changed(self) -> None:
        self.since_eviction = 0
        self.changes += 1

    def replace(self, segments: list[Segment]) -> None:
        """Puts other segments in place of what is stored; the method has moved over what it keeps (statistics of tokens
        are gone)."""
        self.segments = segments
        self.drop_token_statistics()
        self._changed()

    def drop_token_statistics(self) -> None:
        """Slots are about to be divided anew: what belongs to them is forgotten, what is kept per head stays."""
        self.statistics = {name: x for name, x in self.statistics.items() if name.startswith(OF_HEAD)}

    def repeat_heads(self, times: int) -> None:
        """From now on every KV head is stored `times` times, once per query head of its group."""
        self.tidy()
        last = self.segments[-1]
        # Only a rectangle can repeat its heads; other forms are read out first.
        if len(self.segments) > 1 or not isinstance(last, DenseSegment):
            last = DenseSegment.of(self.stored(), last.head_repeat if isinstance(last, DenseSegment) else 1)
        last.repeat_heads(times)
        self.segments = [last]

    # ---- counting ----------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor that the layer holds: its segments' by "segment.name", its statistics by "statistic.name", what
        its trajectory taught by "trajectory.name"."""
        held = {f"{i}.{name}": x for i, s in enumerate(self.segments) for name, x in s.tensors().items()}
        held |= {f"statistic.{name}": x for name, x in self.statistics.items()}
        return held | {f"trajectory.{name}": x for name, x in self.trajectory.items()}

    def host_bytes(self) -> int:
        """Bytes that segments hold in host memory although the model runs on a device."""
        return sum(segment.host_bytes() for segment in self.segments)

    def kv_bytes(self) -> int:
        """Bytes of all storages that the layer keeps alive on the model's device, positions and lengths included."""
        # What a segment holds on the host is told apart by object: on a CPU everything would lie on one device.
        host = {id(x) for segment in self.segments for x in segment.host_tensors().values()}
        return storage_bytes([x for x in self.tensors().values() if id(x) not in host])

    def full_bytes(self) -> int:
        """Bytes of K and V that the model's own cache holds after the same tokens, those forgotten on demand left
        out."""
        if not self.is_initialized:
            return 0
        seen = self.seen if self.kind.window is None else min(self.seen, self.kind.window - 1)
        gone = 0 if self.context.gone is None or self.kind.window is not None else int(self.context.gone.sum())
        return 2 * (len(self.real_seen) * seen - gone) * self.kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def remaining(self) -> torch.Tensor:
        """Tokens seen and not forgotten on demand, int64 [batch] on the CPU: what a budget is a share of."""
        return self.real_seen if self.context.gone is None else self.real_seen - self.context.gone

    @property
    def came(self) -> torch.Tensor | None:
        """What each row got, while hooks run; see `Context.came`."""
        return self.context.came

    def resting(self, counts: torch.Tensor) -> torch.Tensor:
        """How many tokens to keep, int64 [batch, 1 or stored heads] on the CPU: `counts`, and in rows to which nothing
        came all that they hold. What other rows got costs a row nothing."""
        if self.came is None:
            return counts
        held = self.lengths() if counts.shape[1] > 1 else self.lengths().amax(1, keepdim=True)
        return torch.where(self.came[:, None] > 0, counts, held)

    def lengths(self) -> torch.Tensor:
        """Tokens stored, int64 [batch, stored heads], on the CPU."""
        return sum(segment.lengths() for segment in self._known())
