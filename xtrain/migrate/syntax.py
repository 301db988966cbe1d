"""The uses in one Python file, from its syntax tree."""

from __future__ import annotations

import ast
import re

from xtrain.migrate.configs import config_in_python
from xtrain.migrate.scopes import Names, Scope, text_of
from xtrain.migrate.shell import command_of, variables_of
from xtrain.migrate.use import ACCELERATOR, CUDA_LIBRARIES, ENGINE, Use, kind_of

_IMPORT_ERRORS = {"ImportError", "ModuleNotFoundError", "Exception", "BaseException"}
_DEVICE = re.compile(r"^cuda(:(\d+|%\w|\{\w*\})?)?$")
_TYPE = re.compile(r"^torch\.cuda\.\w+$")
_BACKEND = re.compile(r"^(?:cpu:\w+,)?(?:cuda:)?nccl(?:,\w+:\w+)*$")
_COMMAND = re.compile(
    r"^\s*(?:\w+=\S+\s+)*(?:deepspeed|torchrun|accelerate launch|python\S* -m torch\.distributed)\s\S.*"
)
_METHODS = {"cuda": "Tensor.cuda", "pin_memory": "Tensor.pin_memory"}
_AVAILABLE = re.compile(r"avail|has_|have_|is_installed|find_spec|TYPE_CHECKING|is_imported", re.IGNORECASE)


def _catches_missing(handler: ast.ExceptHandler) -> bool:
    if handler.type is None:
        return True
    return any(isinstance(node, ast.Name) and node.id in _IMPORT_ERRORS for node in ast.walk(handler.type))


