"""What a model shows of itself while it reads a text: inputs of its projections, and what each layer would predict."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from textkv.kinds import text_model
from textkv.masa.grouping import drift


@dataclass(frozen=True, eq=False)
class Calibration:
    """What was seen.

    Attributes:
        moments: X^T X / T fp64 [in, in] of the inputs X of each projection, by its name.
        drifts: KL in nats between neighbouring layers, fp64 [layers - 1].
    """

    moments: dict[str, Tensor]
    drifts: Tensor


@torch.inference_mode()
def calibrate(model: PreTrainedModel, rows: Tensor, projections: dict[str, dict[str, nn.Linear]]) -> Calibration:
    """Read `rows` int64 [texts, tokens], one at a time.

    A layer's prediction is the output head after the final norm, on its output averaged over a text's tokens
    (section 3); predictions are averaged over texts.

    Raises:
        ValueError: no text, or a model without an output head over a vocabulary.
    """
    if rows.dim() != 2 or not rows.numel():
        raise ValueError(f"calibration rows are {list(rows.shape)}; give texts as [texts, tokens], at least one")
    decoder, head = text_model(model), model.get_output_embeddings()
    if head is None or getattr(decoder, "norm", None) is None:
        raise ValueError(f"{type(model).__name__} has no final norm and output head to compare layers by")
    owners = _owners(projections)
    moments = {name: torch.zeros(module.in_features, module.in_features).double() for name, module in owners.items()}
    means: list[Tensor] = []
    hooks = [module.register_forward_pre_hook(_adder(moments[name])) for name, module in owners.items()]
    hooks += [block.register_forward_hook(_keeper(means)) for block in decoder.layers]
    predicted = []
    try:
        for row in rows:
            means.clear()
            decoder(input_ids=row[None].to(model.device), use_cache=False)
            logits = head(decoder.norm(torch.stack(means)))
            predicted.append(logits.double().softmax(-1))
    finally:
        for hook in hooks:
            hook.remove()
    log_p = torch.stack(predicted).mean(0).clamp(min=1e-30).log().cpu()
    seen = {name: moment / rows.numel() for name, moment in moments.items()}
    # Q, K and V read the same input: it is gathered once.
    shared = {
        name: seen[list(projections[_reader(letter, projections)])[number]]
        for letter, modules in projections.items()
        for number, name in enumerate(modules)
    }
    return Calibration(shared, drift(log_p))


def _reader(letter: str, projections: dict[str, dict[str, nn.Linear]]) -> str:
    """The projection whose input stands for that of `letter`."""
    return letter if letter == "o" else next(other for other in projections if other != "o")


def _owners(projections: dict[str, dict[str, nn.Linear]]) -> dict[str, nn.Linear]:
    readers = dict.fromkeys(_reader(letter, projections) for letter in projections)
    return {name: module for letter in readers for name, module in projections[letter].items()}


def _adder(moment: Tensor) -> Callable:
    def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].flatten(0, -2).float()
        moment.add_((x.T @ x).cpu())

    return add


def _keeper(means: list[Tensor]) -> Callable:
    def keep(module: nn.Module, args: tuple, output: Tensor | tuple[Tensor, ...]) -> None:
        hidden = output if isinstance(output, Tensor) else output[0]
        means.append(hidden[0].mean(0))

    return keep
