"""Find out how a DeepSpeed engine's model lies over ranks, which of them hold it together, and the layers of all of it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np

from grace_ds.comm.base import Comm
from grace_ds.comm.choose import share
from grace_ds.comm.within import SumWithin
from grace_ds.config.schema import GraceConfig
from grace_ds.data.sampler import Geometry
from grace_ds.errors import ConfigError
from grace_ds.gradients.collector import GradientCollector
from grace_ds.gradients.deepspeed_layers import select_autotp
from grace_ds.gradients.hooks import Sketcher
from grace_ds.gradients.layers import select_layers
from grace_ds.gradients.megatron_layers import select_parallel
from grace_ds.gradients.probe import is_embedding
from grace_ds.gradients.sharded_collector import ShardedGradientCollector
from grace_ds.integrations.engine import is_pipeline, shares_model
from grace_ds.recipes import recipe

log = logging.getLogger("grace_ds")


@dataclass(frozen=True)
class Layout:
    """How one model lies over ranks; each number is 1 where it does not.

    Attributes:
        sequence: ranks among which the tokens of a sample are shared out (Ulysses).
        tensor: ranks that hold parts of layers (AutoTP).
        tensor_rank: this rank among them.
        stages: of the pipeline.
    """

    sequence: int = 1
    tensor: int = 1
    tensor_rank: int = 0
    stages: int = 1

    @property
    def ranks(self) -> int:
        """Ranks that hold one model together."""
        return self.sequence * self.tensor * self.stages


def layout_of(engine: Any, config: GraceConfig) -> Layout:
    """Return how the engine's model lies over ranks.

    Raises:
        ConfigError: in a way whose layers cannot be read; on every rank.
    """
    import torch.distributed as dist

    if not shares_model(engine):
        return Layout()
    tensor = max(1, int(engine.autotp_size()))
    tensor_rank = 0
    if tensor > 1:
        from deepspeed.utils import groups

        tensor_rank = int(groups.get_tensor_model_parallel_rank())
    stages = int(engine.num_stages) if is_pipeline(engine) else 1
    layout = Layout(int(engine.sequence_parallel_size), tensor, tensor_rank, stages)
    together = dist.get_world_size() // engine.dp_world_size
    ways = [n for n in (layout.sequence, layout.tensor, layout.stages) if n > 1]
    if layout.ranks != together or len(ways) != 1:
        raise ConfigError(
            f"recipe: {config.recipe} reads models that lie over ranks by Ulysses, by AutoTP or by PipelineEngine, one of them "
            f"at a time; of this one {together} ranks hold a part: {layout.sequence} of a sequence, {layout.tensor} of layers "
            f"cut by AutoTP, {layout.stages} stages. Set recipe: {recipe(config.recipe).fallback}, which needs no gradient"
        )
    return layout


def sketcher_of(config: GraceConfig, engine: Any) -> Sketcher:
    """Make the sketcher of the layers that the config names, over the whole model.  Collective over all ranks.

    Raises:
        ConfigError: there is no layer to sketch, or the model lies over ranks in a way that cannot be read; on every rank.
    """
    layout, collect = layout_of(engine, config), config.collect
    if is_pipeline(engine):
        _check_start(engine)
        layers = select_parallel([engine.module], collect.layers, collect.exclude, 0, share, time_major=False)
    elif layout.tensor > 1:
        layers = select_autotp(engine.module, collect.layers, collect.exclude, layout.tensor_rank)
    else:
        layers = select_layers(engine.module, collect.layers, collect.exclude)
    log.info("sketching %d layers: %s … %s", len(layers), layers[0].name, layers[-1].name)
    return Sketcher(layers, config.seed, collect.dim, collect.rank, pipelined=is_pipeline(engine))


def _check_start(engine: Any) -> None:
    """Raise an error on every rank if a probe cannot begin in the pipeline's first stage."""
    begins = any(map(is_embedding, engine.module.modules())) or not engine.is_first_stage()
    if not all(share(begins)):
        raise ConfigError("the pipeline's first stage has no nn.Embedding, where a probe would begin; set recipe: content")


def collector_of(engine: Any, config: GraceConfig, sketcher: Sketcher, comm: Comm, geometry: Geometry) -> GradientCollector:
    """Return the collector of this rank's part of the model.  Collective over ``comm``, which holds all ranks.

    The first of the ranks that hold one model passes its rows on: of a pipeline the first stage, which loads the samples.
    """
    layout = layout_of(engine, config)
    if layout.ranks == 1 and not is_pipeline(engine):
        return GradientCollector(sketcher, config.collect)
    replica = comm.allgather(np.array([geometry.rank], np.int64))
    members = [rank for rank, theirs in enumerate(replica) if theirs[0] == geometry.rank]
    counts = layout.tensor_rank == 0  # all tensor-parallel ranks have the same losses
    return ShardedGradientCollector(sketcher, config.collect, SumWithin(comm, members), comm.rank == members[0], counts)
