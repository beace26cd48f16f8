"""A check of the tests of `gendiff.math`: each small fault of the table below must make one of them fail.

    python tests/mutants.py                  # all of them; writes docs/mutants.md
    python tests/mutants.py tables.py lerp   # those whose file, kind or source holds one of the words

Every mutant is a copy of the package in a temporary folder with one fragment of source replaced; what is
installed and what is in `src` stay as they are. The tests of the changed file run first, the rest of
`tests/math` after them. The exit status is 1 if the tests fail without a mutant, if fewer than 60 mutants or
fewer than 95 % of them are killed, or if a fragment is no longer found once in its file. Mutants that change
nothing do not belong in the table.
"""

import argparse
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "gendiff"
TESTS = ROOT / "tests" / "math"
REPORT = ROOT / "docs" / "mutants.md"
LEAST, SHARE = 60, 0.95
TIMEOUT = 180  # seconds of one run; all of tests/math take about 20

# Imported once, in a server that every run is forked from: this takes longer than the tests of most files.
# Hypothesis is not among them, because pytest wants to import its own plugins.
PRELOADED = [
    "torch",
    "mpmath",
    "scipy.stats",
    "scipy.integrate",
    "diffusers.schedulers.scheduling_ddpm",
    "diffusers.schedulers.scheduling_ddim",
    "diffusers.schedulers.scheduling_euler_discrete",
    "diffusers.schedulers.scheduling_flow_match_euler_discrete",
]
SERVER = multiprocessing.get_context("forkserver")

Row = (
    tuple[str, str, str] | tuple[str, str, str, int]
)  # kind, fragment, replacement, which one if there are more

