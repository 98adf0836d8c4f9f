"""D4RT under Lightning: the module that trains it, and the data module that feeds it."""

from typing import Literal

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from fourdperf.data.queries import Clip
from fourdperf.models.d4rt import D4RT, Prediction
from fourdperf.train.d4rt_loss import Weights, d4rt_loss, mean_depth
from fourdperf.train.data import collate, loader, stream_loader
from fourdperf.train.module import ModelTraining, val_batches
from fourdperf.train.muon import MuonAdamW
from fourdperf.train.schedule import adamw

__all__ = ["ClipData", "D4RTTraining"]


class D4RTTraining(ModelTraining):
    """One D4RT model, its losses and its optimiser; batches are `Clip`s with a leading axis.

    model: the network. max_steps: where the learning rate reaches `final_lr`. clip: the gradient's largest L2 norm.
    optimizer: "adamw" as in the paper, or "muon" (`fourdperf.train.muon`), for small models and few steps.
    seed: of what is random in a step: batch n of process r starts from a seed of its own, so that a resumed run
    repeats an uninterrupted one.
    """

    def __init__(
        self,
        model: D4RT,
        max_steps: int,
        *,
        lr: float = 1e-4,
        final_lr: float = 1e-6,
        warmup_steps: int = 2500,
        weight_decay: float = 0.03,
        optimizer: Literal["adamw", "muon"] = "adamw",
        clip: float = 10.0,
        weights: Weights | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.model = model
        self.max_steps, self.lr, self.final_lr, self.warmup_steps = max_steps, lr, final_lr, warmup_steps
        self.weight_decay, self.clip, self.seed = weight_decay, clip, seed
        self.optimizer = optimizer
        self.weights = weights or Weights()
        self.sharded = False

    def configure_model(self) -> None:
        """Under FSDP every block's parameters are sharded over the processes (torch's fully_shard)."""
        mesh = self.device_mesh
        if mesh is None or self.sharded:
            return
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        for block in (*self.model.encoder.layers, *self.model.decoder.blocks):
            fully_shard(block, mesh=mesh["data_parallel"])
        for block in self.model.decoder.blocks:
            register_fsdp_forward_method(block, "prepare")
        fully_shard(self.model, mesh=mesh["data_parallel"])
        self.sharded = True

    def forward(self, batch: Clip) -> Prediction:
        return self.model(batch.video, batch.queries, batch.aspect_ratio, batch.patch_video)

    def on_train_batch_start(self, batch: Clip, batch_idx: int) -> None:
        self.seed_batch(batch_idx)

    def training_step(self, batch: Clip, batch_idx: int) -> Tensor:
        terms = d4rt_loss(self(batch), batch.targets, self.weights)
        self.log_dict({f"train/{name}": value.detach() for name, value in terms.items()}, batch_size=len(batch.video))
        return terms["loss"]

    def validation_step(self, batch: Clip, batch_idx: int) -> None:
        prediction = self(batch)
        terms = d4rt_loss(prediction, batch.targets, self.weights) | quick_metrics(prediction, batch)
        self.log_validation(terms, len(batch.video))

    def configure_optimizers(self) -> dict:
        moved, make = (self.model, MuonAdamW) if self.optimizer == "muon" else (self.parameters(), adamw)
        optimizer = make(moved, self.lr, self.weight_decay)
        return self.scheduled(optimizer)

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        norm = torch.nn.utils.clip_grad_norm_(self.parameters(), self.clip)
        norm = norm.full_tensor() if self.sharded else norm
        self.log_norm(norm)


def quick_metrics(prediction: Prediction, batch: Clip) -> dict[str, Tensor]:
    """Of the queries as they come: share of right visibilities, and the mean distance |x / d - x' / d'| of points in
    mean depths of their clip."""
    targets = batch.targets
    known = targets.has_visibility
    right = (prediction.visibility > 0) == (targets.visibility > 0.5)
    valid = targets.has_xyz
    ours, true = (x / mean_depth(x, valid) for x in (prediction.xyz, targets.xyz))
    distance = torch.where(valid, (ours - true).norm(dim=-1), 0)
    return {
        "visibility_accuracy": (right & known).sum() / known.sum().clamp(min=1),
        "xyz_error": (distance.sum(1) / valid.sum(1).clamp(min=1)).mean(),
    }


class ClipData(LightningDataModule):
    """Clips for training and validation.

    train: endless, `train[number]` for any number (`fourdperf.train.data`), or a stream of shards, which has no exact
    place to go on from. val: finite.
    """

    def __init__(self, train: Dataset, val: Dataset | None, batch_size: int, workers: int = 0) -> None:
        super().__init__()
        self.train, self.val, self.batch_size, self.workers = train, val, batch_size, workers

    def train_dataloader(self) -> DataLoader:
        trainer = self.trainer
        if isinstance(self.train, IterableDataset):  # shards share themselves out
            return stream_loader(self.train, self.batch_size, self.workers)
        had = lambda: trainer.global_step * trainer.accumulate_grad_batches
        return loader(self.train, self.batch_size, self.workers, trainer.global_rank, trainer.world_size, had)

    def val_dataloader(self) -> DataLoader | list:
        if self.val is None:
            return []
        if isinstance(self.val, IterableDataset):
            # of a sharded model every process is needed in each pass
            if self.trainer.lightning_module.sharded and self.trainer.world_size > 1:
                wanted = "wanted a folder with --strategy fsdp"
                raise ValueError(f"--val_data_path: {wanted}; shards give processes different numbers of clips")
            return stream_loader(self.val, self.batch_size, self.workers)
        batches = val_batches(len(self.val), self.batch_size, self.trainer.global_rank, self.trainer.world_size)
        return DataLoader(self.val, batch_sampler=batches, collate_fn=collate, num_workers=self.workers)
