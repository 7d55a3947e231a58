"""Plain models that no rule may know: other argument names, layouts, attention spelled in other ways.

B batch, S sequence, D width, N heads, H head width, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB, WIDTH, HEADS = 40, 24, 4


def generator_of(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def ids(number: int, length: int, batch: int = 2) -> Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=generator_of(number))


class SelfAttention(nn.Module):
    """Bidirectional or causal attention over [B, S, D] with scaled_dot_product_attention."""

    def __init__(self, heads: int = HEADS, causal: bool = True) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal and mask is None)
        return self.out(y.transpose(1, 2).flatten(2))


class SequenceFirst(nn.Module):
    """[S, B, D] inside, attention over [B * N, S, H] written by hand, as old Megatron and fairseq models do."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, stuff: Tensor, goal: Tensor) -> Tensor:
        x = self.embedding(stuff.t())
        s, b, _ = x.shape
        q, k, v = (t.reshape(s, b * HEADS, -1).transpose(0, 1) for t in self.qkv(self.norm(x)).chunk(3, -1))
        scores = torch.bmm(q, k.transpose(1, 2)) / math.sqrt(WIDTH // HEADS)
        scores = scores.masked_fill(torch.ones(s, s, dtype=torch.bool).triu(1), float("-inf"))
        y = torch.bmm(scores.softmax(-1), v).transpose(0, 1).reshape(s, b, WIDTH)
        logits = self.head(x + self.out(y))
        return F.cross_entropy(logits.reshape(-1, VOCAB), goal.t().reshape(-1))


def sequence_first(number: int, *, length: int = 33) -> dict[str, Any]:
    return {"stuff": ids(number, length), "goal": ids(number + 1, length)}


class Einsum(nn.Module):
    """Projections and attention as einsum, with a three-dimensional weight for each of q, k and v."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.position = nn.Parameter(torch.randn(64, WIDTH))
        self.q, self.k, self.v, self.o = (nn.Parameter(torch.randn(WIDTH, HEADS, WIDTH // HEADS) / 5) for _ in range(4))
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, words: Tensor, answers: Tensor) -> Tensor:
        x = self.embedding(words) + self.position[: words.shape[1]]
        q, k, v = (torch.einsum("bsd,dnh->bsnh", x, w) for w in (self.q, self.k, self.v))
        scores = torch.einsum("bqnh,bknh->bnqk", q, k) * (WIDTH // HEADS) ** -0.5
        y = torch.einsum("bnqk,bknh->bqnh", scores.softmax(-1), v)
        x = x + torch.einsum("bsnh,dnh->bsd", y, self.o)
        return F.cross_entropy(self.head(x).flatten(0, 1), answers.flatten())


def einsum(number: int, *, length: int = 33) -> dict[str, Any]:
    return {"words": ids(number, length), "answers": ids(number + 1, length)}


class TwoInputs(nn.Module):
    """Two token sequences of one length are added, with a parameter as positions; its outputs are a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Embedding(VOCAB, WIDTH)
        self.second = nn.Linear(3, WIDTH)
        self.positions = nn.Parameter(torch.randn(1, 33, WIDTH))
        self.attention = SelfAttention()
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, tokens: Tensor, features: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        x = self.first(tokens) + self.second(features) + self.positions
        y = self.head(x + self.attention(x))
        return F.mse_loss(y, wanted), y


def two_inputs(number: int) -> dict[str, Any]:
    generator = generator_of(number)
    features, wanted = torch.randn(2, 33, 3, generator=generator), torch.randn(2, 33, 5, generator=generator)
    return {"tokens": ids(number, 33), "features": features, "wanted": wanted}


def first_output(out: Any, batch: dict[str, Any]) -> Tensor:
    return out[0]


class MeanPooled(nn.Module):
    """A classifier over the mean of the tokens that are no padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.attention = SelfAttention(causal=False)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, text: Tensor, is_real: Tensor, label: Tensor) -> Tensor:
        x = self.embedding(text)
        x = x + self.attention(x, is_real[:, None, None, :])
        weight = is_real.unsqueeze(-1).to(x.dtype)
        pooled = (x * weight).sum(1) / weight.sum(1)
        return F.cross_entropy(self.head(pooled), label)


def mean_pooled(number: int, *, length: int = 33) -> dict[str, Any]:
    is_real = torch.arange(length) < torch.tensor([[length], [length - 20]])
    return {"text": ids(number, length), "is_real": is_real, "label": torch.tensor([2, 0])}


class FirstToken(nn.Module):
    """A classifier over the first token, behind a learned token that is put in front of the sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.attention = SelfAttention(causal=False)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, text: Tensor, label: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(text.shape[0], -1, -1), self.embedding(text)], 1)
        x = x + self.attention(self.norm(x))
        return F.cross_entropy(self.head(x[:, 0]), label)


