"""Networks by name, and what the configuration of each has."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np

from utils.base.settings import setting


class NetworkEntry(NamedTuple):
    """A network that --model.network can name: its configuration class, and `build(config, remat, mesh,
    condition)`.

    `config_class` is a frozen dataclass derived from NetworkConfig: its fields become --model.* flags. `remat` is one
    of diffusion_transformer.REMAT_POLICIES, `mesh` the devices to build for; a network may ignore both.
    `condition` is the kind of condition that its data have (utils/conditions/condition.py); the network keeps it as a
    field.
    """

    config_class: type["NetworkConfig"]
    build: Callable[..., Any]


# One more network is one entry; DiT enters itself (diffusion_transformer.py).
NETWORKS: dict[str, NetworkEntry] = {}


@dataclasses.dataclass(frozen=True)
class NetworkConfig:
    """Settings that every network has, because training and guidance use them; a network adds its own."""

    # {preset: {field: value}}, for --model.preset. A preset fills what the user left unset.
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    # Whether the network has a second output after `inner_head` blocks, and returns `Heads` for `with_inner=True`.
    TAKES_INNER_HEAD: ClassVar[bool] = False
    # Whether the network adds the `augmentation` that a condition brings (`Embedded`), as --augment needs.
    TAKES_AUGMENTATION: ClassVar[bool] = False

    network: str = setting("dit", "The network; docs/change_this.md adds one.", choices=NETWORKS)
    # Read by guidance, training and the data, whatever the network.
    num_classes: int = setting(1000, 'Number of labels; one more embedding stands for "no label".', 1, 10**8)
    class_dropout_prob: float = setting(
        0.1, "Probability of dropping a label in training, for classifier-free guidance.", 0, 1
    )
    condition_dropout: str = setting(
        "together", "Of several conditions: drop all together, or each by itself, too.", choices=("together", "each")
    )
    # Objectives that learn average velocities pass the step as a fourth argument.
    step_conditioning: int = setting(0, "1: the model is also given the length of the step that it is asked for.", 0, 1)
    # Internal guidance: the output of an early block guides that of the last (arXiv:2512.24176).
    inner_head: int = setting(
        0,
        "A second output after this many blocks, for --inner_scale; a third of the depth is usual. 0: none.",
        0,
        1000,
    )
    inner_weight: float = setting(0.5, "Weight of the loss of the second output.", 0, 1000)
    dtype: str = setting(
        "bfloat16", "Compute dtype; parameters stay float32.", choices=("bfloat16", "float32"), is_fixed=False
    )

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Any:
        """Returns the configuration among the --model.* values of a run. A missing value has its default, as in the
        runs that were saved before there was such a setting."""
        return cls(**{field.name: values[field.name] for field in dataclasses.fields(cls) if field.name in values})

    def check(self, latent_shape: tuple[int, int, int]) -> None:
        """Raises UserError where no such network can be made for latents (h, w, c); names the flag and a fix."""

    def fit_array(
        self, path: tuple[str, ...], array: np.ndarray, shape: tuple[int, ...]
    ) -> tuple[np.ndarray, str] | None:
        """Returns (an array of another run's parameters made fit for `shape`, a remark for the log); None where there
        is no way, so that it is made new. Called for a run with --load_dir, where the array at `path` has another
        shape there."""
        return None

    def count_matrices(self, path: tuple[str, ...], shape: tuple[int, ...]) -> int:
        """Returns how many matrices the parameter at `path`, of this shape, holds side by side along its last axis:
        --optimizer muon orthogonalises each by itself. 0: the parameter is left to Adam."""
        return int(path[-1] == "kernel" and len(shape) == 2)

    def describe(self) -> str:
        """Returns the network's sizes in a few words, for the log."""
        return self.network

    def hints(self, latent_shape: tuple[int, int, int]) -> list[str]:
        """Returns remarks on settings that are possible for latents (h, w, c), but hardly meant."""
        return []
