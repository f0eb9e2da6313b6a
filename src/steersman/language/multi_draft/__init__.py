"""Multi-draft speculative decoding: bounds on acceptance, verifiers, and a tree of drafts for ``generate``."""

from steersman.language.multi_draft.acceptance import acceptance, optimal_acceptance
from steersman.language.multi_draft.contexts import Contexts, contexts
from steersman.language.multi_draft.decoding import MultiDraft
from steersman.language.multi_draft.laws import SAMPLERS, VERIFIERS, draft
from steersman.language.multi_draft.recommendation import Plan, recommend
from steersman.language.multi_draft.verification import output_law, verify

__all__ = [
    "SAMPLERS",
    "VERIFIERS",
    "Contexts",
    "MultiDraft",
    "Plan",
    "acceptance",
    "contexts",
    "draft",
    "optimal_acceptance",
    "output_law",
    "recommend",
    "verify",
]
