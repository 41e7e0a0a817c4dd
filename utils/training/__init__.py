"""Training from Python: `train(build_run(make_config({...})))`.

They are imported when they are asked for: other programs use single modules of this package, and start sooner.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from utils.training.build import build_run
    from utils.training.configure import make_config
    from utils.training.loop import plan_run, train

__all__ = ["build_run", "make_config", "plan_run", "train"]

_MODULES = {"build_run": "build", "make_config": "configure", "plan_run": "loop", "train": "loop"}


def __getattr__(name: str) -> Any:
    import importlib

    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
