#!/usr/bin/env python
"""Golden cross-entropies for tests/it/models/evaluate.rs, by unmodified transformers.

    python tools/make_evaluation_fixture.py          # writes tests/fixtures/evaluate.json
    python tools/make_evaluation_fixture.py MODEL TEXT_DIR [WINDOW [MAX_WINDOWS]]

With arguments it prints the perplexity of any decoder-only checkpoint on TEXT_DIR/*.txt, for
comparison with `mcsmoe evaluate`. Weights are upcast to f32; windows are the first
MAX_WINDOWS // files of every file, without special tokens. Needs torch, transformers 5, numpy.
"""
import json
import math
import sys
from pathlib import Path

import numpy as np
import stock
import torch
from transformers import AutoTokenizer

FIXTURES = Path(__file__).resolve().parent.parent / "tests" / "fixtures"
torch.set_num_threads(1)


def cross_entropy(logits, targets):
    loss = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
    return loss.double().item()


def causal(folder, text_dir, window, max_windows):
    """Summed nats and predicted tokens per file."""
    model = stock.load(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    paths = sorted(Path(text_dir).glob("*.txt"))
    files = {}
    for path in paths:
        ids = tokenizer(path.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
        total, count = 0.0, 0
        for w in range(min(max(1, max_windows // len(paths)), len(ids) // window)):
            x = torch.tensor([ids[w * window:(w + 1) * window]])
            with torch.inference_mode():
                logits = model(input_ids=x, use_cache=False).logits[0, :-1]
            total += cross_entropy(logits, x[0, 1:])
            count += window - 1
        files[path.stem] = dict(nll=total / count, tokens=count)
    return files


def corrupt(ids, seed, sentinels, end, density=0.15, mean_span=3.0):
    """T5 span corruption: input and targets."""
    rng = np.random.default_rng(seed)
    hidden = max(1, round(len(ids) * density))
    spans = min(max(1, round(hidden / mean_span)), len(sentinels))

    def composition(total):
        cuts = rng.choice(total - 1, spans - 1, replace=False) if spans > 1 else []
        return np.diff([0, *sorted(int(c) + 1 for c in cuts), total]).tolist()

    lengths, gaps = composition(hidden), composition(len(ids) - hidden)
    source, target, at = [], [], 0
    for gap, length, sentinel in zip(gaps, lengths, sentinels):
        source += [*ids[at:at + gap], sentinel]
        target += [sentinel, *ids[at + gap:at + gap + length]]
        at += gap + length
    return [*source, end], [*target, end]


def switch(folder, windows, length, seed):
    """Windows of made-up tokens, the same as in the test."""
    model = stock.load(folder)
    ids = [20 + (7 * i * i + 3 * i) % 44 for i in range(windows * length)]
    total, count = 0.0, 0
    for w in range(windows):
        x, y = corrupt(ids[w * length:(w + 1) * length], seed + w, range(2, 18), 1)
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([x]), labels=torch.tensor([y])).logits[0]
        total += cross_entropy(logits, torch.tensor(y))
        count += len(y)
    return dict(windows=windows, window=length, seed=seed, nll=total / count, tokens=count)


def main():
    if len(sys.argv) > 2:
        window, most = (int(a) for a in (sys.argv[3:5] + ["512", "100"][len(sys.argv) - 3:]))
        files = causal(sys.argv[1], sys.argv[2], window, most)
        tokens = sum(f["tokens"] for f in files.values())
        nll = sum(f["nll"] * f["tokens"] for f in files.values()) / tokens
        print(json.dumps(dict(nll=nll, perplexity=math.exp(nll), tokens=tokens, files=files)))
        return
    window, most = 256, 6
    golden = dict(
        causal=dict(window=window, max_windows=most,
                    files=causal(FIXTURES / "mixtral-8e", FIXTURES / "text", window, most)),
        switch=switch(FIXTURES / "forward" / "switch", 4, 64, 1234),
    )
    (FIXTURES / "evaluate.json").write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
