"""Compile every shipped configuration for sm_80 and sm_90 without a GPU; test_compile.py runs it as a process.

The public functions are called on small CPU tensors while a recorder stands in for each kernel, so what is compiled is
what the launchers really pass. Prints one line per configuration; a type error or too much shared memory ends it.
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import replace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from textkv import kernels
from textkv.kernels.codebook import row_bytes
from textkv.kernels.pack import Bits, LowRank, Sparse

SHARED_LIMIT = 99 * 1024  # bytes of one program on the smallest GPUs of compute capability 8.6 and 8.9
POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.uint8: "*u8",
}


class Recorder:
    """Stands in for a jitted kernel and keeps the configurations that it is launched with."""

    def __init__(self, kernel: JITFunction) -> None:
        self.kernel, self.seen = kernel, {}

    def __getitem__(self, grid: tuple[int, ...]):
        return self.launch

    def launch(self, *args, num_warps: int = 4, num_stages: int = 3, **kwargs) -> None:
        values = inspect.signature(self.kernel.fn).bind(*args, **kwargs).arguments
        signature, constants, attributes = {}, {}, {}
        for i, parameter in enumerate(self.kernel.params):
            value, name = values[parameter.name], parameter.name
            specialised = not parameter.do_not_specialize
            if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and specialised):
                signature[name], constants[name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[name], attributes[(i,)] = POINTERS[value.dtype], [["tt.divisibility", 16]]
            elif isinstance(value, float):
                signature[name] = "fp32"
            else:
                signature[name] = "i32"
                if specialised and value % 16 == 0:
                    attributes[(i,)] = [["tt.divisibility", 16]]
        options = {"num_warps": num_warps, "num_stages": num_stages}
        self.seen[str((signature, constants, options))] = (signature, constants, attributes, options)

    def compile(self, capability: int) -> None:
        for signature, constants, attributes, options in self.seen.values():
            source = ASTSource(self.kernel, signature, constants, attributes)
            shared = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).metadata.shared
            print(f"sm_{capability} {self.kernel.fn.__module__}.{self.kernel.fn.__name__} {shared} bytes {constants}")
            if shared > SHARED_LIMIT:
                raise SystemExit(f"{self.kernel.fn.__name__} {constants} takes {shared} bytes of shared memory")


def record() -> list[Recorder]:
    """Put a recorder in the place of every kernel."""
    recorders = []
    for operation in kernels.OPERATIONS:
        module = importlib.import_module(f"textkv.kernels.{operation}")
        for name, value in list(vars(module).items()):
            if isinstance(value, JITFunction) and name.endswith("_kernel"):
                recorders.append(Recorder(value))
                setattr(module, name, recorders[-1])
    return recorders


def zeros(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def launch_attention(D: int, group: int, m: int, **options) -> None:
    q, k = zeros(1, 2 * group, m, D), zeros(1, 2, 600, D)
    if options.pop("ragged", False):
        options |= {"start": torch.tensor([0, 300]), "length": torch.tensor([300, 300], dtype=torch.int32)}
        k = k[0, 0]
    kernels.decode_attention(q, k, k, scale=1.0, **options, _backend="triton")


def launch_packed(
    D: int, group: int, m: int, T: int, k_bits: Bits, v_bits: Bits, layout: str, corrected: bool, half: int = 0,
    axes: int = 1, **options,
) -> None:  # fmt: skip
    blocks = 600 // T + 1
    k = kernels.pack(zeros(2 * blocks, T, D), k_bits, layout=layout)
    v = kernels.pack(zeros(2 * blocks, T, D), v_bits, layout="token")
    if corrected:
        one = zeros(2 * blocks, dtype=torch.int32)
        a, p, delta = (zeros(*shape, dtype=torch.float16) for shape in ((2 * blocks, T, 4), (2, D, 4), (9,)))
        terms = LowRank(a, p, one), Sparse(one, one, zeros(9, dtype=torch.int16), delta)
        k, v = (replace(x, lowrank=terms[0], sparse=terms[1]) for x in (k, v))
    rows = {"start": torch.tensor([0, blocks]), "length": torch.tensor([600, 300], dtype=torch.int32), "longest": 600}
    if half:
        rows |= {"centre": torch.zeros(2, D), "inv_freq": torch.zeros(2, half)}
        rows["positions"] = zeros(*[3] * (axes == 3), 1, 1, 600, dtype=torch.int32)
        rows["axes"] = zeros(half, dtype=torch.int32) if axes == 3 else None
    kernels.packed_attention(zeros(1, 2 * group, m, D), k, v, scale=1.0, **rows, **options, _backend="triton")


def launch_coded(D: int, group: int, m: int, bits: tuple[int, int], half: int = 0, **options) -> None:
    rows = [zeros(1, 2, 600, row_bytes(each, D), dtype=torch.uint8) for each in bits]
    if half:
        options |= {"inv_freq": torch.zeros(1, 2, half), "positions": zeros(1, 1, 600, dtype=torch.int32)}
    options |= {"bits": bits, "signs": torch.ones(2, D), "scale": 1.0, "_backend": "triton"}
    kernels.coded_attention(zeros(1, 2 * group, m, D), *rows, **options)


def launch_all() -> None:
    """One call for each configuration that a bf16 model of head_dim 128 leads to, and the extremes."""
    valid = torch.ones(1, 600, dtype=torch.bool)
    for options in ({}, {"valid": valid}, {"ragged": True}, {"softcap": 50.0}, {"softcap": 50.0, "ragged": True}):
        launch_attention(128, 7, 1, **options)
    launch_attention(128, 4, 64, causal=True, window=256, softcap=30.0)
    launch_attention(128, 4, 64, causal=True, window=256, ragged=True)
    launch_attention(128, 4, 64, visible=zeros(1, 64, 600).bool(), valid=valid)
    for D in (256, 512):
        launch_attention(D, 8, 1)
        launch_attention(D, 8, 1, ragged=True)
        launch_attention(D, 8, 64, causal=True, window=100, valid=valid, visible=zeros(1, 64, 600).bool())
    launch_attention(128, 4, 64, causal=True)
    launch_attention(128, 8, 4, causal=True, ragged=True)
    launch_attention(80, 1, 1)
    launch_attention(256, 8, 64, causal=True, valid=valid)
    q, k = zeros(1, 8, 32, 128), zeros(1, 2, 600, 128)
    for bits in ((2, 2), (4, 4), (8, 8), ("fp8", "fp8")):
        launch_packed(128, 7, 1, 64, *bits, "channel", corrected=False)
    launch_packed(128, 8, 1, 64, 2, 2, "channel", corrected=True)
    launch_packed(128, 4, 64, 64, 2, 2, "token", corrected=True)
    launch_packed(256, 8, 64, 128, 4, 2, "token", corrected=True)
    launch_packed(80, 1, 1, 16, 4, 4, "token", corrected=False)
    launch_packed(128, 7, 1, 64, 4, 4, "channel", corrected=False, half=64)
    launch_packed(80, 1, 1, 16, 4, 4, "channel", corrected=False, half=20)
    launch_packed(256, 8, 64, 128, 2, 2, "channel", corrected=True, half=128)
    launch_packed(128, 7, 1, 64, 4, 4, "channel", corrected=False, half=64, axes=3)
    launch_packed(256, 8, 64, 128, 2, 2, "channel", corrected=True, half=128, axes=3)
    holes = torch.ones(1, 1, 600, dtype=torch.bool)
    launch_packed(128, 7, 1, 64, 4, 4, "channel", corrected=False, half=64, softcap=50.0, valid=holes)
    launch_packed(128, 7, 1, 64, 4, 4, "channel", corrected=False, half=32, softcap=50.0)
    launch_packed(512, 8, 1, 64, 4, 4, "channel", corrected=False)
    launch_packed(512, 8, 64, 64, "fp8", "fp8", "channel", corrected=False, valid=holes)
    launch_packed(512, 8, 64, 128, 2, 2, "token", corrected=True)
    launch_packed(512, 8, 64, 128, 2, 2, "channel", corrected=True, half=256, axes=3)
    launch_coded(128, 7, 1, (4, 4), centre=torch.zeros(1, 2, 128))
    launch_coded(128, 4, 64, (3, 2), valid=holes, softcap=50.0)
    launch_coded(512, 8, 64, (4, 4), half=256, centre=torch.zeros(1, 2, 512))
    lse = zeros(1, 8, 32, dtype=torch.float32)
    wide, few = zeros(1, 2, 600, 512), zeros(1, 8, 64, 512)
    kernels.window_mass(few, wide, scale=1.0, squares=True, softcap=50.0, _backend="triton")
    kernels.merge([few] * 2, [zeros(1, 8, 64, dtype=torch.float32)] * 2, _backend="triton")
    kernels.compact(wide, wide, zeros(1, 2, 9, dtype=torch.int64), _backend="triton")
    kernels.subspace_residual(wide, zeros(1, 2, 512, 32, dtype=torch.float32), _backend="triton")
    for half in (256, 32):
        kernels.rotate(wide, torch.tensor(1), torch.ones(half), _backend="triton")
    kernels.window_mass(q, k, scale=1.0, _backend="triton")
    kernels.window_mass(q, k, scale=1.0, valid=valid, squares=True, _backend="triton")
    kernels.merge([q] * 3, [lse] * 3, _backend="triton")
    kernels.compact(k, k, torch.ones(1, 2, 600, dtype=torch.bool), _backend="triton")
    kernels.compact(k, k, zeros(1, 2, 9, dtype=torch.int64), _backend="triton")
    kernels.subspace_residual(k, zeros(1, 2, 128, 32, dtype=torch.float32), _backend="triton")
    kernels.subspace_residual(zeros(1, 2, 9, 256), zeros(1, 2, 256, 32, dtype=torch.float32), _backend="triton")
    for rows, suppress in ((1, None), (32, torch.tensor([7]))):
        kernels.confidence(zeros(rows, 126_464), suppress=suppress, _backend="triton")
    kernels.confidence(zeros(2, 300, dtype=torch.float32), suppress=torch.tensor([7, 8]), _backend="triton")
    frequencies = torch.ones(64)
    kernels.rotate(k, torch.tensor(1), frequencies, _backend="triton")
    kernels.rotate(k, torch.tensor(1.0), frequencies[:16], _backend="triton")
    for interleaved in (False, True):
        options = {"sections": [16, 24, 24], "interleaved": interleaved, "_backend": "triton"}
        kernels.rotate(k, zeros(3, 1, 600, dtype=torch.int64), frequencies, **options)


if __name__ == "__main__":
    recorders = record()
    launch_all()
    for recorder in recorders:
        if not recorder.seen:
            raise SystemExit(f"{recorder.kernel.fn.__name__} was never launched")
        for capability in (80, 90):
            recorder.compile(capability)
