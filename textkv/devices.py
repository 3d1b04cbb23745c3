"""Which device a command computes on."""

import torch


def device_of(name: str | None) -> str:
    """`name`, or the best device there is. Raises ValueError for one that is not there."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        # Tried and not looked up: a driver that is too old shows only when memory is asked for.
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"device {name!r} cannot be used ({reason}); use cpu, or cuda on a machine with one"
        ) from error
    return name
