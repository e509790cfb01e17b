"""The rule of a call: looked up by the operator's name among lines, makers and pointwise operators.

A line's entries stand for the tensor arguments of the operator's schema, in order; entries of absent optional operands
are dropped. A maker reads dims and flags off the call and returns a rule, or None: then the operator runs replicated.
An operator that no table names has no rule.
"""

from __future__ import annotations

from dataclasses import replace

from whalepy.program import rules_index, rules_nn, rules_pointwise, rules_product, rules_reduce, rules_shape
from whalepy.program.call import Call
from whalepy.program.rules import Rule, at_ranks, parse_rule
from whalepy.program.rules_pointwise import (
    LOSSES_WITH_REDUCTION,
    POINTWISE,
    POINTWISE_FUNCTIONS,
    linear_groups,
    pointwise,
)
from whalepy.program.rules_write import Maker
from whalepy.program.user_rules import USER_RULES

__all__ = ["LINES", "LOSSES_WITH_REDUCTION", "MAKERS", "POINTWISE", "rule_of"]

LINES = {**rules_product.LINES, **rules_nn.LINES}
MAKERS: dict[str, Maker] = {
    **rules_pointwise.MAKERS,
    **rules_shape.MAKERS,
    **rules_reduce.MAKERS,
    **rules_index.MAKERS,
    **rules_product.MAKERS,
    **rules_nn.MAKERS,
}


def rule_of(call: Call) -> Rule | None:
    """The rule of a call at its ranks, or None: it runs replicated."""
    found = _find(call)
    if found is None:
        return None
    if not found.linear:
        found = replace(found, linear=linear_groups(call))
    return at_ranks(found, call.ranks, [result.ndim for result in call.results])


def _find(call: Call) -> Rule | None:
    if call.name in USER_RULES:
        return _present(call, USER_RULES[call.name])
    if call.name in LINES:
        line, linear = LINES[call.name]
        return _present(call, parse_rule(line, linear=linear))
    if call.name in MAKERS:
        return MAKERS[call.name](call)
    return pointwise(call) if call.name in POINTWISE or call.name in POINTWISE_FUNCTIONS else None


def _present(call: Call, rule: Rule) -> Rule | None:
    """The rule without the entries of absent operands."""
    present = [i for i, name in enumerate(call.tensor_arguments) if call[name] is not None]
    if len(present) != len(call.operands) or (present and present[-1] >= len(rule.inputs)):
        return None
    position = {old: new for new, old in enumerate(present)}
    return replace(
        rule,
        inputs=tuple(rule.inputs[i] for i in present),
        additive=frozenset(position[i] for i in rule.additive if i in position),
        linear=tuple(frozenset(position[i] for i in g) for g in rule.linear if g <= set(present)),
    )
