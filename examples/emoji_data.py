"""The emoji as a data set of images and captions, of which some pairs of colour and shape are held out."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from emoji_cache import HELD_OUT, REPAINTED, TRAIN, Kept, kept
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import Dataset

from gendiff.data.context import sample_rng

SHIFT = 1  # pixels that a training image is moved by at most, in each direction


@final
@dataclass(frozen=True, eq=False)
class Emoji(Dataset[dict[str, Any]]):
    """Captioned images, those to train on; `kept` has all.

    Attributes:
        rows: the place in `kept` of each.
        ids: its caption, which no other has.
    """

    kept: Kept
    rows: list[int]
    ids: list[str]

    @classmethod
    def load(cls, cache: Path | None = None, size: int = 32, pairs: bool = False) -> "Emoji":
        """From a file, which is made where there is none: by default one in runs/emoji.

        With the file, neither the font nor the encoder need be installed.

        Args:
            cache: the file.
            size: height and width of an image.
            pairs: whether to have no more than the colours of a few shapes, which is fast.
        """
        found = kept(cache, size, pairs)
        rows = (found.kinds <= REPAINTED).nonzero().flatten().tolist()
        return cls(found, rows, [found.captions[row] for row in rows])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        """An image [3, S, S] in [0, 1], moved a little, with its caption."""
        image = self.kept.images[self.rows[i]]
        y, x = sample_rng().integers("move", 2 * SHIFT + 1, (2,)).tolist()
        wide, (height, width) = pad(image, [SHIFT] * 4, value=1.0), image.shape[1:]
        image = wide[:, y : y + height, x : x + width]
        return {"id": self.ids[i], "image": image, "caption": self.ids[i], "weight": 1.0}

    def real(self) -> tuple[list[str], Tensor]:
        """The captions of the font's own images that are trained on, and these."""
        return self._of(TRAIN)

    def held_out(self) -> tuple[list[str], Tensor]:
        """The captions that are held out from training, and their images."""
        return self._of(HELD_OUT)

    def _of(self, kind: int) -> tuple[list[str], Tensor]:
        rows = (self.kept.kinds == kind).nonzero().flatten().tolist()
        return [self.kept.captions[row] for row in rows], self.kept.images[rows]
