"""Functions up to their names and constants."""

import ast
import hashlib


def normalised_tree(source: str) -> str:
    """A hash of the syntax tree of `source` in which names and constants do not matter.

    The function's name, arguments and variables are renumbered by first appearance, constants become the
    name of their type, docstrings go; builtins, methods and everything else stay. Raises SyntaxError.
    """
    tree = ast.parse(source)
    nodes = list(ast.walk(tree))
    bound = {node.arg for node in nodes if isinstance(node, ast.arg)}
    bound |= {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    bound |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return hashlib.sha256(ast.dump(_Normaliser(bound).visit(tree)).encode()).hexdigest()[:16]


class _Normaliser(ast.NodeTransformer):
    def __init__(self, bound: set[str]) -> None:
        self.bound = bound
        self.numbers: dict[str, str] = {}

    def _rename(self, name: str) -> str:
        if name not in self.bound:
            return name
        return self.numbers.setdefault(name, f"_{len(self.numbers)}")

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.name = self._rename(node.name)
        if ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
        return self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.arg = self._rename(node.arg)
        return self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.Name(id=self._rename(node.id), ctx=node.ctx)

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        return ast.Constant(value=type(node.value).__name__)
