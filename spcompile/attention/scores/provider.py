"""What a kernel must offer to compute attention: one block of scores, forward and backward.

B batch, N query heads, G key heads, S query rows, T keys of the block; Sg, Tg all queries and keys of the sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol

import torch

from spcompile.attention.scores.mask import WITHOUT_KEYS, AttentionMask, Kind
from spcompile.diagnostics import IllegalOption

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from spcompile.attention.scores.dropout import Dropout
    from spcompile.attention.scores.runs import Run


@dataclass(frozen=True, eq=False)
class Scores:
    """What happens to q k^T on the way to the weights, in this order.

        s = scale * q k^T;  s = softcap * tanh(s / softcap);  s = s + bias + slope * (k - q), masked;
        w = exp(s) / (exp(sink) + sum over keys of exp(s));  w = w * dropout

    Under a mask with `rounded_by`, s is (s + rounded_by) - rounded_by in the third line; its gradient is that of s. So
    it is with `fill`, in rows without keys.
    softcap: 0 for none. alibi_slopes [N], without gradient: multiply the distance of key and query positions.
    sinks [N]: a logit for each head that takes its share of every row; providers ignore it, see `blocks`.
    q_documents [B|1, Sg], k_documents [B|1, Tg], key_valid bool [B|1, Tg]: in the natural order of the sequence.
    bias [B|1, N|1, S|1, Tg]: added if floating, kept where True if bool; rows as q's rows, columns in natural order.
    tables: what spx::tile_tables found of the mask, for kernels that read it; it says nothing that the mask does not.

    Raises:
        IllegalOption: the mask speaks of documents or key padding that were not given, or the other way round, a
            negative softcap, rounded scores or a fill beside sinks, or ids of another dtype than int32 with a fill.
    """

    mask: AttentionMask
    scale: float
    q_documents: Tensor | None = None
    k_documents: Tensor | None = None
    key_valid: Tensor | None = None
    bias: Tensor | None = None
    softcap: float = 0.0
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    dropout: Dropout | None = None
    tables: Tensor | None = None

    def __post_init__(self) -> None:
        if self.softcap < 0:
            raise IllegalOption(f"softcap={self.softcap}", legal="a positive number, or 0 for none")
        for name, given in (("documents", self.q_documents), ("documents", self.k_documents)):
            if (given is not None) != self.mask.documents:
                raise IllegalOption(
                    f"mask {str(self.mask)!r}", legal=f"{name!r} with both document tensors, or neither"
                )
        if (self.mask.rounded_by, self.mask.fill) != (None, None) and self.sinks is not None:
            raise IllegalOption(f"mask {str(self.mask)!r}", legal="'rounded_by' or 'fill' without sinks")
        ids = self.q_documents
        if self.mask.fill is not None and ids is not None and ids.dtype != torch.int32:
            raise IllegalOption(f"mask {str(self.mask)!r} with documents {ids.dtype}", legal="torch.int32 with a fill")
        if (self.key_valid is not None) != self.mask.key_padding:
            raise IllegalOption(f"mask {str(self.mask)!r}", legal="'key_padding' with key_valid, or neither")

    def without_idle_conditions(self) -> Scores:
        """The same scores, without a condition on documents or key padding that holds for all pairs, or an unused fill.

        Positions with one document, and padding masks without padding, are what most callers pass; few have rows
        without keys. Only on the CPU, where reading a few numbers waits for nothing.
        """
        q, k, valid = self.q_documents, self.k_documents, self.key_valid
        one_document = q is not None and k is not None and q.device.type == "cpu" and _are_one(q, k)
        no_padding = valid is not None and valid.device.type == "cpu" and bool(valid.all())
        no_fill = self.mask.fill is not None and q is not None and q.device.type == "cpu" and not _has_open_rows(q)
        if not one_document and not no_padding and not no_fill:
            return self
        mask = replace(
            self.mask,
            documents=self.mask.documents and not one_document,
            key_padding=self.mask.key_padding and not no_padding,
            fill=None if no_fill else self.mask.fill,
        )
        return replace(
            self,
            mask=mask,
            q_documents=None if one_document else q,
            k_documents=None if one_document else k,
            key_valid=None if no_padding else valid,
        )

    @property
    def share_no_document(self) -> bool:
        """Whether no query has the document of any key, as far as may be known: on the CPU only, as above."""
        q, k = self.q_documents, self.k_documents
        if q is None or k is None or q.device.type != "cpu" or self.mask.fill is not None:
            return False
        return not bool(torch.isin(q, k.unique()).any())

    @property
    def depends_on_place(self) -> bool:
        """Whether more than the mask depends on where in the sequence a query and a key are."""
        return any(x is not None for x in (self.bias, self.alibi_slopes, self.dropout))


def _has_open_rows(q_documents: Tensor) -> bool:
    return bool((q_documents == WITHOUT_KEYS).any())


def _are_one(q_documents: Tensor, k_documents: Tensor) -> bool:
    """Whether every row of queries and of keys is of one document, the same."""
    first = k_documents[:, :1]
    return k_documents.numel() > 0 and bool((k_documents == first).all()) and bool((q_documents == first).all())


class Rounding(NamedTuple):
    """A large number that was added to scores, and the rows of which: bool [B|1, 1, S, 1], None for all."""

    number: float
    rows: Tensor | None


@dataclass(frozen=True, eq=False)
class Block:
    """Scores of the query rows `q` against the keys `k`.

    CAUSAL_DIAGONAL compares indices inside the block. For FULL and CAUSAL_DIAGONAL the positions of q and k are
    those indices, and nothing else that depends on positions is left: a kernel may look at `kind`, scale and softcap.
    """

    kind: Kind
    q: Run
    k: Run
    scores: Scores

    def keep(self, q: Run, k: Run, device: torch.device) -> Tensor | None:
        """The dense mask bool [B|1, N|1, S, T] of some rows and keys of the block; None if nothing is masked."""
        scores = self.scores
        keep = None
        if scores.mask != AttentionMask():
            keep = scores.mask.allowed(
                q.positions(device),
                k.positions(device),
                None if scores.q_documents is None else q.select(scores.q_documents, 1),
                None if scores.k_documents is None else k.select(scores.k_documents, 1),
                None if scores.key_valid is None else k.select(scores.key_valid, 1),
            )
        if scores.bias is not None and not scores.bias.is_floating_point():
            dense = self._bias(q, k)
            keep = dense if keep is None else keep & dense
        return keep

    def bias(self, q: Run, k: Run) -> Tensor | None:
        """What is added to the scores, [B|1, N|1, S|1, T], of some rows and keys of the block: bias and ALiBi."""
        bias, slopes = self.scores.bias, self.scores.alibi_slopes
        added = self._bias(q, k) if bias is not None and bias.is_floating_point() else None
        if slopes is None:
            return added
        distance = k.positions(slopes.device) - q.positions(slopes.device)[:, None]
        wide = torch.promote_types(slopes.dtype, torch.float32)
        alibi = (slopes.to(wide)[:, None, None] * distance)[None]
        return alibi if added is None else added + alibi

    def rounding(self, q: Run) -> Rounding | None:
        """By what scores of some rows of the block are rounded, if at all."""
        mask, documents = self.scores.mask, self.scores.q_documents
        if mask.rounded_by is not None:
            return Rounding(mask.rounded_by, None)
        if mask.fill is None:
            return None
        assert documents is not None
        return Rounding(mask.fill, (q.select(documents, 1) == WITHOUT_KEYS)[:, None, :, None])

    def dropout(self, q: Run, k: Run, dtype: torch.dtype) -> Tensor | None:
        """What the weights [B|1, N, S, T] of some rows and keys of the block are multiplied with."""
        dropout = self.scores.dropout
        if dropout is None:
            return None
        return dropout.factors(q.positions(dropout.seed.device), k.positions(dropout.seed.device), dtype)

    def _bias(self, q: Run, k: Run) -> Tensor:
        bias = self.scores.bias
        assert bias is not None
        return k.select(bias if bias.shape[2] == 1 else bias.narrow(2, q.start, q.length), 3)


@dataclass(frozen=True, eq=False)
class Rows:
    """Query rows in the backward, with what the forward left of them: all over the whole sequence of keys.

    q [B, N, S, H], out and grad_out [B, N, S, V], lse and its gradient grad_lse [B, N, S].
    """

    q: Tensor
    out: Tensor
    grad_out: Tensor
    lse: Tensor
    grad_lse: Tensor | None

    @cached_property
    def delta(self) -> Tensor:
        """What a score's gradient has too much: rowsum(out * grad_out) - grad_lse [B, N, S], accumulation dtype."""
        dtype = self.lse.dtype
        delta = (self.out.to(dtype) * self.grad_out.to(dtype)).sum(-1)
        return delta if self.grad_lse is None else delta - self.grad_lse

    def narrow(self, start: int, length: int) -> Rows:
        """Rows start .. start + length - 1."""
        q, out, grad_out, lse = (x.narrow(2, start, length) for x in (self.q, self.out, self.grad_out, self.lse))
        return Rows(q, out, grad_out, lse, None if self.grad_lse is None else self.grad_lse.narrow(2, start, length))


