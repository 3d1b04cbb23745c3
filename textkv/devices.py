"""Which device a command computes on."""

import os

import torch


def device_of(name: str | None) -> str:
    """`name`, or the best device there is. Raises ValueError for one that is not there."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        # Tried and not looked up: a driver that is too old shows only when memory is asked for.
        torch.zeros(1, device=name).tolist()  # on "meta" there is nothing to read
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0]
        raise ValueError(
            f"device {name!r} cannot be used ({reason}); use cpu, or cuda on a machine with one"
        ) from error
    return name


def check_room(device: str, needed: float, asked: str) -> None:
    """Refuse what can never lie in a device's memory: a system that promises more than it has would stand still.

    Args:
        needed: bytes, at least.
        asked: the arguments that ask for them, for the message: "--length 4096".

    Raises:
        ValueError: the device has less.
    """
    if device.startswith("cuda"):
        room = torch.cuda.mem_get_info(device)[1]
    elif hasattr(os, "sysconf"):
        room = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        return
    if needed > room:
        raise ValueError(f"{asked} needs {needed / 1e9:,.1f} GB, and {device} has {room / 1e9:,.1f}; ask for less")
