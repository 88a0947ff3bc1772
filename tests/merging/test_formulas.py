"""The methods against formulas written out independently, in float64 NumPy and on whole tensors."""

import numpy as np
import pytest
import torch

from soups.errors import ConfigError
from soups.merging import make_method, merge

RNG = np.random.default_rng(0)
SHAPES = {"a": (12, 9), "b": (30,), "c": (5, 40)}
BASE = {name: RNG.standard_normal(shape) for name, shape in SHAPES.items()}
EXPERTS = [{name: x + 0.1 * RNG.standard_normal(x.shape) for name, x in BASE.items()} for _ in range(3)]
TAUS = [{name: expert[name] - BASE[name] for name in BASE} for expert in EXPERTS]


def tensors(weights):
    return {name: torch.from_numpy(x.copy()) for name, x in weights.items()}


def merged(name, *, base=BASE, experts=EXPERTS, **parameters):
    method = make_method(name, **parameters)
    result = merge(method, [tensors(e) for e in experts], base=tensors(base) if base else None)
    return {key: tensor.numpy() for key, tensor in result.items()}


def check(result, expected, tolerance=1e-12):
    for name in SHAPES:
        np.testing.assert_allclose(result[name], expected[name], rtol=tolerance, atol=tolerance)


def flat(weights):
    return np.concatenate([weights[name].ravel() for name in SHAPES])


def unflat(vector):
    result, start = {}, 0
    for name, shape in SHAPES.items():
        size = int(np.prod(shape))
        result[name] = vector[start : start + size].reshape(shape)
        start += size
    return result


def trimmed(vector, keep):
    """Zero everything smaller than the `keep`-th largest magnitude."""
    limit = np.sort(np.abs(vector))[::-1][keep - 1]
    return np.where(np.abs(vector) >= limit, vector, 0)


def ties_paper(taus, density, weights, extra=0, reduce="mean"):
    vectors = np.stack([flat(tau) for tau in taus])
    keep = int(density * vectors.shape[1]) + extra
    vectors = np.stack([trimmed(vector, keep) for vector in vectors])
    sign = np.sign(vectors.sum(0))
    if extra:  # the authors' code decides ties by the majority
        sign[sign == 0] = np.sign(sign.sum())
    agree = np.sign(vectors) == sign
    agree &= vectors != 0
    w = np.array(weights)[:, None]
    top = (w * vectors * agree).sum(0)
    bottom = (w * agree).sum(0)
    return top / np.where(bottom == 0, 1, bottom) if reduce == "mean" else top


def plus(base, vector, scale=1.0):
    change = unflat(vector)
    return {name: base[name] + scale * change[name] for name in base}


def test_ties_paper_and_its_public_variants():
    check(merged("ties", density=0.3), plus(BASE, ties_paper(TAUS, 0.3, [1, 1, 1])))
    weights = (0.5, 1.0, 2.0)
    check(merged("ties", density=0.3, weight=weights, scale=0.7), plus(BASE, ties_paper(TAUS, 0.3, weights), 0.7))
    check(merged("ties.official"), plus(BASE, ties_paper(TAUS, 0.2, [1, 1, 1], extra=1)))
    check(merged("ties.adamerging"), plus(BASE, ties_paper(TAUS, 0.2, [1, 1, 1], extra=1, reduce="sum"), 0.3))


def test_ties_trims_the_whole_model_or_each_tensor():
    small = {**BASE, "b": BASE["b"] * 1}
    experts = [{**e, "b": BASE["b"] + 1e-6 * (e["b"] - BASE["b"])} for e in EXPERTS]
    model, tensor = merged("ties", experts=experts, density=0.2), merged("ties.peft", experts=experts, density=0.2)
    assert (model["b"] == small["b"]).all()
    assert (tensor["b"] != small["b"]).sum() >= 6


