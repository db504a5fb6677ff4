"""Bytes that the processes of a training step exchange, counted at the collectives, beside docs/scale.md's arithmetic.

    python benchmarks/train_communication.py [--model default] [--processes 2] [--json]

Two processes on this machine train over gloo for a step, each on its own rows: with a copy of the model (DDP), and with
parameters in shards (FSDP2, a decoder layer a group, as accelerate wraps them). Every collective is seen by torch's
dispatcher, so that what is counted is the size of the tensors handed to it. What then goes over a wire is the
algorithm's: a ring of n sends (n - 1) / n of a gathered tensor, and twice that of a summed one, from each process.
"""

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.utils._python_dispatch import TorchDispatchMode
from train_memory import CATEGORIES, MODULES, RANK

from lora_guard import adapter, base_model
from lora_guard.heads import GuardHeads
from lora_guard.model import AdapterKind, GuardModel

CASES: tuple[tuple[AdapterKind, bool], ...] = (("lora", False), ("alora", False), ("lora", True), ("alora", True))


class Collectives(TorchDispatchMode):
    """Counts, while it is entered, the bytes of the whole tensor that each collective sums, gathers or scatters."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "c10d":
            tensors = [one for part in args[:2] for one in (part if isinstance(part, list) else [part])]
            sizes = [tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor)]
            self.bytes[str(op).removeprefix("c10d.").removesuffix(".default").strip("_")] += max(sizes, default=0)
        return op(*args, **(kwargs or {}))


def main() -> None:
    """Start the processes and print what the first of them counted."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=base_model.DEFAULT)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found = measure(arguments.model, arguments.processes)
    if arguments.json:
        print(json.dumps(found))
        return
    print(f"{'MB a step, counted and by formula':34}{'summed or scattered':^21} | {'gathered':^21}")
    for case in found:
        pairs = ((case["summed"], case["summed_by_formula"]), (case["gathered"], case["gathered_by_formula"]))
        print(f"{case['case']:34}" + " | ".join(f"{one / 1e6:10.2f} {other / 1e6:10.2f}" for one, other in pairs))


def measure(model: str, processes: int) -> list[dict[str, Any]]:
    """What a step of each case exchanges, in bytes."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    done = subprocess.run(
        [*launch, __file__, model], env={**os.environ, "ACCELERATE_USE_CPU": "true"}, stdout=subprocess.PIPE, check=True
    )
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith(b"{")]


def count(name: str) -> None:
    """In each process: a step of every case."""
    for kind, shards in CASES:
        found = step(name, kind, shards=shards)
        if int(os.environ["RANK"]) == 0:
            print(json.dumps(found), flush=True)


def step(name: str, kind: AdapterKind, *, shards: bool) -> dict[str, Any]:
    """One forward and backward pass as :mod:`lora_guard.training.loop` does it, and what its collectives moved."""
    accelerator = Accelerator()
    accelerator.state.distributed_type = DistributedType.FSDP if shards else DistributedType.MULTI_CPU
    accelerator.state.fsdp_plugin = (  # accelerate itself chooses shards on GPUs only
        FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
        )
        if shards
        else None
    )
    base = base_model.load(name, dtype=torch.bfloat16)
    config = base.model.config.get_text_config()
    invocation = [1, 2, 3]
    shape = adapter.LoraShape(RANK, 64, 0.0, MODULES, invocation=invocation if kind == "alora" else None)
    attached = adapter.attach(base.model, shape)
    heads = GuardHeads(config.hidden_size, CATEGORIES)
    model = GuardModel(base.model, heads, kind=kind, invocation=invocation, attached=attached).train()
    trained = sum(parameter.nbytes for parameter in model.trainable().values())
    whole = sum(parameter.nbytes for parameter in model.parameters())
    layers = sum(parameter.nbytes for parameter in base.model.get_decoder().layers.parameters())
    wrapped, _ = accelerator.prepare(model, torch.optim.AdamW(model.trainable().values()))
    if isinstance(model, FSDPModule):
        register_fsdp_forward_method(model, "read")
    ids = torch.randint(5, config.vocab_size, (2, 40))
    mask = torch.ones_like(ids)
    with Collectives() as collectives:
        if kind == "alora":
            prefix = model.read(ids, mask)
            logits = wrapped(torch.tensor([invocation] * len(ids)), prefixes=[prefix])
        else:
            logits = wrapped(ids, mask)
        accelerator.backward(logits.float().square().mean())
    passes = 3 if kind == "alora" else 2
    moved = collectives.bytes
    return {
        "case": f"{'FSDP2' if shards else 'DDP'}, {kind}",
        "collectives": dict(moved),
        "summed": moved["allreduce"] + moved["reduce_scatter_base"],
        "summed_by_formula": trained,
        "gathered": moved["allgather_base"],
        # what is outside the layers, mostly embeddings, stays gathered after its first pass
        "gathered_by_formula": passes * layers + whole - layers if shards else 0,
    }


if __name__ == "__main__":
    if "RANK" in os.environ:
        count(sys.argv[1])
        sys.stdout.flush()
        os._exit(0)  # DTensor's caches keep the process group, whose threads may abort an interpreter that ends
    main()
