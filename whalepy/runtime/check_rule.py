"""Whether a sharding rule is true: split, run, recombine, compare with the whole operator, gradients included."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from whalepy.errors import WhaleError
from whalepy.planner.levels import STACKABLE
from whalepy.program.call import Call, results
from whalepy.program.layout import Mode, Sharded
from whalepy.program.options import Option
from whalepy.program.rule_table import rule_of
from whalepy.program.rules import NEVER, Rule
from whalepy.program.user_rules import USER_RULES, find_operator
from whalepy.rewrite.bindings import Reducer, Stream
from whalepy.runtime.one_operator import SIZES, OneOperator, Parts, Trial, gradients_of, one_operator

SHARES: tuple[tuple[float, ...], ...] = ((3, 1), (2, 2, 1), (1, 0, 2))
"""Shares every option is tried at: unequal, three positions, and one that holds nothing."""
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest difference relative to the largest absolute value (assumption: a few hundred roundings)."""


def check_rule(name: str, make_inputs: Callable[[], Any]) -> tuple[str, ...]:
    """Run `lib::op` cut in every way its rule allows, and compare with the whole operator.

    `make_inputs()` returns the arguments: a tuple, or a dict of keyword arguments. Floating tensors among them get
    gradients. Returns the letters that were tried. Raises WhaleError with a sentence for a rule that is missing, does
    not fit these arguments, allows nothing at these sizes, or is wrong.
    """
    target = find_operator(name)
    given = make_inputs()
    args, kwargs = ((), given) if isinstance(given, Mapping) else (tuple(given), {})
    letters = check_call(target, args, kwargs)
    if not letters:
        raise WhaleError(
            f"the rule of {name} allows no cut at these sizes", fix="give inputs whose free dims are larger than 1"
        )
    return letters


def check_call(
    target: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    shares: Sequence[tuple[float, ...]] = SHARES,
) -> tuple[str, ...]:
    """The letters of the rule of one call, each tried; raises WhaleError as `check_rule` does."""
    one = one_operator(target, *_with_gradients(args, kwargs or {}))
    rule = rule_of(Call(one.program.nodes[one.index]))
    if rule is None:
        _refuse_ranks(one)
        raise WhaleError(
            f"{one.operator.target} has no rule that fits these arguments: it runs replicated",
            fix='register one: whalepy.rule("lib::op", "operands -> results")',
        )
    _refuse_unequal(one, rule)
    for mode, what in trials(one, rule):
        for weights in shares:
            if mode.option is None or fits(one, mode.option, weights):
                refuse_difference(Trial(one, (weights,), (mode,)), rule, what)
    return tuple(dict.fromkeys(letter_of(rule, option) for option in one.operator.options))


def _refuse_ranks(one: OneOperator) -> None:
    """Raises WhaleError where a user's rule is there but does not fit."""
    call = Call(one.program.nodes[one.index])
    if call.name in USER_RULES:
        ranks = ", ".join(map(str, call.ranks))
        made = ", ".join(str(result.ndim) for result in call.results)
        raise WhaleError(
            f"the rule {str(USER_RULES[call.name])!r} does not fit operands of {ranks} dims and results of {made}",
            fix="write one letter per dim, `...` for leading dims",
        )


def _refuse_unequal(one: OneOperator, rule: Rule) -> None:
    """Raises WhaleError where one letter stands for dims of different sizes (but for 1, which broadcasts)."""
    call = Call(one.program.nodes[one.index])
    values = [*(operand.meta["val"] for operand in call.operands), *call.results]
    sizes: dict[str, set[int]] = {}
    for tokens, value in zip((*rule.inputs, *rule.outputs), values, strict=True):
        for token, size in zip(tokens, value.shape, strict=True):
            if isinstance(token, str) and token != NEVER and int(size) != 1:
                sizes.setdefault(token, set()).add(int(size))
    for letter, found in sizes.items():
        if len(found) > 1:
            listed = " and ".join(map(str, sorted(found)))
            raise WhaleError(
                f"the rule {str(rule)!r} of {one.operator.target} is wrong: {letter!r} stands for dims of {listed}",
                fix="give dims that are different axes different letters, or _",
            )


