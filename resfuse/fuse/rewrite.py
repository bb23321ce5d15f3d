"""Writes a fused forward from the source of a forward.

The statements stay as they are, control flow, side effects and line numbers included.  Only calls, additions and reads
of variables change: a call that may be a convolution, batch norm or activation becomes `call(f, x)`, an addition
`add(a, b)`, and every other read of a variable that may hold a `Lazy` is forced (`resfuse.nn.lazy`).  So there is
nothing to freeze and nothing to check later, and what a convolution or norm turns out to be is decided at each call.

A pending `Lazy` survives only statements that cannot tell, or change what it will read: assignments to variables
without side effects, and control flow made of them.  Before any other statement it is forced.
"""

from __future__ import annotations
import __future__

import ast
import builtins
import copy
import functools
import linecache
from collections.abc import Iterable, Iterator
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import nn

from resfuse.nn import lazy

HELPERS = {
    f"_resfuse_{name}": getattr(lazy, name)
    for name in ("call", "invoke", "method", "attribute", "add", "add_", "force", "force_all", "settle", "guard")
}
_CHILDREN = "_resfuse_children"
_FUNCTION_NODES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_UNSUPPORTED = (
    *(ast.NamedExpr, ast.Yield, ast.YieldFrom, ast.Await, ast.Match, ast.Global, ast.Nonlocal),
    *([ast.TryStar] if hasattr(ast, "TryStar") else []),
)
# Builtins that change nothing.
_PURE = {
    *("getattr", "hasattr", "isinstance", "len", "range", "enumerate", "zip", "reversed", "list", "tuple", "dict"),
    *("int", "float", "bool", "str", "min", "max", "abs", "sum", "any", "all", "type", "slice", "super"),
}
Names = frozenset[str]


class NotRewrittenError(Exception):
    """The reason why a forward stays as it is."""


def rewrite(function: FunctionType, cls: type, channels_last: bool) -> FunctionType | None:
    """The fused version of a method, which may return a `Lazy`; None if nothing in it could be fused.

    Args:
        function: the method, of the class or one of its bases.
        cls: the class.
        channels_last: convolutions take their input in channels_last memory.

    Raises:
        NotRewrittenError: its source is not available, is not what runs, or has a construct that is not supported.
    """
    return _Rewriter(_definition(function), function, cls, channels_last).result()


def _definition(function: FunctionType) -> ast.FunctionDef:
    """The syntax tree of a function, which is proven to be the one that runs."""
    code = function.__code__
    lines = linecache.getlines(code.co_filename, function.__globals__)
    if not lines:
        raise NotRewrittenError("its source is not available")
    functions, imports = _functions("".join(lines))
    for node in functions:
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        if node.name == code.co_name and first == code.co_firstlineno:
            node = copy.deepcopy(node)
            node.decorator_list, node.imports = [], imports  # type: ignore[attr-defined]
            try:
                same = _same_code(_compile(node, function).__code__, code)
            except SyntaxError:
                same = False
            if same:
                return node
    raise NotRewrittenError("its source is not the one that runs")


