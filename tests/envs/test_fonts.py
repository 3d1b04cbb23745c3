"""What is drawn depends on the project's fonts alone: under any set-up of the machine's the pixels are the same."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from agentkv import envs
from agentkv.envs import fonts, live, pixels
from agentkv.envs.browser import Browser

DEJAVU = Path("/usr/share/fonts/truetype/dejavu")
CONFIG = '<?xml version="1.0"?><fontconfig><dir>{}</dir></fontconfig>'
SCREENS = ("memory-code", "click-dialog", "choose-list", "shop/checkout.html", "controls", "letters")


def test_every_face_lies_beside_its_licence() -> None:
    faces = {fonts.face(family, style) for family, styles in fonts.STYLES.items() for style in styles}
    assert faces == set(fonts.FOLDER.glob("*.ttf")) and len(faces) == 10
    assert "SIL OPEN FONT LICENSE Version 1.1" in (fonts.FOLDER / "LICENSE.txt").read_text()


def test_a_face_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="no face 'mono' 'Italic'; there are sans: Regular, Bold, Italic"):
        fonts.face("mono", "Italic")
    with pytest.raises(ValueError, match="no face 'gothic'"):
        fonts.face("gothic")


def test_nothing_inherited_leads_elsewhere() -> None:
    inherited = {"HOME": "/home", "FONTCONFIG_FILE": "a", "FONTCONFIG_PATH": "b", "FONTCONFIG_SYSROOT": "c"}
    assert fonts.environment(inherited) == {"HOME": "/home", "FONTCONFIG_FILE": str(fonts.CONFIG)}


def test_page_and_fontconfig_name_the_faces_alike() -> None:
    config = fonts.CONFIG.read_text()
    for family, names in fonts.NAMES.items():
        for name in names[1:]:
            assert f"<family>{name}</family><prefer><family>{names[0]}</family>" in config, (family, name)
    assert "<include" not in config


def test_the_suite_sees_no_font_of_the_system() -> None:
    config = Path(os.environ["FONTCONFIG_FILE"])
    assert config.name == "machine-fonts.conf" and "/usr" not in config.read_text()


def set_ups(folder: Path) -> dict[str, Path]:
    """Machines by their fonts: a single face (the suite's), Liberation, and DejaVu where it is installed."""
    known = {"one": Path(os.environ["FONTCONFIG_FILE"])}
    for name, place in (("liberation", fonts.FOLDER), ("dejavu", DEJAVU)):
        if place.is_dir():
            known[name] = folder / f"{name}.conf"
            known[name].write_text(CONFIG.format(place))
    return known


@pytest.mark.browser
def test_tasks_look_the_same_on_machines_with_other_fonts(
    browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = pixels.draw(browser, SCREENS)
    for name, config in set_ups(tmp_path).items():
        monkeypatch.setenv("FONTCONFIG_FILE", str(config))
        with Browser() as other:
            for screen, shot in pixels.draw(other, SCREENS).items():
                assert np.array_equal(shot, ours[screen]), (name, screen)


@pytest.mark.browser
def test_a_live_page_keeps_the_fonts_of_the_machine(
    browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(fonts.FOLDER).parent / "pages" / "letters.html").as_uri()
    shots = [live.make(page, "look", browser, viewport=(320, 320)).reset(seed=0)[0]["screenshot"]]
    for config in set_ups(tmp_path).values():
        monkeypatch.setenv("FONTCONFIG_FILE", str(config))
        env = live.make(page, "look", viewport=(320, 320))
        assert env.browser.machine_fonts
        shots.append(env.reset(seed=0)[0]["screenshot"])
        env.close()
    assert not any(np.array_equal(a, b) for number, a in enumerate(shots) for b in shots[:number])
    assert not envs.make("memory-code").browser.machine_fonts


@pytest.mark.browser
def test_faces_in_the_page_where_fontconfig_is_not_read(browser: Browser, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS: what is left to the machine there are bare generic names, which `letters` has."""
    screens = [name for name in SCREENS if name != "letters"]
    ours = pixels.draw(browser, screens)
    monkeypatch.setattr(fonts, "environment", dict)
    with Browser() as deaf:
        for screen, shot in pixels.draw(deaf, screens).items():
            assert np.array_equal(shot, ours[screen]), screen
