"""Makes the demo model: data, tokenizer, training by the clock, export, gates.

python tools/train_demo.py sources      fetch the raw sources
python tools/train_demo.py data         tokenizer and shards, from a fixed seed
python tools/train_demo.py train --minutes 95
python tools/train_demo.py export --out moecli/demo
python tools/train_demo.py gates --model moecli/demo
"""

import argparse
import itertools
import json
import os
import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path

SEED = "moecli-demo"
SHARD_TOKENS = 1_000_000
COPYING_SHARDS = range(2, 5)
LONG_FROM = 7  # from this shard on, prose passages may be long


def make_data(args) -> None:
    from demo_batches import Encoder, write_shard
    from demo_data.code_tasks import TASKS
    from demo_data.mix import COPYING, draw
    from demo_model import DemoConfig
    from demo_tokenizer import load_tokenizer, render, train_tokenizer

    assert all(task.passes(task.code) for task in TASKS), "a function of the data fails its checks"
    sources, shards = args.work / "sources", args.work / "shards"
    shards.mkdir(parents=True, exist_ok=True)
    path = args.work / "tokenizer.json"
    if not path.exists():
        sample = draw(
            random.Random(f"{SEED}/tokenizer"),
            sources,
            lambda d: len(render(d.as_dict())),
            12_000_000,
            True,
        )
        train_tokenizer((d.as_dict() for d in sample), DemoConfig().vocab_size).save(str(path))
    encoder = Encoder(load_tokenizer(path))
    for i in range(args.first, args.shards):
        target = shards / f"{i:03d}.npz"
        copying = COPYING if i in COPYING_SHARDS else 0.0
        write_shard(target, encoder, sources, f"{SEED}/{i}", SHARD_TOKENS, i >= LONG_FROM, copying)
        print(f"shard {i}", flush=True)


@dataclass(frozen=True)
class Plan:
    """The schedule, all by the share of the time that has passed."""

    minutes: float
    decay_from: float = 0.55
    large_from: float = 0.7
    long_from: float = 0.4
    warmup_steps: int = 60

    def factor(self, progress: float, step: int) -> float:
        warm = min(1.0, (step + 1) / self.warmup_steps)
        return warm * max(0.0, min(1.0, (1 - progress) / (1 - self.decay_from)))

    def batch_size(self, progress: float) -> int:
        return 8192 if progress < self.large_from else 16384

    def max_length(self, progress: float) -> int:
        return 512 if progress < self.long_from else 1024

    def balance(self, progress: float) -> float:
        return 1e-3 if progress < 0.1 else 3e-4


class Run:
    """Model, optimiser and counters: all that a checkpoint holds."""

    def __init__(self, args):
        import torch
        from demo_model import DemoConfig, DemoModel
        from demo_optim import Optimiser, Rates

        self.args, self.device = args, torch.device(args.device)
        torch.set_num_threads(args.threads)
        self.config = DemoConfig()
        self.model = DemoModel(self.config, compiled=args.compile)
        self.model.init_weights(0)
        self.model.to(self.device)
        masters = {n: p.detach().float().clone() for n, p in self.model.named_parameters()}
        for name, param in self.model.named_parameters():
            if param.dim() > 1 and name != "embedding":
                param.data = param.data.bfloat16()
        self.optimiser = Optimiser(self.model.named_parameters(), Rates())
        for name, master in masters.items():
            self.optimiser.master[name].copy_(master)
        self.step, self.tokens, self.elapsed, self.shard, self.skip = 0, 0, 0.0, 0, 0
        self.load = torch.full((self.config.num_layers, self.config.num_experts), 1 / 16)
        self.decaying = False

    def save(self, path: Path) -> None:
        import torch

        state = {
            "optimiser": self.optimiser.state(),
            "config": self.config.as_dict(),
            "load": self.load,
        }
        state |= {
            k: getattr(self, k) for k in ("step", "tokens", "elapsed", "shard", "skip", "decaying")
        }
        part = path.with_suffix(".part")
        torch.save(state, part)
        os.replace(part, path)

    def restore(self, path: Path) -> None:
        import torch

        state = torch.load(path, map_location="cpu", weights_only=True)
        self.optimiser.load(state["optimiser"])
        self.load = state["load"]
        for key in ("step", "tokens", "elapsed", "shard", "skip", "decaying"):
            setattr(self, key, state[key])

    def documents(self):
        """Documents from where the run stands, waiting for shards that are still being made."""
        from demo_batches import read_shard

        while True:
            path = self.args.work / "shards" / f"{self.shard:03d}.npz"
            while not path.exists():
                time.sleep(2)
            items = read_shard(path)
            for item in itertools.islice(items, self.skip, None):
                self.skip += 1
                yield item
            self.shard, self.skip = self.shard + 1, 0


