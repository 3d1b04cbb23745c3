"""A pattern: one gate per KV head, 1 = it needs the whole context; a small JSON file that lies beside its model.

"mini" and "smollm2" are these models' patterns, parts of the package. The second needed no training: `identify --model
smollm2 --how mean_qk --longest 512 --passkeys 4 --words 4 --sinks 16 --recent 64`, fifty rows of plays. The authors'
released patterns (a folder with `full_attention_heads.tsv` and `config.json`) are read as well.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from textkv.command import write_text
from textkv.mini import WEIGHTS
from textkv.records import checked, listed, parse

FILE = "duo_attention.json"
FORMAT = 1
EMBEDDED = {"mini": WEIGHTS, "smollm2": Path(__file__).with_name("smollm2.json")}
RELEASED, RELEASED_CONFIG = "full_attention_heads.tsv", "config.json"


@dataclass(frozen=True, eq=False)
class Pattern:
    """Gates and where they come from.

    Attributes:
        gates: fp32 [layers, kv_heads] in 0..1, on the CPU.
        sinks, recent: sizes of the streaming window that they were trained with, in tokens.
        how: "distillation", "mean_qk" or "released".
        model: name of the model, for the reader.
        settings: how they were made, for the reader.

    Raises:
        ValueError: gates that are no rectangle of numbers in 0..1.
    """

    gates: torch.Tensor
    sinks: int
    recent: int
    how: str = "distillation"
    model: str = ""
    settings: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.gates.dim() != 2 or not self.gates.numel():
            raise ValueError(f"gates of shape {tuple(self.gates.shape)}: a pattern needs [layers, kv_heads]")
        # Negated, so that NaN is refused too.
        if not bool(((self.gates >= 0) & (self.gates <= 1)).all()):
            raise ValueError(f"gates from {float(self.gates.min()):g} to {float(self.gates.max()):g}: must lie in 0..1")

    def save(self, path: str | Path) -> None:
        """Writes the pattern as JSON, all of it or nothing."""
        made = {
            "format": FORMAT, "model": self.model, "how": self.how, "sinks": self.sinks, "recent": self.recent,
            "layers": self.gates.shape[0], "kv_heads": self.gates.shape[1],
            "gates": [[round(g, 4) for g in row] for row in self.gates.tolist()], "settings": self.settings,
        }  # fmt: skip
        write_text(Path(path), json.dumps(made, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Pattern:
        """Reads a file that `save` wrote, a released .tsv, or a folder that holds either; or one of `EMBEDDED`.

        Raises:
            ValueError: nothing there, or not a pattern.
        """
        file = EMBEDDED.get(str(path)) or Path(path)
        if file.is_dir():
            file = next((file / name for name in (FILE, RELEASED) if (file / name).exists()), file / FILE)
        if not file.is_file():
            raise ValueError(
                f"pattern {str(path)!r}: there is no {file.name}; make one with "
                "`python -m textkv.methods.duo_attention identify --model FOLDER`"
            )
        try:
            return cls._released(file) if file.suffix == ".tsv" else cls._own(parse(file.read_bytes()))
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"pattern {str(path)!r} cannot be read: {error}") from None

    @classmethod
    def _own(cls, saved: Any) -> Pattern:
        if checked(saved, {"format": int})["format"] != FORMAT:
            raise ValueError(f"format {saved['format']}, this version reads {FORMAT}")
        checked(saved, {"gates": list, "sinks": int, "recent": int, "how": str, "model": str, "settings": dict})
        for row in listed(saved["gates"], list, "gates"):
            listed(row, float, "a row of gates")
        gates = torch.tensor(saved["gates"], dtype=torch.float32)
        return cls(gates, saved["sinks"], saved["recent"], saved["how"], saved["model"], saved["settings"])

    @classmethod
    def _released(cls, file: Path) -> Pattern:
        gates = torch.from_numpy(np.loadtxt(file, dtype=np.float32, delimiter="\t", ndmin=2))
        sizes = checked(parse((file.parent / RELEASED_CONFIG).read_bytes()), {"sink_size": int, "recent_size": int})
        return cls(gates.clamp(0, 1), sizes["sink_size"], sizes["recent_size"], "released")

    def summary(self) -> dict[str, float]:
        """Mean and median of the gates, share above 0.5 and share below 0.05."""
        g = self.gates
        return {
            "mean": g.mean().item(), "median": g.median().item(),
            "above_0.5": (g > 0.5).float().mean().item(), "below_0.05": (g < 0.05).float().mean().item(),
        }  # fmt: skip


def full_heads(gates: torch.Tensor, count: int, seed: int = 0) -> torch.Tensor:
    """The `count` heads with the largest gates: bool [layers, kv_heads].

    Trained gates are often exactly 1 in many heads; ties go by an order drawn from `seed`, so that they do not all fall
    on the first layers. For one seed, a smaller count always gives a part of a larger one.
    """
    order = torch.from_numpy(np.random.default_rng(seed).permutation(gates.numel()))
    best = order[gates.cpu().flatten()[order].sort(descending=True, stable=True).indices[:count]]
    return torch.zeros(gates.numel(), dtype=torch.bool).index_fill(0, best, True).view(gates.shape)