class _Uses(ast.NodeVisitor):
    """Walks a file; `optional` says whether the place is one that the file can do without."""

    def __init__(self, tree: ast.Module, shown: str) -> None:
        self.names = Names(tree)
        self.scope: Scope = self.names.scopes[tree]
        self.shown = shown
        self.optional = False
        self.guarded = False  # below a question whether CUDA is there
        self.found: dict[Use, None] = {}
        self._perhaps: set[str] = set()  # names that only optional imports bind
        self._surely: set[str] = set()

    def add(self, node: ast.AST, kind: str, name: str, value: object = None) -> None:
        """Note a use; the same one in the same line counts once."""
        line = getattr(node, "lineno", 1)
        optional = self.optional or (self.guarded and kind == "cuda")
        self.found.setdefault(Use(self.shown, line, kind, name, optional, value=value))

    def dotted(self, node: ast.AST, name: str) -> None:
        """Note a dotted name, if it is one that counts."""
        kind = kind_of(name)
        if kind is not None:
            self.add(node, kind, name.replace(ENGINE, "engine", 1).replace(ACCELERATOR, "accelerator", 1))

    # ------------------------------------------------------------ scopes

    def _inside(self, node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        outer, self.scope = self.scope, self.names.scopes[node]
        statements = node.body
        if statements and isinstance(statements[0], ast.Expr) and text_of(statements[0].value) is not None:
            statements = statements[1:]
        for statement in statements:
            self.visit(statement)
        self.scope = outer

    def visit_Module(self, node: ast.Module) -> None:
        self._inside(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for head in (*node.decorator_list, *node.bases, *node.keywords):
            self.visit(head)
        self._inside(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._function(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        self._function(node)

    def _function(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        for head in (*node.decorator_list, node.args, *([node.returns] if node.returns else [])):
            self.visit(head)
        self._inside(node)

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self.visit(node.args)
        outer, self.scope = self.scope, self.names.scopes.get(node, self.scope)
        self.visit(node.body)
        self.scope = outer

    # ------------------------------------------------------------ what makes a use optional

    def visit_Try(self, node: ast.Try) -> None:
        outer = self.optional
        self.optional = outer or any(_catches_missing(handler) for handler in node.handlers)
        for statement in node.body:
            self.visit(statement)
        self.optional = outer
        for part in (*node.handlers, *node.orelse, *node.finalbody):
            self.visit(part)

    def _questions(self, test: ast.expr) -> tuple[bool, bool]:
        """Whether a condition asks for an installed package, and whether for a device of CUDA."""
        package = device = False
        for node in ast.walk(test):
            if isinstance(node, ast.Attribute | ast.Name):
                dotted = self.names.resolve(node, self.scope) or ""
                last = node.attr if isinstance(node, ast.Attribute) else node.id
                about_cuda = dotted.startswith("torch.cuda") or "cuda" in last.lower()
                device = device or (about_cuda and bool(_AVAILABLE.search(last)))
                package = package or (not about_cuda and bool(_AVAILABLE.search(last)))
        return package, device

    def _branch(self, test: ast.expr, body: list[ast.stmt] | list[ast.expr]) -> None:
        package, device = self._questions(test)
        outer = self.optional, self.guarded
        self.optional, self.guarded = outer[0] or package, outer[1] or device
        for inner in body:
            self.visit(inner)
        self.optional, self.guarded = outer

    def visit_If(self, node: ast.If) -> None:
        self.visit(node.test)
        self._branch(node.test, node.body)
        for statement in node.orelse:
            self.visit(statement)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self.visit(node.test)
        self._branch(node.test, [node.body])
        self.visit(node.orelse)

    # ------------------------------------------------------------ uses

    def _bound(self, alias: ast.alias) -> None:
        name = alias.asname or alias.name.partition(".")[0]
        (self._perhaps if self.optional else self._surely).add(name)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._bound(alias)
            self.dotted(node, alias.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.module and not node.level:
            for alias in node.names:
                self._bound(alias)
                self.dotted(node, node.module if alias.name == "*" else f"{node.module}.{alias.name}")

    def visit_Attribute(self, node: ast.Attribute) -> None:
        name = self.names.resolve(node, self.scope)
        if name is not None and kind_of(name) is not None:
            if name.partition(".")[0] not in CUDA_LIBRARIES:  # of those the import says it all
                self._named(node, name)
            self._arguments_inside(node)
            return
        if node.attr == "is_cuda":
            self.add(node, "cuda", "Tensor.is_cuda")
        self.visit(node.value)

    def _named(self, node: ast.Attribute, name: str) -> None:
        root: ast.expr = node
        while isinstance(root, ast.Attribute):
            root = root.value
        outer = self.optional
        if isinstance(root, ast.Name) and root.id in self._perhaps - self._surely:
            self.optional = True
        self.dotted(node, name)
        self.optional = outer

    def _arguments_inside(self, node: ast.expr) -> None:
        """Calls within a dotted name, as in `initialize(model=net.cuda())[0].train`, have arguments of their own."""
        while isinstance(node, ast.Attribute | ast.Subscript):
            node = node.value
        if isinstance(node, ast.Call):
            self.visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        name = self.names.resolve(node, self.scope)
        function = node.func
        if name is not None and kind_of(name) is not None and isinstance(function, ast.Name):
            outer = self.optional
            self.optional = outer or function.id == "hasattr" or len(node.args) > 2
            self.dotted(node, name)
            self.optional = outer
            for argument in node.args[1:]:  # what it is asked of is in the name
                self.visit(argument)
            return
        elif (
            isinstance(function, ast.Attribute)
            and function.attr in _METHODS
            and self.names.resolve(function, self.scope) is None
        ):
            self.add(function, "cuda", _METHODS[function.attr])
        elif name is not None and self.names.resolve(function, self.scope) == "importlib.import_module":
            self.dotted(node, name)
        self.generic_visit(node)

    def visit_Dict(self, node: ast.Dict) -> None:
        config = config_in_python(node)
        if config is not None:
            self.add(node, "config", *config)
        self.generic_visit(node)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        first = text_of(node.values[0]) if node.values else None
        if first is not None and first == "cuda:":
            self.add(node, "cuda", '"cuda:..."')
            return
        if first is not None and _COMMAND.match(first) and command_of(first):
            self.add(node, "launch", str(command_of(first)), first)
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        sides = [node.left, *node.comparators]
        if any((text_of(side) or "") == "cuda" for side in sides):
            self.add(node, "cuda", '== "cuda"')
            sides = [side for side in sides if text_of(side) != "cuda"]
        for side in sides:
            self.visit(side)

    def visit_Expr(self, node: ast.Expr) -> None:
        if text_of(node.value) is None:  # a string alone is a comment
            self.visit(node.value)

    def visit_Constant(self, node: ast.Constant) -> None:
        text = node.value
        if not isinstance(text, str) or len(text) > 2000:
            return
        if _DEVICE.match(text):
            self.add(node, "cuda", f'"{text}"' if text[5:].isdigit() or text == "cuda" else '"cuda:..."')
        elif _TYPE.match(text):
            self.add(node, "cuda", text)
        elif _BACKEND.match(text):
            self.add(node, "cuda", '"nccl"')
        elif text in variables_of(text):
            self.add(node, "environment", text)
        elif _COMMAND.match(text):
            name = command_of(text)
            if name is not None:
                self.add(node, "launch", name, text)


def uses_of_tree(tree: ast.Module, shown: str) -> list[Use]:
    """The uses in a parsed file, by line; `shown` is the file's name in them."""
    walk = _Uses(tree, shown)
    walk.visit(tree)
    return sorted(walk.found, key=lambda use: (use.line, use.kind, use.name))
