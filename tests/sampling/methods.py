"""Solvers that tests run over: one of every kind."""

from gendiff.sampling import DDIM, DDPM, Euler, Heun, Solver

METHODS: tuple[Solver, ...] = (Euler(), Heun(), DDIM(0.5), DDPM())
