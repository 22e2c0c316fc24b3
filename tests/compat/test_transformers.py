"""transformers with peft: LoRA in a small GPT-2, whose state dict is the adapter's alone and under peft's own names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

pytest.importorskip("transformers", reason='pip install "lightning_fed[compat]"')
pytest.importorskip("peft", reason='pip install "lightning_fed[compat]"')

from peft import (
    LoraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from transformers import BatchEncoding, GPT2Config, GPT2LMHeadModel, get_linear_schedule_with_warmup

from lightning_fed.callbacks import FedAdam, Partition, TrainableOnly
from tests.callbacks.listening import Listens
from tests.compat.runs import (
    CLIENTS,
    ENGINES,
    ROUNDS,
    Outcome,
    assert_same,
    moved,
    one_round_of_one_client,
    run,
    stopped_run,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

LENGTH = 16


class Writer(L.LightningModule):
    """A GPT-2 with LoRA, AdamW and a linear schedule with warm-up over the whole training."""

    def __init__(self) -> None:
        super().__init__()
        config = GPT2Config(
            vocab_size=128, n_positions=LENGTH, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
        )
        lora = LoraConfig(
            r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["c_attn"], task_type="CAUSAL_LM", fan_in_fan_out=True
        )
        self.model = get_peft_model(GPT2LMHeadModel(config), lora)

    def training_step(self, batch: BatchEncoding, batch_idx: int) -> torch.Tensor:
        loss = self.model(**batch).loss
        self.log("train_loss", loss, on_step=False, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch: BatchEncoding, batch_idx: int) -> None:
        self.log("val_loss", self.model(**batch).loss)

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = get_linear_schedule_with_warmup(optimizer, steps // 4, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class AdapterOnly(Writer):
    """Saves and loads the adapter alone, as peft's own checkpoints do: under other names than the parameters'."""

    def __init__(self) -> None:
        super().__init__()
        self.strict_loading = False

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        return get_peft_model_state_dict(self.model)

    def load_state_dict(self, state_dict: dict[str, torch.Tensor], strict: bool = True, **kwargs: Any) -> None:
        set_peft_model_state_dict(self.model, dict(state_dict))


class Text(L.LightningDataModule):
    """Lines of text, a byte a token, as transformers' collators give batches."""

    def prepare_data(self) -> None:
        words = ["the", "server", "asks", "each", "client", "for", "weights", "and", "none", "for", "data"]
        self.lines = [" ".join(words[(i * j + j) % len(words)] for j in range(1, 6)) for i in range(44)]

    def setup(self, stage: str) -> None:
        rows = [{"input_ids": list(line.encode()[:LENGTH])} for line in self.lines]
        self.train, self.val = rows[:36], rows[36:]

    def train_dataloader(self) -> torch.utils.data.DataLoader:
        return torch.utils.data.DataLoader(self.train, batch_size=4, shuffle=True, collate_fn=collate)

    def val_dataloader(self) -> torch.utils.data.DataLoader:
        return torch.utils.data.DataLoader(self.val, batch_size=4, collate_fn=collate)


def collate(rows: list[dict[str, list[int]]]) -> BatchEncoding:
    ids = torch.tensor([row["input_ids"] for row in rows])
    return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})


class Case:
    """A module, and what aggregates its weights."""

    def __init__(self, module: type[Writer], adam: bool) -> None:
        self.module, self.adam = module, adam

    def build(self) -> tuple[L.LightningModule, dict[str, Any]]:
        return self.module(), {"datamodule": Text()}

    def callbacks(self) -> list[Any]:
        return [Partition(CLIENTS, val_fraction=0.25), *([FedAdam(learning_rate=0.05, tau=0.1)] if self.adam else [])]


CASES = {
    "all weights": (Writer, False),
    "adapter alone": (AdapterOnly, False),
    "adapter alone, FedAdam": (AdapterOnly, True),
}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(*CASES[request.param])


@pytest.fixture(scope="module")
def expected(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """The run that all others have to be like."""
    return run(case.build, tmp_path_factory.mktemp("expected"), *case.callbacks())


def test_the_adapter_alone_is_trained(case: Case, expected: Outcome) -> None:
    changed = moved(expected, case.build)
    trained = {name for name, parameter in case.module().named_parameters() if parameter.requires_grad}
    assert changed == trained
    assert all("lora_" in name for name in changed)
    assert expected.rows[-1]["val_loss"] < expected.rows[0]["val_loss"]
    assert len(expected.rows) == ROUNDS
    assert "clients/val_loss" in expected.rows[0]


def test_another_seed_is_another_run(case: Case, expected: Outcome, tmp_path: Path) -> None:
    """What the tests below compare does depend on what is drawn."""
    with pytest.raises(AssertionError):
        assert_same(run(case.build, tmp_path, *case.callbacks(), seed=1), expected)


def test_one_client_in_one_round_is_a_plain_trainer(case: Case, tmp_path: Path) -> None:
    ours, plain = one_round_of_one_client(case.build, tmp_path)
    torch.testing.assert_close(ours, plain, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_trains_it_to_the_same_bits(case: Case, engine: str, expected: Outcome, tmp_path: Path) -> None:
    assert_same(run(case.build, tmp_path, *case.callbacks(), engine=ENGINES[engine]()), expected)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_stopped_run_goes_on_to_the_same_bits(case: Case, engine: str, expected: Outcome, tmp_path: Path) -> None:
    checkpoint = stopped_run(case.build, tmp_path, *case.callbacks(), engine=ENGINES[engine]())
    resumed = run(case.build, tmp_path, *case.callbacks(), engine=ENGINES[engine](), ckpt_path=checkpoint)
    assert_same(resumed, expected)


def test_names_that_differ_from_the_parameters_do_not_change_the_method(tmp_path: Path) -> None:
    """A server optimizer steps the same parameters whether the state dict has peft's names or the module's own."""
    whole, adapter = Case(Writer, adam=True), Case(AdapterOnly, adam=True)
    assert_same(
        run(adapter.build, tmp_path / "adapter", *adapter.callbacks()),
        run(whole.build, tmp_path / "whole", *whole.callbacks()),
    )


def test_of_lora_only_the_adapters_are_sent(expected: Outcome, case: Case, tmp_path: Path) -> None:
    """And the run is the one in which all weights travel, bit for bit."""
    if case.module is not Writer:
        pytest.skip("its state dict is the adapter alone")
    listens = Listens()
    found = run(case.build, tmp_path, *case.callbacks(), TrainableOnly(), engine=listens)
    for name, tensor in expected.state.items():
        assert torch.equal(found.state[name], tensor)
    module = Writer()
    adapters = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert adapters
    assert all("lora" in name for name in adapters)
    assert len(listens.heard) > 2 * CLIENTS * ROUNDS
    assert {name for message, _ in listens.heard for name in message.content.get("arrays", {})} == adapters
    base = module.model.base_model.model.transformer.wte.weight.detach().numpy().tobytes()
    assert not [message for message, data in listens.heard if base[:64] in data]
    size = sum(parameter.nbytes for parameter in module.parameters() if parameter.requires_grad)
    assert [row["bytes/up"] for row in found.rows] == [CLIENTS * size] * ROUNDS
