"""Centres of a model's queries, layer by layer: a small safetensors file that lies beside the model.

"mini" is the file of the embedded text model. A file holds, for each layer that a method governs, by its number in the
model, "N.mean" fp32 [heads, head_dim] and "N.lengths" fp32 [heads, R / 2] of R rotary channels; what they are, says
`textkv.evidence.QueryCentres`. Nothing in it can run code.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from textkv.command import write_bytes
from textkv.evidence import QueryCentres
from textkv.mini import WEIGHTS
from textkv.records import checked, parse

FILE = "tri_attention.safetensors"
FORMAT = 1
COMMAND = "python -m textkv.tri_attention calibrate --model FOLDER --text FILE"


@dataclass(frozen=True, eq=False)
class Centres:
    """Query centres and where they come from.

    Attributes:
        layers: by the layer's number in the model, for a batch of one row, on the CPU.
        model: name of the model, for the reader.
        settings: how they were made, for the reader.

    Raises:
        ValueError: no layers, numbers that are not finite, or a mean and lengths that do not belong together.
    """

    layers: dict[int, QueryCentres]
    model: str = ""
    settings: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("no layers: centres are those of at least one layer")
        for number, of_layer in self.layers.items():
            mean, lengths = of_layer.mean, of_layer.lengths
            if mean.dim() != 3 or lengths.dim() != 3 or mean.shape[:2] != lengths.shape[:2]:
                raise ValueError(
                    f"layer {number}: mean of {tuple(mean.shape[1:])} and lengths of {tuple(lengths.shape[1:])}; need "
                    "[heads, head_dim] and [heads, pairs] of the same heads"
                )
            if not bool(mean.isfinite().all() and lengths.isfinite().all() and (lengths >= 0).all()):
                raise ValueError(f"layer {number}: means must be finite, and lengths finite and not negative")

    def save(self, path: str | Path) -> None:
        """Writes the centres as safetensors, all of them or nothing."""
        tensors = {}
        for number, of_layer in self.layers.items():
            tensors[f"{number}.mean"] = of_layer.mean[0].float().contiguous()
            tensors[f"{number}.lengths"] = of_layer.lengths[0].float().contiguous()
        count = next(iter(self.layers.values())).count
        header = {"format": FORMAT, "model": self.model, "tokens": int(count[0]), "settings": self.settings}
        write_bytes(Path(path), save(tensors, metadata={"header": json.dumps(header, sort_keys=True)}))

    @classmethod
    def load(cls, path: str | Path) -> Centres:
        """Reads a file that `save` wrote, or a folder that holds one; "mini" is the embedded one.

        Raises:
            ValueError: nothing there, or no centres.
        """
        file = WEIGHTS if path == "mini" else Path(path)
        file = file / FILE if file.is_dir() else file
        if not file.is_file():
            raise ValueError(f"centres={str(path)!r}: there is no {file.name}; make one with `{COMMAND}`")
        try:
            with safe_open(file, "pt") as opened:
                header = checked(parse((opened.metadata() or {})["header"]), {"format": int})
                if header["format"] != FORMAT:
                    raise ValueError(f"format {header['format']}, this version reads {FORMAT}")
                checked(header, {"tokens": int, "model": str, "settings": dict})
                numbers = sorted({int(name.partition(".")[0]) for name in opened.keys()})
                count = torch.tensor([float(header["tokens"])])
                layers = {
                    n: QueryCentres(count, *(opened.get_tensor(f"{n}.{part}")[None] for part in ("mean", "lengths")))
                    for n in numbers
                }
            return cls(layers, header["model"], header["settings"])
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            said = " ".join(str(error).split())
            raise ValueError(f"centres={str(path)!r} cannot be read: {said}") from None
