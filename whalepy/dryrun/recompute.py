"""Blocks that are run again in the backward pass instead of keeping what they made: none, some operators, or all.

Source: Korthikanti et al., Reducing Activation Recomputation in Large Transformer Models, arXiv:2205.05198, section 5.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from whalepy.dryrun.counting import Counter
from whalepy.rewrite.deferring import Queue, current_queue, deferring

Recompute = Literal["none", "attention", "selective", "full"]
RECOMPUTE: Mapping[str, str] = {
    "none": "everything that the backward pass reads is kept",
    "attention": "attention scores and what is made of them are computed again (Megatron-LM's selective)",
    "selective": "results of products and of fused attention are kept, all else is computed again",
    "full": "the inputs of each block are kept, all else is computed again",
}

_aten = torch.ops.aten
_PRODUCTS = frozenset(
    (_aten.mm, _aten.addmm, _aten.bmm, _aten.baddbmm, _aten.convolution, _aten._scaled_dot_product_efficient_attention)
)


def with_regions(
    module: fx.GraphModule, block_of: Mapping[fx.Node, int], recompute: Recompute, counter: Counter
) -> fx.GraphModule:
    """The graph with every block as one call, which keeps what `recompute` says.

    Before:  a = norm(x); b = linear(a, w); c = add(x, b)
    After:   c = block_0(x, w)
    """
    spans = _spans(module, block_of)
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    nodes = list(module.graph.nodes)
    at = 0
    while at < len(nodes):
        stop = spans.get(at)
        if stop is None:
            made[nodes[at]] = graph.node_copy(nodes[at], made.__getitem__)
            at += 1
            continue
        block = block_of[nodes[at]]
        _outline(graph, made, nodes[at:stop], partial(_Region, block=block, recompute=recompute, counter=counter))
        at = stop
    return fx.GraphModule({}, graph)


def attention_of(block_of: Mapping[fx.Node, int], quadratics: Collection[fx.Node]) -> dict[fx.Node, int]:
    """Of every block only what makes values with one axis twice, such as attention scores, and what reads them."""
    reads = {user for node in quadratics for user in node.users}
    return {node: block for node, block in block_of.items() if node in quadratics or node in reads}


def _spans(module: fx.GraphModule, block_of: Mapping[fx.Node, int]) -> dict[int, int]:
    """Where each block starts and ends; blocks that interleave with others are left as they are."""
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for k, node in enumerate(module.graph.nodes):
        block = block_of.get(node, -1)
        if block >= 0:
            first.setdefault(block, k)
            last[block] = k + 1
    spans = {first[block]: last[block] for block in first}
    starts = sorted(spans)
    return {a: spans[a] for k, a in enumerate(starts) if k + 1 == len(starts) or spans[a] <= starts[k + 1]}


def _outline(
    graph: fx.Graph,
    made: dict[fx.Node, fx.Node],
    nodes: list[fx.Node],
    region_of: Callable[[fx.GraphModule], Callable[..., Any]],
) -> None:
    inside = set(nodes)
    given = dict.fromkeys(n for node in nodes for n in node.all_input_nodes if n not in inside)
    wanted = [node for node in nodes if any(user not in inside for user in node.users)]
    inner = fx.Graph()
    own = {node: inner.placeholder(node.name) for node in given}
    for node in nodes:
        own[node] = inner.node_copy(node, own.__getitem__)
    inner.output(tuple(own[node] for node in wanted))
    call = graph.call_function(region_of(fx.GraphModule({}, inner)), tuple(made[node] for node in given))
    for k, node in enumerate(wanted):
        made[node] = graph.call_function(_getitem, (call, k))


def _getitem(values: Any, k: int) -> Any:
    return values[k]


@dataclass(frozen=True, eq=False)
class _Region:
    """A block that is run again in the backward pass."""

    graph: fx.GraphModule
    block: int
    recompute: Recompute
    counter: Counter

    @property
    def __name__(self) -> str:
        return "region"

    def __call__(self, *args: Any) -> Any:
        contexts: dict[str, Any] = {}
        if self.recompute == "selective":
            contexts["context_fn"] = partial(
                create_selective_checkpoint_contexts, self._policy, allow_cache_entry_mutation=True
            )
        return checkpoint(
            self._run,
            current_queue(),
            *args,
            use_reentrant=False,
            preserve_rng_state=False,
            determinism_check="none",
            **contexts,
        )

    def _run(self, queue: Queue | None, *args: Any) -> Any:
        """Also run again in the backward pass, as the forward pass was: with weight gradients that wait, or without."""
        self.counter._backward_block = self.block  # of functions that autograd made without saying
        with self.counter.again(exchanges=self.recompute != "selective"), deferring(queue):
            return self.graph(*args)

    def _policy(self, context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        keeps = operator._overloadpacket in _PRODUCTS and not self.counter.quadratic
        return CheckpointPolicy.MUST_SAVE if keeps else CheckpointPolicy.PREFER_RECOMPUTE
