"""Text to image, from nothing to pictures: emoji, drawn from their names. No download at run time.

    pip install gendiff[emoji]
    python examples/emoji.py           # one H100: about 9 minutes
    python examples/emoji.py --small   # two CPU cores: about 80 s; shows that all of it runs, no more

Expected: a table of how many training prompts are recognised in their samples, and in how many samples of
pairs of colour and shape that were held out from training both are right; the picture runs/emoji/emoji.png,
and the network in runs/emoji/base or small.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from emoji_data import Emoji
from emoji_net import Net
from emoji_report import report
from emoji_text import TextCodec

from gendiff import EMA, Denoiser, Objective, TrainConfig, Trainer, WarmupCosine, cfg
from gendiff.math import Rectified, grids
from gendiff.objectives import LogitNormal
from gendiff.sampling import Heun
from gendiff.training import SampleGrid

PROMPTS = ["red heart", "pizza", "octopus", "green book", "rocket", "dog face", "blue circle", "green heart"]
SCALE = 2.5

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="few emoji, a small network, few steps")
    parser.add_argument(
        "--cache", type=Path, help="file of drawn and encoded emoji; made where there is none"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/emoji"))
    parser.add_argument("--steps", type=int, help="updates")
    args = parser.parse_args()

    emoji = Emoji.load(args.cache, pairs=args.small)
    codec = TextCodec(emoji.kept.table, drop=0.1)
    torch.manual_seed(0)  # for the initial weights
    denoiser = Denoiser(Net("small" if args.small else "base"), Rectified(), "flow")
    steps = args.steps or (60 if args.small else 3000)
    config = TrainConfig(
        output_dir=args.out / "run",
        max_steps=steps,
        per_device_batch_size=32 if args.small else 256,
        mixed_precision="bf16" if torch.cuda.is_available() else "no",
        learning_rate=2e-3 if args.small else 4e-4,
        lr_scheduler=WarmupCosine(0.03),
        betas=(0.9, 0.99),
        ema=EMA(0.9 if args.small else 0.999, warmup=True),
        save_steps=None if args.small else 2000,
        save_total_limit=2,
        logging_steps=10 if args.small else 100,
        num_workers=0 if args.small else 12,
    )
    grid, guided = grids.uniform(denoiser.schedule, 10 if args.small else 25), partial(cfg, scale=SCALE)
    known = [caption for caption in PROMPTS if caption in emoji.kept.captions]
    samples = SampleGrid(
        known, every=max(1, steps // 4), size=(32, 32), grid=grid, solver=Heun(), combine=guided
    )
    trainer = Trainer(
        denoiser,
        emoji,
        codec=codec,
        objective=Objective(times=LogitNormal()),
        config=config,
        callbacks=[samples],
    )
    print(trainer)
    trainer.train()
    trainer.save_pretrained(args.out / ("small" if args.small else "base"))  # the averaged weights
    report(trainer, emoji, grid, guided, args.out, seeds=4 if args.small else 32)
