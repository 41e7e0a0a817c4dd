"""Progress bars, by tqdm: drawn over themselves in a terminal, as widgets in a notebook, as a line now and then in a
log file.

Programs ask `progress_bar` of utils/base/messages.py for them. There is one at a time: a bar that begins `within`
another, as that of the samples of an evaluation within a training's, is shown in the other's description.
"""

import contextlib
import contextvars
import importlib.util
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any

from tqdm import tqdm

LOG_INTERVAL = 10.0  # seconds between two lines of a bar in a log file
PAUSED = "{l_bar}{bar}| {n_fmt}/{total_fmt}"  # of a bar whose time stands still: no rate, and no time left

# What bars of this thread begin within: (the bar, what it waits for). Other threads have nothing there.
_outer: contextvars.ContextVar[tuple[tqdm, str] | None] = contextvars.ContextVar("outer", default=None)
_is_hidden: contextvars.ContextVar[bool] = contextvars.ContextVar("is_hidden", default=False)


class TolerantStream:
    """The standard error output for a progress bar; what cannot be written is dropped."""

    def write(self, text: str) -> None:
        # tqdm writes over its last state. In a file, every state is a line.
        if not is_live():
            line = text.replace("\x1b[A", "").strip("\r\n").rstrip()
            text = f"{line}\n" if line else ""
        with contextlib.suppress(OSError):
            sys.stderr.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            sys.stderr.flush()

    @property
    def encoding(self) -> str:
        return sys.stderr.encoding or "ascii"

    def isatty(self) -> bool:
        return sys.stderr.isatty()

    def fileno(self) -> int:
        return sys.stderr.fileno()  # tqdm asks the terminal behind it for its width


class BarWithin:
    """The progress of a part of what another bar waits for, in that bar's description: "saving, files 3/10
    [00:06<00:14]", the seconds so far and those that are left.

    It takes the arguments of tqdm, of which only these have an effect.
    """

    def __init__(
        self,
        outer: tuple[tqdm, str],
        iterable: Iterable[Any] | None = None,
        desc: str = "",
        total: int | None = None,
        initial: int = 0,
        unit: str = "",
        unit_scale: bool = False,
        delay: float = 0,
        **others: Any,
    ):
        # Of the whole, the bar; of this part, what is counted.
        self.bar, self.what = outer
        self.unit = unit if unit_scale else ""
        self.iterable = iterable
        self.desc = desc
        self.total = len(iterable) if total is None and isinstance(iterable, Sized) else total
        self.n = initial
        self.initial = initial
        self.disable = False

        # When it is drawn first, and next: as seldom as the whole.
        self.start_t = time.monotonic()
        self.next_time = self.start_t + (delay if is_live() else max(delay, self.bar.mininterval))
        if not delay:
            self.refresh()

    def __iter__(self) -> Iterator[Any]:
        for item in self.iterable or ():
            yield item
            self.update()
        self.close()

    def update(self, count: float = 1) -> None:
        self.n += count
        now = time.monotonic()
        if now >= self.next_time:
            self.next_time = now + self.bar.mininterval
            self.refresh()

    def refresh(self) -> None:
        # How far it is: 3/10, or 1.2k/3.4kB.
        parts = [self.n] if self.total is None else [self.n, self.total]
        counts = "/".join(tqdm.format_sizeof(part) if self.unit else f"{part:,}" for part in parts)

        # The seconds, once there is a pace.
        done = self.n - self.initial
        times = ""
        if done > 0 and self.total is not None:
            elapsed = time.monotonic() - self.start_t
            left = elapsed / done * max(0, self.total - self.n)
            times = f" [{tqdm.format_interval(elapsed)}<{tqdm.format_interval(left)}]"
        _describe(self.bar, f"{self.text} {counts}{self.unit}{times}", is_live() or done > 0)

    @property
    def text(self) -> str:
        return f"{self.what}, {self.desc}" if self.desc else self.what

    def clear(self) -> None:
        pass

    def close(self) -> None:
        """Takes the part out of the description."""
        if not self.disable:
            self.disable = True
            _describe(self.bar, self.what, is_live())

    def __enter__(self) -> "BarWithin":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


Bar = tqdm | BarWithin


# --- Where they are drawn ---


def in_notebook() -> bool:
    """Returns whether this is the kernel of a notebook."""
    ipython = sys.modules.get("IPython")  # a kernel has imported it
    shell = ipython and ipython.get_ipython()
    return bool(shell) and "IPKernelApp" in shell.config


def has_widgets() -> bool:
    """Returns whether bars are widgets; in a notebook without ipywidgets they are text."""
    return in_notebook() and importlib.util.find_spec("ipywidgets") is not None


def is_live() -> bool:
    """Returns whether a bar can be drawn over itself."""
    return in_notebook() or sys.stderr.isatty()


def bar_class() -> type[tqdm]:
    """Returns tqdm's class of bars for where this runs."""
    if has_widgets():
        from tqdm.notebook import tqdm_notebook

        return tqdm_notebook
    return tqdm


