"""Dead code of pure graphs: everything that no output needs."""

from __future__ import annotations

from torch import fx


def drop_unused(graph: fx.Graph) -> None:
    """Remove every call whose result nothing reads; also random ones, which torch would keep."""
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
