"""Data: samples by id, in an order that is a function of (seed, epoch), with randomness of their own."""

from gendiff.data.captioned import Captioned as Captioned
from gendiff.data.collate import collate as collate
from gendiff.data.combine import Mix as Mix
from gendiff.data.combine import Zip as Zip
from gendiff.data.context import BrokenSample as BrokenSample
from gendiff.data.context import sample_rng as sample_rng
from gendiff.data.folder import Folder as Folder
from gendiff.data.framing import Buckets as Buckets
from gendiff.data.framing import Framing as Framing
from gendiff.data.images import read_image as read_image
from gendiff.data.images import save_images as save_images
from gendiff.data.images import tile as tile
from gendiff.data.loader import Loader as Loader
from gendiff.data.micro import Micro as Micro
from gendiff.data.order import Order as Order
from gendiff.data.order import permutation as permutation
from gendiff.data.tensors import Tensors as Tensors
