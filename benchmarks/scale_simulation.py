"""How many replicas of the server a day of conversations needs, and how long a chat then takes: a simulation of events.

    python benchmarks/scale_simulation.py [--plot docs/scale.svg] [--json]

One replica is what was measured (docs/performance.md): two cores, the default chat model and guard, every chat checked
as it is generated. Requests come at random at the rate of the busiest hour, each goes to the less loaded of two
replicas drawn at random (as Ray Serve's router does), and a replica shares its engine among its chats a token each in
turn. The simulation finds the load at which the slowest percent of chats takes at most ``SLOWEST`` times as long as on
an idle replica; from that load follow the replicas. What is assumed stands in ``Assumed``, and in docs/scale.md.
"""

import argparse
import heapq
import json
import math
import random
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

CONVERSATIONS = (10**6, 10**8, 10**10)
SLOWEST = 3.0
MOST_REPLICAS = 1000
"""Of a simulated pool, as Ray's clusters have; further ones are pools beside it."""
LOADS = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)


@dataclass(frozen=True)
class Measured:
    """Seconds on one replica: the figures of docs/performance.md, 2026-11-26; each can be given as an option."""

    step: float = 0.050
    """A token of one chat: the decode step of ``benchmarks/serving/overhead.py``."""
    prompt: float = 0.186
    """Prefill and judgement of a short prompt, there too; longer ones in proportion to their tokens."""
    prompt_tokens: int = 40
    check: float = 0.054
    """Every 16 tokens and at the end: 37/34 of a step, as ``lora-guard bench dual-path`` has them."""
    every: int = 16
    chats: int = 8
    """Shared among at a time; the others wait."""
    audit_bytes: int = 600
    """Of one line of the audit log."""


@dataclass(frozen=True)
class Assumed:
    """What nobody measured."""

    turns: float = 3.0
    """Requests of a conversation."""
    prompt_tokens: float = 120.0
    answer_tokens: float = 150.0
    spread: float = 0.8
    """Standard deviation of the logarithm of both lengths."""
    busiest_hour: float = 2.0
    """Its rate over the day's mean."""
    dollars: float = 0.08
    """An hour of two cores."""


@dataclass
class Replica:
    """An engine that is shared evenly: ``clock`` is the work that each running chat has had since the beginning."""

    clock: float = 0.0
    updated: float = 0.0
    running: list[tuple[float, float, float]] = field(default_factory=list)
    """Heap of (clock at which it is done, when it came, its work)."""
    waiting: list[tuple[float, float]] = field(default_factory=list)
    """(when it came, its work), first come first."""
    version: int = 0
    """Of the completion that is in the calendar; older ones there are void."""

    @property
    def load(self) -> int:
        return len(self.running) + len(self.waiting)

    def advance(self, now: float) -> None:
        """Share the time since the last event among the running chats."""
        if self.running:
            self.clock += (now - self.updated) / len(self.running)
        self.updated = now

    def start(self, came: float, work: float) -> None:
        heapq.heappush(self.running, (self.clock + work, came, work))

    def next_done(self) -> float:
        """When the first of the running chats is done if nothing else happens."""
        return self.updated + (self.running[0][0] - self.clock) * len(self.running)


