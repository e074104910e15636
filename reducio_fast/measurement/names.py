"""Names of what can be measured, without importing torch: the command line offers them."""

from __future__ import annotations

FULL_SIZES = (256, 512, 1024)
WORKLOADS = ("default", *map(str, FULL_SIZES), "narrow", "tile", "svd", "svd-short", "svd-narrow")
# "fast-default" is the fast path at the dtype that it takes by default, beside "fast" at the dtype of the reference.
# QUANTISED decode in FP8, the last one after as many steps as quality="balanced" takes.
QUANTISED = ("fast-fp8", "fast-fp8-balanced")
CONTENDERS = ("reference", "compiled", "fast", "fast-compiled", "fast-default", *QUANTISED)
