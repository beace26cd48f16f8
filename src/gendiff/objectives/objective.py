"""The training loss: coupling × time law × corruption × weighting × error, each on its own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from jaxtyping import Float, Float64, Shaped
from torch import Tensor

from gendiff._checks import finite_on_host, positive_batch
from gendiff.denoiser import Cond, Denoise, Denoised
from gendiff.math.predictions import Name, Prediction
from gendiff.math.schedules import Schedule
from gendiff.objectives.draw import Corruption, Coupling, Draw, Independent
from gendiff.objectives.errors import MSE, Error
from gendiff.objectives.times import OnGrid, TimeLaw, Uniform
from gendiff.objectives.weightings import Unweighted, Weighting
from gendiff.random import Randomness, as_rng


@final
@dataclass(frozen=True, eq=False)  # tensors have no single truth value to compare by
class LossTerms:
    """Losses per sample; what is minimised is the mean of weight·loss over the samples of an update.

    Attributes:
        loss: unweighted loss, [B].
        weight: weight of each, [B]; None is 1. A padded sample has weight 0.
        t: times, [B].
        log_snr: noise levels, [B], by which losses are best looked at.
        metrics: other numbers per sample, [B] each, to be averaged in a log.
    """

    loss: Float[Tensor, "B"]
    weight: Float[Tensor, "B"] | None = None
    t: Float64[Tensor, "B"] | None = None
    log_snr: Float64[Tensor, "B"] | None = None
    metrics: Mapping[str, Float[Tensor, "B"]] = field(default_factory=dict)

    def mean(self) -> Float[Tensor, ""]:
        """The scalar to minimise: the mean over the batch of weight·loss.

        >>> LossTerms(torch.tensor([1.0, 3.0]), weight=torch.tensor([1.0, 0.0])).mean()
        tensor(0.5000)
        """
        return (self.loss if self.weight is None else self.weight * self.loss).mean()


@final
@dataclass(frozen=True, kw_only=True)
class Objective:
    r"""The loss of a denoiser, which brings the schedule and the prediction type itself.

    .. math:: \mathbb E_{x_0, \epsilon, t}\; w(t)\; \ell\big(\text{out}(\alpha x_0 + \sigma\epsilon,\, t),\
              p\,x_0 + q\,\epsilon\big)

    ======================================================  ==============================================
    setting                                                 published as
    ======================================================  ==============================================
    `Objective()` on a table, epsilon                       L_simple, Ho et al. 2020, eq. 14
    `Objective(weighting=MinSNR(5.0))` on a table           Hang et al. 2023
    `Objective(times=LogitNormal())`, Rectified, flow       Stable Diffusion 3, Esser et al. 2024
    `Objective(times=LogNormal())`, VarianceExploding, edm  EDM, Karras et al. 2022
    ======================================================  ==============================================

    Args:
        times: the time law; by default a table's own times, and uniform times on a continuous schedule.
        weighting: how much each level counts.
        coupling: how noise is paired with data.
        error: the elementwise error.
        corruption: changes of the noise, applied in turn.
        space: what the error is computed of: a prediction type, or None for the network's own output.

    >>> from gendiff.denoiser import Denoiser
    >>> from gendiff.math import Rectified
    >>> from gendiff.random import Rng
    >>> denoiser = Denoiser(lambda x, timestep, cond: torch.zeros_like(x), Rectified(), "x0")
    >>> terms = Objective()(denoiser, torch.full((2, 4), 3.0), rng=Rng(0))
    >>> terms.loss
    tensor([9., 9.])
    """

    times: TimeLaw | None = None
    weighting: Weighting = Unweighted()
    coupling: Coupling = Independent()
    error: Error = MSE()
    corruption: Sequence[Corruption] = ()
    space: Prediction | Name | None = None

    def __post_init__(self) -> None:
        kinds = {"times": TimeLaw, "weighting": Weighting, "coupling": Coupling, "error": Error}
        for name, kind in kinds.items():
            value = getattr(self, name)
            if not isinstance(value, kind) and not (name == "times" and value is None):
                raise TypeError(f"{name} of an Objective is a {kind.__name__}, got {value!r}.")
        several = isinstance(self.corruption, Sequence)
        if not several or not all(isinstance(change, Corruption) for change in self.corruption):
            raise TypeError(
                f"corruption of an Objective is a sequence of Corruptions, got {self.corruption!r}."
            )
        object.__setattr__(self, "corruption", tuple(self.corruption))
        if self.space is not None:
            object.__setattr__(self, "space", Prediction.of(self.space))

    def __call__(
        self,
        denoise: Denoise,
        x0: Float[Tensor, "B *dims"],
        cond: Cond = None,
        *,
        rng: Randomness | torch.Generator | int,
    ) -> LossTerms:
        """Draw, denoise and score.

        Args:
            denoise: the denoiser that is trained.
            x0: clean data, [B, *].
            cond: its condition, B rows.
            rng: randomness: an `Rng`, a `torch.Generator` or a seed.

        Raises:
            TypeError: for a bare network, which does not say what its input and output mean.
        """
        if not isinstance(getattr(denoise, "schedule", None), Schedule):
            raise TypeError(
                f"an Objective trains a denoiser, which has a schedule, got {type(denoise).__name__}; wrap "
                f"the network: Denoiser(network, schedule, prediction)."
            )
        draw = self.draw(denoise.schedule, x0, rng=rng)
        return self.score(denoise(draw.x_t, draw.t, cond), draw)

    def draw(
        self, schedule: Schedule, x0: Float[Tensor, "B *dims"], *, rng: Randomness | torch.Generator | int
    ) -> Draw:
        """Noise a batch: times from the law, noise from the coupling, then the corruptions.

        Raises:
            TypeError: for a batch of integers, such as pixels in 0 … 255.
            ValueError: for an empty batch, or (on a CPU) one that holds NaN or infinity.
        """
        positive_batch(x0, "x0")
        if not x0.is_floating_point():
            raise TypeError(
                f"x0 is {x0.dtype}; noise is added to floating-point data, so scale and cast it first."
            )
        finite_on_host(x0, "x0")
        rng = as_rng(rng)
        law = self.times if self.times is not None else (Uniform() if schedule.size is None else OnGrid())
        draw = Draw.of(schedule, x0, self.coupling(x0, rng), law.draw(schedule, len(x0), rng, x0.device))
        for corruption in self.corruption:
            draw = corruption(draw, rng)
        return draw

    def score(self, denoised: Denoised, draw: Draw, where: Shaped[Tensor, "..."] | None = None) -> LossTerms:
        """Compare what the network said with the truth of the draw.

        Args:
            denoised: the denoiser's answer at (draw.x_t, draw.t).
            draw: the draw.
            where: weights of the elements, such as a mask: [B, *], with 1 where it does not depend on a
                dimension.

        Raises:
            ValueError: if `denoised` has no network output and `space` is None, or shapes do not agree.
        """
        own = denoised.prediction
        space = own if self.space is None else Prediction.of(self.space)
        if space is None or (self.space is None and denoised.out is None):
            raise ValueError(
                "this Denoised has no network output to compare; say in which space its pair is compared, "
                "such as Objective(space='x0')."
            )
        level = draw.level
        own_words = denoised.out if space == own else None
        said = space.output(denoised.x0, denoised.eps, level) if own_words is None else own_words
        loss = self.error(said, space.output(draw.x0, draw.eps, level), where)
        weight = None if isinstance(self.weighting, Unweighted) else self.weighting.weight(level, space)
        return LossTerms(
            loss=loss,
            weight=None if weight is None else weight.to(loss.dtype),
            t=draw.t,
            log_snr=draw.schedule.log_snr(draw.t),
        )
