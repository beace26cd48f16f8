"""Attention layers of any model of diffusers: found, given processors, stacked on, and undone exactly."""

from gendiff.attention.context import Context as Context
from gendiff.attention.context import Grid as Grid
from gendiff.attention.handle import Handle as Handle
from gendiff.attention.kernels import Call as Call
from gendiff.attention.kernels import Kernel as Kernel
from gendiff.attention.kernels import register_kernel as register_kernel
from gendiff.attention.middleware import Middleware as Middleware
from gendiff.attention.project import project as project
from gendiff.attention.project import set_projector as set_projector
from gendiff.attention.registry import register as register
from gendiff.attention.registry import registered as registered
from gendiff.attention.registry import set_processor as set_processor
from gendiff.attention.registry import unregister as unregister
from gendiff.attention.selectors import Depth as Depth
from gendiff.attention.selectors import Kind as Kind
from gendiff.attention.selectors import Selector as Selector
from gendiff.attention.selectors import Stage as Stage
from gendiff.attention.selectors import match as match
from gendiff.attention.site import Site as Site
from gendiff.attention.stack import Stack as Stack
from gendiff.attention.stack import signature as signature
from gendiff.attention.stack import stack as stack
from gendiff.attention.table import Sites as Sites
from gendiff.attention.table import sites as sites
from gendiff.attention.windows import Steps as Steps
from gendiff.attention.windows import Times as Times
