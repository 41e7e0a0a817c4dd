"""The recipe as jax-flow runs it: float32, attention with its weights in memory from Flax's own layers, a trained
position table, nothing donated, a dispatch for every sampling step. Written from the recipe's description; the
numbers it computes are those of `utils.training.step` and `utils.sampling.solvers` up to the lag of the EMA.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from diffusion_transformer import DiT as OurDiT
from diffusion_transformer import position_table, timestep_features
from utils.networks.state import TrainState
from utils.objectives import flow_matching


def modulate(x, shift, scale):
    return x * (1 + scale[:, None]) + shift[:, None]


def normalise(x):
    return nn.LayerNorm(use_scale=False, use_bias=False, epsilon=1e-6)(x)


class Block(nn.Module):
    num_heads: int
    mlp_ratio: float

    @nn.compact
    def __call__(self, x, c):
        width = x.shape[-1]
        modulations = nn.Dense(6 * width, kernel_init=nn.initializers.zeros)(nn.silu(c))
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = jnp.split(modulations, 6, axis=-1)
        y = modulate(normalise(x), shift_1, scale_1)
        x = x + gate_1[:, None] * nn.MultiHeadDotProductAttention(self.num_heads)(y, y)
        y = modulate(normalise(x), shift_2, scale_2)
        y = nn.Dense(width)(nn.gelu(nn.Dense(int(self.mlp_ratio * width))(y)))
        return x + gate_2[:, None] * y


class DiT(nn.Module):
    """The same function as `diffusion_transformer.DiT`, from layers of Flax."""

    sizes: Any

    @nn.compact
    def __call__(self, x, t, labels):
        m = self.sizes
        b, h, w, c = x.shape
        p = m.patch_size
        x = nn.Conv(m.hidden_size, (p, p), (p, p))(x).reshape(b, -1, m.hidden_size)
        x = x + self.param("pos_embed", lambda _: jnp.asarray(position_table(h // p, w // p, m.hidden_size)))
        condition = nn.Dense(m.hidden_size)(nn.silu(nn.Dense(m.hidden_size)(timestep_features(t))))
        condition += nn.Embed(m.num_classes + 1, m.hidden_size)(labels)
        for _ in range(m.depth):
            x = Block(m.num_heads, m.mlp_ratio)(x, condition)
        shift, scale = jnp.split(nn.Dense(2 * m.hidden_size)(nn.silu(condition)), 2, axis=-1)
        x = nn.Dense(p * p * c)(modulate(normalise(x), shift, scale))
        return x.reshape(b, h // p, w // p, p, p, c).swapaxes(2, 3).reshape(b, h, w, c)


def create_params(model: OurDiT, latent_shape: tuple[int, int, int]) -> PyTree:
    inputs = (jnp.zeros((1, *latent_shape)), jnp.zeros(1), jnp.zeros(1, jnp.int32))
    return jax.jit(DiT(model.config).init)(jax.random.key(0), *inputs)


def create_state(
    model: OurDiT, optimizer: optax.GradientTransformation, latent_shape: tuple[int, int, int]
) -> TrainState:
    params = create_params(model, latent_shape)
    return TrainState(jnp.zeros((), jnp.int32), params, params, optimizer.init(params), jax.random.key(1))


@partial(jax.jit, static_argnames=("model", "optimizer"))
def train_step(state: TrainState, latents, labels, *, model: OurDiT, optimizer: optax.GradientTransformation):
    """(state one step on, metrics); the EMA is of the parameters before the step, as in jax-flow."""
    time_key, noise_key, drop_key = jax.random.split(jax.random.fold_in(state.key, state.step), 3)
    noise = jax.random.normal(noise_key, latents.shape)
    t = jax.nn.sigmoid(jax.random.normal(time_key, labels.shape))
    labels = jnp.where(
        jax.random.bernoulli(drop_key, model.config.class_dropout_prob, labels.shape), model.config.num_classes, labels
    )

    x_t = flow_matching.interpolate(noise, latents, t)

    def loss_fn(params):
        target = latents - noise
        prediction = DiT(model.config).apply(params, x_t, t, labels)
        loss = jnp.square(prediction - target).mean()
        return loss, {"loss": loss, "v": jnp.abs(target).mean(), "v_pred": jnp.abs(prediction).mean()}

    grads, metrics = jax.grad(loss_fn, has_aux=True)(state.params)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    ema_params = jax.tree.map(lambda ema, p: 0.9999 * ema + 0.0001 * p, state.ema_params, state.params)
    params = optax.apply_updates(state.params, updates)
    norms = {name: optax.tree.norm(tree) for name, tree in {"g": grads, "u": updates, "p": params}.items()}
    return state.replace(
        step=state.step + 1, params=params, ema_params=ema_params, opt_state=opt_state
    ), metrics | norms


@partial(jax.jit, static_argnames="model")
def velocity(params, x, t, labels, cfg_scale, *, model: OurDiT):
    """Guided velocity, both halves in one batch."""
    both = jnp.concatenate([jnp.full_like(labels, model.config.num_classes), labels])
    v = DiT(model.config).apply(params, jnp.concatenate([x, x]), jnp.concatenate([t, t]), both)
    v_uncond, v_cond = jnp.split(v, 2)
    return v_uncond + cfg_scale * (v_cond - v_uncond)


def sample(params, noise, labels, cfg_scale: float, num_steps: int, *, model: OurDiT):
    """Euler steps, dispatched one by one."""
    x = noise
    for i in range(num_steps):
        x = x + velocity(params, x, jnp.full(len(x), i / num_steps), labels, cfg_scale, model=model) / num_steps
    return x
