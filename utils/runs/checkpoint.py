"""Checkpoints through Orbax: asynchronous and atomic, each complete enough to continue a run bit for bit.

RUN/checkpoints/STEP/ holds the items `params`, `ema_params`, `ema_profiles` (of a run that has some), `optimizer` (its
state, the step and the random key), `config` (the run's resolved flags and a description of its data), `data` (the data
iterator's position) and `checksums` of all of these, which are compared on reading. Older checkpoints have no
checksums. An imported model has `ema_params`, `config` and `checksums` alone, and `params` where its file had both: it
can be sampled, and be started from, but not be continued.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from utils.base.external import BadFileError
from utils.base.files import set_aside
from utils.base.messages import UserError, find_system_error, log
from utils.networks.lora import KEY as LORA
from utils.runs.checksums import checksums, leaf_shapes
from utils.runs.names import CHECKPOINTS as FOLDER
from utils.runs.names import DAMAGED
from utils.runs.retention import Retention
from utils.runs.saved_config import check_parameters, read_config

Content = TypeVar("Content")


class DamagedCheckpointError(UserError):
    """A checkpoint whose files are not as they were written."""


class SaveError(UserError):
    """A checkpoint that could not be written; the message says why, and which one is safe."""


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turns the errors that Orbax, TensorStore and the JSON reader raise on a damaged checkpoint into one line."""
    _check_permissions(path)
    try:
        yield
    except UserError:
        raise
    except (MemoryError, jax.errors.JaxRuntimeError) as error:  # the devices' memory too
        raise UserError(f"checkpoint {path} cannot be read ({str(error)[:100]}); it may be whole") from error
    except Exception as error:  # the libraries below share no exception type
        logging.debug("%s", error, exc_info=True)
        if refused := find_system_error(error):
            raise UserError(f"checkpoint {path} cannot be read ({refused[1]}); it may be whole: try again") from error
        raise DamagedCheckpointError(
            f"checkpoint {path} is damaged: files of it are missing, cut or changed"
        ) from error


def _check_permissions(path: Path) -> None:
    """Raises UserError where a file of the checkpoint may not be opened: it is not damaged then."""
    for file in path.rglob("*") if path.is_dir() else ():
        if not os.access(file, os.R_OK):
            raise UserError(f"{file} may not be read by this user; change its permissions")
        if not (file.is_file() or file.is_dir()):  # which Orbax would wait on
            raise UserError(f"{file} is no regular file; restore the checkpoint from a copy")


