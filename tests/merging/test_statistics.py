"""Statistics as operands: what methods make of them, what is refused, and their part in a plan's fingerprint."""

import numpy as np
import pytest
import torch

from soups.errors import ConfigError, SoupError, WeightsError
from soups.merging import make_method, merge, plan_merge
from soups.statistics import Statistics, hash_store
from soups.stores import DictStore, open_store, write_safetensors
from soups.weights import hash_weights

RNG = np.random.default_rng(7)
SHAPES = {"linear": (6, 9), "conv": (8, 3, 2, 2), "bias": (6,), "table": (9, 5)}
MODELS = [{name: RNG.standard_normal(shape) for name, shape in SHAPES.items()} for _ in range(3)]


def tensors(weights):
    return {name: torch.from_numpy(np.array(x)) for name, x in weights.items()}


def given(model, sums, rows=None, **more):
    settings = {"weights_hash": hash_weights(tensors(model)), "data": "d", "examples": 10, **more}
    return Statistics(tensors(sums), rows=rows, **settings)


def merged(method, statistics, models=MODELS, **parameters):
    result = merge(method, [tensors(one) for one in models], statistics=statistics, **parameters)
    return {name: tensor.numpy() for name, tensor in result.items()}


def test_fisher_is_the_precision_weighted_mean_and_the_rest_is_averaged():
    fishers = [{f"fisher/{name}": RNG.random(SHAPES[name]) for name in ("linear", "bias")} for _ in MODELS]
    counts = (10, 20, 5)
    found = merged(
        "fisher", [given(m, f, examples=n) for m, f, n in zip(MODELS, fishers, counts, strict=True)], floor=0.0
    )
    weighed = merged(
        "fisher", [given(m, f) for m, f in zip(MODELS, fishers, strict=True)], floor=0.0, weight=(1, 2, 0.5)
    )
    for name in ("linear", "bias"):
        f = np.stack([one[f"fisher/{name}"] for one in fishers])
        x = np.stack([model[name] for model in MODELS])
        by_example = f / np.array(counts).reshape(-1, *[1] * (f.ndim - 1))
        np.testing.assert_allclose(found[name], (by_example * x).sum(0) / by_example.sum(0), rtol=1e-13)
        shares = f * np.array([1, 2, 0.5]).reshape(-1, *[1] * (f.ndim - 1))
        np.testing.assert_allclose(weighed[name], (shares * x).sum(0) / shares.sum(0), rtol=1e-13)
    np.testing.assert_allclose(found["conv"], np.mean([model["conv"] for model in MODELS], axis=0), rtol=1e-14)
    np.testing.assert_allclose(weighed["conv"], np.average([m["conv"] for m in MODELS], axis=0, weights=[1, 2, 0.5]))


def test_fisher_can_count_every_model_alike_whatever_its_norm():
    fishers = [{"fisher/linear": RNG.random(SHAPES["linear"]), "fisher/bias": RNG.random(6)} for _ in MODELS]
    scaled = [
        {name: x * factor for name, x in one.items()} for one, factor in zip(fishers, (1, 100, 0.01), strict=True)
    ]
    plain = merged("fisher", [given(m, f) for m, f in zip(MODELS, fishers, strict=True)], normalize=True, floor=0.0)
    other = merged("fisher", [given(m, f) for m, f in zip(MODELS, scaled, strict=True)], normalize=True, floor=0.0)
    norms = [
        np.sqrt(sum((x / 10) ** 2 for x in f["fisher/linear"].ravel()) + ((f["fisher/bias"] / 10) ** 2).sum())
        for f in fishers
    ]
    f = np.stack([one["fisher/linear"] / norm for one, norm in zip(fishers, norms, strict=True)])
    x = np.stack([model["linear"] for model in MODELS])
    np.testing.assert_allclose(plain["linear"], (f * x).sum(0) / f.sum(0), rtol=1e-12)
    np.testing.assert_allclose(other["linear"], plain["linear"], rtol=1e-12)


