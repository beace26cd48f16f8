"""Run by test_accumulation.py, on one process or several: trains, and prints what came out as JSON."""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor

from tests.training.toy import Images, trainer


def main(folder: str, batch: str, length: str) -> None:
    accelerator = Accelerator(cpu=True)
    made = trainer(
        Path(folder),
        train_dataset=Images(24),
        eval_dataset=Images(7),
        accelerator=accelerator,
        per_device_batch_size=int(batch),
        gradient_accumulation_steps=int(length),
        max_steps=6,
        logging_steps=1,
    )
    # A denoiser that was made before goes on pointing at the live module.
    made.train()
    weights = torch.cat([p.detach().flatten() for p in made.parameters.values()])
    averages = torch.cat([a.flatten() for a in made.ema.averages.weights().values()])
    every = [torch.cat([weights, averages])]
    if accelerator.num_processes > 1:
        every: list[Tensor] = [torch.empty_like(every[0]) for _ in range(accelerator.num_processes)]
        dist.all_gather(every, torch.cat([weights, averages]))
    evaluated = made.evaluate()["loss"]
    if accelerator.is_main_process:
        rows = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
        print(
            json.dumps(
                {
                    "rates": [row["learning_rate"][0] for row in rows],
                    "rows": rows,
                    "weights": weights.tolist(),
                    "replicas": float((every[0] - every[-1]).abs().max()),
                    "evaluated": evaluated,
                }
            )
        )
    accelerator.wait_for_everyone()  # else a process may tear down what the other still talks to
    accelerator.end_training()
    # The threads of a gloo group that DDP held go on after it is destroyed, and one that lets go of a tensor
    # while the interpreter is taken down aborts the process: all is said by now, so nothing is taken down.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
