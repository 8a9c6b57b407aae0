"""What most commands import, in the environment that they have in tests; see ``forked_commands``."""

import os

from tests.conftest import environment

os.environ.update(environment())

import accelerate  # noqa: E402, F401
import cv2  # noqa: E402, F401
import datasets  # noqa: E402, F401
import h5py  # noqa: E402, F401
import jsonargparse  # noqa: E402, F401
import openslide  # noqa: E402, F401
import peft  # noqa: E402, F401
import tifffile  # noqa: E402, F401
import timm  # noqa: E402, F401
import torch  # noqa: E402, F401
import transformers  # noqa: E402, F401
import transformers.models.gemma3n.modeling_gemma3n  # noqa: E402, F401
from matplotlib import pyplot  # noqa: E402, F401
