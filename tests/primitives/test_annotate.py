"""Scopes put on modules by path."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import Tensor, nn

from whalepy.errors import AnnotationError
from whalepy.primitives import (
    annotate,
    open_chain,
    recorded_chain,
    recording,
    replicate,
    scopes_on,
    split,
    stage,
)

SEEN: list[tuple[str, object]] = []


class Leaf(nn.Module):
    def __init__(self, name: str = "leaf") -> None:
        super().__init__()
        self.name = name
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        SEEN.append((self.name, open_chain()))
        return x * self.weight * scale


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Leaf("attn")
        self.mlp = Leaf("mlp")

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.attn(x))


class Model(nn.Module):
    """Blocks in a list, a head, and a module that has two paths."""

    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.embed = Leaf("embed")
        self.h = nn.ModuleList(Block() for _ in range(blocks))
        self.head = Leaf("head")
        self.again = self.head

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.h:
            x = block(x)
        return self.again(self.head(x))


def tree(model: nn.Module) -> str:
    return "\n".join(f"{path or 'model'}: {', '.join(map(repr, chain))}" for path, chain in scopes_on(model).items())


def seen(model: nn.Module) -> str:
    SEEN.clear()
    model(torch.ones(1))
    return "\n".join(f"{name} {chain}" for name, chain in SEEN)


def golden(text: str) -> str:
    return "\n".join(line.strip() for line in text.strip().splitlines())


TAKEN = [
    ("", "model"),
    ("h.*", "h.0 h.1"),  # not h.0.attn: the outermost modules that match
    ("h.1", "h.1"),
    ("h.*.attn", "h.0.attn h.1.attn"),
    ("*.mlp", "h.0.mlp h.1.mlp"),
    ("h.[1-9]", "h.1"),
    ("h", "h.0 h.1"),  # a ModuleList never runs: its children do
    ("h*", "h.0 h.1 head"),
    ("head", "head"),
    ("again", "head"),  # the same module by its second path
    ("*", "model"),  # fnmatch: * matches the empty path too
]


@pytest.mark.parametrize(("pattern", "paths"), TAKEN)
def test_a_pattern_takes_the_outermost_modules_that_run(pattern: str, paths: str) -> None:
    model = Model()
    assert annotate(model, {pattern: split(2)}) is model
    assert [path or "model" for path in scopes_on(model)] == paths.split()


def test_entries_nest_by_module_tree_then_by_dict_order() -> None:
    model = annotate(
        Model(), {"h.*.attn": split(4), "h.0": stage(2), "h.*": [replicate(2), replicate()], "": replicate(8)}
    )
    # Two entries on h.0 nest in dict order: the stage stands around the two replicates.
    assert tree(model) == golden("""
        model: replicate(8)
        h.0: stage(2), replicate(2), replicate()
        h.0.attn: split(4)
        h.1: replicate(2), replicate()
        h.1.attn: split(4)
    """)
    assert seen(model) == golden("""
        embed (replicate(8),)
        attn (replicate(8), stage(2), replicate(2), replicate(), split(4))
        mlp (replicate(8), stage(2), replicate(2), replicate())
        attn (replicate(8), replicate(2), replicate(), split(4))
        mlp (replicate(8), replicate(2), replicate())
        head (replicate(8),)
        head (replicate(8),)
    """)


def test_one_object_is_one_scope_over_all_its_matches() -> None:
    scope = split(2)
    model = annotate(Model(), {"h.*": scope, "h.*.attn": scope, "head": scope, "again": scope})
    seen(model)
    assert {chain for name, chain in SEEN if name != "embed"} == {(scope,)}


def test_a_second_call_adds_inside() -> None:
    outer, inner = replicate(2), split(2)
    model = annotate(Model(), {"h.*": outer})
    annotate(model, {"h.0": [outer, inner]})
    assert tree(model) == "h.0: replicate(2), split(2)\nh.1: replicate(2)"
    with pytest.raises(AnnotationError) as refused:
        annotate(model, {"": split(3), "h.1": stage()})
    assert str(refused.value).startswith('replicate on "h.0" cannot stand inside split (test_annotate.py:')
    assert tree(model) == "h.0: replicate(2), split(2)\nh.1: replicate(2)"  # nothing was changed


def test_illegal_nesting_over_paths_names_both_lines() -> None:
    outer = split(4)
    inner = replicate(2)
    model = Model()
    with pytest.raises(AnnotationError) as refused:
        annotate(model, {"h.*.attn": inner, "h.*": outer})
    assert str(refused.value) == (
        f'replicate on "h.0.attn" cannot stand inside split ({outer.at})\n'
        f"  at:  {inner.at}\n"
        "  fix: inside split only plain operators may appear"
    )
    assert scopes_on(model) == {}


def test_nesting_is_checked_under_every_path_of_a_shared_module() -> None:
    model = Model()
    model.h[0].head = model.head  # named again further down, inside a split
    with pytest.raises(AnnotationError, match=r'^replicate on "h.0.head" cannot stand inside split'):
        annotate(model, {"h.0": split(2), "head": replicate(2)})


ENTRIES = 'write {"": whalepy.replicate(2)}: module paths and their primitives'
PRIMITIVES = "give a primitive like whalepy.split(4), or a list of them, outermost first"
MODULES = 'its modules are "embed", "h", "head"'

REFUSED = [
    # misspelt: near names, numbered ones as one pattern
    ({"h.*.atn": split()}, 'annotate: "h.*.atn" matches no module of Model that has a forward',
     'did you mean "h.*.attn", "h.*"?'),
    ({"transformer": split()}, 'annotate: "transformer" matches no module of Model that has a forward', MODULES),
    # a parameter is no module
    ({"head.weight": split()}, 'annotate: "head.weight" matches no module of Model that has a forward', MODULES),
    ({"": replicate}, f'annotate: "" is given {replicate!r}, which is no primitive', "write whalepy.replicate()"),
    ({"h": []}, 'annotate: "h" is given [], which is no primitive', PRIMITIVES),
    ({"h": None}, 'annotate: "h" is given None, which is no primitive', PRIMITIVES),
    ({"h": 2}, 'annotate: "h" is given 2, which is no primitive', PRIMITIVES),
    ({0: split()}, "annotate: 0 is no module path", '"" is the whole model'),
    ([], "annotate takes a dict of module paths, not []", ENTRIES),
]  # fmt: skip


@pytest.mark.parametrize(("entries", "what", "fix"), REFUSED, ids=[what for _, what, _ in REFUSED])
def test_refused_entries(entries, what: str, fix: str) -> None:
    model, line = Model(), split().at
    with pytest.raises(AnnotationError) as refused:
        annotate(model, entries)
    at = f"test_annotate.py:{int(line.rpartition(':')[2]) + 2}"
    assert str(refused.value) == f"{what}\n  at:  {at}\n  fix: {fix}"


def test_only_modules_can_be_annotated() -> None:
    with pytest.raises(AnnotationError, match=r"^annotate takes an nn\.Module, not 3"):
        annotate(3, {"": replicate(2)})


def test_a_container_of_nothing_that_runs_matches_nothing() -> None:
    model = nn.Sequential(nn.Identity())
    model.extra = nn.ParameterList([torch.ones(1)])
    with pytest.raises(AnnotationError, match=r'^annotate: "extra" matches no module of Sequential'):
        annotate(model, {"extra": split(2)})


def double(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_a_copy_runs_its_own_weights_in_the_same_scopes(copied) -> None:
    model = annotate(Model(blocks=1), {"": replicate(2), "h.0": split(2)})
    other = copied(model)
    double(other)  # a forward still bound to the original would not notice
    assert model(torch.ones(1)).item() == 1
    assert other(torch.ones(1)).item() == 2**5
    assert tree(other) == tree(model)
    assert seen(other) == seen(model)


def test_copies_share_the_scopes() -> None:
    model = annotate(Model(), {"": replicate(2)})
    assert scopes_on(copy.deepcopy(model)) == scopes_on(model)


def test_the_model_stays_what_it_was() -> None:
    model = Model()
    names, signature = list(model.state_dict()), str(inspect.signature(model.head.forward))
    annotate(model, {"": replicate(2), "head": split(2)})
    calls: list[str] = []
    model.head.register_forward_pre_hook(lambda *_: calls.append("before"))
    model.head.register_forward_hook(lambda *_: calls.append("after"))
    assert model.head(torch.ones(1), scale=3.0).item() == 3
    assert calls == ["before", "after"]
    assert list(model.state_dict()) == names
    assert (
        str(inspect.signature(model.head.forward))
        == signature
        == "(x: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor"
    )
    swapped = {"weight": torch.full((1,), 5.0)}
    assert torch.func.functional_call(model.head, swapped, torch.ones(1)).item() == 5


class Loss(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, labels=ids, use_cache=False).loss


def test_gpt2_by_path() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"n_layer": 2, "n_embd": 8, "n_head": 2, "vocab_size": 16, "n_positions": 8}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **ends))
    blocks = [stage(1), split(2)]
    annotate(model, {"": replicate(2), "transformer.h.*": blocks, "lm_head": split(2, on="lm_head.weight:0")})
    with recording():
        program = torch.export.export(Loss(model), (torch.zeros(2, 4, dtype=torch.long),), strict=False)
    heavy = ("embedding", "linear", "addmm", "scaled_dot_product_attention", "cross_entropy_loss")
    nodes = [node for node in program.module(check_guards=False).graph.nodes if node.op == "call_function"]
    lines = [
        f"{name} {recorded_chain(node)}" for node in nodes if (name := node.target.__name__.split(".")[0]) in heavy
    ]
    block = ["(replicate(2), stage(1), split(2))"]
    assert lines == [
        *["embedding (replicate(2),)"] * 2,
        *[f"{name} {block[0]}" for name in ("addmm", heavy[3], "addmm", "addmm", "addmm")] * 2,
        "linear (replicate(2), split(2, on='lm_head.weight:0'))",
        "cross_entropy_loss (replicate(2),)",
    ]


def test_a_numbered_child_is_offered_as_it_is() -> None:
    with pytest.raises(AnnotationError) as refused:  # not as "*", which would be the whole model
        annotate(nn.Sequential(nn.Identity(), nn.Identity()), {"10": split()})
    assert refused.value.fix == 'did you mean "1", "0"?'
