"""Scores of a centre that turns with the token's position, for `packed_attention`: its reference and device functions.

    q . R(p) c = (q1 c1 + q2 c2) . cos(p freq) + (q2 c1 - q1 c2) . sin(p freq)

with q and c cut into the halves of the R rotary dims. The two products are made once per query; a tile of tokens needs
its cosines and sines only, which are never stored. Angles are fp32 products, as the models form them: what was turned
by them when it was subtracted must be turned by the same when it comes back.

Under M-RoPE a token has three positions (time, height, width), and p is for each frequency that of its own axis.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ._backend import check_tensor, jit, tl


def turned_scores(q, centre, inv_freq, positions, axes, tile):
    """q [runs, x, D] against the turned centres of the tokens `tile` of each run -> fp32 [runs, x, tokens].

    positions are [1 or 3, B, G or 1, n], as `check_turn` returns them.
    """
    half = inv_freq.shape[1]
    (q1, q2), (c1, c2) = (x[..., : 2 * half].unflatten(-1, (2, half)).unbind(-2) for x in (q, centre[:, None]))
    with_cos, with_sin = q1 * c1 + q2 * c2, q2 * c1 - q1 * c2
    shown = positions[..., tile]
    common = _common(inv_freq) if shown.shape[1] * shown.shape[2] == 1 < len(q) else None
    if common is None:
        shown = shown.expand(-1, -1, len(q) // positions.shape[1], -1).flatten(1, 2).float()
        shown = (shown if axes is None else shown[axes.long()]).movedim(0, 1)  # [runs, 1 or R / 2, tokens]
        angle = shown * inv_freq[:, :, None]
        scores = with_cos @ angle.cos() + with_sin @ angle.sin()
    else:
        # Cosines and sines cost more than all products: runs at the same places share them.
        shown = shown[:, 0, 0].float()
        angle = (shown if axes is None else shown[axes.long()]) * common[:, None]
        moves = (inv_freq != 0)[:, None]
        still = with_cos.masked_fill(moves, 0).sum(-1, keepdim=True)  # the cosine of 0 is 1
        scores = torch.cat([with_cos * moves, with_sin * moves], -1) @ torch.cat([angle.cos(), angle.sin()]) + still
    # positions may end before the last tile does
    missing = tile.stop - tile.start - scores.shape[2]
    return F.pad(scores, (0, missing)) if missing else scores


def _common(inv_freq):
    """The frequencies [R / 2] of which each of the runs [runs, R / 2] has its own or 0; None = there are none such."""
    common = inv_freq.amax(0)
    return common if bool(((inv_freq == common) | (inv_freq == 0)).all()) else None


@jit
def turned_products(
    p_q, o_q, m_row, p_centre, p_freq, p_axis, run,
    D: tl.constexpr, HALF: tl.constexpr, AXES: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """What cos and sin of a token's angles [frequencies] are multiplied with: fp32 [queries, frequencies] each; then
    freq and axis of the frequencies."""
    f = tl.arange(0, BLOCK_F)
    real = f < HALF
    c_1 = tl.load(p_centre + run * D + f, mask=real, other=0.0)[None, :]
    c_2 = tl.load(p_centre + run * D + HALF + f, mask=real, other=0.0)[None, :]
    mask = m_row[:, None] & real[None, :]
    q_1 = tl.load(p_q + o_q[:, None] + f[None, :], mask=mask, other=0.0).to(tl.float32)
    q_2 = tl.load(p_q + o_q[:, None] + HALF + f[None, :], mask=mask, other=0.0).to(tl.float32)
    freq = tl.load(p_freq + run * HALF + f, mask=real, other=0.0)
    axis = tl.zeros([BLOCK_F], tl.int32)
    if AXES == 3:
        axis = tl.load(p_axis + f, mask=real, other=0)
    return q_1 * c_1 + q_2 * c_2, q_2 * c_1 - q_1 * c_2, freq, axis


@jit
def turned_tile(with_cos, with_sin, freq, axis, p_positions, s_pa, j, seen, AXES: tl.constexpr):
    """Queries . turned centres of tokens j, fp32 [queries, tokens]. Centres are large: their products stay fp32."""
    time = tl.load(p_positions + j, mask=seen, other=0).to(tl.float32)
    if AXES == 3:
        # three rows and a choice between them: a gather would load one number per frequency and token
        height = tl.load(p_positions + s_pa + j, mask=seen, other=0).to(tl.float32)
        width = tl.load(p_positions + 2 * s_pa + j, mask=seen, other=0).to(tl.float32)
        own = tl.where(axis[:, None] == 1, height[None, :], time[None, :])
        angle = freq[:, None] * tl.where(axis[:, None] == 2, width[None, :], own)
    else:
        angle = freq[:, None] * time[None, :]
    scores = tl.dot(with_cos, tl.cos(angle), input_precision="tf32x3")
    return scores + tl.dot(with_sin, tl.sin(angle), input_precision="tf32x3")


def check_turn(q, centre, inv_freq, positions, axes, longest):
    """Raise ValueError on bad arguments of a centre that turns; return the positions as [1 or 3, B, G or 1, n]."""
    if centre is None or positions is None:
        raise ValueError("inv_freq turn a centre by the tokens' positions; pass centre and positions with them")
    runs, batch = len(centre), q.shape[0]
    check_tensor("inv_freq", inv_freq, (runs, "R/2"), (torch.float32,), q)
    if not 1 <= inv_freq.shape[1] <= q.shape[-1] // 2:
        raise ValueError(
            f"inv_freq has shape {list(inv_freq.shape)}; the limit is D / 2 = {q.shape[-1] // 2} pairs of dims"
        )
    lead = () if axes is None else (3,)
    check_tensor("positions", positions, (*lead, batch, "G or 1", "n"), (torch.int32,), q)
    groups, n = positions.shape[-2:]
    if groups not in (1, runs // batch) or n < longest or positions.stride(-1) != 1:
        first = ", ".join(map(str, (*lead, batch)))
        raise ValueError(
            f"positions has shape {list(positions.shape)}; it must be [{first}, {runs // batch} or 1, n >= {longest}], "
            "dense in n"
        )
    if axes is None:
        return positions[None]
    check_tensor("axes", axes, (inv_freq.shape[1],), (torch.int32,), q)
    if axes.device.type == "cpu" and not bool(((axes >= 0) & (axes < 3)).all()):
        raise ValueError(f"axes holds {axes.unique().tolist()}; a frequency turns with axis 0 (t), 1 (h) or 2 (w)")
    return positions
