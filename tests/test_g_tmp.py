import pytest, os, time
pytestmark = pytest.mark.xdist_group("split")
@pytest.mark.parametrize("a", ["tp=2:x", "dp=1", "c", "d"])
def test_a(a): time.sleep(0.5)
