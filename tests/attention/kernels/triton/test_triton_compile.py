"""Every configuration of the table compiles for the GPUs it is for, without spills and within their memories."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from triton_resources import TENSOR_MEMORY, Resources, resources
from triton_table import DTYPES, SPILLED, VARIANTS, Compilation, compilations, scores_of

from spcompile.attention.kernels.triton.configs import (
    ARCHITECTURES,
    HEAD_SIZES,
    TABLE,
    Config,
    architecture,
)
from spcompile.attention.kernels.triton.hop_provider import variant_of
from spcompile.attention.kernels.triton.launch import Launch

SHARED = {80: 166912, 90: 232448, 100: 232448}  # bytes that one program may have, CUDA programming guide
PRODUCTS = {80: ("mma.sync",), 90: ("mma.sync", "wgmma.mma_async"), 100: ("mma.sync", "tcgen05.mma")}
SAMPLE = 150  # of all compilations that are no row's default, one in so many is compiled beside the defaults
ROWS = [pytest.param(*row, id="-".join(map(str, row))) for row in TABLE]


def check(launch: Launch, capability: int, spilled: int | None = 0, element: int = 2) -> Resources:
    """spilled: bytes that a thread may spill; None for any."""
    found = resources(launch, capability)
    case = f"{launch.kernel.fn.__name__} {launch.options} for sm_{capability}"
    assert "trap;" not in found.assembly, f"{case}: the kernel is nothing but a trap"
    assert element != 2 or any(op in found.assembly for op in PRODUCTS[capability]), f"{case}: no tensor core"
    assert found.columns <= TENSOR_MEMORY, f"{case}: {found.columns} columns of tensor memory"
    assert found.shared <= SHARED[capability], f"{case}: {found.shared} bytes of shared memory"
    assert spilled is None or found.spilled <= spilled, f"{case}: {found.spilled} bytes spilled"
    return found


def check_all(chosen: list[Compilation]) -> None:
    """All of them, and then one error for those that fail."""
    failures = []
    for one in chosen:
        allowed = None if one.scores == "everything" else 0 if one.is_default else SPILLED[one.element]
        try:
            check(one.launch(), one.capability, allowed, one.element)
        except AssertionError as error:
            failures.append(f"{one}: {error}")
    assert not failures, "\n".join(failures)


def of_row(arch: str, element: int, size: int, variant: str) -> list[Compilation]:
    return [c for c in compilations() if c[:4] == (arch, element, size, variant)]


def is_sampled(one: Compilation) -> bool:
    return not one.is_default and one.number % SAMPLE == 0


def test_the_table_is_complete() -> None:
    assert set(TABLE) == {
        (arch, element, size, variant)
        for arch in ARCHITECTURES
        for element in DTYPES
        for size in HEAD_SIZES
        for variant in VARIANTS
    }
    found = {variant: {variant_of(scores) for scores in scores_of(variant).values()} for variant in VARIANTS}
    assert found == {variant: {variant} for variant in VARIANTS}
    every, rows = list(compilations()), {c[:4] for c in compilations() if c.is_default}
    assert rows == set(TABLE)
    assert len(set(every)) == len(every)
    assert {c.kernel for c in every if c.is_default} == {"forward", "rows", "keys", "bias"}


@pytest.mark.thinned(8)
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_plain_kernels(capability: int) -> None:
    """Tensor cores of the right generation, asynchronous copies, no spills."""
    copies, products = {
        80: ("cp.async.cg", "mma.sync"),
        90: ("cp.async.bulk.tensor", "wgmma.mma_async"),
        100: ("cp.async.bulk.tensor", "tcgen05.mma"),
    }[capability]
    for kernel in ("forward", "rows", "keys"):
        one = Compilation(architecture(capability, True), 2, 128, "plain", "causal", kernel, "alone")
        assembly = check(one.launch(), capability).assembly
        assert copies in assembly
        assert products in assembly


@pytest.mark.slow
@pytest.mark.thinned(30)
@pytest.mark.parametrize(
    ("arch", "element", "size", "variant"),
    [  # float32 compiles for minutes
        pytest.param(*row, id="-".join(map(str, row)), marks=pytest.mark.manual if row[1] == 4 else ()) for row in TABLE
    ],
)
def test_the_default_of_every_row(arch: str, element: int, size: int, variant: str) -> None:
    """And a sample of all else, the same on every machine."""
    check_all([c for c in of_row(arch, element, size, variant) if c.is_default or is_sampled(c)])


@pytest.mark.manual
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("arch", "element", "size", "variant"), ROWS)
def test_every_configuration(arch: str, element: int, size: int, variant: str) -> None:
    check_all([c for c in of_row(arch, element, size, variant) if not (c.is_default or is_sampled(c))])


@pytest.mark.slow
@pytest.mark.thinned(6)
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_rounded_scores(capability: int) -> None:
    for kernel in ("forward", "rows", "keys"):
        arch = architecture(capability, True)
        for scores in ("rounded", "filled"):
            check(Compilation(arch, 2, 128, "rich", scores, kernel, "alone").launch(), capability)


@pytest.mark.slow
@pytest.mark.thinned(16)
@pytest.mark.parametrize("capability", [90, 100])
@pytest.mark.parametrize("size", [72, 80])
def test_what_no_descriptor_describes(size: int, capability: int) -> None:
    """Head sizes that are no power of two, and addresses instead of descriptors on newer GPUs, at least compile."""
    configs = TABLE[architecture(capability, False), 2, 128, "plain"]
    assert not any(isinstance(config, Config) and config.tma for config in configs)
    for kernel, hop in (("forward", "alone"), ("rows", "last"), ("keys", "alone")):
        one = Compilation("sm80", 2, 128, "plain", "causal", kernel, hop)
        check(one.launch(size), capability, spilled=None)