def test_ties_official_resolves_ties_by_the_majority():
    base = {"w": np.zeros(3)}
    experts = [{"w": np.array([1.0, -1.0, -1.0])}, {"w": np.array([-1.0, -2.0, -1.0])}]
    for name, expected in (("ties.official", -1), ("ties.mergekit", 1), ("ties.peft", 1), ("ties", 0)):
        method = make_method(name, density=1.0)
        result = merge(method, [tensors(e) for e in experts], base=tensors(base))
        assert isinstance(result, dict) and result["w"][0] == expected, name


def ties_mergekit(tau_list, density, weights, normalize):
    result = {}
    for name in SHAPES:
        n = tau_list[0][name].size
        parts = [
            trimmed(tau[name].ravel(), max(1, int(density * n))) * w for tau, w in zip(tau_list, weights, strict=True)
        ]
        x = np.stack(parts)
        sign = np.where(x.sum(0) >= 0, 1.0, -1.0)
        agree = np.sign(x) == sign
        top, bottom = (x * agree).sum(0), (np.array(weights)[:, None] * agree).sum(0)
        result[name] = (top / np.where(np.abs(bottom) < 1e-8, 1, bottom) if normalize else top).reshape(SHAPES[name])
    return result


@pytest.mark.parametrize("normalize", [True, False])
def test_ties_as_mergekit_has_it(normalize):
    weights = (0.5, -0.4, 2.0)
    change = ties_mergekit(TAUS, 0.4, weights, normalize)
    result = merged("ties.mergekit", density=0.4, weight=weights, normalize=normalize)
    check(result, {name: BASE[name] + change[name] for name in BASE})


def test_mergekits_rescaling_restores_the_l1_norm():
    (expert,) = EXPERTS[:1]
    result = merged("ties.mergekit", experts=[expert], density=0.2, rescale=True)
    for name in SHAPES:
        np.testing.assert_allclose(np.abs(result[name] - BASE[name]).sum(), np.abs(TAUS[0][name]).sum())


def test_exactly_k_are_kept_whatever_is_equal():
    base, expert = {"w": torch.zeros(100_000)}, {"w": torch.ones(100_000)}
    result = merge(make_method("ties.mergekit", density=0.37), [expert], base=base)
    assert isinstance(result, dict) and result["w"].tolist() == [1.0] * 37_000 + [0.0] * 63_000
    result = merge(make_method("ties", density=0.37), [expert], base=base)
    assert isinstance(result, dict) and result["w"].sum() == 100_000


def test_task_arithmetic_and_linear():
    total = sum(flat(tau) * w for tau, w in zip(TAUS, (1, -0.5, 2), strict=True))
    check(merged("task_arithmetic", weight=(1, -0.5, 2), scale=0.4), plus(BASE, total, 0.4))
    check(merged("task_arithmetic", weight=(1, -0.5, 2), normalize=True, scale=1.0), plus(BASE, total / 2.5))
    mean = {name: np.average([e[name] for e in EXPERTS], axis=0, weights=[1, 2, 5]) for name in SHAPES}
    check(merged("linear", base=None, weight=(1, 2, 5)), mean)
    with pytest.raises(ConfigError, match="sum to zero"):
        merged("linear", base=None, weight=(1, -2, 1))


def slerp(a, b, t):
    angle = np.arccos(np.clip((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b), -1, 1))
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


def test_slerp_and_its_generalisations():
    one, two = EXPERTS[0], {name: -x[::-1] for name, x in EXPERTS[1].items()}
    expected = {name: slerp(one[name], two[name], 0.3) for name in SHAPES}
    check(merged("slerp", base=one, experts=[two], t=0.3), expected)
    check(merged("nuslerp", base=None, experts=[one, two], weight=(0.7, 0.3)), expected)
    on_taus = {name: BASE[name] + slerp(TAUS[0][name], TAUS[1][name], 0.4) for name in SHAPES}
    check(merged("nuslerp", experts=EXPERTS[:2], weight=(0.6, 0.4)), on_taus)
    # Above |cos| 0.9995 mergekit interpolates in a straight line; the sphere is an option.
    near = {name: x + 1e-4 for name, x in one.items()}
    check(merged("slerp", base=one, experts=[near], t=0.3), {name: x + 0.3e-4 for name, x in one.items()})
    round_ = {name: slerp(one[name], near[name], 0.3) for name in SHAPES}
    check(merged("slerp", base=one, experts=[near], t=0.3, straight=1.0), round_, 1e-9)


