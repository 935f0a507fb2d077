"""Play a notebook's code cells, one after the other in this process, and keep their results in it.

    python -m scripts.run_notebook examples/notebook.ipynb

No Jupyter is needed: a cell's result is the value of its last line, as Jupyter would show it.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import sys
from pathlib import Path


def play(notebook: dict, names: dict) -> None:
    """Run every code cell with `names` as its globals; outputs and numbers are put into the notebook."""
    number = 0
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            number += 1
            said = io.StringIO()
            with contextlib.redirect_stdout(said):
                value = run("".join(cell["source"]), names, f"cell {number}")
            text = {"output_type": "stream", "name": "stdout", "text": said.getvalue().splitlines(keepends=True)}
            cell["execution_count"] = number
            cell["outputs"] = [*([text] if said.getvalue() else []), *([] if value is None else [shown(value, number)])]


def run(source: str, names: dict, where: str) -> object:
    """Execute a cell; the value of its last statement where that is an expression without a semicolon behind it."""
    tree = ast.parse(source)
    last = None
    if tree.body and isinstance(tree.body[-1], ast.Expr) and not source.rstrip().endswith(";"):
        last = ast.Expression(tree.body.pop().value)
    exec(compile(tree, where, "exec"), names)
    return None if last is None else eval(compile(last, where, "eval"), names)


def shown(value: object, number: int) -> dict:
    """A value as a cell's output: as text, and as a picture or as HTML where it has one."""
    data = {"text/plain": repr(value).splitlines(keepends=True)}
    if hasattr(value, "_repr_html_"):
        data["text/html"] = value._repr_html_().splitlines(keepends=True)
    if hasattr(value, "_repr_png_"):
        data["image/png"] = base64.b64encode(value._repr_png_()).decode()
    return {"output_type": "execute_result", "execution_count": number, "data": data, "metadata": {}}


def main() -> None:
    for name in sys.argv[1:]:
        notebook = json.loads(Path(name).read_text(encoding="utf-8"))
        play(notebook, {"__name__": "__main__"})
        Path(name).write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
