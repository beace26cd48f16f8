"""The reference DDPM equations; the derivation is in `gendiff.math.ddpm.equations`."""

from gendiff.math.ddpm.equations import Coefficients as Coefficients
from gendiff.math.ddpm.equations import coefficients as coefficients
from gendiff.math.ddpm.equations import level_of as level_of
from gendiff.math.ddpm.equations import posterior as posterior
from gendiff.math.ddpm.equations import predict_x0 as predict_x0
from gendiff.math.ddpm.equations import q_sample as q_sample
from gendiff.math.ddpm.equations import step_coefficients as step_coefficients
from gendiff.math.ddpm.equations import transition as transition
from gendiff.math.ddpm.step import Step as Step
from gendiff.math.ddpm.step import Variance as Variance
from gendiff.math.ddpm.step import log_variance as log_variance
from gendiff.math.ddpm.step import split_variance as split_variance
from gendiff.math.ddpm.step import step as step
from gendiff.math.ddpm.tables import Tables as Tables
from gendiff.math.ddpm.vlb import discretised_nll as discretised_nll
from gendiff.math.ddpm.vlb import normal_kl as normal_kl
from gendiff.math.ddpm.vlb import prior_term as prior_term
from gendiff.math.ddpm.vlb import vlb_term as vlb_term
