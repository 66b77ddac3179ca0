# %% [markdown]
# # cryo_svae in Python
#
# A model is trained on the particles of `example_data/`: a simulated molecule of two arms with one hinge,
# in every in-plane rotation, a little off the centre of its box, in noise. Then the model is asked what
# each particle looks like, how it is turned and where it lies.

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import cryo_svae

folder = Path("example_data") if Path("example_data").is_dir() else Path()
particles = cryo_svae.load(folder / "particles.star")
print(f"{len(particles)} particles of {particles.box_px[0]} px at {particles.pixel_size_angst[0]:.2f} Å")

# %% [markdown]
# ## Training
#
# `fit` takes the options of `cryo-svae run`, with underscores: `z_dim=1` is one dimension of content, which
# is enough for one hinge. Training takes about half a minute on two cores.

# %%
epochs = 50
model = cryo_svae.fit(particles, z_dim=1, epochs=epochs)

# %% [markdown]
# ## Estimates
#
# One row for each particle, in the order of the file: content `z`, in-plane rotation `psi_deg`, origin
# `origin_angst` (x, y), their standard deviations, and a figure of merit, which is about 0 for an image
# without a particle.

# %%
table = model.estimate(particles)
print(f"psi of the first particle: {table.psi_deg[0]:.1f}° ± {table.psi_std_deg[0]:.1f}°")
print(f"its origin: {table.origin_angst[0].round(1)} Å")
print(f"its z: {table.z[0].round(2)} ± {table.z_std[0].round(2)}")

# %% [markdown]
# ## Images along the latent axis
#
# The images that the model generates, from the 2nd to the 98th percentile of z: the hinge moves from one
# end of its range to the other.

# %%
ends = np.percentile(table.z[:, 0], np.linspace(2, 98, 7))[:, None]
images = model.decode(ends)
figure, axes = plt.subplots(1, len(images), figsize=(10.5, 1.7), layout="constrained")
for axis, image, z in zip(axes, images, ends[:, 0], strict=True):
    axis.imshow(image, cmap="gray")
    axis.set_title(f"z = {z:.1f}", fontsize=9)
    axis.set_axis_off()
plt.show()

# %% [markdown]
# ## Class averages
#
# Classes are groups of particles with similar z. The particles of each are aligned, corrected for the CTF
# and averaged; the resolution is where the Fourier ring correlation of two half-sets falls to 0.143.

# %%
classes, averages = model.average(particles, table, n_classes=5)
for number, (count, angst) in enumerate(
    zip(classes.n_particles, averages.resolution_0143_angst, strict=True), start=1
):
    print(f"class {number}: {count} particles, {angst:.1f} Å")

# %% [markdown]
# ## The model in a file
#
# `model.save("model.pt")` writes it, and `cryo_svae.load_model("model.pt")` reads it again. The command
# `cryo-svae estimate others.star --model model.pt --out JOB` uses it on other particles.
