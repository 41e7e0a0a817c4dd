"""Training from Python: `train(build_run(make_config({...})))`."""

from utils.training.build import build_run
from utils.training.configure import make_config
from utils.training.loop import train

__all__ = ["build_run", "make_config", "train"]
