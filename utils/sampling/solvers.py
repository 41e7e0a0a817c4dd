"""Samples from a velocity field: solvers of fixed or adaptive steps, their times, and the noise of each sample.

The number of steps is an ordinary argument of the compiled function: changing it compiles nothing anew. Nothing here
knows the network.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree

from utils.kernels.random import unroll
from utils.objectives.objective import VelocityFn, scale_noise

# step(velocity_fn, x, t, t_next) -> x at t_next; a stochastic one is given fresh noise, too.
StepFn = Callable[..., Float[Array, "b ..."]]
# grid(step, num_steps): the time before step `step` of `num_steps`, and at its end after the last.
TimeGrid = Callable[[int | Int[Array, ""], int | Int[Array, ""]], Float[Array, ""]]


def full_times(t: Float[Array, ""], x: Float[Array, "b ..."]) -> Float[Array, " b"]:
    """Returns the time t for each example of x, (b,)."""
    return jnp.full((x.shape[0],), t, jnp.float32)


def euler_step(
    velocity_fn: VelocityFn, x: Float[Array, "b ..."], t: Float[Array, ""], t_next: Float[Array, ""]
) -> Float[Array, "b ..."]:
    """Takes a step of order 1: Euler's method. One evaluation."""
    return x + (t_next - t) * velocity_fn(x, full_times(t, x), full_times(t_next, x))


def heun_step(
    velocity_fn: VelocityFn, x: Float[Array, "b ..."], t: Float[Array, ""], t_next: Float[Array, ""]
) -> Float[Array, "b ..."]:
    """Takes a step of order 2: the trapezoidal rule with an Euler predictor. Two evaluations."""
    v = velocity_fn(x, full_times(t, x), full_times(t_next, x))
    v_end = velocity_fn(x + (t_next - t) * v, full_times(t_next, x), full_times(t_next, x))
    return x + (t_next - t) * (v + v_end) / 2


def heun_euler_step(
    velocity_fn: VelocityFn, x: Float[Array, "b ..."], t: Float[Array, ""], t_next: Float[Array, ""]
) -> Float[Array, "b ..."]:
    """Takes a Heun step, but an Euler step where it ends at t = 1, as JiT does (arXiv:2511.13720).

    Backwards, a step that starts at t = 1 is an Euler step by the velocity at its end. The velocity at t = 1 is thus
    computed, so that all steps compile as one, but never used.
    """
    t_start = jnp.where(t < 1, t, t_next)
    v = velocity_fn(x, full_times(t_start, x), full_times(t_next, x))
    v_end = velocity_fn(x + (t_next - t) * v, full_times(t_next, x), full_times(t_next, x))
    is_inside = (t < 1) & (t_next < 1)
    return x + (t_next - t) * jnp.where(is_inside, (v + v_end) / 2, v)


def midpoint_step(
    velocity_fn: VelocityFn, x: Float[Array, "b ..."], t: Float[Array, ""], t_next: Float[Array, ""]
) -> Float[Array, "b ..."]:
    """Takes a step of order 2: the velocity halfway, reached by an Euler step. Two evaluations."""
    middle = (t + t_next) / 2
    v = velocity_fn(x, full_times(t, x), full_times(middle, x))
    v = velocity_fn(x + (middle - t) * v, full_times(middle, x), full_times(t_next, x))
    return x + (t_next - t) * v


def euler_maruyama_step(
    velocity_fn: VelocityFn,
    x: Float[Array, "b ..."],
    t: Float[Array, ""],
    t_next: Float[Array, ""],
    fresh_noise: Float[Array, "b ..."],
) -> Float[Array, "b ..."]:
    """Takes a step of order 1 of the SDE with the same marginals (SiT, arXiv:2401.08740, diffusion coefficient 1 - t).

    On the straight path the score is (t v - x) / (1 - t), so that dx = (v + (t v - x)) dt + sqrt(2 (1 - t)) dW. Where
    x_0 has the standard deviation s, the score is 1 / s^2 of that: with fresh noise of the same deviation, the drift
    stays as it is. The step that ends at t = 1 takes the mean alone.
    """
    v = velocity_fn(x, full_times(t, x), full_times(t_next, x))
    drift = v + (t * v - x)
    deviation = jnp.where(t_next < 1, jnp.sqrt(2 * (1 - t) * (t_next - t)), 0)
    return x + (t_next - t) * drift + deviation * fresh_noise


