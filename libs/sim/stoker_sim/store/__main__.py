"""`python -m stoker_sim.store --seeds A..B`: run these seeds, and name the first that fails."""

from __future__ import annotations

import argparse
import sys
import traceback

from stoker_sim.quiet import quiet
from stoker_sim.store.scenario import STEPS, run_seed


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m stoker_sim.store", description=__doc__)
    parser.add_argument("--seeds", default="0..100", help="A..B: from A up to, and without, B; or one seed")
    parser.add_argument("--steps", type=int, default=STEPS, help="things that befall each world")
    parser.add_argument("--logs", action="store_true", help="with the agents' own logs")
    parser.add_argument("--keep-going", action="store_true", help="run the other seeds after one that failed")
    parser.add_argument("--traces", action="store_true", help="print the trace of each seed")
    chosen = parser.parse_args(arguments)
    first, _, end = chosen.seeds.partition("..")
    seeds = range(int(first), int(end) if end else int(first) + 1)
    if not chosen.logs:
        quiet()
    failed = []
    for seed in seeds:
        try:
            result = run_seed(seed, steps=chosen.steps)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the seed's
            failed.append(seed)
            last = traceback.extract_tb(error.__traceback__)[-1]
            sys.stdout.write(f"seed {seed}: {type(error).__name__}: {error} ({last.filename}:{last.lineno})\n")
            sys.stdout.flush()
            if not chosen.keep_going:
                break
        else:
            if chosen.traces:
                sys.stdout.write(f"seed {seed}: {result.trace} {result.steps} steps, {result.virtual_s:.0f} s\n")
    sys.stdout.write(f"{len(seeds)} seeds, failed: {failed or 'none'}\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
