"""What makes a model folder a hub repository: the model card and `pipeline.py`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from .layouts import REDUCIO, SVD, Layout
from .networks import pipeline_networks

CARD = "README.md"
PIPELINE_FILE = "pipeline.py"

_PIPELINE_CODE = '''"""Opens this folder through diffusers; needs `pip install reducio-fast`.

    DiffusionPipeline.from_pretrained(FOLDER_OR_HUB_ID, custom_pipeline="pipeline", trust_remote_code=True)
"""

from reducio_fast import DiffusersReducioPipeline  # noqa: F401
'''

_CARD_TEXT = """
# {title}

A [Reducio](https://arxiv.org/abs/2411.13552) model: text and an image in, a clip of {frames} frames of {height}x{width}
at {fps:g} frames a second out.

With reducio-fast (`pip install reducio-fast`):

```python
from reducio_fast import ReducioPipeline

pipe = ReducioPipeline.from_pretrained("{title}")  # this folder, or its hub id
pipe("what the clip shows").save("clip.mp4")
```

Through diffusers, where reducio-fast is installed:

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{title}", custom_pipeline="pipeline", trust_remote_code=True)
```

| component | class | parameters |
|---|---|---|
{rows}
"""

_SVD_TEXT = """
# {title}

A [Stable Video Diffusion](https://arxiv.org/abs/2311.15127) model: an image in, a clip of {frames} frames out. The
weights' licence is that of what they were made from: name it here.

With reducio-fast (`pip install reducio-fast`){also}:

```python
from reducio_fast import {pipeline}

pipe = {pipeline}.from_pretrained("{title}")  # this folder, or its hub id
pipe("photo.png").save("clip.mp4")
```

| component | class | parameters |
|---|---|---|
{rows}
"""


def write_card(
    folder: Path, components: Mapping[str, Any], settings: Mapping[str, Any], title: str, layout: Layout
) -> None:
    """Write `README.md`, and for our own family `pipeline.py`. An existing card belongs to its author and stays.

    The author adds what the weights were trained on, and their licence.
    """
    is_reducio = layout is REDUCIO
    if is_reducio:
        (folder / PIPELINE_FILE).write_text(_PIPELINE_CODE, encoding="utf-8")
    if (folder / CARD).exists():
        return
    from huggingface_hub import ModelCardData

    present = {name: part for name, part in components.items() if part is not None}
    data = ModelCardData(
        library_name="reducio-fast",
        pipeline_tag="text-to-video" if "text_to_image" in present else "image-to-video",
        tags=["reducio" if is_reducio else "svd", "diffusers", "safetensors"],
    )
    rows = "\n".join(f"| {n} | {type(part).__name__} | {_parameters(part)} |" for n, part in present.items())
    if is_reducio:
        height, width, fps = (settings[name] for name in ("sample_height", "sample_width", "fps"))
        frames = components["vae"].config.num_frames
        text = _CARD_TEXT.format(title=title, frames=frames, height=height, width=width, fps=fps, rows=rows)
    else:
        is_svd = layout is SVD
        also = f", or with diffusers' `{layout.pipeline}`" if is_svd else ""
        fields = {"pipeline": "SVDPipeline" if is_svd else "SV3DPipeline", "also": also, "title": title, "rows": rows}
        text = _SVD_TEXT.format(frames=components["unet"].config.num_frames, **fields)
    (folder / CARD).write_text(f"---\n{data.to_yaml()}\n---\n{text}", encoding="utf-8")


def _parameters(part: Any) -> str:
    networks = pipeline_networks(part) if hasattr(part, "components") else [part]
    count = sum(p.numel() for n in networks if isinstance(n, nn.Module) for p in n.parameters())
    return f"{count:,}" if count else ""
