"""Chat samples cut out of Python source: signature + docstring asks, the body answers.

Source is normalised by ``ast.unparse`` (no comments, one quote style, one indentation), so that a
model of a few million parameters spends its capacity on code and not on formatting.
"""

import ast
import hashlib
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

HELD_OUT_SHARE = 0.06
MAX_BODY_CHARACTERS = 900
MAX_PROMPT_CHARACTERS = 300


class Function(NamedTuple):
    """One function of the corpus."""

    name: str  # "module.Class.function": decides the split, so all versions stay on one side
    prompt: str
    body: str
    documented: bool

    @property
    def held_out(self) -> bool:
        digest = hashlib.sha256(self.name.encode()).digest()
        return int.from_bytes(digest[:4]) < HELD_OUT_SHARE * 2**32


def read_functions(roots: list[Path]) -> list[Function]:
    """Every usable function under ``roots``, first of its kind, tests and vendored code left out.

    A body that occurs on both sides of the split is dropped from the held-out side.
    """
    functions: dict[tuple[str, str], Function] = {}
    for root in roots:
        for path in sorted(root.rglob("*.py")):
            relative = path.relative_to(root)
            if not is_test_or_vendored(relative):
                for function in cut(path, ".".join(relative.with_suffix("").parts)):
                    functions.setdefault((function.prompt, function.body), function)
    trained = {f.body for f in functions.values() if not f.held_out}
    return [f for f in functions.values() if not (f.held_out and f.body in trained)]


def is_test_or_vendored(path: Path) -> bool:
    skipped = {"test", "tests", "idle_test", "site-packages", "_vendor", "pydoc_data", "ensurepip"}
    return bool(skipped & set(path.parts)) or path.name.startswith("test_")


def cut(path: Path, module: str) -> Iterator[Function]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError):  # deliberately broken files of lib2to3
        return
    yield from walk(tree, module)


def walk(node: ast.AST, scope: str) -> Iterator[Function]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            name = f"{scope}.{child.name}"
            if function := split_function(child, name):
                yield function
            yield from walk(child, name)
        elif isinstance(child, ast.ClassDef):
            yield from walk(child, f"{scope}.{child.name}")
        else:
            yield from walk(child, scope)


def split_function(node: ast.FunctionDef | ast.AsyncFunctionDef, name: str) -> Function | None:
    docstring = ast.get_docstring(node)
    documented = docstring is not None
    first = 1 if documented else 0
    if len(node.body) == first:
        return None
    header = [ast.Expr(ast.Constant(summary(docstring)))] if documented else [ast.Pass()]
    shell = type(node)(**{**dict(ast.iter_fields(node)), "body": header, "decorator_list": []})
    prompt = ast.unparse(ast.fix_missing_locations(shell))
    if not documented:
        prompt = prompt.rsplit("\n", 1)[0]  # without the ``pass``
    body = "\n".join(indent(ast.unparse(statement)) for statement in node.body[first:])
    if len(body) > MAX_BODY_CHARACTERS or len(prompt) > MAX_PROMPT_CHARACTERS or len(body) < 16:
        return None
    return Function(name, prompt, body, documented)


def summary(docstring: str) -> str:
    """The first paragraph on one line: a question shorter than its answer."""
    return " ".join(docstring.strip().split("\n\n")[0].split())


def indent(code: str) -> str:
    return "\n".join(f"    {line}" if line else line for line in code.split("\n"))


def standard_library() -> Path:
    """The standard library of the running interpreter."""
    return Path(sysconfig.get_path("stdlib", vars={"installed_base": sys.base_prefix}))
