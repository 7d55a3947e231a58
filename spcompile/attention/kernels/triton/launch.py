"""The arguments of the Triton kernels for one hop: places, mask, tiles, and one `Launch` for each kernel.

B batch, N query heads, G key heads, S query rows, T keys, H head size of q and k, V of v.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from spcompile.attention.kernels.triton.backward import key_kernel, row_kernel
from spcompile.attention.kernels.triton.bias import bias_kernel, row_numbers_kernel
from spcompile.attention.kernels.triton.configs import DESCRIPTOR_STEP, Config, Configs, width_of
from spcompile.attention.kernels.triton.forward import forward_kernel
from spcompile.attention.kernels.triton.scores import (
    BiasArgs,
    DropoutArgs,
    MaskArgs,
    Operand,
    PlaceArgs,
    ScoreArgs,
    SegmentArgs,
)
from spcompile.attention.kernels.triton.tile_tables import Places, Segments, document_numbers, segments, tile_kinds

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from spcompile.attention.kernels.triton.shared_tables import Kernel, SharedTables
    from spcompile.attention.scores.mask import AttentionMask
    from spcompile.attention.scores.provider import Scores
    from spcompile.attention.scores.runs import Run

LOG2E = math.log2(math.e)
TileOperand: TypeAlias = Operand | TensorDescriptor


class Launch(NamedTuple):
    """A kernel with its grid and all its arguments."""

    kernel: Any
    grid: tuple[int, int, int]
    args: tuple[Any, ...]
    options: dict[str, Any]

    def run(self) -> None:
        """Start it; a grid of nothing is nothing."""
        if all(self.grid):
            self.kernel[self.grid](*self.args, **self.options)


Layout = tuple[int, tuple[tuple[int, int, int], ...]]  # local length; start, length and first position of runs


def runs_key(runs: Sequence[Run], length: int) -> Layout | None:
    """What `runs` say of `length` local elements, as a key of a cache; None if a run has gaps."""
    if any(run.gaps is not None for run in runs):
        return None
    return length, tuple((run.start, run.length, run.first) for run in runs)


@functools.lru_cache(maxsize=256)
def _cached_positions(layout: Layout, device: torch.device) -> Tensor:
    length, spans = layout
    positions = torch.full((length,), -1, dtype=torch.int32, device=device)
    for start, count, first in spans:
        positions[start : start + count] = torch.arange(first, first + count, dtype=torch.int32, device=device)
    return positions


def positions_of(runs: Sequence[Run], length: int, device: torch.device) -> Tensor:
    """int32 [length]: the position of each local element, -1 where it is padding."""
    layout = runs_key(runs, length)
    if layout is not None:
        return _cached_positions(layout, device)
    positions = torch.full((length,), -1, dtype=torch.int32, device=device)
    for run in runs:
        positions[run.start : run.stop] = run.positions(device)
    return positions


@functools.lru_cache(maxsize=256)
def _cached_kinds(
    mask: AttentionMask, q: Layout, k: Layout, config: Config, device: torch.device
) -> tuple[Tensor, Tensor]:
    """`tile_kinds` where positions alone decide: the same for every layer and step."""
    q_places, k_places = (Places(_cached_positions(layout, device)[None], None) for layout in (q, k))
    return tile_kinds(mask, q_places, k_places, config.block_m, config.block_n)


@functools.lru_cache(maxsize=256)
def _cached_segments(
    mask: AttentionMask, q: Layout, k: Layout, config: Config, device: torch.device, by_keys: bool
) -> SegmentArgs:
    return _segment_args(*_cached_kinds(mask, q, k, config, device), by_keys)


def _segment_args(full: Tensor, partial: Tensor, by_keys: bool) -> SegmentArgs:
    return _as_args(segments(full.mT, partial.mT) if by_keys else segments(full, partial))


def _as_args(found: Segments) -> SegmentArgs:
    batches, lines, most, _ = found.full.shape
    return SegmentArgs(*found, lines if batches > 1 else 0, most)


def kernel_operand(x: Tensor) -> Operand:
    """`x` [B, N, S, H] as kernels take it; its last dim is dense."""
    assert x.stride(3) == 1 or x.shape[3] == 1
    return Operand(x, x.stride(0), x.stride(1), x.stride(2))


def _steps(x: Tensor) -> list[int]:
    """From entry to entry, head to head and row to row; where there is one, any step will do."""
    return [x.stride(dim) if x.shape[dim] > 1 else x.shape[3] for dim in range(3)]


def describable(x: Tensor) -> bool:
    """Whether a tensor descriptor can describe `x` [B, N, S, H]: addresses and steps in multiples of 16 bytes.

    A descriptor is what the copy engine of Hopper and later takes (TMA): it leaves more registers to the kernel.
    """
    steps = [step * x.element_size() for step in _steps(x)]
    fits = all(step and step % DESCRIPTOR_STEP == 0 for step in steps)
    return x.numel() > 0 and x.stride(3) == 1 and x.data_ptr() % DESCRIPTOR_STEP == 0 and fits


def tiled(x: Tensor, rows: int, wanted: bool) -> TileOperand:
    """`x` as an operand that the kernel reads in tiles of `rows` rows: by descriptor if wanted and possible."""
    if not wanted or not describable(x):
        return kernel_operand(x)
    return TensorDescriptor(x, list(x.shape), [*_steps(x), 1], [1, 1, rows, width_of(x.shape[3])])


def dense(x: Tensor) -> Tensor:
    """`x` with a dense last dim."""
    return x if x.stride(-1) == 1 else x.contiguous()


def readable(x: Tensor, configs: Configs) -> Tensor:
    """`x` [B, N, S, H] as kernels of these configurations read it; a copy where no descriptor describes it."""
    if not any(isinstance(config, Config) and config.tma for config in configs):
        return dense(x)
    return x if describable(x) else torch.empty(x.shape, dtype=x.dtype, device=x.device).copy_(x)


class ForwardTensors(NamedTuple):
    """out [B, N, S, V], lse [B, N, S]; the state between hops in float32: acc like out, peak and mass like lse."""

    out: Tensor
    lse: Tensor
    acc: Tensor
    peak: Tensor
    mass: Tensor


class RowTensors(NamedTuple):
    """What kernels read of `Rows`: grad_out [B, N, S, V] with a dense last dim, lse and delta [B, N, S].

    Both are contiguous, in float32. lse is in units of log 2, and +inf for rows without keys: their weights are 0.
    """

    grad_out: Tensor
    lse: Tensor
    delta: Tensor

    def args(self, config: Config) -> tuple[TileOperand, Tensor, Tensor]:
        """What a kernel reads of them."""
        return tiled(self.grad_out, config.block_m, config.tma), self.lse, self.delta


@dataclass(frozen=True, eq=False)
class Hop:
    """Rows of q against the keys of one hop. The strides of q, k, v are free, but for a dense last dim.

    shared: the tables of this hop, where they were made for all hops and layers together; they say what the runs do.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_runs: Sequence[Run]
    k_runs: Sequence[Run]
    scores: Scores
    configs: Configs
    shared: SharedTables | None = None

    @functools.cached_property
    def columns(self) -> Tensor:
        """int32 [T]: positions of the keys, valid or not."""
        if self.shared is not None:
            return self.shared.columns()
        return positions_of(self.k_runs, self.k.shape[2], self.k.device)

    @functools.cached_property
    def places(self) -> tuple[Places, Places]:
        """Of rows and of keys."""
        if self.shared is not None:
            return self.shared.places()
        scores, k_positions = self.scores, self.columns[None]
        q_positions = positions_of(self.q_runs, self.q.shape[2], self.q.device)[None]
        if scores.key_valid is not None:
            valid = _columns_at(scores.key_valid, self.columns)
            k_positions = torch.where(valid, k_positions, -1)
        if scores.q_documents is None or scores.k_documents is None:
            return Places(q_positions, None), Places(k_positions, None)
        ids = _columns_at(scores.q_documents, q_positions[0]), _columns_at(scores.k_documents, self.columns)
        q_documents, k_documents = document_numbers(*ids)
        return Places(q_positions, q_documents), Places(k_positions, k_documents)

    def kinds(self, config: Config) -> tuple[Tensor, Tensor]:
        """`tile_kinds` under one configuration."""
        key = self._cache_key()
        if key is not None and self.shared is None:
            return _cached_kinds(*key, config, self.q.device)
        return tile_kinds(self.scores.mask, *self.places, config.block_m, config.block_n)

    def segments(self, kernel: Kernel) -> SegmentArgs:
        """The segments of tiles of keys for each tile of rows; of the kernel "keys" the other way round."""
        if self.shared is not None:
            return _as_args(self.shared.segments(kernel))
        config, by_keys = getattr(self.configs, kernel), kernel == "keys"
        key = self._cache_key()
        if key is not None:
            return _cached_segments(*key, config, self.q.device, by_keys)
        return _segment_args(*self.kinds(config), by_keys)

    def _cache_key(self) -> tuple[AttentionMask, Layout, Layout] | None:
        q, k = runs_key(self.q_runs, self.q.shape[2]), runs_key(self.k_runs, self.k.shape[2])
        return None if self.scores.mask.needs_data or q is None or k is None else (self.scores.mask, q, k)

    @functools.cached_property
    def score_args(self) -> ScoreArgs:
        scores, mask = self.scores, self.scores.mask
        slopes, dropout = scores.alibi_slopes, scores.dropout
        offset = mask.offset if mask.causal else None
        return ScoreArgs(
            unit=scores.scale * LOG2E,
            cap=scores.softcap * LOG2E if scores.softcap else None,
            to_cap=scores.scale / scores.softcap if scores.softcap else None,
            slopes=None if slopes is None else slopes.float() * LOG2E,
            rounded_by=_in_float32(mask.rounded_by),
            fill=_in_float32(mask.fill),
            mask=MaskArgs(
                1 if mask.documents else None, offset, mask.prefix, mask.window, mask.window_right, mask.chunk
            ),
            bias=_bias_args(scores.bias),
            dropout=DropoutArgs(None, None, None, None)
            if dropout is None
            else DropoutArgs(
                dropout.seed.contiguous(),
                dropout.seed.shape[1] if dropout.seed.shape[0] > 1 else 0,
                dropout.threshold,
                1 / (1 - dropout.p),
            ),
        )

    @property
    def _sizes(self) -> dict[str, Any]:
        """The compile-time arguments that all kernels of the hop have."""
        size, v_size = self.q.shape[3], self.v.shape[3]
        return {
            "GROUP": self.q.shape[1] // self.k.shape[1],
            "SIZE": size,
            "WIDTH": width_of(size),
            "V_SIZE": v_size,
            "V_WIDTH": width_of(v_size),
            "PRECISION": precision_of(self.q.dtype),
        }

    def _place_args(self) -> tuple[PlaceArgs, PlaceArgs]:
        q, k = (
            PlaceArgs(
                x.positions,
                x.positions.stride(0) if x.positions.shape[0] > 1 else 0,
                x.documents,
                None if x.documents is None else x.documents.stride(0) if x.documents.shape[0] > 1 else 0,
            )
            for x in self.places
        )
        return q, k

    def _operands(self, config: Config) -> tuple[TileOperand, TileOperand, TileOperand]:
        """What a kernel reads of q, k and v."""
        q = tiled(self.q, config.block_m, config.tma)
        return q, tiled(self.k, config.block_n, config.tma), tiled(self.v, config.block_n, config.tma)

    def forward(self, state: ForwardTensors, first: bool, last: bool) -> Launch:
        """Reads the state unless this is the first hop; writes it, or on the last hop out and lse."""
        config = self.configs.forward
        B, N, S, _ = self.q.shape
        only_read = last and not first
        acc = tiled(state.acc, config.block_m, config.tma) if only_read else kernel_operand(state.acc)
        return Launch(
            forward_kernel,
            (-(-S // config.block_m), N, B),
            (*self._operands(config), kernel_operand(state.out), state.lse, acc,
             state.peak, state.mass, self.scores.sinks, *self._place_args(), self.segments("forward"),
             self.score_args, S, self.k.shape[2]),
            {**self._sizes, "FIRST": first, "LAST": last, **_options(config)},
        )  # fmt: skip

    def row_gradients(self, rows: RowTensors, dq_state: Tensor, dq: Tensor, first: bool, last: bool) -> Launch:
        """Reads dq_state, float32, unless this is the first hop; writes it, or on the last hop dq."""
        config = self.configs.rows
        B, N, S, _ = self.q.shape
        return Launch(
            row_kernel,
            (-(-S // config.block_m), N, B),
            (*self._operands(config), *rows.args(config), kernel_operand(dq_state), kernel_operand(dq),
             *self._place_args(), self.segments("rows"), self.score_args, self.scores.scale,
             S, self.k.shape[2]),
            {**self._sizes, "FIRST": first, "LAST": last, **_options(config)},
        )  # fmt: skip

    def key_gradients(self, rows: RowTensors, dk: Tensor, dv: Tensor) -> Launch:
        """Dk and dv of the hop."""
        config = self.configs.keys
        B, G, T, _ = self.k.shape
        return Launch(
            key_kernel,
            (-(-T // config.block_n), G, B),
            (*self._operands(config), *rows.args(config), kernel_operand(dk), kernel_operand(dv),
             *self._place_args(), self.segments("keys"), self.score_args, self.scores.scale,
             self.q.shape[2], T),
            {**self._sizes, **_options(config)},
        )  # fmt: skip

    def bias_gradient(self, rows: RowTensors, grad_bias: Tensor) -> Launch:
        """Added to grad_bias, float32 of the bias's shape."""
        config = self.configs.bias
        B, N, S, _ = self.q.shape
        T = self.k.shape[2]
        full, partial = self.kinds(config)
        kinds = (full | partial).to(torch.int8)
        row_tiles, key_tiles = -(-S // config.block_m), -(-T // config.block_n)
        batches, heads, one_row = grad_bias.shape[0], grad_bias.shape[1], grad_bias.shape[2] == 1
        return Launch(
            bias_kernel,
            (1 if one_row else row_tiles, key_tiles, batches * heads),
            (*self._operands(config), *rows.args(config), _bias_args(grad_bias),
             self.columns, *self._place_args(), kinds, row_tiles if kinds.shape[0] > 1 else 0, self.score_args,
             S, T, N, row_tiles if one_row else 1, B // batches, N // heads),
            {**self._sizes, "ONE_ROW": one_row, **_options(config)},
        )  # fmt: skip


def row_numbers_launch(out: Tensor, lse: Tensor, grad_lse: Tensor | None, into: RowTensors) -> Launch:
    """Fills `lse` and `delta` out of what `Rows` has: out [B, N, S, V], lse and its gradient [B, N, S]."""
    B, N, S, V = out.shape
    block = 64
    args = (kernel_operand(out), kernel_operand(into.grad_out), lse, grad_lse, into.delta, into.lse, S)
    sizes = {"V_SIZE": V, "V_WIDTH": width_of(V), "BLOCK_M": block}
    return Launch(row_numbers_kernel, (-(-S // block), N, B), args, sizes)


def _in_float32(number: float | None) -> float | None:
    return None if number is None else max(number, torch.finfo(torch.float32).min)


def precision_of(dtype: torch.dtype) -> str:
    """How float32 operands are multiplied: exactly, unless PyTorch's own matmul may use tf32. No matter for halves."""
    return "tf32" if dtype != torch.float32 or torch.backends.cuda.matmul.allow_tf32 else "ieee"


def _columns_at(x: Tensor, positions: Tensor) -> Tensor:
    """Columns of [B|1, Sg] at positions; those of padding are the first or last, which nothing looks at."""
    return x.index_select(1, positions.clamp(0, x.shape[1] - 1))


def _bias_args(bias: Tensor | None) -> BiasArgs:
    if bias is None:
        return BiasArgs(None, None, None, None, None)
    bias = dense(bias)
    steps = [bias.stride(dim) if bias.shape[dim] > 1 else 0 for dim in range(3)]
    if bias.is_floating_point():
        return BiasArgs(bias, None, *steps)
    return BiasArgs(None, bias.view(torch.uint8), *steps)


def _options(config: Config) -> dict[str, int]:
    return {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "num_warps": config.warps,
        "num_stages": config.stages,
    }
