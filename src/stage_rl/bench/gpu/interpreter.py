"""Kernels without a GPU: in Triton's interpreter, by a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys


def in_interpreter(module: str, call: str) -> dict[str, float]:
    """What a call of a function of a module returns, by a process with the interpreter.

    Triton chooses it when it is imported, and here it may have been.
    """
    done = subprocess.run(
        [sys.executable, "-c", f"import json; from {module} import *; print(json.dumps({call}))"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])
