"""Teach a network a style: an adapter of rank 4 in its attention, trained on a captioned folder, and shipped.

    python examples/emoji.py --small --steps 1200         # the network: two CPU cores, 5 minutes
    python examples/lora.py                               # line drawings of emoji: 1 minute
    python examples/lora.py --model FOLDER --data PHOTOS  # a local diffusers pipeline, a folder with captions

Expected: a table of what is trained; how colourful samples are before and after; both in runs/lora/00000.png;
the adapter in runs/lora/style.safetensors, which diffusers reads too. Without the network of emoji.py a tiny
pipeline of random weights shows that all of it runs.
"""

from pathlib import Path

import torch
from local_pipeline import arguments
from lora_base import Base
from lora_style import colour, folder

from gendiff import TrainConfig, Trainer, WarmupCosine, lora
from gendiff.data import Folder, save_images

ATTENTION = ("**.to_k", "**.to_q", "**.to_v", "**.to_out.0")
SHOWN = 8

if __name__ == "__main__":
    args = arguments(
        __doc__, model=None, data=None, steps=300, batch=32, rank=4, alpha=8.0, learning_rate=2e-3,
        pictures=256, out=Path("runs/lora"),
    )  # fmt: skip
    base = Base.load(args.model, args.device)
    path = args.data or folder(args.out / "drawings", args.pictures, base.emoji)
    photos = Folder(path, size=base.size)

    handle = lora.inject(
        base.network, lora.plan(base.network, ATTENTION, rank=args.rank, lora_alpha=args.alpha), "style"
    )
    config = TrainConfig(
        output_dir=args.out / "run",
        max_steps=args.steps,
        per_device_batch_size=args.batch,
        mixed_precision="bf16" if args.device == "cuda" else "no",
        param_groups=handle.param_groups(args.learning_rate, loraplus_lr_ratio=4),
        lr_scheduler=WarmupCosine(0.05),
        seed=args.seed,
    )
    trainer = Trainer(base.denoiser, photos, codec=base.codec, objective=base.objective, config=config)
    print(handle, trainer, sep="\n")
    trainer.train()
    file = lora.save(handle, args.out / "style.safetensors")

    fresh = Base.load(args.model, args.device)  # as whoever gets the file does
    captions = fresh.prompts[:: max(1, len(fresh.prompts) // SHOWN)][:SHOWN]
    before = fresh.draw(captions, args.seed)
    report = lora.load(file, fresh.network, "style")
    (loaded,) = report.handles.values()
    after = fresh.draw(captions, args.seed)
    with loaded.disabled():
        assert torch.equal(fresh.draw(captions, args.seed), before)  # the base, bit for bit
    print(report, lora.measure(loaded), sep="\n\n")

    wanted = torch.stack([photos[i]["image"] for i in range(min(len(photos), 32))])
    print("\ncolour, which the drawings have none of")
    for name, images in {"before": before, "after": after, "the folder": wanted}.items():
        print(f"  {name:<12}{colour(images):8.3f}")
    rows = torch.cat([torch.cat(list(one), -1) for one in (before, after)], -2)
    larger = max(1, 128 // base.size)  # pixels of the picture for one of a sample
    rows = rows.repeat_interleave(larger, -2).repeat_interleave(larger, -1)
    print(*save_images(rows[None], args.out))