def ancestral_step(
    velocity_fn: VelocityFn,
    x: Float[Array, "b ..."],
    t: Float[Array, ""],
    t_next: Float[Array, ""],
    fresh_noise: Float[Array, "b ..."],
) -> Float[Array, "b ..."]:
    """Draws from the posterior of DDPM (arXiv:2006.11239, eq. 6 and 7) between two times of the straight path.

    With s = 1 - t, s' = 1 - t' and x_1 = x + s v predicted, its mean is a x_1 + b x for a = c / (t' s^2),
    b = (t / t') (s' / s)^2 and c = (t' - t) (t' s + t s'), and its variance s'^2 - (b s)^2 = c (s' / (t' s))^2. No two
    numbers that are nearly equal are subtracted but the times, so that float32 keeps the digits.

    A field of twice the channels of x has a learned variance in its second half (arXiv:2102.09672, eq. 15): 1 is the
    forward process's, c h' / (h t'^2) with h = t^2 + s^2, and -1 that of the posterior.
    """
    # What the network says: the data that x comes from and, where it has learned it, a variance.
    field = velocity_fn(x, full_times(t, x), full_times(t_next, x))
    velocity, learned = field[..., : x.shape[-1]], field[..., x.shape[-1] :]
    x_1 = x + (1 - t) * velocity

    # Mean and deviation of the posterior, in the terms of the docstring.
    s, s_next = 1 - t, 1 - t_next
    common = (t_next - t) * (t_next * s + t * s_next)
    mean = common / (t_next * s**2) * x_1 + (t / t_next) * (s_next / s) ** 2 * x
    deviation = jnp.sqrt(common) / t_next
    if learned.shape[-1]:
        fraction = (learned + 1) / 2
        # Both bounds over the common factor, as deviations; the learned number interpolates their logarithms.
        forward = jnp.hypot(t_next, s_next) / jnp.hypot(t, s)
        ratio = forward**fraction * (s_next / s) ** (1 - fraction)
    else:
        ratio = s_next / s

    # The step that ends at t = 1 takes the mean alone.
    return mean + jnp.where(t_next < 1, deviation * ratio, 0) * fresh_noise


class Solver(NamedTuple):
    """One step, and where it evaluates the velocity: fractions of the way from t to t_next.

    A stochastic one takes fresh noise (b, ...), of the standard deviation of x_0, as its last argument. `grid` names
    its times: 'any', those of --time_grid; 'sde', those of `sde_time_at`; 'objective', the objective's own
    (`Objective.time_grid`).
    """

    step: StepFn
    fractions: tuple[float, ...]
    is_stochastic: bool = False
    grid: str = "any"

    @property
    def nfe(self) -> int:
        """Velocities that a step takes (number of function evaluations)."""
        return len(self.fractions)


# A new solver is one function and one line.
SOLVERS = {
    "euler": Solver(euler_step, (0,)),
    "heun": Solver(heun_step, (0, 1)),
    "heun_euler": Solver(heun_euler_step, (0, 1)),
    "midpoint": Solver(midpoint_step, (0, 0.5)),
    "sde": Solver(euler_maruyama_step, (0,), is_stochastic=True, grid="sde"),
    "ddim": Solver(euler_step, (0,), grid="objective"),  # the straight path makes it Euler's
    "ddpm": Solver(ancestral_step, (0,), is_stochastic=True, grid="objective"),
}
ADAPTIVE_SOLVERS = ("dopri5",)
# Those of fixed steps from 0 to 1 without fresh noise: they alone can invert and inpaint.
ODE_SOLVERS = tuple(name for name, solver in SOLVERS.items() if solver.grid == "any")
MAX_ADAPTIVE_STEP = 1 / 4  # the error estimate of a longer one does not see what lies between
SPACINGS = ("linspace", "leading")  # of the noise levels of a diffusion, see `Diffusion.time_at`
SDE_LAST_STEP = 0.04  # where the score is not to be trusted; SiT's


