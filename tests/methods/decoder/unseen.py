"""Golden vectors that nobody has seen: seeded inputs of other shapes, and what a slow form of the published rules,
written in NumPy from their description alone, returns for them. The keys are those of the stored vectors.

Each maker returns the arrays and how narrow the closest decision was, relative to the largest score.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Vector = tuple[dict[str, Any], float]
Maker = Callable[[np.random.Generator, str], Vector]


def some(rng: np.random.Generator, low: int, high: int) -> int:
    """A whole number from low to high - 1."""
    return int(rng.integers(low, high))


def softmax(x: Array, axis: int = -1) -> Array:
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def stored(x: Array) -> Array:
    """What is left of values that were rounded to half precision."""
    return x.astype(np.float16).astype(np.float32)


def best(scores: Array, k: int) -> NDArray[np.int64]:
    """The k largest, best first; equal ones: lower index first."""
    return np.argsort(-np.asarray(scores, np.float64), kind="stable")[:k]


def gap(scores: Array, k: int) -> float:
    """Between the k-th best and the next."""
    falling = np.sort(np.asarray(scores, np.float64))[::-1]
    if not 0 < k < len(falling):
        return float("inf")
    return float((falling[k - 1] - falling[k]) / (np.abs(falling).max() + 1e-300))


def apart(values: Array) -> float:
    """The smallest difference of two values."""
    return float(np.diff(np.sort(values)).min()) / (np.abs(values).max() + 1e-300) if len(values) > 1 else float("inf")


def attention(rng: np.random.Generator, shape: tuple[int, ...], kind: str) -> Array:
    """Rows of softmax. kind: "sharp" near 0 and 1, "twice" with each column twice, "plain"."""
    logits = rng.standard_normal(shape) * (20 if kind == "sharp" else 2)
    if kind == "twice":
        logits = np.repeat(logits, 2, -1)[..., : shape[-1]]
    return stored(softmax(logits))


def states(rng: np.random.Generator, shape: tuple[int, ...], kind: str = "plain") -> Array:
    """Features. kind: "sharp" of ten thousand, "twice" with each row twice, "plain"."""
    x = rng.standard_normal(shape)
    if kind == "twice":
        x = np.repeat(x, 2, -2)[..., : shape[-2], :]
    return stored(x) * np.float32(1e4 if kind == "sharp" else 1)


def fastv(rng: np.random.Generator, kind: str) -> Vector:
    n, start, heads = some(rng, 1, 600), some(rng, 0, 40), some(rng, 1, 9)
    length = start + n + some(rng, 1, 60)
    rows, hidden = attention(rng, (1, heads, length), kind), states(rng, (1, length, 3))
    out: dict[str, Any] = {"attn_last_row": rows, "hidden": hidden, "image_start": start, "image_len": n}
    scores, narrow = rows[0].mean(0)[start : start + n], float("inf")
    for drop in rng.choice(101, 3, replace=False).tolist():
        k = round(n * (1 - drop / 100))
        narrow = min(narrow, gap(scores, k))
        kept = np.sort(np.concatenate([np.arange(start), start + best(scores, k), np.arange(start + n, length)]))
        out |= {f"keep_r{drop}": kept, f"pos_r{drop}": kept[None], f"hidden_r{drop}": hidden[0][kept]}
    return out, narrow


def turned(x: Array, places: Array) -> Array:
    """Rotary positions, base 10,000. x: (H, n, d), places: (n,)."""
    width = x.shape[-1]
    angle = np.tile(places[:, None] / 10000 ** (np.arange(0, width, 2) / width), 2)
    return x * np.cos(angle) + np.concatenate([-x[..., width // 2 :], x[..., : width // 2]], -1) * np.sin(angle)


def pyramiddrop(rng: np.random.Generator, kind: str) -> Vector:
    heads, d, rows = int(rng.choice([1, 2, 4])), int(rng.choice([2, 4, 8])), some(rng, 1, 4)
    start, total, width, stages = some(rng, 0, 30), some(rng, 1, 200), heads * d, some(rng, 1, 5)
    ratios = np.sort(rng.choice([0.05, 0.125, 0.25, 0.29, 0.4, 0.57, 0.75, 0.9, 1.0], stages, replace=False))[::-1]
    words = start + rng.integers(1, 20, rows)
    lengths = words + total + rng.integers(0, 6, rows)  # answers behind the prompt
    mask = np.arange(lengths.max()) < lengths[:, None]
    features = states(rng, (rows, int(lengths.max()), width), kind) * mask[..., None]
    wq, wk = (stored(rng.standard_normal((width, width)) * 2 * width**-0.5) for _ in range(2))
    out: dict[str, Any] = {"features": features, "attention_mask": mask, "wq": wq, "wk": wk, "heads": heads}
    out |= {"image_start": start, "image_len": total, "ratios": np.r_[1.0, ratios], "prompt_len": words}
    left, narrow = [np.arange(n) for n in lengths], float("inf")
    count = total
    for stage, ratio in enumerate(ratios.tolist()):
        for b in range(rows):
            x = features[b][left[b]].astype(np.float64)
            q, k = (
                turned((x @ w.T).reshape(-1, heads, d).transpose(1, 0, 2), np.arange(len(x)).astype(float))
                for w in (wq.astype(np.float64), wk.astype(np.float64))
            )
            last = int(words[b]) + count - 1
            seen = softmax(np.einsum("hd,hnd->hn", q[:, last], k[:, : last + 1]) / d**0.5).mean(0)
            seen = seen[start : start + count]
            narrow = min(narrow, gap(seen, int(total * ratio)))
            stays = start + np.sort(best(seen, int(total * ratio)))
            left[b] = left[b][np.r_[0:start, stays, start + count : len(x)].astype(int)]
        count = int(total * ratio)
        size = np.array([len(at) for at in left])
        real = np.arange(size.max()) < size[:, None]
        kept, held = np.full(real.shape, -1), np.zeros((*real.shape, width), np.float32)
        for b in range(rows):
            kept[b, real[b]], held[b, real[b]] = left[b], features[b][left[b]]
        out |= {f"kept_rows_{stage}": kept, f"features_{stage}": held, f"attention_mask_{stage}": real}
        out[f"position_ids_{stage}"] = np.where(real, np.arange(real.shape[1]), 0)
    return out, narrow


def clusters(x: Array, c: int) -> tuple[Array, float]:
    """DPC-kNN with c neighbours, the point itself among them, and c centres; sums divided by size + 1e-6."""
    if c == 1:  # whichever is the centre, all are its cluster
        return x.sum(0, keepdims=True) / (len(x) + 1e-6), float("inf")
    distance = np.sqrt(((x[:, None] - x[None]) ** 2).sum(-1)) / x.shape[1] ** 0.5
    density = np.exp(-(np.sort(distance, 1)[:, :c] ** 2).mean(1))
    away = [distance[i][density > density[i]].min(initial=distance.max()) for i in range(len(x))]
    worth = np.array(away) * density
    centres = best(worth, c)
    home = distance[centres].argmin(0)
    home[centres] = np.arange(c)
    near = np.sort(np.delete(distance[centres], centres, 1), 0)
    narrow = min([gap(worth, c), apart(density), apart(worth[centres]), *((near[1] - near[0]) / distance.max())])
    return np.stack([x[home == j].sum(0) / ((home == j).sum() + 1e-6) for j in range(c)]), narrow


def sparsevlm_clusters(rng: np.random.Generator, kind: str) -> Vector:
    n, d = some(rng, 2, 40), some(rng, 4, 40)
    x = states(rng, (1, n, d))
    if kind == "twice":  # in clumps
        x = stored(x * 0.3 + states(rng, (1, 5, d))[:, rng.integers(0, 5, n)])
    if kind == "sharp":  # a few channels that are large everywhere
        x = stored(x + 100.0 * (np.arange(d) < 2))
    out: dict[str, Any] = {"x": x}
    narrow = float("inf")
    for c in {1, some(rng, 1, n + 1)}:
        merged, close = clusters(x[0].astype(np.float64), c)
        out[f"merged_c{c}"], narrow = merged[None].astype(np.float32), min(narrow, close)
    return out, narrow


def sparsevlm_stage(rng: np.random.Generator, kind: str) -> Vector:
    start, n, words, heads = (some(rng, *ends) for ends in ((0, 40), (2, 120), (2, 30), (1, 6)))
    length, image = start + n + words, slice(start, start + n)
    hidden = stored(states(rng, (1, length, some(rng, 2, 40))) * rng.choice([0.3, 1, 2.5]))
    rows = np.zeros((1, heads, words, length), np.float32)
    for i in range(words):
        rows[0, :, i, : start + n + i + 1] = attention(rng, (heads, start + n + i + 1), "plain")
    visual = hidden[0, image].astype(np.float64)
    scores = softmax(visual @ hidden[0, start + n :].T.astype(np.float64), 1).mean(0)
    raters = np.flatnonzero(scores > scores.mean())
    relation = rows[0].astype(np.float64).mean(0)[raters][:, image].mean(0)
    k = min(some(rng, 1, n + 20), n - 1)
    keep = np.isin(np.arange(n), best(relation, k))
    gone = np.flatnonzero(~keep)
    again = int(len(gone) * 0.3) + 1
    merged, narrow = clusters(visual[gone[best(relation[gone], again)]], int(again / 10) + 1)
    narrow = min(narrow, gap(relation, k), gap(relation[gone], again), float(np.abs(scores - scores.mean()).min()))
    looks = attention(rng, (some(rng, 14, 40), 5, 9), "plain")
    whole = np.concatenate([hidden[0, :start], visual[keep], hidden[0, start + n :]]).astype(np.float32)
    shorter = np.concatenate([whole[: start + k], merged, whole[start + k :]]).astype(np.float32)
    places = np.r_[0:start, start + np.flatnonzero(keep), start + n : length]
    out: dict[str, Any] = {"attn_text_rows": rows, "hidden_in": hidden, "heads_in": looks}
    out |= {"rater_score": scores[None].astype(np.float32), "rater_idx": raters}
    out["heads_top14"] = best(looks.sum((1, 2)), 14)
    for name, sequence, ids in (("v1", shorter, np.arange(len(shorter))), ("v2", whole, places)):
        out |= {f"{name}_keep_mask": keep[None], f"{name}_relation": relation[None].astype(np.float32)}
        out |= {f"{name}_hidden_out": sequence[None], f"{name}_position_ids": ids[None]}
        out[f"{name}_v_token_num"] = k + (len(merged) if name == "v1" else 0)
    return out, min(narrow, gap(looks.sum((1, 2)), 14))


def sparsevlm_rank(rng: np.random.Generator, kind: str) -> Vector:
    heads, words, n = some(rng, 1, 5), some(rng, 1, 30), some(rng, 2, 600)
    few = some(rng, 1, words + 1)
    mixed = rng.random((words, few))
    mixed /= mixed.sum(1, keepdims=True)
    rows = np.einsum("tq,bhqn->bhtn", mixed, attention(rng, (1, heads, few, n), kind)).astype(np.float32)
    seen = rows[0].mean(0)
    rank, relation, narrow = int(np.linalg.matrix_rank(seen)), seen.astype(np.float64).mean(0), float("inf")
    out: dict[str, Any] = {"attn_text_to_visual": rows, "relation": relation[None].astype(np.float32), "rank": rank}
    for scale, bias in ((13.5, 0.0), (9.0, 6.0), (0.8, 0.0)):
        k = min(int(rank * scale + bias), n - 1)
        out[f"mask_s{scale}_b{bias}"] = np.isin(np.arange(n), best(relation, k))[None]
        narrow = min(narrow, gap(relation, k))
    return out, narrow


def mustdrop_filter(rng: np.random.Generator, kind: str) -> Vector:
    heads, words, n = some(rng, 1, 6), some(rng, 1, 30), some(rng, 1, 600)
    rows = attention(rng, (1, heads, words, n + 20), kind)[..., :n]
    keys = np.sort(rng.choice(n, some(rng, 0, min(n, 50) + 1), replace=False))
    out: dict[str, Any] = {"attn_text_to_visual": rows, "key_set": keys}
    seen, narrow, stays = rows[0].astype(np.float64).mean(0), float("inf"), np.arange(n)
    total, most = seen.sum(0), seen.max(0)
    for overall, single in ((0.001, 0.001), (0.011, 0.01), (round(float(rng.random()) * 3 / n, 4), 0.05)):
        stays = np.flatnonzero((total >= total.sum() * overall) | (most >= single))
        out[f"keep_g{overall}_i{single}"] = stays
        narrow = min(narrow, np.abs(total / total.sum() - overall).min(), np.abs(most - single).min())
    union = np.union1d(stays, keys)
    return out | {"union_with_keyset": union, "new_keyset": np.searchsorted(union, keys)}, narrow


def mustdrop_windows(rng: np.random.Generator, kind: str) -> Vector:
    side, d = some(rng, 2, 25), some(rng, 2, 20)
    coarse = rng.standard_normal((side // 4 + 1, side // 4 + 1, d)).repeat(4, 0).repeat(4, 1)[:side, :side]
    x = stored(coarse + rng.standard_normal((side, side, d)) * 0.5 * rng.random((side, side, 1))).reshape(-1, d)
    x *= np.float32(1e4 if kind == "sharp" else 1)
    out: dict[str, Any] = {"x": np.concatenate([states(rng, (1, d)), x])[None], "side": side}
    rows, narrow = x / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True), float("inf")
    for window in {w for w in (2, 3, 5) if w <= side}:
        cells, fit = np.arange(side * side).reshape(side, side), side // window * window
        squares = [
            cells[r : r + window, c : c + window].ravel() for r in range(0, fit, window) for c in range(0, fit, window)
        ]
        pairs = window**2 * (window**2 - 1)
        alike = np.array([((rows[s] @ rows[s].T).sum() - window**2) / pairs for s in squares])
        for percent in (80, 60, some(rng, 1, 100)):
            merges = best(alike, int((alike >= percent / 100).sum()))
            rest = np.setdiff1d(cells, np.concatenate([squares[j] for j in merges]) if len(merges) else [])
            means = [x[squares[j]].mean(0, keepdims=True) for j in merges]
            y = np.concatenate([out["x"][0][:1], *means, x[rest]])
            sizes = np.r_[1, np.full(len(merges), window**2), np.ones(len(rest))]
            out[f"y_w{window}_t{percent}"] = y[None].astype(np.float32)
            out[f"size_w{window}_t{percent}"] = sizes[None, :, None].astype(np.float32)
            narrow = min(narrow, np.abs(alike - percent / 100).min(), apart(alike[merges]))
    return out, narrow


def mustdrop_cache(rng: np.random.Generator, kind: str) -> Vector:
    n, stages = some(rng, 1, 600), []
    out: dict[str, Any] = {}
    for stage in range(some(rng, 1, 6)):
        keep = np.sort(rng.choice(n, some(rng, n // 2, n + 1), replace=False))
        stages.append(keep)
        out[f"stage_keep_{stage}"], n = keep, len(keep)
    chained = np.arange(n)
    for stage in range(len(stages) - 1, -1, -1):
        chained = stages[stage][chained]
        out[f"kv_keep_{stage}"] = chained
    return out, float("inf")


def fitprune(rng: np.random.Generator, kind: str) -> Vector:
    heads, words, n = some(rng, 1, 6), some(rng, 1, 30), some(rng, 1, 200)
    visual = np.zeros((1, heads, n, n), np.float32)
    for i in range(n):
        visual[0, :, i, : i + 1] = attention(rng, (heads, i + 6), "plain")[:, : i + 1]
    text = attention(rng, (1, heads, words, n + 20), "plain")[..., :n]
    cross, own = text[0].astype(np.float64).max(0).sum(0), visual[0].astype(np.float64).max(0).sum(0) / n
    out: dict[str, Any] = {"attn_visual_rows": visual, "attn_text_rows": text}
    out |= {"cross": cross.astype(np.float32), "self": own.astype(np.float32)}
    order, narrow = np.argsort(cross * own, kind="stable"), float("inf")
    for gone in {0, n - 1, some(rng, 0, n)}:
        out[f"deleted_{gone}"], narrow = order[:gone], min(narrow, gap(cross * own, n - gone))
    return out, narrow


def neighbours(values: Array) -> Array:
    """Mean of five, zeros outside counted."""
    wide = np.pad(values, 2)
    return np.array([wide[i : i + 5].sum() / 5 for i in range(len(values))])


def gemfilter(rng: np.random.Generator, kind: str) -> Vector:
    heads, n, d = some(rng, 1, 9), some(rng, 1, 600), some(rng, 1, 33)
    shared = int(rng.choice([g for g in range(1, heads + 1) if heads % g == 0]))  # heads of keys
    q, k = states(rng, (1, heads, 1, d)), states(rng, (1, shared, n, d), kind)
    logits = np.einsum("hd,hnd->n", q[0, :, 0].astype(np.float64), k[0].astype(np.float64).repeat(heads // shared, 0))
    keep, narrow = some(rng, 1, n + 1), float("inf")
    out: dict[str, Any] = {"q_last": q, "k": k}
    for name, values in (("pool", neighbours(logits)), ("nopool", logits)):
        found, narrow = best(values, keep), min(narrow, gap(values, keep))
        out |= {f"idx_{name}": found[None, None], f"val_{name}": values[found][None, None].astype(np.float32)}
    return out, narrow


def promptdistill(rng: np.random.Generator, kind: str, pooled: bool) -> Vector:
    rows, n = some(rng, 1, 5), some(rng, 2, 600)
    logits, lengths = states(rng, (rows, n, 1), kind)[..., 0], rng.integers(1, n + 1, rows)
    ends = np.array([some(rng, 1, length + 1) for length in lengths])
    keep, narrow, kept = some(rng, 1, ends.min() + 1), float("inf"), []
    for values, end, length in zip(logits.astype(np.float64), ends, lengths, strict=True):
        before = np.where(np.arange(n) < end, values, 0)
        scores = (neighbours(before) if pooled else before)[:end]
        narrow = min(narrow, gap(scores, keep))
        kept.append(np.r_[np.sort(best(scores, keep)), end:length])
    valid = np.arange(max(map(len, kept))) < np.array([[len(row)] for row in kept])
    index = np.zeros(valid.shape, np.int64)
    index[valid] = np.concatenate(kept)
    mask = (np.arange(n) < lengths[:, None]).astype(np.int64)
    out: dict[str, Any] = {"logits": logits, "prompt_ends": ends, "attention_mask": mask, "n_topk": keep}
    return out | {"keep_idx": index, "keep_valid": valid.astype(np.int64)}, narrow


def llavolta(rng: np.random.Generator, kind: str) -> Vector:
    rows, start, after, d = some(rng, 1, 4), some(rng, 0, 2000), some(rng, 0, 30), 5
    n = some(rng, 1, 600)
    hidden = states(rng, (rows, start + n + after, d), kind)
    out: dict[str, Any] = {"hidden": hidden, "image_start": start, "image_len": n}
    for stride in {1, some(rng, 1, min(n, 12) + 1)}:
        used = n // stride * stride  # the published code drops a tail
        means = hidden[:, start : start + used].reshape(rows, -1, stride, d).mean(2, dtype=np.float64)
        out[f"y_s{stride}"] = np.concatenate([hidden[:, :start], means, hidden[:, start + n :]], 1).astype(np.float32)
        middle = np.arange(start, start + used).reshape(-1, stride).mean(1).astype(np.float16).astype(np.int64)
        places = np.r_[0:start, middle, start + n : start + n + after]
        out[f"pos_s{stride}"] = np.repeat(places[None], rows, 0)
    return out, float("inf")


def normed(x: Array, weight: Array, bias: Array) -> Array:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * weight + bias


def quecc(rng: np.random.Generator, kind: str) -> Vector:
    heads, kernel, blocks, rows = 8, int(rng.choice([1, 2, 3, 4])), some(rng, 1, 4), some(rng, 1, 4)
    width, levels, words, side = heads * some(rng, 1, 3), some(rng, 1, 40), 7, kernel * blocks
    shapes = {"text_projection.0.weight": (width, words), "q_downsample.weight": (width, 1, kernel, kernel)}
    shapes |= {"clip_attn.in_proj_weight": (3 * width, width), "clip_attn.out_proj.weight": (width, width)}
    shapes |= {"clip_attn.in_proj_bias": (3 * width,)}
    small = ["text_projection.0.bias", "text_projection.1.weight", "text_projection.1.bias", "q_downsample.bias"]
    for name, source in (("q_proj", width), ("k_proj", levels), ("v_proj", levels)):
        shapes |= {f"{name}.0.weight": (width, source), f"{name}.2.weight": (width, width)}
        small += [f"{name}.0.bias", f"{name}.2.bias", f"{name}.3.weight", f"{name}.3.bias"]
    shapes |= dict.fromkeys([*small, "clip_attn.out_proj.bias"], (width,))
    w = {name: stored(rng.standard_normal(shape) * 0.4) for name, shape in shapes.items()}
    x, text = states(rng, (rows, side * side, width)), states(rng, (rows, 1, words))
    many = states(rng, (rows, side * side, levels))

    def linear(y: Array, name: str) -> Array:
        return y @ w[f"{name}.weight"].T.astype(np.float64) + w[f"{name}.bias"]

    def mlp(y: Array, name: str) -> Array:
        inner = linear(y, f"{name}.0")
        inner = 0.5 * inner * (1 + np.vectorize(math.erf)(inner / 2**0.5))
        return normed(linear(inner, f"{name}.2"), w[f"{name}.3.weight"], w[f"{name}.3.bias"])

    asked = normed(linear(text, "text_projection.0"), w["text_projection.1.weight"], w["text_projection.1.bias"])
    grids = [mlp(y, name).reshape(rows, side, side, width) for y, name in ((x + asked, "q_proj"), (many, "k_proj"))]
    grids.append(mlp(many, "v_proj").reshape(rows, side, side, width))
    into, shift = w["clip_attn.in_proj_weight"].astype(np.float64), w["clip_attn.in_proj_bias"]
    out, d = np.zeros((rows, blocks**2, width)), width // heads
    for at in np.ndindex(rows, blocks, blocks):
        block = (at[0], *(slice(i * kernel, (i + 1) * kernel) for i in at[1:]))
        q, k, v = (grid[block].reshape(-1, width) for grid in grids)
        q = (q * w["q_downsample.weight"].reshape(width, -1).T).sum(0, keepdims=True) + w["q_downsample.bias"]
        q, k, v = (y @ into[i * width :][:width].T + shift[i * width :][:width] for i, y in enumerate((q, k, v)))
        q, k, v = (y.reshape(-1, heads, d).transpose(1, 0, 2) for y in (q, k, v))
        mixed = (softmax(q @ k.transpose(0, 2, 1) / d**0.5) @ v).reshape(1, width)
        out[at[0], at[1] * blocks + at[2]] = linear(mixed, "clip_attn.out_proj")[0]
    arrays: dict[str, Any] = {"x": x, "x_multi": many, "text": text, "out": out.astype(np.float32)}
    return arrays | {f"w.{name}": value for name, value in w.items()}, float("inf")