def bar_options() -> dict[str, Any]:
    """Returns the options of tqdm for where this runs."""
    # A line that is longer than the terminal is wide would be drawn below itself.
    return {
        "file": TolerantStream(),
        "dynamic_ncols": has_widgets() or sys.stderr.isatty(),
        "mininterval": 0.2 if is_live() else LOG_INTERVAL,
    }


def make_bar(*args: Any, **options: Any) -> Bar:
    """Returns a bar, or a part of the one that it begins within. The arguments are tqdm's."""
    # What is silent is no part of anything.
    outer = _outer.get()
    if outer is not None and not options.get("disable"):
        return BarWithin(outer, *args, **options)
    return bar_class()(*args, **{**bar_options(), **options})


# --- One at a time ---


@contextlib.contextmanager
def within(bar: Bar, what: str = "", bar_format: str | None = None) -> Iterator[None]:
    """Has a bar say what it waits for in the block; bars that begin there become parts of that. `bar_format`, as tqdm
    has it, is the bar's meanwhile."""
    # A part's own parts are parts of the whole bar.
    root = bar.bar if isinstance(bar, BarWithin) else bar
    if root.disable:
        yield
        return

    # Its words and its form, for the block.
    text = ", ".join(filter(None, [bar.text if isinstance(bar, BarWithin) else bar.desc, what]))
    before = root.desc, root.bar_format
    root.bar_format = bar_format or root.bar_format
    _describe(root, text, is_live())

    # After an error they stay: the last line of the bar says where that was.
    token = _outer.set((root, text))
    try:
        yield
    finally:
        _outer.reset(token)
    description, root.bar_format = before
    _describe(root, description, is_drawn=False)


def _describe(bar: tqdm, text: str, is_drawn: bool) -> None:
    """Sets a bar's description, and draws it unless its delay has not passed yet."""
    bar.set_description_str(text, refresh=False)
    if is_drawn and time.time() >= bar.start_t + bar.delay:
        bar.refresh()
        bar.delay = 0.0  # tqdm ends the line of a bar only if it knows that it was drawn


@contextlib.contextmanager
def watching(bar: Bar, count: Callable[[], int]) -> Iterator[None]:
    """Moves a bar to count() twice a second while the block runs, which has no other way to tell how far it is; then to
    its end."""
    is_done = threading.Event()

    def watch() -> None:
        while not is_done.wait(0.5):
            bar.update(max(0, min(count(), bar.total or 0) - bar.n))

    # The end is reached by the block's own, without an error.
    thread = threading.Thread(target=watch, daemon=True)
    with bar:
        thread.start()
        try:
            yield
        finally:
            is_done.set()
            thread.join()
        bar.update(max(0, (bar.total or 0) - bar.n))


def hide_bars() -> None:
    """Hides the bars that this thread begins: it works beside another one, which has bars."""
    _is_hidden.set(True)


def are_hidden() -> bool:
    return _is_hidden.get()


def open_bars() -> list[tqdm]:
    """Returns the bars that are on the screen."""
    # A bar with a delay is not, before that has passed and the bar has moved.
    bars = list(getattr(tqdm, "_instances", ()))
    return [bar for bar in bars if not bar.disable and bar.last_print_t >= bar.start_t + bar.delay]


@contextlib.contextmanager
def above_bars() -> Iterator[None]:
    """Clears the bars for the block, which writes lines, and draws them again below these."""
    # In a file, every state is a line of its own.
    bars = open_bars() if is_live() else []
    for bar in bars:
        bar.clear()
    yield
    for bar in bars:
        bar.refresh()


def close_bars() -> None:
    """Ends the lines of all progress bars, before the last line of a program that ends in their midst."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()


# --- Bars of libraries ---


@contextlib.contextmanager
def download_bar(what: str, is_silent: bool) -> Iterator[type[tqdm]]:
    """Yields a class of bars for the downloads of huggingface_hub in the block (its `tqdm_class`), under the name
    `what`.

    That library draws several at once: of transfers, of what is put together from them, of files. The first, of bytes,
    is shown alone, and is ended with the block.
    """
    parent: Any = bar_class()  # known at run time alone
    shown: list[tqdm] = []

    class DownloadBar(parent):
        def __init__(self, *args: Any, **options: Any):
            # Its own form would say what is reconstructed, and a delay leaves small files without a bar.
            is_first = options.get("unit") == "B" and not shown
            own = {"desc": what, "disable": is_silent or not is_first, "bar_format": None, "delay": 2}
            super().__init__(*args, **{**options, **bar_options(), **own})
            if is_first:
                shown.append(self)

        # Names and rates of its own.
        def set_description(self, *args: Any, **options: Any) -> None:
            pass

        set_description_str = set_postfix_str = set_description

    # The library leaves them open.
    try:
        yield DownloadBar
    finally:
        for bar in shown:
            bar.close()


@contextlib.contextmanager
def silent_hub(is_silent: bool) -> Iterator[None]:
    """Runs the block without the bars of huggingface_hub's uploads, where `is_silent`."""
    if not is_silent:
        yield
        return
    from huggingface_hub.utils import disable_progress_bars

    with disable_progress_bars():
        yield
