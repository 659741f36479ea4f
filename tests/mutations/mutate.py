"""Small mistakes that can be made in a Python file: where they fit, and the text after one of them."""

import ast
import difflib
import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

COMPARISONS = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
ARITHMETIC = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
NAMES = {
    **{"min": "max", "amin": "amax", "minimum": "maximum", "argmin": "argmax", "any": "all", "floor": "ceil"},
    **{"sin": "cos", "gelu": "tanh", "GELU": "Tanh", "softmax": "log_softmax", "exp": "expm1", "cumsum": "cumprod"},
}
NAMES |= {other: name for name, other in NAMES.items()}
# They change speed, messages or what a type checker sees.
HARMLESS_CALLS = re.compile(r"(^|\.)(warn|warning|warning_once|info|debug|cast|overload|lru_cache|cache|TypeVar)$")
HARMLESS_KEYWORDS = {
    "non_blocking",
    "maxsize",
    "stacklevel",
    "pin_memory",
    "memory_format",
    "copy",
    "strict",
    "dynamic",
}
# No test on a CPU comes here.
ELSEWHERE = re.compile(r"cuda|TYPE_CHECKING|is_compiling|is_torch_fx|deepspeed")


class Mutation(NamedTuple):
    """One mistake: the bytes of a file from `start` to `stop` are `text` instead."""

    path: Path
    line: int
    start: int
    stop: int
    text: str
    kind: str

    def applied(self) -> str:
        source = self.path.read_bytes()
        return (source[: self.start] + self.text.encode() + source[self.stop :]).decode()

    def diff(self) -> str:
        before = self.path.read_text(encoding="utf-8").splitlines()
        return "\n".join(list(difflib.unified_diff(before, self.applied().splitlines(), lineterm="", n=2))[2:])


def mutations_of(path: Path) -> list[Mutation]:
    """All that fit into a file and that can still be parsed, in the order of the file."""
    found: list[Mutation] = []
    for node, kind, text in _mistakes(ast.parse(path.read_bytes())):
        mutation = Mutation(path, node.lineno, *_place(path, node), text, kind)
        try:
            ast.parse(mutation.applied())
        except SyntaxError:
            continue
        found.append(mutation)
    return found


def _place(path: Path, node: Any) -> tuple[int, int]:
    """From which byte of the file to which."""
    starts = [0, *itertools.accumulate(map(len, path.read_bytes().splitlines(keepends=True)))]
    return starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset


def _mistakes(tree: ast.AST) -> Iterator[tuple[ast.expr | ast.stmt, str, str]]:
    for node in _code(tree):
        if isinstance(node, ast.If | ast.While | ast.IfExp):
            yield node.test, "condition", f"not ({ast.unparse(node.test)})"
        for kind, changed in _changes(node):
            text = changed if isinstance(changed, str) else ast.unparse(changed)
            yield node, kind, f"({text})" if isinstance(node, ast.BinOp | ast.BoolOp | ast.Compare) else text


def _code(node: ast.AST) -> Iterator[ast.expr | ast.stmt]:
    """The expressions and statements that compute something, not what is for readers, type checkers or errors."""
    if isinstance(node, ast.Raise | ast.Assert | ast.Import | ast.ImportFrom | ast.JoinedStr):
        return
    if isinstance(node, ast.Call) and HARMLESS_CALLS.search(ast.unparse(node.func)):
        return
    if isinstance(node, ast.If | ast.IfExp) and ELSEWHERE.search(ast.unparse(node.test)):
        for child in node.orelse if isinstance(node, ast.If) else [node.orelse]:
            yield from _code(child)
        return
    if isinstance(node, ast.Module | ast.ClassDef):
        # Constants of a module are names or sizes of buffers; fields of a class are flags for transformers.
        children = [child for child in node.body if not isinstance(child, ast.Assign | ast.AnnAssign | ast.Expr)]
        for child in children:
            yield from _code(child)
        return
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        defaults = [default for default in [*node.args.defaults, *node.args.kw_defaults] if default is not None]
        for child in [*defaults, *node.body]:
            yield from _code(child)
        return
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return
    if isinstance(node, ast.expr | ast.stmt):
        yield node
    skipped = {"annotation", "returns", "type_params", "ctx", "op", "ops"}
    for name, value in ast.iter_fields(node):
        if name not in skipped:
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.keyword) and child.arg in HARMLESS_KEYWORDS:
                    continue
                if isinstance(child, ast.AST):
                    yield from _code(child)


