"""What is told of a code besides its one line: why it comes, an example, and what to do."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

PRELUDE = '''\
import torch
import torch.nn.functional as F
from torch import nn

import spcompile


class Block(nn.Module):
    """Causal attention of four heads, and an MLP."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def heads(self, x):
        return self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)

    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def forward(self, x):
        x = x + self.out(self.attend(*self.heads(x)).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(x)))


model, x = Block(), torch.randn(2, 16, 32)
'''


@dataclass(frozen=True)
class CodeText:
    """Of one code.

    cause, cure: paragraphs of markdown. example: Python that follows PRELUDE and ends in the error, or makes a plan
    with the remark; where `runs` is False, the text that a user sees: what needs several processes shows no other way.
    """

    cause: str
    example: str
    cure: str
    runs: bool = True

    def markdown(self) -> str:
        """The three, under the heading of a code."""
        fence = "```python" if self.runs else "```text"
        example = textwrap.dedent(self.example).strip()
        cause, cure = (" ".join(text.split()) for text in (self.cause, self.cure))
        return f"**Cause.** {cause}\n\n{fence}\n{example}\n```\n\n**Cure.** {cure}\n"
