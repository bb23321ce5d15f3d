"""Train a ResNet on ImageNet, or on any folder of images, with fused layers.

    python examples/train_imagenet.py DATA                                    # one process; DATA/train and DATA/val
    torchrun --nproc-per-node=8 examples/train_imagenet.py DATA --amp bf16    # one process per GPU
    torchrun --nproc-per-node=2 examples/train_imagenet.py DATA               # without a GPU: over gloo

DATA/train and DATA/val have one folder of images per class (`torchvision.datasets.ImageFolder`).

The recipe: SGD with Nesterov momentum, a learning rate per 256 images with linear warm-up (Goyal et al. 2017,
arXiv:1706.02677) and a cosine to zero (Loshchilov & Hutter 2017, arXiv:1608.03983), label smoothing (Szegedy et al.
2016, arXiv:1512.00567), no weight decay for biases and batch norms (He et al. 2019, arXiv:1812.01187), an exponential
moving average of the weights, channels_last, and automatic mixed precision.

A killed run resumes from its last checkpoint when the same command is given again, and ends with the same weights, bit
for bit, as an uninterrupted one: checkpoints hold model, average, optimizer, schedule, loss scale, position in the
epoch, and every process's random state; and the augmentation of a sample depends only on the seed, the epoch and the
sample.  (With three or more processes, or kernels that are not deterministic, sums may be taken in another order.)  So
torchrun can survive the loss of a process:

    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --max-restarts=3 --nproc-per-node=8 examples/train_imagenet.py DATA

(Without that variable torch 2.11 may give restarted processes the addresses of those that are gone.)
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torchvision
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import resfuse

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
AMP_DTYPES = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}
# Options that a resumed run cannot change.
FIXED = ("model", "batch_size", "epochs", "warmup_epochs", "seed", "amp", "sync_bn", "image_size")


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with train/ and val/, each with one folder per class")
    parser.add_argument("--output", type=Path, default=Path("out/imagenet"), help="for checkpoints and log.csv")
    parser.add_argument("--model", default="resnet50", help="a classification model of torchvision")
    parser.add_argument("--epochs", type=int, default=90)
    parser.add_argument("--batch-size", type=int, default=64, help="per process")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--lr", type=float, default=0.1, help="learning rate per 256 images in a step")
    parser.add_argument("--warmup-epochs", type=float, default=5)
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--weight-decay", type=float, default=5e-5)
    parser.add_argument("--label-smoothing", type=float, default=0.1)
    parser.add_argument("--ema-decay", type=float, default=0.9999)
    parser.add_argument("--amp", choices=AMP_DTYPES, default="none")
    parser.add_argument("--sync-bn", action="store_true", help="batch statistics over all processes")
    parser.add_argument("--no-fuse", action="store_true", help="PyTorch's own layers, for comparison")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    parser.add_argument("--workers", type=int, default=4, help="processes that load images, per training process")
    parser.add_argument("--save-every", type=int, default=500, help="steps between checkpoints within an epoch")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    for name in ("epochs", "batch_size", "image_size", "save_every"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(options, name)}")
    for part in ("train", "val"):
        if not (options.data / part).is_dir():
            parser.error(f"data: expected a folder {options.data / part}, which does not exist")
    if options.model not in torchvision.models.list_models():
        parser.error(f"--model: expected the name of a model of torchvision, got {options.model!r}")
    return options


class Processes:
    """The processes that train together: those of torchrun, or this one alone."""

    def __init__(self) -> None:
        self.distributed = "RANK" in os.environ
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self.device.type == "cuda":
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(self.device)
        if self.distributed:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        self.rank = dist.get_rank() if self.distributed else 0
        self.count = dist.get_world_size() if self.distributed else 1

    def sum(self, tensor: Tensor) -> Tensor:
        if self.distributed:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, on each of them."""
        values = [value] * self.count
        if self.distributed:
            dist.all_gather_object(values, value)
        return values

    def share_buffers(self, model: nn.Module) -> None:
        """Copy the first process's running statistics to all, before evaluation."""
        for buffer in model.buffers() if self.distributed else ():
            dist.broadcast(buffer, 0)

    def close(self) -> None:
        if self.distributed:
            dist.barrier()  # gloo (torch 2.11) hangs if it is destroyed while it releases a collective's tensors
            dist.destroy_process_group()


