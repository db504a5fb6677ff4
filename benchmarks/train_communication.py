"""Bytes of gradients that DDP reduces in a training step, counted in two processes, beside docs/scale.md's arithmetic.

    python benchmarks/train_communication.py [--model default] [--rows 2] [--tokens 64]

Two gloo processes hold the same guard, rank 32 on q, k, v and o of all layers. A hook of DDP's sums the buckets that
it reduces; of each byte a process sends one and receives one where there are two processes.
"""

import argparse
import json
import subprocess
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from train_memory import CATEGORIES, MODULES, RANK

from lora_guard import adapter, base_model
from lora_guard.heads import GuardHeads
from lora_guard.model import GuardModel


def main() -> None:
    """Start the two processes, or be one of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=base_model.DEFAULT)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64, help="of each row")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if not dist.is_torchelastic_launched():
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        sys.exit(subprocess.run([*launch, *sys.argv], check=False).returncode)
    dist.init_process_group("gloo")
    found = reduced(arguments.model, arguments.rows, arguments.tokens)
    if dist.get_rank() == 0:
        megabytes = {name: f"{value / 1e6:.2f} MB" for name, value in found.items()}
        print(json.dumps(found) if arguments.json else ", ".join(f"{name} {size}" for name, size in megabytes.items()))
    dist.destroy_process_group()


def reduced(name: str, rows: int, tokens: int) -> dict[str, int]:
    """Bytes that the backward pass of one step reduces, and by the formula: 4 a trainable parameter."""
    base = base_model.load(name, dtype=torch.bfloat16)
    config = base.model.config.get_text_config()
    hidden, layers = config.hidden_size, config.num_hidden_layers
    kv = config.num_key_value_heads * getattr(config, "head_dim", hidden // config.num_attention_heads)
    attached = adapter.attach(base.model, adapter.LoraShape(RANK, 64, 0.0, MODULES))
    model = GuardModel(base.model, GuardHeads(hidden, CATEGORIES), kind="lora", attached=attached).train()
    wrapped = DistributedDataParallel(model)
    counted = [0]

    def count(group: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        counted[0] += bucket.buffer().nbytes
        return allreduce_hook(group, bucket)

    wrapped.register_comm_hook(None, count)
    ids = torch.randint(5, config.vocab_size, (rows, tokens))
    wrapped(ids, torch.ones_like(ids)).float().square().mean().backward()
    adapters = layers * RANK * (4 * hidden + 2 * (hidden + kv))
    heads = (1 + CATEGORIES) * (hidden + 1)
    return {"counted": counted[0], "by formula": 4 * (adapters + heads)}


if __name__ == "__main__":
    main()
