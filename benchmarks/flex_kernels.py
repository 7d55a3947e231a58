"""FlexAttention's Triton kernels of the installed torch, causal, compiled for a GPU that is not there.

Inductor renders its templates while it compiles for a device. Here they are rendered with the few things that they ask
of Inductor: names of arguments, sizes, and what the mask says. Tiles are those that torch chooses without autotuning.
"""

from __future__ import annotations

import importlib.util
import math
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import jinja2
import torch
import triton
from torch._inductor.kernel.flex.common import load_flex_template
from torch._inductor.template_heuristics.triton import CUDAConfigHeuristic
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

B, N, S, BLOCK = 2, 8, 4096, 128  # BLOCK: of torch's BlockMask
HEADER = "import triton\nimport triton.language as tl\n\n\n@triton.jit\n"
INDICES = {"KV_NUM_BLKS", "KV_IDX", "Q_NUM_BLKS", "Q_IDX"}
ROWS = ("LSE", "MAX", "DELTA")


def forward(size: int, capability: int) -> tuple[Any, tuple[int, int]]:
    """(what triton compiled, its tile of queries and keys); size: of a head."""
    with mock.patch("torch.cuda.get_device_capability", return_value=divmod(capability, 10)):
        chosen = CUDAConfigHeuristic().get_flex_attn_fwd_configs(size, torch.bfloat16)[0]
    tiles = {"BLOCK_M": chosen.block_m, "BLOCK_N": chosen.block_n, "OUTPUT_LOGSUMEXP": True, "OUTPUT_MAX": False}
    source = "".join(load_flex_template(name) for name in ("flex_attention", "utilities", "common"))
    return compiled(source, size, capability, chosen, tiles), (chosen.block_m, chosen.block_n)


def backward(size: int, capability: int) -> tuple[Any, tuple[int, int]]:
    """The same; one kernel has both loops, and the tile is that of the loop for dk and dv, turned for dq."""
    with mock.patch("torch.cuda.get_device_capability", return_value=divmod(capability, 10)):
        chosen = CUDAConfigHeuristic().get_flex_attn_bwd_configs(size, torch.bfloat16)[0]
    names = ("block_m1", "block_n1", "block_m2", "block_n2")
    tiles = {name.upper(): getattr(chosen, name) for name in names} | {"WRITE_DQ": True}
    source = "".join(load_flex_template(name) for name in ("flex_backwards", "utilities"))
    return compiled(source, size, capability, chosen, tiles), (chosen.block_m1, chosen.block_n1)


def compiled(source: str, size: int, capability: int, chosen: Any, tiles: dict[str, Any]) -> Any:
    """A template, causal, for heads of this size."""
    constants = tiles | {
        "IS_DIVISIBLE": True,
        "SAFE_HEAD_DIM": True,
        "QK_HEAD_DIM": size,
        "QK_HEAD_DIM_ROUNDED": size,
        "V_HEAD_DIM": size,
        "V_HEAD_DIM_ROUNDED": size,
        "SM_SCALE": 1 / math.sqrt(size),
        "GQA_SHARED_HEADS": 1,
        "HAS_FULL_BLOCKS": True,
        "PRESCALE_QK": False,
        "ROWS_GUARANTEED_SAFE": False,
        "BLOCKS_ARE_CONTIGUOUS": False,
        "FLOAT32_PRECISION": "'ieee'",
        "SPARSE_Q_BLOCK_SIZE": BLOCK,
        "SPARSE_KV_BLOCK_SIZE": BLOCK,
        "INDEX_DTYPE": "tl.int32",
    }
    text, operands = rendered(source, size, constants)
    with tempfile.TemporaryDirectory() as folder:
        module = imported(Path(folder) / "flex.py", text)
        function = module.flex_kernel
        signature = {name: pointer_of(name) for name in operands}
        aligned = {(place,): [["tt.divisibility", 16]] for place in range(len(operands))}
        options = {"num_warps": chosen.num_warps, "num_stages": chosen.num_stages}
        target = GPUTarget("cuda", capability, 32)
        return triton.compile(ASTSource(function, signature, {}, aligned), target=target, options=options)


def rendered(source: str, size: int, constants: dict[str, Any]) -> tuple[str, list[str]]:
    """The kernel's text, and the names of its arguments."""
    operands: list[str] = []
    defines = "".join(f"{name} : tl.constexpr = {value}\n" for name, value in constants.items())

    def def_kernel(*names: str) -> str:
        operands.extend(f"arg_{name}" for name in (*names, "OUT"))
        aliases = "".join(f"{name} = arg_{name}\n" for name in (*names, "OUT"))
        return f"{HEADER}def flex_kernel({', '.join(operands)}):\n" + indented(defines + aliases)

    def strides_of(name: str) -> tuple[int, ...]:
        blocks = S // BLOCK
        if name.endswith("NUM_BLKS"):
            return (blocks, blocks, 1)
        if name.endswith("IDX"):
            return (blocks * blocks, blocks * blocks, blocks, 1)
        return (N * S * size, S * size, size, 1)

    def stride(name: str, dim: int | None = None) -> str:
        return ", ".join(map(str, strides_of(name))) if dim is None else str(strides_of(name)[dim])

    def size_of(name: str, dim: int) -> str:
        return str(1 if name.endswith(("NUM_BLKS", "IDX")) else (B, N, S, size)[dim])

    def modification(output_name: str | None, **names: Any) -> str:
        """Scores stay as they are; the mask is causal."""
        says = {
            "post_mod_scores": names.get("score"),
            "grad_scores": names.get("grad_score_mod"),
            "mask_mod_output": f"{names['m']} >= {names['n']}",
        }
        return "pass" if output_name is None else f"{output_name} = {says[output_name]}"

    def store_output(places: tuple[str, ...], value: str, valid: str, indent_width: int = 4, **_: Any) -> str:
        terms = " + ".join(f"({place}) * {step}" for place, step in zip(places, strides_of("OUT"), strict=True))
        return f"tl.store(OUT + {terms}, {value}, {valid})"

    environment = jinja2.Environment(undefined=jinja2.StrictUndefined)
    environment.filters["indent_except_first"] = lambda text, times: text.replace("\n", "\n" + "    " * times)
    text = environment.from_string(source).render(
        **constants,
        USE_TMA=False,
        def_kernel=def_kernel,
        stride=stride,
        size=size_of,
        modification=modification,
        store_output=store_output,
        gen_argdefs=lambda: ", ".join(operands),
        gen_defines=lambda: defines,
    )
    return text, operands


def pointer_of(name: str) -> str:
    """The triton type of an argument."""
    name = name.removeprefix("arg_")
    if name.removeprefix("FULL_") in INDICES:
        return "*i32"
    return "*fp32" if name in ROWS else "*bf16"


def indented(text: str) -> str:
    return "".join(f"    {line}\n" for line in text.splitlines())


def imported(path: Path, text: str) -> ModuleType:
    """A module out of a text: triton reads the source of what it compiles."""
    path.write_text(text)
    spec = importlib.util.spec_from_file_location("flex_kernels_rendered", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
