"""Products by head, and the rotation that is a product: what TPUs compute, against what every device can."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cotgrpo.models.matmul import project_tokens
from cotgrpo.models.rotary import rotate, rotate_by_product, rotation

LAST = (((2,), (0,)), ((), ()))


@pytest.mark.parametrize("letters", ["DF", "FD"])
def test_a_product_by_head_is_the_product(letters: str) -> None:
    """With both gradients; the sums have the same terms in another order."""
    keys = jax.random.split(jax.random.key(0), 3)
    sizes = {"D": 24, "F": 32}
    rows, columns = (sizes[letter] for letter in letters)
    x, kernel = jax.random.normal(keys[0], (2, 6, rows)), jax.random.normal(keys[1], (rows, columns))
    dy = jax.random.normal(keys[2], (2, 6, columns))

    def results(head_dim: int | None) -> tuple[jax.Array, ...]:
        product = lambda x, kernel: project_tokens(x, kernel, LAST, letters=letters, head_dim=head_dim)
        y, pull = jax.vjp(product, x, kernel)
        return (y, *pull(dy))

    for plain, by_head in zip(results(None), results(8), strict=True):
        np.testing.assert_allclose(plain, by_head, rtol=1e-5, atol=1e-5)
    product = jax.make_jaxpr(lambda: project_tokens(x, kernel, LAST, letters=letters, head_dim=8))()
    assert "6,4,8]" in str(product), "the heads are dimensions of the product"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("head_dim", [8, 12], ids=["whole heads", "some values of a head"])
def test_a_rotation_by_a_product_is_the_rotation(dtype: str, head_dim: int) -> None:
    """To the last bit, with its gradient: the permutation moves values and rounds none."""
    keys = jax.random.split(jax.random.key(1), 2)
    x, dy = (jax.random.normal(key, (2, 5, 3, head_dim)).astype(dtype) for key in keys)
    angles = rotation(jnp.arange(10).reshape(2, 5), 10_000.0, 8)
    expected, pull = jax.vjp(lambda x: rotate(x, *angles), x)
    found, pull_product = jax.vjp(lambda x: rotate_by_product(x, *angles), x)
    assert found.dtype == x.dtype
    np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(expected, np.float32))
    for own, plain in zip(pull_product(dy), pull(dy), strict=True):
        np.testing.assert_array_equal(np.asarray(own, np.float32), np.asarray(plain, np.float32))
