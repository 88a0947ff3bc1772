"""Language modelling: windows, causality, losses against their definition, and a model that learns."""

import lightning.pytorch as lightning
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

from soups.errors import DataError
from soups.tasks.language_modelling import (
    ALPHABET,
    LanguageModelling,
    Transformer,
    corpus,
    encode,
    huggingface_causal,
    mean_loss,
    random_windows,
    spread_windows,
    token_losses,
)


def test_the_corpus_is_cut_without_overlap() -> None:
    found = corpus("python", characters=5000)
    assert [len(found.train), len(found.heldout), len(found.test)] == [4250, 250, 500]
    assert int(torch.cat([found.train, found.heldout, found.test]).max()) < len(ALPHABET)
    with pytest.raises(DataError, match="did you mean 'python'"):
        corpus("pyton")


def test_windows() -> None:
    tokens = torch.arange(50)
    spread = spread_windows(tokens, 3, 9)
    assert spread[0].tolist() == list(range(10)) and spread[2].tolist() == list(range(40, 50))
    drawn = random_windows(tokens, 100, 9, 0, "a")
    assert torch.equal(drawn.places, random_windows(tokens, 100, 9, 0, "a").places)
    assert not torch.equal(drawn.places, random_windows(tokens, 100, 9, 0, "b").places)
    assert int(drawn.places.max()) <= 40 and all(len(drawn[number]) == 10 for number in range(100))
    with pytest.raises(DataError, match="has no window of 50"):
        random_windows(tokens, 1, 50, 0)


def test_a_token_is_predicted_from_those_before_it() -> None:
    model = Transformer(context=16).eval()
    tokens = torch.randint(len(ALPHABET), (2, 16), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % len(ALPHABET)
    with torch.inference_mode():
        first, second = model(tokens), model(changed)
    assert torch.allclose(first[:, :9], second[:, :9], atol=1e-6) and not torch.allclose(first[:, 9:], second[:, 9:])
    expected = -first.double().log_softmax(-1)[:, :-1].gather(2, tokens[:, 1:, None])[..., 0]
    assert torch.allclose(token_losses(model, tokens).double(), expected, atol=1e-5)
    state = torch.random.get_rng_state()
    assert torch.equal(Transformer(seed=3).head.weight, Transformer(seed=3).head.weight)
    assert torch.equal(state, torch.random.get_rng_state())


def test_training_lowers_the_loss_below_that_of_letter_frequencies() -> None:
    text = encode("the cat sat on the mat and the dog sat on the log. " * 40)
    model = Transformer(context=32, width=32, layers=1, heads=2)
    module = LanguageModelling(model, {"lr": 1e-2})
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    windows = random_windows(text, 16 * 60, 32, 0)
    trainer.fit(module, DataLoader(windows, batch_size=16), DataLoader(spread_windows(text, 32, 32), batch_size=16))
    counts = text.bincount().double()
    shares = counts[counts > 0] / counts.sum()
    letters = float(-(shares * shares.log()).sum())
    found = mean_loss(model, spread_windows(text, 32, 32), batch_size=5)
    assert found < letters / 4
    assert found == pytest.approx(float(trainer.callback_metrics["heldout/loss"]), abs=1e-4)
    rate = trainer.optimizers[0].param_groups[0]["lr"]
    assert rate == pytest.approx(1e-3, rel=0.2), "a tenth of the peak is left"


def test_a_hugging_face_model_takes_its_place(tmp_path) -> None:
    GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=16, n_layer=1, n_head=2, n_positions=32)).save_pretrained(tmp_path)
    model = huggingface_causal(str(tmp_path)).eval()
    losses = token_losses(model, torch.randint(97, (2, 17)))
    assert losses.shape == (2, 16) and losses.mean().item() == pytest.approx(4.57, abs=0.3)