# Data


class SampleSeeded(Dataset[tuple[Tensor, int]]):
    """A dataset whose random transforms depend only on the seed, the epoch and the sample.

    Its keys are (epoch, index).
    """

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = key
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(hash((self.seed, epoch, index)))
            return self.dataset[index]


class ResumableSampler(DistributedSampler[tuple[int, int]]):
    """A seeded permutation per epoch; yields (epoch, index), from a given position on."""

    start = 0

    def __iter__(self) -> Iterator[Any]:
        return ((self.epoch, index) for index in list(super().__iter__())[self.start :])

    def __len__(self) -> int:
        return self.num_samples - self.start


def images_in(folder: Path, *augmentation: nn.Module) -> ImageFolder:
    """Normalised images of one size."""
    to_float = (v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, DEVIATION))
    return ImageFolder(str(folder), v2.Compose([*augmentation, *to_float]))


def train_loader(options: argparse.Namespace, processes: Processes) -> tuple[DataLoader[Any], ResumableSampler]:
    crop = v2.RandomResizedCrop(options.image_size, antialias=True)
    images = images_in(options.data / "train", crop, v2.RandomHorizontalFlip())
    sampler = ResumableSampler(images, processes.count, processes.rank, seed=options.seed, drop_last=True)
    if sampler.num_samples < options.batch_size:
        raise SystemExit(
            f"--batch-size: expected at most {sampler.num_samples}, the images per process, got {options.batch_size}"
        )
    dataset = SampleSeeded(images, options.seed)
    return _loader(dataset, options, processes, sampler=sampler, drop_last=True), sampler


def val_loader(options: argparse.Namespace, processes: Processes) -> DataLoader[Any]:
    enlarged = v2.Resize(round(options.image_size * 256 / 224), antialias=True)
    images = images_in(options.data / "val", enlarged, v2.CenterCrop(options.image_size))
    return _loader(Subset(images, range(processes.rank, len(images), processes.count)), options, processes)


def _loader(dataset: Any, options: argparse.Namespace, processes: Processes, **extra: Any) -> DataLoader[Any]:
    return DataLoader(
        dataset,
        options.batch_size,
        num_workers=options.workers,
        persistent_workers=options.workers > 0,
        pin_memory=processes.device.type == "cuda",
        generator=torch.Generator(),  # its own: starting a loader must not advance the global one
        **extra,
    )


# Model, optimizer and state


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for the weights of convolutions and of the classifier only."""
    decayed, others = [], []
    for name, parameter in model.named_parameters():
        (others if name.endswith("bias") or parameter.dim() == 1 else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def learning_rate(step: int, warmup: int, total: int) -> float:
    """The fraction of the peak learning rate at a step: linear warm-up, then a cosine to zero."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup)))) / 2


