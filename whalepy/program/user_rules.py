"""Rules that users add for operators of their own, checked as far as a line can be when it is added."""

from __future__ import annotations

from typing import Any

import torch

from whalepy.errors import WhaleError
from whalepy.program.rules import ELLIPSIS, NEVER, Rule, Tokens, is_whole, parse_rule

USER_RULES: dict[str, Rule] = {}
"""Rules added by `whalepy.rule`, by qualified operator name (`lib.op`)."""


def rule(name: str, line: str) -> None:
    """Add a sharding rule: how the dims of `lib::op`'s operands and results go together.

    `line` has one entry per tensor argument and per result: "b h s d, s d -> b h s d"; see docs/rules.md. A later rule
    for the same operator replaces the earlier one. Raises WhaleError for an unknown operator or a line that cannot be
    its rule; whether the rule is *true* is what `whalepy.check_rule` finds out.
    """
    operator = find_operator(name)
    parsed = parse_rule(line)
    for fault in (_counts(operator, parsed, line), _letters(parsed, line)):
        if fault:
            raise WhaleError(f"{fault} (rule of {name})", fix="see docs/rules.md for the notation")
    USER_RULES[f"{operator.namespace}.{name.split('::')[1].split('.')[0]}"] = parsed


def find_operator(name: str) -> Any:
    """The torch operator called `lib::op` (its default overload) or `lib::op.overload`. Raises WhaleError."""
    library, separator, rest = name.partition("::")
    packet_name, _, overload = rest.partition(".")
    if not separator or not packet_name:
        raise WhaleError(f"{name!r} is not an operator's name", fix='write "lib::op", as it was given to torch.library')
    try:
        packet = getattr(getattr(torch.ops, library), packet_name)
        return getattr(packet, overload or packet.overloads()[0])
    except (AttributeError, RuntimeError):
        raise WhaleError(
            f"torch knows no operator {name!r}", fix="import the module that registers it before this line"
        ) from None


def _counts(operator: Any, rule: Rule, line: str) -> str | None:
    schema = operator._schema
    operands = [a for a in schema.arguments if "Tensor" in str(a.type)]
    if schema.is_mutable:
        return f"{schema.name} writes to its arguments; only operators that return new tensors can be sharded"
    if any("List" in str(a.type) for a in operands):
        return f"{schema.name} takes a list of tensors, for which a line has no entry"
    required = [a for a in operands if "Optional" not in str(a.type)]
    if not len(required) <= len(rule.inputs) <= len(operands):
        return f"{line!r} has {len(rule.inputs)} operands; {schema.name} takes {len(operands)} tensors"
    returned = [r for r in schema.returns if "Tensor" in str(r.type)]
    if len(rule.outputs) != len(returned):
        return f"{line!r} has {len(rule.outputs)} results; {schema.name} returns {len(returned)} tensors"
    return None


def _letters(rule: Rule, line: str) -> str | None:
    left, right = _names(rule.inputs), _names(rule.outputs)
    for name in sorted(right):
        if name not in left and not is_whole(name) and name != ELLIPSIS:
            return f"{name!r} stands only on the right of {line!r}: no operand says how it is cut"
    for name in sorted(left | right):
        if name.upper() != name and name.upper() in left | right:
            return f"{line!r} says both {name!r} (free) and {name.upper()!r} (whole)"
    plain = {token for tokens in (*rule.inputs, *rule.outputs) for token in tokens if isinstance(token, str)}
    for name in sorted((left | right) - plain - {NEVER}):
        return f"{name!r} stands only inside a product of {line!r}: its size is known from nowhere"
    if rule.kernels:
        return f"{line!r} names a local kernel; an operator of yours has none"
    return None


def _names(side: tuple[Tokens, ...]) -> set[str]:
    return {name for tokens in side for token in tokens for name in ((token,) if isinstance(token, str) else token)}
