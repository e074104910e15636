"""How good the default model is: metrics, an analytic detector for its toy world, and the report made of both."""

from .detector import Detection, detect
from .metrics import psnr, ssim

__all__ = ["Detection", "detect", "psnr", "ssim"]
