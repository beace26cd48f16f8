"""The scheduler mathematics: pure functions and frozen dataclasses on torch alone."""

from gendiff.math import ddpm as ddpm
from gendiff.math import grids as grids
from gendiff.math.bounds import Clip as Clip
from gendiff.math.bounds import DynamicThreshold as DynamicThreshold
from gendiff.math.gaussians import GaussianOracle as GaussianOracle
from gendiff.math.gaussians import MixtureOracle as MixtureOracle
from gendiff.math.grids import Grid as Grid
from gendiff.math.predictions import Prediction as Prediction
from gendiff.math.schedules import Level as Level
from gendiff.math.schedules import Rectified as Rectified
from gendiff.math.schedules import Schedule as Schedule
from gendiff.math.schedules import VarianceExploding as VarianceExploding
from gendiff.math.tables import CosineBeta as CosineBeta
from gendiff.math.tables import LinearBeta as LinearBeta
from gendiff.math.tables import ScaledLinearBeta as ScaledLinearBeta
from gendiff.math.tables import SigmoidBeta as SigmoidBeta
from gendiff.math.tables import TableSchedule as TableSchedule
from gendiff.math.tables import Tabulated as Tabulated
from gendiff.math.tables import ZeroTerminalSNR as ZeroTerminalSNR
