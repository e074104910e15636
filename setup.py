"""Which folder is which package; everything else about the project is in pyproject.toml.

The packages are listed, never discovered: the root folders `reference`, `triton_kernels` and `compile` must be
installed inside `reducio_fast` only. `triton_kernels` as a top-level name belongs to Triton's own distribution, which
other libraries probe for by name, so leaking ours would break them.
"""

from setuptools import setup

setup(
    packages=[
        "reducio_fast",
        "reducio_fast.cli",
        "reducio_fast.server",
        "reducio_fast.training",
        "reducio_fast.training.tiny",
        "reducio_fast.training.reducio",
        "reducio_fast.training.svd",
        "reducio_fast.evaluation",
        "reducio_fast.measurement",
        "reducio_fast.pipelines",
        "reducio_fast.pipelines.call",
        "reducio_fast.pipelines.execution",
        "reducio_fast.pipelines.reducio",
        "reducio_fast.pipelines.svd",
        "reducio_fast.pipelines.peers",
        "reducio_fast.data",
        "reducio_fast.data.curation",
        "reducio_fast.fast",
        "reducio_fast.fast.reducio",
        "reducio_fast.fast.svd",
        "reducio_fast.memory",
        "reducio_fast.checkpoints",
        "reducio_fast.media",
        "reducio_fast.system",
        "reducio_fast.reference",
        "reducio_fast.reference.reducio",
        "reducio_fast.reference.svd",
        "reducio_fast.triton_kernels",
        "reducio_fast.compile",
    ],
    package_dir={
        "reducio_fast": "reducio_fast",
        "reducio_fast.reference": "reference",
        "reducio_fast.triton_kernels": "triton_kernels",
        "reducio_fast.compile": "compile",
    },
    # py.typed lets type checkers read our types; the embedded default model has one folder a component, at any depth.
    package_data={
        "reducio_fast": ["py.typed", "models/tiny/**", "models/svd-tiny/**"],
        "reducio_fast.server": ["page.html"],
        "reducio_fast.training": ["recipes/*.toml"],
        "reducio_fast.measurement": ["machine_limits.json"],
        "reducio_fast.triton_kernels": ["tables/*.json"],
    },
)
