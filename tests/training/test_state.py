"""A training's state on disk."""

from pathlib import Path

import torch

from training.state import load_state, read_counters, save_state


def test_state_survives_a_restart(tmp_path: Path) -> None:
    def fresh() -> tuple[torch.nn.Module, dict[str, torch.Tensor], list[torch.optim.Optimizer]]:
        model = torch.nn.Linear(3, 2)
        return (
            model,
            {n: p.detach().clone() for n, p in model.named_parameters()},
            [torch.optim.AdamW([model.bias]), torch.optim.Muon([model.weight])],
        )

    model, average, optimizers = fresh()
    model(torch.ones(3)).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    save_state(tmp_path / "state.safetensors", model, average, optimizers, {"step": 5, "seconds": 1.5})
    again, other, second = fresh()
    assert read_counters(tmp_path / "state.safetensors") == {"step": 5, "seconds": 1.5}
    load_state(tmp_path / "state.safetensors", again, other, second)
    torch.testing.assert_close(again.weight, model.weight)
    torch.testing.assert_close(other["bias"], average["bias"])
    for number, key, name in ((0, "exp_avg", "bias"), (0, "step", "bias"), (1, "momentum_buffer", "weight")):
        came = second[number].state[getattr(again, name)][key]
        torch.testing.assert_close(came, optimizers[number].state[getattr(model, name)][key])
    assert not list(tmp_path.glob("*.partial"))
