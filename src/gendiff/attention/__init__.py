"""Attention layers of any model of diffusers: found, given processors, stacked on, and undone exactly."""

from typing import TYPE_CHECKING

from gendiff.attention.capture import Capture as Capture
from gendiff.attention.context import Context as Context
from gendiff.attention.context import Grid as Grid
from gendiff.attention.excite import AttendAndExcite as AttendAndExcite
from gendiff.attention.handle import Handle as Handle
from gendiff.attention.ip_adapter import IPAdapter as IPAdapter
from gendiff.attention.kernels import Call as Call
from gendiff.attention.kernels import Kernel as Kernel
from gendiff.attention.kernels import register_kernel as register_kernel
from gendiff.attention.local import SlidingWindow as SlidingWindow
from gendiff.attention.merging import DownsampledKV as DownsampledKV
from gendiff.attention.merging import TokenMerging as TokenMerging
from gendiff.attention.middleware import Middleware as Middleware
from gendiff.attention.perturb import BlurredQueries as BlurredQueries
from gendiff.attention.perturb import IdentityProbs as IdentityProbs
from gendiff.attention.project import project as project
from gendiff.attention.project import set_projector as set_projector
from gendiff.attention.prompt import PromptToPrompt as PromptToPrompt
from gendiff.attention.prompt import SharedQK as SharedQK
from gendiff.attention.prompt import align as align
from gendiff.attention.reference import ReferenceProcessor as ReferenceProcessor
from gendiff.attention.reference_joint import FluxReferenceProcessor as FluxReferenceProcessor
from gendiff.attention.reference_joint import JointReferenceProcessor as JointReferenceProcessor
from gendiff.attention.regional import Regional as Regional
from gendiff.attention.registry import register as register
from gendiff.attention.registry import registered as registered
from gendiff.attention.registry import set_processor as set_processor
from gendiff.attention.registry import unregister as unregister
from gendiff.attention.selectors import Depth as Depth
from gendiff.attention.selectors import Kind as Kind
from gendiff.attention.selectors import Selector as Selector
from gendiff.attention.selectors import Stage as Stage
from gendiff.attention.selectors import match as match
from gendiff.attention.shared import SharedKV as SharedKV
from gendiff.attention.site import Site as Site
from gendiff.attention.stack import Stack as Stack
from gendiff.attention.stack import signature as signature
from gendiff.attention.stack import stack as stack
from gendiff.attention.table import Sites as Sites
from gendiff.attention.table import sites as sites
from gendiff.attention.temperature import Temperature as Temperature
from gendiff.attention.windows import Steps as Steps
from gendiff.attention.windows import Times as Times
from gendiff.attention.words import words_of as words_of

if TYPE_CHECKING:  # loaded at its first use, by who writes a processor
    from gendiff.attention.check import check_processor as check_processor


def __getattr__(name: str) -> object:
    if name != "check_processor":
        raise AttributeError(f"module 'gendiff.attention' has no attribute {name!r}")
    from gendiff.attention.check import check_processor

    return check_processor


def __dir__() -> list[str]:
    return sorted({*globals(), "check_processor"})
