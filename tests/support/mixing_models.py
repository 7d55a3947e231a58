"""Small models whose rows meet in other ways than by attention, or beside it: written for memory, one layer or two.

B batch, S sequence, D width, F hidden width, H and W rows and columns of an image.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Built = tuple[nn.Module, tuple[Any, ...]]


class ResponseNorm(nn.Module):
    """Each channel of an image scaled by its norm over all places, beside the mean norm (Woo et al. 2023)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(width))

    def forward(self, x_BHWF: Tensor) -> Tensor:
        norm_B11F = torch.linalg.vector_norm(x_BHWF, dim=(1, 2), keepdim=True)
        return self.scale * (x_BHWF * (norm_B11F / (norm_B11F.mean(-1, keepdim=True) + 1e-6))) + x_BHWF


class ImageBlock(nn.Module):
    """A convolution of each channel, then an MLP over channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.around = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm = nn.LayerNorm(width)
        self.inner, self.response = nn.Linear(width, 4 * width), ResponseNorm(4 * width)
        self.outer = nn.Linear(4 * width, width)

    def forward(self, x_BDHW: Tensor) -> Tensor:
        h_BHWD = self.norm(self.around(x_BDHW).permute(0, 2, 3, 1))
        y_BHWD = self.outer(self.response(F.gelu(self.inner(h_BHWD))))
        return x_BDHW + y_BHWD.permute(0, 3, 1, 2)


class Image(nn.Module):
    """One block, fewer places, and the largest place of each channel."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 2, 2)
        self.blocks = nn.Sequential(ImageBlock(width), nn.Conv2d(width, width, 2, 2))
        self.head = nn.Linear(width, 5)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.head(self.blocks(self.patches(x_BCHW)).amax((2, 3)))


def image() -> Built:
    return Image(), (torch.randn(2, 3, 32, 16),)


def attend(q_BSD: Tensor, k_BSD: Tensor, v_BSD: Tensor, heads: int = 4) -> Tensor:
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q_BSD, k_BSD, v_BSD))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width))


class Stream(nn.Module):
    """One of the streams that meet in an attention: its own norms, projections and MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.given = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.taken, self.mlp = nn.Linear(width, width), mlp(width)

    def project(self, x_BSD: Tensor) -> list[Tensor]:
        h_BSD = self.norm(x_BSD)
        return [projection(h_BSD) for projection in self.given]

    def forward(self, x_BSD: Tensor, seen_BSD: Tensor) -> Tensor:
        x_BSD = x_BSD + self.taken(seen_BSD)
        return x_BSD + self.mlp(self.second(x_BSD))


class TwoStreams(nn.Module):
    """Text and image, each with weights of its own, in one attention (Esser et al. 2024)."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.ends = nn.ModuleList((nn.Linear(5, width), nn.Linear(6, width)))
        self.streams = nn.ModuleList((Stream(width), Stream(width)))

    def forward(self, text_BTC: Tensor, image_BSC: Tensor) -> tuple[Tensor, ...]:
        parts = [end(x) for end, x in zip(self.ends, (text_BTC, image_BSC), strict=True)]
        projected = [stream.project(x) for stream, x in zip(self.streams, parts, strict=True)]
        seen = attend(*(torch.cat(both, 1) for both in zip(*projected, strict=True)))
        seen = seen.split([text_BTC.shape[1], image_BSC.shape[1]], dim=1)
        return tuple(stream(x, y) for stream, x, y in zip(self.streams, parts, seen, strict=True))


