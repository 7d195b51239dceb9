"""Image data for training: decode once, augment whole batches on the device."""

from sagan_attn.training.data.augment import AugmentConfig, augment
from sagan_attn.training.data.base import ImageData
from sagan_attn.training.data.folder import FolderData
from sagan_attn.training.data.lookup import LookupData, LookupSplit, make_lookup
from sagan_attn.training.data.preprocess import Preprocess
from sagan_attn.training.data.seeds import batch_seed
from sagan_attn.training.data.torchvision_sets import CIFARData, TorchvisionData

__all__ = [
    "AugmentConfig",
    "CIFARData",
    "FolderData",
    "ImageData",
    "LookupData",
    "LookupSplit",
    "Preprocess",
    "TorchvisionData",
    "augment",
    "batch_seed",
    "make_lookup",
]
