"""Checkpoints through Orbax: asynchronous and atomic, each complete enough to continue a run bit for bit.

RUN/checkpoints/STEP/ holds the items `params`, `ema_params`, `optimizer` (its state, the step and the random key),
`config` (the run's resolved flags and its data set's facts) and `data` (the data iterator's position).
"""

import contextlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from diffusion_transformer import position_table
from utils.errors import UserError
from utils.train_state import TrainState

FOLDER = "checkpoints"


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turns what a damaged checkpoint makes Orbax, TensorStore or the JSON reader raise into one line."""
    previous = sys.unraisablehook

    # The first array that cannot be read closes the event loop that the other reads are about to report to.
    def ignore_late_reads(unraisable):
        if "Event loop is closed" not in str(unraisable.exc_value):
            previous(unraisable)

    sys.unraisablehook = ignore_late_reads
    try:
        yield
        sys.unraisablehook = previous
    except Exception as error:  # the libraries below share no exception type
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise UserError(
            f"checkpoint {path} cannot be read (truncated, or of another model?): {reason}; "
            "delete that folder to go back to the one before it"
        ) from error


class Checkpoints:
    """The checkpoints of one run folder; the newest `keep_last` and every `keep_every`-th step are kept."""

    def __init__(self, run_dir: Path, keep_last: int | None = None, keep_every: int | None = None):
        self.folder = Path(run_dir).absolute() / FOLDER
        options = ocp.CheckpointManagerOptions(max_to_keep=keep_last, keep_period=keep_every)
        self.manager = ocp.CheckpointManager(self.folder, options=options)

    def latest_step(self) -> int | None:
        return self.manager.latest_step()

    def save(self, state: TrainState, config: dict[str, Any], data_position: Any) -> None:
        """Starts writing; returns when the state may be donated. Atomic: a killed save leaves no checkpoint behind."""
        step = int(state.step)
        if step in self.manager.all_steps():
            return
        self.manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(state.params),
                ema_params=ocp.args.StandardSave(state.ema_params),
                optimizer=ocp.args.StandardSave(_optimizer_item(state)),
                config=ocp.args.JsonSave(config),
                data=ocp.args.JsonSave({"position": data_position}),
            ),
        )

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, Any]:
        """(state placed as the abstract state `like` says, data position) of `step`; UserError where it is damaged."""
        with _readable(self.folder / str(step)):
            items = self.manager.restore(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardRestore(like.params),
                    ema_params=ocp.args.StandardRestore(like.ema_params),
                    optimizer=ocp.args.StandardRestore(_optimizer_item(like)),
                    data=ocp.args.JsonRestore(),
                ),
            )
        optimizer = dict(items.optimizer)
        key = jax.random.wrap_key_data(optimizer.pop("key_data"))
        state = like.replace(params=items.params, ema_params=items.ema_params, key=key, **optimizer)
        return state, items.data["position"]

    def restore_config(self, step: int) -> dict[str, Any]:
        with _readable(self.folder / str(step)):
            config = self.manager.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore())).config
            # What runs of before the VAE did not save.
            absent = {"name": config["dataset_name"], "vae": None, "vae_sha256": None}
            return config | {"dataset": absent | config["dataset"]}

    def restore_params(self, step: int, like: PyTree, names: tuple[str, ...]) -> list[PyTree]:
        """The parameter trees `names` ('params', 'ema_params') of `step`, placed as the abstract tree `like` says."""
        with _readable(self.folder / str(step)):
            args = {name: ocp.args.StandardRestore(like) for name in names}
            items = self.manager.restore(step, args=ocp.args.Composite(**args))
        return [items[name] for name in names]

    def wait(self) -> None:
        """Returns when everything saved is on disk."""
        self.manager.wait_until_finished()

    def close(self) -> None:
        self.manager.close()


def _optimizer_item(state: TrainState) -> dict[str, Any]:
    """Step, optimizer state and key; the key as its raw words, which any Orbax version stores."""
    if isinstance(state.key, jax.ShapeDtypeStruct):
        key_data = jax.eval_shape(jax.random.key_data, state.key)
        key_data = jax.ShapeDtypeStruct(key_data.shape, key_data.dtype, sharding=state.key.sharding)
    else:
        key_data = jax.random.key_data(state.key)
    return {"step": state.step, "opt_state": state.opt_state, "key_data": key_data}


def open_checkpoint(load_dir: str | Path) -> tuple[Checkpoints, int]:
    """(checkpoints, step) of a run folder's newest checkpoint, or of one checkpoint RUN/checkpoints/STEP.

    Raises UserError naming --load_dir where there is none.
    """
    path = Path(load_dir).absolute()
    run_dir, step = path, None
    if path.parent.name == FOLDER and path.name.isdigit():
        run_dir, step = path.parent.parent, int(path.name)
    if not (run_dir / FOLDER).is_dir():
        raise UserError(
            f"--load_dir={load_dir} holds no checkpoint (no folder {run_dir / FOLDER}); "
            "give a run's folder, as train_flow.py wrote it"
        )
    checkpoints = Checkpoints(run_dir)
    steps = sorted(checkpoints.manager.all_steps())
    if not steps or (step is not None and step not in steps):
        found = f"found steps {', '.join(map(str, steps))}" if steps else "no checkpoint was finished there"
        raise UserError(f"--load_dir={load_dir} holds no such checkpoint ({found})")
    return checkpoints, steps[-1] if step is None else step


def import_jax_flow_params(flat: Mapping[str, np.ndarray]) -> PyTree:
    """DiT parameters from those of a jax-flow checkpoint, `flat` = {'DiTBlock_0/Dense_0/kernel': array, ...}.

    Query, key and value become one kernel. jax-flow trained its position table, which is a constant here: a `pos_embed`
    that has left the constant is kept as a parameter of that name, and DiT then uses it, so that the imported model
    computes what the old one did. Raises ValueError for a tree that is not a jax-flow DiT's.
    """
    flat = {name: np.asarray(value) for name, value in flat.items()}
    depth = sum(name.startswith("DiTBlock_") and name.endswith("/MlpBlock_0/Dense_0/kernel") for name in flat)

    def take(path):
        return {leaf: flat.pop(f"{path}/{leaf}") for leaf in ("kernel", "bias")}

    def take_pair(path):
        return {f"dense_{i}": take(f"{path}/Dense_{i}") for i in range(2)}

    def take_block(path):
        attention = f"{path}/MultiHeadDotProductAttention_0"
        query, key, value, out = (take(f"{attention}/{name}") for name in ("query", "key", "value", "out"))
        width = len(query["kernel"])
        return {
            "ada_ln": {"dense": take(f"{path}/Dense_0")},
            "attention": {
                "qkv": {
                    "kernel": np.concatenate([part["kernel"].reshape(width, width) for part in (query, key, value)], 1),
                    "bias": np.concatenate([part["bias"].reshape(width) for part in (query, key, value)]),
                },
                "out": {"kernel": out["kernel"].reshape(width, width), "bias": out["bias"]},
            },
            "mlp": take_pair(f"{path}/MlpBlock_0"),
        }

    try:
        params = {
            "patch_embed": take("PatchEmbed_0/Conv_0"),
            "timestep_embed": take_pair("TimestepEmbedder_0"),
            "label_embed": {"Embed_0": {"embedding": flat.pop("LabelEmbedder_0/Embed_0/embedding")}},
            **{f"block_{i}": take_block(f"DiTBlock_{i}") for i in range(depth)},
            "final_layer": {
                "ada_ln": {"dense": take("FinalLayer_0/Dense_0")},
                "dense": take("FinalLayer_0/Dense_1"),
            },
        }
    except KeyError as error:
        raise ValueError(f"not the parameter tree of a jax-flow DiT: {error.args[0]} is missing") from None
    pos_embed = flat.pop("pos_embed", None)
    if flat:
        raise ValueError(f"not the parameter tree of a jax-flow DiT: {sorted(flat)[0]} has no counterpart")
    if pos_embed is not None:
        _, tokens, width = pos_embed.shape
        side = int(tokens**0.5)
        if np.abs(pos_embed[0] - position_table(side, side, width)).max() > 1e-5:
            params["pos_embed"] = pos_embed
    return params