def test_elements_that_no_data_move_are_averaged():
    noise = {"fisher/bias": np.array([1.0, 0, 0, 1e-17, 1e-20, 0]), "fisher/linear": np.ones(SHAPES["linear"])}
    other = {"fisher/bias": np.array([1.0, 0, 1e-18, 1e-19, 1e-13, 0]), "fisher/linear": np.ones(SHAPES["linear"])}
    found = merged("fisher", [given(MODELS[0], noise), given(MODELS[1], other)], models=MODELS[:2])
    mean = (MODELS[0]["bias"] + MODELS[1]["bias"]) / 2
    np.testing.assert_allclose(found["bias"], mean, rtol=1e-14)
    zeros = {"fisher/bias": np.zeros(6), "fisher/linear": np.zeros(SHAPES["linear"])}
    found = merged("fisher", [given(one, zeros) for one in MODELS[:2]], models=MODELS[:2])
    np.testing.assert_allclose(found["bias"], mean, rtol=1e-14)


def inputs(name, rows=200):
    shape = SHAPES[name]
    width = {"linear": 9, "conv": 12, "table": 9}[name]
    return [RNG.standard_normal((rows, width)) @ RNG.standard_normal((width, width)) for _ in MODELS], shape


def test_regmean_solves_the_least_squares_problem_of_all_inputs():
    # `table` is stored as (in, out).
    data = {name: inputs(name)[0] for name in ("linear", "conv", "table")}
    statistics = [
        given(
            model,
            {f"gram/{name}": x[i].T @ x[i] for name, x in data.items()},
            {f"gram/{name}": 200 for name in data},
            transposed=["table"],
        )
        for i, model in enumerate(MODELS)
    ]
    found = merged("regmean", statistics, off_diagonal=1.0, ridge=1e-14)
    for name, x in data.items():
        columns = [m[name] if name == "table" else m[name].reshape(len(m[name]), -1).T for m in MODELS]
        wanted = np.linalg.lstsq(
            np.concatenate(x), np.concatenate([a @ w for a, w in zip(x, columns, strict=True)]), rcond=None
        )[0]
        wanted = wanted if name == "table" else wanted.T.reshape(SHAPES[name])
        np.testing.assert_allclose(found[name], wanted, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(found["bias"], np.mean([m["bias"] for m in MODELS], axis=0))


def test_regmean_counts_every_model_alike_and_weighs_them():
    x, _ = inputs("linear")
    few = given(MODELS[0], {"gram/linear": x[0][:50].T @ x[0][:50]}, {"gram/linear": 50})
    many = given(MODELS[1], {"gram/linear": x[1].T @ x[1]}, {"gram/linear": 200})
    found = merged("regmean", [few, many], MODELS[:2], off_diagonal=0.3, weight=(2.0, 1.0), ridge=0.0)["linear"]
    grams = [x[0][:50].T @ x[0][:50] / 50, x[1].T @ x[1] / 200]
    grams = [2 * np.where(np.eye(9), grams[0], 0.3 * grams[0]), np.where(np.eye(9), grams[1], 0.3 * grams[1])]
    wanted = np.linalg.solve(sum(grams), sum(g @ m["linear"].T for g, m in zip(grams, MODELS, strict=False))).T
    np.testing.assert_allclose(found, wanted, rtol=1e-10)


def test_regmean_without_off_diagonals_weighs_columns():
    x, _ = inputs("linear")
    statistics = [given(m, {"gram/linear": a.T @ a}) for m, a in zip(MODELS, x, strict=True)]
    found = merged("regmean", statistics, off_diagonal=0.0, ridge=0.0)["linear"]
    energy = np.stack([(a**2).sum(0) for a in x])
    np.testing.assert_allclose(
        found, np.einsum("tj,tij->ij", energy, np.stack([m["linear"] for m in MODELS])) / energy.sum(0)
    )


def test_directions_without_data_keep_the_average():
    statistics = []
    for model in MODELS:
        x = RNG.standard_normal((40, 9))
        x[:, 4:] = 0
        statistics.append(given(model, {"gram/linear": x.T @ x}))
    found = merged("regmean", statistics)["linear"]
    mean = np.mean([m["linear"] for m in MODELS], axis=0)
    np.testing.assert_allclose(found[:, 4:], mean[:, 4:], rtol=1e-9)
    assert np.abs(found[:, :4] - mean[:, :4]).max() > 0.05
    nothing = [given(model, {"gram/linear": np.zeros((9, 9))}) for model in MODELS]
    np.testing.assert_allclose(merged("regmean", nothing)["linear"], mean, rtol=1e-14)


def test_grouped_convolutions_have_a_gram_for_each_group():
    x = [[RNG.standard_normal((80, 12)) for _ in range(2)] for _ in MODELS]
    statistics = [given(m, {"gram/conv": np.stack([a.T @ a for a in own])}) for m, own in zip(MODELS, x, strict=True)]
    found = merged("regmean", statistics, off_diagonal=1.0, ridge=0.0)["conv"]
    for group in range(2):
        rows = slice(4 * group, 4 * group + 4)
        columns = [m["conv"][rows].reshape(4, -1).T for m in MODELS]
        grams = [own[group].T @ own[group] for own in x]
        wanted = np.linalg.solve(sum(grams), sum(g @ w for g, w in zip(grams, columns, strict=True))).T
        np.testing.assert_allclose(found[rows].reshape(4, -1), wanted, rtol=1e-9)


FISHERS = [given(model, {"fisher/bias": np.ones(6)}) for model in MODELS]


@pytest.mark.parametrize(
    ("method", "statistics", "message"),
    [
        ("fisher", None, r"Fisher needs statistics \(fisher\)"),
        ("linear", FISHERS, "Linear uses none"),
        ("fisher", FISHERS[:2], "2 models for 3"),
        ("regmean", FISHERS, "holds fisher, but RegMean needs gram"),
        ("fisher", [FISHERS[1], FISHERS[0], FISHERS[2]], "of other weights than"),
        (
            "fisher",
            [*FISHERS[:2], given(MODELS[2], {"fisher/linear": np.ones((6, 9))})],
            "no fisher of 'linear'|no fisher of 'bias'",
        ),
        ("fisher", [given(m, {"fisher/bias": np.ones(7)}) for m in MODELS], r"shape \(7,\).*\(6,\)"),
        ("regmean", [given(m, {"gram/bias": np.ones((6, 6))}) for m in MODELS], "another architecture"),
        (
            "fisher",
            [given(m, {"fisher/body.bias": np.ones(6)}) for m in MODELS],
            "no fisher of any tensor.*'fisher/body.bias'",
        ),
        ("regmean", [given(m, {"gram/linear": -np.eye(9)}) for m in MODELS], "no Cholesky factor"),
    ],
)
def test_statistics_that_do_not_fit_are_refused(method, statistics, message):
    with pytest.raises(SoupError, match=message):
        merged(method, statistics)


def test_statistics_are_part_of_the_fingerprint(tmp_path):
    paths, files = [], []
    for number, model in enumerate(MODELS):
        paths.append(tmp_path / f"{number}.safetensors")
        write_safetensors(paths[-1], tensors(model))
        files.append(tmp_path / f"{number}.stats.safetensors")
        FISHERS[number].save(files[-1])

    def mark():
        opened = [Statistics.open(path) for path in files]
        return plan_merge("fisher", [open_store(path) for path in paths], statistics=opened).fingerprint()

    first = mark()
    assert first and first == mark()
    given(MODELS[1], {"fisher/bias": np.full(6, 2.0)}).save(files[1])
    assert mark() != first
    FISHERS[1].save(files[1])
    in_memory = plan_merge("fisher", [open_store(path) for path in paths], statistics=FISHERS)
    assert in_memory.fingerprint() is None
    result = merge("fisher", paths, statistics=files, out=tmp_path / "out")
    with open_store(result) as store:
        np.testing.assert_allclose(store.load()["bias"], np.mean([m["bias"] for m in MODELS], axis=0))


def test_a_plan_says_how_much_memory_a_gram_takes():
    wide = {"w": np.zeros((4, 1000))}
    plan = plan_merge("regmean", [DictStore(tensors(wide))] * 2, statistics=[given(wide, {"gram/w": np.eye(1000)})] * 2)
    assert plan.jobs[0].working_bytes() >= 3 * 8 * 1000**2
    assert plan.bytes_to_read == 2 * (4 * 1000 + 1000**2) * 8


def test_parts_add_up_and_files_keep_everything(tmp_path):
    parts = [
        Statistics(
            {"gram/w": torch.eye(2) * n, "fisher/w": torch.ones(3, 2)},
            weights_hash="h",
            data=f"d{n}",
            examples=n,
            rows={"gram/w": 10 * n},
            transposed=["w"],
        )
        for n in (1, 2)
    ]
    total = parts[0] + parts[1]
    path = total.save(tmp_path / "s.safetensors")
    with Statistics.open(path) as found:
        assert found.kinds == ("gram", "fisher")
        assert (found.examples, found.count("gram/w"), found.count("fisher/w"), found.data) == (3, 30, 3, "d1+d2")
        assert found.transposed == {"w"}
        assert found.load()["gram/w"].tolist() == [[3, 0], [0, 3]]
        assert found.store.metadata["kind"] == "gram fisher"
    with pytest.raises(WeightsError, match="different weights"):
        parts[0] + Statistics({"gram/w": torch.eye(2)}, weights_hash="other", data="d", examples=1)
    with pytest.raises(WeightsError, match="hold different statistics"):
        parts[0] + Statistics({"gram/w": torch.eye(2)}, weights_hash="h", data="d", examples=1)
    with pytest.raises(WeightsError, match=r"no known kind.*'gram'"):
        Statistics({"gramm/w": torch.eye(2)}, weights_hash="h", data="d", examples=1)
    write_safetensors(tmp_path / "model.safetensors", {"w": torch.ones(2)})
    with pytest.raises(WeightsError, match="holds no statistics"):
        Statistics.open(tmp_path / "model.safetensors")


def test_the_hash_of_a_store_is_that_of_its_weights(tmp_path):
    weights = {"b": torch.randn(5, 3).bfloat16(), "a": torch.randn(4, 4).T, "n": torch.tensor(3), "e": torch.zeros(0)}
    write_safetensors(tmp_path / "w.safetensors", weights)
    with open_store(tmp_path / "w.safetensors") as store:
        assert hash_store(store) == hash_store(DictStore(weights)) == hash_weights(weights)


def test_complex_weights_have_one_rule():
    models = [{"w": torch.randn(70, dtype=torch.complex64), "v": torch.randn(3)} for _ in range(3)]
    wanted = sum(m["w"].to(torch.complex128) for m in models) / 3
    found = merge("linear", models)
    assert found["w"].dtype == torch.complex64
    assert torch.equal(found["w"], wanted.to(torch.complex64))
    assert torch.equal(merge("passthrough", models[:1], dtype=torch.bfloat16)["w"], models[0]["w"])
    assert merge("linear", models, dtype=torch.bfloat16)["v"].dtype == torch.bfloat16
    with pytest.raises(WeightsError, match="'w' holds complex numbers, which TaskVectors cannot merge"):
        merge("ties", models[1:], base=models[0])
    mixed = merge({"w": "linear", "*": make_method("ties")}, models[1:], base=models[0])
    assert torch.allclose(mixed["w"], (models[1]["w"] + models[2]["w"]) / 2)
    bad = [{**models[0], "w": models[0]["w"].clone()}, models[1]]
    bad[0]["w"][5] = complex(0, float("nan"))
    with pytest.raises(WeightsError, match=r"'w' holds non-finite values \(NaN or infinity; 1 "):
        merge("linear", bad)


def test_parameters_go_with_a_name():
    with pytest.raises(ConfigError, match=r"no parameter 'densty'; .*density"):
        merge("ties", [tensors(MODELS[0])], base=tensors(MODELS[1]), densty=0.5)
    with pytest.raises(ConfigError, match="go with the name of a method"):
        merge(make_method("linear"), [tensors(MODELS[0])], weight=2.0)


def _gram(size, rows):
    x = RNG.standard_normal((rows, size))
    return x.T @ x


def test_lot_reproduces_each_change_on_its_own_inputs_and_leaves_the_rest_at_the_base():
    """With the inputs themselves: the least-squares solution of least norm of Σ ‖X_t (τᵀ − τ_tᵀ)‖²."""
    base = {name: RNG.standard_normal(shape) for name, shape in SHAPES.items()}
    inputs = [RNG.standard_normal((2, 9)) for _ in MODELS]  # six rows for nine directions
    moments = [RNG.random(6) for _ in MODELS]
    sums = [{"gram/linear": x.T @ x, "second_moment/bias": m} for x, m in zip(inputs, moments, strict=True)]
    found = merged("lot", [given(m, s) for m, s in zip(MODELS, sums, strict=True)], base=tensors(base))
    stacked = np.vstack(inputs)
    target = np.vstack([x @ (m["linear"] - base["linear"]).T for x, m in zip(inputs, MODELS, strict=True)])
    change = np.linalg.lstsq(stacked, target, rcond=None)[0].T
    np.testing.assert_allclose(found["linear"], base["linear"] + change, rtol=1e-9, atol=1e-11)
    unseen = np.linalg.svd(stacked)[2][6:]
    np.testing.assert_allclose(found["linear"] @ unseen.T, base["linear"] @ unseen.T, atol=1e-10)
    weights = np.stack(moments)
    delta = np.stack([m["bias"] - base["bias"] for m in MODELS])
    np.testing.assert_allclose(found["bias"], base["bias"] + (weights * delta).sum(0) / weights.sum(0), rtol=1e-12)
    np.testing.assert_allclose(found["conv"], np.mean([m["conv"] for m in MODELS], axis=0), rtol=1e-12)


def test_mats_solves_the_kronecker_system_that_is_written_out():
    sums = [{"gram/linear": _gram(9, 30), "kfac_out/linear": _gram(6, 30)} for _ in MODELS]
    rows = {"gram/linear": 30, "kfac_out/linear": 15}
    statistics = [given(m, s, rows=rows) for m, s in zip(MODELS, sums, strict=True)]
    found = merged("mats", statistics, weight=(1, 2, 0.5), ridge=0.0, steps=1000, tolerance=1e-14)
    # vec by rows: (Gout ⊗ Gin) vec(W)
    left, right = np.zeros((54, 54)), np.zeros(54)
    for weight, model, one in zip((1, 2, 0.5), MODELS, sums, strict=True):
        matrix = weight * np.kron(one["kfac_out/linear"] / 15, one["gram/linear"] / 30)
        left += matrix
        right += matrix @ model["linear"].ravel()
    np.testing.assert_allclose(found["linear"].ravel(), np.linalg.solve(left, right), rtol=1e-6)
    np.testing.assert_allclose(found["bias"], np.average([m["bias"] for m in MODELS], axis=0, weights=(1, 2, 0.5)))
    few = merged("mats", statistics, steps=1)
    assert np.abs(few["linear"] - found["linear"]).max() > 1e-3, "the number of steps has an effect"
    turned = [{name: x.T if name == "linear" else x for name, x in m.items()} for m in MODELS]
    other = [given(m, s, rows=rows, transposed=("linear",)) for m, s in zip(turned, sums, strict=True)]
    again = merged("mats", other, models=turned, weight=(1, 2, 0.5), ridge=0.0, steps=1000, tolerance=1e-14)
    np.testing.assert_allclose(again["linear"].T, found["linear"], rtol=1e-6)


def test_wudi_is_the_published_descent_and_its_minimum():
    """Autograd on the paper's loss, by Adam; the minimum has a gradient of zero."""
    base = {"w": RNG.standard_normal((4, 7)), "v": RNG.standard_normal(3)}
    experts = [{name: x + 0.1 * RNG.standard_normal(x.shape) for name, x in base.items()} for _ in range(3)]
    deltas = [torch.from_numpy(one["w"] - base["w"]) for one in experts]

    def loss(tau):
        return sum((((tau - d) @ d.T) ** 2).sum() / (d**2).sum() for d in deltas)

    tau = sum(deltas).clone().requires_grad_()
    optimiser = torch.optim.Adam([tau], lr=1e-3)
    for _ in range(50):
        optimiser.zero_grad()
        loss(tau).backward()
        optimiser.step()
    options = {"models": experts, "base": tensors(base)}
    found = merged(make_method("wudi", steps=50, lr=1e-3), None, **options)
    np.testing.assert_allclose(found["w"], base["w"] + tau.detach().numpy(), rtol=1e-9)
    np.testing.assert_allclose(found["v"], np.mean([one["v"] for one in experts], axis=0), rtol=1e-12)
    exact = merged(make_method("wudi", exact=True, ridge=1e-12), None, **options)
    best = torch.from_numpy(exact["w"] - base["w"]).requires_grad_()
    value = loss(best)
    value.backward()
    assert float(best.grad.abs().max()) < 1e-6 and float(value.detach()) < float(loss(tau.detach()))
