"""Every averaged tensor finds its place in a state dict, whatever hooks make of its keys, or an error names it."""

from __future__ import annotations

import pytest
import torch

from soups.averaging import export, load_averaged
from soups.averaging.places import find_places
from soups.callbacks import EMA, SWA
from soups.errors import ConfigError, WeightsError
from soups.stores import read_safetensors


def stripped(state):
    return {key.removeprefix("net."): tensor for key, tensor in state.items()}


def wrapped(state):
    return {f"model.module.{key}": tensor for key, tensor in state.items()}


def halved_copies(state):
    return {
        f"ema_free.{key}": tensor.clone().half() if tensor.is_floating_point() else tensor
        for key, tensor in state.items()
    }


def shuffled(state):
    return {f"t{number}": tensor for number, (_, tensor) in enumerate(reversed(state.items()))}


def doubled(state):
    return {**state, **{f"copy.{key}": tensor.clone() for key, tensor in state.items()}}


@pytest.mark.parametrize("rename", [stripped, wrapped, halved_copies, shuffled, doubled])
@pytest.mark.parametrize("how", ["hook", "state_dict"])
def test_renamed_state_dicts(tmp_path, toy, rename, how):
    class Renamed(toy.Toy):
        def on_save_checkpoint(self, checkpoint):
            if how == "hook":
                checkpoint["state_dict"] = rename(checkpoint["state_dict"])

        def state_dict(self, *args, **kwargs):
            whole = super().state_dict(*args, **kwargs)
            return rename(whole) if how == "state_dict" else whole

    module, ema = Renamed(), EMA(decay=0.9)
    module.on_train_batch_end = lambda *_: module.points.append(toy.snapshot_of(module))
    trainer = toy.trainer(tmp_path, ema)
    trainer.fit(module)
    raw = rename(module.points[-1])
    average = {**module.points[-1], **{key: t.float() for key, t in toy.ema_of(module.points, 0.9).items()}}
    wanted = rename(average)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert toy.same(load_averaged(tmp_path / "a.ckpt", "raw"), raw)
    tolerance = 2e-3 if rename is halved_copies else 1e-6
    found = load_averaged(tmp_path / "a.ckpt", "ema")
    assert found.keys() == wanted.keys()
    toy.close(found, wanted, tolerance)
    assert all(found[key].dtype == raw[key].dtype for key in found)
    first = next(iter(found))
    assert not torch.equal(found[first], raw[first])
    toy.close(read_safetensors(export(tmp_path / "a.ckpt", "ema", tmp_path / "m.safetensors")), wanted, tolerance)
    if how == "state_dict":
        toy.close(ema.average(), wanted, tolerance)
    ema.apply()
    toy.close(toy.snapshot_of(module), average)


def test_saving_a_renamed_state_dict_while_the_average_is_in_place(tmp_path, toy):
    class Renamed(toy.Toy):
        def on_save_checkpoint(self, checkpoint):
            checkpoint["state_dict"] = stripped(checkpoint["state_dict"])

    class Save(toy.pl.Callback):
        def on_validation_batch_end(self, trainer, *_):
            trainer.save_checkpoint(tmp_path / "mid.ckpt")

    module = Renamed()
    toy.trainer(tmp_path, Save(), EMA(decay=0.9, validate="average")).fit(module)
    assert toy.same(load_averaged(tmp_path / "mid.ckpt", "raw"), stripped(module.points[-1]))
    toy.close(load_averaged(tmp_path / "mid.ckpt"), stripped(toy.ema_of(module.points, 0.9)))


@pytest.mark.parametrize("lossy", ["dropped", "fused"])
def test_a_tensor_without_a_place_is_an_error_that_names_it(tmp_path, toy, lossy):
    class Loses(toy.Toy):
        def change(self, state):
            state = dict(state)
            weight = state.pop("net.2.weight")
            if lossy == "fused":
                state["fused"] = torch.cat([weight, state.pop("net.2.bias")[:, None]], 1)
            return state

        def on_save_checkpoint(self, checkpoint):
            checkpoint["state_dict"] = self.change(checkpoint["state_dict"])

    module, ema = Loses(), EMA(decay=0.9)
    trainer = toy.trainer(tmp_path, ema)
    trainer.fit(module)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(WeightsError, match=r"'net\.2\.(weight|bias)'.*has no place"):
        load_averaged(tmp_path / "a.ckpt")
    with pytest.raises(WeightsError, match="no place"):
        export(tmp_path / "a.ckpt", "ema", tmp_path / "m.safetensors")
    if lossy == "dropped":
        rest = load_averaged(tmp_path / "a.ckpt", strict=False)
        toy.close(rest, {key: t for key, t in toy.ema_of(module.points, 0.9).items() if key != "net.2.weight"})
    else:
        with pytest.raises(WeightsError, match="fused"):
            load_averaged(tmp_path / "a.ckpt", strict=False)
    assert toy.same(load_averaged(tmp_path / "a.ckpt", "raw"), module.change(module.points[-1]))


