"""What models say in radians and pixels, as a table in degrees and Å."""

from __future__ import annotations

import math

import numpy as np
import torch

from cryo_svae.learning.estimation import empty_table, fill
from cryo_svae.models.engine import Posterior


def test_radians_and_pixels_become_degrees_and_angstroms_in_their_rows():
    posterior = Posterior(
        z_mean=torch.tensor([[0.5, -1.0], [2.0, 3.0]]),
        z_std=torch.tensor([[0.1, 0.2], [0.3, 0.4]]),
        psi_rad=torch.tensor([math.pi / 2, -math.pi / 6]),
        psi_std_rad=torch.tensor([math.pi / 180, math.pi / 90]),
        origin_px=torch.tensor([[1.0, -2.0], [0.5, 4.0]]),
        origin_std_px=torch.tensor([0.25, 0.5]),
        figure_of_merit=torch.tensor([0.9, 0.1]),
        log_likelihood=torch.tensor([-100.0, -200.0]),
        second_mode=torch.tensor([0.0, 0.2]),
    )
    table = empty_table(3, z_dim=2)
    fill(table, np.array([2, 0]), posterior, pixel_size_angst=2.5)
    assert table.usable.tolist() == [True, False, True]
    np.testing.assert_allclose(table.psi_deg, [-30.0, 0.0, 90.0], atol=1e-5)
    np.testing.assert_allclose(table.psi_std_deg, [2.0, 0.0, 1.0], atol=1e-6)
    np.testing.assert_allclose(table.origin_angst, [[1.25, 10.0], [0.0, 0.0], [2.5, -5.0]])
    np.testing.assert_allclose(table.origin_std_angst, [1.25, 0.0, 0.625])
    np.testing.assert_allclose(table.z, [[2.0, 3.0], [0.0, 0.0], [0.5, -1.0]])
    np.testing.assert_allclose(table.z_std, [[0.3, 0.4], [0.0, 0.0], [0.1, 0.2]], atol=1e-7)
    np.testing.assert_allclose(table.figure_of_merit, [0.1, 0.0, 0.9], atol=1e-7)
    assert table.log_likelihood.tolist() == [-200.0, 0.0, -100.0]
