"""Reward heads: what fidelity and quality of an answer will be, predicted from the model's own hidden state (PORAG 2A).

    f_i(h) = w2 . tanh(W1 h + b1) + b2,  i = fidelity, quality

h is the hidden state of the answer's last token over prompt, passages and answer (arXiv 2504.01281). The paper trains
the heads in the same loop at a rate of their own, and leaves the loss open: here the mean squared error to the measured
figures (`textkv.rag.rewards`). No gradient of theirs reaches the model. They are of use where answers are to be judged
without a reference; where there is one, the figures themselves are the better reward.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from textkv.command import write_bytes

FILE = "heads.safetensors"


class RewardHeads(nn.Module):
    """Two heads on hidden states of `width` channels.

    Args:
        rate: learning rate of the heads (5e-5 in the paper, for days of training).
        seed: of their first weights.
    """

    def __init__(self, width: int, rate: float = 1e-3, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.heads = nn.ModuleList(
                nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)) for _ in range(2)
            )
        self._optimizer = torch.optim.AdamW(self.parameters(), rate)

    def forward(self, states: Tensor) -> Tensor:
        """(fidelity, quality) fp32 [n, 2] as predicted from states [n, width]."""
        return torch.cat([head(states.float()) for head in self.heads], -1)

    @torch.no_grad()
    def predicted(self, states: Tensor) -> list[tuple[float, float]]:
        """The same as numbers."""
        return [tuple(row) for row in self(states.cpu()).tolist()]

    @torch.enable_grad()
    def learn(self, states: Tensor, measured: Sequence[tuple[float, float]]) -> float:
        """One step towards what was measured of these answers; the mean squared error before it."""
        # Inference tensors cannot be saved for a gradient: a copy can.
        loss = nn.functional.mse_loss(self(states.detach().cpu().clone()), torch.tensor(measured, dtype=torch.float32))
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        return loss.item()

    def save(self, folder: Path) -> None:
        """Writes the weights to a checkpoint's folder; moments of the optimizer begin anew after a restart."""
        write_bytes(folder / FILE, save(self.state_dict()))

    def load(self, folder: Path) -> None:
        """Reads what `save` wrote.

        Raises:
            ValueError: there is nothing, or heads of another model.
        """
        try:
            self.load_state_dict(load_file(folder / FILE))
        except (OSError, RuntimeError, SafetensorError) as error:
            told = " ".join(str(error).split())[:120]
            raise ValueError(f"{folder / FILE} holds no heads of this model ({told}); begin anew") from None


@torch.no_grad()
def last_states(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], answers: Sequence[str]
) -> Tensor:
    """fp32 [n, hidden]: the last layer's state of the last token of each prompt with its answer."""
    texts = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    # Padded on the left, every text ends in the last column.
    given = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt").to(model.device)
    was = model.training
    out = model.eval()(
        input_ids=given.input_ids, attention_mask=given.attention_mask, output_hidden_states=True, use_cache=False,
        logits_to_keep=1,
    )  # fmt: skip
    model.train(was)
    return out.hidden_states[-1][:, -1].float()
