"""Matrix PCA, refinement, grouping and the combinations, against what linear algebra says (masa, section 6)."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTModel

from textkv.masa import Sharing, export, groups_of, matrix_pca, parameters_of, share
from textkv.masa.grouping import cut, drift
from textkv.masa.refine import Rest, deal, factor


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tiny(layers=4, kv_heads=2, **options) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=kv_heads, max_position_embeddings=256, **options,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def logits(model, seed=0):
    ids = torch.randint(0, 60, (2, 12), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model(ids).logits


def test_atoms_are_orthonormal_and_the_residual_is_what_was_dropped():
    weights, last = drawn(5, 6, 7), float("inf")
    energy = torch.linalg.svdvals(weights.flatten(1).double()) ** 2
    for count in range(6):
        atoms, coefficients, residual = matrix_pca(weights, count)
        flat = atoms.flatten(1)
        torch.testing.assert_close(flat @ flat.T, torch.eye(count), atol=1e-5, rtol=0)
        missed = weights - torch.einsum("ls,soi->loi", coefficients, atoms)
        assert residual == pytest.approx(float(energy[count:].sum()), rel=1e-6, abs=1e-9)
        assert float((missed.double() ** 2).sum()) == pytest.approx(residual, rel=1e-4, abs=1e-8)
        assert residual <= last
        last = residual
    torch.testing.assert_close(torch.einsum("ls,soi->loi", coefficients, atoms), weights, atol=1e-5, rtol=1e-5)


def test_layers_that_are_alike_need_one_atom():
    same = drawn(6, 7)
    weights = torch.stack([same, 2 * same, -same])
    atoms, coefficients, residual = matrix_pca(weights, 2)
    assert residual < 1e-8 and not atoms[1].any()
    torch.testing.assert_close(coefficients[:, 0] / coefficients[0, 0], torch.tensor([1.0, 2.0, -1.0]))


def test_a_rest_of_full_rank_is_exact_and_whitening_beats_the_plain_svd_on_its_own_data():
    weight, inputs = drawn(5, 8), drawn(40, 8, seed=1) * torch.logspace(0, -2, 8)
    rest = Rest.of(weight, factor(inputs.T @ inputs / 40))
    left, right = (rest.left.float(), rest.right.float())
    torch.testing.assert_close(left @ right, weight, atol=1e-4, rtol=1e-4)
    u, s, vt = torch.linalg.svd(weight)
    for rank in range(1, 5):
        ours, plain = rest.cut(rank), (u[:, :rank] * s[:rank]) @ vt[:rank]
        error = [float((inputs @ (weight - w).T).norm()) for w in (ours[0] @ ours[1], plain)]
        assert error[0] <= error[1] + 1e-5


def test_inputs_that_span_less_than_their_space_can_be_factored():
    one = drawn(1, 8)
    root = factor(one.T @ one)
    assert bool(root.isfinite().all())
    with pytest.raises(ValueError, match="finite"):
        factor(torch.full((2, 2), float("nan")))


def test_ranks_go_where_they_take_most_away_for_what_they_cost():
    rests = [(torch.tensor([4.0, 1.0]), 2, 2), (torch.tensor([3.0, 2.9]), 1, 2)]
    # worth: 8, .5 against 9, 8.4
    assert deal(rests, 2) == [0, 2]
    assert deal(rests, 4) == [1, 2]
    assert deal(rests, 100) == [2, 2]
    with pytest.raises(ValueError, match="budget=-1"):
        deal(rests, -1)


def test_groups_are_cut_where_the_prediction_changes_most():
    assert cut([0.1, 9.0, 0.1, 0.2, 5.0, 0.1, 0.1], 3) == [(0, 2), (2, 5), (5, 8)]
    assert cut([1.0, 1.0, 1.0], 1) == [(0, 4)]
    p = torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log()
    assert drift(p)[0] == pytest.approx(0.5 * torch.tensor(2.0).log() + 0.5 * torch.tensor(2 / 3).log())
    for groups, says in ((3, "group of one layer"), (0, "use 1 to 2")):
        with pytest.raises(ValueError, match=says):
            cut([1.0, 1.0, 1.0], groups)


@pytest.mark.parametrize("how", ["network", "free", "sequential", "repeat"])
@pytest.mark.parametrize("projections", ["qkv", "qkvo"])
def test_the_parameters_are_those_of_the_formula_and_exported_they_compute_the_same(how, projections):
    model = share(tiny(), Sharing(atoms=2, projections=projections, coefficients=how))
    before = logits(model)
    groups = groups_of(model)
    shapes = {"q": (32, 32), "k": (16, 32), "v": (16, 32), "o": (32, 32)}
    sharing = Sharing(atoms=2, projections=projections)
    kept = sum(4 * d * h for letter, (d, h) in shapes.items() if letter not in projections)
    assert sum(group.parameters for group in groups) + kept == parameters_of(sharing, 4, shapes)
    plain = export(model)
    torch.testing.assert_close(logits(plain), before, atol=1e-5, rtol=1e-5)
    assert set(plain.state_dict()) == set(tiny().state_dict())


def test_sequential_and_repeat_are_one_hot():
    for how, chosen in (("sequential", [0, 0, 1, 1]), ("repeat", [0, 1, 0, 1])):
        group = groups_of(share(tiny(), Sharing(atoms=2, coefficients=how)))[0]
        assert group.coefficients.argmax(1).tolist() == chosen and group.coefficients.sum(1).tolist() == [1.0] * 4


@pytest.mark.parametrize("how", ["network", "free", "sequential"])
def test_atoms_learn_and_what_is_fixed_stays(how):
    model = share(tiny(), Sharing(atoms=2, rank=1, coefficients=how)).train()
    before = groups_of(model)[0]
    before = before.atoms.clone(), before.coefficients.clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.5)
    ids = torch.randint(0, 60, (2, 12))
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    after = groups_of(model)[0]
    assert not torch.equal(after.atoms, before[0])
    assert torch.equal(after.coefficients, before[1]) == (how == "sequential")


def test_a_vision_transformer_shares_learns_and_exports():
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=8
    )
    model = ViTModel(config).eval()
    whole = sum(p.numel() for p in model.parameters())
    share(model, Sharing(atoms=2))
    kept = parameters_of(Sharing(atoms=2), 4, dict.fromkeys("qkvo", (32, 32)))
    assert sum(group.parameters for group in groups_of(model)) == kept
    picture, first = drawn(1, 3, 16, 16), groups_of(model)[0].atoms.clone()
    model(picture).last_hidden_state.square().mean().backward()
    torch.optim.SGD([p for p in model.parameters() if p.grad is not None], 0.5).step()
    assert not torch.equal(groups_of(model)[0].atoms, first)
    with torch.no_grad():
        before = model(picture).last_hidden_state
        torch.testing.assert_close(export(model)(picture).last_hidden_state, before, atol=1e-5, rtol=1e-5)
    assert sum(p.numel() for p in model.parameters()) == whole


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (dict(atoms=-1), "atoms=-1"),
        (dict(), "leave nothing"),
        (dict(atoms=1, projections="qkx"), "qkvo"),
        (dict(atoms=1, projections=""), "qkvo"),
        (dict(atoms=1, coefficients="some"), "network"),
    ],
)
def test_settings_that_cannot_be_are_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        Sharing(**wrong)


def test_models_that_cannot_be_shared_are_refused_and_left_as_they_were():
    with pytest.raises(ValueError, match="atoms=5 is more than the 4 layers"):
        share(tiny(), Sharing(atoms=5))
    with pytest.raises(ValueError, match="group of one layer"):
        share(tiny(layers=1), Sharing(atoms=1))
    broken = tiny()
    broken.model.layers[2].self_attn.k_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layers.2.*k_proj.*not finite"):
        share(broken, Sharing(atoms=2))
    other = tiny()
    other.model.layers[1].self_attn.q_proj = torch.nn.Linear(32, 16)
    with pytest.raises(ValueError, match="only layers of one shape"):
        share(other, Sharing(atoms=2))
    assert not groups_of(other)
    twice = share(tiny(), Sharing(atoms=2))
    with pytest.raises(ValueError, match="parametrised already"):
        share(twice, Sharing(atoms=2))
