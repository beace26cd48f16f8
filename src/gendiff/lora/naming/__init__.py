"""What files call the layers of a model, found from the model: original names, kohya's, and live ones."""

from gendiff.lora.naming.families import original_names as original_names
from gendiff.lora.naming.kohya import diffusers_names as diffusers_names
from gendiff.lora.naming.kohya import kohya_names as kohya_names
from gendiff.lora.naming.kohya import kohya_prefix as kohya_prefix
from gendiff.lora.naming.rows import Original as Original
from gendiff.lora.naming.rows import Rows as Rows