TABLE: dict[tuple[str, str], list[Row]] = {
    ("schedules.py", "test_schedules.py"): [
        ("and for or", "(result >= 0) & (result <= 1)", "(result >= 0) | (result <= 1)"),
        (
            "alpha and sigma swapped",
            "log_snr.sigmoid().sqrt(), (-log_snr).sigmoid()",
            "(-log_snr).sigmoid().sqrt(), log_snr.sigmoid()",
        ),
        ("root dropped", "(-log_snr).sigmoid().sqrt()", "(-log_snr).sigmoid()"),
        ("alpha and sigma swapped", "return Level(1 - t, t)", "return Level(t, 1 - t)"),
        ("square dropped", "return 2 * (torch.log1p(-t) - t.log())", "return torch.log1p(-t) - t.log()"),
        ("wrong sign", "torch.log1p(-t) - t.log()", "torch.log1p(t) - t.log()"),
        ("wrong sign", "(-levels(log_snr) / 2).sigmoid()", "(levels(log_snr) / 2).sigmoid()"),
        ("halving dropped", "(-levels(log_snr) / 2).sigmoid()", "(-levels(log_snr)).sigmoid()"),
        ("off by one", "TIMESTEPS * times(t)", "(TIMESTEPS - 1) * times(t)"),
        ("offset dropped", "u = (t - self.t_min) / (1 - self.t_min)", "u = t"),
        ("tangent dropped", "math.atan(self.sigma_min)).tan()", "math.atan(self.sigma_min))"),
        ("branches swapped", "t < self.t_min, linear, geometric", "t < self.t_min, geometric, linear"),
        ("square dropped", "-2 * self.sigma(t).log()", "-self.sigma(t).log()"),
        ("clamp dropped", "u.clamp(0, 1) * (1 - self.t_min)", "u * (1 - self.t_min)"),
        ("scale dropped", "angle * self.t_min", "angle"),
        ("wrong factor", "self.sigma(t).log() / 4", "self.sigma(t).log() / 2"),
        ("alpha and sigma swapped", "return alpha * x0 + sigma * eps", "return sigma * x0 + alpha * eps"),
        ("wrong sign", "return alpha * x0 + sigma * eps", "return alpha * x0 - sigma * eps"),
        ("dtype of one argument", "working_dtype(x0, eps)", "working_dtype(x0)"),
        ("check dropped", "        same_shape(x0=x0, eps=eps)\n", ""),
    ],
    ("tables.py", "test_tables.py"): [
        ("off by one", "return 1 / self.size", "return 1 / (self.size + 1)"),
        ("α for ᾱ", "self.log_alphas.cumsum(0)", "self.log_alphas"),
        ("off by one", "v.floor().clamp(max=self.size - 1)", "v.floor().clamp(max=self.size - 2)"),
        ("lerp ends swapped", "torch.lerp(left[0], right[0], w)", "torch.lerp(right[0], left[0], w)"),
        ("lerp ends swapped", "torch.lerp(left[1], right[1], w)", "torch.lerp(right[1], left[1], w)"),
        ("square dropped", "-2 * torch.lerp(left[1]", "-torch.lerp(left[1]"),
        ("sine for tangent", "w).tan().log()", "w).sin().log()"),
        (
            "branches swapped",
            "along_angle, along_log_snr)\n        return torch",
            "along_log_snr, along_angle)\n        return torch",
        ),
        ("special case dropped", "torch.where(w == 1, right[0], inside)", "inside"),
        ("off by one", "value.contiguous(), right=True) - 1)", "value.contiguous(), right=True))"),
        (
            "wrong sign",
            "(value - left[0]) / (right[0] - left[0])",
            "(left[0] - value) / (right[0] - left[0])",
        ),
        ("wrong end", "(_angle(value) - left[1])", "(_angle(value) - right[1])"),
        ("clamp dropped", "(j + w.clamp(0, 1)) / self.size", "(j + w) / self.size"),
        ("off by one", "(j + w.clamp(0, 1)) / self.size", "(j + 1 + w.clamp(0, 1)) / self.size"),
        ("clamp dropped", "(self._grid_units(times(t)) - 1).clamp(min=0)", "self._grid_units(times(t)) - 1"),
        ("off by one", "(self._grid_units(times(t)) - 1)", "self._grid_units(times(t))"),
        ("wrong unit", "<= self.size * SNAP", "<= SNAP"),
        ("rounding too wide", "SNAP = 2.0**-22", "SNAP = 2.0**-18"),
        ("rounding dropped", "SNAP, nearest, v)", "SNAP, v, v)"),
        ("wrong sign", "log_alpha_bar - log1mexp(log_alpha_bar)", "log_alpha_bar + log1mexp(log_alpha_bar)"),
        ("ᾱ for SNR", "log_alpha_bar - log1mexp(log_alpha_bar)", "log_alpha_bar"),
        ("root dropped", "torch.exp(-log_snr / 2).atan()", "torch.exp(-log_snr).atan()"),
        ("wrong sign", "torch.exp(-log_snr / 2).atan()", "torch.exp(log_snr / 2).atan()"),
        ("one end forgotten", "left.isinf() | right.isinf()", "left.isinf()"),
        (
            "ends swapped",
            "torch.linspace(self.beta_start, self.beta_end",
            "torch.linspace(self.beta_end, self.beta_start",
        ),
        ("square dropped", "torch.log1p(-roots.square())", "torch.log1p(-roots)"),
        ("wrong range", "torch.linspace(-6, 6", "torch.linspace(-5, 5"),
        (
            "offset dropped",
            "(self.beta_end - self.beta_start) + self.beta_start",
            "(self.beta_end - self.beta_start)",
        ),
        ("wrong constant", "COSINE_OFFSET = 0.008", "COSINE_OFFSET = 0.08"),
        ("wrong constant", "COSINE_MAX_BETA = 0.999", "COSINE_MAX_BETA = 0.9999"),
        ("wrong sign", "(2 * rest - step).sin()", "(2 * rest + step).sin()"),
        ("square dropped", "rest.sin().square()", "rest.sin()"),
        ("off by one", "torch.arange(self.size, 0, -1", "torch.arange(self.size + 1, 1, -1"),
        ("cap dropped", "-betas.clamp(max=COSINE_MAX_BETA)", "-betas"),
        ("end left out", "0 < given[-1] <= 1", "0 < given[-1] < 1"),
        ("check dropped", "bool(inside[:-1].all() and 0 <", "bool(0 <"),
        (
            "root dropped",
            "log1mexp((log_alpha_bar[-1] - log_alpha_bar) / 2)",
            "log1mexp(log_alpha_bar[-1] - log_alpha_bar)",
        ),
        ("scale dropped", "2 * (shrink - shrink[0])", "2 * shrink"),
        ("ᾱ for α", "torch.diff(rescaled, prepend=rescaled.new_zeros(1))", "rescaled"),
        ("off by one", "self.schedule.size < 2", "self.schedule.size < 1"),
    ],
    ("predictions.py", "test_predictions.py"): [
        ("wrong sign", "(-sigma, alpha)", "(sigma, alpha)"),
        ("alpha and sigma swapped", "(-sigma, alpha)", "(-alpha, sigma)"),
        ("wrong sign", "(-torch.ones_like(alpha), torch", "(torch.ones_like(alpha), torch"),
        (
            "factor dropped",
            "sigma / (data * torch.hypot(data * alpha, sigma))",
            "sigma / torch.hypot(data * alpha, sigma)",
        ),
        ("wrong sign", "-alpha * data / torch", "alpha * data / torch"),
        ("factor dropped", "hypot(data * alpha, sigma)", "hypot(alpha, sigma)", 1),
        ("sign of one of two", "return self.sign * p, self.sign * q", "return p, self.sign * q"),
        ("wrong sign", "level.alpha * q - level.sigma * p", "level.alpha * q + level.sigma * p"),
        ("factor dropped", "torch.hypot(self.sigma_data * level.alpha", "torch.hypot(level.alpha"),
        ("dtype of one argument", "like(x0, working_dtype(x0, eps))", "like(x0, x0.dtype)"),
        ("p and q swapped", "return p * x0 + q * eps", "return q * x0 + p * eps"),
        ("wrong sign", "-level.sigma / determinant", "level.sigma / determinant"),
        ("wrong sign", "Level(-p / determinant", "Level(p / determinant"),
        ("all for any", "(determinant == 0).any()", "(determinant == 0).all()"),
        ("wrong end of time", "schedule.level(1.0)", "schedule.level(0.5)"),
        (
            "cast too early",
            "        (p, q), determinant = self.pair",
            "        level = Level(*level.like(x_t, x_t.dtype))\n        (p, q), determinant = self.pair",
        ),
        ("bound off", "if not 0 < self.sigma_data < math.inf", "if not 0 <= self.sigma_data < math.inf"),
    ],
    ("bounds.py", "test_bounds.py"): [
        ("argument ignored", "x0.clamp(-self.limit, self.limit)", "x0.clamp(-1, 1)"),
        ("one side only", "x0.clamp(-self.limit, self.limit)", "x0.clamp(max=self.limit)"),
        ("wrong quantile", "self.quantile * (flat.shape[1] - 1)", "self.quantile * flat.shape[1]"),
        (
            "lerp ends swapped",
            "torch.lerp(ordered[:, 0], ordered[:, -1]",
            "torch.lerp(ordered[:, -1], ordered[:, 0]",
        ),
        ("floor dropped", ".clamp(1, self.limit)", ".clamp(max=self.limit)"),
        ("absolute value dropped", "flat.abs().sort", "flat.sort"),
        ("division dropped", "(flat.clamp(-s, s) / s)", "flat.clamp(-s, s)"),
        ("batch taken as one", "x0.flatten(1) if x0.ndim > 1 else", "x0.reshape(1, -1) if x0.ndim > 1 else"),
        ("alpha dropped", "(x_t - alpha * x0) / sigma", "(x_t - x0) / sigma"),
        ("bound off", "not self.limit >= 1", "not self.limit >= 0"),
    ],
    ("numeric.py", "test_numeric.py"): [
        ("expm1 -> exp", "torch.log(-torch.expm1(x))", "torch.log(1 - torch.exp(x))"),
        ("log1p -> log", "torch.log1p(-torch.exp(x))", "torch.log(1 - torch.exp(x))"),
        ("too few digits", "high - low < 1e-16 * high", "high - low < 1e-6 * high"),
        ("parameters swapped", "1 - _beta_cdf(1 - x, b, a)", "1 - _beta_cdf(1 - x, a, b)"),
        ("wrong sign", "m * (b - m) * x", "m * (b + m) * x"),
        ("too few terms", "range(120, 0, -1)", "range(4, 0, -1)"),
        ("+1 missing", "-(a + b) * x / (a + 1)", "-(a + b) * x / a"),
        ("log1p -> log", "b * math.log1p(-x)", "b * math.log(x)"),
        ("bound off", "0 <= p <= 1 and a > 0", "0 <= p <= 1 and a >= 0"),
    ],
    ("grids.py", "test_grids.py"): [
        ("not strict", "(t.diff() < 0)", "(t.diff() <= 0)"),
        ("end left out", "t[-1] >= 0", "t[-1] > 0"),
        ("off by one", "return len(self.times) - 1", "return len(self.times)"),
        ("inverse map", "shift * t / (shift * t + (1 - t))", "t / (t + shift * (1 - t))"),
        ("rounding at the end", "shift * t / (shift * t + (1 - t))", "shift * t / (1 + (shift - 1) * t)"),
        (
            "exponential dropped",
            "math.exp(base[1] + slope * (tokens - base[0]))",
            "base[1] + slope * (tokens - base[0])",
        ),
        ("origin dropped", "slope * (tokens - base[0])", "slope * tokens"),
        ("off by one", "_positive(steps) + 1", "_positive(steps)"),
        ("offset dropped", "i * (size // steps) + offset", "i * (size // steps)"),
        ("division not whole", "i * (size // steps)", "i * (size / steps)"),
        ("off by one", "round(size - i * stride) - 1", "round(size - i * stride)"),
        ("division whole", "size - (size - size / steps)", "size - (size - size // steps)"),
        ("off by one", "stride = (size - 1) / max(steps - 1, 1)", "stride = size / max(steps - 1, 1)"),
        ("wrong end", "else [size - 1]", "else [0]"),
        (
            "halving dropped",
            "numbers((-schedule.log_snr(times) / 2).exp())",
            "numbers((-schedule.log_snr(times)).exp())",
        ),
        (
            "exponent inverted",
            "lambda s: s ** (1 / rho), lambda r: r**rho",
            "lambda s: s**rho, lambda r: r ** (1 / rho)",
        ),
        ("logarithm dropped", "end, torch.log, torch.exp)", "end, torch.abs, torch.abs)"),
        ("ends swapped", "torch.linspace(1, 0, _positive(steps)", "torch.linspace(0, 1, _positive(steps)"),
        ("parameters swapped", "beta_quantile(p, a, b)", "beta_quantile(p, b, a)"),
        ("range dropped", "schedule.t_min + quantiles * (1 - schedule.t_min)", "quantiles"),
        ("ends swapped", "last + quantiles * (first - last)", "first + quantiles * (last - first)"),
        ("off by one", "else (steps + 1) / schedule.size", "else steps / schedule.size"),
        ("off by one", "times = steps / TIMESTEPS if", "times = (steps + 1) / TIMESTEPS if"),
        ("and for or", "if not inside or not torch", "if not inside and not torch"),
        ("square dropped", "schedule.time(-2 * ratios.log())", "schedule.time(-ratios.log())"),
        ("check too narrow", "(ratios > (1 + ROUNDING) * noisiest)", "(ratios > noisiest)"),
        ("check dropped", "ROUNDING = 1e-3", "ROUNDING = 1e3"),
        ("lerp ends swapped", "torch.lerp(ends[0], ends[1]", "torch.lerp(ends[1], ends[0]"),
        ("argument ignored", "noisiest if sigma_max is None else sigma_max", "noisiest"),
        ("check dropped", "size is None or not 1 <= steps <= size", "size is None"),
        ("end ignored", "times.new_tensor([end])", "times.new_tensor([0.0])", 2),
    ],
    ("ddpm/equations.py", "test_ddpm.py"): [
        ("not strict", "(log_alpha < 0) & (log_s <= 0)", "(log_alpha <= 0) & (log_s <= 0)"),
        ("check dropped", "(log_alpha < 0) & (log_s <= 0)", "(log_alpha < 0)"),
        ("expm1 -> exp", "beta = -torch.expm1(log_alpha)", "beta = 1 - torch.exp(log_alpha)"),
        (
            "s for t",
            "torch.expm1(log_alpha) / torch.expm1(log_t)",
            "torch.expm1(log_alpha) / torch.expm1(log_s)",
        ),
        (
            "t and s swapped",
            "torch.expm1(log_s) / torch.expm1(log_t)",
            "torch.expm1(log_t) / torch.expm1(log_s)",
        ),
        ("sign of zero", "torch.expm1(log_t) + 0.0", "torch.expm1(log_t)"),
        ("root dropped", "(log_s / 2).exp() * c1", "log_s.exp() * c1"),
        ("t for s", "(log_s / 2).exp() * c1", "(log_t / 2).exp() * c1"),
        ("ᾱ for α", "(log_alpha / 2).exp() * c2", "(log_t / 2).exp() * c2"),
        ("c1 for c2", "c2 * beta, beta)", "c1 * beta, beta)"),
        ("cancellation", "2 * bar_t > bar_s, neighbours", "bar_t > 0, neighbours"),
        ("cancellation", "torch.log1p((bar_t - bar_s) / bar_s)", "(1 + (bar_t - bar_s)).log() - bar_s.log()"),
        ("t for s", "Coefficients(c.x0 * r_s", "Coefficients(c.x0 * r_t"),
        ("ratio inverted", "c.x_t * (r_s / r_t)", "c.x_t * (r_t / r_s)"),
        ("square dropped", "c.variance * r_s**2", "c.variance * r_s"),
        ("s for t", "c.beta * r_t**2", "c.beta * r_s**2"),
        ("square dropped", "-torch.log1p((sigma / alpha).square())", "-torch.log1p(sigma / alpha)"),
        ("expm1 -> exp", "(-torch.expm1(value)).sqrt()", "(1 - torch.exp(value)).sqrt()"),
        ("root dropped", "(1 - value).sqrt()", "1 - value"),
        ("halving dropped", "Level((value / 2).exp()", "Level(value.exp()"),
        ("check dropped", "((value >= low) & (value <= high))", "(value >= low)"),
        ("alpha and sigma swapped", "return alpha * x0 + sigma * eps", "return sigma * x0 + alpha * eps"),
        ("eps for x0", "log=log))[0]", "log=log))[1]"),
        ("x0 and x_t swapped", "of_x0 * x0 + of_x_t * x_t", "of_x0 * x_t + of_x_t * x0"),
    ],
    ("ddpm/step.py", "test_ddpm.py"): [
        ("wrong constant", "math.log(1e-20)", "math.log(1e-10)"),
        (
            "branches swapped",
            'small if kind.startswith("fixed_small") else large',
            'large if kind.startswith("fixed_small") else small',
        ),
        ("+1 missing", "(raw + 1) / 2)", "raw / 2)"),
        (
            "lerp ends swapped",
            "torch.lerp(small.expand_as(raw), large.expand_as(raw)",
            "torch.lerp(large.expand_as(raw), small.expand_as(raw)",
        ),
        ("root missing", 'return raw if kind == "learned"', 'return raw / 2 if kind == "learned"'),
        ("clamp dropped", "value.log().clamp(min=MIN_LOG_VARIANCE)", "value.log()"),
        ("eps not computed again", "        eps = eps_of(x0, x_t, level)\n", ""),
        ("bound ignored", "        x0 = bound(x0)\n", ""),
        ("wrong condition", "expand_right(c.variance == 0, x_t)", "expand_right(c.beta == 0, x_t)"),
        ("noise at the data", "torch.where(to_data, 0.0, (log_v / 2).exp())", "(log_v / 2).exp()"),
        ("no noise from pure noise", "c.variance == 0", "c.x_t == 0"),
        ("root dropped", "0.0, (log_v / 2).exp()", "0.0, log_v.exp()"),
        (
            "x0 and x_t swapped",
            "_shaped(c.x0, x_t) * x0 + _shaped(c.x_t, x_t) * x_t",
            "_shaped(c.x_t, x_t) * x0 + _shaped(c.x0, x_t) * x_t",
        ),
        ("s for t", "level = level_of(alpha_bar_t, log=log)", "level = level_of(alpha_bar_s, log=log)"),
        ("halves swapped", "prediction, raw = out.chunk(2, dim=1)", "raw, prediction = out.chunk(2, dim=1)"),
        ("check inverted", "(raw is None) == kind", "(raw is not None) == kind"),
    ],
    ("ddpm/tables.py", "test_ddpm.py"): [
        ("rolled round", "torch.cat([log_bar.new_zeros(1), log_bar[:-1]])", "log_bar.roll(1)"),
        ("off by one", "c.variance[min(1, len(log_bar) - 1)]", "c.variance[0]"),
        ("ᾱ for α", "betas=-torch.expm1(schedule.log_alphas)", "betas=-torch.expm1(log_bar)"),
        ("wrong sign", "sqrt_recip_alpha_bar=(-log_bar / 2)", "sqrt_recip_alpha_bar=(log_bar / 2)"),
        ("-1 missing", "torch.expm1(-log_bar).sqrt()", "torch.exp(-log_bar).sqrt()"),
        ("root dropped", "(-torch.expm1(log_bar)).sqrt()", "-torch.expm1(log_bar)"),
        ("coefficients swapped", "posterior_mean_coef1=c.x0", "posterior_mean_coef1=c.x_t"),
        ("t for s", "alpha_bar_prev=log_prev.exp()", "alpha_bar_prev=log_bar.exp()"),
        ("upper for lower bound", "posterior_variance=c.variance", "posterior_variance=c.beta"),
    ],
    ("ddpm/vlb.py", "test_vlb.py"): [
        ("wrong sign", "torch.expm1(ratio) - ratio", "torch.expm1(ratio) + ratio"),
        ("-1 missing", "torch.expm1(ratio) - ratio", "torch.exp(ratio) - ratio"),
        ("1 for 2", "* (-log_variance_2).exp()", "* (-log_variance_1).exp()"),
        ("square dropped", "(mean_1 - mean_2).square()", "(mean_1 - mean_2).abs()"),
        ("off by one", "half = 1 / (bins - 1)", "half = 1 / bins"),
        ("root dropped", "scale = (-log_variance / 2).exp()", "scale = (-log_variance).exp()"),
        ("wrong tail", "flip = lower + upper > 0", "flip = lower + upper < 0"),
        ("bins closed", "x < -1 + half, x > 1 - half", "x < -1 - half, x > 1 + half"),
        (
            "ends swapped",
            "torch.where(flip, edge_high, edge_low)",
            "torch.where(flip, edge_low, edge_high)",
            0,
        ),
        ("wrong sign", "(log_lower - log_upper).exp()", "(log_upper - log_lower).exp()"),
        (
            "argument ignored",
            "discretised_nll(x0, mean, log_variance, bins)",
            "discretised_nll(x0, mean, log_variance)",
        ),
        ("root taken", "2 * sigma.log()", "sigma.log()"),
        ("alpha dropped", "normal_kl(alpha * x0,", "normal_kl(x0,"),
        (
            "reverse KL",
            "normal_kl(true_mean, true_log_variance, mean, log_variance)",
            "normal_kl(mean, log_variance, true_mean, true_log_variance)",
        ),
        (
            "branches swapped",
            "to_data, _bits(discretised_nll(x0, mean, log_variance, bins)), _bits(kl)",
            "to_data, _bits(kl), _bits(discretised_nll(x0, mean, log_variance, bins))",
        ),
        ("sum for mean", "nats.flatten(1).mean(1)", "nats.flatten(1).sum(1)"),
        ("nats for bits", ".mean(1) / LOG2", ".mean(1)"),
    ],
    ("_components.py", "test_gaussians.py"): [
        ("check dropped", "(eigenvalues < -TOLERANCE * largest).any()", "(eigenvalues < -math.inf).any()"),
        ("rounding kept", "torch.where(eigenvalues <= noise, 0.0, eigenvalues)", "eigenvalues"),
        ("root dropped", "self.axes * self.eigenvalues.sqrt()", "self.axes * self.eigenvalues"),
        ("alpha dropped", "x[:, None] - a * parts.means", "x[:, None] - parts.means"),
        ("index swapped", '"kij,bki->bkj", parts.axes, x', '"kij,bkj->bki", parts.axes, x'),
        ("2π dropped", "(2 * math.pi * self.variances).log()", "self.variances.log()"),
        (
            "halving dropped",
            "self.parts.log_weights - exponent.sum(-1) / 2",
            "self.parts.log_weights - exponent.sum(-1)",
        ),
        ("weights dropped", "self.parts.log_weights - exponent", "-exponent"),
        ("gain for its square", "gain * self.offsets", "gain.square() * self.offsets"),
        ("alpha dropped", "gain = self.alpha * self.parts.eigenvalues", "gain = self.parts.eigenvalues"),
        (
            "square dropped",
            "alpha.square() * eigenvalues + sigma.square()",
            "alpha * eigenvalues + sigma.square()",
        ),
        ("noise dropped", "square() + noise\n", "square()\n"),
        ("wrong default", "(0, size - rank), value=1.0)", "(0, size - rank), value=0.0)"),
        (
            "halving dropped",
            "(2 * math.pi * observed).log()).sum(-1) / 2",
            "(2 * math.pi * observed).log()).sum(-1)",
        ),
        ("square dropped", "noise = float(noise_std) ** 2", "noise = float(noise_std)"),
    ],
    ("laws.py", "test_gaussians.py"): [
        (
            "sigma dropped",
            "seen.average(seen.sigma * seen.offsets / seen.variances)",
            "seen.average(seen.offsets / seen.variances)",
        ),
        ("wrong sign", "return -seen.average(", "return seen.average("),
        ("square dropped", "inner = seen.sigma.square() * seen", "inner = seen.sigma * seen"),
        (
            "spread of means dropped",
            'return within + torch.einsum("bk,bki,bkj->bij", share, apart, apart)',
            "return within",
        ),
        (
            "scale - 1",
            "return without + weight * (self.score(",
            "return without + (weight - 1) * (self.score(",
        ),
        (
            "scale - 1",
            "return without + weight * (self.log_prob(",
            "return without + (weight - 1) * (self.log_prob(",
        ),
        ("max for sum", "log_joint().logsumexp(-1)", "log_joint().amax(-1)"),
        (
            "weights ignored",
            "torch.multinomial(parts.log_weights.exp()",
            "torch.multinomial(torch.ones_like(parts.log_weights)",
        ),
        ("class ignored", "type(other) is not type(self)", "False"),
    ],
    ("gaussians.py", "test_gaussians.py"): [
        ("square dropped", "std.to(torch.float64).square()", "std.to(torch.float64)"),
        ("square dropped", "s.square() * eigenvalues / variances_at", "s * eigenvalues / variances_at"),
        (
            "levels swapped",
            "(variances_at(seen.parts.eigenvalues, a, s) / seen.variances)",
            "(seen.variances / variances_at(seen.parts.eigenvalues, a, s))",
        ),
        ("root dropped", "/ seen.variances).sqrt()", "/ seen.variances)"),
        ("alpha dropped", "return (a * seen.parts.means + moved)", "return (seen.parts.means + moved)"),
        ("square dropped", "a.square() * self.covariance + noise", "a * self.covariance + noise"),
        ("-1 missing", "1 + scale * (ratios - 1)", "1 + scale * ratios"),
        ("scale dropped", "without.mean + scale * covariance", "without.mean + covariance"),
        ("wrong sign", "(with_.mean - without.mean)", "(without.mean - with_.mean)"),
        (
            "d dropped",
            "(precision * self.covariance).sum() - self.size - log_det",
            "(precision * self.covariance).sum() - log_det",
        ),
        ("wrong sign", "self.size - log_det", "self.size + log_det"),
        ("halving dropped", "(spread + apart @ precision @ apart) / 2", "spread + apart @ precision @ apart"),
    ],
    ("mixtures.py", "test_gaussians.py"): [
        (
            "levels swapped",
            "self._line(points, alpha_t, sigma_t), self._line(points, alpha_s, sigma_s)",
            "self._line(points, alpha_s, sigma_s), self._line(points, alpha_t, sigma_t)",
        ),
        (
            "evidence dropped",
            "(self.components.log_weights + log_evidence).softmax(0)",
            "self.components.log_weights.softmax(0)",
        ),
        ("square dropped", "a.square() * self.covariances + noise", "a * self.covariances + noise"),
        ("alpha dropped", "a * self.means, a.square()", "self.means, a.square()"),
        ("one tail only", "return below - above, ", "return below, "),
        ("weight tolerance", "abs(total - 1) <= TOLERANCE", "abs(total - 1) <= 0.5"),
        ("scale dropped", "(y[:, None] - self.centres) / self.scales", "y[:, None] - self.centres"),
    ],
}


