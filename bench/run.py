"""Throughput of core-serve beside others, on one model, in one run.

    make bench                                  the demo model, 1, 4 and 16 requests at once
    make bench ARGS='--model DIR --rounds 5'

Always there: core-serve's native model, its transformers fallback, and transformers' own `generate`. A peer joins if
its environment is set up: ~/.cache/core-peers/NAME/bin/python, or --peer NAME=PYTHON. vllm takes a Hugging Face folder,
llamacpp a GGUF file.

Every engine runs in a process of its own, alone, once a round; rounds begin with another engine each time. Prompts are
random token ids, none used twice, so no prefix cache helps. The table holds medians of output tokens a second, prefill
included. Ratios within one run are the result; absolute figures differ from machine to machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from core.bench.prompts import Prompts
from core.config import EngineConfig
from core.demo import demo_model_path
from core.plugin_report import render
from core.plugins import PluginHost

OWN = ("native", "transformers", "generate")
SHOWN = {"native": "core-serve, native", "transformers": "core-serve, fallback", "generate": "transformers generate"}
PEERS = ("vllm", "llamacpp")
PEERS_FOLDER = Path.home() / ".cache" / "core-peers"
LIMIT_S = 900  # for one engine in one round


@dataclass
class Found:
    """What all rounds brought."""

    seconds: dict[tuple[str, int], list[float]] = field(default_factory=lambda: defaultdict(list))
    bound_s: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    machine: dict[str, Any] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)  # engine -> the last lines of its error


def main() -> int:
    options = parse()
    pythons = dict.fromkeys(OWN, sys.executable) | peers(options)
    found = Found()
    draw = Prompts(vocab_size(options.model))
    for number in range(options.rounds):
        prompts = {
            count: {"warm": draw.draw(count, options.prompt_len), "timed": draw.draw(count, options.prompt_len)}
            for count in options.concurrency
        }
        engines = list(pythons)
        for engine in engines[number % len(engines) :] + engines[: number % len(engines)]:
            if engine not in found.failed:
                measure(engine, pythons[engine], prompts, options, found)
    report(found, list(pythons), options)
    return 1 if found.failed else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a Hugging Face folder or GGUF file (default: the demo model)")
    parser.add_argument("--concurrency", default="1,4,16", help="requests at once (default: %(default)s)")
    parser.add_argument("--prompt-len", type=int, default=128, help="tokens (default: %(default)s)")
    parser.add_argument("--new", type=int, default=64, help="tokens to generate (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="(default: %(default)s)")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON", help=f"of {', '.join(PEERS)}")
    parser.add_argument("--json", type=Path, help="write every measurement to this file")
    options = parser.parse_args()
    options.concurrency = [int(count) for count in options.concurrency.split(",")]
    options.model = options.model or demo_model_path()
    if unknown := [text for text in options.peer if text.partition("=")[0] not in PEERS or "=" not in text]:
        parser.error(f"--peer {unknown[0]}: NAME=PYTHON, with NAME one of {', '.join(PEERS)}")
    return options


def peers(options: argparse.Namespace) -> dict[str, str]:
    """Return the Python of each peer that is set up and can open this model."""
    found = {name: PEERS_FOLDER / name / "bin" / "python" for name in PEERS}
    set_up = {name: str(python) for name, python in found.items() if python.exists()}
    set_up |= {name: python for name, _, python in (text.partition("=") for text in options.peer)}
    wanted = "vllm" if Path(options.model).is_dir() else "llamacpp"
    return {name: python for name, python in set_up.items() if name == wanted}


def vocab_size(model: str) -> int:
    """Return how many ids the checkpoint's config allows."""
    return int(PluginHost.load().open_checkpoint(model, EngineConfig(model=model)).spec.config["vocab_size"])


def measure(engine: str, python: str, prompts: dict[int, Any], options: argparse.Namespace, found: Found) -> None:
    """Run one engine in a process of its own; an engine that fails is noted, and the others go on."""
    job = {
        "engine": engine,
        "model": options.model,
        "threads": options.threads,
        "new": options.new,
        "max_len": options.prompt_len + options.new,
        "prompts": prompts,
    }
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    driver = [python, str(Path(__file__).with_name("engines.py"))]
    try:
        done = subprocess.run(
            driver, input=json.dumps(job), env=environment, capture_output=True, text=True, timeout=LIMIT_S
        )
    except (subprocess.TimeoutExpired, OSError) as error:
        found.failed[engine] = str(error)
        return
    if done.returncode:
        found.failed[engine] = " / ".join(done.stderr.strip().splitlines()[-3:]) or f"exit code {done.returncode}"
        return
    answer = json.loads(done.stdout.splitlines()[-1])
    speeds = []
    for count in options.concurrency:
        found.seconds[engine, count].append(answer["seconds"][str(count)])
        speeds.append(f"{count * options.new / answer['seconds'][str(count)]:.1f}")
    if engine == "native":
        for count in options.concurrency:
            found.bound_s[count].append(answer["bound_s"][str(count)])
        found.machine = {name: answer[name] for name in ("gflops", "read_gb_s", "served")}
    print(f"{engine:14} {' · '.join(speeds)} tokens/s", file=sys.stderr)


def report(found: Found, engines: list[str], options: argparse.Namespace) -> None:
    """Print the table, write the JSON."""
    print(render(table(found, engines, options), 120), end="")
    if found.machine:
        print(
            f"native is {found.machine['served']}; the bound is for the weights as it has them, matrix products "
            f"at {found.machine['gflops']:.0f} GFLOP/s in float32 and memory read at {found.machine['read_gb_s']:.1f} "
            "GB/s, both measured in this run. generate has them as float32."
        )
    for engine, reason in found.failed.items():
        print(f"{engine} failed: {reason}")
    if options.json:
        rounds = {f"{engine}, {count}": seconds for (engine, count), seconds in found.seconds.items()}
        kept = {"seconds": rounds, "bound_s": found.bound_s, "machine": found.machine, "failed": found.failed}
        options.json.write_text(json.dumps(kept, indent=1) + "\n")


def table(found: Found, engines: list[str], options: argparse.Namespace) -> Table:
    title = f"output tokens/s, {options.prompt_len} in, {options.new} out, {options.threads} threads"
    made = Table(title=f"{title}, {Path(options.model).name}")
    made.add_column("engine")
    for count in options.concurrency:
        made.add_column(f"{count} at once", justify="right")
        made.add_column("/ generate", justify="right")
    seconds = {key: statistics.median(values) for key, values in found.seconds.items()}
    rows = {SHOWN.get(engine, engine): {count: seconds.get((engine, count)) for count in options.concurrency}
            for engine in engines}  # fmt: skip
    rows["(bound, native)"] = {count: statistics.median(values) for count, values in found.bound_s.items()}
    for name, by_count in rows.items():
        cells = []
        for count in options.concurrency:
            own, base = by_count.get(count), seconds.get(("generate", count))
            cells.append(f"{count * options.new / own:.1f}" if own else "-")
            cells.append(f"{base / own:.2f}" if own and base else "-")
        made.add_row(name, *cells)
    return made


if __name__ == "__main__":
    sys.exit(main())
