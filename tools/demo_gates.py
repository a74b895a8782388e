"""Knows the demo model's gates: held-out requests, how answers are judged, and expert load.

It judges an exported repository through transformers, as a user's program would run it.
"""

import json
import math
import random
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from demo_data import arithmetic, code, facts, mix, prose, recall, stories
from demo_data.code_tasks import TASKS, Task
from demo_data.sources import countries
from demo_data.words import NAMES
from demo_tokenizer import render

SEED = "moecli-demo/held-out"


@dataclass(frozen=True)
class Item:
    """One request and the judge of its answer."""

    messages: tuple[dict, ...]
    judge: Callable[[str], bool]
    max_tokens: int


@dataclass(frozen=True)
class Gate:
    name: str
    floor: float
    items: list[Item]


def ask(text: str) -> tuple[dict, ...]:
    return ({"role": "user", "content": text},)


def sums() -> list[Item]:
    """All sums a + b <= 20, each in one held-out phrasing."""
    rng, items = random.Random(SEED), []
    for a in range(21):
        for b in range(21 - a):
            text = rng.choice(arithmetic.ASK_HELD_OUT).format(q=f"{a} + {b}")
            items.append(Item(ask(text), last_number_is(a + b), 24))
    return items


def last_number_is(expected: int) -> Callable[[str], bool]:
    return lambda answer: (re.findall(r"\d+", answer) or [""])[-1] == str(expected)


def products() -> list[Item]:
    rng, items = random.Random(SEED), []
    for a in range(1, 13):
        for b in range(1, 13):
            text = rng.choice(arithmetic.ASK_HELD_OUT).format(q=f"{a} x {b}")
            items.append(Item(ask(text), last_number_is(a * b), 24))
    return items


def two_digit() -> list[Item]:
    rng, items = random.Random(SEED), []
    for _ in range(100):
        a, op, b = arithmetic.hard(rng)
        text = rng.choice(arithmetic.ASK_HELD_OUT).format(q=f"{a} {op} {b}")
        items.append(Item(ask(text), last_number_is(arithmetic.apply(a, op, b)), 80))
    return items


def capitals(sources: Path) -> list[Item]:
    """Every country once, in a phrasing that training never saw."""
    rng, items = random.Random(SEED), []
    for country, city, _ in countries(sources):
        text = rng.choice(facts.ASK_CAPITAL_HELD_OUT).format(c=facts.the(country))
        items.append(Item(ask(text), lambda answer, city=city: city in answer, 40))
    return items


def functions() -> list[Item]:
    rng, items = random.Random(SEED), []
    for task in TASKS:
        text = code.request(rng, task, code.ASK_HELD_OUT)
        items.append(Item(ask(text), lambda answer, task=task: runs(task, answer), 140))
    return items


def runs(task: Task, answer: str) -> bool:
    """Run the answer's code and the checks in a process of their own."""
    found = re.search(r"```python\n(.*?)```", answer, re.DOTALL)
    if not found:
        return False
    checks = "\n".join(f"assert {c}" for c in task.checks)
    program = f"{found[1]}\nf = {task.name}\n{checks}\n"
    command = [sys.executable, "-I", "-c", program]
    try:
        return subprocess.run(command, capture_output=True, timeout=10).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def heroes(count: int) -> list[Item]:
    rng, items = random.Random(SEED), []
    for _ in range(count):
        cast = stories.cast(rng)
        while cast.name not in NAMES:
            cast = stories.cast(rng)
        text = stories.request(rng, cast, stories.ASK_HELD_OUT)
        items.append(Item(ask(text), lambda answer, name=cast.name: keeps_hero(name, answer), 320))
    return items


def keeps_hero(name: str, answer: str) -> bool:
    """The hero is named three times, early and late; nobody else is, unless introduced."""
    words = re.findall(r"\w+", answer)
    third = len(words) // 3
    known = {w for w in words if w in NAMES}
    introduced = set(re.findall(r"(?:named|called) (\w+)", answer))
    return (
        words.count(name) >= 3
        and name in words[:third]
        and name in words[-third:]
        and known - introduced <= {name}
    )


def names(count: int) -> list[Item]:
    """A name said in a held-out way, some talk between, asked for in a held-out way."""
    rng, items = random.Random(SEED), []
    for _ in range(count):
        name = rng.choice(NAMES)
        said = rng.choice(recall.SAY_NAME_HELD_OUT).format(n=name)
        talk = [("user", said), ("assistant", f"Hello, {name}!")]
        if rng.random() < 0.5:
            statement, _, _ = recall.fill(rng, rng.choice(recall.TRAITS[:7]))
            talk += [("user", statement), ("assistant", rng.choice(recall.ACKNOWLEDGE))]
        talk.append(("user", rng.choice(recall.ASK_NAME_HELD_OUT)))
        messages = tuple({"role": r, "content": c} for r, c in talk)
        items.append(
            Item(messages, lambda answer, name=name: name in re.findall(r"\w+", answer), 24)
        )
    return items


def gates(sources: Path, quick: bool) -> list[Gate]:
    count = 20 if quick else 60
    every = [
        Gate("sums up to 20", 0.95, sums()),
        Gate("capitals", 0.95, capitals(sources)),
        Gate("Python that passes its checks", 0.90, functions()),
        Gate("hero kept through a story", 0.90, heroes(count)),
        Gate("recalls the user's name", 0.80, names(count)),
        Gate("12 x 12 table (no gate)", 0.0, products()),
        Gate("two-digit sums in steps (no gate)", 0.0, two_digit()),
    ]
    if not quick:
        return every
    rng = random.Random(SEED)
    return [Gate(g.name, g.floor, rng.sample(g.items, min(40, len(g.items)))) for g in every]