@dataclass(frozen=True)
class Mutant:
    """One fault: a fragment of a file of gendiff.math and what stands in its place."""

    file: str
    first: str
    kind: str
    old: str
    new: str
    index: int | None = None

    def apply(self, source: str) -> str | None:
        """The mutated source; None where the fragment is not found once, or not at its index."""
        pieces = source.split(self.old)
        if self.index is None and len(pieces) != 2:
            return None
        cut = (self.index or 0) + 1
        if cut >= len(pieces):
            return None
        return self.old.join(pieces[:cut]) + self.new + self.old.join(pieces[cut:])

    @property
    def change(self) -> str:
        """The mutation on one line of Markdown."""
        texts = (" ".join(text.split()).replace("|", "\\|") for text in (self.old, self.new))
        return " → ".join(f"`{text}`" if text else "(removed)" for text in texts)


@dataclass(frozen=True)
class Result:
    mutant: Mutant
    killer: str | None  # the test that failed, "timeout", or None for a survivor
    seconds: float


def mutants(words: list[str]) -> Iterator[Mutant]:
    for (file, first), rows in TABLE.items():
        for row in rows:
            mutant = Mutant(file, first, *row)
            if not words or any(word in f"{file} {mutant.kind} {mutant.old}" for word in words):
                yield mutant


