"""Entering and leaving scopes, away from any capture."""

import asyncio
import copy
import pickle
import subprocess
import sys
import threading
from dataclasses import FrozenInstanceError

import pytest
import torch

from whalepy.errors import AnnotationError
from whalepy.primitives import cluster, open_chain, replicate, split, stage


def test_chains_are_kept_outermost_first() -> None:
    around, outer, inner = cluster("all"), replicate(2), split(4)
    with around, outer:
        with inner as entered:
            assert entered is inner
            assert open_chain() == (around, outer, inner)
        assert open_chain() == (around, outer)
    assert open_chain() == ()


def test_an_exception_restores_the_chain() -> None:
    outer = replicate(2)
    with outer:
        with pytest.raises(ZeroDivisionError), split(2):
            _ = 1 / 0
        assert open_chain() == (outer,)
    assert open_chain() == ()


def test_an_object_inside_itself_is_one_scope() -> None:
    outer, inner = replicate(2), split(2)
    with outer, inner, outer:
        assert open_chain() == (outer, inner)
    assert open_chain() == ()


def test_illegal_nesting_is_refused_on_entering() -> None:
    with split(4) as outer:
        inner = replicate(2)
        with pytest.raises(AnnotationError) as refused, inner:
            pass
        assert open_chain() == (outer,)
    assert str(refused.value) == (
        f"replicate cannot stand inside split ({outer.at})\n"
        f"  at:  {inner.at}\n"
        "  fix: inside split only plain operators may appear"
    )
    line = test_illegal_nesting_is_refused_on_entering.__code__.co_firstlineno
    assert (outer.at, inner.at) == (f"test_scope.py:{line + 1}", f"test_scope.py:{line + 2}")


def test_leaving_out_of_order_is_an_error() -> None:
    outer, inner = replicate(2), split(4)
    outer.__enter__()
    inner.__enter__()
    with pytest.raises(AnnotationError) as refused:
        outer.__exit__(None, None, None)
    assert str(refused.value) == (
        f"replicate(2) is left while split(4) ({inner.at}) inside it is open\n"
        f"  at:  {outer.at}\n"
        "  fix: leave scopes in the reverse order of entering them"
    )
    inner.__exit__(None, None, None)
    outer.__exit__(None, None, None)
    with pytest.raises(AnnotationError, match=r"^replicate\(2\) is left while it is not open"):
        outer.__exit__(None, None, None)


def test_threads_do_not_see_each_others_scopes() -> None:
    seen: list[object] = []
    with replicate(2):
        thread = threading.Thread(target=lambda: seen.append(open_chain()))
        thread.start()
        thread.join()
    assert seen == [()]


def test_tasks_do_not_see_each_others_scopes() -> None:
    async def task(scope) -> object:
        with scope:
            await asyncio.sleep(0)
            return open_chain()

    async def both() -> list[object]:
        return list(await asyncio.gather(task(first), task(second)))

    first, second = replicate(2), split(2)
    assert asyncio.run(both()) == [(first,), (second,)]


def test_eager_code_leaves_torchs_annotations_alone() -> None:
    # They are a plain global: two threads that train eagerly would corrupt it for each other.
    with replicate(2):
        assert "custom" not in torch.fx.traceback.get_current_meta()


def test_a_primitive_is_frozen_and_equal_to_itself_only() -> None:
    primitive = replicate(2)
    with pytest.raises(FrozenInstanceError):
        primitive.degree = 3
    assert primitive != replicate(2)
    assert len({replicate(2).id, replicate(2).id, primitive.id}) == 3


def test_copies_are_the_same_scope_and_pickles_say_the_same() -> None:
    primitive = split(shares=(3, 1), on="head.weight:0")
    assert copy.deepcopy([primitive])[0] is primitive
    assert copy.copy(primitive) is primitive
    loaded = pickle.loads(pickle.dumps(primitive))
    assert (repr(loaded), loaded.at, type(loaded)) == (repr(primitive), primitive.at, split)
    twice = pickle.loads(pickle.dumps([primitive, primitive]))
    assert twice[0] is twice[1]


def test_torch_is_imported_only_on_entering() -> None:
    code = """
import sys, whalepy.primitives as primitives
primitives.replicate(2), primitives.cluster([[0, 1]])
before = "torch" in sys.modules
with primitives.stage():
    pass
print(before, "torch" in sys.modules)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "False True\n"


def test_the_line_is_the_users_also_from_exec() -> None:
    scope: dict[str, object] = {"stage": stage}
    exec(compile("\n\nmade = stage()", "/models/model.py", "exec"), scope)
    assert scope["made"].at == "model.py:3"
