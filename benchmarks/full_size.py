"""Pipelines with the shapes of released models and random weights, and the sampling examples run on them.

Run on a CUDA device: python benchmarks/full_size.py [--out runs/full_size]

Networks and autoencoders have their released sizes; text encoders have the widths of theirs, but two layers
and a small vocabulary. The pictures are noise: what is shown is that every part runs, decodes and is saved.
"""

import argparse
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import diffusers
import torch

from gendiff import Rng
from gendiff.data import save_images
from gendiff.testing import text, tiny_pipeline

lib: Any = diffusers
CLIP_L, CLIP_G, T5 = 768, 1280, 4096


def vae(**settings: Any) -> Any:
    """The autoencoder of Stable Diffusion and its successors."""
    return lib.AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        sample_size=512,
        **settings,
    )


def sdxl_unet(channels: int = 4, refiner: bool = False) -> Any:
    """The network of the base, or of the refiner."""
    cross = ("CrossAttnDownBlock2D",) * 2
    down = ("DownBlock2D", *cross, "DownBlock2D") if refiner else ("DownBlock2D", *cross)
    up = tuple(name.replace("Down", "Up") for name in reversed(down))
    return lib.UNet2DConditionModel(
        sample_size=128,
        in_channels=channels,
        block_out_channels=(384, 768, 1536, 1536) if refiner else (320, 640, 1280),
        down_block_types=down,
        up_block_types=up,
        transformer_layers_per_block=4 if refiner else (1, 2, 10),
        attention_head_dim=(6, 12, 24, 24) if refiner else (5, 10, 20),
        cross_attention_dim=CLIP_G if refiner else CLIP_L + CLIP_G,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2560 if refiner else 2816,
    )


def sd15(pipe: Any) -> dict[str, Any]:
    unet = lib.UNet2DConditionModel(cross_attention_dim=CLIP_L, sample_size=64)
    encoder = text.clip_encoder(pipe.tokenizer, width=CLIP_L)
    return {"unet": unet, "vae": vae(scaling_factor=0.18215), "text_encoder": encoder}


def sdxl(pipe: Any) -> dict[str, Any]:
    refiner, channels = pipe.text_encoder is None, pipe.unet.config.in_channels
    parts: dict[str, Any] = {"unet": sdxl_unet(channels, refiner), "vae": vae(scaling_factor=0.13025)}
    parts["text_encoder_2"] = text.clip_encoder(pipe.tokenizer_2, width=CLIP_G, projected=True, act="gelu")
    return parts if refiner else parts | {"text_encoder": text.clip_encoder(pipe.tokenizer, width=CLIP_L)}


def sd3(pipe: Any) -> dict[str, Any]:
    """Stable Diffusion 3 medium."""
    network = lib.SD3Transformer2DModel(
        sample_size=128,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=24,
        attention_head_dim=64,
        num_attention_heads=24,
        joint_attention_dim=T5,
        caption_projection_dim=1536,
        pooled_projection_dim=CLIP_L + CLIP_G,
        pos_embed_max_size=192,
    )
    latents = {"latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609}
    return {
        "transformer": network,
        "vae": vae(**latents, use_quant_conv=False, use_post_quant_conv=False),
        "text_encoder": text.clip_encoder(pipe.tokenizer, width=CLIP_L, projected=True),
        "text_encoder_2": text.clip_encoder(pipe.tokenizer_2, width=CLIP_G, projected=True, act="gelu"),
        "text_encoder_3": text.t5_encoder(pipe.tokenizer_3, width=T5),
    }


SIZES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "sd15": sd15,
    "sd3": sd3,
    **dict.fromkeys(("sdxl", "sdxl-inpaint", "sdxl-inpaint-4", "sdxl-refiner"), sdxl),
}


def full_pipeline(name: str, device: str = "cuda", dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Any:
    """A tiny pipeline whose models are replaced by ones of the released sizes."""
    pipe: Any = tiny_pipeline(name)
    torch.manual_seed(seed)
    with torch.device(device):  # drawn there, which takes seconds in place of minutes
        parts = SIZES[name](pipe)
    pipe.register_modules(**parts)
    for model in parts.values():
        model.eval().requires_grad_(False)
    return pipe.to(device, dtype)


def main(out: Path) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    flow, sdxl_inpaint, text_to_image = map(import_module, ("flow", "sdxl_inpaint", "text_to_image"))

    def shown(name: str, make: Callable[[], torch.Tensor]) -> None:
        for run in ("first", "second"):
            torch.cuda.synchronize()
            began = time.perf_counter()
            image = make().float().cpu()
            seconds = time.perf_counter() - began
            finite = bool(image.isfinite().all())
            print(
                f"{name:16} {run:6} run {seconds:6.2f} s, {tuple(image.shape)}, finite {finite}", flush=True
            )
        save_images(image, out / name)  # pyright: ignore[reportPossiblyUnboundVariable]

    prompt = ["a red fox in the snow"]
    for name, size in (("sd15", 512), ("sdxl", 1024)):
        pipe = full_pipeline(name)
        shown(name, lambda: text_to_image.draw(pipe, prompt, "blurry", size, 50, 7.5, 0))  # noqa: B023
        del pipe
    pipe = full_pipeline("sd3")
    shown("sd3", lambda: flow.draw(pipe, prompt[0], 1024, 28, 7.0, 0))
    del pipe
    photo, hole = Rng(0).uniform("photo", (1, 3, 1024, 1024)), torch.zeros(1, 1, 1024, 1024)
    hole[..., 300:700, 300:700] = 1
    refiner = full_pipeline("sdxl-refiner")
    for name in ("sdxl-inpaint", "sdxl-inpaint-4"):
        base = full_pipeline(name)
        shown(name, lambda: sdxl_inpaint.paint(base, refiner, photo, hole, prompt[0], 40, 0))  # noqa: B023
        del base


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/full_size"))
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    main(parser.parse_args().out)