def main() -> None:
    """Simulate, derive and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replicas", type=int, default=100, help="of the pool whose load is chosen")
    parser.add_argument("--requests", type=int, default=40_000, help="simulated at each load")
    parser.add_argument("--seed", type=int, default=0)
    for name, default in asdict(Measured()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default, help="of one replica")
    parser.add_argument("--plot", type=Path, help="an SVG of the slowest percent over the load")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    measured = Measured(**{name: getattr(arguments, name) for name in asdict(Measured())})
    assumed = Assumed()
    curve = [simulate(measured, assumed, load, arguments) for load in LOADS]
    fitting = [point for point in curve if point["slowest"] <= SLOWEST]
    if not fitting:
        raise SystemExit(f"no load keeps the slowest percent within {SLOWEST} times: raise SLOWEST")
    chosen = fitting[-1]
    plan = [derive(measured, assumed, chosen, count) for count in CONVERSATIONS]
    for row in plan:  # replicas beyond the largest simulated pool are further pools of its kind
        pool = min(int(row["replicas"]), MOST_REPLICAS)
        point = simulate(measured, assumed, chosen["load"], argparse.Namespace(**{**vars(arguments), "replicas": pool}))
        row |= {"pool": pool, **{name: point[name] for name in ("seconds", "p95_seconds", "slowest_seconds")}}
    if arguments.plot is not None:
        plot(curve, arguments.plot)
    found = {"measured": asdict(measured), "assumed": asdict(assumed), "curve": curve, "plan": plan}
    print(json.dumps(found) if arguments.json else text(curve, chosen, plan))


def work_of(measured: Measured, assumed: Assumed, chance: random.Random) -> float:
    """Seconds that one request takes on an idle replica."""
    prompt, answer = (
        chance.lognormvariate(math.log(mean) - assumed.spread**2 / 2, assumed.spread)
        for mean in (assumed.prompt_tokens, assumed.answer_tokens)
    )
    checks = 1 + answer / measured.every
    return measured.prompt * prompt / measured.prompt_tokens + answer * measured.step + checks * measured.check


def simulate(measured: Measured, assumed: Assumed, load: float, arguments: Any) -> dict[str, float]:
    """Latencies of a pool whose engines are busy for this share of the time."""
    chance = random.Random(arguments.seed)
    mean = sum(work_of(measured, assumed, chance) for _ in range(20_000)) / 20_000
    replicas = [Replica() for _ in range(arguments.replicas)]
    rate = load * len(replicas) / mean
    calendar: list[tuple[float, int, int]] = []  # (time, replica or -1 for an arrival, version)
    heapq.heappush(calendar, (chance.expovariate(rate), -1, 0))
    ratios: list[float] = []
    seconds: list[float] = []
    arrived = 0
    while len(ratios) < arguments.requests:
        now, index, version = heapq.heappop(calendar)
        if index < 0:
            arrived += 1
            heapq.heappush(calendar, (now + chance.expovariate(rate), -1, 0))
            index = min(chance.sample(range(len(replicas)), min(2, len(replicas))), key=lambda one: replicas[one].load)
            replica = replicas[index]
            replica.advance(now)
            work = work_of(measured, assumed, chance)
            if len(replica.running) < measured.chats:
                replica.start(now, work)
            else:
                replica.waiting.append((now, work))
        else:
            replica = replicas[index]
            if version != replica.version:
                continue
            replica.advance(now)
            _, came, work = heapq.heappop(replica.running)
            if arrived > arguments.requests // 10:  # the pool has filled
                ratios.append((now - came) / work)
                seconds.append(now - came)
            if replica.waiting:
                replica.start(*replica.waiting.pop(0))
        replica.version += 1
        if replica.running:
            heapq.heappush(calendar, (replica.next_done(), index, replica.version))
    return {
        "load": load,
        "mean": sum(ratios) / len(ratios),
        "median": quantile(ratios, 0.5),
        "slowest": quantile(ratios, 0.99),
        "seconds": quantile(seconds, 0.5),
        "p95_seconds": quantile(seconds, 0.95),
        "slowest_seconds": quantile(seconds, 0.99),
        "mean_work": mean,
    }


def derive(measured: Measured, assumed: Assumed, point: dict[str, float], conversations: int) -> dict[str, float]:
    """What a day of so many conversations needs at the load of ``point``."""
    requests = conversations * assumed.turns
    busiest = requests / 86_400 * assumed.busiest_hour
    replicas = math.ceil(busiest * point["mean_work"] / point["load"])
    return {
        "conversations": conversations,
        "requests_per_second": busiest,
        "replicas": replicas,
        "dollars_a_day": replicas * 24 * assumed.dollars,
        "dollars_per_thousand": replicas * 24 * assumed.dollars / conversations * 1000,
        "audit_gigabytes": requests * measured.audit_bytes / 1e9,
    }


def quantile(values: list[float], share: float) -> float:
    """The value that so large a share does not exceed."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def text(curve: list[dict[str, float]], chosen: dict[str, float], plan: list[dict[str, float]]) -> str:
    """Two tables in Markdown."""
    lines = [
        "| load | median ÷ alone | slowest percent ÷ alone | median, s | slowest percent, s |",
        "|---|---|---|---|---|",
    ]
    for point in curve:
        mark = " (taken)" if point is chosen else ""
        lines.append(
            f"| {point['load']:.0%}{mark} | {point['median']:.2f} | {point['slowest']:.2f} | {point['seconds']:.1f} | "
            f"{point['slowest_seconds']:.1f} |"
        )
    lines += [
        "",
        "| conversations a day | requests/s, busiest hour | replicas | a request, p50, s | p95, s | p99, s | $ a day | "
        "$ per 1,000 | audit log a day |",
    ]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    for row in plan:
        lines.append(
            f"| {row['conversations']:,} | {row['requests_per_second']:,.0f} | {row['replicas']:,} | "
            f"{row['seconds']:.1f} | {row['p95_seconds']:.1f} | {row['slowest_seconds']:.1f} | "
            f"{row['dollars_a_day']:,.0f} | {row['dollars_per_thousand']:.2f} | {row['audit_gigabytes']:,.1f} GB |"
        )
    return "\n".join(lines)


def plot(curve: list[dict[str, float]], path: Path) -> None:
    """Median and slowest percent over the load."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.subplots()
    for name, label in (("median", "median"), ("slowest", "slowest percent")):
        axes.plot([point["load"] for point in curve], [point[name] for point in curve], "o-", label=label)
    axes.axhline(SLOWEST, color="grey", linestyle=":", label=f"{SLOWEST:g} times")
    axes.set(xlabel="load of the replicas", ylabel="time of a chat ÷ on an idle replica", ylim=(0, None))
    axes.legend()
    figure.savefig(path)


if __name__ == "__main__":
    main()
