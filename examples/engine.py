"""The training loop that train_hta.py and train_vtab1k.py share, from a recipe to a result."""

from __future__ import annotations

import argparse
import logging
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, broadcast_object_list, set_seed
from epochs import batch_function, evaluate, per_step_batch, train_epoch
from images import Normalise, Order, build_data, build_loader
from methods import METHODS, SVP_METHODS, apply_method, load_trained, save_trained
from recipes import METHOD_LR, Recipe, paper_faithful
from run_folder import (
    append_metrics,
    claim,
    cut_metrics,
    disk,
    latest_checkpoint,
    load_checkpoint,
    result_of,
    save_checkpoint,
    write_json,
)
from splits import DataError, Splits
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import DataLoader

import svp_peft as sp

logger = logging.getLogger(__name__)


def new_parser(description: str, datasets: list[str]) -> argparse.ArgumentParser:
    """The options of both scripts; those that default to None take the recipe's value."""
    parser = argparse.ArgumentParser(
        description=f"{description} What is left out is taken from recipes.py."
    )
    add = parser.add_argument
    count, share = _number(int, 1), _number(float, 0.0, 1.0)
    add("--dataset", choices=[*datasets, "all"], required=True, help="all: one after the other")
    add("--data-root", type=Path, required=True, help="the folder with all data sets")
    add("--output", type=Path, default=Path("runs"), help="folder for the runs: %(default)s")
    add("--backbone", default="hustvl/Vim-small-midclstok", help="Hub id, folder or file")
    add("--method", choices=METHODS, default="svp", help="what is trained: %(default)s")
    add("--seeds", type=_number(int, 0, 2**32 - 1), nargs="+", help="one run for each")
    add("--recipe", choices=["reference", "paper"], default="reference", help="see recipes.QUIRKS")
    add("--select", choices=["val", "test", "last"], help="what chooses the epoch")
    add("--lr", type=_number(float, 0.0), help="learning rate in use, not scaled by the batch")
    add("--epochs", type=count)
    add("--batch-size", type=count, help="of all processes and accumulated steps")
    add("--accumulate", type=count, default=1, help="steps whose gradients add up to one batch")
    add("--cross-group-size", type=count, help="blocks that share a cross prompter")
    add("--inner-bottleneck", type=count, help="width of the inner prompters")
    add("--mixed-precision", choices=["no", "bf16", "fp16"], default="no")
    add("--ema", type=share, help="decay of a moving average; the released code uses 0.99996")
    add("--workers", type=_number(int, 0), default=min(16, os.cpu_count() or 1), help="per process")
    add("--checkpoint-seconds", type=_number(float, 0.0), default=60, help="between checkpoints")
    add("--steps", type=count, help="end every epoch after so many, to try things out")
    add("--cpu", action="store_true", help="do not use a GPU")
    return parser


def _number(kind: type, low: float, high: float = math.inf) -> Callable[[str], Any]:
    """A type for argparse: a finite number from `low` to `high`."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not low <= value <= high or not math.isfinite(value):
            limits = f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
            raise argparse.ArgumentTypeError(f"{text} is not a number of {limits}")
        return value

    parse.__name__ = kind.__name__
    return parse


def chosen_recipe(row: Recipe, options: argparse.Namespace) -> Recipe:
    """The row of recipes.py with what the command line changes."""
    if options.recipe == "paper":
        row = paper_faithful(row)
    changes = {
        name: getattr(options, name)
        for name in ("select", "epochs", "batch_size", "cross_group_size", "inner_bottleneck")
        if getattr(options, name) is not None
    }
    # the base rate, not the one in use, belongs to a batch of 512
    return replace(row, **changes)


def new_accelerator(options: argparse.Namespace) -> Accelerator:
    # every epoch is cut to whole batches, so accumulation never spans two of them
    accumulation = GradientAccumulationPlugin(options.accumulate, sync_with_dataloader=False)
    return Accelerator(
        cpu=options.cpu,
        mixed_precision=options.mixed_precision,
        gradient_accumulation_plugin=accumulation,
    )


def run_suite(
    rows: dict[str, Recipe],
    load: Callable[[str, Recipe], Splits],
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Every data set and seed that the options ask for; complete runs are not repeated.

    Raises:
        DataError: data sets cannot be used. Of "all", the others were run.
    """
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO)
    accelerator = new_accelerator(options)
    results: list[dict[str, Any]] = []
    left_out = []
    for dataset in rows if options.dataset == "all" else [options.dataset]:
        recipe = chosen_recipe(rows[dataset], options)
        try:
            results += run_seeds(accelerator, dataset, recipe, load, options)
        except DataError as error:
            # the other processes may not have met the same file
            if options.dataset != "all" or accelerator.num_processes > 1:
                raise
            left_out.append(dataset)
            logger.error("%s is left out: %s", dataset, error)
            accelerator.free_memory()
    # together: a process must not take down its connections while another still uses them
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if left_out:
        raise DataError(
            f"{len(left_out)} of {len(rows)} data sets left out, for the reasons above: "
            f"{', '.join(left_out)}. Put them right and run the same command again: it runs what "
            "is missing."
        )
    return results