def first_token(number: int, *, length: int = 32) -> dict[str, Any]:
    return {"text": ids(number, length), "label": torch.tensor([1, 2])}


class RunningSum(nn.Module):
    """A branch that adds the running mean over the sequence; unequal head counts."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList([SelfAttention(4), SelfAttention(6), SelfAttention(3)])
        self.plain = nn.Sequential(nn.Linear(WIDTH, 48), nn.Tanh(), nn.Linear(48, WIDTH))
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, words: Tensor, answers: Tensor) -> Tensor:
        x = self.embedding(words)
        for layer in self.layers:
            x = x + layer(x)
            x = x + self.plain(x)
        x = x + self.running(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), answers.flatten())

    def running(self, x_BSD: Tensor) -> Tensor:
        count = torch.arange(1, x_BSD.shape[1] + 1)
        return x_BSD.cumsum(1) / count[:, None]


class RunningProduct(RunningSum):
    """The same with a running product, which no shard can compute alone."""

    def running(self, x_BSD: Tensor) -> Tensor:
        return x_BSD.tanh().add(1.5).cumprod(1).tanh()


class Reduced(nn.Module):
    """One causal layer whose loss is summed or averaged; a batch's labels say which positions count."""

    def __init__(self, reduction: str) -> None:
        super().__init__()
        self.reduction = reduction
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.attention = SelfAttention()
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, words: Tensor, answers: Tensor) -> Tensor:
        x = self.embedding(words)
        logits = self.head(x + self.attention(x))
        return F.cross_entropy(logits.flatten(0, 1), answers.flatten(), reduction=self.reduction)


def labelled_at(number: int, *, places: tuple[tuple[int, int], ...], length: int, batch: int = 2) -> dict[str, Any]:
    """Only the given (row, position) have labels."""
    answers = torch.full((batch, length), -100)
    for row, position in places:
        answers[row, position] = (row + position) % VOCAB
    return {"words": ids(number, length, batch), "answers": answers}


