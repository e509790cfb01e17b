"""Chains of scopes on really captured nodes, and no effect on torch.compile."""

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from whalepy.primitives import (
    Primitive,
    annotate,
    cluster,
    recorded_chain,
    recording,
    replicate,
    scope_by_id,
    split,
    stage,
)


class Wrapped(nn.Module):
    """Any function as a module."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Tensor:
        return self.function(*args)


def captured(model: nn.Module, *args: Tensor) -> torch.fx.GraphModule:
    free = (tuple({0: Dim.AUTO} for _ in args),)  # a free batch captures twice: the ids must be those of the last time
    dims = free if isinstance(model, Wrapped) else free[0]
    with recording():
        program = torch.export.export(model, args, dynamic_shapes=dims, strict=False)
    return program.module(check_guards=False)


def scopes(model: nn.Module, *args: Tensor) -> str:
    """One line per captured operator: its name and its chain."""
    nodes = captured(model, *args).graph.nodes
    called = [node for node in nodes if node.op == "call_function"]
    return "\n".join(f"{node.target.__name__.partition('.')[0]} {recorded_chain(node)}" for node in called)


def golden(text: str) -> str:
    return "\n".join(line.strip() for line in text.strip().splitlines())


X = torch.ones(2, 3)


def test_context_managers() -> None:
    def run(x: Tensor) -> Tensor:
        x = x.sin()
        with cluster(), replicate(2):
            x = x.cos()
            with split(shares=(3, 1)):
                x = x.tanh()
            x = x.exp()
        return x.neg()

    assert scopes(Wrapped(run), X) == golden("""
        sin ()
        cos (cluster('auto'), replicate(2))
        tanh (cluster('auto'), replicate(2), split(2, shares=(3, 1)))
        exp (cluster('auto'), replicate(2))
        neg ()
    """)


def test_a_scope_written_in_a_loop_is_a_scope_each_time() -> None:
    def run(x: Tensor) -> Tensor:
        for _ in range(3):
            with stage():
                x = x.sin()
        return x

    nodes = captured(Wrapped(run), X).graph.nodes
    chains = [recorded_chain(node) for node in nodes if node.op == "call_function"]
    assert [repr(chain) for chain in chains] == ["(stage(),)"] * 3
    assert len(set(chains)) == 3
    assert {chain[0].at for chain in chains} == {f"test_recording.py:{run.__code__.co_firstlineno + 2}"}
    (node,) = [node for node in nodes if node.target is torch.ops.aten.sin.default][-1:]
    assert node.meta["custom"]["whalepy"] == (chains[-1][0].id,)  # plain ints, safe to copy and to compare
    assert scope_by_id(chains[-1][0].id) is chains[-1][0]


def test_decorators() -> None:
    scope = split(2)

    @scope
    def function(x: Tensor) -> Tensor:
        return x.cos()

    @replicate(2)
    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return function(x.sin()).tanh()

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, x: Tensor) -> Tensor:
            return self.method(self.inner(x).exp())

        @scope
        def method(self, x: Tensor) -> Tensor:
            return x.neg()

    assert scopes(Outer(), X) == golden("""
        sin (replicate(2),)
        cos (replicate(2), split(2))
        tanh (replicate(2),)
        exp ()
        neg (split(2),)
    """)


def test_an_exception_inside_a_capture_leaves_nothing_behind() -> None:
    def run(x: Tensor) -> Tensor:
        try:
            with replicate(2), split(2):
                raise ValueError
        except ValueError:
            return x.sin()

    assert scopes(Wrapped(run), X) == "sin ()"
    assert "custom" not in torch.fx.traceback.get_current_meta()


def test_scopes_around_a_capture_count() -> None:
    def run(x: Tensor) -> Tensor:
        x = x.sin()
        with split(2):
            return x.cos()

    with replicate(4):
        text = scopes(Wrapped(run), X)
    assert text == "sin (replicate(4),)\ncos (replicate(4), split(2))"


def test_no_grad_regions_keep_their_scopes() -> None:
    def run(x: Tensor) -> Tensor:
        with replicate(2), torch.no_grad():
            return x.sin()

    graphs = [
        module.graph for module in captured(Wrapped(run), X).modules() if isinstance(module, torch.fx.GraphModule)
    ]
    sines = [node for graph in graphs for node in graph.nodes if node.target is torch.ops.aten.sin.default]
    assert [repr(recorded_chain(node)) for node in sines] == ["(replicate(2),)"]


def test_torchs_own_switch_is_enough() -> None:
    with torch.fx.traceback.preserve_node_meta():
        program = torch.export.export(annotate(nn.Sequential(nn.Tanh()), {"0": split(2)}), (X,), strict=False)
    (node,) = [node for node in program.graph.nodes if node.op == "call_function"]
    assert repr(recorded_chain(node)) == "(split(2),)"


def test_an_id_no_capture_has_seen() -> None:
    with pytest.raises(KeyError):
        scope_by_id(replicate(2).id)


def compiled_cases() -> list[tuple[str, nn.Module, bool]]:
    made: Primitive = replicate(2)

    @split(2)
    def decorated(x: Tensor) -> Tensor:
        return x.sin()

    def written(x: Tensor) -> Tensor:
        with cluster("all"), replicate(shares=(3, 1)), stage(2):
            x = decorated(x)
            with split(4, on="head.weight:0"):
                return x.cos()

    def entered(x: Tensor) -> Tensor:
        with made:
            return x.sin() + 1

    modules = annotate(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), {"": replicate(2), "0": [stage(), split(2)]})
    return [
        ("decorated", Wrapped(decorated), True),
        ("annotated", modules, True),
        ("written", Wrapped(written), True),
        ("made outside", Wrapped(entered), False),  # torch cannot enter a user's context made outside the graph
    ]


@pytest.mark.parametrize("case", compiled_cases(), ids=lambda case: case[0])
def test_scopes_do_not_disturb_torch_compile(case: tuple[str, nn.Module, bool]) -> None:
    _, model, whole = case
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=whole)
    torch.testing.assert_close(compiled(X), model(X))
