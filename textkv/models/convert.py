"""What was fetched, as an ordinary model folder: safetensors in fp32, configuration, tokenizer."""

from __future__ import annotations

import shutil
import zipfile
import zlib
from importlib.util import find_spec
from pathlib import Path, PurePosixPath

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from textkv.models.fetch import Unfetched

NEEDED = ("gguf", "accelerate")  # transformers asks for both before it reads a GGUF file


def check_installed(form: str) -> None:
    """Raises ValueError, with the mend, if what the conversion needs is not there."""
    missing = [name for name in NEEDED if form == "gguf" and find_spec(name) is None]
    if missing:
        raise ValueError(
            f"converting a GGUF file needs {' and '.join(missing)}, not installed here; pip install 'agentkv[models]'"
        )


def from_gguf(file: Path, folder: Path) -> None:
    """Reads a GGUF file by transformers and writes it into `folder` as an fp32 model with its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    # The weights are dequantised, but transformers 5.23 still calls the model quantised and refuses to save it.
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def from_archive(file: Path, folder: Path) -> None:
    """Unpacks a zipped model folder.

    Raises:
        Unfetched: the archive is damaged, or would write outside of the folder.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            for member in archive.infolist():
                path = PurePosixPath(member.filename)
                if path.is_absolute() or ".." in path.parts:
                    raise Unfetched(f"{file.name}: its member {member.filename!r} lies outside of the folder; not used")
                if not member.is_dir():
                    (folder / path).parent.mkdir(parents=True, exist_ok=True)
                    with archive.open(member) as source, (folder / path).open("wb") as out:
                        shutil.copyfileobj(source, out)
    except (zipfile.BadZipFile, zlib.error) as error:
        raise Unfetched(f"{file.name} is damaged ({error}); run the same command again") from None