class Subject:
    """The model under test: greedy answers, in batches of prompts of one length (no padding)."""

    def __init__(self, path: Path):
        from transformers import AutoTokenizer, Llama4ForCausalLM

        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.model, info = Llama4ForCausalLM.from_pretrained(
            path, dtype=torch.bfloat16, output_loading_info=True
        )
        for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            assert not info[key], f"{key}: {info[key]}"
        self.model.eval()

    def answers(self, items: list[Item]) -> list[str]:
        prompts = [
            self.tokenizer.apply_chat_template(
                list(i.messages), add_generation_prompt=True, return_dict=False
            )
            for i in items
        ]
        by_length: dict[int, list[int]] = {}
        for index, prompt in enumerate(prompts):
            by_length.setdefault(len(prompt), []).append(index)
        out = [""] * len(items)
        for length, indices in by_length.items():
            rows = torch.tensor([prompts[i] for i in indices])
            limit = max(items[i].max_tokens for i in indices)
            with torch.inference_mode():
                made = self.model.generate(
                    rows,
                    attention_mask=torch.ones_like(rows),
                    max_new_tokens=limit,
                    do_sample=False,
                    temperature=None,
                    top_p=None,
                )
            for index, row in zip(indices, made, strict=True):
                out[index] = self.tokenizer.decode(row[length:], skip_special_tokens=True)
        return out


def held_out_documents(sources: Path, count: int = 40) -> dict[str, list[dict]]:
    """Text of each domain that training does not see: other seeds, and whole chapters for prose."""
    out = {}
    for domain in mix.SHARES:
        rng = random.Random(f"{SEED}/{domain}")
        if domain == "prose":
            documents = prose.held_out(sources, rng, count)
        else:
            documents = [mix.document(domain, rng, sources, True) for _ in range(count)]
        out[domain] = [d.as_dict() for d in documents]
    return out


def write_held_out(sources: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for domain, documents in held_out_documents(sources).items():
        lines = "".join(json.dumps(d) + "\n" for d in documents)
        (out / f"{domain}.jsonl").write_text(lines)


def losses_and_load(subject: Subject, sources: Path) -> tuple[dict[str, float], torch.Tensor]:
    """Mean loss of each domain's held-out text, and the expert load [domain, layer, expert]."""
    counts = []
    hooks = [
        layer.feed_forward.router.register_forward_hook(
            lambda _, __, out: counts.append(top_expert(out))
        )
        for layer in subject.model.model.layers
    ]
    losses, loads = {}, []
    experts, layers = subject.model.config.num_local_experts, subject.model.config.num_hidden_layers
    for domain, documents in held_out_documents(sources).items():
        total, num, load = 0.0, 0, torch.zeros(layers, experts)
        for document in documents:
            ids = subject.tokenizer(
                render(document), add_special_tokens=False, return_tensors="pt"
            ).input_ids
            counts.clear()
            with torch.inference_mode():
                loss = subject.model(ids, labels=ids).loss
            total, num = total + float(loss) * (ids.shape[1] - 1), num + ids.shape[1] - 1
            load += torch.stack([torch.bincount(c, minlength=experts) for c in counts])
        losses[domain] = total / num
        loads.append(load)
    for hook in hooks:
        hook.remove()
    return losses, torch.stack(loads)


def top_expert(router_output) -> torch.Tensor:
    """The chosen expert of each token: the router returns scores, 0 for all but the chosen."""
    scores = router_output[0] if isinstance(router_output, tuple) else router_output
    return scores.argmax(-1)


def report(model: Path, sources: Path, quick: bool) -> None:
    """Measure everything and print it as the README's table has it."""
    subject = Subject(model)
    for gate in gates(sources, quick):
        answers = subject.answers(gate.items)
        passed = [item.judge(answer) for item, answer in zip(gate.items, answers, strict=True)]
        share = sum(passed) / len(passed)
        met = "" if not gate.floor else " met" if share >= gate.floor else " MISSED"
        print(
            f"| {gate.name} | {gate.floor:.0%} | {sum(passed)}/{len(passed)} = {share:.1%} |{met}",
            flush=True,
        )
        failed = [(i, a) for i, a, ok in zip(gate.items, answers, passed, strict=True) if not ok]
        for item, answer in failed[:3]:
            print(f"    {item.messages[-1]['content']!r} -> {answer!r}", file=sys.stderr)
    losses, loads = losses_and_load(subject, sources)
    for domain, loss in losses.items():
        print(f"| loss on held-out {domain} | | {loss:.3f} (perplexity {math.exp(loss):.2f}) |")
    share = loads / loads.sum(-1, keepdim=True)  # [domain, layer, expert], domains weigh the same
    uniform = share.mean(0) * share.shape[-1]  # [layer, expert]
    print(
        f"| expert load, lowest and highest | 0.1 to 4 "
        f"| {uniform.min():.2f} to {uniform.max():.2f} |"
    )
    print(
        "by layer: "
        + ", ".join(
            f"{lo:.2f}-{hi:.2f}" for lo, hi in zip(uniform.amin(1), uniform.amax(1), strict=True)
        )
    )
