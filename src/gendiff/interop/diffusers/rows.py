"""The model families that are known, one row each."""

from typing import Any

from gendiff.interop.diffusers import derived, layouts
from gendiff.interop.diffusers.family import Clock, Family, Images, Network, Prompt
from gendiff.interop.diffusers.latents import MEAN_STD, PATCH_NORM

STATES, POOLED, MASK = "encoder_hidden_states", "pooled_projections", "encoder_attention_mask"
UNET_TEXT = {"text": STATES, "guidance": None}
SIZES = {"text_pooled": "added_cond_kwargs.text_embeds", "size": "added_cond_kwargs.time_ids"}
DISTILLED = {"guidance": "time_cond_proj_dim"}
MASKED = Prompt(
    results=("text", "text_mask", None, None), negatives=(None, None, "text", "text_mask"), null="negative"
)
THOUSANDTHS = Clock(steps=((0, 1000),), rounded=True)


def _two_networks(pipe: Any, chosen: bool) -> str | None:
    if pipe.config.get("boundary_ratio") is not None and not chosen:
        return (
            "it changes from one network to another on the way (Wan 2.2); say which one is meant, with "
            "transformer=pipe.transformer for the noisy times or transformer=pipe.transformer_2 for the rest"
        )
    if pipe.config.get("expand_timesteps"):
        return "its network is given a timestep for every token (Wan 2.2 5B), which is not supported"
    return None


ROWS: tuple[Family, ...] = (
    Family(
        name="sd",
        pipelines=(
            "StableDiffusionPipeline",
            "StableDiffusionImg2ImgPipeline",
            "StableDiffusionInpaintPipeline",
        ),
        network=Network(
            component="unet",
            x="sample",
            names=UNET_TEXT,
            optional=DISTILLED,
            derive=derived.guidance_embedding,
            beside="mask",
        ),
        prompt=Prompt(results=("text", None), negatives=(None, "text"), null="negative"),
    ),
    Family(
        name="pix2pix",
        pipelines=("StableDiffusionInstructPix2PixPipeline",),
        network=Network(component="unet", x="sample", names={"text": STATES}, beside="source"),
        prompt=Prompt(method="_encode_prompt"),
    ),
    Family(
        name="sdxl",
        pipelines=(
            "StableDiffusionXLPipeline",
            "StableDiffusionXLImg2ImgPipeline",
            "StableDiffusionXLInpaintPipeline",
        ),
        network=Network(
            component="unet",
            x="sample",
            names=UNET_TEXT | SIZES,
            optional=DISTILLED,
            derive=derived.guidance_embedding,
            beside="mask",
        ),
        prompt=Prompt(
            results=("text", None, "text_pooled", None),
            negatives=(None, "text", None, "text_pooled"),
            null="negative",
        ),
        images=Images(upcast=True),
    ),
    Family(
        name="sd3",
        pipelines=(
            "StableDiffusion3Pipeline",
            "StableDiffusion3Img2ImgPipeline",
            "StableDiffusion3InpaintPipeline",
        ),
        network=Network(names={"text": STATES, "text_pooled": POOLED}),
        prompt=Prompt(
            results=("text", None, "text_pooled", None),
            negatives=(None, "text", None, "text_pooled"),
            null="negative",
        ),
        images=Images(multiple=2),
    ),
    Family(
        name="flux",
        pipelines=("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline"),
        network=Network(
            clock=THOUSANDTHS,
            names={"text": STATES, "text_pooled": POOLED, "guidance": "guidance"},
            optional={"guidance": "guidance_embeds"},
            layout=layouts.patches,
            derive=derived.flux_ids,
        ),
        prompt=Prompt(results=("text", "text_pooled", None)),
        images=Images(multiple=2),
    ),
    Family(
        name="flux2",
        pipelines=("Flux2Pipeline", "Flux2KleinPipeline"),
        network=Network(
            clock=THOUSANDTHS,
            names={"text": STATES, "guidance": "guidance"},
            optional={"guidance": "guidance_embeds"},
            layout=layouts.places,
            derive=derived.flux2_ids,
        ),
        prompt=Prompt(results=("text", None)),
        images=Images(latents=PATCH_NORM),
    ),
    Family(
        name="qwen",
        pipelines=("QwenImagePipeline", "QwenImageImg2ImgPipeline", "QwenImageInpaintPipeline"),
        network=Network(
            clock=THOUSANDTHS,
            names={"text": STATES, "text_mask": f"{STATES}_mask", "guidance": "guidance"},
            optional={"guidance": "guidance_embeds"},
            layout=layouts.patches,
            derive=derived.qwen_shapes,
        ),
        prompt=Prompt(results=("text", "text_mask")),
        images=Images(latents=MEAN_STD, frames="one", multiple=2),
    ),
    Family(
        name="wan",
        pipelines=("WanPipeline", "WanVideoToVideoPipeline"),
        network=Network(names={"text": STATES}),
        prompt=Prompt(results=("text", None), negatives=(None, "text"), null="negative"),
        images=Images(latents=MEAN_STD, frames="many", multiple=2),
        refuse=_two_networks,
    ),
    Family(
        name="z-image",
        pipelines=("ZImagePipeline", "ZImageImg2ImgPipeline", "ZImageInpaintPipeline"),
        network=Network(
            x="x",
            clock=Clock(keyword="t", steps=((1000, -1000),)),
            sign=-1,
            names={"text": "cap_feats", "text_mask": None},
            layout=layouts.frames_listed,
            derive=derived.listed_captions,
        ),
        prompt=Prompt(results=("text", None), negatives=(None, "text"), null="negative"),
        images=Images(multiple=2),
    ),
    Family(
        name="lumina2",
        pipelines=("Lumina2Pipeline",),
        network=Network(
            clock=Clock(steps=((0, 1000), (1, -1))),
            sign=-1,
            names={"text": STATES, "text_mask": MASK},
        ),
        prompt=MASKED,
        images=Images(multiple=2),
    ),
    Family(
        name="sana",
        pipelines=("SanaPipeline",),
        network=Network(names={"text": STATES, "text_mask": MASK}, derive=derived.scaled_timestep),
        prompt=MASKED,
    ),
    Family(
        name="pixart",
        pipelines=("PixArtSigmaPipeline", "PixArtAlphaPipeline"),
        network=Network(names={"text": STATES, "text_mask": MASK}, derive=derived.picture_facts),
        prompt=MASKED,
        images=Images(multiple=2),
    ),
    Family(
        name="unet2d",
        pipelines=("DDPMPipeline", "DDIMPipeline"),
        network=Network(
            component="unet",
            x="sample",
            names={"label": "class_labels"},
            optional={"label": "num_class_embeds"},
        ),
        prompt=None,
        images=Images(latents=None),
    ),
)