def _changes(node: ast.AST) -> Iterator[tuple[str, ast.AST | str]]:
    match node:
        case ast.Compare(ops=[op]) if type(op) in COMPARISONS:
            yield "comparison", ast.Compare(node.left, [COMPARISONS[type(op)]()], node.comparators)
        case ast.BoolOp():
            yield "and/or", ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
        case ast.BinOp() if type(node.op) in ARITHMETIC and not _is_text(node):
            yield "arithmetic", ast.BinOp(node.left, ARITHMETIC[type(node.op)](), node.right)
        case ast.Constant(value=bool() as value):
            yield "constant", repr(not value)
        case ast.Constant(value=int() as value):
            yield "constant", repr(value + 1)
            if value:
                yield "constant", repr(value - 1)
        case ast.Constant(value=float() as value):
            yield "constant", repr(2 * value or 1.0)
        case ast.UnaryOp(op=ast.Not() | ast.Invert()):
            yield "no not", node.operand
        case ast.UnaryOp(op=ast.USub()) if not isinstance(node.operand, ast.Constant):
            yield "sign", node.operand
        case ast.AugAssign():
            yield "dropped", "pass"
        case ast.Expr(value=ast.Call()):
            yield "dropped", "pass"
        case ast.Assign(targets=[ast.Subscript() | ast.Attribute()]):
            yield "dropped", "pass"
        case ast.Assign(targets=[ast.Name(id=name)], value=value) if _reads(value, name):
            yield "dropped", "pass"  # a change of what has this name already
        case ast.Continue() | ast.Break():
            yield "dropped", "pass"
        case ast.Call():
            yield from _changed_calls(node)
        case ast.Attribute(attr=name) if name in NAMES:
            yield "function", ast.Attribute(node.value, NAMES[name], node.ctx)
        case ast.Name(id=name, ctx=ast.Load()) if name in ("min", "max", "any", "all"):
            yield "function", NAMES[name]


def _changed_calls(call: ast.Call) -> Iterator[tuple[str, ast.AST]]:
    arguments = call.args
    for i in range(len(arguments) - 1):
        first, second = arguments[i : i + 2]
        different = ast.dump(first) != ast.dump(second)
        if different and not any(isinstance(argument, ast.Starred | ast.GeneratorExp) for argument in (first, second)):
            swapped = [*arguments[:i], second, first, *arguments[i + 2 :]]
            yield "swapped arguments", ast.Call(call.func, swapped, call.keywords)
            return


def _is_text(node: ast.BinOp) -> bool:
    return any(
        isinstance(side, ast.JoinedStr) or (isinstance(side, ast.Constant) and isinstance(side.value, str))
        for side in (node.left, node.right)
    )


def _reads(node: ast.AST, name: str) -> bool:
    return any(isinstance(child, ast.Name) and child.id == name for child in ast.walk(node))


def named(path: Path, wanted: Callable[[Any], bool], kind: str, change: Callable[[Any], str]) -> Mutation:
    """A mutation that is looked for: of the one node that is `wanted`."""
    nodes = [node for node in ast.walk(ast.parse(path.read_bytes())) if wanted(node)]
    if len(nodes) != 1:
        raise LookupError(f'"{kind}" has {len(nodes)} places in {path}, not one: mend `CASES`.')
    return Mutation(path, nodes[0].lineno, *_place(path, nodes[0]), change(nodes[0]), kind)