def _text_checksum(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class Checkpoints:
    """The checkpoints of a run; the newest `keep_last` are kept, and those at multiples of the step `keep_every`.

    `best` keeps others, too (`Retention`). `remote` is the RemoteRun (utils/runs/remote_run.py) of which `run_dir` is
    the local folder: its checkpoints count, too, and are fetched as they are read.
    """

    def __init__(
        self,
        run_dir: Path,
        keep_last: int | None = None,
        keep_every: int | None = None,
        best: Any = None,
        remote: Any = None,
    ):
        self.remote = remote
        self.run_dir = Path(run_dir).absolute()
        self.folder = self.run_dir / FOLDER
        self.retention = Retention(keep_last, keep_every, best)
        self.manager = ocp.CheckpointManager(self.folder, options=self.retention.options())
        self.writing = None  # the step whose files are being written in the background

    def steps(self) -> list[int]:
        """Returns the steps of all finished checkpoints, newest first."""
        return sorted({*self.manager.all_steps(), *(self.remote.steps if self.remote else ())}, reverse=True)

    # --- Writing ---

    def save(self, state: PyTree, config: dict[str, Any], data_position: Any) -> None:
        """Starts to write a checkpoint, and returns when the state may be donated.

        It is atomic: a save that is killed leaves no checkpoint behind. Raises SaveError where this save fails, or the
        one before, which may still be at work.
        """
        self._save(int(state.step), _array_items(state), {"config": config, "data": {"position": data_position}})

    def save_params(self, params: PyTree, config: dict[str, Any], raw: PyTree | None = None) -> None:
        """Writes an EMA, and the parameters `raw` where there are some, as step 0, and returns when they are on disk.
        Raises SaveError where that fails."""
        items = {"ema_params": params} if raw is None else {"ema_params": params, "params": raw}
        self._save(0, items, {"config": config})
        self.wait()

    def _save(self, step: int, items: Mapping[str, PyTree], texts: Mapping[str, Any]) -> None:
        # One save at a time, and each step once. Waiting raises what the save before this one has met.
        if step in self.manager.all_steps():
            return
        self.wait()
        if self.remote:
            self.remote.wait()  # so that no checkpoint goes before it is uploaded
        self.remove_unfinished()

        # Checksums of all items, and of the checksums. Now: the arrays may be donated once this returns.
        sums: dict[str, Any] = {name: checksums(tree) for name, tree in items.items()}
        sums |= {name: _text_checksum(content) for name, content in texts.items()}
        json_items = {**texts, "checksums": sums | {"checksums": _text_checksum(sums)}}

        # In the background from here on.
        self.writing = step
        with self._reporting():
            self.manager.save(
                step,
                args=ocp.args.Composite(
                    **{name: ocp.args.StandardSave(tree) for name, tree in items.items()},
                    **{name: ocp.args.JsonSave(content) for name, content in json_items.items()},
                ),
            )

    def poll(self) -> None:
        """Raises SaveError if a save in the background has failed."""
        if self.writing is not None and not self.manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Returns when everything is on disk. Raises SaveError where it cannot be written."""
        with self._reporting():
            self.manager.wait_until_finished()
        is_new = self.writing is not None
        self.writing = None
        if self.remote and is_new:
            self.remote.push_soon()

    @contextlib.contextmanager
    def _reporting(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of TensorStore and Orbax, which share no type
            step = self.writing
            self.writing = None
            self.remove_unfinished()
            logging.debug("%s", error, exc_info=True)
            _, reason = find_system_error(error) or (0, type(error).__name__)
            steps = self.steps()
            safe = f"step {steps[0]} is safe" if steps else "no earlier one is there"
            raise SaveError(
                f"checkpoint of step {step} could not be written to {self.folder} ({reason}); {safe}"
            ) from error

    def remove_unfinished(self) -> None:
        """Removes the remains of saves that failed or were killed. Only the process that writes here may call it, and
        only while nothing is being written."""
        if jax.process_index() == 0:
            for left in self.folder.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(left, ignore_errors=True)

    # --- Reading: the state of a training ---

    def restore(self, step: int, target: PyTree) -> tuple[PyTree, Any]:
        """Returns (state, position in the data) of `step`; the state is placed as the abstract state `target` is.

        Raises DamagedCheckpointError where files are missing or not as they were written, and UserError for an imported
        model.
        """
        self.refuse_imported(step)
        items = self._read(step, _array_items(target), ("data",))
        # The random key is stored as its raw words.
        optimizer = dict(items.pop("optimizer"))
        key = jax.random.wrap_key_data(optimizer.pop("key_data"))
        state = target.replace(**{name: items[name] for name in items if name != "data"}, key=key, **optimizer)
        return state, items["data"]["position"]

    def refuse_imported(self, step: int) -> None:
        """Raises UserError where `step` is an imported model's."""
        if self.is_imported(step):
            raise UserError(
                f"{self.run_dir} holds an imported model, which has no optimizer to continue with; train from it with "
                f"--load_dir {self.run_dir} and another --save_dir"
            )

    def is_imported(self, step: int) -> bool:
        """Returns whether `step` holds parameters alone, as `save_params` writes them."""
        sums = self._read_checksums(step)
        return sums is not None and "ema_params" in sums and "optimizer" not in sums

    def has_raw(self, step: int) -> bool:
        """Returns whether `step` holds parameters beside their EMA."""
        return self._stored_name(step, "params") == "params"

    def _stored_name(self, step: int, name: str) -> str:
        """Returns the item in which `step` has the parameters `name`: an imported model may have its EMA alone."""
        sums = self._read_checksums(step)
        return "ema_params" if self.is_imported(step) and sums is not None and name not in sums else name

    # --- Reading: a configuration, or parameters alone ---

    def restore_config(self, step: int) -> dict[str, Any]:
        """Returns the configuration kept with `step`. Raises DamagedCheckpointError where it cannot be read."""
        path = self.folder / str(step)
        sums = self._read_checksums(step)
        try:
            config = read_config(self._read(step, {}, ("config",))["config"])
            if sums is not None:  # which the oldest checkpoints have not
                check_parameters(
                    config, {leaf: tuple(shape) for leaf, (_, *shape) in sums.get("ema_params", {}).items()}
                )
        except BadFileError as error:
            raise DamagedCheckpointError(f"checkpoint {path} is damaged: {error}") from None
        return config

    def restore_params(self, step: int, target: PyTree, names: tuple[str, ...]) -> list[PyTree]:
        """Returns the parameter trees `names` ('params', 'ema_params') of `step`, placed as the abstract `target` is.

        An imported model may have the EMA's alone, which then serve as both. Raises DamagedCheckpointError where files
        are missing or not as they were written, and UserError where the checkpoint is another model's.
        """
        stored = {name: self._stored_name(step, name) for name in names}
        self._check_shapes(step, target, stored[names[0]])  # parameters and EMA have the same
        targets = {name: self._with_stored_types(step, name, target) for name in stored.values()}
        items = self._read(step, targets, ())
        return [items[stored[name]] for name in names]

    def restore_stored(self, step: int, name: str, sharding: Any = None) -> PyTree:
        """Returns the parameters `name` ('params', 'ema_params' or 'ema_profiles') of `step`, whichever model they are
        of, on this device or as `sharding` places them.

        Raises DamagedCheckpointError where files are missing or not as they were written.
        """
        name = self._stored_name(step, name)
        return self._read(step, {name: self.stored_shapes(step, name, sharding)}, ())[name]

    def _metadata(self, step: int, name: str) -> PyTree:
        """Returns the shapes and types with which an item of `step` was saved."""
        path = self.folder / str(step)
        with _readable(path):
            metadata: Any = ocp.Checkpointer(ocp.StandardCheckpointHandler()).metadata(path / name)
            return metadata.item_metadata.tree

    def stored_shapes(self, step: int, name: str, sharding: Any = None) -> PyTree:
        """Returns the shapes of an item of `step`, to be restored on this device or as `sharding` places them."""
        tree = self._metadata(step, name)
        # Orbax would otherwise restore onto the devices of the training, which need not be here.
        sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)

    def stored_lora(self, step: int, name: str, sharding: Any) -> PyTree:
        """Returns {"lora": shapes} of LoRA's factors in an item of `step`; {} where it has none."""
        sums = self._read_checksums(step)
        name = self._stored_name(step, name)
        # Checkpoints without checksums are older than LoRA.
        if sums is None or not any(leaf.startswith(f"['{LORA}']") for leaf in sums[name]):
            return {}
        return {LORA: self.stored_shapes(step, name, sharding)[LORA]}

    # --- The newest that is intact ---

    def restore_newest(self, read: Callable[[int], Content], steps: list[int]) -> tuple[int, Content]:
        """Returns (step, read(step)) for the first of `steps` that is intact on every process, and names the others.

        Raises DamagedCheckpointError where none is.
        """
        problems = []
        for step in steps:
            content: Any = None
            problem = ""
            try:
                self._fetch(step)
                content = read(step)
            except DamagedCheckpointError as error:
                problem = str(error)  # other errors end the program: they say nothing about the checkpoint
            # A checkpoint that is damaged for one process is damaged for all: they go on from the same one.
            if _all_processes_agree(not problem):
                return step, content
            problems.append(problem or f"checkpoint {self.folder / str(step)} is damaged for another process")
            if step != steps[-1]:
                log(f"{problems[-1]}; going back to the one before it")
        others = f" (as are those of steps {', '.join(map(str, steps[:-1]))})" if len(steps) > 1 else ""
        raise DamagedCheckpointError(f"{problems[-1]}{others}; restore it from a copy")

    def _fetch(self, step: int) -> None:
        """Fetches a checkpoint that is in storage alone."""
        if self.remote and step not in self.manager.all_steps():
            self.remote.fetch_step(step)
            self.manager.reload()

    def set_aside(self, step: int) -> None:
        """Moves a damaged checkpoint to RUN/damaged_checkpoints, so that its step can be saved again."""
        if jax.process_index() == 0:
            if self.remote:
                self.remote.unmark(step)
            target = set_aside(self.folder / str(step), self.run_dir / DAMAGED)
            log(f"moved {self.folder / str(step)} to {target}")
        _all_processes_agree(True)  # a barrier: no process lists the folder before the first has moved it
        self.manager.reload()

    def close(self) -> None:
        self.manager.close()

    # --- Items of a step ---

    def _read(self, step: int, targets: Mapping[str, PyTree], json_names: tuple[str, ...]) -> dict[str, Any]:
        """Returns items of `step`, each compared with its checksum."""
        path = self.folder / str(step)
        # What was written, and whether it can be read under these settings of JAX.
        expected = self._read_checksums(step)
        self._check_types(step, targets)

        # What is there now.
        with _readable(path):
            items = self.manager.restore(
                step,
                args=ocp.args.Composite(
                    **{name: ocp.args.StandardRestore(target) for name, target in targets.items()},
                    **{name: ocp.args.JsonRestore() for name in json_names},
                ),
            )
            found: dict[str, Any] = {name: checksums(items[name]) for name in targets}
            found |= {name: _text_checksum(items[name]) for name in json_names}

        # Older checkpoints have no checksums to compare with.
        wrong = [name for name in found if expected is not None and found[name] != expected.get(name)]
        if wrong:
            raise DamagedCheckpointError(f"checkpoint {path} is damaged: {wrong[0]} is not what was written")
        return dict(items.items())

    def _with_stored_types(self, step: int, name: str, target: PyTree) -> PyTree:
        """Returns `target` with the types of an item of `step`: under JAX_ENABLE_X64=1 a model would have others."""
        if not jax.config.values["jax_enable_x64"]:
            return target  # types depend on that setting alone
        types = {
            jax.tree_util.keystr(path): leaf.dtype
            for path, leaf in jax.tree_util.tree_leaves_with_path(self._metadata(step, name))
        }

        def with_type(path, leaf):
            dtype = types.get(jax.tree_util.keystr(path), leaf.dtype)
            return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)

        return jax.tree_util.tree_map_with_path(with_type, target)

    def _check_types(self, step: int, targets: Mapping[str, PyTree]) -> None:
        """Raises UserError, naming the environment variable, where arrays were saved under another setting of JAX than
        that under which they would be read."""
        path = self.folder / str(step)
        for name, target in targets.items():
            # 64-bit types.
            tree = self._metadata(step, name)
            was_x64 = _has_float64(tree)
            would_be_x64 = _has_float64(target) and jax.config.values["jax_enable_x64"]
            if was_x64 != would_be_x64:
                what, fix = ("with", "set it") if was_x64 else ("without", "unset it")
                raise UserError(f"checkpoint {path} was saved {what} JAX_ENABLE_X64=1: {fix} to read it")
            # The kind of the random key.
            if name == "optimizer" and tuple(tree["key_data"].shape) != target["key_data"].shape:
                implementation = str(jax.config.values["jax_default_prng_impl"])
                raise UserError(
                    f"checkpoint {path} has a random key of another kind than JAX_DEFAULT_PRNG_IMPL={implementation} "
                    "makes; set that variable as it was, or unset it"
                )

    def _read_checksums(self, step: int) -> dict[str, Any] | None:
        """Returns the checksums of `step`; None for older checkpoints, which have none."""
        path = self.folder / str(step)
        if not (path / "checksums").is_dir():
            return None
        with _readable(path):
            restored: Any = self.manager.restore(step, args=ocp.args.Composite(checksums=ocp.args.JsonRestore()))
            sums = restored.checksums
            own = sums.pop("checksums")  # not part of what it is the checksum of
        if own != _text_checksum(sums):
            raise DamagedCheckpointError(f"checkpoint {path} is damaged: its checksums are not what was written")
        return sums

    def _check_shapes(self, step: int, target: PyTree, name: str) -> None:
        """Raises UserError where the parameters of `step` have other shapes than `target`."""
        # Shapes stand beside the checksums; those of older checkpoints are read from the arrays.
        path = self.folder / str(step)
        sums = self._read_checksums(step)
        with _readable(path):
            if sums is not None:
                found = {leaf: tuple(shape) for leaf, (_, *shape) in sums[name].items()}
            else:
                found = leaf_shapes(self.stored_shapes(step, name))

        # The first difference is named.
        expected_shapes = leaf_shapes(target)
        for leaf in sorted(found.keys() | expected_shapes.keys()):
            if found.get(leaf) != expected_shapes.get(leaf):
                old, new = (str(shapes.get(leaf, "absent")) for shapes in (found, expected_shapes))
                raise UserError(
                    f"checkpoint {path} is of another model: {leaf} is {old} there, {new} here; give the --model flags "
                    f"of its run, which are in {self.run_dir / 'config.json'}"
                )


