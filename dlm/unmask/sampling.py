"""How a token is drawn from logits, and how sure the model was of it: temperature, top-p, top-k, suppressed ids.

Shared by all rules. Two conventions exist for the confidence of a drawn token: LLaDA measures it on the model's own
logits, Dream on the distribution that the token was drawn from ("warped": temperature, then top-p, then top-k). Noise
is Gumbel in its log form, z / T - log(-log u), whose argmax is a draw from softmax(z / T); the authors' exp(z) /
(-log u)^T overflows. Noise in low precision makes texts more alike (arXiv 2409.02908), so it is fp64 by default.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from dlm.unmask.noise import Noise
from textkv.kernels import confidence

COLDEST = 1e-30  # logits divided by less are no numbers any more


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: 0 = the most probable token.
        top_p: keep the fewest most probable tokens whose mass exceeds this; None = all.
        top_k: keep the k most probable tokens (and those equal to the last of them); None = all.
        noise: precision of the Gumbel noise.

    Raises:
        ValueError: a value out of range.
    """

    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    noise: Literal["float32", "float64"] = "float64"

    def __post_init__(self) -> None:
        t, p, k = self.temperature, self.top_p, self.top_k
        if isinstance(t, bool) or not isinstance(t, int | float) or not 0 <= t < float("inf"):
            raise ValueError(f"temperature={t!r} is no number >= 0; use 0 for the most probable token")
        if 0 < t < COLDEST:
            raise ValueError(
                f"temperature={t!r} is below {COLDEST:g}, where logits leave the range of fp32; use 0 for the most "
                "probable token"
            )
        if p is not None and (isinstance(p, bool) or not isinstance(p, int | float) or not 0 < p <= 1):
            raise ValueError(f"top_p={p!r} is not in (0, 1]; use None to keep all tokens")
        if k is not None and (isinstance(k, bool) or not isinstance(k, int) or k < 1):
            raise ValueError(f"top_k={k!r} is no number of tokens >= 1; use None to keep all tokens")
        if self.noise not in ("float32", "float64"):
            raise ValueError(f"noise={self.noise!r}: use 'float32' or 'float64'")


@dataclass(frozen=True)
class Draw:
    """Drawn tokens, int64 [batch, r], and how sure the model was, fp32 [batch, r].

    `probability` is that of the token. `best`, `second` (the two largest probabilities) and `entropy` (nats) are those
    of the distribution that it is measured on; the last two are None where they were not asked for.
    """

    tokens: torch.Tensor
    probability: torch.Tensor
    best: torch.Tensor
    second: torch.Tensor | None
    entropy: torch.Tensor | None


