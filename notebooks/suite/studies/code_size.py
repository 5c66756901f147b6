"""How much code the manager is: the tokens of all modules of ours that importing it loads."""

import ast
import io
import subprocess
import sys
import tokenize
from pathlib import Path

_FREE = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
    tokenize.ENCODING, tokenize.ENDMARKER,
}  # fmt: skip
_LIST = """
import sys, {module}
for name, module in sorted(sys.modules.items()):
    if name.split(".")[0] == "dynlib":
        print(name, module.__file__, sep="\\t")
"""


def tokens(text: str) -> int:
    """Names, numbers, operators and strings of Python code, without comments and docstrings."""
    documented: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if ast.get_docstring(node, clean=False) is not None:
            documented.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    found = tokenize.generate_tokens(io.StringIO(text).readline)
    return sum(each.type not in _FREE and each.start[0] not in documented for each in found)


def manager_tokens(module: str = "dynlib.manager") -> dict[str, int]:
    """Module -> tokens, of all modules of ours that are loaded when `module` is imported first."""
    command = [sys.executable, "-c", _LIST.format(module=module)]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    files = dict(line.split("\t") for line in listed.splitlines())
    return {name: tokens(Path(file).read_text(encoding="utf-8")) for name, file in files.items()}
