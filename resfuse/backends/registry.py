"""Which backend runs a problem: decided here, in one place, once per problem, and with reasons.

Automatic choice takes the first backend in `PREFERENCE` that supports the problem, unless `ranking.TABLE` has a faster
one, and logs why it passed over the others; an explicit request (`use_backend`, or the environment variable
RESFUSE_BACKEND) that cannot be met raises.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import Any

import torch

from resfuse.backends import ranking
from resfuse.backends.problem import AbsentDevice, Problem

logger = logging.getLogger("resfuse")

PREFERENCE = ("cuda", "triton", "cpu", "reference")


_registered: dict[str, ModuleType] = {}


def register(name: str, module: ModuleType) -> None:
    """Add a backend from outside the package.  It has no rank: `use_backend` takes it, automatic choice never does.

    Args:
        name: what `use_backend` calls it; a name that is taken stays with its owner.
        module: implements the verbs, `unavailable_reason()` and `unsupported_reasons(problem)`.
    """
    if name in PREFERENCE or _registered.get(name, module) is not module:
        raise ValueError(f"a backend named {name!r} exists already")
    _registered[name] = module


def validated(name: str | None) -> str | None:
    """The name, if there is a backend of this name, or None.

    Raises:
        ValueError: there is none.
    """
    names = (*PREFERENCE, *_registered)
    if name is not None and name not in names:
        raise ValueError(f"backend: expected one of {', '.join(map(repr, names))} or None, got {name!r}")
    return name


_from_environment = validated(os.environ.get("RESFUSE_BACKEND") or None)
_request: ContextVar[str | None] = ContextVar("resfuse_backend", default=_from_environment)


def backend(name: str) -> ModuleType:
    """The module that implements a backend's verbs."""
    return _registered.get(name) or importlib.import_module(f"resfuse.backends.{name}")


def requested_backend() -> str | None:
    """The backend asked for by `use_backend` or RESFUSE_BACKEND, None where the choice is automatic."""
    return _request.get()


def unavailable_reasons() -> dict[str, str | None]:
    """Backend name -> None where it can be used on this machine, else why not."""
    return {name: backend(name).unavailable_reason() for name in PREFERENCE}


def available_backends() -> list[str]:
    """Names of the backends usable on this machine, in order of preference: `["cpu", "reference"]` without a GPU.

    Example:
        >>> available_backends()[-1]
        'reference'
    """
    return [name for name, reason in unavailable_reasons().items() if reason is None]


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Run every op inside the context, and later its backward, on the named backend; `None` means automatic choice.

    Args:
        name: one of `available_backends()`, or None.

    Raises:
        ValueError: no backend has that name.
        RuntimeError: the backend cannot be used on this machine (the message says why).  An op that the backend
            does not support raises the same error when it is called.

    Example:
        >>> with use_backend("reference"):
        ...     requested_backend()
        'reference'
    """
    if validated(name) is not None:
        reason = backend(str(name)).unavailable_reason()
        if reason is not None:
            raise RuntimeError(f"backend {name!r} is not available: {reason}")
    token = _request.set(name)
    try:
        yield
    finally:
        _request.reset(token)


def explain_choice(problem: Problem, request: str | None = None) -> tuple[str, dict[str, list[str]]]:
    """Name of the chosen backend, and for every backend that was preferred to it the reasons against it."""
    chosen, rejected = choose(problem, request)
    return request or chosen.__name__.rpartition(".")[2], {name: list(reasons) for name, reasons in rejected.items()}


@functools.cache
def repeating_inference(request: str | None) -> Callable[..., torch.Tensor | None] | None:
    """`conv_bn_act_repeated` of the first backend that has one: it answers calls like earlier, checked ones."""
    for name in PREFERENCE if request is None else (request,):
        repeated = getattr(backend(name), "conv_bn_act_repeated", None)
        if repeated is not None and backend(name).unavailable_reason() is None:
            return repeated
    return None


@functools.lru_cache(maxsize=4096)
def choose(fields: tuple[Any, ...], request: str | None) -> tuple[ModuleType, dict[str, tuple[str, ...]]]:
    """The backend for a problem, and the reasons against those that were preferred to it.

    `fields` are those of a `Problem`; a plain tuple serves as well, and is made faster: this runs at every call.
    `request` is a backend's name, or None for automatic choice.
    """
    problem = Problem(*fields)
    rejected: dict[str, tuple[str, ...]] = {}
    for name in PREFERENCE if request is None else (request,):
        reasons = _reasons_against(name, problem, automatic=request is None)
        if not reasons and request is None:
            reasons = _reasons_to_pass_over(name, problem)
        if not reasons:
            if rejected:
                logger.debug("%s runs on %r: %s", problem, name, rejected)
            return backend(name), rejected
        rejected[name] = reasons
    listed = "\n".join(f"  {name}: {'; '.join(reasons)}" for name, reasons in rejected.items())
    raise RuntimeError(f"no backend can run {problem}:\n{listed}")


def forget_choices() -> None:
    """Choose anew at the next call: a library has been loaded since."""
    choose.cache_clear()
    repeating_inference.cache_clear()


def _reasons_against(name: str, problem: Problem, automatic: bool) -> tuple[str, ...]:
    module = backend(name)
    if isinstance(problem.device, AbsentDevice):  # this machine does not matter
        return tuple(module.unsupported_reasons(problem))
    unavailable = module.unavailable_reason()
    if unavailable is None and automatic and hasattr(module, "only_on_request_reason"):
        unavailable = module.only_on_request_reason()
    return (unavailable,) if unavailable else tuple(module.unsupported_reasons(problem))


def _reasons_to_pass_over(name: str, problem: Problem) -> tuple[str, ...]:
    """Why another backend, which can run the problem, is preferred to this one."""
    return tuple(
        str(entry)
        for entry in ranking.exceptions(name, problem)
        if not _reasons_against(entry.preferred, problem, automatic=True)
    )
