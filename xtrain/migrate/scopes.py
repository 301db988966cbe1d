"""What the names of a Python file stand for: imports, their aliases, and what `deepspeed.initialize` returned.

Follows names through functions, classes, tuples, arguments and return values of functions of the same file. It knows
no other file and no types; a name that it cannot follow stands for nothing.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from xtrain.migrate.use import ACCELERATOR, DEEPSPEED_PACKAGES, ENGINE

Function = ast.FunctionDef | ast.AsyncFunctionDef


def _either(*paths: str) -> tuple[str, ...]:
    """Dotted names below `deepspeed`, and as a script has them that says `import xtrain as deepspeed`."""
    return tuple(f"{package}.{path}" for package in DEEPSPEED_PACKAGES for path in paths)


_CLASSES = _either("DeepSpeedEngine", "runtime.engine.DeepSpeedEngine")
_INITIALIZE = _either("initialize")
_ACCELERATORS = _either(
    "get_accelerator", "accelerator.get_accelerator", "accelerator.real_accelerator.get_accelerator"
)
_STEPS = (ast.Assign, ast.AnnAssign, ast.NamedExpr, ast.Call, ast.Return)
_ROUNDS = 4  # how often values are handed on through assignments, calls and returns


class Scope:
    """The names of a module, class or function.

    Attributes:
        names: name -> the dotted name that it stands for; None where the scope has it for something else.
        parent: where names are looked up that are not in it.
        owner: the class that the function is a method of.
        steps: the assignments, calls and returns in it, in order.
    """

    def __init__(self, node: ast.AST, parent: Scope | None, owner: ast.ClassDef | None = None) -> None:
        self.node = node
        self.parent = parent
        self.owner = owner
        self.names: dict[str, str | None] = {}
        self.imported: set[str] = set()
        self.steps: list[ast.AST] = []

    def lookup(self, name: str) -> str | None:
        """What a name stands for here."""
        scope: Scope | None = self
        while scope is not None:
            if name in scope.names and (scope is self or not isinstance(scope.node, ast.ClassDef)):
                return scope.names[name]
            scope = scope.parent
        return None


def own_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a scope in order, without those of functions and classes in it (but with their heads)."""
    stack = list(reversed(list(_children(node))))
    while stack:
        inner = stack.pop()
        yield inner
        if not isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            stack += reversed(list(ast.iter_child_nodes(inner)))


