"""Throughput of core-serve beside transformers' `generate`, on one model, in one run.

    make bench                                  the demo model, 1, 4 and 16 requests at once
    make bench ARGS='--model DIR --rounds 5'

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

from rich.console import Console
from rich.table import Table

ENGINES = ("native", "transformers", "generate")


def main() -> int:
    options = parse()
    found: dict[tuple[str, int], list[float]] = defaultdict(list)
    for number in range(options.rounds):
        for at in range(len(ENGINES)):
            engine = ENGINES[(at + number) % len(ENGINES)]
            for concurrency, speed in measure(engine, options).items():
                found[engine, int(concurrency)].append(speed)
    Console().print(table(found, options))
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a Hugging Face folder or GGUF file (default: the demo model)")
    parser.add_argument("--concurrency", default="1,4,16", help="requests at once (default: %(default)s)")
    parser.add_argument("--prompt-len", type=int, default=128, help="tokens (default: %(default)s)")
    parser.add_argument("--new", type=int, default=64, help="tokens to generate (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="(default: %(default)s)")
    return parser.parse_args()


def measure(engine: str, options: argparse.Namespace) -> dict[str, float]:
    """Run one engine in a process of its own; return output tokens a second by concurrency."""
    job = {**vars(options), "engine": engine}
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    driver = os.path.join(os.path.dirname(__file__), "driver.py")
    done = subprocess.run(
        [sys.executable, driver, json.dumps(job)], env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    answer: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(f"{engine:14} {answer}", file=sys.stderr)
    return answer


def table(found: dict[tuple[str, int], list[float]], options: argparse.Namespace) -> Table:
    counts = [int(count) for count in options.concurrency.split(",")]
    made = Table(
        title=f"output tokens/s, {options.prompt_len} in, {options.new} out, float32, {options.threads} threads"
    )
    made.add_column("engine")
    for count in counts:
        made.add_column(f"{count} at once", justify="right")
        made.add_column("/ generate", justify="right")
    for engine in ENGINES:
        cells = []
        for count in counts:
            middle = statistics.median(found[engine, count])
            cells += [f"{middle:.1f}", f"{middle / statistics.median(found['generate', count]):.2f}"]
        made.add_row(engine, *cells)
    return made


if __name__ == "__main__":
    sys.exit(main())