def test_karcher_mean_minimises_the_squared_angles():
    result = merged("karcher", base=None, max_iter=100, tol=1e-13)
    for name in SHAPES:
        units = [e[name].ravel() / np.linalg.norm(e[name]) for e in EXPERTS]
        mean = result[name].ravel()
        np.testing.assert_allclose(np.linalg.norm(mean), np.mean([np.linalg.norm(e[name]) for e in EXPERTS]))
        mean /= np.linalg.norm(mean)
        gradient = 0
        for unit in units:
            angle = np.arccos(unit @ mean)
            gradient += angle / np.sin(angle) * (unit - (unit @ mean) * mean)
        assert np.linalg.norm(gradient) < 1e-9


def test_multislerp_of_two_at_one_half_is_slerp():
    one, two = EXPERTS[0], {name: x[::-1] for name, x in EXPERTS[1].items()}
    result = merged("multislerp", base=None, experts=[one, two])
    for name in SHAPES:
        a, b = one[name] / np.linalg.norm(one[name]), two[name] / np.linalg.norm(two[name])
        norm = (np.linalg.norm(one[name]) + np.linalg.norm(two[name])) / 2
        np.testing.assert_allclose(result[name], slerp(a, b, 0.5) * norm, atol=1e-6)


def test_model_stock():
    result = merged("model_stock")
    for name in SHAPES:
        x = np.stack([tau[name].ravel() for tau in TAUS])
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        cosine = np.mean([x[i] @ x[j] for i in range(3) for j in range(i)])
        t = 3 * cosine / (1 + 2 * cosine)
        mean = np.mean([e[name] for e in EXPERTS], axis=0)
        np.testing.assert_allclose(result[name], t * mean + (1 - t) * BASE[name], atol=1e-12)


@pytest.mark.parametrize(("density", "gamma"), [(0.5, 0.1), (0.95, 0.2), (0.3, 0.0), (0.3, 0.001), (1.0, 0.5)])
def test_breadcrumbs(density, gamma):
    change = {}
    for name in SHAPES:
        n = TAUS[0][name].size
        kept = int(density * n)
        top = min(int(gamma * n), n - kept)
        x = np.zeros((3, n))
        for i, tau in enumerate(TAUS):
            order = np.argsort(-np.abs(tau[name].ravel()))[top : top + kept]
            x[i, order] = tau[name].ravel()[order]
        change[name] = x.sum(0).reshape(SHAPES[name])
    expected = {name: BASE[name] + 0.6 * change[name] for name in BASE}
    check(merged("breadcrumbs", density=density, gamma=gamma, scale=0.6), expected)


def test_breadcrumbs_by_row():
    result = merged("breadcrumbs.official", experts=EXPERTS[:1], density=0.4, gamma=0.2, scale=1.0)
    tau, kept = TAUS[0]["c"], result["c"] - BASE["c"]
    for row, left in zip(tau, kept, strict=True):
        order = np.argsort(-np.abs(row))
        assert (np.nonzero(np.abs(left) > 1e-15)[0] == np.sort(order[8:24])).all()


@pytest.mark.parametrize("topk", [1.0, 0.4])
def test_sce(topk):
    expected = {}
    for name in SHAPES:
        x = np.stack([tau[name].ravel() for tau in TAUS])
        if topk < 1:
            variance = x.var(0)
            mask = np.zeros(x.shape[1])
            mask[np.argsort(-variance)[: int(topk * np.count_nonzero(variance))]] = 1
            x = x * mask
        weights = (x**2).mean(1)
        weights = weights / weights.sum()
        sign = np.where(x.sum(0) >= 0, 1, -1)
        agree = weights[:, None] * (np.sign(x) == sign)
        merged_tau = (agree * x).sum(0) / np.maximum(agree.sum(0), 1e-6)
        expected[name] = BASE[name] + merged_tau.reshape(SHAPES[name])
    check(merged("sce", select_topk=topk), expected, 1e-9)


