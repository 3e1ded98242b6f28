"""Images per second of one process and of several with the same batch, one thread each.

    python scripts/distributed_throughput.py [--processes 1 2] [--arch resnet18 hybrid] [KEY=VALUE ...]

Prints a table: images/s by the median step, and the CPU time of all processes for 1,000 images, which says what the
synchronisation costs also on a busy machine.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time

ARCHS = ["resnet18", "revnet", "hybrid"]
STEPS, WARM_UP = 5, 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--arch", nargs="+", default=ARCHS)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    args = parser.parse_intermixed_args()
    print("| arch | processes | images/s | CPU s for 1,000 images |\n|---|---|---|---|", flush=True)
    for processes in args.processes:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", __file__]
        environment = {"OMP_NUM_THREADS": "1", **os.environ, "REVTRAIN_ARCHS": ",".join(args.arch)}
        subprocess.run([sys.executable, *launcher, *args.overrides], env=environment, check=True)


def worker(archs: list[str], overrides: list[str]) -> None:
    """What each process does."""
    import torch
    from torch.nn.functional import cross_entropy

    from revtrain.conf import compose
    from revtrain.config import read
    from revtrain.machine.device import choose_device, synchronize
    from revtrain.machine.processes import Processes
    from revtrain.models import build_model
    from revtrain.optim import make_optimizer

    team = Processes.of_environment()
    device = choose_device(team.device_name(compose(overrides).device))
    team.connect(device)
    for arch in archs:
        cfg = compose([f"arch={arch}", *overrides])
        torch.manual_seed(0)
        model = build_model(cfg, 10, 32).to(device).train()
        network, optimizer, share = team.wrap(model), make_optimizer(model, read(cfg).training), team.share(cfg.batch)
        images, labels = torch.randn(share, 3, 32, 32, device=device), torch.arange(share, device=device) % 10
        seconds = []
        for step in range(WARM_UP + STEPS):
            if step == WARM_UP:
                cpu_seconds = time.process_time()
            started = time.perf_counter()
            cross_entropy(network(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            synchronize(device)
            seconds.append(time.perf_counter() - started)
        spent = team.add_up({"cpu": time.process_time() - cpu_seconds})["cpu"]
        if team.leads:
            speed = cfg.batch / statistics.median(seconds[WARM_UP:])
            print(f"| {arch} | {team.size} | {speed:.1f} | {1000 * spent / (STEPS * cfg.batch):.1f} |", flush=True)
    team.close()


if __name__ == "__main__":
    if "REVTRAIN_ARCHS" in os.environ and "RANK" in os.environ:
        worker(os.environ["REVTRAIN_ARCHS"].split(","), sys.argv[1:])
    else:
        main()
