"""The command line of `digits.py`, and what it reports: a table, a picture, whether the bounds hold."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import digits_picture
from digits_data import Digits
from digits_metrics import Figures, Judge
from torch import Tensor

GUIDED, ACCURACY, RATIO, SHARE = 1.5, 0.98, 2.0, 0.62  # the bounds that hold at this scale
NAMES = {0.0: "scale 0\n(class unseen)", 1.0: "scale 1\n(no guidance)"}


def arguments(doc: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="few steps: all runs, no figure is claimed")
    parser.add_argument("--out", type=Path, default=Path("runs/digits"), help="folder of the picture")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def table(figures: Mapping[str, Figures]) -> str:
    lines = [f"{'':<18}{'accuracy':>10}{'Fréchet distance':>26}{'nearer to training':>22}"]
    for name, f in figures.items():
        distance = f"{f.distance:.4f} = {f.ratio:.2f} × real"
        lines.append(f"{name:<18}{f.accuracy:>10.1%}{distance:>26}{f.share:>22.1%}")
    return "\n".join(lines)


def missed(figures: Figures) -> list[str]:
    """The bounds that these figures do not keep."""
    bounds = {
        f"accuracy {figures.accuracy:.1%} is below {ACCURACY:.0%}": figures.accuracy < ACCURACY,
        f"Fréchet distance {figures.ratio:.2f} × real is above {RATIO:g} ×": figures.ratio > RATIO,
        f"share nearer to training {figures.share:.1%} is above {SHARE:.0%}": figures.share > SHARE,
    }
    return [text for text, broken in bounds.items() if broken]


def report(
    args: argparse.Namespace,
    digits: Digits,
    labels: Tensor,
    samples: Mapping[float, Tensor],
    rows: Sequence[Mapping[str, Any]],
) -> None:
    """Print the table, write the picture, and leave with exit code 1 where a bound is missed."""
    judge = Judge(digits.images, digits.labels, digits.held_images, digits.held_labels)
    figures = {scale: judge(images, labels) for scale, images in samples.items()}
    print("\n" + table({"real, held out": judge.real} | {f"scale {s:g}": f for s, f in figures.items()}))
    counts = len(labels), len(digits.labels), len(digits.held_labels)
    print("{} samples a scale; trained on {} images; {} held out".format(*counts))
    columns = {"real": (digits.held_images.numpy(), digits.held_labels.numpy())}
    for scale, images in samples.items():
        columns[NAMES.get(scale, f"scale {scale:g}")] = images.numpy(), labels.numpy()
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "digits.png"
    digits_picture.draw(path, columns, rows)
    print(f"picture: {path}")
    if args.short:
        print("A short run: these figures are not the claim; run without --short for that.")
    elif problems := missed(figures[GUIDED]):
        sys.exit(f"At scale {GUIDED:g} " + ", ".join(problems) + ".")
    else:
        print(f"At scale {GUIDED:g} all bounds hold.")