class Watcher:
    """A pytest plugin that notes the first failure and makes Hypothesis quick and reproducible."""

    def __init__(self) -> None:
        self.killer: str | None = None

    def pytest_configure(self) -> None:
        from hypothesis import Phase, settings

        quick = (Phase.explicit, Phase.generate)  # a smaller example would say no more here
        settings.register_profile(
            "mutants", derandomize=True, deadline=None, database=None, max_examples=25, phases=quick
        )
        settings.load_profile("mutants")

    def pytest_runtest_logreport(self, report: Any) -> None:
        self._note(report)

    def pytest_collectreport(self, report: Any) -> None:
        self._note(report)

    def _note(self, report: Any) -> None:
        if report.failed and self.killer is None:
            self.killer = report.nodeid.removeprefix("tests/math/").partition("[")[0]


def session(folder: str, tests: list[str], answer: Connection) -> None:
    """In a process of its own: run these tests on the package in a folder, answer with what failed first."""
    os.chdir(ROOT)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    sys.path.insert(0, folder)
    import pytest

    watcher = Watcher()
    # without the checks of annotations, which are slow and would kill mutants that the tests should kill
    options = ["-x", "-q", "--tb=no", "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib"]
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
    status = pytest.main([*options, *tests], plugins=[watcher])
    import gendiff.math

    genuine = str(gendiff.math.__file__).startswith(folder)  # and not an installed one
    answer.send((genuine, int(status), watcher.killer))


