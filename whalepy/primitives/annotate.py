"""Put scopes on the modules of a model whose code is not edited."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, TypeVar, cast

from whalepy.errors import AnnotationError
from whalepy.primitives.callsite import user_line
from whalepy.primitives.chains import extended
from whalepy.primitives.recording import under_dynamo
from whalepy.primitives.scope import Primitive

if TYPE_CHECKING:
    from torch import nn

    Model = TypeVar("Model", bound=nn.Module)

Chain = tuple[Primitive, ...]
Entries = Mapping[str, Primitive | Sequence[Primitive]]


def annotate(model: Model, scopes: Entries) -> Model:
    """The same model, whose modules run inside the scopes given for their paths.

    A key is an fnmatch pattern on module paths; "" is the whole model. It takes the outermost modules it matches that
    have a forward; a container without one stands for its children. A list of primitives nests, outermost first.
    One primitive is one scope over all its matches. Entries nest by module tree, then in the order of `scopes`;
    what an earlier call put on a module stays around what this one adds.
    Raises AnnotationError, before any module is changed: a pattern that matches nothing, a value that is no
    primitive, primitives that cannot nest.
    """
    at = user_line()
    modules = _modules(model, at)
    chains = {module: _chain_on(module) for module in modules.values()}
    for pattern, value in _checked_entries(scopes, at):
        for path in _targets(modules, pattern) or _nothing(model, modules, pattern, at):
            module = modules[path]
            chains[module] = tuple(dict.fromkeys(chains[module] + value))
    _check_nesting(modules, chains)
    for module, chain in chains.items():
        if chain != _chain_on(module):
            module.forward = ScopedForward(_inner_forward(module), chain)
    return model


@contextmanager
def annotated(model: nn.Module, scopes: Entries) -> Generator[None]:
    """The model annotated like this for a while; as it was before afterwards."""
    before = {module: module.__dict__.get("forward") for module in model.modules()}
    annotate(model, scopes)
    try:
        yield
    finally:
        for module, forward in before.items():
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = forward


def scopes_on(model: nn.Module) -> dict[str, Chain]:
    """What `annotate` put on each module, by path in module order; modules without scopes are left out."""
    chains = ((path, _chain_on(module)) for path, module in model.named_modules())
    return {path: chain for path, chain in chains if chain}


class ScopedForward:
    """The `forward` of one module, run inside `chain`. It is copied and pickled with its module."""

    def __init__(self, inner: Callable[..., Any], chain: Chain) -> None:
        functools.update_wrapper(self, inner, updated=())  # the name and the signature stay those of `inner`
        self.inner = inner
        self.chain = chain

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if under_dynamo():  # it cannot enter a context made outside the code it reads
            return self.inner(*args, **kwargs)
        with ExitStack() as scopes:
            for primitive in self.chain:
                scopes.enter_context(primitive)
            return self.inner(*args, **kwargs)

    def __reduce__(self) -> tuple[object, ...]:
        # A state, not arguments: `inner` is bound to the module, which holds this object.
        return ScopedForward.__new__, (ScopedForward,), (self.inner, self.chain)

    def __setstate__(self, state: tuple[Callable[..., Any], Chain]) -> None:
        self.__init__(*state)


def _modules(model: object, at: str) -> dict[str, nn.Module]:
    """Every module by path, parents first; a module with two paths appears under both."""
    from torch import nn

    if isinstance(model, nn.Module):
        return dict(model.named_modules(remove_duplicate=False))
    raise AnnotationError(f"annotate takes an nn.Module, not {model!r}", at=at, fix="give the model first")


def _chain_on(module: nn.Module) -> Chain:
    forward = module.__dict__.get("forward")
    return forward.chain if isinstance(forward, ScopedForward) else ()


def _inner_forward(module: nn.Module) -> Callable[..., Any]:
    forward = module.forward
    return forward.inner if isinstance(forward, ScopedForward) else forward


def _checked_entries(scopes: object, at: str) -> Iterable[tuple[str, Chain]]:
    if not isinstance(scopes, Mapping):
        fix = 'write {"": whalepy.replicate(2)}: module paths and their primitives'
        raise AnnotationError(f"annotate takes a dict of module paths, not {scopes!r}", at=at, fix=fix)
    for pattern, value in cast(Mapping[object, object], scopes).items():
        if not isinstance(pattern, str):
            raise AnnotationError(f"annotate: {pattern!r} is no module path", at=at, fix='"" is the whole model')
        yield pattern, _chain_of(pattern, value, at)


def _chain_of(pattern: str, value: object, at: str) -> Chain:
    chain = tuple(cast(Iterable[object], value)) if isinstance(value, (list, tuple)) else (value,)
    bad = [item for item in chain if not isinstance(item, Primitive)]
    if chain and not bad:
        return cast(Chain, chain)
    if bad and isinstance(bad[0], type) and issubclass(bad[0], Primitive):
        fix = f"write whalepy.{bad[0].kind}()"
    else:
        fix = "give a primitive like whalepy.split(4), or a list of them, outermost first"
    raise AnnotationError(f'annotate: "{pattern}" is given {value!r}, which is no primitive', at=at, fix=fix)


def _targets(modules: Mapping[str, nn.Module], pattern: str) -> list[str]:
    """The outermost paths that match and whose module has a forward, in module order."""
    found = {target for path in modules if fnmatchcase(path, pattern) for target in _with_forward(modules, path)}
    return [path for path in modules if path in found and found.isdisjoint(_ancestors(path))]


def _with_forward(modules: Mapping[str, nn.Module], path: str) -> Iterable[str]:
    """`path`, or the outermost paths below it that have a forward: a ModuleList has none."""
    from torch import nn

    module = modules[path]
    if "forward" in module.__dict__ or type(module).forward is not nn.Module.forward:
        yield path
        return
    for name, _ in module.named_children():
        yield from _with_forward(modules, f"{path}.{name}" if path else name)


def _ancestors(path: str) -> Iterable[str]:
    """Every path above `path`, nearest first; the last is ""."""
    while path:
        path = path.rpartition(".")[0]
        yield path


def _check_nesting(modules: Mapping[str, nn.Module], chains: Mapping[nn.Module, Chain]) -> None:
    around: dict[str, Chain] = {}
    for path, module in modules.items():
        chain = around[path.rpartition(".")[0]] if path else ()
        for primitive in chains[module]:
            chain = extended(chain, primitive, place=f' on "{path}"')
        around[path] = chain


def _nothing(model: nn.Module, modules: Mapping[str, nn.Module], pattern: str, at: str) -> list[str]:
    raise AnnotationError(
        f'annotate: "{pattern}" matches no module of {type(model).__name__} that has a forward',
        at=at,
        fix=_near(modules, pattern) or f"its modules are {_quoted(name for name, _ in model.named_children())}",
    )


def _near(modules: Mapping[str, nn.Module], pattern: str) -> str:
    # Numbered paths are offered once, as a pattern: "h.0.attn" and "h.1.attn" are "h.*.attn".
    patterns = (_numbers_left_open(path) for path in modules if path)
    near = difflib.get_close_matches(pattern, dict.fromkeys(patterns), n=3)
    return f"did you mean {_quoted(near)}?" if near else ""


def _numbers_left_open(path: str) -> str:
    if "." not in path:  # a lone "*" would be the whole model
        return path
    return ".".join("*" if part.isdigit() else part for part in path.split("."))


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f'"{name}"' for name in names)
