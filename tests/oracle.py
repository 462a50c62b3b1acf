"""The mathematics once more, formula by formula, with loops over tokens and ranks. Slow, and shares no code."""

from __future__ import annotations

import torch


def token_gate(x, W, b, top_k, expert_rank=1, score="sigmoid", biased=False):
    """Gates (N, r) of a token router; differentiable in x and W."""
    rows = []
    for token in x:
        z = [sum(w_j * x_j for w_j, x_j in zip(w, token)) for w in W]
        if score == "sigmoid":
            scores = [1 / (1 + torch.exp(-z_i)) for z_i in z]
            keys = [s_i + b_i for s_i, b_i in zip(scores, b)]
        else:
            scores = [torch.exp(z_i) for z_i in z]
            keys = [z_i + b_i for z_i, b_i in zip(z, b)]
        order = sorted(range(len(z)), key=lambda i: (-float(keys[i].detach()), i))
        chosen = order[:top_k]
        leaking = [k_i.clamp(min=2**-20) for k_i in keys] if score == "sigmoid" else [torch.exp(k_i) for k_i in keys]
        values = leaking if biased else scores
        total = sum(values[i] for i in chosen)
        gate = [top_k * values[i] / total if i in chosen else 0 * z[i] for i in range(len(z))]
        rows.append(torch.stack([gate[j // expert_rank] for j in range(len(z) * expert_rank)]))
    return torch.stack(rows)


def task_gate(embedding, W, c, task_ids, scaling="linear"):
    """Gates (B, r) of a task router, with the straight-through gradient."""
    num_tasks, r = len(embedding), len(W)
    rows = []
    for t in task_ids.tolist():
        z = torch.stack([(w * embedding[t]).sum() + c_j for w, c_j in zip(W, c)])
        p = torch.exp(z - z.max()) / torch.exp(z - z.max()).sum()
        best = max(range(r), key=lambda j: (float(p[j].detach()), -j))
        gate = []
        for j in range(r):
            factor = {"linear": (best + 1) / num_tasks, "quadratic": ((j + 1) / r) ** 2, "none": 1.0}[scaling]
            inside = 1.0 if j <= best else 0.0
            gate.append(inside * factor * (1 + p[best] - p[best].detach()))
        rows.append(torch.stack(gate))
    return torch.stack(rows)


def update(y, x, A, B, gate, scale):
    """y + s · Σ_j g_j · B[:, j] · (A[j] · x), one rank-one update at a time."""
    rows = []
    for n in range(len(x)):
        row = y[n]
        for j in range(len(A)):
            row = row + scale * gate[n, j] * (A[j] * x[n]).sum() * B[:, j]
        rows.append(row)
    return torch.stack(rows)


def contrastive(h, embedding, task_ids, temperature):
    """MoRE's contrastive loss of one layer."""
    total = 0.0
    for h_i, t_i in zip(h, task_ids.tolist()):
        cos = [(h_i * e).sum() / (h_i.norm() * e.norm()) for e in embedding]
        total = total - torch.log(torch.exp(cos[t_i] / temperature) / sum(torch.exp(c / temperature) for c in cos))
    return total / len(h)
