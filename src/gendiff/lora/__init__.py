"""Low-rank adapters: planned and checked before anything is changed, put on, and taken off exactly."""

from gendiff.lora.adapter import Adapter as Adapter
from gendiff.lora.handle import LoraHandle as LoraHandle
from gendiff.lora.inject import inject as inject
from gendiff.lora.inject import remove as remove
from gendiff.lora.plan import LoraPlan as LoraPlan
from gendiff.lora.plan import Planned as Planned
from gendiff.lora.plan import plan as plan
from gendiff.lora.presets import preset as preset
from gendiff.lora.targets import Class as Class
from gendiff.lora.targets import Target as Target
from gendiff.lora.targets import Width as Width