class SamplerConfig(NamedTuple):
    """Solver, steps and guidance with which samples are drawn from a model."""

    num_steps: int
    cfg_scale: float | None  # None: no guidance
    cfg_interval: tuple[float, float] = (0.0, 1.0)  # times, ends included, at which guidance is on
    solver: str = "euler"
    cfg_channels: int | None = None  # how many channels are guided; None: all
    time_shift: float = 1.0  # see `time_at`
    spacing: str = SPACINGS[0]  # of ddim and ddpm
    rtol: float = 1e-5  # of adaptive solvers, which take no step count
    atol: float = 1e-5
    cfg_zero_star: bool = False  # see `guidance.guide`
    cfg_zero_steps: int = 0  # with cfg_zero_star: number of first steps that leave x as it is
    inner_scale: float = 1.0  # of internal guidance; 1: none
    inner_interval: tuple[float, float] = (0.0, 1.0)
    guide_scale: float = 1.0  # of guidance by another model; 1: none
    guide_interval: tuple[float, float] = (0.0, 1.0)

    def without_guidance(self) -> "SamplerConfig":
        """Returns the sampler with the same solver and steps, but without guidance of any kind."""
        return self._replace(cfg_scale=None, cfg_zero_star=False, cfg_zero_steps=0, inner_scale=1.0, guide_scale=1.0)

    @property
    def is_adaptive(self) -> bool:
        return self.solver in ADAPTIVE_SOLVERS

    @property
    def is_inner_guided(self) -> bool:
        return self.inner_scale != 1

    @property
    def is_model_guided(self) -> bool:
        return self.guide_scale != 1

    @property
    def nfe(self) -> int | None:
        """Velocities that a sample takes; a guided one is two passes of the network. None: the solver chooses."""
        num_steps = self.num_steps - self.cfg_zero_steps
        return None if self.is_adaptive else num_steps * SOLVERS[self.solver].nfe

    def __str__(self) -> str:
        name = self.solver.title().replace("_", "-") if self.solver in ODE_SOLVERS else self.solver.upper()
        steps = f"{self.num_steps} {name} step{'s' * (self.num_steps > 1)}"
        if self.is_adaptive:
            steps = f"{self.solver} (rtol {self.rtol:g}, atol {self.atol:g})"
        shift = f" on times shifted by {self.time_shift:g}" if self.time_shift != 1 else ""
        if self.spacing != SPACINGS[0]:
            shift = f" with {self.spacing} spacing"

        # Guidance: its scale, then the times and channels to which it is limited.
        # Only what differs from the defaults, after what is always said.
        guidance = "no guidance" if self.cfg_scale is None else f"guidance {self.cfg_scale:g}"
        if self.cfg_scale is not None:
            guidance += _interval_text(self.cfg_interval)
            guidance += f" of {self.cfg_channels} channels" if self.cfg_channels is not None else ""
        if self.cfg_zero_star:
            guidance += f" by CFG-Zero*, {self.cfg_zero_steps} zero steps"
        if self.is_inner_guided:
            guidance += f", inner guidance {self.inner_scale:g}{_interval_text(self.inner_interval)}"
        if self.is_model_guided:
            guidance += f", autoguidance {self.guide_scale:g}{_interval_text(self.guide_interval)}"
        return f"{steps}{shift}, {guidance}"


# Fields of a SamplerConfig that change the velocity itself, whatever the steps.
GUIDANCE = (
    *("cfg_scale", "cfg_interval", "cfg_channels", "cfg_zero_star"),
    *("inner_scale", "inner_interval", "guide_scale", "guide_interval"),
)


def is_always(interval: tuple[float, float]) -> bool:
    """Returns whether an interval (low, high) includes all times from 0 to 1."""
    return interval[0] <= 0 and interval[1] >= 1


def _interval_text(interval: tuple[float, float]) -> str:
    return "" if is_always(interval) else f" for t in [{interval[0]:g}, {interval[1]:g}]"


def time_at(step: int | Int[Array, ""], num_steps: int | Int[Array, ""], time_shift: float | Float[Array, ""] = 1.0):
    """Returns the time in [0, 1] before step `step` of `num_steps`.

    It is u = step / num_steps, shifted to u / (u + S (1 - u)). S = 1 is the uniform grid. S > 1 spends more steps on
    noise, as SD3 (arXiv:2403.03206, section 5.3.2, where noise is at t = 1) and LightningDiT do.
    """
    u = jnp.float32(step / num_steps)
    # The uniform grid is exact: the formula rounds even at S = 1.
    return jnp.where(time_shift == 1, u, u / (u + time_shift * (1 - u)))


def sde_time_at(step: int | Int[Array, ""], num_steps: int | Int[Array, ""]) -> Float[Array, ""]:
    """Returns SiT's times for its SDE: `num_steps` from 0 to 0.96, ends included, and 1 after the last step."""
    u = jnp.float32(step / jnp.maximum(num_steps - 1, 1)) * (1 - SDE_LAST_STEP)
    return jnp.where(step < num_steps, u, 1)


def start_path(
    noise: Float[Array, "b ..."], num_steps: int | Int[Array, ""], times: TimeGrid = time_at
) -> Float[Array, "b ..."]:
    """Scales the noise x_0 to the first time t of the grid, by sqrt(t^2 + (1 - t)^2), which is 1 at t = 0."""
    t = times(0, num_steps)
    return noise * jnp.hypot(t, 1 - t)


