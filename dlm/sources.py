"""Models and guides by the name that a command got: an embedded one, a folder, or an id of the hub.

A `ModelInfo` is what can be told of both without their weights, so that a request that cannot work is refused before
they are read (or fetched). A guide is whatever causal language model transformers itself can load; remote code is
never run.
"""

from __future__ import annotations

import socket
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import Event, Thread
from urllib.parse import urlsplit

import torch
from huggingface_hub import constants
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from dlm.config import DecodingConfig
from dlm.mini import WEIGHTS, load_mini
from dlm.models import DecodingSpec, load_decoding_spec, load_model
from dlm.models.loading import MODELS
from dlm.prompts import check_prompt, gap_ids, prompt_ids
from dlm.unmask import Guider
from textkv import checkpoints
from textkv.checkpoints import read_object

MINI_MODELS = {"mini": "llada", "mini-dream": "dream", "mini-hard": "llada-hard"}
MINI_GUIDES = {"mini": "guider"}
HUB_PATIENCE = 3.0  # seconds that the hub has to answer
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def dtype_of(name: str | None, device: str) -> torch.dtype:
    """The dtype called `name`, or bfloat16 on a GPU and float32 elsewhere."""
    return DTYPES[name or ("float32" if device == "cpu" else "bfloat16")]


def check_model(name: str) -> None:
    """Raises ValueError or FileNotFoundError if `name` is no diffusion model, as far as the files here tell."""
    kind = _kind(name, MINI_MODELS)
    if kind is not None and kind not in MODELS:
        raise ValueError(f"model {name} is a {kind!r} model; diffusion models here are {' and '.join(MODELS)}")


def check_guide(name: str) -> None:
    """Raises ValueError or FileNotFoundError if `name` is no causal model, as far as the files here tell."""
    kind = _kind(name, MINI_GUIDES)
    if kind in MODELS:
        raise ValueError(f"guide {name} is a {kind!r} diffusion model; a guide reads from the left, as Qwen2 does")


@dataclass(frozen=True)
class ModelInfo:
    """A diffusion model by its spec and tokenizer, and a guide without weights where there is one."""

    spec: DecodingSpec
    tokenizer: PreTrainedTokenizerBase
    guide: Guider | None = None

    def ids(self, config: DecodingConfig, prompt: str | list[dict[str, str]], chat: bool) -> list[int]:
        """The ids of a prompt, or of a text with gaps (`infill`). Raises ValueError if model or guide cannot go
        on from them."""
        ids = gap_ids(self.tokenizer, prompt) if config.infill else prompt_ids(self.tokenizer, prompt, chat)
        check_prompt(config, self.spec, ids)
        if self.guide is not None:
            self.guide.check_length(len(ids) + config.gen_length)
        return ids


def model_info(model: str, guide: str | None = None) -> ModelInfo:
    """What the files of a model and of a guide say beside their weights.

    Raises:
        ValueError: files that cannot be read, no tokenizer among them, or two that cannot work together.
        FileNotFoundError: no such model or guide.
    """
    # transformers draws one for every tokenizer and shard; a command's output is its answer.
    logging.disable_progress_bar()
    check_model(model)
    if guide is not None:
        check_guide(guide)
    with _named(f"model {model}"):
        spec, tokenizer = load_decoding_spec(_source(model, MINI_MODELS))
    if tokenizer is None:
        raise ValueError(f"model {model} has no tokenizer beside it; put its tokenizer.json into the folder")
    if guide is None:
        return ModelInfo(spec, tokenizer)
    with _named(f"guide {guide}"):
        source = _source(guide, MINI_GUIDES)
        # Shapes without storage: a guide of 7B parameters is checked in megabytes.
        with checkpoints.readable_files(source), torch.device("meta"):
            checkpoints.check_layers(source)
            config = AutoConfig.from_pretrained(source, trust_remote_code=False)
            body = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        own = checkpoints.load_tokenizer(AutoTokenizer.from_pretrained, source, body)
    return ModelInfo(spec, tokenizer, Guider(body, own, tokenizer))


def open_model(name: str, device: str, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The diffusion model called `name`, whose `ModelInfo` was read already, and its tokenizer.

    Raises:
        ValueError: weights that cannot be read.
        FileNotFoundError: no such model.
    """
    with _named(f"model {name}"):
        if name in MINI_MODELS:
            return load_mini(MINI_MODELS[name], dtype, device)
        return load_model(name, dtype, device)


def open_guide(name: str, device: str, dtype: torch.dtype, dlm_tokenizer: PreTrainedTokenizerBase) -> Guider:
    """The guide called `name`, beside a diffusion model with `dlm_tokenizer`; errors as `open_model`."""
    with _named(f"guide {name}"):
        if name in MINI_GUIDES:
            model, tokenizer = load_mini(MINI_GUIDES[name], dtype, device)
        else:
            # No pickles and no code of the folder, whatever its config asks for.
            load = AutoModelForCausalLM.from_pretrained
            model = checkpoints.load_model(load, name, dtype=dtype, trust_remote_code=False).to(device).eval()
            tokenizer = checkpoints.load_tokenizer(AutoTokenizer.from_pretrained, name, model)
    return Guider(model, tokenizer, dlm_tokenizer)


@cache
def _try_hub() -> None:
    """Puts the hub's client offline for this process if the hub cannot be reached: what was fetched before is found
    still, and for anything else it says so at once instead of trying again for half a minute."""
    if urllib.request.getproxies():
        return
    address = urlsplit(constants.ENDPOINT)
    reached = Event()

    def connect() -> None:
        with suppress(OSError), socket.create_connection((address.hostname, address.port or 443), HUB_PATIENCE):
            reached.set()

    # In a thread: the lookup of a name has no time limit of its own.
    thread = Thread(target=connect, daemon=True)
    thread.start()
    thread.join(HUB_PATIENCE)
    if not reached.is_set():
        constants.HF_HUB_OFFLINE = True


@contextmanager
def _named(what: str) -> Iterator[None]:
    """Errors of files that cannot be read, in one line that says whose."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"{what}: {str(error).splitlines()[0]}") from error


def _source(name: str, embedded: Mapping[str, str]) -> str:
    return str(WEIGHTS / embedded[name]) if name in embedded else name


def _kind(name: str, embedded: Mapping[str, str]) -> str | None:
    """The `model_type` in the folder called `name`; None for an embedded model and for an id of the hub."""
    if name in embedded:
        if not (WEIGHTS / embedded[name] / "model.safetensors").is_file():
            load_mini(embedded[name])  # says how the weights are made
        return None
    folder = Path(name)
    if not folder.is_dir():
        # An id of the hub is owner/name and nothing else; anything that looks like a path is meant as one.
        if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
            raise FileNotFoundError(
                f"{name!r} is no folder here; give one, {' or '.join(embedded)}, or an id of the hub as owner/name"
            )
        _try_hub()
        return None
    config = folder / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"{folder} has no config.json; give the folder that holds the model's files")
    return read_object(config).get("model_type")
