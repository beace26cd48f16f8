"""Pictures of samples, losses, schedules, time laws, solvers, attention and adapters: matplotlib figures."""

from gendiff.plot import _matplotlib as _matplotlib  # first, since it says how to install it
from gendiff.plot.adapter import adapter as adapter
from gendiff.plot.attention import attention as attention
from gendiff.plot.errors import solver_errors as solver_errors
from gendiff.plot.figure import Picture as Picture
from gendiff.plot.images import sample_grid as sample_grid
from gendiff.plot.laws import times as times
from gendiff.plot.levels import loss_by_level as loss_by_level
from gendiff.plot.losses import loss as loss
from gendiff.plot.noise import schedules as schedules
from gendiff.plot.paths import solver_paths as solver_paths
