"""Every configuration of the table compiles for the GPUs it is for, without spills and within their shared memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton_resources import Resources, resources

from spcompile.attention.dropout import Dropout
from spcompile.attention.mask import AttentionMask
from spcompile.attention.provider import Scores
from spcompile.attention.runs import natural_runs
from spcompile.attention.triton_configs import (
    HEAD_SIZES,
    SPILLED_SINGLES,
    TABLE,
    VARIANTS,
    Config,
    Configs,
    architecture,
)
from spcompile.attention.triton_launch import ForwardTensors, Hop, Launch, RowTensors
from spcompile.attention.triton_provider import variant_of

SHARED = {80: 166912, 90: 232448, 100: 232448}  # bytes that one program may have, CUDA programming guide
DTYPES = {2: torch.bfloat16, 4: torch.float32}
B, N, G, S = 2, 8, 2, 256


def variants() -> dict[str, list[tuple[str, dict[str, Any]]]]:
    """What the kernels of each row of the table are compiled for: masks and other arguments of Scores."""
    ids = torch.zeros(B, S, dtype=torch.int64)
    data = {"q_documents": ids, "k_documents": ids, "key_valid": ids == 0}
    dropout = {"dropout": Dropout(0.1, torch.zeros(B, N, dtype=torch.int64)), "alibi_slopes": torch.ones(N)}
    return {
        "plain": [("full", {}), ("causal", {}), ("causal window=100", {}), ("causal", {"sinks": torch.ones(N)})],
        "rich": [("causal documents key_padding", data), ("causal", {"softcap": 30.0}), ("causal", dropout)],
        "bias": [("causal", {"bias": torch.ones(1, N, S, S, dtype=torch.bfloat16)})],
    }


def launches(dtype: torch.dtype, size: int, configs: Configs, text: str, more: dict[str, Any]) -> Iterator[Launch]:
    """Every kernel, alone and as a hop in the middle of a ring."""
    q, k, v, grad_out = (torch.empty(B, n, S, size, dtype=dtype) for n in (N, G, G, N))
    row, wide = torch.empty(B, N, S), torch.empty(B, N, S, size)
    hop = Hop(q, k, v, natural_runs(S), natural_runs(S), Scores(AttentionMask.parse(text), 0.1, **more), configs)
    rows = RowTensors(grad_out, row, row)
    yield hop.forward(ForwardTensors(grad_out, row, wide, row, row), True, True)
    yield hop.row_gradients(rows, wide, q, True, True)
    yield hop.key_gradients(rows, k, v)
    if "bias" in more:
        yield hop.bias_gradient(rows, torch.empty(1, N, S, S))
    else:
        yield hop.forward(ForwardTensors(grad_out, row, wide, row, row), False, False)
        yield hop.row_gradients(rows, wide, q, False, False)
        yield hop.key_gradients(rows, k.float(), v.float())


def check(launch: Launch, capability: int, spilled: int = 0) -> Resources:
    found = resources(launch, capability)
    case = f"{launch.kernel.fn.__name__} {launch.options} for sm_{capability}"
    assert found.spilled <= spilled, f"{case}: {found.spilled} bytes spilled"
    assert found.shared <= SHARED[capability], f"{case}: {found.shared} bytes of shared memory"
    return found


def test_the_table_is_complete() -> None:
    assert set(TABLE) == {
        (arch, element, size, variant)
        for arch in ("sm80", "sm90", "sm100")
        for element in DTYPES
        for size in HEAD_SIZES
        for variant in VARIANTS
    }
    found = {
        name: {variant_of(Scores(AttentionMask.parse(t), 1.0, **m)) for t, m in v} for name, v in variants().items()
    }
    assert found == {name: {name} for name in VARIANTS}


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_plain_kernels(capability: int) -> None:
    """Tensor cores of the right generation, asynchronous copies, no spills."""
    configs = TABLE[architecture(capability, True), 2, 128, "plain"]
    forward, rows, keys, *_ = launches(torch.bfloat16, 128, configs, "causal", {})
    copies, products = {
        80: ("cp.async.cg", "mma.sync"),
        90: ("cp.async.bulk.tensor", "wgmma.mma_async"),
        100: ("cp.async.bulk.tensor", "tcgen05.mma"),
    }[capability]
    for launch in (forward, rows, keys):
        assembly = check(launch, capability).assembly
        assert copies in assembly
        assert products in assembly


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", HEAD_SIZES)
@pytest.mark.parametrize("element", DTYPES)
@pytest.mark.parametrize("arch", ["sm80", "sm90", "sm100"])
def test_every_configuration(arch: str, element: int, size: int, variant: str) -> None:
    configs = TABLE[arch, element, size, variant]
    for text, more in variants()[variant]:
        for launch in launches(DTYPES[element], size, configs, text, more):
            check(launch, int(arch.removeprefix("sm")), spilled=0 if element == 2 else SPILLED_SINGLES)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [90, 100])
@pytest.mark.parametrize("size", [72, 80])
def test_what_no_descriptor_describes(size: int, capability: int) -> None:
    """Head sizes that are no power of two, and addresses instead of descriptors on newer GPUs, at least compile."""
    configs = TABLE[architecture(capability, False), 2, 128, "plain"]
    assert not any(isinstance(config, Config) and config.tma for config in configs)
    for launch in launches(torch.bfloat16, size, configs, "causal", {}):
        assert resources(launch, capability).shared <= SHARED[capability]
