"""The one-line notation of sharding rules, and what a rule says about an operator at given ranks.

`...k, nk, +n -> ...n !n=kernel`: one comma-separated entry per tensor operand, then one per tensor result.
Lower-case letters are factors that may be sharded; UPPER-case ones must be whole; `_` is never shardable and unrelated
to anything; `...` stands for leading dims that broadcast from the right; `(n p)` is one dim that is the product of two
factors; `+` marks an operand that is added to the result (its value counts once, however the contraction is cut); a
letter missing on the right is contracted: the result is a partial sum. `!x=name` names the local kernel that stands in
for the operator when x is sharded. With spaces, tokens may be words: `b heads s d, s d -> b heads s d`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from whalepy.errors import WhaleError

Token = str | tuple[str, ...]
Tokens = tuple[Token, ...]
ELLIPSIS = "..."
NEVER = "_"


@dataclass(frozen=True)
class Rule:
    """What the dims of one operator's operands and results have to do with each other."""

    inputs: tuple[Tokens, ...]
    outputs: tuple[Tokens, ...]
    additive: frozenset[int] = frozenset()
    kernels: Mapping[str, str] = field(default_factory=dict[str, str])
    linear: tuple[frozenset[int], ...] = ()
    """Groups of operands in which the operator is jointly linear: partial sums may wait through it."""
    sizes: Mapping[str, int] = field(default_factory=dict[str, int])
    """Known sizes of factors that occur only inside a product dim."""
    flat: bool = False
    """A reshape: the dims of the operand and of the result multiply to the same product."""
    concatenated: int | None = None
    """A split into unequal parts: this dim of the operand is the concatenation of the results' dims."""

    def __str__(self) -> str:
        sides = [", ".join(map(_text, side)) for side in (self.inputs, self.outputs)]
        return " -> ".join(sides) + "".join(f"  !{letter}={name}" for letter, name in self.kernels.items())


def is_whole(token: str) -> bool:
    """Whether a factor must be whole (UPPER case or `_`)."""
    return token == NEVER or token.isupper()


def parse_rule(text: str, *, linear: Sequence[Sequence[int]] = (), sizes: Mapping[str, int] | None = None) -> Rule:
    """The rule a line stands for. Raises WhaleError naming the part that cannot be read."""
    body, *marks = re.split(r"\s*!", text.strip())
    if body.count("->") != 1:
        raise WhaleError(f"the rule {text!r} needs exactly one '->'", fix="write 'operands -> results'")
    left, right = body.split("->")
    entries = [entry.strip() for entry in left.split(",")] if left.strip() else []
    additive = frozenset(i for i, entry in enumerate(entries) if entry.startswith("+"))
    inputs = tuple(_tokens(entry.lstrip("+"), text) for entry in entries)
    outputs = tuple(_tokens(entry.strip(), text) for entry in right.split(","))
    kernels = dict(_mark(mark, text) for mark in marks)
    groups = tuple(frozenset(group) for group in linear)
    return Rule(inputs, outputs, additive, kernels, groups, dict(sizes or {}))


def _mark(mark: str, text: str) -> tuple[str, str]:
    letter, equals, name = mark.partition("=")
    if not equals or not letter.strip() or not name.strip():
        raise WhaleError(f"the mark '!{mark}' of the rule {text!r} is not of the form !letter=kernel")
    return letter.strip(), name.strip()


def _tokens(entry: str, text: str) -> Tokens:
    pieces = re.findall(r"\([^()]*\)|\.\.\.|[^\s()]+", entry)
    if "(" in re.sub(r"\([^()]*\)", "", entry) or ")" in re.sub(r"\([^()]*\)", "", entry):
        raise WhaleError(f"unbalanced parentheses in the rule {text!r}", fix="write a product dim as (a b)")
    spaced = " " in re.sub(r"\([^()]*\)", "", entry.strip()).strip()
    tokens: list[Token] = []
    for piece in pieces:
        if piece.startswith("("):
            tokens.append(tuple(piece[1:-1].split()))
        elif piece == ELLIPSIS or spaced:
            tokens.append(piece)
        else:
            tokens.extend(re.findall(r"\.\.\.|.", piece))
    if sum(token == ELLIPSIS for token in tokens) > 1:
        raise WhaleError(f"'...' stands twice in one operand of the rule {text!r}")
    return tuple(tokens)


def _text(tokens: Tokens) -> str:
    return " ".join(f"({' '.join(token)})" if isinstance(token, tuple) else token for token in tokens)


def at_ranks(rule: Rule, input_ranks: Sequence[int], output_ranks: Sequence[int]) -> Rule | None:
    """The rule with `...` written out for operands and results of these ranks; None where they do not fit."""
    if len(input_ranks) != len(rule.inputs) or len(output_ranks) != len(rule.outputs):
        return None
    inputs = [_spread(tokens, rank) for tokens, rank in zip(rule.inputs, input_ranks, strict=True)]
    outputs = [_spread(tokens, rank) for tokens, rank in zip(rule.outputs, output_ranks, strict=True)]
    if any(side is None for side in (*inputs, *outputs)):
        return None
    return Rule(
        tuple(side for side in inputs if side is not None),
        tuple(side for side in outputs if side is not None),
        rule.additive,
        rule.kernels,
        rule.linear,
        rule.sizes,
        rule.flat,
        rule.concatenated,
    )


def _spread(tokens: Tokens, rank: int) -> Tokens | None:
    if ELLIPSIS not in tokens:
        return tokens if len(tokens) == rank else None
    at = tokens.index(ELLIPSIS)
    count = rank - len(tokens) + 1
    if count < 0:
        return None
    leading = tuple(f".{count - 1 - i}" for i in range(count))
    return tokens[:at] + leading + tokens[at + 1 :]


RuleMaker = Callable[..., "Rule | None"]
