import torch

from moslim.ops.numerics import derive_seed, uniforms


def test_seed_depends_on_every_key_and_their_order():
    seeds = {derive_seed(a, b, c) for a in range(12) for b in range(12) for c in range(12)}
    assert len(seeds) == 12**3
    assert derive_seed(1, 2) != derive_seed(2, 1)
    assert derive_seed(0) != derive_seed(0, 0)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_seeds_stay_what_they_were():
    """Another value would change every figure that was ever reported."""
    assert derive_seed(0, 1, 2) == 3763004081518053814


def test_a_row_does_not_depend_on_its_batch():
    seeds = torch.tensor([derive_seed(7, i) for i in range(6)])
    together = uniforms(seeds, 9)
    assert torch.equal(together[[4, 1]], uniforms(seeds[[4, 1]], 9))
    assert torch.equal(together[:, :3], uniforms(seeds, 3))


def test_numbers_are_uniform_and_independent():
    numbers = uniforms(torch.tensor([derive_seed(3, i) for i in range(200)]), 200)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = torch.histc(numbers, 10, 0, 1)
    chi_square = ((counts - 4000) ** 2 / 4000).sum()
    assert chi_square < 27.9  # 0.1% point of chi-square with 9 degrees of freedom
    for lagged in (numbers[:, 1:], numbers[1:]):
        plain = numbers[:, :-1] if lagged.shape == (200, 199) else numbers[:-1]
        assert torch.corrcoef(torch.stack([plain.flatten(), lagged.flatten()]))[0, 1].abs() < 0.02