def _children(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield from node.body
    elif isinstance(node, ast.Lambda):
        yield node.body


def parameters(arguments: ast.arguments) -> list[ast.arg]:
    """A function's parameters by position, then those by keyword only."""
    return [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]


def text_of(node: ast.expr) -> str | None:
    """The value of a string literal."""
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


class Names:
    """All scopes of a file.

    Attributes:
        scopes: the node of a module, class, function or lambda -> its scope.
    """

    def __init__(self, tree: ast.Module) -> None:
        self.scopes: dict[ast.AST, Scope] = {}
        self._attributes: dict[tuple[ast.ClassDef, str], str] = {}
        self._functions: dict[str, list[Function]] = {}
        self._returns: dict[Function, tuple[str | None, ...]] = {}
        self._build(tree, None, None)
        for _ in range(_ROUNDS):
            before = self._known()
            for scope in self.scopes.values():
                self._follow(scope)
            if self._known() == before:
                break

    def _known(self) -> int:
        named = sum(value is not None for scope in self.scopes.values() for value in scope.names.values())
        returned = sum(value is not None for values in self._returns.values() for value in values)
        return named + returned + len(self._attributes)

    # ------------------------------------------------------------ building

    def _build(self, node: ast.AST, parent: Scope | None, owner: ast.ClassDef | None) -> None:
        scope = self.scopes[node] = Scope(node, parent, owner)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            self._functions.setdefault(node.name, []).append(node)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            for parameter in parameters(node.args):
                scope.names[parameter.arg] = None
        inner = node if isinstance(node, ast.ClassDef) else owner
        for child in own_nodes(node):
            if isinstance(child, _STEPS):
                scope.steps.append(child)
            if isinstance(child, ast.Import):
                self._import(scope, child)
            elif isinstance(child, ast.ImportFrom) and child.module and not child.level:
                for alias in child.names:
                    self._bind(scope, alias.asname or alias.name, f"{child.module}.{alias.name}")
            elif isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
                scope.names.setdefault(child.id, None)
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                scope.names.setdefault(child.name, None)
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
                self._build(child, scope, inner)

    def _import(self, scope: Scope, node: ast.Import) -> None:
        for alias in node.names:
            if alias.asname:
                self._bind(scope, alias.asname, alias.name)
            else:
                root = alias.name.partition(".")[0]
                self._bind(scope, root, root)

    @staticmethod
    def _bind(scope: Scope, name: str, target: str) -> None:
        # `except ImportError: X = None` and a second import in the handler leave the first one standing.
        if scope.names.get(name) is None:
            scope.names[name] = target
            scope.imported.add(name)

    # ------------------------------------------------------------ following values

    def _follow(self, scope: Scope) -> None:
        node = scope.node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for parameter in parameters(node.args):
                if parameter.annotation is not None and self._is_engine_type(parameter.annotation, scope):
                    scope.names[parameter.arg] = ENGINE
        for child in scope.steps:
            if isinstance(child, ast.Assign):
                for target in child.targets:
                    self._assign(target, child.value, scope)
            elif isinstance(child, ast.AnnAssign | ast.NamedExpr) and child.value is not None:
                self._assign(child.target, child.value, scope)
            elif isinstance(child, ast.Call):
                self._hand_on(child, scope)
            elif isinstance(child, ast.Return) and child.value is not None:
                self._return(node, child.value, scope)

    def _is_engine_type(self, annotation: ast.expr, scope: Scope) -> bool:
        written = text_of(annotation)
        if written is not None:
            return written.rpartition(".")[2] == "DeepSpeedEngine"
        return any(
            self.resolve(inner, scope) in _CLASSES
            for inner in ast.walk(annotation)
            if isinstance(inner, ast.Name | ast.Attribute)
        )

    def _assign(self, target: ast.expr, value: ast.expr, scope: Scope) -> None:
        if isinstance(target, ast.Tuple | ast.List):
            if isinstance(value, ast.Tuple | ast.List) and len(value.elts) == len(target.elts):
                for inner, part in zip(target.elts, value.elts, strict=True):
                    self._assign(inner, part, scope)
                return
            for inner, dotted in zip(target.elts, self.parts(value, scope), strict=False):
                self._name(inner, dotted, scope)
            return
        self._name(target, self.resolve(value, scope), scope)

    def _name(self, target: ast.expr, dotted: str | None, scope: Scope) -> None:
        if dotted is None:
            return
        if isinstance(target, ast.Name):
            if target.id not in scope.imported and scope.names.get(target.id) is None:
                scope.names[target.id] = dotted
        elif (
            isinstance(target, ast.Attribute)
            and scope.owner is not None
            and self._is_self(target.value, scope)
        ):
            self._attributes.setdefault((scope.owner, target.attr), dotted)

    @staticmethod
    def _is_self(node: ast.expr, scope: Scope) -> bool:
        return isinstance(node, ast.Name) and node.id == "self" and scope.owner is not None

    def _callee(self, node: ast.expr, scope: Scope) -> Function | None:
        """The function of this file that is called, when there is one of that name only."""
        if isinstance(node, ast.Name):
            name = node.id
        elif isinstance(node, ast.Attribute) and self._is_self(node.value, scope):
            name = node.attr
        else:
            return None
        named = self._functions.get(name, [])
        return named[0] if len(named) == 1 else None

    def _hand_on(self, call: ast.Call, scope: Scope) -> None:
        """Engines that are arguments of the file's own functions are engines in there."""
        function = self._callee(call.func, scope)
        if function is None:
            return
        inside = self.scopes[function]
        accepted = [parameter.arg for parameter in parameters(function.args)]
        if isinstance(call.func, ast.Attribute) and accepted[:1] == ["self"]:
            accepted = accepted[1:]
        given = [*zip(accepted, call.args, strict=False)]
        given += [(word.arg, word.value) for word in call.keywords if word.arg in accepted]
        for name, value in given:
            if self.resolve(value, scope) in (ENGINE, ACCELERATOR) and inside.names.get(name) is None:
                inside.names[name] = self.resolve(value, scope)

    def _return(self, function: ast.AST, value: ast.expr, scope: Scope) -> None:
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            return
        if isinstance(value, ast.Tuple):
            parts: tuple[str | None, ...] = tuple(self.resolve(inner, scope) for inner in value.elts)
        else:
            parts = (self.resolve(value, scope),)
        if any(part in (ENGINE, ACCELERATOR) for part in parts):
            self._returns[function] = tuple(part if part in (ENGINE, ACCELERATOR) else None for part in parts)

    # ------------------------------------------------------------ resolving

    def parts(self, value: ast.expr, scope: Scope) -> tuple[str | None, ...]:
        """What the items of a returned tuple stand for."""
        if not isinstance(value, ast.Call):
            return ()
        if self.resolve(value.func, scope) in _INITIALIZE:
            return (ENGINE,)
        function = self._callee(value.func, scope)
        return self._returns.get(function, ()) if function is not None else ()

    def resolve(self, node: ast.expr, scope: Scope) -> str | None:
        """The dotted name that an expression stands for, or None."""
        if isinstance(node, ast.Name):
            return scope.lookup(node.id)
        if isinstance(node, ast.Attribute):
            if scope.owner is not None and self._is_self(node.value, scope):
                return self._attributes.get((scope.owner, node.attr))
            base = self.resolve(node.value, scope)
            return f"{base}.{node.attr}" if base is not None else None
        if isinstance(node, ast.Subscript):
            index = node.slice.value if isinstance(node.slice, ast.Constant) else None
            parts = self.parts(node.value, scope)
            return parts[index] if isinstance(index, int) and 0 <= index < len(parts) else None
        if isinstance(node, ast.IfExp):  # x = deepspeed.zero if ... else None
            return self.resolve(node.body, scope) or self.resolve(node.orelse, scope)
        return self._call(node, scope) if isinstance(node, ast.Call) else None

    def _call(self, node: ast.Call, scope: Scope) -> str | None:
        """`getattr(deepspeed, "x")`, `importlib.import_module("deepspeed.x")`, and what the file's functions return."""
        called = self.resolve(node.func, scope)
        if called in _ACCELERATORS:
            return ACCELERATOR
        if called in _CLASSES:
            return ENGINE
        if isinstance(node.func, ast.Name) and called is None:
            if node.func.id in ("getattr", "hasattr") and len(node.args) > 1:
                base, name = self.resolve(node.args[0], scope), text_of(node.args[1])
                return f"{base}.{name}" if base is not None and name is not None else None
            if node.func.id == "__import__" and node.args:
                return text_of(node.args[0])
        if called == "importlib.import_module" and node.args:
            return text_of(node.args[0])
        parts = self.parts(node, scope)
        return parts[0] if len(parts) == 1 and called not in _INITIALIZE else None
