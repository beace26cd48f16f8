"""What a user tests their own code with: a tiny pipeline of every model family, made on the spot.

Importing this package loads neither diffusers nor transformers; making a pipeline does.
"""

from gendiff.testing.pipelines import TINY_PIPELINES, tiny_pipeline

__all__ = ["TINY_PIPELINES", "tiny_pipeline"]
