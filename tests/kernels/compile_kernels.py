"""Compile the Triton kernels for a CUDA architecture, without a GPU, and report what they use as JSON.

    python tests/kernels/compile_kernels.py 90

A script of its own: the tests run the kernels in Triton's interpreter, which has to be chosen per process.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import ASTSource

from noesis.kernels import layout
from noesis.kernels.coding import _triton as coding_triton
from noesis.kernels.launching import Kernel
from noesis.kernels.moments import _triton as moments_triton
from noesis.kernels.pooling import _triton as pooling_triton
from noesis.kernels.stepping import _triton as stepping_triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = {
    "p_layer": "*i64", "p_slab": "*fp32", "p_control": "*i64", "p_scratch": "*i32", "p_totals": "*fp64",
    "p_steps": "*fp64", "p_timestep": "*fp64",
}  # fmt: skip
SIZES = {"fp32": 4, "fp16": 2, "bf16": 2}


def build(kernel: Any, arch: int, constants: dict[str, Any], pointers: dict[str, str]) -> dict[str, int]:
    """Registers, shared memory and spills of a variant."""
    function, names = kernel.function, kernel.function.arg_names
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i64") for name in names}
    aligned = [name for name in names if name in pointers and name not in ("p_layer", "p_timestep")]
    source = ASTSource(
        function,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": kernel.warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        used = subprocess.run(
            [str(TOOLS / "cuobjdump"), "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    use = {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", used)}
    loads = "ld.global.v4" in compiled.asm["ptx"]
    return {
        "registers": use["REG"], "shared_bytes": use["SHARED"], "spilled_bytes": use["LOCAL"] + use["STACK"],
        "wide_loads": int(loads),
    }  # fmt: skip


def moments(arch: int, dtype: str, **flags: int) -> dict[str, int]:
    """A variant of the moments kernel."""
    tile = moments_triton.TILE_BYTES // SIZES[dtype] // (1 if flags.get("DENSE", True) else 4)
    constants = {
        "PARTS": 264, "PARTS_P2": 512, "TILE": tile, "PIECE": tile // moments_triton.PIECES, "FIELDS": layout.REQUIRED,
        "DENSE": True, "EVEN": True, "SOLO": False, "BY_SAMPLE": False, "COUNT_ZEROS": False, **flags,
    }  # fmt: skip
    return build(moments_triton._KERNEL, arch, constants, {**POINTERS, "p_x": f"*{dtype}"})


def main() -> None:
    """Compile every kind of variant once."""
    arch = int(sys.argv[1])
    report = {f"moments {dtype}": moments(arch, dtype) for dtype in SIZES}
    every = {"FIELDS": len(layout.FIELDS)}
    for flags in ({"SOLO": True}, {"DENSE": False}, {"EVEN": False}, {"BY_SAMPLE": True}, {"COUNT_ZEROS": True}, every):
        report[f"moments fp16 {flags}"] = moments(arch, "fp16", **flags)
    for fields in (layout.REQUIRED, len(layout.FIELDS)):
        steps = {"BLOCK": stepping_triton.BLOCK, "FIELDS": fields}
        report[f"begin {fields} fields"] = build(stepping_triton._BEGIN, arch, steps, POINTERS)
    for name, tile in (("last", pooling_triton.CHANNELS_LAST), ("first", pooling_triton.CHANNELS_FIRST)):
        constants = {"POSITIONS": tile[0], "CHANNELS": tile[1], "SPREAD": True}
        pointers = {"p_x": "*fp16", "p_buffer": "*fp32", "p_stamp": "*i64", "p_control": "*i64"}
        unit = {"s_channel" if name == "last" else "s_position": 1}
        report[f"pool channels {name}"] = build(pooling_triton._POOL, arch, {**constants, **unit}, pointers)
    report["stamp"] = build(pooling_triton._STAMP, arch, {}, pointers)
    code = Kernel(coding_triton.code_kernel, coding_triton.WARPS)
    names = [name for name in code.function.arg_names if name.startswith("p_")]
    pointers = {name: "*i64" if name == "p_nearest" else "*fp32" for name in names}
    sizes = {"ROWS": coding_triton.ROWS, "CHANNELS": coding_triton.CHANNELS, "CODES": coding_triton.CODES, "DIM": 64}
    report["code"] = build(code, arch, sizes, pointers)
    report["end"] = build(stepping_triton._END, arch, {}, POINTERS)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
