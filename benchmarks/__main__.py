"""List the benchmarks, or run one of them.

python benchmarks [NAME [ARGUMENT ...]]
"""

import ast
import os
import sys
from pathlib import Path

HERE = Path(__file__).parent


def programs() -> dict[str, str]:
    """Return the question that each benchmark answers by its name: the first line of its docstring."""
    files = sorted(path for path in HERE.glob("*.py") if path != Path(__file__))
    return {path.stem: (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0] for path in files}


def main() -> None:
    known, given = programs(), sys.argv[1:]
    if not given:
        width = max(map(len, known))
        print("\n".join(f"{name:{width}}  {question}" for name, question in known.items()))
    elif given[0] in known:
        program = str(HERE / f"{given[0]}.py")
        os.execv(sys.executable, [sys.executable, program, *given[1:]])
    else:
        sys.exit(f"there is no benchmark {given[0]!r}; `make bench` lists them")


if __name__ == "__main__":
    main()
