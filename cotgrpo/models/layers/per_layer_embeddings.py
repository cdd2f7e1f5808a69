"""Per-layer embeddings (Gemma 4): a second embedding, from which every layer reads a vector of its own.

With x_0 the embedded token, W a matrix and E the table, both as wide as all layers together, layer l gets

    p_l = (norm(x_0 W_l / sqrt(D)) + sqrt(P) E_l[token]) / sqrt(2)

and adds `norm(out(act(gate(x)) * p_l))` to the residual stream x after its MLP. The vectors of all layers are looked up
at once, before the first layer.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import flax.linen as nn
import jax.numpy as jnp

from cotgrpo.models.matmul import project_tokens
from cotgrpo.models.norm_and_gate import rms_norm
from cotgrpo.sharding import constrain, look_up, vary_alike

if TYPE_CHECKING:
    from cotgrpo.models.config import DecoderConfig
    from cotgrpo.types import Array, Float, Int


class PerLayerInputs(nn.Module):
    """Token ids and their embedding to what each layer reads, `[L, B, T, P]`."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, tokens: Int[Array, "B T"], x_BTD: Float[Array, "B T D"], *, gather: bool = False
    ) -> Float[Array, "L B T P"]:
        """Return the layers' inputs. `gather` is that of `look_up`."""
        c, own = self.config, self.config.per_layer_embeddings
        assert own is not None
        B, T, D = x_BTD.shape
        dtype, param_dtype, start = jnp.dtype(c.dtype), jnp.dtype(c.param_dtype), nn.initializers.normal(c.init_scale)
        table = self.param("embedding", start, (own.vocab_size, c.num_layers * own.width), param_dtype)
        looked_up = look_up(table, tokens, dtype, gather=gather) * jnp.asarray(own.width**0.5, dtype)
        projected = nn.Dense(
            c.num_layers * own.width,
            use_bias=False,
            name="projection",
            dtype=dtype,
            param_dtype=param_dtype,
            kernel_init=start,
            dot_general=functools.partial(project_tokens, letters="DF"),
        )(x_BTD)
        by_layer = lambda x: x.reshape(B, T, c.num_layers, own.width)
        scale_P = self.param("scale", nn.initializers.ones, (own.width,), param_dtype).astype(jnp.float32)
        projected = by_layer(projected) * jnp.asarray(D**-0.5, dtype)
        normed = rms_norm(*vary_alike(projected, scale_P), c.norm_eps)
        inputs = (normed + by_layer(looked_up)) * jnp.asarray(2**-0.5, dtype)
        return constrain(jnp.moveaxis(inputs, 2, 0), "LBTP")
