"""Triton kernels, one per file: jit function, launch wrapper, op registration.

Installed as `reducio_fast.triton_kernels`. Only relative imports inside this folder.
"""

from __future__ import annotations

# The top-level name `triton_kernels` belongs to Triton's own distribution, and other libraries try to import it to see
# whether it is installed. With the repository root on sys.path (python -c, python -m) they would find this folder
# instead. The ImportError makes them treat it as not available, which is true.
if not __name__.startswith("reducio_fast."):
    raise ImportError(
        f"this folder is the package reducio_fast.triton_kernels, not the top-level module {__name__!r}: "
        "install the project (pip install -e .) and import it by its full name"
    )
