"""LoHa's layers of peft with scales that are tensors, of which peft's own make numbers (and torch warns)."""

from typing import Any, ClassVar

from peft.tuners.loha import layer as of_peft
from torch import Tensor


class _Scaled:
    """What is added to the weight, at a scale that may be a tensor."""

    OF_PEFT: ClassVar[Any]

    def get_delta_weight(self: Any, adapter_name: str, *, apply_rank_dropout: bool = False) -> Tensor:
        scale = self.scaling[adapter_name]
        if not isinstance(scale, Tensor):
            return self.OF_PEFT.get_delta_weight(self, adapter_name, apply_rank_dropout=apply_rank_dropout)
        made = of_peft.make_weight(
            self.hada_w1_a[adapter_name],
            self.hada_w1_b[adapter_name],
            self.hada_w2_a[adapter_name],
            self.hada_w2_b[adapter_name],
            scale,
        )
        return made.reshape(self.get_base_layer().weight.shape)


class Linear(_Scaled, of_peft.Linear):
    """LoHa of a linear layer."""

    OF_PEFT = of_peft.Linear


class Conv1d(_Scaled, of_peft.Conv1d):
    """LoHa of a convolution along one dimension."""

    OF_PEFT = of_peft.Conv1d


class Conv2d(_Scaled, of_peft.Conv2d):
    """LoHa of a convolution along two dimensions."""

    OF_PEFT = of_peft.Conv2d