class OneProjection(nn.Module):
    """Text and image, each with norms of its own, put together in front of projections and the MLP."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.ends = nn.ModuleList((nn.Linear(5, width), nn.Linear(6, width)))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(4))
        self.given = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.taken, self.mlp = nn.Linear(width, width), mlp(width)

    def forward(self, text_BTC: Tensor, image_BSC: Tensor) -> tuple[Tensor, ...]:
        T = text_BTC.shape[1]
        parts = [end(x) for end, x in zip(self.ends, (text_BTC, image_BSC), strict=True)]
        h_BSD = torch.cat([norm(x) for norm, x in zip(self.norms[:2], parts, strict=True)], 1)
        seen_BSD = self.taken(attend(*(projection(h_BSD) for projection in self.given)))
        parts = [parts[0] + seen_BSD[:, :T], parts[1] + seen_BSD[:, T:]]
        h_BSD = self.mlp(torch.cat([norm(x) for norm, x in zip(self.norms[2:], parts, strict=True)], 1))
        return parts[0] + h_BSD[:, :T], parts[1] + h_BSD[:, T:]


class StateSpace(nn.Module):
    """A selective scan behind a short convolution, step by step (Gu and Dao 2023). N: state of each channel."""

    def __init__(self, width: int, hidden: int, state: int = 2, rank: int = 2) -> None:
        super().__init__()
        self.sizes = [rank, state, state]
        self.norm, self.given, self.taken = nn.LayerNorm(width), nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)
        self.around = nn.Conv1d(hidden, hidden, 3, groups=hidden, padding=2)
        self.selects, self.times = nn.Linear(hidden, sum(self.sizes), bias=False), nn.Linear(rank, hidden)
        self.decay, self.skip = nn.Parameter(torch.randn(hidden, state)), nn.Parameter(torch.randn(hidden))

    def forward(self, x_BSD: Tensor) -> Tensor:
        u_BFS, gate_BFS = self.given(self.norm(x_BSD)).transpose(1, 2).chunk(2, dim=1)
        u_BFS = F.silu(self.around(u_BFS)[..., : x_BSD.shape[1]])
        time_BSR, in_BSN, out_BSN = self.selects(u_BFS.transpose(1, 2)).split(self.sizes, dim=-1)
        step_BSF = F.softplus(self.times(time_BSR))
        keep_BSFN = torch.exp(-step_BSF[..., None] * self.decay.exp())
        new_BSFN = (step_BSF * u_BFS.transpose(1, 2))[..., None] * in_BSN[:, :, None]
        state_BFN, seen = torch.zeros_like(new_BSFN[:, 0]), []
        for at in range(x_BSD.shape[1]):
            state_BFN = keep_BSFN[:, at] * state_BFN + new_BSFN[:, at]
            seen.append((state_BFN @ out_BSN[:, at, :, None])[..., 0])
        y_BFS = torch.stack(seen, -1) + self.skip[:, None] * u_BFS
        return x_BSD + self.taken((y_BFS * F.silu(gate_BFS)).transpose(1, 2))


class Heads(nn.Module):
    """A scan of heads that share what goes in and out, all of it from one projection and one convolution, by chunks
    (Dao and Gu 2024). P: width of a head, C: a chunk.
    """

    def __init__(self, width: int, hidden: int, heads: int, state: int = 2, chunk: int = 4) -> None:
        super().__init__()
        self.heads, self.chunk, self.parts = heads, chunk, [hidden, state, state]
        both = hidden + 2 * state
        self.norm = nn.LayerNorm(width)
        self.given, self.taken = nn.Linear(width, hidden + both + heads, bias=False), nn.Linear(hidden, width)
        self.around = nn.Conv1d(both, both, 3, groups=both, padding=2)
        self.decay = nn.Parameter(torch.randn(heads))

    def forward(self, x_BSD: Tensor) -> Tensor:
        B, S, _ = x_BSD.shape
        gate_BSF, both_BSE, step_BSH = self.given(self.norm(x_BSD)).split(
            [self.parts[0], sum(self.parts), self.heads], -1
        )
        both_BSE = F.silu(self.around(both_BSE.transpose(1, 2))[..., :S].transpose(1, 2))
        u_BSF, in_BSN, out_BSN = both_BSE.split(self.parts, dim=-1)
        step_BSH = F.softplus(step_BSH)
        u_BCHP = (u_BSF.view(B, S, self.heads, -1) * step_BSH[..., None]).unflatten(1, (-1, self.chunk))
        in_BCN, out_BCN = (t.unflatten(1, (-1, self.chunk)) for t in (in_BSN, out_BSN))
        rate_BHC = (-step_BSH * self.decay.exp()).unflatten(1, (-1, self.chunk)).permute(0, 3, 1, 2)
        sums_BHC = rate_BHC.cumsum(-1)
        apart = sums_BHC[..., :, None] - sums_BHC[..., None, :]
        inside = apart.masked_fill(torch.ones(self.chunk, self.chunk).triu(1).bool(), float("-inf")).exp()
        seen = torch.einsum("bktn,bksn,bhkts,bkshp->bkthp", out_BCN, in_BCN, inside, u_BCHP)
        left = torch.einsum("bksn,bhks,bkshp->bkhpn", in_BCN, (sums_BHC[..., -1:] - sums_BHC).exp(), u_BCHP)
        state, before = torch.zeros_like(left[:, 0]), []
        for k in range(left.shape[1]):
            before.append(state)
            state = state * sums_BHC[:, :, k, -1].exp()[..., None, None] + left[:, k]
        seen = seen + torch.einsum("bktn,bkhpn,bhkt->bkthp", out_BCN, torch.stack(before, 1), sums_BHC.exp())
        return x_BSD + self.taken(seen.reshape(B, S, -1) * F.silu(gate_BSF))


class MeansSoFar(nn.Module):
    """Each token sees the mean of those up to it (Zhang et al. 2018)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(width), mlp(width)

    def forward(self, x_BSD: Tensor) -> Tensor:
        counts_S = torch.arange(1, x_BSD.shape[1] + 1, dtype=x_BSD.dtype)
        return x_BSD + self.mlp(self.norm(x_BSD).cumsum(1) / counts_S[:, None])


