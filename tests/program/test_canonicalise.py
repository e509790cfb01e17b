from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from whalepy.program.call import Call, operator_name
from whalepy.program.canonicalise import canonicalise
from whalepy.program.capture import capture


class Applied(nn.Module):
    """A weight, and a loss of it and the inputs."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(6, 8, dtype=torch.float64) * 0.8 + 0.1)
        self.function = function

    def forward(self, zero: Tensor, *inputs: Tensor) -> Tensor:
        return self.function(self.weight, *inputs) + zero.sum()


ZERO = torch.zeros(1, dtype=torch.float64)


def canonical(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[fx.GraphModule, Tensor, Tensor]:
    """The canonical graph, its result, and the result of the function; gradients agree."""
    torch.manual_seed(0)
    model = Applied(function)
    inputs = (ZERO, *inputs)
    captured = capture(model, inputs, batch_dim=None)
    module = canonicalise(captured.graph)
    values = [p.value if p.leaf is None else inputs[p.leaf] for p in captured.placeholders]
    expected = model(*inputs)
    found = module(*values)
    found = found[0] if isinstance(found, tuple | list) else found
    (gradient,) = torch.autograd.grad(found, model.weight)
    (wanted,) = torch.autograd.grad(expected, model.weight)
    torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-14, equal_nan=True)
    return module, found, expected


def names(module: fx.GraphModule) -> list[str]:
    return [operator_name(node.target) for node in module.graph.nodes if node.op == "call_function"]


TARGET = torch.tensor([1, 7, -100, 5, 0, 3])
CLASS_WEIGHT = torch.rand(8, dtype=torch.float64) + 0.5
# loss of (weights as logits or predictions) -> operators that must be gone in their averaging form
MEANS = [
    lambda w: F.cross_entropy(w, TARGET),
    lambda w: F.cross_entropy(w, TARGET, weight=CLASS_WEIGHT),
    lambda w: F.cross_entropy(w, TARGET, label_smoothing=0.2),
    lambda w: F.cross_entropy(w, TARGET, weight=CLASS_WEIGHT, label_smoothing=0.2),
    lambda w: F.cross_entropy(w, TARGET.clamp(min=0), ignore_index=7),
    lambda w: F.cross_entropy(w.float(), TARGET).double(),
    lambda w: F.cross_entropy(
        w.view(2, 3, 8).transpose(1, 2), TARGET.view(2, 3).clamp(min=0)
    ),  # a dim after the classes
    lambda w: F.cross_entropy(w, w.detach().softmax(1)),  # probabilities as targets
    lambda w: F.nll_loss(w.log_softmax(1), TARGET),
    lambda w: F.nll_loss(w.log_softmax(1), TARGET, weight=CLASS_WEIGHT),
    lambda w: F.mse_loss(w, w.detach() * 2),
    lambda w: F.mse_loss(w, w.detach() * 2, reduction="sum"),
    lambda w: F.smooth_l1_loss(w, w.detach() * 2, beta=0.1),
    lambda w: F.huber_loss(w, w.detach() * 2, delta=0.1),
    lambda w: F.l1_loss(w, w.detach() * 2),
    lambda w: F.binary_cross_entropy(w, w.detach(), weight=CLASS_WEIGHT),
    lambda w: F.binary_cross_entropy_with_logits(w, w.detach(), pos_weight=CLASS_WEIGHT),
    lambda w: F.kl_div(w.log_softmax(1), w.detach(), log_target=False),
    lambda w: F.kl_div(w.log_softmax(1), w.detach(), reduction="batchmean"),
    lambda w: F.soft_margin_loss(w, w.detach().sign()),
    lambda w: F.poisson_nll_loss(w, w.detach()),
    lambda w: F.margin_ranking_loss(w, w.detach() * 2, w.detach().sign(), margin=0.1),
    lambda w: F.hinge_embedding_loss(w, w.detach().sign()),
    lambda w: F.triplet_margin_loss(w, w.detach() * 2, w.detach() + 1),
    lambda w: F.cosine_embedding_loss(w, w.detach() + 1, TARGET.sign()),
    lambda w: F.multi_margin_loss(w, TARGET.clamp(min=0), weight=CLASS_WEIGHT),
    lambda w: F.multilabel_margin_loss(w, TARGET.clamp(min=-1)[:, None].expand(-1, 8).contiguous()),
]


@pytest.mark.parametrize("loss", MEANS)
def test_means_of_losses_are_taken_apart_exactly(loss: Callable[[Tensor], Tensor]) -> None:
    module, found, expected = canonical(loss)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    averaged = [n for n in module.graph.nodes if n.op == "call_function" and Call(n)["reduction"] == 1]
    # Probabilities keep their mean: no rule shards them, so nothing is gained.
    assert not averaged or Call(averaged[0])["target"].meta["val"].is_floating_point()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_all_targets_ignored_is_the_same_as_in_torch(reduction: str) -> None:
    ignored = torch.full((6,), -100)
    _, found, expected = canonical(lambda w: F.cross_entropy(w, ignored, reduction=reduction))
    torch.testing.assert_close(found, expected, equal_nan=True)


BAGS = torch.tensor([[0, 5, 5], [1, 2, 3]])
# what is read in bags -> whether a table and rows of indices remain
IN_BAGS = [
    (lambda w: F.embedding_bag(BAGS, w, mode="sum"), True),
    (lambda w: F.embedding_bag(BAGS, w), True),
    (lambda w: F.embedding_bag(BAGS, w, mode="max"), False),
    (lambda w: F.embedding_bag(BAGS, w, padding_idx=5), False),
    (lambda w: F.embedding_bag(BAGS, w, mode="sum", per_sample_weights=BAGS.double()), False),
    (lambda w: F.embedding_bag(BAGS, w, scale_grad_by_freq=True), False),  # by the frequency over all rows
    (lambda w: F.embedding_bag(BAGS.flatten(), w, torch.tensor([0, 2])), False),
    (lambda w: F.embedding_bag(BAGS.reshape(-1), w, torch.arange(0, 6, 2)), False),  # other bags than the rows
    (lambda w: F.embedding_bag(BAGS.reshape(-1), w, torch.arange(0, 5, 3)), False),
]


@pytest.mark.parametrize(("read", "expected"), IN_BAGS)
def test_bags_of_one_length_lose_their_offsets(read: Callable[[Tensor], Tensor], expected: bool) -> None:
    module, found, whole = canonical(lambda w: (read(w) * w[:1]).sum())
    torch.testing.assert_close(found, whole, rtol=1e-12, atol=0)
    assert ("whalepy.program.functional_ops.bags" in names(module)) == expected
    assert ("aten.embedding_bag" in names(module)) != expected


def test_slices_that_tile_a_dim_are_one_split() -> None:
    def fused(w: Tensor) -> Tensor:
        q, k, v = w[..., :4], w[..., 4:6], w[..., 6:]
        return (q[..., :2] * k * v).sum()

    module, found, expected = canonical(fused)
    torch.testing.assert_close(found, expected)
    (split,) = [n for n in module.graph.nodes if operator_name(n.target) == "aten.split_with_sizes"]
    assert split.args[1:] == ([4, 2, 2], 1)
    assert names(module).count("aten.slice") == 1  # q[..., :2] alone tiles nothing


# slices -> how many stay
SLICES = [
    (lambda w: w[:, :4].sum() + 2 * w[:, 3:].sum(), 2),  # they overlap
    (lambda w: w[:, :4].sum() + 2 * w[:, 5:].sum(), 2),  # a gap
    (lambda w: w[:, ::2].sum() + 2 * w[:, 1::2].sum(), 2),  # strided
    (lambda w: w[:, :4].sum() + 2 * w[:, 4:].sum() + w[:, :4].prod(), 0),  # one twice
    (lambda w: w[:3].sum() + 2 * w[:, 4:].sum() + w[3:].prod(), 1),  # two dims
    (lambda w: w[:, :-3].sum() + 2 * w[:, -3:].sum(), 0),  # from the end
    (lambda w: w[:, :].sum() + w[:, :100].prod(), 0),  # the whole dim is no slice
]


@pytest.mark.parametrize(("function", "left"), SLICES)
def test_other_slices_stay(function: Callable[[Tensor], Tensor], left: int) -> None:
    module, found, expected = canonical(function)
    torch.testing.assert_close(found, expected)
    assert names(module).count("aten.slice") == left


def test_the_shape_and_the_type_of_another_tensor_become_arguments() -> None:
    x = torch.rand(4, 12)
    module, found, expected = canonical(
        lambda w, x: (w.view_as(x) * w.reshape_as(x)).type_as(x).sum() + w[0, 0].expand_as(x).sum(), x
    )
    torch.testing.assert_close(found, expected)
    assert not {"aten.view_as", "aten.reshape_as", "aten.type_as", "aten.expand_as"} & set(names(module))


# copies -> the operator that makes them
COPIES = [
    (lambda w, n: w[:1].repeat(n, 1), "aten.expand"),
    (lambda w, n: w[0].repeat(n, 1), "aten.expand"),
    (lambda w, n: w[:1].repeat(2, n, 1).view(2 * n, 8)[:n], "aten.expand"),
    (lambda w, n: w[:, :1].tile(8), "aten.expand"),
    (lambda w, n: w[:2].repeat(n, 1)[:6], "aten.expand"),
    (lambda w, n: w[:1, :4].repeat(n // 3, n, 2)[0, :, :], "aten.repeat"),
    (lambda w, n: w[:1, :4].repeat(2, n, n // 3)[1], "aten.expand"),
    (lambda w, n: w[:3].repeat(2, 1), "aten.repeat"),
    (lambda w, n: w[:1, :4].repeat(n, 2), "aten.repeat"),
    (lambda w, n: w[:1].repeat_interleave(n, 0), "aten.repeat_interleave"),
]


@pytest.mark.parametrize(("copies", "expected"), COPIES)
def test_copies_of_one_are_an_expansion(copies: Callable[[Tensor, int], Tensor], expected: str) -> None:
    x = torch.rand(6, 8, dtype=torch.float64)
    module, found, whole = canonical(lambda w, x: (w * (copies(w, x.shape[0]) + x)).sum(), x)
    torch.testing.assert_close(found, whole, rtol=1e-12, atol=0)
    made = {"aten.expand", "aten.repeat", "aten.tile", "aten.repeat_interleave"} & set(names(module))
    assert made == {expected}


# a number added -> the operators that are left
SHIFTED = [
    (lambda w: 0.0 + (w + 0).prod(), {"aten.prod"}),
    (lambda w: (w - 0.0).prod(), {"aten.prod"}),
    (lambda w: 1 - w.prod(), {"aten.prod", "aten.full", "aten.sub"}),
    (lambda w: torch.add(w.prod(), 2, alpha=3), {"aten.prod", "aten.full", "aten.add"}),
    (lambda w: w.prod() - 2.5, {"aten.prod", "aten.full", "aten.sub"}),
    (lambda w: torch.rsub(w.prod(), 2, alpha=3), {"aten.prod", "aten.full", "aten.sub"}),
    (lambda w: (w + 1).prod(), {"aten.prod", "aten.add"}),
    (lambda w: (0 - w).prod(), {"aten.prod", "aten.rsub"}),
    (lambda w: torch.sub(2.0, w).prod(), {"aten.prod", "aten.rsub"}),
    (lambda w: torch.add(2.0, w).prod(), {"aten.prod", "aten.add"}),
    (lambda w: torch.sub(2.0, w.prod()), {"aten.prod", "aten.full", "aten.sub"}),
    (lambda w: torch.add(0.3, w, alpha=0.7).prod(), {"aten.prod", "aten.full", "aten.add"}),
    (
        lambda w: w.prod().detach().long() + 0.5 + w.prod(),
        {"aten.prod", "aten.detach", "aten.to", "aten.add", "aten.full"},
    ),
]


@pytest.mark.parametrize(("function", "left"), SHIFTED)
def test_a_number_beside_a_scalar_is_a_term_of_its_own(function: Callable[[Tensor], Tensor], left: set[str]) -> None:
    module, found, expected = canonical(lambda w: function(w).reshape(()))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    own = {"aten.sum", "aten.reshape"}
    assert set(names(module)) - own - {"aten.add"} == left - {"aten.add"}


def test_an_empty_operand_of_cat_goes() -> None:
    module, found, expected = canonical(lambda w: torch.cat([torch.empty(0, dtype=w.dtype), w, w * 2], 1).prod())
    torch.testing.assert_close(found, expected)
    (cat,) = [n for n in module.graph.nodes if operator_name(n.target) == "aten.cat"]
    assert len(cat.args[0]) == 2


# creating operator -> the operator that reads no other tensor
CREATED = [
    (lambda w, n: w.new_zeros(n, 8), "aten.zeros"),
    (lambda w, n: w.new_ones((n, 8), dtype=torch.float32), "aten.ones"),
    (lambda w, n: w.new_full((n, 8), 2.5), "aten.full"),
    (lambda w, n: w.long().new_full((n, 8), 3), "aten.full"),
    (lambda w, n: w.new_empty(n, 8).fill_(4.0), "aten.empty"),
]


@pytest.mark.parametrize(("create", "expected"), CREATED)
def test_what_is_created_like_another_tensor_does_not_read_it(
    create: Callable[[Tensor, int], Tensor], expected: str
) -> None:
    x = torch.rand(6, 8, dtype=torch.float64)
    module, found, whole = canonical(lambda w, x: (w * (create(w, x.shape[0]) + x)).sum(), x)
    torch.testing.assert_close(found, whole)
    (created,) = [n for n in module.graph.nodes if operator_name(n.target) == expected]
    assert Call(created).operands == ()
    assert not any(name.startswith("aten.new_") for name in names(module))
