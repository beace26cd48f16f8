"""Training losses, put together from independent parts."""

from gendiff.objectives.draw import Corruption as Corruption
from gendiff.objectives.draw import Coupling as Coupling
from gendiff.objectives.draw import Draw as Draw
from gendiff.objectives.draw import Independent as Independent
from gendiff.objectives.draw import InputPerturbation as InputPerturbation
from gendiff.objectives.draw import OffsetNoise as OffsetNoise
from gendiff.objectives.errors import MSE as MSE
from gendiff.objectives.errors import Error as Error
from gendiff.objectives.errors import Huber as Huber
from gendiff.objectives.objective import LossTerms as LossTerms
from gendiff.objectives.objective import Objective as Objective
from gendiff.objectives.times import LogitNormal as LogitNormal
from gendiff.objectives.times import LogNormal as LogNormal
from gendiff.objectives.times import OnGrid as OnGrid
from gendiff.objectives.times import Stratified as Stratified
from gendiff.objectives.times import TimeLaw as TimeLaw
from gendiff.objectives.times import Uniform as Uniform
from gendiff.objectives.weightings import EDMWeighting as EDMWeighting
from gendiff.objectives.weightings import MinSNR as MinSNR
from gendiff.objectives.weightings import SoftMinSNR as SoftMinSNR
from gendiff.objectives.weightings import Unweighted as Unweighted
from gendiff.objectives.weightings import Weighting as Weighting
