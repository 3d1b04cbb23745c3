"""Model folders whose attention weights are combinations of shared atoms (MASA, arXiv 2508.04581): the form on disk.

Beside config.json and the tokenizer lies `atoms.safetensors` in place of `model.safetensors`: every other weight under
its own name, and for group G of projection P "masa.P.G.atoms" [S, out, in], "masa.P.G.coefficients" [layers, S] and,
where a rest is kept, "masa.P.G.L.left" [out, rank] and "masa.P.G.L.right" [rank, in] of its L-th layer. Atoms lie there
once for all layers. The header says which weights of the model they make, so nothing here knows a family of models.
`textkv.models.load` reads such a folder by itself; what it returns is an ordinary model with plain weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from textkv.checkpoints import check_layers, check_tensors, check_types, readable_files
from textkv.disk import whole_folder
from textkv.records import checked, listed, parse

FILE = "atoms.safetensors"
FORMAT = 1
_FIELDS = {"format": int, "groups": list, "architecture": str, "about": dict}
COMMAND = "`python -m textkv.masa convert`"


@dataclass(frozen=True, eq=False)
class AtomGroup:
    """Weights of one projection in consecutive layers, as combinations of the same atoms.

    W_l = sum_s coefficients[l, s] * atoms[s] + left[l] @ right[l], all in torch's layout [out, in]. No atoms at all
    (S = 0) leave the product alone: plain low rank.

    Attributes:
        projection: "q", "k", "v" or "o".
        names: of the model's parameters that the layers' weights are.
        atoms: float [S, out, in].
        coefficients: float [layers, S].
        rests: a pair (left [out, rank], right [rank, in]) for each layer, or nothing where none is kept.

    Raises:
        ValueError: shapes that do not belong together, or numbers that are not finite.
    """

    projection: str
    names: tuple[str, ...]
    atoms: Tensor
    coefficients: Tensor
    rests: tuple[tuple[Tensor, Tensor], ...] = ()

    def __post_init__(self) -> None:
        atoms, coefficients, what = self.atoms, self.coefficients, f"atoms of {self.projection}"
        if atoms.dim() != 3 or coefficients.shape != (len(self.names), len(atoms)):
            raise ValueError(
                f"{what}: {list(atoms.shape)}, coefficients {list(coefficients.shape)} for {len(self.names)} layers; "
                "need [S, out, in] and [layers, S]"
            )
        if self.rests and len(self.rests) != len(self.names):
            raise ValueError(f"{what}: {len(self.rests)} rests for {len(self.names)} layers; need one for each")
        rows, columns = atoms.shape[1:]
        for left, right in self.rests:
            if left.shape != (rows, right.shape[0]) or right.shape[1:] != (columns,):
                raise ValueError(
                    f"{what}: a rest of {list(left.shape)} @ {list(right.shape)} makes no [{rows}, {columns}]"
                )
        for tensor in (atoms, coefficients, *(part for rest in self.rests for part in rest)):
            if not bool(tensor.isfinite().all()):
                raise ValueError(f"{what} of {self.names[0]} hold numbers that are not finite; take other weights")

    @property
    def parameters(self) -> int:
        """How many numbers it keeps."""
        rests = sum(left.numel() + right.numel() for left, right in self.rests)
        return self.atoms.numel() + self.coefficients.numel() + rests

    @property
    def plain_parameters(self) -> int:
        """How many numbers the weights have that it stands for."""
        return len(self.names) * self.atoms.shape[1] * self.atoms.shape[2]

    def to(self, dtype: torch.dtype, device: str | torch.device = "cpu") -> AtomGroup:
        """The same in another dtype, elsewhere."""
        rests = tuple((left.to(device, dtype), right.to(device, dtype)) for left, right in self.rests)
        parts = (part.to(device, dtype) for part in (self.atoms, self.coefficients))
        return AtomGroup(self.projection, self.names, *parts, rests)

    def weights(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The layers' weights [out, in] by name, in `dtype` or that of the atoms; computed in fp32 at least."""
        dtype = dtype or self.atoms.dtype
        wide = torch.promote_types(self.atoms.dtype, torch.float32)
        # All layers at once: one product [layers, S] x [S, out * in].
        mixed = torch.einsum("ls,soi->loi", self.coefficients.to(wide), self.atoms.to(wide))
        for weight, (left, right) in zip(mixed, self.rests, strict=False):
            weight += left.to(wide) @ right.to(wide)
        return {name: weight.to(dtype) for name, weight in zip(self.names, mixed, strict=True)}


def is_atoms(folder: str | Path) -> bool:
    """Whether a model folder is of this form."""
    return (Path(folder) / FILE).is_file()