class Scored(nn.Module):
    """Written-out attention with a softcap, a window, ALiBi in the first layer and learned sinks in the second."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))
        self.sinks = nn.Parameter(torch.linspace(-1, 2, HEADS))
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, stuff: Tensor, goal: Tensor) -> Tensor:
        x = self.embedding(stuff)
        at = torch.arange(stuff.shape[1])
        distance = at - at[:, None]
        for number, layer in enumerate(self.qkv):
            q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in layer(x).chunk(3, -1))
            scores = q @ k.mT / math.sqrt(WIDTH // HEADS)
            if number == 0:
                slopes = 2.0 ** -torch.arange(1, HEADS + 1, dtype=x.dtype)
                scores = (scores + slopes[:, None, None] * distance).masked_fill(distance > 0, -math.inf)
                y = scores.softmax(-1) @ v
            else:
                scores = (3 * torch.tanh(scores / 3)).masked_fill((distance > 0) | (distance <= -6), -math.inf)
                sinks = self.sinks.view(1, -1, 1, 1).expand(x.shape[0], -1, x.shape[1], 1)
                y = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1] @ v
            x = x + y.transpose(1, 2).flatten(2)
        return F.cross_entropy(self.head(x).flatten(0, 1), goal.flatten())


class Translator(nn.Module):
    """An encoder over one length, a decoder over another that reads it by cross-attention with a padding mask."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.encode, self.decode = SelfAttention(causal=False), SelfAttention()
        self.q, self.kv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, source: Tensor, lengths: Tensor, target: Tensor) -> Tensor:
        keep = (torch.arange(source.shape[1]) < lengths[:, None])[:, None, None, :]
        memory = self.embedding(source)
        memory = memory + self.encode(memory, keep)
        x = self.embedding(target)
        x = x + self.decode(x)
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (self.q(x), *self.kv(memory).chunk(2, -1)))
        scores = (q @ k.mT / math.sqrt(WIDTH // HEADS)).masked_fill(~keep, torch.finfo(x.dtype).min)
        y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return F.cross_entropy(self.head(x + y)[:, :-1].flatten(0, 1), target[:, 1:].flatten())


def translated(number: int) -> dict[str, Any]:
    return {"source": ids(number, 11), "lengths": torch.tensor([11, 4]), "target": ids(number + 100, 16)}


class TalkingHeads(nn.Module):
    """Causal attention whose scores are mixed across heads before the softmax: no kernel knows it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.mix = nn.Parameter(torch.eye(HEADS) + 0.1)
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, stuff: Tensor, goal: Tensor) -> Tensor:
        x = self.embedding(stuff)
        at = torch.arange(stuff.shape[1])
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        scores = torch.einsum("nm,bmst->bnst", self.mix, q @ k.mT / math.sqrt(WIDTH // HEADS))
        y = scores.masked_fill(at > at[:, None], -math.inf).softmax(-1) @ v
        return F.cross_entropy(self.head(x + y.transpose(1, 2).flatten(2)).flatten(0, 1), goal.flatten())


class Encoder(nn.Module):
    """torch's own layers under a causal mask that the caller makes, kept in a buffer or made anew."""

    def __init__(self, in_buffer: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, VOCAB)
        self.mask = nn.Buffer(nn.Transformer.generate_square_subsequent_mask(32)) if in_buffer else None

    def forward(self, stuff: Tensor, goal: Tensor) -> Tensor:
        length = stuff.shape[1]
        made = nn.Transformer.generate_square_subsequent_mask(length)
        y = self.layers(self.embedding(stuff), mask=made if self.mask is None else self.mask[:length, :length])
        return F.cross_entropy(self.head(y).flatten(0, 1), goal.flatten())


class ByHand(nn.Module):
    """Nothing of torch.nn: products by einsum with dots, softmax and loss of exp and sum, rotations from buffers."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"table": (VOCAB, WIDTH), "q": (WIDTH, WIDTH), "k": (WIDTH, WIDTH), "v": (WIDTH, WIDTH)}
        sizes |= {"o": (WIDTH, WIDTH), "up": (2 * WIDTH, WIDTH), "down": (WIDTH, 2 * WIDTH), "head": (VOCAB, WIDTH)}
        self.weights = nn.ParameterDict({name: torch.randn(size) / math.sqrt(WIDTH) for name, size in sizes.items()})
        angle = torch.arange(64)[:, None] * 0.1 ** torch.arange(0, WIDTH // HEADS // 2)
        self.cos, self.sin = nn.Buffer(angle.cos(), persistent=False), nn.Buffer(angle.sin(), persistent=False)
        self.mask = nn.Buffer(torch.tril(torch.ones(1, 1, 64, 64)), persistent=False)

    def rotated(self, x: Tensor, at: Tensor) -> Tensor:
        cos, sin, even, odd = self.cos[at], self.sin[at], x[..., ::2], x[..., 1::2]
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)

    def forward(self, stuff: Tensor, goal: Tensor) -> Tensor:
        length, w = stuff.shape[1], self.weights
        x = w["table"][stuff]
        q, k, v = (torch.einsum("...i,oi->...o", x, w[n]).unflatten(-1, (HEADS, -1)).transpose(1, 2) for n in "qkv")
        at = torch.arange(length)
        scores = torch.einsum("...sd,...td->...st", self.rotated(q, at), self.rotated(k, at)) / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(self.mask[:, :, :length, :length] == 0, -math.inf)
        weights = torch.exp(scores - scores.max(-1, keepdim=True)[0])
        y = torch.einsum("...st,...td->...sd", weights / weights.sum(-1, keepdim=True), v)
        x = x + torch.einsum("...i,oi->...o", y.transpose(1, 2).flatten(-2), w["o"])
        x = x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
        x = x + torch.relu(x @ w["up"].T) @ w["down"].T
        logits = x @ w["head"].T
        logits = logits - logits.max(-1, keepdim=True)[0]
        return (torch.log(torch.exp(logits).sum(-1)) - logits.gather(-1, goal.unsqueeze(-1)).squeeze(-1)).mean()
