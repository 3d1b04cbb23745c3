"""Checkpoints are whole or refused: what every loader of models here goes through.

transformers warns of weights that are missing and starts them at random, passes over those that it does not know, and
makes up an empty tokenizer where a folder has none. A model that was loaded like that answers nonsense; here it is one
line that says what is wrong with which files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from textkv.records import checked, parse

FAULTS = {"missing_keys": "missing", "unexpected_keys": "unknown", "mismatched_keys": "of another shape"}
TOKENIZERS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
)
LAYERS = ("num_hidden_layers", "n_layers", "num_layers", "n_layer")
DEEPEST = 1_000  # layers
SHOWN = 4  # names of each kind
LINE = 300  # characters of what a library says
# Whatever a damaged config or file makes transformers stumble over.
_STUMBLES = (
    OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, RuntimeError,
    ImportError, SafetensorError, StrictDataclassError,
)  # fmt: skip


def load_model(load: Callable[..., Any], source: str | Path, *, unused: str = "", **options: Any) -> PreTrainedModel:
    """`load(source, **options)`, a `from_pretrained`, with every weight from the files and finite. No pickles.

    Args:
        unused: pattern of names that the caller never computes with: these may be missing or additional.

    Raises:
        ValueError: weights that are missing, unknown, of another shape or not finite, counted and named; files that
            cannot be read.
        FileNotFoundError: files that are not there.
    """
    with readable_files(source):
        check_layers(source)
        check_types(source)
        check_family(source, load)
        # Other shapes are let through here so that the line below names them all.
        model, info = load(
            str(source), use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    check_names(source, info, unused)
    check_finite(source, model)
    return model


def load_tokenizer(
    load: Callable[..., Any], source: str | Path, model: PreTrainedModel | None = None, **options: Any
) -> PreTrainedTokenizerBase:
    """`load(source, **options)`, a `from_pretrained`, of files that are there; no code of the folder is run.

    Args:
        model: what is to read its tokens, if it is known.

    Raises:
        FileNotFoundError: a folder without a tokenizer.
        ValueError: one that cannot be read, that knows no token, or more of them than the model.
    """
    folder = Path(source)
    # transformers would make up a tokenizer that knows nothing.
    if folder.is_dir() and not any((folder / name).is_file() for name in TOKENIZERS):
        raise FileNotFoundError(f"{source} has no tokenizer; put its tokenizer.json into the folder")
    if load == AutoTokenizer.from_pretrained:
        options["trust_remote_code"] = False
    with readable_files(source):
        tokenizer = load(str(source), **options)
    if not tokenizer("0", add_special_tokens=False)["input_ids"]:
        raise ValueError(f"the tokenizer at {source} reads no text; put its tokenizer.json into the folder")
    if model is not None:
        check_vocabulary(source, model, tokenizer)
    return tokenizer


NAMED = {"model_type": (str, type(None)), "architectures": (list[str], type(None)),
         "eos_token_id": (int, list[int], type(None))}  # fmt: skip
"""What is looked at here before transformers reads the same file."""


def read_object(path: str | Path) -> dict[str, Any]:
    """The JSON object in a file beside weights, as config.json. Raises ValueError, with the file, for anything else."""
    try:
        return checked(parse(Path(path).read_bytes(), finite=False), {}, NAMED)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); download it again") from None


@contextmanager
def readable_files(
    source: str | Path, what: str = "a model", mend: str = "download or convert it again"
) -> Iterator[None]:
    """What libraries say of files that they cannot read as `what` becomes one line with their place."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except _STUMBLES as error:
        told = " ".join(str(error).split("\n\n")[0].split())[:LINE] or type(error).__name__
        kind = FileNotFoundError if isinstance(error, OSError) else ValueError
        raise kind(f"{source} cannot be read as {what} ({told}); {mend}") from error


def check_family(source: str | Path, load: Callable[..., Any]) -> None:
    """Raises ValueError if `load` is of a class for one family and the files are of another: transformers would fill a
    model of the class's default size with random numbers."""
    wanted = getattr(getattr(getattr(load, "__self__", None), "config_class", None), "model_type", None)
    if not wanted:
        return
    found = PreTrainedConfig.get_config_dict(str(source))[0].get("model_type")
    if found != wanted:
        raise ValueError(f"it is a {found!r} model, here one of type {wanted!r} is needed")