class Training:
    """Everything that a checkpoint holds, and one step of it."""

    def __init__(self, options: argparse.Namespace, processes: Processes, classes: int, steps_per_epoch: int) -> None:
        self.options, self.processes = options, processes
        torch.manual_seed(options.seed)  # the same weights everywhere
        device = processes.device
        self.model = torchvision.models.get_model(options.model, weights=None, num_classes=classes).to(device)
        self.report = None if options.no_fuse else resfuse.fuse_(self.model)
        self.model.to(memory_format=torch.channels_last)
        # DDP rejects SyncBatchNorm on a CPU; resfuse runs it there, so convert after wrapping.
        late_conversion = options.sync_bn and device.type == "cpu"
        if options.sync_bn and not late_conversion:
            nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        self.ema = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(options.ema_decay))
        self.wrapped: nn.Module = self.model
        if options.compile:
            self.model.compile()
        if processes.distributed:
            ids = [device] if device.type == "cuda" else None
            self.wrapped = DistributedDataParallel(self.model, device_ids=ids)
        if late_conversion:
            nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        lr = options.lr * options.batch_size * processes.count / 256
        groups = parameter_groups(self.model, options.weight_decay)
        self.optimizer = torch.optim.SGD(groups, lr, options.momentum, nesterov=options.momentum > 0)
        warmup, total = round(options.warmup_epochs * steps_per_epoch), options.epochs * steps_per_epoch
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: learning_rate(step, warmup, total)
        )
        self.amp_dtype = AMP_DTYPES[options.amp]
        self.scaler = torch.amp.GradScaler(device.type, init_scale=2.0**12, enabled=options.amp == "fp16")
        self.loss = nn.CrossEntropyLoss(label_smoothing=options.label_smoothing)
        random.seed(options.seed + processes.rank)
        torch.manual_seed(options.seed + processes.rank)
        self.epoch = self.step_in_epoch = 0
        self.totals = torch.zeros(3, dtype=torch.float64, device=device)  # of loss, of right answers, of images
        self.history: list[dict[str, float]] = []

    def step(self, images: Tensor, targets: Tensor) -> Tensor:
        """One step of the optimizer; returns the loss of this process's images."""
        images, targets = to_device(self.processes.device, images, targets)
        with autocast(self.processes.device, self.amp_dtype):
            logits = self.wrapped(images)
        loss = self.loss(logits.float(), targets)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        self.ema.update_parameters(self.model)
        self.step_in_epoch += 1
        right = (logits.detach().argmax(1) == targets).sum()
        self.totals += torch.stack(
            (loss.detach().double() * len(targets), right.double(), right.new_tensor(len(targets)))
        )
        return loss.detach()

    def state(self) -> dict[str, Any]:
        """The contents of a checkpoint.  All processes must call it."""
        return {
            "options": {name: getattr(self.options, name) for name in FIXED},
            "processes": self.processes.count,
            "epoch": self.epoch,
            "step_in_epoch": self.step_in_epoch,
            "history": self.history,
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "of_each_process": self.processes.gather((random_state(self.processes.device), self.totals.cpu())),
        }

    def load(self, path: Path) -> None:
        """Resume from a checkpoint.

        Raises:
            SystemExit: it belongs to a run with other options, or with another number of processes.
        """
        state = torch.load(path, map_location=self.processes.device, weights_only=True)
        mine = {name: getattr(self.options, name) for name in FIXED} | {"processes": self.processes.count}
        theirs = state["options"] | {"processes": state["processes"]}
        for name, value in mine.items():
            if theirs[name] != value:
                raise SystemExit(
                    f"{path}: is of a run with {name} {theirs[name]!r}, not {value!r}; choose another --output"
                )
        self.epoch, self.step_in_epoch = state["epoch"], state["step_in_epoch"]
        self.history = state["history"]
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        random_numbers, totals = state["of_each_process"][self.processes.rank]
        set_random_state(random_numbers, self.processes.device)
        self.totals.copy_(totals)


def to_device(device: torch.device, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    images = images.to(device, non_blocking=True, memory_format=torch.channels_last)
    return images, targets.to(device, non_blocking=True)


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)


def random_state(device: torch.device) -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {"python": random.getstate(), "torch": torch.get_rng_state(), "cuda": cuda}


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"].cpu())
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


def write(value: Any, path: Path) -> None:
    """Save atomically: a process that is killed here leaves the previous file."""
    partial = path.with_suffix(".partial")
    torch.save(value, partial)
    os.replace(partial, path)


# The run


@torch.inference_mode()
def evaluate(model: nn.Module, loader: DataLoader[Any], training: Training) -> tuple[float, float, float]:
    """(loss, top-1, top-5) over the validation images of all processes."""
    processes = training.processes
    processes.share_buffers(model)
    model.eval()
    totals = torch.zeros(4, dtype=torch.float64, device=processes.device)
    for images, targets in loader:
        images, targets = to_device(processes.device, images, targets)
        with autocast(processes.device, training.amp_dtype):
            logits = model(images).float()
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices == targets[:, None]
        loss = nn.functional.cross_entropy(logits, targets, reduction="sum")
        totals += torch.stack([loss, best[:, 0].sum(), best.sum(), targets.new_tensor(len(targets))]).double()
    model.train()
    loss_sum, first, five, count = processes.sum(totals).tolist()
    return loss_sum / count, first / count, five / count


def progress_bar(console: Console, visible: bool) -> Progress:
    columns = (
        TextColumn("epoch {task.fields[epoch]}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  lr {task.fields[lr]:.4f}  {task.fields[speed]:.0f} img/s"),
        TimeRemainingColumn(),
    )  # fmt: skip
    return Progress(*columns, console=console, disable=not visible)


