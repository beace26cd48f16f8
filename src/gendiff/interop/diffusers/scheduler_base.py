"""What every scheduler in place of one of diffusers has: a config, levels, and ways to noise data to them."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import (
    SCHEDULER_CONFIG_NAME,
    KarrasDiffusionSchedulers,
    SchedulerMixin,
)
from jaxtyping import Float
from torch import Tensor

from gendiff._checks import expand_right, unknown, working_dtype
from gendiff.interop.diffusers.scheduler_methods import decoded, encoded, method_of
from gendiff.interop.diffusers.schedules import REPLACES, SOLVER, Settings, all_settings, settings_of
from gendiff.interop.diffusers.tables import Levels
from gendiff.math.tables import TableSchedule
from gendiff.sampling.linear import LinearSolver
from gendiff.sampling.path import Point


class ConfiguredScheduler(SchedulerMixin, ConfigMixin):
    """A scheduler made of the config of another, with the levels that its network was trained at.

    Pipelines change configs after schedulers are made, so that what a config says is read when a run begins.
    """

    config_name = SCHEDULER_CONFIG_NAME
    _compatibles = [e.name for e in KarrasDiffusionSchedulers]  # noqa: RUF012  (theirs)

    def __init__(self, **config: Any) -> None:
        config.setdefault(REPLACES, type(self).__name__)
        self.register_to_config(**config)
        self.levels = Levels(self.settings)
        self.num_inference_steps: int | None = None
        self.timesteps = torch.arange(self.levels.size - 1, -1, -1)

    @classmethod
    def from_config(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls,
        config: Any = None,
        return_unused_kwargs: bool = False,
        *,
        solver: LinearSolver | str | Mapping[str, Any] | None = None,
        **changes: Any,
    ) -> Any:
        """A scheduler that does what another does.

        Args:
            config: a scheduler of diffusers, its config, or a config read from a file; its class decides the
                timesteps, the scaling of samples and, without `solver`, the method.
            return_unused_kwargs: whether to return the arguments that were not used as well; there are none.
            solver: another method: a `LinearSolver`, or a name such as "euler", "dpmpp-2", "unipc-3".
            changes: settings other than the config's, such as `use_karras_sigmas=True`, also those that its
                class does not have but another class does.

        Raises:
            ValueError: for a class, a setting or a solver that is not known.
        """
        settings = settings_of(config)
        kept = {key: value for key, value in settings.config.items() if key != "_class_name"}
        known = all_settings()
        for key in changes:
            if key not in settings.values and key not in known:
                raise ValueError(unknown("setting of a scheduler", key, sorted(known)))
        also = sorted({*(kept.get("_also") or ()), *(key for key in changes if key not in settings.values)})
        defaulted = [key for key in kept.get("_use_default_values") or () if key not in changes]
        kept |= {"_use_default_values": defaulted} if "_use_default_values" in kept else {}
        merged = {**settings.values, **kept, **changes, REPLACES: settings.name}
        if also:
            merged["_also"] = also
        if solver is not None:
            merged[SOLVER] = encoded(solver)
        scheduler = cls(**merged)
        return (scheduler, {}) if return_unused_kwargs else scheduler

    def save_config(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        solver = self.config.get(SOLVER)
        if isinstance(solver, LinearSolver):
            raise ValueError(
                f"{solver!r} is no solver of gendiff, so a file cannot hold it: save the scheduler without "
                f"it, and pass solver= to from_pretrained."
            )
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)

    @property
    def settings(self) -> Settings:
        """The class that is replaced, and what the config says of it."""
        return settings_of(self)

    @property
    def solver(self) -> LinearSolver:
        """The method, without a pipeline's eta."""
        chosen = self.config.get(SOLVER)
        return method_of(self.settings) if chosen is None else decoded(chosen)

    @property
    def order(self) -> int:
        """Evaluations of a step, which is what pipelines mean by it."""
        return max(int(self.solver.evaluations), 1)

    @property
    @abstractmethod
    def points(self) -> tuple[Point, ...]:
        """Where the network is evaluated in this run, and where it ends; before one, the table's ends."""

    @abstractmethod
    def index_for_timestep(self, timestep: Any, schedule_timesteps: Any = None) -> int:
        """The evaluation at a timestep."""

    @property
    def sigmas(self) -> Tensor:
        """Levels of the evaluations and of the end, as sigma/alpha, of a flow sigma; float32, on the host."""
        flow, inverted = self.levels.coordinates == "flow", self.levels.inverted
        values = [(p.alpha if inverted else p.sigma) if flow else p.ratio for p in self.points]
        return torch.tensor(values, dtype=torch.float64).float()

    @property
    def init_noise_sigma(self) -> float | Tensor:
        """What unit noise is multiplied by to make the first sample; a number or a scalar on the host."""
        if self.levels.coordinates != "ve":
            return 1.0
        if self.levels.edm:
            return (self.config["sigma_max"] ** 2 + 1) ** 0.5
        noisiest = torch.tensor(max(point.sigma for point in self.points), dtype=torch.float64)
        leading = self.settings["timestep_spacing"] == "leading"
        return (noisiest**2 + 1) ** 0.5 if leading else noisiest

    def add_noise(
        self, original_samples: Float[Tensor, "B *dims"], noise: Float[Tensor, "B *dims"], timesteps: Tensor
    ) -> Float[Tensor, "B *dims"]:
        """Noise data to the levels of timesteps: alpha·x0 + sigma·eps, in the coordinates of the samples.

        Args:
            original_samples: clean data, [B, *].
            noise: unit Gaussian noise, [B, *].
            timesteps: of the network, [B]. Those of a table may be any of its timesteps, on any device;
                others are those of this run, looked up unless `set_begin_index` or a step said where it is.
        """
        alpha, sigma = self._levels_at(timesteps, original_samples)
        dtype = working_dtype(original_samples)
        noised = alpha.to(dtype) * original_samples.to(dtype) + sigma.to(dtype) * noise.to(dtype)
        return noised.to(original_samples.dtype)

    def scale_noise(
        self, sample: Float[Tensor, "B *dims"], timestep: Any, noise: Float[Tensor, "B *dims"]
    ) -> Float[Tensor, "B *dims"]:
        """`add_noise` as the pipelines of flows call it."""
        timesteps = torch.as_tensor(timestep).reshape(-1)
        return self.add_noise(sample, noise, timesteps)

    def get_velocity(
        self, sample: Float[Tensor, "B *dims"], noise: Float[Tensor, "B *dims"], timesteps: Tensor
    ) -> Float[Tensor, "B *dims"]:
        """The target of v-prediction, alpha·eps - sigma·x0, at a table's variance-preserving levels."""
        values = self._of_table(timesteps, sample)
        dtype = working_dtype(sample)
        alpha, sigma = (expand_right(value.to(dtype), sample) for value in values)
        return (alpha * noise.to(dtype) - sigma * sample.to(dtype)).to(sample.dtype)

    def _levels_at(self, timesteps: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.levels.tabular and self.levels.row.by_timestep:
            alpha, sigma = self._of_table(timesteps, x)
        else:
            index = self._begun()
            rows = timesteps.reshape(-1)
            indices = (
                [index] * len(rows) if index is not None else map(self.index_for_timestep, rows.tolist())
            )
            chosen = [self.points[i] for i in indices]
            alpha, sigma = (
                torch.tensor([getattr(point, name) for point in chosen], dtype=torch.float64, device=x.device)
                for name in ("alpha", "sigma")
            )
        return expand_right(alpha, x), expand_right(sigma, x)

    @abstractmethod
    def _begun(self) -> int | None:
        """The evaluation that a run is at or begins with, where that is known."""

    def _of_table(self, timesteps: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """The variance-preserving (alpha, sigma) at timesteps of a table; fractions are interpolated."""
        if not self.levels.tabular:
            raise ValueError(f"{self.settings.name} has no table of timesteps.")
        if timesteps.is_floating_point():
            ratios = torch.from_numpy(self.levels.value(timesteps.reshape(-1).double().cpu().numpy()))
        else:
            ratios = self._ratios[timesteps.reshape(-1).to(self._ratios.device)]
        ratios = ratios.to(x.device)
        alpha = 1 / (1 + ratios.square()).sqrt()
        return alpha, torch.where(ratios.isinf(), torch.ones_like(ratios), ratios * alpha)

    @property
    def _ratios(self) -> Tensor:
        return torch.from_numpy(self.levels.ratios)

    @property
    def alphas_cumprod(self) -> Tensor:
        r"""The table :math:`\bar\alpha`, in float32."""
        return (1 / (1 + self._ratios.square())).float()

    @property
    def alphas(self) -> Tensor:
        """1 - beta of every entry of the table, in float32."""
        return self._log_alphas.exp().float()

    @property
    def betas(self) -> Tensor:
        """Beta of every entry of the table, in float32."""
        return (-self._log_alphas.expm1()).float()

    @property
    def _log_alphas(self) -> Tensor:
        schedule = self.levels.schedule
        if not isinstance(schedule, TableSchedule):
            raise AttributeError(f"{self.settings.name} has no table of betas.")
        return schedule.log_alphas

    @property
    def final_alpha_cumprod(self) -> Tensor:
        r""":math:`\bar\alpha` at which a run ends."""
        return torch.tensor(1.0) if self.settings["set_alpha_to_one"] is not False else self.alphas_cumprod[0]

    def __len__(self) -> int:
        return self.levels.size
