"""Networks that other packages derive from diffusers' U-Net, and their pipelines, in small.

The classes have the names of those in DepthCrafter and sv3d-diffusers and compute the same, on diffusers' own modules;
the pipelines pass the arguments that those packages' pipelines pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, ConfigMixin, ModelMixin, StableVideoDiffusionPipeline
from diffusers import UNetSpatioTemporalConditionModel as DiffusersUNet
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import Timesteps
from diffusers.models.unets.unet_spatio_temporal_condition import UNetSpatioTemporalConditionOutput
from torch import Tensor, nn

from reducio_fast.pipelines.peers.models import PEERS, build_random
from tiny_svd import lively_svd, unet_config

FRAMES = 5


# ---- what the two packages compute -----------------------------------------------------------------------------------


def embedded(unet: Any, timestep: Any, batch: int, dtype: torch.dtype) -> Tensor:
    steps = torch.as_tensor(timestep).reshape(-1).expand(batch)
    return unet.time_embedding(unet.time_proj(steps).to(dtype))


def through(unet: Any, sample: Tensor, embedding: Tensor, tokens: Tensor, return_dict: bool) -> Any:
    """All blocks, as both packages run them: without the sizes that diffusers passes to its up-samplers."""
    batch, frames = sample.shape[:2]
    common = {"temb": embedding, "image_only_indicator": torch.zeros(batch, frames, dtype=unet.dtype)}

    def given(block: Any) -> dict[str, Any]:
        attends = getattr(block, "has_cross_attention", False)
        return common | ({"encoder_hidden_states": tokens} if attends else {})

    x = unet.conv_in(sample.flatten(0, 1))
    skips = [x]
    for block in unet.down_blocks:
        x, more = block(hidden_states=x, **given(block))
        skips += more
    x = unet.mid_block(hidden_states=x, encoder_hidden_states=tokens, **common)
    for block in unet.up_blocks:
        count = len(block.resnets)
        x = block(hidden_states=x, res_hidden_states_tuple=tuple(skips[-count:]), **given(block))
        del skips[-count:]
    out = unet.conv_out(unet.conv_act(unet.conv_norm_out(x))).unflatten(0, (batch, frames))
    return UNetSpatioTemporalConditionOutput(sample=out) if return_dict else (out,)


class DiffusersUNetSpatioTemporalConditionModelDepthCrafter(DiffusersUNet):
    """encoder_hidden_states [B, T, E]: the token of each frame. The inputs are cast to the dtype of the weights."""

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        encoder_hidden_states: Tensor,
        added_time_ids: Tensor,
        return_dict: bool = True,
    ) -> Any:
        batch, frames = sample.shape[:2]
        dtype = self.conv_in.weight.dtype
        numbers = self.add_time_proj(added_time_ids.flatten()).reshape(batch, -1)
        embedding = embedded(self, timestep, batch, dtype) + self.add_embedding(numbers.to(dtype))
        tokens = encoder_hidden_states.flatten(0, 1)[:, None]
        return through(self, sample.to(dtype), embedding.repeat_interleave(frames, 0), tokens, return_dict)


class SV3DUNetSpatioTemporalConditionModel(ModelMixin, ConfigMixin):
    """No subclass of diffusers' U-Net, but one of its modules and of a second embedding, for angles."""

    @register_to_config
    def __init__(
        self,
        sample_size: int | None = None,
        in_channels: int = 8,
        out_channels: int = 4,
        down_block_types: tuple[str, ...] = (),
        up_block_types: tuple[str, ...] = (),
        block_out_channels: tuple[int, ...] = (),
        addition_time_embed_dim: int = 256,
        projection_class_embeddings_input_dim: int = 768,
        layers_per_block: int = 2,
        cross_attention_dim: int = 1024,
        transformer_layers_per_block: int = 1,
        num_attention_heads: tuple[int, ...] = (),
        num_frames: int = 25,
    ) -> None:
        super().__init__()
        for name, module in DiffusersUNet(**self.config).named_children():
            self.add_module(name, module)
        self.add_angle_proj = Timesteps(2 * addition_time_embed_dim, True, downscale_freq_shift=0)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        encoder_hidden_states: Tensor,
        added_time_ids: Tensor | list[Tensor],
        return_dict: bool = True,
    ) -> Any:
        """added_time_ids: noise augmentation, polar angle and azimuth of each frame, [B, T] each; or SVD's tensor."""
        batch, frames = sample.shape[:2]
        embedding = embedded(self, timestep, batch, sample.dtype)
        if isinstance(added_time_ids, Tensor):
            numbers = self.add_time_proj(added_time_ids.flatten()).reshape(batch, -1)
            embedding = (embedding + self.add_embedding(numbers.to(sample.dtype))).repeat_interleave(frames, 0)
        else:
            augmentation, polar, azimuth = (ids.flatten() for ids in added_time_ids)
            numbers = [self.add_time_proj(augmentation), self.add_angle_proj(polar), self.add_angle_proj(azimuth)]
            added = self.add_embedding(torch.cat(numbers, 1).to(sample.dtype))
            embedding = embedding.repeat_interleave(frames, 0) + added
        return through(self, sample, embedding, encoder_hidden_states.repeat_interleave(frames, 0), return_dict)


