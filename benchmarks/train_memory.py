"""Memory of a training step, counted tensor by tensor, beside the arithmetic of docs/scale.md.

    python benchmarks/train_memory.py [--model default] [--rows 8] [--tokens 200] [--json]

What a step holds is counted, not estimated from the process: the bytes that autograd keeps for the backward pass (each
storage once, parameters apart), the trainable parameters with their gradients and Adam's moments, and the keys and
values that an activated adapter reads. The base is in bf16, adapters in fp32, rank 32 on q, k, v and o of all layers.
"""

import argparse
import json
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from lora_guard import adapter, base_model
from lora_guard.heads import GuardHeads
from lora_guard.model import AdapterKind, GuardModel
from lora_guard.training.checkpointing import checkpoint_layers

RANK = 32
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")
CATEGORIES = 14


@dataclass(frozen=True)
class Held:
    """Bytes of a step; None where the arithmetic of docs/scale.md names no figure."""

    case: str
    trained: int
    """Trainable parameters, gradients and moments."""
    trained_by_formula: int
    backward: int
    """Kept for the backward pass."""
    backward_by_formula: int | None
    prefixes: int
    """Keys and values of the rows."""
    prefixes_by_formula: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=base_model.DEFAULT)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=200, help="of each row")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    cases: list[tuple[AdapterKind, bool]] = [("alora", False), ("lora", False), ("lora", True)]
    found = [step(arguments.model, kind, arguments.rows, arguments.tokens, slim=slim) for kind, slim in cases]
    if arguments.json:
        print(json.dumps([asdict(held) for held in found]))
        return
    print(f"{'MB, counted and by formula':28}{'trained':^19} | {'for the backward':^19} | {'keys and values':^19}")
    for held in found:
        pairs = (
            (held.trained, held.trained_by_formula),
            (held.backward, held.backward_by_formula),
            (held.prefixes, held.prefixes_by_formula),
        )
        print(f"{held.case:28}" + " | ".join(f"{counted / 1e6:9.2f} {formula(value)}" for counted, value in pairs))


def formula(value: int | None) -> str:
    return f"{'–':>9}" if value is None else f"{value / 1e6:9.2f}"


def step(name: str, kind: AdapterKind, rows: int, tokens: int, *, slim: bool) -> Held:
    """Count what one forward and backward pass and the optimiser hold; ``slim``: with activation checkpointing."""
    base = base_model.load(name, dtype=torch.bfloat16)
    config = base.model.config.get_text_config()
    hidden, layers = config.hidden_size, config.num_hidden_layers
    kv = config.num_key_value_heads * getattr(config, "head_dim", hidden // config.num_attention_heads)
    invocation = [1, 2, 3]
    shape = adapter.LoraShape(RANK, 64, 0.0, MODULES, invocation=invocation if kind == "alora" else None)
    attached = adapter.attach(base.model, shape)
    if slim:
        checkpoint_layers(base.model)
    model = GuardModel(
        base.model, GuardHeads(hidden, CATEGORIES), kind=kind, invocation=invocation, attached=attached
    ).train()
    optimizer = torch.optim.AdamW(model.trainable().values())
    ids = torch.randint(5, config.vocab_size, (rows, tokens))
    mask, kept, prefixes = torch.ones_like(ids), dict[int, int](), 0
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters | read:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    read: set[int] = set()
    if kind == "alora":
        prefix = model.read(ids, mask)
        held = {
            part.untyped_storage().data_ptr(): part.untyped_storage().nbytes()
            for pair in prefix.layers
            for part in pair
        }
        read, prefixes = set(held), sum(held.values())
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logits = model(torch.tensor([invocation] * rows), prefixes=[prefix])
    else:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logits = model(ids, mask)
    logits.float().square().mean().backward()
    optimizer.step()
    trainable = model.trainable().values()
    states = [value for state in optimizer.state.values() for value in state.values() if value.dim()]
    grads = [parameter.grad for parameter in trainable if parameter.grad is not None]
    adapters = layers * RANK * (4 * hidden + 2 * (hidden + kv))
    heads = (1 + CATEGORIES) * (hidden + 1)
    return Held(
        case=f"{kind}{', checkpointing' if slim else ''}, {rows} × {tokens}",
        trained=sum(tensor.nbytes for tensor in [*trainable, *grads, *states]),
        trained_by_formula=16 * (adapters + heads),
        backward=sum(kept.values()),
        backward_by_formula=2 * hidden * layers * rows * tokens if slim else None,
        prefixes=prefixes,
        prefixes_by_formula=2 * layers * kv * 2 * rows * tokens if kind == "alora" else 0,
    )


if __name__ == "__main__":
    main()
