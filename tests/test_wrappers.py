"""A patched model inside what training and deployment put around it; DDP is in test_patch.py."""

import copy
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed import fsdp
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointWrapper,
    apply_activation_checkpointing,
)

from svp_peft.adapter_file import load_adapter, save_adapter
from svp_peft.adapters import disable_adapter, set_adapter
from svp_peft.config import SVPConfig
from svp_peft.patch import apply_svp, remove_svp
from svp_peft.vim import VisionMamba
from tests.lookalikes import MapBlock, SplitBlock, VimLike, VMambaLike

CONFIG = SVPConfig(inner_bottleneck=4, cross_group_size=2)


def randomised(model: nn.Module) -> nn.Module:
    apply_svp(model.eval(), CONFIG)
    with torch.no_grad():
        model.svp.alpha.normal_(std=0.5)
        model.svp.beta.normal_(std=0.5)
    return model


def built_in() -> nn.Module:
    return VisionMamba(img_size=16, patch_size=4, stride=4, embed_dim=16, depth=2, num_classes=5)


def test_data_parallel_gives_the_models_output():
    model = randomised(VimLike())
    images = torch.randn(4, 3, 16, 16)
    assert torch.equal(nn.DataParallel(model)(images), model(images))


def replica_of(model: nn.Module) -> nn.Module:
    """What nn.DataParallel runs on another GPU: shallow copies, with parameters of their own."""
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, twin in copies.items():
        for name, child in module._modules.items():
            if child is not None:
                setattr(twin, name, copies[child])
        for name, parameter in module._parameters.items():
            if parameter is not None:
                setattr(twin, name, parameter.detach().clone())
    return copies[model]


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = VimLike()

    def forward(self, images):
        return self.net(images)


@pytest.mark.parametrize("nested", [False, True])
def test_a_replica_of_data_parallel_uses_its_own_copy_of_the_adapter(nested):
    model = randomised(Outer() if nested else VimLike())
    images = torch.randn(2, 3, 16, 16)
    expected = model(images)
    replica = replica_of(model)
    with torch.no_grad():
        # what a replica read from the original would show here
        model.svp.alpha.zero_()
    torch.testing.assert_close(replica(images), expected)
    assert not torch.equal(model(images), expected)


def test_a_training_module_around_the_model_trains_and_switches_it():
    class Task(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = randomised(VimLike())
            self.loss = nn.CrossEntropyLoss()

        def training_step(self, batch):
            images, labels = batch
            return self.loss(self.model(images), labels)

    task = Task().train()
    before = task.model.svp.alpha.detach().clone()
    optimizer = torch.optim.SGD([p for p in task.parameters() if p.requires_grad], lr=1.0)
    task.training_step((torch.randn(2, 3, 16, 16), torch.tensor([0, 1]))).backward()
    optimizer.step()
    assert not torch.equal(task.model.svp.alpha, before)
    set_adapter(task, "default")
    with disable_adapter(task):
        assert task.model.svp.disabled
    assert remove_svp(task) is task
    assert "svp" not in task.model._modules


def test_the_built_in_vim_exports_with_any_batch_size_and_survives_saving():
    torch._dynamo.reset()
    model, images = randomised(built_in()), torch.randn(2, 3, 16, 16)
    batch = torch.export.Dim("batch", min=2, max=64)
    with torch.no_grad():
        expected = model(images)
        program = torch.export.export(model, (images,), dynamic_shapes={"x": {0: batch}})
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        exported = torch.export.load(file).module()
        # the exported graph sums in another order than the eager kernels
        torch.testing.assert_close(exported(images), expected, rtol=1e-4, atol=1e-5)
        three = exported(torch.cat((images, images[:1])))
        torch.testing.assert_close(three[:2], expected, rtol=1e-4, atol=1e-5)


def recompute_blocks(model: nn.Module, kind: type[nn.Module]) -> None:
    apply_activation_checkpointing(model, check_fn=lambda module: type(module) is kind)


@pytest.mark.parametrize("first", ["patch", "wrap"])
@pytest.mark.parametrize(("build", "kind"), [(VimLike, SplitBlock), (VMambaLike, MapBlock)])
def test_blocks_wrapped_by_activation_checkpointing_are_patched_saved_and_freed(
    first, build, kind, tmp_path
):
    model, images = build().eval(), torch.randn(2, 3, 16, 16)
    plain, base = copy.deepcopy(model), model(images)
    if first == "wrap":
        recompute_blocks(model, kind)
    apply_svp(model, CONFIG)
    if first == "patch":
        recompute_blocks(model, kind)
    for parameter in model.svp.adapter.parameters():
        nn.init.normal_(parameter, std=0.3)
    assert all(type(model.get_submodule(p)) is CheckpointWrapper for p in model.svp.spec.blocks)
    logits = model(images)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.svp.adapter.parameters())
    save_adapter(model, tmp_path)
    # the base model that is not wrapped is the same one, and so is the other way round
    load_adapter(plain, tmp_path, check_base_model="error")
    assert torch.equal(plain(images), logits)
    load_adapter(model, tmp_path, adapter_name="again", check_base_model="error")
    remove_svp(model)
    assert torch.equal(model(images), base)
    assert all(parameter.requires_grad for parameter in model.parameters())