def run_seeds(
    accelerator: Accelerator,
    dataset: str,
    recipe: Recipe,
    load: Callable[[str, Recipe], Splits],
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Every seed of one data set."""
    results = []
    splits = None
    for seed in options.seeds or [recipe.seed]:
        folder = options.output / dataset / options.method / f"seed{seed}"
        if accelerator.is_main_process:
            claim(folder, settings_of(accelerator, recipe, options, seed))
        accelerator.wait_for_everyone()
        result = result_of(folder)
        if result is None:
            # one process downloads, the others find the files
            with accelerator.local_main_process_first():
                splits = splits or load(dataset, recipe)
            if splits.num_classes != recipe.num_classes:
                logger.warning(
                    "%s: %d classes found, the whole data set has %d",
                    dataset,
                    splits.num_classes,
                    recipe.num_classes,
                )
            result = run(accelerator, folder, splits, recipe, options, seed)
        results.append(result)
        if accelerator.is_main_process:
            print(
                f"{dataset:<20} {options.method:<12} seed {seed}  "
                f"test accuracy {result['test_accuracy']:.2%}  "
                f"trained {result['trained_parameters']:,}  {folder}",
                flush=True,
            )
    return results


def lr_of(recipe: Recipe, options: argparse.Namespace) -> float:
    return METHOD_LR.get(options.method, recipe.lr) if options.lr is None else options.lr


def variant_of(options: argparse.Namespace) -> str:
    """What the command line makes of the method; "" for the recipe's own."""
    named = (("group size", options.cross_group_size), ("bottleneck", options.inner_bottleneck))
    return ", ".join(f"{name} {value}" for name, value in named if value is not None)


def settings_of(
    accelerator: Accelerator, recipe: Recipe, options: argparse.Namespace, seed: int
) -> dict[str, Any]:
    """What must be the same when a run is resumed."""
    return {
        "recipe": asdict(recipe),
        "method": options.method,
        "seed": seed,
        "lr": lr_of(recipe, options),
        "backbone": str(options.backbone),
        "mixed_precision": options.mixed_precision,
        "processes": accelerator.num_processes,
        "accumulate": options.accumulate,
        "steps": options.steps,
        "ema": options.ema,
    }


def run(
    accelerator: Accelerator,
    folder: Path,
    splits: Splits,
    recipe: Recipe,
    options: argparse.Namespace,
    seed: int,
) -> dict[str, Any]:
    """Train one method on one data set with one seed, or go on where a stopped run was.

    Returns:
        What is in result.json.

    Raises:
        RunError: the folder is another run's, the disk is full, the loss is not finite, ...
    """
    lr = lr_of(recipe, options)
    data = {
        name: {"images": len(split), "fingerprint": split.fingerprint()}
        for name, split in (("train", splits.train), ("test", splits.test))
    }
    if accelerator.is_main_process:
        claim(folder, data)
    accelerator.wait_for_everyone()

    set_seed(seed)
    model = sp.load_vim(
        options.backbone, num_classes=splits.num_classes, drop_path_rate=recipe.drop_path
    )
    apply_method(
        model,
        options.method,
        cross_group_size=recipe.cross_group_size,
        inner_bottleneck=recipe.inner_bottleneck,
        simam_input=recipe.simam_input and options.method in SVP_METHODS,
        factorised_head=recipe.factorised_head,
    )
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    head = sum(p.numel() for p in model.head.parameters())

    device = accelerator.device
    # before the moving average copies it
    model.to(device)
    rank, world = accelerator.process_index, accelerator.num_processes
    size = model.img_size[0]
    batch = per_step_batch(recipe, world * options.accumulate, len(splits.train))
    order = Order(len(splits.train), seed, rank, world)
    train_data = build_data(splits.train, recipe.augment, size, device, training=True)
    train_loader = build_loader(train_data, order, batch, options.workers, drop_last=True)
    # an epoch is a whole number of batches for every process
    steps = len(splits.train) // recipe.batch_size * options.accumulate
    steps = steps if options.steps is None else min(steps, options.steps)

    def eval_loader(split) -> DataLoader:
        data = build_data(split, recipe.augment, size, device, training=False)
        return build_loader(
            data,
            Order(len(split), None, rank, world),
            batch * 3 // 2,
            options.workers,
            drop_last=False,
        )

    chooser = {"val": splits.val, "test": splits.test, "last": None}[recipe.select]
    chooser_loader = eval_loader(chooser) if chooser else None

    optimizer = create_optimizer_v2(
        model, opt="adamw", lr=lr, weight_decay=recipe.weight_decay, eps=1e-8
    )
    schedule = CosineLRScheduler(
        optimizer,
        t_initial=recipe.epochs,
        lr_min=min(recipe.min_lr, lr),
        warmup_t=min(recipe.warmup_epochs, recipe.epochs // 2),
        warmup_lr_init=min(recipe.warmup_lr, lr),
    )
    ema = ModelEmaV3(model, decay=options.ema) if options.ema else None
    model, optimizer = accelerator.prepare(model, optimizer)
    plain = accelerator.unwrap_model(model)

    progress: dict[str, Any] = {"epochs_done": 0, "seconds": 0.0, "best": None}
    checkpoint = latest_checkpoint(folder)
    if checkpoint:
        progress = load_checkpoint(accelerator, plain, folder, checkpoint)
        if ema:
            ema.load_state_dict(torch.load(checkpoint / "ema.pt", map_location=device))
        logger.info("%s: going on after epoch %d", folder, progress["epochs_done"])
    if accelerator.is_main_process:
        cut_metrics(folder, progress["epochs_done"])
    writer = _tensorboard(folder, progress["epochs_done"]) if accelerator.is_main_process else None
    normalise = Normalise(device, recipe.erase if recipe.augment == "reference" else 0.0)
    evaluation_normalise = Normalise(device)
    prepare_batch = batch_function(recipe, splits.num_classes, normalise)

    last_checkpoint = time.monotonic()
    for epoch in range(progress["epochs_done"], recipe.epochs):
        # all randomness of an epoch follows from (seed, epoch, process), so a resumed run draws
        # what the uninterrupted one drew
        set_seed((seed * 1_000_003 + epoch * 1_009 + rank) % 2**32)
        order.epoch = epoch
        schedule.step(max(epoch - recipe.schedule_lag, 0))
        row = {"epoch": epoch, "lr": optimizer.param_groups[0]["lr"]}
        row |= train_epoch(
            accelerator, model, optimizer, train_loader, prepare_batch, steps, recipe, epoch, ema
        )
        if chooser_loader:
            accuracy = evaluate(accelerator, model, chooser_loader, evaluation_normalise)
            row[f"{recipe.select}_accuracy"] = accuracy
            if progress["best"] is None or accuracy > progress["best"]["accuracy"]:
                progress["best"] = {"epoch": epoch, "accuracy": accuracy}
                _save(accelerator, plain, options.method, folder / "best")
        progress["epochs_done"] = epoch + 1
        progress["seconds"] += row["seconds"]
        if accelerator.is_main_process:
            append_metrics(folder, row)
            for name, value in row.items() if writer else ():
                writer.add_scalar(name, value, epoch)
        # all processes take part in a checkpoint, and each has a clock of its own
        due = [time.monotonic() - last_checkpoint >= options.checkpoint_seconds]
        broadcast_object_list(due)
        if due[0] or epoch == recipe.epochs - 1:
            _save(accelerator, plain, options.method, folder / "last")
            extra = {"ema.pt": ema.state_dict()} if ema else {}
            save_checkpoint(accelerator, plain, folder, epoch, progress, extra)
            last_checkpoint = time.monotonic()

    test_loader = chooser_loader if recipe.select == "test" else eval_loader(splits.test)
    last_accuracy = evaluate(accelerator, model, test_loader, evaluation_normalise)
    if progress["best"] is None:
        progress["best"] = {"epoch": recipe.epochs - 1, "accuracy": None}
        if accelerator.is_main_process:
            shutil.copytree(folder / "last", folder / "best", dirs_exist_ok=True)
    accelerator.wait_for_everyone()
    load_trained(plain, options.method, folder / "best")
    result = {
        "dataset": recipe.dataset,
        "method": options.method,
        "variant": variant_of(options),
        "seed": seed,
        "select": recipe.select,
        "lr": lr,
        "trained_parameters": trained,
        "head_parameters": head,
        "best_epoch": progress["best"]["epoch"],
        "val_accuracy": progress["best"]["accuracy"] if recipe.select == "val" else None,
        "test_accuracy": evaluate(accelerator, model, test_loader, evaluation_normalise),
        "last_test_accuracy": last_accuracy,
        "seconds": progress["seconds"],
        "svp_peft": sp.__version__,
    }
    if ema:
        result["ema_test_accuracy"] = evaluate(
            accelerator, ema.module, test_loader, evaluation_normalise
        )
    if accelerator.is_main_process:
        write_json(folder / "result.json", result)
    if writer:
        writer.close()
    accelerator.free_memory()
    return result


def _save(accelerator: Accelerator, model: nn.Module, method: str, folder: Path) -> None:
    if accelerator.is_main_process:
        with disk(folder):
            save_trained(model, method, folder)


def _tensorboard(folder: Path, epochs_done: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        logger.warning("tensorboard is not installed: metrics.jsonl has the same numbers")
        return None
    # a resumed run writes the epochs after its checkpoint again
    return SummaryWriter(str(folder / "tensorboard"), purge_step=epochs_done)
