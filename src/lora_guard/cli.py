"""The command line: parses, calls one function, prints; every error is one line and a non-zero exit code."""

import functools
import json
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from lora_guard.errors import ConfigError, DataError, InputError, LoraGuardError
from lora_guard.process_memory import suit_torch

if TYPE_CHECKING:
    from lora_guard.guard import Guard

# torch and all that stands on it are imported inside the commands: --help answers at once.

app = typer.Typer(
    name="lora-guard",
    help="Moderate a chat model with low-rank adapters on the model itself: train, evaluate, moderate, chat, serve.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Command = TypeVar("Command", bound=Callable[..., Any])

GuardOption = Annotated[str, typer.Option(help="default, commercial, a guard or run folder, or a hub id.")]
BaseOption = Annotated[
    str | None, typer.Option(help="Base model: a hub id, folder or .gguf file; the guard's own when absent.")
]
OtherBaseOption = Annotated[
    bool, typer.Option("--allow-other-base", help="Accept a base model with other weights than the guard's.")
]
EngineOption = Annotated[
    str, typer.Option(help="torch, or llama-cpp (extra 'device'): a .gguf chat model, quantised or not, without torch.")
]
PolicyOption = Annotated[
    str | None, typer.Option(help="Whose thresholds decide: strict, balanced, …; the guard's default when absent.")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="key=value for any field of the config; may be repeated.")
]
TargetOption = Annotated[str | None, typer.Option(help="prompt or response; the last message decides when absent.")]


def _command(function: Command) -> Command:
    """Register a command whose errors become one line on stderr: exit code 1, or 130 after Ctrl-C."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except LoraGuardError as error:
            print("error:", *str(error).splitlines(), file=sys.stderr)  # a file's words may hold line breaks
            raise typer.Exit(1) from error
        except KeyboardInterrupt as error:
            print("interrupted; what was written stays", file=sys.stderr)
            raise typer.Exit(130) from error

    app.command()(run)
    return function


@_command
def train(
    out: Annotated[Path, typer.Argument(help="Run folder: new, or begun before with --resume.")],
    config: Annotated[Path | None, typer.Option(help="YAML file; the run folder's own with --resume.")] = None,
    set_: SetOption = None,
    split: Annotated[str | None, typer.Option(help="grouped or paper, short for --set split=….")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a run that was stopped.")] = False,
) -> None:
    """Train a guard. Also under: accelerate launch -m lora_guard train …"""
    from lora_guard.config import TrainConfig
    from lora_guard.training.loop import train as run

    saved = out / "config.yaml"
    source = config or (saved if resume and saved.is_file() else None)
    overrides = [*(set_ or []), *([f"split={split}"] if split else [])]
    run(TrainConfig.load(source, overrides), out, resume=resume)


@_command
def eval(
    out: Annotated[Path, typer.Option(help="Folder for report.html, results.json, results.md, pr.png and scores/.")],
    data: Annotated[
        list[str] | None, typer.Option(help="File with labelled rows, or hub:NAME, a public set; more may follow it.")
    ] = None,
    more: Annotated[list[str] | None, typer.Argument(help="More files with labelled rows.")] = None,
    suite: Annotated[
        str | None, typer.Option(help="Folder whose data files are all taken; public: all public sets of the hub.")
    ] = None,
    control: Annotated[
        list[Path] | None, typer.Option(help="Results folder of another guard to compare with; may be repeated.")
    ] = None,
    perturb: Annotated[
        bool, typer.Option("--perturb", help="Score each set again under disguises of its texts, and show the drop.")
    ] = False,
    no_text: Annotated[bool, typer.Option("--no-text", help="Leave the errors' text out of the report.")] = False,
    card: Annotated[bool, typer.Option("--card", help="Put the figures into the guard's model card too.")] = False,
    guard: GuardOption = "default",
    base: BaseOption = None,
    allow_other_base: OtherBaseOption = False,
    engine: EngineOption = "torch",
    policy: PolicyOption = None,
    resamples: Annotated[int, typer.Option(min=10, help="Bootstrap resamples behind each interval.")] = 1000,
) -> None:
    """Evaluate a guard on labelled sets: metrics with 95 % intervals beside controls and published figures."""
    from lora_guard.evaluation.run import EvalSettings, evaluate_sets

    settings = EvalSettings(
        resamples=resamples,
        text=not no_text,
        perturb=perturb,
        controls=control or [],
        command=shlex.join(["lora-guard", *sys.argv[1:]]),
    )
    loaded = _load(guard, base, allow_other_base, engine, policy, bulk=True)
    markdown, left_out = evaluate_sets(loaded, [*(data or []), *(more or [])], suite, out, settings)
    print(markdown)
    if card:
        from lora_guard.training.card import evaluated

        evaluated(guard, out)
    if left_out:
        raise DataError(f"left out {len(left_out)} public sets: {'; '.join(left_out.values())}")


@_command
def calibrate(
    data: Annotated[
        list[Path], typer.Option(help="File with labelled rows the guard was not trained on; more may follow it.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the calibrated guard; may be the guard's own.")],
    more: Annotated[list[Path] | None, typer.Argument(help="More files with labelled rows.")] = None,
    guard: GuardOption = "default",
    base: BaseOption = None,
    allow_other_base: OtherBaseOption = False,
    engine: EngineOption = "torch",
    target_fpr: Annotated[float | None, typer.Option(min=0, max=1, help="Balanced: the highest FPR.")] = None,
    target_recall: Annotated[float | None, typer.Option(min=0, max=1, help="Balanced: the least recall.")] = None,
    best_f1: Annotated[bool, typer.Option("--best-f1", help="Balanced: the best F1, as when none is given.")] = False,
    harmful_share: Annotated[
        list[str] | None, typer.Option(help="prompt=0.2: best F1 where 0.2 of prompts are harmful; or response=….")
    ] = None,
    learn_tokens: Annotated[
        list[Path] | None,
        typer.Option(help="Training config, once or more: learn a token head from its sources' texts."),
    ] = None,
    set_: SetOption = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the summary as one line of JSON.")] = False,
) -> None:
    """Fit a guard's scores and thresholds to labelled rows, on the engine that will run it; adapter and heads stay."""
    from lora_guard.artifact import check_out
    from lora_guard.calibrate_command import calibrate as run
    from lora_guard.calibrate_command import default_rule, folder_for, form_of, shares, show, token_rows

    rule = default_rule(target_fpr, target_recall, best_f1)
    traffic = shares(harmful_share or [], rule)
    sources = token_rows(learn_tokens or [], set_ or [])
    check_out(out, form_of(engine))
    folder = folder_for(guard, engine, base, allow_other_base=allow_other_base)
    loaded = _load(str(folder), base, allow_other_base, engine, bulk=True)
    show(run(loaded, folder, [*data, *(more or [])], out, rule, traffic, sources), as_json=json_)


