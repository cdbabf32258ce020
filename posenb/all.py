"The notebook user's door: `from posenb.all import *`"
# written by hand, as there is nothing to explain: every module, and what a notebook wants beside them
import numpy as np, torch
import matplotlib.pyplot as plt
from pathlib import Path
from fastai.callback.schedule import *
from fastai.torch_core import set_seed
from .skeleton import *
from .synthetic import *
from .augment import *
from .dataset import *
from .targets import *
from .model import *
from .loss import *
from .group import *
from .predict import *
from .evaluate import *
from .schedule import *
from .log import *
from .callbacks import *
from .checkpoint import *
from .distributed import *
from .samplers import *
from .analyse import *
from .optimizer import *
from .learner import *
from .train import *
from .show import *
from .widgets import *
