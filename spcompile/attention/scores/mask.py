"""Which keys a query may see, as a small typed value instead of a dense [S, T] tensor.

B batch, S query rows, T keys. Positions are indices into the global sequence in its natural order.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, fields, replace
from enum import Enum
from typing import TYPE_CHECKING

import torch

from spcompile.diagnostics import IllegalOption

if TYPE_CHECKING:
    from torch import Tensor


class Kind(Enum):
    """What a mask leaves of one block of scores."""

    EMPTY = "empty"  # nothing
    FULL = "full"  # everything
    CAUSAL_DIAGONAL = "causal diagonal"  # row i sees keys j <= i, counted inside the block
    PARTIAL = "partial"  # anything else


EXCLUDES = -9e3  # a number below this in the place of a score, or added, excludes its key: -1e4 has long been in use
WITHOUT_KEYS = -1  # the document id of rows that the other conditions leave no key, under a mask with a fill
_NUMBERS = dict.fromkeys(
    ("rounded_by", "fill"), r"-?\d+(\.\d+)?(e[+-]\d+)?"
)  # how those that are no integers are written


@dataclass(frozen=True)
class AttentionMask:
    """The conjunction of all conditions that are set, for a query at position q and a key at position k.

    causal: k <= q + offset.
    prefix: relaxes causal: keys k < prefix are visible to all queries.
    window: q - k < window.
    window_right: k - q < window_right.
    chunk: q // chunk == k // chunk.
    documents: the query's and the key's document id are equal.
    key_padding: the key is valid.
    rounded_by: no condition. A large number that was added to all scores. What counts in the weights is what the sum
        has left of them, (score + rounded_by) - rounded_by, if anything; gradients are those of the scores.
    fill: a large number that was added to scores instead of excluding keys. Rows with the document WITHOUT_KEYS see all
        keys, whatever the other conditions say; their scores are rounded by it. Other ids are not negative then.

    `str(mask)` and `AttentionMask.parse` are inverse to each other; the text is an argument of the spx ops.

    Raises:
        IllegalOption: a size that is not positive, offset or prefix without causal, or a fill without documents, which
            say for which rows it is, or with key_padding, for invalid keys are of another document then.
    """

    causal: bool = False
    offset: int = 0
    window: int | None = None
    window_right: int | None = None
    chunk: int | None = None
    prefix: int | None = None
    documents: bool = False
    key_padding: bool = False
    rounded_by: float | None = None
    fill: float | None = None

    def __post_init__(self) -> None:
        if not self.causal and (self.offset != 0 or self.prefix is not None):
            raise IllegalOption("an attention mask with offset or prefix but not causal", legal="causal=True with them")
        if self.fill is not None and (not self.documents or self.key_padding or self.rounded_by is not None):
            raise IllegalOption("an attention mask with a fill", legal="documents, but no key_padding or rounded_by")
        for name in ("window", "window_right", "chunk", "prefix"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise IllegalOption(f"an attention mask with {name}={size}", legal="a positive int or None")

    def __str__(self) -> str:
        words = []
        for field in fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                words.append(field.name if value is True else f"{field.name}={value}")
        return " ".join(words) or "full"

    @staticmethod
    @functools.lru_cache(maxsize=256)
    def parse(text: str) -> AttentionMask:
        """The mask that `str` wrote as `text`.

        Raises:
            IllegalOption: a text that no mask has.
        """
        legal = {field.name: field.default for field in fields(AttentionMask)}
        values: dict[str, float | bool] = {}
        for word in text.split() if text != "full" else []:
            name, equals, value = word.partition("=")
            is_flag = isinstance(legal.get(name), bool)
            number = _NUMBERS.get(name, "" if is_flag else r"-?\d+")
            if name not in legal or name in values or is_flag == bool(equals) or not re.fullmatch(number, value):
                raise IllegalOption(
                    f"attention mask {text!r}: {word!r}", legal=f"'full' or words of {', '.join(legal)}"
                )
            values[name] = True if is_flag else float(value) if name in _NUMBERS else int(value)
        if not values and text != "full":
            raise IllegalOption(f"attention mask {text!r}", legal=f"'full' or words of {', '.join(legal)}")
        return AttentionMask(**values)  # type: ignore[arg-type]

    @property
    def needs_data(self) -> bool:
        """Whether positions alone do not decide it."""
        return self.documents or self.key_padding

    def allowed(
        self,
        q_positions: Tensor,
        k_positions: Tensor,
        q_documents: Tensor | None = None,
        k_documents: Tensor | None = None,
        key_valid: Tensor | None = None,
    ) -> Tensor:
        """The dense mask: bool [B|1, 1, S, T], True where the query sees the key.

        q_positions [S], k_positions [T], q_documents [B|1, S], k_documents and key_valid [B|1, T].
        """
        q, k = q_positions[:, None], k_positions[None, :]
        keep = (q == q) & (k == k)
        if self.causal:
            seen = k <= q + self.offset
            keep = keep & (seen if self.prefix is None else seen | (k < self.prefix))
        if self.window is not None:
            keep = keep & (q - k < self.window)
        if self.window_right is not None:
            keep = keep & (k - q < self.window_right)
        if self.chunk is not None:
            keep = keep & (q // self.chunk == k // self.chunk)
        keep = keep[None, None]
        if self.documents:
            assert q_documents is not None
            assert k_documents is not None
            keep = keep & (q_documents[:, None, :, None] == k_documents[:, None, None, :])
            if self.fill is not None:
                keep = keep | (q_documents == WITHOUT_KEYS)[:, None, :, None]
        if self.key_padding:
            assert key_valid is not None
            keep = keep & key_valid[:, None, None, :]
        return keep

    @property
    def usual(self) -> AttentionMask:
        """What the mask is in most rows: those that some key is left."""
        return replace(self, fill=None)

    def reach(self, q_first: int, q_last: int) -> tuple[int, int | None]:
        """No query at q_first..q_last sees a key outside of positions (first, last); last is None where unbounded."""
        if self.fill is not None:
            return 0, None
        first = 0
        lasts = []
        if self.causal:
            lasts.append(max(q_last + self.offset, (self.prefix or 0) - 1))
        if self.window is not None:
            first = max(first, q_first - self.window + 1)
        if self.window_right is not None:
            lasts.append(q_last + self.window_right - 1)
        if self.chunk is not None:
            first = max(first, q_first // self.chunk * self.chunk)
            lasts.append((q_last // self.chunk + 1) * self.chunk - 1)
        return first, min(lasts) if lasts else None

    def reach_of_each(self, q_positions: Tensor, k_length: int) -> tuple[Tensor, Tensor]:
        """`reach` of every query alone: the first and the last of keys 0 .. k_length - 1 that it may see.

        Of the shape of q_positions; first > last where there is none. Every key between passes what positions decide.
        A fill is left aside.
        """
        first, last = torch.zeros_like(q_positions), torch.full_like(q_positions, k_length - 1)
        if self.causal:
            last = torch.minimum(last, (q_positions + self.offset).clamp(min=(self.prefix or 0) - 1))
        if self.window is not None:
            first = (q_positions - self.window + 1).clamp(min=0)
        if self.window_right is not None:
            last = torch.minimum(last, q_positions + self.window_right - 1)
        if self.chunk is not None:
            chunk = q_positions // self.chunk * self.chunk
            first, last = torch.maximum(first, chunk), torch.minimum(last, chunk + self.chunk - 1)
        return first, last

    def classify(self, q_first: int, q_last: int, k_first: int, k_last: int) -> Kind:
        """What the mask leaves of queries q_first..q_last against keys k_first..k_last (all inclusive, consecutive)."""
        first, last = self.reach(q_first, q_last)
        if k_last < first or (last is not None and k_first > last):
            return Kind.EMPTY
        window_fits = self.window is None or q_last - k_first < self.window
        if self.needs_data or not window_fits:
            return Kind.PARTIAL
        if self.chunk is not None and not q_first // self.chunk == q_last // self.chunk == k_first // self.chunk == (
            k_last // self.chunk
        ):
            return Kind.PARTIAL
        furthest_ahead = k_last - q_first
        in_prefix = self.prefix is not None and k_last < self.prefix
        right_fits = self.window_right is None or furthest_ahead < self.window_right
        if (not self.causal or in_prefix or furthest_ahead <= self.offset) and right_fits:
            return Kind.FULL
        right_fits = self.window_right is None or self.offset < self.window_right
        outside_prefix = self.prefix is None or k_first >= self.prefix
        if self.causal and k_first == q_first + self.offset and right_fits and outside_prefix:
            return Kind.CAUSAL_DIAGONAL
        return Kind.PARTIAL