@pytest.mark.parametrize("name", ["ram", "ram_plus", "ram_plus.mergekit"])
def test_ram(name):
    epsilon = float(np.quantile(np.abs(np.concatenate([tau[key].ravel() for tau in TAUS for key in SHAPES])), 0.6))
    changed = {key: np.stack([np.abs(tau[key]) > epsilon for tau in TAUS]) for key in SHAPES}
    own = {key: (mask & (mask.sum(0) == 1)).reshape(len(TAUS), -1).sum(1) for key, mask in changed.items()}
    every = {key: mask.reshape(len(TAUS), -1).sum(1) for key, mask in changed.items()}
    expected = {}
    for key in SHAPES:
        among = [key] if name.endswith("mergekit") else list(SHAPES)
        alone = sum(own[one] for one in among)
        shared = sum(every[one] for one in among) - alone
        factors = 1 + 0.5 * np.minimum(0.9, shared / np.maximum(alone, 1)) if name != "ram" else np.ones(len(TAUS))
        count = changed[key].sum(0)
        total = np.zeros(SHAPES[key])
        for tau, mask, factor in zip(TAUS, changed[key], factors, strict=True):
            total += np.where(mask & (count == 1), factor * tau[key], 0)
            total += np.where(mask & (count > 1), tau[key] / np.maximum(count, 1), 0)
        expected[key] = BASE[key] + total
    parameters = {} if name == "ram" else {"r": 0.5, "alpha": 0.9}
    check(merged(name, epsilon=epsilon, **parameters), expected)


def test_nearswap():
    expected = {}
    for name in SHAPES:
        b, x = BASE[name], EXPERTS[0][name]
        w = np.clip(0.02 / np.maximum(np.abs(b - x), 1e-6), 0, 1)
        expected[name] = w * x + (1 - w) * b
    check(merged("nearswap", experts=EXPERTS[:1], t=0.02), expected)