def save_atoms(
    folder: str | Path,
    model: PreTrainedModel,
    plain: dict[str, Tensor],
    groups: Sequence[AtomGroup],
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: torch.dtype | None = None,
    about: dict[str, Any] | None = None,
) -> Path:
    """Write a model folder of this form and return its file of weights; a crash leaves what was there.

    Args:
        model: gives configuration and class; its weights are not read.
        plain: every weight that no group makes, by name; tied ones once.
        dtype: of all numbers on disk; None = as they are.
        about: JSON values for the reader: where it comes from.

    Raises:
        FileExistsError: the folder holds something that is no such model.
    """
    folder = Path(folder)
    if folder.exists() and not is_atoms(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is there and holds no {FILE}; name another folder, or move it")
    tensors, told = dict(plain), []
    for number, group in enumerate(groups):
        key = f"masa.{group.projection}.{number}"
        tensors |= {f"{key}.atoms": group.atoms, f"{key}.coefficients": group.coefficients}
        for layer, (left, right) in enumerate(group.rests):
            tensors |= {f"{key}.{layer}.left": left, f"{key}.{layer}.right": right}
        told.append({"projection": group.projection, "names": group.names, "rests": bool(group.rests)})
    cast = {name: _on_disk(tensor, dtype) for name, tensor in tensors.items()}
    header = {"format": FORMAT, "groups": told, "architecture": type(model).__name__, "about": about or {}}
    with whole_folder(folder) as draft:
        model.config.save_pretrained(draft)
        if tokenizer is not None:
            tokenizer.save_pretrained(draft)
        if getattr(model, "generation_config", None) is not None and model.can_generate():
            model.generation_config.save_pretrained(draft)
        save_file(cast, draft / FILE, metadata={"format": "pt", "masa": json.dumps(header)})
    return folder / FILE


def _on_disk(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    kind = dtype if dtype and tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to("cpu", kind).contiguous()


def read_atoms(folder: str | Path) -> tuple[dict[str, Tensor], list[AtomGroup], dict[str, Any]]:
    """(other weights by name, groups, header) of a folder that `save_atoms` wrote.

    Raises:
        ValueError: the file is damaged, of another format, lacks a tensor or holds what is not finite; in one line.
    """
    path = Path(folder) / FILE
    try:
        with safe_open(path, "pt") as file:
            header = checked(parse((file.metadata() or {})["masa"]), _FIELDS)
            if header["format"] != FORMAT:
                raise ValueError(f"it has format {header['format']}, this version reads {FORMAT}")
            groups = [
                _group(file, number, told) for number, told in enumerate(listed(header["groups"], dict, "groups"))
            ]
            plain = {name: file.get_tensor(name) for name in file.keys() if not name.startswith("masa.")}
    except KeyError as error:
        raise ValueError(f"{path} is no file of atoms: it lacks {error}; make one with {COMMAND}") from None
    except (SafetensorError, OSError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    check_tensors(path, plain.items())
    return plain, groups, header


def _group(file: Any, number: int, told: dict[str, Any]) -> AtomGroup:
    checked(told, {"projection": str, "names": list, "rests": bool})
    listed(told["names"], str, "names")
    key, names = f"masa.{told['projection']}.{number}", tuple(told["names"])
    rests = ()
    if told["rests"]:
        sides = ("left", "right")
        rests = tuple(tuple(file.get_tensor(f"{key}.{n}.{side}") for side in sides) for n in range(len(names)))
    parts = (file.get_tensor(f"{key}.{part}") for part in ("atoms", "coefficients"))
    return AtomGroup(told["projection"], names, *parts, rests)


def plain_weights(plain: dict[str, Tensor], groups: Iterable[AtomGroup], dtype: torch.dtype) -> dict[str, Tensor]:
    """All weights of the ordinary model in `dtype`, by name."""
    made = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in plain.items()}
    for group in groups:
        made |= group.weights(dtype)
    return made


def load_atoms(folder: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> PreTrainedModel:
    """The model of a folder of this form, in eval mode, every weight materialised once.

    Combining at every forward would read S matrices where one is needed: slower by S at batch 1, and the small form
    serves the disk, not the speed.

    Raises:
        ValueError: see `read_atoms`; or the weights are not those of the configured model.
    """
    plain, groups, header = read_atoms(folder)
    architecture = getattr(transformers, str(header.get("architecture")), None)
    if not (isinstance(architecture, type) and issubclass(architecture, PreTrainedModel)):
        raise ValueError(f"{Path(folder) / FILE}: {header.get('architecture')} is no model class of transformers")
    with readable_files(folder):
        check_layers(folder)
        check_types(folder)
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with (
        readable_files(folder),
        torch.device("meta"),
    ):  # names and shapes only: transformers would make up what is missing
        empty = architecture(config)
    weights, shapes = plain_weights(plain, groups, dtype), {n: w.shape for n, w in empty.state_dict().items()}
    wrong = [name for name, _ in empty.named_parameters() if name not in weights]
    wrong += [name for name, weight in weights.items() if shapes.get(name) != weight.shape]
    if wrong:
        raise ValueError(f"{folder}: {wrong[0]} is missing or not of the shape that config.json says")
    model = architecture.from_pretrained(None, config=config, state_dict=weights, dtype=dtype)
    return model.to(device).eval()
