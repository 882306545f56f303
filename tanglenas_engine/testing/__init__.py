"""What a plugin must do, as checks to call from its own tests. They raise AssertionError with what is wrong.

from tanglenas_engine import create_space
from tanglenas_engine.testing import check_optimizer

def test_it_is_an_optimizer():
    check_optimizer(MyOptimizer, lambda: create_space("autoformer_nano"))
"""

from .optimizers import (
    check_gradients,
    check_optimizer,
    check_resume,
    check_sampling,
    check_stages,
    random_data,
    same,
)

__all__ = [
    "check_gradients",
    "check_optimizer",
    "check_resume",
    "check_sampling",
    "check_stages",
    "random_data",
    "same",
]
