"""Where a run's numbers and pictures go: always RUN/metrics.jsonl and RUN/images/, and wandb unless it is disabled.

Silent on every process but the first.
"""

import json
import netrc
import os
import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlparse

import jax
from matplotlib.figure import Figure
from ml_collections import ConfigDict


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The complete lines of a metrics.jsonl, oldest first; a line that a kill cut short is left out."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines]


class Tracker:
    """Logs scalars and figures of one run by step. `first_step` is where this process starts: later lines of an
    earlier, killed process are dropped, because their steps are about to be run again."""

    def __init__(self, run_dir: Path, config: ConfigDict, first_step: int):
        self.run_dir = Path(run_dir)
        self.wandb_run = None
        self.enabled = jax.process_index() == 0
        if not self.enabled:
            return
        self.run_dir.mkdir(parents=True, exist_ok=True)
        path = self.run_dir / "metrics.jsonl"
        kept = [line for line in read_metrics(path) if line["step"] <= first_step]
        path.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self.file = path.open("a", buffering=1)
        if config.wandb.mode != "disabled":
            self.wandb_run = start_wandb(self.run_dir, config)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        if not self.enabled:
            return
        values = {name: float(value) for name, value in metrics.items()}
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        if self.wandb_run:
            self.wandb_run.log(values, step=step)

    def log_figure(self, name: str, figure: Figure, step: int) -> None:
        """Writes RUN/images/NAME/STEP.png and logs the same file to wandb under `name`."""
        if not self.enabled:
            return
        path = self.run_dir / "images" / re.sub(r"[^\w.-]", "_", name) / f"{step:08d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
        if self.wandb_run:
            import wandb

            self.wandb_run.log({name: wandb.Image(str(path))}, step=step)

    def close(self) -> None:
        if self.enabled:
            self.file.close()
        if self.wandb_run:
            self.wandb_run.finish()


def start_wandb(run_dir: Path, config: ConfigDict):
    """The wandb run; offline, saying so in one line, where --wandb.mode is online but no account is set up."""
    import wandb  # takes seconds, and nothing may touch it when it is disabled

    options = config.wandb.to_dict()
    mode = options.pop("mode")
    if mode == "online" and not has_wandb_account(wandb.Settings().base_url):
        print(f"wandb: no account is set up (`wandb login` does it); logging offline under {run_dir / 'wandb'}")
        mode = "offline"
    id_file = run_dir / "wandb_id.txt"  # so that a resumed run goes on in the same curve
    run = wandb.init(
        **options,
        mode=mode,
        dir=run_dir,
        id=id_file.read_text().strip() if id_file.exists() else None,
        resume="allow" if mode == "online" else None,
        config=config.to_dict(),
        settings=wandb.Settings(quiet=True, console="off"),
    )
    id_file.write_text(run.id)
    return run


def has_wandb_account(base_url: str) -> bool:
    """Whether wandb will find credentials for the server without asking: in the environment or in netrc."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    try:
        entries = netrc.netrc(os.environ.get("NETRC"))
    except (OSError, netrc.NetrcParseError):
        return False
    return entries.authenticators(urlparse(base_url).hostname) is not None
