"""A network called through its family is called as by its own pipeline: the same bits come out."""

from typing import Any

import pytest
import torch
from torch import Tensor

from gendiff import Condition
from gendiff.interop.diffusers import PipelineBackbone, codec_of, family_of
from gendiff.testing import TINY_PIPELINES
from tests.interop.calls import PIPES, PROMPTS, TOGETHER, Pipes, combine, masks, pixels, run

GUIDED = [name for name in TINY_PIPELINES if name not in ("ddpm", "flux2")]  # whose pipelines guide


@pytest.fixture
def pipes() -> Pipes:
    return PIPES


def parts(name: str, pipe: Any, prompts: list[str] = PROMPTS) -> tuple[PipelineBackbone, Any, Condition]:
    """Backbone and codec of a pipeline, and the condition of the prompts as a user would make it."""
    family, codec, facts = family_of(pipe), codec_of(pipe), dict[str, Any]()
    backbone = PipelineBackbone(getattr(pipe, family.network.component), family)
    assert backbone.accepts == codec.accepts
    if name == "ddpm":
        return backbone, codec, codec.cond()
    rows = len(prompts)
    if "size" in codec.accepts:
        facts["size"] = (64, 32)
    if "channels" in codec.accepts:
        edited = {"source": pixels(rows)}
        facts |= edited if name == "pix2pix" else {"image": pixels(rows), "mask": masks(rows)}
    if name in ("flux", "flux2"):
        facts["guidance"] = 2.5
    return backbone, codec, codec.cond(prompts, **facts)


def masked_latents(name: str, codec: Any, rows: int) -> dict[str, Any]:
    """Inpainting pipelines draw a sample of the masked picture's latents; they are given the mean."""
    if not name.endswith("inpaint"):
        return {}
    return {"masked_image_latents": codec.beside.masked(pixels(rows), masks(rows))[:, 1:]}


def kept(name: str, out: Tensor) -> Tensor:
    return out.chunk(2, dim=1)[0] if name == "pixart" else out  # the pipeline throws the variance away


@torch.no_grad()
@pytest.mark.parametrize("name", TINY_PIPELINES)
def test_the_network_is_called_as_by_the_pipeline(pipes, name):
    backbone, codec, cond = parts(name, pipes[name])
    seen = run(name, pipes[name], **masked_latents(name, codec, 2))
    assert len(seen.steps) >= 2
    for x, timestep, theirs in seen.steps:
        assert torch.equal(kept(name, backbone(x, timestep.float().expand(len(x)), cond)), theirs)
    assert torch.equal(codec.decode(seen.latents), seen.images)


# One prompt: the null is encoded once, and in a batch of two a text encoder gives other last bits.
@torch.no_grad()
@pytest.mark.parametrize("name", GUIDED)
def test_so_is_the_guided_one_with_the_codecs_null(pipes, name):
    backbone, codec, cond = parts(name, pipes[name], PROMPTS[:1])
    null = codec.null(cond)
    seen = run(name, pipes[name], PROMPTS[:1], guided=True, **masked_latents(name, codec, 1))
    for x, timestep, theirs in seen.steps:
        t = timestep.float()
        if name == "pix2pix":
            branches = [cond, null, codec.null(null, "channels")]
            text, image, none = backbone(x.repeat(3, 1, 1, 1), t.expand(3), Condition.concat(branches)).chunk(
                3
            )
            ours = none + 3.0 * (text - image) + 1.5 * (image - none)
        elif name in TOGETHER:
            both = Condition.concat([null, cond])
            ours = combine(name)(*backbone(x.repeat(2, 1, 1, 1), t.expand(2), both).chunk(2))
        elif name == "z-image":  # it pads both in one batch, which changes the order of sums
            answers = backbone(x.repeat(2, 1, 1, 1), t.expand(2), padded([cond, null]))
            ours = combine(name)(*answers.flip(0).chunk(2))
        else:
            ours = combine(name)(backbone(x, t.expand(1), null), backbone(x, t.expand(1), cond))
        assert torch.equal(kept(name, ours), theirs)


def padded(conds: list[Condition]) -> Condition:
    texts = [cond["text"] for cond in conds]
    length = max(text.shape[1] for text in texts)
    masks = [(torch.arange(length) < text.shape[1])[None] for text in texts]
    texts = [torch.nn.functional.pad(text, (0, 0, 0, length - text.shape[1])) for text in texts]
    return Condition(text=torch.cat(texts), text_mask=torch.cat(masks))
