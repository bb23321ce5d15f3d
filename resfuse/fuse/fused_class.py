"""Classes of fused modules: the module's own class with fused forwards.

`fuse_` changes `module.__class__` and nothing else, so the module keeps its identity, children, parameters, hooks and
names, and remains an instance of its class.  A fused class is made once for each class and options.  It cannot be
imported by name, so its instances are pickled and copied by these.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any, ClassVar

from torch import nn

from resfuse.fuse.rewrite import NotRewrittenError, rewrite
from resfuse.nn.lazy import FORWARDS, force
from resfuse.ops.recompute import recomputed


class Fused:
    """Base of the fused classes."""

    _resfuse_original: ClassVar[type[nn.Module]]
    """The module's class before `fuse_`."""
    _resfuse_options: ClassVar[tuple[bool, bool]]
    """(channels_last, recompute) of `fused_class`."""
    _resfuse_methods: ClassVar[dict[Callable[..., Any], Callable[..., Any]]]
    """Methods, and those of its bases -> the same for a caller that can take a `Lazy`."""

    def __init_subclass__(cls, **options: Any) -> None:
        """Nothing that the original class asks of its subclasses."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        reduced: Any = super().__reduce_ex__(max(2, int(protocol)))
        cls = type(self)
        if not is_fused_class(cls):
            return reduced  # whoever derived a class from the fused one is responsible for pickling it
        return _new, (cls._resfuse_original, *cls._resfuse_options), *reduced[2:]


_classes: dict[tuple[type[nn.Module], bool, bool, FunctionType], type[nn.Module] | str] = {}


def fused_class(original: type[nn.Module], channels_last: bool, recompute: bool) -> type[nn.Module]:
    """The class `Fused<Original>`, always the same one as long as the class has the same forward.

    Args:
        original: the module's class.
        channels_last: convolutions take their input in channels_last memory.
        recompute: what is called within its forward does not keep outputs that backward can compute again.

    Raises:
        NotRewrittenError: there can be none, for a reason that its message gives.
    """
    forward = getattr(original, "forward", None)
    if not isinstance(forward, FunctionType):
        raise NotRewrittenError("its forward is no function")
    key = (original, channels_last, recompute, forward)
    cls = _classes.get(key)
    if cls is None:
        try:
            cls = _make_class(original, channels_last, recompute)
        except NotRewrittenError as reason:
            cls = str(reason)
        _classes[key] = cls
    if isinstance(cls, str):
        raise NotRewrittenError(cls)
    return cls


def _make_class(original: type[nn.Module], channels_last: bool, recompute: bool) -> type[nn.Module]:
    if not _pickles_by_default(original):
        raise NotRewrittenError(f"{original.__name__} has its own way of being pickled")
    if original.__call__ is not nn.Module.__call__:
        raise NotRewrittenError(f"{original.__name__} has a __call__ of its own")
    if original.__module__.startswith("torch.") and original is not nn.Sequential:
        raise NotRewrittenError("it is PyTorch's own")
    namespace: dict[str, Any] = {
        "__module__": original.__module__, "__doc__": original.__doc__,
        "_resfuse_original": original, "_resfuse_options": (channels_last, recompute), "_resfuse_methods": {},
    }  # fmt: skip
    names, todo = {"forward"}, ["forward"]
    while todo:
        name = todo.pop()
        for depth, function in enumerate(_definitions(original, name)):
            try:
                fused = rewrite(function, original, channels_last)
            except NotRewrittenError:
                if name == "forward" and depth == 0:
                    raise
                continue
            if depth == 0 and fused is not None:
                namespace[name], lazy_version = _versions(original, name, function, fused, recompute)
                namespace["_resfuse_methods"][namespace[name]] = lazy_version
                if name == "forward":
                    FORWARDS[namespace[name]] = lazy_version
            elif fused is not None:
                namespace["_resfuse_methods"][function] = fused  # called by super()
            found = {called for called in function.__code__.co_names if _definitions(original, called)}
            todo += found - names
            names |= found
    return type(f"Fused{original.__name__}", (Fused, original), namespace)


def _definitions(cls: type, name: str) -> list[FunctionType]:
    """The methods of that name that a class and its bases define, without those of `nn.Module` itself."""
    found = []
    for base in cls.__mro__:
        if base.__module__.startswith("torch.") and base is not nn.Sequential:
            break
        function = base.__dict__.get(name)
        if isinstance(function, FunctionType):
            found.append(function)
    return found


def _versions(
    cls: type, name: str, function: FunctionType, fused: Callable[..., Any], recompute: bool
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """A method of a fused class, and the version for callers that can take a `Lazy`.

    Both are the fused version as long as the original class has the method that it was made from.
    """

    def method(self: Any, *args: Any, **options: Any) -> Any:
        if getattr(cls, name) is function:
            return force(fused(self, *args, **options))
        return getattr(cls, name)(self, *args, **options)

    def lazy_method(self: Any, *args: Any, **options: Any) -> Any:
        if getattr(cls, name) is function:
            return fused(self, *args, **options)
        options = {key: force(value) for key, value in options.items()}
        return getattr(cls, name)(self, *map(force, args), **options)

    if recompute:
        method, lazy_method = recomputed(method), recomputed(lazy_method)
    method.__name__, method.__doc__, method.__wrapped__ = name, function.__doc__, function  # type: ignore[attr-defined]
    return method, lazy_method


def _pickles_by_default(cls: type[nn.Module]) -> bool:
    """True if instances are pickled in the default way, which `Fused.__reduce_ex__` relies on."""
    return all(getattr(cls, name) is getattr(object, name) for name in ("__reduce__", "__reduce_ex__"))


def is_fused_class(cls: type) -> bool:
    """True if `fused_class` made the class itself, not one of its bases."""
    return issubclass(cls, Fused) and cls.__bases__[1:] == (cls._resfuse_original,)


def is_fused(module: nn.Module) -> bool:
    """True if `fuse_` gave the module its class, or the class from which that was derived."""
    return isinstance(module, Fused)


def _new(original: type[nn.Module], channels_last: bool, recompute: bool = False) -> nn.Module:
    """An empty instance; one of the original class where the fused one cannot be made here (there are no sources)."""
    try:
        cls = fused_class(original, channels_last, recompute)
    except NotRewrittenError:
        cls = original
    return cls.__new__(cls)