@_command
def moderate(
    prompt: Annotated[str | None, typer.Option(help="The prompt.")] = None,
    response: Annotated[str | None, typer.Option(help="The response to the prompt.")] = None,
    target: TargetOption = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the verdict as one line of JSON.")] = False,
    input: Annotated[str | None, typer.Option(help="JSONL file of rows; - is stdin.")] = None,
    output: Annotated[str, typer.Option(help="JSONL file of rows with verdicts, resumed if begun; - is stdout.")] = "-",
    guard: GuardOption = "default",
    base: BaseOption = None,
    allow_other_base: OtherBaseOption = False,
    engine: EngineOption = "torch",
    policy: PolicyOption = None,
) -> None:
    """Judge one prompt or response, or a file of them."""
    from lora_guard.moderate_command import moderate_many, moderate_one

    if (prompt is None) == (input is None):
        raise InputError("give either --prompt (and perhaps --response) or --input")
    if input is not None and response is not None:
        raise InputError("--response goes with --prompt; rows of --input have their own")
    if prompt is not None and output != "-":
        raise InputError("--output goes with --input; the verdict on --prompt goes to stdout")
    load = functools.partial(_load, guard, base, allow_other_base, engine, policy)
    if prompt is not None:
        moderate_one(load, prompt, response, target, as_json=json_)
    else:
        moderate_many(load, str(input), output, target)


@_command
def bulk(
    input: Annotated[str, typer.Option(help="Path or glob of .jsonl, .csv and .parquet files; s3:// and others too.")],
    output: Annotated[str, typer.Option(help="Folder of Parquet files: each row and its verdict; new or empty.")],
    address: Annotated[
        str | None, typer.Option(help="Ray cluster, ray://HOST:PORT; one on this machine is started when absent.")
    ] = None,
    actors: Annotated[
        int | None, typer.Option(min=1, help="Guards in memory; one a GPU, or else one a machine, when absent.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the output folder.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print the summary as one line of JSON.")] = False,
    shard_rows: Annotated[
        int, typer.Option(min=1, help="The most rows of an output file, and of an actor's work that a kill loses.")
    ] = 1024,
    target: TargetOption = None,
    guard: GuardOption = "default",
    base: BaseOption = None,
    allow_other_base: OtherBaseOption = False,
    engine: EngineOption = "torch",
    policy: PolicyOption = None,
) -> None:
    """Judge files of any size on Ray, exactly once a row; needs the extra scale. Small input: moderate."""
    from lora_guard.bulk_command import bulk as run

    run(
        input=input,
        output=output,
        address=address,
        actors=actors,
        shard_rows=shard_rows,
        resume=resume,
        guard=guard,
        base=base,
        allow_other_base=allow_other_base,
        engine=engine,
        policy=policy,
        target=target,
        as_json=json_,
    )


@_command
def chat(
    guard: GuardOption = "default",
    base: BaseOption = None,
    allow_other_base: OtherBaseOption = False,
    engine: EngineOption = "torch",
    policy: PolicyOption = None,
    system: Annotated[str | None, typer.Option(help="System message; the model's own when absent.")] = None,
    block: Annotated[
        bool, typer.Option("--block", help="Show only what a check has cleared; withhold what is flagged.")
    ] = False,
    check_every: Annotated[
        int, typer.Option(min=1, help="Check the answer every so many tokens, beside each sentence end.")
    ] = 16,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
) -> None:
    """Talk to the chat model; verdicts on prompt and response follow each answer."""
    from lora_guard.engine.stream import StreamSettings
    from lora_guard.terminal import converse

    settings = StreamSettings("block" if block else "score", check_every)
    converse(
        _load(guard, base, allow_other_base, engine, policy),
        settings,
        system=system,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    )


