"""Tasks with gentelella's storefront and the cart that it gets."""

from __future__ import annotations

from random import Random
from typing import Any

from .task import Site, Values
from .world import SENDERS, World, phrase


def a_product(rng: Random, data: World) -> Values:
    """A product with its choices, and who orders it."""
    names = [product[0] for product in data["products"]]
    one, other = rng.sample(names[:6], 2)
    how = {
        "size": rng.choice(("Medium", "Large")),
        "colour": rng.choice(("Green", "Red")),
        "count": str(rng.randint(2, 4)),
    }
    who = {"buyer": rng.choice(SENDERS), "street": f"{phrase(rng, 1).title()} Road {rng.randint(1, 99)}"}
    return {"one": one, "other": other, "shipping": rng.choice(("Express", "Pick-up"))} | how | who


def line(name: str, size: str = "Small", colour: str = "Black", count: str | int = 1) -> dict[str, Any]:
    """A line of the cart."""
    return {"name": name, "size": size, "colour": colour, "count": int(count)}


def _order(data: World, v: Values) -> None:
    fields = {"Name": v["buyer"], "Street": v["street"], "Shipping": v["shipping"]}
    data["placed"].append({"lines": [line(v["one"], v["size"])], **fields})


TASKS: dict[str, Site] = {
    "site-shop-cart": Site(
        "e_commerce.html",
        "Put {count} pieces of the product '{one}' into the cart, size {size}, colour {colour}.",
        a_product,
        lambda d, v: d["cart"].append(line(v["one"], v["size"], v["colour"], v["count"])),
        7,
    ),
    "site-shop-two": Site(
        "index.html",
        "In the storefront, put one '{one}' and one '{other}' into the cart, both in {colour}, size Small.",
        a_product,
        lambda d, v: d["cart"].extend(line(v[name], colour=v["colour"]) for name in ("one", "other")),
        9,
    ),
    "site-shop-order": Site(
        "e_commerce.html",
        "Buy one black '{one}' in size {size}: put it into the cart and place the order for {buyer}, {street}, "
        "with {shipping} shipping.",
        a_product,
        _order,
        10,
    ),
}