def check_layers(source: str | Path) -> None:
    """Raises ValueError if the config in a folder asks for more layers than its files have weights, or, without files,
    than any model has: such a model would be built for hours before its weights are missed.
    """
    path = Path(source) / "config.json"
    if path.is_file():
        asked = max(_layers(read_object(path)), default=0)
        most = sum(1 for _ in _stored(source)) or DEEPEST
        if asked > most:
            raise ValueError(f"config.json asks for {asked:,} layers, which {most:,} weights cannot fill")


def _layers(config: Any) -> Iterator[float]:
    """Every number of layers that a config names, those of its parts too."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _layers(value)
        elif name in LAYERS and isinstance(value, int | float):
            yield value


def check_types(source: str | Path) -> None:
    """Raises ValueError if weights in a folder are whole numbers, and its config tells of no quantisation that they
    would be codes of: transformers would take the codes for the weights.
    """
    path = Path(source) / "config.json"
    if path.is_file() and not read_object(path).get("quantization_config"):
        wrong = [f"{name} ({kind})" for name, kind in _stored(source)
                 if name.endswith((".weight", ".bias")) and not kind.startswith(("F", "BF"))]  # fmt: skip
        if wrong:
            raise ValueError(f"{len(wrong):,} weights are no fractions: {listed(wrong)}, and no quantization_config")


def _stored(source: str | Path) -> Iterator[tuple[str, str]]:
    """(name, type) of every tensor in a folder, from the heads of its files."""
    for path in sorted(Path(source).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                yield name, file.get_slice(name).get_dtype()


def check_vocabulary(source: str | Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ValueError if the tokenizer's own vocabulary has tokens that the model has no row for: it is another's."""
    rows = model.get_input_embeddings().num_embeddings
    # A padding token that was added for training, or one that a conversion adds, has no row in many models.
    added = tokenizer.get_added_vocab()
    beyond = sum(number >= rows and token not in added for token, number in tokenizer.get_vocab().items())
    if beyond:
        told = f"{beyond:,} of its tokens lie beyond the model's {rows:,}"
        raise ValueError(f"the tokenizer at {source} is of another model ({told}); take the model's own")


def check_names(source: str | Path, info: dict[str, Any], unused: str = "") -> None:
    """Raises ValueError if the files lack weights that the config asks for, or hold others.

    Args:
        info: what `from_pretrained(..., output_loading_info=True)` gives.
        unused: pattern of names that do not matter.
    """
    faults = []
    for name, title in FAULTS.items():
        keys = sorted(str(key) for key in info.get(name) or () if not (unused and re.search(unused, str(key))))
        if keys:
            faults.append(f"{title}: {listed(keys)}")
    if faults:
        raise ValueError(f"the weights at {source} do not fit its config.json; {'; '.join(faults)}")


def check_finite(source: str | Path, model: torch.nn.Module) -> None:
    """Raises ValueError if a weight is NaN or infinite; says of which how many."""
    check_tensors(source, model.state_dict().items())


@torch.no_grad()
def check_tensors(source: str | Path, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """As `check_finite`, for tensors by name."""
    bad = {}
    for name, tensor in tensors:
        if tensor.is_meta or not tensor.is_floating_point() or not tensor.numel():
            continue
        # The extremes are NaN where any number is: one pass without a mask of all, which a large model has no room for.
        if not all(bool(extreme.isfinite()) for extreme in tensor.detach().aminmax()):
            bad[name] = int((~tensor.detach().isfinite()).sum())
    if bad:
        told = listed([f"{name} ({count:,})" for name, count in bad.items()])
        raise ValueError(f"{sum(bad.values()):,} weights at {source} are not finite: {told}; take other weights")


def listed(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    return f"{', '.join(names[:SHOWN])}{f' and {len(names) - SHOWN} more' if len(names) > SHOWN else ''}"