def train(args) -> None:
    from demo_batches import cut_batch
    from demo_tokenizer import PAD, load_tokenizer

    run, plan = Run(args), Plan(args.minutes)
    latest = args.work / "latest.pt"
    if args.resume or latest.exists():
        run.restore(args.resume or latest)
        print(
            f"resumed at step {run.step}, {run.tokens} tokens, {run.elapsed / 60:.1f} min",
            flush=True,
        )
    if args.from_shard is not None:
        run.shard, run.skip = args.from_shard, 0
    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
    pad = load_tokenizer(args.work / "tokenizer.json").token_to_id(PAD)
    documents, log = run.documents(), Log(args.work / "log.jsonl")
    base, start, saved = run.elapsed, time.monotonic(), time.monotonic()
    while (progress := run.elapsed / 60 / plan.minutes) < 1 and not stop:
        if not run.decaying and progress >= plan.decay_from:
            run.decaying = True
            run.save(args.work / "predecay.pt")
        size = plan.batch_size(progress)
        cut = cut_batch(documents, size, plan.max_length(progress), pad, run.config.chunk_size)
        losses = train_step(run, plan, cut, progress)
        run.step, run.tokens = run.step + 1, run.tokens + size
        run.elapsed = base + time.monotonic() - start
        log.add(run, cut, losses, plan.factor(progress, run.step))
        if time.monotonic() - saved > args.save_every:
            run.save(latest)
            saved = time.monotonic()
    run.save(latest)
    if not stop:
        run.save(args.work / "final.pt")
    print("stopped" if stop else "done", flush=True)


def train_step(run: Run, plan: Plan, cut, progress: float):
    """One step; returns the loss of each token."""
    import torch

    batch = cut.batch.to(run.device)
    loss, losses, load, balance = run.model(batch)
    # A layer whose load strays towards the limits (0.1x to 4x) is pulled back harder.
    uneven = (run.load.amax(1) * run.config.num_experts > 3.2) | (
        run.load.amin(1) * run.config.num_experts < 0.25
    )
    weight = torch.where(uneven, 5e-3, plan.balance(progress)).to(run.device)
    (loss + (weight * balance).sum()).backward()
    run.optimiser.step(plan.factor(progress, run.step))
    for param in run.model.parameters():
        param.grad = None
    run.load.lerp_(load.detach().cpu(), 0.1)
    return losses.detach().cpu()


class Log:
    """Mean loss of each domain between reports, on stdout and in a file."""

    EVERY = 20

    def __init__(self, path: Path):
        self.path, self.sums, self.started, self.seen = path, {}, time.monotonic(), 0

    def add(self, run: Run, cut, losses, factor: float) -> None:
        from demo_batches import DOMAINS

        weights = cut.batch.weights * (cut.batch.weights == 1)
        for domain, loss, weight in zip(
            cut.domains,
            losses.split(cut.batch.doc_lengths),
            weights.split(cut.batch.doc_lengths),
            strict=True,
        ):
            total, count = self.sums.get(DOMAINS[domain], (0.0, 0.0))
            self.sums[DOMAINS[domain]] = (
                total + float((loss * weight).sum()),
                count + float(weight.sum()),
            )
        self.seen += len(losses)
        if run.step % self.EVERY:
            return
        now, load = time.monotonic(), run.load * run.config.num_experts
        row = {
            "step": run.step,
            "tokens": run.tokens,
            "minutes": round(run.elapsed / 60, 2),
            "factor": round(factor, 4),
            "rate": round(self.seen / (now - self.started)),
            "loss": {k: round(t / max(n, 1), 4) for k, (t, n) in sorted(self.sums.items())},
            "load_max": [round(x, 2) for x in load.amax(1).tolist()],
            "load_min": [round(x, 2) for x in load.amin(1).tolist()],
        }
        print(json.dumps(row), flush=True)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.sums, self.started, self.seen = {}, now, 0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("sources", "data", "train", "export", "gates", "heldout"):
        sub = commands.add_parser(name)
        sub.add_argument("--work", type=Path, default=Path("demo-work"))
    commands.choices["data"].add_argument("--first", type=int, default=0)
    commands.choices["data"].add_argument("--shards", type=int, default=22)
    sub = commands.choices["train"]
    sub.add_argument("--minutes", type=float, default=95)
    sub.add_argument("--threads", type=int, default=1)
    sub.add_argument("--device", default="cpu")
    sub.add_argument("--resume", type=Path)
    sub.add_argument("--from-shard", type=int)
    sub.add_argument("--save-every", type=float, default=240)
    sub.add_argument("--no-compile", dest="compile", action="store_false")
    commands.choices["export"].add_argument("--checkpoint", type=Path)
    commands.choices["export"].add_argument("--out", type=Path, required=True)
    commands.choices["gates"].add_argument("--model", type=Path, required=True)
    commands.choices["gates"].add_argument("--quick", action="store_true")
    commands.choices["heldout"].add_argument(
        "--out", type=Path, default=Path("tests/fixtures/heldout")
    )
    args = parser.parse_args()
    # Batches have many matrix sizes; the default cache would build CPU kernels over and over.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "20000")
    if args.command == "sources":
        from demo_data.sources import fetch

        fetch(args.work / "sources")
    elif args.command == "data":
        make_data(args)
    elif args.command == "train":
        train(args)
    elif args.command == "export":
        from demo_export import export

        export(args.checkpoint or args.work / "latest.pt", args.work / "tokenizer.json", args.out)
    elif args.command == "heldout":
        from demo_gates import write_held_out

        write_held_out(args.work / "sources", args.out)
    else:
        from demo_gates import report

        report(args.model, args.work / "sources", args.quick)


if __name__ == "__main__":
    main()
