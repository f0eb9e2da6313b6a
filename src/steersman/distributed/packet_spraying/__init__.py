"""Single-path planning instead of packet spraying, for collectives on leaf-spine fabrics.

fabric = LeafSpine(leaves=16, spines=16, hosts=16)
job = collective("all_to_all", place(fabric), "64MB", form="permutation")
evaluate(fabric, job, policy("ecmp")).bound / evaluate(fabric, job, policy("spray")).bound    # 5.2
evaluate(fabric, job, SinglePathPlanner()).pieces                                             # no flow is split
"""

from steersman.distributed.packet_spraying.collectives import (
    COLLECTIVES,
    PLACEMENTS,
    Step,
    collective,
    parse_bytes,
    place,
)
from steersman.distributed.packet_spraying.fabric import LeafSpine
from steersman.distributed.packet_spraying.jobs import Call, Job, load_job
from steersman.distributed.packet_spraying.load import LOCAL, SPREAD, Assignment, Loads, loads
from steersman.distributed.packet_spraying.policies import (
    PLANS,
    Ecmp,
    Policy,
    SinglePath,
    SinglePathPlanner,
    Spray,
    policy,
)
from steersman.distributed.packet_spraying.routes import nccl_settings, source_ports, spine_of, write_table
from steersman.distributed.packet_spraying.simulate import (
    Evaluation,
    completion,
    congestion,
    evaluate,
    fair_rates,
    ideal,
    progressive_filling,
)

__all__ = [
    "COLLECTIVES",
    "LOCAL",
    "PLACEMENTS",
    "PLANS",
    "SPREAD",
    "Assignment",
    "Call",
    "Ecmp",
    "Evaluation",
    "Job",
    "LeafSpine",
    "Loads",
    "Policy",
    "SinglePath",
    "SinglePathPlanner",
    "Spray",
    "Step",
    "collective",
    "completion",
    "congestion",
    "evaluate",
    "fair_rates",
    "ideal",
    "load_job",
    "loads",
    "nccl_settings",
    "parse_bytes",
    "place",
    "policy",
    "progressive_filling",
    "source_ports",
    "spine_of",
    "write_table",
]
