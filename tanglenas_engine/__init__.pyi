# ruff: noqa: I001
"""The public surface of the engine, by kind of reader. Plugins import from here and `tanglenas_engine.testing` only."""

# Everyone.
from .errors import DivergedError as DivergedError
from .errors import TangleNASError as TangleNASError
from .errors import at_least as at_least
from .errors import positive as positive
from .errors import unknown as unknown
from .errors import within as within
from .plugins import create_dataset as create_dataset
from .plugins import create_objective as create_objective
from .plugins import create_optimizer as create_optimizer
from .plugins import create_space as create_space
from .plugins.hookspecs import hookimpl as hookimpl
from .runtime import strict_json as strict_json
from .runtime.files import write_atomic as write_atomic
from .runtime.foreign import blamed as blamed

# Authors of search spaces.
from . import elastic as elastic
from .conversion.elasticize import elasticize as elasticize
from .spaces import cells as cells
from .spaces.architecture import Architecture as Architecture
from .spaces.space import SearchSpace as SearchSpace
from .superposition.choice import Choice as Choice
from .superposition.size import Assignment as Assignment
from .superposition.size import Axis as Axis
from .superposition.size import Row as Row
from .superposition.size import Size as Size
from .superposition.size import combinations as combinations
from .superposition.size import make_divisible as make_divisible
from .superposition.size import stacked as stacked

# Authors of optimizers.
from .optimizers.optimizer import Batch as Batch
from .optimizers.optimizer import Optimizer as Optimizer
from .optimizers.optimizer import Source as Source
from .optimizers.optimizer import Step as Step
from .optimizers.optimizer import l2 as l2
from .elastic.parts import call_with as call_with
from .runtime.distributed import averaged as averaged
from .superposition.mixture import Mixture as Mixture

# Authors of datasets.
from .data.dataset import Dataset as Dataset
from .data.dataset import Described as Described
from .data.dataset import Samples as Samples
from .data.dataset import TensorSamples as TensorSamples
from .data.dataset import TokenSamples as TokenSamples
from .data.dataset import content_hash as content_hash
from .data.dataset import data_path as data_path

# Authors of objectives.
from .runtime.devices import device_of as device_of
from .runtime.progress import Line as Line
from .runtime.progress import Progress as Progress
from .runtime.progress import SilentProgress as SilentProgress
from .spaces.cost import Additive as Additive
from .spaces.cost import Cost as Cost
from .spaces.objective import Objective as Objective
from .tables.table import rank_correlations as rank_correlations

# Callers of the stages, and gin files that name their parts.
from .data.splits import make_splits as make_splits
from .data.splits import open_splits as open_splits
from .optimizers.stopping import EarlyStopping as EarlyStopping
from .spaces.pretrained import load_pretrained as load_pretrained
from .stages.discretize import discretize as discretize
from .stages.evaluate import evaluate as evaluate
from .stages.retrain import retrain as retrain
from .stages.search import search as search
from .training.losses import auxiliary as auxiliary
from .training.losses import cross_entropy as cross_entropy
from .training.optim import cosine as cosine
from .training.options import Computation as Computation
from .training.options import Session as Session
