"""Primitives as decorators."""

import inspect

import pytest
import torch
from torch import Tensor, nn

from whalepy.errors import AnnotationError
from whalepy.primitives import open_chain, replicate, split


def test_functions_and_methods() -> None:
    scope = replicate(2)

    @scope
    def function(x: int, *, y: int = 1) -> object:
        """Documented."""
        return x, y, open_chain()

    class Model:
        @scope
        def method(self, x: int) -> object:
            return self, x, open_chain()

        @scope
        @staticmethod
        def static(x: int) -> object:
            return x, open_chain()

        @classmethod
        @scope
        def made_by(cls, x: int) -> object:
            return cls, x, open_chain()

        @scope
        @classmethod
        def also_made_by(cls, x: int) -> object:
            return cls, x, open_chain()

    model = Model()
    assert function(3, y=4) == (3, 4, (scope,))
    assert model.method(3) == (model, 3, (scope,))
    assert model.static(3) == (3, (scope,))
    assert model.made_by(3) == (Model, 3, (scope,))
    assert model.also_made_by(3) == (Model, 3, (scope,))
    assert (function.__name__, function.__doc__) == ("function", "Documented.")
    assert str(inspect.signature(function)) == "(x: int, *, y: int = 1) -> object"
    assert open_chain() == ()


def test_recursion_is_one_scope() -> None:
    scope = split(2)

    @scope
    def depth(n: int) -> object:
        return depth(n - 1) if n else open_chain()

    assert depth(3) == (scope,)


@replicate(2)
class Block(nn.Module):
    def forward(self, x: Tensor, scale: float = 1.0) -> object:
        return open_chain()


class Loud(Block):
    def forward(self, x: Tensor, scale: float = 2.0) -> object:
        return super().forward(x, scale)


def test_module_classes_stay_the_same_class() -> None:
    block = Block()
    (scope,) = block(torch.ones(1))
    assert repr(scope) == "replicate(2)"
    assert Block()(torch.ones(1)) == (scope,)  # a decorator is one object: one scope over all instances
    assert Loud()(torch.ones(1)) == (scope,)
    assert (Block.__name__, isinstance(block, nn.Module)) == ("Block", True)
    assert str(inspect.signature(block.forward)) == "(x: torch.Tensor, scale: float = 1.0) -> object"


def test_a_class_may_inherit_its_forward() -> None:
    scope = split(2)

    @scope
    class Head(nn.Linear):
        pass

    assert Head.forward is not nn.Linear.forward
    assert Head(2, 2)(torch.ones(1, 2)).shape == (1, 2)


def rows():
    yield 1


async def step() -> None: ...


class Bare(nn.Module): ...


REFUSED = [
    (nn.Identity(), "a Identity that is already made", 'write whalepy.annotate(model, {"": split(2)})'),
    (dict, "the class dict", "decorate an nn.Module class or a function"),
    (Bare, "Bare: it has no forward", "decorate a class that defines forward"),
    (3, "3", "decorate a function, a method or an nn.Module class"),
    (rows, "rows: its body runs after the call", "open split(2) inside rows"),
    (step, "step: its body runs after the call", "open split(2) inside step"),
]


@pytest.mark.parametrize(("target", "named", "fix"), REFUSED, ids=[named for _, named, _ in REFUSED])
def test_what_cannot_be_decorated(target, named: str, fix: str) -> None:
    scope = split(2)
    with pytest.raises(AnnotationError) as refused:
        scope(target)
    assert str(refused.value) == f"split cannot decorate {named}\n  at:  {scope.at}\n  fix: {fix}"
