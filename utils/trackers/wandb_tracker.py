"""A run on wandb: online, or offline where there is no account, no network, or no answer."""

import contextlib
import errno
import logging
import netrc
import os
import re
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

from utils.base.files import open_regular, set_aside, write_text
from utils.base.messages import log, one_line, show_path_as, warn

# Limits, so that a training never waits long for wandb.
PROBE_SECONDS = 5  # for an answer of wandb's server
INIT_SECONDS = 30  # for starting a run there
FINISH_SECONDS = 60  # for uploading the rest at the end


class WandbTracker:
    """Sends numbers and images to wandb. `wandb` itself is imported at the start of a run: that takes seconds."""

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        steps: Sequence[tuple[int, Mapping[str, Any]]] = (),
        axis: str | None = None,
    ):
        """`settings` go into wandb's configuration; those of --wandb.* are in its group `wandb`. `steps` are the steps
        and values that earlier starts logged. `axis` names a metric against which wandb shows the others, instead of
        the step."""
        self.run = start_wandb(folder, settings)
        if axis:
            self.run.define_metric("*", step_metric=axis)
        # Offline, each start has a folder of its own: the newest one gets all steps.
        for step, values in steps if self.run.offline else ():
            self._send(values, step)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._send(numbers, step)

    def image(self, step: int, name: str, file: Path) -> None:
        import wandb

        self._send({name: wandb.Image(str(file))}, step)

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Sends the rows as a table; a cell is empty where a row has no such column."""
        import wandb

        columns: list[str | int] = list(dict.fromkeys(column for row in rows for column in row))
        data = [[row.get(str(column)) for column in columns] for row in rows]
        self._send({name: wandb.Table(columns=columns, data=data, allow_mixed_types=True)})

    def close(self) -> None:
        folder = Path(self.run.dir).parent
        is_offline = self.run.offline
        try:
            self.run.finish()
        except Exception as error:  # the network is gone, or wandb's own process
            warn(f"wandb: {one_line(error)}; upload what is missing with `wandb sync {folder}`")
            _tear_down()
            return
        if is_offline:
            log(f"wandb: offline; upload with `wandb sync {folder}` (the newest folder there has all steps)")

    def _send(self, values: Mapping[str, Any], step: int | None = None) -> None:
        try:
            self.run.log(values, step=step)
        except Exception:
            _tear_down()
            raise


def _tear_down() -> None:
    """Forgets wandb's own process, which may be gone: otherwise it is called once more when Python exits."""
    import wandb

    with contextlib.suppress(Exception):
        wandb.teardown()


def start_wandb(folder: Path, settings: Mapping[str, Any]) -> Any:
    """Starts or resumes the wandb run of a run's folder, and returns it.

    Where --wandb.mode is online but no account is set up, the server does not answer, or it refuses, the run is offline
    and one line says so. Raises whatever wandb raises if it cannot start at all.
    """
    import wandb

    logging.raiseExceptions = False  # wandb's own log on a full disk would fill the screen with tracebacks

    # What wandb is asked for.
    options = dict(settings["wandb"])
    mode = options.pop("mode")
    options["name"] = options.pop("display_name", options["name"])
    own_settings: dict[str, Any] = {"silent": True, "console": "off"}
    if "WANDB_INIT_TIMEOUT" not in os.environ:
        own_settings["init_timeout"] = INIT_SECONDS
    if "finish_timeout" in wandb.Settings.model_fields and "WANDB_FINISH_TIMEOUT" not in os.environ:
        own_settings |= {"finish_timeout": FINISH_SECONDS, "finish_timeout_raises": True}
    show_path_as(
        folder / "wandb", None
    )  # even if the folder is the copy of one in object storage: `wandb sync` takes it
    id_file = folder / "wandb_id.txt"  # so that a resumed run goes on in the same curve
    known_id = _read_wandb_id(id_file)

    def start(mode: Literal["online", "offline"]) -> Any:
        return wandb.init(
            **options,
            mode=mode,
            dir=folder,
            id=known_id,
            resume="allow" if mode == "online" else None,
            config=dict(settings),
            settings=wandb.Settings(**own_settings),
        )

    # Online if it can be, else offline.
    run = None
    problem = explain_offline() if mode == "online" else ""
    if mode == "online" and not problem:
        try:
            run = start("online")
        except Exception as error:  # a key or a project that the server refuses, an answer that does not come
            problem = one_line(error)
    if problem:
        log(f"wandb: {problem}; logging offline under {folder / 'wandb'}")
    run = run or start("offline")

    if not run.offline:
        log(f"wandb: {run.url}")
    if run.id != known_id:
        write_text(id_file, run.id)
    return run


def explain_offline() -> str:
    """Returns why wandb cannot be reached, or an empty string if it can.

    Reasons are a missing account and a server that does not answer within PROBE_SECONDS. wandb itself would try for 90
    seconds.
    """
    import wandb

    # An account: without one, wandb would ask on the terminal.
    try:
        settings = wandb.setup().settings  # of its environment variables and files
    except Exception as error:
        return one_line(error)
    if not has_wandb_account(settings.base_url):
        return "no account is set up (`wandb login` does it)"
    # A server: one behind a proxy is not asked.
    if settings.http_proxy or settings.https_proxy:
        return ""
    problems: list[str] = ["no answer"]

    def ask():
        try:
            urllib.request.urlopen(settings.base_url, timeout=PROBE_SECONDS).close()
            problems.clear()
        except urllib.error.HTTPError:  # an answer
            problems.clear()
        except urllib.error.URLError as error:
            problems[:] = [] if isinstance(error.reason, ssl.SSLError) else [str(error.reason)]
        except Exception as error:
            problems[:] = [str(error)]

    # In a thread: nothing else bounds the time in which a name is resolved.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return f"{settings.base_url} does not answer ({problems[0]})" if problems else ""


def _read_wandb_id(file: Path) -> str | None:
    """Returns the id in a wandb_id.txt; None if the file is missing, or if a power cut has damaged it."""
    if not file.exists():
        return None
    try:
        with open_regular(file) as opened:
            text = opened.read(1000).decode(errors="replace").strip()
    except OSError as error:
        if error.errno != errno.EINVAL:  # which `open_regular` raises for a folder or a pipe
            raise
        text = ""
    if re.fullmatch(r"[\w-]{1,64}", text):
        return text
    warn(f"{file} holds no wandb id (damaged?): the run goes on in a new curve, and the file is set aside")
    set_aside(file)
    return None


def has_wandb_account(base_url: str) -> bool:
    """Returns whether wandb will find credentials for the server without asking: in the environment or in netrc."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    try:
        entries = netrc.netrc(os.environ.get("NETRC"))
    except (OSError, netrc.NetrcParseError):
        return False
    return entries.authenticators(urlparse(base_url).hostname or "") is not None
