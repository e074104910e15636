"""Names of what can be measured, without importing torch: the command line offers them."""

from __future__ import annotations

FULL_SIZES = (256, 512, 1024)
WORKLOADS = ("default", *map(str, FULL_SIZES), "narrow")
CONTENDERS = ("reference", "compiled", "fast", "fast-compiled")