def run_tests(folder: Path, tests: list[Path]) -> str | None:
    """What fails when these tests see the package of a folder; None if nothing does."""
    mine, theirs = SERVER.Pipe()
    process = SERVER.Process(target=session, args=(str(folder), [str(test) for test in tests], theirs))
    process.start()
    theirs.close()
    try:
        if not mine.poll(TIMEOUT):
            return "timeout"
        genuine, status, killer = mine.recv()
    except EOFError:
        return "crash"
    finally:
        process.kill()
        process.join()
    if not genuine:
        raise RuntimeError(f"the tests imported another gendiff than the one in {folder}")
    if (status, killer) != (0, None) and killer is None:
        raise RuntimeError(
            f"pytest ended with status {status} on {[test.name for test in tests]}: no failure"
        )
    return killer


def judge(mutant: Mutant | None) -> Result | str | None:
    """Run the tests on a mutant, or on a plain copy."""
    start = time.perf_counter()
    every = sorted(TESTS.glob("test_*.py"))
    with tempfile.TemporaryDirectory(prefix="mutant-") as name:
        folder = Path(name).resolve()
        shutil.copytree(
            ROOT / "src" / "gendiff", folder / "gendiff", ignore=shutil.ignore_patterns("__pycache__")
        )
        if mutant is None:
            return run_tests(folder, every)
        target = folder / "gendiff" / "math" / mutant.file
        mutated = mutant.apply(target.read_text())
        assert mutated is not None
        target.write_text(mutated)
        first = TESTS / mutant.first
        killer = run_tests(folder, [first]) or run_tests(folder, [test for test in every if test != first])
    return Result(mutant, killer, time.perf_counter() - start)


