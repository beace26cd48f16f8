"""What a user tests their own code with: a tiny pipeline of every model family, and the order of a solver.

Importing this package loads neither diffusers nor transformers; making a pipeline does.
"""

from gendiff.testing.folders import pipeline_folder as pipeline_folder
from gendiff.testing.pipelines import TINY_PIPELINES as TINY_PIPELINES
from gendiff.testing.pipelines import tiny_pipeline as tiny_pipeline
from gendiff.testing.solvers import Order as Order
from gendiff.testing.solvers import check_solver as check_solver
from gendiff.testing.solvers import measure_order as measure_order
