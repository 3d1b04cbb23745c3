"""Which path runs an operation, and the argument checks that all six share.

Triton is optional: without it the package still imports and every operation runs its torch reference. The kernels are
decorated with `jit` from here, so that a file reads the same with and without Triton; it is the only place that asks.
"""

from __future__ import annotations

import importlib.util
import warnings

import torch

HAVE_TRITON = importlib.util.find_spec("triton") is not None

if HAVE_TRITON:
    import triton
    import triton.language as tl

    jit = triton.jit
else:
    triton = tl = None

    def jit(function=None, **_options):
        """Stand-in for `triton.jit`: leaves the kernel as a plain function that nobody calls."""
        return function if function is not None else jit


# tokens of one program of a split-KV kernel, at least: below this the merge costs more than the balance brings
MIN_SPLIT = 256
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 512  # larger tiles do not fit a GPU's shared memory
LOG2_E = 1.4426950408889634


def use_triton(x: torch.Tensor, backend: str | None) -> bool:
    """True if the Triton kernel shall run: on CUDA tensors, or when a test asks for it by `backend="triton"`."""
    if backend is None and not x.is_cuda:
        return False
    if backend not in (None, "triton", "fused", "reference"):
        raise ValueError(f"_backend={backend!r} is not known; use 'triton', 'fused', 'reference' or None")
    if backend is not None:
        return backend == "triton"
    if x.is_cuda and not HAVE_TRITON:
        warnings.warn(
            "triton is not installed: kernels run their slow torch reference on CUDA; pip install triton",
            RuntimeWarning,
            stacklevel=3,
        )
    return x.is_cuda and HAVE_TRITON


def dot_dtype(x: torch.Tensor):
    """The Triton type in which tiles of `x` are multiplied; sums are always fp32.

    It is x's own type, but fp32 in the interpreter, which keeps bf16 as 16-bit integers and would multiply those.
    """
    if triton.knobs.runtime.interpret:
        return tl.float32
    return {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}[x.dtype]


def split_length(n: int, tiles: int, x: torch.Tensor) -> int:
    """How many of n keys one program takes so that `tiles` independent tiles fill the GPU about four times."""
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
    splits = max(1, min(4 * processors // max(1, tiles), -(-n // MIN_SPLIT)))
    return max(1, -(-n // splits))


def dense_rows(x: torch.Tensor) -> torch.Tensor:
    """`x` itself, or a copy where its last axis has a stride: the kernels read whole rows."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def check_tensor(
    name: str,
    x: torch.Tensor,
    shape: tuple[int | str, ...],
    dtypes: tuple[torch.dtype, ...],
    like: torch.Tensor | None = None,
) -> None:
    """Raise ValueError unless `x` has `shape` (a string is any size), one of `dtypes` and the device of `like`."""
    if not isinstance(x, torch.Tensor):
        raise ValueError(f"{name} is {type(x).__name__}; it must be a tensor")
    fits = x.dim() == len(shape) and all(
        isinstance(w, str) or w == have for w, have in zip(shape, x.shape, strict=True)
    )
    if not fits:
        raise ValueError(f"{name} has shape {list(x.shape)}; it must be [{', '.join(map(str, shape))}]")
    if x.dtype not in dtypes:
        allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name} is {str(x.dtype).removeprefix('torch.')}; it must be {allowed}")
    if like is not None and x.device != like.device:
        raise ValueError(f"{name} is on {x.device}; it must be on {like.device}, beside the other arguments")


def check_head_dim(name: str, x: torch.Tensor) -> None:
    """Raise ValueError if the last axis of `x` is longer than a kernel tile can be."""
    if not 1 <= x.shape[-1] <= MAX_HEAD_DIM:
        raise ValueError(f"{name} has head_dim {x.shape[-1]} (shape {list(x.shape)}); the limit is 1..{MAX_HEAD_DIM}")


def check_groups(heads: int, groups: int) -> None:
    """Raise ValueError unless the query heads split evenly over the kv heads."""
    if groups < 1 or heads % groups:
        raise ValueError(f"q has {heads} heads and k has {groups}; the first must be a multiple of the second")


def check_valid(valid: torch.Tensor | None, batch: int, groups: int, n: int, like: torch.Tensor) -> torch.Tensor | None:
    """Return `valid` as a bool view [batch, groups, n] (no copy), or None."""
    if valid is None:
        return None
    if isinstance(valid, torch.Tensor) and valid.dim() == 2:
        check_tensor("valid", valid, (batch, n), (torch.bool,), like)
        return valid[:, None, :].expand(batch, groups, n)
    check_tensor("valid", valid, (batch, groups, n), (torch.bool,), like)
    return valid


def check_softcap(softcap: float | None) -> None:
    """Raise ValueError unless `softcap` is None or positive."""
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap={softcap} must be above 0; None leaves the scores as they are")
