"""``lora-guard bulk``: sees that Ray is there, runs a bulk moderation and prints what it came to."""

from importlib.util import find_spec

from lora_guard.conversation import TARGETS
from lora_guard.errors import ConfigError, InputError, allowed
from lora_guard.guard import engine_name


def bulk(
    *,
    input: str,
    output: str,
    address: str | None,
    actors: int | None,
    shard_rows: int,
    resume: bool,
    guard: str,
    base: str | None,
    allow_other_base: bool,
    engine: str,
    policy: str | None,
    target: str | None,
    as_json: bool,
) -> None:
    """Moderate in bulk and print the summary.

    Raises:
        ConfigError: Ray is not installed.
        InputError: an unknown engine or target; or as :func:`lora_guard.scale.bulk.moderate_bulk`.
    """
    if find_spec("ray") is None:
        raise ConfigError(
            "ray is not installed; it comes with: pip install 'lora-guard[scale]'; "
            "for what one machine can judge: lora-guard moderate --input FILE --output FILE"
        )
    if target is not None and target not in TARGETS:
        raise InputError(f"target {target!r} is unknown; {allowed(target, TARGETS)}")
    chosen = engine_name(engine)
    from lora_guard.scale import bulk as scale

    settings = scale.BulkSettings(
        input=input,
        output=output,
        address=address,
        actors=actors,
        guard=guard,
        base=base,
        allow_other_base=allow_other_base,
        engine=chosen,
        policy=policy,
        target=target,
        shard_rows=shard_rows,
        resume=resume,
    )
    summary = scale.moderate_bulk(settings)
    print(scale.as_json(summary) if as_json else scale.as_text(summary))