@_command
def serve(
    config: Annotated[Path | None, typer.Option(help="YAML file with any field of the server's config.")] = None,
    set_: SetOption = None,
    host: Annotated[str | None, typer.Option(help="Short for --set host=…; 127.0.0.1 unless set.")] = None,
    port: Annotated[int | None, typer.Option(help="Short for --set port=…; 8000 unless set.")] = None,
    guard: GuardOption = "default",
    base: BaseOption = None,
    allow_other_base: OtherBaseOption = False,
    engine: EngineOption = "torch",
    policy: PolicyOption = None,
) -> None:
    """Serve the chat model and its guard over HTTP, to OpenAI's clients and others; needs the extra serve."""
    try:
        from lora_guard.serving.run import serve as run
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error.name} is not installed; it comes with: pip install 'lora-guard[serve]'") from error
    from lora_guard.guard import engine_name
    from lora_guard.serving.config import ServeConfig

    short = [f"{name}={value}" for name, value in (("host", host), ("port", port)) if value is not None]
    settings = ServeConfig.load(config, [*(set_ or []), *short])
    run(settings, guard, base, allow_other_base=allow_other_base, engine=engine_name(engine), policy=policy)


@_command
def export(
    out: Annotated[
        Path | None, typer.Argument(help="The folder to write; an earlier export there is replaced.")
    ] = None,
    guard: GuardOption = "default",
    to: Annotated[str, typer.Option(help="llama-cpp, or peft-seqcls for PEFT and vLLM.")] = "llama-cpp",
    base: BaseOption = None,
    data: Annotated[
        Path | None, typer.Option(help="Labelled rows to make test vectors of, beside the built-in texts.")
    ] = None,
    check: Annotated[Path | None, typer.Option(help="Check this bundle instead, on --model.")] = None,
    model: Annotated[
        str | None, typer.Option(help="default or a .gguf file; the default's own for a guard on it when absent.")
    ] = None,
) -> None:
    """Make a bundle of a guard for llama.cpp or a classifier for PEFT, or replay a bundle's vectors on a model."""
    from lora_guard.export import run
    from lora_guard.guard import find

    if to not in ("llama-cpp", "peft-seqcls"):
        raise InputError(f"--to {to!r} is unknown; allowed: llama-cpp, peft-seqcls")
    if (out is None) == (check is None):
        raise InputError("give either OUT, to write a bundle, or --check BUNDLE")
    if to == "peft-seqcls":
        if out is None or model is not None:
            raise InputError("--check and --model go with bundles for llama-cpp, not with --to peft-seqcls")
        print(run.export_for_peft(find(guard), out, base=base, data=data))
        return
    if out is not None:
        found, passed = run.export(find(guard), out, base=base, model=model, data=data)
    else:
        found, passed = run.check(Path(str(check)), model or "default")
    print(found)
    if not passed:
        raise typer.Exit(1)


@_command
def bench(
    name: Annotated[str, typer.Argument(help="dual-path, check, score, train, memory, grow or device.")],
    json_: Annotated[bool, typer.Option("--json", help="Print the figures as one line of JSON.")] = False,
    data: Annotated[
        Path | None, typer.Option(help="Folder with train/ and eval/ files; generated rows when absent.")
    ] = None,
    rows: Annotated[int | None, typer.Option(min=8, help="Rows to run on; the bench's own number when absent.")] = None,
    guard: GuardOption = "default",
) -> None:
    """Measure speed or memory against the paper's procedure, both sides in one run of at most ten minutes."""
    from lora_guard.bench.run import run
    from lora_guard.bench.setup import Setup

    run(name, Setup(guard=guard, data=data, rows=rows), as_json=json_)


@_command
def doctor(
    json_: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
    guard: GuardOption = "default",
) -> None:
    """Check the install, default model, guard, memory and threads, and say what to do about each finding."""
    from lora_guard.doctor import examine, show

    findings = examine(guard)
    print(json.dumps([finding._asdict() for finding in findings])) if json_ else show(findings)
    if any(finding.state == "bad" for finding in findings):
        raise typer.Exit(1)


def _load(
    guard: str, base: str | None, allow_other_base: bool, engine: str, policy: str | None = None, *, bulk: bool = False
) -> "Guard":
    from lora_guard.guard import Guard, engine_name

    chosen = engine_name(engine)
    bulk = bulk and chosen == "torch"
    return Guard.load(guard, base=base, allow_other_base=allow_other_base, engine=chosen, policy=policy, bulk=bulk)


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        from importlib.metadata import version as installed

        print(installed("lora-guard"))
        raise typer.Exit


def main() -> None:
    """The entry point of ``lora-guard`` and ``python -m lora_guard``."""
    suit_torch(os.environ)
    app()
