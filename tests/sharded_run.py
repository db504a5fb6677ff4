"""Started by tests/test_sharding.py in two processes: runs whose parameters are sharded, and one that is killed."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lora_guard import TrainConfig
from lora_guard.training import loop


class ShardingAccelerator(Accelerator):
    """accelerate chooses FSDP on GPUs only, but what it then does runs on CPUs too."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.state.distributed_type = DistributedType.FSDP
        self.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            cpu_ram_efficient_loading=False,
        )

    def end_training(self) -> None:
        """Keep the processes connected for the next run."""


class Killed(BaseException):
    """Stands for a kill: no handler of the program sees it."""


def main(config: TrainConfig, folder: Path) -> None:
    loop.Accelerator = ShardingAccelerator  # type: ignore[misc]
    loop.train(config, folder / "sharded")
    step = loop._step

    def killing(run: Any, batch: Any, number: int, *rest: Any) -> Any:
        assert all(isinstance(parameter, DTensor) for parameter in run.model.parameters())
        assert all(isinstance(layer, FSDPModule) for layer in run.model.base.get_decoder().layers)
        slim = ["forward" in vars(layer) for layer in run.model.base.get_decoder().layers]
        assert set(slim) == {config.activation_checkpointing}  # a wrapped pass is the layer's own attribute
        dtypes = {(parameter.requires_grad, str(parameter.dtype)) for parameter in run.model.parameters()}
        (folder / f"dtypes-{run.accelerator.process_index}.json").write_text(json.dumps(sorted(dtypes)), "utf-8")
        if number == 3:
            raise Killed
        return step(run, batch, number, *rest)

    loop._step = killing
    try:
        loop.train(config, folder / "killed")
    except Killed:
        loop._step = step
    accelerator = Accelerator()
    if accelerator.is_main_process:
        shutil.copytree(folder / "killed", folder / "killed-alone")
    accelerator.wait_for_everyone()
    loop.train(config, folder / "killed", resume=True)
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    for given in sys.argv[1:]:
        main(TrainConfig.load(Path(given) / "config.yaml"), Path(given))
    # DTensor's caches hold the device mesh, and the mesh its process group, as long as the interpreter lives: no call
    # destroys the group, and gloo's threads, still running while the interpreter ends, now and then abort the process.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
