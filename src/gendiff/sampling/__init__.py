"""Solvers of declared order, and the loop that runs them."""

from gendiff.sampling.bounded import Bounded as Bounded
from gendiff.sampling.driver import Step as Step
from gendiff.sampling.driver import iterate as iterate
from gendiff.sampling.driver import sample as sample
from gendiff.sampling.handoff import Handoff as Handoff
from gendiff.sampling.handoff import split as split
from gendiff.sampling.known import Known as Known
from gendiff.sampling.linear import LinearSolver as LinearSolver
from gendiff.sampling.onestep import DDIM as DDIM
from gendiff.sampling.onestep import DDPM as DDPM
from gendiff.sampling.onestep import Euler as Euler
from gendiff.sampling.onestep import Heun as Heun
from gendiff.sampling.path import Path as Path
from gendiff.sampling.path import Point as Point
from gendiff.sampling.solver import Query as Query
from gendiff.sampling.solver import Solver as Solver
from gendiff.sampling.solver import State as State
from gendiff.sampling.stage import Stage as Stage