DepthUNet, OrbitUNet = DiffusersUNetSpatioTemporalConditionModelDepthCrafter, SV3DUNetSpatioTemporalConditionModel


class DepthPipeline(StableVideoDiffusionPipeline):
    """DepthCrafter's call: overlapping windows of a video, one token a frame, the halves of guidance one by one."""

    @torch.no_grad()
    def __call__(self, video: Tensor, window: int, overlap: int, guidance: float, seed: int = 0, steps: int = 2) -> Any:
        generator = torch.Generator().manual_seed(seed)
        pixels = 2 * video - 1
        with torch.inference_mode():
            small = nn.functional.interpolate(pixels, size=(self.image_encoder.config.image_size,) * 2)
            tokens = self.image_encoder(small).image_embeds[None]
        noisy = pixels + 0.02 * torch.randn(pixels.shape, generator=generator)
        with torch.inference_mode():
            images = torch.cat([self.vae.encode(part).latent_dist.mode() for part in noisy.split(2)])[None]
        ids = self._get_add_time_ids(7, 127, 0.02, tokens.dtype, 1, 1, False)
        self.scheduler.set_timesteps(steps)
        height, width = video.shape[2:]
        start = self.prepare_latents(1, window, 8, height, width, tokens.dtype, torch.device("cpu"), generator)
        clip: Tensor | None = None
        for first in range(0, len(video) - overlap, window - overlap):
            own = slice(first, first + window)
            self.scheduler.set_timesteps(steps)
            latents = start[:, : images[:, own].shape[1]].clone()
            for i, t in enumerate(self.scheduler.timesteps):
                if clip is not None and i == 0:
                    noise = latents[:, :overlap] / self.scheduler.init_noise_sigma * self.scheduler.sigmas[0]
                    latents[:, :overlap] = clip[:, -overlap:] + noise
                scaled = self.scheduler.scale_model_input(latents, t)
                halves = [(images[:, own], tokens[:, own])]
                if guidance > 1:
                    halves.append((torch.zeros_like(scaled), torch.zeros_like(tokens[:, own])))
                predictions = [
                    self.unet(
                        torch.cat([scaled, image], dim=2),
                        t,
                        encoder_hidden_states=embeds,
                        added_time_ids=ids,
                        return_dict=False,
                    )[0]
                    for image, embeds in halves
                ]
                guided = predictions[-1] + guidance * (predictions[0] - predictions[-1])
                latents = self.scheduler.step(guided if guidance > 1 else predictions[0], t, latents).prev_sample
            if clip is None:
                clip = latents
            else:
                weights = torch.linspace(0, 1, overlap).view(1, -1, 1, 1, 1)
                clip[:, -overlap:] = latents[:, :overlap] * weights + clip[:, -overlap:] * (1 - weights)
                clip = torch.cat([clip, latents[:, overlap:]], dim=1)
        assert clip is not None
        frames = self.decode_latents(clip, len(video), 2)
        return self.video_processor.postprocess_video(video=frames, output_type="np")[0]


