"""Where this process finds its modules, so that a process it starts runs the same code."""

from __future__ import annotations

import os
import sys


def python_path() -> str:
    """What ``PYTHONPATH`` is to be in the other process."""
    return os.pathsep.join(folder or os.getcwd() for folder in sys.path)