def write_report(results: list[Result]) -> None:
    killed = sum(result.killer is not None for result in results)
    lines = [
        "# Mutants of `gendiff.math`",
        "",
        "Written by `tests/mutants.py` (`make mutants`): each row is a small fault put into a copy of the",
        "package, and the first test of `tests/math` that failed because of it.",
        "",
        f"{killed} of {len(results)} mutants are killed.",
        "",
        "| file | kind | mutation | killed by |",
        "|---|---|---|---|",
    ]
    for result in results:
        mutant = result.mutant
        killer = f"`{result.killer}`" if result.killer else "**SURVIVED**"
        lines.append(f"| `{mutant.file}` | {mutant.kind} | {mutant.change} | {killer} |")
    REPORT.write_text("\n".join(lines) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "words", nargs="*", help="only the mutants whose file, kind or source holds one of these"
    )
    parser.add_argument("--jobs", type=int, default=2, help="mutants tested at a time (default: 2)")
    options = parser.parse_args()
    chosen = list(mutants(options.words))
    sources = {mutant.file: (SOURCE / "math" / mutant.file).read_text() for mutant in chosen}
    stale = [mutant for mutant in chosen if mutant.apply(sources[mutant.file]) is None]
    for mutant in stale:
        print(f"STALE     {mutant.file}: {mutant.old!r} is not found once (or not at its index)")
    if stale:
        return 1
    os.environ.update(
        OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1"
    )  # of the server, which starts with the first run
    SERVER.set_forkserver_preload(PRELOADED)
    start = time.perf_counter()
    if (failure := judge(None)) is not None:
        print(f"the tests fail without a mutant: {failure}")
        return 1
    print(
        f"without a mutant the tests pass, in {time.perf_counter() - start:.0f} s; {len(chosen)} mutants",
        flush=True,
    )
    results: list[Result] = []
    with ThreadPoolExecutor(options.jobs) as pool:
        for result in pool.map(judge, chosen):
            assert isinstance(result, Result)
            results.append(result)
            state = f"killed by {result.killer}" if result.killer else "SURVIVED"
            mutant = result.mutant
            print(
                f"{result.seconds:4.0f} s  {mutant.file}: {mutant.kind}: {mutant.change}: {state}", flush=True
            )
    killed = sum(result.killer is not None for result in results)
    print(f"{killed} of {len(results)} killed, in {time.perf_counter() - start:.0f} s")
    if options.words:
        return int(killed < len(results))
    write_report(results)
    return int(killed < LEAST or killed < SHARE * len(results))


if __name__ == "__main__":
    sys.exit(main())