class OrbitPipeline(StableVideoDiffusionPipeline):
    """sv3d-diffusers' call: both halves of guidance in one batch, the camera of each frame."""

    @torch.no_grad()
    def __call__(self, image: Tensor, polar: list[float], azimuth: list[float], seed: int = 0, steps: int = 2) -> Any:
        generator, frames = torch.Generator().manual_seed(seed), len(polar)
        small = nn.functional.interpolate(image, size=(self.image_encoder.config.image_size,) * 2)
        token = self.image_encoder(small).image_embeds[:, None]
        tokens = torch.cat([torch.zeros_like(token), token])
        latent = self.vae.encode(image).latent_dist.mode()
        images = torch.cat([torch.zeros_like(latent), latent])[:, None].repeat(1, frames, 1, 1, 1)
        ids = [torch.tensor(values).repeat(2, 1) for values in ([1e-5] * frames, polar, azimuth)]
        self.scheduler.set_timesteps(steps)
        height, width = image.shape[2:]
        latents = self.prepare_latents(1, frames, 8, height, width, tokens.dtype, torch.device("cpu"), generator)
        scale = torch.linspace(1.0, 2.5, frames).view(1, -1, 1, 1, 1)
        for t in self.scheduler.timesteps:
            scaled = self.scheduler.scale_model_input(torch.cat([latents] * 2), t)
            joined = torch.cat([scaled, images], dim=2)
            out = self.unet(joined, t, encoder_hidden_states=tokens, added_time_ids=ids, return_dict=False)[0]
            without, with_image = out.chunk(2)
            latents = self.scheduler.step(without + scale * (with_image - without), t, latents).prev_sample
        decoded = self.decode_latents(latents, frames, 2)
        return self.video_processor.postprocess_video(video=decoded, output_type="np")[0]


# ---- their networks and pipelines, small -----------------------------------------------------------------------------


def network(network_class: Any, **changes: Any) -> Any:
    ids = {"projection_class_embeddings_input_dim": 160} if issubclass(network_class, OrbitUNet) else {}
    return lively_svd(network_class(**unet_config(32, 64, **(ids | changes))))


def frame_autoencoder() -> Any:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    return lively_svd(AutoencoderKL(**blocks, block_out_channels=(32, 32, 32, 32), latent_channels=4))


def inputs_of(unet: Any, dtype: torch.dtype = torch.float32, batch: int = 2) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)  # noqa: E731
    inputs = {"sample": draw(batch, FRAMES, 8, 8, 8), "timestep": torch.tensor(0.7)}
    if isinstance(unet, OrbitUNet):
        ids = [torch.full((batch, FRAMES), 1e-5), *6 * torch.rand(2, batch, FRAMES, generator=generator)]
        added = {"added_time_ids": [values.to(dtype) for values in ids]}
        return inputs | added | {"encoder_hidden_states": draw(batch, 1, 24)}
    added_ids = torch.tensor([[6.0, 127.0, 0.02], [6.0, 90.0, 0.1]], dtype=dtype)[:batch]
    return inputs | {"encoder_hidden_states": draw(batch, FRAMES, 24), "added_time_ids": added_ids}


def pipeline_of(family: str) -> tuple[Any, Callable[..., np.ndarray]]:
    """A pipeline and its call, by seed."""
    parts = build_random(PEERS["svd"], True, torch.float32, torch.device("cpu")).components
    config = dict(parts["unet"].config)
    if family == "DepthCrafter":
        parts["unet"] = lively_svd(DepthUNet.from_config(config))
        pipe = DepthPipeline(**(parts | {"vae": lively_svd(parts["vae"])}))
        video = torch.rand(5, 3, 64, 64, generator=torch.Generator().manual_seed(4))
        return pipe, lambda seed=0, guidance=1.0: pipe(video, window=3, overlap=1, guidance=guidance, seed=seed)
    config["projection_class_embeddings_input_dim"] = 5 * config["addition_time_embed_dim"]
    parts["unet"] = lively_svd(OrbitUNet.from_config(config))
    pipe = OrbitPipeline(**(parts | {"vae": frame_autoencoder()}))
    picture = 2 * torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(4)) - 1
    turns = [0.9, 2.0, 3.1, 0.0]
    return pipe, lambda seed=0, polar=1.4: pipe(picture, [polar] * 4, turns, seed=seed)
