"""Everything that is compared, by name: baselines from the literature, the system's own recipes, and the oracle."""

from __future__ import annotations

from benchmarks.selection.arms.attribution import Bergson
from benchmarks.selection.arms.base import Arm
from benchmarks.selection.arms.ceiling import CEILINGS, ContentUnique
from benchmarks.selection.arms.filters import DedupFilter, Dsir
from benchmarks.selection.arms.graph import D2Pruning, Density, Facility
from benchmarks.selection.arms.instep import DattriLlm
from benchmarks.selection.arms.lexical import Bm25, DsirLibrary, TokenFrequency
from benchmarks.selection.arms.offline import OfflineFilter
from benchmarks.selection.arms.scored import GradientNormTopK, LossTopK, RhoLoss
from benchmarks.selection.arms.simple import InfoBatch, Oracle, RepeatedRandom, StaticRandom, TrustedUpsample, Uniform
from benchmarks.selection.arms.system import RECIPES, system_arm

ARMS: dict[str, type[Arm]] = {
    "uniform": Uniform,
    "rs2": RepeatedRandom,
    "static_random": StaticRandom,
    "infobatch": InfoBatch,
    "loss_topk": LossTopK,
    "gradnorm_topk": GradientNormTopK,
    "facility": Facility,
    "d2": D2Pruning,
    "rho": RhoLoss,
    "density": Density,
    "dedup_filter": DedupFilter,
    "dsir": Dsir,
    "trusted_upsample": TrustedUpsample,
    "dattri": DattriLlm,
    "bergson": Bergson,
    "dsir_library": DsirLibrary,
    "offline": OfflineFilter,
    "bm25": Bm25,
    "token_frequency": TokenFrequency,
    "oracle": Oracle,
    **{name: system_arm(name) for name in RECIPES},
    "content_unique": ContentUnique,
}
SYSTEM = (*RECIPES, *CEILINGS)