def train_epoch(training: Training, loader: DataLoader[Any], sampler: ResumableSampler, console: Console) -> None:
    """Train the rest of an epoch, with a checkpoint every `save_every` steps."""
    options, processes = training.options, training.processes
    sampler.set_epoch(training.epoch)
    sampler.start = training.step_in_epoch * options.batch_size
    steps = sampler.num_samples // options.batch_size
    checkpoint = options.output / "checkpoint.pt"
    training.wrapped.train()
    begin, done = time.perf_counter(), 0
    with progress_bar(console, processes.rank == 0) as progress:
        task = progress.add_task(
            "", total=steps, completed=training.step_in_epoch, epoch=training.epoch + 1, loss=0.0, lr=0.0, speed=0.0
        )
        for images, targets in loader:
            loss = training.step(images, targets)
            done += len(targets) * processes.count
            if training.step_in_epoch % 10 == 0 or training.step_in_epoch == steps:
                value = loss.item()
                if not math.isfinite(value):
                    raise SystemExit(
                        f"the loss is {value} in step {training.step_in_epoch} of epoch {training.epoch + 1}"
                    )
                speed = done / (time.perf_counter() - begin)
                lr = training.scheduler.get_last_lr()[0]
                progress.update(task, completed=training.step_in_epoch, loss=value, lr=lr, speed=speed)
            if training.step_in_epoch % options.save_every == 0 and training.step_in_epoch < steps:
                state = training.state()
                if processes.rank == 0:
                    write(state, checkpoint)
    sampler.start = 0


def finish_epoch(training: Training, val: DataLoader[Any], seconds: float, console: Console) -> None:
    """Evaluate, log, and save."""
    options, processes = training.options, training.processes
    lr = training.scheduler.get_last_lr()[0]
    loss_sum, right, count = processes.sum(training.totals.clone()).tolist()
    val_loss, top1, top5 = evaluate(training.model, val, training)
    ema_loss, ema_top1, ema_top5 = evaluate(training.ema, val, training)
    training.epoch, training.step_in_epoch = training.epoch + 1, 0
    training.totals.zero_()
    row = {
        "epoch": training.epoch, "lr": lr, "train_loss": loss_sum / count, "train_top1": right / count,
        "val_loss": val_loss, "top1": top1, "top5": top5,
        "ema_loss": ema_loss, "ema_top1": ema_top1, "ema_top5": ema_top5, "seconds": seconds,
    }  # fmt: skip
    training.history.append(row)
    state = training.state()
    if processes.rank != 0:
        return
    write(state, options.output / "checkpoint.pt")
    with open(options.output / "log.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        writer.writeheader()
        writer.writerows(training.history)
    console.print(", ".join(f"{name} {value:.4g}" for name, value in row.items()))


def main(argv: list[str] | None = None) -> None:
    options = arguments(argv)
    processes = Processes()
    console = Console(quiet=processes.rank != 0)
    options.output.mkdir(parents=True, exist_ok=True)
    loader, sampler = train_loader(options, processes)
    val = val_loader(options, processes)
    classes = len(sampler.dataset.classes)  # type: ignore[attr-defined]
    training = Training(options, processes, classes, sampler.num_samples // options.batch_size)
    console.print(f"{options.model} on {processes.count} x {processes.device.type}, {classes} classes")
    if training.report is not None:
        console.print(f"{training.report.fused_ops} fused operations in {len(training.report.fused)} modules")
    checkpoint = options.output / "checkpoint.pt"
    if checkpoint.exists():
        training.load(checkpoint)
        console.print(f"resuming epoch {training.epoch + 1} after step {training.step_in_epoch}, from {checkpoint}")
    while training.epoch < options.epochs:
        begin = time.perf_counter()
        train_epoch(training, loader, sampler, console)
        finish_epoch(training, val, time.perf_counter() - begin, console)
    if processes.rank == 0:
        write(training.model.state_dict(), options.output / "model.pt")
        write(training.ema.module.state_dict(), options.output / "ema.pt")
    processes.close()


if __name__ == "__main__":
    main()
