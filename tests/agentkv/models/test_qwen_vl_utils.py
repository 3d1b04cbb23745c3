"""The Qwen families' sizes and pixels are those of their makers' own reader, `qwen-vl-utils`.

That package asks for torchvision as soon as it is imported, and no build of torchvision loads beside a torch for CPUs;
of images it uses nothing of it. So the agents do without the package, and the test gives it empty modules.
"""

import random
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from PIL import Image

from agentkv.models import AGENTS
from agentkv.models.chat import ChatAdapter
from tests.agentkv.models.tiny import tiny

QWEN = ("qwen2.5-vl", "qwen3-vl", "qwen3.5", "ui-tars", "gui-owl", "fara", "holo2")


@pytest.fixture
def makers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The package."""
    vision = {name: ModuleType(f"torchvision.{name}") for name in ("io", "transforms")}
    vision["transforms"].InterpolationMode = SimpleNamespace(BICUBIC="bicubic")
    package = ModuleType("torchvision")
    package.__version__, package.io, package.transforms = "0", vision["io"], vision["transforms"]
    monkeypatch.setitem(sys.modules, "torchvision", package)
    for name, module in vision.items():
        monkeypatch.setitem(sys.modules, f"torchvision.{name}", module)
    for name in [name for name in sys.modules if name.startswith("qwen_vl_utils")]:
        monkeypatch.delitem(sys.modules, name)
    return pytest.importorskip("qwen_vl_utils")


@pytest.fixture(params=QWEN)
def adapter(request: pytest.FixtureRequest) -> ChatAdapter:
    return tiny(AGENTS[request.param])


def test_six_hundred_sizes(makers: ModuleType, adapter: ChatAdapter) -> None:
    published = {"shortest_edge": 4 * 28 * 28, "longest_edge": 16384 * 28 * 28}
    patch, merge = adapter.processor.patch_size, adapter.processor.merge_size
    processor = adapter.image_processor(patch_size=patch, merge_size=merge, size=published)
    draw = random.Random(0)
    for _ in range(600):
        wide, high = draw.randint(60, 5200), draw.randint(60, 3800)
        rows, columns = makers.smart_resize(high, wide, patch * merge, *published.values())
        assert processor.get_number_of_image_patches(high, wide, {}) * patch**2 == rows * columns, (wide, high)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
def test_the_pixels_of_a_message(makers: ModuleType, adapter: ChatAdapter, mode: str) -> None:
    image = Image.effect_noise((333, 217), 60).convert("RGB")
    if mode == "RGBA":
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    image = image if mode in ("RGB", "RGBA") else image.convert(mode)
    smallest, largest = (adapter.processor.size[edge] for edge in ("shortest_edge", "longest_edge"))
    shown = {"type": "image", "image": image, "min_pixels": smallest, "max_pixels": largest}
    said = [{"role": "user", "content": [shown]}]
    (theirs,), _ = makers.process_vision_info(said, image_patch_size=adapter.processor.patch_size)
    expected = adapter.processor(images=[theirs], do_resize=False, return_tensors="pt")
    ours = adapter.prompt("x", [], image).inputs
    assert torch.equal(ours["image_grid_thw"], expected["image_grid_thw"])
    assert torch.equal(ours["pixel_values"], expected["pixel_values"].to(ours["pixel_values"].dtype))