@functools.lru_cache(maxsize=16)
def _functions(source: str) -> tuple[list[ast.FunctionDef], list[ast.stmt]]:
    """The functions of a module, and its imports, which decide how its calls are compiled."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return [], []
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    imports = (ast.Import, ast.ImportFrom)
    return functions, [node for node in _walk(tree.body) if isinstance(node, imports) and not _is_future(node)]


def _is_future(node: ast.stmt) -> bool:
    return isinstance(node, ast.ImportFrom) and node.module == "__future__"


def _compile(definition: ast.FunctionDef, function: FunctionType) -> FunctionType:
    """A function from a syntax tree, with the globals, defaults and closure of another, and the helpers."""
    code = function.__code__
    definition = copy.copy(definition)
    definition.args = copy.deepcopy(definition.args)
    definition.returns, definition.args.defaults = None, []
    definition.args.kw_defaults = [None] * len(definition.args.kwonlyargs)
    for argument in ast.walk(definition.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    cells = dict(zip(code.co_freevars, function.__closure__ or (), strict=True))
    cells |= {name: CellType(helper) for name, helper in HELPERS.items()}
    parameters = ast.arguments([], [ast.arg(name) for name in cells], None, [], [], None, [])
    outer = ast.FunctionDef("_outer", parameters, [definition], [])
    module = ast.fix_missing_locations(ast.Module([*definition.imports, outer], []))  # type: ignore[attr-defined]
    flags = code.co_flags & _FUTURES
    compiled = compile(module, code.co_filename, "exec", flags, dont_inherit=True)
    inner = _inner_code(_inner_code(compiled, "_outer"), definition.name)
    result = FunctionType(
        inner, function.__globals__, function.__name__, function.__defaults__,
        tuple(cells[name] for name in inner.co_freevars),
    )  # fmt: skip
    result.__kwdefaults__, result.__doc__ = function.__kwdefaults__, function.__doc__
    result.__qualname__, result.__module__ = function.__qualname__, function.__module__
    return result


_FUTURES = functools.reduce(
    int.__or__, (getattr(__future__, name).compiler_flag for name in __future__.all_feature_names)
)


def _inner_code(code: CodeType, name: str) -> CodeType:
    return next(const for const in code.co_consts if isinstance(const, CodeType) and const.co_name == name)


def _same_code(one: CodeType, other: CodeType) -> bool:
    names = ("co_code", "co_names", "co_varnames", "co_cellvars", "co_freevars")
    if any(getattr(one, name) != getattr(other, name) for name in names):
        return False
    return len(one.co_consts) == len(other.co_consts) and all(
        _same_code(a, b) if isinstance(a, CodeType) and isinstance(b, CodeType) else type(a) is type(b) and a == b
        for a, b in zip(one.co_consts, other.co_consts, strict=True)
    )


class _Rewriter:
    def __init__(self, definition: ast.FunctionDef, function: FunctionType, cls: type, channels_last: bool) -> None:
        self.definition, self.function, self.cls, self.channels_last = definition, function, cls, channels_last
        code = function.__code__
        if not definition.args.args:
            raise NotRewrittenError("it has no argument self")
        self.self_name = definition.args.args[0].arg
        self.locals = frozenset(code.co_varnames) | frozenset(code.co_cellvars)
        self.captured = frozenset(code.co_cellvars)
        if "locals" in code.co_names or "exec" in code.co_names or "eval" in code.co_names:
            raise NotRewrittenError("it looks at its own variables")
        for node in ast.walk(definition):
            if isinstance(node, _UNSUPPORTED):
                raise NotRewrittenError(f"it has a construct that is not supported, at line {node.lineno}")
        if self.self_name in _stores(definition.body):
            raise NotRewrittenError(f"it assigns to {self.self_name}")
        self.parameters = _parameters(definition.args) - {self.self_name} - self.captured
        self.lazy_names: set[str] = set()
        self.aliases: dict[str, set[str]] = {}
        self.pending: set[str] = set()
        self.statement: Any = None
        self.contexts = 0
        self.before_loop: set[str] = set()
        """Variables that were assigned before the innermost loop."""
        self.temporaries = 0
        self.changed = False
        self.comprehension = 0

    def result(self) -> FunctionType | None:
        body = self.definition.body
        self._find_lazy_names(body)
        self._live(body, frozenset())
        bound = set(self.parameters)
        new, pending = self._block(body, set(self.parameters), bound)
        if not self.changed:
            return None
        definition = copy.copy(self.definition)
        children = ast.Attribute(ast.Name(self.self_name, ast.Load()), "_modules", ast.Load())
        first = ast.copy_location(ast.Assign([ast.Name(_CHILDREN, ast.Store())], children), body[0])
        definition.body = [first, *self._force_captured(body[0]), *new, *self._settle_all(pending or (), body[-1])]
        return _compile(definition, self.function)

    def _force_captured(self, where: ast.AST) -> list[ast.stmt]:
        """A caller may pass a `Lazy` for a parameter that nested functions read, or among `*args`."""
        arguments = self.definition.args
        helpers = dict.fromkeys(_parameters(arguments) & self.captured, "force")
        if arguments.vararg is not None:
            helpers[arguments.vararg.arg] = "force_all"
        return [
            ast.copy_location(
                ast.Assign([ast.Name(name, ast.Store())], _helper(helper, ast.Name(name, ast.Load()))), where
            )
            for name, helper in sorted(helpers.items())
        ]

    # Names

    def _find_lazy_names(self, body: list[ast.stmt]) -> None:
        """Variables that may hold a `Lazy`, which no nested function reads."""
        assigned: list[tuple[str, ast.expr]] = []
        for node in _walk(body):
            if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
                assigned.append((node.targets[0].id, node.value))
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
                assigned.append((node.target.id, node.value))
        self.lazy_names |= self.parameters
        before = -1
        while before != len(self.lazy_names):
            before = len(self.lazy_names)
            self.lazy_names |= {
                name for name, value in assigned if name not in self.captured and self._may_be_lazy(value)
            }
        self.pendable = self.parameters | {name for name, value in assigned if name in self.lazy_names}
        self.pendable |= {
            node.target.id
            for node in _walk(body)
            if isinstance(node, ast.AugAssign)
            and isinstance(node.target, ast.Name)
            and node.target.id in self.lazy_names
        }

    def _may_be_lazy(self, node: ast.expr) -> bool:
        if isinstance(node, ast.Name):
            return node.id in self.lazy_names
        if isinstance(node, ast.Call):
            return self._kind(node) != "plain"
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return self._may_be_lazy(node.left) or self._may_be_lazy(node.right)
        if isinstance(node, ast.IfExp):
            return self._may_be_lazy(node.body) or self._may_be_lazy(node.orelse)
        return False

    # Aliases: variables that may hold the same tensor, because one was assigned to the other.

    def _alias(self, name: str) -> set[str]:
        return self.aliases.get(name, {name})

    def _assign_alias(self, name: str, value: ast.expr, forget: bool = True) -> None:
        same = {name}.union(*(self._alias(source) for source in _values(value)))
        if forget:
            self.aliases = {key: names - {name} for key, names in self.aliases.items() if key != name}
        for other in same:
            self.aliases[other] = self._alias(other) | same

    def _assign_aliases_of(self, body: list[ast.stmt]) -> None:
        """Those that any number of runs of a loop's body may make."""
        for _ in range(2):
            for node in _walk(body):
                if _assigns_name(node):
                    self._assign_alias(node.targets[0].id, node.value, forget=False)  # type: ignore[attr-defined]

    # Liveness: each statement learns the names that are read after it, and those read in it or after it.

    def _live(self, body: list[ast.stmt], after: Names) -> Names:
        for statement in reversed(body):
            after = self._live_statement(statement, after)
        return after

    def _live_statement(self, node: Any, after: Names) -> Names:
        own: list[ast.AST] = [node]
        if isinstance(node, ast.If):
            after = self._live(node.body, after) | self._live(node.orelse, after)
            own = [node.test]
        elif isinstance(node, (ast.For, ast.While)):
            own = [node.iter if isinstance(node, ast.For) else node.test]
            after = self._live(node.orelse, after)
            for _ in range(2):
                after = after | self._live(node.body, after | _loads(own))
        elif isinstance(node, ast.With):
            after = self._live(node.body, after)
            own = [item.context_expr for item in node.items]
        elif isinstance(node, ast.Try):
            after = after | self.locals
            for inner in (node.body, node.orelse, node.finalbody, *(handler.body for handler in node.handlers)):
                self._live(inner, after)
            own = []
        elif isinstance(node, (ast.Return, ast.Raise)):
            after = frozenset()
        elif isinstance(node, (ast.Break, ast.Continue)):
            after = self.locals
        node.live_after = after
        stored = {n.id for n in _targets(node)} if isinstance(node, ast.Assign) else set()
        node.live_before = (after - stored) | _loads(own)
        return node.live_before

    def _dead_after(self, name: ast.Name) -> bool:
        """True if nobody reads the value of this variable after this read of it."""
        node, alias = self.statement, self._alias(name.id)
        if self.comprehension:
            return False
        stored = set()
        if _assigns_name(node):
            stored = {node.targets[0].id}
        elif isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
            stored = {node.target.id}
        if (alias - stored) & node.live_after:
            return False
        own = _own_expressions(node)
        nodes = [n for tree in own for n in ast.walk(tree)]
        reads = sum(isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load) and n.id in alias for n in nodes)
        return reads + (isinstance(node, ast.AugAssign) and bool(stored & alias)) == 1

    # Statements

    def _block(
        self, body: list[ast.stmt], pending: set[str], bound: set[str]
    ) -> tuple[list[ast.stmt], set[str] | None]:
        """The new statements, and the variables that may be pending after them (None: never reached).

        `bound` are the variables that are certainly assigned; it is extended.
        """
        new: list[ast.stmt] = []
        for statement in body:
            self.pending, self.statement = pending, statement
            forced = pending if not self._keeps_pending(statement) else self._unread(statement)
            new += self._settle_all(forced, statement)
            self.pending = pending - forced
            statements, after = self._statement(statement, bound)
            new += statements
            if after is None:
                return new, None
            # What was read is not pending any more: it was evaluated, or has become a part of something else.
            read = set() if hasattr(statement, "body") else _loads([statement]) - {n.id for n in _targets(statement)}
            pending = after - read
        return new, pending

    def _unread(self, statement: Any) -> set[str]:
        """Pending variables that the statement overwrites, or nobody reads any more: they are computed all the same."""
        overwritten = {n.id for n in _targets(statement)} if isinstance(statement, ast.For) else set()
        return {name for name in self.pending if name not in statement.live_before or name in overwritten}

    def _settle_all(self, names: Iterable[str], where: ast.AST) -> list[ast.stmt]:
        return [
            ast.copy_location(
                ast.Assign([ast.Name(name, ast.Store())], _helper("settle", ast.Name(name, ast.Load()))), where
            )
            for name in sorted(names)
        ]

    def _statement(self, node: ast.stmt, bound: set[str]) -> tuple[list[ast.stmt], set[str] | None]:
        pending = self.pending
        if isinstance(node, _FUNCTION_NODES):
            bound.add(node.name)
            return [node], pending
        if isinstance(node, (ast.If, ast.For, ast.While, ast.With, ast.Try)):
            return self._compound(node, bound)
        node_copy = copy.copy(node)
        if _assigns_name(node) or (
            isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value
        ):
            assert isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            assert isinstance(target, ast.Name)
            value, may = self._expression(node.value)
            if may and target.id not in self.lazy_names:
                value, may = _helper("force", value), False
            node_copy.value = value  # type: ignore[attr-defined]
            bound.add(target.id)
            self._assign_alias(target.id, node.value)
            may = may and not isinstance(node.value, ast.Name)
            return [node_copy], (pending | {target.id}) if may else (pending - {target.id})
        if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name) and node.target.id in self.lazy_names:
            name = ast.copy_location(ast.Name(node.target.id, ast.Load()), node.target)
            if isinstance(node.op, ast.Add):
                value = self._addition("add_", name, node.value)
                assign = ast.Assign([ast.Name(name.id, ast.Store())], value)
                self.changed = True
                return [ast.copy_location(assign, node)], pending | {name.id}
            node_copy.value = self._raw(node.value)  # type: ignore[attr-defined]
            return [*self._settle_all([name.id], node), node_copy], pending - {name.id}
        if isinstance(node, ast.Return) and node.value is not None:
            value, may = self._expression(node.value)
            if may and self.contexts:
                value = _helper("force", value)
            node_copy.value = value  # type: ignore[attr-defined]
            return [node_copy], None
        if isinstance(node, ast.Delete):
            names = {target.id for target in node.targets if isinstance(target, ast.Name)}
            bound -= names
            return [node], pending - names
        for target in _targets(node):
            bound.add(target.id)
            pending = pending - {target.id}
        if isinstance(node, ast.Expr):  # such as `outputs.append(x)`: nobody reads what it returns
            node_copy.value = self._raw_children(node.value)  # type: ignore[attr-defined]
            return [node_copy], pending
        new = self._raw_children(node)
        ended = isinstance(node, (ast.Return, ast.Raise))
        if isinstance(node, (ast.Break, ast.Continue)):
            return [*self._settle_all(pending - self.before_loop, node), new], None
        return [new], None if ended else pending

    def _compound(self, node: Any, bound: set[str]) -> tuple[list[ast.stmt], set[str] | None]:
        node_copy = copy.copy(node)
        if isinstance(node, ast.If):
            node_copy.test = self._raw(node.test)
        pending = self.pending - _loads(_own_expressions(node))
        if isinstance(node, ast.If):
            bounds = [set(bound), set(bound)]
            branches, before, aliases = [], self.aliases, []
            for part, inner in zip((node.body, node.orelse), bounds, strict=True):
                self.aliases = before
                branches.append(self._block(part, set(pending), inner))
                aliases.append(self.aliases)
            one, other = aliases
            self.aliases = {name: one.get(name, {name}) | other.get(name, {name}) for name in {*one, *other}}
            outs = [out for _, out in branches if out is not None]
            common = set.intersection(*outs) if outs else set()
            for (new, out), name in zip(branches, ("body", "orelse"), strict=True):
                extra = set() if out is None else out - bound - common
                setattr(node_copy, name, new + self._settle_all(extra, node))
            both = [b for b, (_, out) in zip(bounds, branches, strict=True) if out is not None]
            bound |= set.intersection(*both) if both else set()
            return [node_copy], set.union(*outs) & (bound | common) if outs else None
        if isinstance(node, (ast.For, ast.While)):
            inner = set(bound)
            self._assign_aliases_of(node.body)
            if isinstance(node, ast.For):
                node_copy.iter = self._raw(node.iter)
                targets = {n.id for n in ast.walk(node.target) if isinstance(n, ast.Name)}
                inner |= targets
            else:
                targets = set()
                head = pending | (self.pendable & bound & _stores(node.body))
                self.pending = head
                node_copy.test = self._raw(node.test)
            head = (pending | (self.pendable & bound & _stores(node.body))) - targets
            outer, self.before_loop = self.before_loop, set(bound)
            new, out = self._block(node.body, set(head), inner)
            self.before_loop = outer
            node_copy.body = new + self._settle_all((out or set()) - bound, node)
            self._assign_aliases_of(node.body)
            after = head | ((out or set()) & bound)
            node_copy.orelse, out = self._block(node.orelse, after, bound)
            return [node_copy], after | (out or set())
        # What is computed in a context, or may raise there, is computed there.
        self.contexts += 1
        inside = [s for field in ("body", "orelse", "finalbody") for s in getattr(node, field, [])]
        self._assign_aliases_of(inside)
        if isinstance(node, ast.With):
            node_copy.items = [self._raw_children(item) for item in node.items]
            parts = [(node_copy, "body", node.body, bound)]
        else:
            node_copy.handlers = [copy.copy(handler) for handler in node.handlers]
            parts = [(node_copy, name, getattr(node, name), set(bound)) for name in ("body", "orelse", "finalbody")]
            parts += [(handler, "body", handler.body, set(bound)) for handler in node_copy.handlers]
        for owner, name, body, inner in parts:
            new, out = self._block(body, set(), inner)
            setattr(owner, name, new + self._settle_all(out or (), node))
        self.contexts -= 1
        self._assign_aliases_of(inside)
        return [node_copy], set()

    def _keeps_pending(self, node: ast.stmt) -> bool:
        """True if a pending `Lazy` may be evaluated after this statement as well as before it."""
        for tree in _own_expressions(node):
            conditional = [n for n in ast.walk(tree) if isinstance(n, (ast.IfExp, ast.BoolOp))]
            if self.pending & _loads(conditional):
                return False
        if isinstance(node, (ast.If, ast.While)):
            return self._is_pure(node.test)
        if isinstance(node, ast.For):
            return self._is_pure(node.iter)
        if isinstance(node, ast.Assign):
            return all(_is_names(target) or _counts_batches(target) for target in node.targets) and self._is_pure(
                node.value
            )
        if isinstance(node, ast.AnnAssign):
            return isinstance(node.target, ast.Name) and (node.value is None or self._is_pure(node.value))
        if isinstance(node, ast.AugAssign):
            if _counts_batches(node.target):
                return self._is_pure(node.value)
            add = isinstance(node.op, ast.Add) and isinstance(node.target, ast.Name)
            return add and node.target.id in self.lazy_names and self._is_pure(node.value)  # type: ignore[union-attr]
        if isinstance(node, ast.Return):
            return node.value is None or self._is_pure(node.value)
        if isinstance(node, ast.Assert):
            return self._is_pure(node.test)
        if isinstance(node, ast.Expr):
            call = node.value
            if isinstance(call, ast.Call) and (_counts_batches(call.func) or self._resolve(call.func) is torch._assert):
                return all(self._is_pure(argument) for argument in call.args)
            return isinstance(call, ast.Constant)
        return isinstance(node, (ast.Pass, ast.Break, ast.Continue, ast.Delete))

    def _is_pure(self, node: ast.expr) -> bool:
        return all(self._is_pure_call(call) for call in ast.walk(node) if isinstance(call, ast.Call)) and not any(
            isinstance(inner, (ast.Lambda, *_COMPREHENSIONS)) for inner in ast.walk(node)
        )

    def _is_pure_call(self, node: ast.Call) -> bool:
        """False if a call could change more than its arguments, which `guard` sees to, and random states."""
        chain, root = _chain(node.func)
        if any(keyword.arg in ("inplace", "out") for keyword in node.keywords) and self._kind(node) == "plain":
            return False
        if isinstance(root, ast.Name) and root.id == self.self_name:
            own = not chain or (len(chain) == 1 and hasattr(self.cls, chain[0]))
            return not own and not chain[-1].endswith("_")
        if isinstance(root, ast.Name) and root.id in self.locals:
            return not chain or not chain[-1].endswith("_") or self._kind(node) == "method"
        if isinstance(root, ast.Name):
            if self._kind(node) != "plain":
                return True
            found = self.function.__globals__.get(root.id)
            if isinstance(found, ModuleType) and found.__name__.split(".")[0] in ("torch", "math"):
                return not chain[-1].endswith("_") and not chain[-1].startswith("set_")
            return found is None and root.id in _PURE and root.id not in self.function.__code__.co_freevars
        if isinstance(node.func, ast.Attribute):  # of an expression
            return not node.func.attr.endswith("_") or self._kind(node) == "method"
        return not (isinstance(root, ast.Call) and isinstance(root.func, ast.Name) and root.func.id == "super")

    # Expressions

    def _kind(self, node: ast.Call) -> str:
        """How a call is written: "call" (one argument), "invoke", "method" (of what may be a tensor) or "plain"."""
        if any(isinstance(argument, ast.Starred) for argument in node.args) or any(
            k.arg is None for k in node.keywords
        ):
            return "plain"
        chain, root = _chain(node.func)
        helper = "call" if len(node.args) == 1 and not node.keywords else "invoke"
        if not (node.args or node.keywords) or (chain and chain[-1].endswith("_")):
            helper = "plain"
        if isinstance(root, ast.Name):
            if root.id == self.self_name:
                return helper if chain else "plain"
            if root.id in self.locals:
                if len(chain) == 1 and root.id in self.lazy_names:
                    return "method" if chain[0] in lazy.TENSOR_METHODS else "plain"
                return helper
            found = self._resolve(node.func)
            known = isinstance(found, nn.Module) or lazy.is_known(found)
            return helper if known else "plain"
        if isinstance(node.func, ast.Attribute) and not _is_super(root):
            return "method" if chain[-1] in lazy.TENSOR_METHODS else "plain"
        return helper

    def _resolve(self, node: ast.expr) -> Any:
        """The object that a dotted global name stands for now, or None."""
        chain, root = _chain(node)
        if not isinstance(root, ast.Name) or root.id in self.locals or root.id in self.function.__code__.co_freevars:
            return None
        found = self.function.__globals__.get(root.id, getattr(builtins, root.id, None))
        for name in chain:
            if not isinstance(found, (type(torch), type)):  # a module or class: nothing is run
                return None
            found = getattr(found, name, None)
        return found

    def _expression(self, node: ast.expr) -> tuple[ast.expr, bool]:
        """The new expression, and whether it may be a `Lazy`, which nobody else then holds while it is pending."""
        if isinstance(node, ast.Name):
            if node.id not in self.lazy_names:
                return node, False
            return (
                _helper("settle", node) if node.id in self.pendable and not self._is_last_read(node) else node
            ), True
        if isinstance(node, ast.Call) and not self.comprehension:
            kind = self._kind(node)
            if kind != "plain":
                self.changed = True
                return ast.copy_location(self._call(kind, node), node), True
        if isinstance(node, ast.BinOp) and self._may_be_lazy(node) and not self.comprehension:
            self.changed = True
            return ast.copy_location(self._addition("add", node.left, node.right), node), True
        if isinstance(node, ast.Attribute) and node.attr in lazy.ATTRIBUTES and self._is_lazy_name(node.value):
            return _helper("attribute", ast.Constant(node.attr), node.value), False
        if isinstance(node, ast.Compare) and isinstance(node.ops[0], (ast.Is, ast.IsNot)):
            comparison = copy.copy(node)
            comparison.left, comparison.comparators = self._child(node.left), [self._raw(v) for v in node.comparators]
            return comparison, False
        if isinstance(node, ast.IfExp):
            new = copy.copy(node)
            new.test = self._raw(node.test)
            (new.body, one), (new.orelse, other) = self._expression(node.body), self._expression(node.orelse)
            return new, one or other
        return self._raw_children(node), False

    def _is_lazy_name(self, node: ast.expr) -> bool:
        return isinstance(node, ast.Name) and node.id in self.lazy_names

    def _is_last_read(self, node: ast.Name) -> bool:
        """True for `return x` and the like; an assignment makes an alias."""
        return isinstance(self.statement, ast.Return) and self._dead_after(node)

    def _call(self, kind: str, node: ast.Call) -> ast.expr:
        if kind == "call":
            f = self._child(node.func)
            x, last = self._argument(node.args[0])
            return _helper("call", f, x, ast.Constant(last), ast.Constant(self.channels_last))
        # A known function writes to nothing but its first argument.
        guarded = kind == "invoke" and not lazy.is_known(self._resolve(node.func))
        arguments = [self._argument(node.args[0])[0]] if node.args and kind == "invoke" else []
        arguments += [self._argument(argument, guarded)[0] for argument in node.args[len(arguments) :]]
        keywords = [ast.keyword(k.arg, self._argument(k.value, guarded)[0]) for k in node.keywords]
        if kind == "invoke":
            call = _helper("invoke", ast.Constant(self.channels_last), self._raw(node.func), *arguments)
        else:
            assert isinstance(node.func, ast.Attribute)
            call = _helper("method", ast.Constant(node.func.attr), self._argument(node.func.value)[0], *arguments)
        call.keywords = keywords
        return call

    def _child(self, node: ast.expr) -> ast.expr:
        """`self.name`, for a child without `nn.Module.__getattr__`, which takes longer than the rest of a call."""
        if not isinstance(node, ast.Attribute) or not isinstance(node.value, ast.Name):
            return self._raw(node)
        if node.value.id != self.self_name or hasattr(self.cls, node.attr):
            return self._raw(node)
        key, children = ast.Constant(node.attr), ast.Name(_CHILDREN, ast.Load())
        child = ast.Subscript(children, key, ast.Load())
        return ast.copy_location(ast.IfExp(ast.Compare(key, [ast.In()], [children]), child, node), node)

    def _argument(self, node: ast.expr, guarded: bool = True) -> tuple[ast.expr, bool]:
        """An argument of a helper, which may write to it if it is guarded, and whether it is its last reader."""
        last = False
        if isinstance(node, ast.Name) and node.id in self.lazy_names:
            last = self._dead_after(node)
            new: ast.expr = node if last or node.id not in self.pendable else _helper("settle", node)
        else:
            new, may = self._expression(node)
            last = may
        if isinstance(node, ast.Constant) or not guarded:
            return new, last
        # A pending variable that the argument reads is not pending any more.
        others = sorted(name for name in self.pending - _loads([node]) if self._is_read(name))
        if others:
            return _helper("guard", new, *(ast.Name(p, ast.Load()) for p in others)), last
        return new, last

    def _is_read(self, name: str) -> bool:
        """True if a variable is read in or after the statement."""
        node = self.statement
        return name.startswith("_resfuse_") or name in node.live_after or name in _loads(_own_expressions(node))

    def _addition(self, helper: str, left: ast.expr, right: ast.expr) -> ast.expr:
        pending = self.pending
        if isinstance(left, ast.Name) and isinstance(right, ast.Name):  # evaluated before anything is written
            self.pending = pending - {right.id}
        a, _ = self._argument(left)
        self.pending = pending
        added: set[str] = set()
        if not isinstance(left, ast.Name) and any(isinstance(n, ast.Call) for n in ast.walk(right)):
            # While the right side runs, the left one is pending.
            name = f"_resfuse_left{self.temporaries}"
            self.temporaries += 1
            a = ast.NamedExpr(ast.Name(name, ast.Store()), a)
            added = {name}
        self.pending = self.pending | added
        b, last = self._argument(right) if not isinstance(right, ast.Name) else self._unguarded(right, left)
        self.pending = self.pending - added
        return _helper(helper, a, b, ast.Constant(last and isinstance(right, (ast.Name, ast.Call))))

    def _unguarded(self, node: ast.Name, left: ast.expr) -> tuple[ast.expr, bool]:
        """An argument that is only read; its memory is given away if no pending value but the sum could read it."""
        if node.id not in self.lazy_names:
            return node, False
        last = self._dead_after(node) and not (self.pending - _loads([left]) - {node.id})
        return (node if last or node.id not in self.pendable else _helper("settle", node)), last

    def _raw(self, node: ast.expr) -> ast.expr:
        """The new expression; its value is no `Lazy`."""
        if isinstance(node, ast.Name) and node.id in self.lazy_names:
            return _helper("force", node)
        new, may = self._expression(node)
        return _helper("force", new) if may else new

    def _raw_children(self, node: Any) -> Any:
        if isinstance(node, _FUNCTION_NODES):
            return node
        self.comprehension += isinstance(node, _COMPREHENSIONS)
        new = copy.copy(node)
        for field, value in ast.iter_fields(node):
            if isinstance(value, ast.expr):
                is_read = not isinstance(getattr(value, "ctx", None), (ast.Store, ast.Del)) or not isinstance(
                    value, ast.Name
                )
                setattr(new, field, self._raw(value) if is_read else value)
            elif isinstance(value, ast.AST):
                setattr(new, field, self._raw_children(value))
            elif isinstance(value, list):
                setattr(new, field, [
                    self._raw(v) if isinstance(v, ast.expr) and not isinstance(getattr(v, "ctx", None), ast.Store)
                    else self._raw_children(v) if isinstance(v, ast.AST) else v
                    for v in value
                ])  # fmt: skip
        self.comprehension -= isinstance(node, _COMPREHENSIONS)
        return new