class Gradients(NamedTuple):
    """What one block adds to the gradients: [B, N, S, H], [B, G, T, H], [B, G, T, V]."""

    q: Tensor
    k: Tensor
    v: Tensor


class Provider(Protocol):
    """A kernel. It keeps no state, and its choice may depend only on what is equal on all ranks.

    q, k, v and the rows are those of the block. `dtype` is the dtype of the results: q's own where the block is all
    there is, else the accumulation dtype, in which case no intermediate result may be rounded to less.
    """

    name: str

    def supports(self, q: Tensor, k: Tensor, v: Tensor, block: Block) -> bool:
        """Whether this kernel computes such a block."""

    def block_forward(self, q: Tensor, k: Tensor, v: Tensor, block: Block, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(out, lse): out in `dtype`, lse in the accumulation dtype; 0 and -inf for rows without a key."""

    def block_backward(
        self, rows: Rows, k: Tensor, v: Tensor, block: Block, dtype: torch.dtype, grad_bias: Tensor | None
    ) -> Gradients:
        """The block's gradients in `dtype`. grad_bias, of the bias's own shape, is added to in place."""


class ForwardHops(Protocol):
    """Query rows that see the keys of one hop after another, in the order of the calls."""

    def add(
        self, k: Tensor, v: Tensor, q_runs: Sequence[Run], k_runs: Sequence[Run], last: bool, part: int = 0
    ) -> None:
        """Let the rows see one hop's keys. part: which of the parts of all keys these are, to `Scores.tables`."""

    def result(self) -> tuple[Tensor, Tensor]:
        """After the last hop: (out in q's dtype, lse in the accumulation dtype), the sinks' share included."""


class BackwardHops(Protocol):
    """The gradients of query rows, and of each hop's keys."""

    def add(
        self, k: Tensor, v: Tensor, q_runs: Sequence[Run], k_runs: Sequence[Run], last: bool, part: int = 0
    ) -> tuple[Tensor, Tensor]:
        """One hop's (dk, dv) in the accumulation dtype. part: as in the forward."""

    def result(self) -> tuple[Tensor, Tensor | None]:
        """After the last hop: dq in q's dtype; the bias's gradient in the accumulation dtype, None if not wanted."""


class HopProvider(Protocol):
    """A kernel that takes all blocks of a hop at once and carries its own state, never rounded, from hop to hop."""

    name: ClassVar[str]

    def supports_hops(self, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> bool:
        """Whether this kernel computes such hops; the answer is the same on all ranks and for all hops."""

    def start_forward(self, q: Tensor, v: Tensor, scores: Scores) -> ForwardHops:
        """Before the first key; v is that of any hop."""

    def start_backward(self, rows: Rows, v: Tensor, scores: Scores, wants_grad_bias: bool) -> BackwardHops:
        """Before the first key; v is that of any hop."""

    def backward(
        self,
        rows: Rows,
        k: Tensor,
        v: Tensor,
        q_runs: Sequence[Run],
        k_runs: Sequence[Run],
        scores: Scores,
        wants_grad_bias: bool,
        part: int = 0,
    ) -> tuple[Gradients, Tensor | None]:
        """The only hop's gradients, in the inputs' dtypes; the bias's in the accumulation dtype."""
