"""cryo_svae in Python, on the example: load, fit, estimate, decode, average.

python example_data/walkthrough.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

import cryo_svae

HERE = Path(__file__).resolve().parent


def main(epochs: int = 50) -> tuple[cryo_svae.Model, np.ndarray]:
    """Trains on the example; the model and the particles' z."""
    particles = cryo_svae.load(HERE / "particles.star")
    print(
        f"{len(particles)} particles of {particles.box_px[0]} px at {particles.pixel_size_angst[0]:.2f} Å"
    )

    model = cryo_svae.fit(particles, z_dim=1, epochs=epochs)
    table = model.estimate(particles)
    print(f"psi of the first particle: {table.psi_deg[0]:.1f}° ± {table.psi_std_deg[0]:.1f}°")
    print(f"its origin: {table.origin_angst[0].round(1)} Å, its z: {table.z[0].round(2)}")

    # The generator's images from one end of the latent axis to the other, pose zero.
    ends = np.percentile(table.z[:, 0], np.linspace(2, 98, 5))[:, None]
    print("decoded:", model.decode(ends).shape)

    classes, averages = model.average(particles, table, n_classes=5)
    for number, (count, angst) in enumerate(
        zip(classes.n_particles, averages.resolution_0143_angst, strict=True), start=1
    ):
        print(f"class {number}: {count} particles, {angst:.1f} Å")
    return model, table.z


if __name__ == "__main__":
    main()
