"""A toy diffusion model without a network, a loop around a rule, and guiders whose opinion is known."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import nn
from transformers.cache_utils import Cache

from dlm.canvas import Canvas
from dlm.models.decoding_spec import DecodingSpec
from dlm.unmask import Rule, resolve_unmask

VOCAB, MASK, END = 40, 39, 38
SPEC = DecodingSpec(MASK, (END,), 37, 0, None, "confidence")


def canvas(batch: int = 1, prompt: int = 3, gen: int = 12, block: int = 4, seed: int = 0, pads: tuple = ()) -> Canvas:
    """Random prompts, row i padded by pads[i] on the left, and masks."""
    ids = torch.randint(0, 30, (batch, prompt), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for row, pad in enumerate(pads):
        ids[row, :pad], mask[row, :pad] = 37, 0
    return Canvas(ids, mask, gen_length=gen, block_length=block, mask_id=MASK, shift=0)


def whole(board: Canvas) -> tuple[torch.Tensor, torch.Tensor]:
    """A logit window over the whole canvas."""
    low = torch.zeros(board.batch, dtype=torch.int64)
    return low, torch.full_like(low, board.length)


class Toy:
    """Logits of a slot from its place after the prompt and the token before it (nothing, if that is a mask)."""

    def __init__(self, seed: int = 0, bigram: float = 1.0, vocab: int = VOCAB, prompt: int = 3) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.place = torch.randn(200, vocab, generator=generator)
        self.bigram = bigram * torch.randn(vocab, vocab, generator=generator)
        self.prompt = prompt

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        before = ids.roll(1, dims=1)
        follow = self.bigram[before].masked_fill((before == MASK)[..., None], 0)
        return self.place[torch.arange(ids.shape[1]) - self.prompt] + follow


def play(
    rule: str | Rule,
    board: Canvas,
    model: Callable[[torch.Tensor], torch.Tensor],
    steps: int | None = None,
    generator: torch.Generator | None = None,
    spec: DecodingSpec = SPEC,
    logit_window: Callable = whole,
    limit: int = 500,
    **options,
) -> SimpleNamespace:
    """Decodes with the bare rule: text [batch, G], committed slots per forward, the unmasker."""
    rule = resolve_unmask(rule, **options)
    unmasker = rule.begin(board, spec, generator, steps or board.length - board.prompt)
    history = []
    while not board.done:
        slots = unmasker.candidates(board, logit_window(board))
        logits = model(board.ids)
        logits = logits.gather(1, slots.clamp(min=0)[..., None].expand(-1, -1, logits.shape[2]))
        logits = logits.masked_fill((slots < 0)[..., None], float("nan"))  # what stands there is not read
        choice = unmasker.choose(logits, slots, board)
        assert not bool((choice.commit & (slots < 0)).any())
        history.append(board.commit(slots, choice.tokens, choice.commit))
        assert len(history) < limit, "the rule does not end"
    return SimpleNamespace(text=board.generated.clone(), history=torch.stack(history), unmasker=unmasker)


class Opinion(nn.Module):
    """A causal model whose next-token logits are `says(tokens so far of one row) -> [V]`: no weights, a real cache."""

    def __init__(self, says: Callable[[list[int]], torch.Tensor], vocab: int = VOCAB, ends: tuple = ()) -> None:
        super().__init__()
        self.says, self.calls = says, []
        self.config = SimpleNamespace(vocab_size=vocab, max_position_embeddings=500, eos_token_id=None)
        self.config.get_text_config = lambda: self.config
        self.generation_config = SimpleNamespace(eos_token_id=list(ends) or None)
        self.device, self.dtype = torch.device("cpu"), torch.float32

    def forward(
        self, input_ids: torch.Tensor, past_key_values: Cache, use_cache: bool, logits_to_keep: int,
        attention_mask: torch.Tensor | None = None, position_ids: torch.Tensor | None = None,
    ):  # fmt: skip
        self.calls.append(input_ids.shape[1])
        states = input_ids[:, None, :, None].float()
        held = past_key_values.update(states, states, 0)[0][:, 0, :, 0].long()
        real = torch.ones_like(held) if attention_mask is None else attention_mask
        first = held.shape[1] - logits_to_keep
        logits = [
            torch.stack([self.says(row[: i + 1][there[: i + 1].bool()].tolist()) for i in range(first, held.shape[1])])
            for row, there in zip(held, real, strict=True)
        ]
        return SimpleNamespace(logits=torch.stack(logits).clone())


def onehot(token: int, vocab: int = VOCAB) -> torch.Tensor:
    return 20.0 * torch.nn.functional.one_hot(torch.tensor(token), vocab)