def _array_items(state: PyTree) -> dict[str, PyTree]:
    """Returns the items that hold arrays, of a state or of an abstract one. The random key is in raw words, which every
    version of Orbax stores."""
    if isinstance(state.key, jax.ShapeDtypeStruct):
        key_data = jax.eval_shape(jax.random.key_data, state.key)
        key_data = jax.ShapeDtypeStruct(key_data.shape, key_data.dtype, sharding=state.key.sharding)
    else:
        key_data = jax.random.key_data(state.key)
    optimizer = {"step": state.step, "opt_state": state.opt_state, "key_data": key_data}
    items = {"params": state.params, "ema_params": state.ema_params, "optimizer": optimizer}
    # Runs without profiles have checkpoints as ever.
    return items | ({"ema_profiles": state.ema_profiles} if state.ema_profiles else {})


def _has_float64(tree: PyTree) -> bool:
    return any(leaf.dtype == np.float64 for leaf in jax.tree.leaves(tree))


def _all_processes_agree(is_fine: bool) -> bool:
    """Returns whether something went well on every process of the run."""
    if jax.process_count() == 1:
        return is_fine
    return bool(np.all(multihost_utils.process_allgather(np.bool_(is_fine))))


def has_checkpoints(run_dir: Path) -> bool:
    """Returns whether a checkpoint has been finished in a run's folder."""
    return any(path.name.isdigit() for path in (run_dir / FOLDER).glob("*"))  # unfinished ones have a suffix