@pytest.mark.parametrize("strict", [True, False])
def test_modules_that_leave_tensors_out_on_purpose(tmp_path, toy, strict):
    class Leaves(toy.Toy):
        strict_loading = strict

        def state_dict(self, *args, **kwargs):
            return {key: t for key, t in super().state_dict(*args, **kwargs).items() if "net.2" not in key}

    module, ema = Leaves(), EMA(decay=0.9)
    module.on_train_batch_end = lambda *_: module.points.append(toy.snapshot_of(module))
    trainer = toy.trainer(tmp_path, ema)
    trainer.fit(module)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    wanted = toy.ema_of(module.points, 0.9)
    if strict:
        with pytest.raises(WeightsError, match=r"net\.2\."):
            ema.average()
        with pytest.raises(WeightsError, match=r"net\.2\."):
            load_averaged(tmp_path / "a.ckpt")
    else:
        kept = {key: t for key, t in wanted.items() if "net.2" not in key}
        toy.close(ema.average(), kept)
        toy.close(load_averaged(tmp_path / "a.ckpt"), kept)
    ema.apply()
    toy.close(toy.snapshot_of(module), wanted)


def test_resuming_from_renamed_checkpoints(tmp_path, toy):
    class Renamed(toy.Toy):
        def on_save_checkpoint(self, checkpoint):
            checkpoint["state_dict"] = stripped(checkpoint["state_dict"])

        def on_load_checkpoint(self, checkpoint):
            checkpoint["state_dict"] = {f"net.{key}": tensor for key, tensor in checkpoint["state_dict"].items()}

    first, ema = Renamed(), EMA(decay=0.9)
    trainer = toy.trainer(tmp_path, ema)
    trainer.fit(first)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    second, again = Renamed(), EMA(decay=0.9, test="both")
    later = toy.trainer(tmp_path, again, max_epochs=4)
    later.fit(second, ckpt_path=tmp_path / "a.ckpt")
    toy.close(again.average(), toy.ema_of([*first.points, *second.points], 0.9))
    later.test(second, ckpt_path=tmp_path / "a.ckpt", verbose=False)
    found = float(later.callback_metrics["test/loss_ema"])
    assert found == pytest.approx(toy.evaluate(first, ema.average()), rel=1e-5)


def test_an_average_of_another_module_is_not_tested(tmp_path, toy):
    ema = EMA(decay=0.9)
    trainer = toy.trainer(tmp_path, ema)
    trainer.fit(toy.Toy())
    trainer.save_checkpoint(tmp_path / "a.ckpt")

    class Smaller(toy.Toy):
        strict_loading = False

        def __init__(self):
            super().__init__()
            self.net = self.net[:1]

    with pytest.raises(WeightsError, match=r"holds 'net\.[12]\.weight'|has shape"):
        toy.trainer(tmp_path, EMA(test="average")).test(Smaller(), ckpt_path=tmp_path / "a.ckpt", verbose=False)


def test_lightnings_pruning_saves_the_masked_average(tmp_path, toy):
    from lightning.pytorch.callbacks import ModelPruning

    module, ema, swa = toy.Toy(norm=False), EMA(decay=0.9, validate="both"), SWA(start="0st", every="1st")
    pruning = ModelPruning("l1_unstructured", parameter_names=["weight"], amount=0.4, use_global_unstructured=True)
    save = toy.pl.callbacks.ModelCheckpoint(dirpath=tmp_path, filename="in_fit")  # while pruning is not permanent yet
    trainer = toy.trainer(tmp_path, pruning, ema, swa, save)
    trainer.fit(module)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert toy.same(load_averaged(tmp_path / "in_fit.ckpt"), load_averaged(tmp_path / "a.ckpt"))
    for name in ("ema", "swa"):
        found = load_averaged(tmp_path / "a.ckpt", name)
        assert found.keys() == toy.Toy(norm=False).state_dict().keys()
        assert not torch.equal(found["net.0.weight"], load_averaged(tmp_path / "a.ckpt", "raw")["net.0.weight"])
        mask = load_averaged(tmp_path / "a.ckpt", "raw")["net.0.weight"] != 0
        assert 0 < int(mask.sum()) < mask.numel() and torch.equal(found["net.0.weight"] != 0, mask)
    toy.Toy(norm=False).load_state_dict(load_averaged(tmp_path / "a.ckpt"))


def test_places_prefer_memory_then_names_then_values():
    tensors = {
        "a.weight": torch.zeros(2),
        "b.weight": torch.zeros(2),
        "c.bias": torch.ones(3),
        "d": torch.full((2,), torch.nan),
    }
    state = {
        "x": tensors["b.weight"], "a.weight": torch.zeros(2), "m.c.bias": torch.ones(3, dtype=torch.float16),
        "ghost": torch.zeros(2), "made": torch.rand(3), "nan": torch.full((2,), torch.nan), "text": "no tensor",
    }  # fmt: skip
    places = find_places(state, tensors)
    assert places.names == {"x": "b.weight", "a.weight": "a.weight", "m.c.bias": "c.bias", "nan": "d"}
    assert places.unknown == ["ghost", "made"]


def test_before_a_fit_apply_says_what_to_do():
    with pytest.raises(ConfigError, match=r"run trainer\.fit"):
        EMA().apply()
