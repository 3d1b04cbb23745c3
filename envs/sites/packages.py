"""The two packages of npm whose built pages the site tasks run on: which ones, where they lie, what is in them.

- gentelella 4.2.0 (MIT, Colorlib; with ECharts, Apache-2.0): an office with mail, calendar, board, files, chat, people,
  settings and a shop
- startbootstrap-sb-admin-2 4.1.4 (MIT, Start Bootstrap; with Font Awesome Free, CC BY 4.0, OFL 1.1 and MIT): a
  dashboard of another look, never trained on

Neither is shipped here. `install` fetches a package as the archive that npm's registry has, and it stays one file in
the user's cache: it is read in memory, never unpacked, and no code of it runs outside the browser. Its SHA-512 is
checked whenever it is opened.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
import urllib.request
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath

from textkv.command import ran
from textkv.disk import replace_whole

REGISTRY = "https://registry.npmjs.org"  # npm's own default; `npm config set registry` or NPM_CONFIG_REGISTRY change it
_TIMEOUT = 60  # seconds without an answer
_SERVED = (".html", ".css", ".js", ".svg", ".png", ".jpg", ".ico", ".woff", ".woff2", ".ttf", ".webmanifest")


class SitesMissing(RuntimeError):
    """The pages of a package are not installed, not whole, or could not be fetched."""


@dataclass(frozen=True)
class Package:
    """One version of a package; `integrity` as npm writes it, `root` = the folder of its archive that is served."""

    name: str
    version: str
    integrity: str
    root: str
    megabytes: float
    licence: str = "MIT"

    @property
    def path(self) -> Path:
        """Where its archive lies, or would lie: below XDG_CACHE_HOME, or ~/.cache where that is not set."""
        cache_folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return Path(cache_folder) / "agentkv" / "sites" / f"{self.name}-{self.version}.tgz"

    @property
    def installed(self) -> bool:
        """Whether its archive is there, whatever its content."""
        return self.path.is_file()


GENTELELLA = Package(
    "gentelella",
    "4.2.0",
    "sha512-etbwRsQv+fl5tAnmE+SCZGGWWU6H6EudoWFZEPDJ93jGtVlDOnUmG09XW/BY+V3K1n28jZJ3fJx4V3WH7MVzOQ==",
    "package/dist",
    3.4,
)
SB_ADMIN = Package(
    "startbootstrap-sb-admin-2",
    "4.1.4",
    "sha512-Zr0JNu4tRD4EJVDwVLETKWfMniFx4Dy3qAnJ96ucqUqIZ8Ns4/H5a6Y0E44/K5lxO05EBQwi24hPxaLEz+2IhA==",
    "package",
    5.6,
)
PACKAGES = (GENTELELLA, SB_ADMIN)


def integrity_of(archive: bytes) -> str:
    """The checksum of an archive as npm writes it."""
    return "sha512-" + base64.b64encode(hashlib.sha512(archive).digest()).decode()


def install(package: Package) -> Path:
    """Fetch the archive of a package unless it is there; returns its path.

    Raises `SitesMissing` when it cannot be fetched, or when what came or what lies there has another checksum.
    """
    if package.installed:
        _archive(package)
        return package.path
    archive = _by_npm(package) if shutil.which("npm") else _by_hand(package)
    _check(package, archive, "what came from the registry")
    replace_whole(package.path, archive)
    return package.path


def _by_npm(package: Package) -> bytes:
    """npm itself knows the user's registry, its password and its certificates."""
    wanted = f"{package.name}@{package.version}"
    with tempfile.TemporaryDirectory() as folder:
        command = ["npm", "pack", wanted, "--pack-destination", folder, "--ignore-scripts", "--loglevel", "error"]
        code, told = ran(command, hear=True, cwd=folder, stdout=subprocess.DEVNULL)
        archives = list(Path(folder).glob("*.tgz"))
        if code or len(archives) != 1:
            said = [line for line in told.splitlines() if line.strip()] or ["it gave no reason"]
            raise SitesMissing(
                f"npm could not fetch {wanted} ({said[0].strip()[:200]}): is the network there, and does npm's "
                "registry have it? (npm config get registry)"
            )
        return archives[0].read_bytes()


def _by_hand(package: Package) -> bytes:
    """Without npm: from the registry that the environment names, else npm's default."""
    registry = next(
        (os.environ[name] for name in ("NPM_CONFIG_REGISTRY", "npm_config_registry") if os.environ.get(name)), REGISTRY
    )
    about = f"{registry.rstrip('/')}/{package.name}/{package.version}"
    try:
        with urllib.request.urlopen(about, timeout=_TIMEOUT) as answer:
            archive = str(json.load(answer)["dist"]["tarball"])
        if not archive.startswith(("https://", "http://")):
            raise ValueError(f"its archive is at {archive[:80]!r}")
        with urllib.request.urlopen(archive, timeout=_TIMEOUT) as answer:
            return answer.read()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SitesMissing(
            f"{about} could not be fetched ({error}): is the network there? Another registry: NPM_CONFIG_REGISTRY=URL"
        ) from error


def _check(package: Package, archive: bytes, what: str) -> None:
    found = integrity_of(archive)
    if found != package.integrity:
        raise SitesMissing(
            f"{what} is not {package.name} {package.version}: its checksum is {found}, expected {package.integrity}; "
            "delete it and run python -m envs.sites install again"
        )


def _archive(package: Package) -> bytes:
    if not package.installed:
        raise SitesMissing(
            f"the pages of {package.name} {package.version} are not installed; run python -m envs.sites install "
            f"({package.megabytes:g} MB from npm's registry)"
        )
    archive = package.path.read_bytes()
    _check(package, archive, str(package.path))
    return archive


@cache
def files_of(package: Package) -> dict[str, bytes]:
    """What the package's pages are made of, by path below `root`, after its checksum was compared.

    Raises `SitesMissing` for a package that is not installed or not the one that was pinned.
    """
    found = {}
    with tarfile.open(fileobj=io.BytesIO(_archive(package)), mode="r:gz") as archive:
        for member in archive:
            path = PurePosixPath(member.name)
            if member.isfile() and path.suffix in _SERVED and path.is_relative_to(package.root):
                content = archive.extractfile(member)
                found[str(path.relative_to(package.root))] = content.read() if content else b""
    return found
