"""Models by what a user calls them: a name, a folder, or a hub id."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from textkv.checkpoints import load_model, load_tokenizer
from textkv.mini import WEIGHTS, load_mini
from textkv.models.atoms import is_atoms, load_atoms
from textkv.models.catalogue import CATALOGUE
from textkv.models.place import folder_of, record_of

MINI = "mini"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def resolve(name: str, use: str = "text") -> str:
    """What `from_pretrained` takes for a model: a folder, or a hub id as it is.

    Known names come before folders of the same name: write ./smollm2 for such a folder.

    Args:
        name: "mini" (embedded), a name of the catalogue, a folder, or a hub id "owner/model".
        use: "text" or "embedder", what the model is to do.

    Raises:
        FileNotFoundError: a name that is not installed (the message has the command), or none of the above.
        ValueError: a known model of another use.
    """
    if name == MINI and use == "text":
        if not (WEIGHTS / "model.safetensors").exists():
            raise FileNotFoundError(f"no weights in {WEIGHTS}; train them with `python -m training.text.train`")
        return str(WEIGHTS)
    if name in CATALOGUE:
        if CATALOGUE[name].use != use:
            raise ValueError(f"model {name} is {CATALOGUE[name].what}; here a model for {use} is needed")
        if record_of(folder_of(name)) is None:
            raise FileNotFoundError(f"model {name} is not installed; run `python -m textkv.models install {name}`")
        return str(folder_of(name))
    if Path(name).is_dir():
        return name
    if _HUB_ID.fullmatch(name) and not Path(name).parent.is_dir():
        return name
    known = [MINI, *(x.name for x in CATALOGUE.values() if x.use == use)]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]}?" if near else f"give a folder, a hub id owner/model, or {', '.join(known)}"
    raise FileNotFoundError(f"model {name}: no such folder or known name; {hint}")


def load(
    name: str, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """(text model in eval mode, tokenizer) by a name that `resolve` knows.

    Raises:
        FileNotFoundError, ValueError: see `resolve`; or nothing can be loaded from there, in one line.
    """
    place = resolve(name)
    if name == MINI:
        return load_mini(dtype=dtype, device=device)
    try:
        # A folder is read as it is; only a hub id may ask the network.
        here = {"local_files_only": Path(place).is_dir()}
        if is_atoms(place):
            model = load_atoms(place, dtype)
        else:
            model = load_model(
                AutoModelForCausalLM.from_pretrained, place, dtype=dtype, trust_remote_code=False, **here
            )
        tokenizer = load_tokenizer(AutoTokenizer.from_pretrained, place, model, **here)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"model {name} cannot be loaded: {first_line(error)}") from None
    return model.to(device).eval(), tokenizer


def first_line(error: Exception) -> str:
    """The first line of what an error says."""
    return str(error).strip().partition("\n")[0]