FSDP_WORKER = """
import copy, os, sys, torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from svp_peft.adapter_file import hotswap_adapter, load_adapter, save_adapter
from svp_peft.adapter_tensors import adapter_state
from svp_peft.adapters import add_adapter, average_adapters, disable_adapter, set_adapter
from svp_peft.hub import push_to_hub
from svp_peft.errors import InputError
from svp_peft.config import SVPConfig
from svp_peft.patch import apply_svp
from tests.lookalikes import VimLike

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
torch.manual_seed(0)
model = apply_svp(VimLike(), SVPConfig(inner_bottleneck=4, cross_group_size=2))
add_adapter(model, "other", num_classes=3)
with torch.no_grad():
    model.svp.alpha.normal_(); model.svp.beta.normal_()
alone = copy.deepcopy(model)
mesh = init_device_mesh("cpu", (2,))
for layer in model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
images = torch.randn(2, 2, 3, 16, 16)

def optimizer(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)

sharded, single = optimizer(model), optimizer(alone)
for _ in range(3):
    sharded.zero_grad(); single.zero_grad()
    model(images[rank]).square().mean().backward()
    (alone(images[0]).square().mean() + alone(images[1]).square().mean()).div(2).backward()
    sharded.step(); single.step()

def same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)

same(model.svp.alpha.full_tensor(), alone.svp.alpha)
with disable_adapter(model), disable_adapter(alone):
    same(model(images[0]), alone(images[0]))
set_adapter(model, "other"); set_adapter(alone, "other")
same(model(images[0]), alone(images[0]))

# every process gives its part of the values, one of them writes
set_adapter(model, "default"); set_adapter(alone, "default")
folder = sys.argv[2] + ".adapter"
save_adapter(model, folder, is_main_process=rank == 0)
dist.barrier()
fresh = load_adapter(VimLike(), folder, check_base_model="ignore")
assert adapter_state(fresh).keys() == adapter_state(alone).keys()
for key, tensor in adapter_state(fresh).items():
    same(tensor, adapter_state(alone)[key])
trained = model(images[0])
with torch.no_grad():
    model.svp.alpha.zero_()
hotswap_adapter(model, folder, check_base_model="error")
assert torch.equal(model(images[0]), trained)
for call in (
    lambda: add_adapter(model, "late"),
    lambda: load_adapter(model, folder, adapter_name="late"),
    lambda: average_adapters(model, ["default"]),
    lambda: apply_svp(fully_shard(VimLike(), mesh=mesh)),
    lambda: push_to_hub(model, "me/late"),
):
    try:
        call()
    except InputError as error:
        assert "fully_shard" in str(error)
    else:
        raise AssertionError("not refused")
# Leave together and past the interpreter's end, where gloo may still have a thread to join.
dist.barrier()
dist.destroy_process_group()
print("agreed", flush=True)
os._exit(0)
"""


@pytest.mark.skipif(
    not hasattr(fsdp, "fully_shard"), reason="the first releases of FSDP2 need GPUs"
)
def test_fsdp2_with_two_processes_trains_switches_disables_saves_and_swaps(tmp_path):
    root = Path(__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", FSDP_WORKER, str(rank), str(tmp_path / "store")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [worker.communicate(timeout=250)[0] for worker in workers]
    assert [output.strip().splitlines()[-1] for output in outputs] == ["agreed"] * 2, outputs
    assert [worker.returncode for worker in workers] == [0, 0], outputs
