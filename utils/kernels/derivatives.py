"""Derivatives written by hand, in forward and in reverse mode.

jax.custom_vjp forbids forward mode, and jax.custom_jvp leaves reverse mode to JAX's transposition. Here the tangent is
one primitive, linear in the tangents of the arguments, that brings its own transpose.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, PyTree

# One primitive for all functions: which tangent and cotangents it means is in its parameters.
_linear_p = Primitive("linear_with_transpose")
_linear_p.multiple_results = True


def define_derivatives(
    function: Callable[..., tuple[Array, PyTree]],
    tangent: Callable[[Sequence[Array], Sequence[Array]], Array],
    cotangents: Callable[[Sequence[Array], PyTree, Array], Sequence[Array]],
) -> Callable[..., Array]:
    """Returns a function of arrays with both its derivatives.

    `function(*arguments)` returns (output, anything to save for reverse mode). `tangent(arguments, tangents)` returns
    the output's tangent, in operations that JAX can differentiate. `cotangents(arguments, saved, cotangent)` returns
    the cotangents of the arguments: the transpose of `tangent`.
    """
    # Both are custom_jvp: the primitive below has the derivative of the first, and the second may be differentiated.
    with_saved = jax.custom_jvp(function)
    pull = jax.custom_jvp(cotangents)

    @pull.defjvp
    def derivative_of_cotangents(operands, tangents):
        """Differentiates the transpose of `tangent` in place of `cotangents`; saved values are constants there."""
        arguments, saved, cotangent = operands
        argument_tangents, _, cotangent_tangent = tangents

        # The formula depends on the arguments alone, so that its derivative is complete without what was saved.
        def by_formula(arguments, cotangent):
            return jax.linear_transpose(partial(tangent, arguments), arguments)(cotangent)[0]

        parts = (arguments, cotangent), (argument_tangents, cotangent_tangent)
        return pull(arguments, saved, cotangent), jax.jvp(by_formula, *parts)[1]

    @with_saved.defjvp
    def derivative(arguments, tangents):
        # The primitive carries what was saved to its transpose; saved values have no tangents.
        output, saved = with_saved(*arguments)
        leaves, tree = jax.tree.flatten(saved)
        output_tangent, = _linear_p.bind(
            *arguments, *leaves, *tangents,
            tangent=tangent, cotangents=pull, count=len(arguments), saved_tree=tree,
        )  # fmt: skip
        return (output, saved), (output_tangent, jax.tree.map(_zero_tangent, saved))

    # Callers see the output alone.
    return lambda *arguments: with_saved(*arguments)[0]


def _zero_tangent(x: Array) -> Array | np.ndarray:
    # What JAX wants as the tangent of a constant: integers have tangents of float0.
    is_float = jnp.issubdtype(x.dtype, jnp.floating)
    return jnp.zeros_like(x) if is_float else np.zeros(x.shape, jax.dtypes.float0)


def _apply_linear(*operands, tangent, cotangents, count, saved_tree):
    # The tangent of `count` arguments; the saved values between them and their tangents are not needed.
    return [tangent(tuple(operands[:count]), tuple(operands[-count:]))]


def _linear_jvp(primals, tangents, *, count, **params):
    """Has JAX differentiate `tangent` in its arguments and in their tangents: derivatives of second order."""

    def differentiable(arguments, argument_tangents):
        return params["tangent"](arguments, argument_tangents)

    tangents = [ad.instantiate_zeros(x) for x in tangents]
    parts = [(tuple(operands[:count]), tuple(operands[-count:])) for operands in (primals, tangents)]
    _, tangent_out = jax.jvp(differentiable, parts[0], parts[1])
    return _linear_p.bind(*primals, count=count, **params), [tangent_out]


def _linear_transpose(output_cotangents, *operands, tangent, cotangents, count, saved_tree):
    (cotangent,) = output_cotangents
    results = [None] * len(operands)
    if type(cotangent) is ad.Zero:
        return results
    arguments = tuple(operands[:count])
    # The operands are the arguments, what was saved, and the tangents, of which the undefined are asked for.
    saved = jax.tree.unflatten(saved_tree, operands[count:-count])
    found = cotangents(arguments, saved, cotangent)
    are_wanted = [ad.is_undefined_primal(x) for x in operands[-count:]]
    results[-count:] = [x if is_wanted else None for x, is_wanted in zip(found, are_wanted, strict=True)]
    return results


def _linear_batch(operands, axes, **params):
    # Every operand gets the mapped axis in front; the functions are then mapped as a whole.
    size = next(x.shape[axis] for x, axis in zip(operands, axes, strict=True) if axis is not None)
    moved = [
        jnp.broadcast_to(x, (size, *x.shape)) if axis is None else jnp.moveaxis(x, axis, 0)
        for x, axis in zip(operands, axes, strict=True)
    ]
    batched = {name: jax.vmap(params[name]) for name in ("tangent", "cotangents")}
    return _linear_p.bind(*moved, **(params | batched)), [0]


# How JAX evaluates, differentiates, transposes and maps the primitive.
_linear_p.def_impl(_apply_linear)
_linear_p.def_abstract_eval(
    lambda *operands, **params: [
        ShapedArray(x.shape, x.dtype) for x in jax.eval_shape(lambda *xs: _apply_linear(*xs, **params), *operands)
    ]
)
mlir.register_lowering(_linear_p, mlir.lower_fun(_apply_linear, multiple_results=True))
ad.primitive_jvps[_linear_p] = _linear_jvp
ad.primitive_transposes[_linear_p] = _linear_transpose
batching.primitive_batchers[_linear_p] = _linear_batch


def save_pullback(function: Callable[..., Array]) -> tuple[Callable, Callable]:
    """Returns (function, cotangents) for `define_derivatives` from a function with a custom VJP, whose own residuals
    are what is saved."""

    def with_saved(*arguments):
        output, pullback = jax.vjp(function, *arguments)
        return output, jax.tree.leaves(pullback)

    def cotangents(arguments, saved, cotangent):
        # A pullback is a pytree of what it saves: its structure, found without computing, takes the saved leaves.
        pullback = jax.eval_shape(lambda *arguments: jax.vjp(function, *arguments)[1], *arguments)
        return jax.tree.unflatten(jax.tree.structure(pullback), saved)(cotangent)

    return with_saved, cotangents
