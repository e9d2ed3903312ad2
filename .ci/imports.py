"""Every module of the package imports with what is installed, or names the extra that it needs."""

from __future__ import annotations

import importlib
import re
import sys
from collections import Counter
from pathlib import Path

import hf_accel


def outcome(module: str) -> str:
    """Return ``imports``, the extra that an ImportError names, or the error."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        extra = re.search(r"pip install 'hf-accel\[(\w+)\]'", str(error))
        return f"needs [{extra[1]}]" if extra else f"{type(error).__name__}: {error}"
    except BaseException as error:  # SystemExit of a module that acts when it is imported is a fault, too
        return f"{type(error).__name__}: {error}"
    return "imports"


def main() -> int:
    """Print a line of counts; 1 where a module does neither."""
    root = Path(hf_accel.__file__).parent
    files = sorted(file.relative_to(root.parent).with_suffix("") for file in root.rglob("*.py"))
    outcomes = {name: outcome(name) for name in (".".join(file.parts).removesuffix(".__init__") for file in files)}
    faults = {name: found for name, found in outcomes.items() if not re.fullmatch(r"imports|needs \[\w+\]", found)}
    for name, found in faults.items():
        print(f"{name}: {found}")
    counts = ", ".join(f"{number} {found}" for found, number in sorted(Counter(outcomes.values()).items()))
    print(f"{len(outcomes)} modules: {counts if not faults else f'{len(faults)} fail'}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
