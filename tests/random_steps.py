"""The steps that random programs are made of: from values with known sizes to one statement of a model.

A maker gets the builder and `Picks`, numbers it reads choices from; it returns the statement, or None where no value
fits. The same numbers give the same statement, and smaller ones plainer choices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

T = TypeVar("T")
Size = int | None
"""None: a size that follows the number of rows."""


@dataclass
class Picks:
    """Choices read one after another; all that follow the last are 0."""

    numbers: tuple[int, ...]
    read: int = 0

    def below(self, count: int) -> int:
        """A number from 0 to count - 1."""
        number = self.numbers[self.read] if self.read < len(self.numbers) else 0
        self.read += 1
        return number % count

    def one(self, choices: Sequence[T]) -> T:
        """One of some choices."""
        return choices[self.below(len(choices))]


class Builder(Protocol):
    """What makers see of the program so far."""

    def values(self) -> list[str]:
        """Names of values, the newest first."""
        ...

    def sizes(self, name: str) -> tuple[Size, ...]:
        """Sizes of a value."""
        ...

    def module(self, text: str) -> str:
        """The name of a new module of the model, `self.m3`."""
        ...

    def made(self, kind: str) -> list[tuple[str, tuple[int, ...]]]:
        """Earlier modules of a kind, with the sizes that they were made of."""
        ...


Maker = Callable[[Builder, Picks], "str | None"]


def table(text: str) -> list[str]:
    """One entry per line."""
    return [line.strip() for line in text.strip().splitlines()]


def chosen(b: Builder, p: Picks, fits: Callable[[tuple[Size, ...]], object] = bool) -> str | None:
    """A value whose sizes fit, more often a new one."""
    names = [name for name in b.values() if fits(b.sizes(name))]
    return names[p.one([0, 0, 0, 1, 1, 2, 3, 4]) % len(names)] if names else None


def like(b: Builder, p: Picks, name: str) -> str:
    """A value of the same sizes, perhaps the same."""
    same = [other for other in b.values() if b.sizes(other) == b.sizes(name)]
    return p.one(same)


def known_last(sizes: tuple[Size, ...]) -> bool:
    return len(sizes) > 1 and sizes[-1] is not None


# -- modules


def linear(b: Builder, p: Picks) -> str | None:
    v = chosen(b, p, known_last)
    if v is None:
        return None
    width, bias = b.sizes(v)[-1], p.one(["", ", bias=False"])
    return f"out = {b.module(f'nn.Linear({width}, {p.one([4, 2, 3, 6, 8])}{bias})')}({v})"


def shared_linear(b: Builder, p: Picks) -> str | None:
    """A weight used once more: the module again, its weight, or its weight the other way round."""
    found: list[str] = []
    for v in b.values()[:4]:
        for name, (width, out) in b.made("nn.Linear"):
            if known_last(b.sizes(v)) and b.sizes(v)[-1] == width:
                found += [f"out = {name}({v})", f"out = F.linear({v}, {name}.weight)"]
            if known_last(b.sizes(v)) and b.sizes(v)[-1] == out:
                found.append(f"out = {v} @ {name}.weight")
    return p.one(found) if found else None


def norm(b: Builder, p: Picks) -> str | None:
    v = chosen(b, p, known_last)
    if v is None:
        return None
    sizes = b.sizes(v)
    shapes: list[object] = [sizes[-1]]
    if len(sizes) > 2 and sizes[-2] is not None:
        shapes.append((sizes[-2], sizes[-1]))
    kind = p.one(["nn.LayerNorm({})", "nn.RMSNorm({}, eps=1e-3)", "nn.LayerNorm({}, elementwise_affine=False)"])
    return f"out = {b.module(kind.format(p.one(shapes)))}({v})"


def channel_norm(b: Builder, p: Picks) -> str | None:
    v = chosen(b, p, lambda s: 2 <= len(s) <= 4 and s[0] is None and None not in s[1:])
    if v is None:
        return None
    sizes = b.sizes(v)
    channels = sizes[1] or 1
    dims = {2: "1d", 3: "1d", 4: "2d"}[len(sizes)]
    kinds = [f"nn.BatchNorm{dims}({channels}, eps=0.1)", f"nn.BatchNorm{dims}({channels}, eps=0.1, affine=False)"]
    if len(sizes) > 2:
        kinds += [f"nn.GroupNorm({g}, {channels})" for g in (1, 2, 3) if channels % g == 0]
    return f"out = {b.module(p.one(kinds))}({v})"


def convolution(b: Builder, p: Picks) -> str | None:
    v = chosen(b, p, lambda s: len(s) in (3, 4) and s[0] is None and None not in s[1:])
    if v is None:
        return None
    channels, dims = b.sizes(v)[1], len(b.sizes(v)) - 2
    groups = p.one([g for g in (1, 2, 3) if (channels or 1) % g == 0])
    out = groups * p.one([2, 1, 3])
    more = p.one(["3, padding=1", "1", "2, stride=2", "2", "3, padding=1, bias=False", "3, padding=2, dilation=2"])
    kind = p.one(["nn.Conv", "nn.Conv", "nn.ConvTranspose"])
    return f"out = {b.module(f'{kind}{dims}d({channels}, {out}, {more}, groups={groups})')}({v})"


def pooling(b: Builder, p: Picks) -> str | None:
    v = chosen(b, p, lambda s: len(s) in (3, 4) and s[0] is None and None not in s[1:])
    if v is None:
        return None
    dims = len(b.sizes(v)) - 2
    return (
        f"out = F.{p.one(['avg_pool{}d({}, 2)', 'max_pool{}d({}, 2)', 'adaptive_avg_pool{}d({}, 2)']).format(dims, v)}"
    )


def embedding(b: Builder, p: Picks) -> str | None:
    width = p.one([4, 2, 6])
    table_of = b.module(f"nn.Embedding(8, {width}{p.one(['', ', padding_idx=0'])})")
    return p.one(
        [
            f"out = {table_of}(ids)",
            f"out = F.one_hot(ids, 8).to(x.dtype) @ {table_of}.weight",
            f"out = {table_of}(ids) + {table_of}.weight[:3]",
            f"out = {table_of}(ids.flip(1))",
            f"out = {table_of}(ids) @ {table_of}.weight.T",
            f"out = {table_of}.weight[ids[:, 0]]",
        ]
    )


def mlp(b: Builder, p: Picks) -> str | None:
    v = chosen(b, p, known_last)
    if v is None:
        return None
    width, hidden = b.sizes(v)[-1], p.one([8, 3, 5])
    up, down = b.module(f"nn.Linear({width}, {hidden})"), b.module(f"nn.Linear({hidden}, {width})")
    return f"out = {v} + {down}(F.{p.one(['gelu', 'silu', 'tanh'])}({up}({v})))"


def attention(b: Builder, p: Picks) -> str | None:
    """Heads, perhaps grouped; projections apart or fused; masks or causal, by sdpa or by hand."""
    v = chosen(b, p, lambda s: len(s) == 3 and s[0] is None and s[1] is not None and s[2] is not None)
    if v is None:
        return None
    _, length, width = b.sizes(v)
    (heads, kv), dh = p.one([(2, 2), (4, 2), (3, 3), (2, 1)]), p.one([2, 1])
    if p.below(2):
        fused = b.module(f"nn.Linear({width}, {(heads + 2 * kv) * dh})")
        parts = f"q, k, w = {fused}({v}).split([{heads * dh}, {kv * dh}, {kv * dh}], -1)"
        if heads == kv:
            parts = p.one([parts, f"q, k, w = {fused}({v}).chunk(3, -1)"])
    else:
        made = [b.module(f"nn.Linear({width}, {n * dh})") for n in (heads, kv, kv)]
        parts = "q, k, w = " + ", ".join(f"{m}({v})" for m in made)
    lines = [parts, f"q = q.unflatten(-1, ({heads}, {dh})).transpose(1, 2)"]
    lines += [f"{n} = {n}.view({v}.shape[0], {length}, {kv}, {dh}).transpose(1, 2)" for n in "kw"]
    if heads != kv and p.below(2):
        lines += [f"{n} = {n}.repeat_interleave({heads // kv}, 1)" for n in "kw"]
        kv = heads
    lines.append(_attended(p, length or 1, grouped=heads != kv))
    lines.append(f"out = {b.module(f'nn.Linear({heads * dh}, {width})')}(out.transpose(1, 2).flatten(2))")
    if p.below(2):
        lines.append(f"out = {v} + out")
    return "\n".join(lines)


def _attended(p: Picks, length: int, *, grouped: bool) -> str:
    ways = ["", ", is_causal=True", f", attn_mask=torch.ones({length}, {length}, dtype=torch.bool).tril()"]
    ways += [", attn_mask=(x.flatten(1)[:, 0] > 0.2)[:, None, None, None].to(x.dtype)"]
    if grouped:
        return f"out = F.scaled_dot_product_attention(q, k, w{p.one(ways)}, enable_gqa=True)"
    by_hand = [
        "out = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ w",
        f"s = (q @ k.mT).masked_fill(torch.ones({length}, {length}, dtype=torch.bool).triu(1), -1e9)"
        "\nout = s.softmax(-1) @ w",
        "out = torch.einsum('bhqk,bhkd->bhqd', torch.einsum('bhqd,bhkd->bhqk', q, k).softmax(-1), w)",
    ]
    return p.one([f"out = F.scaled_dot_product_attention(q, k, w{way})" for way in ways] + by_hand)


# -- one value, any dim


UNARY = table(
    """
    torch.tanh({v})
    F.gelu({v})
    F.leaky_relu({v})
    {v}.sigmoid() * 2
    {v} ** 2
    {v} * 0.7 + 0.1
    -{v}
    {v}.detach() + {v}
    torch.exp(-{v} ** 2)
    {v}.clamp(-0.9, 0.9)
    {v} / {v}.shape[0]
    {v} - {v}.mean()
    {v} / (1 + {v}.abs().amax())
    ({v} > 0.1234).to({v}.dtype) * {v}
    torch.where({v} > 0.1234, {v}, {v} * 0.3)
    {v}.masked_fill({v} < -0.1234, 0.37)
    {v}.flatten(1)
    {v}.flatten(1) @ {v}.flatten(1).T
    {v}.contiguous().clone()
    {v}.reshape(-1)
    {v}.T.tanh() if {v}.ndim == 2 else {v}.mT.tanh()
    ({v}.abs() + 0.1).sqrt()
    """
)
ALONG = table(
    """
    {v}.softmax({d})
    {v}.log_softmax({d})
    {v}.cumsum({d}) * 0.3
    {v}.tanh().cumprod({d})
    {v}.flip({d})
    {v}.roll(1, {d})
    {v}.sort({d}).values
    {v}.sort({d}, descending=True).values * 0.5
    {v}.topk(1, {d}).values
    {v}.gather({d}, {v}.argsort({d}))
    {v}.narrow({d}, 0, 1) + {v}
    torch.cat([{v}, {w}], {d})
    torch.cat([{w}, {v}.tanh(), {v}], {d})
    torch.stack([{v}, {w}], {d})
    {v}.unsqueeze({d})
    {v}.movedim({d}, 0)
    {v}.movedim({d}, -1)
    {v}.transpose({d}, -1)
    {v}.transpose(0, {d}).reshape(-1, {v}.shape[0])
    {v}.repeat_interleave(2, {d})
    torch.cat([{v}, {v}.flip({d})], {d})
    {v}.unflatten({d}, (-1, 2))
    {v}.unflatten({d}, (2, -1))
    {v}.unflatten({d}, (-1, 3))
    {v}.flatten(0, {d})
    {v}.flatten({d})
    {v} - {v}.mean({d}, keepdim=True)
    {v} * {v}.amax({d}, keepdim=True)
    {v} / ({v}.norm(dim={d}, keepdim=True) + 1)
    {v}.index_select({d}, torch.tensor([0, 0]))
    {v}.index_select({d}, torch.arange({v}.shape[{d}]))
    torch.zeros_like({v}).scatter({d}, {v}.argsort({d}), {w})
    torch.zeros_like({v}).scatter_add({d}, {v}.argsort({d}) // 2, {w})
    torch.zeros_like({v}).index_add({d}, torch.arange({v}.shape[{d}]) // 2, {w})
    {v}.index_fill({d}, torch.tensor([0]), 0.25)
    {v} * torch.arange({v}.shape[{d}], dtype={v}.dtype).view([-1 if i == {d} else 1 for i in range({v}.ndim)]) * 0.1
    {v} * F.one_hot({v}.argmax({d}), {v}.shape[{d}]).movedim(-1, {d}).to({v}.dtype)
    torch.where({v}.detach() > {v}.detach().mean({d}, keepdim=True), {v}, {w})
    torch.cat({v}.split(1, {d})[::-1], {d})
    {v}.diff(dim={d})
    {v}.unfold({d}, 2, 1)
    {v}.repeat([2 if i == {d} else 1 for i in range({v}.ndim)])
    F.normalize({v}, dim={d}, eps=0.1)
    {v} + {w}.mean({d}, keepdim=True).expand_as({v})
    {v}.expand([2, *{v}.shape]).movedim(0, {d})
    {v}.median({d}, keepdim=True).values + {v}
    {v}.logcumsumexp({d}) * 0.3
    {v}.argsort({d}).to({v}.dtype) * 0.2 + {v}
    """
)
REDUCED = table(
    """
    {v}.mean({d})
    {v}.sum({d}) * 0.3
    {v}.amax({d})
    {v}.amin({d})
    {v}.max({d}).values
    {v}.logsumexp({d})
    {v}.var({d}, correction=0)
    ({v}.var({d}, correction=0) + 0.1).sqrt()
    {v}.norm(dim={d})
    {v}.norm(p=3, dim={d})
    {v}.tanh().prod({d})
    {v}.select({d}, 0)
    {v}.select({d}, -1)
    {v}.sum({d}) / {v}.shape[{d}]
    ({v} * ({v} > 0.1234)).sum({d}) / ({v} > 0.1234).sum({d}).clamp(min=1)
    {v}.unbind({d})[0]
    {v}.kthvalue(1, {d}).values
    """
)
SLICES = ["1:", ":-1", "::2", "-1:", "1::2", ":1", "[0]", "[0, -1, 0]", "0", "-2:"]


def unary(b: Builder, p: Picks) -> str | None:
    v = chosen(b, p)
    return f"out = {p.one(UNARY).format(v=v)}" if v else None


def _along(entries: list[str], more: str) -> Maker:
    def make(b: Builder, p: Picks) -> str | None:
        v = chosen(b, p, lambda s: len(s) > 0)
        if v is None:
            return None
        rank = len(b.sizes(v))
        # Counted from the end, so that 0 is the last dim and batches are cut off only later.
        d = (rank - 1 - p.below(rank)) - p.one([0, rank])
        return more + p.one(entries).format(v=v, w=like(b, p, v), d=d)

    return make


def sliced(b: Builder, p: Picks) -> str | None:
    v = chosen(b, p)
    if v is None:
        return None
    d = p.below(len(b.sizes(v)))
    return f"out = {v}[{':, ' * d}{p.one(SLICES)}]"


def parted(b: Builder, p: Picks) -> str | None:
    """A value in two parts; both are used."""
    v = chosen(b, p, lambda s: any(size is not None and size > 1 for size in s))
    if v is None:
        return None
    sizes = b.sizes(v)
    d = p.one([i for i in reversed(range(len(sizes))) if (sizes[i] or 0) > 1])
    size = sizes[d] or 0
    even = [f"l, r = {v}.chunk(2, {d})", f"l, r = {v}.split({size // 2}, {d})"] if size % 2 == 0 else []
    text = p.one([*even, f"l, r = {v}.split([{size - 1}, 1], {d})", f"l, r = {v}.tensor_split([1], {d})"])
    ends = ["out = l * r.tanh()"] if size % 2 == 0 and even and "[" not in text else []
    ends += [f"out = l * r.mean({d}, keepdim=True)", f"out = torch.cat([r, l], {d})"]
    return f"{text}\n{p.one(ends)}"


def binary(b: Builder, p: Picks) -> str | None:
    v = chosen(b, p)
    if v is None:
        return None
    w = p.one(b.values())
    forms = ["{v} + {w}", "{v} * {w}.tanh()", "{v} - 0.3 * {w}", "torch.maximum({v}, {w})", "{v} @ {w}.mT"]
    forms += ["{w}.sigmoid() * {v}", "torch.where({w} > 0.1234, {v}, 0.2)", "{v} / (1 + {w} ** 2)", "{v} @ {w}"]
    forms += ["torch.lerp({v}, {w}, 0.4)", "torch.cat([{v}, {w}], 0)", "torch.cat([{v}, {w}], -1)"]
    forms += ["torch.einsum('bi,bj->bij', {v}, {w})", "torch.einsum('...i,...i->...', {v}, {w})"]
    forms += ["torch.einsum('bti,bsi->bts', {v}, {w})", "torch.einsum('bi,ci->bc', {v}, {w})", "{v}.T @ {w}"]
    return f"out = {p.one(forms).format(v=v, w=w)}"


# -- rows chosen by inputs, and sums over whole values


INDEXED = table(
    """
    {v}[torch.arange({v}.shape[0]), ids[:, 0] % {v}.shape[1]]
    {v}[:, ids[0] % {v}.shape[1]]
    {v}.gather(1, (ids % {v}.shape[1]).view(ids.shape[0], 3, *[1] * ({v}.ndim - 2)).expand(-1, -1, *{v}.shape[2:]))
    torch.zeros(8, *{v}.shape[1:], dtype={v}.dtype).index_add(0, ids[:, 0], {v})
    torch.zeros(8, *{v}.shape[1:], dtype={v}.dtype).index_add(0, ids[:, 0], {v})[ids[:, 1]]
    {v} * (ids[:, 0] > 2).view(-1, *[1] * ({v}.ndim - 1))
    {v}.masked_fill((ids[:, 1] > 3).view(-1, *[1] * ({v}.ndim - 1)), 0.0)
    {v}[ids[:, 0].argsort(stable=True)]
    {v}[ids[:, 2] % {v}.shape[0]]
    {v} * (ids[:, 0] != ids[:, 1]).to({v}.dtype).mean()
    {v} + ids.cumsum(1).to({v}.dtype)[:, -1].view(-1, *[1] * ({v}.ndim - 1)) * 0.1
    """
)


def indexed(b: Builder, p: Picks) -> str | None:
    v = chosen(b, p, lambda s: len(s) > 1 and s[0] is None and s[1] is not None)
    return f"out = {p.one(INDEXED).format(v=v)}" if v else None


# -- writes


WRITES = table(
    """
    {t}.add_({w}.tanh())
    {t}.mul_(0.5)
    {t}.tanh_()
    {t}.masked_fill_({w} > 0.1234, 0.1)
    {t}.transpose(0, -1).mul_(0.5)
    {t}[..., 1:] += 0.5 * {w}[..., :-1]
    {t}[:, 1:] += {t}[:, :-1].clone()
    {t}[:, 0] = {w}[:, -1]
    {t}[0] = 0.3
    {t}[1:] = {w}[:-1]
    {t}[..., 0].copy_({w}[..., -1])
    {t}.select(-1, 0).fill_(0.2)
    {t}.flatten()[::2].mul_(0.3)
    {t}[:, ::2].sub_(0.1)
    {t}[{t} > 0.5] = 0.5
    {t}.view(-1)[1:].add_(0.1)
    {t}.copy_({w} * 0.3)
    {t}.mT.add_(1.0)
    {t}.zero_().add_({w})
    {t}.index_add_(0, torch.arange({t}.shape[0]), {w})
    {t}.clamp_(max=0.7)
    {t}[:, [0]] *= 2.0
    {t}[ids[:, 0] % {t}.shape[0]] = 0.4
    {t}.scatter_(-1, {w}.argsort(-1), {w})
    {t}.index_copy_(-1, torch.tensor([0]), {w}[..., -1:])
    """
)


def written(b: Builder, p: Picks) -> str | None:
    """A write into a fresh value; or into one that others view, of which one is read then."""
    v = chosen(b, p)
    if v is None:
        return None
    text = p.one(WRITES)
    if p.below(2):
        return text.format(t=v, w=like(b, p, v)) + f"\nout = {p.one(b.values())} * 1.0"
    return f"out = {v}.clone()\n" + text.format(t="out", w=like(b, p, v))


def buffered(b: Builder, p: Picks) -> str | None:
    """A statistic kept from step to step, and read."""
    v = chosen(b, p)
    if v is None:
        return None
    name = b.module("torch.zeros(())")
    statistic = p.one(["mean()", "sum()", "amax()", "pow(2).mean()"])
    return f"{name}.mul_(0.9).add_(0.1 * {v}.detach().{statistic})\nout = {v} * (1 + 0.1 * {name}.tanh())"


MAKERS: dict[str, Maker] = {
    "linear": linear,
    "unary": unary,
    "along": _along(ALONG, "out = "),
    "reduced": _along(REDUCED, "out = "),
    "sliced": sliced,
    "parted": parted,
    "binary": binary,
    "mlp": mlp,
    "norm": norm,
    "channel norm": channel_norm,
    "convolution": convolution,
    "pooling": pooling,
    "embedding": embedding,
    "attention": attention,
    "shared": shared_linear,
    "indexed": indexed,
    "written": written,
    "buffered": buffered,
}

# -- losses of the last value; `extra` are values that nothing else reads


LOSSES = table(
    """
    F.mse_loss({v}, torch.full_like({v}, 0.3))
    {v}.pow(2).mean()
    {v}.pow(2).sum() / {v}.shape[0]
    {v}.pow(2).mean().sqrt()
    {v}.mean(0).pow(2).sum()
    ({v}.tanh() * ({v} > 0.1234)).sum() / ({v} > 0.1234).sum().clamp(min=1)
    F.cross_entropy(self.head({v}.flatten(1)), labels)
    F.cross_entropy(self.head({v}.flatten(1)), labels, reduction='sum') / (labels != -100).sum().clamp(min=1)
    F.cross_entropy(self.head({v}.flatten(1)), labels, label_smoothing=0.1)
    F.cross_entropy(self.head({v}.flatten(1)), labels, weight=torch.arange(1.0, 6.0, dtype=x.dtype))
    F.cross_entropy(self.head({v}.flatten(1)), labels, reduction='none').sum() / labels.shape[0]
    F.nll_loss(self.head({v}.flatten(1)).log_softmax(-1), labels.clamp(min=0))
    F.cross_entropy({v}.flatten(1) @ {v}.flatten(1).T, torch.arange({v}.shape[0]))
    F.smooth_l1_loss({v}, torch.zeros_like({v})) + {v}.logsumexp(tuple(range({v}.ndim)))
    ({v}.flatten(1).var(1, correction=0) + 0.1).log().mean()
    F.binary_cross_entropy_with_logits({v}, torch.full_like({v}, 0.3))
    (({v} - {v}.detach().mean(0)).abs().mean() + 1).log()
    F.kl_div({v}.log_softmax(-1), torch.full_like({v}, 0.2), reduction='batchmean')
    """
)