class Sampler:
    """Draws the tokens of one generation.

    Args:
        suppressed: token ids that are never drawn.
        noise: where random numbers come from.

    Attributes:
        there: bool [batch, r], the candidates of the last draw.
    """

    def __init__(self, sampling: Sampling, suppressed: tuple[int, ...], noise: Noise) -> None:
        self.sampling, self.noise = sampling, noise
        self.suppressed = torch.tensor(suppressed, dtype=torch.int64, device=noise.device)
        self.there: torch.Tensor | None = None

    def draw(
        self, logits: torch.Tensor, there: torch.Tensor | None = None, *, warped: bool = False,
        excluded: torch.Tensor | None = None, spread: bool = True,
    ) -> Draw:  # fmt: skip
        """One token for each row of logits [batch, r, V].

        Args:
            there: bool [batch, r], which of them are candidates; what is drawn for the others has no meaning. None =
                all of them.
            warped: measure on the distribution after temperature, top-p and top-k instead of on the logits.
            excluded: int64 [s], ids that may be drawn but count as impossible where probabilities are measured.
            spread: whether the second probability and the entropy are wanted.
        """
        flat, batch = logits.flatten(0, 1), logits.shape[:2]
        self.there = torch.ones(batch, dtype=torch.bool, device=logits.device) if there is None else there
        # Warping needs a copy of [n, V]; greedy decoding without a warped measure goes by the raw logits.
        random = self.sampling.temperature > 0
        filtered = self.sampling.top_p is not None or self.sampling.top_k is not None
        source = self.warp(flat) if random or (warped and filtered) else flat
        measured = source if warped else flat
        found = confidence(measured, suppress=self.suppressed, spread=spread)
        self._check(found.probability)
        token, probability = found.token, found.probability
        if random:
            noise = self.gumbel(source.shape[1:]).flatten(0, 1)
            noisy = (source.to(noise.dtype) + noise).argmax(1)
            token = torch.where(found.lse == -torch.inf, token, noisy)  # nothing but -inf: the noise cannot choose
        # Measured again without the excluded tokens: the others' probabilities must sum to 1 without them.
        if excluded is not None:
            found = confidence(measured, suppress=torch.cat([self.suppressed, excluded]), spread=spread)
        if random or excluded is not None:
            probability = (measured.gather(1, token[:, None])[:, 0].float() - found.lse).exp()
            impossible = found.lse == -torch.inf
            if excluded is not None:
                impossible = impossible | torch.isin(token, excluded)
            probability = probability.masked_fill(impossible, 0)
        found = (token, probability, found.probability, found.second, found.entropy)
        return Draw(*(None if x is None else x.view(batch) for x in found))

    def _check(self, probability: torch.Tensor) -> None:
        """Raises ValueError for a candidate without a probability [batch * r]: its logits are no numbers."""
        # Any token could be read from them, and the text would look like one.
        wrong = np.isnan(probability.cpu().numpy())
        if wrong.any() and (wrong & self.there.flatten().cpu().numpy()).any():
            raise ValueError(
                "the logits hold NaN, so no token can be read from them; load the model in bfloat16 or float32, "
                "whose range is wider than float16's, and look at its weights"
            )

    def warp(self, z: torch.Tensor) -> torch.Tensor:
        """fp32 [n, V]: logits [n, V] after temperature, top-p and top-k, -inf at what is suppressed or filtered."""
        z = z.float() / self.sampling.temperature if self.sampling.temperature > 0 else z.float().clone()
        z = z.index_fill_(1, self.suppressed, -torch.inf)
        if self.sampling.top_p is not None:
            # Stable: of equal tokens the lower id comes first on every device.
            ordered = z.sort(dim=1, descending=True, stable=True)
            past = ordered.values.softmax(1).cumsum(1) > self.sampling.top_p
            past = past.roll(1, dims=1)  # the first token over the limit stays
            past[:, 0] = False
            z.masked_fill_(torch.zeros_like(past).scatter(1, ordered.indices, past), -torch.inf)
        if self.sampling.top_k is not None:
            # By value and not by index: tokens equal to the k-th stay, as in Dream's code.
            least = z.topk(min(self.sampling.top_k, z.shape[1]), dim=1).values[:, -1:]
            z.masked_fill_(z < least, -torch.inf)
        return z

    def take_rows(self, rows: torch.Tensor) -> None:
        """Keeps rows int64 [kept] (CPU) of the batch."""
        self.noise.take_rows(rows)

    def uniform(self) -> torch.Tensor:
        """A uniform number in [0, 1) for each candidate of the last draw, fp32 [batch, r]."""
        return self.noise.uniform(self.there)

    def gumbel(self, width: tuple[int, ...] = ()) -> torch.Tensor:
        """Gumbel noise [batch, r, *width] for the candidates of the last draw; log(0) is kept out at both ends."""
        dtype = getattr(torch, self.sampling.noise)
        edge = torch.finfo(dtype)
        # -log(-log u) with u in (0, 1): clamped away from 0 and 1, where it is infinite.
        return -(-self.noise.uniform(self.there, width, dtype).clamp_(edge.tiny, 1 - edge.eps).log_()).log_()