class Mixer(nn.Module):
    """An MLP over tokens, then one over channels (Tolstikhin et al. 2021)."""

    def __init__(self, width: int, length: int) -> None:
        super().__init__()
        self.norms, self.channels = nn.ModuleList(nn.LayerNorm(width) for _ in range(2)), mlp(width)
        self.tokens = nn.Sequential(nn.Linear(length, 2 * length), nn.GELU(), nn.Linear(2 * length, length))

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_BSD = x_BSD + self.tokens(self.norms[0](x_BSD).mT).mT
        return x_BSD + self.channels(self.norms[1](x_BSD))


class LinearAttention(nn.Module):
    """Each token sees running sums of keys times values, beside running sums of keys (Katharopoulos et al. 2020)."""

    def __init__(self, width: int, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.norm, self.taken = heads, nn.LayerNorm(width), nn.Linear(width, width)
        self.given = nn.ModuleList(nn.Linear(width, width) for _ in range(3))

    def forward(self, x_BSD: Tensor) -> Tensor:
        h_BSD = self.norm(x_BSD)
        q, k, v = (projection(h_BSD).unflatten(-1, (self.heads, -1)) for projection in self.given)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        states = torch.einsum("bshd,bshe->bshde", k, v).cumsum(1)
        total = torch.einsum("bshd,bshd->bsh", q, k.cumsum(1))
        seen = torch.einsum("bshd,bshde->bshe", q, states) / total[..., None]
        return x_BSD + self.taken(seen.flatten(2))


class InTurns(nn.Module):
    """An MLP of which every second number gates the one before it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.given, self.taken = nn.Linear(width, 6 * width), nn.Linear(3 * width, width)

    def forward(self, x_BSD: Tensor) -> Tensor:
        h_BSF = self.given(self.norm(x_BSD))
        return x_BSD + self.taken(h_BSF[..., ::2].clamp(max=2) * h_BSF[..., 1::2].sigmoid())


class Features(nn.Module):
    """Attention by positive features of queries and keys, whose sums over all keys are small (Choromanski et al. 2020).
    N: heads, H: width of a head, F: features.
    """

    def __init__(self, width: int, heads: int = 2, features: int = 6) -> None:
        super().__init__()
        self.heads, self.norm, self.taken = heads, nn.LayerNorm(width), nn.Linear(width, width)
        self.given = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.register_buffer("drawn_FH", torch.randn(features, width // heads))

    def positive(self, x_BNSH: Tensor, over: tuple[int, ...]) -> Tensor:
        y_BNSF = torch.einsum("bnsh,fh->bnsf", x_BNSH, self.drawn_FH)
        largest = y_BNSF.amax(over, keepdim=True).detach()
        return torch.exp(y_BNSF - x_BNSH.square().sum(-1, keepdim=True) / 2 - largest) + 1e-4

    def forward(self, x_BSD: Tensor) -> Tensor:
        h_BSD = self.norm(x_BSD)
        q, k, v = (projection(h_BSD).unflatten(-1, (self.heads, -1)).transpose(1, 2) for projection in self.given)
        q, k = self.positive(q, (-1,)), self.positive(k, (-1, -2))
        total = torch.einsum("bnsf,bnf->bns", q, k.sum(-2))
        seen = torch.einsum("bnsf,bnfh->bnsh", q, torch.einsum("bnsf,bnsh->bnfh", k, v)) / total[..., None]
        return x_BSD + self.taken(seen.transpose(1, 2).flatten(2))


class Spectrum(nn.Module):
    """Fourier transforms along width and sequence in the place of attention (Lee-Thorp et al. 2022)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms, self.mlp = nn.ModuleList(nn.LayerNorm(width) for _ in range(2)), mlp(width)

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_BSD = self.norms[0](x_BSD + torch.fft.fftn(x_BSD, dim=(1, 2)).real)
        return self.norms[1](x_BSD + self.mlp(x_BSD))


class Attends(nn.Module):
    """Attention alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.taken = nn.LayerNorm(width), nn.Linear(width, width)
        self.given = nn.ModuleList(nn.Linear(width, width) for _ in range(3))

    def forward(self, x_BSD: Tensor) -> Tensor:
        h_BSD = self.norm(x_BSD)
        return x_BSD + self.taken(attend(*(projection(h_BSD) for projection in self.given)))


class NormOfHeads(nn.Module):
    """Attention of which all heads have one norm, in front of the projection back (Wang et al. 2022)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms, self.taken = nn.ModuleList(nn.LayerNorm(width) for _ in range(2)), nn.Linear(width, width)
        self.given = nn.ModuleList(nn.Linear(width, width) for _ in range(3))

    def forward(self, x_BSD: Tensor) -> Tensor:
        h_BSD = self.norms[0](x_BSD)
        return x_BSD + self.taken(self.norms[1](attend(*(projection(h_BSD) for projection in self.given))))


class ChannelsFirst(nn.Module):
    """Channels in front of places, projected in groups by convolutions of width 1, with norms on the way there and back
    (Iandola et al. 2020).
    """

    def __init__(self, width: int, groups: int = 2) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.given = nn.ModuleList(nn.Conv1d(width, width, 1, groups=groups) for _ in range(3))
        self.taken = nn.Conv1d(width, width, 1)
        self.up, self.down = (
            nn.Conv1d(width, 4 * width, 1, groups=groups),
            nn.Conv1d(4 * width, width, 1, groups=groups),
        )

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_BDS = x_BSD.transpose(1, 2)
        seen_BSD = attend(*(projection(x_BDS).transpose(1, 2) for projection in self.given))
        x_BDS = self.norms[0]((x_BDS + self.taken(seen_BSD.transpose(1, 2))).transpose(1, 2)).transpose(1, 2)
        return self.norms[1]((x_BDS + self.down(F.gelu(self.up(x_BDS)))).transpose(1, 2))


class Averages(nn.Module):
    """An exponential average of all rows before, for each channel, by Fourier transforms (Ma et al. 2023)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.rate = nn.LayerNorm(width), nn.Parameter(torch.randn(width))
        self.taken = nn.Linear(width, width)

    def forward(self, x_BSD: Tensor) -> Tensor:
        h_BSD, length = self.norm(x_BSD), x_BSD.shape[1]
        rate_D = self.rate.sigmoid()
        kernel_SD = rate_D * (1 - rate_D) ** torch.arange(length)[:, None]
        spectrum = torch.fft.rfft(h_BSD, n=2 * length, dim=1) * torch.fft.rfft(kernel_SD, n=2 * length, dim=0)
        seen_BSD = torch.fft.irfft(spectrum, n=2 * length, dim=1)[:, :length]
        return x_BSD + self.taken(F.silu(seen_BSD) * h_BSD)


class Slots(nn.Module):
    """Experts whose slots are means of all tokens, and tokens means of all slots (Puigcerver et al. 2023). E: experts,
    C: slots of each.
    """

    def __init__(self, width: int, experts: int = 4, slots: int = 1) -> None:
        super().__init__()
        self.slots = nn.Parameter(torch.randn(experts, slots, width))
        self.up = nn.Parameter(torch.randn(experts, width, 3 * width) / 4)
        self.down = nn.Parameter(torch.randn(experts, 3 * width, width) / 4)

    def forward(self, x_BSD: Tensor) -> Tensor:
        scores_BSEC = torch.einsum("bsd,ecd->bsec", F.normalize(x_BSD, dim=-1), self.slots)
        given_BECD = torch.einsum("bsd,bsec->becd", x_BSD, scores_BSEC.softmax(1))
        inner_BECF = F.gelu(torch.einsum("becd,edf->becf", given_BECD, self.up))
        made_BECD = torch.einsum("becf,efd->becd", inner_BECF, self.down)
        shares_BSK = scores_BSEC.flatten(2).softmax(-1)
        return x_BSD + shares_BSK @ made_BECD.flatten(1, 2)


class Capacity(nn.Module):
    """Experts with so many places each, given out by running sums (Fedus et al. 2021). E: experts, C: places."""

    def __init__(self, width: int, experts: int = 4, places: int = 8) -> None:
        super().__init__()
        self.places, self.norm, self.router = places, nn.LayerNorm(width), nn.Linear(width, experts)
        self.up = nn.Parameter(torch.randn(experts, width, 3 * width) / 4)
        self.down = nn.Parameter(torch.randn(experts, 3 * width, width) / 4)

    def forward(self, x_BSD: Tensor) -> Tensor:
        h_BSD = self.norm(x_BSD)
        share_BS, expert_BS = self.router(h_BSD).softmax(-1).max(-1)
        chosen_BSE = F.one_hot(expert_BS, self.up.shape[0])
        place_BSE = (chosen_BSE.cumsum(1) - 1) * chosen_BSE
        kept_BSE = chosen_BSE * (place_BSE < self.places)
        at_BSEC = kept_BSE[..., None] * F.one_hot(place_BSE.clamp(max=self.places - 1), self.places)
        given_BSEC = at_BSEC.to(x_BSD.dtype)
        inner_BECF = F.gelu(torch.einsum("becd,edf->becf", torch.einsum("bsec,bsd->becd", given_BSEC, h_BSD), self.up))
        made_BECD = torch.einsum("becf,efd->becd", inner_BECF, self.down)
        return x_BSD + torch.einsum("bsec,becd->bsd", given_BSEC * share_BS[..., None, None], made_BECD)


class Words(nn.Module):
    """Layers between a table of words and a loss of all of them."""

    def __init__(self, *layers: nn.Module, width: int = 8, words: int = 12) -> None:
        super().__init__()
        self.table, self.layers, self.head = nn.Embedding(words, width), nn.Sequential(*layers), nn.Linear(width, words)

    def forward(self, ids_BS: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.layers(self.table(ids_BS))).flatten(0, 1), ids_BS.flatten())


def words(*layers: nn.Module, length: int = 12) -> Built:
    return Words(*layers), (torch.randint(0, 12, (2, length)),)


def text_and_image(kind: type[nn.Module]) -> Built:
    return kind(), (torch.randn(2, 8, 5), torch.randn(2, 24, 6))


KINDS: dict[str, Callable[[], Built]] = {
    "response norm": image,
    "two streams": lambda: text_and_image(TwoStreams),
    "streams, one projection": lambda: text_and_image(OneProjection),
    "gates in turns": lambda: words(Attends(8), InTurns(8)),
    "spectrum": lambda: words(Spectrum(8)),
    "state space": lambda: words(StateSpace(8, 16)),
    "means so far": lambda: words(MeansSoFar(8), length=24),
    "tokens and channels": lambda: words(Mixer(8, 24), length=24),
    "linear attention": lambda: words(LinearAttention(8), length=24),
    "features": lambda: words(Features(8), length=24),
    "capacity": lambda: words(Attends(8), Capacity(8), length=24),
    "norm of all heads": lambda: words(NormOfHeads(8), NormOfHeads(8), length=24),
    "channels first": lambda: words(ChannelsFirst(8), ChannelsFirst(8), length=24),
    "averages": lambda: words(Attends(8), Averages(8), Averages(8), length=24),
    "slots": lambda: words(Attends(8), Slots(8), length=24),
    "heads of a scan": lambda: words(Heads(8, 16, 4), length=24),
}
