"""Classes of fused modules: the module's own class with another forward.

`fuse_` changes `module.__class__` and nothing else, so the module keeps its identity, children, parameters, hooks and
names, and remains an instance of its class.  A fused class is made once for each pair of mixin and class.  It cannot be
imported by name, so its instances are pickled and copied by that pair.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

# In the __dict__ of a fused module: the strides that `fuse_` changed, by the names of parameters.
FORMER_STRIDES = "_resfuse_former_strides"


class Fused:
    """Base of the mixins, each of which overrides the method of one pattern."""

    _resfuse_original: ClassVar[type[nn.Module]]
    """The module's class before `fuse_`."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        reduced: Any = super().__reduce_ex__(max(2, int(protocol)))
        cls = type(self)
        if not is_fused_class(cls):
            return reduced  # whoever derived a class from the fused one is responsible for pickling it
        return _new, (cls.__bases__[0], cls._resfuse_original), *reduced[2:]


_classes: dict[tuple[type[Fused], type[nn.Module]], type[nn.Module]] = {}


def fused_class(mixin: type[Fused], original: type[nn.Module]) -> type[nn.Module]:
    """The class `Fused<Original>(mixin, original)`, always the same one."""
    cls = _classes.get((mixin, original))
    if cls is None:
        namespace = {"__module__": original.__module__, "__doc__": original.__doc__, "_resfuse_original": original}
        cls = _classes[mixin, original] = type(f"Fused{original.__name__}", (mixin, original), namespace)
    return cls


def pickles_by_default(cls: type[nn.Module]) -> bool:
    """True if instances are pickled in the default way, which `Fused.__reduce_ex__` relies on."""
    return all(getattr(cls, name) is getattr(object, name) for name in ("__reduce__", "__reduce_ex__"))


def is_fused_class(cls: type) -> bool:
    """True if `fused_class` made the class itself, not one of its bases."""
    return issubclass(cls, Fused) and cls.__bases__[1:] == (cls._resfuse_original,)


def is_fused(module: nn.Module) -> bool:
    """True if `fuse_` gave the module its class, or the class from which that was derived."""
    return isinstance(module, Fused)


def _new(mixin: type[Fused], original: type[nn.Module]) -> nn.Module:
    cls = fused_class(mixin, original)
    return cls.__new__(cls)
