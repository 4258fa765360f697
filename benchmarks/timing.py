"""What the benchmarks of all families share: two things timed side by side, peak memory in a fresh process."""

import argparse
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median

import torch

from polyscale.evaluation.speed import time_alternating


def parse_arguments(description: str, rounds: int) -> argparse.Namespace:
    """The options of every benchmark; sets the number of threads, and prints where it runs.

    Returns:
        `device` and `dtype` (bfloat16 on a GPU, float32 on the CPU), `rounds`, `threads`, `clock`, `quick`.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=rounds, help="timed calls of each side")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of torch on the CPU")
    parser.add_argument(
        "--processor-time",
        dest="clock",
        action="store_const",
        const=time.process_time,
        default=time.perf_counter,
        help="count processor time, not wall-clock time: for a CPU that others use too, with --threads 1",
    )
    parser.add_argument("--quick", action="store_true", help="fewer and smaller cases")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    on_cpu = arguments.device == "cpu"
    arguments.dtype = torch.float32 if on_cpu else torch.bfloat16
    where = (
        f"{arguments.threads} threads of {os.cpu_count()}" if on_cpu else torch.cuda.get_device_name(arguments.device)
    )
    clock = "processor time" if arguments.clock is time.process_time else "wall-clock time"
    print(f"{description}\n{platform.machine()}, {where}, {clock}, torch {torch.__version__}, {arguments.dtype}\n")
    return arguments


def compare(
    title: str,
    ours: Callable[[], object],
    theirs: Callable[[], object],
    *,
    rounds: int,
    goal: float,
    device: str,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Times two functions side by side, prints a line, and returns how many times as fast ours is.

    That ratio is the median over rounds of the ratio within a round: both sides of a round ran at the same time.
    """
    synchronize = None if device == "cpu" else torch.cuda.synchronize
    with torch.inference_mode():
        seconds = time_alternating({"ours": ours, "theirs": theirs}, rounds, synchronize, clock)
    ratio = median(theirs / ours for ours, theirs in zip(seconds["ours"], seconds["theirs"], strict=True))
    mine, other = (1000 * median(seconds[name]) for name in ("ours", "theirs"))
    report(f"{title:<34} ours {mine:9.2f} ms   theirs {other:9.2f} ms   speed ratio", ratio, at_least=goal)
    return ratio


def report(text: str, value: float, *, at_least: float | None = None, at_most: float | None = None) -> None:
    """Prints a figure beside its goal."""
    goal = f">= {at_least:g}" if at_least is not None else f"<= {at_most:g}"
    met = value >= at_least if at_least is not None else value <= at_most
    print(f"{text} {value:.3f}  (goal {goal}: {'met' if met else 'MISSED'})", flush=True)


def run_fresh(code: str, threads: int) -> list[float]:
    """Runs Python code in a new process and returns the numbers on its last line of output."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return [float(number) for number in done.stdout.splitlines()[-1].split()]


# VmHWM, not getrusage: the latter's maximum survives an exec, so a child would start with its parent's.
_MEMORY = """
{imports}
def kibibytes(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name + ":"))
before = kibibytes("VmRSS")
{code}
print((kibibytes("VmHWM") - before) / 1024)
"""


def peak_memory(imports: str, code: str, threads: int) -> float:
    """MiB that `code` adds at its peak to a fresh process that has done `imports`: the median of five processes, whose
    readings scatter by a tenth. Linux only.
    """
    return median(run_fresh(_MEMORY.format(imports=imports, code=code), threads)[0] for _ in range(5))


__all__ = ["compare", "parse_arguments", "peak_memory", "report", "run_fresh"]
