"""A clip longer than the model makes: clips of the model's length, each continuing the one beside it."""

from __future__ import annotations

from typing import Any

from ...system.errors import ReducioError, check_switch, check_word
from . import validation
from .request import Chain, Joint

DIRECTIONS = ("forward", "both")
MAX_FRAMES = 100_000  # an hour and three quarters at 16 frames a second


def reducio_joint(config: Any) -> Joint:
    """For a video autoencoder, whose content frame is the middle of the clip: half of the latent is carried over."""
    frames, content = config.num_frames, config.content_frame
    overlap = content + 1  # the neighbour's last frame becomes number `content`
    factor = config.temporal_factor
    return Joint(
        frames=frames, content=content, steps=frames // factor, held=overlap // factor, time_axis=2, overlap=overlap
    )


def svd_joint(frames: int, overlap: Any) -> Joint:
    """For models whose clips start with their image: it is frame number `-overlap` of the clip before."""
    overlap = validation.check_count("overlap", overlap, frames - 1)
    return Joint(frames=frames, content=0, steps=frames, held=overlap, time_axis=1, overlap=overlap)


def plan(joint: Joint, num_frames: Any, direction: Any, match_colours: Any) -> Chain | None:
    """The chain of clips that makes `num_frames`; None if one clip is enough.

    Raises ReducioError for a number of frames that whole clips do not give, with the two nearest, and for invalid
    values of the other arguments.
    """
    check_word("direction", direction, DIRECTIONS)
    check_switch("match_colours", match_colours)
    if direction == "both" and joint.hop_back < 1:
        raise ReducioError("direction: 'both' needs a model whose content frame lies within the clip; use 'forward'")
    num_frames = validation.check_count("num_frames", num_frames, MAX_FRAMES)

    def chain(further: int) -> Chain:
        before = 0 if direction == "forward" else further // 2
        return Chain(joint=joint, after=further - before, before=before, match_colours=match_colours)

    further = 0
    while chain(further).frames < num_frames:
        further += 1
    if chain(further).frames != num_frames:
        if not further:
            near = f"{joint.frames}, then {chain(1).frames}"
        else:
            near = f"{chain(further - 1).frames} and {chain(further).frames}"
        raise ReducioError(
            f"num_frames: {num_frames} is not reached by clips of {joint.frames} frames that overlap; "
            f"the two nearest are {near}"
        )
    return chain(further) if further else None