def _helper(name: str, *arguments: ast.expr) -> ast.Call:
    return ast.Call(ast.Name(f"_resfuse_{name}", ast.Load()), list(arguments), [])


def _chain(node: ast.expr) -> tuple[list[str], ast.expr]:
    """The attributes of a dotted expression, and what they begin at."""
    chain: list[str] = []
    while isinstance(node, ast.Attribute):
        chain.insert(0, node.attr)
        node = node.value
    return chain, node


def _is_super(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"


def _walk(body: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """All nodes, without those of nested functions."""
    for node in body:
        yield node
        if not isinstance(node, _FUNCTION_NODES):
            yield from _walk(ast.iter_child_nodes(node))


def _loads(trees: Iterable[ast.AST]) -> Names:
    """Names that are read, by nested functions too; a `+=` reads its target."""
    found: set[str] = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            found.add(node.id)
        elif isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
    return frozenset(found)


def _stores(body: list[ast.stmt]) -> set[str]:
    return {n.id for s in body for n in ast.walk(s) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


def _targets(node: ast.AST) -> list[ast.Name]:
    """Variables that a simple statement assigns."""
    found = []
    for target in [*getattr(node, "targets", []), getattr(node, "target", None)]:
        if target is not None:
            found += [n for n in ast.walk(target) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        found += [ast.Name((alias.asname or alias.name).split(".")[0], ast.Store()) for alias in node.names]
    return found


def _own_expressions(node: Any) -> list[ast.AST]:
    """What a statement evaluates itself, without the statements in it."""
    if isinstance(node, (ast.If, ast.While)):
        return [node.test]
    if isinstance(node, ast.For):
        return [node.iter]
    if isinstance(node, ast.With):
        return list(node.items)
    return [] if isinstance(node, ast.Try) else [node]


def _assigns_name(node: ast.AST) -> bool:
    return isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)


def _is_names(target: ast.expr) -> bool:
    return all(isinstance(node, (ast.Name, ast.Tuple, ast.List, ast.expr_context)) for node in ast.walk(target))


def _counts_batches(node: ast.expr) -> bool:
    """True for `self.num_batches_tracked` and its methods, which no convolution reads."""
    return "num_batches_tracked" in _chain(node)[0]


def _values(node: ast.expr) -> Iterator[str]:
    """Variables whose value an expression may have."""
    if isinstance(node, ast.Name):
        yield node.id
    elif isinstance(node, ast.IfExp):
        yield from _values(node.body)
        yield from _values(node.orelse)
    elif isinstance(node, ast.BoolOp):
        for value in node.values:
            yield from _values(value)


def _parameters(arguments: ast.arguments) -> frozenset[str]:
    """Positional and keyword parameters; `*args` and `**options` hold no tensors themselves."""
    return frozenset(argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs))
