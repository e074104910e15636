"""Opens this folder through diffusers; needs `pip install reducio-fast`.

    DiffusionPipeline.from_pretrained(FOLDER_OR_HUB_ID, custom_pipeline="pipeline", trust_remote_code=True)
"""

from reducio_fast import DiffusersReducioPipeline  # noqa: F401