def _with_gradients(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
    """Every floating tensor requires a gradient, unless some do already: then those."""
    tensors = [v for v in pytree.tree_leaves((tuple(args), dict(kwargs))) if isinstance(v, Tensor)]
    chosen = any(tensor.requires_grad for tensor in tensors)

    def leaf(value: Any) -> Any:
        wants = isinstance(value, Tensor) and not chosen and value.is_floating_point()
        return value.detach().requires_grad_() if wants else value

    return pytree.tree_map(leaf, (tuple(args), dict(kwargs)))


def trials(one: OneOperator, rule: Rule) -> Iterator[tuple[Mode, str]]:
    """Every mode the rule offers, with words for it."""
    for option in one.operator.options:
        yield Mode("S", option), f"cut along {letter_of(rule, option)!r}"
    for group in rule.linear:
        yield Mode("P", partial=group), f"given partial sums for operands {sorted(group)}"


def letter_of(rule: Rule, option: Option) -> str:
    """The factor of the rule that an option cuts."""
    sides = zip((*rule.inputs, *rule.outputs), (*option.inputs, *option.outputs), strict=True)
    tokens = [entry[place.dim] for entry, place in sides if place is not None]
    plain = [token for token in tokens if isinstance(token, str)]
    return plain[0] if plain else " ".join(tokens[0])


def fits(one: OneOperator, option: Option, weights: Sequence[float]) -> bool:
    """Whether the axis has a unit for every position with a positive weight."""
    size = one.program.axes.size(option.axis)
    return isinstance(size, int) and size >= sum(weight > 0 for weight in weights)


def two_level_modes(one: OneOperator) -> Iterator[tuple[Mode, Mode]]:
    """Pairs of options that may stand on two levels at once, in different dims or nested."""
    for outer in one.operator.options:
        for inner in one.operator.options:
            if _together(outer, inner):
                yield Mode("S", outer, 0), Mode("S", inner, 1)


def _together(outer: Option, inner: Option) -> bool:
    if outer.kernel and inner.kernel and (outer.kernel != inner.kernel or outer.kernel not in STACKABLE):
        return False
    pairs = zip((*outer.inputs, *outer.outputs), (*inner.inputs, *inner.outputs), strict=True)
    spots = [(a and (a.dim, a.term), b and (b.dim, b.term)) for a, b in pairs]
    return all(a != b for a, b in spots if a and b)


@dataclass(frozen=True)
class Run:
    """What an operator gave: results, and the gradients of its leaves (None where none came)."""

    results: list[Tensor]
    gradients: list[Tensor | None]


def refuse_difference(trial: Trial, rule: Rule, what: str) -> None:
    """Raises WhaleError where the parts do not make up the whole operator's results and gradients."""
    found = difference(trial)
    if found is not None:
        raise WhaleError(
            f"the rule {str(rule)!r} of {trial.one.operator.target} is wrong: {what} at shares "
            f"{' / '.join(':'.join(f'{w:g}' for w in weights) for weights in trial.shares)}, {found}",
            fix="write an UPPER-case letter for a dim that the operator needs whole, _ for one that is unrelated",
        )


def difference(trial: Trial) -> str | None:
    """In words, the first way in which the parts differ from the whole operator; None where they agree."""
    values = list(trial.one.values)
    whole = _run(trial.one.program.captured.graph, values, trial, None)
    try:
        parts = _run_all(trial)
    except WhaleError as error:
        return f"a position failed: {error.what}"
    except (RuntimeError, IndexError, ValueError) as error:
        return f"a position failed: {str(error).strip().splitlines()[0]}"
    if any(isinstance(binding, Stream) for binding in trial.rewritten.bindings):
        again = _run(trial.one.program.captured.graph, values, trial, None)
        if not all(map(torch.equal, whole.results, again.results)):
            return _shape_difference(trial, whole, parts)
    for r, expected in enumerate(whole.results):
        layout = trial.result_layout(trial.one.outputs[r][1])
        found = _compare(trial, {at: p.results[r] for at, p in parts.items()}, trial.one.outputs[r], layout, expected)
        if found:
            return f"result {r} {found}"
    for k, expected in enumerate(whole.gradients):
        if expected is None:
            continue
        layout = gradients_of(trial.leaf_layout(k))
        gradients = _zero_where_none(trial, k, {at: p.gradients[k] for at, p in parts.items()})
        found = _compare(trial, gradients, (k, 0), layout, expected)
        if found:
            return f"the gradient of operand {k} {found}"
    return None


def _zero_where_none(trial: Trial, leaf: int, gradients: Mapping[tuple[int, ...], Tensor | None]) -> Parts:
    zeros = trial.distribute(torch.zeros_like(trial.one.values[leaf]), (leaf, 0), _shards(trial.leaf_layout(leaf)))
    return {at: zeros[at] if g is None else g for at, g in gradients.items()}


def _shards(layout: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(kind if isinstance(kind, Sharded) else "R" for kind in layout)


def _shape_difference(trial: Trial, whole: Run, parts: Mapping[tuple[int, ...], Run]) -> str | None:
    """Of a random operator only the shapes can be compared."""
    for r, expected in enumerate(whole.results):
        layout = _shards(trial.result_layout(trial.one.outputs[r][1]))
        local = trial.distribute(expected, trial.one.outputs[r], layout)
        for at, run in parts.items():
            if run.results[r].shape != local[at].shape:
                return f"result {r} has shape {list(run.results[r].shape)} at {at}, not {list(local[at].shape)}"
    return None


def _compare(trial: Trial, parts: Parts, key: tuple[int, int], layout: tuple[Any, ...], expected: Tensor) -> str | None:
    local = trial.distribute(expected, key, _shards(layout))
    for at, part in parts.items():
        if part.shape != local[at].shape:
            return f"has shape {list(part.shape)} at position {at}, not {list(local[at].shape)}"
        if part.dtype != expected.dtype:
            return f"has type {part.dtype} at position {at}, not {expected.dtype}"
    for at, combined in trial.combine(parts, key, layout).items():
        worst = _distance(combined, expected)
        if worst > _tolerance(trial, expected):
            return f"differs by {worst:.1e} of its largest value at position {at}"
    return None


def _tolerance(trial: Trial, expected: Tensor) -> float:
    """That of the coarsest type involved; whole numbers are exact."""
    if not expected.is_floating_point() and not expected.is_complex():
        return 0.0
    return max(TOLERANCE.get(value.dtype, 1e-9) for value in (expected, *trial.one.values))


def _distance(found: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest absolute value; infinite where one is not finite and they differ."""
    if expected.numel() == 0 or torch.equal(found, expected):
        return 0.0
    if expected.is_complex():
        found, expected = torch.view_as_real(found), torch.view_as_real(expected)
    a, b = found.to(torch.float64), expected.to(torch.float64)
    differs = (a != b) & ~(a.isnan() & b.isnan())
    if not bool(differs.any()):
        return 0.0
    gap = (a - b).abs()[differs].max()
    scale = b.nan_to_num(posinf=0.0, neginf=0.0).abs().max().clamp(min=1e-3)
    return float((gap / scale).nan_to_num(nan=float("inf")))


def _run_all(trial: Trial) -> dict[tuple[int, ...], Run]:
    """Every position's run; in threads where kernels reduce over a level, so that all are there at once."""
    keys = [(k, 0) for k in range(len(trial.one.values))]
    leaves = [
        trial.distribute(value, key, trial.leaf_layout(key[0]))
        for key, value in zip(keys, trial.one.values, strict=True)
    ]
    meetings = trial.meetings()

    def play(at: tuple[int, ...]) -> Run:
        try:
            binder = trial.binder(at, meetings)
            extra = [7 if isinstance(v, Stream) else v for v in binder.values(trial.rewritten.bindings, SIZES)]
            return _run(trial.rewritten.graph, [parts[at] for parts in leaves], trial, at, extra)
        except BaseException:
            for meeting in meetings.values():
                meeting.barrier.abort()
            raise

    rewritten = trial.rewritten
    if not any(isinstance(binding, Reducer) for binding in rewritten.bindings):
        return {at: play(at) for at in trial.coordinates}
    with ThreadPoolExecutor(len(trial.coordinates)) as pool:
        return dict(zip(trial.coordinates, pool.map(play, trial.coordinates), strict=True))


def _run(
    graph: Callable[..., Any], values: Sequence[Tensor], trial: Trial, at: tuple[int, ...] | None, extra: Any = ()
) -> Run:
    """Forward and backward; `at` None is the whole operator. The gradient that comes in is the same random one."""
    operands = trial.one.operator.operand_grad
    leaves = [_leaf(value, operands, trial, k) for k, value in enumerate(values)]
    outputs = list(graph(*leaves, *extra))
    roots: list[Tensor] = []
    seeds: list[Tensor] = []
    for r, output in enumerate(outputs):
        if output.requires_grad:
            roots.append(output)
            seeds.append(_incoming(trial, r, at))
            if seeds[-1].shape != output.shape:
                raise WhaleError(f"result {r} has shape {list(output.shape)}, not {list(seeds[-1].shape)}")
    if not roots:
        return Run([o.detach() for o in outputs], [None] * len(values))
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    found = iter(torch.autograd.grad(roots, wanted, seeds, allow_unused=True))
    gradients = [next(found) if leaf.requires_grad else None for leaf in leaves]
    return Run([o.detach() for o in outputs], gradients)


def _leaf(value: Tensor, operand_grad: Sequence[bool], trial: Trial, k: int) -> Tensor:
    producers = [producer for producer, _ in trial.one.operator.operands]
    return value.clone().requires_grad_(operand_grad[producers.index(k)])


def _incoming(trial: Trial, r: int, at: tuple[int, ...] | None) -> Tensor:
    key = trial.one.outputs[r]
    whole = results(trial.one.program.nodes[key[0]])[key[1]]
    seed = torch.randn(whole.shape, generator=torch.Generator().manual_seed(r), dtype=torch.float64).to(whole.dtype)
    return seed if at is None else trial.distribute(seed, key, gradients_of(trial.result_layout(key[1])))[at]
