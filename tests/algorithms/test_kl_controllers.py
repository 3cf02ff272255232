import pytest

from moslim.algorithms.functional import AdaptiveKL


def test_the_factor_follows_the_divergence():
    controller = AdaptiveKL(target=4.0, gain=0.5)
    factor = 1.0
    for found, step in ((4.0, 1.0), (4.4, 1.05), (100.0, 1.1), (0.0, 0.9), (3.6, 0.95)):
        controller.observe(found)  # errors 0, 0.1, then clipped: 0.2, -0.2, and -0.1
        factor *= step
        assert controller.factor == pytest.approx(factor)


def test_its_state_comes_back():
    one, other = AdaptiveKL(), AdaptiveKL()
    one.observe(100.0)
    other.load_state_dict(one.state_dict())
    assert other.factor == one.factor == pytest.approx(1.02)


@pytest.mark.parametrize("options", [{"target": 0.0}, {"gain": 0.0}, {"gain": 5.0}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="give a target above 0, a gain in"):
        AdaptiveKL(**options)
