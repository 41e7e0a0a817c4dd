"""Serves a page in which to play with a trained model: samples with their path, interpolation, inversion, inpainting.

    python app.py --load_dir runs/demo
    python app.py --load_dir hf:USER/NAME --host 0.0.0.0

The page shows each request as a command of sample.py or edit.py, which draws the same pixels. docs/app.md has the JSON
behind it.
"""

import importlib.util

from absl import flags
from ml_collections import ConfigDict

from utils.app.model import Limits, Served
from utils.base.messages import UserError, configure_output, show_result
from utils.flags import program, reading
from utils.flags.definitions import define_codec_flags, define_params_flag, define_path, define_quiet_flag
from utils.flags.help import topic
from utils.runs.opening import load_generator

PACKAGES = ("starlette", "uvicorn")  # of the extra `app`


def define_flags() -> None:
    with topic("What is served"):
        define_path("load_dir", None, "Folder of a run, RUN/checkpoints/STEP, hf:USER/NAME, or a published model.")
        define_params_flag()
        define_path(
            "guide", None, "Autoguidance: a run that guides where a request has a guide_scale, as in sample.py."
        )
        flags.DEFINE_string("guide_params", "ema", "Parameters of --guide: ema, raw or ema:WIDTH, as for --params.")
        flags.DEFINE_enum("dtype", None, ["bfloat16", "float32"], "Compute dtype; default: the run's.")
        define_codec_flags()
    with topic("Where"):
        flags.DEFINE_string("host", "127.0.0.1", "Address to listen on; 0.0.0.0: also for other machines.")
        flags.DEFINE_integer("port", 7860, "Port to listen on; 0: any that is free.", 0, 65535)
        define_quiet_flag()
    with topic("Bounds"):
        flags.DEFINE_integer("max_samples", 64, "Images of a request.", 2, 128)
        flags.DEFINE_integer("max_steps", 256, "Steps of a request.", 1, 10_000)
        flags.DEFINE_integer("max_frames", 64, "Frames of a film.", 1, 1000)
        flags.DEFINE_integer("queue", 8, "Requests that may wait for the one that is computed.", 0, 1000)


def check_packages() -> None:
    """Raises UserError where the extra `app` is not installed."""
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise UserError(f"app.py needs the package {missing[0]}, which is not installed; make setup EXTRAS=app")


def load_words(config: ConfigDict) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the words by which other programs load the same model, beside --load_dir, and those for its guide."""
    # What the command line leaves open, the other programs leave open in the same way.
    given = {
        "params": None if config.params == "ema" else config.params,
        "dtype": config.dtype,
        "codec": reading.read_codec(config),
    }
    options = [word for name, value in given.items() if value is not None for word in (f"--{name}", value)]
    guide = [] if config.guide is None else ["--guide", config.guide]
    if guide and config.guide_params != "ema":
        guide += ["--guide_params", config.guide_params]
    return tuple(options), tuple(guide)


def load_served(config: ConfigDict) -> Served:
    """Loads the model of --load_dir, with the bounds of its requests."""
    options, guide = load_words(config)
    generator = load_generator(
        config.load_dir,
        params=config.params,
        dtype=config.dtype,
        codec=reading.read_codec(config),
        needs_images=True,
        guide=config.guide,
        guide_params=config.guide_params,
    )
    # All that a visitor may ask for is bounded here.
    limits = Limits(config.max_samples, config.max_steps, config.max_frames, config.queue)
    return Served(generator, config.load_dir, options, guide, limits)


def main(config: ConfigDict) -> None:
    configure_output(is_apart=True)
    check_packages()
    from utils.app.server import bind, make_server

    if not config.load_dir:
        raise UserError("--load_dir is not given: name the folder of a run, such as runs/demo")
    # The port first: a model takes a while to load.
    listening = bind(config.host, config.port)
    served = load_served(config)
    host = f"[{config.host}]" if ":" in config.host else config.host
    server = make_server(served, config.host)
    show_result(f"http://{host}:{listening.getsockname()[1]}")
    server.run(sockets=[listening])


if __name__ == "__main__":
    program.run_program(define_flags, main)
