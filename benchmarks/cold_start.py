"""How long a model that lies in the page cache takes from opening it to its first token.

    python benchmarks/cold_start.py MODEL_DIR [--rounds N] [--kernels NAME] [--json FILE]

Every round is a process of its own. Imports are timed apart. Besides what was read, it is told how
long the same process takes to read as many bytes of the same files again, into memory that nobody
has touched before: the time that the bytes themselves need.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

CHILD = """
import json, mmap, os, sys, time
begin = time.perf_counter()
from pathlib import Path
import moecli.engine
from moecli.config import EngineConfig, SamplingConfig
imported = time.perf_counter()
path, kernels = Path(sys.argv[1]), sys.argv[2]
with moecli.engine.Engine.open(path, EngineConfig(ctx=512, kernels=kernels)) as engine:
    opened = time.perf_counter()
    session = engine.new_session()
    prompt = engine.encode_text("Hello")
    sampling = SamplingConfig(temperature=0, max_tokens=1)
    list(engine.generate(session, prompt, sampling))
    first = time.perf_counter()
    plan = engine.plan
    nbytes = plan.dense_nbytes + plan.embedding_nbytes + engine.expert_stats().disk_nbytes
    hits = engine.expert_stats().hit_rate
    # What is loaded by now: the second answer costs computing alone.
    again = time.perf_counter()
    session.tokens.clear(); session.cache.truncate(0)
    list(engine.generate(session, prompt, sampling))
    computed = time.perf_counter() - again
read = time.perf_counter()
left = nbytes
with mmap.mmap(-1, nbytes + (1 << 20)) as block:
    for file in sorted(path.glob("*.safetensors")):
        descriptor = os.open(file, os.O_RDONLY)
        at = 0
        while left > 0 and at < os.fstat(descriptor).st_size:
            with memoryview(block)[nbytes - left : nbytes - left + min(left, 4 << 20)] as target:
                count = os.preadv(descriptor, [target], at)
            at, left = at + count, left - count
        os.close(descriptor)
bytes_s = time.perf_counter() - read
print(json.dumps({"import_s": imported - begin, "open_s": opened - imported,
                  "first_token_s": first - opened, "computing_s": computed, "bytes_s": bytes_s,
                  "nbytes": nbytes, "beyond_bytes_s": first - imported - bytes_s,
                  "tokens": len(prompt)}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    size = 0
    for file in sorted(options.model.glob("*.safetensors")):
        with file.open("rb") as data:
            while block := data.read(16 << 20):  # into the page cache
                size += len(block)
    command = [sys.executable, "-c", CHILD, str(options.model), options.kernels]
    found = []
    for _ in range(options.rounds):
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found.append(json.loads(done.stdout))
    medians = {name: statistics.median(round_[name] for round_ in found) for name in found[0]}
    row = {"model_nbytes": size, **medians}
    print(f"{size / 2**30:.1f} GiB on disk, {row['nbytes'] / 2**30:.2f} GiB needed, medians in s:")
    for name in ("import", "open", "first_token", "computing", "bytes", "beyond_bytes"):
        each = [round_[f"{name}_s"] for round_ in found]
        print(f"{name:12}  {row[f'{name}_s']:.2f}  ({min(each):.2f} to {max(each):.2f})")
    if options.json is not None:
        options.json.write_text(json.dumps(row, indent=1) + "\n")


if __name__ == "__main__":
    main()