def test_arcee_fusion():
    def softmax(x):
        e = np.exp(x - x.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    expected = {}
    for name in SHAPES:
        b, x = BASE[name], EXPERTS[0][name]
        p, q = softmax(x) + 1e-8, softmax(b) + 1e-8
        importance = np.abs(x - b) * (p * np.log(p / q)).sum(-1, keepdims=True)
        # mergekit sorts and takes the places (0.25, 0.5, 0.75) · (n − 1), rounded down.
        ordered = np.sort(importance.ravel())
        first, middle, third = (ordered[int(share * (ordered.size - 1))] for share in (0.25, 0.5, 0.75))
        expected[name] = np.where(importance >= middle + 1.5 * (third - first), x, b)
    check(merged("arcee_fusion", experts=EXPERTS[:1]), expected, 1e-9)


def test_robust_means():
    stacked = {name: np.stack([e[name] for e in EXPERTS]) for name in SHAPES}
    check(merged("median", base=None), {name: np.median(x, axis=0) for name, x in stacked.items()})
    check(merged("median", base=None, experts=EXPERTS[:2]), {name: x[:2].mean(0) for name, x in stacked.items()})
    middle = {name: np.sort(x, axis=0)[1] for name, x in stacked.items()}
    check(merged("trimmed_mean", base=None, trim=0.34), middle)


def test_consensus():
    x = np.stack([flat(tau) for tau in TAUS])
    total = x.sum(0)
    masks = np.stack([np.abs(t) > limit * np.abs(total - t) for t, limit in zip(x, (0.2, 0.4, 0.6), strict=True)])
    expected = plus(BASE, total * (masks.sum(0) >= 2), 0.5)
    check(merged("consensus", threshold=(0.2, 0.4, 0.6), agree=2, scale=0.5), expected)


def inverse_root(matrix):
    values, vectors = np.linalg.eigh(matrix)
    return vectors @ np.diag(values**-0.5) @ vectors.T


def test_tsv_with_orthogonal_factors_by_another_route():
    # The polar factor of M is M (MᵀM)^(−1/2): no second SVD.
    for name in ("a", "c"):
        m, n = SHAPES[name]
        k = min(m, n) // 3
        parts = [np.linalg.svd(tau[name], full_matrices=False) for tau in TAUS]
        u = np.concatenate([p[0][:, :k] for p in parts], axis=1)
        s = np.concatenate([p[1][:k] for p in parts])
        v = np.concatenate([p[2][:k].T for p in parts], axis=1)
        tau = u @ inverse_root(u.T @ u) @ np.diag(s) @ (v @ inverse_root(v.T @ v)).T
        np.testing.assert_allclose(merged("tsv", scale=0.8)[name], BASE[name] + 0.8 * tau, atol=1e-10)
    np.testing.assert_allclose(merged("tsv", scale=0.8)["b"], BASE["b"] + 0.8 * np.mean([t["b"] for t in TAUS], axis=0))


def test_tsv_of_one_task_is_that_task_and_many_tasks_do_not_vanish():
    check(merged("tsv", experts=EXPERTS[:1]), EXPERTS[0], 1e-10)
    many = merged("tsv", experts=[*EXPERTS, *EXPERTS])
    assert np.abs(many["c"] - BASE["c"]).max() > 1e-3


def test_iso_c_keeps_the_nuclear_norm_and_flattens_the_spectrum():
    result = merged("iso_c")
    for name in ("a", "c"):
        total = sum(tau[name] for tau in TAUS)
        values = np.linalg.svd(result[name] - BASE[name], compute_uv=False)
        np.testing.assert_allclose(values, np.full(len(values), np.linalg.svd(total, compute_uv=False).mean()))
        inner = np.trace((result[name] - BASE[name]).T @ total)  # U Vᵀ is the matrix that maximises this
        np.testing.assert_allclose(inner, values.mean() * np.linalg.svd(total, compute_uv=False).sum())


def test_iso_cts():
    name, (m, n) = "c", SHAPES["c"]
    rank, each = min(m, n), round((min(m, n) - int(0.4 * min(m, n))) / 3)
    u, s, vt = np.linalg.svd(sum(tau[name] for tau in TAUS), full_matrices=False)
    shared = rank - 3 * each
    u, s, vt = u[:, :shared], s[:shared], vt[:shared]
    own = [np.linalg.svd(tau[name] - u @ u.T @ tau[name], full_matrices=False) for tau in TAUS]
    us = np.concatenate([*(p[0][:, :each] for p in own), u], axis=1)
    vs = np.concatenate([*(p[2][:each] for p in own), vt], axis=0).T
    mean = np.mean(np.concatenate([*(p[1][:each] for p in own), s]))
    tau = mean * (us @ inverse_root(us.T @ us)) @ (vs @ inverse_root(vs.T @ vs)).T
    np.testing.assert_allclose(merged("iso_cts", common=0.4)[name], BASE[name] + tau, atol=1e-9)


def pcb_clamp(x, low_share, high_share):
    """The authors' `clamp`, on rows: sort, and take the places int(d · low) and int(d · (1 − high) − 1)."""
    d, ordered = x.shape[1], np.sort(x, axis=1)
    return np.clip(x, ordered[:, int(d * low_share), None], ordered[:, int(d * (1 - high_share) - 1), None])


def pcb_normalize(x):
    low, high = x.min(1, keepdims=True), x.max(1, keepdims=True)
    return (x - low) / (high - low)


@pytest.mark.parametrize(
    ("ratio", "clip"), [(0.3, 0.05), (0.05, 0.01), (0.1, 0.0001), (0.213, 0.013), (0.7, 0.02), (0.93, 0.1)]
)
def test_pcb(ratio, clip):
    # The steps of the authors' vision code, one after the other.
    x = np.stack([flat(tau) for tau in TAUS])
    sizes = pcb_clamp(np.abs(x), clip, clip)
    clamped = np.sign(x) * sizes
    own = np.exp(len(x) * pcb_normalize(sizes) ** 2)
    signed = np.sign(x) * pcb_normalize(sizes)
    across = np.stack([np.tanh(one * signed).sum(0) for one in signed])
    scale = pcb_normalize(pcb_clamp(own * across, 1 - ratio, 0))
    tau = (clamped * scale).sum(0) / np.maximum(scale.sum(0), 1e-12)
    check(merged("pcb", ratio=ratio, clip=clip, scale=0.5), plus(BASE, tau, 0.5), 1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("density", "gamma"), [(0.15, 0.006), (0.4, 0.1), (1.0, 0.0), (1.0, 0.1), (0.9, 0.25)])
def test_breadcrumbs_official_keeps_exactly_its_share_of_each_row(dtype, density, gamma):
    draw = torch.Generator().manual_seed(3)
    coarse = (torch.randn(20, 640, generator=draw) * 4).round() / 64  # many equal magnitudes
    base = {
        "w": torch.zeros(20, 640, dtype=dtype),
        "b": torch.zeros(640, dtype=dtype),
        "s": torch.zeros((), dtype=dtype),
    }
    expert = {"w": coarse.to(dtype), "b": coarse[0].to(dtype), "s": torch.tensor(0.5, dtype=dtype)}
    method = make_method("breadcrumbs.official", density=density, gamma=gamma, scale=1.0)
    found = merge(method, [expert], base=base)
    kept, top = (
        int(density * 640),
        int(gamma * 640),
    )  # the authors remove the largest first, then keep so many of the rest
    for name in ("w", "b"):
        for row, left in zip(expert[name].view(-1, 640), found[name].view(-1, 640), strict=True):
            order = sorted(range(640), key=lambda i, row=row: (-abs(float(row[i])), i))[top : top + kept]
            wanted = torch.zeros_like(row)
            wanted[order] = row[order]
            assert torch.equal(left, wanted)
    assert found["s"] == 0.5


@pytest.mark.parametrize("shape", [(1, 40), (40, 1), (1, 1)])
def test_heads_with_one_row_or_column_follow_the_formulas(shape):
    base = {"w": RNG.standard_normal(shape)}
    taus = [RNG.standard_normal(shape) for _ in range(3)]
    experts = [{"w": base["w"] + tau} for tau in taus]
    total = sum(taus)
    # A matrix of rank one has one singular value: flattening the spectrum changes nothing.
    for name in ("iso_c", "iso_cts"):
        parameters = {"common": 1.0} if name == "iso_cts" else {}
        np.testing.assert_allclose(
            merged(name, base=base, experts=experts, **parameters)["w"], base["w"] + total, atol=1e-12
        )
    # TSV: each task's only direction; along the axis of length one all of them are ±1.
    row = [tau.ravel() for tau in taus]
    sizes = [np.linalg.norm(one) for one in row]
    if max(shape) > 1:
        v = np.stack([one / size for one, size in zip(row, sizes, strict=True)])
        v = inverse_root(v @ v.T) @ v
        wanted = sum(size * direction for size, direction in zip(sizes, v, strict=True)) / np.sqrt(3)
        found = merged("tsv", base=base, experts=experts)["w"] - base["w"]
        np.testing.assert_allclose(found.ravel(), wanted, atol=1e-10)


@pytest.mark.parametrize(
    ("shape", "common", "tasks", "stops"),
    [
        ((2, 30), 0.4, 3, True),
        ((30, 2), 0.4, 3, True),
        ((2, 30), 0.5, 3, False),
        ((2, 30), 0.0, 2, False),
        ((5, 9), 0.1, 7, True),
        ((1, 9), 0.4, 1, False),
    ],
)
def test_iso_cts_stops_where_a_task_would_have_no_dimension(shape, common, tasks, stops):
    base = {"head": RNG.standard_normal(shape)}
    experts = [{"head": base["head"] + RNG.standard_normal(shape)} for _ in range(tasks)]
    rank = min(shape)
    assert (rank - round((rank - int(rank * common)) / tasks) * tasks < 0) == stops
    if stops:
        with pytest.raises(
            ConfigError, match=r"Iso-CTS: 'head' has .* Raise common, or leave this tensor out by exclude"
        ):
            merged("iso_cts", base=base, experts=experts, common=common)
        mean = np.mean([one["head"] for one in experts], axis=0)
        found = merged("iso_cts", base=base, experts=experts, common=common, exclude=("head",))
        np.testing.assert_allclose(found["head"], mean, atol=1e-12)
    else:
        assert np.isfinite(merged("iso_cts", base=base, experts=experts, common=common)["head"]).all()


@pytest.mark.parametrize("density", [0.0, 0.01, 0.2])
def test_ties_peft_may_keep_nothing(density):
    base, expert = {"w": torch.zeros(30)}, {"w": torch.arange(1.0, 31.0)}
    found = merge(make_method("ties.peft", density=density), [expert], base=base)
    assert int((found["w"] != 0).sum()) == int(density * 30)


def test_cabs_takes_the_largest_free_ones_of_each_group():
    base = {"w": np.zeros(8)}
    experts = [{"w": np.array([4.0, 3, 2, 1, 0, 0, 1, 0])}, {"w": np.array([-9.0, 1, 5, 2, 7, 0, 8, 9])}]
    method = make_method("cabs", keep=2, group=4)
    result = merge(method, [tensors(e) for e in experts], base=tensors(base))
    # The first takes 4, 3 and 1; the second the two largest that are left in each group.
    assert isinstance(result, dict)
    assert result["w"].tolist() == [4, 3, 5, 2, 7, 0, 1, 9]


def test_knots_of_one_task_is_that_task_and_a_shared_basis_is_found():
    check(merged("knots", experts=EXPERTS[:1], density=1.0), EXPERTS[0], 1e-10)
    # Two low-rank tasks in one subspace with disjoint coordinates there: nothing interferes, and both come through whole.
    u = np.linalg.qr(RNG.standard_normal((12, 2)))[0]
    first, second = np.zeros((2, 9)), np.zeros((2, 9))
    first[0, :4], second[1, 4:] = 3.0, 2.0
    base = {"a": BASE["a"]}
    experts = [{"a": BASE["a"] + u @ first}, {"a": BASE["a"] + u @ second}]
    method = make_method("knots", density=1.0)
    result = merge(method, [tensors(e) for e in experts], base=tensors(base))
    assert isinstance(result, dict)
    np.testing.assert_allclose(result["a"].numpy(), BASE["a"] + u @ (first + second), atol=1e-10)


def test_knots_as_the_authors_code_has_it():
    names, density = [name for name, array in BASE.items() if array.ndim == 2], 0.3
    tied, flat = {}, [[] for _ in EXPERTS]
    for name in sorted(names):
        deltas = [expert[name] - BASE[name] for expert in EXPERTS]
        u, s, vt = np.linalg.svd(np.concatenate(deltas, axis=1), full_matrices=False)
        parts = np.split(s[:, None] * vt, len(EXPERTS), axis=1)
        tied[name] = u, parts
        for vector, part in zip(flat, parts, strict=True):
            vector.append(np.abs(part).ravel())
    limits = []
    for vector in flat:
        ordered = np.sort(np.concatenate(vector))
        limits.append(ordered[len(ordered) - int(len(ordered) * density) - 1])
    result = merged("knots", density=density, scale=0.6)
    for name, (u, parts) in tied.items():
        kept = [np.where(np.abs(part) >= limit, part, 0) for part, limit in zip(parts, limits, strict=True)]
        sign = np.sign(np.sum(kept, axis=0))
        agreeing = [np.where(np.sign(part) == sign, part, 0) for part in kept]
        mean = np.sum(agreeing, axis=0) / np.maximum(1, np.sum([part != 0 for part in agreeing], axis=0))
        np.testing.assert_allclose(result[name], BASE[name] + 0.6 * u @ mean, atol=1e-10)


def test_knots_leaves_matrices_that_nobody_changed():
    result = merge("knots", [tensors(BASE), tensors(BASE)], base=tensors(BASE))
    assert all(torch.equal(result[name], tensor) for name, tensor in tensors(BASE).items())


def cart(experts, rank, scale):
    mean = np.mean(experts, axis=0)
    k = max(1, int(rank * min(mean.shape)))
    total = 0
    for expert in experts:
        u, s, vt = np.linalg.svd(expert - mean, full_matrices=False)
        total = total + (u[:, :k] * s[:k]) @ vt[:k]
    return mean + scale * total


@pytest.mark.parametrize("rank", [0.4, 0.12, 0.25, 0.38, 0.05, 1.0])
def test_cart_rounds_its_rank_down(rank):
    found = merged("cart", base=None, rank=rank, scale=0.7)
    for name in ("a", "c"):
        np.testing.assert_allclose(found[name], cart([e[name] for e in EXPERTS], rank, 0.7), atol=1e-12)
    np.testing.assert_allclose(found["b"], np.mean([e["b"] for e in EXPERTS], axis=0), atol=1e-14)


@pytest.mark.parametrize(("tasks", "rank", "scale"), [(8, 0.12, 2.0), (14, 0.16, 1.5), (20, 0.32, 1.9)])
def test_cart_official_takes_attention_and_mlp_alone(tasks, rank, scale):
    names = {
        "model.attn.out.weight": True,
        "model.mlp.fc.weight": True,
        "model.ln_mlp.weight": False,
        "model.proj": False,
    }
    experts = [{name: RNG.standard_normal((25, 31)) for name in names} for _ in range(3)]
    found = merged("cart.official", base=None, experts=experts, tasks=tasks)
    for name, reduced in names.items():
        own = [e[name] for e in experts]
        np.testing.assert_allclose(found[name], cart(own, rank, scale) if reduced else np.mean(own, axis=0), atol=1e-12)
    with pytest.raises(ConfigError, match=r"settings for \[8, 14, 20\] tasks, not 9"):
        make_method("cart.official", tasks=9)


@pytest.mark.parametrize(("name", "density"), [("dare", 0.2), ("della", 0.4)])
def test_random_methods_have_the_task_vector_as_their_mean(name, density):
    n, draws = 20_000, 20
    tau = torch.linspace(-1, 1, n)
    base, expert = {"w": torch.zeros(n)}, {"w": tau}
    parameters = {"epsilon": 0.2} if name == "della" else {}
    results = []
    for seed in range(draws):
        method = make_method(name, density=density, seed=seed, **parameters)
        result = merge(method, [expert], base=base)
        assert isinstance(result, dict)
        results.append(result["w"].numpy().astype(np.float64))
    stacked, truth = np.stack(results), tau.numpy().astype(np.float64)
    # Each element is τ/p with probability p: mean τ, variance τ²(1/p − 1).
    rank = np.argsort(np.argsort(np.abs(truth), kind="stable"))
    p = density if name == "dare" else density - 0.2 + 0.4 * rank / (n - 1)
    deviation = np.sqrt(truth**2 * (1 / p - 1))
    z = (stacked.mean(0) - truth).sum() / np.sqrt((deviation**2).sum() / draws)
    assert abs(z) < 4
    kept = (stacked != 0).mean()
    assert abs(kept - density) < 4 * np.sqrt(density * (1 - density) / (n * draws))
    np.testing.assert_allclose(stacked.var(0, ddof=1).sum(), (deviation**2).sum(), rtol=0.03)


def test_masks_of_models_and_tensors_are_independent():
    n = 20_000
    base = {"w": torch.zeros(n), "v": torch.zeros(n)}
    expert = {"w": torch.ones(n), "v": torch.ones(n)}
    method = make_method("dare", density=0.5)
    alone = merge(method, [expert], base=base)
    both = merge(method, [expert, expert], base=base)
    assert isinstance(alone, dict) and isinstance(both, dict)
    masks = [alone["w"] / 2, alone["v"] / 2, (both["w"] - alone["w"]) / 2]
    for i in range(3):
        for j in range(i):
            assert abs(float((masks[i] * masks[j]).mean()) - 0.25) < 0.02
