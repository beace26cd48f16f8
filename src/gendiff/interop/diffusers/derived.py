"""Keywords of networks that follow from others: position ids, shapes, lists, the embedding of a scale.

They are made at the call, on the device of x_t, so that a condition holds nothing that is not batched.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gendiff.condition import Condition

Keywords = Mapping[str, Any]


def flux_ids(network: Any, x: Tensor, cond: Condition, given: Keywords) -> Keywords:
    """(0, row, column) of every patch of 2 by 2, and zeros for the text."""
    rows, columns = (torch.arange(side // 2, device=x.device, dtype=torch.float32) for side in x.shape[-2:])
    row, column = torch.meshgrid(rows, columns, indexing="ij")
    image = torch.stack([torch.zeros_like(row), row, column], dim=-1).reshape(-1, 3)
    return {"img_ids": image, "txt_ids": image.new_zeros(cond["text"].shape[1], 3)}


def flux2_ids(network: Any, x: Tensor, cond: Condition, given: Keywords) -> Keywords:
    """(0, row, column, 0) of every place, (0, 0, 0, index) of every token of the text; one set a sample."""

    def product(*lengths: int) -> Tensor:
        ids = torch.cartesian_prod(*(torch.arange(length, device=x.device) for length in lengths))
        return ids.expand(len(x), -1, -1)

    return {
        "img_ids": product(1, *x.shape[-2:], 1),
        "txt_ids": product(1, 1, 1, cond["text"].shape[1]),
    }


def qwen_shapes(network: Any, x: Tensor, cond: Condition, given: Keywords) -> Keywords:
    """(frames, rows, columns) of the patches of every sample."""
    return {"img_shapes": [[(1, x.shape[-2] // 2, x.shape[-1] // 2)]] * len(x)}


def listed_captions(network: Any, x: Tensor, cond: Condition, given: Keywords) -> Keywords:
    """The text of every sample without its padding, as a list; reading a mask waits for the device."""
    text = given["cap_feats"]
    if "text_mask" not in cond:
        return {"cap_feats": list(text.unbind(0))}
    return {"cap_feats": [row[mask] for row, mask in zip(text, cond["text_mask"].bool(), strict=True)]}


def picture_facts(network: Any, x: Tensor, cond: Condition, given: Keywords) -> Keywords:
    """Resolution and aspect ratio in pixels, of which only the 1024-pixel PixArt-alpha takes notice."""
    if not network.use_additional_conditions:
        return {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    height, width = (8 * side for side in x.shape[-2:])  # PixArt's autoencoder has a factor of 8
    resolution, aspect = x.new_empty(len(x), 2), x.new_full((len(x), 1), height / width)
    resolution[:, 0], resolution[:, 1] = height, width  # fills; a list would be copied from the host
    return {"added_cond_kwargs": {"resolution": resolution, "aspect_ratio": aspect}}


def scaled_timestep(network: Any, x: Tensor, cond: Condition, given: Keywords) -> Keywords:
    """The timestep in the units of a Sana network."""
    return {"timestep": given["timestep"] * network.config.timestep_scale}


def guidance_embedding(network: Any, x: Tensor, cond: Condition, given: Keywords) -> Keywords:
    r"""Sines and cosines of the guidance scale w, for a network distilled from guided ones.

    With D channels, :math:`\sin(1000 (w - 1) f_i), \cos(1000 (w - 1) f_i)`,
    :math:`f_i = 10000^{-i/(D/2 - 1)}`, i = 0 … D/2 - 1 (Luo et al. 2023, *Latent consistency models*, section
    4.3, with the embedding of their code).
    """
    if "guidance" not in cond:
        return {}
    size = network.config.time_cond_proj_dim
    half = size // 2
    frequencies = torch.arange(half, dtype=torch.float32, device=x.device)
    frequencies = torch.exp(frequencies * -(math.log(10000.0) / (half - 1)))
    angles = ((cond["guidance"].float() - 1) * 1000.0)[:, None] * frequencies
    embedding = torch.nn.functional.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, size % 2))
    return {"timestep_cond": embedding.to(x.dtype)}
