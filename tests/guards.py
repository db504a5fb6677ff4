"""Tiny guards: a random adapter and random heads on a tiny chat model, and a generation that they judge."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny import tiny_folder

from lora_guard import Guard, adapter, artifact, base_model
from lora_guard.artifact import BaseReference, GuardSpec, HeadsShape
from lora_guard.engine import torch_guard
from lora_guard.heads import GuardHeads
from lora_guard.model import GuardModel
from lora_guard.taxonomy import Taxonomy
from lora_guard.token_head import TokenHead
from lora_guard.verdict import Calibration, Calibrator, Policy, TargetCalibration


def plain_calibration(categories: Sequence[str], threshold: float = 0.5, **thresholds: float) -> Calibration:
    """Scores are the logits' sigmoid; ``balanced`` has the threshold, and further policies have theirs."""
    everywhere = Calibrator(thresholds={"balanced": threshold, **thresholds})
    part = TargetCalibration(harmful=everywhere, categories=dict.fromkeys(categories, everywhere))
    policies = {name: Policy(rule="best_f1") for name in everywhere.thresholds}
    return Calibration(default_policy="balanced", policies=policies, prompt=part, response=part)


def tiny_guard_folder(
    path: Path,
    architecture: str = "llama",
    adapter_kind: str = "lora",
    categories: Sequence[str] = ("a", "b"),
    max_length: int = 128,
    threshold: float = 0.5,
    strength: float = 0.5,
    modules: Sequence[str] | None = None,
    token_head: bool = False,
) -> Path:
    """A guard folder below ``path``; its base, saved beside it, is named in guard.json by its absolute path.

    ``strength`` is the standard deviation of the adapter's B; ``modules`` have the adapter, queries and values if None.
    With ``token_head`` it has random weights for the bytes.
    """
    base_folder = tiny_folder(path / "base", architecture)
    base = base_model.load(str(base_folder))
    renderer = base_model.renderer(base)
    invocation = renderer.guard_turn if adapter_kind == "alora" else renderer.end_of_turn
    ids = renderer.template_ids(invocation)
    torch.manual_seed(0)
    attached: adapter.Adapter | None = None
    if adapter_kind != "none":
        modules = modules or (["qkv_proj"] if architecture == "phi3" else ["q_proj", "v_proj"])
        attached = adapter.attach(
            base.model, adapter.LoraShape(4, 8, 0.0, modules, invocation=ids if adapter_kind == "alora" else None)
        )
        with torch.no_grad():
            for name, parameter in base.model.named_parameters():
                if ".lora_B." in name:
                    parameter.normal_(std=strength)
    hidden = base.model.config.get_text_config().hidden_size
    heads = GuardHeads(hidden, len(categories))
    spec = GuardSpec(
        name="tiny",
        adapter=adapter_kind,  # type: ignore[arg-type]
        base=BaseReference(
            name=str(base_folder), revision=None, fingerprint=base.fingerprint, hidden_size=hidden, norms=base.norms
        ),
        taxonomy=Taxonomy("tiny", tuple(categories)).to_dict(),
        invocation=invocation,
        max_length=max_length,
        heads=HeadsShape(bias=True, harmful=True),
        calibration=plain_calibration(categories, threshold, strict=0.0, permissive=1.0),
    )
    folder = path / "guard"
    model = GuardModel(base.model, heads, kind=spec.adapter, invocation=ids, attached=attached)
    torch_guard.save(model, spec, folder, card="# tiny\n")
    if token_head:
        weight = np.random.default_rng(0).normal(size=256).astype(np.float32)
        artifact.rewrite(
            folder, folder, artifact.read_spec(folder), card="# tiny\n", token_head=TokenHead(weight).to_bytes()
        )
    return folder


def judged_generation(
    guard: Guard, ids: Sequence[int], judgements: int, temperature: float
) -> tuple[list[int], list[bytes]]:
    """The tokens and the bytes of the logits of a generation with ``judgements`` on each target before and after each
    token, the conversation going on after the twentieth."""
    session: Any = guard.session(seed=3)
    session.append(ids)
    logits = []

    def judge() -> None:
        for place in range(judgements):
            session.judge("response")
            session.judge("prompt", at=3 + place)

    for step in range(40):
        judge()
        logits.append(np.asarray(session.logits).tobytes())
        session.sample(temperature=temperature, top_p=0.9)
        if step == 20:
            judge()
            session.append(ids)
    return session._ids, logits