def take_steps(
    velocity_fn: VelocityFn,
    x: Float[Array, "b ..."],
    first: int | Int[Array, ""],
    last: int | Int[Array, ""],
    num_steps: int | Int[Array, ""],
    solver: str = "euler",
    times: TimeGrid = time_at,
    keys: Key[Array, " b"] | None = None,
    noise_scale: float = 1.0,
) -> Float[Array, "b ..."]:
    """Returns x after the steps i = first .. last - 1 of `num_steps`, each from times(i, num_steps) to that of i + 1.

    `solver` is a key of SOLVERS; a stochastic one draws the noise of example j at step i from (keys[j], i), and scales
    it as x_0 is. All three counts may be traced, so that one compiled function serves every step count and every stage
    of a path.
    """
    step, _, is_stochastic, _ = SOLVERS[solver]

    def body(i, x):
        t, t_next = times(i, num_steps), times(i + 1, num_steps)
        if is_stochastic:
            fresh = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, i), x.shape[1:]))(keys)
            return step(velocity_fn, x, t, t_next, scale_noise(fresh, noise_scale))
        return step(velocity_fn, x, t, t_next)

    return jax.lax.fori_loop(first, last, body, x)


def sample(
    velocity_fn: VelocityFn,
    noise: Float[Array, "b ..."],
    num_steps: int | Int[Array, ""],
    solver: str = "euler",
    times: TimeGrid = time_at,
    keys: Key[Array, " b"] | None = None,
    first: int | Int[Array, ""] = 0,
    noise_scale: float = 1.0,
) -> Float[Array, "b ..."]:
    """Returns samples: standard normal `noise`, scaled, carried to t = 1 by the steps `first` .. `num_steps` - 1; see
    `take_steps`."""
    x = start_path(scale_noise(noise, noise_scale), num_steps, times)
    return take_steps(velocity_fn, x, first, num_steps, num_steps, solver, times, keys, noise_scale)


def adaptive_sample(
    velocity_of: Callable[[PyTree], VelocityFn],
    x: Float[Array, "b ..."],
    condition: PyTree,
    t_start: float | Float[Array, ""] = 0.0,
    t_end: float | Float[Array, ""] = 1.0,
    *,
    rtol: float | Float[Array, ""] = 1e-5,
    atol: float | Float[Array, ""] = 1e-5,
) -> tuple[Float[Array, "b ..."], Int[Array, " b"]]:
    """Returns (x carried from `t_start` to `t_end`, evaluations of the velocity for each), on the field
    `velocity_of(condition)`.

    Dormand and Prince's method of order 5 with error control (diffrax's Dopri5): the error of each step is kept below
    atol + rtol |x|, root mean square over a sample. Each sample has steps of its own, so that it does not depend on
    its batch.
    """

    def field(t, x, condition):
        # A batch of one: the solver is mapped over the examples.
        times = jnp.full((1,), t, jnp.float32)
        return velocity_of(jax.tree.map(lambda leaf: leaf[None], condition))(x[None], times, times)[0]

    return solve_adaptively(field, x, condition, t_start, t_end, rtol=rtol, atol=atol)


def solve_adaptively(
    field: Callable[[Any, PyTree, PyTree], PyTree],
    state: PyTree,
    args: PyTree,
    t_start: float | Float[Array, ""],
    t_end: float | Float[Array, ""],
    *,
    rtol: float | Float[Array, ""],
    atol: float | Float[Array, ""],
) -> tuple[PyTree, Int[Array, " b"]]:
    """Returns (state at `t_end`, evaluations) of d state / dt = field(t, state, args) for each example.

    Examples are the first axis of the leaves of `state` and `args`; see `adaptive_sample`.
    """
    # Imported here: it takes seconds, and only adaptive solvers need it.
    import diffrax

    def solve(state, args):
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            diffrax.Dopri5(),
            t_start,
            t_end,
            dt0=None,  # chosen from the field at the start
            y0=state,
            args=args,
            saveat=diffrax.SaveAt(t1=True),
            stepsize_controller=diffrax.PIDController(rtol, atol, dtmax=MAX_ADAPTIVE_STEP),
            max_steps=None,  # no sample is given up, whatever its tolerance
            adjoint=diffrax.ForwardMode(),  # nothing is differentiated backwards through it
        )
        # Six evaluations a step, of which the last serves the next; and one to begin with.
        return jax.tree.map(lambda leaf: leaf[0], solution.ys), 6 * solution.stats["num_steps"] + 1

    # Steps of its own for each example: a batch waits for its slowest.
    return jax.vmap(solve)(state, args)


def sample_noise(key: Key[Array, ""], indices: Int[Array, " b"], shape: tuple[int, ...]) -> Float[Array, "b ..."]:
    """Returns standard normal noise (b, *shape); row j is a function of (key, indices[j]) alone."""
    key = unroll(key)  # one draw for each sample, which is sooner computed than compiled
    return jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), shape))(indices)
