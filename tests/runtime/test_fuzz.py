"""Correctness must not depend on the plan: random modes, sizes and storage train like the local model."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.exactness import _literals_as
from tests.models import bert, gpt2

MODELS = {"gpt2": gpt2, "bert": bert}


def errors_of(kind: str, mesh: tuple[int, ...], seeds: list[int]) -> list[tuple[int, float, float]]:
    """(seed, loss error, worst gradient error relative to the largest) of each random plan, on this rank."""
    import copy

    import torch

    import whalepy
    from tests.fuzz import random_decisions
    from whalepy.runtime import build, planning

    captured = planning.program_for
    kept: dict[str, Any] = {}
    patched = {
        (build, "decide"): None,
        (planning, "program_for"): lambda *a: kept.setdefault("it", captured(*a)) if not kept else kept["it"],
        (planning, "_chosen"): lambda *a: None,  # the plans are random ones
        (planning, "_check_rows"): lambda *a: None,  # random row cuts may leave a rank without rows
        (planning, "notes_of"): lambda *a: (),  # names levels by scopes, of which a random plan has none
    }
    saved = {key: getattr(*key) for key in patched}
    torch.manual_seed(0)
    with _literals_as(torch.float64):
        model, (batch,) = MODELS[kind]()
        model = model.double()
        local = copy.deepcopy(model)
        loss = local(**batch).loss
        loss.backward()
        scale = max(float(p.grad.abs().max()) for p in local.parameters() if p.grad is not None)
        found = []
        try:
            for seed in seeds:
                for (module, name), value in patched.items():
                    setattr(module, name, random_decisions(mesh, seed) if name == "decide" else value)
                parallel = whalepy.compile(model, f"{math.prod(mesh)}xcpu", batch)
                own = parallel.train_step(**parallel.local_batch(batch))
                gradients = parallel.full_gradients()
                worst = max(float((gradients[n] - p.grad).abs().max()) for n, p in local.named_parameters())
                found.append((seed, abs(float(own - loss)), worst / scale))
        finally:
            for (module, name), value in saved.items():
                setattr(module, name, value)
    return found


def check(workers: Any, kind: str, mesh: tuple[int, ...], seeds: range) -> None:
    for found in workers.run(math.prod(mesh), errors_of, kind, mesh, list(seeds), timeout_s=30 + 30 * len(seeds)):
        assert len(found) == len(seeds)
        assert [(seed, loss, worst) for seed, loss, worst in found if loss > 1e-9 or worst > 1e-9] == []


@pytest.mark.parametrize(("kind", "mesh"), [("gpt2", (2,)), ("bert", (3,)), ("gpt2", (2, 2))])
def test_random_plans_train_like_the_local_model(workers: Any, kind: str, mesh: tuple[int, ...]) -> None:
    check(workers, kind, mesh, range(4))


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("mesh", [(2,), (3,), (2, 2)])
def test_many_random_plans_train_like_the_local_model(workers: Any, kind: str, mesh: tuple[int, ...]) -> None:
    check(workers, kind, mesh, range(100, 150))
