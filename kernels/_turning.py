"""Scores of a centre that turns with the token's position, for `packed_attention`: its reference and device functions.

    q . R(p) c = (q1 c1 + q2 c2) . cos(p rate) + (q2 c1 - q1 c2) . sin(p rate)

with q and c cut into the halves of the R rotary dims. The two products are made once per query; a tile of tokens needs
its cosines and sines only, which are never stored. Angles are fp32 products, as the models form them: what was turned
by them when it was subtracted must be turned by the same when it comes back.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels._backend import check_tensor, jit, tl


def turned_scores(q, centre, rates, positions, tile):
    """q [runs, x, D] against the turned centres of the tokens `tile` of each run -> fp32 [runs, x, tokens]."""
    half = rates.shape[1]
    shown = positions[..., tile].expand(-1, len(q) // len(positions), -1).flatten(0, 1)
    angle = shown.float()[:, None] * rates[:, :, None]
    (q1, q2), (c1, c2) = (x[..., : 2 * half].unflatten(-1, (2, half)).unbind(-2) for x in (q, centre[:, None]))
    scores = (q1 * c1 + q2 * c2) @ angle.cos() + (q2 * c1 - q1 * c2) @ angle.sin()
    # positions may end before the last tile does
    return F.pad(scores, (0, tile.stop - tile.start - scores.shape[2]))


@jit
def turned_products(p_q, o_q, m_row, p_centre, p_rate, run, D: tl.constexpr, HALF: tl.constexpr, BLOCK_F: tl.constexpr):
    """What cos and sin of a token's angles [frequencies] are multiplied with: fp32 [queries, frequencies] each."""
    f = tl.arange(0, BLOCK_F)
    real = f < HALF
    c_1 = tl.load(p_centre + run * D + f, mask=real, other=0.0)[None, :]
    c_2 = tl.load(p_centre + run * D + HALF + f, mask=real, other=0.0)[None, :]
    mask = m_row[:, None] & real[None, :]
    q_1 = tl.load(p_q + o_q[:, None] + f[None, :], mask=mask, other=0.0).to(tl.float32)
    q_2 = tl.load(p_q + o_q[:, None] + HALF + f[None, :], mask=mask, other=0.0).to(tl.float32)
    rate = tl.load(p_rate + run * HALF + f, mask=real, other=0.0)
    return q_1 * c_1 + q_2 * c_2, q_2 * c_1 - q_1 * c_2, rate


@jit
def turned_tile(with_cos, with_sin, rate, p_positions, j, seen):
    """Queries . turned centres of tokens j, fp32 [queries, tokens]. Centres are large: their products stay fp32."""
    position = tl.load(p_positions + j, mask=seen, other=0).to(tl.float32)
    angle = rate[:, None] * position[None, :]
    scores = tl.dot(with_cos, tl.cos(angle), input_precision="tf32x3")
    return scores + tl.dot(with_sin, tl.sin(angle), input_precision="tf32x3")


def check_turn(q, centre, rates, positions, longest):
    """Raise ValueError on bad arguments of a centre that turns."""
    if centre is None or positions is None:
        raise ValueError("rates turn a centre by the tokens' positions; pass centre and positions with them")
    runs, batch = len(centre), q.shape[0]
    check_tensor("rates", rates, (runs, "R/2"), (torch.float32,), q)
    if not 1 <= rates.shape[1] <= q.shape[-1] // 2:
        raise ValueError(f"rates has shape {list(rates.shape)}; the limit is D / 2 = {q.shape[-1] // 2} pairs of dims")
    check_tensor("positions", positions, (batch, "G or 1", "n"), (torch.int32,), q)
    groups, n = positions.shape[1:]
    if groups not in (1, runs // batch) or n < longest or positions.stride(2) != 1:
        raise ValueError(
            f"positions has shape {list(positions.shape)}; it must be [{batch}, {runs // batch} or 1, n >= {longest}], "
            "dense in n"
        )
