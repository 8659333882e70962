"""Relative L2 against torch's norm and closed forms."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ditcache.metrics.latent import latent

A = torch.randn(1, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
B = A + 0.1 * torch.randn(A.shape, generator=torch.Generator().manual_seed(1))


def test_agrees_with_torch():
    expected = (torch.linalg.norm((B - A).double()) / torch.linalg.norm(A.double())).item()
    assert latent(A, B) == pytest.approx(expected, abs=1e-7)
    assert latent(A.numpy(), B.numpy()) == pytest.approx(latent(A, B), abs=1e-12)


def test_reads_what_a_pipeline_hands_over():
    half = A.to(torch.bfloat16)
    assert latent(half, half.float()) == 0
    assert latent(A.clone().requires_grad_(), B) == latent(A, B)


def test_identical_and_bad():
    assert latent(A, A) == 0
    assert latent(A, torch.zeros_like(A)) == pytest.approx(1)
    assert latent(A, -A) == pytest.approx(2)
    assert latent(A, A.flip(2)) > 1


def test_a_reference_of_zeros():
    zeros = np.zeros((1, 4))
    assert latent(zeros, zeros) == 0 and math.isinf(latent(zeros, zeros + 1))


@settings(max_examples=25, deadline=None)
@given(st.floats(0.01, 10), st.floats(0, 3))
def test_free_of_scale_and_linear_in_the_error(scale, error):
    a, noise = A.double().numpy(), (B - A).double().numpy()
    assert latent(scale * a, scale * (a + error * noise)) == pytest.approx(
        error * latent(a, a + noise), abs=1e-9
    )


def test_unequal_shapes_are_refused():
    with pytest.raises(
        ValueError, match=r"latent: reference is \(1, 4, 3, 8, 8\), candidate is \(1, 4, 2"
    ):
        latent(A, A[:, :, :2])
