"""Triton kernels, one a file: jit function, launch wrapper, op registration.

Installed as `reducio_fast.triton_kernels`. Only relative imports inside this folder.
"""

from __future__ import annotations

# Triton's own distribution owns the top-level name, and other libraries decide what they can do by probing for it.
# With the repository root on sys.path (python -c, python -m) that probe would find this folder and believe it; a failed
# import tells it "not available", which is the truth.
if not __name__.startswith("reducio_fast."):
    raise ImportError(
        f"this folder is the package reducio_fast.triton_kernels, not the top-level module {__name__!r}: "
        "install the project (pip install -e .) and import it by its full name"
    )
