"""Guidance: rules that combine predictions, and the denoiser that applies them."""

from gendiff.guidance.guider import Guider as Guider
from gendiff.guidance.rules import cfg as cfg
from gendiff.guidance.rules import elementwise as elementwise
