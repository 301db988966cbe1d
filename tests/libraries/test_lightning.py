"""Lightning's Trainer and Fabric with their DeepSpeed strategies, next to their DDP."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.libraries import tiny
from tests.libraries.test_trainer import close

Ranks = Callable[..., list[Any]]
STEPS = 4


def _loader(steps: int) -> Any:
    return torch.utils.data.DataLoader(tiny.ids(2 * 2 * steps), batch_size=2)  # type: ignore[arg-type]


def _host_as_cuda(kind: type) -> Any:
    """An accelerator that these strategies take, and that is the host: they ask for a CUDAAccelerator by class.

    Args:
        kind: CUDAAccelerator of lightning.pytorch or of lightning.fabric.
    """

    class HostAccelerator(kind):  # type: ignore[misc]
        def setup_device(self, device: torch.device) -> None:
            """Nothing to do."""

        def setup(self, trainer: Any) -> None:
            """Nothing to do."""

        def teardown(self) -> None:
            """Nothing to do."""

        @staticmethod
        def parse_devices(devices: Any) -> Any:
            return devices

        @staticmethod
        def get_parallel_devices(devices: Any) -> list[torch.device]:
            return [torch.device("cpu", index) for index in range(int(devices))]

        @staticmethod
        def auto_device_count() -> int:
            return 1

        @staticmethod
        def is_available() -> bool:
            return True

        def get_device_stats(self, device: Any) -> dict[str, Any]:
            return {}

    return HostAccelerator()


def _deepspeed(stage: int) -> dict[str, Any]:
    config = tiny.zero(stage, gradient_clipping=1.0, train_micro_batch_size_per_gpu=2)
    return {key: value for key, value in config.items() if value != "auto"}


def _lit(losses: list[float]) -> Any:
    import lightning

    class Lit(lightning.LightningModule):
        def configure_model(self) -> None:
            if not hasattr(self, "inner"):
                self.inner = tiny.model()

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            loss = self.inner(**batch).loss
            mean = self.all_gather(loss.detach()).mean()
            losses.append(mean.item())
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    return Lit()


def _trainer(stage: int | None, epochs: int) -> Any:
    import lightning
    from lightning.pytorch.accelerators import CUDAAccelerator
    from lightning.pytorch.plugins.environments import TorchElasticEnvironment
    from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy

    ours = stage is not None
    # With the config that Lightning makes of its own arguments.
    strategy: Any = DeepSpeedStrategy(stage=stage, logging_batch_size_per_gpu=2) if ours else DDPStrategy()
    return lightning.Trainer(
        accelerator=_host_as_cuda(CUDAAccelerator) if ours else "cpu",
        devices=2,
        strategy=strategy,
        plugins=[TorchElasticEnvironment()],
        max_epochs=epochs,
        gradient_clip_val=1.0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )


def _trained(folder: str, stage: int | None) -> list[float]:
    """Two epochs; with DeepSpeed the second goes on from what was saved after the first."""
    losses: list[float] = []
    with tiny.fresh():
        trainer = _trainer(stage, 2 if stage is None else 1)
        trainer.fit(_lit(losses), _loader(STEPS // 2))
        if stage is not None:
            trainer.save_checkpoint(f"{folder}/saved")
    if stage is not None:
        with tiny.fresh():
            _trainer(stage, 2).fit(_lit(losses), _loader(STEPS // 2), ckpt_path=f"{folder}/saved")
    return losses


@pytest.mark.parametrize("stage", [2, 3])
def test_lightning(ranks: Ranks, tmp_path: Path, stage: int) -> None:
    close(ranks(2, _trained, str(tmp_path), stage)[0], ranks(2, _trained, str(tmp_path), None)[0])


def _fabric(stage: int | None, folder: str) -> tuple[list[float], list[float]]:
    """Losses of some steps, and of the last two again after loading what was saved before them."""
    from lightning.fabric import Fabric
    from lightning.fabric.accelerators import CUDAAccelerator
    from lightning.fabric.plugins.environments import TorchElasticEnvironment
    from lightning.fabric.strategies import DDPStrategy, DeepSpeedStrategy

    with tiny.fresh():
        strategy: Any = DDPStrategy() if stage is None else DeepSpeedStrategy(config=_deepspeed(stage))
        accelerator: Any = "cpu" if stage is None else _host_as_cuda(CUDAAccelerator)
        plugins = [TorchElasticEnvironment()]
        fabric = Fabric(accelerator=accelerator, devices=2, strategy=strategy, plugins=plugins)
        fabric.launch()
        with fabric.init_module():
            model = tiny.model()
        model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
        batches = list(fabric.setup_dataloaders(_loader(STEPS)))

        def run(some: Any) -> list[float]:
            losses = []
            for batch in some:
                loss = model(**batch).loss
                fabric.backward(loss)
                if stage is None:
                    fabric.clip_gradients(model, optimizer, max_norm=1.0)
                optimizer.step()
                optimizer.zero_grad()
                losses.append(fabric.all_gather(loss.detach()).mean().item())
            return losses

        losses = run(batches[:2])
        state = {"model": model, "optimizer": optimizer, "step": 2}
        fabric.save(f"{folder}/saved", state)
        losses += run(batches[2:])
        fabric.load(f"{folder}/saved", state)
        return losses, run(batches[2:])


@pytest.mark.parametrize("stage", [2, 3])
def test_fabric(ranks: Ranks, tmp_path: Path, stage: int) -> None:
    losses, again = ranks(2, _fabric, stage, str(tmp_path))[0]
    close(losses, ranks(2, _fabric, None, str(tmp_path / "plain"))[0][0])
    assert again == losses[2:]
