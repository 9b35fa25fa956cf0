"""What `fastdistill evaluate` must give, row by row, from plain transformers in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def rows_by_hand(documents: list[str], tokenizer: Any, seq_len: int, stride: int) -> list[tuple[list[int], int]]:
    """Of one stream of documents and their ends: each row, and how many of its tokens were predicted before."""
    ids = [i for document in documents for i in [*tokenizer(document)["input_ids"], tokenizer.eos_token_id]]
    rows, new = [], 0
    while new < len(ids):
        start = max(0, new - (seq_len - stride))
        rows.append((ids[start : start + seq_len], new - start))
        new = start + seq_len
    return rows


def means_by_hand(student: Path, teacher: Path, documents: list[str], seq_len: int, stride: int) -> dict[str, float]:
    tokenizer = AutoTokenizer.from_pretrained(student)
    models: list[Any] = [AutoModelForCausalLM.from_pretrained(path).double().eval() for path in (student, teacher)]
    sums = dict.fromkeys(("loss", "kl", "top1_agreement", "top5_overlap", "shared_mass"), 0.0)
    count = text_bytes = 0
    for ids, known in rows_by_hand(documents, tokenizer, seq_len, stride):
        with torch.no_grad():
            log_s, log_t = (model(torch.tensor([ids])).logits[0].log_softmax(-1) for model in models)
        for place in range(max(1, known), len(ids)):
            s, t = log_s[place - 1], log_t[place - 1]
            sums["loss"] -= float(s[ids[place]])
            sums["kl"] += float((t.exp() * (t - s)).sum())
            tops = [set(x.argsort(descending=True)[:5].tolist()) for x in (s, t)]
            sums["top1_agreement"] += float(s.argmax() == t.argmax())
            sums["top5_overlap"] += len(tops[0] & tops[1]) / 5
            sums["shared_mass"] += float(torch.minimum(s.exp(), t.exp()).sum())
            count += 1
            text_bytes += len(tokenizer.decode([ids[place]], skip_special_tokens=True).encode())
    return {name: value / count for name, value in sums.items()} | {"tokens": count, "text_bytes": text_bytes}
