"""Train on several GPUs, or with most of the model in CPU memory, and do not score.

    torchrun --nproc-per-node 4 -m -- lab.spread --model DIR --task boolq --data DIR --steer reg
    python -m lab.spread --offload --model DIR --task boolq --data DIR --steer reg

(The -- keeps some versions of torchrun from taking --p for a flag of their own.)

Each of N processes keeps an N-th of every tensor: of the parameters, the gradients and the two
moments of AdamW. The tensors of a block are put together when the block is used. The N processes
share out the micro-batches of a step, so the step stays the same, and so does the finished run, but
for rounding. A run can be resumed with another number of processes, and also by train.py.

All other flags are those of train.py, and python train.py --help explains them. --micro-tokens is
what one process takes at a time, and every process first needs CPU memory for the whole model. The
last line of the output is the command that scores the run.
"""
import contextlib
import os
import shlex
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy, OffloadPolicy, fully_shard, register_fsdp_forward_method)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only

import train
from data import BadInput, Parser, command
from eval import pick_device, set_threads, split_names
from model import Transformer

# torchrun starts COUNT processes and numbers them. Without torchrun, this is the only one.
NUMBER = int(os.environ.get("RANK", 0))
COUNT = int(os.environ.get("WORLD_SIZE", 1))
ON_THIS_MACHINE = int(os.environ.get("LOCAL_RANK", 0))
PATIENCE = timedelta(hours=12)         # a process may wait while another reads or writes a model


class Spread:
    """What train.py's loop asks of the processes that share one run: the verbs of `train.ALONE`.

    Every process calls every verb, in the same order. A tensor of which each process has a part is
    a DTensor, PyTorch's word for it; the spreading itself is PyTorch's FSDP2.
    """

    writes = NUMBER == 0

    def __init__(self, device, offload=False):
        self.device = device
        self.policy = OffloadPolicy()
        if offload:
            self.policy = CPUOffloadPolicy(pin_memory=device.type == "cuda")
        alone = dict(store=dist.HashStore(), rank=0, world_size=1) if COUNT == 1 else {}
        # Tensors in CPU memory are exchanged too, so GPUs need both ways.
        ways = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(ways, timeout=PATIENCE, **alone)
        self.mesh = init_device_mesh(device.type, (COUNT,))

    def share(self, batches):
        """The micro-batches of a step that this process computes. Everybody takes part in putting
        the blocks together, so all get equally many: the last ones may be empty."""
        filled = batches + [[]] * (-len(batches) % COUNT)
        return filled[NUMBER::COUNT]

    def sum(self, tensor):
        dist.all_reduce(tensor)
        return tensor

    def wait(self):
        dist.barrier()

    def prepare(self, model, device):
        """Keep this process's part of each tensor of a model that all processes have loaded."""
        for part in (*model.blocks, model):
            fully_shard(part, mesh=self.mesh, offload_policy=self.policy)
            # The loss of a step is a sum over processes, and so is its gradient. FSDP2 divides
            # gradients by COUNT unless it is told otherwise. Gloo can only sum.
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)
        for passes in ("predict", "totals", "log_likelihood"):     # those that training calls
            register_fsdp_forward_method(model, passes)
        return model

    def whole(self, thing):
        """A number -> the same number, whole, on all processes. A model -> the whole model on the
        CPU of process 0; elsewhere an empty one."""
        if not isinstance(thing, nn.Module):
            return thing.full_tensor()
        weights = {name: self._gather(weight) for name, weight in thing.state_dict().items()}
        with torch.device("meta"):
            model = Transformer(thing.config)
        if self.writes:
            model.load_state_dict(weights, assign=True)
        return model

    def state(self, *parts):
        """The states of model and optimizer as whole tensors on the CPU of process 0."""
        return tree_map_only(torch.Tensor, self._gather, [part.state_dict() for part in parts])

    def restore(self, states, model, optimizer):
        """Take over what `state` returned, perhaps to another number of processes. Every process
        reads the whole states and keeps its part of them."""
        weights, moments = states
        for name, weight in model.named_parameters():
            weight.detach().copy_(self._part(weights[name], weight))
        ordered = [weight for group in optimizer.param_groups for weight in group["params"]]
        parts = {number: {name: self._part(value, weight) if value.dim() else value
                          for name, value in moments["state"][number].items()}
                 for number, weight in enumerate(ordered)}     # the count of steps has no part
        optimizer.load_state_dict({**moments, "state": parts})

    def _gather(self, tensor):
        if isinstance(tensor, DTensor):
            tensor = tensor.to(self.device).full_tensor()
        return tensor.detach().cpu() if self.writes else None

    def _part(self, whole, like):
        """A whole tensor -> a DTensor that lies as `like` does."""
        parts = distribute_tensor(whole.to(self.device), self.mesh, like.placements,
                                  src_data_rank=None)
        return parts.to(like.device)


def check_version(version):
    """Raises BadInput for a PyTorch whose FSDP2 lacks a part of what is used here."""
    if tuple(map(int, version.split(".")[:2])) < (2, 9):
        raise BadInput(f"lab.spread needs torch 2.9 or later, and this is {version}; "
                       "train.py works with it")


def run(argv):
    parser = Parser(prog="lab.spread", description=__doc__, usage=(
        "torchrun --nproc-per-node N -m -- lab.spread [--offload] [flags of train.py]"))
    parser.add_argument("--offload", action="store_true", help=(
        "keep parameters, gradients and optimizer state in CPU memory, and on the GPU only the "
        "block that is at work: much less GPU memory, and slower"))
    own, rest = parser.parse_known_args(argv)
    args = train.read_settings(rest)
    launcher = f"torchrun --nproc-per-node {COUNT} -m --" if COUNT > 1 else "python -m"
    args.command = f"{launcher} lab.spread {shlex.join(argv)}"
    check_version(torch.__version__)
    if args.device in ("auto", "cuda") and torch.cuda.is_available():
        args.device = f"cuda:{ON_THIS_MACHINE}"
    device = pick_device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    set_threads(args.threads, split_names(args.task, args.data))
    world = Spread(device, own.offload)
    print(f"spread     over {COUNT} x {device.type}" + ", offloaded" * own.offload)
    train.train(args, world)
    print("next       " + shlex.join(["python", "eval.py", "--model", args.out, "--task", args.task,
                                      "--data", args.data]))
    dist.destroy_process_group()


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if NUMBER == 0:
        return run(argv)
    with (open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere),
          contextlib.redirect_stderr(nowhere)):
        try:
            run(argv)
        except (Exception, SystemExit) as error:
            # Process 0 most likely says the same, and torchrun then ends this one in its sleep.
            if getattr(error, "code", 1) != 0:
                time.sleep(5)
            raise


if __name__ == "__main__":
    command(main)
