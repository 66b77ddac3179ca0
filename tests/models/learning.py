"""A short training of an engine on batches in memory, without the package's own loop."""

from __future__ import annotations

import torch

from cryo_svae.models.engine import Batch, Engine


def learn(engine: Engine, batches: list[Batch], epochs: int) -> None:
    """Trains an engine that has started, by Adam with a one-cycle learning rate."""
    optimizer = torch.optim.Adam(engine.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=epochs * len(batches))
    engine.train()
    for epoch in range(epochs):
        engine.begin_epoch(epoch, epochs)
        for k in torch.randperm(len(batches)):
            terms = engine.elbo(batches[k])
            loss = -(terms.log_likelihood - engine.kl_weight * (terms.kl_z + terms.kl_pose)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
